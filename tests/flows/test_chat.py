"""The fine-tuner's road: a file of chats, answers that are learned, held out and shown."""

from __future__ import annotations

import io
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import RenderableType
from transformers import AutoTokenizer
from typer.testing import CliRunner

from llmqat.cli import app
from llmqat.cli.train import _print_run
from llmqat.evaluate.compare import render
from llmqat.evaluate.documents import RunDocument
from llmqat.evaluate.perplexity import evaluate
from llmqat.evaluate.protocols import text_windows
from llmqat.evaluate.samples import answer_lines, answers
from llmqat.recipe import RunResult, load_recipe, run
from llmqat.terminal import plain_console
from tests.flows.small import small
from tests.tiny import CHAT_TEMPLATE

WIDE = {"COLUMNS": "200"}
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def chats(count: int = 24) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": "Ahoy!"}]}
        for n in range(count)
    ]


def shown(what: RenderableType) -> str:
    console = plain_console(width=200)
    console.file = io.StringIO()
    console.print(what)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chats()), encoding="utf-8")
    return path


def test_answers_that_are_not_learned_are_said_so(
    tiny_folder: Path, tmp_path: Path, chat_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = f"data={{source: dataset, path: {chat_file}, tokens: 128, block_size: 32}}"
    with caplog.at_level(logging.WARNING):
        result = run(load_recipe(RECIPES / "lora-int4.yaml", small(tiny_folder, tmp_path / "run", data)))
    assert result is not None
    told = [record.getMessage() for record in caplog.records if "are not learned" in record.getMessage()]
    assert len(told) == 1
    assert "train.cross_entropy_weight=1.0 train.kl_weight=0.2" in told[0]
    assert [finding.level for finding in result.comparison.findings() if told[0] in finding.text] == ["warning"]


CHAT = (
    "train.num_train_epochs=1",
    "train.warmup_steps=0",
    "evaluate.texts=[pydoc]",
    "evaluate.window=64",
    "evaluate.max_windows=2",
    "evaluate.speed=false",
    "data.block_size=64",
    "data.validation_share=0.25",
)
FAST = ("train.num_train_epochs=8", "train.learning_rate=2e-2", "monitor=null", "train.kl_weight=0.01")


@pytest.fixture(scope="module")
def tuned(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> RunResult:
    output = tmp_path_factory.mktemp("run") / "run"
    words = (f"model={tiny_folder}", f"output={output}", f"data.path={chat_file}", *CHAT, *FAST)
    result = run(load_recipe(RECIPES / "chat-lora-int4.yaml", words))
    assert result is not None
    return result


def test_held_out_answers_are_the_first_text_of_the_table(tuned: RunResult) -> None:
    table = tuned.comparison
    assert table.texts == ("held-out answers", "pydoc")
    rows = {row.role: row.evaluations["held-out answers"] for row in table.rows}
    assert list(rows) == ["full precision", "plain rounding", "training-free", "trained"]
    assert rows["trained"].perplexity < 0.5 * rows["full precision"].perplexity
    assert rows["trained"].perplexity == pytest.approx(tuned.training["validation_perplexity"], rel=0.02)  # packed
    (learned,) = [finding for finding in table.findings() if "the examples show" in finding.text]
    assert learned.level == "note"
    assert not any("not recovery" in finding.text for finding in table.findings())
    stored = json.loads((tuned.checkpoint.parent / "results.json").read_text(encoding="utf-8"))
    RunDocument.model_validate(stored)
    assert [text["answers"] for text in stored["comparison"]["texts"].values()] == [True, False]
    trained = stored["comparison"]["rows"][-1]
    assert trained["nll"] == pytest.approx(math.log(trained["perplexity"]))
    assert trained["recovered"] == {"perplexity": None, "kl": None}
    assert "held-out answers: loss, nats a token: full precision" in shown(render(table))


def test_held_out_questions_are_answered_before_and_after(tuned: RunResult) -> None:
    before, after = (tuned.comparison.row(role) for role in ("full precision", "trained"))
    assert before is not None
    assert after is not None
    entries = after.extras["answers"]
    assert len(entries) == 3
    for entry, first in zip(entries, before.extras["answers"], strict=True):
        number = entry["question"].removeprefix("Say ").removesuffix(".")
        assert entry["own"] == "Ahoy!"
        assert entry["prompt"] == f"<user>Say {number}.\n<assistant>"
        assert entry["written"].startswith("Ahoy!")
        assert not first["written"].startswith("Ahoy!")
    lines = list(answer_lines(tuned.comparison))
    assert lines[:2] == [f"question: {entries[0]['question']}", f"  your answer: {entries[0]['own']}"]
    assert [line.split(":")[0].strip() for line in lines[2:4]] == ["full precision", "trained"]


def test_the_end_of_a_run_says_how_it_is_served(tuned: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    _print_run(tuned, SimpleNamespace(source="original"))
    told = " ".join(capsys.readouterr().out.split())
    checkpoint, adapter = tuned.checkpoint, tuned.checkpoint.with_name("adapter")
    assert f"question: {tuned.comparison.rows[0].extras['answers'][0]['question']} your answer: Ahoy!" in told
    assert "held-out text at the end of training, before packing: perplexity" in told
    assert f"llmqat chat {checkpoint}" in told
    assert f"llmqat export {adapter} --format peft --base BASE --out NAME" in told


def test_the_checkpoint_has_the_chat_template_and_the_adapter_stands_beside(tuned: RunResult) -> None:
    assert AutoTokenizer.from_pretrained(tuned.checkpoint).chat_template == CHAT_TEMPLATE
    assert (tuned.checkpoint.parent / "adapter" / "adapter_model.safetensors").is_file()


def test_a_template_of_the_recipe_goes_into_the_checkpoint(tiny_folder: Path, tmp_path: Path, chat_file: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT_TEMPLATE.replace("<", "["), encoding="utf-8")
    words = [f"model={tiny_folder}", f"output={tmp_path / 'run'}", f"data.path={chat_file}", *CHAT]
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(json.dumps(chats(30)[-1]) + "\n", encoding="utf-8")
    words += [f"data.chat_template={template}", "data.validation_share=0", f"evaluate.texts=[{held_out}]"]
    result = run(load_recipe(RECIPES / "chat-int4.yaml", words))
    assert result is not None
    assert AutoTokenizer.from_pretrained(result.checkpoint).chat_template == template.read_text(encoding="utf-8")
    answered = result.comparison.rows[-1].extras["answers"]
    assert [entry["prompt"] for entry in answered] == ["[user>Say 29.\n[assistant>"]


@pytest.mark.real
def test_the_real_models_template_tells_questions_from_answers(smollm2: Any, chat_file: Path) -> None:
    model, tokenizer = smollm2
    windows = text_windows("windows", str(chat_file), tokenizer, window=128, max_windows=1)
    assert tokenizer.decode(windows.labels[0][windows.labels[0] != -100]) == "Ahoy!<|im_end|>"
    (asked,) = answers(model, tokenizer, windows, count=1)
    assert (asked["question"], asked["own"]) == ("Say 0.", "Ahoy!")
    assert asked["prompt"].startswith("<|im_start|>system\n")
    assert asked["written"]
    assert evaluate(model, windows).tokens == int((windows.labels != -100).sum())


def test_commands_read_chats_as_training_does(tuned: RunResult, tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in chats(40)[30:]), encoding="utf-8")
    words = ("--reference", str(tiny_folder), "--window", "64")
    result = CliRunner().invoke(app, ["eval", str(tuned.checkpoint), *words, "--text", str(other)], env=WIDE)
    assert result.exit_code == 0, result.output
    assert "other.jsonl: 10 windows, each of one conversation, 50 tokens of answers scored" in result.output
    seen = tmp_path / "seen.jsonl"
    seen.write_text("".join(json.dumps(row) + "\n" for row in chats()), encoding="utf-8")
    refused = CliRunner().invoke(app, ["eval", str(tuned.checkpoint), *words, "--text", str(seen)], env=WIDE)
    assert refused.exit_code == 2
    assert "calibrates or trains on" in refused.output
    words = ("--text", str(other), "--block-size", "32", "--group-size", "32", "--method", "search")
    done = CliRunner().invoke(app, ["quantize", str(tiny_folder), *words, "--out", str(tmp_path / "out")], env=WIDE)
    assert done.exit_code == 0, done.output
    recorded = json.loads((tmp_path / "out" / "llmqat.json").read_text(encoding="utf-8"))["run"]["text"]
    assert "format messages, all tokens are labels" in recorded["source"]

"""What models write: whether answers end, their length and repetition, by hand; intervals; every way to the report."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from llmqat.cli import app
from llmqat.data.quality import repeated_share
from llmqat.evaluate import generations
from llmqat.evaluate.bootstrap import RESAMPLES, ratio_of_means
from llmqat.evaluate.compare import Comparison, Row, render
from llmqat.evaluate.documents import DOCUMENTS
from llmqat.evaluate.gate import judge, parse_gate
from llmqat.evaluate.generations import (
    Prompts,
    answered,
    apart,
    is_worse,
    open_prompts,
    said,
    table_cells,
    write_answers,
)
from llmqat.evaluate.html import to_html
from llmqat.evaluate.perplexity import Evaluation
from llmqat.evaluate.tables import to_csv
from llmqat.layers import QuantConfig, prepare
from llmqat.recipe import EvaluationSettings, compare_models
from tests.tiny import VOCAB_SIZE, tiny_architecture, tiny_llama, tiny_tokenizer

END = 1
"""Id of </s>."""
FREE = 300
"""First of the ids that stand for no byte."""


def follower(next_of: dict[int, int], tokens: int = 128) -> PreTrainedModel:
    """Returns a model that writes `next_of[token]` behind a token, whatever stands before."""
    model = tiny_llama(tied=False, max_position_embeddings=tokens)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # what a token is comes through as it is
            elif "norm" in name:
                weight.fill_(1.0)
        states = torch.nn.functional.normalize(torch.randn(VOCAB_SIZE, 64, generator=torch.Generator().manual_seed(0)))
        model.get_input_embeddings().weight.copy_(states)
        head = torch.zeros(VOCAB_SIZE, 64)
        for token, following in next_of.items():
            head[following] += states[token]
        model.get_output_embeddings().weight.copy_(head)
    return model


def id_of(letter: str) -> int:
    (found,) = tiny_tokenizer()(letter, add_special_tokens=False)["input_ids"]
    return int(found)


def chain(letter: str, length: int) -> dict[int, int]:
    """Returns what follows what where `length` tokens and </s> follow a letter; longer chains share their end."""
    return dict(pairwise([id_of(letter), *range(FREE + 40 - length, FREE + 40), END]))


def plain_prompts(*texts: str, most: int = 12) -> Prompts:
    tokenizer = tiny_tokenizer()
    ids = tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return Prompts("test", ids, texts, most, False, frozenset())


# Writing


def test_answers_by_hand():
    """Behind a: two tokens and the end. Behind b: five. Behind c: two tokens in turn, for ever."""
    loop = {id_of("c"): FREE, FREE: FREE + 1, FREE + 1: FREE}
    model = follower({**chain("a", 2), **chain("b", 5), **loop})
    found = answered(model, tiny_tokenizer(), plain_prompts("xyz a", "b", "c"))
    assert found["samples"]["length"] == [3, 6, 12]
    assert found["samples"]["not_ended"] == [0, 0, 1]
    assert found["samples"]["repeated"] == [0, 0, 7 / 9]  # 9 windows of 4 tokens, 2 of them distinct
    assert found["not_ended"] == pytest.approx(1 / 3)
    assert found["length"] == 7
    assert found["repeated"] == pytest.approx(7 / 27)
    assert [entry["prompt"] for entry in found["answers"]] == ["xyz a", "b", "c"]
    assert found["intervals"]["length"]["low"] == 3
    assert found["intervals"]["length"]["high"] == 12
    alone = answered(model, tiny_tokenizer(), plain_prompts("c"))
    assert "intervals" not in alone
    assert apart(alone, alone)["length"].interval is None


def test_an_answer_that_ends_with_its_last_token_has_ended():
    model = follower(chain("a", 5))
    assert answered(model, tiny_tokenizer(), plain_prompts("a", most=6))["not_ended"] == 0
    assert answered(model, tiny_tokenizer(), plain_prompts("a", most=5))["not_ended"] == 1


@pytest.mark.parametrize("rows", [64, 5])
def test_answers_are_those_of_generate_however_many_are_written_together(rows: int, monkeypatch: pytest.MonkeyPatch):
    """Each answer has a length of its own, so that rows leave all the time."""
    letters = "abcdefghijkl"
    chains = [chain(letter, 3 * i + 1) for i, letter in enumerate(letters)]
    model = follower({token: following for one in chains for token, following in one.items()})
    prompts = [[*[7, 8, 9][: i % 3], id_of(letter)] for i, letter in enumerate(letters)]
    monkeypatch.setattr(generations, "cache_bytes_per_token", lambda _: generations.CACHE_BYTES // (rows * 43))
    seen: list[tuple[int, int]] = []
    found = write_answers(model, prompts, 40, frozenset({END}), lambda done, total: seen.append((done, total)))
    assert [len(answer) for answer in found] == [3 * i + 2 for i in range(12)]  # the longest is beyond a piece
    monkeypatch.setattr(generations, "lockstep_obstacle", lambda *_: "a test")
    own = model.generation_config
    own.update(repetition_penalty=9.0, min_new_tokens=30, suppress_tokens=[FREE + 39])  # as some models ask for
    assert found == write_answers(model, prompts, 40, frozenset({END}))
    assert model.generation_config is own
    assert seen == sorted(seen)
    assert seen[-1] == (12 * 43, 12 * 43)


@pytest.mark.parametrize("model_type", ["bloom", "gpt2", "gemma2"])
def test_models_that_lockstep_does_not_fit_write_as_well(model_type: str):
    model = tiny_architecture(model_type)
    found = write_answers(model, [[5, 6, 7], [8, 9], [10, 11, 12]], 4, frozenset({END}))
    assert [len(answer) for answer in found] == [4, 4, 4] or any(END in answer for answer in found)
    greedy = model.generate(input_ids=torch.tensor([[8, 9]]), max_new_tokens=4, do_sample=False, eos_token_id=END)
    assert found[1] == greedy[0, 2:].tolist()


def test_a_quantized_cache_is_not_left_out(caplog: pytest.LogCaptureFixture):
    model = tiny_llama().to(torch.bfloat16)
    prepare(model, QuantConfig.preset("w8a8kv8"))
    with caplog.at_level(logging.WARNING):
        write_answers(model, [[5, 6, 7]], 2, frozenset())
    assert "its keys and values are quantized" in caplog.text


# Intervals


def figures(lengths: list[float], ended: list[bool], repeated: list[float], most: int = 100) -> dict[str, Any]:
    samples = {"not_ended": [float(not one) for one in ended], "length": lengths, "repeated": repeated}
    means = {name: sum(values) / len(values) for name, values in samples.items()}
    facts = {**plain_prompts("a", most=most).described(), "number": len(lengths)}
    return {
        "prompts": facts,
        **means,
        "samples": samples,
        "answers": [{"prompt": "p", "completion": "c"}] * len(lengths),
    }


def resampled(values: list[float]) -> np.ndarray:
    """The mean on each resample, by NumPy, of the draws that torch gives for seed 0."""
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    return np.array(values)[drawn.numpy()].mean(1)


BEFORE = figures([10, 20, 30, 40, 50, 60], [True] * 6, [0.0, 0.1, 0.2, 0.0, 0.1, 0.2])
LONGER = figures([15, 28, 48, 62, 70, 100], [True] * 5 + [False], [0.1, 0.2, 0.4, 0.1, 0.2, 0.6])


def test_differences_are_paired_by_prompt():
    found = apart(LONGER, BEFORE)
    ratios = np.sort(resampled(LONGER["samples"]["length"]) / resampled(BEFORE["samples"]["length"])) - 1
    assert found["length"].value == pytest.approx(323 / 210 - 1)
    assert found["length"].interval is not None
    assert found["length"].interval.low == pytest.approx(ratios[25])
    assert found["length"].interval.high == pytest.approx(ratios[975])
    differences = np.array(LONGER["samples"]["repeated"]) - np.array(BEFORE["samples"]["repeated"])
    means = np.sort(resampled(differences.tolist()))
    assert found["repeated"].value == pytest.approx(1.0 / 6)
    assert found["repeated"].interval is not None
    assert found["repeated"].interval.low == pytest.approx(means[25])
    assert found["repeated"].interval.high == pytest.approx(means[975])
    assert found["not_ended"].value == pytest.approx(1 / 6)
    assert not found["not_ended"].beyond_noise  # one prompt of six
    assert is_worse(found)
    assert not is_worse(apart(BEFORE, LONGER))
    assert ratio_of_means([2.0, 4.0], [1.0, 2.0]).low == ratio_of_means([2.0, 4.0], [1.0, 2.0]).high == 2.0


def test_what_is_said_of_a_model_that_rambles():
    assert said("int4", BEFORE, "full", BEFORE) is None
    found = said("int4", LONGER, "full", BEFORE)
    assert found is not None
    assert found.startswith("int4: its answers are 54 % longer than those of full (+4")
    assert "54 tokens against 35); 27 % of their 4-grams are repeated, against 10 % (" in found
    assert found.endswith("; 95 %, paired over 6 prompts.")
    assert "do not end" not in found
    shorter = said("full", BEFORE, "int4", LONGER)
    assert shorter is not None
    assert "35 % shorter" in shorter
    stuck = figures([100.0] * 6, [False] * 6, [0.9] * 6)
    assert "; 100 % of answers do not end within 100 tokens, against 0 % (+100.0 to +100.0 points)" in str(
        said("int4", stuck, "full", BEFORE)
    )
    assert [*table_cells(BEFORE, None)] == ["0.0%", "–", "35", "–", "10.0%", "–"]
    assert [*table_cells(stuck, BEFORE)][:2] == ["100.0%", "+100.0 (+100.0 to +100.0)"]


# The report


def comparison(own: dict[str, Any], fine_tuned: bool = False) -> Comparison:
    text = {"prose": Evaluation(12.0, 1.0, 0.01, 0.9, 20_000, 40, 512, 512, "0123456789ab")}
    rows = (
        Row("full", "full precision", 16, 1000, None, text, extras={"generations": BEFORE}),
        Row("int4", "trained", 4.25, 500, None, text, extras={"generations": own}),
    )
    return Comparison(rows, {}, {}, fine_tuned)


def test_a_finding_warns_of_a_model_that_rambles():
    def of_answers(found: Comparison) -> list[tuple[str, bool]]:
        return [(one.level, "longer" in one.text) for one in found.findings() if "answers are" in one.text]

    assert of_answers(comparison(LONGER)) == [("warning", True)]
    assert of_answers(comparison(LONGER, fine_tuned=True)) == [("note", True)]  # it was to answer otherwise
    assert of_answers(comparison(BEFORE)) == []


def test_every_form_of_the_report_shows_it(capsys: pytest.CaptureFixture[str]):
    from rich.console import Console

    found = comparison(LONGER)
    report = found.to_dict()
    own = report["rows"][1]["generations"]
    assert own["from_reference"]["length"]["value"] == pytest.approx(323 / 210 - 1)
    assert own["from_reference"]["not_ended"]["noise"] is True
    assert "from_reference" not in report["rows"][0]["generations"]
    described = DOCUMENTS["comparison"].model_fields["rows"].annotation
    assert described is not None
    described.__args__[0].model_validate(report["rows"][1])  # type: ignore[attr-defined]
    page = to_html(report)
    assert "tokens an<br>answer" in page
    assert "Prompts whose answers differ most in length" in page
    assert "not ended,tokens an answer,repeated 4-grams" in to_csv(report)
    console = Console(width=160)
    console.print(render(found))
    assert "+53.8 (+" in capsys.readouterr().out


def test_a_gate_on_what_is_written():
    report = comparison(LONGER).to_dict()
    checks = judge(parse_gate("not_ended<=0.2, length<=1.5x, repeated<=0.3, length<=60"), report)
    assert [check.passed for check in checks] == [True, False, True, True]
    tokens = "tokens an answer"
    assert str(checks[1]) == f"BROKEN: length<=1.5x: int4: 53.8 {tokens}, bound 52.5 {tokens} (of 35.0 {tokens}, full)"
    other = comparison({**LONGER, "prompts": {**LONGER["prompts"], "max_new_tokens": 50}}).to_dict()
    with pytest.raises(ValueError, match="int4 in the baseline has answered other prompts"):
        judge(parse_gate("length<=1.1x"), report, other)
    judge(parse_gate("length<=2x"), report, report)


# Models, prompts and options


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Saves a model that answers in three tokens, and one that goes round for ever."""
    after = id_of(">")
    folders = tmp_path_factory.mktemp("models")
    loop = {after: FREE, FREE: FREE + 1, FREE + 1: FREE}
    for name, model in {"ends": follower(chain(">", 2)), "rambles": follower(loop)}.items():
        model.save_pretrained(folders / name)
        tiny_tokenizer().save_pretrained(folders / name)
    (folders / "text.txt").write_text("a text to be scored " * 20)
    return folders / "ends", folders / "rambles"


def test_the_command_tells_a_model_that_never_ends(models: tuple[Path, Path], tmp_path: Path):
    ends, rambles = map(str, models)
    shared = ["--text", str(models[0].parent / "text.txt"), "--window", "32", "--max-windows", "2"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo words\nthree\none\n")
    written = tmp_path / "out.json"
    asked = ["--prompts", str(prompts), "--max-new-tokens", "16", "--gate", "not_ended<=0.5"]
    run = CliRunner().invoke(
        app, ["eval", rambles, "--reference", ends, *shared, *asked, "--json", str(written)], env={"COLUMNS": "200"}
    )
    assert run.exit_code == 3, run.output
    assert "BROKEN: not_ended<=0.5: rambles: 100.0 %, bound 50.0 %" in run.output
    report = json.loads(written.read_text())
    DOCUMENTS["comparison"].model_validate(report)
    reference, own = (row["generations"] for row in report["rows"])
    assert (reference["length"], reference["not_ended"]) == (3, 0)
    assert (own["length"], own["not_ended"], own["prompts"]["number"]) == (16, 1, 3)  # `one` is asked once
    assert own["repeated"] == pytest.approx(repeated_share([0, 1] * 8))
    assert own["answers"][1]["prompt"] == "<user>two words\n<assistant>"
    again = CliRunner().invoke(app, ["eval", rambles, "--baseline", str(written), "--gate", "length<=1x"])
    assert again.exit_code == 0, again.output
    other = ["eval", rambles, "--baseline", str(written), "--max-new-tokens", "8"]
    refused = CliRunner().invoke(app, other, env={"COLUMNS": "200"})
    assert refused.exit_code == 2
    assert "has answered other prompts" in refused.output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"question": "?"}', "line 1 has no prompt"),
        ("{", "line 1 is no JSON"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing to answer"),
        ('{"messages": [{"role": "user"}]}', "has no `content`"),
        ("\n\n", "holds no prompt"),
    ],
)
def test_prompts_that_do_not_do(lines: str, message: str, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(lines + "\n")
    with pytest.raises(ValueError, match=message):
        open_prompts(str(path), tiny_tokenizer(), 64, 8)


def test_amounts_and_files_that_do_not_do(models: tuple[Path, Path], tmp_path: Path):
    text = (str(models[0].parent / "text.txt"),)
    with pytest.raises(FileNotFoundError, match="no prompts at absent; give a text file with a prompt a line"):
        open_prompts("absent", tiny_tokenizer(), 64, 8)
    with pytest.raises(ValueError, match="max_new_tokens=9 means nothing without prompts; give prompts=instructions"):
        EvaluationSettings(max_new_tokens=9)
    learned = tiny_architecture("gpt2", n_positions=64, max_position_embeddings=64)
    learned.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    settings = EvaluationSettings(
        texts=text, window=16, max_windows=1, speed=False, prompts="instructions", max_prompts=1, max_new_tokens=60
    )
    with pytest.raises(ValueError, match=r"longest prompt \+ max_new_tokens=\d+ is more than the 64 positions"):
        compare_models([str(tmp_path / "gpt2")], settings)


def test_prompts_are_words_messages_or_beginnings(tmp_path: Path):
    rows = [
        "words alone",
        {"prompt": "words"},
        {"text": "text"},
        {"prompt": [{"role": "user", "content": "as messages"}]},
        {"messages": [{"role": "user", "content": "asked"}, {"role": "assistant", "content": "answered"}]},
        {"conversations": [{"from": "human", "value": "shared"}, {"from": "gpt", "value": "answered"}]},
        {"prompt": "begin", "completion": "end"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = open_prompts(str(path), tiny_tokenizer(), None, 8)
    words = ("words alone", "words", "text", "as messages", "asked", "shared")
    assert found.texts == (*(f"<user>{one}\n<assistant>" for one in words), "begin")
    plain = tiny_tokenizer()
    plain.chat_template = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert open_prompts(str(path), plain, None, 8).texts == ("words alone", "words", "text")
    path.write_text(json.dumps(rows[3]) + "\n")
    with pytest.raises(ValueError, match="no chat template"):
        open_prompts(str(path), plain, None, 8)
    parquet = tmp_path / "rows.parquet"
    import datasets

    datasets.Dataset.from_list(rows[4:5]).to_parquet(parquet)
    assert open_prompts(str(parquet), tiny_tokenizer(), None, 8).texts == ("<user>asked\n<assistant>",)


def test_the_prompts_that_come_along_are_64_and_each_another():
    found = open_prompts("instructions", tiny_tokenizer(), None, 256)
    assert len(found.ids) == 64
    assert len(open_prompts("instructions", tiny_tokenizer(), 5, 256).ids) == 5

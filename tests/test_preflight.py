"""Law: what can be known of a run before it begins is told before any weights are loaded, all of it at once."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from llmqat import QuantConfig
from llmqat.calibrate import AllocationConfig
from llmqat.cli import app
from llmqat.data.strategy import SynthesisConfig
from llmqat.data.teacher_cache import CacheHeader, TeacherCacheWriter
from llmqat.recipe import (
    EvaluationSettings,
    Recipe,
    cache_teacher_of,
    compare_models,
    load_recipe,
    pipeline,
    plan_run,
    quantize_model,
    run,
    sensitivity_of,
    synthesize_to,
)
from llmqat.recipe.findings import PreflightError
from llmqat.recipe.preflight import begin, check_run
from tests.tiny import CHAT_TEMPLATE, tiny_gpt2, tiny_llama, tiny_tokenizer

BASE: dict[str, Any] = {
    "data": {"source": "text", "path": "train.txt", "tokens": 256, "block_size": 32},
    "train": {"max_steps": 2, "per_device_train_batch_size": 2},
    "evaluate": {"texts": ["other.txt"], "window": 32, "max_windows": 2, "speed": False},
}
TOLD = {"role": "assistant", "content": "I."}
SYNTHETIC = "data={tokens: 256, block_size: 32}"
WATCHED = "data.validation_share=0.5 train.eval_strategy=steps train.eval_steps=1"

BROKEN: dict[str, str] = {
    # the trainer
    "train.warmup_steps=5": r"warmup_steps=5 does not end within the 2 steps",
    "train.quantization_warmup_steps=2": r"quantization_warmup_steps=2 does not end within the 2 steps",
    "train.max_steps=-1 train.num_train_epochs=1 train.warmup_steps=9": r"warmup_steps=9 does not end within the 4",
    "train.optim=grokadamw": r"optim='grokadamw' needs grokadamw, which is not installed",
    "train.optim=lomo": r"optim='lomo' is refused",
    "train.optim=sgd train.optim_args=nesterov=yes,speed=3": r"does not read 'speed=3'",
    "train.learning_rate=-1": r"Invalid learning rate: -1",
    "train.adam_beta1=2": r"Invalid beta parameter",
    "train.lr_scheduler_type=cosine_with_min_lr": r"min_lr",
    "train.lr_scheduler_kwargs={nonsense: 1}": r"nonsense",
    "train.report_to=comet_ml": r"train.report_to='comet_ml'.*comet.*leave comet_ml out",
    "train.report_to=nonsense": r"nonsense is not supported",
    "train.load_best_model_at_end=true": r"load_best_model_at_end requires",
    f"{WATCHED} train.metric_for_best_model=accuracy": r"metric_for_best_model='accuracy' is none of what",
    "train.deepspeed=absent.json": r"deepspeed='absent\.json': there is no such file",
    "train.push_to_hub=true": r"train.push_to_hub=True needs a token",
    "train.dataloader_drop_last=true train.per_device_train_batch_size=64": r"drops all of the 8 training samples",
    "train.trainable=nothing": r"trainable='nothing' is unknown; choose one of all, scales",
    "train.zero_point_learning_rate=1": r"zero_point_learning_rate=1.*there are no zero points that train",
    "train.scale_learning_rate=-1": r"scale_learning_rate=-1.*is negative",
    "train.dataloader_multiprocessing_context=nonsense train.dataloader_num_workers=1": r"nonsense",
    # texts
    "evaluate.texts=[absent.txt]": r"no text at absent\.txt",
    "evaluate.texts=[short.txt]": r"fewer than one window",
    "evaluate.texts=[train.txt]": r"train\.txt is text that this recipe calibrates or trains on",
    "data={source: pydoc} evaluate.texts=[pydoc]": r"pydoc is text that this recipe calibrates or trains on",
    "data.path=absent.txt": r"no text at absent\.txt",
    "data.path=short.txt": r"short\.txt has 5 bytes, and one block needs data\.block_size=32",
    "data={source: dataset, path: absent.jsonl}": r"no dataset at absent\.jsonl",
    "data={source: dataset, path: rows.jsonl, column: body}": r"column.*'body'",
    "data={source: dataset, path: chats.jsonl, chat_template: absent.jinja}": r"no chat template at .*absent\.jinja",
    "data={source: dataset, name: ./some/set}": r"is no id of a data set|cannot be reached",
    f"{SYNTHETIC} data.strategy=prompts data.prompts=absent.txt": r"no prompts at absent\.txt",
    "data={block_size: 512}": r"data\.block_size=512 is more than the model's context of 256",
    # the model and its scheme
    "model=./absent": r"model './absent' does not exist",
    "teacher=gpt2": r"is in full precision and is its own teacher",
    "quant={preset: int4, group_size: 48}": r"quant\.group_size=48 does not divide",
    "quant={preset: int4, ignore: [nothing]}": r"nothing",
    "quant={preset: int4, group_size: 32, overrides: {nothing: {weights: int8}}}": r"nothing",
    "quant={preset: int4, group_size: 32, targets: []}": r"nothing is left to quantize",
    "quant={preset: int4, group_size: 32, scales: fixed} train.trainable=scales": r"needs learned scales",
    "quant={preset: int3, group_size: 32} serve=vllm-cpu": r"vllm-cpu",
    "lora={targets: [nothing]}": r"nothing",
    "allocate={target_bits: 2, choices: [4, 8]}": r"target_bits=2.* is below the smallest choice of 4",
    "model=gpt2 evaluate.window=300 evaluate.max_windows=1": r"evaluate\.window=300 is more than the 256 positions",
    "model=gpt2 data.block_size=300": r"data\.block_size=300 is more than the 256 positions",
    # what lies on disk
    "teacher_cache=absent": r"absent",
    "teacher_cache=cache": r"teacher.*cache",
    "output=train.txt": r"output=train\.txt",
    "output=train.txt/run": r"train\.txt is a file",
    "output=gpt2": r"output=gpt2 exists and is no run of llmqat",
}
"""Overrides of a recipe, each wrong in one thing -> what is said of it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, texts, and a teacher's cache of another tokenizer."""
    folder = tmp_path_factory.mktemp("place")
    for name, model in {"llama": tiny_llama(), "gpt2": tiny_gpt2(n_positions=256)}.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "train.txt").write_text("What is read to train. " * 100)
    (folder / "other.txt").write_text("What is read to judge. " * 100)
    (folder / "short.txt").write_text("short")
    (folder / "rows.jsonl").write_text(json.dumps({"text": "A row. " * 50}) + "\n")
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    TeacherCacheWriter(folder / "cache", CacheHeader("model", "tokenizer", 512, 4, "bfloat16", "another"))
    return folder


@pytest.fixture(autouse=True)
def no_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for name in ("llmqat.recipe.pipeline.load_model", "llmqat.models.loading._load_weights"):
        monkeypatch.setattr(name, lambda *args, **options: pytest.fail("weights are loaded"))


def recipe(*overrides: str) -> Recipe:
    quant = QuantConfig.preset("int4", group_size=32).model_dump(mode="json")
    values = {
        "model": "llama",
        "output": "run",
        "quant": quant,
        "calibrate": [{"stage": "ranges", "blocks": 2}],
        **BASE,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    return load_recipe("recipe.yaml", overrides)


@pytest.mark.parametrize("overrides", BROKEN)
def test_a_broken_recipe_is_refused_before_weights_are_loaded(overrides: str) -> None:
    shutil.rmtree("run", ignore_errors=True)
    with pytest.raises((ValueError, OSError, ImportError), match=BROKEN[overrides]) as caught:
        run(recipe(*joined(overrides)))
    assert not isinstance(caught.value, PreflightError), "more is said than is wrong"
    assert not Path("run").exists()


def test_plain_prompts_under_a_chat_template_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    rows = {"plain": {"prompt": "Who?", "completion": " I."}, "messages": {"prompt": "Who?", "completion": [TOLD]}}
    for name, row in rows.items():
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        flight = begin(recipe(f"data={{source: dataset, path: {name}.jsonl, chat_template: template.jinja}}"))
        Path("template.jinja").write_text(CHAT_TEMPLATE)
        check_run(flight)
        said = [warning for warning in flight.findings.warnings if "without the chat template" in warning]
        assert len(said) == (name == "plain"), flight.findings
        assert all('"completion": [{"role": "assistant", "content": ANSWER}]' in warning for warning in said)


def joined(overrides: str) -> list[str]:
    """Returns overrides that spaces separate; a space inside of braces or brackets separates none."""
    found: list[str] = []
    for part in overrides.split(" "):
        is_open = found and sum(found[-1].count(mark) for mark in "{[") > sum(found[-1].count(mark) for mark in "}]")
        if is_open:
            found[-1] += f" {part}"
        else:
            found.append(part)
    return found


def test_all_that_is_wrong_is_told_at_once() -> None:
    overrides = (
        *("train.warmup_steps=5", "train.optim=grokadamw", "train.scale_learning_rate=-1", "lora={targets: [nothing]}"),
        *("evaluate.texts=[absent.txt, short.txt]", "data.path=nowhere.txt", "teacher_cache=absent"),
    )
    with pytest.raises(PreflightError) as caught:
        run(recipe(*overrides))
    text = str(caught.value)
    words = (
        "warmup_steps=5",
        "grokadamw",
        "scale_learning_rate=-1",
        "'nothing'",
        "absent.txt",
        "fewer than one window",
    )
    for word in (*words, "nowhere.txt", "teacher cache"):
        assert word in text, word
    assert text.startswith("8 things are wrong")


def test_texts_are_looked_for_without_a_model() -> None:
    with pytest.raises(PreflightError, match=r"2 things are wrong(.|\n)*'./absent' does not exist(.|\n)*at absent.txt"):
        run(recipe("model=./absent", "evaluate.texts=[absent.txt]"))


def test_a_disk_that_is_too_small_is_told_and_one_that_is_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = plan_run(recipe()).disk
    for free, is_told in ((int(disk.least) - 1, "error"), (int(disk.peak) + 1, "warning"), (int(disk.peak * 2), "")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        flight = begin(recipe())
        check_run(flight)
        assert bool(flight.findings.errors) == (is_told == "error")
        assert bool(flight.findings.warnings) == (is_told == "warning")
    flight.findings.refuse()


def test_a_recipe_that_will_do_goes_on_to_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loading(Exception):
        pass

    def load(*args: Any) -> None:
        raise Loading

    monkeypatch.setattr(pipeline, "load_model", load)
    for more in ((), ("lora={r: 4}",), ("train.trainable=scales",), (SYNTHETIC,), ("model=gpt2",)):
        with pytest.raises(Loading):
            run(recipe(*more))


def test_other_commands_tell_all_that_is_wrong_at_once() -> None:
    Path("there").mkdir(exist_ok=True)
    settings = EvaluationSettings(texts=("absent.txt",), window=32)
    config = SynthesisConfig(strategy="prompts", prompts=Path("absent.txt"))
    calls: dict[str, Any] = {
        "quantize": lambda: quantize_model("./absent", Path("there"), text="absent.txt"),
        "sensitivity": lambda: sensitivity_of("./absent", AllocationConfig(target_bits=4), text="absent.txt"),
        "eval": lambda: compare_models(["./absent", "llama"], settings),
        "synthesize": lambda: synthesize_to("./absent", Path("train.txt"), tokens=64, config=config),
        "cache-teacher": lambda: cache_teacher_of(
            recipe("model=./absent", "data.path=absent.txt"), Path("taught"), top_k=4, batch_size=2
        ),
    }
    counts = {}
    for command, call in calls.items():
        with pytest.raises(PreflightError) as caught:
            call()
        assert "model './absent' does not exist" in str(caught.value), command
        assert "absent.txt" in str(caught.value), command
        counts[command] = len(caught.value.findings)
    assert counts == {"quantize": 3, "sensitivity": 2, "eval": 2, "synthesize": 3, "cache-teacher": 2}


def test_a_plan_is_shown_with_its_disk_or_what_is_wrong() -> None:
    recipe("train.max_steps=2")
    shown = CliRunner().invoke(app, ["plan", "recipe.yaml"])
    assert shown.exit_code == 0
    assert "disk in run: 0.00 GB at most, and " in shown.output
    broken = CliRunner().invoke(app, ["plan", "recipe.yaml", "train.warmup_steps=5", "evaluate.texts=[absent.txt]"])
    assert broken.exit_code == 2
    assert "disk in run" not in broken.output
    for words in ("2 things are wrong", "warmup_steps=5", "no text at absent.txt"):
        assert words in broken.output, words


def test_a_plan_reads_small_files_and_so_knows_steps_and_warm_ups(caplog: pytest.LogCaptureFixture) -> None:
    chats = [{"messages": [{"role": "user", "content": f"Who is {n}?"}, TOLD]} for n in range(12)]
    Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    Path("template.jinja").write_text(CHAT_TEMPLATE)
    recipe()
    data = "{source: dataset, path: many.jsonl, chat_template: template.jinja, packing: whole, block_size: 32}"
    words = ["plan", "recipe.yaml", f"data={data}", "train={num_train_epochs: 2, cross_entropy_weight: 1.0}"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    found = re.search(r"text: blocks (\d+); training: steps (\d+), tokens", shown.output)
    assert found is not None, shown.output
    blocks, steps = map(int, found.groups())
    assert steps == 2 * math.ceil(blocks / 4)
    assert "epochs over 12 conversations) are few to learn answers; give train.num_train_epochs=" in caplog.text
    refused = CliRunner().invoke(app, [*words, "train.warmup_steps=50"])
    assert refused.exit_code == 2
    assert f"warmup_steps=50 does not end within the {steps} steps" in refused.output

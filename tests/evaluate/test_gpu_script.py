"""eval/gpu.py on a CPU: every step runs, goes on where it ended, and ends no other with its errors."""

from __future__ import annotations

import json
import logging
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmqat.calibrate import stages
from llmqat.terminal import plain_console
from tests.evaluate.test_scripts import SCRIPTS, headline
from tests.tiny import tiny_llama, tiny_tokenizer

STEPS = ["kernels", "decoding", "training", "calibration", "budget"]


@pytest.fixture(autouse=True, scope="module")
def _script() -> Iterator[None]:
    logger = logging.getLogger("llmqat")
    level = logger.level
    # A compiler takes longer than all that is done here.
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=True):
        patch.syspath_prepend(SCRIPTS)  # as Python does for a script
        patch.setattr(stages, "fusing", stages.ExitStack)
        yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gpu") / "original"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def words_of(output: str) -> str:
    """Returns what was printed without the ends of lines, which depend on the width."""
    return " ".join(output.split())


def run(monkeypatch: pytest.MonkeyPatch, file: Path, *words: str) -> int:
    """Runs the script, and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--one-process", "--json", str(file), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "gpu.py"), run_name="__main__")
    if isinstance(ended.value.code, str):
        raise ended.value
    return int(ended.value.code or 0)


def steps_in(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())["steps"]


@pytest.mark.slow
def test_every_step(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    assert run(monkeypatch, file, "--model", model) == 0
    output = capsys.readouterr().out
    steps = steps_in(file)
    assert list(steps) == STEPS
    assert all(record["complete"] and not record["errors"] and not record["left_out"] for record in steps.values())
    assert steps["training"]["not_here"].keys() <= {"tiny, torchao"}

    kernels = steps["kernels"]["parts"]["4 bits, 64x128"]
    assert "cuda-int4" in kernels["declined"]
    assert {own["of_bound"] < 1 for rows in kernels["rows"].values() for own in rows.values()} == {True}
    decoding = steps["decoding"]["parts"]
    assert decoding["tiny"]["packed"]["weight_bytes"] < decoding["tiny"]["bf16"]["weight_bytes"]
    assert set(decoding) == {"tiny"} | {f"tiny, {way}" for way in ("bf16 compiled", "packed, compiled")}
    training = steps["training"]["parts"]
    assert {"tiny, llmqat", "tiny, plain", "tiny LoRA, llmqat", "tiny LoRA, plain"} <= set(training)
    assert training["tiny, llmqat"]["peak_bytes"] is None  # of a GPU
    assert training["tiny, llmqat"]["planned_bytes"] > 0
    assert steps["calibration"]["parts"]["gptq"]["gptq"]["seconds"] > 0
    budget = steps["budget"]["parts"]
    assert budget["int2, 0 tokens"]["texts"]["own"]["kl"] > budget["int4, 0 tokens"]["texts"]["own"]["kl"]
    assert budget["int2, 128 tokens"]["tokens"] == 128

    found = headline(output)
    assert found["reference, largest error of its bound"] < 1
    assert found["decode of tiny packed, against bf16"] > 0
    assert found["int2, 128 tokens, own kl"] == pytest.approx(
        budget["int2, 128 tokens"]["texts"]["own"]["kl"], rel=1e-3
    )

    # What is done is not done again, and a part that is missing is.
    report = json.loads(file.read_text())
    record = report["steps"]["calibration"]
    del record["parts"]["synthesis"]
    record["complete"] = False
    before = {name: step["parts"] for name, step in report["steps"].items()}
    file.write_text(json.dumps(report))
    assert run(monkeypatch, file, "--model", model) == 0
    steps = steps_in(file)
    assert steps["calibration"]["parts"].pop("synthesis")["tokens"] > 0
    assert {name: step["parts"] for name, step in steps.items()} == before
    with pytest.raises(SystemExit, match="begun with another model"):
        run(monkeypatch, file)


def test_a_step_that_fails_or_is_interrupted_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import kernel_speed

    def failing(out_features: int, in_features: int, rows: int, options: Any, device: Any) -> Any:
        if options.bits == 3:
            raise torch.OutOfMemoryError("too much")
        return measured(out_features, in_features, rows, options, device)

    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    file, measured = tmp_path / "gpu.json", kernel_speed.measured
    with monkeypatch.context() as context:
        context.setattr(kernel_speed, "measured", failing)
        assert run(context, file, "--steps", "kernels,budget") == 1
    output = words_of(capsys.readouterr().out)
    assert "kernels: 3 bits, 64x128 failed, OutOfMemoryError: too much" in output
    assert "budget: int4, 0 tokens is left out: a model with random weights has nothing to learn" in output
    record = steps_in(file)["kernels"]
    assert list(record["parts"]) == ["4 bits, 64x128"]
    assert record["errors"]["3 bits, 64x128"]["type"] == "OutOfMemoryError"
    assert not record["complete"]

    with monkeypatch.context() as context:
        context.setattr(kernel_speed, "measured", interrupted)
        context.setattr(sys, "argv", ["gpu.py", "--small", "--one-process", "--json", str(file), "--steps", "kernels"])
        with pytest.raises(KeyboardInterrupt):
            runpy.run_path(str(SCRIPTS / "gpu.py"), run_name="__main__")
    assert steps_in(file)["kernels"]["running"] == "3 bits, 64x128"
    assert run(monkeypatch, file, "--steps", "kernels") == 0
    again = steps_in(file)["kernels"]
    assert again["complete"]
    assert again["parts"]["4 bits, 64x128"] == record["parts"]["4 bits, 64x128"]
    assert list(again["parts"]) == ["4 bits, 64x128", "3 bits, 64x128"]


def test_what_there_is_no_time_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    assert run(monkeypatch, file, "--steps", "kernels", "--minutes", "0.001") == 0
    assert steps_in(file)["kernels"]["left_out"]["4 bits, 64x128"].endswith("and 0 s were left")
    assert "kernels: 3 bits, 64x128 is left out" in words_of(capsys.readouterr().out)


@pytest.mark.parametrize("over_time", [True, False])
def test_a_process_that_ends_leaves_an_error(over_time: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(SCRIPTS / "gpu.py"))
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--json", str(file), "--work", str(tmp_path / "work")])
    options = script["parse_options"]()
    script["opened"](options)

    def child(command: list[str], **given: Any) -> Any:
        assert {"--small", "--one-process", str(tmp_path / "work")} <= set(command)
        report = json.loads(file.read_text())
        script["record_of"](report, "kernels")["running"] = "4 bits, 64x128"
        file.write_text(json.dumps(report))
        if over_time:
            raise subprocess.TimeoutExpired(command, given["timeout"])
        given["stderr"].write("CUDA error: an illegal memory access was encountered")
        return SimpleNamespace(returncode=-6)

    monkeypatch.setattr(subprocess, "run", child)
    now = time.monotonic()
    script["run_step"]("kernels", options, now + 60, now + 90)
    script["run_step"]("decoding", options, now - 1, now + 90)
    record = steps_in(file)["kernels"]
    error = record["errors"]["4 bits, 64x128"]
    assert ("ended after 7" if over_time else "status -6") in error["message"]
    assert over_time or "illegal memory access" in error["said"]
    assert "running" not in record
    assert steps_in(file)["decoding"]["left_out"] == {"the step": "no time was left"}
    for line in script["table"]("kernels", record):
        plain_console().print(line)


@pytest.mark.slow
def test_a_step_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--json", str(file), "--steps", "kernels"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "gpu.py"), run_name="__main__")
    assert not ended.value.code
    report = json.loads(file.read_text())
    assert list(report["steps"]["kernels"]["parts"]) == ["4 bits, 64x128", "3 bits, 64x128"]
    assert "--one-process" not in report["command"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--steps", "kernel"], "--steps kernel: known are kernels"), (["--minutes", "0"], "more than")],
)
def test_what_means_nothing_is_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "gpu.json", *words) == 2
    assert message in capsys.readouterr().err


def test_wheels_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--list-wheels"])
    runpy.run_path(str(SCRIPTS / "gpu.py"), run_name="__main__")
    assert "torchao: " in capsys.readouterr().out

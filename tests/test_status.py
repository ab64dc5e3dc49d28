"""What `llmqat status` makes of a run folder: alive, silent, killed, interrupted, failed, finished, without status."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmqat.recipe.record import RunRecord
from llmqat.recipe.training import Step
from llmqat.status import STATUS_FILE, RunStatus, look
from llmqat.terminal import Bar

NOW = 1_800_000_000.0
STEP = Step(12, 40, 0.10423, 3.6e-5, 184.2, 366.0)
SAID = "step 12 of 40, loss 0.1042, lr 3.6e-05, 184 tokens/s, 6.1 min left"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "my run"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: m\n")
    return run


def status(**changes: object) -> RunStatus:
    here = RunStatus("running", os.getpid(), socket.gethostname(), 1, NOW - 300, NOW - 4)
    return replace(here, **{"stage": "train", "doing": str(STEP), "seconds": {"load": 2.0}, **changes})  # type: ignore[arg-type]


def said(folder: Path, found: RunStatus | None = None) -> tuple[str, str]:
    if found is not None:
        (folder / STATUS_FILE).write_text(found.to_json())
    seen = look(folder, NOW)
    return seen.state, "\n".join(seen.lines)


def gone() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_a_run_that_lives_says_step_loss_and_time_left(folder: Path):
    state, text = said(folder, status())
    assert state == "running"
    assert text.startswith(f"{folder}: train: {SAID}\n")
    assert f"last sign of life 4.0 s ago, from process {os.getpid()} on this machine" in text
    assert "done: load 2.0 s" in text
    assert "to resume it" not in text


def test_a_run_on_another_machine_is_known_by_its_last_sign(folder: Path):
    elsewhere = status(host="node-7", pid=1, processes=4)
    state, text = said(folder, elsewhere)
    assert state == "running"
    assert "last sign of life 4.0 s ago, from process 1 and 3 more on node-7" in text
    state, text = said(folder, replace(elsewhere, updated=NOW - 600))
    assert state == "silent"
    assert "last sign of life 10.0 min ago" in text
    assert f"if it has ended, to resume it: accelerate launch --num_processes 4 -m llmqat train '{folder}'" in text


def test_a_run_that_was_killed_says_its_checkpoint_and_how_to_go_on(folder: Path):
    checkpoint = folder / "checkpoints" / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 10, "max_steps": 40}))
    state, text = said(folder, status(pid=gone()))
    assert state == "killed"
    assert "ended without a message (killed, or out of memory) at train: step 12 of 40" in text
    assert text.endswith(f"the last checkpoint is of step 10 of 40\nto resume it: llmqat train '{folder}'")


@pytest.mark.parametrize(
    ("error", "state", "words", "next_step"),
    [
        (KeyboardInterrupt(), "interrupted", "interrupted at train", "to resume it: {}"),
        (
            ValueError("warmup_steps=9 is\nmore than 4 steps"),
            "failed",
            "\nwarmup_steps=9 is more than 4 steps\n",
            "fix this first, then: {} KEY=VALUE ...",
        ),
        (RuntimeError("out of memory"), "failed", "RuntimeError: out of memory", "to resume it: {}"),
    ],
)
def test_how_a_run_ends_is_kept(error: BaseException, state: str, words: str, next_step: str, folder: Path):
    record = RunRecord(folder, 1)

    def run() -> None:
        with record:
            record.begin("train")
            record.tell(STEP)
            raise error

    with pytest.raises(type(error)):
        run()
    found = look(folder)
    assert found.state == state
    assert words in "\n".join(found.lines)
    assert found.lines[-1] == next_step.format(f"llmqat train '{folder}'")
    assert "left" not in found.lines[0]
    assert found.status is not None
    assert found.status.step == STEP.to_dict()


def test_a_run_that_is_finished_says_what_is_next(folder: Path):
    with RunRecord(folder, 1) as record:
        record.begin("load")
        record.end("load", 3.2)
        (folder / "results.json").write_text("{}")
        assert look(folder).state == "running"
    found = look(folder)
    assert found.state == "finished"
    assert found.lines[1] == f"next: llmqat chat '{folder}/model'"
    assert "done: load 3.2 s" in found.lines[2]


def test_signs_of_life_say_what_the_bars_show(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llmqat.recipe.record.SECONDS_BETWEEN_SIGNS", 0.02)
    with RunRecord(folder, 1) as record, Bar("gptq", "block", total=30) as bar:
        record.begin("calibrate")
        bar.update(12)
        before = time.time()
        while "12 of 30" not in look(folder).lines[0]:
            assert time.time() - before < 20
        assert look(folder).lines[0].startswith(f"{folder}: calibrate: gptq: 12 of 30 blocks")


def test_what_is_no_run_or_no_status_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is not there; give the output folder"):
        look(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        look(tmp_path)
    assert look(folder).state == "unknown"
    for text in ("{", "{}", '{"schema": 1, "state": "running"}', "[]"):
        (folder / STATUS_FILE).write_text(text)
        with pytest.raises(ValueError, match=r"status\.json: it holds no status of a run"):
            look(folder)

"""A training as a process whose output goes to files: no bars there, every line of the log stamped, `--log` whole."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import ROOT
from tests.flows.small import small

RECIPE = ROOT / "recipes" / "smollm2-135m-int4.yaml"
STAMP = re.compile(r"^\d\d:\d\d:\d\d ")
DATED = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d( |$)")


def run(*words: str) -> tuple[str, str]:
    """Runs the command line without a terminal; returns standard output and standard error."""
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "TQDM_DISABLE", "CI")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llmqat", *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=300)
    output, errors = done.stdout.decode(), done.stderr.decode()  # as bytes: text mode would hide \r
    assert done.returncode == 0, errors[-4000:]
    return output, errors


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str, Path]:
    folder = tmp_path_factory.mktemp("screen")
    log = folder / "logs" / "train.log"
    log.parent.mkdir()
    log.write_text("an earlier line\n")
    steps = ("train.max_steps=4", "train.logging_steps=1", "train.eval_strategy=epoch")
    output, errors = run("train", str(RECIPE), *small(tiny_folder, folder / "run", *steps), "--log", str(log))
    return output, errors, log.read_bytes().decode(), folder / "run"


def test_files_get_no_bars_and_stamped_lines(trained: tuple[str, str, str, Path]):
    output, errors, log, _ = trained
    for text in (output, errors, log):
        assert "\r" not in text
        assert "\x1b" not in text
        assert "it/s" not in text
        assert "{'" not in text
    assert all(STAMP.match(line) for line in errors.splitlines()), errors
    for stage in ("load", "text", "calibrate", "train", "save", "evaluate"):
        assert re.search(rf"^\d\d:\d\d:\d\d {stage}: ", errors, re.MULTILINE)
        assert re.search(rf"^\d\d:\d\d:\d\d {stage}: done in [\d.]+ (s|min)$", errors, re.MULTILINE)


def test_steps_are_lines_that_can_be_read(trained: tuple[str, str, str, Path]):
    output, errors, _, _ = trained
    steps = [line[9:] for line in errors.splitlines() if line[9:].startswith("step ")]
    figures = r"loss [\d.e-]+, lr [\d.e-]+, [\d,]+ tokens/s"
    assert re.fullmatch(rf"step 1 of 4, {figures}, [\d.]+ (s|min) left", steps[0]), steps
    assert re.fullmatch(rf"step 4 of 4, {figures}", next(line for line in reversed(steps) if "lr " in line)), steps
    assert sum("lr " in line for line in steps) == 2, "steps between the first and the last are said once a minute"
    assert not re.search(r"\d\.\d{7}", output + errors), "figures have the digits that mean something"


def test_the_log_has_all_that_was_shown_with_its_date(trained: tuple[str, str, str, Path]):
    output, errors, log, _ = trained
    lines = log.splitlines()
    assert lines[0] == "an earlier line"
    assert re.match(r"[-\d]{10} [:\d]{8} llmqat [^ ]+: llmqat train .*smollm2-135m-int4.yaml", lines[1])
    assert all(DATED.match(line) for line in lines[1:])
    written = [line[20:] for line in lines[2:]]
    for line in (*output.splitlines(), *(line[9:] for line in errors.splitlines())):
        assert line.rstrip() in written


def test_status_of_a_finished_run(trained: tuple[str, str, str, Path]):
    folder = trained[-1]
    output, errors = run("status", str(folder))
    assert errors == ""
    first, following, begun = output.splitlines()
    assert re.fullmatch(rf"{folder}: finished, [\d.]+ (s|min) after it began", first)
    assert following == f"next: llmqat chat {folder}/model"
    assert "train" in begun


def test_tasks_of_lm_eval_draw_no_bars_in_files(tiny_folder: Path, tmp_path: Path):
    questions = (json.dumps({"query": f"what is {n}", "choices": ["one", "two"], "gold": 0}) for n in range(3))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "quiz.jsonl").write_text("\n".join(questions) + "\n")
    (tmp_path / "text.txt").write_text("A text that fills some windows of a tiny model. " * 20)
    text = ("--text", str(tmp_path / "text.txt"), "--window", "32", "--max-windows", "2")
    output, errors = run("eval", str(tiny_folder), *text, "--task-folder", str(tmp_path / "tasks"))
    assert "quiz" in output
    assert "\r" not in output + errors
    assert all(STAMP.match(line) for line in errors.splitlines()), errors

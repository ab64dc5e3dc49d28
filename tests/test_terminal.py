from __future__ import annotations

import importlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table

from llmqat.terminal import (
    PLAIN,
    Bar,
    CommandLog,
    bars,
    console,
    duration,
    errors,
    plain_console,
    progress,
    quiet_libraries,
    show_any_text,
    terminal_bar,
    with_program,
)
from llmqat.terminal.logs import BARS_OFF
from llmqat.terminal.started import program_started_as

ANY_TEXT = "1.5 ± 0.1, 4×4 – “café” 日本 🔥 \udce9"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "utf-8"])
def test_any_text_is_shown_on_a_terminal_of_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # a stream that cannot be told how to encode
    show_any_text()
    table = Table("model ×")
    table.add_row(ANY_TEXT)
    plain_console(width=200).print(table)
    print(ANY_TEXT)
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "1.5" in shown
    assert shown.count("\\udce9") == 2, "half a character, as in the name of a file that is not UTF-8"
    if encoding == "ascii":
        assert "1.5 +- 0.1, 4x4 - \\u201ccaf\\xe9\\u201d \\u65e5\\u672c \\U0001f525" in shown
    if encoding == "latin-1":
        assert "1.5 ± 0.1, 4×4 - " in shown


def test_what_stands_for_a_character_can_be_shown_anywhere():
    assert all(text.isascii() for text in PLAIN.values())


def test_brackets_and_colons_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]):
    console = plain_console(width=120)
    table = Table("[b]heading[/b]", title="[red]title")
    table.add_row("x [wip]/:fire:/[/closed]")
    console.print(table)
    console.print("x [wip]/:fire:/[/closed]", style="dim")
    shown = capsys.readouterr().out
    assert shown.count("x [wip]/:fire:/[/closed]") == 2
    assert "[b]heading[/b]" in shown
    assert "[red]title" in shown


# Bars and the log


class Screen(io.StringIO):
    """A terminal that keeps what it shows."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that goes when it is told to."""
    now = [1_000.0]
    monkeypatch.setattr("llmqat.terminal.bars.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Bar, "_last_line", 0.0)

    def wait(count: float) -> None:
        now[0] += 60 * count

    return wait


def test_without_a_terminal_there_is_a_line_a_minute(
    minutes: Callable[[float], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, "llmqat"):
        for _ in Bar("gptq", "block", range(30)):
            minutes(0.25)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 8, "thirty quarters of a minute, the first line after half a minute"
    assert lines[2] == "gptq: 10 of 30 blocks, 2.5 min, about 5.0 min left"
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_on_a_terminal_bars_stand_below_each_other_and_go_away(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stderr", Screen())
    monkeypatch.setattr(errors, "_environ", {"TERM": "xterm"})
    monkeypatch.setattr(errors, "is_interactive", True)
    with caplog.at_level(logging.INFO, "llmqat"), Bar("text", "token", total=100) as outer:
        outer.update(50, note="half")
        bars._shown().refresh()
        with Bar("batch", "row", total=2) as inner:
            inner.update(1)
            assert len(bars._shown().tasks) == 2
        assert len(bars._shown().tasks) == 1
    assert bars._progress is None
    assert "50 of 100 tokens, half" in sys.stderr.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_call_from_python_has_a_bar_on_a_terminal_and_no_lines(
    is_terminal: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stderr", Screen() if is_terminal else io.StringIO())
    monkeypatch.setattr(errors, "_environ", {"TERM": "xterm"})
    monkeypatch.setattr(errors, "is_interactive", True)
    monkeypatch.setattr(Bar, "_last_line", -1e9)
    for _ in terminal_bar("gptq", "block")(range(3)):
        assert (bars._progress is not None) == is_terminal
    assert not caplog.records
    assert ("gptq" in sys.stderr.getvalue()) == is_terminal  # type: ignore[attr-defined]


def test_nothing_is_shown_where_nothing_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, minutes: Callable[[float], None]
):
    monkeypatch.setattr(sys, "stderr", Screen())
    with caplog.at_level(logging.WARNING, "llmqat"):
        for _ in progress("gptq", "block")(range(3)):
            minutes(2)
    assert not caplog.records
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (99, "99 s"), (99.6, "1.7 min"), (5_969, "99.5 min"), (6_000, "1.7 h")],
)
def test_durations_are_said_as_people_say_them(seconds: float, words: str):
    assert duration(seconds) == words


def test_warnings_of_libraries_are_in_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(logging.getLogger("llmqat"), "level", logging.NOTSET)
    command = CommandLog(main_process=True, path=tmp_path / "a" / "run.log", heading="llmqat 1: llmqat train")
    logging.getLogger("library").warning("torch_dtype is deprecated")
    logging.getLogger("llmqat.data").warning("a row is empty")
    monkeypatch.setattr(logging.getLogger("talkative"), "level", logging.INFO)
    logging.getLogger("talkative.part").info("which was asked for")
    console.print("figures", style="bold")
    errors.print("error: ", end="")
    errors.print("no such file")
    command.end()
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "torch_dtype" not in shown
    assert "warning: a row is empty" in shown
    assert "which was asked for" in shown
    assert [line[20:] for line in (tmp_path / "a" / "run.log").read_text().splitlines()] == [
        "llmqat 1: llmqat train",
        "warning: library: torch_dtype is deprecated",
        "warning: a row is empty",
        "talkative.part: which was asked for",
        "figures",
        "error: no such file",
    ]
    assert root.handlers == []


def test_a_log_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path):
    with pytest.raises(OSError, match=r"--log=.* cannot be written"):
        CommandLog(main_process=True, path=tmp_path, heading="")
    CommandLog(main_process=False, path=tmp_path, heading="").end()  # other processes write none
    assert not console.quiet
    assert logging.getLogger("llmqat").level != logging.ERROR


@pytest.mark.parametrize(("main_process", "is_terminal"), [(True, True), (True, False), (False, True)])
def test_downloads_alone_draw_bars_of_their_own_and_on_a_terminal_of_the_main_process(
    main_process: bool, is_terminal: bool, monkeypatch: pytest.MonkeyPatch
):
    variables = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    for variable in variables:
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    monkeypatch.setattr(sys, "stderr", Screen() if is_terminal else io.StringIO())
    monkeypatch.setattr(logging, "captureWarnings", lambda capture: None)
    quiet_libraries(main_process=main_process)
    wanted = None if main_process and is_terminal else "1"
    assert [os.environ.get(variable) for variable in variables] == ["1", wanted, wanted]


def test_what_an_earlier_start_did_does_not_count_for_the_time_left(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    with Bar("gptq", "block", total=30, shown=False) as bar:
        bar.update(25)
        bar.done_before(25)
        assert "left" not in bar.said()
        now[0] = 40.0
        bar.update(26)
        assert bar.said() == "26 of 30 blocks, 40 s, about 2.7 min left"


def test_a_command_names_the_script_that_it_was_started_by():
    assert program_started_as("/somewhere/bin/llmqat") == "llmqat"
    assert program_started_as("/checkout/llmqat/__main__.py") == "llmqat"
    assert program_started_as("my scripts/own.py") == "python 'my scripts/own.py'"
    assert with_program("llmqat chat out") == "llmqat chat out"
    assert with_program("llmqat chat out", "python own.py") == "python own.py chat out"
    assert with_program("vllm serve llmqat-model", "python own.py") == "vllm serve llmqat-model"


@pytest.mark.parametrize("words", [("schema", "--reports"), ("--help",), ("--version",)])
def test_a_reader_that_leaves_is_no_error(words: tuple[str, ...]):
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-m", "llmqat", *words], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_libraries_that_are_imported_already_draw_no_bars_in_a_file(monkeypatch: pytest.MonkeyPatch):
    called = []
    for module, function in BARS_OFF.items():
        found = importlib.import_module(module)
        assert callable(getattr(found, function))
        monkeypatch.setattr(found, function, lambda name=module: called.append(name))
    monkeypatch.setattr(logging, "captureWarnings", lambda capture: None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for variable in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(variable, "1")
    quiet_libraries(main_process=True)
    assert called == [*BARS_OFF]


DRAWN = """
import io, sys
class Screen(io.StringIO):
    isatty = lambda self: True
sys.stderr = Screen()
from llmqat.terminal import quiet_libraries
quiet_libraries(main_process=True)
from huggingface_hub.utils.tqdm import is_tqdm_disabled, tqdm as downloads
from transformers.utils.logging import tqdm as loading
for _ in loading(range(3), desc="Loading weights"):
    pass
with downloads(desc="model.safetensors", total=3, disable=is_tqdm_disabled(20)) as bar:  # as a download makes its own
    bar.update(3)
sys.stdout.write(sys.stderr.getvalue())
"""


def test_what_a_download_draws_is_seen_and_what_transformers_draws_is_not():
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("_BARS", "TQDM_DISABLE"))}
    command = [sys.executable, "-c", DRAWN]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "model.safetensors" in output
    assert "Loading weights" not in output

"""Law: a command that has done its work ends with the commands that go on from there, and each of them can be run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import llmqat.cli.application as shared
from llmqat.cli import app
from llmqat.export import CONVERSIONS
from tests.flows.small import SMALL

SHOWN_ELSEWHERE = {"schema"}
"""Commands whose output is a document for a program."""
PROGRAMS = ("llmqat", "vllm", "llama-server", "llama-cli", "transformers", "python")
RUNS = {
    "plan": f"plan recipe.yaml {shlex.join(SMALL)}",
    "train": f"train recipe.yaml {shlex.join(SMALL)}",
    "status": "status run",
    "quantize": "quantize original --scheme int8 --method rtn --out 'int 8'",
    "audit": "audit original --scheme w8a8",
    "audit, packed": "audit int4",
    "eval": "eval int4 --reference original --text text.txt --window 32 --max-windows 3",
    "eval, alone": "eval int4 --text text.txt --window 32 --max-windows 3",
    "compare": "compare int4 original --reference original --text text.txt --window 32 --max-windows 3",
    "sensitivity": "sensitivity original --group-size 32 --text text.txt --block-size 32 --blocks 2",
    "synthesize": "synthesize original --tokens 64 --block-size 32 --strategy sampling --out written",
    "cache-teacher": f"cache-teacher recipe.yaml {shlex.join(SMALL)} --out teacher",
    "chat": "chat int4 --prompt Hello --max-new-tokens 2",
    "push": "push int4 someone/int4 --license mit --dry-run published",
    "recipes": "recipes",
    "help": "help",
    **{f"export, {name}": f"export int4 --format {name} --out 'as {name}.{name}'" for name in CONVERSIONS},
}
"""Command, and what differs where it is there twice -> its words; they are run in this order in one folder."""


@pytest.fixture(scope="module")
def place(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("next")
    (folder / "original").symlink_to(tiny_folder)
    (folder / "text.txt").write_text("some words that are repeated many times over. " * 60)
    (folder / "recipe.yaml").write_text("model: original\noutput: run\n")
    return folder


def lines_of(words: str) -> list[str]:
    shared.console.width = shared.errors.width = 60  # narrower than the commands are long
    done = CliRunner(env={"COLUMNS": "60", "TERM": "dumb"}).invoke(app, shlex.split(words))
    assert done.exit_code == 0, done.output
    return [line for line in done.output.splitlines() if line.strip()]


def test_every_command_is_run() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {name.partition(",")[0] for name in RUNS} == commands - SHOWN_ELSEWHERE


def test_a_command_ends_with_those_that_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines_of("quantize original --group-size 32 --method rtn --out int4")
    for name, words in RUNS.items():
        lines = lines_of(words)
        following = [line.removeprefix("next: ") for line in lines if line.startswith("next: ")]
        assert following, (name, lines)
        if name != "status":
            shown = [line for line in lines if not line.startswith("      needs ")]
            assert shown[-len(following) :] == [f"next: {line}" for line in following], name
        for line in following:
            _check(line)
    assert lines_of(RUNS["chat"])[-1] == "next: llmqat eval int4 --reference original"
    assert "on this machine, as a run of" in lines_of(RUNS["plan"])[0]  # which `train` has left


def _check(line: str) -> None:
    """Parses each command of a line of shell as its program would."""
    words = shlex.split(line)
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        first, rest = words[:end], words[end + 1 :]
        program, *given = [word for word in first if not word.startswith("VLLM_")]
        assert program in PROGRAMS, line
        if program == "llmqat":
            name, *arguments = given
            typer.main.get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
        words = rest

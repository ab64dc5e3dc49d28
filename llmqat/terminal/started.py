"""What the command line is called: `llmqat`, or `python SCRIPT` where a script adds something of its own and runs it.

A scheme, a stage or a format of a script's own is known to no other program, so the commands that are proposed begin
with that script.
"""

from __future__ import annotations

import shlex
from pathlib import Path

LLMQAT = "llmqat"
_name = LLMQAT


def program_started_as(started: str) -> str:
    """Returns what a command line begins with whose process has `started` as its sys.argv[0], as a shell takes it."""
    path = Path(started)
    is_script = path.suffix == ".py" and path.parts[-2:] != (LLMQAT, "__main__.py")
    return shlex.join(["python", started]) if is_script else LLMQAT


def name_program(started: str) -> None:
    """Says once that this process is a command line, which was started as `started`."""
    global _name
    _name = program_started_as(started)


def program() -> str:
    """Returns what command lines begin with in this process; `llmqat` where it is no command line itself."""
    return _name


def with_program(line: str, name: str | None = None) -> str:
    """Returns a command of llmqat that begins with the program `name`, or else this process's; others as they are."""
    name = program() if name is None else name
    return name + line.removeprefix(LLMQAT) if line.startswith(f"{LLMQAT} ") else line

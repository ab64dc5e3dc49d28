"""What a run folder says of its run: whether it is running, how far it is, and what to do next. Imports no torch.

    status.json     written by the run (recipe/record.py): at each stage, at each logged step, and every few seconds
    results.json    there when the run has finished
    checkpoints/    tells how far training is when status.json is missing

On this machine, a dead process is recognized by its id. On another machine, only the age of the last status is known.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmqat.terminal import duration, with_program

STATUS_FILE = "status.json"
SECONDS_BETWEEN_SIGNS = 10.0
"""A run writes its status at least so often."""
SILENT_SECONDS = 6 * SECONDS_BETWEEN_SIGNS
"""After so long without a sign, a run on another machine is not said to go on."""
RECIPE_FILE, RESULTS_FILE, TRAINER_FOLDER, CHECKPOINT_FOLDER = "recipe.yaml", "results.json", "checkpoints", "model"

USER_MISTAKES = (ValueError, OSError, ImportError, FloatingPointError)
"""Exceptions that mean a mistake of the user: wrong input, files or installed packages."""

State = Literal["running", "finished", "interrupted", "failed"]
Life = Literal["lives", "silent", "gone"]


@dataclass(frozen=True)
class RunStatus:
    """What a run last said of itself."""

    state: State
    pid: int
    host: str
    processes: int
    started: float
    """Seconds since 1970, as `updated`."""
    updated: float
    stage: str = ""
    doing: str = ""
    """How far the stage is, in words."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of each stage that is done."""
    step: Mapping[str, Any] | None = None
    """Step, steps, loss, learning rate, tokens a second and seconds left, at the last step that was logged."""
    error: str = ""
    is_users: bool = False
    """Whether the error is the user's to mend."""
    program: str = "llmqat"
    """What the command line began with that started it: `llmqat`, or `python SCRIPT`."""

    def to_json(self) -> str:
        """Returns it as the file has it."""
        return json.dumps({"schema": 1, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunStatus:
        """Returns what `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = json.loads(text)
            del values["schema"]
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"it holds no status of a run ({error!r})") from error

    def life(self, now: float) -> Life:
        """Returns "gone" for a dead process of this machine, else by the last sign of life "lives" or "silent".

        Args:
            now: seconds since 1970.
        """
        if self.host == socket.gethostname() and not _lives(self.pid):
            return "gone"
        return "lives" if now - self.updated <= SILENT_SECONDS else "silent"


@dataclass(frozen=True)
class Found:
    """What is known of the run in a folder."""

    folder: Path
    state: str
    """running, silent, killed, interrupted, failed, finished, or unknown."""
    lines: tuple[str, ...]
    status: RunStatus | None

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON takes it."""
        status = None if self.status is None else asdict(self.status)
        return {"folder": str(self.folder), "state": self.state, "status": status}


def look(folder: Path, now: float | None = None) -> Found:
    """Returns what the run folder `folder` says of its run.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
        ValueError: its status cannot be read.
    """
    if not (folder / RECIPE_FILE).is_file():
        what = "is there, and holds no run" if folder.is_dir() else "is not there"
        raise FileNotFoundError(f"{folder} {what}; give the output folder of `llmqat train`, with its {RECIPE_FILE}")
    now = time.time() if now is None else now
    status = _read(folder / STATUS_FILE)
    again = _again(folder, status)
    life: Life = "gone" if status is None or status.state != "running" else status.life(now)
    if (folder / RESULTS_FILE).is_file() and life == "gone":
        return Found(folder, "finished", (*_finished(folder, status), *_history(status)), status)
    if status is None:
        where = _last_checkpoint(folder) or "there is no checkpoint of a training yet"
        return Found(folder, "unknown", (f"{folder}: there is no status.json; {where}", again), None)
    heard = f"last sign of life {duration(max(0.0, now - status.updated))} ago{_where(status)}"
    if life == "lives":
        return Found(folder, "running", (f"{folder}: {_doing(status)}", heard, *_history(status)), status)
    if life == "silent":
        text = f"{folder}: not heard of for long; it was at {_TIME_LEFT.sub('', _doing(status))}"
        return Found(folder, "silent", (text, heard, f"if it has ended, {again}"), status)
    ended = "ended without a message (killed, or out of memory)" if status.state == "running" else status.state
    error = (status.error,) if status.error else ()
    resumed = tuple(line for line in (_last_checkpoint(folder), again) if line)
    if status.is_users:
        resumed = (*resumed[:-1], f"fix this first, then: {again.partition(': ')[2]} KEY=VALUE ...")
    lines = (f"{folder}: {ended} at {_TIME_LEFT.sub('', _doing(status))}", *error, heard, *_history(status), *resumed)
    return Found(folder, "killed" if status.state == "running" else status.state, lines, status)


def _read(file: Path) -> RunStatus | None:
    try:
        return RunStatus.from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file}: {error}; delete it, and the next start of the run writes it anew") from error


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


_TIME_LEFT = re.compile(r", [^,;]* left(?=;|$)")


def _doing(status: RunStatus) -> str:
    return ": ".join(part for part in (status.stage or "the beginning", status.doing) if part)


def _where(status: RunStatus) -> str:
    together = f" and {status.processes - 1} more" if status.processes > 1 else ""
    where = "this machine" if status.host == socket.gethostname() else status.host
    return f", from process {status.pid}{together} on {where}"


def _history(status: RunStatus | None) -> tuple[str, ...]:
    if status is None:
        return ()
    begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.started))
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in status.seconds.items())
    return (f"begun {begun}{f'; done: {stages}' if stages else ''}",)


def _finished(folder: Path, status: RunStatus | None) -> tuple[str, ...]:
    ended = "" if status is None else f", {duration(status.updated - status.started)} after it began"
    chat = with_program(f"llmqat chat {shlex.quote(str(folder / CHECKPOINT_FOLDER))}", _program(status))
    return f"{folder}: finished{ended}", f"next: {chat}"


def _program(status: RunStatus | None) -> str:
    return "llmqat" if status is None else status.program


def _again(folder: Path, status: RunStatus | None) -> str:
    launched = _program(status)
    if status is not None and status.processes > 1:
        started = launched.removeprefix("python ") if launched.startswith("python ") else f"-m {launched}"
        launched = f"accelerate launch --num_processes {status.processes} {started}"
    return f"to resume it: {launched} train {shlex.quote(str(folder))}"


def _last_checkpoint(folder: Path) -> str:
    """Returns how far the trainer's last checkpoint is, in words; empty where there is none."""
    steps = []
    for file in (folder / TRAINER_FOLDER).glob("checkpoint-*/trainer_state.json"):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            steps.append((int(state["global_step"]), int(state["max_steps"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it is being written
    return "the last checkpoint is of step {:,} of {:,}".format(*max(steps)) if steps else ""

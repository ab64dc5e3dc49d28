"""The run says where it is, in its folder: `status.json`, for `llmqat status` in another terminal or machine.

It is written when a stage begins and at logged steps, and every few seconds by a thread, with what the bars show.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from llmqat.files import write_whole
from llmqat.recipe.training import Step
from llmqat.status import SECONDS_BETWEEN_SIGNS, STATUS_FILE, USER_MISTAKES, RunStatus
from llmqat.terminal import program
from llmqat.terminal.bars import what_bars_say

log = logging.getLogger(__name__)


class RunRecord:
    """Writes the status of a run while it is entered, and how it ended."""

    def __init__(self, folder: Path, processes: int, goes_on: bool = False) -> None:
        """Takes the run folder, how many processes run together, and whether an interrupted run goes on."""
        now = time.time()
        self.goes_on = goes_on
        self.file = folder / STATUS_FILE
        self.status = RunStatus("running", os.getpid(), socket.gethostname(), processes, now, now, program=program())
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="llmqat-status", daemon=True)

    def __enter__(self) -> RunRecord:
        """Begins to write."""
        self._say()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Writes how it ended."""
        self._ended.set()
        self._thread.join()
        if error is None:
            self._say(state="finished", stage="", doing="")
        elif isinstance(error, KeyboardInterrupt):
            self._say(state="interrupted")
        else:
            words, is_users = " ".join(str(error).split()), isinstance(error, USER_MISTAKES)
            self._say(
                state="failed", error=words if is_users else f"{type(error).__name__}: {words}", is_users=is_users
            )

    def begin(self, stage: str) -> None:
        """Says that a stage begins."""
        self._say(stage=stage, doing="")

    def end(self, stage: str, seconds: float) -> None:
        """Says how long a stage has taken."""
        self._say(seconds={**self.status.seconds, stage: seconds})

    def tell(self, step: Step) -> None:
        """Says how far the training is; the disk hears of quick steps once a second."""
        is_due = time.time() - self.status.updated >= 1 or step.step == step.steps
        self._say(to_disk=is_due, step=step.to_dict(), doing=str(step))

    def _beat(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_SIGNS):
            said = what_bars_say() if self.status.stage != "train" else ""
            changes: dict[str, Any] = {"doing": said} if said else {}
            self._say(**changes)

    def _say(self, *, to_disk: bool = True, **changes: Any) -> None:
        with self._lock:
            self.status = replace(self.status, **changes)
            if not to_disk:
                return
            self.status = replace(self.status, updated=time.time())
            try:
                write_whole(self.file, self.status.to_json(), lasting=False)
            except OSError as error:  # a run does not end because nobody can be told
                log.debug("%s could not be written: %s", self.file, error)

"""Stages of a command: each says when it begins, and how long it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from llmqat.terminal.bars import duration

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who else is told of stages."""

    def begin(self, stage: str) -> None:
        """A stage begins."""

    def end(self, stage: str, seconds: float) -> None:
        """A stage has ended; what it took, all its starts together."""


class Stages:
    """Times stages, and says in the log when one begins and ends."""

    def __init__(self, listener: Listener | None = None) -> None:
        self.listener, self.seconds = listener, dict[str, float]()

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        """Times what happens inside as the stage `name`; `what` tells the user about it."""
        log.info("%s: %s", name, what)
        if self.listener is not None:
            self.listener.begin(name)
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        log.info("%s: done in %s", name, duration(seconds))
        if self.listener is not None:
            self.listener.end(name, self.seconds[name])

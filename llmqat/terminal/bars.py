"""Bars: how far something is, in words that are the same on a terminal, in a file and in a log.

    with Bar("text", "token", total=65_536) as bar:
        bar.update(1_024)
    for block in Bar("gptq", "block", blocks): ...

On a terminal all bars of a process stand below each other and are gone when they are done. Elsewhere, and in a file of
`--log`, there is a line a minute: "gptq: 12 of 30 blocks, 3.1 min, about 4.6 min left". A bar is shown where this
package logs what it does (the command line has the main process do so), so many processes have one set of bars.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from types import TracebackType
from typing import Any, ClassVar

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from llmqat.terminal.consoles import errors, is_terminal

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60.0
BESIDE_BAR = {"beside_bar": True}
"""Marks a line of the log that says what a bar shows where there is one."""


class Bar:
    """The progress of something: iterate over it to get its items, or enter it and call `update`."""

    _last_line = 0.0  # when any bar was last written about in the log
    _entered: ClassVar[list[Bar]] = []

    def __init__(
        self,
        what: str,
        unit: str,
        items: Iterable[Any] = (),
        *,
        total: int | None = None,
        shown: bool | None = None,
        logged: bool = True,
    ) -> None:
        """Makes a bar that is not shown yet.

        Args:
            what: what is done, in a word or two.
            unit: what is counted, in the singular.
            items: what is iterated over, if it is.
            total: how many there are; the length of `items` where that is not given, if they have one.
            shown: whether; where not given, this package's log level says.
            logged: whether lines are written as well; False where the caller writes better ones.
        """
        self.what, self.unit, self.items, self.note = what, unit, items, ""
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.done = 0
        self._shown = log.isEnabledFor(logging.INFO) if shown is None else shown
        self._logged = logged
        self._task: TaskID | None = None
        self._start = self._resumed = time.monotonic()
        self._earlier = 0

    def __enter__(self) -> Bar:
        """Shows the bar."""
        self._start = self._resumed = time.monotonic()
        Bar._entered.append(self)
        Bar._last_line = max(Bar._last_line, self._start - SECONDS_BETWEEN_LINES / 2)
        if self._shown and bars_move():
            self._task = _shown().add_task(self.what, total=self.total, bar=self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Takes the bar away."""
        Bar._entered.remove(self)
        if self._task is not None:
            _take_away(self._task)
            self._task = None

    def __iter__(self) -> Iterator[Any]:
        """Yields the items, and counts those that were worked on."""
        with self:
            for item in self.items:
                yield item
                self.update(self.done + 1)

    def update(self, done: int, total: int | None = None, note: str | None = None) -> None:
        """Says that `done` of `total` are done, and with a note what else there is to know."""
        self.done = done
        self.total = self.total if total is None else total
        self.note = self.note if note is None else note
        if self._task is not None:
            _shown().update(self._task, completed=done, total=self.total)
        if self._logged and self._shown and is_line_due():
            log.info("%s: %s", self.what, self.said(), extra=BESIDE_BAR)

    def done_before(self, done: int) -> None:
        """Says that an earlier start did the first `done`, so that they do not count for the time left."""
        self._earlier, self._resumed = done, time.monotonic()

    def said(self) -> str:
        """Returns how far it is: '12 of 30 blocks, 3.1 min, about 4.6 min left'."""
        seconds = time.monotonic() - self._start
        of = f" of {self.total:,}" if self.total else ""
        parts = [f"{self.done:,}{of} {plural(self.unit)}", *([self.note] if self.note else [])]
        if self.unit == "token" and self.done:
            parts.append(f"{self.done / max(seconds, 1e-9):,.0f} tokens/s")
        parts.append(duration(seconds))
        now_done = self.done - self._earlier
        if self.total and now_done > 0 and self.done < self.total:
            each = (time.monotonic() - self._resumed) / now_done
            parts.append(f"about {duration(each * (self.total - self.done))} left")
        return ", ".join(parts)


def progress(what: str, unit: str) -> Callable[[Iterable[Any]], Bar]:
    """Returns a wrapper of an iterable that shows how far it is."""
    return partial(Bar, what, unit)


def terminal_bar(what: str, unit: str) -> Callable[[Iterable[Any]], Bar]:
    """Returns a wrapper of an iterable that shows a bar on a terminal and nothing elsewhere, for calls from Python."""
    return partial(Bar, what, unit, shown=bars_move() and log.isEnabledFor(logging.WARNING), logged=False)


def is_line_due() -> bool:
    """Returns whether a minute has passed since a bar was last written about; then another begins."""
    now = time.monotonic()
    if now - Bar._last_line < SECONDS_BETWEEN_LINES:
        return False
    Bar._last_line = now
    return True


def what_bars_say() -> str:
    """Returns what is being done in this process, and how far it is; empty where no bar says so."""
    return "; ".join(f"{bar.what}: {bar.said()}" for bar in [*Bar._entered])


def bars_move() -> bool:
    """Returns whether there are bars: standard error is a terminal whose lines can be written over."""
    return is_terminal(errors.file) and not errors.is_dumb_terminal


def stop_bars() -> None:
    """Takes all bars away: what raised inside one may not have done so."""
    global _progress
    if _progress is not None:
        _progress.stop()
        _progress = None


def duration(seconds: float) -> str:
    """Returns seconds as people say them: '34 s', '3.1 min', '2.4 h'."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5_970 else f"{seconds / 3600:.1f} h"


def plural(unit: str) -> str:
    """Returns the plural of a unit that is counted."""
    return f"{unit}es" if unit.endswith(("ch", "s", "x")) else f"{unit}s"


class _Said(ProgressColumn):
    """What a bar says, as of now."""

    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        return Text(bar.said(), no_wrap=True, overflow="ellipsis")


_progress: Progress | None = None


def _shown() -> Progress:
    """Returns the bars of this process, on the screen."""
    global _progress
    if _progress is None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(12), _Said())
        _progress = Progress(*columns, console=errors, transient=True, refresh_per_second=4)
        _progress.start()
    return _progress


def _take_away(task: TaskID) -> None:
    if _progress is None:
        return
    _progress.remove_task(task)
    if not _progress.tasks:
        stop_bars()

"""Consoles: any text, whatever the terminal can show, and in files and pipes lines as long as they are.

Two things destroy a text on its way to the screen. A terminal that is not UTF-8 (a pipe under LANG=C, PYTHONIOENCODING)
cannot encode some characters, and Python then raises after the work is done; `show_any_text` lets it show them in
another way. And rich reads "[wip]" as markup and ":x:" as an emoji; the consoles made here read a text as it is.

A file and a pipe have no width. Rich takes them for 80 columns wide and cuts what is wider; these consoles cut nothing.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from typing import IO, Any

from rich.console import Console, ConsoleDimensions
from rich.control import Control

PLAIN = {
    "–": "-",
    "—": "-",
    "×": "x",
    "±": "+-",
    "…": "...",
    "·": ".",
    "•": "*",
    "→": "->",
    "’": "'",
    "Ŵ": "W^",
    "²": "^2",
}
"""Characters that llmqat itself writes, and what stands for them where they cannot be shown."""
_ERRORS = "llmqat-plain"
_NO_END = 100_000
"""Columns of what has no width."""


def show_any_text() -> None:
    """Lets standard output and standard error take any text: what their encoding lacks is shown in plain letters."""
    codecs.register_error(_ERRORS, _plain)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # notebooks and tests put other streams there
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)


class PlainConsole(Console):
    """A console that shows texts as they are, on lines of any length where it writes to no terminal.

    Attributes:
        copy: gets what is printed as well; None for nobody.
    """

    copy: Console | None = None

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints as rich does."""
        super().print(*objects, **options)
        is_drawing = any(isinstance(one, Control) for one in objects)  # of a bar
        if not is_drawing:
            self.note(*objects, **options)

    def note(self, *objects: Any, **options: Any) -> None:
        """Prints to the copy alone what has been shown in another way."""
        if self.copy is not None and not self.quiet:
            self.copy.print(*objects, **options)

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines; COLUMNS in the environment and a width that was set come first."""
        if self._width is None and not is_terminal(self.file):
            return ConsoleDimensions(_NO_END, 25)
        return super().size

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


def plain_console(*, stderr: bool = False, width: int | None = None, file: IO[str] | None = None) -> PlainConsole:
    """Returns a console that shows texts as they are: brackets are no markup, and ":x:" is no emoji."""
    return PlainConsole(stderr=stderr, width=width, file=file, markup=False, emoji=False, highlight=False)


def is_terminal(stream: IO[Any]) -> bool:
    """Returns whether somebody looks at `stream` as it is written; False for files, pipes and closed streams."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def drop_output() -> None:
    """Lets standard output go nowhere from here on: its reader is gone, and Python would complain at its end."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = (PLAIN.get(letter) or _escaped(letter) for letter in error.object[error.start : error.end])
    return "".join(shown), error.end


def _escaped(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode("ascii")


console = plain_console()
"""Standard output: what a command was asked for."""
errors = plain_console(stderr=True)
"""Standard error: how far it is, and what went wrong."""

"""What is shown on a terminal: any text, whatever the terminal can show.

Two things destroy a text on its way to the screen. A terminal that is not UTF-8 (a pipe under LANG=C, PYTHONIOENCODING)
cannot encode some characters, and Python then raises after the work is done; `show_any_text` lets it show them in
another way. And rich reads "[wip]" as markup and ":x:" as an emoji; the consoles made here read a text as it is.
"""

from __future__ import annotations

import codecs
import sys

from rich.console import Console

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


def show_any_text() -> None:
    """Lets standard output and standard error take any text: what their encoding lacks is shown in plain letters."""
    codecs.register_error(_ERRORS, _plain)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # notebooks and tests put other streams there
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)


def plain_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Returns a console that shows texts as they are: brackets are no markup, and ":x:" is no emoji."""
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = (PLAIN.get(letter) or _escaped(letter) for letter in error.object[error.start : error.end])
    return "".join(shown), error.end


def _escaped(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode("ascii")

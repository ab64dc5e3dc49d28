"""The log of a command: stamped lines on the screen, and everything in a file where `--log` names one.

    log = CommandLog(main_process=True, path=Path("run.log"), heading="llmqat train recipe.yaml")
    ...
    log.end()

The screen has what llmqat says, and what libraries call an error (all they say where train.log_level or
TRANSFORMERS_VERBOSITY asks for more). Their warnings ("... is deprecated") are for whoever
works on llmqat: they are in the file alone. The file has what the screen has as well, without colours and bars, each
line with date and time.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

from llmqat.terminal.bars import bars_move
from llmqat.terminal.consoles import console, errors, is_terminal, plain_console

LIBRARIES = ("transformers", "datasets", "huggingface_hub", "lm_eval")
"""They give their loggers handlers of their own, which write to standard error."""
BARS_OFF = {
    "transformers.utils.logging": "disable_progress_bar",
    "datasets.utils.tqdm": "disable_progress_bars",
    "huggingface_hub.utils.tqdm": "disable_progress_bars",
}
"""Module -> its function that turns off the bars of a library that is imported already."""
OWN = "llmqat"
STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class ScreenHandler(logging.Handler):
    """Shows records on standard error, each with the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a record, unless a bar shows the same or it is a library's and no error."""
        if not _is_for_users(record) or (getattr(record, "beside_bar", False) and bars_move()):
            return
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        line = Text.assemble(
            (time.strftime("%H:%M:%S "), "dim"), (level + record.getMessage(), STYLES.get(record.levelno, ""))
        )
        try:
            Console.print(errors, line, soft_wrap=True)  # the file has a handler of its own
        except Exception:
            self.handleError(record)


def _is_for_users(record: logging.LogRecord) -> bool:
    """Returns whether a record is llmqat's, an error, or of a library that was asked to say more (train.log_level)."""
    library = record.name.partition(".")[0]
    asked = logging.getLogger(library).getEffectiveLevel() < logging.WARNING
    return library == OWN or record.levelno >= logging.ERROR or asked


class LogFile(io.StringIO):
    """A file each of whose lines begins with date and time; written to as soon as a line is whole."""

    def __init__(self, path: Path) -> None:
        """Opens `path` to append to.

        Raises:
            OSError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError as error:
            raise type(error)(f"--log={path} cannot be written ({error.strerror}); give another file") from error
        super().__init__()
        self._line = ""

    def write(self, text: str) -> int:
        """Writes what is whole of `text`, line by line."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line.rstrip()}".rstrip() + "\n")
        return len(text)

    def close(self) -> None:
        """Writes the line that has not ended, and closes the file."""
        if not self._file.closed:
            if self._line:
                self.write("\n")
            self._file.close()
        super().close()


class FileHandler(logging.Handler):
    """Writes every record, libraries' with the name of their logger."""

    def __init__(self, file: LogFile) -> None:
        super().__init__()
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        origin = "" if record.name.partition(".")[0] == OWN else f"{record.name}: "
        try:
            self.file.write(f"{level}{origin}{record.getMessage()}\n")
        except Exception:
            self.handleError(record)


class CommandLog:
    """The log of one command."""

    def __init__(self, *, main_process: bool, path: Path | None, heading: str) -> None:
        """Begins it: from here on records are shown, and written to `path` if it is given.

        Args:
            main_process: others show nothing but warnings of libraries turned errors, and write no file.
            path: the file.
            heading: its first line: command and version.

        Raises:
            OSError: the file cannot be written.
        """
        root = logging.getLogger()
        self._handlers: list[logging.Handler] = []
        self.file = LogFile(path) if main_process and path is not None else None
        if not root.handlers:
            self._handlers.append(ScreenHandler())
        if self.file is not None:
            self._handlers.append(FileHandler(self.file))
            self.file.write(f"{heading}\n")
            console.copy = errors.copy = plain_console(file=self.file)
        for handler in self._handlers:
            root.addHandler(handler)
        self._level_before = logging.getLogger(OWN).level
        logging.getLogger(OWN).setLevel(logging.INFO if main_process else logging.ERROR)
        console.quiet = not main_process

    def write_traceback(self) -> None:
        """Writes the traceback of the exception that is handled, to the file alone."""
        if self.file is not None:
            self.file.write(traceback.format_exc())

    def end(self) -> None:
        """Ends it."""
        console.copy = errors.copy = None
        console.quiet = False
        logging.getLogger(OWN).setLevel(self._level_before)
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
        if self.file is not None:
            self.file.close()


class _LibraryLogger(logging.Logger):
    """A logger that hands its records on and has no handler, whatever the library wants."""

    propagate = property(lambda self: True, lambda self, value: None)

    def addHandler(self, hdlr: logging.Handler) -> None:
        """Takes none."""


def quiet_libraries(*, main_process: bool) -> None:
    """Has libraries log through ours, imported or not, and draw no bars beside ours.

    Downloads keep theirs, on a terminal of the main process alone: nothing of ours shows how far they are.
    For a process of the command line, not for one in which somebody else uses these libraries too.
    """
    usual = logging.getLoggerClass()
    logging.setLoggerClass(_LibraryLogger)
    for name in LIBRARIES:
        logging.getLogger(name)
    logging.setLoggerClass(usual)
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        if not isinstance(logger, _LibraryLogger):  # imported before, by a script that runs the command line
            logger.handlers.clear()
            logger.propagate = True
    logging.captureWarnings(True)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the hub's bars do not ask it
    if not (main_process and is_terminal(errors.file)):
        for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(variable, "1")
        for module, function in BARS_OFF.items():
            if module in sys.modules:
                getattr(sys.modules[module], function)()

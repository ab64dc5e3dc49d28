"""The screen: what is shown on a terminal, in a file and in a pipe.

consoles.py    any text on a terminal of any encoding, and as wide as it is where there is no terminal
tables.py      tables that leave out columns before they break names
bars.py        how far something is: a bar on a terminal, else a line a minute
stages.py      stages of a command, timed
logs.py        stamped lines, and the file of `--log`
started.py     what the commands that are proposed begin with
"""

from __future__ import annotations

from llmqat.terminal.bars import Bar, duration, progress, stop_bars, terminal_bar
from llmqat.terminal.consoles import PLAIN, console, drop_output, errors, is_terminal, plain_console, show_any_text
from llmqat.terminal.logs import CommandLog, quiet_libraries
from llmqat.terminal.stages import Stages
from llmqat.terminal.started import name_program, program, with_program
from llmqat.terminal.tables import Column, FittedTable, markdown_table

__all__ = [
    "PLAIN",
    "Bar",
    "Column",
    "CommandLog",
    "FittedTable",
    "Stages",
    "console",
    "drop_output",
    "duration",
    "errors",
    "is_terminal",
    "markdown_table",
    "name_program",
    "plain_console",
    "program",
    "progress",
    "quiet_libraries",
    "show_any_text",
    "stop_bars",
    "terminal_bar",
    "with_program",
]

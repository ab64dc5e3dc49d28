"""The screen: what is shown on a terminal, in a file and in a pipe.

consoles.py    any text on a terminal of any encoding, and as wide as it is where there is no terminal
tables.py      tables that leave out columns before they break names
"""

from __future__ import annotations

from llmqat.terminal.consoles import PLAIN, is_terminal, plain_console, show_any_text
from llmqat.terminal.tables import Column, FittedTable

__all__ = ["PLAIN", "Column", "FittedTable", "is_terminal", "plain_console", "show_any_text"]

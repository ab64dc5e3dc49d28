from __future__ import annotations

import io
import sys

import pytest
from rich.table import Table

from llmqat.terminal import PLAIN, plain_console, show_any_text

ANY_TEXT = "1.5 ± 0.1, 4×4 – “café” 日本 🔥 \udce9"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "utf-8"])
def test_any_text_is_shown_on_a_terminal_of_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # a stream that cannot be told how to encode
    show_any_text()
    table = Table("model ×")
    table.add_row(ANY_TEXT)
    plain_console(width=200).print(table)
    print(ANY_TEXT)
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "1.5" in shown
    assert shown.count("\\udce9") == 2, "half a character, as in the name of a file that is not UTF-8"
    if encoding == "ascii":
        assert "1.5 +- 0.1, 4x4 - \\u201ccaf\\xe9\\u201d \\u65e5\\u672c \\U0001f525" in shown
    if encoding == "latin-1":
        assert "1.5 ± 0.1, 4×4 - " in shown


def test_what_stands_for_a_character_can_be_shown_anywhere():
    assert all(text.isascii() for text in PLAIN.values())


def test_brackets_and_colons_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]):
    console = plain_console(width=120)
    table = Table("[b]heading[/b]", title="[red]title")
    table.add_row("x [wip]/:fire:/[/closed]")
    console.print(table)
    console.print("x [wip]/:fire:/[/closed]", style="dim")
    shown = capsys.readouterr().out
    assert shown.count("x [wip]/:fire:/[/closed]") == 2
    assert "[b]heading[/b]" in shown
    assert "[red]title" in shown

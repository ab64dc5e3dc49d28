"""What several commands show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmqat.cli.application import console

if TYPE_CHECKING:
    from llmqat.export import ExportReport


def print_checkpoint(report: ExportReport) -> None:
    """Shows the size of a checkpoint that was saved, where it is, and what can be done with it."""
    from llmqat.export.commands import server_commands

    parts = ", ".join(f"{part} {size:,}" for part, size in report.bytes.items() if size)
    console.print(f"{report.bits_per_weight:.2f} bits a packed weight; bytes: {parts}")
    console.print(f"checkpoint: {report.folder}", soft_wrap=True, style="bold")
    own = (f"llmqat {words}" for words in (f"chat {report.folder}", f"eval {report.folder} --text YOUR.txt"))
    commands = [*own, *server_commands(report.folder, report.served)]
    console.print("next: " + "\n      ".join(commands), soft_wrap=True)
    promised = [f"plain transformers loads it: {report.stock.loader}.from_pretrained({str(report.folder)!r})"]
    for note in report.notes or promised:
        console.print(f"- {note}", soft_wrap=True)

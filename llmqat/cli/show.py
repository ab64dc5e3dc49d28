"""What several commands show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmqat.cli.application import console, errors
from llmqat.terminal import with_program

if TYPE_CHECKING:
    from llmqat.export import ExportReport


def print_next(*commands: str, aside: bool = False) -> None:
    """Shows what can be run now, the best first: a line each, which no terminal breaks, and below it what it needs.

    Commands of llmqat begin with the script that this command line was started by, if there is one.

    Args:
        commands: as `export.commands.command` makes them, or other programs' lines; each is shown once.
        aside: show it on standard error, for commands whose output is data.
    """
    shown = errors if aside else console
    for line in dict.fromkeys(commands):
        shown.print(f"next: {with_program(line)}", soft_wrap=True)
        if (lacking := _needs(line)) is not None:
            shown.print(f"      needs {lacking}", soft_wrap=True, style="dim")


def _needs(line: str) -> str | None:
    """Returns what `line` needs that is not here; llmqat itself, whose lines alone stand in light commands, is."""
    if line.startswith("llmqat ") and "&&" not in line:
        return None
    from llmqat.export.commands import needs

    return needs(line)


def print_checkpoint(report: ExportReport, reference: str, *more: str) -> None:
    """Shows the size of a checkpoint that was saved, where it is, and what can be done with it.

    Args:
        report: of what was saved.
        reference: the original model.
        more: commands to propose beside those that run and judge it.
    """
    from llmqat.export.commands import command, server_commands, why_no_vllm

    parts = ", ".join(f"{part} {size:,}" for part, size in report.bytes.items() if size)
    console.print(f"{report.bits_per_weight:.2f} bits a packed weight; bytes: {parts}")
    console.print(f"checkpoint: {report.folder}", soft_wrap=True, style="bold")
    promised = [f"plain transformers loads it: {report.stock.loader}.from_pretrained({str(report.folder)!r})"]
    for note in report.notes or promised:
        console.print(f"- {note}", soft_wrap=True)
    if (reason := why_no_vllm(report.served)) is not None:
        console.print(f"- {reason}", soft_wrap=True)
    print_next(
        command("llmqat", "chat", report.folder),
        command("llmqat", "eval", report.folder, "--reference", reference),
        *server_commands(report.folder, report.served),
        *more,
    )

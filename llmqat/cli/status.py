"""The command `status`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmqat.cli.application import command, console
from llmqat.cli.options import JsonOption
from llmqat.paths import check_outputs
from llmqat.status import look


@command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a recipe.")],
    json_file: JsonOption = None,
) -> None:
    """Shows the progress of a run: stage, step, loss and time left. Or how it ended, and what is next.

    It looks into the folder alone, so it also works for a run on another machine that shares the disk.

    **Examples**

        llmqat status runs/smollm2-135m-int4

        watch llmqat status runs/smollm2-135m-int4
    """
    check_outputs({"--json": json_file}, [run])
    found = look(run)
    for number, line in enumerate(found.lines):
        console.print(line, soft_wrap=True, style="bold" if number == 0 else None)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")

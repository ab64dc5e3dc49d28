"""The command `help`: the guides."""

from __future__ import annotations

from typing import Annotated

import typer

from llmqat.cli.application import COMMANDS, command, console
from llmqat.cli.show import print_next
from llmqat.guides import find_guide, for_terminal, guides
from llmqat.shipped import title


@command("help")
def guide(
    topic: Annotated[str | None, typer.Argument(metavar="TOPIC", help="A guide. Leave it out for a list.")] = None,
) -> None:
    """Shows a guide: how to install, choose a scheme, fine-tune, train, deploy, find out what went wrong.

    The guides are also the pages of llmqat/help in the repository.

    **Examples**

        llmqat help

        llmqat help quickstart

        llmqat help troubleshooting
    """
    if topic is None:
        found = guides()
        width = max(map(len, found))
        for name, file in found.items():
            console.print(f"  {name:{width}}  {title(file)}", soft_wrap=True)
        print_next("llmqat help quickstart")
        return
    if topic in COMMANDS and topic not in guides():
        raise ValueError(f"there is no guide {topic!r}; its options: llmqat {topic} --help. `llmqat help` lists guides")
    file = find_guide(topic)
    text = for_terminal(file.read_text(encoding="utf-8"))
    if console.is_terminal:
        from rich.markdown import Markdown

        console.print(Markdown(text))
    else:
        console.print(text, soft_wrap=True)
    if file.stem in COMMANDS:
        console.print(f"The options of the command: llmqat {file.stem} --help", soft_wrap=True)

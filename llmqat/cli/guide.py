"""The command `help`: the guides."""

from __future__ import annotations

from typing import Annotated

import typer

from llmqat.cli.application import COMMANDS, command, console
from llmqat.cli.show import print_next
from llmqat.guides import find_guide, for_terminal, guides, title


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
            console.print(f"  {name:{width}}  {title(file.read_text(encoding='utf-8'))}", soft_wrap=True)
        print_next("llmqat help quickstart")
        return
    name = topic.lower().replace("_", "-")
    if name in COMMANDS and name not in guides():
        raise ValueError(f"there is no guide {topic!r}; its options: llmqat {name} --help. `llmqat help` lists guides")
    text = for_terminal(find_guide(topic).read_text(encoding="utf-8"))
    if console.is_terminal:
        from rich.markdown import Markdown

        console.print(Markdown(text))
    else:
        console.print(text, soft_wrap=True)
    if name in COMMANDS:
        console.print(f"The options of the command: llmqat {name} --help", soft_wrap=True)

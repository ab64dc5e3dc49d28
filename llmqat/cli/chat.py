"""The command `chat`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llmqat.cli.application import command, console, errors
from llmqat.cli.options import ModelArgument, SeedOption
from llmqat.cli.show import print_next

if TYPE_CHECKING:
    from llmqat.recipe import Conversation


@command()
def chat(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="Answer this and stop, instead of asking for lines.")] = None,
    system: Annotated[str | None, typer.Option(help="System message that opens the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token each time.")] = 0.7,
    seed: SeedOption = 0,
) -> None:
    """Talks with a model, word by word as it writes; completes plainly where it has no chat template.

    **Examples**

        llmqat chat runs/smollm2-135m-int4/model

        llmqat chat HuggingFaceTB/SmolLM2-135M --prompt "Once upon a time" --max-new-tokens 64
    """
    from llmqat.export.commands import command as command_of
    from llmqat.export.commands import option, original_of
    from llmqat.recipe import Conversation

    talk = Conversation.open(model, system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    judge = command_of("llmqat", "eval", model, *option("--reference", original_of(model)))
    if prompt is not None:
        _say(talk, prompt)
        print_next(judge, aside=True)
        return
    console.print(f"{talk.kind}; an empty line or Ctrl-D ends it, Ctrl-C ends an answer", style="dim")
    while line := _ask():
        _say(talk, line)
    print_next(judge, aside=True)


def _say(talk: Conversation, line: str) -> None:
    """Has the model answer, word by word on the screen."""
    console.note(f"> {line}", soft_wrap=True)
    console.note(talk.say(line), soft_wrap=True)
    if speed := talk.speed():
        errors.print(speed, style="dim")


def _ask() -> str:
    try:
        return console.input("> ").strip()
    except EOFError:
        return ""

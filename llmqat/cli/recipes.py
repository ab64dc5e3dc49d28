"""The command `recipes`: what llmqat ships to be copied."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from llmqat.cli.application import app, console
from llmqat.cli.show import print_next
from llmqat.paths import user_path
from llmqat.shipped import copy_shipped, shipped_files, shipped_recipes, title

recipes_app = typer.Typer(rich_markup_mode="markdown", add_completion=False)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback(invoke_without_command=True)
def recipes(ctx: typer.Context) -> None:
    """Lists the recipes that come with llmqat, and copies them.

    A recipe is run by its name, and a file of your own of that name comes first. Copy one to change it.

    **Examples**

        llmqat recipes

        llmqat recipes copy lora-int4

        llmqat plan lora-int4
    """
    if ctx.invoked_subcommand is not None:
        return
    names, files = shipped_recipes(), shipped_files()
    console.print("Recipes, for `llmqat train NAME` and `llmqat plan NAME`:")
    _list(names)
    console.print("Scripts and configurations:")
    _list({name: file for name, file in files.items() if name not in names})
    console.print("`llmqat recipes copy NAME [FOLDER]` copies one.")
    print_next("llmqat plan smollm2-135m-int4")


def _list(files: dict[str, Path]) -> None:
    width = max(map(len, files), default=0)
    for name, file in files.items():
        console.print(f"  {name:{width}}  {title(file)}", soft_wrap=True)


@recipes_app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `llmqat recipes` lists it.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to; made where it is not there.")] = Path("."),
) -> None:
    """Copies a recipe, a script, a configuration or a folder of them into a folder; never over a file that is there.

    **Examples**

        llmqat recipes copy lora-int4

        llmqat recipes copy accelerate/8-gpus-fsdp2.yaml configs

        llmqat recipes copy python
    """
    copied = copy_shipped(name, user_path(folder, "FOLDER"))
    for file in copied:
        console.print(f"{file}", soft_wrap=True)
    if name.removesuffix(".yaml") in shipped_recipes():
        print_next(shlex.join(["llmqat", "plan", str(copied[0])]))

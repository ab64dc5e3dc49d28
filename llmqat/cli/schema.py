"""The command `schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmqat.cli.application import command, console


@command()
def schema(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="A key to explain, such as train.learning_rate.")
    ] = None,
    reports: Annotated[
        bool, typer.Option("--reports", help="Tell of what llmqat writes as JSON instead: a field, or the JSON Schema.")
    ] = False,
) -> None:
    """Explains a key of a recipe, or a field of a report; without a key, prints the JSON Schema of all, for editors.

    An editor with yaml-language-server (VS Code's YAML extension, for one) then completes and checks a recipe whose
    first line is

        # yaml-language-server: $schema=recipe.schema.json

    **Examples**

        llmqat schema train.learning_rate

        llmqat schema calibrate.gptq

        llmqat schema > recipe.schema.json

        llmqat schema --reports > report.schema.json

        llmqat schema --reports rows.kl
    """
    if reports:
        if key is not None:
            from llmqat.recipe.schema import describe_report

            console.print(describe_report(key), soft_wrap=True)
            return
        from llmqat.evaluate.documents import document_schema

        console.print(json.dumps(document_schema(), indent=2, ensure_ascii=False), soft_wrap=True)
        return
    from llmqat.recipe.schema import describe_key, recipe_schema

    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) if key is None else describe_key(key)
    console.print(text, soft_wrap=True)

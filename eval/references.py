"""Writes the guides that are made from code: commands, keys of a recipe, public names of Python.

A test compares the pages with what this script would write.

    python eval/references.py
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterable
from itertools import pairwise
from types import ModuleType
from typing import Any

import typer.main
from transformers import TrainingArguments

import llmqat
from llmqat.cli import app
from llmqat.cli.application import COMMANDS, EXIT_CODES
from llmqat.config import ATTRIBUTES
from llmqat.files import write_whole
from llmqat.guides import guides
from llmqat.recipe.schema import key_rows
from llmqat.terminal import markdown_table, show_any_text

SHARED_OPTIONS = ("--log", "--help")
"""Options that every command has."""
ROOMS = {
    "llmqat.layers": (
        "Schemes, field by field.",
        ("PRESETS", "WeightConfig", "ActivationConfig", "KVCacheConfig", "Override", "audit"),
    ),
    "llmqat.calibrate": (
        "Calibration before training, or without it.",
        (
            *("calibrate", "STAGES", "RangesStage", "GPTQStage", "BlockwiseStage", "SmoothStage", "RotateStage"),
            *("CustomStage", "calibrate_activations", "measure_sensitivity", "allocate_bits"),
        ),
    ),
    "llmqat.data": (
        "Text from files, data sets and conversations, as blocks of tokens.",
        (
            *("DataConfig", "load_blocks", "load_splits", "TokenBlocks", "token_blocks", "save_blocks", "read_blocks"),
            "SOURCES",
        ),
    ),
    "llmqat.train": ("Training.", ("QuantizationMonitor",)),
    "llmqat.export": (
        "Other formats, and which programs can load a checkpoint.",
        ("write_gguf", "write_gptq", "write_onnx", "CONVERSIONS", "CLIENTS", "is_packed", "describe", "served_by"),
    ),
    "llmqat.recipe": (
        "What the commands do, as functions.",
        (
            *("load_recipe", "run", "plan_run", "quantize_model", "sensitivity_of", "synthesize_to", "compare_models"),
            "inspect_model",
        ),
    ),
    "llmqat.kernels": ("Products with packed weights.", ("KERNELS", "Kernel", "PackedWeight", "packed_linear")),
}
"""Module -> what it is for, and what of it is for users beside the names of `llmqat` itself."""


def main() -> None:
    """Writes the pages."""
    show_any_text()
    for topic, text in pages().items():
        write_whole(guides()[topic], text)
        print(guides()[topic])


def pages() -> dict[str, str]:
    """Returns topic -> text."""
    return {"commands": commands_page(), "recipe-keys": keys_page(), "python-api": python_page()}


def commands_page() -> str:
    """Returns the guide of all commands and their options."""
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = [
        "# Commands and their options",
        "",
        "`llmqat COMMAND --help` shows the same, with more examples.",
        "",
        _table(("command", "what it does"), [(f"`{name}`", _summary(known[name].help)) for name in COMMANDS]),
        "",
        "Every command has `--log FILE` (under torchrun `--log-file`), which appends all that is shown to a file. "
        "`llmqat --version` shows versions. `llmqat --install-completion` completes commands in your shell.",
        "",
        _table(("exit code", "meaning"), [(str(code), meaning) for code, meaning in EXIT_CODES.items()]),
    ]
    for name in COMMANDS:
        lines += ["", f"## llmqat {name}", "", _summary(known[name].help)]
        if rows := [row for parameter in known[name].params if (row := _option(parameter))]:
            lines += ["", _table(("option", "default", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def _option(parameter: Any) -> tuple[str, str, str] | None:
    if set(parameter.opts) & set(SHARED_OPTIONS):
        return None
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`", "", parameter.help or ""
    names = " ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    default = parameter.default
    plain = isinstance(default, (str, int, float)) and not isinstance(default, bool)
    return names, f"`{default}`" if plain else "", parameter.help or ""


def keys_page() -> str:
    """Returns the guide of all keys of a recipe, without those that are transformers' own."""
    theirs = {f"train.{field.name}" for field in dataclasses.fields(TrainingArguments)}
    rows = [row for row in key_rows() if row[0] not in theirs and ".mix." not in row[0]]
    lines = [
        "# Keys of a recipe",
        "",
        "`llmqat schema KEY` shows the same in a terminal. `llmqat schema > recipe.schema.json` writes a JSON Schema "
        "for editors. Any key can be given on the command line: `llmqat train RECIPE data.tokens=1000000`. `train` "
        "also has the fields of `transformers.TrainingArguments`, which are not repeated here. A source in `data.mix` "
        "has the keys of `data`.",
    ]
    sections = list(dict.fromkeys(_section(place) for place, *_ in rows))
    for section in sections:
        own = [row for row in rows if _section(row[0]) == section]
        lines += ["", f"## {section}", ""] if section else ["", "## At the top", ""]
        cells = [(f"`{place}`", kind, f"`{default}`" if default else "", text) for place, kind, default, text in own]
        lines.append(_table(("key", "type", "default", "meaning"), cells))
    return "\n".join(lines) + "\n"


def _section(place: str) -> str:
    """Returns the section that a key is listed in: that of a stage for a stage's keys, else the first word."""
    first, _, rest = place.partition(".")
    if not rest:
        return ""
    return f"calibrate.{rest.partition('.')[0]}" if first == "calibrate" else first


def python_page() -> str:
    """Returns the guide of the public names."""
    lines = [
        "# Python API",
        "",
        "`help(llmqat.NAME)` shows shapes, types, errors and sources. Names that are not listed here can change "
        "without notice.",
        "",
        "## llmqat",
        "",
        _names((name, importlib.import_module(llmqat._HOMES[name])) for name in llmqat.__all__),
    ]
    for place, (about, names) in ROOMS.items():
        module = importlib.import_module(place)
        lines += ["", f"## {place}", "", about, "", _names((name, module) for name in names)]
    return "\n".join(lines) + "\n"


def _names(found: Iterable[tuple[str, ModuleType]]) -> str:
    rows = [(f"`{name}{_arguments(getattr(module, name))}`", _about(module, name)) for name, module in found]
    return _table(("name", "what it is"), rows)


def _arguments(found: Any) -> str:
    """Returns the arguments of a function, by name."""
    return f"({', '.join(inspect.signature(found).parameters)})" if inspect.isfunction(found) else ""


def _about(module: ModuleType, name: str) -> str:
    found = getattr(module, name)
    if isinstance(found, type) or inspect.isroutine(found):
        return _summary((inspect.getdoc(found) or "").split(ATTRIBUTES)[0])
    statements = ast.parse(inspect.getsource(module)).body
    for one, following in pairwise(statements):
        if isinstance(one, ast.AnnAssign | ast.Assign) and ast.unparse(one).startswith((f"{name}:", f"{name} =")):
            if not isinstance(following, ast.Expr):
                raise ValueError(f"{module.__name__}.{name} has no text under it that says what it is")
            return _summary(str(ast.literal_eval(following.value)))
    home = next(
        one.module
        for one in statements
        if isinstance(one, ast.ImportFrom) and one.module and name in [alias.name for alias in one.names]
    )
    return _about(importlib.import_module(home), name)


def _summary(text: str | None) -> str:
    """Returns the first paragraph of a text, as one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Returns a table whose cells are one line each."""
    return markdown_table(heads, ([" ".join(cell.split()) for cell in row] for row in rows))


if __name__ == "__main__":
    main()

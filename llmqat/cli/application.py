"""The application: what every command shares. Paths as they are meant, exit codes, words on any terminal, `--log`."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from llmqat import __version__
from llmqat.heap import keep_freed_memory
from llmqat.paths import user_path, user_spec
from llmqat.status import USER_MISTAKES
from llmqat.terminal import CommandLog, drop_output, name_program, quiet_libraries, show_any_text, stop_bars
from llmqat.terminal import console as console  # all commands print to these two
from llmqat.terminal import errors as errors

USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""What click raises for words that it does not take; newer typer has a click of its own."""

EXIT_USER = 2
EXIT_GATE = 3
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
EXIT_CODES = {
    0: "done",
    1: "a fault of llmqat, or no memory left; shown with its traceback",
    EXIT_USER: "a mistake in what was given, told in one message (its traceback: llmqat --traceback COMMAND ...)",
    EXIT_GATE: "a gate is broken, what was measured is written all the same",
    EXIT_INTERRUPTED: "interrupted",
    EXIT_PIPE: "nobody reads any more what is shown, as in llmqat ... | head",
}
"""Of every command; `llmqat --help` ends with them."""

WORDS, LOG = "llmqat.words", "llmqat.log"
"""What a context of click holds for all: the words of the command line, and the command's log."""

LogOption = Annotated[
    Path | None,
    typer.Option(
        "--log",
        "--log-file",  # torchrun takes --log for one of its own
        help="Append all that is shown, and warnings of libraries, to this file, with date and time.",
    ),
]

SPECS = ("model", "models", "reference", "text", "prompts")
"""Parameters of commands that name models and texts: a path, or else a hub id and the like."""


def command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that makes a function a command, with `--log`, and with paths as `user_path` returns them."""

    def registered(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def called(context: typer.Context, log_file: Path | None, **values: Any) -> None:
            meant = {key: _as_meant(key, value) for key, value in values.items()}
            _begin_log(context, _as_meant("--log", log_file), meant.get("out"))
            function(**meant)

        signature = inspect.signature(function, eval_str=True)
        shared = [
            inspect.Parameter("log_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=LogOption),
            inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        ]
        parameters = [*signature.parameters.values(), *shared]
        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        app.command(name)(called)
        return function

    return registered


def _begin_log(context: typer.Context, file: Path | None, out: Path | None) -> None:
    """Begins the log of the command that is called."""
    if file is not None and out is not None and (file == out or out in file.parents):
        raise ValueError(f"--log={file} lies in --out={out}, which must not exist yet; put it beside that folder")
    words = shlex.join(context.meta[WORDS])
    heading = f"llmqat {__version__}: llmqat {words}"
    context.meta[LOG] = CommandLog(main_process=_is_main_process(), path=file, heading=heading)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _as_meant(name: str, value: Any) -> Any:
    if isinstance(value, Path):
        return user_path(value, name)
    if name in SPECS and isinstance(value, str):
        return user_spec(value, name)
    return [_as_meant(name, entry) for entry in value] if isinstance(value, list) else value


class _Group(typer.core.TyperGroup):
    """Turns a user's mistake into a message and exit code 2; anything else keeps its traceback and gives 1."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Runs the command line on a terminal of any encoding, or before a reader that leaves, such as head."""
        show_any_text()
        try:
            return super().main(*args, **options)
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # click and rich exit with 1
                drop_output()
                end.code = EXIT_PIPE
            raise

    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the names of all commands in the order of the help."""
        return sorted(super().list_commands(ctx), key=COMMANDS.index)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Keeps the words as they came."""
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command, and ends its log."""
        try:
            _check_words(ctx.meta[WORDS])
            return super().invoke(ctx)
        except USAGE_ERROR as error:
            _say_key_of_recipe(error, ctx.meta[WORDS])
            raise
        except BrokenPipeError:  # no mistake
            stop_bars()
            raise
        except USER_MISTAKES as error:
            stop_bars()
            if ctx.params.get("show_traceback"):
                traceback.print_exc()
            errors.print("error: ", style="bold red", end="")
            errors.print(str(error), soft_wrap=True)
            raise typer.Exit(EXIT_USER) from error
        except KeyboardInterrupt as error:
            stop_bars()
            resumed = f"; llmqat {ctx.invoked_subcommand} resumes when the same command is given again"
            errors.print(f"interrupted{resumed if ctx.invoked_subcommand in COMMANDS_THAT_GO_ON else ''}")
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except Exception as error:
            stop_bars()
            if LOG in ctx.meta and not isinstance(error, typer.Exit):
                ctx.meta[LOG].write_traceback()
            raise
        finally:
            if LOG in ctx.meta:
                ctx.meta.pop(LOG).end()


def _say_key_of_recipe(error: Any, words: list[str]) -> None:
    """Adds to the error of an option that a command with a recipe does not have how a key of the recipe is given."""
    option = getattr(error, "option_name", None)
    if option is None or error.ctx is None or not any(one.name == "overrides" for one in error.ctx.command.params):
        return
    from llmqat.config import ALIASES

    name = option.lstrip("-").replace("-", "_")
    key = {"data": "data.path"}.get(name) or ALIASES.get(name, name)
    place = next((place for place, word in enumerate(words) if word.partition("=")[0] == option), len(words))
    given = words[place].partition("=")[2] if place < len(words) else ""
    value = given or next(iter(words[place + 1 : place + 2]), "VALUE")
    error.message += f". Keys of the recipe are given without dashes: {key}={shlex.quote(value)}"


def _check_words(words: list[str]) -> None:
    """Raises ValueError for an empty word: a variable that is not set, and no path or gate that anybody means."""
    for before, word in zip(("", *words), words, strict=False):
        if word == "" or (word.startswith("--") and word.endswith("=")):
            option = word.removesuffix("=") or before
            raise ValueError(f"the word behind {option or 'llmqat'} is empty; give a value, or leave the option out")


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="**Exit codes**\n\n" + "\n\n".join(f"{code}: {meaning}" for code, meaning in EXIT_CODES.items()),
)

COMMANDS = (
    *("train", "plan", "status", "eval", "compare", "quantize", "sensitivity", "synthesize", "audit", "export"),
    *("chat", "cache-teacher", "push", "recipes", "schema", "help"),
)
"""In the order of the help."""

COMMANDS_THAT_TRAIN = ("train", "quantize", "sensitivity", "synthesize", "cache-teacher")
"""They allocate and free the same tensors for minutes."""

COMMANDS_THAT_GO_ON = ("train", "quantize", "synthesize", "cache-teacher")
"""They keep what is finished of an interrupted run, and begin with it."""

COMMANDS_OF_MANY_PROCESSES = ("train", "plan")
"""All others would do the same thing in each, and write over each other."""


def _print_versions(asked: bool) -> None:
    if asked:
        typer.echo(f"llmqat {__version__}")
        typer.echo(f"Python {platform.python_version()}")
        for package in ("torch", "transformers"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                typer.echo(f"{package} {importlib.metadata.version(package)}")
        raise typer.Exit


@app.callback()
def _start(
    ctx: typer.Context,
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Show the versions of llmqat, Python, torch and transformers.",
        ),
    ] = False,
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of every error.")] = False,
) -> None:
    """Low-bit quantization-aware training of Hugging Face causal language models.

    Begin with: llmqat quantize HuggingFaceTB/SmolLM2-135M --scheme int4 --out smollm2-int4
    """
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal():
        raise ValueError(
            f"WORLD_SIZE={given!r} is no number of processes; torchrun and accelerate set it, else unset it"
        )
    processes = int(given)
    if processes > 1 and ctx.invoked_subcommand not in COMMANDS_OF_MANY_PROCESSES:
        raise ValueError(
            f"WORLD_SIZE={processes}: llmqat {ctx.invoked_subcommand} runs in one process; start it without torchrun "
            f"and accelerate, or unset WORLD_SIZE (for many processes: {', '.join(COMMANDS_OF_MANY_PROCESSES)})"
        )
    if ctx.invoked_subcommand in COMMANDS_THAT_TRAIN:
        keep_freed_memory()


def main() -> None:
    """Runs the command line and exits with its code; also that of a script, which adds something of its own before."""
    name_program(sys.argv[0])
    quiet_libraries(main_process=_is_main_process())
    app()

"""Commands that train, and that prepare what a training reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmqat.cli.application import command, console
from llmqat.cli.options import (
    BatchSizeOption,
    ModelArgument,
    OutOption,
    OverridesArgument,
    OverwriteOption,
    RecipeArgument,
    SeedOption,
)
from llmqat.cli.show import print_checkpoint, print_next
from llmqat.paths import check_folder_output
from llmqat.terminal import Column, FittedTable

if TYPE_CHECKING:
    from llmqat.evaluate.compare import Comparison
    from llmqat.recipe import Recipe, RunResult


@command()
def train(recipe: RecipeArgument, overrides: OverridesArgument = None, overwrite: OverwriteOption = False) -> None:
    """Runs a recipe: calibrates, trains, saves a packed checkpoint and checks what it wrote, and compares it.

    The same command resumes an interrupted run.

    **Examples**

        llmqat train smollm2-135m-int4

        llmqat train smollm2-135m-int4 model=HuggingFaceTB/SmolLM2-135M train.max_steps=60 output=runs/mine

        accelerate launch -m llmqat train smollm2-135m-int4
    """
    from llmqat.recipe import ResultsNotWrittenError, load_recipe, run

    loaded = load_recipe(recipe, overrides or ())
    try:
        result = run(loaded, overwrite=overwrite)
    except ResultsNotWrittenError as error:
        _print_run(error.result, loaded)
        raise
    if result is not None:  # this is the main process
        _print_run(result, loaded)


@command("cache-teacher")
def cache_teacher(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(help="Folder to write to; a cache of the same model there is continued.")],
    overrides: OverridesArgument = None,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens whose probabilities are kept at each position.")] = 64,
    batch_size: BatchSizeOption = 4,
) -> None:
    """Runs the original model over a recipe's text once and keeps what it predicts, for `train` to learn from.

    Training then needs no teacher in memory. The same command resumes an interrupted one.

    **Examples**

        llmqat cache-teacher smollm2-135m-int4 --top-k 64 --out teacher

        llmqat train smollm2-135m-int4 teacher_cache=teacher
    """
    from llmqat.export.commands import command as command_of
    from llmqat.recipe import cache_teacher_of, load_recipe

    check_folder_output(out, "--out")
    cache = cache_teacher_of(load_recipe(recipe, overrides or ()), out, top_k=top_k, batch_size=batch_size)
    console.print(
        f"{out}: {len(cache):,} blocks, {cache.disk_bytes:,} bytes; the {top_k} most likely tokens have "
        f"{cache.mass():.2%} of the probability",
        soft_wrap=True,
    )
    print_next(command_of("llmqat", "train", recipe, *(overrides or ()), f"teacher_cache={out}"))


@command()
def synthesize(
    model: ModelArgument,
    out: OutOption,
    tokens: Annotated[str, typer.Option(help="Tokens to write: 65536, 64k (64,000) or 1M (1,000,000).")] = "65536",
    block_size: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 512,
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Most rows written at once, of up to 6 GiB together; part of what makes the text."),
    ] = 512,
    strategy: Annotated[str, typer.Option(help="llm-qat, sampling, chat or prompts.")] = "llm-qat",
    chat_share: Annotated[float | None, typer.Option(help="Share of chats, of llm-qat and sampling; 0.25.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Strategy prompts: a prompt a line, or .jsonl.")] = None,
    prompt_turns: Annotated[bool, typer.Option(help="A prompt is a user's turn of the chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="Logits are divided by it.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw of the most likely tokens that have this share together.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw of so many of the most likely tokens; off.")] = None,
    teacher_top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Keep so many of the model's most likely tokens a position, in OUT/teacher."),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(help="Server (vLLM) that runs the model and writes the text; may be repeated."),
    ] = None,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Generates training text with a model: shards of token blocks in parquet, with a report and samples to read.

    A run that was interrupted goes on when the same command is given again; more --tokens are more shards.

    **Examples**

        llmqat synthesize HuggingFaceTB/SmolLM2-135M --tokens 1M --out written

        llmqat synthesize HuggingFaceTB/SmolLM2-135M --strategy prompts --prompts beginnings.txt --out written

        llmqat synthesize HuggingFaceTB/SmolLM2-135M --tokens 1M --teacher-top-k 64 --out written

        llmqat synthesize HuggingFaceTB/SmolLM2-135M --tokens 1M --server http://localhost:8000 --out written

        llmqat train smollm2-135m-int4 data.path=written teacher_cache=written/teacher
    """
    from llmqat.data.shards import report_notes
    from llmqat.data.strategy import SynthesisConfig
    from llmqat.export.commands import command as command_of
    from llmqat.recipe import synthesize_to

    check_folder_output(out, "--out")
    values = {
        "block_size": block_size,
        "batch_size": batch_size,
        "seed": seed,
        "strategy": strategy,
        "chat_share": chat_share,
        "prompts": prompts,
        "prompt_turns": prompt_turns,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "server": server or (),
    }
    written = synthesize_to(
        model,
        out,
        tokens=_count(tokens),
        config=SynthesisConfig.model_validate(values),
        teacher_top_k=teacher_top_k,
        overwrite=overwrite,
    )
    report = written.manifest.report or {}
    console.print(written_table(report))
    for line in report_notes(report):
        console.print(line, soft_wrap=True)
    console.print(
        f"{out}: {written.blocks:,} blocks of {block_size} tokens, shards: {len(written.files)}; samples in "
        f"{out / 'README.md'}",
        soft_wrap=True,
    )
    cache = "" if teacher_top_k is None else f"teacher_cache={out / 'teacher'}"
    print_next(command_of("llmqat", "train", "smollm2-135m-int4", f"model={model}", f"data.path={out}", cache))


def written_table(report: dict[str, Any]) -> FittedTable:
    """Returns figures of the documents that a model has written, by their kind."""
    from llmqat.data.shards import REPORT_COLUMNS, report_rows

    ranks = (0, 2, 4, 5, 1, 3)
    columns = [Column(heading, rank) for heading, rank in zip(REPORT_COLUMNS, ranks, strict=False)]
    columns[0] = Column(REPORT_COLUMNS[0], 0, "name")
    table = FittedTable([*columns, Column(REPORT_COLUMNS[-1], 6, "prose")])
    for row in report_rows(report):
        table.add_row(*row)
    return table


def _count(text: str) -> int:
    """Returns the number in "65536", "64k" or "1M"."""
    factor = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
    digits = text if factor == 1 else text[:-1]
    if not digits.isdecimal() or int(digits) == 0:
        raise ValueError(f"--tokens {text!r} is not a count; write 65536, 64k or 1M")
    return int(digits) * factor


def _print_run(result: RunResult, recipe: Recipe) -> None:
    from llmqat.export.commands import command as command_of
    from llmqat.recipe.folder import ADAPTER_FOLDER

    _print_comparison(result.comparison)
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result.seconds.items())
    since = " since the interrupted run went on" if result.goes_on else ""
    console.print(f"seconds{since}: {seconds}; in all {sum(result.seconds.values()):.0f}")
    if result.training is not None:
        _print_training(result.training)
    more = []
    if (adapter := result.checkpoint.with_name(ADAPTER_FOLDER)).is_dir():
        console.print(f"adapter: {adapter}; it can be served with others over one packed base", soft_wrap=True)
        more = [command_of("llmqat", "export", adapter, "--format", "peft", "--base", "BASE", "--out", "NAME")]
    print_checkpoint(result.report, recipe.source, *more)


def _print_training(training: Mapping[str, Any]) -> None:
    rate = training["tokens_per_second"]  # None where an earlier start had made the last step
    speed = "" if rate is None else f", {rate:.0f} tokens/s"
    tokens = training["tokens"]  # None where a checkpoint of an older llmqat did not say
    console.print(
        f"trained {'unknown' if tokens is None else format(tokens, ',')} tokens in {training['steps']} steps{speed}; "
        f"loss {_figure(training['first_loss'])} -> {_figure(training['last_loss'])} nats",
    )
    if training["validation_perplexity"] is not None:
        console.print(
            f"held-out text at the end of training, before packing: perplexity {training['validation_perplexity']:.4g}",
            soft_wrap=True,
        )


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _print_comparison(comparison: Comparison) -> None:
    from llmqat.evaluate.compare import render
    from llmqat.evaluate.samples import answer_lines

    console.print(render(comparison))
    for line in answer_lines(comparison):
        console.print(line, soft_wrap=True)

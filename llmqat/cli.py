"""The command line: words, help and exit codes. What the commands do is done by the rooms they call.

Heavy imports (torch, transformers) happen inside the commands, so that `llmqat --help` answers at once.

Exit codes: 0 done; 1 our fault, with the traceback; 2 the user's mistake, told in one message without a traceback
(`llmqat --traceback COMMAND ...` shows it); 3 a gate is broken; 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.logging import RichHandler
from rich.table import Table

from llmqat.heap import keep_freed_memory
from llmqat.paths import check_folder_output, check_outputs, user_path, user_spec
from llmqat.terminal import plain_console, show_any_text

if TYPE_CHECKING:
    from llmqat.evaluate.compare import Comparison
    from llmqat.evaluate.tasks import TaskSettings
    from llmqat.export import ExportReport
    from llmqat.export.serving import Verdict
    from llmqat.layers import AuditEntry, CoverageAudit
    from llmqat.recipe import EvaluationSettings, Plan, Recipe, RunResult
    from llmqat.recipe.allocation import BitPlan

USER_MISTAKES = (ValueError, OSError, ImportError, FloatingPointError)
"""What a room raises when the input, the files or the installed packages are not what they must be."""

EXIT_USER = 2
EXIT_GATE = 3
EXIT_INTERRUPTED = 130

console = plain_console()
errors = plain_console(stderr=True)

SPECS = ("model", "models", "reference", "text")
"""Parameters of commands that name models and texts: a path, or else a hub id and the like."""


def command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that makes a function a command, and gives it paths as `user_path` returns them."""

    def registered(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def called(**values: Any) -> None:
            function(**{key: _as_meant(key, value) for key, value in values.items()})

        app.command(name)(called)
        return function

    return registered


def _as_meant(name: str, value: Any) -> Any:
    if isinstance(value, Path):
        return user_path(value, name)
    if name in SPECS and isinstance(value, str):
        return user_spec(value, name)
    return [_as_meant(name, entry) for entry in value] if isinstance(value, list) else value


class _Group(typer.core.TyperGroup):
    """Turns a user's mistake into a message and exit code 2; anything else keeps its traceback and gives 1."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Runs the command line on a terminal of any encoding."""
        show_any_text()
        return super().main(*args, **options)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Keeps the words as they came."""
        ctx.meta["llmqat.words"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            _check_words(ctx.meta["llmqat.words"])
            return super().invoke(ctx)
        except USER_MISTAKES as error:
            if ctx.params.get("show_traceback"):
                traceback.print_exc()
            errors.print("error: ", style="bold red", end="")
            errors.print(str(error), soft_wrap=True)
            raise typer.Exit(EXIT_USER) from error
        except KeyboardInterrupt as error:
            errors.print(
                "interrupted; train, quantize and cache-teacher go on where they stopped: give the same command again"
            )
            raise typer.Exit(EXIT_INTERRUPTED) from error


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
    add_completion=False,
)

MODEL_HELP = "Hub id, folder (full precision, packed or peft adapter), .gguf file, or package:NAME/FILE.gguf."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelsArgument = Annotated[list[str], typer.Argument(metavar="MODEL", help=MODEL_HELP)]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe (.yaml), or the folder of a run.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change, such as train.max_steps=60."),
]
OutOption = Annotated[Path, typer.Option(help="Folder to write to; must not exist.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what lies in the output folder.")]
SchemeOption = Annotated[
    str, typer.Option(help="Preset, such as int4, int4-g32, int8, int2-seq, ternary, w8a8, w4a8 or w4a8kv8.")
]
GroupSizeOption = Annotated[
    int | None, typer.Option(min=1, help="Weights that share one scale; the preset's own where not given.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")]
TextOption = Annotated[
    list[str] | None,
    typer.Option(
        help="UTF-8 text file or folder, rows (.jsonl, .parquet), or hub:NAME:CONFIG:SPLIT; may be given again. "
        "Else the protocol's own: Python's manual, or WikiText-2 from the hub."
    ),
]
ProtocolOption = Annotated[
    str,
    typer.Option(
        help="windows: the text cut up, 40 windows of 512 tokens; wikitext2: as in GPTQ's papers, windows of 2,048; "
        "wikitext: word perplexity, as lm-eval."
    ),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(help="Full-precision model that divergence is measured from; else the first of several models."),
]
WindowOption = Annotated[int | None, typer.Option(min=2, help="Tokens in a window; else the protocol's own.")]
TasksOption = Annotated[str | None, typer.Option(help="Zero-shot tasks of lm-eval to run too: arc_easy,piqa")]
TaskFolderOption = Annotated[
    Path | None, typer.Option(help="Folder of NAME.jsonl with lines of query, choices and gold: tasks of your own.")
]
TaskLimitOption = Annotated[int | None, typer.Option(min=1, help="Questions of each task; else all.")]
GateOption = Annotated[
    str | None, typer.Option(help='Limits to keep, such as "perplexity<=1.02x, top1>=0.95, size<=0.3x".')
]
BaselineOption = Annotated[
    Path | None,
    typer.Option(help="Report that --json wrote earlier: its text is scored again, and a gate's x is relative to it."),
]
ThresholdOption = Annotated[
    float, typer.Option(min=0, help="Share of perplexity that may be lost before training is advised.")
]
CsvOption = Annotated[Path | None, typer.Option("--csv", help="Write the table to this file as CSV.")]
MarkdownOption = Annotated[Path | None, typer.Option(help="Write the table to this file as Markdown.")]
StrideOption = Annotated[int | None, typer.Option(min=1, help="Tokens between window starts; else no overlap.")]
MaxWindowsOption = Annotated[
    int | None, typer.Option(min=0, help="Windows scored in each text, from its start; 0 for all.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")]
TrainedTextOption = Annotated[
    bool, typer.Option("--allow-trained-text", help="Score a text that a model was calibrated or trained on.")
]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same result.")]


FORMS: dict[tuple[str, str | None], bool] = {
    ("compressed-tensors", "vllm"): False,
    ("compressed-tensors", "vllm-arm"): True,
}
"""By `--format` and `--for` of `export`: whether w4a8 is written as `int-quantized`."""

COMMANDS_THAT_TRAIN = ("train", "quantize", "sensitivity", "synthesize", "cache-teacher")
"""They allocate and free the same tensors for minutes."""

COMMANDS_OF_MANY_PROCESSES = ("train", "plan")
"""All others would do the same thing in each, and write over each other."""


@app.callback()
def _start(
    ctx: typer.Context,
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of every error.")] = False,
) -> None:
    """Low-bit quantization-aware training of Hugging Face causal language models.

    Begin with: llmqat train recipes/smollm2-135m-int4.yaml
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
    main_process = os.environ.get("RANK", "0") == "0"
    console.quiet = not main_process
    handler = RichHandler(
        console=errors, show_time=False, show_path=False, show_level=False, highlighter=None, markup=False
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns at import of a kernel that nobody asked for
    logging.getLogger("llmqat").setLevel(logging.INFO if main_process else logging.ERROR)


def main() -> None:
    """Runs the command line and exits with its code."""
    app()


@command()
def train(recipe: RecipeArgument, overrides: OverridesArgument = None, overwrite: OverwriteOption = False) -> None:
    """Runs a recipe: calibrates, trains, saves a proved packed checkpoint, and compares it.

    An interrupted run goes on where it stopped when the same command is given again.

    **Examples**

        llmqat train recipes/smollm2-135m-int4.yaml

        llmqat train recipes/smollm2-135m-int4.yaml model=HuggingFaceTB/SmolLM2-135M train.max_steps=60 output=runs/mine

        accelerate launch -m llmqat train recipes/smollm2-135m-int4.yaml
    """
    from llmqat.recipe import ResultsNotWrittenError, load_recipe, run

    try:
        result = run(load_recipe(recipe, overrides or ()), overwrite=overwrite)
    except ResultsNotWrittenError as error:
        _print_run(error.result)
        raise
    if result is not None:  # this is the main process
        _print_run(result)


@command()
def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    accelerate_config: Annotated[
        Path | None, typer.Option(help="Plan for what this file of `accelerate config` spreads the training over.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Plan for so many GPUs.")] = None,
    sharding: Annotated[
        str, typer.Option(help="With --processes: ddp, zero2 (gradients, optimizer), zero3 or fsdp2 (weights as well).")
    ] = "ddp",
    memory: Annotated[
        float | None, typer.Option(min=0.0, help="GB of a device; else what is free here, where it is of that kind.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Train a few steps on random tokens: real memory, time.")
    ] = False,
) -> None:
    """Shows what a recipe would quantize, its steps and tokens, and its memory on each device; keeps nothing.

    **Examples**

        llmqat plan recipes/smollm2-135m-int4.yaml --probe

        llmqat plan recipes/smollm2-135m-int4.yaml quant.preset=int3 train.max_steps=100

        llmqat plan recipes/lora-int4.yaml model=meta-llama/Llama-3.1-8B --processes 8 --sharding fsdp2 --memory 80
    """
    from llmqat.recipe import available_bytes, devices_of, load_recipe, plan_run
    from llmqat.recipe.memory import Devices

    if accelerate_config is not None and processes is not None:
        raise ValueError("--accelerate-config says how many processes there are; leave out --processes")
    devices = None if processes is None else Devices(processes, sharding, "cuda")
    if accelerate_config is not None:
        devices = devices_of(accelerate_config)
    loaded = load_recipe(recipe, overrides or ())
    planned = plan_run(loaded, devices)
    _print_audit(planned.coverage)
    _print_served(planned.served)
    if planned.target_bits is not None:
        console.print(f"bits are chosen by layer when the run begins, {planned.target_bits} on average")
    unknown = "known when the text is read"
    steps, tokens, blocks = (
        unknown if count is None else f"{count:,}" for count in (planned.steps, planned.tokens, planned.blocks)
    )
    console.print(f"text: blocks {blocks}; training: steps {steps}, tokens {tokens}")
    _print_memory(planned)
    available = round(memory * 1e9) if memory is not None else available_bytes(planned.devices)
    if available is not None:
        _print_fit(planned, available)
    if probe:
        _print_probe(planned, loaded)


@command("eval")
def evaluate(
    models: ModelsArgument,
    text: TextOption = None,
    protocol: ProtocolOption = "windows",
    window: WindowOption = None,
    stride: StrideOption = None,
    max_windows: MaxWindowsOption = None,
    reference: ReferenceOption = None,
    batch_size: BatchSizeOption = 4,
    tasks: TasksOption = None,
    task_folder: TaskFolderOption = None,
    task_limit: TaskLimitOption = None,
    gate: GateOption = None,
    baseline: BaselineOption = None,
    threshold: ThresholdOption = 0.02,
    allow_trained_text: TrainedTextOption = False,
    json_file: JsonOption = None,
    csv_file: CsvOption = None,
    markdown: MarkdownOption = None,
) -> None:
    """Scores models on the same windows of text: perplexity, divergence from a reference, where they are weak.

    Exit code 3 means that a gate is broken.

    **Examples**

        llmqat eval runs/smollm2-135m-int4/model --text notes.txt --json notes.json

        llmqat eval runs/a/model runs/b/model --reference HuggingFaceTB/SmolLM2-135M --window 512 --max-windows 40

        llmqat eval runs/a/model model-Q4_0.gguf my-adapter/ --reference ./original --protocol wikitext

        llmqat eval runs/a/model --reference ./original --tasks arc_easy,piqa

        llmqat eval runs/a/model --baseline last-week.json --gate "perplexity<=1.01x"
    """
    settings = _asked(
        text, protocol, window, stride, max_windows, batch_size, baseline, allow_trained_text, speed=False
    )
    chosen = _tasks(tasks, task_folder, task_limit)
    _judge(models, settings, reference, baseline, gate, threshold, chosen, (json_file, csv_file, markdown, None))


@command()
def compare(
    models: ModelsArgument,
    reference: ReferenceOption = None,
    text: TextOption = None,
    protocol: ProtocolOption = "windows",
    window: WindowOption = None,
    stride: StrideOption = None,
    max_windows: MaxWindowsOption = None,
    batch_size: BatchSizeOption = 4,
    tasks: TasksOption = None,
    task_folder: TaskFolderOption = None,
    task_limit: TaskLimitOption = None,
    gate: GateOption = None,
    baseline: BaselineOption = None,
    threshold: ThresholdOption = 0.02,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML report to this file.")] = None,
    allow_trained_text: TrainedTextOption = False,
    json_file: JsonOption = None,
    csv_file: CsvOption = None,
    markdown: MarkdownOption = None,
) -> None:
    """Puts models beside a reference: quality as `eval` does, size, speed, memory, energy, and an HTML report.

    Exit code 3 means that a gate is broken.

    **Examples**

        llmqat compare runs/a/model runs/b/model --reference HuggingFaceTB/SmolLM2-135M --html ab.html --json ab.json

        llmqat compare runs/a/model --reference ./original --gate "perplexity<=1.02x, top1>=0.95, size<=0.3x"
    """
    settings = _asked(text, protocol, window, stride, max_windows, batch_size, baseline, allow_trained_text, speed=True)
    chosen = _tasks(tasks, task_folder, task_limit)
    _judge(models, settings, reference, baseline, gate, threshold, chosen, (json_file, csv_file, markdown, html))


def _asked(
    texts: list[str] | None,
    protocol: str,
    window: int | None,
    stride: int | None,
    max_windows: int | None,
    batch_size: int,
    baseline: Path | None,
    allow_trained_text: bool,
    speed: bool,
) -> EvaluationSettings:
    """Returns what `eval` and `compare` measure: what was asked for, else as the baseline, else the protocol's own."""
    from llmqat.evaluate.gate import read_report
    from llmqat.recipe import EvaluationSettings

    given: dict[str, Any] = {"protocol": protocol, "texts": texts and tuple(texts), "window": window, "stride": stride}
    asked = {key: value for key, value in given.items() if value is not None}
    if max_windows is not None:
        asked["max_windows"] = max_windows or None
    if baseline is not None:
        before = read_report(baseline)["settings"]
        kept = {key: before[key] for key in ("protocol", "texts", "window", "stride", "max_windows") if key in before}
        asked = {**kept, **{key: value for key, value in asked.items() if key != "protocol"}}
    return EvaluationSettings(**asked, batch_size=batch_size, speed=speed, allow_trained_text=allow_trained_text)


def _tasks(names: str | None, folder: Path | None, limit: int | None) -> TaskSettings | None:
    from llmqat.evaluate.tasks import TaskSettings

    if names is None and folder is None:
        return None
    given = (name.strip() for name in (names or "").split(","))
    return TaskSettings(tuple(dict.fromkeys(name for name in given if name)), folder, limit)


def _judge(
    models: list[str],
    settings: EvaluationSettings,
    reference: str | None,
    baseline: Path | None,
    gate: str | None,
    threshold: float,
    tasks: TaskSettings | None,
    files: tuple[Path | None, Path | None, Path | None, Path | None],
) -> None:
    """Measures, shows, writes (JSON, CSV, Markdown, HTML), and exits with 3 where the gate is broken."""
    from llmqat.evaluate.gate import parse_gate, read_report
    from llmqat.evaluate.report import check_files, measured, verdict_on
    from llmqat.recipe import compare_models

    rules = parse_gate(gate) if gate else ()
    before = None if baseline is None else read_report(baseline)
    if reference is None and before is not None:
        reference = before["settings"].get("reference")
    read: list[str | Path | None] = [*models, reference, *settings.texts, baseline]
    if tasks is not None:
        read.append(tasks.folder)
    outputs = dict(zip(("--json", "--csv", "--markdown", "--html"), files, strict=True))
    check_files(outputs, [source for source in read if source is not None])
    html = files[-1] is not None
    comparison = compare_models(models, settings, reference, tasks=tasks, details=html, rules=rules, baseline=before)
    console.print(measured(comparison))  # now: whatever happens to the files, the figures are seen
    try:
        verdict = verdict_on(comparison, rules, before, threshold)
    except ValueError:
        verdict_on(comparison, threshold=threshold).write(*files)
        raise
    console.print(verdict.rendered())
    verdict.write(*files)
    if not verdict.passed:
        raise typer.Exit(EXIT_GATE)


@command()
def quantize(
    model: ModelArgument,
    out: OutOption,
    scheme: SchemeOption = "int4",
    group_size: GroupSizeOption = None,
    method: Annotated[
        str,
        typer.Option(
            help="rtn: plain rounding; search: scales from calibration; gptq: codes as well; blockwise: each "
            "transformer block trained, which is the best and the slowest."
        ),
    ] = "blockwise",
    target_bits: Annotated[
        float | None, typer.Option(min=2, max=8, help="Bits a weight on average: 2, 3, 4 or 8 chosen for each layer.")
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Rotate the residual stream first; unties the head.")
    ] = False,
    smooth: Annotated[
        float | None, typer.Option(min=0, max=1, help="SmoothQuant's alpha, such as 0.5: smooth layer inputs first.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file or folder to calibrate on.")] = None,
    synthetic: Annotated[
        int, typer.Option(min=1, help="Tokens to calibrate on; written by the model without --text.")
    ] = 16384,
    block_size: Annotated[int, typer.Option(min=2, help="Tokens in a block of calibration text.")] = 512,
    seed: SeedOption = 0,
    serve: Annotated[
        list[str] | None,
        typer.Option(
            help="Who is to serve it: vllm, vllm-cpu, sglang, transformers, llama.cpp, onnxruntime, gptqmodel; may be "
            "given again. A scheme that it does not take is refused now, with the nearest that it does."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for layers.json and layers.png: what quantization did to each layer.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Quantizes a model without training it as a whole, and saves a proved packed checkpoint.

    Weights that are codes times a scale already (the "unquantized" models of quantization-aware training, such as
    Gemma's for Q4_0: --scheme int4-g32) keep their codes with every method; it is said how many groups do.

    An interrupted calibration goes on where it stopped when the same command is given again.

    **Examples**

        llmqat quantize HuggingFaceTB/SmolLM2-135M --scheme int4 --group-size 64 --synthetic 16384 --out smollm2-int4

        llmqat quantize ./model --scheme int8 --method rtn --out model-int8

        llmqat quantize ./model --scheme int4 --target-bits 3.5 --text notes.txt --out model-3.5-bits

        llmqat quantize ./model --scheme w8a8 --smooth 0.5 --text notes.txt --out model-w8a8

        llmqat quantize ./model --scheme int4 --serve vllm --serve llama.cpp --out model-int4
    """
    from llmqat.evaluate.layers import check_picture, render_layers, write_layers
    from llmqat.recipe import quantize_model

    check_folder_output(out, "--out")
    if report is not None:
        check_folder_output(report, "--report")
        check_picture()
    done = quantize_model(
        model,
        out,
        scheme=scheme,
        group_size=group_size,
        method=method,
        target_bits=target_bits,
        rotate=rotate,
        smooth=smooth,
        text=text,
        tokens=synthetic,
        block_size=block_size,
        seed=seed,
        overwrite=overwrite,
        serve=serve or (),
    )
    if done.layers:
        console.print(render_layers(done.layers))
    for stage in done.stages:
        line = f"{stage.stage}: {stage.seconds:.0f} s, KL on the calibration text {stage.change}"
        console.print(line)
    _print_checkpoint(done.report)
    if report is not None:
        write_layers({"quantized": done.layers}, report, picture=True)


@command()
def sensitivity(
    model: ModelArgument,
    target_bits: Annotated[float, typer.Option(min=2, max=8, help="Bits a weight on average.")] = 3.5,
    choices: Annotated[
        list[int] | None, typer.Option(min=2, max=8, help="Bits to choose among; may be given again.")
    ] = None,
    scheme: SchemeOption = "int4",
    group_size: GroupSizeOption = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file or folder; else the model writes it.")] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of text to look at.")] = 16,
    block_size: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 512,
    seed: SeedOption = 0,
    json_file: JsonOption = None,
) -> None:
    """Predicts what fewer bits would cost each layer, and finds the best bits for each under an average.

    The same choice is made by `quantize --target-bits`, and in a recipe by `allocate: {target_bits: 3.5}`.

    **Examples**

        llmqat sensitivity HuggingFaceTB/SmolLM2-135M --target-bits 3.5 --json plan.json

        llmqat sensitivity ./model --scheme int4 --group-size 32 --choices 3 --choices 4 --choices 8 --text notes.txt
    """
    from llmqat.calibrate import AllocationConfig
    from llmqat.recipe import sensitivity_of

    check_outputs({"--json": json_file}, [model, *([] if text is None else [text])])
    wanted = AllocationConfig(target_bits=target_bits, blocks=blocks, **({"choices": choices} if choices else {}))
    found = sensitivity_of(
        model, wanted, scheme=scheme, group_size=group_size, text=text, block_size=block_size, seed=seed
    )
    _print_plan(found)
    if json_file is not None:
        found.write(json_file)


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
    top_p: Annotated[float, typer.Option(help="Draw of the likeliest tokens that have this share together.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw of so many of the likeliest tokens; off.")] = None,
    teacher_top_k: Annotated[
        int | None, typer.Option(min=1, help="Keep so many of the model's likeliest tokens a position, in OUT/teacher.")
    ] = None,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Lets a model write its own training text: shards of token blocks in parquet, with a report and samples to read.

    A run that was interrupted goes on when the same command is given again; more --tokens are more shards.

    **Examples**

        llmqat synthesize HuggingFaceTB/SmolLM2-135M --tokens 1M --out written

        llmqat synthesize HuggingFaceTB/SmolLM2-135M --strategy prompts --prompts beginnings.txt --out written

        llmqat synthesize HuggingFaceTB/SmolLM2-135M --tokens 1M --teacher-top-k 64 --out written

        llmqat train recipes/smollm2-135m-int4.yaml data.path=written teacher_cache=written/teacher
    """
    from llmqat.data.shards import report_lines
    from llmqat.data.strategy import SynthesisConfig
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
    }
    written = synthesize_to(
        model,
        out,
        tokens=_count(tokens),
        config=SynthesisConfig.model_validate(values),
        teacher_top_k=teacher_top_k,
        overwrite=overwrite,
    )
    for line in report_lines(written.manifest.report or {}):
        console.print(line, soft_wrap=True)
    console.print(
        f"{out}: {written.blocks:,} blocks of {block_size} tokens, shards: {len(written.files)}; samples in "
        f"{out / 'README.md'}",
        soft_wrap=True,
    )


@command()
def audit(
    model: ModelArgument,
    scheme: SchemeOption = "int4",
    group_size: GroupSizeOption = None,
    json_file: JsonOption = None,
) -> None:
    """Lists every parameter tensor: quantized how, or left alone and why; bytes before and after; and who serves it.

    A packed checkpoint is shown as it is; any other model as --scheme would leave it.

    **Examples**

        llmqat audit HuggingFaceTB/SmolLM2-135M --scheme int4 --group-size 64

        llmqat audit runs/smollm2-135m-int4/model
    """
    from llmqat.export.serving import served_by
    from llmqat.models import write_whole
    from llmqat.recipe import inspect_model, scheme_of

    check_outputs({"--json": json_file}, [model])
    found = inspect_model(model, scheme_of(scheme, group_size))
    served = served_by(found.description) if found.description.layers else {}
    _print_audit(found.coverage)
    _print_served(served)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        written = {**found.coverage.to_dict(), "served_by": {name: entry.to_dict() for name, entry in served.items()}}
        write_whole(json_file, json.dumps(written, indent=2) + "\n")


@command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="File (gguf) or folder (all others) to write; must not exist.")],
    format: Annotated[
        str,
        typer.Option(
            help="gguf: one file for llama.cpp; gptq: GPTQ's layout for gptqmodel, vLLM and others; onnx: for "
            "onnxruntime; compressed-tensors: another tool's checkpoint as llmqat writes it; peft: an adapter that was "
            "trained inside quantizers, as a plain one over --base."
        ),
    ] = "gguf",
    base: Annotated[
        Path | None, typer.Option(help="With peft, the packed checkpoint that the adapter is to be served with.")
    ] = None,
    served_by: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="With compressed-tensors, the server that reads it: vllm, or vllm-arm (on Arm CPUs). They differ in "
            "how 4-bit weights with 8-bit inputs (w4a8) lie on disk.",
        ),
    ] = None,
) -> None:
    """Writes a packed checkpoint in another format: its codes as they are, nothing rounded again.

    peft is for servers that hold several adapters on one base (vllm serve BASE --enable-lora --lora-modules NAME=OUT).
    The adapter then stands beside the codes instead of being folded into them; what that costs is measured and said.

    **Examples**

        llmqat export runs/smollm2-135m-int4/model --format gguf --out smollm2-int4.gguf

        llmqat export runs/smollm2-135m-int4/model --format onnx --out smollm2-int4-onnx

        llmqat export runs/smollm2-135m-w4a8/model --format compressed-tensors --for vllm-arm --out smollm2-w4a8-arm

        llmqat export runs/lora-int4/adapter --format peft --base smollm2-int4 --out my-adapter
    """
    from llmqat.export import CONVERSIONS, keep_record, load_any, save_again

    check_folder_output(out.parent, "--out")
    if (format == "peft") != (base is not None):
        raise ValueError(
            "--format peft needs --base, the packed checkpoint to serve the adapter with (llmqat quantize MODEL "
            "--method search --out BASE makes one); no other format takes it"
        )
    if base is not None:
        _export_adapter(Path(model), base, out)
        return
    if format not in CONVERSIONS:
        raise ValueError(f"--format {format!r} is unknown; choose one of {', '.join(CONVERSIONS)}, peft")
    if served_by is not None and (format, served_by) not in FORMS:
        raise ValueError(
            f"--for {served_by} means nothing with --format {format}; with --format compressed-tensors give vllm or "
            f"vllm-arm, or leave it out"
        )
    write = CONVERSIONS[format]
    if FORMS.get((format, served_by)):
        write = functools.partial(save_again, int_quantized=True)
    sizes = write(*load_any(model), out)
    keep_record(model, out)
    parts = ", ".join(f"{kind} {size:,}" for kind, size in sizes.items())
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    console.print(f"{out}: {size:,} bytes ({parts})", soft_wrap=True)


def _export_adapter(adapter: Path, base: Path, out: Path) -> None:
    """Writes an adapter for servers, and says what it costs that it is not folded, and how to serve it."""
    from llmqat.evaluate.adapters import write_beside

    done = write_beside(adapter, base, out)
    parts = ", ".join(f"{kind} {size:,}" for kind, size in done.sizes.items())
    console.print(f"{out}: {parts} bytes", soft_wrap=True)
    console.print(
        f"beside the codes of {base} instead of folded into them: KL {done.kl:.4f} from the folded model, the same "
        f"most probable token for {done.top1:.1%} of {done.tokens:,}; rounding W + BA is not rounding W",
        soft_wrap=True,
    )
    console.print(f"next: vllm serve {base} --enable-lora --lora-modules {out.name}={out}", soft_wrap=True)


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
    from llmqat.recipe import Conversation

    talk = Conversation.open(model, system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if prompt is not None:
        talk.say(prompt)
        return
    console.print(f"{talk.kind}; an empty line or Ctrl-D ends it, Ctrl-C ends an answer", style="dim")
    while line := _ask():
        talk.say(line)


@command("cache-teacher")
def cache_teacher(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(help="Folder to write to; a cache of the same model there is gone on with.")],
    overrides: OverridesArgument = None,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens whose probabilities are kept at each position.")] = 64,
    batch_size: BatchSizeOption = 4,
) -> None:
    """Runs the original model over a recipe's text once and keeps what it predicts, for `train` to learn from.

    Training then needs no teacher in memory. An interrupted command goes on where it stopped when given again.

    **Examples**

        llmqat cache-teacher recipes/smollm2-135m-int4.yaml --top-k 64 --out teacher

        llmqat train recipes/smollm2-135m-int4.yaml teacher_cache=teacher
    """
    from llmqat.recipe import cache_teacher_of, load_recipe

    check_folder_output(out, "--out")
    cache = cache_teacher_of(load_recipe(recipe, overrides or ()), out, top_k=top_k, batch_size=batch_size)
    console.print(
        f"{out}: {len(cache):,} blocks, {cache.disk_bytes:,} bytes; the {top_k} likeliest tokens have "
        f"{cache.mass():.2%} of the probability",
        soft_wrap=True,
    )
    console.print(f"next: llmqat train {recipe} teacher_cache={out}", soft_wrap=True)


@command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Packed checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the hub; made if not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; main where not given.")] = None,
    license: Annotated[str | None, typer.Option(help="License of the original model, such as apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the original model.")] = None,
    dry_run: Annotated[
        Path | None, typer.Option(help="Write what would be published to this folder; send nothing.")
    ] = None,
) -> None:
    """Publishes a packed checkpoint on the Hugging Face hub, with a model card of its scheme, data and results.

    **Examples**

        llmqat push runs/smollm2-135m-int4/model someone/smollm2-135m-int4 --license apache-2.0 --private

        llmqat push runs/smollm2-135m-int4/model someone/smollm2-135m-int4 --dry-run to-publish
    """
    from llmqat.export.hub import push as publish

    done = publish(
        folder,
        repository,
        private=private,
        revision=revision,
        license=license,
        base_model=base_model,
        dry_run=dry_run,
    )
    console.print(done, soft_wrap=True)


def _ask() -> str:
    try:
        return console.input("> ").strip()
    except EOFError:
        return ""


def _count(text: str) -> int:
    """Returns the number in "65536", "64k" or "1M"."""
    factor = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
    digits = text if factor == 1 else text[:-1]
    if not digits.isdecimal() or int(digits) == 0:
        raise ValueError(f"--tokens {text!r} is not a count; write 65536, 64k or 1M")
    return int(digits) * factor


# What is shown


def _print_run(result: RunResult) -> None:
    _print_comparison(result.comparison)
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result.seconds.items())
    console.print(f"seconds: {seconds}; in all {sum(result.seconds.values()):.0f}")
    training = result.training
    rate = training["tokens_per_second"]  # None where an earlier start had made the last step
    speed = "" if rate is None else f", {rate:.0f} tokens/s"
    tokens = training["tokens"]  # None where a checkpoint of an older llmqat did not say
    console.print(
        f"trained {'unknown' if tokens is None else format(tokens, ',')} tokens in {training['steps']} steps{speed}; "
        f"loss {training['first_loss']} -> {training['last_loss']} nats",
    )
    _print_checkpoint(result.report)


def _print_checkpoint(report: ExportReport) -> None:
    from llmqat.export.commands import server_commands

    parts = ", ".join(f"{part} {size:,}" for part, size in report.bytes.items() if size)
    console.print(f"{report.bits_per_weight:.2f} bits a packed weight; bytes: {parts}")
    console.print(f"checkpoint: {report.folder}", soft_wrap=True, style="bold")
    own = (f"llmqat {words}" for words in (f"chat {report.folder}", f"eval {report.folder} --text YOUR.txt"))
    commands = [*own, *server_commands(report.folder, report.served)]
    console.print("next: " + "\n      ".join(commands), soft_wrap=True)
    promised = [f"plain transformers loads it: {report.stock.loader}.from_pretrained({str(report.folder)!r})"]
    for note in report.notes or promised:
        console.print(f"- {note}", soft_wrap=True)


def _print_plan(plan: BitPlan) -> None:
    bits = sorted(plan.layers[0].cost)
    table = Table(title="predicted KL, nats a token, of quantizing one layer alone")
    for column in ("layer", "weights", *(f"{count} bits" for count in bits), "chosen"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in sorted(plan.layers, key=lambda layer: -layer.cost[bits[0]] / layer.weights):
        costs = (f"{layer.cost[count]:.2e}" for count in bits)
        table.add_row(layer.name, f"{layer.weights:,}", *costs, str(plan.allocation.bits[layer.name]))
    console.print(table)
    chosen = plan.allocation
    average = f"{chosen.average_bits:.3f} bits a weight (target {chosen.target_bits})"
    console.print(f"{average}, predicted KL {chosen.predicted_kl:.4f}")


def _print_memory(plan: Plan) -> None:
    memory, devices, method = plan.memory, plan.devices, plan.method
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in memory.parts().items() if value)
    where = f"{devices.processes} x {devices.accelerator}" + (f", {devices.kind}" if devices.processes > 1 else "")
    console.print(
        f"trained: {method.trained:,} of {plan.size.parameters + plan.size.groups:,} parameters and scales",
    )
    console.print(f"memory of a device ({where}) in training: {memory.peak / 1e9:.2f} GB at most")
    console.print(f"  GB: {parts}; not all at once")
    if devices.processes > 1:
        from llmqat.recipe.memory import traffic_of

        sent = traffic_of(plan.size, method, devices)
        console.print(f"  each device sends {sent / 1e9:.2f} GB a step")


def _print_fit(plan: Plan, available: int) -> None:
    batch = plan.fitting_batch(available)
    if batch >= plan.method.batch:
        shown = "4,096 or more" if batch >= 4095 else f"{batch:,}"
        text = f"it fits into {available / 1e9:.1f} GB; so would per_device_train_batch_size up to {shown}"
        console.print(text)
        return
    errors.print(
        f"warning: it does not fit into {available / 1e9:.1f} GB, of which nine tenths are planned with"
        + (f"; per_device_train_batch_size={batch} would" if batch else ""),
        style="yellow",
    )
    ways = plan.cheaper(available)
    for name, memory in ways.items():
        errors.print(f"  {memory.peak / 1e9:.2f} GB: {name}")
    if not ways:
        errors.print("  nor does any cheaper way; spread it over more devices (--processes N --sharding fsdp2)")


def _print_probe(plan: Plan, recipe: Recipe) -> None:
    from llmqat.recipe import probe

    found = probe(recipe)
    taken = "unknown" if found.peak_bytes is None else f"{found.peak_bytes / 1e9:.2f} GB"
    console.print(f"probe: memory {taken}; a step {found.step_seconds:.2f} s")
    if plan.steps is not None:
        minutes = found.seconds(plan.steps) / 60
        alone = "" if plan.devices.processes == 1 else ", what devices send each other not counted"
        console.print(f"training would take {minutes:.1f} minutes here{alone}")


def _print_comparison(comparison: Comparison) -> None:
    from llmqat.evaluate.compare import render

    console.print(render(comparison))


def _print_audit(coverage: CoverageAudit) -> None:
    table = Table()
    for column in ("tensors", "", "shape", "treatment", "bytes before", "after"):
        numeric = column in ("", "bytes before", "after")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for names, entries in _alike(coverage):
        first = entries[0]
        before, after = (sum(sizes) for sizes in zip(*((e.bytes_before, e.bytes_after) for e in entries), strict=True))
        table.add_row(
            names,
            f"{len(entries)}",
            "×".join(map(str, first.shape)),
            f"{first.treatment}: {first.reason}" if first.reason else first.treatment,
            f"{before:,}",
            f"{after:,}",
        )
    console.print(table)
    console.print(
        f"{len(coverage.quantized)} tensors quantized at {coverage.average_bits:.2f} bits a weight, "
        f"{len(coverage.kept)} kept; {coverage.bytes_before:,} bytes before, {coverage.bytes_after:,} after "
        f"({coverage.average_bits_of_all:.2f} bits a parameter of the whole model)",
    )
    for note in coverage.notes:
        console.print(f"- {note}")


def _print_served(served: Mapping[str, Verdict]) -> None:
    table = Table()
    for column in ("served by", "", "what is lost, or why not", "known from"):
        table.add_column(column, overflow="fold")
    for verdict in served.values():
        table.add_row(*verdict.row)
    if served:
        console.print(table)


def _alike(coverage: CoverageAudit) -> list[tuple[str, list[AuditEntry]]]:
    """Returns the tensors in groups that differ in nothing but the layer's number, each with a name for all of it."""
    from llmqat.evaluate.layers import BLOCK_NUMBER

    groups: dict[tuple[Any, ...], list[AuditEntry]] = {}
    for entry in coverage.entries:
        key = (BLOCK_NUMBER.sub(".*.", entry.name, count=1), entry.shape, entry.treatment, entry.reason)
        groups.setdefault(key, []).append(entry)
    return [(_common_name(key[0], entries), entries) for key, entries in groups.items()]


def _common_name(pattern: str, entries: list[AuditEntry]) -> str:
    from llmqat.evaluate.layers import BLOCK_NUMBER

    numbers = [int(found[1]) for entry in entries if (found := BLOCK_NUMBER.search(entry.name))]
    if len(numbers) < 2:
        return entries[0].name
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return pattern.replace(".*.", f".{spans}.", 1)

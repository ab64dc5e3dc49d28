"""Commands that calibrate: `quantize` and `sensitivity`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmqat.cli.application import command, console
from llmqat.cli.options import (
    CalibrationTextOption,
    GroupSizeOption,
    JsonOption,
    ModelArgument,
    OutOption,
    OverwriteOption,
    SchemeOption,
    SeedOption,
)
from llmqat.cli.show import print_checkpoint, print_next
from llmqat.paths import check_folder_output, check_new, check_outputs, nearest_name
from llmqat.schemes import check_method, check_scheme
from llmqat.terminal import Column, FittedTable

if TYPE_CHECKING:
    from llmqat.recipe.allocation import BitPlan


@command()
def quantize(
    model: ModelArgument,
    out: OutOption,
    scheme: SchemeOption = "int4",
    group_size: GroupSizeOption = None,
    method: Annotated[
        str,
        typer.Option(
            help="rtn: plain rounding; search: scales from calibration; gptq: codes as well; blockwise: then each "
            "transformer block trained, which is the slowest."
        ),
    ] = "gptq",
    target_bits: Annotated[
        float | None, typer.Option(min=2, max=9, help="Bits a weight on average: 2, 3, 4 or 8 chosen for each layer.")
    ] = None,
    choices: Annotated[
        list[str] | None,
        typer.Option(
            help="With --target-bits: other bits to choose among, or a scheme such as nvfp4; may be given again.",
            metavar="CHOICE",
        ),
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Rotate the residual stream first; unties the head.")
    ] = False,
    smooth: Annotated[
        float | None, typer.Option(min=0, max=1, help="SmoothQuant's alpha, such as 0.5: smooth layer inputs first.")
    ] = None,
    text: CalibrationTextOption = None,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", "--synthetic", min=1, help="Tokens to calibrate on; written by the model without --text."
        ),
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
    """Quantizes a model without training it as a whole, and saves a packed checkpoint whose files are checked.

    Weights that are codes times a scale already (the "unquantized" models of quantization-aware training, such as
    Gemma's for Q4_0: --scheme int4-g32) keep their codes with every method; it is said how many groups do.

    The same command resumes an interrupted calibration.

    **Examples**

        llmqat quantize HuggingFaceTB/SmolLM2-135M --scheme int4 --group-size 64 --tokens 16384 --out smollm2-int4

        llmqat quantize ./model --scheme int8 --method rtn --out model-int8

        llmqat quantize ./model --scheme int4 --target-bits 3.5 --text notes.txt --out model-3.5-bits

        llmqat quantize ./model --scheme w8a8 --smooth 0.5 --text notes.txt --out model-w8a8

        llmqat quantize ./model --scheme int4 --serve vllm --serve llama.cpp --out model-int4
    """
    check_scheme(scheme)
    check_method(method)
    _check_text(text)
    check_new(out, "--out", overwrite=overwrite)
    check_folder_output(out, "--out")

    from llmqat.evaluate.layers import check_picture, render_layers, write_layers
    from llmqat.recipe import quantize_model

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
        choices=choices,
        rotate=rotate,
        smooth=smooth,
        text=text,
        tokens=tokens,
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
    if report is not None:
        write_layers({"quantized": done.layers}, report, picture=True)
    print_checkpoint(done.report, model)


@command()
def sensitivity(
    model: ModelArgument,
    target_bits: Annotated[float, typer.Option(min=2, max=9, help="Bits a weight on average.")] = 3.5,
    choices: Annotated[
        list[str] | None,
        typer.Option(help="Bits to choose among, or a scheme such as nvfp4; may be given again.", metavar="CHOICE"),
    ] = None,
    scheme: SchemeOption = "int4",
    group_size: GroupSizeOption = None,
    text: CalibrationTextOption = None,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of text to look at.")] = 16,
    block_size: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 512,
    seed: SeedOption = 0,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show every layer on a terminal too, not only the most sensitive.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Predicts what fewer bits would cost each layer, and finds the best bits for each under an average.

    The same choice is made by `quantize --target-bits`, and in a recipe by `allocate: {target_bits: 3.5}`. Where
    `--choices` names schemes, the bits of scales count, and so does what quantized inputs cost.

    **Examples**

        llmqat sensitivity HuggingFaceTB/SmolLM2-135M --target-bits 3.5 --json plan.json

        llmqat sensitivity ./model --scheme int4 --group-size 32 --choices 3 --choices 4 --choices 8 --text notes.txt

        llmqat sensitivity ./model --scheme nvfp4 --choices nvfp4 --choices fp8 --target-bits 5.5
    """
    check_scheme(scheme)
    _check_text(text)

    from llmqat.calibrate import AllocationConfig
    from llmqat.export.commands import command as command_of
    from llmqat.export.commands import name_of_folder, option
    from llmqat.recipe import sensitivity_of

    check_outputs({"--json": json_file}, [model, *([] if text is None else [text])])
    wanted = AllocationConfig(target_bits=target_bits, blocks=blocks, **({"choices": choices} if choices else {}))
    found = sensitivity_of(
        model, wanted, scheme=scheme, group_size=group_size, text=text, block_size=block_size, seed=seed
    )
    _print_plan(found, every=layers or not console.is_terminal)
    if json_file is not None:
        found.write(json_file)
    words: list[object] = ["--scheme", scheme, *option("--group-size", group_size), *option("--text", text)]
    words += ["--target-bits", f"{target_bits:g}", *(word for one in choices or () for word in ("--choices", one))]
    words += ["--out", f"{name_of_folder(model)}-{target_bits:g}-bits"]
    print_next(command_of("llmqat", "quantize", model, *words))


def _check_text(text: str | None) -> None:
    """Raises FileNotFoundError where the text that `--text` names is no file or folder that is there."""
    if text is None or text == "pydoc" or text.startswith("hub:") or Path(text).exists():
        return
    found = nearest_name(Path(text))
    near = "" if found is None else f" (the nearest name there is {found})"
    raise FileNotFoundError(
        f"--text: no text at {text}{near}; give a text file, a file of rows, a folder of them, hub:NAME or pydoc"
    )


def _print_plan(plan: BitPlan, *, every: bool) -> None:
    """Shows the answer, then the layers, `every` one or the most sensitive."""
    chosen = plan.allocation
    by_size = plan.choices
    from llmqat.recipe.allocation import choice_name

    counts = sorted(Counter(chosen.bits.values()).items(), key=lambda item: by_size.index(item[0]))
    console.print(
        f"{chosen.average_bits:.3f} bits a weight (target {chosen.target_bits:g}), predicted KL "
        f"{chosen.predicted_kl:.4f}; layers: {', '.join(f'{count} of {choice_name(one)}' for one, count in counts)}"
    )
    shown = len(plan.layers) if every else min(MOST_SENSITIVE, len(plan.layers))
    console.print(sensitivity_table(plan, shown))
    if shown < len(plan.layers):
        console.print(f"{shown} of {len(plan.layers)} layers; all: the same command with --layers, or in --json")


MOST_SENSITIVE = 20
"""Layers that a terminal is shown."""


def sensitivity_table(plan: BitPlan, most: int | None = None) -> FittedTable:
    """Returns what each layer costs by each choice: all, or the `most` sensitive, those of most KL first."""
    from llmqat.recipe.allocation import choice_name

    bits = plan.choices
    costs = [Column(choice_name(count), 2) for count in bits]
    columns = [Column("layer", 0, "name"), *costs, Column("chosen", 1), Column("weights", 3)]
    title = f"predicted KL, nats a token, of quantizing one layer alone; the most at {choice_name(bits[0])} first"
    table = FittedTable(columns, title)
    for layer in sorted(plan.layers, key=lambda layer: -layer.cost[bits[0]])[:most]:
        figures = (f"{layer.cost[count]:.2e}" for count in bits)
        table.add_row(layer.name, *figures, str(plan.allocation.bits[layer.name]), f"{layer.weights:,}")
    return table

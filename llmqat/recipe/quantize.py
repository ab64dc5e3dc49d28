"""Quantization without end-to-end training: calibrates a model and saves it packed.

Finished parts of the calibration lie in a hidden folder beside the output until that is written. So the same command
resumes an interrupted calibration.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmqat.calibrate import (
    ORIGINALS_FILE,
    AllocationConfig,
    BlockwiseStage,
    GPTQStage,
    LayerReport,
    Originals,
    RangesStage,
    RotateStage,
    SmoothStage,
    Stage,
    StageReport,
    calibrate,
    check_stages,
    needs_text,
    report_layers,
    rotates,
)
from llmqat.calibrate.sensitivity import with_choices
from llmqat.calibrate.stages import REPORT_FILE
from llmqat.data import DataConfig, TextSplits, load_blocks, load_splits, open_text
from llmqat.data.origin import origin_of
from llmqat.data.text import text_config
from llmqat.export.checkpoint import ExportReport, save
from llmqat.export.serving import known_clients
from llmqat.files import write_whole
from llmqat.heap import give_back_freed_memory
from llmqat.hub import is_local
from llmqat.layers import QuantConfig, lattice_note
from llmqat.models import CALIBRATION_FILLED, check_full_precision, default_device, load_model, to_accelerator
from llmqat.paths import check_new
from llmqat.recipe.allocation import PLAN_FILE, BitPlan, plan_bits, planned
from llmqat.recipe.config import forward_dtype, scheme_of
from llmqat.recipe.findings import all_of
from llmqat.recipe.folder import BLOCKS_FILES, kept_text
from llmqat.recipe.pipeline import REPORT_BLOCKS
from llmqat.recipe.plan import check_spec_allocation, check_spec_served
from llmqat.schemes import check_method
from llmqat.terminal import Bar, Stages, progress
from llmqat.train import processor_has_bf16

log = logging.getLogger(__name__)

METHODS: dict[str, tuple[type[RangesStage | GPTQStage | BlockwiseStage], ...]] = {
    "rtn": (),
    "search": (RangesStage,),
    "gptq": (RangesStage, GPTQStage),
    "blockwise": (RangesStage, GPTQStage, BlockwiseStage),
}
"""The command line's word for a method -> the stages of the calibration."""
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Quantization:
    """What `quantize_model` did.

    Attributes:
        report: what was written.
        stages: what each stage of the calibration did.
        layers: what quantization did to each layer; empty where transformers names no blocks of the model.
    """

    report: ExportReport
    stages: list[StageReport]
    layers: list[LayerReport]


def stages_of(method: str, blocks: int, *, rotate: bool = False, smooth: float | None = None) -> tuple[Stage, ...]:
    """Returns the stages behind a method of the command line, each looking at the first `blocks` token blocks.

    Raises:
        ValueError: for an unknown method.
    """
    check_method(method)
    before: list[Stage] = [RotateStage()] if rotate else []
    if smooth is not None:
        before.append(SmoothStage(alpha=smooth, blocks=blocks))
    return (*before, *(kind(blocks=blocks) for kind in METHODS[method]))


def quantize_model(
    spec: str,
    folder: Path,
    *,
    scheme: str = "int4",
    group_size: int | None = None,
    method: str = "gptq",
    target_bits: float | None = None,
    choices: Sequence[int | str] | None = None,
    rotate: bool = False,
    smooth: float | None = None,
    text: str | Path | None = None,
    tokens: int = 16384,
    block_size: int = 512,
    seed: int = 0,
    overwrite: bool = False,
    serve: Sequence[str] = (),
) -> Quantization:
    """Writes `spec` packed to `folder`, calibrated, proves it, and returns what was done and written.

    Args:
        spec: what `load_model` takes.
        folder: must not exist, unless `overwrite`.
        scheme: a preset of QuantConfig.
        group_size: weights that share one scale; the preset's own where not given.
        method: `rtn` (plain rounding), `search` (clip ratios weighted by the inputs' mean squares), `gptq`, or
            `blockwise` (each transformer block trained to give what it gave).
        target_bits: bits a weight on average; 2, 3, 4 or 8 are then chosen for each layer.
        choices: what to choose among instead: bits, or names of schemes.
        rotate: rotate the residual stream first.
        smooth: SmoothQuant's alpha, to smooth layer inputs first.
        text: what to calibrate on: `pydoc`, a file or folder of prose or rows, or hub:NAME[:CONFIG[:SPLIT]]. Of
            conversations the whole text is taken. Where not given, the model writes the text.
        tokens: how much text is used.
        block_size: tokens in a block of it.
        seed: of what the model writes, and of block-wise training.
        overwrite: whether a model that lies in `folder` is replaced.
        serve: names of `llmqat.export.serving.CLIENTS` that have to take the checkpoint.

    Raises:
        FileExistsError: the folder exists.
        FileNotFoundError: the model or the text is not there.
        ValueError: the model, text, method or scheme does not do, or one of `serve` does not take it.
    """
    clients = known_clients(serve)
    stages = stages_of(method, math.ceil(tokens / block_size), rotate=rotate, smooth=smooth)
    quant = scheme_of(scheme, group_size)
    allocate = _allocation(target_bits, choices)
    data = text_source(text, tokens, block_size, seed)
    _check_group_size(group_size, allocate)
    possible = quant if allocate is None else with_choices(quant, allocate.choices)
    needed = needs_text(stages, possible)

    def check_text() -> None:
        if text is not None and not needed and target_bits is None:
            raise ValueError(
                f"--method {method} looks at the weights alone; drop --text {text}, or use another --method"
            )
        if text is not None:
            open_text(data)  # says now what is wrong with it

    def check_model() -> bool:
        check_full_precision(spec)
        check_stages(stages, possible)
        check_spec_allocation(spec, quant, allocate)
        return check_spec_served(spec, clients, quant, allocate, rotates(stages))

    # Now: a scheme that does not do should not cost the text.
    int_quantized: bool = all_of([check_model, check_text, partial(check_new, folder, "--out", overwrite=overwrite)])[0]
    if needs_text((), possible) and not any(isinstance(stage, RangesStage) for stage in stages):
        # Static input ranges, which plain rounding of weights needs as well.
        stages = (*stages, RangesStage(method="minmax", blocks=math.ceil(tokens / block_size)))
    read = data if needed or allocate else None
    return _quantized(spec, folder, quant, stages, allocate, read, seed, overwrite, int_quantized)


def _allocation(target_bits: float | None, choices: Sequence[int | str] | None) -> AllocationConfig | None:
    if target_bits is None:
        if choices:
            raise ValueError(
                "--choices are for --target-bits, the bits a weight to be spent; give it, or drop --choices"
            )
        return None
    return AllocationConfig(target_bits=target_bits, **({"choices": tuple(choices)} if choices else {}))


def _check_group_size(group_size: int | None, allocate: AllocationConfig | None) -> None:
    if group_size is not None and allocate is not None and isinstance(allocate.choices[0], str):
        raise ValueError(
            f"--group-size {group_size} changes --scheme, and --choices name schemes with groups of their own; write "
            f"the group in their names, such as int4-g{group_size}, or drop --group-size"
        )


def text_source(text: str | Path | None, tokens: int, block_size: int, seed: int) -> DataConfig:
    """Returns where calibration text comes from: what a command names in a word, or the model itself without one."""
    if text is None:
        return DataConfig(tokens=tokens, block_size=block_size, seed=seed, packing="concatenate")
    return text_config(str(text), labels="all", tokens=tokens, block_size=block_size, seed=seed)


def _quantized(
    spec: str,
    folder: Path,
    quant: QuantConfig,
    stages: Sequence[Stage],
    allocate: AllocationConfig | None,
    data: DataConfig | None,
    seed: int,
    overwrite: bool,
    int_quantized: bool,
) -> Quantization:
    facts: dict[str, Any] = {"model": spec, "model_is_local": is_local(spec)}
    facts["calibrate"] = [stage.model_dump(mode="json") for stage in stages]
    settings = {**facts, "quant": quant.model_dump(mode="json"), "seed": seed}
    settings["allocate"] = None if allocate is None else allocate.model_dump(mode="json")
    settings["data"] = None if data is None else data.model_dump(mode="json", exclude={"server"})
    settings["text"] = None if data is None else origin_of(data)["fingerprints"]
    # Rotation and smoothing are exact in float32 only; without them a block at a time is raised to it.
    folds = any(isinstance(stage, (RotateStage, SmoothStage)) for stage in stages)
    stage = Stages()
    with stage("load", spec):
        model, tokenizer = load_model(spec, torch.float32 if folds else torch.bfloat16)
    work, ids = _work_folder(folder, settings), None
    if data is not None:

        def read() -> TextSplits:
            with Bar("text", "token") as bar:
                writes = data.source == "synthetic" and data.server is None
                # To write text, a model should lie on the GPU as a whole; to be calibrated, it need not.
                apart = writes and (folds or torch.accelerator.is_available())
                writer = to_accelerator(load_model(spec, torch.bfloat16)[0]) if apart else model
                return load_splits(data, tokenizer, writer, bar.update)

        with stage("text", data.source), _no_empty_work(work):
            blocks = kept_text(work, data, read).train
        facts["text"] = blocks.record()
        ids = blocks.rows
    give_back_freed_memory()
    dtype = forward_dtype(processor_has_bf16())
    if allocate is not None:
        assert ids is not None
        with stage("allocate", f"{allocate.target_bits} bits"):
            how: dict[str, Any] = {"seed": seed, "dtype": dtype, "device": default_device()}
            plan = planned(work / PLAN_FILE, partial(plan_bits, spec, quant, allocate, ids, **how)).allocation
        facts["allocation"] = plan.to_dict()
        quant = plan.applied_to(quant)
        give_back_freed_memory()
    to_accelerator(model, filled=CALIBRATION_FILLED)
    with stage("calibrate", ", ".join(one.stage for one in stages) or "plain rounding"), _no_empty_work(work):
        reports = calibrate(model, quant, stages, ids, seed=seed, folder=work, dtype=dtype, bar=progress)
    facts["calibration"] = [asdict(report) for report in reports]
    if note := lattice_note(model):
        facts["lattice"] = note
    originals = Originals.found(model, work / ORIGINALS_FILE)
    looked_at = None if ids is None else ids[:REPORT_BLOCKS]
    layers = [] if originals is None else report_layers(model, originals, looked_at, dtype)
    with stage("save", "packing, and checking the files"):
        report = save(model, folder, tokenizer, run=facts, overwrite=overwrite, int_quantized=int_quantized)
    shutil.rmtree(work, ignore_errors=True)
    return Quantization(report, reports, layers)


def sensitivity_of(
    spec: str,
    allocate: AllocationConfig,
    *,
    scheme: str = "int4",
    group_size: int | None = None,
    text: str | Path | None = None,
    block_size: int = 512,
    seed: int = 0,
) -> BitPlan:
    """Returns what fewer bits would cost each layer of `spec`, and the best assignment under the budget.

    Args:
        spec: what `load_model` takes.
        allocate: budget, choices and how much text.
        scheme: a preset of QuantConfig, which gives everything but the bits.
        group_size: weights that share one scale; the preset's own where not given.
        text: what to look at, as in `quantize_model`; where not given, the model writes the text.
        block_size: tokens in a block of it.
        seed: of what the model writes, and of the labels it draws.

    Raises:
        FileNotFoundError: the model or the text is not there.
        ValueError: the model, text, scheme or budget does not do.
    """
    _check_group_size(group_size, allocate)
    quant = scheme_of(scheme, group_size)
    data = text_source(text, allocate.blocks * block_size, block_size, seed)

    def check_model() -> None:
        check_full_precision(spec)
        check_spec_allocation(spec, quant, allocate)

    all_of([check_model, *([] if text is None else [partial(open_text, data)])])
    dtype, device = forward_dtype(processor_has_bf16()), default_device()
    stage = Stages()
    with stage("load", spec):
        model, tokenizer = load_model(spec, torch.bfloat16)
        to_accelerator(model)
    with stage("text", data.source), Bar("text", "token") as bar:
        blocks = load_blocks(data, tokenizer, model, bar.update)
    del model
    with stage("sensitivity", f"{len(blocks.rows):,} blocks of {blocks.block_size} tokens"):
        return plan_bits(spec, quant, allocate, blocks.rows, seed=seed, dtype=dtype, device=device)


def _work_folder(folder: Path, settings: dict[str, Any]) -> Path:
    """Returns the folder beside `folder` that keeps what is calibrated; emptied where other settings left it."""
    work = folder.with_name(f".{folder.name}.calibration")
    file = work / SETTINGS_FILE
    now = json.dumps(settings, indent=2, default=str)
    if work.is_dir():
        if file.is_file() and file.read_bytes() == now.encode():
            log.info("resuming the interrupted calibration in %s: %s", work, _finished(work))
            return work
        log.warning(
            "%s holds an unfinished calibration with other settings (%s); it is deleted, and calibration starts from "
            "the beginning",
            work,
            _finished(work),
        )
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_whole(file, now)
    return work


def _finished(work: Path) -> str:
    """Returns what an interrupted calibration has finished, in words: "ranges done, 12 blocks of gptq done"."""
    found = ["text done"] if (work / BLOCKS_FILES["train"]).is_file() else []
    for stage in sorted(path for path in work.glob("[0-9][0-9]-*") if path.is_dir()):
        name, blocks = stage.name.partition("-")[2], len(list(stage.glob("block-*.safetensors")))
        if (stage / REPORT_FILE).is_file():
            found.append(f"{name} done")
        elif blocks:
            found.append(f"{blocks} block{'s' * (blocks > 1)} of {name} done")
    return ", ".join(found) or "nothing is finished yet"


@contextmanager
def _no_empty_work(work: Path) -> Iterator[None]:
    """Removes `work` where the block fails, and nothing but the settings lies there."""
    try:
        yield
    except BaseException:
        if [path.name for path in work.iterdir()] == [SETTINGS_FILE]:
            shutil.rmtree(work)
        raise

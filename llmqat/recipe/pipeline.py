"""The run: through the rooms in order, from the model to a packed checkpoint that is compared as it lies on disk.

    load teacher and text -> rotate, smooth -> prepare -> calibrate -> train -> save with proof -> load -> compare

The table puts the trained artefact beside full precision, plain rounding and the calibration without training, all on
the same windows. Every stage but training is quick or kept in the run folder, and training goes on from the trainer's
last checkpoint: so an interrupted run is gone on with by giving the same command again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.calibrate import (
    CalibrationConfig,
    calibrate_activations,
    calibrate_ranges,
    collect_moments,
    rotate,
    smooth,
    static_layers,
)
from llmqat.data import Progress, TokenBlocks, load_blocks
from llmqat.evaluate.compare import Candidate, Comparison, compare, progress_bar
from llmqat.export.checkpoint import RUN_FILE, ExportReport, load, save
from llmqat.layers import (
    ActivationConfig,
    ActivationQuantizer,
    CoverageAudit,
    QuantConfig,
    QuantModule,
    convert,
    prepare,
)
from llmqat.models import cast_parameters, load_model
from llmqat.recipe.config import TRAINER_FOLDER, Recipe, training_arguments
from llmqat.recipe.evaluation import evaluation_windows
from llmqat.recipe.folder import (
    CHECKPOINT_FOLDER,
    RESULTS_FILE,
    checkpoint_step,
    kept_blocks,
    open_run_folder,
    whole_checkpoint,
    write_whole,
)
from llmqat.recipe.plan import coverage_of
from llmqat.train import QATArguments, QATTrainer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a finished run leaves behind."""

    checkpoint: Path
    """The packed checkpoint in the run folder."""
    comparison: Comparison
    """Full precision, plain rounding, training-free calibration and the trained artefact."""
    report: ExportReport
    """Bytes of the checkpoint by part."""
    training: dict[str, Any]
    """Steps, tokens, tokens a second, first and last loss."""
    seconds: dict[str, float]
    """Wall-clock time of each stage."""


class Stages:
    """Times the stages of a run and says in the log which one has begun."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        """Times what happens inside as the stage `name`; `what` tells the user about it."""
        log.info("%s: %s", name, what)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run(recipe: Recipe, *, overwrite: bool = False) -> RunResult | None:
    """Runs `recipe` from the model to the compared artefact, or goes on with it where it was interrupted.

    Under `accelerate launch` or `torchrun` all processes calibrate and train; the main one writes the text, saves,
    evaluates and reports.

    Args:
        recipe: from `load_recipe`.
        overwrite: whether what an earlier run left in the output folder is removed first.

    Returns:
        The result in the main process, None in the others.

    Raises:
        FileExistsError: the output folder holds a finished run, another recipe's run, or something that is no run.
        FileNotFoundError: the model or a text is not there.
        ValueError: the model, the text or the scheme does not do.
    """
    arguments = training_arguments(recipe)
    main = arguments.process_index == 0
    with arguments.main_process_first(local=False):
        if main and open_run_folder(recipe, overwrite=overwrite):
            log.info("going on with the interrupted run in %s", recipe.output)
    stage = Stages()
    with stage("load", recipe.model), arguments.main_process_first():  # a GGUF file is dequantized by one for all
        # Now: a scheme that does not do should not cost the text.
        coverage = coverage_of(recipe.model, recipe.quant, recipe.calibrate.rotate)
        if not coverage.quantized:
            raise ValueError(
                "quant covers no weight (quant.targets is empty, or all is ignored), so there is nothing to pack; a "
                "quantized KV cache alone can be used in Python (llmqat.prepare), or beside weights such as preset int8"
            )
        teacher, tokenizer = load_model(recipe.model, torch.bfloat16)
        teacher.to(arguments.device)
        windows = evaluation_windows(recipe.evaluate, tokenizer)  # now: a text that does not do should not cost a run
    with stage("text", recipe.data.source), arguments.main_process_first(local=False):
        blocks = kept_blocks(recipe.output, partial(_read_text, recipe, tokenizer, teacher))
    with stage("calibrate", recipe.calibrate.method):
        student = prepared_model(recipe, blocks.ids, arguments.device)
        calibrate(student, blocks.ids, recipe.calibrate, arguments.bf16)
        start = quantizer_state(student)
    with stage("train", f"{len(blocks):,} blocks of {blocks.block_size} tokens, {arguments.world_size} processes"):
        training = _train(student, teacher, arguments, blocks)
    if not main:
        return None
    facts: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "text": {"source": blocks.source, "sha256": blocks.sha256, "tokens": blocks.tokens, **blocks.details},
        "training": training,
    }
    with stage("save", "packing, and proving what lies on disk"):
        report = save(student, recipe.output / CHECKPOINT_FOLDER, tokenizer, run=facts, overwrite=True)
    with stage("evaluate", ", ".join(windows)):
        rebuild = partial(_untrained, recipe, blocks.ids, arguments)
        candidates = _candidates(recipe, teacher, coverage, rebuild, start, report, arguments.device)
        with progress_bar() as progress:
            comparison = compare(
                candidates,
                windows,
                batch_size=recipe.evaluate.batch_size,
                speed=recipe.evaluate.speed,
                progress=progress,
            )
    result = RunResult(report.folder, comparison, report, training, stage.seconds)
    _write_results(recipe, result, facts)
    return result


def calibrate(model: nn.Module, blocks: Tensor | None, config: CalibrationConfig, bf16: bool) -> None:
    """Sets the scales of a prepared `model` in place, as `config` says, from the first `config.blocks` of `blocks`.

    Args:
        model: prepared.
        blocks: token ids [N, L]; None will do for methods that look at weights alone.
        config: method and amounts.
        bf16: run the forward in bfloat16.
    """
    moments = None
    if config.method == "weighted_mse":
        assert blocks is not None
        forward = cast_parameters(model, torch.bfloat16) if bf16 else nullcontext()
        with forward:
            moments = collect_moments(model, blocks[: config.blocks], config.batch_size, _bar("moments", "batch"))
    calibrate_ranges(model, config.method, moments, _bar("ranges", "layer"), config.percentile)
    calibrate_inputs(model, blocks, config, bf16)


def calibrate_inputs(model: nn.Module, blocks: Tensor | None, config: CalibrationConfig, bf16: bool) -> None:
    """Sets the static input ranges of a prepared `model`, in place; does nothing where there are none."""
    if not static_layers(model):
        return
    assert blocks is not None
    with cast_parameters(model, torch.bfloat16) if bf16 else nullcontext():
        calibrate_activations(model, blocks[: config.blocks], config.batch_size, _bar("inputs", "batch"))


def needs_text(config: CalibrationConfig, quant: QuantConfig) -> bool:
    """Returns whether the calibration looks at activations, so at text."""
    inputs = [quant.input_activations, *(entry.input_activations for entry in quant.overrides.values() if entry)]
    static = any(isinstance(entry, ActivationConfig) and not entry.dynamic for entry in inputs)
    return config.method == "weighted_mse" or config.smooth is not None or static


def outliers_folded(model: PreTrainedModel, blocks: Tensor | None, config: CalibrationConfig, seed: int) -> None:
    """Rotates and smooths a full-precision `model` in place, where `config` says so."""
    if config.rotate:
        rotate(model, seed)
    if config.smooth is not None:
        assert blocks is not None
        smooth(model, blocks[: config.blocks], config.smooth, config.batch_size, _bar("smooth", "batch"))


def prepared_model(recipe: Recipe, blocks: Tensor, device: torch.device, folded: bool = True) -> PreTrainedModel:
    """Returns the model in float32, prepared, its scales those of plain rounding.

    Args:
        recipe: says the model and the scheme.
        blocks: token ids [N, L] for smoothing.
        device: where the model goes.
        folded: whether it is rotated and smoothed first, where the recipe says so.
    """
    model, _ = load_model(recipe.model, torch.float32)
    model.to(device)
    if folded:
        outliers_folded(model, blocks, recipe.calibrate, recipe.seed)
    prepare(model, recipe.quant)
    return model


def _read_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel) -> TokenBlocks:
    with token_bar("text") as progress:
        return load_blocks(recipe.data, tokenizer, teacher, progress)


def quantizer_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of all that the quantizers of `model` hold beside weights, by name in the state dict."""
    owners = [name for name, module in model.named_modules() if isinstance(module, (QuantModule, ActivationQuantizer))]
    return {
        f"{owner}.{name}": tensor.detach().clone()
        for owner in owners
        for name, tensor in model.get_submodule(owner).state_dict().items()
        if name not in ("weight", "bias")
    }


def _untrained(
    recipe: Recipe, blocks: Tensor, arguments: QATArguments, start: Mapping[str, Tensor] | None
) -> PreTrainedModel:
    """Returns the model packed without training: with the calibrated `start`, or plainly rounded for None."""
    model = prepared_model(recipe, blocks, arguments.device, folded=start is not None)
    if start is None:
        calibrate_inputs(model, blocks, recipe.calibrate, arguments.bf16)
    else:
        model.load_state_dict(dict(start), strict=False)
    convert(model)
    return model


def _train(
    student: PreTrainedModel, teacher: PreTrainedModel, arguments: QATArguments, blocks: TokenBlocks
) -> dict[str, Any]:
    """Trains `student` in place, from the run's last whole checkpoint if there is one; returns the facts of it."""
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=blocks.dataset())
    last = whole_checkpoint(Path(arguments.output_dir))
    if last is not None:
        log.info("going on from %s", last)
    output = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    step_tokens = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    step_tokens *= blocks.block_size
    steps = trainer.state.global_step
    steps_now = steps - (0 if last is None else checkpoint_step(last))
    return {
        "steps": steps,
        "tokens": steps * step_tokens,
        "seconds": output.metrics["train_runtime"],
        "tokens_per_second": steps_now * step_tokens / output.metrics["train_runtime"],
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "processes": arguments.world_size,
        "resumed_from": None if last is None else last.name,
    }


def _candidates(
    recipe: Recipe,
    teacher: PreTrainedModel,
    coverage: CoverageAudit,
    rebuild: Callable[[Mapping[str, Tensor] | None], PreTrainedModel],
    start: Mapping[str, Tensor],
    report: ExportReport,
    device: torch.device,
) -> list[Candidate]:
    """Returns the rows of the run's table; all but full precision are packed, and the trained one comes from disk."""
    bits, size = report.bits_per_weight, report.weight_bytes
    # Rotation unties the head; plain rounding, which does not rotate, is smaller by that.
    plain = coverage_of(recipe.model, recipe.quant) if recipe.calibrate.rotate else coverage
    plain_size = size - coverage.bytes_after + plain.bytes_after
    rows = [
        Candidate("full precision", lambda: teacher, "full precision", 16.0, plain.bytes_before),
        Candidate("plain rounding", lambda: rebuild(None), "plain rounding", bits, plain_size),
    ]
    steps = recipe.calibrate
    if steps.method != "minmax" or steps.rotate or steps.smooth is not None:  # else it is plain rounding itself
        rows.append(Candidate("calibrated", lambda: rebuild(start), "training-free", bits, size))
    rows.append(Candidate("trained", lambda: load(report.folder).to(device), "trained", bits, size))
    return rows


def _write_results(recipe: Recipe, result: RunResult, facts: Mapping[str, Any]) -> None:
    """Puts the measured figures into the checkpoint's llmqat.json, then marks the run as finished with results.json."""
    results = {"comparison": result.comparison.to_dict(), "seconds": result.seconds}
    run_file = result.checkpoint / RUN_FILE
    recorded = json.loads(run_file.read_text(encoding="utf-8"))
    recorded["run"]["results"] = results
    write_whole(run_file, json.dumps(recorded, indent=2, ensure_ascii=False) + "\n")
    everything = {**facts, **results, "checkpoint": result.report.to_dict()}
    write_whole(recipe.output / RESULTS_FILE, json.dumps(everything, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(recipe.output / TRAINER_FOLDER, ignore_errors=True)  # several times the model's size


def _bar(what: str, unit: str) -> Any:
    """Returns a wrapper of an iterable that shows its progress, rate and time left in the main process."""
    return partial(tqdm, desc=what, unit=unit, leave=False, disable=not log.isEnabledFor(logging.INFO))


@contextmanager
def token_bar(what: str) -> Iterator[Progress]:
    """Yields a callback (tokens done, tokens in all) that draws a bar with rate and time left in the main process."""
    with tqdm(desc=what, unit="token", unit_scale=True, leave=False, disable=not log.isEnabledFor(logging.INFO)) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance

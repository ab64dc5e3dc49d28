"""A calibration: stages in a row, from a full-precision model to a prepared one with its codes and scales in place.

    rotate, smooth   change the full-precision model, not what it computes
    (prepare)
    ranges           scales from the weights and E[x^2]
    gptq             codes whose errors cancel in the layer's output, and scales refitted to them
    blockwise        each block trained to give what it gave in full precision

A folder keeps the results: ranges in one file, gptq and blockwise in one file per block. Each file is written under a
temporary name and renamed. A calibration that is started again with the same folder reads these files and does the
rest. So an interrupted calibration resumes, and a finished one is only read. Rotation and smoothing are quick and
exact, and are done again, as are custom stages. Every stage reports its time and the KL divergence from full precision
before and after it.

gptq and blockwise walk through the model with two chains of hidden states (walk.py). The full-precision chain needs the
original weights, even after an earlier stage has changed them. So these are kept, in the dtype of the forward pass: in
a file of the folder, or in the checkpoint files that the model is mapped from (masters.py).
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.calibrate.activations import calibrate_activations, static_caches, static_layers
from llmqat.calibrate.blocks import Block, find_blocks, has_blocks
from llmqat.calibrate.blockwise import train_block
from llmqat.calibrate.config import (
    BlockStage,
    BlockwiseStage,
    CustomStage,
    GPTQStage,
    RangesStage,
    RotateStage,
    SmoothStage,
    Stage,
    TextStage,
    WeightStage,
)
from llmqat.calibrate.gptq import Clean, gptq_block, graphs_kept
from llmqat.calibrate.masters import Originals, in_float32, map_tensors, take_tensors
from llmqat.calibrate.moments import collect_moments
from llmqat.calibrate.probe import Probe
from llmqat.calibrate.ranges import calibrate_ranges
from llmqat.calibrate.rotate import check_rotation, rotate
from llmqat.calibrate.smooth import check_smoothing, smooth
from llmqat.calibrate.walk import Walk, open_walk
from llmqat.data.blocks import Rows, rows_of, sha256_of_rows
from llmqat.data.length import check_length
from llmqat.data.processes import ALONE, Processes
from llmqat.data.teacher_cache import model_fingerprint
from llmqat.files import read_json, write_whole
from llmqat.grid import fusing
from llmqat.heap import give_back_freed_memory, large_tensors_given_back
from llmqat.kernels import WeightPages
from llmqat.layers import (
    ActivationConfig,
    KVQuantizer,
    QuantConfig,
    QuantModule,
    RangedModule,
    at_least_bits,
    check_parameters,
    model_kind,
    prepare,
    quantizer_state,
    short_attention,
)
from llmqat.models import cast_parameters, read_checked, save_checked, visiting
from llmqat.terminal import Bar, duration, terminal_bar

log = logging.getLogger(__name__)

PROBE_BLOCKS = 4
"""Token blocks that the divergence before and after a stage is measured on."""
LOSS = 0.1
"""Share by which a stage's KL may rise by chance: `PROBE_BLOCKS` are little text."""
WORSE = "%s has made the model worse on the first token blocks: KL %s. Leave it out, or give it more text"
REPORT_FILE = "report.json"
STATE_FILE = "state.safetensors"
ORIGINALS_FILE = "originals.safetensors"
MADE_WITH_FILE = "made-with.json"

Bars = Callable[[str, str], Callable[[Iterable[Any]], Bar]]
"""(what, unit) -> a wrapper of an iterable in a bar, which shows how far it is."""


@dataclass(frozen=True)
class StageReport:
    """What one stage did.

    Attributes:
        stage: its name.
        seconds: wall-clock time, all starts of an interrupted stage together.
        kl_before: KL from full precision before it, nats per token, on the first token blocks. None without text, or
            while static input ranges are not set.
        kl_after: the same after it.
        parts: what the stage says of each block or layer, by name.
    """

    stage: str
    seconds: float
    kl_before: float | None
    kl_after: float | None
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_worse(self) -> bool:
        """Whether the KL rose by more than its noise, `LOSS`."""
        known = self.kl_before is not None and self.kl_after is not None
        return known and self.kl_after > (1 + LOSS) * self.kl_before  # type: ignore[operator]

    @property
    def change(self) -> str:
        """KL before and after as text, '0.1896 -> 0.0987'."""
        return " -> ".join("not measured" if kl is None else f"{kl:.4f}" for kl in (self.kl_before, self.kl_after))


# What stages may follow each other


def needs_text(stages: Sequence[Stage], quant: QuantConfig) -> bool:
    """Returns whether a calibration looks at text."""
    looks = (
        isinstance(stage, TextStage) and not (isinstance(stage, RangesStage) and stage.method != "weighted_mse")
        for stage in stages
    )
    return any(looks) or _has_static_inputs(quant)


def rotates(stages: Sequence[Stage]) -> bool:
    """Returns whether a calibration rotates the model, which unties its output head."""
    return any(isinstance(stage, RotateStage) for stage in stages)


def check_stages(stages: Sequence[Stage], quant: QuantConfig) -> None:
    """Raises ValueError where `stages` cannot follow each other, or do not fit the scheme."""
    names = [stage.stage for stage in stages]
    folds = [name for name in names if name in ("rotate", "smooth")]
    if names[: len(folds)] != folds:
        raise ValueError(
            f"calibrate={names}: rotate and smooth change the full-precision model, so they come before all others"
        )
    if len(set(folds)) < len(folds):
        raise ValueError(f"calibrate={names}: rotate and smooth are done once each")
    if _has_static_inputs(quant) and "ranges" not in names:
        raise ValueError(
            f"calibrate={names}: input ranges that text decides are set by the stage ranges; add it, or on the command "
            "line take another --method than rtn"
        )
    walks = [index for index, stage in enumerate(stages) if isinstance(stage, (GPTQStage, BlockwiseStage))]
    if _has_static_inputs(quant) and walks and walks[0] < names.index("ranges"):
        raise ValueError(
            f"calibrate={names}: {names[walks[0]]} needs static input ranges; put the stage ranges before it"
        )
    weights = [quant.weights, *(e.weights for e in quant.overrides.values() if e and not isinstance(e.weights, str))]
    _check_bits(stages, min(scheme.num_bits for scheme in weights))
    if "gptq" in names and any(scheme.scales == "dynamic" for scheme in weights):
        raise ValueError("calibrate: gptq moves weights and keeps scales, which scales: dynamic do not; use learned")


def check_folds(model: nn.Module, stages: Sequence[Stage]) -> None:
    """Raises ValueError where a stage of `stages` cannot be folded into a full-precision `model`, which stays as it is.

    Stages that are of the user's own are not known here.
    """
    for stage in stages:
        if isinstance(stage, RotateStage):
            check_rotation(model)
        elif isinstance(stage, SmoothStage):
            check_smoothing(model)


def _check_bits(stages: Sequence[Stage], least: int) -> None:
    """Raises ValueError where a stage meets scales of other bits than its own, or its bits widen no weight."""
    found: int | None = None
    names = [f"{s.stage} ({s.bits} bits)" if isinstance(s, WeightStage) and s.bits else s.stage for s in stages]
    for name, stage in zip(names, stages, strict=True):
        if isinstance(stage, WeightStage) and stage.bits is not None and stage.bits <= least:
            raise ValueError(f"calibrate={names}: no weight of the scheme has fewer than {stage.bits} bits")
        if isinstance(stage, RangesStage):
            found = stage.bits
        elif isinstance(stage, WeightStage) and stage.bits != found:
            missing = f"{{stage: ranges, bits: {stage.bits}}}" if stage.bits else "the stage ranges, without bits,"
            raise ValueError(f"calibrate={names}: {name} meets scales of other bits; put {missing} before it")
    if found is not None:
        raise ValueError(
            f"calibrate={names}: the scales that are left are of {found} bits; end with ranges without bits"
        )


def _has_static_inputs(quant: QuantConfig) -> bool:
    inputs = [quant.input_activations, *(entry.input_activations for entry in quant.overrides.values() if entry)]
    cached = quant.kv_cache is not None and quant.kv_cache.calibrated
    return cached or any(isinstance(entry, ActivationConfig) and entry.calibrated for entry in inputs)


# The calibration


def calibrate(
    model: PreTrainedModel,
    quant: QuantConfig,
    stages: Sequence[Stage],
    ids: Tensor | Rows | None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    bar: Bars = terminal_bar,
    processes: Processes = ALONE,
) -> list[StageReport]:
    """Prepares a full-precision `model` in place and takes it through `stages`; returns what each did.

    Args:
        model: float32 where training follows or it is rotated or smoothed; else bfloat16 will do, in less memory.
        quant: the scheme.
        stages: in order; none leaves the scales of plain rounding.
        ids: token ids [N, L], or token blocks with their documents (`TokenBlocks.rows`); None will do for stages that
            look at weights alone.
        seed: of rotation, block-wise training and custom stages.
        folder: keeps finished work, so that the calibration can resume; None keeps nothing.
        dtype: what forwards compute in.
        bar: shows how far each stage is; where not given, a bar on a terminal and nothing elsewhere.
            `llmqat.terminal.progress` also logs a line a minute, where the log level of "llmqat" is INFO.
        processes: share the work, each with the same model, text and folder, and end with the same bits. Sums over
            text are then taken in another order than by one process, and differ from its in their last digits.

    Raises:
        ValueError: stages that cannot follow each other, or do not fit the scheme or the model; no text where needed;
            a parameter that holds NaN or infinity.
    """
    check_stages(stages, quant)
    if ids is None and needs_text(stages, quant):
        raise ValueError(f"calibrate={[stage.stage for stage in stages]} looks at text; give token blocks")
    if model.config.is_encoder_decoder:
        if needs_text(stages, quant):
            raise ValueError(
                f"calibrate={[stage.stage for stage in stages]} looks at text as it is, but {model_kind(model)} reads "
                "pairs of input and output; use stages that look at weights alone: {stage: ranges, method: mse}"
            )
        ids = None
    check_parameters(model)
    if ids is not None:
        check_length(model, rows_of(ids).stored.shape[1], "a token block, data.block_size")
    with ExitStack() as stack:
        if folder is None:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="llmqat-", ignore_cleanup_errors=True))
            )
        else:
            _check_made_with(model, quant, ids, seed, dtype, folder, processes)
        folder.mkdir(parents=True, exist_ok=True)
        stack.callback(model.train, model.training)
        model.eval()
        stack.enter_context(short_attention())
        if WeightPages(model):
            stack.enter_context(large_tensors_given_back())
        run = _Calibration(model, quant, stages, ids, seed, folder, dtype, bar, processes)
        reports = []
        for number, stage in enumerate(stages, 1):
            if not isinstance(stage, (RotateStage, SmoothStage)):
                run.prepare()
            reports.append(run.do(number, stage))
        run.prepare()
    return reports


def _check_made_with(
    model: PreTrainedModel,
    quant: QuantConfig,
    ids: Tensor | Rows | None,
    seed: int,
    dtype: torch.dtype,
    folder: Path,
    processes: Processes,
) -> None:
    """Writes into `folder` what its work is made of, or compares it with what it was begun with.

    Raises:
        ValueError: it was begun with another model, scheme or text, or in another dtype or with another seed.
    """
    now = {
        "model": model_fingerprint(model),
        "scheme": quant.model_dump(mode="json"),
        "text": None if ids is None else sha256_of_rows(rows_of(ids)),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    file, differing = folder / MADE_WITH_FILE, []
    if processes.is_first:
        before = read_json(file) if file.is_file() else now
        differing = [name for name, value in now.items() if before.get(name) != value]
        if not differing:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(now, indent=1) + "\n")
    if differing := processes.agreed(differing):
        raise ValueError(
            f"{file}: the calibration in this folder was begun with another {', '.join(differing)}; give the same "
            "again, another folder, or delete this one"
        )


class _Calibration:
    """A calibration under way: the model, the text, and the folder that keeps what is finished."""

    def __init__(
        self,
        model: PreTrainedModel,
        quant: QuantConfig,
        stages: Sequence[Stage],
        ids: Tensor | Rows | None,
        seed: int,
        folder: Path,
        dtype: torch.dtype,
        bar: Bars,
        processes: Processes,
    ) -> None:
        self.model, self.quant, self.stages, self.ids, self.seed = model, quant, stages, ids, seed
        self.folder, self.dtype, self.bar, self.processes = folder, dtype, bar, processes
        self.bits: int | None = None
        writes = any(isinstance(stage, (RotateStage, CustomStage)) for stage in stages)
        self.probe = None if ids is None else Probe(model, ids[:PROBE_BLOCKS], dtype, copy_head=writes)

    @property
    def is_prepared(self) -> bool:
        return any(isinstance(module, (QuantModule, KVQuantizer)) for module in self.model.modules())

    def prepare(self) -> None:
        """Prepares the model where that has not been done, and sets its weights aside."""
        if self.is_prepared:
            return
        prepare(self.model, self.quant)
        if has_blocks(self.model):
            own = any(isinstance(stage, CustomStage) for stage in self.stages)  # which may write to any weight
            for turn in (True, False):  # the first process writes the file that the others read
                if self.processes.is_first is turn:
                    Originals.set_aside(self.model, self.folder / ORIGINALS_FILE, self.dtype, hold=not own)
                self.processes.agreed(None)

    def text(self, stage: TextStage) -> Tensor | Rows:
        """Returns the token blocks that `stage` looks at."""
        assert self.ids is not None
        return self.ids[: stage.blocks]

    def do(self, number: int, stage: Stage) -> StageReport:
        """Does a stage, or the rest of it, or takes it from the folder; returns its report."""
        place = self.folder / f"{number:02}-{stage.stage}"
        place.mkdir(parents=True, exist_ok=True)
        file = place / REPORT_FILE
        is_done = self.processes.agreed(file.is_file())
        report = _read_report(file) if is_done else None
        before, bits = None if report is not None else self.divergence(), self.bits
        start = time.perf_counter()
        if isinstance(stage, WeightStage):
            self.bits = stage.bits
        with at_least_bits(self.model, self.bits):
            do: Callable[[_Calibration, Any, Path], _Done] = _DO.get(type(stage), _apply)
            earlier, parts = do(self, stage, place)
        if report is not None:
            return report
        seconds = earlier + time.perf_counter() - start
        report = StageReport(stage.stage, seconds, before, self.divergence(), parts)
        if self.processes.is_first:
            write_whole(file, json.dumps(asdict(report)))
        log.info("%s: %s, KL %s", stage.stage, duration(seconds), report.change)
        if self.bits == bits and report.is_worse:
            log.warning(WORSE, stage.stage, report.change)
        return report

    def divergence(self) -> float | None:
        """Returns the KL from full precision of the model as it is, or as plain rounding would make it."""
        if self.probe is None or (self.is_prepared and _lacks_input_ranges(self.model)):
            return None
        if self.is_prepared:
            with at_least_bits(self.model, self.bits):
                return self.probe.divergence(self.model)
        weights = {id(parameter): parameter for parameter in self.model.parameters()}  # which stay as they are
        plain = copy.deepcopy(self.model, weights)
        prepare(plain, self.quant)
        return None if _lacks_input_ranges(plain) else self.probe.divergence(plain)


def _read_report(file: Path) -> StageReport:
    try:
        return StageReport(**read_json(file))
    except TypeError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it, and give the same command again") from error


def _lacks_input_ranges(model: nn.Module) -> bool:
    """Returns whether a static input range is not set yet, so that the model cannot run."""
    return not all(module.is_calibrated for module in model.modules() if isinstance(module, RangedModule))


# What each stage does: (seconds of earlier starts, facts by block or layer)

_Done = tuple[float, dict[str, Any]]


def _rotate(run: _Calibration, stage: RotateStage, place: Path) -> _Done:
    rotate(run.model, run.seed)
    return 0.0, {}


def _smooth(run: _Calibration, stage: SmoothStage, place: Path) -> _Done:
    smooth(run.model, run.text(stage), stage.alpha, stage.batch_size, run.bar("smooth", "batch"))
    return 0.0, {}


def _ranges(run: _Calibration, stage: RangesStage, place: Path) -> _Done:
    file, processes = place / STATE_FILE, run.processes
    if processes.agreed(file.is_file()):
        run.model.load_state_dict(read_checked(file)[0], strict=False)
        return 0.0, {}
    with cast_parameters(run.model, run.dtype):
        moments = None
        if stage.method == "weighted_mse":
            bar = run.bar("moments", "batch")
            moments = collect_moments(run.model, run.text(stage), stage.batch_size, bar, processes)
        calibrate_ranges(run.model, stage.method, moments, run.bar("ranges", "layer"), stage.percentile, processes)
        if static_layers(run.model) or static_caches(run.model):
            calibrate_activations(run.model, run.text(stage), stage.batch_size, run.bar("inputs", "batch"))
    if processes.is_first:
        save_checked(file, quantizer_state(run.model))
    return 0.0, {}


def _block_by_block(run: _Calibration, stage: BlockStage, place: Path) -> _Done:
    """Walks through the model; each block is done by `_IN_BLOCK` or read from `place`."""
    originals = Originals.found(run.model, run.folder / ORIGINALS_FILE)
    assert originals is not None
    inner = find_blocks(run.model)
    files = [place / f"block-{index:04}.safetensors" for index in range(len(inner))]
    processes = run.processes
    done = processes.agreed([file.is_file() for file in files])
    if all(done):
        return 0.0, {name: _read_block(module, file) for (name, module), file in zip(inner.items(), files, strict=True)}
    if any(done):
        log.info("%s: %d of %d blocks were done already", stage.stage, sum(done), len(done))
    facts: dict[str, Any] = {}
    earlier = 0.0
    memory = stage.hidden_memory * 1e9
    opened = open_walk(run.model, run.text(stage), stage.batch_size, memory, run.dtype, processes)
    with graphs_kept(), opened as walk:
        bar = run.bar(stage.stage, "block")(walk.blocks)
        for block in bar:
            file = files[block.index]
            if isinstance(stage, BlockwiseStage) or (done[block.index] and stage.target == "clean"):
                # gptq_block runs the original block itself, to record layer inputs.
                with visiting(block.module), originals.in_place(block):
                    block.run_full(walk.full if stage.target == "clean" else walk.quantized, walk.full, processes)
            if done[block.index]:
                found = _read_block(block.module, file)
                earlier += found["seconds"]
                bar.done_before(block.index + 1)
            else:
                start = time.perf_counter()
                was_mapped = any(map(WeightPages(run.model).hold, block.module.parameters()))
                with visiting(block.module, keep=True), in_float32(block), fusing():
                    found = _IN_BLOCK[type(stage)](block, walk, stage, run, bar, originals)
                    processes.copy((*block.module.parameters(), *block.module.buffers()))
                found["seconds"] = time.perf_counter() - start
                if processes.is_first:
                    _write_block(block, file, found)
                if was_mapped and processes.count == 1:
                    map_tensors(block.module, read_checked(file, again=True)[0])
                    give_back_freed_memory()
            facts[block.name] = found
            block.run(walk.quantized, walk.quantized, processes)
            used = (*block.module.parameters(), *block.module.buffers(), *originals.of(block).values())
            WeightPages(run.model).let_go(used)
    return earlier, facts


def _gptq_in_block(
    block: Block, walk: Walk, stage: GPTQStage, run: _Calibration, bar: Any, originals: Originals
) -> dict[str, Any]:
    clean = Clean(walk.full, originals.of(block)) if stage.target == "clean" else None
    return {
        name: asdict(found) for name, found in gptq_block(block, walk.quantized, stage, run.processes, clean).items()
    }


def _train_in_block(
    block: Block, walk: Walk, stage: BlockwiseStage, run: _Calibration, bar: Any, originals: Originals
) -> dict[str, Any]:
    def show(iteration: int, loss: float) -> None:
        bar.update(bar.done, note=f"iteration {iteration} of {stage.iterations}, loss {loss:.3g}")

    return asdict(train_block(block, walk.quantized, walk.full, stage, run.seed, show, run.processes))


def _apply(run: _Calibration, stage: CustomStage, place: Path) -> _Done:
    log.info("%s: begins", stage.stage)
    with torch.random.fork_rng(), run.bar(stage.stage, "stage")((stage,)):  # which a run's status reads
        torch.manual_seed(run.seed)
        facts = stage.apply(run.model, rows_of(run.text(stage)))
    run.processes.copy((*run.model.parameters(), *run.model.buffers()))
    return 0.0, dict(facts or {})


_DO: dict[type[Any], Callable[[_Calibration, Any, Path], _Done]] = {
    RotateStage: _rotate,
    SmoothStage: _smooth,
    RangesStage: _ranges,
    GPTQStage: _block_by_block,
    BlockwiseStage: _block_by_block,
}
_IN_BLOCK: dict[type[Any], Callable[[Block, Walk, Any, _Calibration, Any, Originals], dict[str, Any]]] = {
    GPTQStage: _gptq_in_block,
    BlockwiseStage: _train_in_block,
}


def _write_block(block: Block, path: Path, facts: Mapping[str, Any]) -> None:
    save_checked(path, block.module.state_dict(), {"facts": json.dumps(facts)})


def _read_block(module: nn.Module, path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(take_tensors(module, path)["facts"])
    except (KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the block is calibrated again") from error
    return facts

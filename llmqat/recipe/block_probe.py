"""How long a calibration takes here: its stages on one transformer block of a model, with random weights and tokens.

Time hardly depends on the values. The block is one of middle size, with the default scheme; embeddings and output head
stand around it. Where a stage runs text through the block, time grows in a straight line with its token blocks, so two
small numbers of them say what the stage's own number takes. What no bar is shown for, such as rotation and the checks
of a walk, is counted once and not by depth: a part of it is left out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from llmqat.calibrate import calibrate
from llmqat.calibrate.config import RangesStage, TextStage
from llmqat.calibrate.stages import needs_text
from llmqat.evaluate.memory import forget_peak, peak
from llmqat.layers.buffers import make_buffers
from llmqat.layers.probe import probe_inputs
from llmqat.models import (
    empty_model,
    named_blocks,
    plain_config,
    read_config,
    resolve_spec,
    to_accelerator,
    token_model_class,
)
from llmqat.recipe.config import Recipe, forward_dtype, master_dtype, training_arguments
from llmqat.recipe.plan import blocks_of
from llmqat.recipe.start import starts_packed
from llmqat.terminal.bars import Bar

BY_TEXT = ("moments", "inputs", "smooth", "gptq", "blockwise")
"""Bars of what takes longer with more token blocks; the search for scales does not."""
SHORT_SECONDS = 30.0
"""A first calibration that took no longer is done once more, since kernels were made in it."""
_SPREAD = 0.02
"""Standard deviation of the random weights, as transformers draws them for most models."""


@dataclass(frozen=True)
class BlockProbe:
    """What the calibration of one transformer block took.

    Attributes:
        blocks: transformer blocks of the model.
        block_seconds: of all stages for one of them, with the token blocks that each stage takes.
        other_seconds: what no bar is shown for.
        peak_bytes: most memory held beyond what was held before, embeddings and output head included. None where nobody
            counted.
    """

    blocks: int
    block_seconds: float
    other_seconds: float
    peak_bytes: int | None

    @property
    def seconds(self) -> float:
        """How long the calibration of the whole model would take."""
        return self.blocks * self.block_seconds + self.other_seconds


@dataclass
class _Clock:
    """Times what bars are shown for.

    Attributes:
        seconds: by what is done.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    def bar(self, what: str, unit: str) -> Callable[[Iterable[Any]], Bar]:
        """Returns a wrapper of an iterable, as calibration asks for one."""
        clock = self

        class Timed(Bar):
            def __enter__(self) -> Bar:
                _wait()
                self.began = time.perf_counter()
                return super().__enter__()

            def __exit__(self, *args: Any) -> None:
                super().__exit__(*args)
                _wait()
                taken = time.perf_counter() - self.began
                clock.seconds[what] = clock.seconds.get(what, 0.0) + taken

        return lambda items: Timed(what, unit, items, shown=False)


def _wait() -> None:
    """Waits for what the accelerator has to do, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def calibrates_on_text(recipe: Recipe) -> bool:
    """Returns whether the recipe has stages that run token blocks through the model."""
    return not starts_packed(recipe) and needs_text(recipe.calibrate, recipe.quant)


def probe_block(recipe: Recipe) -> BlockProbe:
    """Returns what the stages of `recipe` take for one block of its model on this machine; no weights are read.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: the recipe calibrates nothing on text, or no block of its model can be calibrated alone.
    """
    if not calibrates_on_text(recipe):
        raise ValueError(
            f"calibrate={[stage.stage for stage in recipe.calibrate]} looks at no text, so there is nothing to probe"
        )
    stages = [stage for stage in recipe.calibrate if isinstance(stage, TextStage)]
    arguments = training_arguments(recipe)
    most = blocks_of(recipe)
    counts = {stage.stage: min(stage.blocks, most or stage.blocks) for stage in stages}
    usual = {"ignore": (), "overrides": {}, "skip_first": 0, "skip_last": 0}  # which tell layers by number
    recipe = recipe.model_copy(update={"quant": recipe.quant.model_copy(update=usual)})
    before = forget_peak() or 0
    try:
        # At least two, since GPTQ validates on halves of the text; and a batch, as a stage runs.
        few = min(max(2, *(stage.batch_size for stage in stages)), max(counts.values()))
        first, others = _timed(recipe, few, arguments)
        if sum(first.values()) + others <= SHORT_SECONDS:
            first, others = _timed(recipe, few, arguments)
        more = min(2 * few, max(counts.values()))
        second = first if more == few else _timed(recipe, more, arguments)[0]
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"a block of {recipe.model} cannot be calibrated alone to probe it: {error}") from error
    highest = peak(arguments.device)
    seconds = 0.0
    for what, least in first.items():
        seconds += least
        if what in BY_TEXT and more > few:
            count = counts.get(what) or counts.get(RangesStage.model_fields["stage"].default, few)
            seconds += max(0.0, second[what] - least) / (more - few) * (count - few)
    return BlockProbe(_one_block(recipe)[1], seconds, others, None if highest is None else highest - before)


def _timed(recipe: Recipe, count: int, arguments: Any) -> tuple[dict[str, float], float]:
    """Returns the seconds of each part of a calibration on `count` token blocks, and those of the rest."""
    model, _ = _one_block(recipe)
    _fill(model, torch.Generator().manual_seed(recipe.seed))
    to_accelerator(model, arguments.device)
    ids = probe_inputs(model, count, recipe.data.block_size, seed=recipe.seed)["input_ids"].cpu()
    clock, start = _Clock(), time.perf_counter()
    with _no_news():
        calibrate(
            *(model, recipe.quant, recipe.calibrate, ids),
            seed=recipe.seed,
            dtype=forward_dtype(arguments.bf16),
            bar=clock.bar,
        )
    return clock.seconds, time.perf_counter() - start - sum(clock.seconds.values())


@contextmanager
def _no_news() -> Iterator[None]:
    """Inside, calibration does not log what its stages did, which means nothing of random weights."""
    own = logging.getLogger("llmqat.calibrate")
    before = own.level
    own.setLevel(logging.WARNING)
    try:
        yield
    finally:
        own.setLevel(before)


def _one_block(recipe: Recipe) -> tuple[PreTrainedModel, int]:
    """Returns the recipe's model with one block and no weights, and how many blocks it has.

    Raises:
        ValueError: it has none.
    """
    config = plain_config(read_config(resolve_spec(recipe.model), recipe.model))
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = empty_model(token_model_class(config, recipe.model), config, dtype=master_dtype(recipe))
    homes: dict[str, list[nn.Module]] = {}
    for name, block in named_blocks(model).items():
        homes.setdefault(name.rpartition(".")[0], []).append(block)
    if not homes:
        raise ValueError(f"{recipe.model} has no transformer blocks, so there is none to calibrate alone")
    home, blocks = max(homes.items(), key=lambda pair: sum(map(_size, pair[1])))
    blocks.sort(key=_size)
    parent, _, attribute = home.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList([blocks[len(blocks) // 2]]))
    return model, len(blocks)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def _fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Gives a model without weights random ones, those of tied parameters once."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    values = torch.empty_like(parameter, device="cpu").normal_(std=_SPREAD, generator=generator)
                    made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
    make_buffers(model)
    model.tie_weights()

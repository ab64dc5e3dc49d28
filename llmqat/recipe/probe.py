"""A few real steps of a recipe's training on random tokens: what memory they take here, and how long one is."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from llmqat.data.blocks import Rows, token_blocks
from llmqat.data.teacher_cache import CacheHeader, TeacherCache, TeacherCacheWriter
from llmqat.evaluate.memory import forget_peak, peak
from llmqat.export import load
from llmqat.heap import give_back_freed_memory
from llmqat.layers import prepare, without_adapters
from llmqat.metrics import TopProbabilities
from llmqat.models import load_model, load_with_few_bits, vocabulary_size
from llmqat.recipe.config import TRAINS_NOTHING, Recipe, kept_top_k, master_dtype, training_arguments
from llmqat.recipe.pipeline import trainable_model
from llmqat.recipe.start import starts_packed
from llmqat.train import QATTrainer, is_own_teacher

PROBE_STEPS = 4
"""Optimizer steps of a probe; the first, in which kernels are made, is not timed."""
SHORT: dict[str, Any] = {
    "max_steps": PROBE_STEPS,
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "logging_strategy": "no",
    "report_to": "none",
    "warmup_steps": 0,
    "quantization_warmup_steps": 0,
    "disable_tqdm": True,
    "push_to_hub": False,
}
"""What a probe's training differs in."""


@dataclass(frozen=True)
class Probe:
    """What some steps took.

    Attributes:
        step_seconds: median of an optimizer step.
        first_seconds: of the first one.
        tokens_per_second: trained on, by all processes together.
        peak_bytes: most memory held while training, beyond what was held before the model was loaded: by the process on
            a CPU, by torch's allocator on a GPU. None where nobody counted.
    """

    step_seconds: float
    first_seconds: float
    tokens_per_second: float
    peak_bytes: int | None

    def seconds(self, steps: int) -> float:
        """Returns how long a training of `steps` optimizer steps would take, calibration and evaluation not counted."""
        return self.first_seconds + self.step_seconds * (steps - 1)


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Marks where the first step begins."""
        if not self.marks:
            self.marks.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Marks where a step ends."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.marks.append(time.perf_counter())


def probe(recipe: Recipe) -> Probe:
    """Returns what a few steps of `recipe` take in this process, without calibration; nothing of them is kept.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: the recipe has a teacher's cache, which knows nothing of random tokens, or does not do.
    """
    if not recipe.trains:
        raise ValueError(f"a probe measures steps of training, and {TRAINS_NOTHING}; plan without --probe")
    if recipe.teacher_cache is not None:
        raise ValueError(
            f"a probe trains on random tokens, which teacher_cache={recipe.teacher_cache} knows nothing of; plan "
            "without --probe, or probe with teacher_cache=null"
        )
    before = forget_peak() or 0
    if starts_packed(recipe):
        model = load(recipe.model)
    else:
        model, _ = load_model(recipe.model, master_dtype(recipe))
        prepare(model, recipe.quant)
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="llmqat-") as folder:
        arguments = training_arguments(
            recipe.model_copy(update={"output": Path(folder), "train": {**recipe.train, **SHORT}})
        )
        student = trainable_model(recipe, model, arguments)
        samples = PROBE_STEPS * arguments.train_batch_size * arguments.gradient_accumulation_steps
        generator = torch.Generator().manual_seed(recipe.seed)
        ids = torch.randint(vocabulary_size(model), (samples, recipe.data.block_size), generator=generator)
        starts = (torch.arange(recipe.data.block_size) % max(recipe.data.block_size // 2, 1) == 0).to(torch.uint8)
        top_k = kept_top_k(recipe)
        rows = Rows(ids, starts=None if top_k is None else starts.repeat(samples, 1))
        trainer = QATTrainer(
            model=student,
            teacher=_teacher(recipe, student) if top_k is None else _random_cache(rows, student, top_k, Path(folder)),
            args=arguments,
            train_dataset=token_blocks(rows, "random").dataset(),
            callbacks=[clock],
        )
        give_back_freed_memory()
        forget_peak()
        trainer.train()
        highest = peak(arguments.device)
    seconds = [after - earlier for earlier, after in pairwise(clock.marks)]
    tokens = samples // PROBE_STEPS * recipe.data.block_size * arguments.world_size
    step = median(seconds[1:])
    return Probe(step, seconds[0], tokens / step, None if highest is None else highest - before)


def _random_cache(rows: Rows, student: Any, top_k: int, folder: Path) -> TeacherCache:
    """Returns a teacher cache with made-up predictions for every position of `rows`.

    The first `top_k` token ids have probability 1 / (top_k + 1) each, and so have all other tokens together.
    """
    vocabulary = vocabulary_size(without_adapters(student))
    header = CacheHeader("", "", vocabulary, min(top_k, vocabulary), "bfloat16")
    count = rows.stored.shape[1] - 1
    indices = torch.arange(header.top_k).repeat(count, 1)
    even = torch.full(indices.shape, -math.log(header.top_k + 1))
    inputs = rows.inputs()
    with TeacherCacheWriter(folder / "teacher", header) as writer:
        for block, positions in zip(inputs["input_ids"], inputs["position_ids"], strict=True):
            writer.add(block, TopProbabilities(indices, even, even[:, 0]), positions)
    return TeacherCache(folder / "teacher")


def _teacher(recipe: Recipe, student: Any) -> PreTrainedModel | None:
    if training_arguments(recipe).kl_weight == 0:
        return None
    if recipe.teacher_bits is not None:
        return load_with_few_bits(recipe.source, recipe.teacher_bits)
    return None if recipe.lora is not None and is_own_teacher(student) else load_model(recipe.source, torch.bfloat16)[0]

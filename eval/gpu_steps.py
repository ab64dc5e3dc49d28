"""The measurements of eval/gpu.py: each step is a row of parts, the ones that say most first.

A part makes what it needs, measures it, and returns figures that JSON takes. Parts are made one after the other while
a step goes on, so one can expect its seconds from what the parts before it have found.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import budget
import inference
import kernel_speed
import torch
from gpu_models import Sizes, Training, device, held_bytes, pack, peak_bytes, random_blocks, random_llama, small_model
from peft import LoraConfig, get_peft_model
from torch import nn
from training_speed import WARM_UP_STEPS, PlainStep, StepClock, prepare_by_torchao, train
from transformers import CompileConfig, PreTrainedModel

from llmqat.calibrate import BlockwiseStage, GPTQStage, RangesStage, Stage, calibrate
from llmqat.data import TokenBlocks, synthesis, writer
from llmqat.evaluate.speed import Clock
from llmqat.export.checkpoint import compile_decoding
from llmqat.extras import missing
from llmqat.kernels import KERNELS
from llmqat.layers import QuantConfig, prepare
from llmqat.models import load_model
from llmqat.recipe.config import Recipe, forward_dtype
from llmqat.recipe.memory import Devices, Method, memory_of, size_of
from llmqat.train import LoraSettings, processor_has_bf16

RANK = 16
"""Of adapters."""
RECIPE_BATCH = 2
"""Blocks in an optimizer step of the recipes, whose rates are meant for it."""
ROUNDS = 2
"""Of GPTQ before a budget is trained; the ten of the recipes would take most of the time that there is."""
TEXT_RATE, TRAINING_RATE = 60_000, 60_000
"""Tokens a second that a budget expects before one was measured."""
CELL_SECONDS, START_SECONDS = 12.0, 15.0
"""What a budget takes beside text and training: loading, saving and scoring; and calibration, the first of a scheme."""


@dataclass(frozen=True)
class Part:
    """One measurement."""

    name: str
    seconds: float
    """Expected on an H100: it is not begun with less time left."""
    measure: Callable[[], dict[str, Any]]
    obstacle: str = ""
    """Why it cannot be measured here; empty where it can."""


@dataclass(frozen=True)
class Context:
    """What all steps know."""

    sizes: Sizes
    model: str | None
    """Spec of the small model; its random twin where None."""
    work: Path | None
    """Folder that keeps text and calibrations of budgets; a temporary one where None."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """Parts of this step that were measured before, by name; those measured now come to it."""


# Kernels


def kernel_parts(context: Context) -> Iterator[Part]:
    """Yields the products of each shape of weights with 4 bits, then with others."""
    sizes = context.sizes
    first, *others = sizes.bits
    for shape, bits in (*product(sizes.shapes, [first]), *product(sizes.shapes, others)):
        yield Part(f"{bits} bits, {shape}", 4, partial(products, sizes, bits, shape))


def products(sizes: Sizes, bits: int, shape: str) -> dict[str, Any]:
    """Returns time and error of every kernel on weights of a shape, by rows; and why the others decline."""
    options = argparse.Namespace(bits=bits, group_size=sizes.group_size, cached=sizes.cached, repeats=sizes.repeats)
    out_features, in_features = map(int, shape.split("x"))
    rows: dict[str, Any] = {}
    for count in sizes.rows:
        found = kernel_speed.measured(out_features, in_features, count, options, device())
        rows[str(count)] = {name: own._asdict() for name, own in found.items()}
    weight = kernel_speed.random_weight(out_features, in_features, options, device())
    x = torch.ones(1, in_features, device=device()).bfloat16()
    declined = {name: reason for name, kernel in KERNELS.items() if (reason := kernel.declines(x, weight)) is not None}
    return {"bits": bits, "shape": shape, "rows": rows, "declined": declined}


# Packed models


def decoding_parts(context: Context) -> Iterator[Part]:
    """Yields packed decoding and prefill beside bfloat16, model by model, then compiled."""
    sizes = context.sizes
    for shape in sizes.llamas:
        yield Part(shape, 25 if shape == "8B" else 15, partial(decoding, sizes, shape))
    for shape, way in product(sizes.llamas, COMPILED):
        yield Part(f"{shape}, {way}", 60 if shape == "8B" else 45, partial(compiled_decoding, sizes, shape, way))


def decoding(sizes: Sizes, shape: str) -> dict[str, Any]:
    """Returns the rates of a random Llama in bfloat16 and packed, and the bytes of its weights."""
    model = random_llama(shape, torch.bfloat16)
    rates = {}
    for way in ("bf16", "packed"):
        if way == "packed":
            pack(model, sizes.group_size)
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        together = timed(model, sizes, sizes.decode_batch)["decode"]
        rates[way] = {**timed(model, sizes), "batch_decode": together, "weight_bytes": held}
    return {"batch_size": sizes.decode_batch, "prompt_tokens": sizes.prompt_tokens, **rates}


def timed(model: PreTrainedModel, sizes: Sizes, batch_size: int = 1) -> dict[str, float]:
    """Returns the median seconds of a prefill, and of a decoding step of all sequences together."""
    options = argparse.Namespace(prompt_tokens=sizes.prompt_tokens, new_tokens=sizes.new_tokens)
    times, turn = inference.Times(), inference.transformers_turn(model, options, batch_size)
    turn()
    for _ in range(sizes.repeats):
        times.add(turn)
    return {"prefill": median(times.prefill), "decode": median(times.decode)}


def compiled_decoding(sizes: Sizes, shape: str, way: str) -> dict[str, float]:
    """Returns the median seconds of a compiled decoding step of one sequence, and of the first turn, which compiles."""
    torch.compiler.reset()
    model = random_llama(shape, torch.bfloat16)
    if way != BF16_COMPILED:
        pack(model, sizes.group_size)
    COMPILED[way](model)
    clock = Clock(device())
    begun = clock.now()
    inference.transformers_turn(
        model, argparse.Namespace(prompt_tokens=sizes.prompt_tokens, new_tokens=sizes.new_tokens)
    )()
    first = clock.now() - begun
    return {**timed(model, sizes), "first_turn": first}


def compile_as_transformers(model: PreTrainedModel) -> None:
    """Lets `generate` compile as stock transformers does, with CUDA graphs."""
    settings = CompileConfig()
    settings._compile_all_devices = True
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = settings


BF16_COMPILED = "bf16 compiled"
COMPILED: dict[str, Callable[[PreTrainedModel], None]] = {
    "packed, compiled": compile_decoding,
    BF16_COMPILED: compile_as_transformers,
}
"""Way -> what prepares a model for it."""


# Training steps


def training_parts(context: Context) -> Iterator[Part]:
    """Yields llmqat's training step, the plain one and torchao's, size by size."""
    absent = missing("torchao")
    for training in context.sizes.trainings:
        seconds = 30 if training.shape == "8B" else 18
        yield Part(f"{training.name}, llmqat", seconds, partial(own_training, context, training))
        yield Part(f"{training.name}, plain", seconds / 2, partial(plain_training, context, training, False))
        if not training.lora:
            obstacle = "" if absent is None else f"it needs {absent}"
            measure = partial(plain_training, context, training, True)
            yield Part(f"{training.name}, torchao", seconds / 2, measure, obstacle)


def own_training(context: Context, training: Training) -> dict[str, Any]:
    """Returns the speed and peak memory of QATTrainer's step, and the peak by the arithmetic of `llmqat plan`."""
    before = held_bytes()
    student: Any = trained_model(context, training)
    teacher = None if training.lora else trained_model(context, training, torch.bfloat16)
    prepare(student, QuantConfig.preset("int4", group_size=context.sizes.group_size))
    if training.lora:
        student = LoraSettings(r=RANK, lora_alpha=2 * RANK).attach(student)
    batches, clock = batches_of(context, training, student), StepClock()
    held_bytes()
    lora = training.lora
    train(student, teacher, batches, [clock], lambda turn: None, gradient_checkpointing=lora, own_teacher=lora)
    found = training_figures(clock, context, training, before)
    return {**found, "planned_bytes": planned_bytes(student, context, training)}


def plain_training(context: Context, training: Training, by_torchao: bool) -> dict[str, Any]:
    """Returns the speed and peak memory of a step without llmqat, with torchao's quantizers or without any."""
    before = held_bytes()
    student: Any = trained_model(context, training)
    if by_torchao:
        prepare_by_torchao(student, context.sizes.group_size)
    if training.lora:
        student.gradient_checkpointing_enable()
        student.enable_input_require_grads()
        student = get_peft_model(student, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
        teacher: Any = partial(without_adapters, student)
    else:
        teacher = trained_model(context, training, torch.bfloat16)
    clock = StepClock()
    step = PlainStep(student, teacher, clock)
    held_bytes()
    for batch in batches_of(context, training, student):
        step.run(batch.unbind())
    return training_figures(clock, context, training, before)


def without_adapters(student: Any, **inputs: Any) -> Any:
    """Returns what a peft model gives without its adapters."""
    with student.disable_adapter():
        return student(**inputs)


def trained_model(context: Context, training: Training, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Returns the model of a training: float32 masters, but bfloat16 under adapters, or where `dtype` says so."""
    dtype = dtype or (torch.bfloat16 if training.lora else torch.float32)
    if training.shape == context.sizes.small_llama:
        return small_model(context.model, context.sizes, dtype)[0]
    return random_llama(training.shape, dtype)


def batches_of(context: Context, training: Training, student: Any) -> torch.Tensor:
    """Returns random token ids [steps, 1, B, L], with the steps that are not timed."""
    shape = (context.sizes.steps + WARM_UP_STEPS, 1, training.batch_size, context.sizes.block_size)
    return random_blocks(shape, student.config.vocab_size)


def training_figures(
    clock: StepClock, context: Context, training: Training, before: int | None
) -> dict[str, float | None]:
    """Returns tokens a second, seconds of a step, and the peak above the bytes held `before`."""
    peak, seconds = peak_bytes(), clock.seconds()
    return {
        "tokens_per_second": training.batch_size * context.sizes.block_size / seconds,
        "step_seconds": seconds,
        "peak_bytes": None if peak is None or before is None else peak - before,
    }


def planned_bytes(student: Any, context: Context, training: Training) -> float:
    """Returns the peak that `llmqat plan` tells of a training of `student`."""
    head = student.get_output_embeddings()
    method = Method(
        trains="lora" if training.lora else "all",
        trained=sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad),
        teacher=0.0 if training.lora else 2.0,
        head_trains=any(parameter.requires_grad for parameter in head.parameters()),
        batch=training.batch_size,
        length=context.sizes.block_size,
        checkpointing=training.lora,
    )
    return memory_of(size_of(student, student.config), method, Devices(accelerator=device().type)).peak


# Text and calibration


def calibration_parts(context: Context) -> Iterator[Part]:
    """Yields the model's own text, then block-wise training and GPTQ on it."""
    workshop = Workshop(context)
    yield Part("synthesis", 15, workshop.synthesis)
    blocks = context.sizes.calibration_blocks
    for stage, seconds in ((BlockwiseStage(blocks=blocks), 25), (GPTQStage(blocks=blocks), 65)):
        yield Part(stage.stage, seconds, partial(workshop.calibration, stage))


class Workshop:
    """The small model, and the text that it has written."""

    def __init__(self, context: Context) -> None:
        self.context, self.sizes = context, context.sizes

    @cached_property
    def _text(self) -> tuple[TokenBlocks, float]:
        """The text, and the seconds it took to write."""
        model, tokenizer = small_model(self.context.model, self.sizes, torch.bfloat16)
        settings = {"block_size": self.sizes.block_size, "batch_size": self.sizes.text_blocks}
        clock = Clock(device())
        begun = clock.now()
        with many_rows():
            tokens = self.sizes.text_blocks * self.sizes.block_size * 15 // 16  # some are refused, and written anew
            text = synthesis.synthesize(model, tokenizer, tokens, **settings)
        return text, clock.now() - begun

    def synthesis(self) -> dict[str, Any]:
        """Returns the speed of text of the model's own."""
        text, seconds = self._text
        tokens = text.ids.numel()
        return {"tokens": tokens, "writing_seconds": seconds, "tokens_per_second": tokens / seconds}

    def calibration(self, stage: Stage) -> dict[str, Any]:
        """Returns the seconds of `stage` after `ranges`, and KL from full precision after each."""
        text, _ = self._text
        model, _ = small_model(self.context.model, self.sizes, torch.bfloat16)
        quant = QuantConfig.preset("int4", group_size=self.sizes.group_size)
        stages = [RangesStage(blocks=self.sizes.calibration_blocks), stage]
        reports = calibrate(model, quant, stages, text.rows, dtype=forward_dtype(processor_has_bf16()))
        return {one.stage: {"seconds": one.seconds, "kl_after": one.kl_after} for one in reports}


@contextmanager
def many_rows() -> Iterator[None]:
    """Inside, a model that writes on a GPU may hold keys and values of a quarter of its memory, not of 6 GiB."""
    before = writer.CACHE_BYTES
    if torch.cuda.is_available():
        writer.CACHE_BYTES = max(before, torch.cuda.get_device_properties(device()).total_memory // 4)
    try:
        yield
    finally:
        writer.CACHE_BYTES = before


# Budgets


def budget_parts(context: Context) -> Iterator[Part]:
    """Yields distillations of the small model on its own text, from the smallest budget of all schemes on."""
    obstacle = "" if context.model is not None else "a model with random weights has nothing to learn; give --model"
    with tempfile.TemporaryDirectory() as temporary:
        cells = Cells(context, context.work or Path(temporary))
        for tokens, scheme in product(context.sizes.budgets, context.sizes.schemes):
            measure = partial(cells.cell, scheme, tokens)
            yield Part(f"{scheme}, {tokens} tokens", cells.expected(scheme, tokens), measure, obstacle)


class Cells:
    """Budgets, and what they share."""

    def __init__(self, context: Context, work: Path) -> None:
        self.context, self.work = context, work
        self._piece = context.sizes.text_blocks * context.sizes.block_size
        self._pieces = 0  # of text that this process has written, or read
        self._started: set[str] = set()

    @cached_property
    def bench(self) -> GpuBench:
        """The bench of eval/budget.py, with large batches and a live teacher."""
        sizes = self.context.sizes
        parser = argparse.ArgumentParser()
        budget.add_bench_options(parser)
        words = ["--eval", "pydoc", budget.OWN, "--work", str(self.work), "--model", str(self.context.model)]
        blocks = sizes.calibration_blocks
        stages = f"[{{stage: ranges, blocks: {blocks}}}, {{stage: gptq, blocks: {blocks}, rounds: {ROUNDS}}}]"
        words += ["--schemes", *sizes.schemes, "--calibrate", stages, "--group-size", str(sizes.group_size)]
        words += ["--window", str(sizes.block_size), "--max-windows", str(sizes.windows), "--set"]
        changes = [f"data.block_size={sizes.block_size}", f"data.batch_size={sizes.text_blocks * 17 // 16}"]
        options = parser.parse_args([*words, *changes])
        options.texts, options.save_steps = [budget.OWN], 1
        budget.name_texts(parser, options)
        bench = GpuBench(options, sizes)
        bench.begin()
        return bench

    def expected(self, scheme: str, tokens: int) -> float:
        """Returns the seconds that a budget is expected to take, by what was measured before."""
        known = [one["training"]["tokens_per_second"] for one in self.context.found.values() if one["training"]]
        text = max(self._pieces_of(tokens) - self._pieces, 0) * self._piece
        start = 0.0 if scheme in self._started else START_SECONDS
        return CELL_SECONDS + start + text / TEXT_RATE + tokens / min(known, default=TRAINING_RATE)

    def _pieces_of(self, tokens: int) -> int:
        """Returns how many pieces of text a budget takes; the start looks at the first."""
        return max(math.ceil(tokens / self._piece), 1)

    def cell(self, scheme: str, tokens: int) -> dict[str, Any]:
        """Returns KL, perplexity and agreement after a budget, by text."""
        cell = budget.Cell(scheme, budget.OWN, tokens, 0)
        folder = self.bench.work / cell.name
        folder.mkdir(exist_ok=True)
        try:
            found = self.bench.found(cell, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._pieces = max(self._pieces, self._pieces_of(tokens))
        self._started.add(scheme)
        kept = ("scheme", "tokens", "calibration", "training", "bits_per_weight")
        texts = {
            name: {key: entry[key] for key in ("kl", "perplexity", "top1")} for name, entry in found["texts"].items()
        }
        return {**{key: found[key] for key in kept}, "texts": texts}


class GpuBench(budget.Bench):
    """Cells for a GPU: more blocks in a step, more rows that are written at once, a teacher in memory.

    Learning rates grow with the root of the batch, as Adam wants it.
    """

    def __init__(self, options: argparse.Namespace, sizes: Sizes) -> None:
        self._batch = sizes.budget_batch
        self.piece = sizes.text_blocks
        super().__init__(options)

    def recipe_of(self, scheme: str) -> Recipe:
        """Returns the scheme's recipe with larger batches and rates; no checkpoint is written."""
        recipe = super().recipe_of(scheme)
        factor = math.sqrt(self._batch / RECIPE_BATCH)
        rates = {key: value * factor for key, value in recipe.train.items() if key.endswith("learning_rate")}
        train = {**recipe.train, **rates, "per_device_train_batch_size": self._batch, "save_strategy": "no"}
        return recipe.model_copy(update={"train": train})

    def teacher(self, text: str, blocks: TokenBlocks) -> nn.Module:
        """Returns the full-precision model itself: a cache of so many tokens would be gigabytes on disk."""
        return load_model(self.model, torch.bfloat16)[0].to(device())

    def text(self, name: str, count: int) -> TokenBlocks:
        """Returns a text to train on, written by as many rows at once as the GPU holds."""
        with many_rows():
            return super().text(name, count)


STEPS: dict[str, Callable[[Context], Iterator[Part]]] = {
    "kernels": kernel_parts,
    "decoding": decoding_parts,
    "training": training_parts,
    "calibration": calibration_parts,
    "budget": budget_parts,
}
"""Step -> its parts."""

"""What a recipe would do, told from the model's configuration alone: coverage, steps, tokens, memory."""

from __future__ import annotations

import dataclasses
import math

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from llmqat.calibrate import rotates, untie
from llmqat.data.config import DEFAULT_SYNTHETIC_TOKENS
from llmqat.export import FORMATS, load
from llmqat.layers import AuditEntry, CoverageAudit, QuantConfig, audit, prepare
from llmqat.models import read_config, resolve_spec
from llmqat.recipe.config import Recipe, training_arguments
from llmqat.train import LoraSettings

BYTES_PER_TRAINED_PARAMETER = 16
"""float32 master, gradient, and two moments of AdamW."""
BYTES_PER_TEACHER_PARAMETER = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe would do."""

    coverage: CoverageAudit
    """Every parameter tensor: quantized how, or left alone and why."""
    blocks: int | None
    """Blocks of training text; None where the amount is known only when the text is read."""
    steps: int | None
    """Optimizer steps; None as for blocks."""
    tokens: int | None
    """Tokens trained on, repeats counted."""
    target_bits: float | None
    """Average that the bits of layers are chosen under when the run begins; None where all have those of the scheme."""
    state_bytes: int
    """Memory of teacher, masters, gradients and optimizer state with AdamW; activations come on top. With adapters the
    masters are frozen in bfloat16."""


def plan_run(recipe: Recipe) -> Plan:
    """Returns what `recipe` would do; no weights are loaded, but a GGUF file is dequantized to the cache once.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: the scheme or the trainer's arguments do not do.
    """
    arguments = training_arguments(recipe)
    coverage = coverage_of(recipe.model, recipe.quant, rotates(recipe.calibrate))
    wanted = recipe.data.tokens or (DEFAULT_SYNTHETIC_TOKENS if recipe.data.source == "synthetic" else None)
    blocks = None if wanted is None else math.ceil(wanted / recipe.data.block_size)
    samples = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps: int | None = arguments.max_steps
    if arguments.max_steps <= 0:
        steps = None if blocks is None else math.ceil(math.ceil(blocks / samples) * arguments.num_train_epochs)
    return Plan(
        coverage=coverage,
        blocks=blocks,
        steps=steps,
        tokens=None if steps is None else steps * samples * recipe.data.block_size,
        target_bits=None if recipe.allocate is None else recipe.allocate.target_bits,
        state_bytes=_state_bytes(recipe, coverage),
    )


def _state_bytes(recipe: Recipe, coverage: CoverageAudit) -> int:
    entries = [entry for entry in coverage.entries if entry.bytes_before]
    held = sum(entry.numel for entry in entries) * BYTES_PER_TEACHER_PARAMETER
    teacher = held if recipe.teacher_cache is None else 0
    if recipe.teacher_bits is not None:
        linear = sum(entry.numel for entry in coverage.quantized)
        teacher -= round(linear * (BYTES_PER_TEACHER_PARAMETER - recipe.teacher_bits / 8))
    if recipe.lora is None:
        return teacher + sum(entry.numel for entry in entries) * BYTES_PER_TRAINED_PARAMETER
    adapted = [entry for entry in coverage.quantized if recipe.lora.targets is None or _is_target(entry, recipe.lora)]
    factors = sum(recipe.lora.r * math.prod(entry.shape[:-2]) * sum(entry.shape[-2:]) for entry in adapted)
    return held + teacher + factors * BYTES_PER_TRAINED_PARAMETER


def _is_target(entry: AuditEntry, lora: LoraSettings) -> bool:
    name = entry.name.removesuffix(".weight")
    return any(name == target or name.endswith(f".{target}") for target in lora.targets or ())


def coverage_of(spec: str, quant: QuantConfig, rotated: bool = False) -> CoverageAudit:
    """Returns the coverage audit of a packed checkpoint as it is, or of any other model as `quant` would leave it.

    Args:
        spec: what `load_model` takes, or a packed checkpoint.
        quant: the scheme.
        rotated: whether the model is rotated first, which unties its output head.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: a target matches nothing, or a group size does not divide.
    """
    config = read_config(resolve_spec(spec), spec)
    if any(format.is_packed(config) for format in FORMATS.values()):
        return audit(load(spec))
    model = _without_weights(config)
    if rotated:
        untie(model)
    return prepare(model, quant)


def _without_weights(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model

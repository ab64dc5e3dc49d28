"""What eval/gpu.py measures on: random Llamas made on the device, and how large everything is.

No weight comes from a disk, but for those of `--model`. `FULL` is for one GPU of 80 GB and a few minutes, `SMALL` for a
CPU and a few seconds.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import inference
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llmqat.layers import QuantConfig, convert, decode_in_groups, prepare, share_products
from llmqat.models import load_model

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {  # SmolLM2-135M
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1.1B": {  # TinyLlama
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "8B": {  # Llama 3
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "tiny": {**inference.SHAPES["tiny"], "tie_word_embeddings": True},
}
CONTEXT = 2048
"""Positions of a random Llama."""


@dataclass(frozen=True)
class Training:
    """A training step that is measured."""

    name: str
    shape: str
    """Of `SHAPES`."""
    batch_size: int
    """Blocks in a step."""
    lora: bool = False
    """Whether adapters of rank 16 train, with gradient checkpointing; else all weights."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    pace: float
    """What the expected seconds of a part, which are those of an H100, are multiplied by."""
    group_size: int
    """Weights that share a scale."""
    shapes: tuple[str, ...]
    """OUTxIN of the weights that kernels multiply with."""
    rows: tuple[int, ...]
    """Of activations."""
    bits: tuple[int, ...]
    """Of these weights; the first with all shapes before the others."""
    cached: int
    """Megabytes that the weights of a shape fill at least."""
    repeats: int
    """Of a measurement, after one that is thrown away."""
    llamas: tuple[str, ...]
    """Shapes that decode."""
    prompt_tokens: int
    new_tokens: int
    decode_batch: int
    """Sequences that are decoded side by side."""
    trainings: tuple[Training, ...]
    block_size: int
    """Tokens in a block."""
    steps: int
    """Training steps that are timed."""
    small_llama: str
    """The shape that stands for `--model` where none is given."""
    text_blocks: int
    """Blocks that the model writes at once."""
    calibration_blocks: int
    schemes: tuple[str, ...]
    """Presets that have a recipe, trained on every budget."""
    budgets: tuple[int, ...]
    """Tokens of training."""
    budget_batch: int
    """Blocks in an optimizer step of a budget."""
    windows: int
    """That a budget is scored on."""


FULL = Sizes(
    pace=1.0,
    group_size=64,
    shapes=("4096x4096", "2048x2048", "14336x4096", "5632x2048", "4096x14336", "2048x5632"),
    rows=(1, 16, 32, 512),
    bits=(4, 2, 3, 8),
    cached=64,
    repeats=3,
    llamas=("1.1B", "8B"),
    prompt_tokens=512,
    new_tokens=24,
    decode_batch=32,
    trainings=(Training("135M", "135M", 16), Training("1.1B", "1.1B", 4), Training("8B LoRA", "8B", 4, lora=True)),
    block_size=512,
    steps=6,
    small_llama="135M",
    text_blocks=2048,
    calibration_blocks=64,
    schemes=("int4", "int3", "int2"),
    budgets=(0, 1_000_000, 5_000_000, 20_000_000, 50_000_000, 100_000_000),
    budget_batch=32,
    windows=40,
)
SMALL = Sizes(
    pace=0.01,
    group_size=32,
    shapes=("64x128",),
    rows=(1, 40),
    bits=(4, 3),
    cached=0,
    repeats=1,
    llamas=("tiny",),
    prompt_tokens=16,
    new_tokens=3,
    decode_batch=2,
    trainings=(Training("tiny", "tiny", 2), Training("tiny LoRA", "tiny", 2, lora=True)),
    block_size=32,
    steps=1,
    small_llama="tiny",
    text_blocks=8,
    calibration_blocks=4,
    schemes=("int4", "int2"),
    budgets=(0, 128),
    budget_batch=2,
    windows=4,
)


def device() -> torch.device:
    """Returns the GPU, or the CPU without one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_llama(shape: str, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a Llama with random weights, made on the device, in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1)
    with device():
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def small_model(spec: str | None, sizes: Sizes, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns `--model` on the device, or its random twin where none is given, and its tokenizer."""
    if spec is not None:
        model, tokenizer = load_model(spec, dtype)
        return model.to(device()), tokenizer
    twin = random_llama(sizes.small_llama, dtype)
    return twin, inference.byte_tokenizer(twin.config.vocab_size)


def pack(model: PreTrainedModel, group_size: int) -> None:
    """Rounds the linears of `model` to int4 and packs them, in place, as `llmqat.load` gives a checkpoint."""
    prepare(model, QuantConfig.preset("int4", group_size=group_size))
    convert(model)
    share_products(model)
    decode_in_groups(model)
    clean()


def random_blocks(shape: tuple[int, ...], vocabulary: int) -> Tensor:
    """Returns seeded random token ids of `shape`, on the CPU."""
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))


def clean() -> None:
    """Gives back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def held_bytes() -> int | None:
    """Returns the bytes of tensors on the GPU now, and forgets how many there were at most; None without a GPU."""
    clean()
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_bytes() -> int | None:
    """Returns the most bytes of tensors on the GPU since `held_bytes`; None without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def gpu_name() -> str | None:
    """Returns what the GPU is called; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None

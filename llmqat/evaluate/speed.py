"""What a model costs to run: time to the first token, tokens decoded a second, memory, energy, bytes on disk by part.

Decoding is measured as a chat feels it: a prompt of fixed length goes through the model once (prefill), then tokens
follow one at a time through the key-value cache, greedily, each fed back in. Only the steps are timed for the decode
figure; the median of several repeats is given, after one that is thrown away. Figures from different machines, or from
one machine at different times, are not comparable: compare models measured one after the other.

Bytes are read from the headers of the safetensors files, so a checkpoint of any size takes milliseconds.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmqat.evaluate.energy import EnergyMeter
from llmqat.evaluate.memory import forget_peak, peak
from llmqat.layers import new_cache
from llmqat.models import check_safetensors, model_device, vocabulary_size, weight_files

PARTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("embeddings", re.compile(r"(embed|wte|wpe|lm_head)")),
    ("linears", re.compile(r"\.(weight_packed|qweight)$")),
    ("scales", re.compile(r"\.((weight|input)_(global_scale|scale|zero_point)|scales|qzeros|g_idx)$")),
    ("other", re.compile(r"\.weight_shape$")),
)
"""The first pattern found in a tensor's name says its part; of the rest, matrices are linears and vectors other."""

_BYTES_OF = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class DecodeSpeed:
    """Medians over the repeats."""

    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int  # of torch on the CPU
    batch_size: int = 1  # sequences decoded side by side; the rates count the tokens of all

    @property
    def first_token_seconds(self) -> float:
        """Seconds from the prompt to its first new token."""
        return self.prompt_tokens * self.batch_size / self.prefill_tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True)
class Costs:
    """What it took to load a model and to decode with it; None is what this machine does not tell."""

    load_seconds: float | None  # None, as of memory, where the model was not loaded from its files
    first_token_seconds: float  # after a prompt of 64 tokens
    decode_tokens_per_second: float  # one sequence
    batch_tokens_per_second: float  # `batch_size` sequences side by side
    batch_size: int
    peak_bytes: int | None  # held at most while loading and decoding, beyond what was held before
    joules_per_token: float | None  # of the package (RAPL) or the board (NVML), per token of one sequence

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True)
class DiskUsage:
    """Bytes of a checkpoint folder by part."""

    linears: int  # matrices of linear layers, packed or not
    scales: int  # scales and zero points of packed linears
    embeddings: int  # token embeddings and the output head
    other: int  # norms, biases, the shapes of packed linears
    headers: int  # of the safetensors files
    files: int  # tokenizer, configuration, everything that is not safetensors
    linear_weights: int  # number of weights in the linears, not bytes; 0 where the layout is not known

    @property
    def total(self) -> int:
        """Bytes of the whole folder."""
        return self.linears + self.scales + self.embeddings + self.other + self.headers + self.files

    @property
    def weight_bytes(self) -> int:
        """Bytes of the safetensors files alone."""
        return self.total - self.files

    @property
    def bits_per_weight(self) -> float | None:
        """Bits on disk of an average weight of a linear layer, its scales included; None without linears."""
        return 8 * (self.linears + self.scales) / self.linear_weights if self.linear_weights else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields and what is derived from them as JSON takes them."""
        derived = {name: getattr(self, name) for name in ("total", "weight_bytes", "bits_per_weight")}
        return {**asdict(self), **derived}


@torch.no_grad()
def decode_speed(
    model: nn.Module,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    repeats: int = 3,
    batch_size: int = 1,
    seed: int = 0,
) -> DecodeSpeed:
    """Returns how fast `model` reads prompts and writes tokens.

    Args:
        model: a transformers causal language model.
        prompt_tokens: random tokens of the prompt; what they say does not matter to the speed.
        new_tokens: tokens timed in each repeat.
        repeats: timed repeats, after one that is not timed.
        batch_size: sequences side by side.
        seed: of the prompt.

    Raises:
        ValueError: if one of the counts is below 1.
    """
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats, "batch_size": batch_size}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} measures nothing; choose at least 1")
    device = model_device(model)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(vocabulary_size(model), (batch_size, prompt_tokens), generator=generator).to(device)
    was_training = model.training
    model.eval()
    try:
        timed = [_time_once(model, prompt, new_tokens) for _ in range(repeats + 1)][1:]
    finally:
        model.train(was_training)
    return DecodeSpeed(
        decode_tokens_per_second=new_tokens * batch_size / median(decode for _, decode in timed),
        prefill_tokens_per_second=prompt_tokens * batch_size / median(prefill for prefill, _ in timed),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=torch.get_num_threads(),
        batch_size=batch_size,
    )


def measure_costs(
    load: Callable[[], nn.Module], *, batch_size: int = 8, from_files: bool = True
) -> tuple[nn.Module, Costs]:
    """Loads a model and decodes with it; returns it and what that took.

    Args:
        load: makes the model.
        batch_size: sequences that are decoded side by side.
        from_files: `load` reads the model's own files. If not (the model is in memory already, or is made of another
            one), its time and memory say nothing of the model, and are None.
    """
    before = forget_peak()
    start = time.perf_counter()
    model = load()
    loaded = time.perf_counter() - start
    meter = EnergyMeter.of(model_device(model))
    joules = meter.joules()
    alone = decode_speed(model)
    spent = None if joules is None else (meter.joules() or joules) - joules
    together = decode_speed(model, batch_size=batch_size, repeats=1)
    held = peak(model_device(model))
    written = alone.new_tokens * (alone.repeats + 1)
    return model, Costs(
        load_seconds=loaded if from_files else None,
        first_token_seconds=alone.first_token_seconds,
        decode_tokens_per_second=alone.decode_tokens_per_second,
        batch_tokens_per_second=together.decode_tokens_per_second,
        batch_size=batch_size,
        peak_bytes=None if held is None or before is None or not from_files else held - before,
        joules_per_token=None if spent is None else spent / written,
    )


def disk_usage(path: Path | str) -> DiskUsage:
    """Returns the bytes of a checkpoint folder by part; only headers and the shapes of packed layers are read.

    Raises:
        FileNotFoundError: if the folder holds no safetensors.
        ValueError: if one of its safetensors files is truncated or damaged.
    """
    folder = Path(path)
    shards = weight_files(folder)
    per_number = _weights_per_number(folder)
    sizes = dict.fromkeys(("linears", "scales", "embeddings", "other"), 0)
    weights = 0
    for shard in shards:
        check_safetensors(shard)
        with safe_open(shard, framework="pt") as tensors:
            names = set(tensors.keys())
            for name in names:
                entry = tensors.get_slice(name)
                part = _part_of(name, entry.get_shape())
                sizes[part] += math.prod(entry.get_shape()) * _BYTES_OF.get(entry.get_dtype(), 1)
                if part == "linears":
                    shape = name.replace(".weight_packed", ".weight_shape")
                    packed = shape != name and shape in names
                    count = math.prod(tensors.get_tensor(shape).tolist() if packed else entry.get_shape())
                    if shape != name and not packed:  # floats of 4 bits, two in a byte
                        count *= 2
                    weights += round(count * (per_number if name.endswith(".qweight") else 1))
    weight_bytes = sum(shard.stat().st_size for shard in shards)
    every_byte = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return DiskUsage(
        **sizes,
        headers=weight_bytes - sum(sizes.values()),
        files=every_byte - weight_bytes,
        linear_weights=weights if per_number else 0,
    )


def _weights_per_number(folder: Path) -> float:
    """Returns how many weights one number of a `qweight` holds (GPTQ, AWQ); 0 for a layout that is not known."""
    file = folder / "config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") if file.is_file() else None
    if not found:
        return 1
    method = found.get("quant_method")
    if method in ("gptq", "awq"):
        return 32 / int(found.get("bits", 4))
    return 1 if method in ("compressed-tensors", "fp8", "fbgemm_fp8") else 0


def _time_once(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Returns the seconds of one prefill and of the decode steps after it."""
    clock = Clock(prompt.device)
    start = clock.now()
    output = model(input_ids=prompt, past_key_values=new_cache(model), use_cache=True, logits_to_keep=1)
    prefilled = clock.now()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return prefilled - start, clock.now() - prefilled


@dataclass(frozen=True)
class Clock:
    """Wall time after all work queued on the device is done."""

    device: torch.device

    def now(self) -> float:
        """Returns seconds from some fixed moment."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def _part_of(name: str, shape: list[int]) -> str:
    for part, pattern in PARTS:
        if pattern.search(name):
            return part
    return "linears" if len(shape) >= 2 else "other"

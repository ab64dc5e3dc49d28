"""Rotation of the residual stream: a Hadamard matrix folded into every weight that reads or writes it.

Multiplying the residual stream by an orthogonal matrix Q spreads a few huge features over all of them, so that no token
spends its codes on one. RMS normalization does not notice a rotation once its gain has moved into the layers that read
it. So nothing is computed at run time: embeddings and writers (o_proj, down_proj) are multiplied by Q on their output
side, readers (q, k, v, gate, up, router, output head) on their input side, and the model computes what it did before.

A tied output head cannot follow: it takes the gain of the last norm, and the embedding does not. It is untied first,
which costs a second matrix of the vocabulary on disk; the audit says how large.

Source: QuaRot (2404.00456) section 4, the rotation called R1 in SpinQuant (2405.16406).

Letters: D hidden size, Q [D, D].
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmqat.calibrate.structure import Norm, check_foldable, find_norms, input_last, unchanged_logits
from llmqat.layers import LinearMap, linear_maps, model_kind, untied_keys
from llmqat.layers.audit import UNTIED
from llmqat.layers.experts import stacked_weights
from llmqat.models import output_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Stream:
    """What touches the residual stream."""

    norms: tuple[Norm, ...]  # that read it
    writers: tuple[Tensor, ...]  # weights and biases that write to it, as views [..., D]


@torch.no_grad()
def rotate(model: nn.Module, seed: int = 0) -> None:
    """Rotates the residual stream of a full-precision `model`, in place; what it computes stays the same.

    Args:
        model: a causal language model with RMS norms before its layers, not prepared yet.
        seed: of the random signs of the Hadamard matrix.

    Raises:
        ValueError: when the model is prepared or not in float32, or its norms do not allow a rotation.
        ValueError: when rotation changed what the model computes; it must then be loaded anew.
    """
    check_foldable(model, "rotation")
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    size = embedding.weight.shape[1]
    stream = _stream(model, size)
    rotation = functools.cache(hadamard(size, seed).to)  # to a device: blocks may be elsewhere than embeddings
    with unchanged_logits(model, "rotation"):
        untie(model)
        for norm in stream.norms:
            _fold_gain(norm)
            for reader in norm.readers.values():
                for weight in _input_last(reader):
                    weight.copy_(weight.double() @ rotation(weight.device))
        for writer in (embedding.weight, *stream.writers):
            writer.copy_(writer.double() @ rotation(writer.device))


def check_rotation(model: nn.Module) -> None:
    """Raises ValueError where the residual stream of a full-precision `model` cannot be rotated."""
    _stream(model, model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]


def hadamard(size: int, seed: int) -> Tensor:
    """Returns a random orthogonal matrix [size, size] in float64: a Hadamard matrix with random signs over sqrt(size).

    Where no Hadamard matrix of the size is known here (Sylvester's and Paley's constructions), a random orthogonal one
    takes its place, and the log says so.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    matrix = _hadamard(size)
    if matrix is None:
        logger.info("no Hadamard matrix of size %d is known; rotating by a random orthogonal one", size)
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] * signs
    return matrix * signs / size**0.5


def _hadamard(size: int) -> Tensor | None:
    """Returns a matrix of ones and minus ones with orthogonal rows, or None."""
    doubling = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    base = size
    doublings = 0
    while base > 1 and (matrix := _paley(base)) is None:
        if base % 2:
            return None
        base, doublings = base // 2, doublings + 1
    matrix = torch.ones(1, 1, dtype=torch.float64) if base == 1 else _paley(base)
    assert matrix is not None
    for _ in range(doublings):
        matrix = torch.kron(doubling, matrix)
    return matrix


def _paley(size: int) -> Tensor | None:
    """Returns Paley's Hadamard matrix of `size` = q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4), q prime; or None.

    Source: Paley, On Orthogonal Matrices (1933), constructions I and II.
    """
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        core = _bordered(size - 1, symmetric=False)
        return core + torch.eye(size, dtype=torch.float64)
    half = size // 2
    if size % 2 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        core, one = _bordered(half - 1, symmetric=True), torch.eye(half, dtype=torch.float64)
        return torch.cat([torch.cat([core + one, core - one], 1), torch.cat([core - one, -core - one], 1)])
    return None


def _bordered(q: int, symmetric: bool) -> Tensor:
    """Returns the Jacobsthal matrix of the prime q with a border of ones: a conference matrix [q + 1, q + 1]."""
    squares = {x * x % q for x in range(1, q)}
    character = torch.tensor([0.0 if x == 0 else 1.0 if x in squares else -1.0 for x in range(q)], dtype=torch.float64)
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    matrix[0, 1:] = 1
    matrix[1:, 0] = 1 if symmetric else -1
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _stream(model: nn.Module, size: int) -> _Stream:
    """Returns the norms that read the residual stream, and the layers that write to it.

    Raises:
        ValueError: when a norm is no RMS norm, or nothing reads its output but the stream itself.
    """
    kind = model_kind(model)
    norms = {name: norm for name, norm in find_norms(model).items() if norm.gain.numel() == size}
    readers = {name for norm in norms.values() for name in norm.readers}
    # A norm of queries or keys normalizes the output of a reader, not the residual stream.
    norms = {name: norm for name, norm in norms.items() if norm.readers or norm.source not in readers}
    for name, norm in norms.items():
        if isinstance(norm.module, nn.LayerNorm) or getattr(norm.module, "bias", None) is not None:
            raise ValueError(f"calibrate.rotate: {name} of {kind} subtracts a mean; only RMS norms can be rotated past")
        if not norm.readers:
            raise ValueError(
                f"calibrate.rotate: {name} of {kind} stands after its layer (no linear layer reads it), which a "
                "rotation cannot pass; leave out calibrate.rotate"
            )
        other = next((name for name, reader in norm.readers.items() if not _input_last(reader)), None)
        if other is not None:
            raise ValueError(
                f"calibrate.rotate: {other} of {kind} reads {name} with something else than one weight, which a "
                "rotation cannot be folded into; leave out calibrate.rotate"
            )
    writers = [
        view
        for name, entry in linear_maps(model).items()
        if (name not in readers and not entry.stacked) or (entry.stacked and not _reads(entry))
        for view in _output_last(entry)
        if view.shape[-1] == size
    ]
    _check_towers(model, readers, size)
    if not norms or not writers:
        raise ValueError(f"calibrate.rotate: no residual stream was found in {kind}; leave out calibrate.rotate")
    return _Stream(tuple(norms.values()), tuple(writers))


def _check_towers(model: nn.Module, readers: set[str], size: int) -> None:
    """Raises ValueError where it is not clear which layers for pictures or sound write to the residual stream.

    Text does not reach them, so `unchanged_logits` sees nothing of them.
    """
    config: Any = getattr(model, "config", None)
    if config is None or config.get_text_config(decoder=True) is config:
        return
    text = {id(p) for p in model.get_decoder().parameters()}  # type: ignore[operator]
    found = [
        name
        for name, entry in linear_maps(model).items()
        if name not in readers and id(entry.weight) not in text and _output_last(entry)[0].shape[-1] == size
        if entry.owner is not model.get_output_embeddings()  # type: ignore[operator]
    ]
    if len(found) > 1:
        raise ValueError(
            f"calibrate.rotate: {', '.join(found[:3])} of {model_kind(model)} are as wide as the residual stream, and "
            "text does not reach them, so which of them write to it is not known; leave out calibrate.rotate"
        )


def _reads(entry: LinearMap) -> bool:
    """Returns whether a stacked weight is the first of its experts, the one that reads the residual stream."""
    return entry.weight is next(iter(stacked_weights(entry.owner).values()))


def _output_last(entry: LinearMap) -> list[Tensor]:
    """Returns weight and bias of a linear map as views whose last dimension is its output features."""
    if entry.stacked:
        return [entry.weight.data if entry.owner.is_transposed else entry.weight.data.mT, *_stacked_bias(entry)]
    weight = entry.weight.data if isinstance(entry.owner, Conv1D) else entry.weight.data.t()
    bias = entry.owner.bias
    return [weight] if bias is None else [weight, bias.data]  # type: ignore[list-item]


def _stacked_bias(entry: LinearMap) -> list[Tensor]:
    name = next(name for name, weight in stacked_weights(entry.owner).items() if weight is entry.weight)
    bias = getattr(entry.owner, f"{name}_bias", None)
    return [] if bias is None else [bias.data]


def untie(model: nn.Module) -> None:
    """Gives the output head of `model` a weight of its own where it is tied to the embedding; works on meta tensors."""
    embedding, head = model.get_input_embeddings(), output_head(model)  # type: ignore[operator]
    if head.weight is not embedding.weight:
        return
    head.register_parameter("weight", nn.Parameter(embedding.get_parameter("weight").detach().clone()))
    setattr(head, UNTIED, True)
    config: Any = model.config
    for each in {id(part): part for part in (config, config.get_text_config())}.values():
        each.tie_word_embeddings = False
    name = next(name for name, module in model.named_modules() if module is head)
    untied_keys(model, f"{name}.weight")


def _fold_gain(norm: Norm) -> None:
    gain = norm.gain.double()
    for reader in norm.readers.values():
        for weight in _input_last(reader):
            weight.copy_(weight.double() * gain)
    norm.set_gain(torch.ones_like(norm.gain))


def _input_last(reader: nn.Module) -> list[Tensor]:
    """Returns the weights with which `reader` reads the residual stream, as views [..., D]; none where unknown."""
    stacked = list(stacked_weights(reader).values())
    if stacked:
        return [stacked[0].data.mT if reader.is_transposed else stacked[0].data]
    return [input_last(reader)] if isinstance(getattr(reader, "weight", None), Tensor) else []

"""Fake quantization's forward and backward as one fused kernel each, made by torch.compile where a compiler is there.

Eager, each is a handful of elementwise passes over slices that fit the cache; fused, it is one pass, three times as
fast. Compiling takes seconds, so it happens only inside `fusing()`, as in training and gptq. A fused pair is used only
after it gave the eager forward and weight gradient bit for bit in a trial; where there is no compiler or the trial
fails, the reason is logged once and the eager passes stay.

Letters: N scales, g weights per scale; the weight is seen as [N, g], the scale as [N, 1].
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from llmqat.grid.levels import Grid

logger = logging.getLogger(__name__)

_TRIAL_SHAPE = (4099, 32)


@dataclass(frozen=True)
class FusedKernels:
    """The two passes, symmetric grid.

    Attributes:
        forward: (weight [N, g], scale [N, 1]) -> fake-quantized weight [N, g] in the dtype asked for.
        backward: (weight, scale, gradient [N, g]) -> (weight's gradient [N, g] float32, scale's gradient [N]).
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


_state = {"fusing": False}


@contextmanager
def fusing() -> Iterator[None]:
    """Inside, fake quantization runs on fused kernels where they can be made."""
    before = _state["fusing"]
    _state["fusing"] = True
    try:
        yield
    finally:
        _state["fusing"] = before


def is_fusing() -> bool:
    """Returns whether this is inside `fusing`."""
    return _state["fusing"]


def fused_kernels(grid: Grid, dtype: torch.dtype, device: torch.device) -> FusedKernels | None:
    """Returns the fused pair of a symmetric grid for an output dtype; None outside `fusing` or without a compiler."""
    if not is_fusing() or device.type == "meta":
        return None
    return _tried(grid, dtype, device.type)


@functools.cache
def _tried(grid: Grid, dtype: torch.dtype, device: str) -> FusedKernels | None:
    eager = _passes(grid, dtype)

    def agree(*compiled: Callable[..., Any]) -> bool:
        return _agree(eager, FusedKernels(*compiled), grid, dtype, device)

    found = compiled_after_trial((eager.forward, eager.backward), agree, "fake quantization")
    return None if found is None else FusedKernels(*found)


def compiled_after_trial(
    eager: Sequence[Callable[..., Any]], agree: Callable[..., bool], name: str
) -> list[Callable[..., Any]] | None:
    """Returns functions as torch.compile makes them, if they give the same numbers; else None, and logs why.

    Args:
        eager: the functions.
        agree: whether the compiled ones, its arguments, give the numbers of `eager`.
        name: says in the log what is slower without them.
    """
    try:
        compiled = [torch.compile(function, dynamic=True, fullgraph=True) for function in eager]
        with _disable_current_modes():
            same = agree(*compiled)
    except Exception as error:  # a compiler can fail in any way; without it training is slower, not wrong
        _log_unfused(name, error)
        return None
    if not same:
        _log_unfused(name, "the compiled kernel rounds otherwise and gives other numbers")
        return None
    return [_guarded(own, other, name) for own, other in zip(compiled, eager, strict=True)]


def _guarded(compiled: Callable[..., Any], eager: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Returns `compiled`, which gives way to `eager` for good should a later shape fail to compile.

    Args:
        compiled: made of `eager` by torch.compile.
        eager: the function.
        name: says in the log what is slower then.
    """
    failed = False

    def call(*tensors: Tensor) -> Any:
        nonlocal failed
        if not failed:
            try:
                with _disable_current_modes():  # inside one, torch runs what is compiled as it was written
                    return compiled(*tensors)
            except Exception as error:  # as in the trial
                failed = True
                _log_unfused(name, error)
        return eager(*tensors)

    return call


def _log_unfused(name: str, reason: Exception | str) -> None:
    """Logs why the passes of `name` are run one by one."""
    said = (str(reason).strip() or repr(reason)).splitlines()[0][:200]
    logger.warning("%s is not fused (slower): %s", name, said)


def _passes(grid: Grid, dtype: torch.dtype) -> FusedKernels:
    qmin, qmax = grid.qmin, grid.qmax

    def forward(weight: Tensor, scale: Tensor) -> Tensor:
        return (torch.clamp(grid.rounded(weight.float() / scale), qmin, qmax) * scale).to(dtype)

    def backward(weight: Tensor, scale: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        v = weight.float() / scale
        r = grid.rounded(v)
        q = torch.clamp(r, qmin, qmax)
        inside = (r == q).float()
        g = gradient.float()
        return g * inside, ((q - v * inside) * g).sum(-1)

    for function in (forward, backward):
        # torch.compile gives up after eight variants of one code object, so each grid gets a copy of its own.
        function.__code__ = function.__code__.replace()
    return FusedKernels(forward, backward)


@torch.no_grad()
def _agree(eager: FusedKernels, compiled: FusedKernels, grid: Grid, dtype: torch.dtype, device: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_TRIAL_SHAPE, generator=generator).to(device)
    scale = (torch.randn(_TRIAL_SHAPE[0], 1, generator=generator).to(torch.bfloat16).float() * 2 / grid.qmax).to(device)
    scale = torch.where(scale == 0, 1.0, scale)
    for part in (weight, scale):  # exact: the last rows are those of a layer of small weights
        part[-16:] *= 2.0**-90
    gradient = torch.randn(_TRIAL_SHAPE, generator=generator).to(device, dtype)
    same_forward = torch.equal(eager.forward(weight, scale), compiled.forward(weight, scale))
    (weights, scales), (own_weights, own_scales) = (
        pair.backward(weight, scale, gradient) for pair in (eager, compiled)
    )
    # The scale's gradient is a sum, whose order differs.
    return same_forward and torch.equal(weights, own_weights) and torch.allclose(scales, own_scales, 1e-3, 1e-3)

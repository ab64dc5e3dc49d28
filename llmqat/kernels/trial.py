"""Trials on the device at hand: whether a kernel gives the right numbers, and which of several is the fastest.

Kernels for GPUs come from packages that change, and run on devices that nobody has tried them on. So a kernel is used
only after a product of random values agreed with the reference. Among those that agree, the fastest is found by timing
them once for each shape, number of rows and dtype; the result is kept for the process.

Letters: M rows of activations, O out features, I in features, G scales per row, g weights per scale.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.grid import Grid, pack_codes
from llmqat.kernels.reference import PackedWeight

TRIAL_FEATURES = 128
CALLS = 20
"""Products in one measurement."""
MEASUREMENTS = 3
MIN_CAPABILITY = (8, 0)
"""Of GPUs that multiply bfloat16 in their tensor cores."""

logger = logging.getLogger(__name__)
_fastest: dict[tuple[Any, ...], str] = {}


class TriedKernel(Protocol):
    """What a trial asks of a kernel."""

    name: str

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x [*, I] times the dequantized weight [O, I] transposed, plus bias."""


def too_old(device: torch.device) -> str | None:
    """Returns why an NVIDIA GPU is too old for kernels of bfloat16, or None."""
    capability, least = torch.cuda.get_device_capability(device), MIN_CAPABILITY
    if capability >= least:
        return None
    return f"it needs a GPU of compute capability {least[0]}.{least[1]}, not {capability[0]}.{capability[1]}"


@functools.cache
def refusal(
    kernel: TriedKernel,
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    grid: Grid,
    groups: tuple[int, ...],
    multiplied: Callable[[Tensor], Tensor] = Tensor.float,
) -> str | None:
    """Returns why `kernel` is not used on `device`, or None; tries it with weights of random codes.

    Args:
        kernel: to try.
        source: the package that it is from, for the reason.
        device: to try it on.
        dtype: of activations and scales.
        grid: of the weights.
        groups: group sizes to try; `TRIAL_FEATURES` stands for one scale a channel.
        multiplied: gives the activations, in float32, that the kernel multiplies in place of those that it is given.
    """
    try:
        wrong = [group for group in groups if not agrees(kernel, device, dtype, grid, group, multiplied)]
    except Exception as error:  # a download, a build or a signature can fail in any way; there are other kernels
        return f"{source} could not be used: {error}"
    return f"{source} gave other numbers than the reference" if wrong else None


@torch.no_grad()
def agrees(
    kernel: TriedKernel,
    device: torch.device,
    dtype: torch.dtype,
    grid: Grid,
    group_size: int,
    multiplied: Callable[[Tensor], Tensor] = Tensor.float,
) -> bool:
    """Returns whether the products of 1, 17 and 128 rows with a random weight are what they should be.

    With eps that of `dtype`, each output y may be off by eps * (|y| + |x| @ |ŵ|.T): a kernel may round the sum, and may
    apply scales to sums where the reference rounds each weight. The norm of all errors may be eps * norm(y) at most.
    That finds errors of a few percent everywhere, which the first bound would let pass.
    """
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(grid, group_size, dtype, generator, device)
    values = weight.dequantized(dtype).float()
    for rows in (1, 17, 128):
        x = torch.randn(rows, TRIAL_FEATURES, generator=generator).to(device, dtype)
        taken = multiplied(x)
        exact = F.linear(taken, values)
        unit = max(torch.finfo(dtype).eps, 2**-20)  # sums are float32
        bound = unit * (exact.abs() + F.linear(taken.abs(), values.abs()))
        error = kernel.linear(x, weight, None).float() - exact
        if not (error.abs() <= bound).all() or error.norm() > unit * exact.norm():
            return False
    return True


def random_weight(
    grid: Grid, group_size: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> PackedWeight:
    """Returns a packed weight of `TRIAL_FEATURES` squared random codes, with scales of both signs."""
    shape, groups = (TRIAL_FEATURES, TRIAL_FEATURES), TRIAL_FEATURES // group_size
    codes = torch.randint(grid.qmin, grid.qmax + 1, shape, generator=generator)
    if grid.levels == "float":
        codes = grid.rounded(codes.float())
    scale = torch.randn(TRIAL_FEATURES, groups, generator=generator).to(device, dtype)
    zero_point = None
    if not grid.symmetric:
        zero_point = torch.randint(grid.qmin, grid.qmax + 1, scale.shape, generator=generator).to(device)
    return PackedWeight(pack_codes(codes, grid).to(device), scale, zero_point, grid, TRIAL_FEATURES)


def rows_class(rows: int, most: int = 512) -> int:
    """Returns the power of two from `rows` up, at most `most`: one choice of a kernel holds for all rows of a class."""
    return min(most, 1 << max(0, rows - 1).bit_length())


def may_time(device: torch.device) -> bool:
    """Returns whether a product can be timed now: on a GPU, and not while a graph is made of what is called."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return not torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def fastest(kernels: Sequence[TriedKernel], rows: int, dtype: torch.dtype, weight: PackedWeight) -> TriedKernel:
    """Returns the fastest of `kernels`, all of which accept `rows` rows; layouts made while timing are dropped.

    Args:
        kernels: in order of preference, which decides where all of them fail.
        rows: of activations, M.
        dtype: of activations.
        weight: a weight of the shape; on the device.
    """
    key = (
        weight.packed.device,
        (weight.out_features, weight.in_features, weight.group_size, weight.grid),
        (rows, dtype, *(kernel.name for kernel in kernels)),
    )
    if key not in _fastest:
        x = torch.randn(rows, weight.in_features, device=weight.packed.device).to(dtype)
        times: dict[str, float] = {}
        for kernel in kernels:
            held = kernel.name in weight.layouts
            try:
                times[kernel.name] = microseconds(kernel, x, weight)
            except Exception as error:  # compiled for each shape: another one may do
                logger.info("kernel %s is not used: it failed in a trial: %s", kernel.name, error)
            if not held:
                weight.layouts.pop(kernel.name, None)
        _fastest[key] = min(times, key=lambda name: times[name], default=kernels[0].name)
        said = ", ".join(f"{name} {taken:.0f} µs" for name, taken in sorted(times.items(), key=lambda item: item[1]))
        shape = f"{weight.out_features} x {weight.in_features}"
        logger.info("products of %s weights with up to %d rows run on %s (%s)", shape, rows, _fastest[key], said)
    return next(kernel for kernel in kernels if kernel.name == _fastest[key])


def microseconds(kernel: TriedKernel, x: Tensor, weight: PackedWeight) -> float:
    """Returns what a product takes on a GPU when Python calls it; the first calls, which prepare it, do not count."""
    for _ in range(3):
        kernel.linear(x, weight, None)
    measured = []
    for _ in range(MEASUREMENTS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            kernel.linear(x, weight, None)
        end.record()
        end.synchronize()
        measured.append(1000 * start.elapsed_time(end) / CALLS)
    return median(measured)

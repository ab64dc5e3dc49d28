"""The kernels of llmqat in order of preference, and the choice among them by shape, dtype and device.

On a CPU the first kernel that accepts a product is used. On a GPU all that accept it are timed, once for each shape and
class of rows, and the fastest is used (trial.py). Where gradients of the activations are wanted, only kernels whose
product torch can differentiate are asked.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.config import Registry
from llmqat.kernels.brgemm import CpuBrgemmKernel
from llmqat.kernels.cpu import CpuDequantizeKernel, CpuInt4Kernel, CpuInt8Kernel
from llmqat.kernels.cuda import CudaInt4Kernel
from llmqat.kernels.gemlite import GemliteKernel
from llmqat.kernels.humming import HummingKernel
from llmqat.kernels.integer import IntegerKernel
from llmqat.kernels.marlin import MarlinKernel
from llmqat.kernels.reference import MAX_DECODE_ROWS, PackedWeight, QuantizedInput, ReferenceKernel
from llmqat.kernels.trial import fastest, may_time, rows_class
from llmqat.kernels.triton import TritonKernel
from llmqat.kernels.zentorch import ZentorchKernel

logger = logging.getLogger(__name__)


class Kernel(Protocol):
    """A way of computing x @ ŵ.T for a packed weight.

    Attributes:
        name: what a user passes as `kernel=`.
        differentiable: whether autograd gives gradients of the activations.
        exact: whether it multiplies the activations that it is given; another one has to be asked for by name.
        floats: whether it takes weights whose codes are floats; False where a kernel does not say it.
    """

    name: str
    differentiable: bool
    exact: bool

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why this kernel cannot run here, or None when it can."""

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x [*, I] times the dequantized weight [O, I] transposed, plus bias [O]: [*, O] in x's dtype."""


_IN_ORDER: tuple[Kernel, ...] = (
    CpuBrgemmKernel(),
    CpuInt4Kernel(),
    CpuInt8Kernel(),
    CpuDequantizeKernel(),
    HummingKernel(),
    MarlinKernel(),
    GemliteKernel(),
    CudaInt4Kernel(),
    TritonKernel(),
    ReferenceKernel(),
    ZentorchKernel(),
)


def _check_kernel(name: str, kernel: Kernel) -> None:
    lacks = [one for one in ("name", "exact", "differentiable", "declines", "linear") if not hasattr(kernel, one)]
    if lacks:
        raise ValueError(f"kernel {name!r} has no {', '.join(lacks)}; llmqat.kernels.Kernel says what one has")
    if kernel.name != name:
        raise ValueError(f"kernel {name!r} calls itself {kernel.name!r}; register it under that name")


KERNELS: Registry[Kernel] = Registry("kernel", _check_kernel)
"""Kernels by the name that `llmqat.load(kernel=)` takes, in the order in which "auto" asks them."""
for _kernel in _IN_ORDER:
    KERNELS.register(_kernel.name, _kernel)
INTEGERS = IntegerKernel()
"""Takes quantized inputs as they are; not in `KERNELS`, since it is not asked for by name: the inputs decide."""
_logged: set[str] = set()


def packed_linear(
    x: Tensor | QuantizedInput, weight: PackedWeight, bias: Tensor | None = None, kernel: str = "auto"
) -> Tensor:
    """Returns x [*, I] times the packed weight transposed, plus bias: [*, O] in x's dtype.

    Args:
        x: activations; quantized ones are multiplied as integers where "auto" is asked for and the weight has 8 bits.
        weight: the packed weight and its scales.
        bias: [O] in x's dtype, or None.
        kernel: "auto" for the first that accepts (on a GPU the fastest), or a name in `KERNELS`.

    Raises:
        ValueError: for an unknown kernel name, or a named kernel that cannot run here.
    """
    if isinstance(x, QuantizedInput):
        if kernel == "auto" and INTEGERS.declines(x, weight) is None:
            return INTEGERS.linear(x, weight, bias)
        x = x.values()
    if not x.numel():  # of no rows, which not every kernel takes; nothing of the weight is read
        return F.linear(x, x.new_empty(weight.out_features, weight.in_features), bias)
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    key = kernel, rows_class(x.numel() // weight.in_features), x.dtype, x.device.type, wants_gradient
    if key not in weight.chosen:
        named = kernel != "auto"
        weight.chosen[key] = _named(kernel, x, weight, wants_gradient) if named else _choice(x, weight, wants_gradient)
    chosen: Kernel = weight.chosen[key]
    return chosen.linear(x, weight, bias)


def _choice(x: Tensor, weight: PackedWeight, wants_gradient: bool) -> Kernel:
    """Returns the kernel for products like that of `x`: the fastest on a GPU, else the first to accept."""
    timed = may_time(x.device)
    accepted: list[Kernel] = []
    for candidate in (kernel for kernel in KERNELS.values() if kernel.exact):
        reason = _refusal(candidate, x, weight, wants_gradient)
        if reason is None:
            accepted.append(candidate)
            if not timed:
                break
        elif x.numel() <= MAX_DECODE_ROWS * weight.in_features:  # with more rows no decode kernel is wanted anyway
            _log_once(f"kernel {candidate.name} is not used: {reason}")
    others = [kernel for kernel in accepted if kernel.name != ReferenceKernel.name]
    if len(others) < 2:
        return (others or accepted)[0]
    name = fastest(others, rows_class(x.numel() // weight.in_features), x.dtype, weight).name
    return KERNELS[name]


def _refusal(kernel: Kernel, x: Tensor, weight: PackedWeight, wants_gradient: bool) -> str | None:
    if weight.grid.levels == "float" and not getattr(kernel, "floats", False):
        return "it takes codes that are integers, not floats"
    reason = kernel.declines(x, weight)
    if reason is None and wants_gradient and not kernel.differentiable:
        return "torch has no gradient of its product"
    return reason


def _named(kernel: str, x: Tensor, weight: PackedWeight, wants_gradient: bool) -> Kernel:
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is unknown; choose auto, {', '.join(KERNELS)}")
    reason = _refusal(KERNELS[kernel], x, weight, wants_gradient)
    if reason is not None:
        raise ValueError(f"kernel={kernel!r} cannot run here: {reason}; choose 'auto' or 'reference'")
    return KERNELS[kernel]


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)

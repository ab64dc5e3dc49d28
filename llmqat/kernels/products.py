"""Products of bfloat16 matrices on CPUs that do not multiply them, with AVX2 alone for one.

What emulates them there takes several times as long as a product in float32 (576 x 1536, 512 rows, AMD EPYC: 76 ms
against 7). A processor that has such products adds in float32 and rounds the sums once. So do these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

EMULATED_ROWS = 7
"""Products of so few rows, or fewer, are faster emulated: their cast would read and write more than they do."""
_SLICE_ELEMENTS = 2_097_152
"""Elements of a weight that are cast at once: for a large one, memory that is asked for anew costs more than all."""
_MATRIX_PRODUCTS = frozenset(
    {torch.mm, torch.bmm, torch.matmul, Tensor.mm, Tensor.bmm, Tensor.matmul, Tensor.__matmul__, torch.addmm}
    | {torch.baddbmm}
)
_ATEN = torch.ops.aten
_LEFT = {_ATEN.mm.default: 0, _ATEN.bmm.default: 0, _ATEN.addmm.default: 1, _ATEN.baddbmm.default: 1}
"""What torch computes products by -> which argument is the left matrix; the next is the right one."""


def cpu_has_bf16() -> bool:
    """Returns whether torch multiplies bfloat16 matrices on this processor without emulation; not with AVX2 alone."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_HAS_BF16 = cpu_has_bf16()


@contextmanager
def float_products() -> Iterator[None]:
    """Inside, products of bfloat16 matrices on the CPU are computed in float32 and rounded to bfloat16.

    Those of `F.linear` and `_MATRIX_PRODUCTS`; others, such as einsum's and attention's, stay as they are. Nothing
    changes on processors that multiply bfloat16 themselves, on GPUs, in other dtypes, for tensors that others have
    subclassed, and for products of at most `EMULATED_ROWS` rows. Tensors keep their dtypes, so that a model gives what
    it gives where it is deployed.
    """
    if _HAS_BF16:
        yield
        return
    with _FloatProducts():
        yield


@contextmanager
def float_training(device: torch.device) -> Iterator[None]:
    """Inside, forward and backward passes compute products as in `float_products`, on the same processors.

    That includes gradients, layers that are computed again under gradient checkpointing, and what einsum consists of.
    What is kept for the backward pass stays bfloat16. All operations of torch go through Python, which is too slow for
    generation: a token took 1.4 times as long. `float_products` costs less, and does not reach the backward pass.

    Args:
        device: where the model lies; nothing changes on GPUs.
    """
    if _HAS_BF16 or device.type != "cpu":
        yield
        return
    with _FloatTraining():  # type: ignore[no-untyped-call]
        yield


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns F.linear(x [*, I], weight [O, I], bias [O]), as inside `float_products`."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    if _HAS_BF16 or not _are_emulated(operands) or weight.dim() != 2 or not weight.numel():
        return F.linear(x, weight, bias)
    x, rows = x.float(), max(1, _SLICE_ELEMENTS // weight.shape[1])
    weights = weight.split(rows)
    biases = [None] * len(weights) if bias is None else bias.float().expand(len(weight)).split(rows)
    with torch.autocast("cpu", enabled=False):  # which would cast them back
        parts = [F.linear(x, part.float(), one).to(torch.bfloat16) for part, one in zip(weights, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _FloatProducts(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if (kwargs and func is not torch.baddbmm) or not (func is F.linear or func in _MATRIX_PRODUCTS):
            return func(*args, **kwargs)
        if func is F.linear:
            return linear(*args)
        if _are_emulated(args, left=len(args) - 2):
            with torch.autocast("cpu", enabled=False):
                return func(*(arg.float() for arg in args), **kwargs).to(torch.bfloat16)
        return func(*args, **kwargs)


class _FloatTraining(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        left = _LEFT.get(func)
        if left is None or not _are_emulated(args[: left + 2], left):
            return func(*args, **(kwargs or {}))
        return _in_slices(func, args[:left], args[left], args[left + 1], kwargs or {})


def _in_slices(
    func: Callable[..., Tensor], added: tuple[Tensor, ...], x: Tensor, right: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """Returns func(*added, x [*, M, K], right [*, K, N], **options) of bfloat16 tensors, added up in float32."""
    x, columns = x.float(), max(1, _SLICE_ELEMENTS * right.shape[-1] // max(1, right.numel()))
    if columns >= right.shape[-1]:
        return func(*(one.float() for one in added), x, right.float(), **options).to(torch.bfloat16)
    out = torch.empty(*x.shape[:-1], right.shape[-1], dtype=torch.bfloat16)
    parts = (one.expand(out.shape).split(columns, -1) for one in (*added, out))
    for part, *found in zip(right.split(columns, -1), *parts, strict=True):
        found[-1].copy_(func(*(one.float() for one in found[:-1]), x, part.float(), **options))
    return out


def _are_emulated(operands: Sequence[Any], left: int = 0) -> bool:
    """Returns whether all operands are plain bfloat16 tensors on the CPU, and the `left` one [*, M, I] has many rows.

    In each matrix, where the right one is many as well, or in all of them. None is a bias that is not there.
    """
    given = [operand for operand in operands if operand is not None]
    if not all(type(one) in (Tensor, nn.Parameter) and one.dtype == torch.bfloat16 and one.is_cpu for one in given):
        return False
    x, right = operands[left], operands[left + 1]
    if x.dim() < 2:
        return False
    rows = x.shape[-2] if right.dim() > 2 else x.shape[:-1].numel()
    return rows > EMULATED_ROWS

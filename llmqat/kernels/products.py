"""Products of bfloat16 matrices on CPUs that do not multiply them, with AVX2 alone for one.

What emulates them there takes eight times as long as a product in float32 (576 x 1536, 512 rows, AMD EPYC: 76 ms
against 7). A processor that has such products adds in float32 and rounds the sums once. So do these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FEW_ROWS = 8
"""Products of fewer rows are faster emulated: they read a weight once, and its cast would read and write more."""
_SLICE_ELEMENTS = 2_097_152
"""Elements of a weight that are cast at once: for a large one, memory that is asked for anew costs more than all."""
_MATRIX_PRODUCTS = frozenset(
    {torch.mm, torch.bmm, torch.matmul, Tensor.mm, Tensor.bmm, Tensor.matmul, Tensor.__matmul__, torch.addmm}
)


def cpu_has_bf16() -> bool:
    """Returns whether torch multiplies bfloat16 matrices on this processor without emulation; not with AVX2 alone."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_HAS_BF16 = cpu_has_bf16()


@contextmanager
def float_products() -> Iterator[None]:
    """Inside, matrix products of bfloat16 tensors on the CPU are computed in float32 and rounded to bfloat16.

    Nothing changes on processors that multiply bfloat16 themselves, on GPUs, in other dtypes, and for products of less
    than `FEW_ROWS` rows. Tensors keep their dtypes, so that a model gives what it gives where it is deployed.
    """
    if _HAS_BF16:
        yield
        return
    with _FloatProducts():
        yield


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns F.linear(x [*, I], weight [O, I], bias [O]), as inside `float_products`."""
    if _HAS_BF16 or not _is_emulated(x):
        return F.linear(x, weight, bias)
    x, bias = x.float(), None if bias is None else bias.float()
    rows = max(1, _SLICE_ELEMENTS // weight.shape[1])
    biases = [None] * len(weight) if bias is None else bias.split(rows)
    parts = [
        F.linear(x, part.float(), its_bias).to(torch.bfloat16)
        for part, its_bias in zip(weight.split(rows), biases, strict=False)
    ]
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
        if func is F.linear and args and _is_emulated(args[0]):
            return linear(*args, **kwargs)
        if func in _MATRIX_PRODUCTS and not kwargs and _is_emulated(args[-2], by_matrix=args[-1].dim() > 2):
            return func(*(arg.float() for arg in args)).to(torch.bfloat16)
        return func(*args, **kwargs)


def _is_emulated(left: Any, by_matrix: bool = False) -> bool:
    """Returns whether `left` [*, M, I] is a bfloat16 tensor on the CPU of many rows, in each matrix or in all."""
    if not isinstance(left, Tensor) or left.dtype != torch.bfloat16 or left.device.type != "cpu" or left.dim() < 2:
        return False
    rows = left.shape[-2] if by_matrix else left.shape[:-1].numel()
    return rows >= FEW_ROWS

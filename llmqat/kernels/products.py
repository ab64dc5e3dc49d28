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

EMULATED_ROWS = 7
"""Products of so few rows, or fewer, are faster emulated: their cast would read and write more than they do."""
_SLICE_ELEMENTS = 2_097_152
"""Elements of a weight that are cast at once: for a large one, memory that is asked for anew costs more than all."""
_MATRIX_PRODUCTS = frozenset(
    {torch.mm, torch.bmm, torch.matmul, Tensor.mm, Tensor.bmm, Tensor.matmul, Tensor.__matmul__, torch.addmm}
)


def cpu_has_bf16() -> bool:
    """Returns whether torch multiplies bfloat16 matrices on this processor without emulation; not with AVX2 alone."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_HAS_BF16 = cpu_has_bf16()


def is_emulated(x: Any) -> bool:
    """Returns whether `x` is a plain bfloat16 tensor on a processor that only emulates products of such."""
    return not _HAS_BF16 and type(x) in (Tensor, nn.Parameter) and x.dtype == torch.bfloat16 and x.is_cpu


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
        if kwargs or not (func is F.linear or func in _MATRIX_PRODUCTS):
            return func(*args, **kwargs)
        if func is F.linear:
            return linear(*args)
        if _are_emulated(args, left=len(args) - 2):
            with torch.autocast("cpu", enabled=False):
                return func(*(arg.float() for arg in args)).to(torch.bfloat16)
        return func(*args, **kwargs)


def _are_emulated(operands: Sequence[Any], left: int = 0) -> bool:
    """Returns whether all operands are plain bfloat16 tensors on the CPU, and the `left` one [*, M, I] has many rows.

    In each matrix, where the right one is many as well, or in all of them. None is a bias that is not there.
    """
    given = [operand for operand in operands if operand is not None]
    if not all(map(is_emulated, given)):
        return False
    x, right = operands[left], operands[left + 1]
    if x.dim() < 2:
        return False
    rows = x.shape[-2] if right.dim() > 2 else x.shape[:-1].numel()
    return rows > EMULATED_ROWS

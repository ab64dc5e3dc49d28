"""Refuses what no checkpoint can hold: NaN, infinity, and scales that the checkpoint's dtype would round.

Codes are integers, so an infinite weight would be packed as the outermost code, and NaN as any: wrong in silence. The
check is one pass over the extremes of each tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llmqat.grid import stored_codes
from llmqat.kernels import WeightPages
from llmqat.layers.packed import PackedModule
from llmqat.layers.quantized import QuantModule


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises for the first of `tensors`, given with their names, that holds NaN or infinity; skips integers and meta.

    Raises:
        ValueError: names the tensor, and how many of its entries are not finite.
    """
    for name, tensor in tensors:
        if is_finite(tensor):
            continue
        count = int((~torch.isfinite(tensor.detach())).sum())
        raise ValueError(
            f"{name} holds NaN or infinity in {count} of {tensor.numel()} entries, which no code stands for; check the "
            f"model where it comes from: the checkpoint, or the training that led here"
        )


def is_finite(tensor: Tensor) -> bool:
    """Returns whether no entry of `tensor` is NaN or infinite; True on the meta device."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # of eight bits, which torch has no minimum of
        tensor = tensor.to(torch.bfloat16)
    low, high = torch.aminmax(tensor.detach())  # forty times faster than torch.isfinite on a CPU
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_packable(name: str, layer: QuantModule | PackedModule, dtype: torch.dtype) -> None:
    """Raises where `layer` cannot be stored as it computes, its scales in `dtype`.

    Raises:
        ValueError: its weight, bias, scale or zero point is not finite, or `dtype` would round a scale; names it.
    """
    own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    check_finite((f"{name}.{leaf}", tensor) for leaf, tensor in own)
    scale = layer.scale().detach()
    check_finite([(f"the scale of {name}", scale)])
    if isinstance(layer, QuantModule):
        scale = scale * stored_codes(torch.zeros(0, dtype=torch.int8), layer.grid)[2]
    if scale.is_meta or (isinstance(layer, PackedModule) and layer.has_float32_scales):
        return
    rounded = scale != scale.to(dtype).float()
    if bool(rounded.any()):
        held_by = next(
            kind
            for kind in (torch.bfloat16, torch.float16, torch.float32)
            if torch.equal(scale.to(kind).float(), scale.float())
        )
        raise ValueError(
            f"{name} has the scale {float(scale[rounded][0]):.3g}, which {dtype} would round ({int(rounded.sum())} of "
            f"{scale.numel()} scales); save the model with dtype={held_by}, or leave the layer out with quant.ignore"
        )


def check_held(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises where a tensor left in high precision is not finite, or is not any more in `dtype`.

    Raises:
        ValueError: names the tensor.
    """
    check_finite([(name, tensor)])
    if dtype != tensor.dtype and not is_finite(tensor.to(dtype)):
        largest = float(tensor.detach().abs().max())
        raise ValueError(
            f"{name} has an entry of magnitude {largest:.3g}, beyond the largest number of {dtype}; save the model "
            f"with dtype=torch.bfloat16"
        )


def check_parameters(model: nn.Module) -> None:
    """Raises ValueError for the first parameter of `model` that holds NaN or infinity."""
    check_finite(WeightPages(model).one_by_one(model.named_parameters()))

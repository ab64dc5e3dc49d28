"""Whether a prepared model still holds the weights of the model it was made from: checksums taken by `prepare`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmqat.kernels import WeightPages

SOURCE = "llmqat_source"
"""Attribute of a prepared model: name of a parameter -> its `Checksum` before `prepare`; None when not known."""
MOVED = "llmqat_moved"
"""Attribute of a model whose weights were changed before it was prepared (rotated, smoothed)."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 1 << 20
"""Numbers that are summed at once: torch widens all of them to 8 bytes first."""

ADAPTER = ".lora_"
"""Part of the name of a parameter of peft's LoRA, which is not the original model's."""


class Checksum(NamedTuple):
    """What a parameter was."""

    dtype: torch.dtype
    value: int


def note_source(model: nn.Module) -> None:
    """Notes the parameters of `model` as they are, in it; nothing on the meta device, or after `note_moved`."""
    parameters = {name: p for name, p in model.named_parameters() if ADAPTER not in name}
    known = not getattr(model, MOVED, False) and not any(p.is_meta for p in parameters.values())
    named = WeightPages(model).one_by_one(parameters.items())
    noted = {name: Checksum(p.dtype, checksum(p)) for name, p in named} if known else None
    model.__dict__[SOURCE] = noted


def note_moved(model: nn.Module) -> None:
    """Notes in `model` that its weights are not those of the original model any more."""
    model.__dict__[MOVED] = True


def forget_source(model: nn.Module) -> None:
    """Notes in a prepared `model` that it is not known any more what it was made from."""
    note_moved(model)
    model.__dict__[SOURCE] = None


def changed_since(noted: Mapping[str, Checksum], parameters: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of noted parameters that are gone, or whose bits are others; another dtype alone is no change.

    Args:
        noted: from `note_source`.
        parameters: what there is now, by the same names.
    """
    there = WeightPages().one_by_one((name, parameters[name].detach()) for name in noted if name in parameters)
    same = {name for name, tensor in there if checksum(tensor.to(noted[name].dtype)) == noted[name].value}
    return [name for name in noted if name not in same]


def checksums_to_json(noted: Mapping[str, Checksum]) -> str:
    """Returns what `note_source` found, as text that a file keeps."""
    return json.dumps({name: [str(entry.dtype).removeprefix("torch."), entry.value] for name, entry in noted.items()})


def checksums_from_json(text: str) -> dict[str, Checksum]:
    """Returns what `checksums_to_json` wrote."""
    return {name: Checksum(getattr(torch, dtype), value) for name, (dtype, value) in json.loads(text).items()}


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """Returns a sum over the bits of `tensor`, each row counted by its place."""
    rows = tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1).contiguous()
    parts = rows.view(_INTEGERS[tensor.element_size()]).split(max(_AT_ONCE // max(rows.shape[1], 1), 1))
    sums = torch.cat([part.sum(-1, dtype=torch.int64) for part in parts])
    return int((sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum())

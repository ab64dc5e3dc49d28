"""Gives non-persistent buffers the values and dtypes that they have in a model loaded from the checkpoint.

Position tables, rotary frequencies and embedding scales are in no checkpoint: they are made when a model is built, and
depend on how it was built. `model.to(bfloat16)` rounds frequencies that a loaded model has in float32. A scale that is
bfloat16 in a model loaded from a bfloat16 checkpoint is float32 in a float32 model. Training has to compute with the
buffers of the loaded checkpoint. So `prepare` builds the model's class once more, without weights, and compares. While
a model computes in the checkpoint's dtype (`models.cast_parameters`), it has the checkpoint's buffers.

The numbers are those of a model built in float32, cast to the dtype that a model built in the checkpoint's dtype has
there. This is what transformers' `from_pretrained` gives; a model built in bfloat16 computes some tables in bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

NOTED = "llmqat_buffers"
"""Attribute of a prepared model: a `Buffers`."""
MADE_IN_FLOAT32 = "inv_freq"
"""End of the names of rotary frequencies, which transformers computes in float32 whatever the dtype of the model."""
ROUNDING = 1e-5
"""Relative difference of float32 numbers that were computed on different devices."""


@dataclass
class Buffers:
    """The float buffers of a model's class.

    Attributes:
        values: non-persistent buffers by name, built in float32, on the CPU.
        dtypes: dtype of a checkpoint -> name of a buffer -> its dtype in a model loaded from that checkpoint.
        ready: (name, dtype, device) -> that buffer of `values` in this dtype on this device; a cache.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[torch.dtype, dict[str, torch.dtype]] = field(default_factory=dict)
    ready: dict[tuple[str, torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def right(self, name: str, found: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns what the buffer `name`, now `found`, is in a checkpoint that has it in `dtype`."""
        if name not in self.values:
            return found if found.dtype == dtype else found.to(dtype)
        key = name, dtype, found.device
        if key not in self.ready:
            self.ready[key] = self.values[name].to(found.device, dtype)
        return self.ready[key]


def note_buffers(model: nn.Module) -> None:
    """Notes in `model` what its buffers are in a checkpoint, and gives those that were rounded their numbers back.

    Nothing is done on the meta device, or where the class cannot be built once more.

    Raises:
        ValueError: a buffer that no checkpoint holds was changed; names it.
    """
    own = dict(float_buffers(model))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if not isinstance(model, PreTrainedModel) or not own or any(buffer.is_meta for buffer, _ in own.values()):
        return
    built = _built(model, torch.float32)
    here = built if dtype == torch.float32 else _built(model, dtype)
    if built is None or here is None:
        return
    values = {name: buffer for name, (buffer, persistent) in built.items() if not persistent}
    right = {name: _right(model, name, own[name][0], values[name], here[name][0]) for name in values if name in own}
    for name, buffer in right.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer
    model.__dict__[NOTED] = Buffers(values, {torch.float32: _dtypes(built), dtype: _dtypes(here)})


def _right(model: nn.Module, name: str, found: Tensor, wanted: Tensor, here: Tensor) -> Tensor:
    """Returns the buffer `name` as it should be: `found`, or `wanted` in the dtype of `here` where `found` is rounded.

    Raises:
        ValueError: it is something else.
    """
    right = wanted.to(here.dtype)
    kept = found.detach().cpu()
    if kept.dtype == right.dtype and torch.equal(kept, right):
        return found
    owner = name.rpartition(".")[0]
    if not _is_derived(model.get_submodule(owner)) and not _same(kept, wanted) and not _same_table(kept, here):
        raise ValueError(
            f"the buffer {name} of {type(model).__name__} is not what its configuration makes of it, and no checkpoint "
            "holds it, so that what is trained would not be what is loaded; set it back, or register it as persistent"
        )
    return right.to(found.device)


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Returns whether `found` is `wanted`, perhaps rounded to a dtype on the way, or one row of it and more."""
    if found.dim() and wanted.dim() and found.shape[1:] == wanted.shape[1:] and len(found) > len(wanted):
        found = found[: len(wanted)]  # a table that grew with a long text
    if found.shape != wanted.shape:
        return False
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if torch.allclose(found.float(), wanted.to(dtype).float(), rtol=ROUNDING, atol=0, equal_nan=True):
            return True
    return False


def _same_table(found: Tensor, here: Tensor) -> bool:
    return found.shape == here.shape and torch.equal(found.float(), here.float())


def _is_derived(module: nn.Module) -> bool:
    """Returns whether a module makes its buffers anew from the length of the text."""
    kinds = getattr(module, "rope_type", "default")
    named = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any(kind in ("dynamic", "longrope") for kind in named)


def _built(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, tuple[Tensor, bool]] | None:
    """Returns the float buffers of a new model of the same class and configuration; None where there can be none."""
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False), torch.device("cpu"):
            made = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    except Exception:  # a class of its own may want anything
        return None
    return dict(float_buffers(made))


def float_buffers(model: nn.Module) -> Iterator[tuple[str, tuple[Tensor, bool]]]:
    """Yields name, tensor and whether a checkpoint holds it of every buffer of floating-point numbers."""
    for name, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                path = f"{name}.{leaf}" if name else leaf
                yield path, (buffer, leaf not in module._non_persistent_buffers_set)


def _dtypes(built: Mapping[str, tuple[Tensor, bool]]) -> dict[str, torch.dtype]:
    return {name: buffer.dtype for name, (buffer, _) in built.items()}


@contextmanager
def buffers_of_checkpoint(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the buffers of a prepared model are those of its checkpoint in `dtype`; of others, what they are."""
    noted: Buffers | None = getattr(model, NOTED, None)
    replaced: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    if noted is not None:
        if dtype not in noted.dtypes:
            assert isinstance(model, PreTrainedModel)
            noted.dtypes[dtype] = _dtypes(_built(model, dtype) or {})
        modules = dict(model.named_modules())
        for name, wanted in noted.dtypes[dtype].items():
            owner, _, leaf = name.rpartition(".")
            table: dict[str, Any] = modules[owner]._buffers if owner in modules else {}
            found = table.get(leaf)
            if found is None or (found.dtype == wanted and _is_derived(modules[owner])):
                continue
            right = noted.right(name, found, wanted)
            if right is not found:
                replaced.append((table, leaf, found, right))
    try:
        for table, leaf, _, right in replaced:
            table[leaf] = right
        yield
    finally:
        for table, leaf, before, right in replaced:
            if table.get(leaf) is right:  # unless the forward itself has put another there
                table[leaf] = before


def make_buffers(model: PreTrainedModel) -> None:
    """Gives a new model, built in a dtype that is not float32, the buffers that transformers gives a loaded one."""
    suspect = [
        name
        for name, (buffer, persistent) in float_buffers(model)
        if not persistent and buffer.dtype == torch.float32 and not name.endswith(MADE_IN_FLOAT32)
    ]
    built = _built(model, torch.float32) if suspect else None
    for name in suspect if built is not None else ():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = built[name][0]  # type: ignore[index]

"""The weights of a block while stages work on it: the original ones set aside, its own raised to float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.calibrate.blocks import Block, find_blocks
from llmqat.grid import quantize
from llmqat.kernels import WeightPages
from llmqat.layers import QuantModule, kept_in_float32
from llmqat.models import read_checked, save_checked, uploaded

_HELD = "_llmqat_originals"
"""Attribute of a model: its `Originals`, where no file holds them."""


class Originals:
    """The parameters of a model's blocks before any stage changed them, in the dtype of the forward pass or a narrower.

    They are in a file of their own, or mapped from the checkpoint files of the model, which no stage writes to.
    Non-float parameters, and those that transformers keeps in float32, keep their dtype. Learned scales and zero points
    are not included.
    """

    def __init__(self, source: Path | Mapping[str, Tensor]) -> None:
        """Reads what `set_aside` has left in a file, or holds tensors by their names."""
        self.source = source
        self._checked: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Originals:
        """Returns itself: nothing is written to what it holds."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes a pickled one None: it would hold the weights a second time."""
        return type(None), ()

    @classmethod
    def set_aside(cls, model: nn.Module, path: Path, dtype: torch.dtype, *, hold: bool = True) -> Originals:
        """Returns the original parameters of the blocks of `model`; saves them to `path`, unless that file exists.

        Nothing is saved where all of them are mapped from checkpoint files and none is float32. Stages work on a
        float32 copy of other weights, but change float32 weights in place.

        Args:
            model: a prepared model.
            path: the file.
            dtype: dtype of the forward pass, which saved floats of more bits are cast to.
            hold: whether mapped weights may stay where they are; False where a custom stage may write to weights.
        """
        if path.is_file():
            return cls(path)
        is_wide = kept_in_float32(model)
        tensors = {
            f"{prefix}.{name}": parameter.detach()
            if is_wide(f"{prefix}.{name}")
            or not parameter.is_floating_point()
            or parameter.dtype.itemsize <= dtype.itemsize
            else parameter.detach().to(dtype)
            for prefix, module in find_blocks(model).items()
            for name, parameter in module.named_parameters()
            if name.rpartition(".")[2] not in ("log_scale", "zero_point")
        }
        is_safe = hold and all(tensor.dtype != torch.float32 for tensor in tensors.values())
        if is_safe and all(map(WeightPages(model).hold, tensors.values())):
            held = model.__dict__[_HELD] = cls(tensors)
            return held
        places: set[int] = set()
        for name, tensor in tensors.items():  # blocks that share weights are in a file once each
            tensors[name] = tensor.clone() if tensor.data_ptr() in places else tensor
            places.add(tensor.data_ptr())
        save_checked(path, tensors)
        return cls(path)

    @classmethod
    def found(cls, model: nn.Module, path: Path) -> Originals | None:
        """Returns what `set_aside` has left in the file `path`, or with `model`; None where that is nothing."""
        return cls(path) if path.is_file() else model.__dict__.get(_HELD)

    def of(self, block: Block) -> dict[str, Tensor]:
        """Returns the original parameters of `block`, by name inside it."""
        prefix = f"{block.name}."
        if not isinstance(self.source, Path):
            return {n.removeprefix(prefix): tensor for n, tensor in self.source.items() if n.startswith(prefix)}
        again = block.name in self._checked
        tensors, _ = read_checked(self.source, lambda name: name.startswith(prefix), again=again)
        self._checked.add(block.name)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    @contextmanager
    def in_place(self, block: Block) -> Iterator[None]:
        """Inside, the parameters of `block` are the original ones."""
        with holding(block, self.of(block)):
            yield


@contextmanager
def holding(block: Block, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters of `block` have the values of `tensors`, by name inside it."""
    moved: dict[str, Tensor] = {}
    try:
        for name, value in tensors.items():
            parameter = block.module.get_parameter(name)
            moved[name] = parameter.data
            parameter.data = uploaded(value, parameter.device)
        yield
    finally:
        for name, own in moved.items():
            block.module.get_parameter(name).data = own


@contextmanager
def in_float32(block: Block) -> Iterator[None]:
    """Inside, the parameters of `block` are float32; afterwards they are in their own dtype again, codes unchanged.

    Each parameter returns to its old memory. One that is mapped from a file gets new memory instead, because pages that
    were written to would stay in memory next to the file's.
    """
    pages = WeightPages()
    parameters = [p for p in block.module.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    narrow: dict[Tensor, Tensor] = {parameter: parameter.data for parameter in parameters}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for layer in block.quantized().values():
            if (own := narrow.get(layer.weight)) is not None:
                layer.weight.data = layer.restored(_narrowed(layer, own.dtype))
        for parameter, own in narrow.items():
            parameter.data = parameter.data.to(own.dtype) if pages.hold(own) else own.copy_(parameter.data)
        pages.let_go(narrow.values())


def take_tensors(module: nn.Module, path: Path) -> dict[str, str]:
    """Puts the tensors of a file in the place of those of `module`; returns the file's metadata.

    Where a parameter of the module is mapped from a file, so are all of them then, and nothing is copied.

    Raises:
        ValueError: the file is damaged.
        RuntimeError: it has not the tensors of the module.
    """
    tensors, metadata = read_checked(path)
    pages = WeightPages()
    if not any(pages.hold(parameter) for parameter in module.parameters()):
        module.load_state_dict(tensors)
        return metadata
    map_tensors(module, tensors)
    return metadata


def map_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Makes the parameters and buffers of `module` the very `tensors`, by name in its state dict.

    Raises:
        RuntimeError: others are needed, or of another shape or dtype.
    """
    own = module.state_dict(keep_vars=True)
    if own.keys() != tensors.keys() or any(
        (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype) for name, tensor in tensors.items()
    ):
        raise RuntimeError(f"the file has not the tensors of {type(module).__name__}")
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        if isinstance(own[name], nn.Parameter):
            holder.get_parameter(leaf).data = tensor
        else:
            holder._buffers[leaf] = tensor


@torch.no_grad()
def _narrowed(layer: QuantModule, dtype: torch.dtype) -> Tensor:
    """Returns the float32 weight of `layer` as [O, I] in `dtype`, with its codes unchanged.

    Where rounding to `dtype` would change a code, the weight is set to the level of its own code. With dynamic scales,
    which depend on all weights, every weight is set so. Other weights keep their values, often near the edge of their
    code. On their levels they would be half a step from any other code, further than adapters move them.
    """
    levels = layer.quantized_matrix(dtype)
    if layer.weights.scales == "dynamic":
        return levels
    near = layer.matrix().to(dtype)
    kept = quantize(near, *layer.scale_and_zero_point(), layer.grid) == layer.codes()
    return torch.where(kept, near, levels)

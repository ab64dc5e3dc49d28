"""The weights of a block while stages work on it: the original ones set aside, its own raised to float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmqat.calibrate.blocks import Block, find_blocks
from llmqat.models import save_whole


class Originals:
    """The weights of a model's blocks before any stage moved them, in a file, in the dtype that is computed in."""

    def __init__(self, path: Path) -> None:
        """Reads what `set_aside` has left in `path`."""
        self.path = path

    @classmethod
    def set_aside(cls, model: nn.Module, path: Path, dtype: torch.dtype) -> Originals:
        """Returns the originals in the file `path`; writes the parameters of the blocks of `model` where it is not."""
        if not path.is_file():
            tensors = {
                f"{prefix}.{name}": parameter.detach().to(dtype)
                for prefix, module in find_blocks(model).items()
                for name, parameter in module.named_parameters()
                if name.rpartition(".")[2] not in ("log_scale", "zero_point")
            }
            save_whole(path, tensors)
        return cls(path)

    def of(self, block: Block) -> dict[str, Tensor]:
        """Returns the original parameters of `block`, by name inside it."""
        prefix = f"{block.name}."
        with safe_open(self.path, framework="pt") as file:
            names = [name for name in list(file.keys()) if name.startswith(prefix)]
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}

    @contextmanager
    def in_place(self, block: Block) -> Iterator[None]:
        """Inside, the parameters of `block` are the original ones."""
        moved: dict[str, Tensor] = {}
        try:
            for name, original in self.of(block).items():
                parameter = block.module.get_parameter(name)
                moved[name] = parameter.data
                parameter.data = original.to(parameter.device)
            yield
        finally:
            for name, own in moved.items():
                block.module.get_parameter(name).data = own


@contextmanager
def in_float32(block: Block) -> Iterator[None]:
    """Inside, the parameters of `block` are float32.

    Afterwards they are in their own dtype again; a quantized weight that is not float32 then lies on the very level of
    its code, so that it still rounds to it.
    """
    narrow = {p: p.dtype for p in block.module.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        if narrow:
            for layer in block.quantized().values():
                if layer.weight in narrow:
                    layer.weight.data = layer.restored(layer.quantized_matrix(torch.float32)).detach()
        for parameter, dtype in narrow.items():
            parameter.data = parameter.data.to(dtype)

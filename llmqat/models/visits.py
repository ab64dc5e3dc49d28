"""Transformer blocks that come to the GPU one after the other, for models that do not fit there as a whole.

Weights stay where they are in the memory of the host, mapped from their files if they were loaded so. A block is copied
to the GPU when its forward begins, and leaves when it ends. What is in no block (embeddings, last norm, output head)
stays on the GPU, and so do hidden states on their way. A pass over the whole model moves all its weights once, so it
pays for many tokens at once: calibration, and perplexity; not for writing text token by token.

Written without a GPU at hand: the tests put copies on the CPU in the place of those on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.kernels import WeightPages
from llmqat.models.forward import uploaded

_DEVICE = "_llmqat_visited_device"
"""Attribute of a model whose blocks visit: the device."""
_VISIT = "_llmqat_visit"
"""Attribute of a module: its `_Visit`, while it is there; of a block that comes for each forward, always."""


def named_blocks(model: nn.Module, counts: Callable[[nn.Module], bool] = lambda module: True) -> dict[str, nn.Module]:
    """Returns the transformer blocks of `model` for which `counts` holds, by name.

    They are the modules that transformers names for splitting a model over devices (`_no_split_modules`); where it
    names none, the entries of the model's outermost lists of modules.
    """
    kinds = getattr(model, "_no_split_modules", None) or ()
    named = {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
    entries = {
        f"{name}.{number}" if name else number: entry
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
        for number, entry in modules.named_children()
    }
    return _outermost(named, counts) or _outermost(entries, counts)


def _outermost(modules: dict[str, nn.Module], counts: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Returns those that count and do not lie in another one, each once."""
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        inside = any(name.startswith(f"{other}.") for other in found)
        if not inside and counts(module):
            found[name] = module
    return found


def visited_device(model: nn.Module) -> torch.device | None:
    """Returns the device to which the blocks of `model` come one by one; None where the model is whole in one place."""
    found: torch.device | None = model.__dict__.get(_DEVICE)
    return found


def let_blocks_visit(model: nn.Module, device: torch.device) -> bool:
    """Has the blocks of `model`, which is on the CPU, come to `device` for each forward; the rest moves there now.

    Returns:
        Whether that can be: a model without blocks stays where it is.
    """
    blocks = named_blocks(model)
    if not blocks:
        return False
    inside = {id(module) for block in blocks.values() for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module._apply(_to(device), recurse=False)
    for block in blocks.values():
        block.__dict__[_VISIT] = _Visit(device)
        block.register_forward_pre_hook(_arrive)
        block.register_forward_hook(_leave, always_call=True)
    model.__dict__[_DEVICE] = device
    return True


def _to(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device)


@contextmanager
def visiting(module: nn.Module, device: torch.device | None = None, *, keep: bool = False) -> Iterator[None]:
    """Inside, `module` is on the device where it visits; it stays where it is if it does not.

    Args:
        module: a block, or a part of one.
        device: to which the blocks of its model come (`visited_device`); a block knows that itself.
        keep: whether parameters may change inside. Where not, they are afterwards those of before.
    """
    visit: _Visit | None = module.__dict__.get(_VISIT) or (None if device is None else _Visit(device))
    if visit is None:
        yield
        return
    visit.keeps |= keep
    visit.arrive(module)
    try:
        yield
    finally:
        visit.leave(module)


def _arrive(module: nn.Module, inputs: Any) -> None:
    module.__dict__[_VISIT].arrive(module)


def _leave(module: nn.Module, inputs: Any, output: Any) -> None:
    module.__dict__[_VISIT].leave(module)


@dataclass
class _Visit:
    """Tensors of a module on their way.

    Attributes:
        device: where to.
        depth: visits within each other; all but the first find the module there.
        keeps: whether parameters come back as they are then.
        parameters: `id()` of each -> the parameter, and its data at home.
        buffers: (module, name, the buffer at home, the one there, and its version when it arrived).
    """

    device: torch.device
    depth: int = 0
    keeps: bool = False
    parameters: dict[int, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)
    buffers: list[tuple[nn.Module, str, Tensor, Tensor, int]] = field(default_factory=list)

    def arrive(self, module: nn.Module) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        for parameter in module.parameters():
            self.parameters[id(parameter)] = parameter, parameter.data
            parameter.data = uploaded(parameter.data, self.device)
        for holder in module.modules():
            for name, buffer in holder._buffers.items():
                if buffer is not None:
                    there = uploaded(buffer, self.device)
                    holder._buffers[name] = there
                    self.buffers.append((holder, name, buffer, there, _version(there)))

    def leave(self, module: nn.Module) -> None:
        self.depth -= 1
        if self.depth > 0:
            return
        pages = WeightPages() if self.keeps else None
        for parameter, home in self.parameters.values():
            parameter.data = home if pages is None else _home(parameter.data, home, pages)
        for holder, name, home, there, version in self.buffers:
            now = holder._buffers.get(name)
            if now is there and _version(there) == version:
                holder._buffers[name] = home
            elif now is not None:
                holder._buffers[name] = now.to(home.device)
        self.parameters.clear()
        self.buffers.clear()
        self.keeps = False


def _home(now: Tensor, home: Tensor, pages: WeightPages) -> Tensor:
    """Returns the values of `now` where `home` lies: in its memory, unless that is a file's or of another form."""
    if pages.hold(home) or now.shape != home.shape or now.dtype != home.dtype:
        return now.to(home.device)
    return home.copy_(now)


def _version(tensor: Tensor) -> int:
    """Returns what counts the changes of a tensor; inference tensors do not."""
    return 0 if tensor.is_inference() else tensor._version

"""Counts, without a GPU, how often a loop would wait for one, and says which lines do.

A program queues work for a GPU and runs ahead of it. It has to wait wherever it asks for a number: `.item()`, `if
tensor:`, `.cpu()`, `nonzero`, an index by a mask. It also waits where it hands over numbers from ordinary memory,
unless it says `non_blocking=True`. On a CPU nothing of that shows. So `Waits` takes some tensors for those of a GPU,
such as the parameters of a model, follows what is computed from them, by the memory that tensors lie in, and records
what would wait:

    with Waits(model) as waits:
        loop()
    print(waits)

What it takes for a tensor of the GPU: what an operation makes of one; what is made with `device=` or moved by `.to()`
to a device that is not spelled "cpu". What it cannot see: the waits inside kernels of torch or other libraries.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent
ASKING = (
    "aten::_local_scalar_dense",  # item, float, int, bool, comparisons in conditions
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique",
    "aten::_unique",
    "aten::bincount",
    "aten::_linalg_check_errors",  # torch.linalg.cholesky, solve, inv
)
"""Beginnings of the names of operations that wait for their input."""
FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.rand, torch.randn, torch.randint)
SOURCES = ("llmqat/", "transformers/", "accelerate/", "torch/optim/")
"""Where the lines are that a wait is put down to, the most telling first."""


class _Marks:
    """The memory that is taken for a GPU's."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}  # which keeps the address from being used again

    def add(self, value: Any) -> None:
        for tensor in _tensors(value):
            reference = StorageWeakRef(tensor.untyped_storage())
            self._known[reference.cdata] = reference
        if len(self._known) > 20_000:
            self._known = {key: kept for key, kept in self._known.items() if not kept.expired()}

    def drop(self, tensor: Tensor) -> None:
        self._known.pop(tensor.untyped_storage()._cdata, None)

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known

    def has_any(self, value: Any) -> bool:
        return any(map(self.has, _tensors(value)))


class Waits:
    """Records the waits for a GPU that its tensors would be on.

    Attributes:
        found: what was asked, and by which line, in order.
    """

    def __init__(self, *on_device: nn.Module | Tensor) -> None:
        """Takes what lies on the GPU from the start: tensors, and the parameters and buffers of modules."""
        self.found: list[str] = []
        self.marks = _Marks()
        for held in on_device:
            self.marks.add([*held.parameters(), *held.buffers()] if isinstance(held, nn.Module) else held)
        self._modes = (_Calls(self), _Operations(self))

    def __enter__(self) -> Waits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, what: str) -> None:
        """Records a wait of the line that runs."""
        self.found.append(f"{what} in {_line()}")

    def __str__(self) -> str:
        return listed(Counter(self.found))


class _Calls(TorchFunctionMode):
    """Sees moves between devices, which are no operations where all is on one."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        marks = self.waits.marks
        if call in (Tensor.cpu, Tensor.tolist, Tensor.numpy) or (call is Tensor.to and _is_host(marks, args, given)):
            if not marks.has(args[0]):
                return call(*args, **given)
            self.waits.note(f".{call.__name__}()")
            with torch._C.DisableTorchFunction():
                found = call(*args, **given)
            if not isinstance(found, Tensor):
                return found
            found = found.clone()  # memory of its own
            marks.drop(found)
            return found
        result = call(*args, **given)
        if call is Tensor.to and _names_device(args, given) and not marks.has(args[0]):
            if not (given.get("non_blocking") or True in args[1:]):
                self.waits.note("an upload by .to()")
            result = result.clone()
            marks.add(result)
        elif call is torch.tensor and isinstance(given.get("device"), torch.device):
            self.waits.note("an upload by torch.tensor()")
            marks.add(result)
        elif call in FACTORIES and isinstance(given.get("device"), torch.device):
            marks.add(result)
        return result


class _Operations(TorchDispatchMode):
    """Sees operations, and passes the mark on."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        marks = self.waits.marks
        name = operation._schema.name
        if not marks.has_any((args, given)):
            result = operation(*args, **given)
            if torch._C._current_graph_task_id() != -1:  # a backward pass, in which no calls are seen
                marks.add(result)
            return result
        if name.startswith(ASKING) or (name == "aten::repeat_interleave" and given.get("output_size") is None):
            self.waits.note(name.removeprefix("aten::"))
        elif name in ("aten::index", "aten::index_put_", "aten::index_put"):
            self._index(args)
        elif name == "aten::copy_" and marks.has(args[0]) != marks.has(args[1]) and args[1].dim():
            if not marks.has(args[0]):
                self.waits.note("a download by copy_")
                return operation(*args, **given)
            if not (given.get("non_blocking") or True in args[2:]):
                self.waits.note("an upload by copy_")
        result = operation(*args, **given)
        if name not in ("aten::_local_scalar_dense", "aten::equal"):
            marks.add(result)
        return result

    def _index(self, args: Any) -> None:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.waits.note("an index by a mask")
        elif self.waits.marks.has(args[0]) and not all(map(self.waits.marks.has, indices)):
            self.waits.note("an index from the host")


def listed(counts: Counter[str]) -> str:
    """Returns the waits as lines, the most frequent first."""
    return "\n".join(f"{count:6d}  {what}" for what, count in counts.most_common())


def between(few: Waits, many: Waits) -> Counter[str]:
    """Returns what `many` waited for beyond `few`: what a loop does in the turns that it made more."""
    return Counter(many.found) - Counter(few.found)


def check_at_most(bound: float, turns: int, counts: Counter[str]) -> None:
    """Raises AssertionError, with the lines that wait, where `turns` of a loop wait more than `bound` times each."""
    total = counts.total()
    assert total <= bound * turns, (
        f"{total} waits for the device in {turns} turns of a loop, {bound} allowed in each:\n{listed(counts)}"
    )


def _tensors(value: Any) -> Iterable[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.device.type != "meta"]


def _names_device(args: Any, given: dict[str, Any]) -> bool:
    return isinstance(given.get("device", args[1] if len(args) > 1 else None), torch.device)


def _is_host(marks: _Marks, args: Any, given: dict[str, Any]) -> bool:
    target = given.get("device", args[1] if len(args) > 1 else None)
    return target == "cpu" if isinstance(target, str) else isinstance(target, Tensor) and not marks.has(target)


def _line() -> str:
    """Returns the innermost line that runs of llmqat and of transformers."""
    frames = [(_short(path), line, function) for path, line, function in _frames()]
    found = [next((frame for frame in frames if frame[0].startswith(source)), None) for source in SOURCES]
    own, others = found[0], [frame for frame in found[1:] if frame is not None]
    called = own is not None and others and frames.index(others[0]) < frames.index(own)
    shown = [*others[:1], own] if called else [own] if own is not None else others[:1]
    return ", called in ".join(f"{path}:{line} {function}" for path, line, function in shown if path) or "a test"


def _short(path: str) -> str:
    return path.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")


def _frames() -> Iterator[tuple[str, int, str]]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # All operations go through a mode of torch.
        is_mode = code.co_qualname.endswith((".__torch_dispatch__", ".__torch_function__"))
        if not is_mode and "/tests/synchronisation.py" not in code.co_filename:
            yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname
        frame = frame.f_back

"""Giving memory back: pages of a weights file that were read and are not needed soon.

A loaded checkpoint is mapped from its file. What kernels compute with is often a layout of their own, of the same size;
the pages that it was made from would stay in memory beside it. They can be let go without loss, since they are read
from the file again if somebody asks for them.

The same holds for a model in full precision: its weights are mapped as well, and a pass over all of them would leave
all of them in memory. So passes that only read let each weight go once they are done with it (`WeightPages`), and a
model may be larger than memory. Linux only; elsewhere nothing is given back.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_MAPS = Path("/proc/self/maps")
_SMAPS = Path("/proc/self/smaps")
LEAST_BYTES = 1 << 29
"""Of weights in files: below it nothing is let go, as nobody would notice."""
_FILE = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) \S+p \S+ \S+ [1-9]\d* +/.*(?:\.safetensors|/blobs/[0-9a-f]{40,64})(?: \(deleted\))?$"
)
"""A private mapping of a weights file; in the cache of the hub they have no names but their hashes."""
_MAY_BE = re.compile(r"\.safetensors|/blobs/")
_HEAD = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")
"""The first line of any mapping."""
_DONTNEED = 4
_C = ctypes.CDLL(None)


@dataclass(frozen=True)
class FilePages:
    """The whole memory pages inside tensors that are mapped from a file; calling it gives the pages back.

    A copy or pickle of it is None, since copied tensors have other addresses.

    Attributes:
        tensors: the mapped tensors, which keep the mapping alive.
        versions: version counters of the tensors when they were mapped. A tensor that was written to since then is left
            alone, because the file does not hold its new values.
        ranges: for each tensor, the address of its first whole page and the bytes of all of them.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]

    def __call__(self) -> None:
        """Lets the pages go; they are read from the file again when somebody asks for them."""
        for tensor, version, (address, size) in zip(self.tensors, self.versions, self.ranges, strict=True):
            if tensor._version == version:
                _let_go(address, size)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _let_go(address: int, size: int) -> None:
    _C.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _DONTNEED)


class FileMappings:
    """The address ranges of this process that are mapped from given files."""

    def __init__(self, paths: set[Path]) -> None:
        """Reads them once; ask before the tensors that keep the mappings alive are gone."""
        wanted = {str(path.resolve()) for path in paths}
        lines = _MAPS.read_text(encoding="utf-8").splitlines() if _MAPS.is_file() else []
        found = [line.split(maxsplit=5) for line in lines]
        ranges = [parts[0].split("-") for parts in found if len(parts) == 6 and parts[5] in wanted]
        self._ranges = [(int(start, 16), int(end, 16)) for start, end in ranges]

    def let_go(self) -> None:
        """Lets all their pages go. To be called before anything was written to the tensors that lie in them."""
        for low, high in self._ranges:
            _let_go(low, high - low)

    def pages_of(self, *tensors: Tensor) -> FilePages | None:
        """Returns the whole pages inside those of `tensors` that lie in one of the files; None where none does."""
        mapped = tuple(tensor for tensor in tensors if _lies_in(self._ranges, tensor))
        if not mapped:
            return None
        return FilePages(mapped, tuple(tensor._version for tensor in mapped), tuple(map(_whole_pages, mapped)))


class WeightPages:
    """What is mapped from safetensors files, and was never written to.

    Pages that were written to are in no file, and a mapping that has some is left alone. Nothing may be written to a
    weight while an object of this class is used: each pass over a model takes a new one.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        """Looks where the files are mapped; not for the sake of a small `model`, as looking takes milliseconds."""
        self._ranges: list[tuple[int, int]] = []
        if model is not None and sum(p.numel() * p.element_size() for p in model.parameters()) < LEAST_BYTES:
            return
        lines = _MAPS.read_text(encoding="utf-8").splitlines() if _MAPS.is_file() else []
        mapped = [match for line in lines if _MAY_BE.search(line) and (match := _FILE.match(line))]
        if sum(int(match[2], 16) - int(match[1], 16) for match in mapped) >= LEAST_BYTES and _SMAPS.is_file():
            self._ranges = _unwritten()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._ranges)

    def hold(self, tensor: Tensor) -> bool:
        """Returns whether `tensor` lies in one of the files."""
        return tensor.device.type == "cpu" and tensor.numel() > 0 and _lies_in(self._ranges, tensor)

    def let_go(self, tensors: Iterable[Tensor]) -> None:
        """Lets the whole pages inside `tensors` go, where they lie in one of the files."""
        for tensor in tensors:
            if self.hold(tensor):
                _let_go(*_whole_pages(tensor))

    def one_by_one(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields what `named` gives, and lets each tensor go when the next one is asked for."""
        for name, tensor in named:
            yield name, tensor
            self.let_go([tensor])


@contextmanager
def weights_let_go(model: nn.Module) -> Iterator[None]:
    """Inside, weights that are mapped from files leave memory when a forward has passed the layer that they are in.

    For passes of little text over a model that may be larger than memory; nothing may be written to weights inside.
    """
    pages = WeightPages(model)

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        pages.let_go(chain(module.parameters(), module.buffers()))

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    with ExitStack() as stack:
        for layer in {layer for entries in lists for layer in entries} if pages else ():
            stack.callback(layer.register_forward_hook(hook).remove)
        yield
    pages.let_go(model.parameters())


def _unwritten() -> list[tuple[int, int]]:
    """Returns the address ranges of weights files that this process has written nothing to."""
    found: list[tuple[int, int]] = []
    here: tuple[int, int] | None = None
    for line in _SMAPS.read_text(encoding="utf-8").splitlines():
        if _MAY_BE.search(line) and (match := _FILE.match(line)):
            here = int(match[1], 16), int(match[2], 16)
            found.append(here)
        elif _HEAD.match(line):
            here = None
        elif here is not None and line.startswith(("Anonymous:", "Swap:")) and line.split()[1] != "0":
            found.remove(here)  # pages were copied as they were written to
            here = None
    return found


def _lies_in(ranges: Iterable[tuple[int, int]], tensor: Tensor) -> bool:
    """Returns whether `tensor`, on a CPU, lies in one of some address ranges."""
    start = tensor.data_ptr()
    return any(low <= start and start + tensor.nbytes <= high for low, high in ranges)


def _whole_pages(tensor: Tensor) -> tuple[int, int]:
    """Returns the address of the first page that begins inside `tensor`, and the bytes of all that end there too."""
    start = tensor.data_ptr()
    first, last = -(-start // mmap.PAGESIZE), (start + tensor.nbytes) // mmap.PAGESIZE
    return first * mmap.PAGESIZE, max(0, last - first) * mmap.PAGESIZE

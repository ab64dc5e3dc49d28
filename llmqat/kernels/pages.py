"""Giving memory back: pages of a weights file that a kernel has read and does not need soon, and holes in the heap.

A loaded checkpoint is mapped from its file. What kernels compute with is often a layout of their own, of the same size;
the pages that it was made from would stay in memory beside it. They can be let go without loss, since they are read
from the file again if somebody asks for them. Linux only; elsewhere nothing is given back.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4
_C = ctypes.CDLL(None)


@dataclass(frozen=True)
class FilePages:
    """The whole pages inside a tensor that is mapped from a file. A copy of it is None: it would lie elsewhere.

    Attributes:
        tensor: keeps the mapping alive.
        version: the tensor's when it was mapped; what is written into it later is in no file.
        address: of the first page.
        size: bytes.
    """

    tensor: Tensor
    version: int
    address: int
    size: int

    def __call__(self) -> None:
        """Lets the pages go; they are read from the file again when somebody asks for them."""
        if self.tensor._version == self.version:
            _let_go(self.address, self.size)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def trim_heap() -> None:
    """Gives the system back what the heap holds and nobody uses; glibc keeps the holes between large blocks."""
    trim = getattr(_C, "malloc_trim", None)
    if trim is not None:
        trim(0)


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

    def pages_of(self, tensor: Tensor) -> FilePages | None:
        """Returns the whole pages inside `tensor`; None where it does not lie in one of the files."""
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if not any(low <= start and start + size <= high for low, high in self._ranges):
            return None
        first, last = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE
        return FilePages(tensor, tensor._version, first * mmap.PAGESIZE, max(0, last - first) * mmap.PAGESIZE)

"""Giving memory back: pages of a weights file that a kernel has read and does not need soon.

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
    """The whole pages inside tensors that are mapped from a file. A copy of it is None: it would lie elsewhere.

    Attributes:
        tensors: keep the mapping alive.
        versions: the tensors' when they were mapped; what is written into one later is in no file.
        ranges: address of the first page and bytes of all, for each tensor.
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
        mapped = tuple(tensor for tensor in tensors if self._hold(tensor))
        if not mapped:
            return None
        return FilePages(mapped, tuple(tensor._version for tensor in mapped), tuple(map(_whole_pages, mapped)))

    def _hold(self, tensor: Tensor) -> bool:
        start = tensor.data_ptr()
        return any(low <= start and start + tensor.nbytes <= high for low, high in self._ranges)


def _whole_pages(tensor: Tensor) -> tuple[int, int]:
    """Returns the address of the first page that begins inside `tensor`, and the bytes of all that end there too."""
    start = tensor.data_ptr()
    first, last = -(-start // mmap.PAGESIZE), (start + tensor.nbytes) // mmap.PAGESIZE
    return first * mmap.PAGESIZE, max(0, last - first) * mmap.PAGESIZE

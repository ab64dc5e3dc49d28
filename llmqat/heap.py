"""The C library's heap: whether memory that is freed is kept for the next tensor of its size.

A training step, or a forward, allocates and frees the same large tensors over and over. glibc gives each of them back
to the system when it is freed, and every page is faulted in anew at the next: a third of a training step of a small
model on two cores (8.1 s against 5.8 s). Kept, the memory of a process only grows, to about the same peak.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_NEVER_TRIM = -1
_GROW_BYTES = 100_000_000
_LARGE_BYTES = 32 << 20
_MOST_MAPPED = 65_536  # glibc's own

SETTINGS_OF_THE_USER = ("MALLOC_", "GLIBC_TUNABLES")
"""How the names of environment variables begin by which a user sets the heap; then nothing is changed."""


def keep_freed_memory() -> bool:
    """Makes glibc keep what this process frees; returns whether it does now.

    Nothing is done where the C library is another, or the environment says how its heap is to be.
    """
    if any(name.startswith(SETTINGS_OF_THE_USER) for name in os.environ):
        return False
    mallopt = _c_function("mallopt")
    if mallopt is None:
        return False
    chosen = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER_TRIM, _TOP_PAD: _GROW_BYTES}
    kept = all(mallopt(setting, value) == 1 for setting, value in chosen.items())
    _state["kept"] = kept
    return kept


_state = {"kept": False}
"""Whether this process keeps what it frees."""


@contextmanager
def large_tensors_given_back() -> Iterator[None]:
    """Inside, glibc gives freed tensors of 32 MiB and more back to the system, if `keep_freed_memory` was on.

    Use it for work on matrices of many sizes, such as calibration block by block. There freed memory rarely fits the
    next tensor, and keeping it doubles the memory of the process.
    """
    mallopt = _c_function("mallopt") if _state["kept"] else None
    if mallopt is None:
        yield
        return
    for setting, value in {_MMAP_MAX: _MOST_MAPPED, _MMAP_THRESHOLD: _LARGE_BYTES, _TOP_PAD: 0}.items():
        mallopt(setting, value)
    mallopt(_TRIM_THRESHOLD, 2 * _LARGE_BYTES)
    give_back_freed_memory()
    try:
        yield
    finally:
        keep_freed_memory()


def give_back_freed_memory() -> None:
    """Gives back what is free now: for the moment before a phase of a run whose tensors are others than those before.

    Without it, what loading and calibration held at most stays with the process while it trains.
    """
    gc.collect()
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


def _c_function(name: str) -> Callable[..., int] | None:
    """Returns a function of the C library, or None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None

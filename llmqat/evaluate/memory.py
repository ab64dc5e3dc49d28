"""Memory of this process: as the kernel counts it (Linux), or on the accelerator as torch does."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from llmqat.heap import give_back_freed_memory


def forget_peak() -> int | None:
    """Makes kernel and torch forget how much memory this process has held at most; returns what it holds now, in bytes.

    What was freed is given back first: else a model that fits into the memory of the one before it seems to need none.
    On a machine with a GPU it is the GPU's memory that is counted.
    """
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: torch.device) -> int | None:
    """Returns the bytes held at most since `forget_peak`; None where nobody counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def resident(what: Literal["VmRSS", "VmHWM"]) -> int | None:
    """Returns this process' memory in bytes, VmRSS (now) or VmHWM (at most); None where /proc does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024

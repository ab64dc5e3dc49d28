"""Energy, from the counters of the machine: RAPL of the processor's packages (Linux), or NVML of an NVIDIA GPU.

Many machines offer neither (virtual ones, or kernels that let only root read the counters): then there is no figure.
The counters are of the whole package or board, so whatever else runs is counted too.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmqat.extras import missing, require

POWERCAP = Path("/sys/class/powercap")


@dataclass
class EnergyMeter:
    """Reads the energy counters of the machine. Only the difference of two readings means anything."""

    packages: tuple[Path, ...] = ()  # RAPL domains
    board: Any = None  # handle of NVML
    _last: dict[Path, int] = field(default_factory=dict)
    _spent: float = 0.0

    @classmethod
    def of(cls, device: torch.device, powercap: Path = POWERCAP) -> EnergyMeter:
        """Returns the meter of what computes on `device`."""
        if device.type == "cuda":
            return cls(board=_nvml_handle(device))
        domains = (path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1)
        return cls(packages=tuple(path for path in sorted(domains) if _counter(path / "energy_uj") is not None))

    def joules(self) -> float | None:
        """Returns a reading in joules, which never falls; None where the machine has no counter.

        RAPL's readings begin at 0 with the first call, and counters that wrap around are unwrapped. NVML's reading is
        the board's own counter.
        """
        if self.board is not None:
            return float(require("pynvml", "energy of a GPU").nvmlDeviceGetTotalEnergyConsumption(self.board)) / 1e3
        if not self.packages:
            return None
        for path in self.packages:
            now = _counter(path / "energy_uj") or 0
            before = self._last.setdefault(path, now)
            whole = _counter(path / "max_energy_range_uj") or 0
            self._spent += (now - before if now >= before else now - before + whole) / 1e6
            self._last[path] = now
        return self._spent


def _counter(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _nvml_handle(device: torch.device) -> Any:
    """Returns NVML's handle of the GPU; None without pynvml, or where the board has no counter."""
    if missing("pynvml") is not None:
        return None
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        # NVML numbers all boards, torch those that CUDA_VISIBLE_DEVICES names
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return handle
    return None

"""Child processes of tests: this checkout first on the path, no network, one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def torchrun(processes: int) -> tuple[str, ...]:
    """Returns module and words that start processes of what follows."""
    return "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)


def started(*module: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m` with the words of `module`, to whatever end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *module]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def launched(*module: str) -> subprocess.CompletedProcess[str]:
    """The same; it must end well."""
    done = started(*module)
    assert done.returncode == 0, done.stderr[-4000:]
    return done

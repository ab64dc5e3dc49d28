"""Child processes of tests: this checkout first on the path, no network, one thread each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from torch.nn.modules.module import register_module_forward_pre_hook

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


Moment = tuple[Literal["module", "file"], int]
"""The call of a module, or the opening, renaming, making or removing of a file, and its number."""
FILE_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def die_at(moment: Moment, folder: Path) -> None:
    """Has this process end by SIGKILL at a moment; files are counted under a folder alone.

    Counted, not timed: on a fast and on a slow machine a test kills at the same places.
    """
    kind, number = moment
    left = [number]

    def passed(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def seen(event: str, words: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and isinstance(words[0], (str, Path)) and str(words[0]).startswith(str(folder)):
            passed()

    if kind == "module":
        register_module_forward_pre_hook(passed)
    else:
        sys.addaudithook(seen)

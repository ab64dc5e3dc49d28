"""What made a result: command, commit, versions, processor and load, for the file that a script writes.

    report = {**made("ablations.py"), "rows": rows}

It is what wrote the file last: a script that goes on adds to what earlier commits have measured. A commit ends in `+`
where tracked files of the package, the scripts or the recipes differ from it.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llmqat

PACKAGES = ("torch", "transformers", "peft", "compressed-tensors")
"""Whose versions may change a figure."""
_ROOT = Path(__file__).resolve().parents[1]


def made(script: str) -> dict[str, Any]:
    """Returns what made the results of `script`, a file name in eval/."""
    return {
        "command": shlex.join(["python", f"eval/{script}", *sys.argv[1:]]),
        "llmqat": llmqat.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "processor": processor(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def commit(root: Path = _ROOT) -> str | None:
    """Returns the commit of the checkout at `root`, in twelve digits; None where there is none, or no git."""
    found = _git(root, "rev-parse", "--short=12", "HEAD")
    if not found:
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "llmqat", "eval", "recipes")
    return f"{found}+" if changed else found


def processor() -> str:
    """Returns the processor's name and the number of its cores."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def line_of(found: dict[str, Any]) -> str:
    """Returns `made` in a line, for the head of a table: command, version, commit, date, processor."""
    at = f"commit {found['commit']}, " if found.get("commit") else ""
    return f"`{found['command']}`, llmqat {found['llmqat']}, {at}{found['date']}, {found['processor']}"


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

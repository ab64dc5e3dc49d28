"""What made a result: command, commit, versions, processor and load, for the file that a script writes.

    report = {**made("ablations.py"), "rows": rows}

It is what wrote the file last: a script that goes on adds to what earlier commits have measured. A commit ends in `+`
where tracked files of the package, the scripts or the recipes differ from it.

A script that prints tables and a headline leaves them in files so:

    parser = argparse.ArgumentParser(..., parents=[result_options()])  # --table and --json
    with recorded("kv_cache.py"):
        main()
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import llmqat
from llmqat.files import write_whole
from llmqat.kernels import cpu_has_bf16
from llmqat.paths import check_outputs, user_path

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


def result_options(*, json_file: bool = True) -> argparse.ArgumentParser:
    """Returns a parent of a script's parser, with `--table` and, where the script has none of its own, `--json`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--table", type=user_path, help="file for what is printed, below a line of what made it")
    if json_file:
        parser.add_argument("--json", type=user_path, help="file for the headline, and what made it")
    return parser


@contextmanager
def recorded(script: str, *, json_file: bool = True) -> Iterator[None]:
    """Inside, what a script prints is printed; at the end it is also in the files of `result_options`.

    Args:
        script: its name in eval/.
        json_file: whether `--json` is for the headline; else it is the script's own.
    """
    options, _ = result_options(json_file=json_file).parse_known_args()
    outputs = {f"--{name}": value for name, value in vars(options).items()}
    check_outputs(outputs)
    if not any(outputs.values()):
        yield
        return
    copy = _Copy(sys.stdout)
    with redirect_stdout(copy):
        yield
    found, printed = made(script), copy.getvalue().rstrip() + "\n"
    if options.table:
        fence = "```" if options.table.suffix == ".md" else ""
        body = f"{fence}text\n{printed}{fence}\n" if fence else printed
        write_whole(options.table, f"{line_of(found)}, load {found['load'][0]}\n\n{body}")
    if json_file and options.json:
        numbers = [re.fullmatch(r"([^:]+): ([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)", line) for line in printed.splitlines()]
        headline = {one[1]: float(one[2]) for one in numbers if one}
        write_whole(options.json, json.dumps({**found, "headline": headline}, indent=2) + "\n")


class _Copy(io.StringIO):
    """A stream that also writes to another."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self._other = other

    def write(self, text: str) -> int:
        """Writes to both."""
        self._other.write(text)
        return super().write(text)

    def flush(self) -> None:
        """Flushes the other."""
        self._other.flush()


def commit(root: Path = _ROOT) -> str | None:
    """Returns the commit of the checkout at `root`, in twelve digits; None where there is none, or no git."""
    found = _git(root, "rev-parse", "--short=12", "HEAD")
    if not found:
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "llmqat", "eval", "recipes")
    return f"{found}+" if changed else found


def processor() -> str:
    """Returns the processor's name, the number of its cores and the instructions that torch uses."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    products = ", bfloat16 products" if cpu_has_bf16() else ""
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}{products}"


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

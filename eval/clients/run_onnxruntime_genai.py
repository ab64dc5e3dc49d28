"""ONNX Runtime GenAI on the CPU: the ONNX folder as it is, with the genai_config.json that lies in it."""

from __future__ import annotations

import json
from typing import Any

import onnxruntime_genai
from job import run, timed
from logits import perplexity_of


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what ONNX Runtime GenAI makes of one folder."""
    model = onnxruntime_genai.Model(job["path"])
    perplexity = perplexity_of(lambda window: logits(model, window), job["windows"])
    extra = {}
    if job["chat"] is not None:
        tokenizer = onnxruntime_genai.Tokenizer(model)
        # The messages of a job are given as they are, a JSON text, which is what this tokenizer takes.
        text = tokenizer.apply_chat_template(json.dumps(job["chat"]), add_generation_prompt=True)
        ids = [int(token) for token in tokenizer.encode(text)]
        extra["chat"] = tokenizer.decode(generated(model, ids, job["max_new_tokens"]))
    timings = timed(lambda prompt, count: generated(model, prompt, count), job)
    return {"perplexity": perplexity, **timings, "extra": extra}


def generator(model: Any, tokens: list[int], count: int) -> Any:
    """Returns a generator that has read `tokens` and may write `count` more, greedily."""
    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=len(tokens) + count)
    found = onnxruntime_genai.Generator(model, settings)
    found.append_tokens(tokens)
    return found


def logits(model: Any, tokens: list[int]) -> Any:
    """Returns the logits [L, V] of a window."""
    return generator(model, tokens, 1).get_output("logits")[0]


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """Returns `count` greedy tokens after `prompt`; no token ends them."""
    found, tokens = generator(model, prompt, count), []
    while len(tokens) < count:
        found.generate_next_token()
        tokens.append(int(found.get_next_tokens()[0]))
        if found.is_done() and len(tokens) < count:  # an end of text, which is read here as any other token
            found.append_tokens(tokens[-1:])
    return tokens


if __name__ == "__main__":
    run(("onnxruntime-genai", "onnxruntime", "numpy"), answer)

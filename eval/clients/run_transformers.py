"""Stock transformers: a compressed-tensors folder, or a GGUF file, in bfloat16."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from job import run, timed
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what transformers makes of one checkpoint."""
    path = Path(job["path"])
    is_file = job["format"] == "gguf"
    folder, named = (path.parent, {"gguf_file": path.name}) if is_file else (path, {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **named).eval()
    if job["lora"] is not None:
        model.load_adapter(job["lora"])
    return answered(model, lambda: AutoTokenizer.from_pretrained(folder, **named), job)


@torch.no_grad()
def answered(model: Any, tokenizer_of: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a model with the interface of transformers."""
    perplexity = perplexity_of(model, job["windows"])
    extra = {}
    if job["chat"] is not None:
        tokenizer = tokenizer_of()
        ids = tokenizer.apply_chat_template(job["chat"], add_generation_prompt=True, return_dict=False)
        extra["chat"] = tokenizer.decode(generated(model, ids, job["max_new_tokens"]))
    timings = timed(lambda prompt, count: generated(model, prompt, count), job)
    return {"perplexity": perplexity, **timings, "extra": extra}


def perplexity_of(model: Any, windows: list[list[int]]) -> float:
    """Returns exp of the mean negative log-likelihood of all tokens but a window's first."""
    total, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """Returns `count` greedy tokens after `prompt`; no token ends them."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
    found: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    return found


if __name__ == "__main__":
    run(("transformers", "torch", "compressed-tensors"), answer)

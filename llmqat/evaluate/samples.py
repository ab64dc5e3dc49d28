"""What models write: the same prompts, completed greedily, to be read side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmqat.layers import new_cache
from llmqat.models import model_device

PROMPTS = (
    "The water cycle begins when the sun",
    "Question: What is the capital of France, and what is it known for?\nAnswer:",
    "def fibonacci(n):\n",
)
NEW_TOKENS = 48


@torch.no_grad()
def completions(model: nn.Module, tokenizer: Any, prompts: tuple[str, ...] = PROMPTS) -> list[dict[str, str]]:
    """Returns each prompt and how `model` goes on, the most probable token each time."""
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model_device(model))
        generate: Any = model.generate
        output = generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            past_key_values=new_cache(model),
            pad_token_id=tokenizer.eos_token_id,
        )
        written = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append({"prompt": prompt, "completion": str(written)})
    return found

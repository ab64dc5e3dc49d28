"""What models write: the same prompts, completed greedily, to be read side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.data.chat import around_words
from llmqat.data.length import table_length
from llmqat.data.script import end_ids
from llmqat.evaluate.compare import Comparison
from llmqat.evaluate.generations import most_probable
from llmqat.evaluate.perplexity import TokenWindows
from llmqat.metrics import IGNORED_LABEL
from llmqat.models import model_device

PROMPTS = (
    "The water cycle begins when the sun",
    "Question: What is the capital of France, and what is it known for?\nAnswer:",
    "def fibonacci(n):\n",
)
NEW_TOKENS = 48


ANSWERS = 3
"""Conversations that models are asked to answer."""
ANSWER_TOKENS = 64
SHOWN_CHARACTERS = 400


def completions(model: nn.Module, tokenizer: Any, prompts: tuple[str, ...] = PROMPTS) -> list[dict[str, str]]:
    """Returns each prompt and how `model` goes on, the most probable token each time."""
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        found.append({"prompt": prompt, "completion": _written(model, tokenizer, ids, NEW_TOKENS)})
    return found


def answers(model: nn.Module, tokenizer: Any, windows: TokenWindows, count: int = ANSWERS) -> list[dict[str, str]]:
    """Returns how `model` answers the first conversations of `windows`, beside the answers that stand there.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with the chat template that the conversations were rendered by.
        windows: of which the answers of conversations are scored.
        count: of conversations.

    Returns:
        A mapping for each: `prompt`, as the model reads it; `question`, the last words of the user in it; `own`, the
        first answer of the conversation; `written`, the model's, the most probable token each time.
    """
    order = range(len(windows)) if windows.units is None else windows.units.argsort().tolist()
    found = []
    for row in list(order)[:count]:
        ids, labels = windows.ids[row], windows.labels[row]
        start, end = _first_answer(labels)
        prompt = str(tokenizer.decode(ids[:start].tolist()))
        entry = {"prompt": prompt, "question": _question(prompt, tokenizer)}
        entry["own"] = str(tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=True))
        entry["written"] = _written(model, tokenizer, ids[None, :start], ANSWER_TOKENS)
        found.append(entry)
    return found


def answer_lines(comparison: Comparison) -> Iterator[str]:
    """Yields for the terminal what `comparison` holds of answers: each question, the user's answer, those of models."""
    answering = [row for row in comparison.rows if row.extras.get("answers")]
    for number, asked in enumerate(answering[0].extras["answers"] if answering else ()):
        yield f"question: {_shortened(asked['question'])}"
        yield f"  your answer: {_shortened(asked['own'])}"
        for row in answering:
            yield f"  {row.name}: {_shortened(row.extras['answers'][number]['written'])}"


def _shortened(text: str) -> str:
    line = " ".join(text.split()) or "(nothing: the answer ends where it begins)"
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 1]}…"


def _first_answer(labels: Tensor) -> tuple[int, int]:
    """Returns where the first run of labels [L] begins and ends."""
    scored = labels.ne(IGNORED_LABEL).nonzero().flatten().tolist()
    end = next((place for place in range(scored[0], len(labels)) if labels[place] == IGNORED_LABEL), len(labels))
    return scored[0], end


def _question(prompt: str, tokenizer: Any) -> str:
    """Returns the last words of the user in a rendered prompt; all of it where that cannot be told."""
    before, between, after = around_words(tokenizer)
    if after and prompt.endswith(after):
        for opening in (between, before):
            if opening and opening in prompt:
                return prompt.rpartition(opening)[2].removesuffix(after).strip()
    return prompt.strip()


@torch.no_grad()
def _written(model: Any, tokenizer: Any, ids: Tensor, tokens: int) -> str:
    """Returns how `model` goes on after `ids` [1, L], the most probable token each time."""
    longest = table_length(model)
    most = tokens if longest is None else min(tokens, longest - ids.shape[1])
    written = most_probable(model, ids.to(model_device(model)), most, end_ids(model, tokenizer))
    return str(tokenizer.decode(written[0], skip_special_tokens=True))

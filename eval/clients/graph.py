"""The graph of an ONNX folder, fed by hand with its cache of keys and values, in whatever runs graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from job import timed
from logits import perplexity_of

Outputs = dict[str, np.ndarray]
"""Of a graph, by name."""


@dataclass(frozen=True)
class Graph:
    """A decoder.

    Attributes:
        compute: returns the outputs of inputs, both by name.
        cache: names of the inputs that are its cache -> heads, and size of a head.
    """

    compute: Callable[[Outputs], Outputs]
    cache: Mapping[str, tuple[int, int]]

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Returns the figures of a job."""
        perplexity = perplexity_of(lambda window: self.outputs(window)["logits"][0], job["windows"])
        return {"perplexity": perplexity, **timed(self.generated, job)}

    def outputs(self, tokens: list[int], before: Outputs | None = None, position: int = 0) -> Outputs:
        """Returns the outputs for new tokens after `position` others, whose outputs are `before`."""
        feed = inputs(tokens, position)
        for name, (heads, size) in self.cache.items():
            empty = np.zeros((1, heads, 0, size), dtype=np.float32)
            feed[name] = empty if before is None else before[name.replace("past_key_values", "present")]
        return self.compute(feed)

    def generated(self, prompt: list[int], count: int) -> list[int]:
        """Returns `count` greedy tokens after `prompt`; no token ends them."""
        found = self.outputs(prompt)
        tokens = [int(found["logits"][0, -1].argmax())]
        while len(tokens) < count:
            found = self.outputs(tokens[-1:], found, len(prompt) + len(tokens) - 1)
            tokens.append(int(found["logits"][0, -1].argmax()))
        return tokens


def inputs(tokens: list[int], position: int = 0) -> dict[str, np.ndarray]:
    """Returns what every decoder takes of new tokens after `position` others."""
    places = np.arange(position, position + len(tokens), dtype=np.int64)[None]
    seen = np.ones((1, position + len(tokens)), dtype=np.int64)
    return {"input_ids": np.array([tokens], dtype=np.int64), "attention_mask": seen, "position_ids": places}


def is_cache(name: str) -> bool:
    """Returns whether an input is part of the cache of keys and values."""
    return name.startswith("past_key_values.")

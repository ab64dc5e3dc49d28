"""Perplexity from logits in NumPy, for clients without torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def perplexity_of(logits: Callable[[list[int]], np.ndarray], windows: list[list[int]]) -> float:
    """Returns exp of the mean negative log-likelihood of all tokens but a window's first.

    Args:
        logits: token ids -> logits [L, V], in any precision.
        windows: token ids.
    """
    nll = [loss for window in windows for loss in _losses(logits(window), window)]
    return math.exp(sum(nll) / len(nll))


def _losses(logits: np.ndarray, tokens: list[int]) -> list[float]:
    scores = logits[:-1].astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    return list(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(scores)), tokens[1:]])

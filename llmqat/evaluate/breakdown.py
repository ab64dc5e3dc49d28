"""Where a model is weak: its figures by position in the window, and by the kind of token that is predicted.

Kinds are read from the tokenizer, by what a token adds to a text that is already there:

    word        begins with a space and goes on with a letter
    inner       a letter without a space before it: the rest of a word, or a word after a line break or a bracket
    number      digits only
    punctuation anything else that can be seen
    space       spaces, tabs and line breaks only
    special     what the tokenizer lists as special, such as BOS

Shapes: S scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmqat.evaluate.perplexity import Evaluation

KINDS = ("word", "inner", "number", "punctuation", "space", "special")
POSITIONS = (1, 8, 32, 128, 512, 2048, 8192)
"""Bounds of the buckets of positions: tokens read before the one that is predicted."""


@dataclass(frozen=True)
class Part:
    """Figures of some of the scored tokens."""

    name: str
    tokens: int
    perplexity: float
    kl: float | None
    top1: float | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON takes them."""
        return asdict(self)


def by_position(found: Evaluation) -> tuple[Part, ...]:
    """Returns the figures by how many tokens of the window were read before; empty buckets are left out."""
    if found.scored is None:
        return ()
    position = found.scored.position
    bounds = zip(POSITIONS, (*POSITIONS[1:], None), strict=True)
    chosen = {_span(low, high): (position >= low) & (position < (high or math.inf)) for low, high in bounds}
    return _parts(found, chosen)


def by_kind(found: Evaluation, tokenizer: Any) -> tuple[Part, ...]:
    """Returns the figures by the kind of the predicted token; kinds that do not occur are left out."""
    if found.scored is None:
        return ()
    ids, places = found.scored.token.unique(return_inverse=True)
    kinds = torch.tensor([KINDS.index(kind) for kind in kinds_of(ids.tolist(), tokenizer)])[places]
    return _parts(found, {kind: kinds == index for index, kind in enumerate(KINDS)})


def kinds_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Returns the kind of each token."""
    specials = set(tokenizer.all_special_ids)
    anchor = tokenizer.encode("a", add_special_tokens=False)
    before = tokenizer.decode(anchor)
    texts = tokenizer.batch_decode([[*anchor, token] for token in ids], clean_up_tokenization_spaces=False)
    return [
        "special" if token in specials else _kind(text.removeprefix(before))
        for token, text in zip(ids, texts, strict=True)
    ]


def _kind(text: str) -> str:
    bare = text.strip()
    if not bare:
        return "space"
    if bare.isdigit():
        return "number"
    if not bare[0].isalpha():
        return "punctuation"
    return "word" if text[0].isspace() else "inner"


def _span(low: int, high: int | None) -> str:
    return f"{low}+" if high is None else f"{low}-{high - 1}"


def _parts(found: Evaluation, chosen: dict[str, Tensor]) -> tuple[Part, ...]:
    assert found.scored is not None
    scores = found.scored.scores
    parts = []
    for name, mask in chosen.items():
        if not mask.any():
            continue
        nll = float(scores.nll[mask].mean(dtype=torch.float64))
        kl, top1 = (None if v is None else float(v[mask].mean(dtype=torch.float64)) for v in (scores.kl, scores.top1))
        parts.append(Part(name, int(mask.sum()), math.exp(nll) if nll < 700 else math.inf, kl, top1))
    return tuple(parts)

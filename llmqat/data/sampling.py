"""Drawing the next token of many rows from their logits.

A token is drawn by inverting the cumulative distribution, so one uniform random number per row is enough. (Drawing by
exponentials would need one for each of the B x V probabilities.) The search has two levels: first among buckets of the
vocabulary, then within a bucket. On a CPU a few rows are processed at a time, so that their float32 probabilities stay
in the processor's cache. On a GPU all rows are processed together, since it wants few and large operations.

Letters: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmqat.metrics import TopProbabilities, top_of_
from llmqat.models import uploaded

_ROWS_AT_ONCE = 16
_BUCKET = 256
"""Vocabulary entries summed together in the first level."""
_CANDIDATES = 512
"""Most likely tokens that are looked at first for top_p; a row that needs more of them is sorted whole."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Logits are divided by it."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability are drawn; 1: all."""
    top_k: int | None = None
    """Only so many of the most likely tokens are drawn; None: all."""


@dataclass(frozen=True)
class Chosen:
    """What was drawn, a token a row."""

    tokens: Tensor
    """int64 [B]."""
    log_probs: Tensor
    """Of them in softmax(logits), in nats, float32 [B]."""
    top: TopProbabilities | None = None
    """The most likely tokens in softmax(logits), [B, K], where they were asked for."""


def choose(logits: Tensor, uniforms: Tensor, greedy: Tensor, sampling: Sampling, top_k: int | None = None) -> Chosen:
    """Returns one token a row, and what the model itself says of it: temperature 1, and all tokens.

    Args:
        logits: [B, V], any floating dtype.
        uniforms: float64 [B] in [0, 1).
        greedy: bool [B] on the CPU: rows that take the most likely token instead.
        sampling: how the others are drawn.
        top_k: K, how many of the most likely tokens are wanted; None: none.
    """
    rows = _ROWS_AT_ONCE if logits.device.type == "cpu" else max(len(logits), 1)
    parts = zip(logits.split(rows), uniforms.split(rows), greedy.split(rows), strict=True)
    found = [_choose(*part, sampling, top_k) for part in parts]
    top = [part.top for part in found if part.top is not None]
    return Chosen(
        torch.cat([part.tokens for part in found]),
        torch.cat([part.log_probs for part in found]),
        TopProbabilities.joined(top) if top else None,
    )


def _choose(logits: Tensor, uniforms: Tensor, greedy: Tensor, sampling: Sampling, top_k: int | None) -> Chosen:
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    scaled = weights if sampling.temperature == 1 else torch.softmax(logits.float() / sampling.temperature, dim=-1)
    tokens = _drawn(scaled, uniforms, sampling)
    if greedy.any():
        tokens = torch.where(uploaded(greedy, logits.device), logits.argmax(-1), tokens)
    chosen = weights.gather(1, tokens[:, None]).squeeze(1)
    log_probs = chosen.clamp(min=torch.finfo(chosen.dtype).tiny).log()
    return Chosen(tokens, log_probs, None if top_k is None else top_of_(weights, top_k))


def _drawn(weights: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Returns a token a row, int64 [B], of those that may be drawn with probabilities `weights`, float32 [B, V]."""
    if sampling.top_k is None and sampling.top_p == 1:
        return invert(weights, uniforms)
    count = min(sampling.top_k or weights.shape[-1], weights.shape[-1])
    first = count if sampling.top_k else min(_CANDIDATES, count)
    kept, candidates = weights.topk(first)
    tokens = _among(kept, candidates, uniforms, sampling)
    # This waits for a GPU; sorting all rows whole, which would not, takes longer.
    rows = (kept.sum(-1) < sampling.top_p).nonzero().squeeze(1) if first < count else None
    if rows is not None and len(rows) > 0:
        tokens[rows] = _among(*weights[rows].topk(count), uniforms[rows], sampling)
    return tokens


def _among(kept: Tensor, candidates: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Returns a token a row, int64 [B], of `candidates` [B, K], most likely first, whose weights are `kept`."""
    before = kept.double().cumsum(-1) - kept  # of more likely tokens: the first token is always kept
    whole = kept.double().sum(-1, keepdim=True) if sampling.top_k else 1.0
    allowed = kept.masked_fill(before >= sampling.top_p * whole, 0.0)
    return candidates.gather(1, invert(allowed, uniforms)[:, None]).squeeze(1)


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Returns the index, int64 [B], at which the distribution function of `weights` reaches `uniforms`.

    Args:
        weights: float32 [B, K], not negative; need not sum to one.
        uniforms: float64 [B] in [0, 1).
    """
    short = -weights.shape[-1] % _BUCKET
    if short:
        weights = nn.functional.pad(weights, (0, short))
    weights = weights.view(len(weights), -1, _BUCKET)
    buckets = weights.sum(-1).double().cumsum(-1)
    target = uniforms[:, None] * buckets[:, -1:]
    bucket = torch.searchsorted(buckets, target, right=True).clamp_(max=buckets.shape[-1] - 1)
    target = target - torch.where(bucket > 0, buckets.gather(-1, (bucket - 1).clamp(min=0)), 0.0)
    inner = weights.gather(1, bucket[..., None].expand(-1, 1, _BUCKET)).squeeze(1).double().cumsum(-1)
    # The bucket's own sum is rounded differently from the sum of its entries: stay on its last possible entry.
    target = torch.minimum(target, inner[:, -1:] * (1 - 2**-40))
    return (bucket * _BUCKET + torch.searchsorted(inner, target, right=True)).squeeze(-1)

"""Judging what a model has written: which documents are dropped and why, and figures about the rest.

Figures are counted a shard at a time and add up (`tally`, `merged`); `summary` makes shares and means of the sums. Only
distinct n-grams do not add up: they are counted over the blocks.

Letters: N blocks, L tokens a block.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

FEWEST_WRITTEN_TOKENS = 8
"""A document that the model ends after fewer tokens of its own is dropped."""
NGRAM = 4
MOST_REPEATED = 0.5
"""A document is dropped if more than this share of its n-grams have occurred in it before."""
LONG_NGRAM = 8
MOST_SHARED = 0.5
"""A document is dropped if more than this share of its long n-grams have occurred in its shard's earlier documents."""
FEWEST_LONG_NGRAMS = 16
"""A document with fewer long n-grams, such as one cut off by the end of its tape, never counts as a near duplicate."""
MOST_COUNTED_TOKENS = 4_000_000
"""Distinct n-grams are counted over the first so many tokens."""


@dataclass(frozen=True)
class Document:
    """What a model has written on one stretch of a tape."""

    tape: int
    ids: list[int]
    kind: str
    """`plain`, `chat` or `prompt`."""
    opening: int
    """Leading ids that were put in."""
    written: int
    """Ids that the model chose."""
    ended: bool
    """Whether the model ended it; else the end of the tape did."""
    log_prob: float
    """Of the ids that the model chose together, in nats."""
    fault: str | None = None
    """Why it is dropped, or None."""


def judged(documents: Sequence[Document]) -> list[Document]:
    """Returns the documents of a shard with their faults; of those that are like each other the first has none."""
    whole: set[tuple[int, ...]] = set()
    parts: set[tuple[int, ...]] = set()
    result = []
    for document in documents:
        own = document.ids[document.opening :]
        grams = ngrams(own, LONG_NGRAM)
        fault = _fault_alone(document)
        if fault is None and document.written >= FEWEST_WRITTEN_TOKENS and tuple(document.ids) in whole:
            fault = "duplicate"
        elif fault is None and len(grams) >= FEWEST_LONG_NGRAMS:
            shared = sum(gram in parts for gram in grams) / len(grams)
            fault = "near duplicate" if shared > MOST_SHARED else None
        if fault is None:
            whole.add(tuple(document.ids))
            parts.update(grams)
        result.append(replace(document, fault=fault))
    return result


def _fault_alone(document: Document) -> str | None:
    if document.ended and document.written < FEWEST_WRITTEN_TOKENS:
        return "ended at once"
    if len(document.ids) >= 2 * NGRAM and repeated_share(document.ids) > MOST_REPEATED:
        return "repeats itself"
    return None


def ngrams(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Returns the n-grams of `ids` in order."""
    return list(zip(*(ids[offset:] for offset in range(size)), strict=False))


def repeated_share(ids: Sequence[int]) -> float:
    """Returns the share of a document's n-grams that have occurred earlier in it."""
    grams = ngrams(ids, NGRAM)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def tally(documents: Sequence[Document]) -> dict[str, Any]:
    """Returns counts and sums by kind of document; those of several shards add up."""
    kinds: dict[str, Any] = {}
    for kind in sorted({document.kind for document in documents}):
        ours = [document for document in documents if document.kind == kind]
        kept = [document for document in ours if document.fault is None]
        kinds[kind] = {
            "documents": len(ours),
            "dropped": dict(sorted(Counter(d.fault for d in ours if d.fault).items())),
            "dropped_tokens": sum(len(d.ids) for d in ours if d.fault),
            "ended": sum(d.ended for d in kept),
            "tokens": sum(len(d.ids) for d in kept),
            "written": sum(d.written for d in kept),
            "log_prob": round(sum(d.log_prob for d in kept), 3),
            "repeated": round(sum(repeated_share(d.ids) for d in kept), 4),
            "lengths": dict(sorted(Counter(_length_class(len(d.ids)) for d in kept).items())),
        }
    return {"kinds": kinds}


def _length_class(length: int) -> str:
    """Returns the least power of two that is not below `length`, in digits that sort."""
    return f"{1 << max(length - 1, 0).bit_length():06d}"


def merged(tallies: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the sums of tallies, key by key."""
    total: dict[str, Any] = {}
    for one in tallies:
        for key, value in one.items():
            if isinstance(value, Mapping):
                total[key] = merged([total.get(key, {}), value])
            else:
                total[key] = total.get(key, 0) + value
    return total


def refused(total: Mapping[str, Any]) -> dict[str, int]:
    """Returns how many documents were dropped, by fault."""
    return {fault: int(count) for fault, count in merged(kind["dropped"] for kind in total["kinds"].values()).items()}


def summary(total: Mapping[str, Any]) -> dict[str, Any]:
    """Returns shares and means of a tally (with tokens_written and seconds in it), over all kinds and by kind.

    Perplexity is the writer's own, over the tokens that it chose: it falls where the model repeats what it is sure of.
    """
    everything = merged(total["kinds"].values())
    return {
        "documents": everything["documents"],
        "documents_by_kind": {kind: values["documents"] for kind, values in total["kinds"].items()},
        "dropped": refused(total),
        **_figures(everything),
        "by_kind": {kind: {**_figures(v), "dropped": v["dropped"]} for kind, v in total["kinds"].items()},
        "tokens_written": total["tokens_written"],
        "seconds": round(total["seconds"], 2),
        "tokens_per_second": round(total["tokens_written"] / max(total["seconds"], 1e-9), 1),
    }


def _figures(sums: Mapping[str, Any]) -> dict[str, Any]:
    kept = sums["documents"] - sum(sums["dropped"].values())
    return {
        "dropped_token_share": round(sums["dropped_tokens"] / max(sums["dropped_tokens"] + sums["tokens"], 1), 4),
        "mean_document_tokens": round(sums["tokens"] / max(kept, 1), 1),
        "lengths_up_to": {str(int(length)): count for length, count in sorted(sums["lengths"].items())},
        "ended_share": round(sums["ended"] / max(kept, 1), 4),
        "perplexity": round(math.exp(-sums["log_prob"] / sums["written"]), 3) if sums["written"] else None,
        f"repeated_{NGRAM}gram_share": round(sums["repeated"] / max(kept, 1), 4),
    }


def distinct_shares(blocks: Tensor) -> dict[str, float]:
    """Returns the share of distinct n-grams, n from 1 to 4, in the first 4 million tokens of `blocks` [N, L]."""
    ids = blocks.flatten()[:MOST_COUNTED_TOKENS].numpy().astype(np.uint64)
    shares, keys = {}, np.zeros(len(ids), dtype=np.uint64)
    for size in range(1, 5):
        keys = keys[: len(ids) - size + 1] * np.uint64(0x9E3779B97F4A7C15) + ids[size - 1 :] + np.uint64(1)
        shares[str(size)] = round(len(np.unique(keys)) / max(len(keys), 1), 4)
    return shares

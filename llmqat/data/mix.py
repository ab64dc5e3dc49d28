"""Several sources in one text: each packed to blocks of its own, then blocks drawn from them by weight.

A weight is a share of the tokens. Sources give their blocks in their own order; which source comes next is shuffled by
the seed. Where no amount is asked for, the text ends when the first source has no more blocks for its share.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from llmqat.data.blocks import Rows, TokenBlocks
from llmqat.data.cache import load_or_make_splits
from llmqat.data.config import DataConfig, MixedSource
from llmqat.data.packing import BlockWriter, TextSplits
from llmqat.files import folder_in_progress

LoadSplits = Callable[[DataConfig], TextSplits]


def load(config: DataConfig, load_one: LoadSplits) -> TextSplits:
    """Returns the blocks of `config.mix`, mixed.

    Args:
        config: sources and weights.
        load_one: reads one of the sources.

    Raises:
        ValueError: when a source has less text than its share.
    """
    assert config.mix is not None
    loaded = [load_one(component_config(config, one)) for one in config.mix]
    weights = [one.weight / sum(entry.weight for entry in config.mix) for one in config.mix]
    # Generated text has no calibration or validation split; the other sources share these by their own weights.
    there = {name: [name in splits.given() for splits in loaded] for splits in loaded for name in splits.given()}
    parts = {
        name: [splits.given()[name] for splits, has in zip(loaded, has_one, strict=True) if has]
        for name, has_one in there.items()
    }
    settings = {
        "mix": {name: [blocks.sha256 for blocks in blocks_of] for name, blocks_of in parts.items()},
        "sources": [splits.train.source for splits in loaded],
        "weights": weights,
        "seed": config.seed,
        "tokens": config.tokens,
    }

    def make(folder: Path) -> None:
        for name, blocks_of in parts.items():
            wanted = config.wanted_blocks if name == "train" else None
            own = [weight for weight, has in zip(weights, there[name], strict=True) if has]
            shares = [weight / sum(own) for weight in own]
            _write(blocks_of, counts_of(blocks_of, shares, wanted), shares, config.seed, folder, name)

    return load_or_make_splits(settings, make)


def component_config(config: DataConfig, one: MixedSource) -> DataConfig:
    """Returns what one source of a mix is read with: its own keys, and the mix's for all others."""
    own = one.model_dump(include=one.model_fields_set - {"weight"})
    shared = {key: getattr(config, key) for key in ("block_size", "seed")}
    if one.source == "synthetic":
        shared["packing"] = "documents" if config.keeps_apart else "concatenate"
    else:
        shared |= {
            key: getattr(config, key) for key in ("packing", "num_proc", "calibration_share", "validation_share")
        }
    total = sum(entry.weight for entry in config.mix or ())
    tokens = None
    if config.wanted_blocks is not None:  # a block more than the share may be drawn, for rounding
        tokens = (int(config.wanted_blocks * one.weight / total) + 1) * config.block_size
    return DataConfig(**{**own, **shared, "source": one.source, "tokens": tokens})


def counts_of(blocks_of: Sequence[TokenBlocks], weights: Sequence[float], wanted: int | None) -> list[int]:
    """Returns how many blocks each source gives, by its weight: `wanted` in all, or as many as the sources allow.

    Raises:
        ValueError: when a source has fewer than its share.
    """
    lengths = [len(blocks) for blocks in blocks_of]
    total = wanted or int(min(length / weight for length, weight in zip(lengths, weights, strict=True)))
    counts = [int(total * weight) for weight in weights]
    largest_rest = sorted(range(len(weights)), key=lambda i: counts[i] - total * weights[i])
    for index in largest_rest[: total - sum(counts)]:
        counts[index] += 1
    if wanted is None:
        return [min(pair) for pair in zip(counts, lengths, strict=True)]
    for blocks, count in zip(blocks_of, counts, strict=True):
        if len(blocks) < count:
            raise ValueError(
                f"data.mix: {blocks.source} has {len(blocks)} blocks, and its weight asks for {count} of {wanted}; "
                "lower data.tokens or its weight"
            )
    return counts


def _write(
    blocks_of: Sequence[TokenBlocks],
    counts: Sequence[int],
    weights: Sequence[float],
    seed: int,
    folder: Path,
    name: str,
) -> None:
    """Writes the blocks in the drawn order to a file, one by one."""
    order = [index for index, count in enumerate(counts) for _ in range(count)]
    random.Random(seed).shuffle(order)
    size = blocks_of[0].block_size
    rows_of = [blocks.rows for blocks in blocks_of]
    wide = any(rows.stored.element_size() > 2 for rows in rows_of)
    done = [0] * len(blocks_of)
    with ExitStack() as stack:
        scratch = stack.enter_context(folder_in_progress(folder / "scratch"))
        writer = stack.enter_context(
            BlockWriter(
                scratch / name,
                size,
                np.int32 if wide else np.uint16,
                any(rows.scored is not None for rows in rows_of),
                any(rows.starts is not None for rows in rows_of),
            )
        )
        for index in order:
            writer.append(_arrays(rows_of[index][done[index] : done[index] + 1]), ())
            done[index] += 1
        for blocks in blocks_of:
            writer.documents.extend([] if blocks.documents is None else blocks.documents.tolist())
        shares = [f"{weight:.4g} of {blocks.source}" for weight, blocks in zip(weights, blocks_of, strict=True)]
        facts = [{"source": blocks.source, "sha256": blocks.sha256, **blocks.details} for blocks in blocks_of]
        details = {"blocks": list(counts), "sources": facts}
        writer.write(folder / f"{name}.safetensors", f"mix, seed {seed}: " + "; ".join(shares), details)


def _arrays(rows: Rows) -> dict[str, np.ndarray[Any, Any]]:
    parts = {"ids": rows.stored, "scored": rows.scored, "starts": rows.starts}
    return {name: part.numpy() for name, part in parts.items() if part is not None}

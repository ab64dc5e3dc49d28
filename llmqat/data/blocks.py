"""Token blocks: the one form in which text reaches calibration, training and evaluation.

Documents are joined into one stream, an end-of-text token after each, and the stream is cut into blocks of equal
length. Every position is text, so no mask and no padding exists anywhere behind this file.

Letters: N blocks, L tokens a block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llmqat.models import save_whole

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""


@dataclass(frozen=True)
class TokenBlocks:
    """Text as token ids, cut into blocks, and where it came from."""

    ids: Tensor
    """int64 [N, L]."""
    source: str
    """Where the text came from, in words that suffice to get it again."""
    sha256: str
    """Of the ids, as `sha256_of_ids` computes it."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the text for the run's report; plain values only."""

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.ids)

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.ids.numel()

    def dataset(self) -> Dataset[dict[str, Tensor]]:
        """Returns the blocks as samples {"input_ids", "labels"}, both int64 [L]; every position is a label."""
        return _BlockDataset(self.ids)


class _BlockDataset(Dataset[dict[str, Tensor]]):
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.ids[index]
        return {"input_ids": block, "labels": block.clone()}


def token_blocks(ids: Tensor, source: str, details: Mapping[str, Any] | None = None) -> TokenBlocks:
    """Returns `ids` [N, L] as TokenBlocks, with their hash."""
    ids = ids.contiguous()
    return TokenBlocks(ids, source, sha256_of_ids(ids), dict(details or {}))


def sha256_of_ids(ids: Tensor) -> str:
    """Returns the SHA-256 of the shape (decimal, joined by `x`) followed by the ids as little-endian int64."""
    shape = "x".join(map(str, ids.shape)).encode()
    return hashlib.sha256(shape + ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def pack_blocks(documents: Iterable[Sequence[int]], block_size: int, tokens: int | None, source: str) -> Tensor:
    """Joins tokenized documents and cuts them into blocks; what does not fill the last block is left out.

    Args:
        documents: token ids of each document, its end included; read only as far as needed.
        block_size: L, tokens a block.
        tokens: tokens wanted, rounded up to whole blocks; None for all.
        source: named in the error.

    Returns:
        int64 [N, L].

    Raises:
        ValueError: when the documents together are shorter than one block.
    """
    wanted = None if tokens is None else -(-tokens // block_size) * block_size
    stream: list[int] = []
    for document in documents:
        stream += document
        if wanted is not None and len(stream) >= wanted:
            break
    count = len(stream) // block_size
    if count == 0:
        raise ValueError(
            f"{source} has {len(stream)} tokens, and one block needs data.block_size={block_size}; "
            "give more text or a smaller block_size"
        )
    count = count if wanted is None else min(count, wanted // block_size)
    return torch.tensor(stream[: count * block_size], dtype=torch.int64).view(count, block_size)


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    """Yields each text's ids, between what the tokenizer puts before a text and its end-of-text token."""
    before = leading_ids(tokenizer)
    after = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for text in texts:
        yield before + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + after


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns what the tokenizer puts before every text: [bos] or nothing."""
    ids = list(tokenizer("")["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def save_blocks(blocks: TokenBlocks, path: Path) -> None:
    """Writes `blocks` to a safetensors file, under a temporary name first."""
    facts = {"source": blocks.source, "sha256": blocks.sha256, "details": json.dumps(dict(blocks.details))}
    save_whole(path, {"ids": blocks.ids}, facts)


def read_blocks(path: Path) -> TokenBlocks:
    """Returns what `save_blocks` wrote.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no token blocks at {path}")
    try:
        with safe_open(path, "pt") as file:
            facts, ids = file.metadata() or {}, file.get_tensor("ids")
        blocks = TokenBlocks(ids, facts["source"], facts["sha256"], json.loads(facts["details"]))
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no token blocks or is damaged: {error}; delete it and run again") from error
    if sha256_of_ids(blocks.ids) != blocks.sha256:
        raise ValueError(f"{path} is damaged: its ids do not have the recorded hash; delete it and run again")
    return blocks

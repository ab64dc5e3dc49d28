"""Token blocks: the one form in which text reaches calibration, training and evaluation.

Documents are joined into one stream, with an end-of-text token after each. The stream is cut into blocks of equal
length; packing.py has two other ways to fill blocks. Every position holds a token of the text, so there is no padding.
Two optional tensors accompany the ids:

    scored   1 where a token is a label. In conversations only the assistant's tokens are. Without it, all tokens are.
    starts   1 where a document begins. Position ids then restart there, and transformers limits attention to
             documents by them. A document's first token is no label. Without it, a block is one text.

On disk, blocks are safetensors files. Packed text stores ids in 16 bits where the vocabulary allows, otherwise in 32.
Files are memory-mapped, so only the blocks that are read take memory.

Letters: N blocks, L tokens a block, M documents.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llmqat.metrics import IGNORED_LABEL
from llmqat.models import save_whole, uploaded

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""

CHUNK = 1 << 22
"""Tokens that are hashed or copied at a time."""
MOST_RECORDED_DOCUMENTS = 16_384
"""Hashes of documents that a run's record lists; of more documents, those with the smallest hashes."""


@dataclass(frozen=True)
class Rows:
    """Blocks as a model takes them, or some of them."""

    stored: Tensor
    """Token ids [N, L] of any integer type, perhaps mapped from a file."""
    scored: Tensor | None = None
    """uint8 [N, L]: 1 where a token is a label. None: everywhere."""
    starts: Tensor | None = None
    """uint8 [N, L]: 1 where a document begins. None: a block is one text."""

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.stored)

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        """Returns some of the blocks; slices of mapped ones are mapped as well."""
        others = (None if part is None else part[rows] for part in (self.scored, self.starts))
        return Rows(self.stored[rows], *others)

    @property
    def ids(self) -> Tensor:
        """Token ids, int64 [N, L]: a copy where they are stored in fewer bits, so take a slice of many first."""
        return self.stored.to(torch.int64)

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Returns what the forward takes: "input_ids", and "position_ids" where documents are kept apart; int64."""
        inputs = {"input_ids": uploaded(self.stored, device, torch.int64)}
        if self.starts is not None:
            inputs["position_ids"] = positions(uploaded(self.starts, device))
        return inputs

    def labels(self) -> Tensor:
        """Returns the ids that the loss is taken on, int64 [N, L], and -100 elsewhere."""
        labels = self.stored.to(torch.int64, copy=True)
        if self.scored is not None:
            labels.masked_fill_(self.scored == 0, IGNORED_LABEL)
        if self.starts is not None:  # what stands before belongs to another document
            labels.masked_fill_(self.starts == 1, IGNORED_LABEL)
        return labels


def rows_of(blocks: Tensor | Rows) -> Rows:
    """Returns `blocks` as Rows; a tensor of ids [N, L] has neither labels nor documents of its own."""
    return Rows(blocks) if isinstance(blocks, Tensor) else blocks


def positions(starts: Tensor) -> Tensor:
    """Returns position ids int64 [N, L] that begin anew where `starts` [N, L] is 1, and with each block."""
    index = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return index - torch.where(starts == 1, index, 0).cummax(1).values


@dataclass(frozen=True)
class TokenBlocks:
    """Text as token ids, cut into blocks, and where it came from."""

    rows: Rows
    """The blocks."""
    source: str
    """Where the text came from, in words that suffice to get it again."""
    sha256: str
    """Of the blocks, as `sha256_of_rows` computes it."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the text for the run's report; plain values only."""
    documents: Tensor | None = None
    """First 64 bits of the SHA-256 of each document, int64 [M], sorted; None where they are not known."""
    file: Path | None = None
    """Where the blocks are mapped from."""

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.rows)

    @property
    def ids(self) -> Tensor:
        """Token ids, int64 [N, L]; a copy in memory where they are mapped from a file: `rows` are not."""
        return self.rows.ids

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.rows.stored.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.rows.stored.numel()

    def dataset(self) -> Dataset[dict[str, Tensor]]:
        """Returns the blocks as samples {"input_ids", "labels"}, int64 [L], and "position_ids" with documents apart."""
        return _BlockDataset(self.rows)

    def record(self) -> dict[str, Any]:
        """Returns the facts that a run's record holds: source, hash, tokens, and hashes of the documents."""
        facts = {"source": self.source, "sha256": self.sha256, "tokens": self.tokens, **self.details}
        if self.documents is not None:
            hashes = self.documents[:MOST_RECORDED_DOCUMENTS].tolist()
            facts["document_hashes"] = {"count": len(self.documents), "hashes": " ".join(map(hash_text, hashes))}
        return facts


def hash_text(document: int) -> str:
    """Returns a document's 64-bit hash in 16 hexadecimal digits, as `llmqat.json` lists it."""
    return f"{document & (2**64 - 1):016x}"


def hash_number(text: str) -> int:
    """Returns the document's hash, signed, that `hash_text` has written."""
    number = int(text, 16)
    return number - 2**64 if number >= 2**63 else number


class _BlockDataset(Dataset[dict[str, Tensor]]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        row = self.rows[index : index + 1]
        return {name: tensor[0] for name, tensor in {**row.inputs(), "labels": row.labels()}.items()}


def token_blocks(blocks: Tensor | Rows, source: str, details: Mapping[str, Any] | None = None) -> TokenBlocks:
    """Returns `blocks`, or ids [N, L], as TokenBlocks, with their hash."""
    rows = rows_of(blocks.contiguous() if isinstance(blocks, Tensor) else blocks)
    return TokenBlocks(rows, source, sha256_of_rows(rows), dict(details or {}))


# The hash


def sha256_of_rows(rows: Rows) -> str:
    """Returns the SHA-256 of the shape (decimal, joined by `x`) followed by the ids as little-endian int64.

    Where there are labels or documents, `scored` and `starts` follow, each its name and then a byte a token.
    """
    parts = {"ids": rows.stored, "scored": rows.scored, "starts": rows.starts}
    given = {name: _chunks(part) for name, part in parts.items() if part is not None}
    return sha256_of_chunks(tuple(rows.stored.shape), given)


def sha256_of_chunks(shape: tuple[int, ...], parts: Mapping[str, Iterable[np.ndarray[Any, Any]]]) -> str:
    """Returns the hash of `sha256_of_rows` from parts that come a chunk at a time: ids first, then scored, starts."""
    digest = hashlib.sha256("x".join(map(str, shape)).encode())
    for name, chunks in parts.items():
        if name != "ids":
            digest.update(name.encode())
        for chunk in chunks:
            digest.update(chunk.astype("<i8" if name == "ids" else "u1").tobytes())
    return digest.hexdigest()


def _chunks(tensor: Tensor) -> Iterator[np.ndarray[Any, Any]]:
    for part in tensor.reshape(-1).split(CHUNK):
        yield part.cpu().numpy()


# Files

PARTS = ("ids", "scored", "starts")
_TYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64, "U8": np.uint8}
"""safetensors' names of the types that blocks are stored in."""


def save_blocks(blocks: TokenBlocks, path: Path) -> None:
    """Writes `blocks` to a safetensors file, under a temporary name first; a file they are mapped from is linked."""
    if blocks.file is not None and blocks.file.is_file():
        _link(blocks.file, path)
        return
    rows = blocks.rows
    parts = {"ids": rows.stored, "scored": rows.scored, "starts": rows.starts, "documents": blocks.documents}
    save_whole(path, {name: part for name, part in parts.items() if part is not None}, metadata_of(blocks))


def metadata_of(blocks: TokenBlocks) -> dict[str, str]:
    """Returns the facts that stand in the header of a file of blocks."""
    return {"source": blocks.source, "sha256": blocks.sha256, "details": json.dumps(dict(blocks.details))}


def _link(source: Path, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)  # neither file is ever changed in place
    except OSError:  # another file system
        shutil.copyfile(source, temporary)
    temporary.replace(path)


def read_blocks(path: Path) -> TokenBlocks:
    """Returns what `save_blocks` wrote, mapped from the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no token blocks at {path}")
    try:
        with safe_open(path, "pt") as file:
            facts, names = file.metadata() or {}, set(file.keys())
            ids, *others = (file.get_tensor(name) if name in names else None for name in (*PARTS, "documents"))
        if ids is None:
            raise KeyError("ids")
        rows = Rows(ids, *others[:2])
        blocks = TokenBlocks(rows, facts["source"], facts["sha256"], json.loads(facts["details"]), others[2], path)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no token blocks or is damaged: {error}; delete it and run again") from error
    if _sha256_of_file(path) != blocks.sha256:
        raise ValueError(f"{path} is damaged: its ids do not have the recorded hash; delete it and run again")
    return blocks


def _sha256_of_file(path: Path) -> str:
    """Returns the hash of the blocks in a file, read piece by piece: pages of a mapping would count as memory."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    parts = {
        name: file_chunks(path, 8 + size + header[name]["data_offsets"][0], _TYPES[header[name]["dtype"]], header)
        for name in PARTS
        if name in header
    }
    return sha256_of_chunks(tuple(header["ids"]["shape"]), parts)


def file_chunks(path: Path, offset: int, dtype: Any, header: Mapping[str, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Yields the numbers of one part of a file of blocks, `CHUNK` at a time."""
    left = int(np.prod(header["ids"]["shape"]))
    with path.open("rb") as file:
        file.seek(offset)
        while left > 0:
            chunk = np.fromfile(file, dtype, min(left, CHUNK))
            left -= len(chunk)
            yield chunk
            if not len(chunk):
                return


# What a tokenizer puts around a text


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns what the tokenizer puts before every text: [bos] or nothing."""
    ids = list(tokenizer("")["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns what stands after every text: the end-of-text token, where the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]

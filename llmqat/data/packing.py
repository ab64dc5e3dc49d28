"""Packs tokenized documents into blocks on disk, one file per split, without holding the text in memory.

Only the block being filled is held, and at first up to FEW_DOCUMENTS conversations, until it is known whether there
are more. Each document goes to one split (training, calibration or validation) by its hash and the seed. So the same
text is never in two splits, in whatever file or order it comes. With few conversations, a draw for each could hold
out one of forty, or none. So these are ordered by that hash, and each split gets its share, rounded. Tokens at the end
of a split that fill no block are left out, and so is a block without any label.

Two splits are filled in another way. With `packing: whole`, a document that does not fit the rest of a block begins a
new one. Held-out answers have a row for each conversation. In both, a block is filled up by repeating its own tokens;
the repeated tokens are no labels. A document longer than a block has several rows. Each label counts in one of them
only, preceded by as much of the document as fits.

    pieces -> ids -> split -> raw files -> one safetensors file a split, under a temporary name until it is whole
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llmqat.data.blocks import CHUNK, PARTS, Progress, Rows, TokenBlocks, read_blocks, sha256_of_chunks
from llmqat.data.config import DataConfig
from llmqat.data.documents import DocumentSource, Encoded, encoded
from llmqat.files import folder_in_progress

log = logging.getLogger(__name__)

TRAIN, CALIBRATION, VALIDATION = "train", "calibration", "validation"
Filling = Literal["joined", "whole", "alone"]
"""How documents fill blocks: one after the other, none cut that fits, or each in a block of its own."""
_NAMES = {np.dtype(np.uint16): "U16", np.dtype(np.int32): "I32", np.dtype(np.int64): "I64", np.dtype(np.uint8): "U8"}


@dataclass(frozen=True)
class TextSplits:
    """A run's text; no document is in two of the three."""

    train: TokenBlocks
    """What is trained on, and calibrated on where `calibration` is None."""
    calibration: TokenBlocks | None = None
    """What is calibrated on alone."""
    validation: TokenBlocks | None = None
    """What the trainer's evaluation loss is measured on."""

    @property
    def calibrated_on(self) -> TokenBlocks:
        """The split that is calibrated on."""
        return self.train if self.calibration is None else self.calibration

    def given(self) -> dict[str, TokenBlocks]:
        """Returns the splits that there are, by name."""
        named = {TRAIN: self.train, CALIBRATION: self.calibration, VALIDATION: self.validation}
        return {name: blocks for name, blocks in named.items() if blocks is not None}

    def record(self) -> dict[str, Any]:
        """Returns the facts that a run's record holds: `text`, and `calibration_text`, `validation_text` if given."""
        return {"text" if name == TRAIN else f"{name}_text": blocks.record() for name, blocks in self.given().items()}


FEW_DOCUMENTS, FEW_TOKENS = 1000, 1 << 20
"""Up to so many conversations, of so many tokens together, are counted before they are split."""
LEAST_HELD_OUT = 2
"""Conversations: of one, no interval can be given."""


def split_of(document: int, seed: int, calibration: float, validation: float) -> str:
    """Returns the split that a document of this hash belongs to, given the shares of the other two splits."""
    place = _place(document, seed)
    if place < validation:
        return VALIDATION
    return CALIBRATION if place < validation + calibration else TRAIN


def _place(document: int, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{document}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def splits_of_few(documents: Iterable[int], seed: int, calibration: float, validation: float) -> dict[int, str]:
    """Returns the split of each of few documents, such that every split has its share of them, as near as can be."""
    ordered = sorted(set(documents), key=lambda document: _place(document, seed))
    count = len(ordered)
    held_out = min(max(round(validation * count), LEAST_HELD_OUT if validation else 0), max(count - 1, 0))
    calibrated = min(max(round(calibration * count), 1 if calibration else 0), max(count - 1 - held_out, 0))
    names = [VALIDATION] * held_out + [CALIBRATION] * calibrated
    return dict(zip(ordered, names + [TRAIN] * (count - len(names)), strict=True))


def _with_splits(pieces: Iterable[Encoded], config: DataConfig, labelled: bool) -> Iterator[tuple[Encoded, str]]:
    """Yields each piece with its split; of conversations, the first are held until it is known whether they are few."""
    shares = shares_as_arguments(config)
    waiting: list[Encoded] = []
    tokens, counts = 0, labelled and any(shares.values())
    for piece in pieces:
        if counts:
            waiting.append(piece)
            tokens += len(piece.ids)
            counts = len(waiting) <= FEW_DOCUMENTS and tokens <= FEW_TOKENS
            if counts:
                continue
        for one in waiting or [piece]:
            yield one, split_of(one.document, config.seed, **shares)
        waiting = []
    found = splits_of_few((one.document for one in waiting), config.seed, **shares)
    for one in waiting:
        yield one, found[one.document]


def pack(
    source: DocumentSource,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Reads `source` once and leaves a file of blocks for each split of `config` in `folder`.

    Reading ends when the training split has the tokens wanted.

    Raises:
        ValueError: when a split is shorter than one block, or a document cannot be read.
    """
    shares = {CALIBRATION: config.calibration_share, VALIDATION: config.validation_share}
    splits = [TRAIN, *(name for name, share in shares.items() if share)]
    most = config.wanted_blocks
    with ExitStack() as stack:
        scratch = stack.enter_context(folder_in_progress(folder / "scratch"))
        dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
        apart = config.keeps_apart
        packers = {
            name: stack.enter_context(
                BlockWriter(
                    scratch / name, config.block_size, dtype, source.labelled, apart, _filling(name, source, config)
                )
            )
            for name in splits
        }
        done = 0
        pieces = encoded(source.pieces(), tokenizer, config.num_proc)
        for piece, name in _with_splits(pieces, config, source.labelled):
            packers[name].add(piece, most if name == TRAIN else None)
            done += len(piece.ids)
            if progress is not None:
                progress(done, max(done, config.tokens or 0))
            if most is not None and packers[TRAIN].blocks >= most:
                break
        for name, packer in packers.items():
            packer.finish(most if name == TRAIN else None)
            _check_length(packer, source, config, name)
            packer.write(folder / f"{name}.safetensors", source.name, source.details)


def _filling(name: str, source: DocumentSource, config: DataConfig) -> Filling:
    if name == VALIDATION and source.labelled:
        return "alone"
    return "whole" if config.packing == "whole" else "joined"


def shares_as_arguments(config: DataConfig) -> dict[str, float]:
    """Returns the shares of a configuration as `split_of` takes them."""
    return {"calibration": config.calibration_share, "validation": config.validation_share}


def _check_length(packer: BlockWriter, source: DocumentSource, config: DataConfig, name: str) -> None:
    if packer.blocks:
        wanted = config.wanted_blocks
        if name == TRAIN and wanted is not None and packer.blocks < wanted:
            log.warning(
                "%s: data.tokens=%s asks for %d blocks of %d tokens, and the text has %d",
                *(source.name, config.tokens, wanted, config.block_size, packer.blocks),
            )
        return
    if packer.tokens and packer.filling != "joined":
        raise ValueError(f"{source.name}: no token of its {name} split is a label; is there an answer in the data?")
    if name != TRAIN:
        share = f"data.{name}_share={getattr(config, f'{name}_share')}"
        raise ValueError(
            f"{source.name}: {share} leaves {packer.tokens} tokens for {name}, and one block needs "
            f"data.block_size={config.block_size}; give more documents or a larger share"
        )
    if packer.tokens >= config.block_size:
        raise ValueError(f"{source.name}: no block has a token that is a label; is there an answer in the data?")
    raise ValueError(
        f"{source.name} has {packer.tokens} tokens, and one block needs data.block_size={config.block_size}; "
        "give more text or a smaller block_size"
    )


def read_splits(folder: Path) -> TextSplits:
    """Returns the splits that `pack` left in `folder`, mapped from there."""
    found = {
        name: read_blocks(folder / f"{name}.safetensors")
        for name in (TRAIN, CALIBRATION, VALIDATION)
        if name == TRAIN or (folder / f"{name}.safetensors").is_file()
    }
    return TextSplits(**found)


def cuts_of(piece: Encoded, size: int) -> Iterator[Encoded]:
    """Yields a document in parts of at most `size` tokens; each token is a label in at most one part.

    A document that fits is one part. Otherwise all parts have `size` tokens. A later part begins with tokens that
    earlier parts had as well: these are context and no labels.
    """
    scored = np.ones(len(piece.ids), np.uint8) if piece.scored is None else piece.scored
    yield Encoded(piece.ids[:size], scored[:size], piece.document, piece.first)
    for done in range(size, len(piece.ids), size - 1):  # the first token of a part is never predicted
        end = min(done + size - 1, len(piece.ids))
        own = scored[end - size : end].copy()
        own[: size - (end - done)] = 0
        yield Encoded(piece.ids[end - size : end], own, piece.document, first=True)


def rows_alone(pieces: Iterable[Encoded], size: int, most_tokens: int | None = None) -> Rows:
    """Returns documents as rows [N, L] of their own: ids int32, scored uint8; rows without a label are left out.

    L is the length of the longest row. Shorter rows are filled up by repeating their tokens, which are no labels there.

    Args:
        pieces: the documents, each in one piece.
        size: most tokens in a row; longer documents have several rows.
        most_tokens: no document is added that would bring all rows above so many tokens; the first one with a label is
            always added.
    """
    kept: list[Encoded] = []
    tokens = 0
    for piece in pieces:
        own = [cut for cut in cuts_of(piece, size) if cut.scored is not None and cut.scored[1:].any()]
        tokens += sum(len(cut.ids) for cut in own)
        if kept and most_tokens is not None and tokens > most_tokens:
            break
        kept += own
    longest = max((len(cut.ids) for cut in kept), default=0)
    filled = [_filled({"ids": cut.ids, "scored": cut.scored}, longest) for cut in kept]
    shape = (len(kept), longest)
    ids, scored = (
        np.concatenate([row[name] for row in filled] or [np.empty(0)]).reshape(shape) for name in ("ids", "scored")
    )
    return Rows(torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(scored.astype(np.uint8)))


def _filled(parts: Mapping[str, Any], size: int) -> dict[str, np.ndarray[Any, Any]]:
    """Returns parts of a block, repeated up to `size` tokens; what is repeated is no label."""
    found = {name: np.resize(part, size) for name, part in parts.items()}
    found["scored"][len(parts["ids"]) :] = 0
    return found


class BlockWriter:
    """Fills blocks and appends them to raw files; a context that closes them."""

    def __init__(
        self, folder: Path, block_size: int, dtype: Any, labelled: bool, apart: bool, filling: Filling = "joined"
    ) -> None:
        self.block_size = block_size
        self.filling = filling
        self.types: dict[str, Any] = {"ids": dtype}
        self.types |= {"scored": np.uint8} if labelled or filling != "joined" else {}
        self.types |= {"starts": np.uint8} if apart else {}
        self.blocks = 0
        self.tokens = 0
        self.documents = array("q")
        self._waiting: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in self.types}
        self._length = 0
        self._begun: list[int] = []  # documents in the block that is being filled
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> BlockWriter:
        self._folder.mkdir()
        self._files = {name: (self._folder / name).open("wb") for name in self.types}
        return self

    def __exit__(self, *failure: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, piece: Encoded, most: int | None) -> None:
        """Takes a piece in; writes the blocks that are full, `most` of them in all."""
        self.tokens += len(piece.ids)
        if self.filling == "joined":
            self._add(piece, most)
            return
        for cut in cuts_of(piece, self.block_size):
            if self.filling == "alone" or self._length + len(cut.ids) > self.block_size:
                self.finish(most)
            self._add(cut._replace(first=True), most)

    def finish(self, most: int | None) -> None:
        """Fills the last block and writes it; where documents are joined, what fills no block is left out."""
        if self.filling == "joined" or not self._length:
            return
        whole = _filled({name: np.concatenate(parts) for name, parts in self._waiting.items()}, self.block_size)
        self._waiting = {name: [part] for name, part in whole.items()}
        self._length = self.block_size
        self._write(most)

    def _add(self, piece: Encoded, most: int | None) -> None:
        size = len(piece.ids)
        parts = {"ids": piece.ids, "scored": piece.scored, "starts": None}
        if "starts" in self.types:
            parts["starts"] = (np.arange(size) == 0).astype(np.uint8) * np.uint8(piece.first)
        for name, dtype in self.types.items():
            part = parts[name]
            self._waiting[name].append(np.ones(size, dtype) if part is None else part.astype(dtype))
        self._begun.append(piece.document)
        self._length += size
        if self._length >= self.block_size:
            self._write(most)

    def _write(self, most: int | None) -> None:
        count = self._length // self.block_size
        whole = {name: np.concatenate(parts) for name, parts in self._waiting.items()}
        rows = {name: part[: count * self.block_size].reshape(count, -1) for name, part in whole.items()}
        learnt = np.ones((count, self.block_size), bool)
        if "scored" in rows:
            learnt &= rows["scored"] == 1
        if "starts" in rows:
            learnt &= rows["starts"] == 0
        kept = learnt[:, 1:].any(axis=1)
        if most is not None:
            kept &= np.cumsum(kept) <= most - self.blocks
        self.append({name: part[kept] for name, part in rows.items()}, self._begun)
        self._waiting = {name: [part[count * self.block_size :]] for name, part in whole.items()}
        self._length -= count * self.block_size
        self._begun = self._begun[-1:] if self._length else []

    def append(self, rows: Mapping[str, np.ndarray[Any, Any]], documents: Iterable[int]) -> None:
        """Writes whole blocks.

        Args:
            rows: arrays [N, L] named "ids", "scored" and "starts". Without "scored" every token is a label; without
                "starts" each block is one document.
            documents: hashes of the documents in them.
        """
        count = len(rows["ids"])
        for name, dtype in self.types.items():
            part = rows.get(name)
            if part is None:
                part = np.full((count, self.block_size), name == "scored", dtype)
                part[:, 0] |= name == "starts"
            self._files[name].write(part.astype(dtype).tobytes())
        self.blocks += count
        self.documents.extend(documents)

    def write(self, path: Path, source: str, details: Mapping[str, Any]) -> None:
        """Writes the blocks as the safetensors file `path`."""
        for file in self._files.values():
            file.close()
        documents = np.unique(np.frombuffer(self.documents, np.int64) if self.documents else np.empty(0, np.int64))
        documents.tofile(self._folder / "documents")
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self.types, (self.blocks, self.block_size))
        raw = {name: self._folder / name for name in (*self.types, "documents")}
        types = {**{name: np.dtype(dtype) for name, dtype in self.types.items()}, "documents": np.dtype(np.int64)}
        digest = sha256_of_chunks(
            shapes["ids"], {name: _read_raw(raw[name], types[name]) for name in PARTS if name in self.types}
        )
        facts = {"source": source, "sha256": digest, "details": json.dumps(dict(details))}
        write_safetensors(path, raw, types, {**shapes, "documents": (len(documents),)}, facts)


def _read_raw(path: Path, dtype: Any) -> Iterator[np.ndarray[Any, Any]]:
    with path.open("rb") as file:
        while len(chunk := np.fromfile(file, dtype, CHUNK)):
            yield chunk


def write_safetensors(
    path: Path,
    raw: Mapping[str, Path],
    types: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
) -> None:
    """Writes `raw` files as one safetensors file, without holding any in memory.

    The format: the header's length in 8 bytes, the header in JSON, the tensors one after the other.

    Args:
        path: the file.
        raw: little-endian numbers of each tensor; those with the widest type first, so that each is aligned.
        types: numpy dtype of each.
        shapes: of each.
        metadata: text that the header carries.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = sorted(raw, key=lambda name: -types[name].itemsize)
    place = 0
    for name in names:
        size = raw[name].stat().st_size
        offsets = [place, place + size]
        header[name] = {"dtype": _NAMES[types[name]], "shape": list(shapes[name]), "data_offsets": offsets}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            with raw[name].open("rb") as part:
                shutil.copyfileobj(part, file, CHUNK)

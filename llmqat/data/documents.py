"""Documents on their way to token ids: read piece by piece, tokenized by several processes, given back in order.

A source opens as a `DocumentSource`: a name, a hash of the content where it is known before it is tokenized, and an
iterator of pieces. A piece is a short document, a conversation, or a part of a document that is too long to be
tokenized at once, cut behind a blank line where there is one; a token at such a cut may differ from that of the whole.
What is not tokenized yet and what waits for its turn is bounded, so memory does not grow with the text.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmqat.data.blocks import closing_ids, leading_ids
from llmqat.data.chat import Chat, Completion, encode_chat, encode_completion, render_chat

LONGEST_PIECE = 1 << 21
"""Characters that are tokenized at once."""
BATCH_CHARACTERS = 1 << 18
"""Characters of the pieces that a process is given at a time; a longer piece is given alone."""
WAITING_BATCHES = 2
"""Batches a process that are read ahead."""


class Piece(NamedTuple):
    """A document, or a part of one."""

    content: str | Chat | Completion
    document: int
    """First 64 bits of the SHA-256 of the whole document, signed."""
    first: bool = True
    """Whether the document begins with it."""
    last: bool = True
    """Whether the document ends with it."""
    all_labels: bool = False
    """Whether all tokens of a conversation, or of a prompt with its completion, are labels, not the answers alone."""


class Encoded(NamedTuple):
    """A piece as token ids."""

    ids: np.ndarray[Any, Any]
    """int32 [tokens]."""
    scored: np.ndarray[Any, Any] | None
    """uint8 [tokens], 1 where a token is a label; None for all."""
    document: int
    first: bool


@dataclass(frozen=True)
class DocumentSource:
    """Text that has been found but not been read."""

    name: str
    """Where it comes from, in words that suffice to get it again."""
    pieces: Callable[[], Iterator[Piece]]
    """Reads it, from its beginning at each call."""
    fingerprint: str | None
    """Changes when the content does; None where that cannot be told before all is read."""
    labelled: bool = False
    """Whether some tokens are no labels."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Facts for the run's report."""


def document_hash(content: str | bytes) -> int:
    """Returns the first 64 bits of the SHA-256 of a document (text as UTF-8), signed."""
    return signed(hashlib.sha256(content.encode() if isinstance(content, str) else content))


def signed(digest: Any) -> int:
    """Returns the first 64 bits of a hashlib digest as a signed number."""
    return int.from_bytes(digest.digest()[:8], "big", signed=True)


def pieces_of(texts: Iterable[str], document: int) -> Iterator[Piece]:
    """Yields one document, whose text comes in parts, as pieces of at most LONGEST_PIECE characters."""
    first, waiting = True, ""
    for text in texts:
        waiting += text
        while len(waiting) > LONGEST_PIECE:
            end = _cut(waiting)
            yield Piece(waiting[:end], document, first, last=False)
            first, waiting = False, waiting[end:]
    yield Piece(waiting, document, first)


def _cut(text: str) -> int:
    """Returns where to cut: behind the last blank line, line or word that begins in LONGEST_PIECE characters."""
    for separator in ("\n\n", "\n", " "):
        end = text.rfind(separator, LONGEST_PIECE // 2, LONGEST_PIECE)
        if end != -1:
            return end + (len(separator) if separator.strip(" ") else 0)  # a space belongs to the word behind it
    return LONGEST_PIECE


# Tokenization


@dataclass(frozen=True)
class _Encoder:
    """A tokenizer, and what it puts around a text."""

    tokenizer: PreTrainedTokenizerBase
    before: list[int]
    after: list[int]

    def __call__(self, pieces: list[Piece]) -> list[Encoded]:
        """Returns the pieces as ids."""
        texts = [piece.content for piece in pieces if isinstance(piece.content, str)]
        ids = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        return [self._encoded(piece, ids) for piece in pieces]

    def _encoded(self, piece: Piece, ids: Iterator[list[int]]) -> Encoded:
        scored: list[int] | None = None
        if isinstance(piece.content, Chat) and piece.all_labels:
            text = render_chat(piece.content, self.tokenizer)
            found = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        elif isinstance(piece.content, Chat):
            found, scored = encode_chat(piece.content, self.tokenizer)
        elif isinstance(piece.content, Completion):
            found, scored = encode_completion(piece.content, self.tokenizer, self.before, self.after)
        else:
            found = (self.before if piece.first else []) + next(ids) + (self.after if piece.last else [])
        marks = None if scored is None or piece.all_labels else np.array(scored, np.uint8)
        return Encoded(np.array(found, np.int32), marks, piece.document, piece.first)


def encoded(pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, num_proc: int = 1) -> Iterator[Encoded]:
    """Yields the pieces as ids, in their order whatever `num_proc`, the number of processes that tokenize."""
    encoder = _Encoder(tokenizer, leading_ids(tokenizer), closing_ids(tokenizer))
    batches = _batches(pieces)
    if num_proc == 1:
        for batch in batches:
            yield from encoder(batch)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None  # shares what is loaded already
    context = multiprocessing.get_context(method)
    waiting: deque[Future[list[Encoded]]] = deque()
    with ProcessPoolExecutor(num_proc, context, initializer=_start, initargs=(encoder,)) as processes:
        try:
            for batch in batches:
                waiting.append(processes.submit(_encode, batch))
                if len(waiting) > WAITING_BATCHES * num_proc:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:  # whoever reads has enough
            for future in waiting:
                future.cancel()


_encoder: _Encoder | None = None


def _start(encoder: _Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    _encoder = encoder


def _encode(pieces: list[Piece]) -> list[Encoded]:
    assert _encoder is not None
    return _encoder(pieces)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        length = len(piece.content) if isinstance(piece.content, str) else piece.content.size
        if batch and size + length > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += length
    if batch:
        yield batch


def encoding_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of all that decides on ids: vocabulary, merges, chat template, special tokens."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if hasattr(backend, "to_str") else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    around = [leading_ids(tokenizer), closing_ids(tokenizer), type(tokenizer).__name__, str(tokenizer.chat_template)]
    return hashlib.sha256("\0".join([model, *map(str, around)]).encode()).hexdigest()

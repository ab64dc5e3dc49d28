"""Text that the model writes itself, for distillation without any data.

A document begins with one token drawn uniformly from the vocabulary (special tokens left out), goes on with 2 to 4 most
likely tokens, and is then sampled from the model's unchanged distribution (temperature 1, top_p 1, top_k off) until the
model ends it. Ids are kept as drawn: nothing is decoded and tokenized again. For a model with a chat template, a share
of the documents begins with the template up to an empty user turn instead: the model writes the user's words, then the
template's opening of the answer is put in, and it writes the answer.

Rows of the batch are *tapes* as long as a block. When a document ends, the next one begins on the same tape; it does
not see what lies before it (see `decode.py`). So every step of every row writes text, and a tape is a block. Documents
that end at once or repeat themselves are dropped; tapes without a loss are blocks as they are, and what is left of the
others is joined and cut anew.

Source: LLM-QAT, arXiv 2305.17888, section 3.1 (start token, greedy tokens, then sampling). Deviations: 2 to 4 greedy
tokens instead of 3 to 5, documents packed, degenerate ones dropped, chat documents (after Magpie, arXiv 2406.08464).

Letters: B rows, L tokens a tape, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data.blocks import Progress, TokenBlocks, leading_ids, token_blocks
from llmqat.data.config import DEFAULT_SYNTHETIC_TOKENS, DataConfig
from llmqat.data.decode import open_decoder, sample

MOST_GREEDY_TOKENS = 4
FEWEST_GREEDY_TOKENS = 2
FEWEST_WRITTEN_TOKENS = 8
"""A document that the model ends after fewer tokens of its own is dropped."""
NGRAM = 4
MOST_REPEATED = 0.5
"""A document is dropped if more than this share of its n-grams have occurred in it before."""
EXPECTED_LOSS = 0.02
"""Share of tokens expected to be dropped; so much more is written in the first round."""
MOST_FRUITLESS_ROUNDS = 3
CACHE_BYTES = 4 * 2**30
"""Keys and values of a round take no more; a large model writes fewer rows at once."""


def load(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> TokenBlocks:
    """Returns blocks that `model` has written, as `config` says.

    Raises:
        ValueError: without a model, and as `synthesize`.
    """
    if model is None:
        raise ValueError("data.source='synthetic' needs the model that writes the text; pass model=")
    return synthesize(
        model,
        tokenizer,
        tokens=config.tokens or DEFAULT_SYNTHETIC_TOKENS,
        block_size=config.block_size,
        seed=config.seed,
        batch_size=config.batch_size,
        chat_share=config.chat_share,
        progress=progress,
    )


def synthesize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    block_size: int = 512,
    seed: int = 0,
    batch_size: int = 256,
    chat_share: float = 0.25,
    progress: Progress | None = None,
) -> TokenBlocks:
    """Returns text written by `model` itself, as token blocks.

    The same model, arguments, processor and versions give the same text.

    Args:
        model: causal language model; its training mode is restored.
        tokenizer: of the model.
        tokens: wanted, rounded up to whole blocks.
        block_size: L, tokens a block and at most a document.
        seed: of everything that is drawn.
        batch_size: most rows decoded at once; part of what makes the text. Fewer where the key-value cache would take
            more than CACHE_BYTES.
        chat_share: share of documents that are chats, if the tokenizer has a chat template.
        progress: called with (tokens written, tokens to write) after each step.

    Raises:
        ValueError: when the model cannot hold block_size tokens, or all it writes is degenerate.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and block_size > longest:
        raise ValueError(f"data.block_size={block_size} is more than the model's context of {longest} tokens")
    script = _Script.of(model, tokenizer, chat_share)
    wanted = -(-tokens // block_size)
    batch_size = min(batch_size, max(CACHE_BYTES // (cache_bytes_per_token(model) * block_size), 1))
    draw = random.Random(seed)
    written: list[_Document] = []
    rows_of_rounds: list[int] = []
    begun = time.perf_counter()
    blocks = torch.empty(0, block_size, dtype=torch.int64)
    while len(blocks) < wanted:
        if len(rows_of_rounds) >= MOST_FRUITLESS_ROUNDS and len(blocks) == 0:
            reasons = Counter(document.fault for document in written)
            raise ValueError(f"the model writes nothing usable, documents by fault: {dict(reasons)}; is it trained?")
        for rows in _rounds(wanted - len(blocks), batch_size):
            done = sum(rows_of_rounds) * block_size
            watch = _Watch(progress, done, max(wanted * block_size, done + rows * block_size))
            written += _write_tapes(model, script, rows, block_size, draw, len(rows_of_rounds), watch)
            rows_of_rounds.append(rows)
        blocks = _assemble(written, block_size)
    seconds = time.perf_counter() - begun
    details = _report(written, blocks[:wanted], sum(rows_of_rounds) * block_size, seconds)
    name = model.config._name_or_path or type(model).__name__
    rows_text = "+".join(map(str, rows_of_rounds))
    source = f"synthesized by {name}: {tokens} tokens, seed {seed}, rows {rows_text}, chat share {script.chat_share:g}"
    return token_blocks(blocks[:wanted], source, details)


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Returns the bytes that keys and values of one token take."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


@dataclass(frozen=True)
class _Script:
    """What is put into documents rather than written by the model, and what ends them."""

    before: list[int]
    """Ids before every plain document: [bos] or nothing."""
    start_tokens: list[int]
    """Ids that a plain document may begin with."""
    ends: frozenset[int]
    """Ids that end a document."""
    chat_share: float
    user_opening: list[int]
    """Chat template up to the user's words."""
    answer_opening: list[int]
    """Chat template from after the user's words to the answer; its first id ends the user's turn."""

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_share: float) -> _Script:
        special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        size = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
        can_chat = chat_share > 0 and tokenizer.chat_template is not None
        user, answer = _chat_openings(tokenizer) if can_chat else ([], [])
        ends = {tokenizer.eos_token_id}
        for config in (model.config, model.generation_config):
            found = getattr(config, "eos_token_id", None)
            ends |= set(found) if isinstance(found, Sequence) else {found}
        if answer and answer[0] in special:
            ends.add(answer[0])
        return cls(
            before=leading_ids(tokenizer),
            start_tokens=[i for i in range(size) if i not in special],
            ends=frozenset(ends - {None}),
            chat_share=chat_share if can_chat else 0.0,
            user_opening=user,
            answer_opening=answer,
        )


def _chat_openings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the ids before and after a user's words in the chat template, the opening of the answer included."""
    mark = "USERWORDS"
    messages = [{"role": "user", "content": mark}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, found, after = text.partition(mark)
    if not found or not before or not after:
        raise ValueError("the chat template does not enclose the user's words; set data.chat_share=0")
    first, last = (list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after))
    return first, last


@dataclass(frozen=True)
class _Document:
    tape: tuple[int, int]
    """Round and row."""
    ids: list[int]
    kind: str
    """`plain` or `chat`."""
    fault: str | None
    """Why it is dropped, or None."""


@dataclass(frozen=True)
class _Watch:
    """Passes progress on, counted from what earlier rounds have written."""

    progress: Progress | None
    done: int
    total: int

    def __call__(self, written: int) -> None:
        if self.progress is not None:
            self.progress(self.done + written, self.total)


def _rounds(blocks: int, batch_size: int) -> list[int]:
    """Returns the rows of each round that together should give `blocks` blocks: as equal as can be."""
    rows = -int(-blocks * (1 + EXPECTED_LOSS) // 1)
    rounds = -(-rows // batch_size)
    return [rows // rounds + (index < rows % rounds) for index in range(rounds)]


class _Tapes:
    """What B rows have written, what is to be put in next, and where their documents begin.

    Attributes:
        ids: int64 [B, L].
        starts: at each position, where the document it belongs to began, int64 [B, L].
    """

    def __init__(self, script: _Script, rows: int, length: int, draw: random.Random, name: int) -> None:
        self.ids = torch.zeros(rows, length, dtype=torch.int64)
        self.starts = torch.zeros(rows, length, dtype=torch.int64)
        self.documents: list[_Document] = []
        self._script, self._draw, self._name = script, draw, name
        self._put_in = torch.full((rows, length + 1), -1, dtype=torch.int64)
        self._greedy = torch.zeros(rows, length + 1, dtype=torch.bool)
        self._ends = torch.tensor(sorted(script.ends), dtype=torch.int64)
        self._in_user_turn = torch.zeros(rows, dtype=torch.bool)
        self._begin = [0] * rows
        self._kind = [""] * rows
        self._given = [0] * rows
        for row in range(rows):
            self._open(row, 0)
        self.ids[:, 0] = self._put_in[:, 0]

    def wants_greedy(self, position: int) -> Tensor:
        """Returns the rows that take the most likely token at `position`."""
        return self._greedy[:, position].nonzero().squeeze(-1)

    def write(self, position: int, chosen: Tensor) -> None:
        """Writes one token a row at `position`: what has to be put in there, else the model's choice."""
        put_in = self._put_in[:, position]
        free = put_in < 0
        tokens = torch.where(free, chosen, put_in)
        turn_end = self._script.answer_opening[0] if self._script.answer_opening else -1
        ended = torch.isin(tokens, self._ends)
        turned = self._in_user_turn & free & (ended | (tokens == turn_end))
        tokens[turned] = turn_end
        self.ids[:, position] = tokens
        for row in turned.nonzero().squeeze(-1).tolist():
            self._give(row, position + 1, self._script.answer_opening[1:])
            self._in_user_turn[row] = False
        for row in (ended & free & ~turned).nonzero().squeeze(-1).tolist():
            self._close(row, position + 1, ended=True)
            self._open(row, position + 1)

    def close_all(self) -> None:
        """Cuts the documents that are still open at the end of their tapes."""
        for row in range(len(self.ids)):
            self._close(row, self.ids.shape[1], ended=False)

    def _open(self, row: int, position: int) -> None:
        script = self._script
        self.starts[row, position:] = position
        self._begin[row], self._given[row] = position, 0
        chat = self._draw.random() < script.chat_share
        self._kind[row] = "chat" if chat else "plain"
        self._in_user_turn[row] = chat
        if chat:
            self._give(row, position, script.user_opening)
            return
        self._give(row, position, [*script.before, self._draw.choice(script.start_tokens)])
        first = position + len(script.before) + 1
        self._greedy[row, first : first + self._draw.randint(FEWEST_GREEDY_TOKENS, MOST_GREEDY_TOKENS)] = True

    def _give(self, row: int, position: int, ids: list[int]) -> None:
        fitting = ids[: max(self.ids.shape[1] - position, 0)]
        self._put_in[row, position : position + len(fitting)] = torch.tensor(fitting, dtype=torch.int64)
        self._given[row] += len(fitting)

    def _close(self, row: int, end: int, ended: bool) -> None:
        begin = self._begin[row]
        if begin < end:
            ids = self.ids[row, begin:end].tolist()
            fault = _fault(ids, written=end - begin - self._given[row], ended=ended)
            self.documents.append(_Document((self._name, row), ids, self._kind[row], fault))


def _fault(ids: list[int], written: int, ended: bool) -> str | None:
    if ended and written < FEWEST_WRITTEN_TOKENS:
        return "ended at once"
    if len(ids) >= 2 * NGRAM and repeated_share(ids) > MOST_REPEATED:
        return "repeats itself"
    return None


def repeated_share(ids: Sequence[int]) -> float:
    """Returns the share of a document's n-grams that have occurred earlier in it."""
    ngrams = list(zip(*(ids[offset:] for offset in range(NGRAM)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _write_tapes(
    model: PreTrainedModel,
    script: _Script,
    rows: int,
    length: int,
    draw: random.Random,
    name: int,
    watch: _Watch,
) -> list[_Document]:
    """Returns the documents that `rows` rows write in `length` positions, in the order of the rows."""
    tapes = _Tapes(script, rows, length, draw, name)
    generator = torch.Generator().manual_seed(draw.getrandbits(62))
    device = model.device
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), open_decoder(model, length) as decoder:
            for position in range(length - 1):
                logits = decoder.step(tapes.ids[:, position].to(device), tapes.starts[:, position].to(device))
                uniforms = torch.rand(rows, dtype=torch.float64, generator=generator)
                chosen = sample(logits, uniforms.to(device)).cpu()
                greedy = tapes.wants_greedy(position + 1)
                if len(greedy):
                    chosen[greedy] = logits[greedy.to(device)].argmax(-1).cpu()
                tapes.write(position + 1, chosen)
                watch((position + 2) * rows)
    finally:
        model.train(training)
    tapes.close_all()
    return sorted(tapes.documents, key=lambda document: document.tape)  # stable: the order on a tape stays


def _assemble(documents: list[_Document], block_size: int) -> Tensor:
    """Returns the kept documents as blocks [N, L]: tapes without a loss whole, then the rest joined and cut."""
    spoiled = {document.tape for document in documents if document.fault}
    whole = [i for document in documents if document.tape not in spoiled for i in document.ids]
    rest = [i for document in documents if document.tape in spoiled and not document.fault for i in document.ids]
    stream = whole + rest
    count = len(stream) // block_size
    return torch.tensor(stream[: count * block_size], dtype=torch.int64).view(count, block_size)


def _report(documents: list[_Document], blocks: Tensor, tokens_written: int, seconds: float) -> dict[str, Any]:
    """Returns the facts of a synthesis as plain values."""
    faults = Counter(document.fault for document in documents if document.fault)
    kinds = Counter(document.kind for document in documents)
    stream = blocks.flatten().tolist()
    return {
        "documents": len(documents),
        "documents_by_kind": dict(kinds),
        "dropped": dict(faults),
        "mean_document_tokens": round(sum(len(document.ids) for document in documents) / len(documents), 1),
        "tokens_written": tokens_written,
        "tokens_kept": blocks.numel(),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens_written / seconds, 1),
        "distinct_bigram_share": round(len(set(pairwise(stream))) / max(len(stream) - 1, 1), 4),
    }

"""Text that the model writes itself, for distillation without any data.

The strategy decides how a document begins and how its tokens are drawn (see `strategy.py`). Ids are kept as drawn:
nothing is decoded and tokenized again. In a chat the model writes the user's words. Then the template's opening of the
answer is put in, and the model writes the answer.

Rows of the batch are *tapes*, each as long as a block. When a document ends, the next one begins on the same tape and
does not attend to what lies before it (see `decode.py`). So every row writes text at every step. Documents are dropped
that end at once, repeat themselves or repeat each other. A tape without a dropped document is a block as it is. The
remaining documents of the other tapes are joined and cut into blocks. Blocks mark where their documents begin, so that
training sees each document alone, as its writer did.

On request, the writer's most likely tokens at each position go into a teacher cache (see `teacher_cache.py`). Where a
tape is a block as it is, these are the model's predictions for the block, and no second forward pass is needed. The
model runs over the other blocks afterwards. The probabilities are the model's own, whatever temperature or truncation
the text is drawn with.

A *shard* is what one batch of tapes gives. A shard written in this process depends only on the model, the settings, its
number and its rows. Its tapes start empty, and all its random numbers come from the seed and the number. So an
interrupted run can reuse the shards that it has finished (`shards.py`). The number of rows matters because the rounding
of bfloat16 products depends on it. `server_writer.py` writes shards on servers.

Source: LLM-QAT, arXiv 2305.17888, section 3.1. Deviations: documents packed, degenerate ones dropped.

Letters: B rows, L tokens a tape, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data.blocks import Progress, Rows, positions
from llmqat.data.decode import open_decoder
from llmqat.data.length import declared_length, table_length
from llmqat.data.processes import ALONE, Processes
from llmqat.data.quality import Document, judged, merged, refused, tally
from llmqat.data.sampling import Sampling, choose
from llmqat.data.script import Script, read_script
from llmqat.data.strategy import SynthesisConfig
from llmqat.data.teacher_cache import CacheHeader, CachePlace, TeacherCache, TeacherCacheWriter, cache_teacher
from llmqat.kernels import float_products
from llmqat.layers import dequantized_once
from llmqat.layers.packed import FEW_ROWS
from llmqat.metrics import TopProbabilities
from llmqat.models import check_next_token, heads_of, keeps_documents_apart, uploaded

log = logging.getLogger(__name__)

WRITER_VERSION = 2
"""Raised whenever the same model, settings and seed come to give another text."""

EXPECTED_DROPPED_SHARE = 0.02
"""Share of tokens expected to be dropped; so much more is written in the first round."""

MOST_FRUITLESS_SHARDS = 3

CACHE_BYTES = 6 * 2**30
"""Keys and values of a shard take no more; a large model writes fewer rows at once."""

WEIGHT_BYTES = 4 * 2**30
"""Weights of a packed writer are dequantized once a shard where they take no more, and else at every position."""

COMPARED_BLOCKS = 2

MOST_DIVERGENCE = 0.01
"""Nats a token between what a model predicts while it writes and for the whole block: rounding, and no more."""


def is_kept_apart(model: PreTrainedModel, packing: str | None = None) -> bool:
    """Returns whether blocks of the model's own text say where their documents begin; `packing` as in `synthesize`.

    Raises:
        ValueError: they are to, and `model` cannot keep documents apart.
    """
    if packing == "concatenate":
        return False
    if keeps_documents_apart(model):
        return True
    said = f"{type(model).__name__} attends beyond the documents that position ids begin"
    if packing == "documents":
        raise ValueError(f"packing: {said}; use packing=concatenate")
    log.info("%s, so a block of its own text is one text", said)
    return False


@dataclass(frozen=True)
class Shard:
    """What one batch of tapes gives."""

    number: int
    rows: int
    """Tapes."""
    blocks: Rows
    """N blocks with document starts; first the M tapes of which no document was dropped, each a block as it is."""
    facts: Mapping[str, Any]
    """What `quality.tally` counts of the documents, and the seconds it took."""
    top: TopProbabilities | None = None
    """The writer's predictions for the first M blocks, [M, L - 1, K]; None where they were not asked for."""


class Keeper:
    """Puts what a model predicts for the blocks that it has written into a teacher cache."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: CachePlace, apart: bool
    ) -> None:
        """Takes the writer, the cache, and whether documents of a block are kept apart."""
        self.model, self.tokenizer, self.cache, self.apart = model, tokenizer, cache, apart
        self.header = CacheHeader.of(model, tokenizer, cache.top_k)

    def keep(self, shard: Shard) -> None:
        """Adds the writer's predictions for `shard` to the cache, but only if documents are kept apart."""
        if shard.top is None or not self.apart:
            return
        assert shard.blocks.starts is not None
        own = positions(shard.blocks.starts)
        with TeacherCacheWriter(self.cache.folder, self.header) as writer:
            for block in range(len(shard.top.log_rest)):
                writer.add(shard.blocks.stored[block], shard.top.of_row(block), own[block])

    def lacks(self, shard: Shard) -> bool:
        """Returns whether predictions for a block of `shard` would be kept, and are not there."""
        known = TeacherCacheWriter(self.cache.folder, self.header).known(shard.blocks) if self.apart else []
        return self.apart and len(known) < len(shard.blocks)

    def complete(self, blocks: Rows) -> None:
        """Runs the model over those of `blocks` of which its predictions are not known.

        Some that are known are compared with such a run. Where they differ, it runs over all blocks.
        """
        top_k, folder = self.cache.top_k, self.cache.folder
        known = TeacherCacheWriter(folder, self.header).known(blocks)[:COMPARED_BLOCKS]
        if known:
            cache = TeacherCache(folder)
            off = cache.divergence(self.model, blocks[torch.tensor(known)])
            if not off <= MOST_DIVERGENCE:
                log.warning(
                    "what was kept as the text was written is KL %.3g from what the model predicts for whole blocks, "
                    "so it reads them all",
                    off,
                )
                cache.remove_shards()
        size = self.cache.batch_size
        cache_teacher(self.model, self.tokenizer, blocks, folder, top_k=top_k, batch_size=size, header=self.header)


class Writer(ABC):
    """Writes shards, wherever the model runs; made once for all of them."""

    made_with: Mapping[str, Any]
    """What the text depends on beside model, tokenizer and settings."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SynthesisConfig,
        top_k: int | None = None,
    ) -> None:
        """Checks that `model` can write what `config` asks for; of `top_k` tokens the probabilities are kept.

        Raises:
            FileNotFoundError: as `read_script`.
            ValueError: the context is shorter than a block, the model writes no text of its own, and as `read_script`.
        """
        longest = min((n for n in (declared_length(model.config), table_length(model)) if n is not None), default=None)
        size = config.block_size
        if longest is not None and size > longest:
            raise ValueError(f"data.block_size={size} is more than the model's context of {longest} tokens")
        self.model, self.config, self.top_k = model, config, top_k
        self.script = read_script(model, tokenizer, config)
        self.most_rows = config.batch_size
        self.kept: tuple[Path, str] | None = None
        """Folder for parts of an unfinished shard, and what they are made with."""

    def shards(
        self,
        tokens: int,
        done: Mapping[int, Shard] | None = None,
        progress: Progress | None = None,
        processes: Processes = ALONE,
    ) -> Iterator[Shard]:
        """Yields shards until they hold `tokens`, in the order of their numbers.

        The rows of the shards are planned in rounds. The first round is for all wanted blocks, each later one for the
        blocks that are still missing. The plan does not depend on `processes`, so the shards do not either.

        Args:
            tokens: wanted.
            done: shards that need not be written again, by number.
            progress: called with (tokens written, tokens to write).
            processes: write shards in turn, at the same time; all get all of them.

        Raises:
            ValueError: when nothing of what the model writes can be used.
        """
        size = self.config.block_size
        wanted, blocks, tapes, number = -(-tokens // size), 0, 0, 0
        facts: list[Mapping[str, Any]] = []
        while blocks < wanted:
            plan = dict(enumerate(rows_of_shards(wanted - blocks, self.most_rows), number))
            watch = _Watch(progress, tapes * size, (tapes + sum(plan.values())) * size)
            for shard in self._round(plan, done or {}, watch, processes):
                if number >= MOST_FRUITLESS_SHARDS and blocks == 0:
                    raise ValueError(
                        f"the model writes nothing usable, documents by fault: {refused(merged(facts))}; is it trained?"
                    )
                yield shard
                facts.append(shard.facts)
                blocks, tapes, number = blocks + len(shard.blocks), tapes + shard.rows, number + 1
                if blocks >= wanted:
                    break

    def _round(
        self, plan: Mapping[int, int], done: Mapping[int, Shard], watch: _Watch, processes: Processes
    ) -> Iterator[Shard]:
        """Yields the shards of `plan` (number -> rows), from `done` or written when they are due."""
        made = {number: done[number] for number in plan if number in done}
        for number in plan:
            if number not in made:
                due = [other for other in plan if other >= number and other not in made][: processes.count]
                own: list[Shard] = []
                error: Exception | None = None
                try:
                    size = self.config.block_size
                    own += [self.write(n, plan[n], watch.after(plan, n, size)) for n in processes.share(due)]
                except Exception as found:  # raised in all processes: none waits for one that has failed
                    error = found
                for part, failed in processes.gathered((own, error)):
                    if failed is not None:
                        raise error or failed
                    made |= {shard.number: shard for shard in part}
            yield made.pop(number)

    def keep_unfinished(self, folder: Path, made_with: Mapping[str, Any]) -> None:
        """Lets parts of a shard be kept in `folder` until it is finished, if this writer has any."""
        self.kept = folder, json.dumps(dict(made_with), sort_keys=True)

    def with_predictions(self, shard: Shard) -> Shard:
        """Returns `shard` with what is predicted for its blocks, where that can be had without the model here."""
        return shard

    @abstractmethod
    def write(self, number: int, rows: int, watch: Progress | None = None) -> Shard:
        """Returns shard `number` of `rows` tapes, whatever has been written before."""


class ModelWriter(Writer):
    """Writes shards with the model in this process."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SynthesisConfig,
        top_k: int | None = None,
    ) -> None:
        """Checks as `Writer`, and that `model` predicts the next token; a large model writes fewer rows at once."""
        check_next_token(model)
        super().__init__(model, tokenizer, config, top_k)
        most = CACHE_BYTES // (cache_bytes_per_token(model) * config.block_size)
        self.most_rows = min(config.batch_size, max(most, 1))
        self.made_with = {"device": model.device.type, "batch_size": self.most_rows}

    def write(self, number: int, rows: int, watch: Progress | None = None) -> Shard:
        """Returns shard `number` of `rows` tapes, whatever has been written before."""
        begun = time.perf_counter()
        draw = random.Random(f"{self.config.seed}/{number}")
        tapes = _Tapes(self.script.shuffled(draw), rows, self.config.block_size, draw)
        generator = torch.Generator().manual_seed(draw.getrandbits(62))
        top = _write_tapes(self.model, tapes, self.config.sampling, generator, self.top_k, watch)
        documents = tapes.finished()
        shard, whole = assembled(number, rows, documents, self.config.block_size, time.perf_counter() - begun)
        if top is not None:
            top = TopProbabilities(top.indices[whole], top.log_probs[whole], top.log_rest[whole])
        return replace(shard, top=top)


def rows_of_shards(blocks: int, most_rows: int) -> list[int]:
    """Returns the rows of each shard that together should give `blocks` blocks: as equal as can be."""
    rows = -int(-blocks * (1 + EXPECTED_DROPPED_SHARE) // 1)
    shards = -(-rows // most_rows)
    return [rows // shards + (index < rows % shards) for index in range(shards)]


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Returns the bytes that keys and values of one token take."""
    config = model.config.get_text_config()
    heads = heads_of(config)
    return int(2 * config.num_hidden_layers * heads.keys * heads.size * model.dtype.itemsize)


def described(config: SynthesisConfig) -> str:
    """Returns the settings that make the text other than its blocks and seed, in words."""
    default = SynthesisConfig()
    parts: list[str] = [config.strategy]
    for name in ("chat_share", "prompts", "prompt_turns", "temperature", "top_p", "top_k"):
        value = getattr(config, name)
        if value != getattr(default, name):
            parts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts)


@dataclass(frozen=True)
class _Watch:
    """Passes progress on, counted from what earlier shards have written."""

    progress: Progress | None
    done: int
    total: int

    def after(self, plan: Mapping[int, int], number: int, size: int) -> _Watch:
        """Returns what watches shard `number` of a `plan` (number -> rows of `size` tokens)."""
        earlier = sum(rows for other, rows in plan.items() if other < number)
        return _Watch(self.progress, self.done + earlier * size, self.total)

    def __call__(self, written: int, _: int) -> None:
        if self.progress is not None:
            self.progress(self.done + written, self.total)


class _Tapes:
    """What B rows have written, what is to be put in next, and where their documents begin.

    Attributes:
        ids: int64 [B, L].
        starts: at each position, where the document it belongs to began, int64 [B, L].
    """

    def __init__(self, script: Script, rows: int, length: int, draw: random.Random) -> None:
        self.ids = torch.zeros(rows, length, dtype=torch.int64)
        self.starts = torch.zeros(rows, length, dtype=torch.int64)
        self._documents: list[Document] = []
        self._script, self._draw = script, draw
        self._opened = 0
        self._put_in = torch.full((rows, length + 1), -1, dtype=torch.int64)
        self._greedy = torch.zeros(rows, length + 1, dtype=torch.bool)
        self._log_probs = torch.zeros(rows, length)
        self._ends = torch.tensor(sorted(script.ends), dtype=torch.int64)
        self._in_user_turn = torch.zeros(rows, dtype=torch.bool)
        self._begin = [0] * rows
        self._kind = [""] * rows
        self._opening = [0] * rows
        self._given = [0] * rows
        for row in range(rows):
            self._open(row, 0)
        self.ids[:, 0] = self._put_in[:, 0]

    def greedy(self, position: int) -> Tensor:
        """Returns which rows take the most likely token at `position`, bool [B]."""
        return self._greedy[:, position]

    def write(self, position: int, chosen: Tensor, log_probs: Tensor) -> None:
        """Writes one token a row at `position`: what has to be put in there, else the model's choice.

        Args:
            position: follows the last one written.
            chosen: the model's choices, int64 [B].
            log_probs: of them, float32 [B].
        """
        put_in = self._put_in[:, position]
        free = put_in < 0
        tokens = torch.where(free, chosen, put_in)
        turn_end = self._script.answer_opening[0] if self._script.answer_opening else -1
        ended = torch.isin(tokens, self._ends)
        turned = self._in_user_turn & free & (ended | (tokens == turn_end))
        tokens[turned] = turn_end
        self.ids[:, position] = tokens
        self._log_probs[:, position] = torch.where(free, log_probs, 0.0)
        for row in turned.nonzero().squeeze(-1).tolist():
            self._give(row, position + 1, self._script.answer_opening[1:])
            self._in_user_turn[row] = False
        for row in (ended & free & ~turned).nonzero().squeeze(-1).tolist():
            self._close(row, position + 1, ended=True)
            self._open(row, position + 1)

    def finished(self) -> list[Document]:
        """Returns all documents, judged, in the order of the tapes; those still open are cut at the end of theirs."""
        for row in range(len(self.ids)):
            self._close(row, self.ids.shape[1], ended=False)
        return judged(sorted(self._documents, key=lambda document: document.tape))  # stable: a tape's order stays

    def _open(self, row: int, position: int) -> None:
        opening = self._script.opening(self._draw, self._opened)
        self._opened += 1
        self.starts[row, position:] = position
        self._begin[row], self._given[row] = position, 0
        self._kind[row] = opening.kind
        self._in_user_turn[row] = opening.kind == "chat"
        self._give(row, position, opening.ids)
        self._opening[row] = self._given[row]
        first = position + len(opening.ids)
        self._greedy[row, first : first + opening.greedy] = True

    def _give(self, row: int, position: int, ids: list[int]) -> None:
        fitting = ids[: max(self.ids.shape[1] - position, 0)]
        self._put_in[row, position : position + len(fitting)] = torch.tensor(fitting, dtype=torch.int64)
        self._given[row] += len(fitting)

    def _close(self, row: int, end: int, ended: bool) -> None:
        begin = self._begin[row]
        if begin < end:
            ids = self.ids[row, begin:end].tolist()
            log_prob = float(self._log_probs[row, begin:end].double().sum())
            written = end - begin - self._given[row]
            document = Document(row, ids, self._kind[row], self._opening[row], written, ended, log_prob)
            self._documents.append(document)


def _write_tapes(
    model: PreTrainedModel,
    tapes: _Tapes,
    sampling: Sampling,
    generator: torch.Generator,
    top_k: int | None,
    watch: Progress | None,
) -> TopProbabilities | None:
    """Fills the tapes, one position of all of them at a time; returns the most likely `top_k` tokens [B, L - 1, K]."""
    rows, length = tapes.ids.shape
    device = model.device
    kept = None if top_k is None else TopProbabilities.empty((rows, length - 1), top_k, device)
    training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            float_products(),
            dequantized_once(model, 0 if rows <= FEW_ROWS else WEIGHT_BYTES),
            open_decoder(model, length) as decoder,
        ):
            for position in range(length - 1):
                here = (uploaded(part[:, position], device) for part in (tapes.ids, tapes.starts))
                logits = decoder.step(*here)
                uniforms = torch.rand(rows, dtype=torch.float64, generator=generator)
                chosen = choose(logits, uploaded(uniforms, device), tapes.greedy(position + 1), sampling, top_k)
                if kept is not None and chosen.top is not None:
                    kept.put(position, chosen.top)
                # The one wait a position: what comes next depends on which documents end. float64 holds both exactly.
                tokens, log_probs = torch.stack([chosen.tokens.double(), chosen.log_probs.double()]).cpu()
                tapes.write(position + 1, tokens.long(), log_probs.float())
                if watch is not None:
                    watch((position + 2) * rows, length * rows)
    finally:
        model.train(training)
    return None if kept is None else kept.to(torch.device("cpu"))


def assembled(
    number: int, rows: int, documents: Sequence[Document], block_size: int, seconds: float
) -> tuple[Shard, list[int]]:
    """Returns the shard of judged documents, and the numbers of the tapes that are its first blocks.

    These are the tapes of which no document was dropped. After them come the kept documents of the other tapes, joined
    and cut into blocks; what fills no block is left out. The first token of each block counts as the start of a
    document, even where a document was cut.

    Args:
        number: of the shard.
        rows: tapes that were written.
        documents: in the order of the tapes.
        block_size: tokens a block.
        seconds: time that the writing took.
    """
    spoiled = {document.tape for document in documents if document.fault}
    whole = [document for document in documents if document.tape not in spoiled]
    rest = [document for document in documents if document.tape in spoiled and not document.fault]
    ids = torch.tensor([i for document in whole + rest for i in document.ids], dtype=torch.int64)
    starts = torch.zeros(len(ids), dtype=torch.uint8)
    starts[torch.tensor([0, *(len(document.ids) for document in (whole + rest)[:-1])]).cumsum(0)[: len(ids)]] = 1
    count = len(ids) // block_size
    ids, starts = (part[: count * block_size].view(count, block_size) for part in (ids, starts))
    starts[:, 0] = 1
    facts = {**tally(documents), "tokens_written": rows * block_size, "seconds": round(seconds, 2)}
    tapes = list(dict.fromkeys(document.tape for document in whole))
    return Shard(number, rows, Rows(ids, starts=starts), facts), tapes

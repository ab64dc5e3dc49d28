"""Generates text with servers that run the model (see `server.py`), in place of the model in this process.

Shards, tapes and documents are those of `writer.py`. A tape is written by a chain of requests, one for each part of a
document that the model writes. All tapes of a shard are requested at the same time, and the servers batch them. What is
drawn for a document depends only on the seed and its place. But a server forms batches of its own, so the same command
gives similar text, not identical text.

Finished documents are appended to a file next to the shards. An interrupted run therefore requests only the others.

Before the first shard, each server writes a few tokens. Their log-probabilities are compared with those of the model in
this process. A server with another model, or with one whose quantization changes its predictions, is an error.

If a teacher cache is wanted, the servers are asked for the predictions at each position (`prompt_logprobs`) once the
blocks of a shard are known.

Letters: N blocks, L tokens a block, K tokens kept a position.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmqat.data.blocks import Progress
from llmqat.data.quality import Document, judged
from llmqat.data.script import Opening, Script
from llmqat.data.server import Servers
from llmqat.data.teacher_cache import hidden_states
from llmqat.data.writer import Shard, Writer, assembled
from llmqat.files import is_locked_by_us
from llmqat.metrics import TopProbabilities, predictor_of, token_nll
from llmqat.models import model_device, name_of

log = logging.getLogger(__name__)

WRITTEN_BY = {"written_by": "a server"}
"""What the manifest of text from a server says that the text depends on."""
TAPES = ".tapes-*.jsonl"
"""Files of finished documents whose shard is not finished."""
REQUESTS, MOST_REQUESTS = 256, 512
"""At most so many at a time to a server, which lets those wait that it has no room for; and to all of them."""
PREDICTIONS = 8
"""The same, where a server tells what it predicts, which is megabytes for each block."""
COMPARED_TOKENS = 64
COMPARED_TEXTS = 8
MOST_DIFFERENCE = 0.1
"""Nats a token, on average, between the log-probabilities of a server and those of the model here: rounding."""


class ServerWriter(Writer):
    """Writes shards on servers."""

    made_with = WRITTEN_BY

    _is_compared = False

    @cached_property
    def servers(self) -> Servers:
        """Those of the configuration, which run the model; none is asked before something is written."""
        return Servers(self.config.server)

    def write(self, number: int, rows: int, watch: Progress | None = None) -> Shard:
        """Returns shard `number` of `rows` tapes.

        Raises:
            ConnectionError: no server answers any more.
            ValueError: there is none, one has another model, or refuses.
        """
        if not self.servers.urls:
            raise ValueError("this text was written by a server, and more of it is wanted; give data.server=URL")
        begun = time.perf_counter()
        self.compare()
        size = self.config.block_size
        script = self.script.shuffled(random.Random(f"{self.config.seed}/{number}"))
        file = None if self.kept is None else _tapes_file(*self.kept, number, rows)
        with _Tapes(file, rows, size) as tapes:
            before = tapes.done

            def tape(row: int) -> None:
                while (room := tapes.room(row)) > 0 and not self.servers.is_stopped:
                    place = len(tapes.of(row))
                    draw = random.Random(f"{self.config.seed}/{number}/{row}/{place}")
                    document = self._document(row, script, place * rows + row, room, draw)
                    if not self.servers.is_stopped:  # else the file may be another's by now
                        tapes.add(document)

            threads = min(REQUESTS * len(self.servers.urls), MOST_REQUESTS)
            try:
                for _ in self.servers.together(tape, range(rows), threads):
                    if watch is not None:
                        watch(tapes.done, rows * size)
            except ConnectionError as error:
                kept = "nothing is kept without a folder" if file is None else "finished documents are kept"
                raise ConnectionError(f"{error}; {kept}") from error
            documents = judged([document for row in range(rows) for document in tapes.of(row)])
        shard = self.with_predictions(assembled(number, rows, documents, size, 0.0)[0])
        # What earlier starts took is not known: as if all had been written now, at this rate.
        seconds = (time.perf_counter() - begun) * rows * size / max(rows * size - before, 1)
        return replace(shard, facts={**shard.facts, "seconds": round(seconds, 2)})

    def _document(self, row: int, script: Script, place: int, room: int, draw: random.Random) -> Document:
        """Returns the shard's document `place`, of at most `room` tokens."""
        opening = script.opening(draw, place)
        ids = opening.ids[:room]
        put_in, log_prob, ended = len(ids), 0.0, False
        for step, (most, ends, settings) in enumerate(self._steps(opening, room)):
            if ended or len(ids) >= most:
                continue
            seed = draw.getrandbits(31)
            part = self.servers.complete(row, ids, ends, max_tokens=most - len(ids), seed=seed, **settings)
            ids, log_prob, ended = ids + part.ids, log_prob + sum(part.log_probs), part.ended
            if opening.kind == "chat" and step == 0 and ended:
                turn_end, *rest = self.script.answer_opening
                given = rest[: room - len(ids)]
                ids, put_in, ended = [*ids[:-1], turn_end, *given], put_in + len(given), False
        return Document(row, ids, opening.kind, min(len(opening.ids), room), len(ids) - put_in, ended, log_prob)

    def _steps(self, opening: Opening, room: int) -> Iterator[tuple[int, frozenset[int], dict[str, Any]]]:
        """Yields the requests of a document: its length after each at most, what ends it, and how tokens are drawn."""
        ends = self.script.ends
        if opening.kind == "chat":
            yield room, ends | {self.script.answer_opening[0]}, self._drawn
        elif opening.greedy:
            yield min(len(opening.ids) + opening.greedy, room), ends, {"temperature": 0.0}
        yield room, ends, self._drawn

    @property
    def _drawn(self) -> dict[str, Any]:
        """How tokens are drawn, as servers take it."""
        config = self.config
        top_k = {} if config.top_k is None else {"top_k": config.top_k}
        return {"temperature": config.temperature, "top_p": config.top_p, **top_k}

    def with_predictions(self, shard: Shard) -> Shard:
        """Returns `shard` with what the servers predict at each position of its blocks, where that is kept."""
        if self.top_k is None or not len(shard.blocks) or not self.servers.urls:
            return shard
        self.compare()
        stored, starts, top_k = shard.blocks.stored, shard.blocks.starts, self.top_k
        assert starts is not None
        count, length = stored.shape
        top = TopProbabilities.empty((count, length - 1), top_k, torch.device("cpu"))

        def block(row: int) -> None:
            ids = stored[row].tolist()
            for begin, end in pairwise([*starts[row].nonzero().squeeze(1).tolist(), length]):
                # After a document's last token comes another document; what is predicted there is not trained on.
                own = ids[begin:end] if end == length else [*ids[begin:end], ids[begin]]
                if len(own) > 1:
                    found = torch.tensor(self.servers.predicted(row, own, top_k), dtype=torch.float64)
                    place = slice(begin, begin + len(own) - 1)
                    log_probs = found[..., 1]
                    top.indices[row, place] = found[..., 0].int()
                    top.log_probs[row, place] = log_probs.half()
                    top.log_rest[row, place] = (1 - log_probs.exp().sum(-1)).clamp(min=0).log().half()

        for _ in self.servers.together(block, range(count), PREDICTIONS * len(self.servers.urls)):
            pass
        return replace(shard, top=top)

    @torch.no_grad()
    def compare(self) -> None:
        """Sees that each server predicts what the model here does, once.

        Raises:
            ConnectionError: a server does not answer.
            ValueError: it has another model.
        """
        if self._is_compared:
            return
        self.servers.check(self.config.block_size + (self.top_k is not None))
        for url in self.servers.urls:
            off = self._difference(self.servers.alone(url))
            if not off <= MOST_DIFFERENCE:
                raise ValueError(
                    f"the server {url} does not predict what {name_of(self.model)} does: log-probabilities of its text "
                    f"differ by {off:.2g} nats a token; serve this model there, in its own precision"
                )
            log.info("%s runs the same model: log-probabilities differ by %.2g nats a token", url, off)
        self._is_compared = True

    def _difference(self, server: Servers) -> float:
        """Returns the mean difference of log-probabilities between a server and the model here, nats a token."""
        size, found, tokens = self.config.block_size, 0.0, 0
        for number in range(COMPARED_TEXTS):
            draw = random.Random(f"{self.config.seed}/compared/{number}")
            ids = self.script.opening(draw, number).ids[: size - 1]
            most = min(COMPARED_TOKENS, size - len(ids))
            part = server.complete(0, ids, frozenset(), max_tokens=most, seed=number, **self._drawn)
            if self.top_k is not None and number == 0:
                server.predicted(0, [*ids, *part.ids], self.top_k)
            own = _log_probs(self.model, [*ids, *part.ids], len(ids))
            found += float((own - torch.tensor(part.log_probs)).abs().sum())
            tokens += len(part.ids)
            if tokens >= COMPARED_TOKENS:
                break
        return found / tokens


def _log_probs(model: PreTrainedModel, ids: list[int], first: int) -> Tensor:
    """Returns the log-probabilities of `ids` from `first` on, float32."""
    training = model.training
    model.eval()
    try:
        given = torch.tensor([ids], device=model_device(model))
        hidden = hidden_states(model, given)[0, first - 1 : -1]
    finally:
        model.train(training)
    return -token_nll(hidden, predictor_of(model).detached(), given[0, first:]).cpu()


class _Tapes:
    """The documents of a shard that are finished, in memory and in a file; added to from many threads."""

    def __init__(self, file: Path | None, rows: int, size: int) -> None:
        """Reads what a file has already, and holds it alone until the end of a `with` block.

        A killed run may have left part of a line at its end.

        Raises:
            ValueError: another process writes there now.
        """
        self._size = size
        self._lock = threading.Lock()
        self._rows: list[list[Document]] = [[] for _ in range(rows)]
        self._lines: TextIO | None = None
        if file is None:
            return
        self._lines = file.open("a+", encoding="utf-8")
        if not is_locked_by_us(self._lines):
            self._lines.close()
            raise ValueError(f"another process writes text into {file.parent} now; wait for it, or give another folder")
        self._lines.seek(0)
        for line in self._lines:
            try:
                document = Document(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if len(document.ids) <= self.room(document.tape):
                self._rows[document.tape].append(document)
        if self.done:
            log.info("%d of %d tokens are there already", self.done, rows * size)

    def __enter__(self) -> _Tapes:
        """Returns the tapes themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        with self._lock:
            if self._lines is not None:
                self._lines.close()

    @property
    def done(self) -> int:
        """Tokens of all finished documents."""
        return sum(len(document.ids) for row in self._rows for document in row)

    def of(self, row: int) -> Sequence[Document]:
        """Returns the documents of a tape."""
        return self._rows[row]

    def room(self, row: int) -> int:
        """Returns the tokens that a tape has room for."""
        return self._size - sum(len(document.ids) for document in self._rows[row])

    def add(self, document: Document) -> None:
        """Takes the next document of its tape."""
        with self._lock:
            if self._lines is not None:
                # The end of a line first: a killed run may have left part of one.
                self._lines.write("\n" + json.dumps(asdict(document)))
                self._lines.flush()
            self._rows[document.tape].append(document)


def _tapes_file(folder: Path, made_with: str, number: int, rows: int) -> Path:
    """Returns the file in `folder` for the documents of a shard; another where it is made with something else."""
    known = hashlib.sha256(f"{made_with} {rows}".encode()).hexdigest()[:12]
    return folder / TAPES.replace("*", f"{number:05d}-{known}")


def remove_tapes(folder: Path, number: int) -> None:
    """Deletes the documents in `folder` of a shard that is finished."""
    for file in folder.glob(TAPES.replace("*", f"{number:05d}-*")):
        file.unlink()

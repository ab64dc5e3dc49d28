"""Text that a model writes on servers: vLLM, or others whose completions take token ids and return them.

A shard is what it is in `writer.py`: documents on tapes that are as long as a block. A tape is a chain of requests, one
for each part of a document that the model writes; the tapes of a shard are written at the same time, and the server
batches them. What is drawn for a tape depends on the seed, the shard's number and the tape's alone. The server computes
in batches of its own, so the same command gives like text, and not the same.

Finished tapes are appended to a file beside the shards, so a run that is interrupted asks for the others alone. A
server that does not answer is tried again for a while; then the others do its work, and the run ends without a loss
when none is left.

Before the first shard each server writes a few tokens whose probabilities are compared with those of the model here: a
server with another model, or with one that is quantized otherwise, is refused.

What the model predicts at each position is asked for when a shard's blocks are known (`prompt_logprobs`).

Letters: N blocks, L tokens a block, K tokens kept a position.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data.blocks import Progress, Rows
from llmqat.data.quality import Document, judged
from llmqat.data.script import Opening, Script
from llmqat.data.strategy import SynthesisConfig
from llmqat.data.writer import Shard, Writer, assembled
from llmqat.metrics import TopProbabilities
from llmqat.models import model_device, name_of

log = logging.getLogger(__name__)

WRITTEN_BY = {"writer": "server"}
"""What the manifest of text from a server says that the text depends on."""
TAPES = ".tapes-*.jsonl"
"""Files of finished tapes whose shard is not finished."""
REQUESTS = 256
"""At most so many at a time to a server, which lets those wait that it has no room for."""
WAITS = (1, 2, 4, 8, 16)
"""Seconds between the trials of a request that a server does not answer."""
TIMEOUT = (10, 1800)
"""Seconds to connect, and for an answer."""
BUSY = (429, 500, 502, 503, 504)
"""HTTP status of a server that may answer later."""
COMPARED_TOKENS = 64
MOST_DIFFERENCE = 0.1
"""Nats a token, on average, between the log-probabilities of a server and those of the model here: rounding."""
KEY_VARIABLE = "OPENAI_API_KEY"

_R = TypeVar("_R")


class _Stopped(Exception):
    """Another request has failed, so no more are sent."""


@dataclass(frozen=True)
class Completion:
    """What a server wrote."""

    ids: list[int]
    log_probs: list[float]
    ended: bool
    """Whether the last id ends the text, or a turn of it."""


class Servers:
    """Servers that run one model; asked from many threads."""

    def __init__(self, urls: Sequence[str]) -> None:
        """Takes their addresses, such as http://localhost:8000; nothing is sent yet."""
        self.urls = [_with_version(url) for url in urls]
        self._models: dict[str, str] = {}
        self._sessions = threading.local()
        self._gone: set[str] = set()
        self._stopped = threading.Event()

    def check(self, context: int) -> None:
        """Asks each server for its model.

        Args:
            context: tokens that it is to take.

        Raises:
            ConnectionError: one does not answer.
            ValueError: one has several models, or takes fewer tokens.
        """
        self._stopped.clear()
        self._gone.clear()
        for url in self.urls:
            found = self._asked(url, "models", None).get("data") or []
            whole = [entry for entry in found if not entry.get("parent")]
            if len(whole) != 1:
                names = ", ".join(str(entry.get("id")) for entry in whole) or "none"
                raise ValueError(f"the server {url} has {len(whole)} models ({names}); give one that has one")
            longest = whole[0].get("max_model_len")
            if longest is not None and longest < context:
                raise ValueError(
                    f"the server {url} takes {longest} tokens, and {context} are needed; start it with a longer "
                    f"context (--max-model-len {context}), or give a shorter data.block_size"
                )
            self._models[url] = str(whole[0]["id"])

    def complete(self, place: int, prompt: list[int], ends: frozenset[int], **settings: Any) -> Completion:
        """Returns how the server of `place` goes on after the ids `prompt`, or another in its stead.

        Args:
            place: any number; the same one means the same server while that answers.
            prompt: ids, one at least.
            ends: ids after which nothing is written.
            settings: max_tokens, temperature and others of the API.

        Raises:
            ConnectionError: no server answers.
            ValueError: the server refuses, or returns no ids.
        """
        body = {
            "prompt": prompt,
            "stop_token_ids": sorted(ends),
            "logprobs": 1,
            "return_token_ids": True,
            "skip_special_tokens": False,
            # A server's own defaults may be those of the model's generation_config.json.
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            **settings,
        }
        url, choice = self._choice(place, body)
        ids, found = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not ids or found is None or len(ids) != len(found):
            raise ValueError(
                f"the server {url} returns no token ids with their log-probabilities (return_token_ids, logprobs); "
                "give one that does, such as a newer vLLM"
            )
        ended = choice.get("finish_reason") == "stop"
        if ended and ids[-1] not in ends:
            raise ValueError(
                f"the server {url} ended a text after token {ids[-1]}, which ends none; start it without stop strings"
            )
        return Completion(list(ids), [float(one) for one in found], ended)

    def predicted(self, place: int, ids: list[int], top_k: int) -> list[dict[int, float]]:
        """Returns the log-probabilities of the `top_k` most likely tokens at each of `ids` but the first, given before.

        Raises:
            ConnectionError: no server answers.
            ValueError: the server refuses, or does not tell.
        """
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": top_k}
        url, choice = self._choice(place, body)
        found = choice.get("prompt_logprobs")
        if not found or len(found) != len(ids):
            raise ValueError(
                f"the server {url} does not tell what it predicts in a prompt (prompt_logprobs), as vLLM does; leave "
                "the teacher's tokens out"
            )
        return [_most_likely(entry, top_k) for entry in found[1:]]

    def stop(self) -> None:
        """Lets no request begin from here on."""
        self._stopped.set()

    def _choice(self, place: int, body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Returns the server that answered, and its answer."""
        turn = place % len(self.urls)
        for url in (*self.urls[turn:], *self.urls[:turn]):
            if url in self._gone:
                continue
            try:
                found = self._asked(url, "completions", {"model": self._models[url], **body})
            except ConnectionError as error:
                if url not in self._gone:
                    log.warning("%s", error)
                self._gone.add(url)
                continue
            choices = found.get("choices")
            if not choices:
                raise ValueError(f"the server {url} returns no completion: {found}")
            return url, choices[0]
        raise ConnectionError(
            f"no server answers any more ({', '.join(self.urls)}); start it again, and repeat the command: what is "
            "written is kept"
        )

    def _asked(self, url: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Returns the answer of one server, which is tried several times.

        Raises:
            ConnectionError: there is none.
            ValueError: it refuses.
        """
        import requests

        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        method, reason = "GET" if body is None else "POST", ""
        if not hasattr(self._sessions, "own"):
            self._sessions.own = requests.Session()
        for wait in (*WAITS, None):
            if self._stopped.is_set():
                raise _Stopped
            try:
                answer = self._sessions.own.request(
                    method, f"{url}/{path}", json=body, headers=headers, timeout=TIMEOUT
                )
                reason = f"status {answer.status_code}: {answer.text[:300]}"
                if answer.ok:
                    return dict(answer.json())
                if answer.status_code == 404:
                    raise ValueError(f"{url} is no address of a server's API ({reason}); write http://HOST:PORT")
                if answer.status_code not in BUSY:
                    raise ValueError(f"the server {url} refuses a request, {reason}")
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                reason = str(error)
            except requests.exceptions.JSONDecodeError as error:
                raise ValueError(f"the server {url} does not answer in JSON; give the address of its API") from error
            if wait is not None:
                self._stopped.wait(wait)
        raise ConnectionError(f"the server {url} does not answer ({reason})")


def _with_version(url: str) -> str:
    """Returns the address of the API below a server's."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _most_likely(entry: Mapping[str, Mapping[str, Any]], top_k: int) -> dict[int, float]:
    """Returns the `top_k` of a position's log-probabilities, most likely first; the prompt's own token is one more."""
    found = sorted(((float(one["logprob"]), -int(token)) for token, one in entry.items()), reverse=True)[:top_k]
    if len(found) < top_k:
        raise ValueError(f"a server told {len(found)} tokens of a position, and {top_k} were asked for")
    return {-token: log_prob for log_prob, token in found}


class ServerWriter(Writer):
    """Writes shards on servers."""

    made_with = WRITTEN_BY

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SynthesisConfig,
        top_k: int | None = None,
    ) -> None:
        """Checks as `Writer`; no server is asked yet.

        Args:
            model: what the servers run; it predicts a few tokens here, to compare.
            tokenizer: of the model.
            config: what makes the text, and the servers.
            top_k: tokens of which the probabilities are kept at each position.
        """
        super().__init__(model, tokenizer, config, top_k)
        self.servers = Servers(config.server)
        self._is_compared = False

    def write(self, number: int, rows: int, watch: Progress | None = None) -> Shard:
        """Returns shard `number` of `rows` tapes.

        Raises:
            ConnectionError: no server answers any more.
            ValueError: there is none, a server has another model, or refuses.
        """
        if not self.servers.urls:
            raise ValueError("this text was written by a server, and more of it is wanted; give data.server=URL")
        begun = time.perf_counter()
        self.compare()
        size = self.config.block_size
        script = self.script.shuffled(random.Random(f"{self.config.seed}/{number}"))
        file = None if self.kept is None else _tapes_file(*self.kept, number, rows)
        done = {} if file is None else _tapes_in(file, rows)
        counter = _Counter(watch, len(done) * size, rows * size)

        def tape(row: int) -> list[Document]:
            return list(self._tape(script, number, rows, row, counter))

        for row, documents in self._together(tape, [row for row in range(rows) if row not in done]):
            done[row] = documents
            if file is not None:
                _append(file, row, documents)
        documents = judged([document for row in sorted(done) for document in done[row]])
        top_k, shard = self.top_k, assembled(number, rows, documents, size, 0.0)[0]
        top = self._predicted(shard.blocks, top_k) if top_k is not None and len(shard.blocks) else None
        facts = {**shard.facts, "seconds": round(time.perf_counter() - begun, 2)}
        return replace(shard, facts=facts, top=top)

    def _tape(self, script: Script, number: int, rows: int, row: int, counter: _Counter) -> Iterator[Document]:
        """Yields the documents of a tape, written one after the other."""
        draw = random.Random(f"{self.config.seed}/{number}/{row}")
        room, opened = self.config.block_size, 0
        while room:
            document = self._document(row, script.opening(draw, row + rows * opened), room, draw)
            counter.add(len(document.ids))
            room, opened = room - len(document.ids), opened + 1
            yield document

    def _document(self, row: int, opening: Opening, room: int, draw: random.Random) -> Document:
        """Returns a document of at most `room` tokens."""
        ids = opening.ids[:room]
        put_in, log_prob = len(ids), 0.0
        sampled = {"temperature": self.config.temperature, "top_p": self.config.top_p}
        if self.config.top_k is not None:
            sampled["top_k"] = self.config.top_k
        ends = self.script.ends
        steps: list[tuple[int, frozenset[int], dict[str, float]]] = [(room, ends, sampled)]
        if opening.kind == "chat":
            steps.insert(0, (room, ends | {self.script.answer_opening[0]}, sampled))
        elif opening.greedy:
            steps.insert(0, (len(ids) + opening.greedy, ends, {"temperature": 0.0}))
        ended = False
        for step, (limit, stops, settings) in enumerate(steps):
            most = min(limit, room) - len(ids)
            if most <= 0 or ended:
                continue
            seed = draw.getrandbits(31)
            part = self.servers.complete(row, ids, stops, max_tokens=most, seed=seed, **settings)
            ids, log_prob, ended = ids + part.ids, log_prob + sum(part.log_probs), part.ended
            if opening.kind == "chat" and step == 0 and ended:
                turn_end, *rest = self.script.answer_opening
                given = rest[: room - len(ids)]
                ids, put_in, ended = [*ids[:-1], turn_end, *given], put_in + len(given), False
        return Document(row, ids, opening.kind, min(len(opening.ids), room), len(ids) - put_in, ended, log_prob)

    def _predicted(self, blocks: Rows, top_k: int) -> TopProbabilities:
        """Returns what the servers predict at each position of `blocks`, each document alone: [N, L - 1, K]."""
        assert blocks.starts is not None
        count, length = blocks.stored.shape

        def block(place: int) -> TopProbabilities:
            assert blocks.starts is not None
            ids = blocks.stored[place].tolist()
            found: list[dict[int, float]] = []
            for begin, end in pairwise([*blocks.starts[place].nonzero().squeeze(1).tolist(), length]):
                # After a document's last token comes another document; what is predicted there is not trained on.
                own = ids[begin:end] if end == length else [*ids[begin:end], ids[begin]]
                found += self.servers.predicted(place, own, top_k) if len(own) > 1 else []
            return _top_of(found)

        made = dict(self._together(block, range(count)))
        parts = [made[place] for place in range(count)]
        shape = (count, length - 1)
        joined = TopProbabilities.joined(parts)
        return TopProbabilities(
            joined.indices.view(*shape, top_k), joined.log_probs.view(*shape, top_k), joined.log_rest.view(shape)
        )

    def _together(self, work: Callable[[int], _R], places: Sequence[int]) -> Iterator[tuple[int, _R]]:
        """Yields place and result of `work` for each of `places`, as they get ready; ends all when one fails."""
        if not places:
            return
        threads = min(len(places), REQUESTS * len(self.servers.urls))
        with ThreadPoolExecutor(threads, "llmqat-server") as pool, _ending(self.servers, pool):
            futures: dict[Future[_R], int] = {pool.submit(work, place): place for place in places}
            for future in as_completed(futures):
                yield futures[future], future.result()

    @torch.no_grad()
    def compare(self) -> None:
        """Sees that each server predicts what the model here does, once.

        Raises:
            ConnectionError: a server does not answer.
            ValueError: it has another model.
        """
        if self._is_compared:
            return
        size = self.config.block_size
        context = size + (self.top_k is not None)
        self.servers.check(context)
        opening = self.script.opening(random.Random(self.config.seed), 0).ids[: size - 1]
        for url in self.servers.urls:
            alone = Servers([url])
            alone.check(context)
            most = min(COMPARED_TOKENS, size - len(opening))
            settings = {"max_tokens": most, "temperature": 1.0, "seed": self.config.seed}
            part = alone.complete(0, opening, self.script.ends, **settings)
            own = _log_probs(self.model, [*opening, *part.ids], len(opening))
            if self.top_k is not None:
                alone.predicted(0, [*opening, *part.ids], self.top_k)
            off = float((own - torch.tensor(part.log_probs)).abs().mean())
            if not off <= MOST_DIFFERENCE:
                raise ValueError(
                    f"the server {url} does not predict what {name_of(self.model)} does: log-probabilities of its text "
                    f"differ by {off:.2g} nats a token; serve this model there, in its own precision"
                )
            log.info("%s runs the same model: log-probabilities differ by %.2g nats a token", url, off)
        self._is_compared = True


def _log_probs(model: PreTrainedModel, ids: list[int], first: int) -> Tensor:
    """Returns the log-probabilities of `ids` from `first` on, float32."""
    training = model.training
    model.eval()
    try:
        inputs = torch.tensor([ids], device=model_device(model))
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits[0, first - 1 : -1].float()
    finally:
        model.train(training)
    return logits.log_softmax(-1).gather(1, inputs[0, first:, None]).squeeze(1).cpu()


def _top_of(found: Sequence[Mapping[int, float]]) -> TopProbabilities:
    """Returns log-probabilities by token as tensors."""
    log_probs = torch.tensor([list(one.values()) for one in found], dtype=torch.float64)
    rest = (1 - log_probs.exp().sum(-1)).clamp(min=0).log()
    return TopProbabilities(torch.tensor([list(one) for one in found]), log_probs.float(), rest.float())


@contextmanager
def _ending(servers: Servers, pool: ThreadPoolExecutor) -> Iterator[None]:
    """Ends what runs and what waits where the inside raises, or is left."""
    try:
        yield
    except BaseException:
        servers.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


class _Counter:
    """Counts tokens of many threads, and passes them on."""

    def __init__(self, watch: Progress | None, done: int, total: int) -> None:
        self._watch, self._done, self._total = watch, done, total
        self._lock = threading.Lock()

    def add(self, tokens: int) -> None:
        with self._lock:
            self._done += tokens
            if self._watch is not None:
                self._watch(self._done, self._total)


# Tapes of an unfinished shard


def _tapes_file(folder: Path, made_with: str, number: int, rows: int) -> Path:
    """Returns the file in `folder` for the finished tapes of a shard; another where it is made with something else."""
    known = hashlib.sha256(f"{made_with} {rows}".encode()).hexdigest()[:12]
    return folder / TAPES.replace("*", f"{number:05d}-{known}")


def remove_tapes(folder: Path, number: int | None = None) -> None:
    """Deletes the tapes of a shard in `folder`, or of all."""
    for file in folder.glob(TAPES if number is None else TAPES.replace("*", f"{number:05d}-*")):
        file.unlink()


def _append(file: Path, row: int, documents: Sequence[Document]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        # The end of a line first: a killed run may have left part of one.
        lines.write("\n" + json.dumps({"row": row, "documents": [asdict(document) for document in documents]}))


def _tapes_in(file: Path, rows: int) -> dict[int, list[Document]]:
    """Returns the whole tapes in a file, by row."""
    found: dict[int, list[Document]] = {}
    if not file.is_file():
        return found
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[int(entry["row"])] = [Document(**document) for document in entry["documents"]]
    kept = {row: documents for row, documents in found.items() if row < rows}
    log.info("%d of %d tapes are there already", len(kept), rows)
    return kept

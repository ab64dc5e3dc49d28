"""Servers that run one model: vLLM, or others whose completions take token ids and return them.

A server that does not answer is tried again for a while. Then the others do its work, and when none is left there is an
error that says why the last one did not answer.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

WAITS = (1, 2, 4, 8, 16)
"""Seconds between the trials of a request that a server does not answer."""
FIRST_WAITS = (1, 2)
"""The same, of the first request to a server, whose address may be wrong."""
TIMEOUT = (10, 1800)
"""Seconds to connect, and for an answer: a request waits on the server for those before it."""
BUSY = (429, 500, 502, 503, 504)
"""HTTP status of a server that may answer later."""
REST = 60
"""Seconds for which a server that did not answer is left alone."""
TICK = 1.0
"""Seconds between two looks at what threads have done."""
KEY_VARIABLE = "LLMQAT_SERVER_KEY"
"""Environment variable of the key that servers ask for."""
_LOOPBACK = ("localhost", "127.", "::1")


class _RequestFailed(ConnectionError):
    """A server fails on one request, again and again."""


@dataclass(frozen=True)
class ServerAnswer:
    """What a server wrote."""

    ids: list[int]
    log_probs: list[float]
    """Of each id, in nats."""
    ended: bool
    """Whether the last id is one of those that end it."""


class Stopped(Exception):
    """Another request has failed, so no more are sent."""


class Servers:
    """Servers that run one model; asked from many threads."""

    def __init__(self, urls: Sequence[str]) -> None:
        """Takes their addresses, such as http://localhost:8000; nothing is sent yet."""
        self.urls = [_with_version(url) for url in urls]
        self._models: dict[str, str] = {}
        self._gone: dict[str, tuple[float, str]] = {}
        self._sessions = threading.local()
        self._stopped = threading.Event()

    def check(self, context: int) -> None:
        """Asks each server for its model; those that were given up are asked again.

        Args:
            context: tokens that it is to take.

        Raises:
            ConnectionError: one does not answer.
            ValueError: one has several models, or takes fewer tokens.
        """
        self._gone.clear()
        for url in self.urls:
            found = self._asked(url, "models", None, FIRST_WAITS).get("data") or []
            whole = {entry.get("root") or entry["id"]: entry for entry in found if not entry.get("parent")}
            if len(whole) != 1:
                raise ValueError(
                    f"the server {url} has {len(whole)} models ({', '.join(map(str, whole)) or 'none'}); give one that "
                    "has one"
                )
            entry = next(iter(whole.values()))
            longest = entry.get("max_model_len")
            if longest is not None and longest < context:
                raise ValueError(
                    f"the server {url} takes {longest} tokens, and {context} are needed; start it with a longer "
                    f"context (--max-model-len {context}), or give a shorter data.block_size"
                )
            self._models[url] = str(entry["id"])

    def alone(self, url: str) -> Servers:
        """Returns one of the checked servers by itself, which no other stands in for."""
        one = Servers([url])
        one._models = self._models
        return one

    def complete(
        self, place: int, prompt: list[int], ends: frozenset[int], *, max_tokens: int, seed: int, **settings: Any
    ) -> ServerAnswer:
        """Returns a continuation of `prompt` from the server of `place`, or from another server if that one is gone.

        A server may return fewer tokens than requested, because of limits of its own. Then it is asked for the rest.

        Args:
            place: any number; equal numbers mean the same server while it answers.
            prompt: token ids, at least one.
            ends: token ids that end the continuation; the one that ends it is its last.
            max_tokens: most token ids that are written.
            seed: of the server's sampling.
            settings: temperature and other sampling parameters of the API.

        Raises:
            ConnectionError: no server answers.
            ValueError: the server refuses, or returns no ids.
        """
        ids: list[int] = []
        log_probs: list[float] = []
        while len(ids) < max_tokens:
            body = {
                "prompt": [*prompt, *ids],
                "max_tokens": max_tokens - len(ids),
                "seed": (seed + len(ids)) % 2**31,
                "stop_token_ids": sorted(ends),
                "ignore_eos": True,  # what ends a text is said above; the server's own idea may be another
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
            part, found = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
            if not part or found is None or len(part) != len(found):
                raise ValueError(
                    f"the server {url} returns no token ids with their log-probabilities (return_token_ids, logprobs); "
                    "give one that does, such as vLLM"
                )
            count = next((n for n, token in enumerate(part, 1) if token in ends), len(part))
            if choice.get("finish_reason") == "stop" and part[count - 1] not in ends:
                raise ValueError(
                    f"the server {url} ended a text without saying by which token, so documents would not end; give "
                    "one that knows ignore_eos and returns the last token, such as vLLM"
                )
            ids, log_probs = ids + part[:count], log_probs + [float(one) for one in found[:count]]
            if ids[-1] in ends:
                return ServerAnswer(ids, log_probs, ended=True)
        return ServerAnswer(ids, log_probs, ended=False)

    def predicted(self, place: int, ids: list[int], top_k: int) -> list[list[tuple[int, float]]]:
        """Returns the `top_k` most likely tokens at each of `ids` but the first, given those before, most likely first.

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

    @property
    def is_stopped(self) -> bool:
        """Whether a request has failed, so that nothing more is wanted."""
        return self._stopped.is_set()

    def together(self, work: Callable[[int], None], places: Sequence[int], threads: int) -> Iterator[None]:
        """Does `work`, which asks servers, for each of `places` in threads; yields each second, and at the end.

        When one fails, no request begins any more, and the error is raised at once.
        """
        wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._stopped.clear()
        for place in places:
            wanted.put(place)

        for _ in range(min(len(places), threads)):  # none of which keeps the process from ending
            threading.Thread(target=self._works, args=(work, wanted, results), daemon=True).start()
        try:
            done = 0
            while done < len(places):
                try:
                    error = results.get(timeout=TICK)
                except queue.Empty:
                    yield
                    continue
                if error is not None:
                    raise error
                done += 1
            yield
        except BaseException:
            self._stopped.set()
            raise

    def _works(
        self,
        work: Callable[[int], None],
        wanted: queue.SimpleQueue[int],
        results: queue.SimpleQueue[BaseException | None],
    ) -> None:
        """Does the work of one thread: places that are `wanted`, until there is none or an error elsewhere."""
        while not self._stopped.is_set():
            try:
                place = wanted.get_nowait()
            except queue.Empty:
                return
            try:
                work(place)
                results.put(None)
            except BaseException as error:  # raised in the thread that waits
                results.put(error)

    def _choice(self, place: int, body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Returns the server that answered, and its answer."""
        turn = place % len(self.urls)
        reasons = []
        for url in (*self.urls[turn:], *self.urls[:turn]):
            since, reason = self._gone.get(url, (-REST, ""))
            if time.monotonic() - since < REST:
                reasons.append(reason)
                continue
            try:
                found = self._asked(url, "completions", {"model": self._models[url], **body}, WAITS)
            except _RequestFailed as error:  # which may be the request's own fault
                reasons.append(str(error))
                continue
            except ConnectionError as error:
                if url not in self._gone:
                    log.warning("%s", error)
                self._gone[url] = (time.monotonic(), str(error))
                reasons.append(str(error))
                continue
            choices = found.get("choices")
            if not choices:
                raise ValueError(f"the server {url} returns no completion: {found}")
            return url, choices[0]
        raise ConnectionError(
            f"no server answers any more: {'; '.join(reasons)}. See what each says itself, start it again, and repeat "
            "the command"
        )

    def _asked(self, url: str, path: str, body: Mapping[str, Any] | None, waits: Sequence[int]) -> dict[str, Any]:
        """Returns the answer of one server, which is tried several times.

        Raises:
            ConnectionError: there is none.
            ValueError: it refuses.
        """
        import requests  # which comes with datasets

        reason, status = "", 0
        for wait in (*waits, None):
            if body is not None and self._stopped.is_set():
                raise Stopped
            try:
                answer = self._sent(url, path, body)
                if answer.ok:
                    return dict(answer.json())
                status, reason = answer.status_code, f"status {answer.status_code}: {answer.text[:300]}"
                _check_status(status, url, path, reason)
            except requests.ReadTimeout:
                raise ConnectionError(f"the server {url} does not answer within {TIMEOUT[1]} s") from None
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                status, reason = 0, str(error)
            except requests.exceptions.JSONDecodeError as error:
                raise ValueError(f"the server {url} does not answer in JSON; give the address of its API") from error
            if wait is not None:
                self._stopped.wait(wait * random.uniform(0.5, 1.5))
        kind = _RequestFailed if status == 500 else ConnectionError
        raise kind(f"the server {url} does not answer ({reason})")

    def _sent(self, url: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """Returns the answer to one trial of a request."""
        import requests

        if not hasattr(self._sessions, "own"):
            self._sessions.own = requests.Session()
        key = os.environ.get(KEY_VARIABLE)
        options: dict[str, Any] = {"headers": {"Authorization": f"Bearer {key}"}} if key else {}
        if (urlsplit(url).hostname or "").startswith(_LOOPBACK):  # which no proxy reaches
            options["proxies"] = {"http": "", "https": ""}
        method = "GET" if body is None else "POST"
        return self._sessions.own.request(method, f"{url}/{path}", json=body, timeout=TIMEOUT, **options)


def _check_status(status: int, url: str, path: str, reason: str) -> None:
    """Raises ValueError where another trial of a request would get the same answer."""
    if status in (401, 403):
        raise ValueError(f"the server {url} wants a key ({reason}); give it in the environment as {KEY_VARIABLE}")
    if status == 404 and path == "models":
        raise ValueError(f"{url} is no address of a server's API ({reason}); write http://HOST:PORT")
    if status not in BUSY:
        raise ValueError(f"the server {url} refuses a request, {reason}")


def _with_version(url: str) -> str:
    """Returns the address of the API below a server's."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _most_likely(entry: Mapping[str, Mapping[str, Any]], top_k: int) -> list[tuple[int, float]]:
    """Returns the `top_k` of a position's log-probabilities, most likely first; the prompt's own token is one more."""
    found = sorted(((float(one["logprob"]), -int(token)) for token, one in entry.items()), reverse=True)[:top_k]
    if len(found) < top_k:
        raise ValueError(f"a server told {len(found)} tokens of a position, and {top_k} were asked for")
    return [(-token, log_prob) for log_prob, token in found]

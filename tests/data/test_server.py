"""Text from servers: here one that answers as vLLM does, with a tiny model behind it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llmqat.data import DataConfig, quality, server_writer
from llmqat.data import server as server_module
from llmqat.data.shards import WrittenFolder, write_shards
from llmqat.data.strategy import SynthesisConfig
from llmqat.data.synthesis import synthesize
from llmqat.data.teacher_cache import CachePlace, TeacherCache
from llmqat.data.writer import Keeper
from llmqat.files import is_locked_by_us
from tests.tiny import tiny_llama, tiny_tokenizer

SIZE = 48


class Server(ThreadingHTTPServer):
    """Answers completions of token ids with a model; what it is asked for is kept."""

    daemon_threads = True

    def __init__(self, model: PreTrainedModel, context: int = 64) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.context = model, context
        self.models = [{"id": "tiny", "parent": None, "max_model_len": context}]
        self.asked: list[dict[str, Any]] = []
        self.fails_after: int | None = None
        self.most = 1 << 30
        self.key = ""
        self.changed: Callable[[dict[str, Any]], dict[str, Any]] = lambda choice: choice
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @torch.no_grad()
    def completed(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, ends = list(body["prompt"]), set(body.get("stop_token_ids", ()))
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        own: list[int] = []
        log_probs: list[float] = []
        while len(own) < min(body["max_tokens"], self.most) and not (own and own[-1] in ends):
            found = self.model(torch.tensor([ids + own])).logits[0, -1].log_softmax(-1)
            greedy = body["temperature"] == 0
            drawn = (
                found.argmax()
                if greedy
                else (found / body["temperature"]).softmax(-1).multinomial(1, generator=generator)
            )
            own.append(int(drawn))
            log_probs.append(float(found[own[-1]]))
        choice: dict[str, Any] = {
            "token_ids": own,
            "logprobs": {"token_logprobs": log_probs},
            "finish_reason": "stop" if own[-1] in ends else "length",
        }
        if (top_k := body.get("prompt_logprobs")) is not None:
            rows = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            choice["prompt_logprobs"] = [None]
            for row, token in zip(rows[:-1], ids[1:], strict=True):  # the prompt's own token is always among them
                kept = {int(i): float(row[i]) for i in [*row.topk(top_k).indices, torch.tensor(token)]}
                choice["prompt_logprobs"].append({str(i): {"logprob": value} for i, value in kept.items()})
        return self.changed(choice)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.answer(401, {"error": "no key"})
        else:
            self.answer(200 if self.path == "/v1/models" else 404, {"data": self.server.models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            after = self.server.fails_after
            if after is not None and len(self.server.asked) >= after:
                self.answer(503, {"error": "the engine is dead"})
                return
            self.server.asked.append(body)
            self.answer(200, {"choices": [self.server.completed(body)]})

    def answer(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "WAITS", (0,))
    monkeypatch.setattr(server_module, "FIRST_WAITS", ())
    monkeypatch.setattr(server_writer, "REQUESTS", 2)


@pytest.fixture
def started() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(model: PreTrainedModel | None = None, **options: Any) -> Server:
        servers.append(Server(tiny_llama() if model is None else model, **options))
        return servers[-1]

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


def fill(folder: Path, *servers: Server, tokens: int = 400, kept: int | None = None, **settings: Any) -> WrittenFolder:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    urls = tuple(one.url for one in servers)
    config = SynthesisConfig(**{"block_size": SIZE, "batch_size": 6, "server": urls, **settings})
    keeper = None if kept is None else Keeper(model, tokenizer, CachePlace(folder / "teacher", kept), apart=True)
    return write_shards(model, tokenizer, tokens, folder, config, keeper=keeper)


def ids_of(written: WrittenFolder) -> list[list[int]]:
    return [row for shard in written.shards() for row in shard.blocks.stored.tolist()]


def test_the_server_s_text_is_that_of_the_model(
    tmp_path: Path, started: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
):
    """Where nothing is left to chance, it is what the model writes here, to the last token."""
    monkeypatch.setattr(quality, "MOST_REPEATED", 1.0)  # as it does without chance
    (tmp_path / "prompts.txt").write_text("one thing\nanother\n")
    settings = {"strategy": "prompts", "prompts": tmp_path / "prompts.txt", "temperature": 1e-6, "batch_size": 1}
    there = fill(tmp_path / "there", started(), tokens=SIZE, **settings)
    here = fill(tmp_path / "here", tokens=SIZE, **settings)
    assert ids_of(there) == ids_of(here)
    facts = [one.manifest.shards[0]["facts"]["kinds"]["prompt"] for one in (there, here)]
    assert facts[0]["written"] == facts[1]["written"]
    assert facts[0]["log_prob"] == pytest.approx(facts[1]["log_prob"], abs=1e-2)


def test_chats_have_the_template_s_words_between_turns(tmp_path: Path, started: Callable[..., Server]):
    tokenizer = tiny_tokenizer()
    server = started()
    written = fill(tmp_path / "text", server, strategy="chat", tokens=600)
    texts = [tokenizer.decode(row) for row in ids_of(written)]
    turned = [text for text in texts if "\n<assistant>" in text]
    assert turned
    assert all("<user>" in text for text in turned)
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    written = [body for body in server.asked if body["stop_token_ids"]]  # without those that compare
    assert {newline in body["stop_token_ids"] for body in written} == {True, False}  # users' turns and answers


def test_tokens_are_drawn_as_the_recipe_says(tmp_path: Path, started: Callable[..., Server]):
    server = started()
    fill(tmp_path / "text", server, strategy="sampling", temperature=0.7, top_p=0.9, top_k=20, chat_share=0.0)
    drawn = {(body["temperature"], body["top_p"], body["top_k"], body["ignore_eos"]) for body in server.asked}
    assert drawn == {(0.7, 0.9, 20, True)}


def test_two_processes_do_not_write_one_shard(tmp_path: Path, started: Callable[..., Server]):
    dying = started()
    dying.fails_after = 6
    with pytest.raises(ConnectionError):
        fill(tmp_path / "text", dying)
    with next((tmp_path / "text").glob(".tapes-*")).open("a") as other:
        assert is_locked_by_us(other)
        with pytest.raises(ValueError, match="another process writes text into"):
            fill(tmp_path / "text", started())


def test_documents_that_do_not_fit_are_left_out(tmp_path: Path, started: Callable[..., Server]):
    """As two processes may have left them."""
    dying = started()
    dying.fails_after = 6
    with pytest.raises(ConnectionError):
        fill(tmp_path / "text", dying)
    tapes = next((tmp_path / "text").glob(".tapes-*"))
    tapes.write_text(2 * tapes.read_text())
    assert fill(tmp_path / "text", started()).blocks > 0


def test_a_server_that_leaves_out_the_last_token_is_refused(tmp_path: Path, started: Callable[..., Server]):
    server = started()
    server.changed = lambda choice: {**choice, "finish_reason": "stop"}
    with pytest.raises(ValueError, match="ended a text without saying by which token"):
        fill(tmp_path / "text", server)


def test_a_recipe_keeps_what_a_server_writes() -> None:
    with pytest.raises(ValueError, match=r"data\.server needs data\.path=FOLDER"):
        DataConfig(server="http://localhost:8000")
    with pytest.raises(ValueError, match=r"data\.mix: server is no key of a source in a mix"):
        DataConfig(mix=[{"source": "pydoc"}, {"server": "http://localhost:8000", "path": "written"}])


def test_the_first_tokens_of_plain_documents_are_the_likeliest(tmp_path: Path, started: Callable[..., Server]):
    server = started()
    fill(tmp_path / "text", server, chat_share=0.0)
    greedy = [body for body in server.asked if body["temperature"] == 0]
    assert greedy
    assert {body["max_tokens"] for body in greedy} <= {1, 2, 3, 4}


def test_what_the_model_predicts_comes_from_the_server(tmp_path: Path, started: Callable[..., Server]):
    written = fill(tmp_path / "text", started(), kept=8)
    cache = TeacherCache(tmp_path / "text" / "teacher")
    for shard in written.shards():
        assert cache.missing(shard.blocks) == []
        assert cache.divergence(tiny_llama(), shard.blocks) < 1e-3
    assert written.manifest.made_with["written_by"] == "a server"
    assert not list((tmp_path / "text").glob(".*"))


def test_a_run_whose_server_dies_goes_on_where_it_was(tmp_path: Path, started: Callable[..., Server]):
    whole = fill(tmp_path / "whole", started())
    dying = started()
    dying.fails_after = 6
    with pytest.raises(ConnectionError, match="no server answers any more"):
        fill(tmp_path / "text", dying)
    tapes = next((tmp_path / "text").glob(".tapes-*"))
    kept = [json.loads(line)["ids"] for line in tapes.read_text().splitlines() if line]
    assert kept
    tapes.write_text(tapes.read_text() + '\n{"tape": 5, "ids"')  # as a killed run leaves it
    other = started()
    assert ids_of(fill(tmp_path / "text", other)) == ids_of(whole)
    compared = 1
    asked = [body["prompt"] for body in other.asked[compared:]]
    assert not any(prompt == ids[: len(prompt)] for prompt in asked for ids in kept)
    assert not list((tmp_path / "text").glob(".*"))


def test_tapes_of_other_settings_are_not_used(tmp_path: Path, started: Callable[..., Server]):
    dying = started()
    dying.fails_after = 6
    with pytest.raises(ConnectionError):
        fill(tmp_path / "text", dying)
    assert ids_of(fill(tmp_path / "text", started(), seed=1)) == ids_of(fill(tmp_path / "whole", started(), seed=1))


def test_another_server_does_the_work_of_one_that_dies(
    tmp_path: Path, started: Callable[..., Server], caplog: pytest.LogCaptureFixture
):
    dying, living = started(), started()
    dying.fails_after = 4
    assert ids_of(fill(tmp_path / "text", dying, living)) == ids_of(fill(tmp_path / "whole", started()))
    assert f"the server {dying.url}/v1 does not answer (status 503" in caplog.text
    assert len(living.asked) > 4


def test_a_server_that_returns_fewer_tokens_is_asked_to_go_on(
    tmp_path: Path, started: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quality, "MOST_REPEATED", 1.0)
    (tmp_path / "prompts.txt").write_text("one thing\nanother\n")
    settings = {"strategy": "prompts", "prompts": tmp_path / "prompts.txt", "temperature": 1e-6}
    short = started()
    short.most = 5
    assert ids_of(fill(tmp_path / "short", short, **settings)) == ids_of(
        fill(tmp_path / "whole", started(), **settings)
    )


def test_servers_are_asked_what_is_not_known_of_finished_text(tmp_path: Path, started: Callable[..., Server]):
    server = started()
    fill(tmp_path / "text", server)
    fill(tmp_path / "text", server, kept=8)
    predictions = [body for body in server.asked if "prompt_logprobs" in body]
    written = fill(tmp_path / "text", server, kept=8)
    assert predictions == [body for body in server.asked if "prompt_logprobs" in body]
    cache = TeacherCache(tmp_path / "text" / "teacher")
    assert [cache.missing(shard.blocks) for shard in written.shards()] == [[]] * len(written.manifest.shards)


def test_an_error_does_not_wait_for_requests_under_way():
    servers = server_module.Servers(["http://127.0.0.1:9"])
    under_way = threading.Event()  # set at the end, so that no thread is left

    def work(place: int) -> None:
        if place:
            under_way.wait(60)
        raise ValueError("refused")

    begun = time.monotonic()
    with pytest.raises(ValueError, match="refused"):
        list(servers.together(work, range(3), threads=3))
    assert time.monotonic() - begun < 30
    under_way.set()


def test_more_text_of_a_server_needs_one(tmp_path: Path, started: Callable[..., Server]):
    folder = tmp_path / "text"
    settings = {"block_size": SIZE, "batch_size": 6, "folder": folder}
    before = ids_of(fill(folder, started()))
    blocks = synthesize(tiny_llama(), tiny_tokenizer(), 400, **settings)
    assert blocks.ids.tolist() == before[: len(blocks.ids)]
    with pytest.raises(ValueError, match=r"was written by a server, and more of it is wanted; give data.server=URL"):
        synthesize(tiny_llama(), tiny_tokenizer(), 4000, **settings)
    assert len(synthesize(tiny_llama(), tiny_tokenizer(), 700, server=started().url, **settings).ids) == 15


def test_text_of_this_process_is_not_gone_on_with_by_a_server(tmp_path: Path, started: Callable[..., Server]):
    fill(tmp_path)
    with pytest.raises(ValueError, match="written_by was 'llmqat', now 'a server'"):
        fill(tmp_path, started())


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda choice: {key: value for key, value in choice.items() if key not in keys}


@pytest.mark.parametrize(
    ("changes", "kept", "message"),
    [
        ({"model": tiny_llama(seed=1)}, None, "does not predict what .* does: log-probabilities of its text differ by"),
        ({"context": 40}, None, r"takes 40 tokens, and 48 are needed; .*--max-model-len 48"),
        ({"context": 48}, 8, "takes 48 tokens, and 49 are needed"),
        ({"models": [{"id": "a"}, {"id": "b"}]}, None, r"has 2 models \(a, b\)"),
        ({"key": "secret"}, None, r"wants a key .*; give it in the environment as LLMQAT_SERVER_KEY"),
        ({"changed": without("token_ids")}, None, "returns no token ids"),
        ({"changed": without("prompt_logprobs")}, 8, "does not tell what it predicts in a prompt"),
    ],
)
def test_servers_that_will_not_do_are_refused(
    changes: dict[str, Any], kept: int | None, message: str, tmp_path: Path, started: Callable[..., Server]
):
    server = started()
    for name, value in changes.items():
        setattr(server, name, value)
    server.models = changes.get("models", [{"id": "tiny", "max_model_len": server.context}])
    with pytest.raises(ValueError, match=message):
        fill(tmp_path / "text", server, kept=kept)
    assert len(server.asked) <= 2 * server_writer.COMPARED_TEXTS  # before anything is written


def test_a_key_is_given_to_servers(tmp_path: Path, started: Callable[..., Server], monkeypatch: pytest.MonkeyPatch):
    server = started()
    server.key = "secret"
    monkeypatch.setenv("LLMQAT_SERVER_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # of which a server on this machine knows nothing
    assert fill(tmp_path, server).blocks


def test_addresses_that_are_none_are_refused(tmp_path: Path, started: Callable[..., Server]):
    server = started()
    with pytest.raises(ValueError, match="is no address of a server's API"):
        synthesize(tiny_llama(), tiny_tokenizer(), 400, block_size=SIZE, server=f"{server.url}/else")
    with pytest.raises(ValueError, match="server 'localhost:8000' is no address; write http://HOST:PORT"):
        SynthesisConfig(server="localhost:8000")
    with pytest.raises(ValueError, match="names an address twice"):
        SynthesisConfig(server=(server.url, server.url))
    with pytest.raises(ConnectionError, match="does not answer"):
        synthesize(tiny_llama(), tiny_tokenizer(), 400, block_size=SIZE, server="http://127.0.0.1:9")

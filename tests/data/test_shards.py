from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset

from llmqat.data import DataConfig, load_blocks, shards, writer
from llmqat.data.blocks import token_blocks
from llmqat.data.processes import Processes
from llmqat.data.shards import WrittenFolder, remove_shards, write_shards
from llmqat.data.strategy import SynthesisConfig
from llmqat.data.synthesis import synthesize
from llmqat.data.teacher_cache import CachePlace, TeacherCache
from llmqat.data.writer import WRITER_VERSION, Keeper, ModelWriter
from tests.children import Moment, die_at
from tests.tiny import tiny_llama, tiny_tokenizer

KILLS = int(os.environ.get("LLMQAT_TEST_KILLS", "3"))
TOKENS = (2 * KILLS + 2) * 4 * 48
"""More shards than kills: whatever is killed has a shard to write."""


def fill(folder: Path, tokens: int = TOKENS, seed: int = 0, model_seed: int = 0, **settings: Any) -> WrittenFolder:
    config = SynthesisConfig(**{"block_size": 48, "batch_size": 4, "seed": seed, **settings})
    return write_shards(tiny_llama(seed=model_seed), tiny_tokenizer(), tokens, folder, config)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "text"
    fill(folder)
    return folder


def fill_until(folder: Path, moment: Moment | None) -> None:
    if moment is not None:
        die_at(moment, folder)
    fill(folder)


def moments() -> Iterator[Moment | None]:
    """Yields the moments to be killed at, in the writing of a shard or of its files, then nothing."""
    draw = random.Random(0)
    for number in range(KILLS):
        yield ("module", draw.randint(1, 3000)) if number % 2 else ("file", draw.randint(1, 8))
    yield None


def test_a_run_that_is_killed_goes_on_and_writes_the_same(
    undisturbed: Path, tmp_path: Path, forkserver: ForkServerContext
):
    folder = tmp_path / "text"
    for moment in moments():
        before = contents(folder)
        process = forkserver.Process(target=fill_until, args=(folder, moment))
        process.start()
        process.join(120)
        assert process.exitcode == (0 if moment is None else -signal.SIGKILL)
        assert before.items() <= contents(folder).items()  # no finished shard is lost or changed
    assert contents(folder) == contents(undisturbed)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    manifests = [json.loads((path / "llmqat.json").read_text()) for path in (folder, undisturbed)]
    assert manifests[0]["made_with"] == manifests[1]["made_with"]
    assert [line["sha256"] for line in manifests[0]["shards"]] == [line["sha256"] for line in manifests[1]["shards"]]


def test_a_shard_depends_on_number_and_rows_alone(undisturbed: Path):
    config = SynthesisConfig(block_size=48, batch_size=4)
    lines = json.loads((undisturbed / "llmqat.json").read_text())["shards"]
    last = ModelWriter(tiny_llama(), tiny_tokenizer(), config).write(lines[-1]["number"], lines[-1]["rows"])
    rows = load_dataset("parquet", data_files=str(undisturbed / lines[-1]["file"]), split="train")
    assert rows["input_ids"][:] == last.blocks.ids.tolist()


def test_what_fails_in_one_process_fails_in_all():
    """None waits for shards that will not come."""

    class Two(Processes):
        def gathered(self, value: Any) -> list[Any]:
            return [value, ([], ConnectionError("the other one's server is gone"))]

    writer_here = ModelWriter(tiny_llama(), tiny_tokenizer(), SynthesisConfig(block_size=16, batch_size=2))
    with pytest.raises(ConnectionError, match="the other one's server is gone"):
        list(writer_here.shards(64, processes=Two(0, 2)))


def test_datasets_and_recipes_read_it(undisturbed: Path, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    rows = load_dataset(str(undisturbed), split="train", cache_dir=str(tmp_path))  # else that of any folder "text"
    assert set(rows.column_names) == {"input_ids", "seq_lengths", "text"}
    assert rows[0]["text"] == tokenizer.decode(rows[0]["input_ids"])
    config = DataConfig(source="dataset", path=undisturbed, block_size=16)
    assert len(load_blocks(config, tokenizer)) > 8
    again = DataConfig(path=undisturbed, tokens=480, block_size=48, batch_size=4)
    blocks = load_blocks(again, tokenizer, tiny_llama())
    assert blocks.ids.tolist() == rows["input_ids"][:10]
    assert blocks.rows.inputs()["position_ids"].tolist() == [
        [place for length in lengths for place in range(length)] for lengths in rows["seq_lengths"][:10]
    ]
    in_memory = synthesize(tiny_llama(), tokenizer, TOKENS, block_size=48, batch_size=4)
    assert in_memory.ids.tolist() == rows["input_ids"][: len(in_memory)]


def test_more_tokens_are_more_shards(tmp_path: Path):
    first = fill(tmp_path, tokens=200)
    before = contents(tmp_path)
    second = fill(tmp_path, tokens=700)
    assert before.items() < contents(tmp_path).items()
    assert first.blocks < second.blocks
    assert second.blocks * 48 >= 700


def test_a_damaged_shard_is_written_again(tmp_path: Path):
    files = fill(tmp_path, tokens=700).files
    before = contents(tmp_path)
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].unlink()
    fill(tmp_path, tokens=700)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"model_seed": 1}, "model_sha256 was"),
        ({"batch_size": 5}, "batch_size was 4, now 5"),
        ({"top_p": 0.5}, "top_p was 1.0, now 0.5"),
    ],
)
def test_something_else_in_the_folder_is_refused(undisturbed: Path, changes: dict[str, Any], named: str):
    before = contents(undisturbed)
    with pytest.raises(ValueError, match=named) as caught:
        fill(undisturbed, **changes)
    assert str(caught.value).count(" was ") == 2  # "was begun", and the one difference
    assert contents(undisturbed) == before


def test_text_of_an_earlier_way_of_writing_is_not_added_to(tmp_path: Path):
    fill(tmp_path, tokens=200)
    manifest = json.loads((tmp_path / "llmqat.json").read_text())
    del manifest["made_with"]["writer_version"]  # as before there was one
    (tmp_path / "llmqat.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"writer_version was None, now {WRITER_VERSION}"):
        fill(tmp_path, tokens=700)


def test_what_a_writer_knew_of_a_shard_is_there_before_the_shard_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, tokenizer, config = tiny_llama(), tiny_tokenizer(), SynthesisConfig(block_size=48, batch_size=4)
    keeper = Keeper(model, tokenizer, CachePlace(tmp_path / "teacher", 8), apart=True)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as inside:
        inside.setattr(shards, "_write_parquet", killed)
        with pytest.raises(KeyboardInterrupt):
            write_shards(model, tokenizer, 200, tmp_path, config, keeper=keeper)
    known = len(TeacherCache(tmp_path / "teacher"))
    assert known > 0
    written = write_shards(model, tokenizer, 200, tmp_path, config, keeper=keeper)
    rows = [shard.blocks for shard in written.shards()]
    cache = TeacherCache(tmp_path / "teacher")
    assert len(cache) >= known
    assert any(len(cache.missing(blocks)) < len(blocks) for blocks in rows)


def test_shards_that_do_not_say_where_documents_begin_are_read_as_one_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder, settings = tmp_path / "text", {"block_size": 48, "batch_size": 4, "folder": tmp_path / "text"}
    fill(folder, tokens=200)
    manifest = json.loads((folder / "llmqat.json").read_text())
    for line in manifest["shards"]:  # as an earlier version has written them
        file = folder / line["file"]
        rows = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        rows.remove_columns("seq_lengths").to_parquet(file)
        line["sha256"] = token_blocks(torch.tensor(rows["input_ids"][:]), "").sha256
    (folder / "llmqat.json").write_text(json.dumps(manifest))
    before = contents(folder)
    blocks = synthesize(tiny_llama(), tiny_tokenizer(), 200, **settings)
    assert contents(folder) == before
    assert blocks.rows.starts is None
    assert "so a block of it is one text" in caplog.text
    with pytest.raises(ValueError, match=r"packing=documents: .* did not keep where documents begin"):
        synthesize(tiny_llama(), tiny_tokenizer(), 200, packing="documents", **settings)


def test_a_shard_of_which_nothing_is_kept_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    judged = writer.judged

    def refused_at_first(documents: list[Any]) -> list[Any]:
        monkeypatch.setattr(writer, "judged", judged)
        return [replace(document, fault="repeats itself") for document in judged(documents)]

    monkeypatch.setattr(writer, "judged", refused_at_first)
    written = fill(tmp_path, tokens=200)
    assert [line["blocks"] == 0 for line in written.manifest.shards][:2] == [True, False]
    before = contents(tmp_path)
    assert fill(tmp_path, tokens=200).manifest == written.manifest
    assert contents(tmp_path) == before


def test_other_files_are_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no generated text"):
        fill(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_report_tells_what_the_text_is_like(undisturbed: Path):
    manifest = json.loads((undisturbed / "llmqat.json").read_text())
    report = manifest["report"]
    assert set(report["documents_by_kind"]) == {"chat", "plain"}
    assert report["perplexity"] > 1
    assert list(report["distinct_ngram_shares"]) == ["1", "2", "3", "4"]
    assert sum(report["lengths_up_to"].values()) == report["documents"] - sum(report["dropped"].values())
    card = (undisturbed / "README.md").read_text()
    assert "12 of its blocks" in card
    assert "perplexity" in card


def test_the_teachers_likeliest_tokens_are_kept_for_every_block(tmp_path: Path):
    model, tokenizer, config = tiny_llama(), tiny_tokenizer(), SynthesisConfig(block_size=48, batch_size=4)
    write_shards(model, tokenizer, 200, tmp_path, config)
    keeper = Keeper(model, tokenizer, CachePlace(tmp_path / "teacher", 8), apart=True)
    written = write_shards(model, tokenizer, 500, tmp_path, config, keeper=keeper)  # also what lay there before
    for shard in written.shards():
        keeper.complete(shard.blocks)
        cache = TeacherCache(tmp_path / "teacher")
        cache.check(model, tokenizer, shard.blocks)
        inputs = shard.blocks.inputs()
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1).flatten(0, 1).topk(8).values
        found = cache.lookup(inputs["input_ids"], position_ids=inputs["position_ids"])
        torch.testing.assert_close(found.log_probs, expected, atol=0.01, rtol=0.002)
    assert len(load_blocks(DataConfig(source="dataset", path=tmp_path, block_size=16), tokenizer)) > 8
    remove_shards(tmp_path)
    assert not list(tmp_path.iterdir())

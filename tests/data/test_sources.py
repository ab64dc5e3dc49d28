"""Laws of every source, and each source's own errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from llmqat.data import SOURCES, DataConfig, load_blocks
from llmqat.data.pydoc import pydoc_text, strip_markup, text_sha256
from tests.tiny import tiny_llama, tiny_tokenizer

ROWS = [{"title": f"t{i}", "body": f"row {i} says something", "year": 1900 + i} for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "b.txt").write_text("second file " * 20, encoding="utf-8")
    (folder / "a.md").write_text("﻿" + "first file\r\n" * 20, encoding="utf-8")
    (folder / "empty.txt").write_text(" \n")
    (folder / "ignored.bin").write_bytes(b"\xff\xfe")
    return folder


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture
def configs(folder: Path, rows_file: Path) -> dict[str, dict[str, Any]]:
    return {
        "synthetic": {},
        "text": {"path": folder},
        "pydoc": {},
        "dataset": {"path": rows_file, "column": "body"},
    }


def load(**values: Any) -> Any:
    return load_blocks(DataConfig(**values), tiny_tokenizer(), tiny_llama())


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_blocks_asked_for_twice_the_same(source: str, configs: dict[str, dict[str, Any]]):
    first, again = (load(source=source, tokens=60, block_size=16, **configs[source]) for _ in range(2))
    assert first.ids.shape == (4, 16)
    assert first.ids.dtype == torch.int64
    assert 0 <= int(first.ids.min()) <= int(first.ids.max()) < 384
    assert first.sha256 == again.sha256
    assert source[:5] in first.source or source == "synthetic"
    json.dumps(dict(first.details))


@pytest.mark.parametrize("source", sorted(set(SOURCES) - {"synthetic"}))
def test_text_shorter_than_a_block_is_refused(source: str, configs: dict[str, dict[str, Any]]):
    with pytest.raises(ValueError, match=r"has \d+ tokens, and one block needs data.block_size=10000000"):
        load(source=source, block_size=10_000_000, **configs[source])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "txt"}, "data.source='txt' is not known; choose one of synthetic, text, pydoc, dataset"),
        ({"source": "text"}, "needs data.path"),
        ({"source": "dataset"}, "needs either data.name"),
        ({"source": "dataset", "name": "a", "path": "b"}, "needs either data.name"),
        ({"source": "pydoc", "column": "text"}, "data.column is not used with data.source='pydoc'"),
        ({"source": "text", "path": "x", "chat_share": 0.5}, "data.chat_share is not used"),
        ({"block_sise": 5}, "did you mean 'block_size'"),
        ({"tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_configurations_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


class TestText:
    def test_files_come_in_order_without_marks(self, folder: Path):
        blocks = load(source="text", path=folder, block_size=16)
        text = tiny_tokenizer().decode(blocks.ids[0])
        assert text.startswith("first file\nfirst")
        assert blocks.details["files"] == 2

    def test_missing(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match="no text at"):
            load(source="text", path=tmp_path / "absent.txt")
        with pytest.raises(FileNotFoundError, match=r"holds no \.txt or \.md file"):
            load(source="text", path=tmp_path)

    def test_empty(self, tmp_path: Path):
        (tmp_path / "a.txt").write_text("\n \n")
        with pytest.raises(ValueError, match="is empty"):
            load(source="text", path=tmp_path / "a.txt")

    def test_encoding(self, tmp_path: Path):
        (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
        with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: byte 0xef at offset 2"):
            load(source="text", path=tmp_path / "a.txt")


class TestPydoc:
    def test_is_stable_english_prose(self):
        text = pydoc_text()
        assert len(text) > 300_000
        assert text == pydoc_text()
        assert "\n****" not in text
        assert load(source="pydoc", tokens=16, block_size=16).details["text_sha256"] == text_sha256()

    def test_markup_is_stripped_and_code_stays(self):
        topic = 'The "if" word\n*************\n\nA *suite* or\n"x ** 2" is built-\nin.\n\n   if x:\n       pass\n'
        assert strip_markup(topic) == "The if word\nA suite or x ** 2 is built-in.\n   if x:\n       pass"


class TestDataset:
    @pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "arrow"])
    def test_kinds_of_files_give_the_same(self, suffix: str, tmp_path: Path, rows_file: Path):
        rows = datasets.Dataset.from_list(ROWS)
        path = tmp_path / f"rows.{suffix}"
        if suffix == "arrow":
            rows.save_to_disk(tmp_path / "saved")
            path.write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
        else:
            {"jsonl": rows.to_json, "parquet": rows.to_parquet, "csv": rows.to_csv}[suffix](path)
        given = load(source="dataset", path=rows_file, column="body", block_size=16)
        assert load(source="dataset", path=path, column="body", block_size=16).sha256 == given.sha256

    def test_files_that_are_named_after_splits(self, tmp_path: Path):
        for name in ("train", "validation-00001", "data/test"):
            file = tmp_path / f"{name}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps({"text": f"{name} {n} words in a row"}) + "\n" for n in range(9)))
        texts = {}
        for split in (None, "validation", "test"):
            blocks = load(source="dataset", path=tmp_path, split=split, block_size=16)
            texts[split] = tiny_tokenizer().decode(blocks.ids[0])
        assert [text.split()[0] for text in texts.values()] == ["train", "validation-00001", "data/test"]
        (tmp_path / "train.jsonl").unlink()
        with pytest.raises(ValueError, match=r"data.split='train': no file in .* there are test, validation"):
            load(source="dataset", path=tmp_path, block_size=16)

    def test_saved_to_disk_with_splits(self, tmp_path: Path):
        rows = datasets.Dataset.from_list([{"text": row["body"]} for row in ROWS])
        datasets.DatasetDict({"train": rows, "valid": rows}).save_to_disk(tmp_path / "saved")
        blocks = load(source="dataset", path=tmp_path / "saved", split="valid", block_size=16)
        assert "split valid, column text" in blocks.source
        with pytest.raises(ValueError, match=r"data.split='test' is not in .*; it has train, valid"):
            load(source="dataset", path=tmp_path / "saved", split="test", block_size=16)

    def test_column_is_asked_for_when_it_is_not_clear(self, rows_file: Path):
        with pytest.raises(ValueError, match=r"choose with data.column=title\|body"):
            load(source="dataset", path=rows_file, block_size=16)

    def test_unknown_column(self, rows_file: Path):
        with pytest.raises(ValueError, match=r"data.column='bdy' is not in .*; did you mean 'body'\? columns: tit"):
            load(source="dataset", path=rows_file, column="bdy", block_size=16)
        with pytest.raises(ValueError, match=r"data.column='year' .* not strings"):
            load(source="dataset", path=rows_file, column="year", block_size=16)

    def test_missing_and_unreadable(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match="no dataset at"):
            load(source="dataset", path=tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="holds no file of a known kind"):
            load(source="dataset", path=tmp_path)
        (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
        with pytest.raises(ValueError, match=r"a\.parquet could not be read as a dataset"):
            load(source="dataset", path=tmp_path / "a.parquet")
        (tmp_path / "a.xyz").write_bytes(b"")
        with pytest.raises(ValueError, match="unknown kind of file"):
            load(source="dataset", path=tmp_path / "a.xyz")

    def test_hub_out_of_reach(self, monkeypatch: pytest.MonkeyPatch):
        def unreachable(*args: Any, **kwargs: Any) -> None:
            raise ConnectionError("offline")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(FileNotFoundError, match=r"data\.name='some/thing' was not found on the hub"):
            load(source="dataset", name="some/thing")

    def test_hub_options_are_passed_on(self, monkeypatch: pytest.MonkeyPatch):
        seen: dict[str, Any] = {}

        def loaded(name: str, config_name: str | None, **options: Any) -> datasets.Dataset:
            seen.update(options, name=name, config_name=config_name)
            return datasets.Dataset.from_list([{"text": row["body"]} for row in ROWS])

        monkeypatch.setattr(datasets, "load_dataset", loaded)
        blocks = load(
            source="dataset", name="some/thing", config_name="raw", revision="abc", split="test", block_size=16
        )
        assert seen == {"name": "some/thing", "config_name": "raw", "split": "test", "revision": "abc"}
        assert blocks.source == "dataset some/thing, raw, revision abc, split test, column text"


def test_synthesis_needs_a_model():
    with pytest.raises(ValueError, match="pass model="):
        load_blocks(DataConfig(), tiny_tokenizer())


def test_less_text_than_asked_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "A.TXT").write_text("few words " * 20)  # which is read, whatever the case of its suffix
    blocks = load(source="text", path=tmp_path, tokens=100_000, block_size=16)
    assert 0 < len(blocks.ids) < 100
    assert f"data.tokens=100000 asks for 6250 blocks of 16 tokens, and the text has {len(blocks.ids)}" in caplog.text


def test_a_number_in_place_of_an_answer_is_refused(tmp_path: Path):
    (tmp_path / "sums.jsonl").write_text(json.dumps({"prompt": "1+1=", "completion": 2}) + "\n")
    with pytest.raises(ValueError, match=r"`completion` is 2, a int, and text or messages are needed"):
        load(source="dataset", path=tmp_path / "sums.jsonl", block_size=16)

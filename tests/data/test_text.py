"""Files of text: rows are read as rows wherever a text is asked for, and what is no text is named."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from llmqat.data import DataConfig, load_blocks
from llmqat.data.hub import BUILDERS, open_local
from llmqat.data.prompts import read_prompts
from llmqat.data.text import ROW_BUILDERS, is_rows, read_text, text_config, text_files
from llmqat.evaluate.protocols import read_documents, text_windows
from llmqat.recipe import load_recipe
from llmqat.recipe.evaluation import _documents_of
from llmqat.recipe.quantize import text_source
from tests.tiny import tiny_tokenizer

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]
ROWS = [{"text": f"row {number} says something"} for number in range(20)]


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    data = datasets.Dataset.from_list(rows)
    suffix = path.suffixes[0]
    if suffix == ".arrow":
        data.save_to_disk(path.with_name("saved"))
        path.write_bytes(next(path.with_name("saved").glob("*.arrow")).read_bytes())
    elif suffix == ".parquet":
        data.to_parquet(path)
    elif suffix in (".csv", ".tsv"):
        data.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def blocks_of(path: Path, **values: Any) -> Any:
    return load_blocks(DataConfig(**{"source": "text", "path": path, "block_size": 16, **values}), tiny_tokenizer())


@pytest.mark.parametrize("suffix", [*ROW_BUILDERS, ".jsonl.gz", ".JSONL"])
def test_rows_are_read_as_rows_by_everything_that_takes_a_text(suffix: str, tmp_path: Path):
    path = write_rows(tmp_path / f"rows{suffix}")
    texts = [row["text"] for row in ROWS]
    assert blocks_of(path).sha256 == blocks_of(path, source="dataset").sha256
    assert tiny_tokenizer().decode(blocks_of(path).ids[0]).startswith("row 0 says")
    assert read_documents(str(path)) == texts
    assert read_prompts(path) == texts
    assert len(_documents_of(str(path))) == len(texts)
    trained = blocks_of(path).documents.tolist()
    assert set(_documents_of(str(path)).values()) >= set(trained)


FORMS = {
    "messages": ({"messages": TURNS}, "<user>hi\n<assistant>good day\n", "good day"),
    "prompt and completion": ({"prompt": "say", "completion": " noted"}, "say noted</s>", " noted</s>"),
}


@pytest.mark.parametrize("name", FORMS)
def test_of_rows_of_any_form_the_answers_are_scored_and_all_is_calibrated_on(name: str, tmp_path: Path):
    row, text, answer = FORMS[name]
    path = write_rows(tmp_path / "rows.jsonl", [row] * 3)
    tokenizer = tiny_tokenizer()
    windows = text_windows("windows", str(path), tokenizer, window=64)
    assert [tokenizer.decode(ids[:length]) for ids, length in zip(windows.ids, windows.lengths, strict=True)] == [
        text.removesuffix("\n")
    ] * 3
    assert [tokenizer.decode(labels[labels != -100]) for labels in windows.labels] == [answer] * 3
    for protocol in ("wikitext", "wikitext2"):
        with pytest.raises(ValueError, match=r"rows\.jsonl has rows of the format .*, and running text is needed here"):
            text_windows(protocol, str(path), tokenizer, window=8)
    blocks = load_blocks(text_source(path, 16, 8, 0), tokenizer)
    assert blocks.rows.scored is None
    assert (text * 3).startswith(tokenizer.decode(blocks.ids.flatten()))


def test_a_word_names_a_text_for_every_command(tmp_path: Path):
    rows, prose = write_rows(tmp_path / "rows.jsonl"), tmp_path / "prose.txt"
    prose.write_text("prose")
    found = {
        word: text_config(word, hub_split="test") for word in ("pydoc", str(rows), str(prose), "hub:a/b", "hub:a/b::c")
    }
    assert [config.source for config in found.values()] == ["pydoc", "dataset", "text", "dataset", "dataset"]
    named = [(config.name, config.config_name, config.split) for config in found.values()]
    assert named == [(None,) * 3] * 3 + [("a/b", None, "test"), ("a/b", None, "c")]
    assert text_config(str(rows), labels="all").labels == "all"
    for word in ("hub:", "hub:a:b:c:d"):
        with pytest.raises(ValueError, match="is no dataset of the hub; write hub:NAME, or hub:NAME:CONFIG:SPLIT"):
            text_config(word)
    recipe = load_recipe("chat-int4", ["data.path=hub:a/b:c:d", "output=x"]).data
    assert (recipe.source, recipe.path, recipe.name, recipe.config_name, recipe.split) == (
        "dataset",
        None,
        "a/b",
        "c",
        "d",
    )


def test_a_folder_of_rows_is_rows_and_one_of_both_says_what_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_rows(tmp_path / "rows.jsonl")
    assert is_rows(tmp_path)
    assert len(read_documents(str(tmp_path))) == len(ROWS)
    (tmp_path / "a.txt").write_text("prose " * 20)
    assert "row" not in tiny_tokenizer().decode(blocks_of(tmp_path).ids.flatten())
    assert "holds prose and rows; the rows are not read: rows.jsonl" in caplog.text


READERS: dict[str, Callable[[Path], Any]] = {
    "a text": blocks_of,
    "a text to score": lambda path: read_documents(str(path)),
    "prompts": read_prompts,
}


@pytest.mark.parametrize("reader", READERS)
def test_lines_of_json_are_no_prose_whatever_the_file_is_called(reader: str, tmp_path: Path):
    path = tmp_path / "rows.txt"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(ValueError, match=r"rows\.txt holds rows of JSON and no prose; give it the suffix \.jsonl"):
        READERS[reader](path)
    path.write_text("{braces} begin a text\n" * 9)
    READERS[reader](path)


FOREIGN: dict[str, tuple[bytes, str]] = {
    "gzip": (gzip.compress(b"a text"), "gzip data"),
    "bzip2": (bz2.compress(b"a text"), "bzip2 data"),
    "zip": (b"PK\x03\x04....", "a zip archive"),
    "pdf": (b"%PDF-1.7 ....", "a PDF"),
    "parquet": (b"PAR1....PAR1", "a parquet file"),
    "utf-16": ("a text".encode("utf-16"), "UTF-16"),
    "zeros": (b"a text\0", "zero byte at offset 6"),
    "latin-1": ("naïve".encode("latin-1"), "byte 0xef at offset 2"),
}


def chat_rows(template: Path) -> Any:
    rows = write_rows(template.with_name("rows.jsonl"), [{"messages": TURNS}] * 20)
    return blocks_of(rows, source="dataset", chat_template=template)


OPENERS = {**READERS, "a chat template": chat_rows, "a recipe": load_recipe, "a text file": read_text}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("opener", OPENERS)
def test_a_file_that_is_no_utf_8_text_is_named_with_what_it_is(opener: str, kind: str, tmp_path: Path):
    content, message = FOREIGN[kind]
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"file\.txt is n.*{message}"):
        OPENERS[opener](path)


@pytest.mark.parametrize("opener", sorted(set(OPENERS) - {"a text file"}))
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_named(opener: str, content: str, tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"file\.txt"):
        OPENERS[opener](path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", BUILDERS)
def test_a_file_without_rows_is_named(suffix: str, streaming: bool, tmp_path: Path):
    path = tmp_path / f"empty{suffix}"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"empty\{suffix} is empty: it holds no rows"):
        open_local(path, "train", streaming)


@pytest.mark.parametrize("content", [b"\n\n", b"[]", b"not JSON", '{"text": "caf\xe9"}\n'.encode("latin-1"), b"\0\1"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_usable_rows_is_named(streaming: bool, suffix: str, content: bytes, tmp_path: Path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\{suffix}"):
        blocks_of(path, source="dataset", streaming=streaming)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a', r"broken\.jsonl line 7: not JSON \(Unterminated string"),
        ("[1]", "line 7: not a JSON object, but"),
    ],
)
def test_the_first_line_that_is_no_row_is_named(
    line: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "six words of a row here"}\n' * 6 + f"{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        blocks_of(path, source="dataset")
    assert "Failed to load JSON" not in caplog.text


def test_a_text_that_is_not_there_is_answered_with_the_nearest_name_and_kinds(tmp_path: Path):
    (tmp_path / "heldout.jsonl").write_text("{}")
    for own in ({"source": "text"}, {"source": "dataset"}):
        with pytest.raises(FileNotFoundError, match=r"helout\.jsonl \(the nearest name there is .*heldout\.jsonl\)"):
            blocks_of(tmp_path / "helout.jsonl", **own)
    with pytest.raises(FileNotFoundError, match=r"a file of rows \(\.json, \.jsonl"):
        text_files(tmp_path / "absent.txt")

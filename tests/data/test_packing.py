"""Documents packed to blocks: joined or kept apart, split by hash, kept in the cache, whatever reads them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmqat.data import DataConfig, TextSplits, load_blocks, load_splits, open_text, read_blocks, save_blocks
from llmqat.data import documents as documents_module
from llmqat.data.blocks import hash_text, sha256_of_rows
from llmqat.data.cache import blocks_folder, read_documents
from llmqat.data.documents import DocumentSource, Piece, document_hash, encoded, pieces_of
from llmqat.data.packing import FEW_DOCUMENTS, rows_alone, splits_of_few
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer

TEXTS = [f"document {i} " + "says something " * (1 + i % 3) for i in range(60)]


def source(texts: list[str], fingerprint: str | None = None) -> DocumentSource:
    def pieces() -> Iterator[Piece]:
        for text in texts:
            yield from pieces_of([text], document_hash(text))

    return DocumentSource("here", pieces, fingerprint)


def splits_of(texts: list[str], **values: Any) -> TextSplits:
    config = DataConfig(**{"source": "pydoc", "block_size": 16, **values})
    return read_documents(source(texts), config, tiny_tokenizer())


def texts_in(splits: TextSplits) -> dict[str, str]:
    return {name: tiny_tokenizer().decode(blocks.ids.flatten()) for name, blocks in splits.given().items()}


def test_documents_are_joined_and_cut_each_with_its_end():
    blocks = splits_of(["ab", "c" * 5, "d"], block_size=4).train
    assert [tiny_tokenizer().decode(row) for row in blocks.ids] == ["ab</s>c", "cccc"]
    assert blocks.rows.stored.dtype == torch.uint16
    assert blocks.rows.starts is None


def test_documents_apart_know_where_they_begin():
    rows = splits_of(["ab", "c" * 5, "d"], block_size=4, packing="documents").train.rows
    assert rows.starts is not None
    assert rows.starts.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    assert rows.inputs()["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert rows.labels()[0].tolist()[::3] == [-100, -100]


def test_no_more_is_read_than_wanted():
    def endless() -> Iterator[Piece]:
        while True:
            yield Piece("abc", 1)

    config = DataConfig(source="pydoc", block_size=4, tokens=9)
    assert read_documents(DocumentSource("here", endless, None), config, tiny_tokenizer()).train.ids.shape == (3, 4)


def test_too_short_names_both_counts():
    with pytest.raises(ValueError, match=r"here has 4 tokens, and one block needs data.block_size=16"):
        splits_of(["abc"])


@pytest.mark.parametrize("num_proc", [2, 3])
def test_blocks_do_not_depend_on_the_number_of_processes(num_proc: int, monkeypatch: pytest.MonkeyPatch):
    alone = splits_of(TEXTS, validation_share=0.3)
    monkeypatch.setattr(documents_module, "BATCH_CHARACTERS", 40)
    several = splits_of(TEXTS, validation_share=0.3, num_proc=num_proc)
    assert [b.sha256 for b in several.given().values()] == [b.sha256 for b in alone.given().values()]


def test_a_long_document_is_tokenized_in_parts_and_stays_one(monkeypatch: pytest.MonkeyPatch):
    text = "".join(f"line {i}\n" + "\n" * (i % 2) for i in range(40))
    whole = splits_of([text], packing="documents").train
    monkeypatch.setattr(documents_module, "LONGEST_PIECE", 50)
    parts = list(pieces_of([text[:7], text[7:]], 5))
    assert len(parts) > 5
    assert "".join(str(part.content) for part in parts) == text
    assert all(len(part.content) <= 50 and str(part.content).endswith("\n") for part in parts)
    assert [part.first for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert splits_of([text], packing="documents").train.sha256 == whole.sha256


def test_the_file_is_what_safetensors_reads_and_its_hash_is_that_of_its_rows(tmp_path: Path):
    blocks = splits_of(TEXTS, packing="documents").train
    assert blocks.file is not None
    loaded = load_file(blocks.file)
    assert torch.equal(loaded["ids"], blocks.rows.stored)
    assert sha256_of_rows(blocks.rows) == blocks.sha256
    rows = dataclasses.replace(blocks.rows, starts=None)
    assert sha256_of_rows(rows) != blocks.sha256
    for linked in (blocks, dataclasses.replace(blocks, file=None)):
        save_blocks(linked, tmp_path / "blocks.safetensors")
        again = read_blocks(tmp_path / "blocks.safetensors")
        assert (again.sha256, again.source, again.details) == (blocks.sha256, blocks.source, blocks.details)
        assert torch.equal(again.documents, blocks.documents)


def test_a_vocabulary_above_16_bits_is_stored_in_32():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<more{i}>" for i in range(2**16 - VOCAB_SIZE + 1)])
    config = DataConfig(source="pydoc", block_size=16)
    blocks = read_documents(source(["a" * 20 + "<more65152>"]), config, tokenizer).train
    assert blocks.rows.stored.dtype == torch.int32
    assert blocks.ids.dtype == torch.int64


CHATS = [{"prompt": "say", "completion": f" it {n}"} for n in range(40)]


def answers_in(rows: Any) -> list[str]:
    return [tiny_tokenizer().decode(row[row != -100]) for row in rows.labels()]


class TestWhole:
    """Documents that are not cut: `packing: whole`, and held-out answers."""

    def chats(self, tmp_path: Path, count: int = 40, **values: Any) -> TextSplits:
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in CHATS[:count]))
        config = {"source": "dataset", "path": path, "block_size": 32, "packing": "whole", **values}
        return load_splits(DataConfig(**config), tiny_tokenizer())

    def test_no_document_is_cut_or_left_out_however_few_there_are(self, tmp_path: Path):
        rows = self.chats(tmp_path, 5).train.rows
        assert answers_in(rows) == [" it 0</s> it 1</s> it 2</s>", " it 3</s> it 4</s>"]
        assert rows.starts is not None
        assert rows.starts[1].nonzero().flatten().tolist() == [0, 9, 18, 27]  # two, and what fills the rest
        assert tiny_tokenizer().decode(rows.ids[1]) == "say it 3</s>say it 4</s>say it 3</s>say i"

    def test_prose_is_kept_whole_too(self):
        rows = splits_of(["abcde", "fgh", "i" * 20], block_size=8, packing="whole").train.rows
        found = [tiny_tokenizer().decode(row[row != -100]) for row in rows.labels()]
        assert found[:2] == ["bcde</s>", "gh</s>"]
        assert "".join(found[2:]) == "i" * 19 + "</s>"

    @pytest.mark.parametrize("packing", ["concatenate", "documents", "whole"])
    def test_held_out_answers_have_a_row_each(self, packing: str, tmp_path: Path):
        splits = self.chats(tmp_path, packing=packing, validation_share=0.2)
        assert splits.validation is not None
        found = answers_in(splits.validation.rows)
        assert len(found) == len(splits.validation.documents)
        trained = "".join(answers_in(splits.train.rows))
        assert all(answer.startswith(" it ") and answer not in trained for answer in found)

    def test_a_long_document_has_rows_in_which_each_label_is_once(self, tmp_path: Path):
        path = tmp_path / "long.jsonl"
        answer = "".join(chr(97 + n % 26) for n in range(70))
        path.write_text(json.dumps({"prompt": "say", "completion": answer}))
        rows = load_blocks(
            DataConfig(source="dataset", path=path, block_size=32, packing="whole"), tiny_tokenizer()
        ).rows
        assert "".join(answers_in(rows)) == answer + "</s>"
        assert len(rows) == 3
        (piece,) = encoded(open_text(DataConfig(source="dataset", path=path)).pieces(), tiny_tokenizer())
        assert torch.equal(rows_alone([piece], 32).labels(), rows.labels())
        assert len(rows_alone([piece, piece], 32, most_tokens=96)) == 3


SHARES = {"calibration_share": 0.25, "validation_share": 0.25}


class TestSplits:
    def test_no_document_is_in_two_splits(self):
        splits = splits_of(TEXTS, **SHARES)
        texts, found = texts_in(splits), [blocks.documents for blocks in splits.given().values()]
        assert list(texts) == ["train", "calibration", "validation"]
        everything = torch.cat([documents for documents in found if documents is not None])
        assert len(everything.unique()) == len(everything) > 50
        for i in range(60):
            assert sum(f"document {i} " in text for text in texts.values()) <= 1

    def test_a_document_stays_in_its_split_whatever_stands_around_it(self):
        splits, turned = splits_of(TEXTS, **SHARES), splits_of(["one more", *TEXTS[::-1]], **SHARES)
        for name, blocks in splits.given().items():
            others = {*map(int, turned.given()[name].documents)} | {document_hash("one more")}
            assert len({*map(int, blocks.documents)} - others) <= 1  # what fills no last block is left out

    @pytest.mark.parametrize("count", [3, 40, 300, 1200])
    @pytest.mark.parametrize("seed", range(2))
    def test_of_few_conversations_just_the_share_is_held_out(self, seed: int, count: int, tmp_path: Path):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"prompt": "say", "completion": f" it {n}"}) + "\n" for n in range(count)))
        config = DataConfig(
            source="dataset", path=path, block_size=16, packing="whole", seed=seed, validation_share=0.1
        )
        held_out = load_splits(config, tiny_tokenizer()).validation
        assert held_out is not None
        if count <= FEW_DOCUMENTS:
            assert len(held_out.documents) == max(2, round(0.1 * count))
        else:
            assert 0.06 * count < len(held_out.documents) < 0.14 * count

    def test_shares_of_few_leave_something_to_train_on(self):
        for count in range(1, 6):
            found = [*splits_of_few(range(count), 0, calibration=0.3, validation=0.6).values()]
            assert found.count("train") >= 1
            assert len(found) == count

    def test_the_seed_chooses(self):
        first, second = (splits_of(TEXTS, seed=seed, **SHARES) for seed in (0, 1))
        assert first.train.sha256 != second.train.sha256

    def test_a_share_that_gives_no_block_is_named(self):
        with pytest.raises(ValueError, match=r"data\.validation_share=0\.001 leaves 0 tokens for validation"):
            splits_of(TEXTS, validation_share=0.001)

    def test_shares_leave_something_to_train_on(self):
        with pytest.raises(ValueError, match="leave nothing to train on"):
            DataConfig(source="pydoc", validation_share=0.5, calibration_share=0.5)

    def test_the_record_lists_hashes_of_documents(self):
        record = splits_of(TEXTS).train.record()["document_hashes"]
        assert record["count"] == 60
        assert hash_text(document_hash(TEXTS[3])) in record["hashes"].split()


class TestCache:
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LLMQAT_CACHE", str(tmp_path / "cache"))

    @pytest.fixture
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        made: list[str] = []
        pack = documents_module.encoded

        def counting(*args: Any, **options: Any) -> Any:
            made.append("")
            return pack(*args, **options)

        monkeypatch.setattr("llmqat.data.packing.encoded", counting)
        return made

    def test_unchanged_text_is_tokenized_once_and_a_change_is_seen(self, tmp_path: Path, counted: list[str]):
        folder = tmp_path / "text"
        folder.mkdir()
        (folder / "a.txt").write_text("some text " * 20)
        (folder / "b.txt").write_text("other text " * 20)
        config = DataConfig(source="text", path=folder, block_size=16)
        first, again = (load_blocks(config, tiny_tokenizer()) for _ in range(2))
        assert len(counted) == 1
        assert torch.equal(first.ids, again.ids)
        (folder / "b.txt").write_text("other texd " * 20)  # as long as before
        assert load_blocks(config, tiny_tokenizer()).sha256 != first.sha256
        (folder / "c.txt").write_text("one more " * 20)
        assert len(load_blocks(config, tiny_tokenizer())) > len(first)
        assert len(counted) == 3

    def test_other_settings_and_tokenizers_have_blocks_of_their_own(self, tmp_path: Path, counted: list[str]):
        path = tmp_path / "a.txt"
        path.write_text("some text " * 20)
        for values in ({}, {"block_size": 8}, {"tokens": 20}, {"packing": "documents"}):
            load_blocks(DataConfig(**{"source": "text", "path": path, "block_size": 16, **values}), tiny_tokenizer())
        other = tiny_tokenizer()
        other.add_tokens(["some"])
        load_blocks(DataConfig(source="text", path=path, block_size=16), other)
        assert len(counted) == 5
        load_blocks(DataConfig(source="text", path=path, block_size=16, num_proc=2), tiny_tokenizer())
        assert len(counted) == 5

    def test_what_fails_leaves_nothing(self, tmp_path: Path):
        (tmp_path / "a.txt").write_text("short")
        with pytest.raises(ValueError, match="one block needs"):
            load_blocks(DataConfig(source="text", path=tmp_path / "a.txt"), tiny_tokenizer())
        assert list(blocks_folder().iterdir()) == []


class TestMix:
    def mixed(self, tmp_path: Path, **values: Any) -> TextSplits:
        for name in "ab":
            (tmp_path / f"{name}.txt").write_text(f"{name}" * 3000)
        mix = [{"source": "text", "path": tmp_path / f"{name}.txt", "weight": w} for name, w in (("a", 3), ("b", 1))]
        return load_splits(DataConfig(**{"mix": mix, "block_size": 16, **values}), tiny_tokenizer())

    @staticmethod
    def letters(splits: TextSplits) -> str:
        return "".join(tiny_tokenizer().decode(row[:1]) for row in splits.train.ids)

    def test_weights_are_shares_of_tokens_and_the_seed_shuffles(self, tmp_path: Path):
        letters = [self.letters(self.mixed(tmp_path, tokens=40 * 16, seed=seed)) for seed in (0, 0, 1)]
        assert [(found.count("a"), found.count("b")) for found in letters] == [(30, 10)] * 3
        assert letters[0] == letters[1] != letters[2]
        assert "b" in letters[0][:20]

    def test_without_an_amount_the_first_source_to_run_out_ends_it(self, tmp_path: Path):
        letters = self.letters(self.mixed(tmp_path))
        assert letters.count("a") == 3001 // 16
        assert letters.count("b") == 3001 // 16 // 3

    def test_a_document_of_two_sources_lies_in_one_split(self, tmp_path: Path):
        rows = tmp_path / "rows.jsonl"
        rows.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
        for i, text in enumerate(TEXTS[::-1]):
            (tmp_path / f"{i}.txt").write_text(text)
        mix = [{"source": "dataset", "path": rows}, {"source": "text", "path": tmp_path}]
        splits = load_splits(DataConfig(mix=mix, block_size=16, **SHARES), tiny_tokenizer())
        documents = [set(blocks.documents.tolist()) for blocks in splits.given().values()]
        assert sum(map(len, documents)) == len(set.union(*documents)) == len(TEXTS)

    def test_a_source_that_is_too_short_is_named(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"data\.mix: text .*a\.txt has 187 blocks, and its weight asks for 300"):
            self.mixed(tmp_path, tokens=400 * 16)

    def test_kinds_of_sources_may_differ(self, tmp_path: Path):
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"prompt": "say it", "completion": "it is said"}\n' * 20)
        mix = [{"source": "dataset", "path": rows}, {"source": "pydoc"}]
        blocks = load_blocks(DataConfig(mix=mix, block_size=16, tokens=160, packing="documents"), tiny_tokenizer())
        assert len(blocks) == 10
        assert blocks.rows.scored is not None
        assert 0 < int(blocks.rows.scored.sum()) < blocks.tokens
        assert blocks.details["blocks"] == [5, 5]

    @pytest.mark.parametrize("first", [0, 1])
    def test_text_that_the_model_generates_is_not_held_out(self, first: int, tmp_path: Path):
        for i, text in enumerate(TEXTS):
            (tmp_path / f"{i}.txt").write_text(text)
        mix = [{"source": "text", "path": tmp_path, "weight": 4}, {"source": "synthetic"}]
        config = DataConfig(mix=mix[::-1] if first else mix, block_size=16, tokens=160, **SHARES)
        splits = load_splits(config, tiny_tokenizer(), tiny_llama().eval())
        assert sorted(splits.train.details["blocks"]) == [2, 8]
        for held_out in (splits.calibration, splits.validation):
            assert held_out is not None
            assert len(held_out.details["sources"]) == 1
        with pytest.raises(ValueError, match="has only text that the model generates"):
            DataConfig(mix=[{"source": "synthetic"}, {"source": "synthetic", "strategy": "chat"}], **SHARES)

    @pytest.mark.parametrize(
        ("mix", "message"),
        [
            ([{"source": "pydoc"}], "at least two sources"),
            ([{"source": "pydoc"}, {"mix": [{"source": "pydoc"}, {"source": "pydoc"}]}], "side by side"),
            ([{"source": "pydoc"}, {"source": "pydoc", "tokens": 5}], "tokens holds for the whole mix"),
            ([{"source": "pydoc"}, {"source": "text"}], "needs data.path"),
            ([{"source": "pydoc", "weight": 0}, {"source": "pydoc"}], "greater than 0"),
        ],
    )
    def test_a_mix_that_is_none_is_refused(self, mix: list[dict[str, Any]], message: str):
        with pytest.raises(ValueError, match=message):
            DataConfig(mix=mix)

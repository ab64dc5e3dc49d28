from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from llmqat.data import read_blocks, save_blocks, token_blocks
from llmqat.data.blocks import Rows, leading_ids, positions
from tests.tiny import tiny_llama, tiny_tokenizer


def test_leading_ids_are_a_bos_that_the_tokenizer_adds():
    tokenizer = tiny_tokenizer()
    assert leading_ids(tokenizer) == []
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert leading_ids(tokenizer) == [0]


def test_positions_begin_anew_with_documents_and_blocks():
    starts = torch.tensor([[0, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0]], dtype=torch.uint8)
    assert positions(starts).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]]


def test_labels_are_what_is_scored_and_has_something_before_it():
    stored = torch.tensor([[7, 8, 9, 10]], dtype=torch.uint16)
    scored = torch.tensor([[1, 1, 0, 1]], dtype=torch.uint8)
    assert Rows(stored, scored).labels().tolist() == [[7, 8, -100, 10]]
    rows = Rows(stored, scored, torch.tensor([[0, 1, 0, 0]], dtype=torch.uint8))
    assert rows.labels().tolist() == [[7, -100, -100, 10]]
    assert rows.inputs()["position_ids"].tolist() == [[0, 0, 1, 2]]
    assert rows.ids.dtype == rows.labels().dtype == torch.int64


def test_dataset_trains_in_a_stock_trainer(tmp_path: Path):
    blocks = token_blocks(torch.arange(64).view(4, 16), "here")
    sample = blocks.dataset()[1]
    assert torch.equal(sample["input_ids"], sample["labels"])
    assert sample["input_ids"].tolist() == list(range(16, 32))
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    assert Trainer(model=tiny_llama(), args=arguments, train_dataset=blocks.dataset()).train().global_step == 1


def test_saved_blocks_come_back(tmp_path: Path):
    blocks = token_blocks(torch.arange(6).view(2, 3), "here", {"documents": 2})
    save_blocks(blocks, tmp_path / "blocks.safetensors")
    again = read_blocks(tmp_path / "blocks.safetensors")
    assert torch.equal(again.ids, blocks.ids)
    assert (again.source, again.sha256, again.details) == (blocks.source, blocks.sha256, blocks.details)
    assert not list(tmp_path.glob("*.part"))


def test_damaged_blocks_are_refused(tmp_path: Path):
    path = tmp_path / "blocks.safetensors"
    with pytest.raises(FileNotFoundError, match="no token blocks"):
        read_blocks(path)
    save_blocks(token_blocks(torch.arange(6).view(2, 3), "here"), path)
    content = path.read_bytes()
    path.write_bytes(content[:-8] + b"\1" * 8)
    with pytest.raises(ValueError, match="recorded hash"):
        read_blocks(path)
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        read_blocks(path)


def test_the_hash_knows_ids_and_shape():
    hashes = {token_blocks(torch.arange(6).view(shape), "here").sha256 for shape in ((2, 3), (3, 2))}
    hashes.add(token_blocks(torch.arange(1, 7).view(2, 3), "here").sha256)
    assert len(hashes) == 3

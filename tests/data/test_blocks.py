from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from llmqat.data import pack_blocks, read_blocks, save_blocks, token_blocks
from llmqat.data.blocks import leading_ids, tokenize
from tests.tiny import tiny_llama, tiny_tokenizer


def test_documents_are_joined_and_cut():
    ids = pack_blocks([[1, 2, 3], [4, 5], [6, 7, 8, 9]], 4, None, "here")
    assert ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_no_more_is_read_than_wanted():
    def endless():
        while True:
            yield [1, 2, 3]

    assert pack_blocks(endless(), 4, 9, "here").shape == (3, 4)


def test_too_short_names_both_counts():
    with pytest.raises(ValueError, match=r"here has 3 tokens, and one block needs data.block_size=4"):
        pack_blocks([[1, 2, 3]], 4, None, "here")


def test_documents_end_with_the_end_of_text_token():
    tokenizer = tiny_tokenizer()
    documents = list(tokenize(["ab", "c"], tokenizer))
    assert [document[-1] for document in documents] == [tokenizer.eos_token_id] * 2
    assert tokenizer.decode(documents[0][:-1]) == "ab"


def test_leading_ids_are_a_bos_that_the_tokenizer_adds():
    tokenizer = tiny_tokenizer()
    assert leading_ids(tokenizer) == []
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert leading_ids(tokenizer) == [0]


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

"""The teacher cache: what it gives back, that it goes on after an interruption, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from llmqat.data import Rows
from llmqat.data.teacher_cache import (
    BLOCKS_PER_SHARD,
    CacheHeader,
    TeacherCache,
    TeacherCacheWriter,
    block_key,
    cache_teacher,
)
from llmqat.metrics import top_probabilities
from tests.tiny import tiny_llama, tiny_tokenizer

TOP_K = 8


def text(count: int = 6, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(2, 258, (count, length), generator=torch.Generator().manual_seed(seed))


def exact(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The log-probabilities [B, L - 1, V] at positions that have a next token."""
    with torch.no_grad():
        return F.log_softmax(model(ids).logits[:, :-1], -1)


def cached(folder: Path, ids: Tensor, top_k: int = TOP_K, batch_size: int = 4) -> TeacherCache:
    return cache_teacher(tiny_llama(), tiny_tokenizer(), ids, folder, top_k=top_k, batch_size=batch_size)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_blocks_are_found_in_any_order_and_give_what_the_model_predicts(tmp_path: Path) -> None:
    ids, model = text(), tiny_llama()
    cache = cached(tmp_path / "cache", ids)
    assert len(cache) == len(ids)
    cache.check(model, tiny_tokenizer(), ids.flip(0)[:4])
    order = [4, 0, 3]
    top = cache.lookup(ids[order])
    wanted = exact(model, ids[order]).flatten(0, 1)
    assert top.indices.shape == (3 * 23, TOP_K)
    best = wanted.topk(TOP_K, -1)
    torch.testing.assert_close(top.log_probs, best.values, rtol=2**-10, atol=2e-3)  # float16
    torch.testing.assert_close(wanted.gather(-1, top.indices), best.values, rtol=1e-4, atol=1e-4)
    rest = wanted.exp().scatter(-1, top.indices, 0.0).sum(-1)
    torch.testing.assert_close(top.log_rest.exp(), rest, rtol=5e-3, atol=1e-4)
    torch.testing.assert_close(top.log_probs.exp().sum(-1) + top.log_rest.exp(), torch.ones(3 * 23))


def test_a_large_vocabulary_keeps_its_ids(tmp_path: Path) -> None:
    header = CacheHeader("m", "t", vocabulary=70_000, top_k=2, dtype="float32")
    top = top_probabilities(torch.randn(3, 70_000), 2)
    with TeacherCacheWriter(tmp_path, header) as writer:
        writer.add(torch.arange(4), top)
    assert torch.equal(TeacherCache(tmp_path).lookup(torch.arange(4)[None]).indices, top.indices)


def test_an_interrupted_cache_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    ids = text(2 * BLOCKS_PER_SHARD + 8, 8)
    cached(tmp_path / "whole", ids)
    interrupted, model, batches = tmp_path / "interrupted", tiny_llama(), []

    def stop_in_the_second_shard(done: int, total: int) -> None:
        assert total == ids.numel()
        batches.append(done)
        if len(batches) == BLOCKS_PER_SHARD // 4 + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_teacher(
            model, tiny_tokenizer(), ids, interrupted, top_k=TOP_K, batch_size=4, progress=stop_in_the_second_shard
        )
    assert sorted(files(interrupted)) == ["cache.json", "shard-00000.safetensors"]
    (interrupted / ".shard-00001.safetensors.1").write_bytes(b"torn")  # what a kill while writing leaves
    rerun: list[int] = []
    model.register_forward_hook(lambda *_: rerun.append(1))
    cache_teacher(model, tiny_tokenizer(), ids, interrupted, top_k=TOP_K, batch_size=4)
    assert len(rerun) == (len(ids) - BLOCKS_PER_SHARD) / 4
    (interrupted / ".shard-00001.safetensors.1").unlink()
    assert files(interrupted) == files(tmp_path / "whole")


def test_more_text_is_added_to_a_cache(tmp_path: Path) -> None:
    ids = text()
    cached(tmp_path, ids[:2])
    assert TeacherCache(tmp_path).missing(ids) == [2, 3, 4, 5]
    assert cached(tmp_path, ids).missing(ids) == []


def test_padded_rows_and_rows_with_positions_are_found(tmp_path: Path) -> None:
    ids, header = text(2, 6), CacheHeader.of(tiny_llama(), tiny_tokenizer(), TOP_K)
    tops = [top_probabilities(torch.randn(length - 1, 384), TOP_K) for length in (6, 4, 6)]
    restarting = torch.tensor([0, 1, 2, 0, 1, 2])
    with TeacherCacheWriter(tmp_path, header) as writer:
        writer.add(ids[0], tops[0])
        writer.add(ids[1, :4], tops[1])
        writer.add(ids[0], tops[2], restarting)
    cache = TeacherCache(tmp_path)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    found = cache.lookup(ids, mask, torch.arange(6)[None])
    assert torch.equal(found.indices[:5], tops[0].indices)
    assert torch.equal(found.indices[5:8], tops[1].indices)
    assert found.log_rest[8:].tolist() == [0.0, 0.0]
    assert torch.equal(cache.lookup(ids[:1], None, restarting[None]).indices, tops[2].indices)
    with pytest.raises(ValueError, match="padding_side='right'"):
        cache.lookup(ids, mask.flip(-1))


def test_another_model_tokenizer_or_text_is_refused_by_name(tmp_path: Path) -> None:
    ids = text()
    cache = cached(tmp_path / "cache", ids)
    with pytest.raises(
        ValueError, match=r"model_sha256=.* there, .* here.*or make another with `llmqat cache-teacher`"
    ):
        cache.check(tiny_llama(seed=1))
    with pytest.raises(ValueError, match=r"dtype='float32' there, 'bfloat16' here"):
        cache.check(tiny_llama().to(torch.bfloat16))
    with pytest.raises(ValueError, match="model_sha256"):
        cache.check(tiny_llama(rms_norm_eps=1e-3))  # the same weights, another configuration
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="tokenizer_sha256"):
        cache.check(tokenizer=tokenizer)
    other = torch.cat([ids[:2], text(2, seed=1)])
    with pytest.raises(ValueError, match=r"lacks 2 of the text's 4 blocks \(the first is block 2\)"):
        cache.check(blocks=other)
    with pytest.raises(ValueError, match="lacks 12 of the text's 12 blocks"):
        cache.check(blocks=ids.view(12, 12))
    with pytest.raises(ValueError, match="is not in the teacher cache"):
        cache.lookup(other)
    with pytest.raises(ValueError, match="top_k=8 there, 4 here"):
        cached(tmp_path / "cache", ids, top_k=4)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    ids = text()
    with pytest.raises(FileNotFoundError, match="llmqat cache-teacher RECIPE --out"):
        TeacherCache(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no teacher cache"):
        cached(tmp_path, ids)
    with pytest.raises(ValueError, match="top_k=385 is not between 1 and the model's vocabulary of 384"):
        cached(tmp_path / "cache", ids, top_k=385)
    cached(tmp_path / "cache", ids)
    header, shard = tmp_path / "cache" / "cache.json", tmp_path / "cache" / "shard-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is damaged"):
        TeacherCache(tmp_path / "cache")
    shard.unlink()
    with pytest.raises(ValueError, match="holds no block"):
        TeacherCache(tmp_path / "cache")
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": "another"}))
    with pytest.raises(ValueError, match="says format='another'"):
        TeacherCache(tmp_path / "cache")
    header.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        TeacherCache(tmp_path / "cache")


def test_a_changed_byte_is_found_where_it_is_read(tmp_path: Path) -> None:
    ids = text()
    cached(tmp_path / "cache", ids)
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    content = shard.read_bytes()
    with safe_open(shard, "pt") as file:
        size = file.get_tensor("log_probs")[:23].nbytes
        first = content.index(file.get_tensor("log_probs")[:23].numpy().tobytes())
    for place in (first, first + size - 1):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        damaged = TeacherCache(tmp_path / "cache")
        damaged.lookup(ids[1:])
        with pytest.raises(ValueError, match=r"shard-00000.safetensors is damaged \(rows 0 to 23 have other bytes"):
            damaged.lookup(ids[:1])
    shard.write_bytes(content)
    plain = TeacherCache(tmp_path / "cache").lookup(ids)
    tensors = load_file(shard)
    del tensors["checksums"]  # as earlier versions wrote it
    save_file(tensors, shard)
    assert torch.equal(TeacherCache(tmp_path / "cache").lookup(ids).log_probs, plain.log_probs)


def test_the_writer_takes_whole_blocks_only(tmp_path: Path) -> None:
    top = top_probabilities(torch.randn(5, 384), TOP_K)
    with TeacherCacheWriter(tmp_path, CacheHeader("m", "t", 384, TOP_K, "float32")) as writer:
        writer.add(torch.arange(6), top)
        assert block_key(torch.arange(6)) not in writer
        with pytest.raises(ValueError, match=r"a block of 5 tokens in a cache of top_k=8 has \(4, 8\)"):
            writer.add(torch.arange(5), top)
    assert block_key(torch.arange(6)) in writer


def test_documents_apart_are_kept_apart(tmp_path: Path) -> None:
    ids = torch.randint(3, 100, (3, 16), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(3, 16, dtype=torch.uint8)
    starts[:, 0] = starts[1, 7] = 1
    rows = Rows(ids.to(torch.uint16), starts=starts)
    model = tiny_llama()
    cache = cache_teacher(model, tiny_tokenizer(), rows, tmp_path / "cache", top_k=TOP_K)
    cache.check(blocks=rows)
    with pytest.raises(ValueError, match="lacks 1 of the text's 3 blocks"):
        cache.check(blocks=ids)  # as one text each, the second is another
    inputs = rows[1:2].inputs()
    found = cache.lookup(**inputs)
    with torch.no_grad():
        alone = model(input_ids=ids[1:2, 7:]).logits[0, :-1].log_softmax(-1)
    expected = alone.gather(-1, found.indices[7:])
    assert torch.allclose(found.log_probs[7:], expected, atol=5e-3)  # float16

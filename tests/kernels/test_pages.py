"""Pages of weights in files are given back, and only those that nothing was written to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmqat.data.teacher_cache import cache_teacher, model_fingerprint
from llmqat.evaluate.perplexity import evaluate, keep_reference, windows_from_blocks
from llmqat.kernels import WeightPages
from llmqat.kernels import pages as pages_module
from llmqat.layers.probe import probe_inputs
from llmqat.models import load_model
from tests.tiny import tiny_llama, tiny_tokenizer

PAGES = 64
"""Of each tensor."""


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "LEAST_BYTES", 0)


def in_memory(path: Path) -> int:
    """Returns the bytes of the mappings of a file that are in memory."""
    text = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", text)
    return 1024 * sum(map(int, found))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path.resolve() / "model.safetensors"
    size = PAGES * 1024
    save_file({name: torch.arange(size, dtype=torch.float32) + n for n, name in enumerate("ab")}, path)
    return path


def numbers(tensors: dict[str, Tensor]) -> list[float]:
    return [float(tensor.double().sum()) for tensor in tensors.values()]


def test_pages_leave_memory_and_come_back(file: Path) -> None:
    tensors = load_file(file)
    before, whole = numbers(tensors), in_memory(file)
    assert whole >= 2 * PAGES * 4096
    pages = WeightPages()
    assert pages
    assert all(pages.hold(tensor) for tensor in tensors.values())
    seen = [name for name, _ in pages.one_by_one(tensors.items())]
    assert seen == ["a", "b"]
    assert in_memory(file) <= 4 * 4096
    assert numbers(tensors) == before
    assert in_memory(file) == whole


def test_what_was_written_to_stays(file: Path) -> None:
    tensors = load_file(file)
    tensors["a"][5] = -7.0
    before = numbers(tensors)
    pages = WeightPages()
    assert not any(map(pages.hold, tensors.values()))
    pages.let_go(tensors.values())
    assert tensors["a"][5] == -7
    assert numbers(tensors) == before


def test_a_file_that_was_deleted_is_mapped_still(file: Path) -> None:
    tensors = load_file(file)
    before = numbers(tensors)
    file.unlink()
    pages = WeightPages()
    assert pages.hold(tensors["b"])
    pages.let_go(tensors.values())
    assert numbers(tensors) == before


def test_other_tensors_are_left_alone(file: Path) -> None:
    tensors = load_file(file)
    pages = WeightPages()
    own = torch.ones(4096)
    assert not any(map(pages.hold, (own, own[:0], torch.ones(3, device="meta"))))
    pages.let_go([own, tensors["a"][:1]])  # less than a page
    assert own.sum() == 4096


def test_little_is_not_worth_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "LEAST_BYTES", 1 << 60)
    tensors = load_file(file)
    assert not WeightPages()
    assert not WeightPages().hold(tensors["a"])


def test_passes_over_a_model_in_files_leave_nothing_in_memory(tmp_path: Path) -> None:
    """And find what they find with the same model in memory."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model, tokenizer = tiny_llama(**shape, head_dim=64, tied=False), tiny_tokenizer()
    folder = tmp_path.resolve() / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mapped, _ = load_model(str(folder), torch.float32)
    file = folder / "model.safetensors"
    model.config._name_or_path = mapped.config._name_or_path
    numbers({name: p.detach() for name, p in mapped.named_parameters()})
    assert in_memory(file) > file.stat().st_size // 2
    ids = probe_inputs(model, 3, 24)["input_ids"]
    passes: dict[str, Callable[[PreTrainedModel], Any]] = {
        "evaluate": lambda one: evaluate(one, ids).nll,
        "reference": lambda one: keep_reference(one, windows_from_blocks(ids)).evaluation.nll,
        "teacher": lambda one: cache_teacher(one, tokenizer, ids, tmp_path / f"{one is model}", top_k=4).mass(),
        "fingerprint": model_fingerprint,
    }
    for name, run in passes.items():
        found = run(mapped)
        assert in_memory(file) < 64 * 4096, name  # the ends of tensors, which share a page
        assert found == run(model), name


def test_files_in_the_cache_of_the_hub_are_known_by_their_hashes(file: Path) -> None:
    blob = file.parent / "blobs" / ("0123456789abcdef" * 4)
    blob.parent.mkdir()
    link = file.rename(blob).parent.parent / "snapshot.safetensors"
    link.symlink_to(blob)
    tensors = load_file(link)
    assert all(map(WeightPages().hold, tensors.values()))


@pytest.mark.parametrize(("anonymous", "swap", "held"), [(0, 0, 1), (4, 0, 0), (0, 4, 0)])
def test_what_was_written_to_is_known_in_memory_and_on_disk(
    anonymous: int, swap: int, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, smaps = tmp_path / "maps", tmp_path / "smaps"
    first = "7f00-7f40 rw-p 00000000 fe:00 12 /models/a.safetensors\n"
    other = "8f00-8f40 rw-p 00000000 00:00 0\nAnonymous: 8 kB\nSwap: 8 kB\n"
    maps.write_text(first)
    smaps.write_text(f"{first}Rss: 64 kB\nAnonymous: {anonymous} kB\nSwap: {swap} kB\nSwapPss: 0 kB\n{other}")
    monkeypatch.setattr(pages_module, "_MAPS", maps)
    monkeypatch.setattr(pages_module, "_SMAPS", smaps)
    assert WeightPages()._ranges == [(0x7F00, 0x7F40)] * held

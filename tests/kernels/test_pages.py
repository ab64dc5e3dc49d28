"""Pages of a weights file that are given back: they leave memory, and nothing is lost."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmqat.kernels import FileMappings

SMAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(not SMAPS.is_file(), reason="no /proc: nothing is given back here")


def resident(path: Path) -> int:
    """Bytes of `path` that are in this process' memory."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    words = torch.arange(2**18, dtype=torch.int32)
    save_file({"words": words, "other": torch.ones(3)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        return tmp_path / "model.safetensors", file.get_tensor("words"), words


def test_pages_leave_memory_and_come_back(mapped: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    path, tensor, words = mapped
    pages = FileMappings({path}).pages_of(tensor)
    assert pages is not None
    assert torch.equal(tensor, words)
    assert resident(path) >= tensor.nbytes - 8192
    pages()
    assert resident(path) < 65536
    assert torch.equal(tensor, words)


def test_what_was_written_is_kept(mapped: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    path, tensor, words = mapped
    pages = FileMappings({path}).pages_of(tensor)
    assert pages is not None
    tensor.add_(1)
    pages()
    assert torch.equal(tensor, words + 1)


def test_only_what_is_mapped_is_given_back(mapped: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    path, tensor, words = mapped
    mappings = FileMappings({path})
    assert mappings.pages_of(words) is None
    assert FileMappings({tmp_path / "another"}).pages_of(tensor) is None
    pages = mappings.pages_of(tensor)
    assert copy.deepcopy((tensor, pages))[1] is None

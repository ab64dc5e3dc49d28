"""A run that learns from a teacher cache: made by the command, checked, used, and no teacher in memory meanwhile."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from llmqat.cli import app
from llmqat.data import read_blocks
from llmqat.data.teacher_cache import TeacherCache
from llmqat.recipe import load_recipe, pipeline, plan_run, run
from llmqat.train import QATTrainer
from tests.flows.small import small
from tests.tiny import tiny_llama

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RECIPE = RECIPES / "smollm2-135m-int4.yaml"


def command(*words: str) -> str:
    result = CliRunner().invoke(app, [*words])
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*words: str) -> str:
    result = CliRunner().invoke(app, [*words])
    assert result.exit_code == 2, result.output
    return result.output


@pytest.mark.parametrize("recipe", ["smollm2-135m-int4", "lora-int4"])
def test_a_run_learns_from_the_cache(
    recipe: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = RECIPES / f"{recipe}.yaml", tmp_path / "cache"
    written = "data={source: synthetic, tokens: 128, block_size: 32}"
    words = small(tiny_folder, tmp_path / "run", written)
    output = command("cache-teacher", str(path), *words, "--top-k", "16", "--out", str(cache))
    assert "4 blocks" in output
    (text,) = cache.glob("text-*.safetensors")
    loaded: list[weakref.ref[PreTrainedModel]] = []
    in_memory: list[int] = []
    load, train = pipeline.load_model, QATTrainer.train

    def watched(*args: Any) -> Any:
        model, tokenizer = load(*args)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    def spy(self: QATTrainer, *args: Any, **kwargs: Any) -> Any:
        gc.collect()
        in_memory.append(sum(model() is not None for model in loaded))
        assert isinstance(self.teacher, TeacherCache)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(QATTrainer, "train", spy)
    monkeypatch.setattr(pipeline, "load_model", watched)
    result = run(load_recipe(path, [*words, f"teacher_cache={cache}"]))
    assert result is not None
    assert in_memory == [1]  # the student
    assert result.comparison.rows[0].role == "full precision"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["training"]["teacher_cache"]["top_k"] == 16
    assert results["training"]["own_teacher"] is False
    assert results["text"]["sha256"] == read_blocks(text).sha256


def test_another_text_or_model_is_refused_before_anything_is_calibrated(tiny_folder: Path, tmp_path: Path) -> None:
    cache, words = tmp_path / "cache", small(tiny_folder, tmp_path / "run")
    command("cache-teacher", str(RECIPE), *words, "--top-k", "16", "--out", str(cache))
    use = f"teacher_cache={cache}"
    assert "lacks" in refusal("train", str(RECIPE), *words, use, "data.block_size=16")
    shutil.rmtree(tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tiny_llama(seed=1).save_pretrained(other)
    assert "model_sha256" in refusal("train", str(RECIPE), *words, use, f"model={other}")
    shutil.rmtree(tmp_path / "run")
    assert "is not used with train.kl_weight=0" in refusal(
        "train", str(RECIPE), *words, use, "train.kl_weight=0", "train.cross_entropy_weight=1"
    )
    assert "llmqat cache-teacher RECIPE --out" in refusal("train", str(RECIPE), *words, f"teacher_cache={tmp_path}")
    assert "top_k=16 there, 8 here" in refusal(
        "cache-teacher", str(RECIPE), *words, "--top-k", "8", "--out", str(cache)
    )


def test_the_plan_counts_no_teacher(tiny_folder: Path, tmp_path: Path) -> None:
    words = small(tiny_folder, tmp_path / "run")
    plans = [plan_run(load_recipe(RECIPE, [*words, *more])) for more in ((), ("teacher_cache=somewhere",))]
    parameters = sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert plans[0].memory.teacher - plans[1].memory.teacher == torch.bfloat16.itemsize * parameters

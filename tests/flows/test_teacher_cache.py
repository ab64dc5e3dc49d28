"""A run that learns from a teacher cache: made by the command, checked, used, and no teacher in memory meanwhile."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from llmqat.cli import app
from llmqat.data import DataConfig, TextSplits, load_splits, read_blocks, teacher_cache
from llmqat.data.teacher_cache import CachePlace, TeacherCache
from llmqat.data.writer import COMPARED_BLOCKS
from llmqat.metrics import TopProbabilities
from llmqat.models import load_model
from llmqat.recipe import load_recipe, pipeline, plan_run, run
from llmqat.recipe.config import kept_top_k
from llmqat.recipe.folder import what_is_kept
from llmqat.recipe.teacher import cache_while_writing, text_of, written_cache
from llmqat.train import QATTrainer
from tests.flows.small import small
from tests.tiny import tiny_architecture, tiny_llama

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


class Watched:
    """What a run has in memory, and what teaches, when its training begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_memory: list[int] = []
        self.teachers: list[Any] = []
        self.read = 0
        """Blocks that a teacher has read to fill a cache."""
        loaded: list[weakref.ref[PreTrainedModel]] = []
        load, train, states = pipeline.load_model, QATTrainer.train, teacher_cache.hidden_states

        def watched(*args: Any) -> Any:
            model, tokenizer = load(*args)
            loaded.append(weakref.ref(model))
            return model, tokenizer

        def spy(trainer: QATTrainer, *args: Any, **kwargs: Any) -> Any:
            gc.collect()
            self.in_memory.append(sum(model() is not None for model in loaded))
            self.teachers.append(trainer.teacher)
            return train(trainer, *args, **kwargs)

        def counted(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
            self.read += len(input_ids)
            return states(model, input_ids, position_ids)

        monkeypatch.setattr(QATTrainer, "train", spy)
        monkeypatch.setattr(pipeline, "load_model", watched)
        monkeypatch.setattr(teacher_cache, "hidden_states", counted)


@pytest.mark.parametrize("recipe", ["smollm2-135m-int4", "lora-int4"])
def test_a_run_learns_from_the_cache(
    recipe: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = RECIPES / f"{recipe}.yaml", tmp_path / "cache"
    written = "data={source: synthetic, tokens: 128, block_size: 32}"
    words = small(tiny_folder, tmp_path / "run", written)
    output = command("cache-teacher", str(path), *words, "--top-k", "16", "--out", str(cache))
    assert "5 blocks" in output  # a tape more was written
    (text,) = cache.glob("text-*.safetensors")
    watched = Watched(monkeypatch)
    result = run(load_recipe(path, [*words, f"teacher_cache={cache}"]))
    assert result is not None
    assert watched.in_memory == [1]  # the student
    assert isinstance(watched.teachers[0], TeacherCache)
    assert result.comparison.rows[0].role == "full precision"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["training"]["teacher_cache"]["top_k"] == 16
    assert results["training"]["own_teacher"] is False
    assert results["text"]["sha256"] == read_blocks(text).sha256


WRITTEN = "data={source: synthetic, tokens: 256, block_size: 32}"


@pytest.mark.parametrize("recipe", ["smollm2-135m-int4", "lora-int4"])
def test_a_writer_is_its_own_teacher_and_an_interrupted_run_finds_what_it_knew(
    recipe: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = RECIPES / f"{recipe}.yaml", tmp_path / "run"
    loaded = load_recipe(path, small(tiny_folder, output, WRITTEN, "teacher_top_k=16"))
    watched, calibrate = Watched(monkeypatch), pipeline.calibrate

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(loaded)
    blocks, written = read_blocks(output / "blocks.safetensors"), TeacherCache(output / "teacher")
    assert blocks.rows.starts is not None
    assert written.missing(blocks.rows) == []
    compared = min(len(blocks), COMPARED_BLOCKS)
    cut_anew, watched.read = watched.read - compared, 0
    assert cut_anew < len(blocks)
    assert "teacher" in what_is_kept(loaded)
    monkeypatch.setattr(pipeline, "calibrate", calibrate)
    result = run(loaded)
    assert result is not None
    assert watched.read == 0
    assert watched.in_memory == [1]  # the student
    assert isinstance(watched.teachers[0], TeacherCache)
    results = json.loads((output / "results.json").read_text())
    assert results["training"]["teacher_cache"]["top_k"] == 16
    assert results["text"]["sha256"] == blocks.sha256
    assert not (output / "teacher").exists()


def test_a_folder_of_written_text_keeps_what_its_writer_knew(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    size = ("--tokens", "256", "--block-size", "32")
    command("synthesize", str(tiny_folder), *size, "--teacher-top-k", "8", "--out", str(text))
    data = f"data={{source: synthetic, path: {text}, tokens: 256, block_size: 32}}"
    recipe = load_recipe(RECIPE, small(tiny_folder, tmp_path / "run", data))
    model, tokenizer = load_model(recipe.source, torch.bfloat16)
    place, watched = cache_while_writing(recipe, model), Watched(monkeypatch)
    assert place == CachePlace(text / "teacher", 8)  # as many as there are
    splits = text_of(recipe, tokenizer, model, cache=place)
    written_cache(place, model, tokenizer, splits).check(model, tokenizer, splits.train.rows)
    assert watched.read == COMPARED_BLOCKS


@pytest.mark.parametrize("way", ["train", "cache-teacher", "synthesize"])
def test_a_writer_that_predicts_something_else_for_whole_blocks_reads_them(
    way: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put = TopProbabilities.put

    def wrong(kept: TopProbabilities, column: int, top: TopProbabilities) -> None:
        put(kept, column, replace(top, indices=top.indices.flip(-1)))

    monkeypatch.setattr(TopProbabilities, "put", wrong)
    words = small(tiny_folder, tmp_path / "run", WRITTEN, "teacher_top_k=16")
    recipe = load_recipe(RECIPE, words)
    model, tokenizer = load_model(recipe.source, torch.bfloat16)
    if way == "train":
        place = cache_while_writing(recipe, model)
        assert place is not None
        text = text_of(recipe, tokenizer, model, cache=place)
        cache = written_cache(place, model, tokenizer, text)
    elif way == "cache-teacher":
        command("cache-teacher", str(RECIPE), *words[:-1], "--top-k", "16", "--out", str(tmp_path / "made"))
        (file,) = (tmp_path / "made").glob("text-*.safetensors")
        text, cache = TextSplits(read_blocks(file)), TeacherCache(tmp_path / "made")
    else:
        size = ("--tokens", "256", "--block-size", "32")
        command("synthesize", str(tiny_folder), *size, "--teacher-top-k", "16", "--out", str(tmp_path / "text"))
        data = DataConfig(path=tmp_path / "text", tokens=256, block_size=32)
        text, cache = load_splits(data, tokenizer, model), TeacherCache(tmp_path / "text" / "teacher")
    assert "so it reads them all" in caplog.text
    assert cache.divergence(model, text.train.rows) < 1e-4


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("data={source: pydoc, tokens: 256, block_size: 32}", "data.source=pydoc is not written by the model"),
        ("data.packing=concatenate", "their writer saw each document alone"),
        ("train.kl_weight=0", "learns from no teacher"),
        ("teacher_bits=8", "teacher_bits=8 asks for a teacher in memory"),
        ("teacher_cache=somewhere", "teacher_cache=somewhere is the teacher"),
        ("train.eval_strategy=steps", "needs the teacher for evaluate.texts"),
    ],
)
def test_where_a_writer_cannot_teach_the_teacher_runs_or_is_asked_for(
    word: str, reason: str, tiny_folder: Path, tmp_path: Path
) -> None:
    words = small(tiny_folder, tmp_path / "run", WRITTEN, word)
    assert kept_top_k(load_recipe(RECIPE, words)) is None
    with pytest.raises(ValueError, match="teacher_top_k=16: .*" + reason):
        load_recipe(RECIPE, [*words, "teacher_top_k=16"])
    assert kept_top_k(load_recipe(RECIPE, [*words, "teacher_top_k=null"])) is None


def test_documents_that_cannot_be_kept_apart_mean_a_teacher_that_runs(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model, words = tiny_architecture("opt"), small(tiny_folder, tmp_path / "run", WRITTEN)
    assert cache_while_writing(load_recipe(RECIPE, words), model) is None
    assert "the teacher runs at each step of training: OPTForCausalLM attends beyond" in caplog.text
    with pytest.raises(ValueError, match="teacher_top_k=16: OPTForCausalLM attends beyond the documents"):
        cache_while_writing(load_recipe(RECIPE, [*words, "teacher_top_k=16"]), model)


def test_a_small_vocabulary_is_kept_whole(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, small(tiny_folder, tmp_path / "run", WRITTEN))
    place = cache_while_writing(recipe, tiny_architecture("llama", vocab_size=100))
    assert place == CachePlace(tmp_path / "run" / "teacher", 100)


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
    ways = ((), ("teacher_cache=somewhere",), (WRITTEN,), (WRITTEN, "teacher_top_k=null"))
    plans = [plan_run(load_recipe(RECIPE, [*words, *more])) for more in ways]
    parameters = sum(parameter.numel() for parameter in tiny_llama().parameters())
    held = torch.bfloat16.itemsize * parameters
    assert [plan.memory.teacher for plan in plans] == [held, 0, 0, held]
    assert [plan.disk.teacher for plan in plans] == [0, 0, 256 * 256 * 4, 0]
    assert plans[2].teacher.startswith("the 256 most likely tokens that the model keeps")
    assert plans[3].teacher == "a second model in memory, which runs at each step (teacher_top_k is null)"

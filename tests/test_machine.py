"""The time that a plan tells, from what runs and probes took on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llmqat.calibrate import RangesStage
from llmqat.cli.plan import answer
from llmqat.recipe import load_recipe, plan_run
from llmqat.recipe.block_probe import BlockProbe
from llmqat.recipe.machine import FILE, expected_time, remember_probe, remember_run


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LLMQAT_CACHE", str(tmp_path / "cache"))
    words = (f"model={tiny_folder}", f"output={tmp_path / 'run'}", "data.tokens=3200", "data.block_size=32")
    return load_recipe("smollm2-135m-int4", (*words, "train.max_steps=100", "train.warmup_steps=0"))


def test_a_run_tells_the_time_of_the_next_one(recipe: Any, tmp_path: Path) -> None:
    planned = plan_run(recipe)
    assert planned.tokens == 6400
    asked = (recipe, planned.coverage, 1, planned.tokens)
    assert expected_time(*asked) is None
    assert "how long is not known here (--probe measures it)" in answer(planned, 10**12, None)
    remember_probe(*asked[:3], 64.0)
    probed = expected_time(*asked)
    assert probed is not None
    assert (probed.seconds, probed.whole, probed.measured.by) == (100.0, False, "a probe")
    assert "training takes about 1.7 min on this machine, as a probe of" in answer(planned, 10**12, probed)
    training = {"tokens_per_second": 128.0, "teacher_cache": {"top_k": 256}}
    seconds = {"text": 20.0, "train": 50.0, "evaluate": 30.0}
    remember_run(*asked[:3], {**training, "teacher_cache": None}, seconds, goes_on=False)  # the teacher ran
    remember_run(*asked[:3], training, seconds, goes_on=True)
    assert expected_time(*asked) == probed
    remember_run(*asked[:3], training, seconds, goes_on=False)
    remember_probe(*asked[:3], 1.0)  # says less than a run
    run = expected_time(*asked)
    assert run is not None
    assert (run.seconds, run.whole) == (100.0, True)
    assert "; about 1.7 min on this machine, as a run of" in answer(planned, 10**12, run)
    other = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"max_windows": 3})})
    found = expected_time(other, *asked[1:])
    assert found is not None
    assert (found.seconds, found.whole) == (50.0, False)
    for changes in ({"lora": {"r": 4}}, {"quant": recipe.quant.preset("int8")}, {"teacher_top_k": None}):
        assert expected_time(recipe.model_copy(update=changes), *asked[1:]) is None
    assert expected_time(recipe, planned.coverage, 2, planned.tokens) is None


def test_a_run_that_trains_nothing_tells_its_time_as_well(recipe: Any) -> None:
    alone = recipe.model_copy(update={"train": {"max_steps": 0}})
    planned = plan_run(alone)
    asked = (alone, planned.coverage, 1, planned.tokens)
    assert planned.tokens == 0
    assert "; how long is not known here (--probe measures it); " in answer(planned, 10**12, None)
    calibrated = BlockProbe(30, 19.0, 30.0, None)
    words = "; calibration takes about 10.0 min on this machine, text and evaluation not counted; "
    assert words in answer(planned, 10**12, None, calibrated)
    assert "machine, training, the choice of bits, text and" in answer(
        dataclasses.replace(planned, steps=None, target_bits=3.5), 10**12, None, calibrated
    )
    without = recipe.model_copy(update={"train": {"max_steps": 0}, "calibrate": [RangesStage(method="mse")]})
    assert "; how long is not known here; " in answer(plan_run(without), 10**12, None)
    remember_run(*asked[:3], None, {"text": 20.0, "evaluate": 30.0}, goes_on=False)
    found = expected_time(*asked)
    assert found is not None
    assert (found.seconds, found.whole) == (50.0, True)
    other = alone.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"max_windows": 3})})
    assert expected_time(other, *asked[1:]) is None
    assert expected_time(recipe, planned.coverage, 1, 6400) is None
    unread = recipe.data.model_copy(update={"source": "text", "tokens": None})  # its amount is not known yet
    no_epoch = plan_run(alone.model_copy(update={"data": unread, "train": {"num_train_epochs": 0}}))
    assert (no_epoch.blocks, no_epoch.steps) == (None, 0)


def test_a_damaged_file_is_begun_anew(recipe: Any, tmp_path: Path) -> None:
    planned = plan_run(recipe)
    (tmp_path / "cache").mkdir()
    for content in ("{", "[]", '{"a": {"b": 1}}'):
        (tmp_path / "cache" / FILE).write_text(content)
        assert expected_time(recipe, planned.coverage, 1, 64) is None
        remember_probe(recipe, planned.coverage, 1, 64.0)
        found = expected_time(recipe, planned.coverage, 1, 64)
        assert found is not None
        assert found.seconds == 1.0

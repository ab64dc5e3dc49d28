"""Another tool's packed checkpoint is planned, its scales trained by a recipe, and judged by `llmqat eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llmqat import load
from llmqat.cli import app
from llmqat.layers import PackedLinear
from llmqat.recipe import plan_run, run
from tests.export.test_import import CASES, foreign
from tests.flows.test_recipes import packed_recipe
from tests.tiny import tiny_qwen2, tiny_tokenizer


def packed_layers(folder: Path) -> dict[str, PackedLinear]:
    return {name: module for name, module in load(folder).named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize(("name", "bits"), [("W4A16 group", 4.5), ("W8A8", 8.2)])
def test_anothers_checkpoint_is_trained_by_a_recipe_and_judged(name: str, bits: float, tmp_path: Path) -> None:
    theirs, original = foreign(tmp_path / "theirs", **CASES[name]), tmp_path / "original"
    tiny_qwen2().save_pretrained(original)
    tiny_tokenizer().save_pretrained(original)
    recipe = packed_recipe(theirs, original, tmp_path / "run", "train.max_steps=4")
    plan, result = plan_run(recipe), run(recipe)
    assert result is not None
    assert [row.role for row in result.comparison.rows] == ["full precision", "training-free", "trained"]
    assert plan.method.trained == result.training["trained_parameters"]
    before, after = packed_layers(theirs), packed_layers(result.checkpoint)
    assert len(before) == 14
    assert before.keys() == after.keys()
    for layer, trained in zip(before.values(), after.values(), strict=True):
        assert trained.weights == layer.weights
        assert torch.equal(trained.packed_weight().codes(), layer.packed_weight().codes())
    assert any(not torch.equal(layer.weight_scale, after[name].weight_scale) for name, layer in before.items())

    text = tmp_path / "text.txt"
    text.write_text("Words that nobody was trained on, one after the other. " * 20)
    words = ("--text", str(text), "--window", "32", "--max-windows", "4", "--reference", str(original))
    command = ["eval", str(theirs), str(result.checkpoint), *words, "--json", str(tmp_path / "eval.json")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert [round(row["bits_per_weight"], 1) for row in rows[1:]] == [bits, bits]
    reference, start, trained = (row["kl"] for row in rows)
    assert reference == 0 < start
    if name == "W4A16 group":  # 8 bits leave next to nothing to repair
        assert trained < start

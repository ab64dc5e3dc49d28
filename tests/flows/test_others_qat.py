"""Checkpoints as others' QAT publishes them: loaded, judged, trained further, exported, with the codes that they have.

INT4 checkpoints of Gemma 4 (`-qat-w4a16-ct`) are written here by compressed-tensors itself: symmetric 4 bits in groups
of 32, embeddings and output head in bfloat16, what reads images ignored by name.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from transformers import PreTrainedModel
from typer.testing import CliRunner

from llmqat import QATTrainer, QuantConfig, convert, load, save
from llmqat.cli import app
from llmqat.layers import PackedLinear
from tests.export.readers import READERS
from tests.export.test_import import foreign, logits
from tests.tiny import CLASSES, tiny_of_class, tiny_tokenizer
from tests.train.test_trainer import Blocks, _arguments

NO_TOWER = ("re:.*vision_tower.*", "re:.*embed_vision.*", "re:.*multi_modal_projector.*", "lm_head")
SHAPES: dict[str, dict[str, Any]] = {
    "gemma3": {"layer_types": ["sliding_attention", "sliding_attention"], "query_pre_attn_scalar": 16},
    "gemma4": {},
}
"""What llama.cpp takes for granted of Gemma 3."""


def original(name: str) -> PreTrainedModel:
    text = {**CLASSES[name][2]["text_config"], **SHAPES[name]}
    return tiny_of_class(name, text_config=text)


def theirs(folder: Path, name: str) -> Path:
    """A tiny INT4 checkpoint with a vision tower, as Gemma's are."""
    return foreign(folder, model=original(name), ignore=NO_TOWER)


def packed(model: torch.nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def same_codes(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(packed(one).items(), packed(other).items(), strict=True)
    return all(a == b and torch.equal(x.weight_packed, y.weight_packed) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("name", SHAPES)
def test_an_int4_checkpoint_with_a_vision_tower_is_read_judged_and_trained_on(name: str, tmp_path: Path) -> None:
    folder = theirs(tmp_path / "theirs", name)
    model = load(folder, kernel="reference")
    assert type(model).__name__ == CLASSES[name][1]
    assert {layer.weights for layer in packed(model).values()} == {QuantConfig.preset("int4-g32").weights}
    assert not [layer for layer in packed(model) if re.search("vision|projector|lm_head", layer)]
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    stock = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(stock))

    arguments = _arguments(tmp_path / "run", trainable="scales", scale_learning_rate=5e-2, bf16=True, max_steps=4)
    QATTrainer(model=model, teacher=original(name), args=arguments, train_dataset=Blocks()).train()
    save(convert(model), tmp_path / "trained")
    again = load(tmp_path / "trained", kernel="reference")
    assert same_codes(again, load(folder))
    layer = "model.language_model.layers.0.mlp.up_proj.weight_scale"
    assert not torch.equal(again.state_dict()[layer], load(folder).state_dict()[layer])

    original(name).save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    (tmp_path / "text.txt").write_text("Words that nobody was trained on, one after the other. " * 20)
    words = ["--text", str(tmp_path / "text.txt"), "--window", "32", "--max-windows", "4", "--json"]
    command = ["eval", str(folder), "--reference", str(tmp_path / "original"), *words, str(tmp_path / "eval.json")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    reference, judged = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert reference["kl"] == 0 < judged["kl"] < 0.5


def test_its_language_model_becomes_q4_0_without_moving_a_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = theirs(tmp_path / "theirs", "gemma3"), tmp_path / "model.gguf"
    with caplog.at_level(logging.WARNING, "llmqat"):
        done = CliRunner().invoke(app, ["export", str(folder), "--format", "gguf", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "the language model of Gemma3ForConditionalGeneration is written" in caplog.text
    wanted, found = READERS["compressed-tensors"](folder, "gemma3"), READERS["gguf"](out, "gemma3_text")
    assert {f"language_model.{name}" for name in found} == set(wanted)
    for name, (levels, scale) in found.items():
        assert (levels == wanted[f"language_model.{name}"][0]).all()
        assert (scale == wanted[f"language_model.{name}"][1]).all()
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors]
    assert kinds.count("Q4_0") == 14
    assert not [tensor.name for tensor in gguf.GGUFReader(out).tensors if tensor.name.startswith(("v.", "mm."))]


def test_what_gguf_is_not_written_for_here_is_refused_by_name(tmp_path: Path) -> None:
    folder, out = theirs(tmp_path / "theirs", "gemma4"), tmp_path / "model.gguf"
    done = CliRunner().invoke(app, ["export", str(folder), "--format", "gguf", "--out", str(out)])
    assert done.exit_code == 2
    assert "model type 'gemma4' is not written" in done.output


def test_scales_that_float16_cannot_hold_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = original("gemma3")
    small = "model.language_model.layers.0.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(small).weight.mul_(2**-20)
    folder, out = foreign(tmp_path / "theirs", model=model, ignore=NO_TOWER), tmp_path / "model.gguf"
    with caplog.at_level(logging.WARNING, "llmqat"):
        done = CliRunner().invoke(app, ["export", str(folder), "--format", "gguf", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "1 weights have scales too small for float16" in caplog.text
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    tensor = found["blk.0.ffn_up.weight"]
    assert tensor.tensor_type.name == "BF16"
    stored = torch.from_numpy(tensor.data.copy()).view(torch.bfloat16)
    assert torch.equal(stored, load(folder).get_submodule(small).weight.bfloat16())

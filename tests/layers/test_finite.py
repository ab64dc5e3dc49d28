"""NaN and infinity, and scales that a dtype cannot hold: named before anything is packed, wherever they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llmqat import QuantConfig, convert, load, prepare, save
from llmqat.calibrate import RangesStage, RotateStage, calibrate
from llmqat.export import CONVERSIONS
from tests.tiny import tiny_llama, tiny_mixtral, tiny_qwen2, tiny_tokenizer

LAYER = "model.layers.0.mlp.up_proj"


def prepared(**changes: Any) -> PreTrainedModel:
    """A prepared model with biases, zero points, a quantized embedding and a head of its own."""
    model = tiny_qwen2()
    prepare(model, QuantConfig.preset("int4", group_size=32, **changes))
    return model


def broken(model: PreTrainedModel, name: str, value: float) -> PreTrainedModel:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        tensors[name].view(-1)[-1] = value
    return model


KINDS = (
    f"{LAYER}.weight",
    f"{LAYER}.log_scale",
    f"{LAYER}.initial_scale",
    f"{LAYER}.zero_point",
    "model.embed_tokens.weight",
    "model.embed_tokens.log_scale",
    "lm_head.weight",
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.1.input_layernorm.weight",
)
"""A tensor of each kind that a prepared model holds."""


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", KINDS)
def test_save_and_convert_name_what_is_not_finite(name: str, value: float, tmp_path: Path) -> None:
    model = broken(prepared(symmetric=False, embeddings="int8"), name, value)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        save(model, tmp_path / "packed")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", CONVERSIONS)
@pytest.mark.parametrize("name", [f"{LAYER}.weight", "model.norm.weight"])
def test_every_format_names_what_is_not_finite(name: str, format: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        CONVERSIONS[format](broken(prepared(), name, float("inf")), tiny_tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_prepare_and_calibrate_name_every_parameter_that_is_not_finite(value: float) -> None:
    for make in (tiny_qwen2, tiny_mixtral):
        original = make()
        for name, _ in original.named_parameters():
            model = broken(copy.deepcopy(original), name, value)
            before = {key: type(module) for key, module in model.named_modules()}
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                prepare(model, QuantConfig.preset("int4", group_size=32))
            stages = [RotateStage(), RangesStage(method="minmax")]
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                calibrate(model, QuantConfig.preset("int4", group_size=32), stages, None)
            assert {key: type(module) for key, module in model.named_modules()} == before


def test_weights_beyond_what_a_scale_can_stand_for_are_named() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(LAYER).weight[0, :2] = torch.tensor([3e38, -3e38])
    with pytest.raises(ValueError, match="up_proj has weights beyond"):
        prepare(model, QuantConfig.preset("int4", group_size=32, symmetric=False))


@pytest.mark.parametrize("magnitude", [2.0**-30, 2.0**24])
def test_a_scale_that_a_dtype_would_round_is_named_with_the_dtype_that_holds_it(
    magnitude: float, tmp_path: Path
) -> None:
    model = prepared()
    with torch.no_grad():
        model.get_submodule(LAYER).weight.mul_(magnitude)
        model.get_submodule(LAYER).initial_scale.mul_(magnitude)
    with pytest.raises(ValueError, match=r"up_proj has the scale .*torch\.float16 would round .*dtype=torch\.bfloat16"):
        save(model, tmp_path / "packed", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    save(model, tmp_path / "packed")
    with pytest.raises(ValueError, match=r"up_proj has the scale .*torch\.float16 would round"):
        save(load(tmp_path / "packed"), tmp_path / "again", dtype=torch.float16)


def test_a_parameter_beyond_the_dtype_is_named(tmp_path: Path) -> None:
    model = broken(prepared(), "model.norm.weight", 1e6)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has an entry of magnitude 1e\+06"):
        save(model, tmp_path / "packed", dtype=torch.float16)
    assert not list(tmp_path.iterdir())

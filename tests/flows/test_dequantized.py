"""Models that are published quantized alone are read, quantized anew without a loss where they can be, and trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import llmqat
from llmqat.evaluate.loading import load_to_judge
from llmqat.layers import QuantConfig, QuantModule, prepare
from llmqat.models import load_model
from llmqat.models.loading import load_with_few_bits
from llmqat.recipe import load_recipe, plan_run, run
from llmqat.recipe.quantize import quantize_model
from tests.flows.small import small
from tests.flows.test_recipes import RECIPE
from tests.tiny import tiny_architecture, tiny_llama, tiny_tokenizer

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
IDS = torch.arange(2, 34)[None]


def gpt_oss(folder: Path) -> dict[str, Tensor]:
    """Writes a tiny model with experts in MXFP4, as OpenAI stores them; returns these as plain numbers, by name."""
    model = tiny_architecture("gpt_oss")
    generator, plain = torch.Generator().manual_seed(0), {}

    def quantized(name: str, weight: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: weight.bfloat16()}
        experts, columns, rows = weight.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        blocks[..., 0] = 0x76  # so that the largest number of the format, and another one, are in each group
        scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        pairs = torch.stack([E2M1[(blocks & 15).long()], E2M1[(blocks >> 4).long()]], -1).flatten(-2)
        plain[name] = (pairs * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2).mT
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    return _written(model, folder, quantized, {"quant_method": "mxfp4"}, plain)


def deepseek(folder: Path) -> dict[str, Tensor]:
    """Writes a tiny model in FP8 with a scale for each block of 128 x 128, as DeepSeek stores it."""
    model, plain = tiny_llama(hidden_size=256, intermediate_size=384, head_dim=64), {}

    def quantized(name: str, weight: Tensor) -> dict[str, Tensor]:
        if not name.endswith("proj.weight"):
            return {name: weight.bfloat16()}
        blocks = weight.view(weight.shape[0] // 128, 128, -1, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        plain[name] = (codes.float() * scale[:, None, :, None]).view(weight.shape)
        return {name: codes.view(weight.shape), f"{name}_scale_inv": scale}

    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return _written(model, folder, quantized, config, plain)


def _written(
    model: PreTrainedModel,
    folder: Path,
    quantized: Callable[[str, Tensor], dict[str, Tensor]],
    quantization: dict[str, object],
    plain: dict[str, Tensor],
) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    tensors = {key: tensor for name, weight in stored.items() for key, tensor in quantized(name, weight).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


PUBLISHED = {"mxfp4": gpt_oss, "fp8": deepseek}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", PUBLISHED)
def test_its_numbers_are_those_that_it_was_published_with(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = PUBLISHED[method](tmp_path)
    model, _ = load_model(str(tmp_path), dtype)
    assert plain
    for name, weight in plain.items():
        found = model.get_parameter(name)
        assert found.dtype == dtype
        assert torch.equal(found.bfloat16(), weight.bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    (note,) = [note for note in prepare(model, QuantConfig.preset("int4-g32")).notes if "dequantized" in note]
    assert f"the original was quantized by {method} and dequantized at loading" in note


@pytest.mark.parametrize("method", PUBLISHED)
def test_it_is_saved_as_the_plain_model_that_it_is_now(method: str, tmp_path: Path) -> None:
    PUBLISHED[method](tmp_path / "theirs")
    model, _ = load_model(str(tmp_path / "theirs"))
    model.save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    again, _ = load_model(str(tmp_path / "plain"))
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("method", PUBLISHED)
def test_weights_without_their_scales_are_refused(method: str, tmp_path: Path) -> None:
    PUBLISHED[method](tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    del tensors[next(name for name in tensors if name.endswith(("_scales", "_scale_inv")))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted = {"mxfp4": "could not be loaded", "fp8": r"1 of its tensors are quantized .* so their scales are missing"}
    with pytest.raises(ValueError, match=rf"^model '{tmp_path}'.*{wanted[method]}"):
        load_model(str(tmp_path))


def test_quantized_weights_of_which_the_configuration_does_not_say_so_are_refused(tmp_path: Path) -> None:
    """Else their codes would be taken for weights, in silence."""
    deepseek(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"holds scales of quantized weights \(.*weight_scale_inv.*quantization_config"
    ):
        load_model(str(tmp_path))


def test_mxfp4_experts_stay_what_they_are(tmp_path: Path) -> None:
    """The lattice is recognized, so that MXFP4 to MXFP4 loses nothing, in memory and on disk."""
    gpt_oss(tmp_path / "theirs")
    original, _ = load_model(str(tmp_path / "theirs"))
    model, _ = load_model(str(tmp_path / "theirs"))
    prepare(model, QuantConfig.preset("mxfp4a16", ignore=("re:.*self_attn",)))
    experts = [layer for layer in model.modules() if isinstance(layer, QuantModule)]
    assert len(experts) == 4
    for layer in experts:
        assert layer.recognized == layer.scale_shape[0] * layer.scale_shape[1]
    llmqat.save(model, tmp_path / "ours")
    with torch.no_grad():
        expected = original(IDS).logits
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(llmqat.load(tmp_path / "ours", kernel="reference")(IDS).logits, expected)


@pytest.mark.parametrize("method", PUBLISHED)
def test_it_is_quantized_planned_trained_and_judged(method: str, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    PUBLISHED[method](folder)
    quantize_model(str(folder), tmp_path / "packed", scheme="int4-g32", method="rtn")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    llmqat.load(tmp_path / "packed")(IDS)
    assert load_to_judge(str(folder)).dtype == torch.bfloat16
    words = small(folder, tmp_path / "run", "quant={preset: int4-g32}")
    recipe = load_recipe(RECIPE, words)
    assert any("dequantized at loading" in note for note in plan_run(recipe).coverage.notes)
    result = run(recipe)
    assert result is not None
    assert [row.role for row in result.comparison.rows] == [
        "full precision",
        "plain rounding",
        "training-free",
        "trained",
    ]
    with pytest.raises(ValueError, match=rf"is quantized already \(quant_method='{method}'\), and bitsandbytes"):
        load_with_few_bits(str(folder), 4)

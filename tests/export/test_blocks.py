"""FP8 weights with one scale for a block of 128 by 128, against compressed-tensors' own arithmetic; all the way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as their_fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmqat
from llmqat.calibrate import GPTQStage, RangesStage, calibrate
from llmqat.calibrate.gptq import Curvature, gptq_layer
from llmqat.calibrate.ranges import calibrate_ranges
from llmqat.export import save
from llmqat.export.compressed_tensors import packed_state_dict, quantized_layers
from llmqat.export.description import describe
from llmqat.export.forms import weight_args, weight_config
from llmqat.export.serving import served_by
from llmqat.layers import PRESETS, ActivationConfig, PackedLinear, QuantConfig, QuantLinear, WeightConfig, prepare
from llmqat.train import QATArguments, QATTrainer
from tests.tiny import tiny_llama, tiny_model

BLOCKS = QuantConfig.preset("fp8-block")
FP8 = ActivationConfig(levels="float")
WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}


def wide_llama() -> PreTrainedModel:
    """Returns a model of which keys and values have half a block of rows."""
    return tiny_llama(**WIDE, head_dim=32)


def layer_of(rows: int, columns: int) -> QuantLinear:
    """Returns a quantized layer whose blocks lie far apart in size; the last has fewer rows, and one is all zeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    size = torch.exp2(torch.arange(-(-rows // 128) * (columns // 128)).view(-1, columns // 128) % 40 - 20.0)
    size[1, 1] = 0
    weight[5] = 0  # in a block of others
    weight *= size.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(weight)
    model = nn.ModuleDict({"layer": linear})
    prepare(model, BLOCKS)
    layer = model["layer"]
    assert isinstance(layer, QuantLinear)
    return layer


def test_scales_and_numbers_are_theirs():
    layer = layer_of(10_000, 256)
    args = weight_args(layer.weights)
    assert args.block_structure == [128, 128]
    assert weight_config(args) == layer.weights
    assert layer.initial_scale is not None
    padded = torch.nn.functional.pad(layer.weight.detach(), (0, 0, 0, 79 * 128 - 10_000))
    blocks = padded.view(79, 128, 2, 128)
    theirs, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    some = blocks.abs().amax((1, 3)) > 0  # zeros have another scale there
    assert torch.equal(layer.initial_scale[some], theirs[some].bfloat16().float())
    found = their_fake_quantize(layer.weight.detach(), layer.initial_scale, None, args)
    assert torch.equal(layer.quantized_weight(torch.float32), found)


def test_a_block_has_one_scale_through_calibration_and_training(tmp_path: Path):
    model, teacher = wide_llama(), wide_llama()
    ids = torch.randint(3, 384, (8, 32), generator=torch.Generator().manual_seed(0))
    calibrate(model, BLOCKS, [RangesStage(), GPTQStage(blocks=4)], ids, folder=tmp_path / "calibration")
    args = QATArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        scale_learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        logging_steps=1,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = QATTrainer(model=model, teacher=teacher, args=args, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    moved = 0
    for _, layer in quantized_layers(model):
        assert isinstance(layer, QuantLinear)
        assert layer.log_scale is not None
        assert layer.log_scale.shape == (-(-layer.rows // 128), layer.columns // 128)
        moved += int((layer.log_scale != 0).sum())
        scale = layer.scale()
        assert scale.shape == (layer.rows, layer.columns // 128)
        assert torch.equal(scale, scale[::128].repeat_interleave(128, 0)[: layer.rows])
    assert moved > 0
    report = save(model, tmp_path / "packed")
    assert report.stock.loads
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16).eval()
    loaded = llmqat.load(tmp_path / "packed", kernel="reference")
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, loaded(ids).logits)
    save(loaded, tmp_path / "again")
    first, second = (load_file(tmp_path / part / "model.safetensors") for part in ("packed", "again"))
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


def test_gptq_lowers_the_error_at_given_scales():
    layer = layer_of(200, 256)
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(1)) @ torch.randn(256, 256)
    before = layer.scale()
    found = gptq_layer(layer, Curvature.of(x.t() @ x / len(x) + torch.eye(256)), rounds=3)
    assert found.after < found.before
    assert torch.equal(layer.scale(), before)


def test_what_is_written_is_decompressed_by_them_to_the_weight():
    model = wide_llama()
    prepare(model, BLOCKS)
    state = packed_state_dict(model, torch.bfloat16)
    for name, layer in quantized_layers(model):
        scheme = QuantizationScheme(targets=["Linear"], weights=weight_args(layer.weights.stored))
        own = {key.rpartition(".")[2]: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        assert own["weight_scale"].shape == (-(-layer.rows // 128), layer.columns // 128)
        found = BaseCompressor.get_value_from_registry("float-quantized").decompress(own, scheme)["weight"]
        assert torch.equal(found.bfloat16(), layer.quantized_weight(torch.bfloat16)), name


def test_a_label_is_a_name():
    assert BLOCKS.weights.label == "fp8 block"
    assert QuantConfig.preset("fp8 block") == BLOCKS
    assert QuantConfig.preset("fp8", strategy="block") == BLOCKS
    small = QuantConfig.preset("fp8-block64")
    assert small.weights.label == "fp8 block64"
    assert small == QuantConfig.preset("fp8-block", group_size=64) == QuantConfig.preset("fp8 block64")
    assert small.input_activations is not None
    assert small.input_activations.group_size == 64


def test_inputs_have_groups_of_a_block_s_side_and_of_no_other_scheme():
    def inputs(name: str, **changes: Any) -> int | None:
        found = QuantConfig.preset(name, **changes).input_activations
        assert found is not None
        return found.group_size

    assert inputs("fp8-block", strategy="channel") is None
    assert inputs("fp8-block", group_size=None) is None
    assert inputs("fp8-g64", strategy="block") == inputs("fp8-block64", strategy="block") == 64
    assert inputs("fp8afp8-block") == inputs("fp8afp8", strategy="block") == 128
    assert inputs("fp8a8-block", group_size=64) is None
    PRESETS.register("mine-in-blocks", QuantConfig(weights=BLOCKS.weights, input_activations=FP8))
    try:
        assert inputs("mine-in-blocks") is None  # as its author has them
    finally:
        del PRESETS["mine-in-blocks"]


@pytest.mark.parametrize("rows", [128, 129, 300])
@pytest.mark.parametrize("scales", ["learned", "dynamic"])
def test_the_search_loses_no_more_than_the_plain_range(rows: int, scales: str):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, rows, bias=False)
    linear.weight = nn.Parameter(torch.randn(rows, 256, generator=generator).pow(3) * 0.01)
    with torch.no_grad():
        linear.weight[3, 7] = -5.0  # the extreme of its block is below zero
        linear.weight[-1] = -linear.weight[-1].abs()
    model = nn.ModuleDict({"layer": linear})
    prepare(model, QuantConfig.preset("fp8-block", scales=scales))
    layer = model["layer"]
    assert isinstance(layer, QuantLinear)
    plain = float((layer.quantized_weight(torch.float32) - layer.weight).square().sum())
    calibrate_ranges(model, "mse")
    found = float((layer.quantized_weight(torch.float32) - layer.weight).square().sum())
    assert found <= plain * 1.001
    moments = {"layer": torch.rand(256, generator=generator) + 0.1}
    before = float(((layer.quantized_weight(torch.float32) - layer.weight).square() @ moments["layer"]).sum())
    calibrate_ranges(model, "weighted_mse", moments)
    after = float(((layer.quantized_weight(torch.float32) - layer.weight).square() @ moments["layer"]).sum())
    assert after <= before * 1.001


def test_a_file_with_other_scales_is_refused(tmp_path: Path):
    save(prepared(), tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = torch.cat([tensors[name]] * 2)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"weight_scale is of \[6, 1\], but config\.json makes it \[3, 1\]"):
        llmqat.load(tmp_path / "packed")


def test_others_than_fp8_have_no_blocks():
    with pytest.raises(ValueError, match="blocks are of FP8 weights"):
        WeightConfig(num_bits=4, strategy="block", group_size=128)
    with pytest.raises(ValueError, match="give group_size exactly when strategy is 'group' or 'block'"):
        WeightConfig(num_bits=8, levels="float", strategy="block")


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match=r"blocks of 128 do not divide in_features=64 of .*strategy: channel"):
        prepare(tiny_llama(), BLOCKS)
    shape = {"hidden_size": 128, "intermediate_size": 96, "num_local_experts": 2}
    with pytest.raises(ValueError, match=r"blocks of 128 rows do not divide the 192 of an expert.*levels: float"):
        prepare(tiny_model("mixtral", head_dim=32, **shape), BLOCKS)
    override = {"weights": WeightConfig(num_bits=8, levels="float", strategy="channel"), "input_activations": FP8}
    model = tiny_llama(**{**WIDE, "intermediate_size": 320}, head_dim=32)
    prepare(model, QuantConfig.preset("fp8-block", overrides={"re:.*down_proj": override}))
    model(torch.arange(8)[None])


def test_packed_scales_of_blocks_train_block_by_block(tmp_path: Path):
    packed = llmqat.convert(prepared(), dtype=torch.float32)
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
    for layer in layers.values():
        before = layer.scale()
        layer.train_scales()
        layer.log_scale.grad, x = None, torch.randn(7, layer.columns)
        layer.product(x, None, "reference").square().sum().backward()
        product = x @ layer.weight.detach().T
        share = 2 * (product.T @ x) * layer.weight.detach()  # of each weight in dL / d log s, without LSQ's factor
        expected = torch.stack([part.sum(0) for part in share.unflatten(1, (-1, 128)).sum(-1).split(128)])
        factor = 1 / math.sqrt(layer.rows * layer.columns / expected.numel() * layer.grid.steps)
        torch.testing.assert_close(layer.log_scale.grad, expected * factor, rtol=1e-3, atol=1e-3)
        assert torch.equal(layer.scale(), before)
        with torch.no_grad():
            layer.log_scale.add_(0.1 * torch.randn(layer.log_scale.shape))
    scales = {name: layer.scale().detach() for name, layer in layers.items()}
    llmqat.save(llmqat.convert(packed), tmp_path / "packed")
    again = llmqat.load(tmp_path / "packed")
    assert all(torch.equal(again.get_submodule(name).scale(), scale) for name, scale in scales.items())


def prepared() -> PreTrainedModel:
    """Returns a prepared model."""
    model = wide_llama()
    prepare(model, BLOCKS)
    return model


def test_vllm_wants_whole_blocks_in_merged_products():
    model = prepared()
    assert "k_proj: out_features=64 is no multiple of 128" in str(served_by(describe(model))["vllm"].reason)
    model = tiny_llama(**{**WIDE, "num_key_value_heads": 4}, head_dim=32)
    prepare(model, BLOCKS)
    assert served_by(describe(model))["vllm"].serves

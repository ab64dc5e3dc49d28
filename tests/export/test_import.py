"""Checkpoints written by compressed-tensors itself, as llm-compressor does it: loaded, trained further, or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from llmqat import QATTrainer, convert, load, save
from llmqat.export import CONVERSIONS, load_any
from llmqat.layers import PackedLinear
from tests.export.readers import READERS, tensors_of
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_qwen2, tiny_tokenizer
from tests.train.test_trainer import Blocks, _arguments

INT8_INPUTS = {"num_bits": 8, "strategy": "token", "dynamic": True}
FP8_INPUTS = {**INT8_INPUTS, "type": "float"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}
NVFP4 = {"type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
MXFP4 = {"type": "float", "scale_dtype": torch.uint8}


def foreign(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    inputs: Any = None,
    model: PreTrainedModel | None = None,
    ignore: Sequence[str] = ("lm_head",),
    **weights: Any,
) -> Path:
    """Quantizes a tiny model, its head left alone, and saves it by compressed-tensors alone."""
    model = (tiny_qwen2() if model is None else model).to(dtype)
    given = {"num_bits": 4, "strategy": "group", "group_size": 32, **weights}
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**given),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore))
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            observe(module, scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def observe(module: Any, weights: QuantizationArgs) -> None:
    """Gives a layer the ranges of its weights, as a minmax observer would."""
    if weights.strategy == "block":
        size = weights.block_structure[0]
        rows = module.weight.unflatten(1, (-1, size)).unflatten(0, (-1, size)).float().transpose(1, 2).flatten(2)
    elif weights.strategy == "tensor":
        rows = module.weight.view(1, -1).float()
    else:
        rows = module.weight.view(*module.weight_scale.shape, -1).float()
    shared = None
    if weights.strategy == "tensor_group":
        shared = generate_gparam(rows.amin(), rows.amax())
        module.weight_global_scale.copy_(shared)
    if getattr(module, "input_global_scale", None) is not None:
        module.input_global_scale.copy_(generate_gparam(torch.tensor(-3.0), torch.tensor(3.1)))
    scale, zero_point = calculate_qparams(rows.amin(-1), rows.amax(-1), weights, shared)
    module.weight_scale.copy_(scale.view(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.copy_(zero_point)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(2))
    return model(ids).logits


CASES: dict[str, dict[str, Any]] = {
    "W4A16 group": {},
    "W4A16 group, float16": {"dtype": torch.float16},
    "W4A16 channel": {"strategy": "channel", "group_size": None},
    "W8A16 channel": {"num_bits": 8, "strategy": "channel", "group_size": None},
    "W8A16 group": {"num_bits": 8},
    "W8A8": {"num_bits": 8, "strategy": "channel", "group_size": None, "inputs": INT8_INPUTS},
    "FP8": {**FP8, "inputs": FP8_INPUTS},
    "FP8 weights": FP8,
    "FP8 tensor": {**FP8, "strategy": "tensor"},
    "FP8 block": {**FP8, "strategy": "block", "block_structure": [32, 32]},
    "NVFP4 weights": NVFP4,
    "NVFP4": {**NVFP4, "inputs": {"num_bits": 4, **NVFP4, "dynamic": "local", "observer": "static_minmax"}},
    "MXFP4 weights": MXFP4,
    "MXFP4": {**MXFP4, "inputs": {"num_bits": 4, "strategy": "group", "group_size": 32, **MXFP4, "dynamic": True}},
}


FORMATS = {
    "W8A8": "int-quantized",
    "FP8": "float-quantized",
    "FP8 weights": "naive-quantized",
    "FP8 tensor": "naive-quantized",
    "FP8 block": "naive-quantized",
    "NVFP4 weights": "nvfp4-pack-quantized",
    "NVFP4": "nvfp4-pack-quantized",
    "MXFP4": "mxfp4-pack-quantized",
    "MXFP4 weights": "mxfp4-pack-quantized",
}


@pytest.mark.parametrize("name", CASES)
def test_others_checkpoints_load_as_stock_transformers_loads_them(name: str, tmp_path: Path) -> None:
    folder = foreign(tmp_path / "theirs", **CASES[name])
    format = json.loads((folder / "config.json").read_text())["quantization_config"]["format"]
    assert format == FORMATS.get(name, "pack-quantized")
    ours = load(folder, kernel="reference")
    assert sum(isinstance(module, PackedLinear) for module in ours.modules()) == 14
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=CASES[name].get("dtype", torch.bfloat16))
    assert torch.equal(logits(ours), logits(stock))
    save(ours, tmp_path / "ours", dtype=ours.dtype)
    assert torch.equal(logits(load(tmp_path / "ours", kernel="reference")), logits(ours))


def wide(tmp_path: Path, case: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model of others whose scales bfloat16 does not hold, and its weights as compressed-tensors has them."""
    folder = foreign(tmp_path / "theirs", **CASES[case])
    if case == "FP8 weights":
        tensors = tensors_of(folder)
        scales = {name: tensor.float() * 1.001 for name, tensor in tensors.items() if name.endswith("weight_scale")}
        save_file(tensors | scales, folder / "model.safetensors", metadata={"format": "pt"})
    tensors, expected = tensors_of(folder), {}
    for name in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        if case == "FP8 weights":
            expected[name] = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
        else:
            words = tensors[f"{name}.weight_packed"]
            codes = unpack_fp4_from_uint8(words, words.shape[0], 2 * words.shape[1], torch.float32)
            scale = tensors[f"{name}.weight_scale"].float() / tensors[f"{name}.weight_global_scale"]
            expected[name] = codes * scale.repeat_interleave(16, dim=1)
    return load(folder), expected


@pytest.mark.parametrize("case", ["FP8 weights", "NVFP4 weights"])
def test_scales_that_bfloat16_does_not_hold_are_kept(case: str, tmp_path: Path) -> None:
    model, expected = wide(tmp_path, case)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert set(layers) == set(expected)
    save(model, tmp_path / "again", dtype=model.dtype)
    again = load(tmp_path / "again")
    for name, layer in layers.items():
        assert layer.has_float32_scales
        assert layer.weight.dtype == layer.dtype == torch.bfloat16
        assert torch.equal(layer.weight, expected[name].bfloat16())
        assert torch.equal(again.get_submodule(name).scale(), layer.scale())
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        model.to(dtype)
        assert all(layer.weight.dtype == dtype for layer in layers.values())
        assert all(torch.equal(layer.weight, expected[name].to(dtype)) for name, layer in layers.items())
    with pytest.raises(ValueError, match=r"scales of torch.float32 that bfloat16 does not hold cannot be trained"):
        next(iter(layers.values())).train_scales()


def test_a_state_dict_keeps_them_too(tmp_path: Path) -> None:
    model, expected = wide(tmp_path, "NVFP4 weights")
    for name, weight in expected.items():
        layer = model.get_submodule(name)
        empty = PackedLinear(layer.in_features, layer.out_features, layer.bias is not None, layer.weights)
        empty.load_state_dict(layer.state_dict())
        assert empty.dtype == torch.bfloat16
        assert torch.equal(empty.weight, weight.bfloat16())


def test_scales_are_kept_in_a_float32_model_as_well(tmp_path: Path) -> None:
    _, expected = wide(tmp_path, "NVFP4 weights")
    model = load(tmp_path / "theirs", dtype=torch.float32)
    save(model, tmp_path / "again", dtype=torch.float32)
    model.to(torch.bfloat16)
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight.bfloat16())
        assert torch.equal(load(tmp_path / "again").get_submodule(name).weight.float(), weight)


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_scales_that_float16_turns_into_nothing_are_refused(factor: float, tmp_path: Path) -> None:
    model, _ = wide(tmp_path, "FP8 weights")
    tensors = tensors_of(tmp_path / "theirs")
    scales = {name: tensor * factor for name, tensor in tensors.items() if name.endswith("weight_scale")}
    save_file(tensors | scales, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path / "theirs")
    with pytest.raises(ValueError, match="float16"):
        load(tmp_path / "theirs", dtype=torch.float16)
    with pytest.raises(ValueError, match="float16"):
        model.half()


@pytest.mark.parametrize(("num_bits", "inputs"), [(4, None), (8, None), (8, INT8_INPUTS)])
def test_others_zero_points_are_read_as_compressed_tensors_writes_them(
    num_bits: int, inputs: Any, tmp_path: Path
) -> None:
    """Stock transformers loads them dequantized only: then with the same weights."""
    group = {"strategy": "group", "group_size": 32} if inputs is None else {"strategy": "channel", "group_size": None}
    folder = foreign(tmp_path / "theirs", num_bits=num_bits, symmetric=False, inputs=inputs, **group)
    options = {"dtype": torch.bfloat16, "quantization_config": CompressedTensorsConfig(dequantize=True)}
    stock = AutoModelForCausalLM.from_pretrained(folder, **options)
    logits(stock)
    layers = [pair for pair in load(folder).named_modules() if isinstance(pair[1], PackedLinear)]
    assert len(layers) == 14
    for name, module in layers:
        assert torch.equal(module.weight, stock.get_submodule(name).weight), name


def test_others_checkpoint_is_exported_with_its_own_codes(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "theirs")
    theirs = READERS["compressed-tensors"](folder, "qwen2")
    for format in ("gguf", "gptq", "onnx"):
        CONVERSIONS[format](load_any(folder)[0], tiny_tokenizer(), tmp_path / format)
        for name, (levels, scale) in READERS[format](tmp_path / format, "qwen2").items():
            assert (levels == theirs[name][0]).all()
            assert (scale == theirs[name][1]).all()


def test_others_checkpoint_is_where_training_of_scales_can_start(tmp_path: Path) -> None:
    model = load(foreign(tmp_path / "theirs"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = _arguments(tmp_path / "run", trainable="scales", scale_learning_rate=5e-2, bf16=True, max_steps=4)
    QATTrainer(model=model, teacher=tiny_llama(), args=arguments, train_dataset=Blocks()).train()
    save(convert(model), tmp_path / "trained")
    after = load(tmp_path / "trained").state_dict()
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(after[f"{name}.weight_packed"], before[f"{name}.weight_packed"])
    assert not torch.equal(after[f"{name}.weight_scale"], before[f"{name}.weight_scale"])


def changed(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_is_not_run_is_refused_by_name(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "theirs")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparse weights \(sparse-24-bitmask\)"),
        ({"sparsity_config": {}, "transform_config": {"config_groups": {"R1": {}}}}, "transforms of weights"),
        ({"transform_config": {}, "format": "nvfp4-pack-quantized", "config_groups": group(format=None)}, "nvfp4-pack"),
        ({"config_groups": group(format="float-quantized")}, "format 'float-quantized'"),
        ({"config_groups": group(weights={"num_bits": 4, "type": "float"})}, r"weights of a format \(4 bits, float"),
        (
            {"config_groups": group(weights={"num_bits": 8, "strategy": "tensor"})},
            "not scaled by group, channel or block",
        ),
        ({"config_groups": group(weights={"num_bits": 4, "group_size": 32, "actorder": "group"})}, "actorder"),
        ({"config_groups": group(), "kv_cache_scheme": {"num_bits": 8}}, "a KV cache quantized otherwise than in FP8"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            load(changed(folder, **changes))


def group(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized", **changes}}

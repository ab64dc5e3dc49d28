"""The law of every format: what another reader finds in the file are the codes and scales of the model."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from llmqat import QuantConfig, load, lora_config, prepare, save, save_adapter
from llmqat.export import CONVERSIONS, FORMATS, write_gptq
from llmqat.layers import QuantLinear, QuantModule
from tests.export.readers import READERS, tensors_of
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_qwen2, tiny_tokenizer


def prepared(model: PreTrainedModel, preset: str = "int4", **changes: Any) -> PreTrainedModel:
    """A prepared model whose scales and zero points have moved, as after training."""
    prepare(model, QuantConfig.preset(preset, **changes))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, QuantModule):
                module.log_scale.normal_(std=0.2)
                if module.zero_point is not None:
                    module.zero_point.add_(torch.randint_like(module.zero_point, -3, 4))
    return model


def levels_and_scales(layer: QuantLinear) -> tuple[np.ndarray, np.ndarray]:
    """Integer levels and scales [O, I] of the training forward, as stored: half-integers are odd numbers of halves."""
    scale, zero_point = (None if part is None else part.detach() for part in layer.scale_and_zero_point())
    codes = layer.codes().to(torch.int64)
    levels = codes if zero_point is None else codes - expanded(zero_point, layer).to(torch.int64)
    if layer.grid.offset:
        levels, scale = 2 * levels + 1, scale / 2
    return levels.numpy(), expanded(scale, layer).numpy()


def expanded(values: torch.Tensor, layer: QuantLinear) -> torch.Tensor:
    return values.expand(layer.rows, -1).repeat_interleave(layer.columns // values.shape[1], dim=1)


SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {"group_size": 32},
    "int4 channel": {"strategy": "channel"},
    "int4 asym": {"group_size": 64, "symmetric": False},
    "int3": {"preset": "int3", "group_size": 32},
    "int2 asym": {"preset": "int2", "group_size": 32, "symmetric": False},
    "int2-seq": {"preset": "int2-seq", "group_size": 32},
    "ternary": {"preset": "ternary", "strategy": "tensor"},
    "int8": {"preset": "int8"},
    "int8 asym": {"preset": "int8", "group_size": 32, "symmetric": False},
    "int6": {"num_bits": 6, "group_size": 32},
}
CASES = [(scheme, "llama") for scheme in SCHEMES] + [("int4 asym", "qwen2")]
MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2}


def test_every_format_has_a_reader() -> None:
    assert set(READERS) == set(CONVERSIONS)
    assert set(FORMATS) <= set(CONVERSIONS)


@pytest.mark.parametrize("format", CONVERSIONS)
@pytest.mark.parametrize(("scheme", "model_type"), CASES)
def test_codes_and_scales_are_the_model_s(scheme: str, model_type: str, format: str, tmp_path: Path) -> None:
    if (format, scheme) == ("gguf", "int8 asym"):
        pytest.skip("refused by name: see test_gguf.py")
    model = prepared(MODELS[model_type](), **SCHEMES[scheme])
    sizes = CONVERSIONS[format](model, tiny_tokenizer(), tmp_path / "out")
    assert sum(sizes.values()) > 0
    read = READERS[format](tmp_path / "out", model_type)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert set(read) == set(layers)
    for name, (levels, scale) in read.items():
        wanted_levels, wanted_scale = levels_and_scales(layers[name])
        assert np.array_equal(np.abs(levels), np.abs(wanted_levels)), name
        # The same sign, or (a mirrored block) both turned: then too the weight is the same number.
        assert np.array_equal(levels * scale.astype(np.float64), wanted_levels * wanted_scale.astype(np.float64)), name
        assert np.array_equal(np.abs(scale), np.abs(wanted_scale)), name


@pytest.mark.parametrize("format", CONVERSIONS)
def test_a_packed_checkpoint_gives_the_same_file_as_the_prepared_model(format: str, tmp_path: Path) -> None:
    model = prepared(tiny_qwen2(), group_size=32)
    save(model, tmp_path / "packed", tiny_tokenizer())
    CONVERSIONS[format](load(tmp_path / "packed"), tiny_tokenizer(), tmp_path / "from-packed")
    CONVERSIONS[format](model, tiny_tokenizer(), tmp_path / "from-prepared")
    left, right = tmp_path / "from-packed", tmp_path / "from-prepared"
    names = [path.relative_to(left) for path in left.rglob("*") if path.suffix not in (".json", "")] or [Path()]
    assert all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


@pytest.mark.parametrize("format", [*CONVERSIONS, "adapter"])
def test_every_file_has_the_rights_of_any_new_file(format: str, tmp_path: Path) -> None:
    model = prepared(tiny_llama(), group_size=32)
    before = os.umask(0o027)
    try:
        if format == "adapter":
            save_adapter(get_peft_model(model, lora_config(model, r=4, lora_alpha=4)), tmp_path / "out")
        else:
            CONVERSIONS[format](model, tiny_tokenizer(), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert {name: mode for name, mode in modes.items() if mode not in ("drwxr-x---", "-rw-r-----")} == {}


@pytest.mark.parametrize("format", CONVERSIONS)
def test_nothing_is_overwritten_and_nothing_half_written(format: str, tmp_path: Path) -> None:
    model = prepared(tiny_llama(), group_size=32)
    (tmp_path / "there").touch()
    with pytest.raises((FileExistsError, ValueError), match="exists"):
        CONVERSIONS[format](model, tiny_tokenizer(), tmp_path / "there")
    with pytest.raises(ValueError, match="no quantized weight"):
        CONVERSIONS[format](tiny_llama(), tiny_tokenizer(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("format", CONVERSIONS)
def test_a_layer_whose_scales_are_too_small_for_float16_keeps_its_numbers(
    format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Formats with float16 scales hold it as the numbers that it computes with, and say so; the others as codes."""
    small, model = "model.layers.1.self_attn.v_proj", tiny_qwen2()
    with torch.no_grad():
        model.get_submodule(small).weight.mul_(2.0**-30)
    prepare(model, QuantConfig.preset("int4", group_size=32))
    CONVERSIONS[format](model, tiny_tokenizer(), tmp_path / "out")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    as_numbers = format in ("gguf", "gptq")
    assert set(READERS[format](tmp_path / "out", "qwen2")) == set(layers) - ({small} if as_numbers else set())
    assert (small in caplog.text) == as_numbers
    weight = layers[small].quantized_weight(torch.bfloat16)
    if format == "gptq":
        assert torch.equal(tensors_of(tmp_path / "out")[f"{small}.weight"], weight)
        assert quantization_config(tmp_path / "out")["dynamic"] == {f"-:^{small.replace('.', chr(92) + '.')}$": {}}
    elif format == "gguf":
        (tensor,) = (t for t in gguf.GGUFReader(tmp_path / "out").tensors if t.name == "blk.1.attn_v.weight")
        assert torch.equal(torch.from_numpy(tensor.data.copy()).view(torch.bfloat16), weight)


# GPTQ


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_gptq_names_the_convention_of_zero_points_and_packs_as_defined(tmp_path: Path) -> None:
    """Two hand-worked words: codes from the lowest bits along the input; zero 8 is stored as 7 in the first version."""
    from safetensors.torch import load_file

    model = prepared(tiny_llama(), group_size=32)
    write_gptq(model, tiny_tokenizer(), tmp_path / "v1")
    settings = quantization_config(tmp_path / "v1")
    assert settings == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": settings["meta"],
    }
    tensors = load_file(tmp_path / "v1" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"  # 64 -> 128
    assert tensors[f"{name}.qweight"].shape == (64 * 4 // 32, 128)
    assert tensors[f"{name}.scales"].shape == (2, 128)
    assert tensors[f"{name}.g_idx"].tolist() == [0] * 32 + [1] * 32
    assert tensors[f"{name}.qzeros"].tolist() == [[0x77777777] * 16] * 2
    codes = model.get_submodule(name).codes()[5, 8:16].tolist()
    word = sum((code + 8) << (4 * place) for place, code in enumerate(codes))
    assert int(tensors[f"{name}.qweight"][1, 5]) & 0xFFFFFFFF == word
    write_gptq(prepared(tiny_llama(), group_size=32, symmetric=False), tiny_tokenizer(), tmp_path / "v2")
    assert quantization_config(tmp_path / "v2")["checkpoint_format"] == "gptq_v2"


def test_gptq_names_layers_that_differ_and_keeps_an_embedding_s_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    overrides = {"re:.*down_proj": {"num_bits": 8, "strategy": "channel", "group_size": None}}
    model = prepared(tiny_llama(), group_size=32, overrides=overrides, ignore=("re:.*0.*o_proj",), embeddings="int8")
    write_gptq(model, tiny_tokenizer(), tmp_path / "out")
    dynamic = quantization_config(tmp_path / "out")["dynamic"]
    assert dynamic == {
        r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"-:^model\.layers\.0\.self_attn\.o_proj$": {},
    }
    kept = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(kept, model.model.embed_tokens.quantized_weight(torch.bfloat16))


def test_gptq_of_a_packed_model_with_a_quantized_embedding(tmp_path: Path) -> None:
    model = prepared(tiny_llama(), group_size=32, embeddings="int8")
    save(model, tmp_path / "packed", tiny_tokenizer())
    packed = load(tmp_path / "packed")
    write_gptq(packed, tiny_tokenizer(), tmp_path / "gptq")
    assert quantization_config(tmp_path / "gptq")["quant_method"] == "gptq"


def test_gptq_writes_a_conv1d_in_its_own_layout(tmp_path: Path) -> None:
    """Beside linear layers, which have the other."""
    from safetensors.torch import load_file

    model = tiny_gpt2()
    inner = model.config.n_inner or 4 * model.config.n_embd
    model.transformer.h[0].mlp.c_proj = torch.nn.Linear(inner, model.config.n_embd)
    prepare(model, QuantConfig.preset("int4", group_size=32))
    write_gptq(model, tiny_tokenizer(), tmp_path / "gptq")
    written = load_file(tmp_path / "gptq" / "model.safetensors")
    layer = model.transformer.h[0].attn.c_attn
    expected = layer.quantized_weight(torch.bfloat16)
    assert expected.shape == layer.weight.shape == (model.config.n_embd, 3 * model.config.n_embd)
    assert torch.equal(written["transformer.h.0.attn.c_attn.weight"], expected)
    assert quantization_config(tmp_path / "gptq")["dynamic"][r"-:^transformer\.h\.0\.attn\.c_attn$"] == {}


def test_gptq_names_layers_that_servers_run_as_one_where_they_are_alike(tmp_path: Path) -> None:
    """vLLM asks for the rule of qkv_proj and gate_up_proj, whose parts must not differ."""
    overrides = {r"re:.*\.1\..*(gate|up|q|k)_proj": {"num_bits": 8, "group_size": 32}}
    model = prepared(tiny_llama(), group_size=32, overrides=overrides, ignore=(r"re:.*\.0\..*(q|k|v)_proj",))
    write_gptq(model, tiny_tokenizer(), tmp_path / "out")
    dynamic = quantization_config(tmp_path / "out")["dynamic"]
    eight = {"bits": 8, "group_size": 32, "sym": True}
    assert {rule: scheme for rule, scheme in dynamic.items() if "qkv" in rule or "gate_up" in rule} == {
        r"+:^model\.layers\.1\.mlp\.gate_up_proj$": eight,
        r"-:^model\.layers\.0\.self_attn\.qkv_proj$": {},
    }
    parts = [f"mlp.{part}_proj" for part in ("gate", "up")] + [f"self_attn.{part}_proj" for part in ("q", "k")]
    assert {rule for rule, scheme in dynamic.items() if scheme == eight} == {
        rf"+:^{re.escape(f'model.layers.1.{part}')}$" for part in [*parts, "mlp.gate_up_proj"]
    }


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (tiny_llama, {"preset": "w4a8", "group_size": 32}, "quantized inputs"),
        (tiny_llama, {"preset": "w4a8kv8", "group_size": 32, "input_activations": None}, "quantized KV cache"),
        (lambda: tiny_llama(intermediate_size=80), {"group_size": 16}, "80 x 64; the GPTQ layout needs both divided"),
        (tiny_mixtral, {"group_size": 32}, "stacked experts"),
        (tiny_gpt2, {"group_size": 32}, "no linear layer of the model's blocks"),
    ],
)
def test_what_gptq_cannot_hold_is_refused(
    make: Callable[[], PreTrainedModel], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_gptq(prepared(make(), **changes), tiny_tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())

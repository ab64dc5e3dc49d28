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
from compressed_tensors.compressors.base import compress_module, decompress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import save_file
from transformers import CompressedTensorsConfig, PreTrainedModel
from typer.testing import CliRunner

from llmqat import QATTrainer, QuantConfig, convert, load, save
from llmqat.cli import app
from llmqat.layers import PackedExperts, PackedLinear
from tests.export.readers import READERS, tensors_of
from tests.export.test_import import CASES, foreign, logits, observe
from tests.tiny import CLASSES, tiny_model, tiny_of_class, tiny_tokenizer
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


EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "head_dim": 16,
        "num_key_value_heads": 4,
    },
}
"""Kimi K2 is a DeepSeek V3."""
ONLY_EXPERTS = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
"""What Kimi K2's checkpoint ignores."""


INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}


def only_experts(folder: Path, name: str, **weights: Any) -> tuple[Path, dict[str, torch.Tensor], torch.nn.ModuleDict]:
    """A tiny checkpoint of which routed experts alone are packed, one by one; their tensors, and their layers."""
    model = tiny_model(name, **EXPERTS[name]).bfloat16()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = tensors_of(folder)
    layers = torch.nn.ModuleDict()
    for key in [key for key in tensors if re.search(r"mlp\.experts\.\d+\.", key)]:
        weight = tensors.pop(key)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
        linear.weight.data.copy_(weight)
        layers[key.removesuffix(".weight").replace(".", "/")] = linear
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**(weights or INT4)))
    apply_quantization_config(layers, QuantizationConfig(config_groups={"group_0": scheme}))
    for layer in layers.values():
        observe(layer, scheme.weights)
        compress_module(layer)
    packed = {key.replace("/", "."): tensor for key, tensor in layers.state_dict().items()}
    save_file(tensors | packed, folder / "model.safetensors", metadata={"format": "pt"})
    form = next(iter(layers.values())).quantization_scheme.format
    group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json"), "format": form}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ONLY_EXPERTS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, packed, layers


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_packed_one_by_one_are_read_as_the_stacks_of_the_model(name: str, tmp_path: Path) -> None:
    folder, theirs, _ = only_experts(tmp_path / "theirs", name)
    model = load(folder, kernel="reference")
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    assert len(stacks) == (2 if name == "deepseek_v3" else 4)
    assert not packed(model)
    scales = {stack: experts.weight_scale.clone() for stack, experts in stacks.items()}
    for stack, experts in stacks.items():
        kinds = ("gate_proj", "up_proj") if stack.endswith("gate_up_proj") else ("down_proj",)
        place = stack.rpartition(".")[0]
        names = [f"{place}.{expert}.{kind}" for expert in range(4) for kind in kinds]
        for leaf in ("weight_packed", "weight_scale"):
            rows = torch.cat([theirs[f"{one}.{leaf}"] for one in names])
            assert torch.equal(experts.state_dict()[leaf], rows)
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert torch.equal(logits(model), logits(stock))
    save(model, tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", kernel="reference")), logits(model))

    arguments = _arguments(tmp_path / "run", trainable="scales", scale_learning_rate=5e-2, bf16=True, max_steps=2)
    QATTrainer(model=model, teacher=tiny_model(name, **EXPERTS[name]), args=arguments, train_dataset=Blocks()).train()
    save(convert(model), tmp_path / "trained")
    after, before = dict(load(tmp_path / "trained").named_modules()), dict(load(folder).named_modules())
    assert all(torch.equal(after[stack].weight_packed, before[stack].weight_packed) for stack in stacks)
    assert any(not torch.equal(after[stack].weight_scale, scale) for stack, scale in scales.items())


@pytest.mark.parametrize("case", ["FP8 weights", "FP8 tensor", "FP8 block", "NVFP4 weights", "MXFP4 weights"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_floats_are_read_as_the_stacks_of_the_model(name: str, case: str, tmp_path: Path) -> None:
    """Of NVFP4 and of FP8 with a scale a tensor, each expert has a number of its own."""
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, **CASES[case]}
    folder, _, layers = only_experts(tmp_path / "theirs", name, **weights)
    stacks = {name: module for name, module in load(folder).named_modules() if isinstance(module, PackedExperts)}
    assert len(stacks) == (2 if name == "deepseek_v3" else 4)
    for layer in layers.values():
        decompress_module(layer)
    for stack, experts in stacks.items():
        place, kinds = stack.rpartition(".")[0].replace(".", "/"), ("down_proj",)
        if stack.endswith("gate_up_proj"):
            kinds = ("gate_proj", "up_proj")
        rows = [layers[f"{place}/{expert}/{kind}"].weight for expert in range(4) for kind in kinds]
        assert torch.equal(experts.weight.flatten(0, 1), torch.cat(rows).bfloat16())
    if case == "NVFP4 weights":
        with pytest.raises(ValueError, match=r"its experts were read one by one, each with a weight_global_scale of"):
            save(load(folder), tmp_path / "again")
    else:
        save(load(folder), tmp_path / "again")
        again = dict(load(tmp_path / "again").named_modules())
        assert all(torch.equal(again[stack].weight, experts.weight) for stack, experts in stacks.items())


def test_tensors_that_an_expert_lacks_are_named(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, **CASES["NVFP4 weights"]}
    folder, *_ = only_experts(tmp_path / "theirs", "qwen3_moe", **weights)
    lacking = "model.layers.0.mlp.experts.2.up_proj.weight_global_scale"
    kept = {name: tensor for name, tensor in tensors_of(folder).items() if name != lacking}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"experts.gate_up_proj lacks {lacking}, which others of its experts have"):
        load(folder)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder, *_ = only_experts(tmp_path / "theirs", "qwen3_moe")
    tensors = tensors_of(folder)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp.experts.2.up_proj" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj lacks 1 of 8 packed parts: the up_proj of expert 2"):
        load(folder)

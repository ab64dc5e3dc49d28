"""Prepared checkpoints, written in the middle of a training: loaded as they are, packed, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from llmqat import QATArguments, QATTrainer
from llmqat.export import load, load_any, save
from llmqat.layers import PRESETS, QuantConfig, QuantModule, prepare
from llmqat.models import DEQUANTIZED, load_model
from llmqat.recipe.plan import coverage_of
from tests.tiny import (
    regrouped,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_model,
    tiny_of_class,
    tiny_qwen2,
    tiny_tokenizer,
    with_ranges,
)

MODELS = {
    "llama": tiny_llama,
    "untied": lambda: tiny_llama(tied=False),
    "qwen2": tiny_qwen2,
    "experts": tiny_mixtral,
    "Conv1D": tiny_gpt2,
    "llava": lambda: tiny_of_class("llava"),
    "t5": lambda: tiny_of_class("t5"),
    "mamba": lambda: tiny_model("mamba", state_size=16, time_step_rank=16),
}


def written(model: PreTrainedModel, folder: Path, **changes: Any) -> PreTrainedModel:
    """Prepares a model, moves its scales as training does, and writes it as a Trainer does."""
    prepare(model, QuantConfig.model_validate({"weights": {"num_bits": 4, "group_size": 16}, **changes}))
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, QuantModule) and module.log_scale is not None:
            module.log_scale.data.copy_(torch.randn(module.log_scale.shape, generator=generator) * 0.1)
    with_ranges(model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def check_same(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", MODELS)
def test_a_prepared_checkpoint_is_loaded_as_it_was(name: str, tmp_path: Path) -> None:
    model = written(MODELS[name](), tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    check_same(loaded, model)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_scheme_is_loaded_as_it_was(preset: str, tmp_path: Path) -> None:
    config = QuantConfig.preset(preset).model_dump(mode="json")
    config["weights"] |= regrouped(preset, 16)
    for part in (config["kv_cache"] or {}).values():
        if isinstance(part, dict) and part.get("group_size"):
            part["group_size"] = 16
    model = written(tiny_llama(), tmp_path / "saved", **config)
    check_same(load(tmp_path / "saved"), model)


@pytest.mark.parametrize("part", ["embeddings", "lm_head"])
def test_quantized_ends_are_loaded_as_they_were(part: str, tmp_path: Path) -> None:
    model = written(tiny_llama(tied=part == "embeddings"), tmp_path / "saved", **{part: "int8"})
    check_same(load(tmp_path / "saved"), model)


def test_a_checkpoint_of_a_trainer_is_packed_and_judged(tmp_path: Path) -> None:
    ids = torch.randint(2, 258, (8, 16), generator=torch.Generator().manual_seed(1))
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=16))
    arguments = QATArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, save_steps=1, report_to="none", use_cpu=True, bf16=False
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    QATTrainer(model=model, teacher=tiny_llama(), args=arguments, train_dataset=rows).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    tiny_tokenizer().save_pretrained(checkpoint)
    check_same(load(checkpoint), model)
    save(load(checkpoint), tmp_path / "packed")
    save(model, tmp_path / "wanted")
    assert (tmp_path / "packed/model.safetensors").read_bytes() == (tmp_path / "wanted/model.safetensors").read_bytes()
    with torch.no_grad():
        judged, packed = load_any(checkpoint)[0], load(tmp_path / "packed")
        assert torch.equal(judged(ids).logits, packed(ids).logits)
    assert coverage_of(str(checkpoint), QuantConfig.preset("int8")).quantized[0].treatment == "int4 g16"


def test_a_prepared_checkpoint_takes_no_kernel_and_is_no_full_precision_model(tmp_path: Path) -> None:
    written(tiny_llama(), tmp_path / "saved")
    for options in ({"dtype": torch.bfloat16}, {"kernel": "reference"}, {"compile": True}):
        with pytest.raises(ValueError, match="prepared for training"):
            load(tmp_path / "saved", **options)
    with pytest.raises(ValueError, match=r"prepared for quantization-aware training.*llmqat\.load"):
        load_model(str(tmp_path / "saved"))


@pytest.mark.parametrize("change", ["a scale is missing", "a weight is missing", "a tensor is left over"])
def test_a_damaged_prepared_checkpoint_is_refused_by_name(change: str, tmp_path: Path) -> None:
    written(tiny_llama(), tmp_path / "saved")
    path = tmp_path / "saved/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj." + ("log_scale" if "scale" in change else "weight")
    if "left over" in change:
        tensors[name := "model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    else:
        del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=name):
        load(tmp_path / "saved")


# What is sent elsewhere


def test_what_is_no_packed_checkpoint_is_told_the_right_way(tmp_path: Path) -> None:
    plain, adapter = tmp_path / "folders/plain", tmp_path / "adapter"
    tiny_of_class("llava").save_pretrained(plain)
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for spec, wanted in (
        (plain, "AutoModelForImageTextToText"),
        (adapter, "is an adapter"),
        (tmp_path / "x.gguf", "is a GGUF file"),
        (tmp_path / "folders", str(plain)),
    ):
        with pytest.raises(ValueError, match=wanted):
            load(spec)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4"])
def test_what_another_tool_has_quantized_is_refused_by_its_name(method: str, tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": method, "bits": 4, "group_size": 32, "load_in_4bit": True}
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=method):
        load(tmp_path)
    if method not in DEQUANTIZED:
        with pytest.raises(ValueError, match=method):
            load_any(tmp_path)

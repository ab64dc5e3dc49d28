"""An adapter from inside the quantizers, written as a plain peft folder over a packed base: against stock peft."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from llmqat import QuantConfig, adopt_adapters, load, lora_config, prepare, save, save_adapter
from llmqat.calibrate import calibrate_ranges
from llmqat.cli import app
from llmqat.evaluate.adapters import adapter_beside
from llmqat.export.commands import vllm_command
from tests.tiny import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_tokenizer

INT4 = QuantConfig.preset("int4-g32")


def folders(folder: Path, model: PreTrainedModel, **options: Any) -> tuple[Path, Path]:
    """An adapter that moves its base visibly, trained inside quantizers as far as anyone can tell; a packed base."""
    model.save_pretrained(folder / "original")
    tiny_tokenizer().save_pretrained(folder / "original")
    student, base = (AutoModelForCausalLM.from_pretrained(folder / "original", dtype=torch.float32) for _ in range(2))
    for part in (student, base):
        prepare(part, INT4)
        calibrate_ranges(part, "mse")
    save(base, folder / "base", tiny_tokenizer())
    adapted = get_peft_model(student, lora_config(student, **{"r": 4, "lora_alpha": 8, **options}))
    adopt_adapters(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    save_adapter(adapted, folder / "adapter")
    return folder / "adapter", folder / "base"


def export(adapter: Path, base: Path, out: Path) -> Any:
    words = ["export", str(adapter), "--format", "peft", "--base", str(base), "--out", str(out)]
    return CliRunner().invoke(app, words)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(2))).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"targets": ["q_proj", "model.layers.1.mlp.up_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj|v_proj": 64, r"layers\.1\.mlp\..*": 32}},
    ],
    ids=str,
)
def test_stock_peft_computes_base_and_adapter_side_by_side(options: dict[str, Any], tmp_path: Path) -> None:
    adapter, base = folders(tmp_path, tiny_llama(), **options)
    done = export(adapter, base, tmp_path / "plain")
    assert done.exit_code == 0, done.output
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    plain = logits(stock)
    found = logits(PeftModel.from_pretrained(stock, str(tmp_path / "plain")).eval())
    assert not torch.equal(found, plain)
    ours = load(base, kernel="reference")
    assert torch.equal(logits(ours), plain)
    with adapter_beside(ours, tmp_path / "plain"):
        assert torch.equal(logits(ours), found)
    assert torch.equal(logits(ours), plain)

    state, theirs = (
        load_file(tmp_path / "plain/adapter_model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    assert state
    assert set(state) == {name for name in theirs if "lora_" in name}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in state.items())
    config = LoraConfig.from_pretrained(str(tmp_path / "plain"))
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8, options.get("use_rslora", False))
    assert config.target_parameters is None
    assert config.base_model_name_or_path == str(base)


def test_what_it_costs_is_measured_and_said(tmp_path: Path) -> None:
    adapter, base = folders(tmp_path, tiny_llama())
    done = export(adapter, base, tmp_path / "plain")
    said = " ".join(done.output.split())
    found = re.search(
        r"instead of folded into them: KL ([\d.]+) from the folded model, .* ([\d.]+)% of ([\d,]+);", said
    )
    assert found is not None, said
    assert float(found[1]) > 0
    assert 0 < float(found[2]) < 100
    assert vllm_command(base, "--enable-lora", "--lora-modules", f"plain={tmp_path / 'plain'}") in said
    assert export(adapter, base, tmp_path / "plain").exit_code == 2


def test_what_no_server_could_compute_is_refused_by_name(tmp_path: Path) -> None:
    refusals = {
        "gpt2": (tiny_gpt2(), r"on transformer\.h\.0\.attn\.c_attn, a Conv1D"),
        "mixtral": (tiny_mixtral(), r"on model\.layers\.0\.mlp\.experts\.\w+, which is a PackedExperts"),
    }
    for name, (model, message) in refusals.items():
        adapter, base = folders(tmp_path / name, model)
        done = export(adapter, base, tmp_path / name / "plain")
        assert done.exit_code == 2
        assert re.search(message, " ".join(done.output.split())), done.output
        assert not (tmp_path / name / "plain").exists()


def test_mistakes_are_told(tmp_path: Path) -> None:
    adapter, base = folders(tmp_path, tiny_llama())
    ordinary = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    ordinary.save_pretrained(str(tmp_path / "ordinary"))
    larger = folders(tmp_path / "larger", tiny_llama(intermediate_size=192))[1]
    cases = {
        (adapter, tmp_path / "original"): "is no packed checkpoint",
        (tmp_path / "ordinary", base): "an ordinary peft adapter already",
        (base, base): "adapter_config.json is not there",
        (adapter, larger): "has another shape there",
    }
    for (given, over), message in cases.items():
        done = export(given, over, tmp_path / "plain")
        assert done.exit_code == 2
        assert message in " ".join(done.output.split()), done.output
    done = CliRunner().invoke(app, ["export", str(adapter), "--format", "peft", "--out", str(tmp_path / "plain")])
    assert "needs --base" in " ".join(done.output.split())
    assert json.loads((adapter / "adapter_config.json").read_text())["target_parameters"]

"""What is said of stock transformers is what it does: a law over architectures and classes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CompressedTensorsConfig, PreTrainedModel

from llmqat.export import ExportReport, load, save
from llmqat.export.stock import ONLY_HERE, try_stock
from llmqat.layers import KVCacheConfig, QuantConfig, prepare
from llmqat.layers.probe import probe_inputs
from tests.tiny import ARCHITECTURES, CLASSES, tiny_architecture, tiny_llama, tiny_model, tiny_of_class

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: lambda name=name: tiny_architecture(name) for name in ARCHITECTURES if name not in ("qwen2", "mistral")},
    **{name: lambda name=name: tiny_of_class(name) for name in CLASSES},
    "llama4": lambda: tiny_model("llama4_text", intermediate_size_mlp=128, num_local_experts=4, moe_layers=[0, 1]),
    "asymmetric": tiny_llama,
    "mixed": tiny_llama,
    "inputs": tiny_llama,
    "inputs, falcon": lambda: tiny_model("falcon"),
    "mixed, falcon": lambda: tiny_model("falcon"),
}
MIXED = {"overrides": {r"re:.*(down_proj|dense_4h_to_h)": {"weights": {"num_bits": 8, "group_size": 32}}}}
SCHEMES: dict[str, dict[str, Any]] = {
    "asymmetric": {"weights": {"num_bits": 4, "group_size": 16, "symmetric": False}},
    "mixed": MIXED,
    "mixed, falcon": MIXED,
    "inputs": {"input_activations": {}},
    "inputs, falcon": {"input_activations": {}},
    "t5": {"ignore": (r"re:.*\.wo$",)},  # its modeling code reads the layer's dtype
}


def saved(name: str, folder: Path) -> ExportReport:
    model = MODELS[name]()
    given = {"weights": {"num_bits": 4, "group_size": 16}, **SCHEMES.get(name, {})}
    prepare(model, QuantConfig.model_validate(given))
    return save(model, folder)


@torch.no_grad()
def difference(folder: Path, loader: str) -> float:
    """Returns how far the logits of stock transformers are from ours; infinity where it does not load."""
    ours = load(folder, kernel="reference")
    inputs = probe_inputs(ours, 2, 16, seed=3)
    wanted = ours(**inputs, use_cache=False).logits.float()
    try:
        kind = getattr(transformers, loader)
        stock, found = kind.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    except Exception:
        return float("inf")
    assert not found["missing_keys"]  # what would stay random is refused
    return float((stock(**inputs, use_cache=False).logits.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_said_of_transformers_is_what_it_does(name: str, tmp_path: Path) -> None:
    report = saved(name, tmp_path / "out")
    assert report.stock.loads == (difference(tmp_path / "out", report.stock.loader) < 1e-3)
    assert report.stock.loads != any("transformers" in note for note in report.notes)
    assert report.stock.compared == "logits"
    without_weights = try_stock(tmp_path / "out")
    assert without_weights.compared == "tensors"
    facts = ("loader", "loads", "dequantized", "silent")
    assert [getattr(without_weights, fact) for fact in facts] == [getattr(report.stock, fact) for fact in facts]


def test_llama4_is_not_left_random_in_silence(tmp_path: Path) -> None:
    report = saved("llama4", tmp_path / "out")
    assert report.stock.silent
    assert "experts" in report.stock.reason
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    assert all(group[ONLY_HERE] for group in groups.values())


@pytest.mark.parametrize("name", ["falcon", "t5"])
def test_a_model_that_reads_weights_while_it_is_built_is_dequantized_at_loading(name: str, tmp_path: Path) -> None:
    report = saved(name, tmp_path / "out")
    # Transformers 5.13 cannot dequantize at loading, and is said not to load it.
    can = "dequantize" in inspect.signature(CompressedTensorsConfig.__init__).parameters
    assert (report.stock.loads, report.stock.dequantized) == (can, can)
    assert can or report.notes


def test_what_transformers_computes_otherwise_is_found_by_its_logits(tmp_path: Path) -> None:
    report = saved("llama", tmp_path / "out")
    assert report.stock.loads
    ours = load(tmp_path / "out", kernel="reference")
    inputs = probe_inputs(ours, 2, 16)
    from llmqat.export.stock import ExpectedLogits

    with torch.no_grad():
        other = ExpectedLogits(inputs, ours(**inputs, use_cache=False).logits + 1)
    found = try_stock(tmp_path / "out", other)
    assert (found.loads, found.silent) == (False, True)
    assert "logits" in found.reason


def test_a_quantized_cache_is_the_note_of_the_audit(tmp_path: Path) -> None:
    model = tiny_llama()
    given = {"weights": {"num_bits": 4, "group_size": 16}}
    prepare(model, QuantConfig.model_validate({**given, "kv_cache": KVCacheConfig()}))
    report = save(model, tmp_path / "out")
    assert report.stock.loads
    assert ["KV cache" in note for note in report.notes] == [True]


def test_a_trial_shows_nothing_and_draws_no_random_number(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    saved("llama4", tmp_path / "first")
    capfd.readouterr()
    torch.manual_seed(5)
    try_stock(tmp_path / "first")
    assert torch.equal(torch.rand(3), wanted)
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")

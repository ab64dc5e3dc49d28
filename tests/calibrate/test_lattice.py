"""Models whose weights already lie on the lattice of the scheme: every method keeps every code, and the run says so."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

from llmqat import QuantConfig, prepare
from llmqat.calibrate import calibrate, calibrate_ranges
from llmqat.cli import app
from llmqat.grid import Grid, keep_lattice, minmax_scale
from llmqat.layers import PRESETS, QuantModule, audit, quantizers_off
from llmqat.models import cast_parameters
from llmqat.recipe.quantize import METHODS, stages_of
from tests.calibrate.test_stages import text
from tests.layers.test_prepare import _small
from tests.tiny import tiny_llama, tiny_mixtral, tiny_tokenizer

Codes = dict[str, Tensor]


def layers(model: torch.nn.Module) -> dict[str, QuantModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}


@torch.no_grad()
def levels(model: torch.nn.Module) -> Codes:
    """Codes, whichever way their scales point."""
    return {
        name: (layer.codes().reshape(layer.scale().numel(), -1) + layer.grid.offset) * layer.scale().sign().view(-1, 1)
        for name, layer in layers(model).items()
    }


@torch.no_grad()
def on_the_lattice(
    model: PreTrainedModel, quant: QuantConfig, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, Codes]:
    """A plain model whose weights are the codes that a scale search finds, times their scales, in `dtype`."""
    prepared = copy.deepcopy(model)
    prepare(prepared, quant)
    calibrate_ranges(prepared, "mse")
    wanted = levels(prepared)
    parameters = dict(model.named_parameters())
    for name, layer in layers(prepared).items():
        weight = parameters.get(name, parameters.get(f"{name}.weight"))
        weight.copy_(layer.quantized_weight(torch.float32).to(dtype))
    return model, wanted


def same(one: Codes, other: Codes) -> bool:
    return one.keys() == other.keys() and all(torch.equal(codes, other[name]) for name, codes in one.items())


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    with cast_parameters(model, torch.bfloat16):
        return model(text() if ids is None else ids).logits.float()


def divergence(found: Tensor, full: Tensor) -> tuple[float, float]:
    """KL from full precision, nats a token, and the share of tokens with the same most probable successor."""
    p, q = full.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float((p.argmax(-1) == q.argmax(-1)).float().mean())


@pytest.mark.parametrize("method", ["rtn", "search", "blockwise"])
@pytest.mark.parametrize("preset", [name for name in PRESETS if _small(name).weights.grid.distances])
def test_every_preset_keeps_every_code(preset: str, method: str) -> None:
    """`blockwise` has every stage in it: scale search, GPTQ, training of blocks."""
    quant = _small(preset)
    inputs = quant.input_activations
    model, wanted = on_the_lattice(tiny_llama(num_hidden_layers=1), quant)
    plain, before = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = [part for part in (inputs, quant.kv_cache) if part is not None and getattr(part, "calibrated", False)]
    if method == "rtn" and found:
        with pytest.raises(ValueError, match="take another --method than rtn"):
            calibrate(model, quant, stages_of(method, 4), text())
        return
    reports = calibrate(model, quant, stages_of(method, 4), text())
    assert len(reports) == len(METHODS[method])
    if quant.weights.levels == "float":  # half of few levels are levels again: other codes, the same numbers
        for name, layer in layers(model).items():
            assert torch.equal(layer.quantized_weight(torch.float32), before[f"{name}.weight"])
    else:
        assert same(levels(model), wanted)
    if quant.input_activations is None and quant.kv_cache is None:
        assert torch.equal(logits(model), plain)  # scales were bfloat16: a KL of 0
        assert all(report.kl_after == 0 for report in reports)
    found = [note for note in audit(model).notes if "already lie on the lattice" in note]
    groups = sum(layer.scale_shape[0] * layer.scale_shape[1] for layer in layers(model).values())
    assert len(found) == 1
    assert found[0].startswith(f"{groups:,} of {groups:,} groups already lie on the lattice of their scheme (")


@pytest.mark.parametrize("preset", PRESETS)
def test_models_of_other_weights_are_quantized_as_ever(preset: str) -> None:
    model = tiny_llama()
    prepare(model, _small(preset))
    assert not [note for note in audit(model).notes if "lattice" in note]
    for layer in layers(model).values():
        assert layer.recognized == 0
        assert layer.kept_groups() is None
        plain = minmax_scale(layer.matrix(), layer.grid, layer.scale_shape)[0]
        of_blocks = plain.view(-1, layer.weights.block, plain.shape[1]).amax(1)
        assert torch.equal(layer.scale(), of_blocks.repeat_interleave(layer.weights.block, 0))


@pytest.mark.parametrize(
    "changes", [{"scales": "dynamic"}, {"scales": "fixed"}, {"symmetric": False}, {"embeddings": "int4"}]
)
def test_other_kinds_of_schemes_keep_them_as_well(changes: dict[str, Any]) -> None:
    quant = QuantConfig.preset("int4-g32", **changes)
    model, wanted = on_the_lattice(tiny_mixtral(), quant)
    plain = logits(model)
    for start in ("minmax", "percentile", "mse"):
        student = copy.deepcopy(model)
        prepare(student, quant)
        calibrate_ranges(student, start)
        assert quant.weights.symmetric is False or same(levels(student), wanted)
        assert torch.equal(logits(student), plain)


def test_groups_on_the_lattice_keep_their_codes_beside_others() -> None:
    quant = QuantConfig.preset("int4-g32")
    model, wanted = on_the_lattice(tiny_llama(), quant)
    other = tiny_llama(seed=1)
    name = "model.layers.0.mlp.up_proj"
    every_other = torch.arange(128)[:, None] % 2 == 0
    with torch.no_grad():
        weight = model.get_parameter(f"{name}.weight")
        weight[:, :32] = torch.where(every_other, weight[:, :32], other.get_parameter(f"{name}.weight")[:, :32])
    reports = calibrate(model, quant, stages_of("blockwise", 4), text())
    mixed, found = levels(model).pop(name).view(128, 2, 32), levels(model)
    kept = wanted.pop(name).view(128, 2, 32)
    del found[name]
    assert same(found, wanted)
    assert torch.equal(mixed[:, 1], kept[:, 1])
    assert torch.equal(mixed[::2, 0], kept[::2, 0])
    assert reports[2].parts["model.layers.0"]["iterations"] > 0
    assert reports[2].parts["model.layers.1"]["iterations"] == 0
    assert f"{2304 - 64:,} of 2,304 groups" in "".join(audit(model).notes)


@torch.no_grad()
def to_q4_0(model: PreTrainedModel) -> None:
    """Rounds every linear layer but the head to Q4_0 and then to bfloat16: a model from "unquantized" QAT.

    The factor makes scales that float16 holds and bfloat16 does not.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rows = module.weight.float().view(-1, 32) * 1.003
            d = rows.gather(1, rows.abs().argmax(1, keepdim=True)).div(-8).half().float()
            module.weight.copy_((d * (rows / d).round().clamp(-8, 7)).view_as(module.weight).bfloat16())


def test_float16_scales_keep_the_codes_where_plain_rounding_changes_predictions() -> None:
    """Q4_0: what is left is the rounding of float16 scales to bfloat16, a share of 2^-8 of a weight at most."""
    model = tiny_llama()
    to_q4_0(model)
    quant, full = QuantConfig.preset("int4-g32"), logits(model)

    ours, naive = copy.deepcopy(model), copy.deepcopy(model)
    prepare(ours, quant)
    prepare(naive, quant)
    for layer in layers(naive).values():
        layer.set_scale(*minmax_scale(layer.matrix(), layer.grid, layer.scale_shape))
    (kl, agreement), (plain_kl, plain_agreement) = (divergence(logits(student), full) for student in (ours, naive))
    assert kl < 0.01 * plain_kl
    assert agreement > 0.98 > plain_agreement
    with quantizers_off(ours):
        assert torch.equal(logits(ours), full)


def test_quantizing_a_folder_says_what_it_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = on_the_lattice(tiny_llama(), QuantConfig.preset("int4-g32"))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "unquantized")
    tiny_tokenizer().save_pretrained(tmp_path / "unquantized")
    words = ["quantize", str(tmp_path / "unquantized"), "--method", "rtn", "--out"]
    said = re.compile(r"2,304\s+of\s+2,304\s+groups\s+already\s+lie\s+on\s+the\s+lattice")
    with caplog.at_level(logging.INFO, "llmqat"):
        done = CliRunner().invoke(app, [*words, str(tmp_path / "same"), "--scheme", "int4-g32"])
    assert done.exit_code == 0, done.output
    assert said.search(done.output)
    assert said.search(caplog.text)
    assert said.search((tmp_path / "same" / "llmqat.json").read_text())
    done = CliRunner().invoke(app, [*words, str(tmp_path / "other"), "--scheme", "int4", "--group-size", "64"])
    assert done.exit_code == 0, done.output
    assert "lattice" not in done.output


@pytest.mark.real
def test_the_real_model_on_the_lattice_of_q4_0_keeps_its_predictions(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":  # as they are: 4 bits with a minimum of their own
            groups = module.out_features, module.in_features // 64
            assert keep_lattice(module.weight, Grid(4), *minmax_scale(module.weight, Grid(4), groups))[2] == 0
    to_q4_0(model)
    ids = torch.tensor([tokenizer(topics["assert"] + topics["numbers"])["input_ids"][:128]])
    full = logits(model, ids)
    prepare(model, QuantConfig.preset("int4-g32"))
    assert sum(layer.recognized for layer in layers(model).values()) == 106_168_320 // 32
    kept = logits(model, ids)
    for layer in layers(model).values():
        layer.set_scale(*minmax_scale(layer.matrix(), layer.grid, layer.scale_shape))
    rounded = logits(model, ids)
    (kl, agreement), (plain_kl, plain_agreement) = divergence(kept, full), divergence(rounded, full)
    assert kl < 0.01 * plain_kl
    assert agreement > 0.97
    assert plain_agreement < 0.9

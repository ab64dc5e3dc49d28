"""Weights that stay zero: the right ones, through calibration, training, saving and loading, in every scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.compressors import BaseCompressor
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmqat
from llmqat import QuantConfig, prepare
from llmqat.calibrate import AnyStage, Stage, calibrate, calibrate_ranges, collect_moments
from llmqat.calibrate.gptq import Curvature, choose_nonzero, damped, gptq_layer, output_error, round_by_gptq
from llmqat.calibrate.sensitivity import measure_sensitivity
from llmqat.export import save
from llmqat.grid import most_important
from llmqat.layers import PRESETS, QuantLinear, QuantModule, WeightConfig, quantizers_off
from llmqat.train import LoraSettings
from tests.tiny import tiny_architecture, tiny_llama, with_ranges

SCHEMES = sorted({*PRESETS, "int4-asym", "int3-g32-asym", "int4-channel", "int4-tensor"} - {"int2-seq"})
BLOCKWISE = {"stage": "blockwise", "iterations": 6, "blocks": 6, "batch_size": 2, "learning_rate": 1e-3}


def stages(*entries: Any) -> list[Stage]:
    return TypeAdapter(list[AnyStage]).validate_python(list(entries))


def text(blocks: int = 6) -> Tensor:
    return torch.randint(2, 258, (blocks, 16), generator=torch.Generator().manual_seed(0))


def layers_of(model: nn.Module) -> dict[str, QuantModule]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantModule)}


def most_in(weight: Tensor, of: int = 4) -> int:
    """Returns the most weights other than zero in any `of` that follow each other."""
    return int((weight.reshape(-1, of) != 0).sum(1).max())


def pruned(model: PreTrainedModel, scheme: str = "int4-2:4") -> PreTrainedModel:
    prepare(model, QuantConfig.preset(scheme))
    return model


def test_the_largest_scores_stay() -> None:
    score = torch.tensor([[1.0, 4, 2, 3, 0, 0, 5, 0], [9, 8, 7, 6, 1, 1, 2, 3]])
    kept = most_important(score, 2, 4)
    assert kept[0, :4].tolist() == [False, True, False, True]
    assert kept[0, 6]
    assert kept.view(4, 4).sum(1).tolist() == [2] * 4
    assert kept[1].tolist() == [True, True, False, False, False, False, True, True]
    assert most_important(score, 3, 8)[0].nonzero().flatten().tolist() == [1, 3, 6]


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (yaml.safe_load("2:4"), "2:4"),  # 124
        ("2:4", "2:4"),
        ("4:8", "4:8"),
        ({"pattern": yaml.safe_load("1:4")}, "1:4"),
        ({"pattern": "unstructured", "share": 0.5}, "0.5 zeros"),
        ("unstructured", "its zeros"),
    ],
)
def test_a_pattern_is_read_as_yaml_gives_it(given: Any, label: str) -> None:
    config = WeightConfig(group_size=32, sparsity=given)
    assert config.sparsity is not None
    assert config.sparsity.label == label
    assert config.label == f"int4 g32 {label}"
    assert config.stored.sparsity is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("4:2", r"pattern='4:2'; give n:m, of which n weights of every m are kept"),
        ("half", "pattern='half'; give n:m"),
        (124 * 60, "pattern='124:0'; give n:m"),
        ({"pattern": "2:4", "share": 0.5}, r"share=0.5 with pattern='2:4'; a share belongs to 'unstructured'"),
        ({"pattern": "unstructured", "share": 1.5}, "less than 1"),
        ({"patern": "2:4"}, "unknown key 'patern' in SparsityConfig; did you mean 'pattern'"),
    ],
)
def test_another_pattern_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WeightConfig(group_size=32, sparsity=given)


def test_where_nothing_can_be_zero_or_rows_do_not_fit_it_is_refused() -> None:
    with pytest.raises(ValueError, match="levels='seq' with sparsity: none of its levels is zero; choose 'ternary'"):
        QuantConfig.preset("int2-seq", sparsity="2:4")
    with pytest.raises(ValueError, match=r"quant.sparsity='3:5': 5 does not divide in_features=64 of model.layers.0"):
        prepare(tiny_llama(), QuantConfig.preset("int4", sparsity="3:5"))
    few = {"pattern": "unstructured", "share": 0.001}
    with pytest.raises(ValueError, match=r"sparsity.share=0.001 leaves no zero in the 64 weights of a row of"):
        prepare(tiny_llama(), QuantConfig.preset("int4", sparsity=few))
    with pytest.raises(ValueError, match=r"sparsity='unstructured' .* keeps the zeros .* no weight .* is zero; give a"):
        prepare(tiny_llama(), QuantConfig.preset("int4", sparsity="unstructured"))


@pytest.mark.parametrize("name", ["int4-2:4", "INT4_2:4", "w4a16-g64-2:4", "int4 g64 2:4"])
def test_names_say_it(name: str) -> None:
    assert QuantConfig.preset(name) == QuantConfig.preset("int4", sparsity="2:4")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_are_zero_in_every_scheme_and_have_no_gradient(scheme: str) -> None:
    model = tiny_llama()
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sizes = {"group_size": 32} if scheme == "fp8-block" else {}  # blocks of 128 are wider than the model
    prepare(model, QuantConfig.preset(scheme, sparsity="2:4", kv_cache=None, **sizes))
    with_ranges(model, 100.0)
    model(text(2), labels=text(2)).loss.backward()
    for name, layer in layers_of(model).items():
        assert layer.nonzero is not None
        quantized = layer.quantized_weight(torch.float32)
        assert most_in(quantized) == 2 or layer.weights.num_bits == 2
        assert not quantized[~layer.nonzero].any()
        expected = most_important(original[f"{name}.weight"].abs(), 2, 4)
        assert torch.equal(layer.nonzero, expected)  # the largest, as no text was looked at
        if layer.weight.grad is not None:
            assert not layer.weight.grad[~layer.nonzero].any()
            assert layer.weight.grad[layer.nonzero].any()
    with quantizers_off(model):  # full precision is the model as it was
        assert torch.equal(model(text(1)).logits, tiny_llama()(text(1)).logits)


@pytest.mark.parametrize("scheme", ["int4-2:4", "int3-g32-asym-4:8", "nvfp4a16-2:4", "ternary-2:4"])
def test_calibration_and_training_keep_the_zeros(scheme: str, tmp_path: Path) -> None:
    model = tiny_llama()
    of = 8 if "4:8" in scheme else 4
    calibrate(model, QuantConfig.preset(scheme), stages("ranges", "gptq", BLOCKWISE), text())
    chosen = {name: layer.nonzero.clone() for name, layer in layers_of(model).items() if layer.nonzero is not None}
    assert all(most_in(kept, of) == of // 2 for kept in chosen.values())
    assert chosen
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(text(2), labels=text(2)).loss.backward()
        optimizer.step()
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.nonzero, chosen[name])
        assert not layer.quantized_weight(torch.float32)[~chosen[name]].any()
    save(model, tmp_path / "packed")
    loaded = llmqat.load(tmp_path / "packed")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        stock(text(1))
        for name, layer in layers_of(model).items():
            for found in (
                loaded.get_submodule(name).dequantized_weight(torch.bfloat16),
                stock.get_submodule(name).weight,
            ):
                assert torch.equal(found, layer.quantized_weight(torch.bfloat16)), name
                assert not found[~chosen[name]].any()


def test_a_calibration_that_goes_on_keeps_the_same_zeros(tmp_path: Path) -> None:
    quant, what = QuantConfig.preset("int4-2:4"), stages("ranges", "gptq")
    found = []
    for _ in range(2):
        model = tiny_llama()
        calibrate(model, quant, what, text(), folder=tmp_path)
        found.append(model.state_dict())
    assert "model.layers.0.mlp.up_proj.nonzero" in found[0]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_ranges_leaves_the_weights_with_the_largest_inputs() -> None:
    model = pruned(tiny_llama())
    moments = collect_moments(model, text())
    calibrate_ranges(model, "weighted_mse", moments)
    for name, layer in layers_of(model).items():
        expected = most_important(layer.weight.abs() * moments[name].sqrt(), 2, 4)
        assert torch.equal(layer.nonzero, expected)


def problem(scheme: str = "int4-g32-2:4") -> tuple[QuantLinear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weights = QuantConfig.preset(scheme).weights
    return QuantLinear(nn.Parameter(torch.randn(24, 64, generator=generator)), None, weights), damped(
        x.t() @ x / 512, 0.01
    )


def fitted(row: Tensor, hessian: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the row whose output is nearest where only some weights are not zero, and its error, in float64."""
    row, hessian, free = row.double(), hessian.double(), kept.nonzero().flatten()
    best = torch.zeros_like(row)
    best[free] = torch.linalg.solve(hessian[free][:, free], hessian[free] @ row)
    return best, (best - row) @ hessian @ (best - row)


def test_a_weight_is_worth_what_the_output_misses_where_the_others_make_up_for_it() -> None:
    """Where whole rows are chosen from, by w^2 / [H^-1]_jj; of every four, knowing the choices before."""
    layer, hessian = problem()
    weight = layer.weight.detach()
    inverse = Curvature.of(hessian).inverse_diagonal
    assert torch.allclose(inverse, torch.linalg.inv(hessian.double()).diagonal().float(), rtol=1e-3)
    alone = torch.ones(64, dtype=torch.bool)
    alone[17] = False
    assert fitted(weight[0], hessian, alone)[1] == pytest.approx(float(weight[0, 17] ** 2 / inverse[17]), rel=1e-3)
    assert torch.equal(
        choose_nonzero(weight, Curvature.of(hessian), 40, 64), most_important(weight.square() / inverse, 40, 64)
    )


def test_which_of_four_stay_is_what_the_definition_says() -> None:
    """Greedy, in float64: of the four features that count most, those go that the output misses least, and so on."""
    layer, hessian = problem()
    weight, found = layer.weight.detach(), choose_nonzero(layer.weight.detach(), Curvature.of(hessian, 4), 2, 4)
    order = hessian.diagonal().view(-1, 4).sum(1).argsort(descending=True)
    same = 0
    for row in range(8):
        w, inverse = weight[row].double().clone(), torch.linalg.inv(hessian.double())
        expected = torch.zeros(64, dtype=torch.bool)
        for group in order.tolist():
            own = list(range(4 * group, 4 * group + 4))
            shrinking, scores = inverse.clone(), []
            for j in own:  # what an error of j costs where only features after it are free
                scores.append(w[j] ** 2 / shrinking[j, j])
                shrinking = shrinking - torch.outer(shrinking[:, j], shrinking[j]) / shrinking[j, j]
            expected[[own[k] for k in torch.stack(scores).topk(2).indices]] = True
            for j in own:
                if not expected[j]:
                    w -= w[j] / inverse[j, j] * inverse[j]
                inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        same += torch.equal(expected, found[row])
    assert same >= 7  # float32 against float64


def test_chosen_zeros_cost_less_than_the_smallest_weights() -> None:
    layer, hessian = problem()
    weight = layer.weight.detach()
    kinds = {
        "chosen": choose_nonzero(weight, Curvature.of(hessian, 4), 2, 4),
        "smallest": most_important(weight.abs(), 2, 4),
    }
    costs = {n: sum(fitted(w, hessian, k)[1] for w, k in zip(weight, kept, strict=True)) for n, kept in kinds.items()}
    assert costs["chosen"] < 0.9 * costs["smallest"]


@pytest.mark.parametrize("scheme", ["int4-g32-2:4", "int4-g32-asym-2:4", "nvfp4a16-2:4"])
def test_what_is_left_makes_up_for_the_zeros(scheme: str) -> None:
    layer, hessian = problem(scheme)
    original = layer.weight.detach().clone()
    scale, zero_point = layer.scale_and_zero_point()
    plain = output_error(original, hessian, layer.codes(), scale, zero_point, layer.grid)
    rounding = gptq_layer(layer, Curvature.of(hessian), 3)
    left = layer.quantized_weight(torch.float32) - original
    after = ((left @ hessian) * left).sum()
    size = ((original @ hessian) * original).sum()
    assert after < 0.75 * plain
    assert rounding.before == pytest.approx(float(plain.detach() / size.detach()), rel=1e-4)
    assert rounding.after == pytest.approx(float(after.detach() / size.detach()), rel=1e-4)
    assert most_in(layer.codes() if zero_point is None else layer.quantized_weight(torch.float32)) == 2


def test_without_sparsity_no_code_is_another() -> None:
    layer, hessian = problem("int4-g32")
    inputs, (scale, _) = Curvature.of(hessian), layer.scale_and_zero_point()
    all_free = torch.ones(24, 64, dtype=torch.bool)
    codes = round_by_gptq(layer.weight, inputs, scale, None, layer.grid)
    assert torch.equal(codes, round_by_gptq(layer.weight, inputs, scale, None, layer.grid, nonzero=all_free))


@pytest.mark.parametrize("sparsity", ["unstructured", {"pattern": "unstructured", "share": 0.6}])
def test_zeros_that_are_there_are_kept(sparsity: Any) -> None:
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer is not model.lm_head:
                layer.weight.mul_(most_important(layer.weight.abs(), round(layer.in_features * 0.4), layer.in_features))
    before = {
        name: module.weight.detach() != 0 for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    calibrate(model, QuantConfig.preset("int4", sparsity=sparsity), stages("ranges", "gptq"), text())
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.nonzero, before[name])
        assert not layer.quantized_weight(torch.float32)[~before[name]].any()


def test_experts_have_zeros_along_the_inputs_of_each() -> None:
    model = tiny_architecture("gpt_oss")
    prepare(model, QuantConfig.preset("int4-g32-2:4"))
    experts = [layer for layer in layers_of(model).values() if layer.transposed]
    assert experts
    for layer in experts:
        assert most_in(layer.quantized_weight(torch.float32).mT) == 2


def test_sensitivity_counts_what_the_zeros_cost() -> None:
    found = {}
    for scheme in ("int4-g32", "int4-g32-2:4"):
        layers = measure_sensitivity(tiny_llama(), QuantConfig.preset(scheme), (4, 8), text())
        found[scheme] = {layer.name: layer.cost for layer in layers}
    for name, cost in found["int4-g32-2:4"].items():
        assert cost[8] > 5 * found["int4-g32"][name][8]
        assert cost[8] > 0.2 * cost[4]


def test_the_format_has_no_packed_form_of_zeros() -> None:
    """What the guide says; else a checkpoint could be smaller."""
    names = BaseCompressor.registered_names()
    assert "pack-quantized" in names
    assert not [name for name in names if "sparse" in name or "24" in name or "bitmask" in name]


def test_adapters_inside_the_quantizers_leave_zeros_alone() -> None:
    model = pruned(tiny_llama())
    model = LoraSettings(r=4).attach(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted = [layer for layer in model.modules() if isinstance(layer, QuantModule) and layer.adapters]
    assert adapted
    for layer in adapted:
        assert layer.nonzero is not None
        assert most_in(layer.quantized_weight(torch.float32)) == 2
        assert (layer.dense_matrix() != layer.weight).any()

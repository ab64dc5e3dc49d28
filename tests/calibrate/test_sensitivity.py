"""The Fisher information against autograd, predicted costs against measured ones, and the knapsack against all ways."""

from __future__ import annotations

import itertools
import logging
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmqat import QuantConfig, prepare
from llmqat.calibrate import (
    Allocation,
    AllocationConfig,
    LayerSensitivity,
    allocate_bits,
    calibrate,
    fisher,
    measure_sensitivity,
)
from llmqat.calibrate import sensitivity as sensitivity_module
from llmqat.calibrate.fisher import fisher_diagonals
from llmqat.calibrate.probe import Probe
from llmqat.calibrate.sensitivity import InputNoise, schemes_of
from llmqat.data.blocks import Rows, rows_of
from llmqat.layers import QuantLinear, QuantModule, quantizers_off
from llmqat.recipe import Recipe
from llmqat.recipe.allocation import check_allocation
from tests.tiny import tiny_architecture, tiny_gpt2, tiny_llama, tiny_mixtral

INT4 = QuantConfig.preset("int4", group_size=32)
CHOICES = (2, 3, 4, 8)
IDS = torch.randint(2, 258, (6, 16), generator=torch.Generator().manual_seed(0))


def test_the_diagonal_is_the_mean_square_of_the_gradient_of_drawn_labels() -> None:
    model = tiny_llama()
    prepare(model, INT4)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    name = "model.layers.0.mlp.up_proj"
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    found = dict(fisher_diagonals(model, layers, rows_of(IDS[:2]), seed=3, dtype=torch.float32))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert all(layer.enabled for layer in layers.values())
    generator = torch.Generator().manual_seed(3)
    expected = torch.zeros_like(found[name])
    for block in IDS[:2]:
        with quantizers_off(model):
            log_probs = model(block[None]).logits[0].log_softmax(-1)
        labels = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(log_probs.gather(-1, labels).sum(), layers[name].weight)
        expected += gradient.square()
    assert torch.allclose(found[name], expected / 32, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("memory", [4.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [tiny_llama, tiny_gpt2, tiny_mixtral, "gemma3_text", "qwen2", "documents"])
def test_blocks_one_by_one_give_what_the_whole_model_gives(
    kind: Any,
    dtype: torch.dtype,
    memory: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids: Any = IDS
    if kind == "documents":
        starts = torch.zeros_like(IDS, dtype=torch.uint8)
        starts[:, [0, 5]] = 1
        ids = Rows(IDS, starts=starts)
    quant, choices = QuantConfig.preset("int4", group_size=16), ("int4-g16", "w4a8-g16")

    def measured() -> list[LayerSensitivity]:
        made = tiny_llama() if kind == "documents" else tiny_architecture(kind) if isinstance(kind, str) else kind()
        return measure_sensitivity(made, quant, choices, ids, dtype=dtype, hidden_memory=memory)

    with caplog.at_level(logging.INFO, logger="llmqat.calibrate.fisher"):
        by_blocks = measured()
    assert not caplog.records  # by which it would say that it takes the whole model
    monkeypatch.setattr(fisher._Backward, "of", _refuse)
    assert by_blocks == measured()


def _refuse(*args: Any) -> None:
    raise fisher._CannotRunAloneError("it is not asked to")


def test_blocks_that_cannot_run_alone_are_taken_with_the_whole_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def measured() -> list[LayerSensitivity]:
        model, kept = tiny_llama(), list[torch.Tensor]()
        model.model.layers[0].register_forward_hook(lambda module, inputs, output: kept.append(output))
        model.model.norm.register_forward_pre_hook(lambda module, inputs: inputs[0] + kept.pop() if kept else None)
        return measure_sensitivity(model, INT4, (3, 4), IDS, dtype=torch.float32)

    with caplog.at_level(logging.INFO, logger="llmqat.calibrate.fisher"):
        found = measured()
    assert "whole model in memory: what follows them reads more than the hidden states after the last" in caplog.text
    monkeypatch.setattr(fisher._Backward, "of", _refuse)
    assert found == measured()


def test_predicted_costs_are_of_the_size_of_measured_ones() -> None:
    """Quantizing one layer alone, at bits where second order holds."""
    torch.manual_seed(0)
    model = tiny_llama()
    ids = torch.randint(2, 258, (48, 16))
    predicted = {layer.name: layer.cost for layer in measure_sensitivity(model, INT4, (3, 4, 8), ids)}
    original = tiny_llama()
    probe = Probe(original, ids, torch.float32)
    ratios = []
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"):
        for bits in (3, 4):
            alone = tiny_llama()
            calibrate(
                alone,
                QuantConfig.preset(f"int{bits}" if bits != 4 else "int4", group_size=32, targets=(name,)),
                [],
                None,
            )
            ratios.append(predicted[name][bits] / probe.divergence(alone))
    # Plain rounding here, searched scales there, and few labels: the size must be right, not the second digit.
    assert all(0.2 < ratio < 3 for ratio in ratios), ratios


def test_fewer_bits_cost_more_for_experts_and_transposed_weights_too() -> None:
    for model, count in ((tiny_llama(), 14), (tiny_mixtral(), 12), (tiny_gpt2(), 8)):
        found = measure_sensitivity(model, INT4, CHOICES, IDS)
        assert len(found) == count
        for layer in found:
            costs = [layer.cost[bits] for bits in CHOICES]
            assert costs == sorted(costs, reverse=True)
            assert costs[-1] > 0


def test_layers_that_the_text_does_not_reach_are_named() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.forward = torch.zeros_like
    named = ("Linear", r"re:model\.layers\.1\.mlp")  # prepare leaves alone what does not run, unless it is named
    with pytest.raises(ValueError, match=r"reached no input of model\.layers\.1\.mlp\.gate_proj.*; give more text"):
        measure_sensitivity(model, QuantConfig.preset("int4", group_size=32, targets=named), (2, 4), IDS)


def test_layers_under_an_override_keep_it() -> None:
    quant = QuantConfig.preset(
        "int4", group_size=32, overrides={"re:.*down_proj": {"num_bits": 8, "strategy": "channel"}}
    )
    found = measure_sensitivity(tiny_llama(), quant, CHOICES, IDS)
    assert not any("down_proj" in layer.name for layer in found)
    plan = allocate_bits(found, 3.0)
    changed = plan.applied_to(quant)
    model = tiny_llama()
    prepare(model, changed)
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            assert module.weights.num_bits == (8 if "down_proj" in name else plan.bits[name])
    with pytest.raises(ValueError, match=r"no layer has the scheme of quant\.weights"):
        measure_sensitivity(
            tiny_llama(),
            QuantConfig.preset("int4", group_size=32, overrides={"Linear": {"num_bits": 8, "strategy": "channel"}}),
            CHOICES,
            IDS,
        )


def everything(layers: list[LayerSensitivity], target: float) -> float:
    total = sum(layer.weights for layer in layers)
    return min(
        sum(layer.cost[bits] for layer, bits in zip(layers, ways, strict=True))
        for ways in itertools.product(CHOICES, repeat=len(layers))
        if sum(layer.weights * bits for layer, bits in zip(layers, ways, strict=True)) <= target * total + 1e-9
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.floats(0, 10), min_size=4, max_size=4)), min_size=1, max_size=5),
    st.floats(2, 8),
)
def test_the_assignment_is_the_best_of_all(sizes: list[tuple[int, list[float]]], target: float) -> None:
    layers = [
        LayerSensitivity(f"layer{number}", size * 64, dict(zip(CHOICES, sorted(costs, reverse=True), strict=True)))
        for number, (size, costs) in enumerate(sizes)
    ]
    found = allocate_bits(layers, target)
    assert found.average_bits <= target + 1e-9
    assert found.predicted_kl == pytest.approx(everything(layers, target), abs=1e-9)


def test_sizes_without_a_common_divisor_are_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [LayerSensitivity(f"layer{n}", 10_007 + 13 * n, {b: (n + 1) / 2**b for b in CHOICES}) for n in range(6)]
    exact = allocate_bits(layers, 3.5)
    monkeypatch.setattr(sensitivity_module, "MAX_CELLS", 300)
    coarse = allocate_bits(layers, 3.5)
    assert coarse.average_bits <= 3.5
    assert exact.predicted_kl <= coarse.predicted_kl <= 1.2 * exact.predicted_kl


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    layer = LayerSensitivity("layer", 64, {3: 1.0, 4: 0.5})
    with pytest.raises(ValueError, match=r"target_bits=2\.5 is below the smallest choice of 3"):
        allocate_bits([layer], 2.5)
    assert allocate_bits([layer], 8.0).bits == {"layer": 4}


def test_what_a_plan_changes() -> None:
    plan = Allocation(3.5, 3.5, 0.1, {"a": 4, "b": 3})
    changed = plan.applied_to(QuantConfig.preset("int4", overrides={"c": None}))
    assert set(changed.overrides) == {"b", "c"}
    assert changed.overrides["b"].weights.num_bits == 3
    assert changed.overrides["b"].weights.group_size == 64


PINNED = {"num_bits": 8, "strategy": "channel", "group_size": None}


def test_layers_of_an_override_and_the_ends_keep_what_they_have() -> None:
    quant = QuantConfig.preset("int8", embeddings="int8", overrides={"re:.*o_proj": PINNED})
    ids = torch.randint(384, (2, 16))
    found = measure_sensitivity(tiny_llama(tied=False), quant, (4, 8), ids, dtype=torch.float32)
    names = {layer.name for layer in found}
    assert "model.layers.0.self_attn.q_proj" in names
    assert not any(name.endswith(("o_proj", "embed_tokens", "lm_head")) for name in names)


NAMES = ("nvfp4", "fp8", "int4-g32", "nvfp4a16")


def test_named_schemes_count_scales_and_inputs() -> None:
    found = {layer.name: layer for layer in measure_sensitivity(tiny_llama(), INT4, NAMES, IDS)}
    layer = found["model.layers.0.mlp.up_proj"]
    assert layer.weights == 128 * 64
    bits = {"nvfp4": 4 + 8 / 16, "nvfp4a16": 4 + 8 / 16, "fp8": 8 + 16 / 64, "int4-g32": 4 + 16 / 32}
    assert layer.bits_per_weight == bits
    for one in found.values():
        assert one.cost["nvfp4"] > 1.2 * one.cost["nvfp4a16"] > 0  # the same weights, and inputs of 4 bits
        assert one.cost["fp8"] < one.cost["nvfp4"]


def test_what_inputs_cost_is_of_the_size_of_what_is_measured() -> None:
    """Quantizing the inputs of one layer alone, at 4 bits: weights of FP8 cost a hundredth of that."""
    torch.manual_seed(0)
    ids = torch.randint(2, 258, (48, 16))
    named = ("w8a4-channel", "w8a16-channel")
    predicted = {one.name: one.cost for one in measure_sensitivity(tiny_llama(), INT4, named, ids, dtype=torch.float32)}
    probe = Probe(tiny_llama(), ids, torch.float32)
    ratios = []
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"):
        alone = tiny_llama()
        calibrate(alone, QuantConfig.preset("w8a4-channel", targets=(name,)), [], None)
        cost = predicted[name]
        assert cost["w8a4-channel"] > 10 * cost["w8a16-channel"]
        ratios.append(cost["w8a4-channel"] / probe.divergence(alone))
    assert all(0.2 < ratio < 3 for ratio in ratios), ratios


def test_a_budget_in_bits_of_the_checkpoint_is_spent_on_named_schemes() -> None:
    found = measure_sensitivity(tiny_llama(), INT4, ("nvfp4", "fp8"), IDS)
    plan = allocate_bits(found, 6.0)
    assert {"nvfp4", "fp8"} == set(plan.bits.values())
    assert plan.average_bits <= 6.0
    everywhere = sum(layer.cost["nvfp4"] for layer in found)
    assert plan.predicted_kl < everywhere
    with pytest.raises(ValueError, match=r"target_bits=4\.2 is below the smallest choice of 4\.5\d* \(nvfp4\)"):
        allocate_bits(found, 4.2)
    model, changed = tiny_llama(), plan.applied_to(QuantConfig.preset("nvfp4"))
    assert set(changed.overrides) == {name for name, choice in plan.bits.items() if choice == "fp8"}
    prepare(model, changed)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            named = QuantConfig.preset(str(plan.bits[name]))
            assert module.weights == named.weights
            assert module.input_quantizer is not None
            assert module.input_quantizer.config == named.input_activations


def test_named_schemes_of_experts_have_no_inputs_to_pay_for() -> None:
    found = measure_sensitivity(tiny_mixtral(), INT4, ("int4-g32", "w4a8-g32"), IDS)
    for layer in found:
        same = layer.cost["int4-g32"] == layer.cost["w4a8-g32"]
        assert same == ("experts" in layer.name), layer.name


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([3, "fp8"], "give either bits, such as 3 and 4, or names of schemes"),
        (["9"], "9 bits are not possible: choose 2 to 8"),
        (["fp8", "fp8"], "a choice is given twice"),
        ([], "at least 1 item"),
    ],
)
def test_choices_that_cannot_be_are_refused(choices: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AllocationConfig(target_bits=5, choices=choices)


def test_names_that_are_no_schemes_of_layers_are_refused() -> None:
    refused = {
        "int4-fp8kv": "int4-fp8kv also says kv_cache, which is not a layer's",
        "fp3": "fp3",
        "int4-g32-2:4": "int4-g32-2:4 has weights that stay zero, and what these cost is not predicted",
        "fp8-block": "fp8-block has one scale for a block",
    }
    for name, said in refused.items():
        with pytest.raises(ValueError, match=said):
            schemes_of(INT4, [name])
    with pytest.raises(ValueError, match="quant has weights that stay zero"):
        schemes_of(QuantConfig.preset("int4-2:4"), ["fp8"])
    assert AllocationConfig(target_bits=5, choices=["3", "4 "]).choices == (3, 4)


def test_stages_of_more_bits_fit_where_some_choice_has_fewer() -> None:
    stages = [{"stage": "ranges", "bits": 4}, {"stage": "gptq", "bits": 4}, "ranges", "gptq"]
    recipe = {"model": "m", "output": "o", "quant": "int2", "calibrate": stages, "allocate": {"target_bits": 3}}
    assert Recipe.model_validate(recipe).allocate is not None


def test_a_budget_is_checked_on_all_layers() -> None:
    model = tiny_llama()
    quant = QuantConfig.preset("int8")
    prepare(model, quant)
    # One scale a row of 64 or 128 in features: 4.25 and 4.125 bits.
    config = AllocationConfig(target_bits=4.24, choices=("int4-channel", "int8"))
    check_allocation(model, quant, config)
    with pytest.raises(ValueError, match=r"is below the smallest choice of 4\.2\d+ \(int4-channel\)"):
        check_allocation(model, quant, config.model_copy(update={"target_bits": 4.14}))


def test_an_expert_that_no_token_chose_has_no_inputs_to_look_at() -> None:
    model = tiny_llama()
    prepare(model, INT4)
    name = "model.layers.0.mlp.up_proj"
    noise = InputNoise({name: model.get_submodule(name)}, schemes_of(INT4, ["nvfp4"]), 1)
    with ExitStack() as stack:
        noise.watch(stack)
        assert model.get_submodule(name)(torch.zeros(0, 64)).shape == (0, 128)
    assert noise.cost(name, "nvfp4") == 0

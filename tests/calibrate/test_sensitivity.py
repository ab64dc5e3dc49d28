"""The Fisher information against autograd, predicted costs against measured ones, and the knapsack against all ways."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmqat import QuantConfig, prepare
from llmqat.calibrate import Allocation, LayerSensitivity, allocate_bits, calibrate, measure_sensitivity
from llmqat.calibrate import sensitivity as sensitivity_module
from llmqat.calibrate.probe import Probe
from llmqat.calibrate.sensitivity import fisher_diagonal
from llmqat.layers import QuantModule, quantizers_off
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mixtral

INT4 = QuantConfig.preset("int4", group_size=32)
CHOICES = (2, 3, 4, 8)
IDS = torch.randint(2, 258, (6, 16), generator=torch.Generator().manual_seed(0))


def test_the_diagonal_is_the_mean_square_of_the_gradient_of_drawn_labels() -> None:
    model = tiny_llama()
    prepare(model, INT4)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    name = "model.layers.0.mlp.up_proj"
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    found = fisher_diagonal(model, layers, IDS[:2], seed=3, dtype=torch.float32)
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

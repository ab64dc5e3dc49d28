"""Moments against a direct computation, and the ranges they lead to."""

from __future__ import annotations

import pytest
import torch

from llmqat import QuantConfig, prepare
from llmqat.calibrate import calibrate_ranges, collect_moments
from llmqat.layers import QuantLinear
from tests.tiny import tiny_llama


def test_moments_are_the_mean_squares_of_the_full_precision_inputs() -> None:
    model = tiny_llama()
    ids = torch.randint(2, 258, (5, 24))
    seen: list[torch.Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    with torch.no_grad():
        model(ids)
    hook.remove()
    prepare(model, QuantConfig.preset("int2", group_size=32))
    moments = collect_moments(model, ids, batch_size=2)
    assert len(moments) == 14
    assert torch.allclose(moments["model.layers.1.mlp.down_proj"], seen[0].square().mean((0, 1)), rtol=1e-4)


def test_calibration_leaves_no_hook_and_no_disabled_quantizer() -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    collect_moments(model, torch.randint(2, 258, (2, 8)))
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert all(layer.enabled and not layer._forward_pre_hooks for layer in layers)
    assert model(torch.randint(2, 258, (1, 4))).logits.shape == (1, 4, 384)


def test_each_method_loses_less_output_than_the_one_before() -> None:
    model, ids = tiny_llama(), torch.randint(2, 258, (8, 32))
    prepare(model, QuantConfig.preset("int2", group_size=32))
    moments = collect_moments(model, ids)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}

    def error(method: str) -> float:
        calibrate_ranges(model, method, moments)
        with torch.no_grad():
            return sum(
                float(((layer.quantized_weight(torch.float32) - layer.weight).square() * moments[name]).sum())
                for name, layer in layers.items()
            )

    errors = [error(method) for method in ("minmax", "mse", "weighted_mse")]
    assert errors[0] > errors[1] > errors[2]


def test_broken_activations_and_missing_moments_are_named() -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    with pytest.raises(ValueError, match=r"needs E\[x\^2\] of model\.layers\.0\.self_attn\.q_proj"):
        calibrate_ranges(model, "weighted_mse", {})
    with pytest.raises(ValueError, match="method='best' is unknown; choose minmax, percentile, mse or weighted_mse"):
        calibrate_ranges(model, "best")
    with pytest.raises(ValueError, match="at least one"):
        collect_moments(model, torch.zeros(0, 8, dtype=torch.long))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"input of model\.layers\.1\.self_attn\.q_proj holds NaN"):
        collect_moments(model, torch.randint(2, 258, (2, 8)))


def test_a_model_that_is_not_prepared_is_refused() -> None:
    for call in (
        lambda m: collect_moments(m, torch.ones(1, 4, dtype=torch.long)),
        lambda m: calibrate_ranges(m, "mse"),
    ):
        with pytest.raises(ValueError, match=r"call llmqat\.prepare"):
            call(tiny_llama())

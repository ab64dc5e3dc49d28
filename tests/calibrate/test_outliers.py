"""Smoothing and rotation: exact in full precision, and of use where there are outliers; static input ranges."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from llmqat import QuantConfig, prepare
from llmqat.calibrate import calibrate_activations, calibrate_ranges, rotate, smooth
from llmqat.calibrate.activations import BINS, _from_histogram
from llmqat.calibrate.rotate import hadamard
from llmqat.layers import ActivationConfig, ActivationQuantizer
from tests.tiny import ARCHITECTURES, tiny_architecture, tiny_llama, tiny_model

ROTATED = {
    "llama": True,
    "qwen2": True,
    "qwen3": True,
    "mistral": True,
    "phi3": True,
    "granite": True,
    "smollm3": True,
    "mixtral": True,
    "qwen3_moe": True,
    "olmoe": True,
    "gpt_oss": True,
}


def ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(2, 258, (rows, 24), generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=ids()).logits


def with_outliers(model: PreTrainedModel) -> PreTrainedModel:
    """Plants what large models have: a few features of the residual stream a hundred times larger than the others."""
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[[3, 17, 40]] *= 60
                for reader in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    if norm is layer.input_layernorm:
                        reader.weight[:, [3, 17, 40]] /= 60
                for reader in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    if norm is layer.post_attention_layernorm:
                        reader.weight[:, [3, 17, 40]] /= 60
    return model


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_smoothing_leaves_full_precision_as_it_was(model_type: str) -> None:
    model = tiny_architecture(model_type)
    before = logits(model)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    folded = smooth(model, ids())
    assert folded >= 2  # one place a layer at least
    assert torch.allclose(logits(model), before, atol=2e-5 * float(before.abs().max()))
    assert any(not torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_rotation_leaves_full_precision_as_it_was_or_says_why_not(model_type: str) -> None:
    model = tiny_architecture(model_type)
    before = logits(model)
    if not ROTATED.get(model_type):
        with pytest.raises(ValueError, match=rf"calibrate\.rotate: .* of {model_type} (subtracts a mean|stands after)"):
            rotate(model)
        assert torch.equal(logits(model), before)
        return
    embedding = model.get_input_embeddings().weight.detach().clone()
    rotate(model)
    assert not torch.allclose(model.get_input_embeddings().weight, embedding, atol=1e-2)
    assert torch.allclose(logits(model), before, atol=2e-5 * float(before.abs().max()))


def test_rotation_unties_the_head_and_the_audit_says_what_that_costs() -> None:
    model = tiny_llama()
    rotate(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    report = prepare(model, QuantConfig.preset("w4a8", group_size=32))
    assert f"{384 * 64 * 2:,} bytes more" in " ".join(report.notes)


@pytest.mark.parametrize("size", [2, 12, 20, 36, 64, 576, 896])
def test_hadamard_matrices_are_orthogonal_and_flat(size: int) -> None:
    matrix = hadamard(size, seed=1)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
    assert not torch.equal(matrix, hadamard(size, seed=2))


def test_a_size_without_a_known_hadamard_matrix_is_rotated_all_the_same() -> None:
    matrix = hadamard(50, seed=0)
    assert torch.allclose(matrix @ matrix.T, torch.eye(50, dtype=torch.float64), atol=1e-12)


def quantization_error(model: PreTrainedModel, config: QuantConfig) -> float:
    plain = logits(model)
    prepare(model, config)
    calibrate_ranges(model, "minmax")
    return float((logits(model) - plain).square().mean())


@pytest.mark.parametrize("preset", ["w4a8", "w4a4"])
def test_smoothing_and_rotation_lower_the_error_of_a_model_with_outliers(preset: str) -> None:
    bits = int(preset[-1])
    config = QuantConfig.preset("int8", input_activations=ActivationConfig(num_bits=bits, symmetric=False))
    plain = quantization_error(with_outliers(tiny_llama()), config)
    smoothed = with_outliers(tiny_llama())
    smooth(smoothed, ids())
    rotated = with_outliers(tiny_llama())
    rotate(rotated)
    assert quantization_error(smoothed, config) < 0.5 * plain
    assert quantization_error(rotated, config) < 0.5 * plain


def test_prepared_models_are_refused() -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    with pytest.raises(ValueError, match="smoothing goes into the original model first"):
        smooth(model, ids())
    with pytest.raises(ValueError, match="rotation goes into the original model first"):
        rotate(model)
    with pytest.raises(ValueError, match=r"calibrate\.smooth=1\.5"):
        smooth(tiny_llama(), ids(), 1.5)


def test_low_precision_is_told_before_anything_is_changed() -> None:
    model = tiny_llama().to(torch.bfloat16)
    before = model.lm_head.weight.clone()
    for fold in (rotate, lambda m: smooth(m, ids())):
        with pytest.raises(ValueError, match=r"needs the model in float32, not torch\.bfloat16"):
            fold(model)
    assert torch.equal(model.lm_head.weight, before)


# Static ranges


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_are_set_and_shared_by_readers_of_one_tensor(observer: str, symmetric: bool) -> None:
    model = tiny_llama()
    inputs = ActivationConfig(dynamic=False, symmetric=symmetric, observer=observer)
    prepare(model, QuantConfig.preset("int8", input_activations=inputs))
    assert calibrate_activations(model, ids(), batch_size=2) == 14
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.input_quantizer.scale == attention.v_proj.input_quantizer.scale
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    assert all(bool(torch.isfinite(quantizer.scale)) for quantizer in quantizers)
    seen: list[torch.Tensor] = []
    handle = attention.q_proj.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    model(ids())
    handle.remove()
    reach = float(attention.q_proj.input_quantizer.scale) * 127.5 / float(seen[0].abs().max())
    assert 0.3 < reach < (1.05 if symmetric else 1.01)


def test_no_static_range_means_no_pass_over_the_text() -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("w8a8"))
    assert calibrate_activations(model, torch.zeros(0, 8, dtype=torch.long)) == 0


def test_observers_cut_what_they_should_from_a_histogram() -> None:
    counts = torch.zeros(BINS, dtype=torch.float64)
    counts[BINS // 4 : 3 * BINS // 4] = 1000  # from -1 to 1, evenly
    counts[-1] = 1  # and one outlier at 2
    full = (-2.0, 2.0)
    low, high = _from_histogram(ActivationConfig(dynamic=False, observer="percentile", percentile=90), full, counts)
    assert (low, high) == (pytest.approx(-0.9, abs=0.01), pytest.approx(0.9, abs=0.01))
    tails = ActivationConfig(dynamic=False, observer="percentile", percentile=90, symmetric=False)
    assert _from_histogram(tails, full, counts) == (pytest.approx(-0.9, abs=0.01), pytest.approx(0.9, abs=0.01))
    low, high = _from_histogram(ActivationConfig(dynamic=False, observer="mse", num_bits=4), full, counts)
    assert 0.9 < high < 1.2


def test_norms_that_ask_for_more_than_an_input_are_left_alone() -> None:
    """A norm with a gate, as linear attention has."""
    model = tiny_llama()
    model.model.layers[0].mlp.gated = GatedNorm(128)
    own = model.model.layers[0].mlp.down_proj.forward
    model.model.layers[0].mlp.down_proj.forward = lambda x: own(model.model.layers[0].mlp.gated(x, x))
    before = logits(model)
    rotate(model)
    assert torch.allclose(logits(model), before, atol=1e-3 * float(before.abs().max()))


class GatedNorm(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return x * self.weight * torch.sigmoid(gate.to(x.dtype))


def test_a_reader_without_a_weight_is_named() -> None:
    model = tiny_model("mamba", state_size=16, time_step_rank=16)
    with pytest.raises(ValueError, match=r"backbone\.layers\.0\.mixer of mamba reads backbone\.layers\.0\.norm with"):
        rotate(model)


def test_rotation_refuses_what_text_does_not_show() -> None:
    """Both layers of LLaVA's projector are as wide as the residual stream, and one of them writes to it."""
    text = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=384)
    vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=3))
    with pytest.raises(ValueError, match=r"linear_1, .*linear_2 of llava are as wide as the residual stream"):
        rotate(model.eval())

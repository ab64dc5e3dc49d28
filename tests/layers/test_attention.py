"""Quantized keys and values in training, and the cache that stores them."""

from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmqat.calibrate.activations import calibrate_activations
from llmqat.layers import (
    KVCacheConfig,
    KVTensorConfig,
    QuantConfig,
    QuantizedCache,
    QuantModule,
    attention,
    prepare,
    quantizers_off,
)
from llmqat.layers.attention import KVQuantizer, dequantize_states, quantize_states
from llmqat.layers.cache import QuantizedStates
from llmqat.models import cast_parameters
from tests.tiny import tiny_architecture, tiny_llama

FOUR = KVTensorConfig(num_bits=4, symmetric=False, group_size=8)
EIGHT = KVTensorConfig()
FLOATS = KVTensorConfig(levels="float")
BY_HEAD = KVTensorConfig(levels="float", strategy="attn_head")
SCHEMES = {
    "kv8": KVCacheConfig(),
    "kv4": KVCacheConfig(key=FOUR, value=FOUR),
    "k8v4": KVCacheConfig(value=FOUR),
    "kvfp8": KVCacheConfig(key=FLOATS, value=FLOATS),
    "kvfp8 by head": KVCacheConfig(key=BY_HEAD, value=BY_HEAD),
}


def prepared(config: KVCacheConfig, model: PreTrainedModel | None = None) -> PreTrainedModel:
    model = model or tiny_llama()
    prepare(model, QuantConfig(targets=(), kv_cache=config))
    calibrate_activations(model, ids())
    return model


def ids(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(2, 258, (rows, length), generator=torch.Generator().manual_seed(3))


def test_codes_of_a_hand_worked_head() -> None:
    # Symmetric: absmax 2.55 over 127.5 is 0.02. Asymmetric 4 bits: from -1 in steps of 3/15.
    codes, scale, offset = quantize_states(torch.tensor([[2.55, -0.02, 0.011]]), EIGHT)
    assert codes.tolist() == [[255, 127, 129]]
    assert offset is None
    assert scale.item() == pytest.approx(0.02)
    four = KVTensorConfig(num_bits=4, symmetric=False)
    codes, scale, offset = quantize_states(torch.tensor([[-1.0, 2.0, 0.11]]), four)
    assert codes.tolist() == [[0, 15, 6]]
    assert offset is not None
    assert (scale.item(), offset.item()) == (pytest.approx(0.2), -1.0)
    assert torch.allclose(dequantize_states(codes, scale, offset, four), torch.tensor([[-1.0, 2.0, 0.2]]))


@settings(max_examples=40, deadline=None)
@given(
    num_bits=st.integers(2, 8),
    symmetric=st.booleans(),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_an_entry_moves_by_half_a_step_at_most(
    num_bits: int, symmetric: bool, groups: int, dtype: torch.dtype, seed: int
) -> None:
    config = KVTensorConfig(num_bits=num_bits, symmetric=symmetric, group_size=8)
    x = torch.randn(2, 3, 5, 8 * groups, generator=torch.Generator().manual_seed(seed)).to(dtype)
    codes, scale, offset = quantize_states(x, config)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**num_bits
    error = (dequantize_states(codes, scale, offset, config).float() - x.float()).abs()
    step = scale.float().repeat_interleave(8, dim=-1)
    # Half a step, where the one missing symmetric code takes another half; and the rounding of scale and result.
    rounding = 2.0**-7 * x.float().abs().amax() if dtype == torch.bfloat16 else 1e-5
    assert bool((error <= step * (1.01 if symmetric else 0.51) + rounding).all())


def test_tokens_and_heads_do_not_see_each_other() -> None:
    x = torch.randn(1, 2, 6, 16)
    changed = x.clone()
    changed[0, 1, 4] *= 100
    quantizer = KVQuantizer(KVCacheConfig())
    before, after = quantizer(x, x)[0], quantizer(changed, x)[0]
    same = torch.ones(1, 2, 6, dtype=torch.bool)
    same[0, 1, 4] = False
    assert torch.equal(before[same], after[same])


def test_gradients_reach_the_projections_and_switched_off_it_is_the_plain_model() -> None:
    plain = tiny_llama()
    model = prepared(SCHEMES["kv4"], copy.deepcopy(plain))
    assert not torch.equal(model(ids()).logits, plain(ids()).logits)
    with quantizers_off(model):
        assert torch.equal(model(ids()).logits, plain(ids()).logits)
    model(ids()).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_is_masked_as_before(implementation: str) -> None:
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    prepared(KVCacheConfig(), model)
    short, mask = ids(1, 10), torch.ones(1, 16, dtype=torch.long)
    mask[:, :6] = 0
    padded = torch.cat([torch.full((1, 6), 7), short], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = model(short).logits
    beside = model(padded, attention_mask=mask, position_ids=positions).logits[:, 6:]
    # Sums in another order may flip a code here and there; a lost mask moves logits by a third of their spread.
    assert (alone - beside).abs().max() < 0.02 * alone.std()


def test_a_copy_has_its_own_switch() -> None:
    model = prepared(KVCacheConfig())
    other = copy.deepcopy(model)
    expected = model(ids()).logits
    with quantizers_off(model):
        assert torch.equal(other(ids()).logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_changed_attention_implementation_is_not_silent(implementation: str) -> None:
    model = prepared(KVCacheConfig())
    expected = model(ids()).logits
    model.set_attn_implementation(implementation)
    with pytest.raises(RuntimeError, match=f"attention implementation is '{implementation}', which does not do it"):
        model(ids())
    model.set_attn_implementation("llmqat_sdpa")
    assert torch.equal(model(ids()).logits, expected)


def test_the_original_implementation_finds_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # Flash attention looks itself up by the name in the configuration.
    seen: list[str] = []

    def flash(module, query, key, value, mask, **options):  # type: ignore[no-untyped-def]
        seen.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)

    model = tiny_llama()
    AttentionInterface.register("spy_test", flash)
    AttentionMaskInterface.register("spy_test", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("spy_test")
    prepared(KVCacheConfig(), model)
    seen.clear()  # prepare runs a tiny forward of the original
    model(ids())
    assert seen == ["spy_test", "spy_test"]
    assert model.config._attn_implementation == "llmqat_spy_test"


def test_a_head_size_of_another_name_is_checked_too() -> None:
    odd = KVTensorConfig(num_bits=4, group_size=5)
    with pytest.raises(ValueError, match=r"group_size=5 does not divide the head size 16 of gpt_neox"):
        prepared(KVCacheConfig(key=odd), tiny_architecture("gpt_neox"))


def test_a_group_that_does_not_divide_the_head_is_named() -> None:
    wide = KVTensorConfig(num_bits=4, group_size=32)
    with pytest.raises(ValueError, match=r"quant\.kv_cache\.value\.group_size=32 does not divide the head size 16"):
        prepared(KVCacheConfig(value=wide))


# The cache


@torch.no_grad()
def step_by_step(model: PreTrainedModel, tokens: torch.Tensor, cache: QuantizedCache, prompt: int) -> torch.Tensor:
    """Returns the logits of `tokens`, the first `prompt` at once and the rest one at a time."""
    parts = [model(tokens[:, :prompt], past_key_values=cache, use_cache=True).logits]
    parts += [
        model(token, past_key_values=cache, use_cache=True).logits for token in tokens[:, prompt:].split(1, dim=1)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_cache_gives_the_numbers_that_training_saw(name: str) -> None:
    model = prepared(SCHEMES[name]).to(torch.bfloat16)
    with torch.no_grad():
        whole = model(ids()).logits
        cache = QuantizedCache(model)
        model(ids()[:, :20], past_key_values=cache, use_cache=True)
    # The stored states, dequantized, are bit for bit the fake-quantized ones.
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer = model.model.layers[1].self_attn.kv_quantizer
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(ids()[:, :20])
    handle.remove()
    assert torch.equal(cache.layers[1].key_states.states(), seen[0][0])
    assert torch.equal(cache.layers[1].value_states.states(), seen[0][1])
    stepped = step_by_step(model, ids(), QuantizedCache(model), 12)
    # A product over one query sums in another order than one over all: a few bfloat16 units of the largest logits.
    assert torch.allclose(stepped.float(), whole.float(), atol=2**-6 * float(whole.abs().max()))


@pytest.mark.parametrize("name", ["k8v4", "kvfp8", "kvfp8 by head"])
def test_generate_takes_the_cache_and_writes_what_the_model_writes_without(name: str) -> None:
    model = prepared(SCHEMES[name])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    plain = model.generate(ids(), **options)
    cached = model.generate(ids(), past_key_values=QuantizedCache(model), **options)
    assert torch.equal(cached, plain)
    beams = model.generate(ids(), past_key_values=QuantizedCache(model), num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids(), num_beams=3, **options))


def test_bytes_are_those_of_eight_and_four_bits() -> None:
    model, tokens = tiny_llama().to(torch.bfloat16), ids(1, 40)
    entries = 2 * 2 * 2 * 40 * 16  # layers, keys and values, heads, tokens, head size
    for config, expected in (
        (KVCacheConfig(), entries + 2 * entries // 16),
        (KVCacheConfig(key=FOUR, value=FOUR), entries // 2 + 4 * entries // 8),
        (None, entries + 2 * 2 * 2),  # in floats, with a scale for the keys and one for the values of a layer
    ):
        if config is None:
            model = prepared(SCHEMES["kvfp8"], tiny_llama()).to(torch.bfloat16)
        cache = QuantizedCache(model, config)
        with torch.no_grad():
            model(tokens, past_key_values=cache, use_cache=True)
        assert cache.nbytes == expected


def test_first_and_last_tokens_stay_in_full_precision() -> None:
    states = QuantizedStates(FOUR, first_tokens=3, last_tokens=5)
    x = torch.randn(1, 2, 20, 16)
    for start, stop in ((0, 2), (2, 9), (9, 10), (10, 20)):
        held = states.append(x[:, :, start:stop])
        assert held.shape[-2] == states.length == stop
        assert torch.equal(held[:, :, :3], x[:, :, : min(3, stop)])
        recent = max(3, stop - 5)
        assert torch.equal(held[:, :, recent:], x[:, :, recent:stop])
    quantized = dequantize_states(*quantize_states(x, FOUR), FOUR)
    assert torch.equal(held[:, :, 3:15], quantized[:, :, 3:15])
    states.crop(7)
    assert states.length == 13
    assert torch.equal(states.states()[:, :, 3:], quantized[:, :, 3:13])
    states.crop(11)
    assert torch.equal(states.states(), x[:, :, :2])


def test_sliding_window_layers_see_their_window_only() -> None:
    model = prepared(KVCacheConfig(), tiny_architecture("gemma2", sliding_window=8))
    with torch.no_grad(), cast_parameters(model, torch.float32):
        whole = model(ids()).logits
    stepped = step_by_step(model, ids(), QuantizedCache(model), 12)
    assert torch.allclose(stepped, whole, atol=1e-3 * float(whole.abs().max()))


def test_floats_have_one_scale_which_text_decides() -> None:
    """Against compressed-tensors' own arithmetic; the largest entry seen becomes 448."""
    model = tiny_llama()
    prepare(model, QuantConfig(targets=(), kv_cache=SCHEMES["kvfp8"]))
    with pytest.raises(RuntimeError, match=r"range of the keys of model.layers.0.self_attn is not calibrated; call"):
        model(ids())
    with pytest.raises(RuntimeError, match="is not calibrated"):
        QuantizedCache(model)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    quantizer = model.model.layers[1].self_attn.kv_quantizer
    handle = quantizer.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    assert calibrate_activations(model, ids()) == 4
    ((key, value), _) = seen[0]
    assert torch.equal(quantizer.key.scale, (key.abs().amax() / 448).bfloat16().float().view(1))
    assert torch.equal(quantizer.value.scale, (value.abs().amax() / 448).bfloat16().float().view(1))
    with torch.no_grad():
        model(ids())
    handle.remove()
    (inputs, outputs) = seen[-1]
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    for x, found, part in zip(inputs, outputs, (quantizer.key, quantizer.value), strict=True):
        assert torch.equal(found, fake_quantize(x, part.scale, None, args))
    with pytest.raises(ValueError, match="floats are for both of them or for none"):
        KVCacheConfig(key=FLOATS)
    with pytest.raises(ValueError, match="floats of the KV cache have 8 bits"):
        KVTensorConfig(levels="float", num_bits=4)
    with pytest.raises(ValueError, match="has no calibrated scales for keys and values in floats"):
        QuantizedCache(tiny_llama(), SCHEMES["kvfp8"])


def test_each_head_can_have_a_scale_of_its_own() -> None:
    """Against compressed-tensors' own arithmetic; the largest entry seen of a head becomes 448."""
    model = prepared(SCHEMES["kvfp8 by head"])
    quantizer = model.model.layers[1].self_attn.kv_quantizer
    assert quantizer.key.scale.shape == quantizer.value.scale.shape == (2, 1, 1)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = quantizer.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    with torch.no_grad(), quantizers_off(model):
        model(ids())
    ((key, value), _) = seen.pop()
    for x, part in ((key, quantizer.key), (value, quantizer.value)):
        assert torch.equal(part.scale.flatten(), (x.abs().amax((0, 2, 3)) / 448).bfloat16().float())
    with torch.no_grad():
        model(ids())
    handle.remove()
    args = QuantizationArgs(num_bits=8, type="float", strategy="attn_head")
    for x, found, part in zip(*seen[0], (quantizer.key, quantizer.value), strict=True):
        assert torch.equal(found, fake_quantize(x, part.scale, None, args))
    with pytest.raises(ValueError, match=r"integers of the KV cache have a scale for each token and head anyway"):
        KVTensorConfig(strategy="attn_head")
    with pytest.raises(ValueError, match=r"the keys of model.layers.1.self_attn have 3 heads, but .* says 2"):
        quantizer(torch.ones(1, 3, 4, 16), torch.ones(1, 3, 4, 16))
    with pytest.raises(ValueError, match=r"the keys of model.layers.1.self_attn have 3 heads"):
        quantizer.key.set_range([-1.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match="is not finite"):
        quantizer.key.set_range([-1.0] * 2, [1.0, float("nan")])


def test_heads_that_differ_by_layer_have_no_scales_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()

    def differs(config: object) -> int:
        raise RuntimeError("num_key_value_heads is not the same in all layers")

    monkeypatch.setattr(attention, "kv_heads", differs)  # as configurations say it that differ by layer
    with pytest.raises(ValueError, match=r"not have the same number of KV heads in all layers .*; take"):
        prepare(model, QuantConfig.preset("int4", group_size=32, kv_cache=SCHEMES["kvfp8 by head"]))
    assert not any(isinstance(module, QuantModule) for module in model.modules())
    prepare(model, QuantConfig.preset("int4", group_size=32, kv_cache=SCHEMES["kvfp8"]))


def test_a_cache_without_a_scheme_or_with_negative_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="no quantized KV cache of its own"):
        QuantizedCache(tiny_llama())
    with pytest.raises(ValueError, match="first_tokens=-1 is negative"):
        QuantizedCache(tiny_llama(), KVCacheConfig(), first_tokens=-1)
    with pytest.raises(ValueError, match="group_size=7 does not divide the head size 16"):
        QuantizedCache(tiny_llama(), KVCacheConfig(key=KVTensorConfig(group_size=7)))

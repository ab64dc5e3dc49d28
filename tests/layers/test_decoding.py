"""A compiled decoding step: attention in groups is transformers' own, and what changes in a model is still noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, PreTrainedModel, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmqat.layers import PackedLinear, QuantConfig, convert, decode_in_groups, is_checked, prepare, share_products
from llmqat.layers.decoding import GROUPED, grouped_attention
from tests.tiny import tiny_llama


def packed(seed: int = 0, preset: str = "int4") -> PreTrainedModel:
    model, generator = tiny_llama().to(torch.bfloat16), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    prepare(model, QuantConfig.preset(preset, group_size=32))
    convert(model)
    share_products(model)
    return model.eval()


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("length", [1, 5])
def test_attention_in_groups_is_transformers_own(heads: tuple[int, int], length: int) -> None:
    query, (key, value) = torch.randn(2, heads[0], length, 16), torch.randn(2, 2, heads[1], 40, 16)
    mask = (torch.rand(2, 1, length, 40) > 0.3).index_fill(3, torch.tensor([0]), True)
    layer = SimpleNamespace(num_key_value_groups=heads[0] // heads[1], is_causal=True)
    for given in (mask, None):
        expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, value, given, scaling=0.3)
        found, _ = grouped_attention(layer, query, key, value, given, scaling=0.3)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["int4", "w4a8kv8"])
def test_a_step_in_groups_gives_the_logits_of_any_other(preset: str) -> None:
    model, ids = packed(preset=preset), torch.arange(2, 12)[None]
    logits = []
    for _ in range(2):
        cache = StaticCache(model.config, max_cache_len=32)
        model(ids[:, :-1], past_key_values=cache)
        logits.append(model(ids[:, -1:], past_key_values=cache).logits)
        decode_in_groups(model)
    assert model.config._attn_implementation == ("llmqat_" if "kv" in preset else "") + GROUPED
    torch.testing.assert_close(*logits)


def other_weights(model: PreTrainedModel) -> None:
    model.load_state_dict(packed(1).state_dict())


def other_weights_seen_before(model: PreTrainedModel) -> None:
    other_weights(model)
    model(torch.arange(2, 6)[None])  # kernels have made their layouts of them


def other_kernel(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.kernel = "reference"
            module.weight_scale.mul_(2)  # which the layout of the kernel before does not see


def trained_scales(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.train_scales()
            assert module.log_scale is not None
            module.log_scale.add_(0.5)


@torch.no_grad()
@pytest.mark.parametrize("change", [other_weights, other_weights_seen_before, other_kernel, trained_scales])
def test_what_changes_after_compiling_is_noticed(change: Callable[[PreTrainedModel], None]) -> None:
    model, ids = packed(), torch.arange(2, 6)[None]
    before, counts = model(ids).logits, []

    def counted(guards: Sequence[Any]) -> list[bool]:
        stays = is_checked(guards)
        # Not those on transformers' list of all architectures that were built in this process, by other tests too.
        ours = [kept for guard, kept in zip(guards, stays, strict=True) if "_CAN_RECORD_REGISTRY" not in guard.name]
        counts.append((len(ours), sum(ours)))
        return stays

    torch._dynamo.reset()
    compiled = torch.compile(model.__call__, backend="eager", options={"guard_filter_fn": counted})
    assert torch.equal(compiled(input_ids=ids).logits, before)
    change(model)
    found = compiled(input_ids=ids).logits
    assert torch.equal(found, model(ids).logits)
    assert not torch.equal(found, before)
    assert counts[0][1] < counts[0][0] / 2


def test_a_model_that_asks_how_its_attention_is_called_stays_as_it_is() -> None:
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    asks, does_not = FalconForCausalLM(config), tiny_llama()
    for model in (asks, does_not):
        model.set_attn_implementation("sdpa")
        decode_in_groups(model)
    assert asks.config._attn_implementation == "sdpa"
    assert does_not.config._attn_implementation == GROUPED

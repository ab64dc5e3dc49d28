"""Attention as matrix products: equal to torch's own, and left alone where it does not serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmqat.layers import short_attention
from llmqat.layers.causal import LONGEST, causal_attention
from tests.tiny import tiny_architecture


def _states(heads: int = 6, shared: int = 2, length: int = 37, sizes: tuple[int, int] = (16, 16)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, sizes[0]), (shared, sizes[0]), (shared, sizes[1]))
    states = [torch.randn(3, length, count, size, generator=generator).transpose(1, 2) for count, size in shapes]
    return [state.requires_grad_() for state in states]


@pytest.mark.parametrize(("shared", "sizes"), [(6, (16, 16)), (2, (16, 16)), (1, (16, 8))])
def test_outputs_and_gradients_are_those_of_torch(shared: int, sizes: tuple[int, int]) -> None:
    query, key, value = _states(shared=shared, sizes=sizes)
    mixed = causal_attention(query, key, value, 0.3)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(mixed, [query, key, value], gradient)
    wanted = torch.autograd.grad(expected, [query, key, value], gradient)
    assert torch.allclose(mixed, expected, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def _documents(length: int = 37) -> torch.Tensor:
    """What each position sees in three samples of two documents, of which the second begins at 1, 20 and nowhere."""
    own = torch.stack([torch.arange(length) >= begin for begin in (1, 20, length)])
    return (own[:, None, :, None] == own[:, None, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("shared", [6, 2])
def test_documents_apart_are_those_of_torch(shared: int) -> None:
    states, visible = _states(shared=shared), _documents()
    wide = [state.repeat_interleave(6 // state.shape[1], 1) for state in states]
    expected = F.scaled_dot_product_attention(*wide, attn_mask=visible, scale=0.3)
    mixed = causal_attention(*states, 0.3, visible)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(mixed, states, gradient)
    wanted = torch.autograd.grad(expected, states, gradient)
    assert torch.allclose(mixed, expected, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gpt_neox", "opt"])
def test_a_model_computes_the_same_inside(model_type: str, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*states: Any) -> torch.Tensor:
        calls.append(len(states))
        return causal_attention(*states)

    monkeypatch.setattr("llmqat.layers.causal.causal_attention", counted)
    model = tiny_architecture(model_type).to(torch.bfloat16).eval()
    ids = torch.randint(2, 200, (2, 40), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids}
    if apart:
        inputs["position_ids"] = torch.cat([torch.arange(13), torch.arange(27)]).repeat(2, 1)
    with torch.no_grad():
        outside = model(**inputs).logits.float()
        with short_attention():
            inside = model(**inputs).logits.float()
    assert len(calls) == model.config.num_hidden_layers
    # Scores rounded to bfloat16: three significant digits.
    assert (inside - outside).norm() < 0.02 * outside.norm()


CASES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "a bias": {"mask": torch.zeros(3, 1, 37, 37, dtype=torch.bfloat16)},
    "a mask of all samples": {"mask": torch.ones(1, 1, 37, 37, dtype=torch.bool).tril()},
    "padding at the beginning": {
        "mask": torch.ones(37, 37, dtype=torch.bool).tril().repeat(3, 1, 1, 1).tril(0) & (torch.arange(37) > 3)
    },
    "too long": {"length": LONGEST + 1},
    "dropout": {"dropout": 0.0001},
    "not causal": {"is_causal": False},
}


@pytest.mark.parametrize("case", CASES)
def test_what_it_does_not_serve_is_left_to_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmqat.layers.causal.causal_attention", lambda *states: pytest.fail("it was served"))
    options = {"dtype": torch.bfloat16, "mask": None, "length": 37, **CASES[case]}
    mask, dtype, length = (options.pop(name) for name in ("mask", "dtype", "length"))
    query, key, value = (state.to(dtype) for state in _states(heads=2, length=length))
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    torch.manual_seed(0)
    expected, _ = original(torch.nn.Module(), query, key, value, mask, **options)
    with short_attention():
        torch.manual_seed(0)
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](torch.nn.Module(), query, key, value, mask, **options)
    assert torch.equal(found, expected)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original


def test_a_mask_may_come_by_its_name() -> None:
    """As AFMoE gives it, and as transformers' own function is defined."""
    states = [torch.randn(1, 2, 8, 16, dtype=torch.bfloat16) for _ in range(3)]
    layer = torch.nn.Module()
    with short_attention():
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        by_name, _ = function(layer, *states, attention_mask=None, scaling=0.25)
        by_place, _ = function(layer, *states, None, scaling=0.25)
    assert torch.equal(by_name, by_place)

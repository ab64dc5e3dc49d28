"""Layers that share a product: the same numbers as each on its own, and nothing of it in the checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from llmqat.layers import (
    ActivationConfig,
    PackedLinear,
    PackedModule,
    QuantConfig,
    TiedHead,
    WeightConfig,
    convert,
    dequantized_once,
    keep_dequantized,
    prepare,
    products,
)
from llmqat.layers.shared import SharedProduct, share_products
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_qwen2


def packed_model(model: PreTrainedModel | None = None, **changes: object) -> PreTrainedModel:
    model = tiny_llama() if model is None else model
    prepare(model, QuantConfig(**{"weights": WeightConfig(num_bits=4, group_size=32), **changes}))
    convert(model)
    return model


def ids(length: int = 9) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 9, 60])
@pytest.mark.parametrize("kind", ["llama", "biases", "inputs", "int8", "integers", "3 bits", "zero points"])
def test_sharing_changes_nothing_but_the_order_of_sums(kind: str, length: int) -> None:
    changes = {
        "inputs": {"input_activations": ActivationConfig(num_bits=8)},
        "int8": {"weights": WeightConfig(num_bits=8, strategy="channel", group_size=None)},
        "integers": {
            "weights": WeightConfig(num_bits=8, strategy="channel", group_size=None),
            "input_activations": ActivationConfig(num_bits=8, symmetric=False),
        },
        "zero points": {"weights": WeightConfig(num_bits=4, group_size=32, symmetric=False)},
        "3 bits": {"weights": WeightConfig(num_bits=3, group_size=32)},
    }.get(kind, {})
    alone = packed_model(tiny_qwen2() if kind == "biases" else None, **changes)
    model = copy.deepcopy(alone)
    share_products(model)
    assert sum(isinstance(product, SharedProduct) for product in products(model)) == 2 * 2
    own, shared = alone(ids(length)).logits.float(), model(ids(length)).logits.float()
    # The tiles of a wider product add up in another order; two bfloat16 units after two layers of residuals.
    assert (own - shared).abs().max() <= 2**-5 * own.abs().max()
    again = model(ids(length)).logits.float()
    assert torch.equal(shared, again)
    assert model.state_dict().keys() == alone.state_dict().keys()


@torch.no_grad()
def test_a_layer_that_comes_with_another_input_computes_by_itself() -> None:
    model = packed_model()
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(2, 3, 64).bfloat16()
    alone = attention.q_proj(x), attention.k_proj(y), attention.v_proj(x)
    share_products(model)
    shared = attention.q_proj.shared
    assert isinstance(shared, SharedProduct)
    for _ in range(4):
        together = attention.q_proj(x), attention.k_proj(y), attention.v_proj(x)
        for own, got in zip(alone, together, strict=True):
            torch.testing.assert_close(got, own, rtol=2**-6, atol=2**-4)
    assert shared._misses >= 3  # it has given up


@torch.no_grad()
def test_an_input_that_was_written_to_is_multiplied_again() -> None:
    model = packed_model()
    share_products(model)
    mlp, x = model.model.layers[0].mlp, torch.randn(3, 64).bfloat16()
    before = mlp.gate_proj(x)
    x.mul_(2)
    torch.testing.assert_close(mlp.up_proj(x), copy.deepcopy(mlp.up_proj)(x), rtol=2**-6, atol=2**-4)
    torch.testing.assert_close(mlp.gate_proj(x), 2 * before, rtol=2**-6, atol=2**-4)


@torch.no_grad()
def test_new_codes_are_used_at_once() -> None:
    model, other = packed_model(), packed_model(tiny_llama(seed=1))
    share_products(model)
    model(ids())
    model.load_state_dict(other.state_dict())
    share_products(other)
    assert torch.equal(model(ids()).logits, other(ids()).logits)


def test_scales_in_training_are_not_shared() -> None:
    model = packed_model()
    share_products(model)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.train_scales()
    model(ids()).logits.float().sum().backward()
    gradient = model.model.layers[0].mlp.up_proj.log_scale.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_gradients_pass_through_a_packed_model_to_what_is_trained() -> None:
    model = packed_model()
    share_products(model)
    norm = model.model.layers[0].input_layernorm.weight
    with torch.inference_mode():
        model(ids(60))
    model(ids(60)).logits.float().sum().backward()
    assert norm.grad is not None
    assert norm.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("embeddings", ["keep", "int8"])
def test_weights_that_are_held_give_the_reference_kernels_numbers(embeddings: str) -> None:
    model = packed_model(embeddings=embeddings).bfloat16()
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, (PackedLinear, TiedHead)):
            module.kernel = "reference"
    share_products(model)
    before = model(ids()).logits
    with dequantized_once(model, 2**20):
        assert torch.equal(model(ids()).logits, reference(ids()).logits)
    assert torch.equal(model(ids()).logits, before)
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    assert len(packed) == 14 + (embeddings == "int8")
    with dequantized_once(model, sum(2 * module.rows * module.columns for module in packed) - 1):
        assert all(module.packed_weight().kept is None for module in packed)
        assert torch.equal(model(ids()).logits, before)


@torch.no_grad()
def test_products_on_a_kernel_that_was_asked_for_are_shared_where_all_ask_for_it() -> None:
    model = packed_model().bfloat16()
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for layer in layers:
        layer.kernel = "reference"
    expected = model(ids()).logits
    share_products(model)
    torch.testing.assert_close(model(ids()).logits, expected, rtol=2**-5, atol=2**-5)
    asked = [layer.shared for layer in layers if layer.shared is not None]
    assert asked
    assert {name for shared in asked for name, *_ in shared.weight().chosen} == {"reference"}
    layers[0].kernel = "auto"  # of one layer alone: its siblings do not follow it
    torch.testing.assert_close(model(ids()).logits, expected, rtol=2**-5, atol=2**-5)
    assert layers[0].packed_weight().chosen


@torch.no_grad()
def test_weights_are_kept_as_far_as_memory_goes_and_dropped_with_the_layer() -> None:
    model = packed_model().bfloat16()
    share_products(model)
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    sizes = [2 * module.rows * module.columns for module in packed]
    one, many = ids(4), ids(60)
    before = model(one).logits, model(many).logits
    assert len(keep_dequantized(model, sum(sizes[:3]))) == 3
    assert [module.packed_weight().kept is not None for module in packed[:4]] == [True, True, True, False]
    assert torch.equal(model(one).logits, before[0])  # few rows read the packed weights
    torch.testing.assert_close(model(many).logits, before[1], rtol=2**-5, atol=2**-5)
    for module in packed[:3]:
        weight = module.packed_weight()
        weight.kept.zero_()
    assert not torch.equal(model(many).logits, before[1])  # they are used
    model.float().bfloat16()
    assert all(module.packed_weight().kept is None for module in packed)
    torch.testing.assert_close(model(many).logits, before[1], rtol=2**-5, atol=2**-5)

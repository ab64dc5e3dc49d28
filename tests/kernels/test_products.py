"""Products of bfloat16 matrices on a CPU that does not multiply them: float32 inside, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.kernels import float_products, float_training, products
from llmqat.layers import QuantConfig, convert, prepare
from tests.tiny import tiny_llama


@pytest.fixture(autouse=True)
def no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_HAS_BF16", False)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


MODES = {"forward": float_products, "training": partial(float_training, torch.device("cpu"))}
PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((4, 20, 64), (48, 64))),
    "linear with bias": (F.linear, ((20, 64), (48, 64), (48,))),
    "linear in slices": (F.linear, ((9, 1024), (4099, 1024), (4099,))),
    "matmul": (torch.matmul, ((2, 20, 64), (2, 64, 30))),
    "@": (Tensor.__matmul__, ((20, 64), (64, 30))),
    "mm": (torch.mm, ((20, 64), (64, 30))),
    "bmm": (torch.bmm, ((2, 20, 64), (2, 64, 30))),
    "baddbmm": (partial(torch.baddbmm, alpha=0.25), ((2, 20, 30), (2, 20, 64), (2, 64, 30))),
    "addmm": (torch.addmm, ((30,), (20, 64), (64, 30))),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_sum_is_rounded_once(name: str, mode: str) -> None:
    product, shapes = PRODUCTS[name]
    operands = [drawn(*shape) for shape in shapes]
    with MODES[mode]():
        found = product(*operands)
    exact = product(*(operand.double() for operand in operands))
    size = product(*(operand.double().abs() for operand in operands))
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-18 * size).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_autocast_does_not_cast_back(name: str, mode: str) -> None:
    product, shapes = PRODUCTS[name]
    operands = [drawn(*shape) for shape in shapes]
    with MODES[mode]():
        expected = product(*operands)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(product(*operands), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_gradients_are_those_of_the_product(name: str, mode: str) -> None:
    product, shapes = PRODUCTS[name]
    operands = [drawn(*shape).requires_grad_() for shape in shapes]
    with MODES[mode]():
        product(*operands).sum().backward()
    wide = [operand.detach().float().requires_grad_() for operand in operands]
    product(*wide).sum().backward()
    for operand, expected in zip(operands, wide, strict=True):
        torch.testing.assert_close(operand.grad.float(), expected.grad, rtol=2**-8, atol=0.5)


@pytest.mark.parametrize(
    ("x", "weight"),
    [(drawn(7, 64), drawn(48, 64)), (drawn(64), drawn(48, 64)), (drawn(20, 64).float(), drawn(48, 64).float())],
)
def test_few_rows_and_other_dtypes_are_left_alone(x: Tensor, weight: Tensor) -> None:
    with float_products():
        assert torch.equal(F.linear(x, weight), torch._C._nn.linear(x, weight))
        assert torch.equal(x @ weight.T, torch.matmul(x, weight.T))
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))


class Foreign(Tensor):
    """A weight of another package, with a product of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return torch.full((args[0].shape[0], 3), 7.0)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("side", ["x", "weight"])
def test_tensors_of_other_packages_multiply_themselves(side: str) -> None:
    operands = {"x": drawn(20, 64), "weight": drawn(48, 64)}
    operands[side] = operands[side].as_subclass(Foreign)
    with float_products():
        assert (F.linear(*operands.values()) == 7).all()


def test_a_bias_of_one_number_and_a_weight_without_rows_are_as_torch_has_them() -> None:
    x, weight = drawn(9, 1024), drawn(4099, 1024)
    with float_products():
        assert F.linear(x, weight, drawn(1)).shape == (9, 4099)
        assert F.linear(x, weight[:0]).shape == (9, 0)
        assert F.linear(x, weight[0]).shape == (9,)
        with pytest.raises(RuntimeError):
            F.linear(x, weight.float())


def test_a_processor_with_bfloat16_products_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_HAS_BF16", True)
    x, weight = drawn(20, 64), drawn(48, 64)
    with float_products():
        assert torch.equal(F.linear(x, weight), torch._C._nn.linear(x, weight))
        assert not torch.overrides._get_current_function_mode_stack()


@torch.no_grad()
@pytest.mark.parametrize("preset", ["int4", "w8a8", "fp8", "mxfp4"])
def test_a_model_keeps_its_dtypes(preset: str) -> None:
    model, ids = tiny_llama().bfloat16().eval(), torch.arange(2, 40)[None]
    prepare(model, QuantConfig.preset(preset, group_size={"int4": 32, "mxfp4": 32}.get(preset)))
    packed = convert(model).eval()
    before = packed(ids).logits
    with float_products():
        found = packed(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found - before).abs().mean() < 0.1 * before.abs().mean()  # an input may be rounded to the next level

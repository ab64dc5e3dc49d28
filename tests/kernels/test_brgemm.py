"""cpu-brgemm without the hub: its layout, read by a stand-in as the C++ code reads it, and when it is chosen."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmqat.kernels import JoinedWeight, brgemm, packed_linear, registry, trial
from llmqat.kernels.brgemm import CpuBrgemmKernel
from llmqat.layers import WeightConfig
from tests.kernels.test_kernels import packed_layer


def gemm_int4_forward(x: Tensor, weight: Tensor, zeros: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """The signature of quantization-gptq, version 1, what its C++ checks and assumes, and its loops; in float32."""
    rows, columns = weight.shape[0], x.shape[1]
    assert x.dtype == absmax.dtype == torch.bfloat16
    assert weight.dtype == zeros.dtype == torch.uint8
    assert all(tensor.is_contiguous() for tensor in (x, weight, zeros, absmax))
    assert x.dim() == 2
    assert rows % 32 == 0  # other blocks end the process
    assert weight.shape[1] == columns // 2
    assert zeros.shape == absmax.shape == (columns // blocksize, rows)
    assert columns % blocksize == 0
    assert 128 % blocksize == 0 or blocksize % 128 == 0  # the weight is read 128 in features at a time
    assert int(zeros.max()) <= 15
    packed = weight.reshape(rows // 32, columns // 2, 32)
    values = torch.empty(rows, columns)
    for n in range(32):  # `tinygemm_kernel_nn`: lane n of the 32 holds both in features of a pair
        half, lane = divmod(n, 16)
        for e in range(2):
            values[n::32, e::2] = (packed[:, :, 2 * lane + e] >> 4 * half & 15).float()
    scale = absmax.t().repeat_interleave(blocksize, dim=1).float()
    values = (values - zeros.t().repeat_interleave(blocksize, dim=1)) * scale
    return (x.float() @ values.bfloat16().float().T).bfloat16()


def stand_in(product: Any = gemm_int4_forward) -> SimpleNamespace:
    """Everything of the kernel's module that is used."""
    return SimpleNamespace(gemm_int4_forward=product)


def forget() -> None:
    for cached in (trial.refusal, brgemm.load_brgemm, brgemm._trial):
        cached.cache_clear()
    brgemm._loaded.clear()


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A machine with AVX512-BF16 and `kernels`, whose `get_kernel` gives what is put into the dictionary."""
    found: dict[str, Any] = {"module": stand_in(), "asked": []}

    def get_kernel(repository: str, *, version: int, backend: str | None = None) -> Any:
        found["asked"].append((repository, version, backend))
        if isinstance(found["module"], Exception):
            raise found["module"]
        return found["module"]

    monkeypatch.setattr(brgemm, "require", lambda module, purpose: SimpleNamespace(get_kernel=get_kernel))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(brgemm, "_MULTIPLIES_BF16", True)
    forget()
    yield found
    forget()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "shape"), [(32, (64, 384)), (64, (96, 192)), (128, (32, 384)), (None, (32, 320))])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_layout_is_the_one_that_the_kernel_reads(
    bits: int, group: int | None, shape: tuple[int, int], symmetric: bool
) -> None:
    strategy = "group" if group else "channel"
    scheme = WeightConfig(num_bits=bits, strategy=strategy, group_size=group, symmetric=symmetric)  # type: ignore[arg-type]
    weight = packed_layer(scheme, *shape).packed_weight()
    for rows in (1, 5, 128):
        x, bias = torch.randn(2, rows, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
        expected = (x.float() @ weight.dequantized(torch.bfloat16).float().T).bfloat16() + bias
        torch.testing.assert_close(CpuBrgemmKernel().linear(x, weight, bias), expected, rtol=2**-7, atol=2**-7)


def test_a_large_weight_is_given_in_slices_where_the_kernel_would_write_all_of_it(
    monkeypatch: pytest.MonkeyPatch, hub: dict[str, Any]
) -> None:
    given: list[tuple[int, int]] = []

    def product(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        given.append((len(x), len(weight)))
        return gemm_int4_forward(x, weight, *rest)

    hub["module"] = stand_in(product)
    monkeypatch.setattr(brgemm, "_SLICE_ELEMENTS", 64 * 192)
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64), 160, 192).packed_weight()
    for rows in (4, 128):
        x = torch.randn(rows, 192).bfloat16()
        expected = packed_linear(x, weight, None, "reference")
        torch.testing.assert_close(CpuBrgemmKernel().linear(x, weight, None), expected, rtol=2**-7, atol=2**-7)
    assert given == [(4, 160), (128, 64), (128, 64), (128, 32)]


def test_joined_weights_are_one_to_the_kernel() -> None:
    members = [packed_layer(WeightConfig(num_bits=4, group_size=64), rows).packed_weight() for rows in (64, 128)]
    joined, x = JoinedWeight(members), torch.randn(2, 384).bfloat16()
    expected = torch.cat([packed_linear(x, member, None, "reference") for member in members], dim=-1)
    torch.testing.assert_close(CpuBrgemmKernel().linear(x, joined, None), expected, rtol=2**-7, atol=2**-7)


def test_it_comes_first_on_a_cpu_where_it_was_loaded_and_gave_the_right_numbers(hub: dict[str, Any]) -> None:
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight()
    for rows in (1, 200):
        x = torch.randn(rows, weight.in_features).bfloat16()
        assert registry._choice(x, weight, wants_gradient=False).name == "cpu-brgemm"
        assert registry._choice(x, weight, wants_gradient=True).name != "cpu-brgemm"
    assert hub["asked"] == [("kernels-community/quantization-gptq", 1, "cpu")]


def test_kernels_0_12_is_not_asked_for_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(get_kernel=lambda repository, revision=None, version=None, user_agent=None: stand_in())
    monkeypatch.setattr(brgemm, "require", lambda module, purpose: package)
    assert brgemm.load_brgemm() is gemm_int4_forward


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        ({"num_bits": 5, "group_size": 64}, (64, 384), "it needs a grid of at most 4 bits"),
        ({"num_bits": 4, "group_size": 48}, (64, 384), "group size 48 does not fit"),
        ({"num_bits": 4, "group_size": 64}, (48, 384), "out_features=48 is not a multiple of 32"),
    ],
)
def test_what_it_does_not_take_is_declined(scheme: dict[str, Any], shape: tuple[int, int], reason: str) -> None:
    weight = packed_layer(WeightConfig(**scheme), *shape).packed_weight()
    assert CpuBrgemmKernel().declines(torch.zeros(1, shape[1]).bfloat16(), weight) == reason


def test_other_dtypes_and_processors_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight()
    x = torch.zeros(1, weight.in_features)
    reason = CpuBrgemmKernel().declines(x, weight)
    assert reason == "it needs bfloat16 activations and scales, not torch.float32, torch.bfloat16"
    monkeypatch.setattr(brgemm, "_MULTIPLIES_BF16", False)
    assert "AVX512-BF16" in str(CpuBrgemmKernel().declines(x.bfloat16(), weight))


def gives_other_numbers(x: Tensor, *rest: Any) -> Tensor:
    return gemm_int4_forward(x, *rest).roll(1, -1)


def has_another_signature(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (stand_in(gives_other_numbers), "kernels-community/quantization-gptq gave other numbers than the reference"),
        (stand_in(has_another_signature), "could not be used: has_another_signature() takes 2 positional arguments"),
        (SimpleNamespace(), "could not be used"),
        (FileNotFoundError("no build for torch 2.13"), "could not be used: no build for torch 2.13"),
    ],
)
def test_one_that_fails_its_trial_leaves_the_product_to_the_next(module: Any, reason: str, hub: dict[str, Any]) -> None:
    hub["module"] = module
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight()
    x = torch.zeros(1, weight.in_features).bfloat16()
    assert reason in str(CpuBrgemmKernel().declines(x, weight))
    assert registry._choice(x, weight, wants_gradient=False).name == "cpu-int4"


def test_without_the_package_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kernels" else name)
    reason = CpuBrgemmKernel().declines(torch.zeros(1, weight.in_features).bfloat16(), weight)
    assert reason == "it needs kernels, which is not installed; run `pip install 'llmqat[kernels]'`"


def test_a_compiled_step_holds_the_product_whole(hub: dict[str, Any]) -> None:
    """The hub's operator says nothing of the shape that it gives; torch.compile is told."""
    library = torch.library.Library("llmqat_test_brgemm", "DEF")
    library.define("gemm_int4_forward(Tensor x, Tensor weight, Tensor zeros, Tensor absmax, int blocksize) -> Tensor")
    library.impl("gemm_int4_forward", gemm_int4_forward, "CPU")
    product = torch.ops.llmqat_test_brgemm.gemm_int4_forward
    names = SimpleNamespace(add_op_namespace_prefix=lambda name: f"llmqat_test_brgemm::{name}")
    hub["module"] = SimpleNamespace(gemm_int4_forward=product, _ops=names)
    layer = packed_layer(WeightConfig(num_bits=4, group_size=64))
    x = torch.randn(1, layer.in_features).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
    assert layer.packed_weight().layouts.keys() == {"cpu-brgemm"}
    # A layout holds tensors alone: what the hub's module gives cannot be found by another process.
    assert all(isinstance(part, Tensor) for part in layer.packed_weight().layouts["cpu-brgemm"])

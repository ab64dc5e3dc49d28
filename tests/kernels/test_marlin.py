"""Marlin without a GPU: its layout, read by a stand-in as the CUDA code writes and reads it, and when it is chosen."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llmqat.kernels import JoinedWeight, PackedWeight, marlin, packed_linear, registry, trial
from llmqat.kernels.marlin import MarlinKernel
from llmqat.layers import WeightConfig
from tests.kernels.test_kernels import packed_layer

SCALAR_TYPES = SimpleNamespace(uint4b8="uint4b8", uint8b128="uint8b128")


def codes_of(words: Tensor, bits: int, size_k: int, size_n: int) -> numpy.ndarray[Any, Any]:
    """Codes [K, N] of Marlin's words, by the indices of vLLM's `gptq_marlin_repack_kernel`, thread by thread."""
    stored = words.numpy().view(numpy.uint32).reshape(size_k // 16, size_n // 64, -1)
    codes = numpy.zeros((size_k, size_n), dtype=numpy.int64)
    for th_id in range(32):
        for warp_id in range(4):
            tc_col, tc_row = th_id // 4, (th_id % 4) * 2
            for i in range(8):  # vals[0:4] are those of b1, vals[4:8] of b2, eight columns on
                k, n = tc_row + (0, 1, 8, 9)[i % 4], warp_id * 16 + tc_col + 8 * (i // 4)
                if bits == 4:
                    word, place = th_id * 4 + warp_id, (0, 2, 4, 6, 1, 3, 5, 7).index(i)
                else:
                    word, place = th_id * 8 + warp_id * 2 + i // 4, (0, 2, 1, 3).index(i % 4)
                codes[k::16, n::64] = stored[:, :, word] >> place * bits & 2**bits - 1
    return codes - 2 ** (bits - 1)


def scales_of(scales: Tensor) -> Tensor:
    """Scales [G, N] in the order of the out features: what vLLM's `marlin_permute_scales` did, undone."""
    if len(scales) > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    plain = torch.empty_like(scales).view(-1, len(order))
    plain[:, order] = scales.view(-1, len(order))
    return plain.view_as(scales)


def gptq_marlin_gemm(
    a: Tensor,
    c: Tensor | None,
    b_q_weight: Tensor,
    b_scales: Tensor,
    global_scale: Tensor | None,
    b_zeros: Tensor | None,
    g_idx: Tensor | None,
    perm: Tensor | None,
    workspace: Tensor,
    b_q_type: str,
    size_m: int,
    size_n: int,
    size_k: int,
    is_k_full: bool = True,
    use_atomic_add: bool = False,
    use_fp32_reduce: bool = False,
    is_zp_float: bool = False,
) -> Tensor:
    """The signature of vllm-quantization, version 0, and what its C++ checks; the product in float32."""
    bits = {"uint4b8": 4, "uint8b128": 8}[b_q_type]
    groups = b_scales.shape[0]
    assert (c, global_scale, b_zeros, g_idx, perm) == (None,) * 5
    assert use_fp32_reduce
    assert is_k_full
    assert not use_atomic_add
    assert not is_zp_float
    assert a.shape == (size_m, size_k)
    assert a.is_contiguous()
    assert a.stride(0) % 8 == 0
    assert b_q_weight.dtype == torch.int32
    assert b_q_weight.is_contiguous()
    assert b_q_weight.shape == (size_k // 16, size_n * 16 * bits // 32)
    assert b_scales.dtype == a.dtype
    assert b_scales.is_contiguous()
    assert b_scales.shape == (groups, size_n)
    assert groups == 1 or size_k // groups in (32, 64, 128)
    assert workspace.dtype == torch.int32
    assert not workspace.any()
    scales = scales_of(b_scales).float().repeat_interleave(size_k // groups, dim=0)
    weight = (torch.from_numpy(codes_of(b_q_weight, bits, size_k, size_n)) * scales).to(a.dtype).float()
    return (a.float() @ weight).to(a.dtype)


def stand_in(**changes: Any) -> SimpleNamespace:
    """Everything of the kernel's module that is used."""
    workspace = lambda device: torch.zeros(108, dtype=torch.int32, device=device)  # noqa: E731
    whole = {"gptq_marlin_gemm": gptq_marlin_gemm, "scalar_types": SCALAR_TYPES, "marlin_make_workspace_new": workspace}
    return SimpleNamespace(**whole | changes)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(marlin, "load_marlin", stand_in)
    trial.refusal.cache_clear()
    yield
    trial.refusal.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A machine with `kernels` and a GPU of capability 8.6, whose trials run on the CPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    agrees = trial.agrees
    monkeypatch.setattr(trial, "agrees", lambda kernel, _, *rest: agrees(kernel, torch.device("cpu"), *rest))
    return torch.device("cuda", 0)


def on(device: torch.device, rows: int = 1, columns: int = 384, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Activations of which only shape, dtype and device exist."""
    with FakeTensorMode():
        return torch.empty(rows, columns, dtype=dtype, device=device)


def half(weight: PackedWeight) -> PackedWeight:
    return PackedWeight(weight.packed, weight.scale.half(), None, weight.grid, weight.in_features)


@pytest.mark.parametrize(("group", "shape"), [(32, (64, 384)), (64, (128, 192)), (128, (64, 384)), (None, (128, 64))])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_layout_is_the_one_that_marlin_reads(bits: int, group: int | None, shape: tuple[int, int]) -> None:
    scheme = WeightConfig(num_bits=bits, strategy="group" if group else "channel", group_size=group)
    weight = packed_layer(scheme, *shape).packed_weight()
    for weight_of, dtype in ((weight, torch.bfloat16), (half(weight), torch.float16)):
        x, bias = torch.randn(2, 3, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        expected = x.float() @ weight_of.dequantized(dtype).float().T
        got = MarlinKernel().linear(x, weight_of, bias)
        # The same operands, summed in float32 in another order, and rounded to the dtype before the bias and after.
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected + bias.float(), rtol=2**-7, atol=2**-7)


def test_marlin_is_chosen_on_a_gpu_where_it_was_loaded_and_gave_the_right_numbers(gpu: torch.device) -> None:
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight()
    for rows in (1, 200):
        assert registry._choice(on(gpu, rows), weight, wants_gradient=False).name == "marlin"
    assert MarlinKernel().declines(on(gpu, dtype=torch.float16), half(weight)) is None


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        ({"num_bits": 4, "group_size": 64, "symmetric": False}, (64, 384), "it needs a symmetric grid"),
        ({"num_bits": 4, "group_size": 48}, (64, 384), "group size 48 does not fit"),
        ({"num_bits": 4, "group_size": 64}, (96, 384), "96 x 384 features are not multiples"),
        ({"num_bits": 4, "group_size": 64}, (64, 192), "64 x 192 features are not multiples"),
    ],
)
def test_what_marlin_does_not_take_is_declined(
    scheme: dict[str, Any], shape: tuple[int, int], reason: str, gpu: torch.device
) -> None:
    weight = packed_layer(WeightConfig(**scheme), *shape).packed_weight()
    assert reason in str(MarlinKernel().declines(on(gpu, 1, shape[1]), weight))


def test_joined_weights_are_one_to_marlin() -> None:
    members = [packed_layer(WeightConfig(num_bits=4, group_size=64), rows).packed_weight() for rows in (64, 128)]
    joined, x = JoinedWeight(members), torch.randn(2, 384).bfloat16()
    expected = torch.cat([packed_linear(x, member, None, "reference") for member in members], dim=-1)
    torch.testing.assert_close(MarlinKernel().linear(x, joined, None), expected, rtol=2**-7, atol=2**-7)


def test_other_dtypes_are_declined(gpu: torch.device) -> None:
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight()
    for dtype in (torch.float32, torch.float16):
        reason = MarlinKernel().declines(on(gpu, dtype=dtype), weight)
        assert reason == f"it needs activations and scales of one 16-bit dtype, not {dtype}, torch.bfloat16"
    with pytest.raises(ValueError, match="kernel='marlin' cannot run here: it runs on NVIDIA GPUs, not on cpu"):
        packed_linear(torch.randn(1, 384).bfloat16(), weight, kernel="marlin")


def gives_other_numbers(*args: Any, **options: Any) -> Tensor:
    return gptq_marlin_gemm(*args, **options).roll(1, -1)


def has_another_signature(a: Tensor, b_q_weight: Tensor) -> Tensor:
    return a @ b_q_weight


@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (gives_other_numbers, "gave other numbers than the reference"),
        (has_another_signature, "could not be used: has_another_signature() got an unexpected keyword argument"),
    ],
)
def test_a_marlin_that_fails_its_trial_leaves_the_product_to_the_next(
    product: Any, reason: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marlin, "load_marlin", lambda: stand_in(gptq_marlin_gemm=product))
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64), in_features=384).packed_weight()
    assert reason in str(MarlinKernel().declines(on(gpu), weight))
    assert registry._choice(on(gpu), weight, wants_gradient=False).name == "cuda-int4"


def test_without_the_package_a_build_or_a_recent_gpu_the_reason_says_so(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = packed_layer(WeightConfig(num_bits=8, strategy="channel"), in_features=384).packed_weight()

    def refused(message: str) -> None:
        trial.refusal.cache_clear()
        assert message in str(MarlinKernel().declines(on(gpu), weight))

    def no_build() -> None:
        raise FileNotFoundError("no build for torch 2.13")

    monkeypatch.setattr(marlin, "load_marlin", no_build)
    refused("kernels-community/vllm-quantization could not be used: no build for torch 2.13")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    refused("it needs a GPU of compute capability 8.0, not 7.5")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kernels" else name)
    refused("it needs kernels, which is not installed; run `pip install 'llmqat[kernels]'`")


def test_the_kernel_is_asked_for_by_repository_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    package = SimpleNamespace(get_kernel=lambda *args, **options: asked.append((args, options)))
    monkeypatch.undo()
    monkeypatch.setattr(marlin, "require", lambda module, purpose: {"kernels": package}[module])
    marlin.load_marlin.__wrapped__()
    assert asked == [(("kernels-community/vllm-quantization",), {"version": 0})]

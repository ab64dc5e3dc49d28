"""The fused kernels: the eager numbers, and what happens without a compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmqat.grid import Grid, fake_quantize, fused, fusing, snap_scale


@pytest.fixture
def fresh() -> None:
    fused._tried.cache_clear()


def _gradients(dtype: torch.dtype, columns: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, columns, generator=generator).requires_grad_()
    scale = snap_scale(torch.randn(40, columns // 32, generator=generator) * 0.2, Grid(4)).requires_grad_()
    out = fake_quantize(weight, scale, None, Grid(4), dtype)
    upstream = torch.randn(40, columns, generator=generator).to(dtype)
    return out, *torch.autograd.grad(out, (weight, scale), upstream)


@pytest.mark.usefixtures("fresh")
def test_layers_of_all_shapes_share_one_kernel() -> None:
    graphs = torch._dynamo.utils.counters["stats"]
    with fusing():
        assert fused.fused_kernels(Grid(3), torch.float32, torch.device("cpu")) is not None
        before = graphs["unique_graphs"]
        for rows, columns, size in ((64, 64, 32), (128, 64, 32), (64, 128, 64), (33, 160, 16), (384, 96, 96)):
            weight = torch.randn(rows, columns, requires_grad=True)
            scale = snap_scale(torch.rand(rows, columns // size), Grid(3)).requires_grad_()
            with torch.no_grad():
                fake_quantize(weight, scale, None, Grid(3))
            fake_quantize(weight.view(-1).view(rows, columns), scale, None, Grid(3)).sum().backward()
        assert graphs["unique_graphs"] == before


@pytest.mark.usefixtures("fresh")
def test_fused_is_eager_bit_for_bit() -> None:
    for dtype, columns in ((torch.bfloat16, 96), (torch.float32, 160)):
        eager = _gradients(dtype, columns)
        with fusing():
            compiled = _gradients(dtype, columns)
            assert fused.fused_kernels(Grid(4), dtype, torch.device("cpu")) is not None
        assert torch.equal(eager[0], compiled[0])
        assert torch.equal(eager[1], compiled[1])
        assert torch.allclose(eager[2], compiled[2], rtol=1e-4, atol=1e-4)
    assert fused.fused_kernels(Grid(4), torch.float32, torch.device("cpu")) is None


class _Rounds(TorchDispatchMode):
    """Sees the passes that are not fused."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func is torch.ops.aten.round.default
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("fresh")
def test_what_is_fused_stays_so_inside_a_mode() -> None:
    eager = _gradients(torch.bfloat16, 96)
    with fusing():
        assert fused.fused_kernels(Grid(4), torch.bfloat16, torch.device("cpu")) is not None
        with _Rounds() as rounds:
            assert torch.equal(_gradients(torch.bfloat16, 96)[1], eager[1])
    assert not rounds.seen
    with _Rounds() as rounds:
        _gradients(torch.bfloat16, 96)
    assert rounds.seen
    fused._tried.cache_clear()
    with fusing(), _Rounds():
        assert fused.fused_kernels(Grid(4), torch.bfloat16, torch.device("cpu")) is not None


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_the_eager_passes_stay_and_the_reason_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*args: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", no_compiler)
    eager = _gradients(torch.bfloat16, 96)
    with fusing(), caplog.at_level(logging.WARNING, logger="llmqat"):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(_gradients(torch.bfloat16, 96), eager, strict=True))
    assert [r.getMessage() for r in caplog.records] == ["fake quantization is not fused (slower): no C++ compiler here"]


@pytest.mark.usefixtures("fresh")
def test_a_kernel_that_rounds_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: _nudged(function(*args)))
    with fusing(), caplog.at_level(logging.WARNING, logger="llmqat"):
        assert fused.fused_kernels(Grid(4), torch.bfloat16, torch.device("cpu")) is None
    assert "rounds otherwise" in caplog.text


def _nudged(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return result + 1 if isinstance(result, torch.Tensor) else result


@pytest.mark.usefixtures("fresh")
def test_a_compilation_that_fails_later_gives_way_to_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def compiles_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def call(*args: torch.Tensor) -> Any:
            calls.append(1)
            if len(calls) > 2:
                raise AssertionError
            return function(*args)

        return call

    monkeypatch.setattr(torch, "compile", compiles_once)
    eager = _gradients(torch.bfloat16, 96)
    with fusing(), caplog.at_level(logging.WARNING, logger="llmqat"):
        for _ in range(2):
            assert torch.equal(_gradients(torch.bfloat16, 96)[1], eager[1])
    assert len(calls) == 4
    assert "AssertionError" in caplog.text

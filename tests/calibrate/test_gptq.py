"""GPTQ against its definition: a column-by-column reference in float64, and what it is for, a smaller output error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmqat import QuantConfig, prepare
from llmqat.calibrate import gptq as gptq_module
from llmqat.calibrate import open_walk
from llmqat.calibrate.config import GPTQStage
from llmqat.calibrate.gptq import (
    COLUMNS,
    Curvature,
    damped,
    gptq_block,
    gptq_layer,
    output_error,
    placed_weight,
    refit_scales,
    round_by_gptq,
    second_moments,
)
from llmqat.grid import Grid, quantize, search_scale
from llmqat.layers import QuantLinear, WeightConfig
from tests.tiny import tiny_llama

GRIDS = {
    "int4": Grid(4),
    "int3 asymmetric": Grid(3, symmetric=False),
    "int2": Grid(2),
    "ternary": Grid(2, levels="ternary"),
    "seq": Grid(2, levels="seq"),
    "int8": Grid(8),
}


def problem(
    rows: int, columns: int, grid: Grid, group_size: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Weight, damped second moments of correlated inputs, scale and zero point."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator)
    x = torch.randn(4 * columns, columns, generator=generator) @ mixing * torch.rand(columns, generator=generator) * 3
    hessian = x.t() @ x / len(x)
    return weight, damped(hessian, 0.01), *search_scale(weight, grid, (rows, columns // group_size), hessian.diagonal())


def reference(weight: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """GPTQ by its definition: after each column the free ones move by -e / [H^-1]_jj * [H^-1]_j, H^-1 shrinking."""
    w, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    order = hessian.diagonal().argsort(descending=True)
    size = weight.shape[1] // scale.shape[1]
    codes = torch.zeros_like(weight)
    for position, j in enumerate(order):
        s = scale[:, j // size].double()
        z = 0.0 if zero_point is None else zero_point[:, j // size].double()
        q = (torch.round(w[:, j] / s - grid.offset) + z).clamp(grid.qmin, grid.qmax)
        codes[:, j] = q.float()
        error = w[:, j] - (q - z + grid.offset) * s
        free = order[position + 1 :]
        w[:, free] -= torch.outer(error / inverse[j, j], inverse[j, free])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes.to(grid.code_dtype)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_those_of_the_definition(name: str) -> None:
    grid = GRIDS[name]
    weight, hessian, scale, zero_point = problem(24, 64, grid, 16)
    found = round_by_gptq(weight, Curvature.of(hessian), scale, zero_point, grid)
    expected = reference(weight, hessian, scale, zero_point, grid)
    # float32 against float64: a weight that lies on the edge between two codes may fall on either side, and what
    # follows in its row with it.
    assert (found == expected).all(1).float().mean() > 0.8
    assert (found == expected).float().mean() > 0.97


def test_the_rest_of_the_matrix_follows_the_blocks_of_columns() -> None:
    weight, hessian, scale, _ = problem(16, 3 * COLUMNS, Grid(4), 32)
    found = round_by_gptq(weight, Curvature.of(hessian), scale, None, Grid(4))
    assert (found == reference(weight, hessian, scale, None, Grid(4))).float().mean() > 0.97


@pytest.mark.parametrize("name", GRIDS)
def test_the_output_error_falls_with_the_codes_and_again_with_the_scales(name: str) -> None:
    grid = GRIDS[name]
    weight, hessian, scale, zero_point = problem(32, 128, grid, 32)

    def error(codes: Tensor, scale: Tensor) -> float:
        return float(output_error(weight, hessian, codes, scale, zero_point, grid))

    nearest = quantize(weight, scale, zero_point, grid)
    codes = round_by_gptq(weight, Curvature.of(hessian), scale, zero_point, grid)
    refitted = refit_scales(weight, hessian, codes, scale, zero_point, grid)
    assert error(codes, refitted) <= error(codes, scale) < error(nearest, scale)
    if grid.num_bits < 8:  # else the scale is finer than bfloat16 already
        assert error(codes, refitted) < error(codes, scale)


def test_refitted_scales_solve_the_least_squares() -> None:
    grid = Grid(4)
    weight, hessian, scale, _ = problem(6, 32, grid, 8)
    codes = round_by_gptq(weight, Curvature.of(hessian), scale, None, grid)
    found = refit_scales(weight, hessian, codes, scale, None, grid)
    root = torch.linalg.cholesky(hessian.double())
    for row in range(6):
        columns = torch.zeros(32, 4, dtype=torch.float64)
        for g in range(4):
            columns[8 * g : 8 * g + 8, g] = codes[row, 8 * g : 8 * g + 8].double()
        solved = torch.linalg.lstsq(root.t() @ columns, root.t() @ weight[row].double()).solution
        assert torch.allclose(found[row].double(), solved, rtol=2**-7)  # bfloat16, and a little of the old scale


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(GRIDS)), st.integers(0, 10_000))
def test_the_master_weight_rounds_to_the_codes(name: str, seed: int) -> None:
    grid = GRIDS[name]
    weight, _, scale, zero_point = problem(8, 32, grid, 8, seed)
    codes = torch.randint(grid.qmin, grid.qmax + 1, weight.shape, generator=torch.Generator().manual_seed(seed)).to(
        grid.code_dtype
    )
    placed = placed_weight(weight, codes, scale, zero_point, grid)
    assert torch.equal(quantize(placed, scale, zero_point, grid), codes)
    kept = quantize(weight, scale, zero_point, grid) == codes
    near = (placed - weight).abs() <= 0.011 * scale.abs().repeat_interleave(8, 1)
    assert near[kept].all()


def test_a_layer_keeps_its_codes_after_gptq() -> None:
    weights = WeightConfig(num_bits=3, group_size=32)
    weight, hessian, _, _ = problem(48, 64, weights.grid, 32)
    layer = QuantLinear(torch.nn.Parameter(weight.clone()), None, weights)
    before = layer.codes()
    found = gptq_layer(layer, Curvature.of(hessian), rounds=2)
    assert found.after < found.before
    assert not torch.equal(layer.codes(), before)
    scale = layer.scale()
    assert found.after == pytest.approx(
        float(output_error(weight, hessian, layer.codes(), scale, None, weights.grid))
        / float(((weight @ hessian) * weight).sum()),
        rel=1e-4,
    )


def test_features_never_seen_and_broken_moments() -> None:
    hessian = torch.zeros(4, 4)
    assert torch.equal(damped(hessian, 0.01), torch.eye(4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        damped(torch.full((4, 4), float("nan")), 0.01)


@pytest.mark.parametrize("columns", [24, 1000])
def test_second_moments_are_those_of_the_inputs(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_module, "SYMMETRIC", columns)
    model = tiny_llama()
    prepare(model, QuantConfig.preset("w8a8"))
    walk = open_walk(model, torch.randint(2, 258, (5, 16)), 2)
    block, chain = walk.blocks[0], walk.quantized
    layer = block.module.mlp.up_proj
    seen: list[Tensor] = []
    block.watch([layer], lambda _, x: seen.append(x), chain, chain.batches)
    x = layer.input_quantizer(torch.cat(seen)).flatten(0, 1).float()
    found = second_moments(block, layer, chain)
    assert found is not None
    assert torch.allclose(found, x.t() @ x / 80, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, found.t())


def test_a_layer_sees_what_the_layers_before_it_make_of_their_new_codes() -> None:
    """The moments of down_proj are taken after gate_proj and up_proj have theirs."""
    torch.manual_seed(0)
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int2", group_size=32))
    walk = open_walk(model, torch.randint(2, 258, (4, 16)), 2)
    found = gptq_block(walk.blocks[0], walk.quantized, GPTQStage(batch_size=2))
    assert list(found) == [
        f"model.layers.0.{name}"
        for name in (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    ]
    assert all(rounding.after < rounding.before for rounding in found.values())

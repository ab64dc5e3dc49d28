"""GPTQ against its definition: a column-by-column reference in float64, and what it is for, a smaller output error."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from llmqat import QuantConfig, prepare
from llmqat.calibrate import gptq as gptq_module
from llmqat.calibrate import open_walk
from llmqat.calibrate.blocks import Block
from llmqat.calibrate.chains import Chain
from llmqat.calibrate.config import GPTQStage
from llmqat.calibrate.gptq import (
    COLUMNS,
    RIDGES,
    Clean,
    Curvature,
    LayerGroup,
    Moments,
    correction,
    cross_validated,
    damped,
    gptq_block,
    gptq_layer,
    gptq_layers,
    joined,
    layers_by_input,
    moments_by_half,
    output_error,
    placed_weight,
    refit_scales,
    round_by_gptq,
    stream_of,
)
from llmqat.calibrate.walk import Walk
from llmqat.data.processes import ALONE
from llmqat.grid import Grid, quantize, search_scale
from llmqat.layers import QuantLinear, WeightConfig, quantizers_off
from tests.tiny import tiny_llama

GRIDS = {
    "int4": Grid(4),
    "int3 asymmetric": Grid(3, symmetric=False),
    "int2": Grid(2),
    "ternary": Grid(2, levels="ternary"),
    "seq": Grid(2, levels="seq"),
    "int8": Grid(8),
    "nvfp4": Grid(4, levels="float", scale_dtype="e4m3"),
    "mxfp4": Grid(4, levels="float", scale_dtype="e8m0"),
    "fp8": Grid(8, levels="float"),
}


def group_of(block: Block, layer: QuantLinear, chain: Chain) -> LayerGroup:
    """Returns the layers that read what `layer` does."""
    return next(group for group in layers_by_input(block, chain) if layer in group.layers.values())


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
        v = w[:, j] / s
        rounded = grid.rounded(v.float()).double() if grid.levels == "float" else torch.round(v - grid.offset)
        q = (rounded + z).clamp(grid.qmin, grid.qmax)
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
    if grid.num_bits < 8 and grid.scale_dtype == "bfloat16":  # else steps of the scale are too fine, or too coarse
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


def test_rows_are_refitted_alike_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(4)
    weight, hessian, scale, _ = problem(24, 128, grid, 32)
    codes = round_by_gptq(weight, Curvature.of(hessian), scale, None, grid)
    whole = refit_scales(weight, hessian, codes, scale, None, grid)
    monkeypatch.setattr(gptq_module, "PRODUCT_ELEMENTS", 128 * 5)
    assert torch.equal(refit_scales(weight, hessian, codes, scale, None, grid), whole)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(GRIDS)), st.integers(0, 10_000))
def test_the_master_weight_rounds_to_the_codes(name: str, seed: int) -> None:
    grid = GRIDS[name]
    weight, _, scale, zero_point = problem(8, 32, grid, 8, seed)
    drawn = torch.randint(grid.qmin, grid.qmax + 1, weight.shape, generator=torch.Generator().manual_seed(seed))
    codes = drawn.to(grid.code_dtype) if grid.levels != "float" else grid.rounded(drawn.float()).to(grid.code_dtype)
    placed = placed_weight(weight, codes, scale, zero_point, grid)
    assert torch.equal(quantize(placed, scale, zero_point, grid), codes)
    kept = quantize(weight, scale, zero_point, grid) == codes
    low, high = grid.cell(codes.float())
    # 2 % of the distance to the next level is kept free, of floats on the wider side of a cell.
    near = (placed - weight).abs() <= 0.0137 * (high - low) * scale.abs().repeat_interleave(8, 1)
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


@pytest.mark.parametrize("name", GRIDS)
def test_layers_worked_together_are_as_each_by_itself(name: str) -> None:
    grid = GRIDS[name]
    fields = {"num_bits": grid.num_bits, "symmetric": grid.symmetric, "levels": grid.levels}
    fields["scale_dtype"] = grid.scale_dtype
    size = 32 if grid.scale_dtype == "e8m0" else 16
    weights = WeightConfig(**fields, group_size=size)
    wide = {"strategy": "channel"} if grid.scale_dtype == "bfloat16" else {"group_size": size}
    other = WeightConfig(**fields, **wide)
    _, hessian, _, _ = problem(8, 64, grid, 16)
    layers = {
        number: QuantLinear(torch.nn.Parameter(problem(rows, 64, grid, 16, seed)[0]), None, scheme)
        for number, (seed, (rows, scheme)) in enumerate([(1, (24, weights)), (2, (8, other)), (3, (40, weights))])
    }
    layers = {f"layer {number}": layer for number, layer in layers.items()}
    alone = copy.deepcopy(layers)
    target = {"layer 2": layers["layer 2"].matrix().detach() * 1.01}
    found = gptq_layers(layers, Curvature.of(hessian), 3, target)
    assert list(found) == list(layers)
    for key, layer in alone.items():
        own = gptq_layer(layer, Curvature.of(hessian), 3, target.get(key))
        assert found[key].after == pytest.approx(own.after, rel=0.02)
        assert (layers[key].codes() == layer.codes()).float().mean() > 0.99  # sums in another order


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
    found = joined(moments_by_half(block, group_of(block, layer, chain), chain))
    assert torch.allclose(found.moments, x.t() @ x / 80, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.moments, found.moments.t())
    assert found.missing is None


def test_the_clean_target_is_the_least_squares_solution_without_rounding() -> None:
    torch.manual_seed(0)
    clean, weight = torch.randn(64, 12), torch.randn(5, 12)
    x = clean + 0.3 * torch.randn(64, 12)
    hessian, missing = x.t() @ x / 64, (clean - x).t() @ x / 64
    found = weight + correction(weight, hessian, Moments(hessian, missing))
    torch.testing.assert_close(found, torch.linalg.lstsq(x, clean @ weight.t()).solution.t(), rtol=1e-4, atol=1e-4)
    assert not correction(weight, hessian, Moments(hessian, torch.zeros(12, 12))).any()
    steps = [correction(weight, damped(hessian, ridge), Moments(hessian, missing)).norm() for ridge in (0.1, 10.0)]
    assert steps[1] < 0.2 * steps[0]
    lack = torch.randn(64, 5)  # of the residual stream
    seen = Moments(hessian, missing, lack.t() @ x / 64)
    expected = torch.linalg.lstsq(x, clean @ weight.t() + lack).solution.t()
    torch.testing.assert_close(weight + correction(weight, hessian, seen), expected, rtol=1e-4, atol=1e-4)
    part = correction(weight, hessian, seen, slice(None, None, 2))
    torch.testing.assert_close(part, correction(weight, hessian, seen)[::2])


def test_the_ridge_is_the_one_that_fits_the_other_half_best() -> None:
    torch.manual_seed(0)
    weight, mixing = torch.randn(5, 12), torch.eye(12) + 0.2 * torch.randn(12, 12)

    def half(tokens: int, noise: float) -> tuple[Tensor, Tensor, Moments]:
        clean = torch.randn(tokens, 12)
        x = clean @ mixing + noise * torch.randn(tokens, 12)
        return x, clean @ weight.t(), Moments(x.t() @ x / tokens, (clean - x).t() @ x / tokens)

    def expected(halves: list[tuple[Tensor, Tensor, Moments]]) -> float:
        errors = {}
        for ridge in RIDGES:
            errors[ridge] = 0.0
            for (_, _, fitted), (x, wanted, _) in ((halves[0], halves[1]), (halves[1], halves[0])):
                found = weight + correction(weight, damped(fitted.moments, ridge), fitted)
                errors[ridge] += float((x @ found.t() - wanted).square().sum() / len(x))
        return min(errors, key=errors.__getitem__)

    chosen = []
    for tokens, noise in ((2000, 0.1), (14, 0.5), (40, 0.5)):
        halves = [half(tokens, noise), half(tokens, noise)]
        chosen.append(cross_validated(weight, [moments for *_, moments in halves]))
        assert chosen[-1] == expected(halves)
    assert chosen[0] < chosen[1]  # the more text, the smaller
    unlike = [half(2000, 0.1)[2], half(2000, 0.1)[2]]
    unlike[1] = Moments(unlike[1].moments, -unlike[1].missing)
    assert cross_validated(weight, unlike) is None
    assert cross_validated(weight, []) == max(RIDGES)


def walk_of(model: PreTrainedModel, quant: QuantConfig, blocks: int = 6) -> tuple[Walk, Clean]:
    """Returns a walk of `model`, prepared here, over text, and what its first block was."""
    before = {name: value.clone() for name, value in model.model.layers[0].named_parameters()}
    prepare(model, quant)
    torch.manual_seed(1)
    walk = open_walk(model, torch.randint(2, 258, (blocks, 16)), 2, dtype=torch.float32)
    return walk, Clean(walk.full, before)


def moments_of(block: Block, layer: QuantLinear, walk: Walk, clean: Clean, memory_limit: float) -> list[Moments]:
    """What text says of the inputs of `layer`; the original inputs are kept where the limit allows, else made anew."""
    group = group_of(block, layer, walk.quantized)
    clean = replace(clean)
    clean.meet(block, [group], walk.quantized, memory_limit, ALONE)
    assert (clean.inputs is None) == (memory_limit == 0)
    return moments_by_half(block, group, walk.quantized, clean=clean)


@pytest.mark.parametrize("memory_limit", [0, math.inf])
def test_the_missing_part_is_that_of_the_inputs_of_the_original(memory_limit: float) -> None:
    walk, clean = walk_of(tiny_llama(), QuantConfig.preset("int2", group_size=32))
    block = walk.blocks[0]
    gate = block.module.mlp.gate_proj
    seen: dict[str, list[Tensor]] = {"own": [], "clean": []}
    block.watch([gate], lambda _, x: seen["own"].append(x), walk.quantized, walk.quantized.batches)
    with quantizers_off(block.module):
        block.watch([gate], lambda _, x: seen["clean"].append(x), walk.full, walk.full.batches)
    own, wanted = (torch.cat(found).flatten(0, 1) for found in seen.values())
    halves = moments_of(block, gate, walk, clean, memory_limit)
    even, odd = halves  # token blocks in turn
    part = own.view(-1, 16, own.shape[1])[::2].flatten(0, 1)
    assert even.count == odd.count == len(part)
    torch.testing.assert_close(even.moments, part.t() @ part, rtol=1e-3, atol=1e-2)
    missing = (even.missing + odd.missing) / len(own)
    found = joined(halves)
    assert (found.count, halves) == (1, [])
    torch.testing.assert_close(found.missing, (wanted - own).t() @ own / len(own), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(missing, found.missing, rtol=1e-6, atol=1e-9)
    walk, clean = walk_of(tiny_llama(), QuantConfig.preset("int2", group_size=32))
    block = walk.blocks[0]
    first = moments_of(block, block.module.self_attn.q_proj, walk, clean, memory_limit)
    assert all(not half.missing.any() for half in first)  # which nothing quantized precedes


@pytest.mark.parametrize("memory_limit", [0, math.inf])
def test_the_stream_that_a_layer_adds_to_is_found(memory_limit: float) -> None:
    walk, clean = walk_of(tiny_llama(), QuantConfig.preset("int2", group_size=32))
    block = walk.blocks[0]
    mlp = block.module.mlp
    found = {name: stream_of(block, layer, walk.quantized) for name, layer in block.quantized().items()}
    assert {name.rpartition(".")[2]: module for name, module in found.items() if module is not None} == {
        "o_proj": block.module.input_layernorm,
        "down_proj": block.module.post_attention_layernorm,
    }
    seen: dict[str, list[Tensor]] = {"own": [], "clean": [], "input": []}
    norm = block.module.post_attention_layernorm
    block.watch([norm], lambda _, x: seen["own"].append(x), walk.quantized, walk.quantized.batches)
    block.watch([mlp.down_proj], lambda _, x: seen["input"].append(x), walk.quantized, walk.quantized.batches)
    with quantizers_off(block.module):
        block.watch([norm], lambda _, x: seen["clean"].append(x), walk.full, walk.full.batches)
    moments = joined(moments_of(block, mlp.down_proj, walk, clean, memory_limit))
    expected = []
    for own, wanted, x in zip(*seen.values(), strict=True):
        share = 1 / wanted.norm(dim=-1, keepdim=True)  # what the next norm divides by
        share = (share / share.square().mean().sqrt()).flatten(0, 1)
        own, wanted, x = (states.flatten(0, 1) * share for states in (own, wanted, x))
        expected.append(((wanted - own).t() @ x / len(x), x.t() @ x / len(x)))
    torch.testing.assert_close(moments.stream, sum(s for s, _ in expected) / len(expected), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(moments.moments, sum(m for _, m in expected) / len(expected), rtol=1e-3, atol=1e-5)
    walk, clean = walk_of(tiny_llama(), QuantConfig.preset("int2", group_size=32))
    block = walk.blocks[0]
    first = moments_of(block, block.module.self_attn.o_proj, walk, clean, memory_limit)
    assert all(not half.stream.any() for half in first)  # nothing quantized precedes the block


def test_a_scaled_output_is_added_to_no_stream() -> None:
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: 0.5 * own(x)
    walk, _ = walk_of(model, QuantConfig.preset("int4", group_size=32))
    assert stream_of(walk.blocks[0], mlp.down_proj, walk.quantized) is None


def test_a_clean_target_brings_a_block_nearer_to_what_it_gave() -> None:
    errors = {}
    for target in ("clean", "quantized"):
        torch.manual_seed(0)
        walk, clean = walk_of(tiny_llama(), QuantConfig.preset("int2", group_size=32), blocks=32)
        block, stage = walk.blocks[0], GPTQStage(batch_size=2, target_damping=0.01)
        expected = [block_output(block, walk.full, rows) for rows in walk.full.batches]
        gptq_block(block, walk.quantized, stage, clean=clean if target == "clean" else None)
        found = [block(walk.quantized, rows) for rows in walk.quantized.batches]
        errors[target] = float((torch.cat(found) - torch.cat(expected)).square().sum().detach())
    assert errors["clean"] < 0.95 * errors["quantized"]


def test_original_inputs_that_fit_no_memory_are_made_anew() -> None:
    found = {}
    for memory in (0.0, 4.0):
        walk, clean = walk_of(tiny_llama(), QuantConfig.preset("int3", group_size=32))
        block = walk.blocks[0]
        expected = torch.cat([block_output(block, walk.full, rows) for rows in walk.full.batches])
        gptq_block(block, walk.quantized, GPTQStage(hidden_memory=memory), clean=clean)
        assert torch.equal(walk.full[slice(0, len(walk.full))], expected)  # the block is behind it
        found[memory] = torch.cat([layer.codes().flatten() for layer in block.quantized().values()])
    assert torch.equal(*found.values())


def block_output(block: Block, chain: Chain, rows: slice) -> Tensor:
    """Returns what `block` gives with its quantizers off."""
    with quantizers_off(block.module):
        return block(chain, rows).detach()


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_sees_a_part_of_the_tokens_has_no_clean_target(first: bool) -> None:
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) + torch.nn.functional.pad(own(x[:, 1:]), (0, 0, 1, 0))
    calls = 2
    if not first:  # the quantized chain alone, and all tokens in the first batch, as of an expert
        calls, seen = 1, [0]

        def forward(x: Tensor) -> Tensor:
            seen[0] += mlp.down_proj.enabled
            few = mlp.down_proj.enabled and seen[0] > 2
            return own(x) if not few else torch.nn.functional.pad(own(x[:, 1:]), (0, 0, 1, 0))

        mlp.forward = forward
    walk, clean = walk_of(model, QuantConfig.preset("int4", group_size=32))
    block = walk.blocks[0]
    group = group_of(block, mlp.down_proj, walk.quantized)
    assert group.calls == calls
    if not first:
        seen[0] = 0
    (found,) = moments_by_half(block, group, walk.quantized, clean=clean)
    assert found.missing is None


@pytest.mark.parametrize("memory_limit", [0, math.inf])
def test_a_layer_that_the_original_calls_less_often_has_no_clean_target(memory_limit: float) -> None:
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    own, seen = mlp.forward, [-math.inf]

    def forward(x: Tensor) -> Tensor:
        seen[0] += not mlp.down_proj.enabled
        return own(x) if mlp.down_proj.enabled or seen[0] != 2 else x  # one batch of the original goes around it

    mlp.forward = forward
    walk, clean = walk_of(model, QuantConfig.preset("int4", group_size=32))
    block = walk.blocks[0]
    inputs: list[Tensor] = []
    block.watch([mlp.down_proj], lambda _, x: inputs.append(x), walk.quantized, walk.quantized.batches)
    seen[0] = 0
    (found,) = moments_of(block, mlp.down_proj, walk, clean, memory_limit)
    assert found.missing is None
    if memory_limit:  # known before any input counts: all count alike
        x = torch.cat(inputs).flatten(0, 1)
        torch.testing.assert_close(found.moments / found.count, x.t() @ x / len(x), rtol=1e-3, atol=1e-5)


def test_layers_that_read_the_same_have_no_stream_of_one_of_them() -> None:
    model = tiny_llama()
    layer = model.model.layers[0]
    twin = copy.deepcopy(layer.mlp.down_proj)
    layer.mlp.add_module("twin", twin)
    own = layer.mlp
    own.forward = lambda x: own.down_proj(h := own.act_fn(own.gate_proj(x)) * own.up_proj(x)) + 0.0 * own.twin(h)
    walk, clean = walk_of(model, QuantConfig.preset("int2", group_size=32))
    block, before = walk.blocks[0], layer.mlp.twin.codes()
    group = next(group for group in layers_by_input(block, walk.quantized) if "mlp.twin" in group.layers)
    assert set(group.layers) == {"mlp.down_proj", "mlp.twin"}
    assert stream_of(block, layer.mlp.down_proj, walk.quantized) is not None
    gptq_block(block, walk.quantized, GPTQStage(batch_size=2, rounds=1), clean=clean)
    assert torch.equal(layer.mlp.twin.codes(), layer.mlp.down_proj.codes())
    assert not torch.equal(layer.mlp.twin.codes(), before)


def test_a_damping_of_no_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_damping=0\.1 means nothing with target=quantized"):
        GPTQStage(target="quantized", target_damping=0.1)


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

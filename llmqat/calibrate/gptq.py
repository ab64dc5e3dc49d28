"""GPTQ: rounds a layer's weights one input feature after another; later features compensate the errors of earlier ones.

Plain rounding takes the nearest code of each weight. What matters, though, is the error x (W - Ŵ)^T of the layer's
output. Its mean square over the text is (w - ŵ) H (w - ŵ)^T for each row, with H = E[x^T x]. GPTQ visits the input
features in order of E[x_j^2], the largest first. It rounds column j and moves the columns not yet rounded, to
compensate the error, by the Cholesky factor of the inverse of H. The scales of groups stay fixed meanwhile (static
groups), so any order of features is allowed. A block of columns is rounded in cache. One product then updates the rest.

When the codes are known, the scales that suit them best solve a small linear system per row: with Ŵ = sum_g s_g C_g the
error is quadratic in the scales. Codes and scales are found in turn.

The quantized layers before a layer change its inputs from x to y. With `target="clean"` the layer should give from y
what the original layer gave from x: the codes minimize E|y Ŵ^T - x W^T|^2. This is the problem above for another
weight, W + W E[(x - y)^T y] H^-1, H = E[y^T y], the least-squares solution without rounding. A ridge on H keeps it near
W in directions that the text says little about. The ridge is cross-validated: a correction found on one half of the
text has to fit the other half.

Where the output of a layer is added to a residual stream r, the layer also corrects the error of that stream. Its
target is x W^T plus the stream of the original model minus the present one. The error of a token is then divided by the
rms of its original stream, as the next norm divides by it. Otherwise few tokens with a stream a hundred times longer
(massive activations, 2402.17762) would decide alone.

Finally the master weight moves to the nearest point that rounds to its code, so training starts from exactly these
codes.

Letters: O out features, I in features, G scales per row, g weights per scale.
Source: GPTQ (2210.17323) section 3.3, algorithm 1; the refit of scales is ordinary least squares. The clean target: the
corrected weight of QEP (2504.09629), its strength being 1; GPTAQ (2504.02692) and Qronos (2505.11695) solve the same
problem column by column. Deviations: a cross-validated ridge in place of a lower strength, the residual stream, and by
what tokens count.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.calibrate.blocks import Block, showing_inputs
from llmqat.calibrate.chains import Call, Chain, Some
from llmqat.calibrate.config import GPTQStage
from llmqat.calibrate.forward import input_of
from llmqat.calibrate.masters import holding
from llmqat.data.processes import ALONE, Processes
from llmqat.grid import Grid, most_important, of_each_weight, quantize, snap_scale
from llmqat.kernels.graphs import Recorder
from llmqat.layers import QuantLinear, quantized_once, quantizers_off
from llmqat.layers.finite import is_finite
from llmqat.models import uploaded

COLUMNS = 64
"""Columns rounded as one block before the rest of the matrix is updated."""
SYMMETRIC = 384
"""Features per product when second moments are added up; only products on and above the diagonal are computed."""
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Ridges that cross-validation tries, as shares of the mean of the diagonal of the second moments."""
PRODUCT_ELEMENTS = 1 << 19
"""Elements of one product with a part of the second moments on a CPU, so that it fits the cache."""
SYSTEM_ELEMENTS = 1 << 27
"""Elements of the linear systems, [G, G] for each row, that are solved at once on other devices."""
SAMPLED_ROWS = 128
"""Rows of a weight that cross-validation uses: at least so many, where there are, and fewer than twice so many."""
PIECE = 2
"""Batches whose original inputs are held in memory until the quantized chain has run on the same text."""
COMPARED = 4096
"""Leading entries of two tensors that `stream_of` compares before it compares the whole."""
_recorder = Recorder()


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Returns H [I, I] with `damping` times the mean of its diagonal added to the diagonal.

    A feature that the text never uses has 0 there and gets the whole mean, or 1 where the mean is 0.

    Raises:
        ValueError: when H is not finite.
    """
    if not is_finite(hessian):
        raise ValueError("the second moments of a layer's inputs hold NaN or infinity; check the model in float32")
    return _damped(hessian, damping)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """Returns what `damped` does, of moments that are known to be finite."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    found = hessian.clone()
    found.diagonal().add_(torch.where(diagonal > 0, damping * mean, mean))
    return found


@dataclass(frozen=True)
class Curvature:
    """Second moments of a layer's inputs, in the form that GPTQ needs; the same for all layers that read these inputs.

    Attributes:
        hessian: [I, I] float32, damped E[x^T x]: positive definite.
        order: [I] int64, input features from the largest mean square to the least.
        factor: [I, I] float32, rows and columns in that order, upper triangular: factor^T factor = H^-1.
    """

    hessian: Tensor
    order: Tensor
    factor: Tensor

    @property
    def inverse_diagonal(self) -> Tensor:
        """Diagonal of the inverse of the second moments, [I] float32."""
        found = torch.empty(len(self.order), device=self.factor.device)
        found[self.order] = self.factor.square().sum(0)
        return found

    @staticmethod
    @torch.no_grad()
    def of(hessian: Tensor, together: int = 1) -> Curvature:
        """Returns the curvature for a damped `hessian` [I, I] float32.

        Args:
            hessian: [I, I] float32, damped.
            together: number of adjacent features that stay next to each other in the order; divides I.
        """
        sizes = hessian.diagonal().view(-1, together).sum(1)
        first = sizes.argsort(descending=True).unsqueeze(1) * together
        order = (first + torch.arange(together, device=first.device)).flatten()
        # With the features the other way round, H = L L^T; turned back, H = M M^T with M upper, and the factor is M^-1.
        back = order.flip(0)
        turned = torch.linalg.cholesky(hessian[back][:, back]).flip(0, 1)
        identity = torch.eye(len(order), dtype=hessian.dtype, device=hessian.device)
        return Curvature(hessian, order, torch.linalg.solve_triangular(turned, identity, upper=True))


@torch.no_grad()
def round_by_gptq(
    weight: Tensor,
    inputs: Curvature,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    kept: Tensor | None = None,
    nonzero: Tensor | None = None,
) -> Tensor:
    """Returns the codes [O, I] of `weight` that GPTQ finds for given scales.

    Args:
        weight: [O, I] float32.
        inputs: of the layer.
        scale: [O, G], [O, 1] or [1, 1] float32, snapped.
        zero_point: of the scale's shape, or None.
        grid: the code range.
        kept: of the scale's shape, groups that keep the codes nearest to their weights; None for none.
        nonzero: [O, I] bool, weights that are free; the others have the code of zero. None where all are free.
    """
    out_features, in_features = weight.shape
    order, factor = inputs.order, inputs.factor
    # Input features are rows here, so that each is contiguous.
    left = weight.t()[order].contiguous()
    group = order // (in_features // scale.shape[1])
    scales = scale.t()[group].expand(in_features, out_features)
    zeros = None if zero_point is None else zero_point.t()[group].expand(in_features, out_features)
    codes = torch.empty_like(left)
    known = _known_codes(weight, scale, zero_point, grid, kept, nonzero)
    known = None if known is None else known.t()[order]
    for start in range(0, in_features, COLUMNS):
        rows = slice(start, min(start + COLUMNS, in_features))
        tensors = left[rows], factor[rows, rows], scales[rows], _part(zeros, rows), _part(known, rows)
        codes[rows], errors = _recorder((_round_rows, grid), functools.partial(_round_rows, grid), *tensors)
        left[rows.stop :].addmm_(factor[rows, rows.stop :].t(), errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous().to(grid.code_dtype)


@contextmanager
def graphs_kept() -> Iterator[None]:
    """Inside, CUDA graphs of the rounding serve all layers of their shape; afterwards they are let go."""
    try:
        yield
    finally:
        _recorder.clear()


@torch.no_grad()
def choose_nonzero(weight: Tensor, inputs: Curvature, keep: int, of: int) -> Tensor:
    """Returns which weights stay, bool [O, I]: in every `of` of a row, the `keep` whose loss costs the output most.

    Visits the input features as GPTQ does. When a weight becomes zero, the weights not yet visited compensate for it.
    So each choice takes the earlier ones into account. Where `of` is the whole row, all choices are made at the start.

    Args:
        weight: [O, I] float32, what the layer should compute.
        inputs: curvature of the layer's inputs, made with `together=of` unless `of` is the whole row.
        keep: number of weights that stay in each group, the n of n:m.
        of: number of adjacent weights in a group, the m of n:m; divides I.

    Source: SparseGPT (2301.00774), algorithm 1, with groups of features in the order of their mean squares.
    """
    size = weight.shape[1]
    if of == size:
        return most_important(weight.square() / inputs.inverse_diagonal, keep, of)
    left = weight.t()[inputs.order].contiguous()
    kept = torch.zeros_like(left, dtype=torch.bool)
    step = of * max(1, COLUMNS // of)
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        errors = _prune_rows(left[rows], kept[rows], inputs.factor[rows, rows], keep, of)
        left[rows.stop :].addmm_(inputs.factor[rows, rows.stop :].t(), errors, alpha=-1)
    result = torch.empty_like(kept)
    result[inputs.order] = kept
    return result.t().contiguous()


def _prune_rows(left: Tensor, kept: Tensor, factor: Tensor, keep: int, of: int) -> Tensor:
    """Finds which of the input features `left` [n, O] stay, into `kept`; returns the errors of the others [n, O]."""
    errors = torch.empty_like(left)
    diagonal = factor.diagonal()
    for row in range(len(left)):
        if row % of == 0:
            score = left[row : row + of] / diagonal[row : row + of].unsqueeze(1)
            kept[row : row + of] = most_important(score.abs().t(), keep, of).t()
        torch.mul(left[row], ~kept[row], out=errors[row])
        errors[row] /= diagonal[row]
        if row + 1 < len(left):
            left[row + 1 :].addr_(factor[row, row + 1 :], errors[row], alpha=-1)
    return errors


def _known_codes(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    kept: Tensor | None,
    nonzero: Tensor | None,
) -> Tensor | None:
    """Returns the codes [O, I] of weights that are not free, float32, and NaN for those that are; None for no codes."""
    if kept is None and nonzero is None:
        return None
    known = torch.full_like(weight, torch.nan)
    if kept is not None:
        known = torch.where(of_each_weight(kept, *weight.shape), quantize(weight, scale, zero_point, grid), known)
    if nonzero is not None:
        zero = known.new_zeros(()) if zero_point is None else of_each_weight(zero_point, *weight.shape)
        known = torch.where(nonzero, known, zero)
    return known


def _round_rows(
    grid: Grid, left: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor | None, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rounds input features `left` [n, O] one after the other; returns their codes and errors [n, O].

    Where `known` [n, O] is a number, that is the code. The features are changed as those before them are rounded.
    """
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    inverse_diagonal = factor.diagonal().reciprocal().unbind()  # tensors: as numbers they would be waited for
    rows = zip(left.unbind(), codes.unbind(), errors.unbind(), scales.unbind(), inverse_diagonal, strict=True)
    for row, (w, q, error, s, inverse) in enumerate(rows):
        torch.div(w, s, out=q)
        grid.round_(q)
        if zeros is not None:
            q.add_(zeros[row])
        q.clamp_(grid.qmin, grid.qmax)
        if known is not None:
            torch.where(known[row].isnan(), q, known[row], out=q)
        level = q if zeros is None else q - zeros[row]
        torch.addcmul(w, level + grid.offset if grid.offset else level, s, value=-1, out=error)
        error.mul_(inverse)
        if row + 1 < left.shape[0]:
            left[row + 1 :].addr_(factor[row, row + 1 :], error, alpha=-1)
    return codes, errors


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Returns all as one, row after row; None where there are none."""
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(given) if given else None


@torch.no_grad()
def refit_scales(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    product: Tensor | None = None,
) -> Tensor:
    """Returns the scales [O, G] with the least output error for given codes, snapped.

    A row keeps its old scales where new ones would not reduce its error, or where its linear system is singular.

    Args:
        weight: [O, I] float32, what the layer is to compute.
        hessian: [I, I] float32, damped.
        codes: [O, I].
        scale: [O, G] float32, as the codes were found; each row has its own.
        zero_point: [O, G] or None.
        grid: the code range.
        product: weight @ hessian, where it is known.
    """
    rows, groups = scale.shape
    level = _levels(codes.view(rows, groups, -1), zero_point, grid)
    product = weight @ hessian if product is None else product
    target = (product * level.flatten(1)).view(level.shape).sum(-1)
    found = torch.empty_like(scale)
    most = PRODUCT_ELEMENTS // weight.shape[1] if weight.device.type == "cpu" else SYSTEM_ELEMENTS // groups**2
    count = max(1, most)
    for start in range(0, rows, count):
        some = slice(start, start + count)
        found[some] = _scales_of(level[some], hessian, target[some], scale[some], grid)
    return found


def _scales_of(level: Tensor, hessian: Tensor, target: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Returns the scales [n, G] of some rows with `level` [n, G, g], for `target` [n, G]: level_g (H w)_g."""
    rows, groups, size = level.shape
    # A[g, h] = level_g H_gh level_h by products with parts of H; it is symmetric.
    matrix = level.new_zeros(rows, groups, groups)
    for g in range(groups):
        part = level[:, g] @ hessian[g * size : (g + 1) * size, g * size :]
        matrix[:, g, g:] = part.view(rows, -1, size).mul_(level[:, g:]).sum(-1)
    matrix += matrix.triu(1).mT
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    # A little of the old scale keeps a row solvable whose group has no code but zero.
    ridge = 1e-4 * diagonal.mean(-1, keepdim=True).clamp(min=1e-12).expand_as(diagonal)
    solved, _ = torch.linalg.solve_ex(matrix + torch.diag_embed(ridge), target + ridge * scale)  # waits for no device
    found = snap_scale(torch.where(torch.isfinite(solved), solved, scale), grid)
    # The error is s A s - 2 b s and what no scale changes; so this is its change from the old scales to those found.
    step, both = found - scale, (found + scale).unsqueeze(-1)
    better = (step * ((matrix @ both).squeeze(-1) - 2 * target)).sum(-1) < 0
    return torch.where(better.unsqueeze(-1), found, scale)


def output_error(
    weight: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid
) -> Tensor:
    """Returns E|x (W - Ŵ)^T|^2, a scalar: what the codes [O, I] cost the layer's output."""
    level = _levels(codes.view(*scale.shape, -1), zero_point, grid)
    error = weight - (level * scale.unsqueeze(-1)).view(weight.shape)
    return ((error @ hessian) * error).sum()


def _levels(codes: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Returns code - zero point + offset, float32; `zero_point` lacks the last dimension of `codes`."""
    level = codes.float() + grid.offset
    return level if zero_point is None else level - zero_point.unsqueeze(-1)


@torch.no_grad()
def placed_weight(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
) -> Tensor:
    """Returns the master weight, float32 [O, I], nearest to `weight` that rounds to `codes`.

    A weight that lies beyond the last code of the grid, and has that code, stays where it is.
    """
    shape = scale.numel(), -1
    level = _levels(codes.reshape(shape), None if zero_point is None else zero_point.reshape(-1), grid)
    code, v = codes.reshape(shape), weight.reshape(shape) / scale.reshape(-1, 1)
    low, high = grid.cell(level)
    moved = v.clamp(low.masked_fill_(code == grid.qmin, -torch.inf), high.masked_fill_(code == grid.qmax, torch.inf))
    return torch.where(moved == v, weight.reshape(shape), moved * scale.reshape(-1, 1)).view(weight.shape)


@dataclass(frozen=True)
class LayerRounding:
    """What GPTQ did to one layer.

    Attributes:
        before: mean square error of the layer's output over the mean square of the output, with the codes before GPTQ.
        after: the same with the codes of GPTQ.
    """

    before: float
    after: float


@dataclass
class Clean:
    """The original parameters of a block, and the full-precision chain that has reached it.

    Attributes:
        chain: the full-precision chain.
        weights: the original parameters of the block, by name inside it.
        inputs: recorded inputs [tokens, features] on the CPU, for each recorded module one per call, in the batches
            that this process runs. None while the chain has not moved past the block.
    """

    chain: Chain
    weights: Mapping[str, Tensor]
    inputs: Mapping[nn.Module, Sequence[Tensor]] | None = None

    def meet(
        self, block: Block, groups: Sequence[LayerGroup], chain: Chain, memory_limit: float, processes: Processes
    ) -> None:
        """Sets `stream` of each group, and records the original inputs where they fit in `memory_limit` bytes.

        Recording runs the chain past the block. Otherwise `moments_by_half` computes the inputs anew for each group.
        """
        paired = [group for group in groups if group.has_pairs]
        for group in paired:
            if group.calls == len(group.layers) == 1:
                group.stream = stream_of(block, group.first, chain)
        rows = chain.batches[0]
        tokens = _tokens(chain.call(block, rows)) * len(chain) // (rows.stop - rows.start)
        size = sum(group.calls * group.first.in_features for group in paired)
        size += sum(group.first.out_features for group in paired if group.stream is not None)
        if tokens * size * block.dtype.itemsize <= memory_limit:
            self._pass(block, [module for group in paired for module in group.watched], processes)

    def kept(self, module: nn.Module, batches: Sequence[Some], calls: int, processes: Processes) -> list[Tensor]:
        """Returns the inputs of `module` in some batches, `calls` in each; none where it was called another number."""
        assert self.inputs is not None
        found, ran = self.inputs[module], self.chain.batches_of(processes)
        if len(found) != len(ran) * calls:
            return []
        return [x for index, rows in enumerate(ran) if rows in batches for x in found[index * calls :][:calls]]

    def leave(self, block: Block, processes: Processes) -> None:
        """Passes the block, unless that is done."""
        if self.inputs is None:
            self._pass(block, [], processes)

    def _pass(self, block: Block, modules: Sequence[nn.Module], processes: Processes) -> None:
        inputs: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

        def keep(module: nn.Module, x: Tensor) -> None:
            inputs[module].append(x.detach().reshape(-1, x.shape[-1]).to("cpu", copy=True))

        with showing_inputs(inputs, keep), holding(block, self.weights):
            block.run_full(self.chain, self.chain, processes)
        self.inputs = inputs


def gptq_block(
    block: Block, chain: Chain, stage: GPTQStage, processes: Processes = ALONE, clean: Clean | None = None
) -> dict[str, LayerRounding]:
    """Finds codes and scales of every linear layer of `block` in place, in the order they run; returns what it gained.

    A layer sees the inputs that it gets from the layers before it with their new codes. Layers that text does not
    reach, or that other blocks share, keep their codes, and are not in what is returned.

    Args:
        block: with its quantizers on.
        chain: the quantized chain, which has reached the block.
        stage: damping, rounds, target damping, and the memory for original inputs.
        processes: share the batches of the chain; all find the same codes and scales.
        clean: source of the clean targets; its chain moves past the block. None: the target of a layer is what it gives
            in full precision from the inputs that it gets. This also holds for a layer that does not see every token,
            such as an expert.

    Returns:
        Full name of each layer -> its errors before and after.
    """
    found: dict[str, LayerRounding] = {}
    groups = layers_by_input(block, chain)
    if clean is not None:
        clean.meet(block, groups, chain, stage.hidden_memory * 1e9, processes)
    for group in groups:
        halves = moments_by_half(block, group, chain, processes, clean)
        if not halves:
            continue
        originals: dict[str, Tensor] = {}
        targets: dict[str, Tensor] = {}
        ridge = None
        if clean is not None and halves[0].missing is not None:
            with holding(block, clean.weights):
                originals = {name: layer.dense_matrix().float() for name, layer in group.layers.items()}
            ridge = stage.target_damping
            if ridge is None:
                ridge = cross_validated(torch.cat(list(originals.values())), halves)
        seen = joined(halves)
        if ridge is not None:
            hessian = _damped(seen.moments, ridge)
            targets = {name: own + correction(own, hessian, seen) for name, own in originals.items()}
            del hessian
        moments = damped(seen.moments, stage.damping)
        del seen, halves  # of a wide layer gigabytes, and so is what comes now
        rounded = gptq_layers(group.layers, Curvature.of(moments), stage.rounds, targets)
        found |= {f"{block.name}.{name}": rounding for name, rounding in rounded.items()}
    if clean is not None:
        clean.leave(block, processes)
    return found


@torch.no_grad()
def cross_validated(weight: Tensor, halves: Sequence[Moments]) -> float | None:
    """Returns the ridge of `RIDGES` whose correction, found on one half of the text, fits the other half best.

    Args:
        weight: [O, I] float32.
        halves: what each half of the text says of the inputs.

    Returns:
        A share of the mean diagonal of the second moments; None where the weight as it is fits best. The largest where
        there is no second half.

    Raises:
        ValueError: damped second moments are not positive definite.
    """
    if len(halves) < 2:
        return max(RIDGES)
    rows = slice(None, None, max(1, len(weight) // SAMPLED_ROWS))
    device = weight.device
    sums = torch.zeros(len(RIDGES), dtype=torch.float64, device=device)
    faults = torch.zeros(len(RIDGES), dtype=torch.float64, device=device)
    for fitted, other in permutations(halves, 2):
        wanted = other.lacking(weight, rows)
        for number, ridge in enumerate(RIDGES):
            step, fault = _correction(weight, _damped(fitted.moments, ridge), fitted, rows)
            sums[number] += ((step @ other.moments - 2 * wanted) * step).sum() / other.count
            faults[number] += fault
    found, failed = torch.stack([sums, faults]).tolist()  # the one wait for the device
    _check_definite(not any(failed))
    errors = dict(zip(RIDGES, found, strict=True))
    best = min(RIDGES, key=errors.__getitem__)
    return best if errors[best] < 0 else None


@torch.no_grad()
def correction(weight: Tensor, hessian: Tensor, seen: Moments, rows: slice = slice(None)) -> Tensor:
    """Returns what to add to `weight` so that its product with the inputs is nearest to the clean target, [O, I].

    Args:
        weight: [O, I] float32, the original one.
        hessian: [I, I] float32, damped E[x^T x]: the more damping, the smaller the correction.
        seen: what text says of the inputs.
        rows: of the weight; those of others are left out.

    Raises:
        ValueError: `hessian` is not positive definite.
    """
    found, fault = _correction(weight, hessian.clone(), seen, rows)
    _check_definite(not bool(fault))
    return found


def _check_definite(is_definite: bool) -> None:
    if not is_definite:
        raise ValueError(
            "the damped second moments of a layer's inputs are not positive definite; raise target_damping of stage "
            "gptq, or give more text"
        )


def _correction(weight: Tensor, hessian: Tensor, seen: Moments, rows: slice) -> tuple[Tensor, Tensor]:
    """Returns what `correction` does, and a number that is not 0 where `hessian` is not positive definite.

    Of a wide layer a matrix takes gigabytes: the factor takes the place of `hessian`.
    """
    fault = torch.empty((), dtype=torch.int32, device=hessian.device)
    factor = hessian.mT  # in the order that LAPACK wants, and the same, since it is symmetric
    torch.linalg.cholesky_ex(factor, out=(factor, fault))
    return torch.cholesky_solve(seen.lacking(weight, rows).t(), factor).t(), fault


@torch.no_grad()
def gptq_layer(layer: QuantLinear, inputs: Curvature, rounds: int, target: Tensor | None = None) -> LayerRounding:
    """Finds the codes of `layer` by GPTQ and the scales that suit them, in turn, and puts both in place.

    Groups that already were on the lattice of the scheme keep their codes and scales, because they have no error. Other
    groups in the same row keep their scales too. Where the scheme has sparsity, the zero weights are chosen first, and
    the others compensate for them.

    Args:
        layer: has a float32 weight; its present scales are the start.
        inputs: curvature of the layer's inputs.
        rounds: number of times that codes are found; scales are refitted after each.
        target: the weight [O, I] float32 that the codes should represent; None: the layer's own.
    """
    return gptq_layers({"": layer}, inputs, rounds, {} if target is None else {"": target})[""]


@torch.no_grad()
def gptq_layers(
    layers: Mapping[str, QuantLinear], inputs: Curvature, rounds: int, targets: Mapping[str, Tensor]
) -> dict[str, LayerRounding]:
    """Finds codes and scales as `gptq_layer` does, for several layers that read the same inputs.

    Layers of one scheme are stacked into one matrix. The rows of a weight are independent of each other. So the result
    is the same, in fewer and larger steps.
    """
    together_in = functools.cache(lambda of: Curvature.of(inputs.hessian, of))  # the same for all layers

    def inputs_for(of: int) -> Curvature:
        return inputs if of == len(inputs.order) else together_in(of)

    all_problems = {name: _Problem.of(layer, inputs, targets.get(name), inputs_for) for name, layer in layers.items()}
    after: dict[str, Tensor] = {}
    together: dict[Any, dict[str, _Problem]] = {}
    for name, problem in all_problems.items():
        if problem.is_kept:
            after[name] = problem.before
        else:
            free = problem.kept is None, problem.nonzero is None
            kind = problem.layer.grid, problem.scale.shape[1], free, problem.rows_alike or name
            together.setdefault(kind, {})[name] = problem
    for problems in together.values():
        grid = next(iter(problems.values())).layer.grid
        weight, scale = (torch.cat([getattr(p, name) for p in problems.values()]) for name in ("weight", "scale"))
        zero_point, kept, nonzero = (
            _joined([getattr(p, name) for p in problems.values()]) for name in ("zero_point", "kept", "nonzero")
        )
        product = weight @ inputs.hessian
        for _ in range(rounds):
            codes = round_by_gptq(weight, inputs, scale, zero_point, grid, kept, nonzero)
            if not all(problem.rows_alike for problem in problems.values()):
                break  # a scale of several rows stays as it is, and other rounds would find the same codes
            better = refit_scales(weight, inputs.hessian, codes, scale, zero_point, grid, product)
            # The scales of a row suit each other, so those of a row with a group that is kept stay as they are.
            scale = better if kept is None else torch.where(kept.any(-1, keepdim=True), scale, better)
        sizes = [len(p.weight) for p in problems.values()]
        parts = codes.split(sizes), scale.split([len(p.scale) for p in problems.values()])
        for (name, problem), own_codes, own_scale in zip(problems.items(), *parts, strict=True):
            after[name] = problem.place(own_codes, own_scale, inputs.hessian)
    shares = [torch.stack([p.before, after[name]]) / p.size for name, p in all_problems.items()]
    found = torch.stack(shares).tolist()  # of all layers at once, so that the device is waited for once
    return {name: LayerRounding(*pair) for name, pair in zip(layers, found, strict=True)}


@dataclass
class _Problem:
    """A layer whose codes and scales are to be found.

    Attributes:
        layer: it.
        weight: what the codes are to stand for, [O, I] float32.
        scale: the start, [O, G], [O, 1] or [1, 1] float32.
        zero_point: of the scale's shape, or None.
        kept: of the scale's shape, groups that keep their codes; None for none.
        nonzero: [O, I] bool, weights that are not held at zero; None where none is.
        size: mean square of the output, a scalar.
        before: error of the output with the codes that are there, a scalar.
    """

    layer: QuantLinear
    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    kept: Tensor | None
    nonzero: Tensor | None
    size: Tensor
    before: Tensor

    @classmethod
    def of(
        cls, layer: QuantLinear, inputs: Curvature, target: Tensor | None, inputs_for: Callable[[int], Curvature]
    ) -> _Problem:
        """Returns that of `layer`, whose weight is float32; which of its weights are zero is chosen.

        `inputs_for` gives what `choose_nonzero` asks of the inputs, by how many weights it chooses from.
        """
        own, hessian = layer.dense_matrix().float(), inputs.hessian
        wanted = own if target is None else target
        codes, (scale, zero_point) = layer.codes(), layer.scale_and_zero_point()
        layer.choose_zeros(lambda keep, of: choose_nonzero(wanted, inputs_for(of), keep, of))
        kept = layer.kept_groups()
        weight = wanted
        if kept is not None:
            weight = torch.where(of_each_weight(kept, *own.shape), layer.matrix(), wanted)
        size = ((own @ hessian) * own).sum()
        before = output_error(weight, hessian, codes, scale, zero_point, layer.grid)
        return cls(layer, weight, scale, zero_point, kept, layer.nonzero, size, before)

    @property
    def rows_alike(self) -> bool:
        """Whether each row has scales of its own."""
        return self.layer.kept_shape[0] == len(self.weight)

    @property
    def is_kept(self) -> bool:
        """Whether all groups keep their codes."""
        return self.kept is not None and bool(self.kept.all())

    def place(self, codes: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
        """Puts codes and scales into the layer; returns the error of the output with them, a scalar."""
        after = output_error(self.weight, hessian, codes, scale, self.zero_point, self.layer.grid)
        if self.rows_alike:  # else it is as it was
            self.layer.set_scale(scale, self.zero_point)
        placed = placed_weight(self.weight, codes, *self.layer.scale_and_zero_point(), self.layer.grid)
        self.layer.weight.copy_(self.layer.restored(placed))
        return after


@dataclass
class LayerGroup:
    """Linear layers that read the same tensors.

    Attributes:
        layers: by name in the block.
        calls: calls of each layer in a forward of the block, counted in the first batch that reaches it.
        whole: whether each of these calls reads the hidden states of all tokens.
        stream: the module whose input is the residual stream that the output of the only layer is added to, from
            `stream_of`. None where there is none, or it was not looked for.
    """

    layers: dict[str, QuantLinear]
    calls: int
    whole: bool
    stream: nn.Module | None = None

    @property
    def first(self) -> QuantLinear:
        """One of the layers."""
        return next(iter(self.layers.values()))

    @property
    def has_pairs(self) -> bool:
        """Whether each input can be paired with the input of the original model for the same tokens."""
        return self.calls > 0 and self.whole

    @property
    def watched(self) -> list[nn.Module]:
        """The modules whose inputs are asked for, in the order they run."""
        return [self.first] if self.stream is None else [self.stream, self.first]


def layers_by_input(block: Block, chain: Chain) -> list[LayerGroup]:
    """Returns the linear layers of `block` in the order they run, those that read the same tensors together.

    Layers that no batch reaches are left out, and so are those that other blocks share.
    """
    layers = {
        name: module
        for name, module in block.module.named_modules()
        if isinstance(module, QuantLinear) and id(module.weight) not in block.shared
    }
    names: dict[nn.Module, str] = {module: name for name, module in layers.items()}
    found: dict[tuple[str, ...], LayerGroup] = {}
    reached: set[str] = set()
    for rows in chain.batches:
        read: dict[str, list[_Place]] = {}
        kept: list[Tensor] = []  # so that no memory is used again during the forward

        def note(module: nn.Module, x: Tensor, read: dict[str, list[_Place]] = read, kept: list[Tensor] = kept) -> None:
            kept.append(x)
            read.setdefault(names[module], []).append((x.data_ptr(), x.shape, x.stride(), x._version))

        block.watch(layers.values(), note, chain, [rows])
        tokens = _tokens(chain.call(block, rows))
        by_input: dict[tuple[_Place, ...], list[str]] = {}
        for name, places in read.items():
            if name not in reached:
                by_input.setdefault(tuple(places), []).append(name)
        for read_by_all, together in by_input.items():
            whole = all(shape[:-1].numel() == tokens for _, shape, *_ in read_by_all)
            found[tuple(together)] = LayerGroup({name: layers[name] for name in together}, len(read_by_all), whole)
        reached |= read.keys()
        if len(reached) == len(layers):
            break
    return list(found.values())


def _tokens(call: Call) -> int:
    """Returns of how many tokens a block is given the hidden states."""
    args, options = call
    given = (options.get("hidden_states"), *args, *options.values())
    states = (x for x in given if isinstance(x, Tensor) and x.is_floating_point())
    return next((x.shape[:-1].numel() for x in states), 0)


_Place = tuple[int, torch.Size, tuple[int, ...], int]
"""Data pointer, shape, stride and version counter of a tensor: equal where two layers read the same tensor."""


@dataclass
class Moments:
    """Second moments of a layer's inputs: sums over tokens, or means where `count` is 1.

    Attributes:
        moments: y^T y, [I, I] float32; y are the inputs that the layer gets.
        missing: (x - y)^T y, [I, I] float32; x are the inputs of the original model. None where there are none, or
            where not every y has its x.
        stream: (r' - r)^T y, [O, I] float32; r is the residual stream that the layer's output is added to, r' that of
            the original model. None where the output is added to none. Where it is known, all sums are weighted: a
            token counts by 1 / mean(r'^2).
        count: number of tokens in the sums.
    """

    moments: Tensor
    missing: Tensor | None = None
    stream: Tensor | None = None
    count: int = 1

    def lacking(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Returns e^T y for some rows of `weight`, [rows, I]; e is the clean target minus the layer's output."""
        assert self.missing is not None
        found = weight[rows] @ self.missing
        return found if self.stream is None else found + self.stream[rows]


@torch.no_grad()
def joined(parts: list[Moments]) -> Moments:
    """Returns the means over the text of all `parts`; to save memory it reuses their tensors and empties the list."""
    first, *others = parts
    count = sum(part.count for part in parts)
    for name in ("moments", "missing", "stream"):
        total = getattr(first, name)
        for other in others if total is not None else ():
            total += getattr(other, name)
        if total is not None:
            total /= count
    first.count = 1
    parts.clear()
    return first


@torch.no_grad()
def moments_by_half(
    block: Block, group: LayerGroup, chain: Chain, processes: Processes = ALONE, clean: Clean | None = None
) -> list[Moments]:
    """Returns the second moments of the inputs of `group`, as its layers quantize them; empty where text reaches none.

    They are sums: of even and of odd token blocks where the original inputs can be paired, else of all text.

    Args:
        block: the block that holds the layers.
        group: one of `layers_by_input`.
        chain: the quantized chain, which has reached the block.
        processes: share the batches of the chain.
        clean: source of the original inputs, after its `meet`; None where there is no clean target.
    """
    own = list(processes.share(chain.batches))
    paired = clean is not None and group.has_pairs
    watched = group.watched if paired else [group.first]
    sums = _Sums(group, paired)
    step = PIECE if clean is not None and paired and clean.inputs is None else max(len(own), 1)
    for piece in (own[start : start + step] for start in range(0, len(own), step)):
        sums.coming = [rows for rows in piece for _ in range(group.calls)]
        if clean is not None and paired:
            if clean.inputs is not None:
                for module in watched:
                    sums.clean[module] += clean.kept(module, piece, group.calls, processes)
            else:
                with holding(block, clean.weights), quantizers_off(block.module):
                    block.watch(watched, sums.record_clean, clean.chain, piece, len(watched) * group.calls)
            sums.unlike |= any(len(sums.clean[module]) != len(sums.coming) for module in watched)
        block.watch(watched, sums.record, chain, piece, len(watched) * group.calls)
    sums.join(processes)
    return sums.parts()


class _Sums:
    """What `Moments` are means of, while text goes by: of even and of odd token blocks where there is a clean chain."""

    def __init__(self, group: LayerGroup, paired: bool) -> None:
        layer = group.first
        size, device = layer.in_features, layer.weight.device
        halves = 2 if paired else 1
        self.layer, self.before, self.paired = layer, group.stream if paired else None, paired
        self.clean: dict[nn.Module, deque[Tensor]] = {module: deque() for module in group.watched}  # not met yet
        self.coming: list[slice] = []
        self.total = [torch.zeros(size, size, device=device) for _ in range(halves)]
        self.missing = [torch.zeros(size, size, device=device) for _ in range(halves if paired else 0)]
        rows = layer.out_features
        self.stream = [torch.zeros(rows, size, device=device) for _ in range(0 if self.before is None else halves)]
        self.count = torch.zeros(halves, dtype=torch.int64)
        self.unlike = False
        self._lack: Tensor | None = None
        self._share: Tensor | None = None

    def record_clean(self, module: nn.Module, x: Tensor) -> None:
        """Keeps inputs of the original model until those that quantization has changed come."""
        self.clean[module].append(x.reshape(-1, x.shape[-1]))

    def record(self, module: nn.Module, x: Tensor) -> None:
        """Adds the inputs of a call."""
        if module is self.before:
            if self.unlike:
                return
            stream = uploaded(self.clean[module].popleft(), x.device).float()
            self._share = _shares(stream)
            self._lack = (stream - x.reshape(-1, x.shape[-1]).float()) * self._share
            return
        x = x if self.layer.input_quantizer is None else self.layer.input_quantizer(x)
        rows = x.reshape(-1, x.shape[-1]).float()
        if not self.paired or self.unlike:
            self._add(0, rows)
            return
        clean, batch = uploaded(self.clean[module].popleft(), x.device), self.coming.pop(0)
        lack, share = self._lack, self._share
        if len(clean) != len(rows):  # a layer that is given a part of the tokens after all
            self.unlike = True
            self._add(0, rows)
            return
        missing = clean.float() - rows
        if share is not None:
            rows, missing = rows * share, missing * share
        for half in range(2):
            own = _of_half(rows, batch, half)
            if len(own):
                behind = None if lack is None else _of_half(lack, batch, half)
                self._add(half, own, _of_half(missing, batch, half), behind, clean.dtype)

    def _add(
        self,
        half: int,
        rows: Tensor,
        missing: Tensor | None = None,
        lack: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.count[half] += len(rows)
        for start in range(0, rows.shape[1], SYMMETRIC):  # the matrix is symmetric: its upper part is enough
            columns = slice(start, start + SYMMETRIC)
            self.total[half][columns, start:].addmm_(rows[:, columns].t(), rows[:, start:])
        if self.missing and missing is not None:
            self.missing[half] += _product(missing, rows, dtype)
        if self.stream and lack is not None:
            self.stream[half] += _product(lack, rows, dtype)

    def join(self, processes: Processes) -> None:
        """Adds what other processes have seen."""
        for total in (*self.total, *self.missing, *self.stream, self.count):
            processes.add(total)
        self.unlike = bool(processes.add(torch.tensor(float(self.unlike))))

    def parts(self) -> list[Moments]:
        """Returns the sums of each half of the text that has rows; of all text where not each has its fellow."""
        counts = self.count.tolist()
        for total in self.total:
            total.triu_()
            total += total.t().tril(-1)
        if self.unlike:
            for other in self.total[1:]:
                self.total[0] += other
            return [Moments(self.total[0], count=sum(counts))] if any(counts) else []
        every = zip_longest(self.total, self.missing, self.stream, counts)  # where there is none, None
        return [Moments(*half) for half in every if half[-1]]


def _shares(stream: Tensor) -> Tensor:
    """Returns by what the errors of tokens count, [T, 1], mean square 1: the next norm divides each by its rms.

    Args:
        stream: [T, D] float32, the residual stream of the original model.
    """
    shares = stream.square().mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    return shares / shares.square().mean().sqrt()


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns left^T right with factors and result in `dtype`, that of the forward; sums are float32.

    In bfloat16 it takes less than half the time. Its rounding is far below the noise of some ten thousand tokens. It is
    too coarse for y^T y: that is inverted, and of features that nearly agree only the small difference counts.
    """
    return left.to(dtype).t() @ right.to(dtype)


def _of_half(rows: Tensor, batch: slice, half: int) -> Tensor:
    """Returns the rows of a batch that belong to even (0) or odd (1) token blocks: its size does not matter then."""
    count = batch.stop - batch.start
    size = len(rows) // count
    return rows[: count * size].view(count, size, -1)[(half - batch.start) % 2 :: 2].flatten(0, 1)


@torch.no_grad()
def stream_of(block: Block, layer: QuantLinear, chain: Chain) -> nn.Module | None:
    """Returns a module of `block` whose input is what the output of `layer` is added to; None where there is none.

    Found by running the first batch: what comes after the layer, another module's input or the block's output, is
    exactly the sum. Models that normalize or scale the output first have no such module.
    """
    rows = chain.batches[0]
    read: list[list[tuple[nn.Module, Tensor]]] = [[], []]  # before the layer ran, and after
    outputs: list[Tensor] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        if (inputs or options) and isinstance(x := input_of(inputs, options), Tensor):
            read[bool(outputs)].append((module, x))

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output)

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in block.module.modules()]
    handles.append(layer.register_forward_hook(leave))
    try:
        with block.cast(), quantized_once(block.module):
            sums = [block(chain, rows)]
    finally:
        for handle in handles:
            handle.remove()
    if len(outputs) != 1:
        return None
    sums += [x for _, x in read[1]]
    calls = [module for module, _ in read[0]]
    shape = outputs[0].shape
    sums = [found for found in sums if found.shape == shape]
    streams = [(module, x) for module, x in reversed(read[0]) if x.shape == shape and calls.count(module) == 1]
    if not sums or not streams:
        return None
    begin = [_beginning(x) + _beginning(outputs[0]) for _, x in streams]
    # Which can be equal is seen at their beginnings, all at once: each comparison of its own waits for a GPU.
    alike = [torch.stack([(_beginning(found) == wanted).all() for found in sums]) for wanted in begin]
    for (module, x), may_be in zip(streams, torch.stack(alike).tolist(), strict=True):
        candidates = [found for found, same in zip(sums, may_be, strict=True) if same]
        if candidates and any(torch.equal(found, x + outputs[0]) for found in candidates):
            return module
    return None


def _beginning(x: Tensor) -> Tensor:
    return x.reshape(-1)[:COMPARED]

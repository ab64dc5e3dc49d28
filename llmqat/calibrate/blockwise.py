"""Block-wise training: each transformer block learns, from quantized inputs, to give its full-precision output.

One block at a time is raised to float32 and trained by gradient descent on the error of its output. The next block then
starts from what this one really computes. No graph of the whole model is ever built. So memory is that of the model,
one block with its optimizer, and the hidden states. Two ways of training:

- "weights": weights, log-scales, zero points, norms and biases, by AdamW (EfficientQAT's Block-AP);
- "rounding": log-scales, and each weight within half a step of its start, so that training chooses between rounding up
  and down. Both move by the sign of the gradient (AutoRound).

With `target="clean"` a block learns the output that full precision gives from inputs that no quantization has changed.
So it also learns to undo the errors of the blocks before it. The loss is the plain squared error. Dividing each token's
error by the size of its target was no better (SmolLM2-135M, int4 from the scale search: WikiText-2 KL 0.134 against
0.126). Training keeps the best state on the check set, the last token blocks of the text. There a block never ends
worse than it began.

Letters: N token blocks, L length, B token blocks in an iteration, D hidden size.
Source: EfficientQAT (2407.11062) section 3.2; AutoRound (2309.05516) equations 3 to 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from llmqat.calibrate.blocks import Block
from llmqat.calibrate.chains import Call, Chain
from llmqat.calibrate.config import BlockwiseStage
from llmqat.data.processes import ALONE, Processes
from llmqat.grid import of_each_weight
from llmqat.kernels.graphs import Recorder
from llmqat.layers import ActivationQuantizer, KVQuantizer, quantized_once
from llmqat.models import model_device, uploaded

FLOOR = 0.05
"""Share of the learning rate that is left at the end."""
CHECKS = 4
"""Times in a training that the error is measured on the check set."""
CHECK_BLOCKS = 8
"""Token blocks of the check set: the last of the text."""

GRAPH_CHECKS = 2
"""Iterations in which what a CUDA graph gives is compared: at the second one parameters have moved."""
GRAPH_TOLERANCE = 0.01
"""Share of its norm by which a gradient may differ: attention adds up some gradients in any order on a GPU."""

OnStep = Callable[[int, float], None]
"""Called after each iteration with its number and its loss."""


@dataclass(frozen=True)
class BlockTraining:
    """What training did to one block.

    Attributes:
        before: relative error of the block's output on the check set before training.
        after: and after it.
        iterations: done; fewer than asked for where nothing was gained any more.
    """

    before: float
    after: float
    iterations: int


def relative_error(output: Tensor, target: Tensor, size: Tensor | None = None) -> Tensor:
    """Returns |output - target|^2 / |target|^2, a float32 scalar; `output` gets gradients.

    Args:
        output: of a block.
        target: what it is to be.
        size: the denominator, where it is that of more than this target.
    """
    wide = target.float()
    size = wide.square().sum() if size is None else size
    return (output.float() - wide).square().sum() / size.clamp(min=1e-12)


class SignSGD(torch.optim.Optimizer):
    """Moves parameters by fixed steps against the sign of the gradient; weights move in their quantization steps.

    A group holds `lr`. For weights it also holds `steps` (distance of neighbouring levels at each weight) and `bounds`
    (low, high), tensors of the parameters' shapes. Without `steps` a parameter moves by `lr` itself.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """Takes parameter groups that each give `lr`, `steps` and `bounds` or None for both."""
        super().__init__(groups, {"lr": 0.0, "steps": None, "bounds": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                direction = parameter.grad.sign_()
                if group["steps"] is not None:
                    direction.mul_(group["steps"][number])
                parameter.add_(direction, alpha=-group["lr"])
                if group["bounds"] is not None:
                    low, high = group["bounds"][number]
                    torch.clamp(parameter, low, high, out=parameter)


def train_block(
    block: Block,
    inputs: Chain,
    targets: Chain,
    stage: BlockwiseStage,
    seed: int,
    on_step: OnStep = lambda *_: None,
    processes: Processes = ALONE,
) -> BlockTraining:
    """Trains `block` in place to give `targets` from `inputs`; its parameters must be float32.

    Parameters that something outside the block shares are not trained. Groups of weights that already were on the
    lattice of their scheme (grid/lattice.py) keep their codes and scales. A block with no other quantized weights, and
    without quantized activations, is not trained at all.

    Args:
        block: with its quantizers on.
        inputs: the quantized chain, which has reached the block.
        targets: a chain with the hidden states that the block should give.
        stage: iterations, batch size, learning rates and patience.
        seed: together with the block's number, seeds the order of token blocks.
        on_step: called after each iteration.
        processes: share the token blocks of each iteration, and end with the same block.

    Raises:
        FloatingPointError: the error of the block's output is NaN or infinite, before or during training.
    """
    parameters = list(block.own_parameters().values())
    trained_before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = _OPTIMIZERS[stage.trains](block, stage)
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + block.index)
    size = min(stage.batch_size, len(inputs))
    order = iter(_endless(inputs.units, -(-size // inputs.unit), generator))
    recorder = Recorder(GRAPH_CHECKS, GRAPH_TOLERANCE)
    before = best_error = _check(block, inputs, targets, size, processes)
    if not math.isfinite(before):
        raise FloatingPointError(
            f"{block.name} gives NaN or infinity before it is trained (relative error {before}), in "
            f"{_not_finite(block, inputs, targets)}; the source model, or what an earlier stage made of it, is damaged"
        )
    kept = _KeptCodes.of(block)
    best, done, stalled = _state(parameters), 0, 0
    interval = max(1, stage.iterations // CHECKS)
    for done in range(1, 0 if kept.is_whole else stage.iterations + 1):
        share = _rate(stage, done - 1)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        loss = _iteration(block, inputs, targets, next(order), optimizer, parameters, processes, recorder)
        kept.restore()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"block-wise training of {block.name} has no finite error in iteration {done} of {stage.iterations}, "
                f"in {_not_finite(block, inputs, targets)}; lower learning_rate and scale_learning_rate of the stage"
            )
        on_step(done, loss)
        if done % interval and done != stage.iterations:
            continue
        error = _check(block, inputs, targets, size, processes)
        stalled = 0 if error < best_error else stalled + 1
        if error < best_error:
            best_error, best = error, _state(parameters)
        if stalled >= stage.patience:
            break
    for parameter, value, trained in zip(parameters, best, trained_before, strict=True):
        parameter.data.copy_(value)
        parameter.grad = None
        parameter.requires_grad_(trained)
    return BlockTraining(before, best_error, done)


@dataclass
class _KeptCodes:
    """The entries of parameters that training must not change: weights, scales and zero points of lattice groups.

    Attributes:
        is_whole: whether nothing else in the block is quantized, neither other weights nor activations.
        parts: (parameter, bool mask of the entries that stay, copy of the parameter).
    """

    is_whole: bool
    parts: list[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, block: Block) -> _KeptCodes:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        layers = list(block.quantized().values())
        is_whole = not any(isinstance(m, (ActivationQuantizer, KVQuantizer)) for m in block.module.modules())
        for layer in layers:
            groups = layer.kept_groups()
            is_whole &= groups is not None and bool(groups.all())
            if groups is None:
                continue
            parts += [
                (parameter, groups, parameter.detach().clone())
                for parameter in (layer.log_scale, layer.zero_point)
                if isinstance(parameter, nn.Parameter)
            ]
            weight, which = layer.get_parameter("weight"), of_each_weight(groups, layer.rows, layer.columns)
            parts.append((weight, layer.restored(which), weight.detach().clone()))
        return cls(is_whole, parts)

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, which, values in self.parts:
            torch.where(which, values, parameter, out=parameter.data)


def _not_finite(block: Block, inputs: Chain, targets: Chain) -> str:
    """Returns what of a block holds NaN or infinity: a parameter, else the hidden states around it."""
    states = {"its input": inputs[:], "its target": targets[:]}
    found = [
        f"{block.name}.{name}" for name, value in block.module.named_parameters() if not bool(value.isfinite().all())
    ]
    found += [name for name, value in states.items() if not bool(value.isfinite().all())]
    return found[0] if found else "what it computes"


def _iteration(
    block: Block,
    inputs: Chain,
    targets: Chain,
    units: Tensor,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    processes: Processes,
    recorder: Recorder,
) -> float:
    """Takes a step on the token blocks of `units` together, of which each process does some; returns the loss."""
    device, own = model_device(block.module), inputs.parts(units[processes.rank :: processes.count])
    wanted = [uploaded(targets[rows], device) for rows in own]
    size = processes.add(sum((target.float().square().sum() for target in wanted), torch.zeros((), device=device)))
    loss = torch.zeros((), device=device)
    for rows, target in zip(own, wanted, strict=True):
        error, *gradients = _gradients(block, inputs.call(block, rows), target, size, parameters, recorder)
        loss = loss + error
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # What a graph gives is overwritten by the next part.
            before = parameter.grad
            parameter.grad = gradient if len(own) == 1 else gradient.clone() if before is None else before + gradient
    if processes.count > 1:
        for parameter in parameters:
            parameter.grad = processes.add(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(processes.add(loss))  # the one wait of an iteration: the first loss that is not finite ends training


def _gradients(
    block: Block, call: Call, target: Tensor, size: Tensor, parameters: list[nn.Parameter], recorder: Recorder
) -> tuple[Tensor, ...]:
    """Returns the error of a block's output for some token blocks, and its gradient by each of `parameters`.

    On a GPU the work is recorded as a CUDA graph where the block's arguments are tensors and plain values.
    """
    values, tree = tree_flatten(call)
    plain = tuple(None if isinstance(value, Tensor) else value for value in values)

    def run(target: Tensor, size: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        arguments = tree_unflatten([next(left) if isinstance(value, Tensor) else value for value in values], tree)
        with block.cast():  # here, since a graph must cast parameters as they are at its time
            error = relative_error(block.output(arguments), target, size)
            found = torch.autograd.grad(error, parameters, allow_unused=True, materialize_grads=True)
        return error.detach(), *found

    tensors = target, size, *(value for value in values if isinstance(value, Tensor))
    if not all(isinstance(value, (bool, int, float, str, type(None))) for value in plain):
        return run(*tensors)
    return recorder((str(tree), plain), run, *tensors)


@torch.no_grad()
def _check(block: Block, inputs: Chain, targets: Chain, size: int, processes: Processes) -> float:
    device = model_device(block.module)
    count = max(size, min(CHECK_BLOCKS, len(inputs)) // size * size)
    parts = inputs.last(count, size)
    errors = torch.zeros(len(parts), device=device)
    with block.cast(), quantized_once(block.module):
        for number in processes.share(range(len(parts))):
            rows = parts[number]
            errors[number] = relative_error(block(inputs, rows), uploaded(targets[rows], device))
    return float(processes.add(errors).mean())


def _state(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _rate(stage: BlockwiseStage, done: int) -> float:
    """Returns the share of the learning rate after `done` iterations: a cosine down to `FLOOR`; linear for signs."""
    progress = done / stage.iterations
    if stage.trains == "rounding":
        return 1.0 - progress
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _endless(count: int, batch_size: int, generator: torch.Generator) -> Iterable[Tensor]:
    """Yields the numbers of units, `batch_size` at a time, in a new order each time all have been seen."""
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def learning_rate(num_bits: int) -> float:
    """Returns the learning rate of weights where a stage gives none: coarser steps take more to cross."""
    return {2: 5e-4, 3: 2e-4}.get(num_bits, 1e-4)


def _all_parameters(block: Block, stage: BlockwiseStage) -> torch.optim.Optimizer:
    """Returns AdamW over weights, norms and biases, log-scales, zero points."""
    rates = {"log_scale": stage.scale_learning_rate, "zero_point": stage.zero_point_learning_rate}
    bits = {id(layer.weight): layer.weights.num_bits for layer in block.quantized().values()}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in block.own_parameters().items():
        own = stage.learning_rate if stage.learning_rate is not None else learning_rate(bits.get(id(parameter), 8))
        rate = rates.get(name.rpartition(".")[2], own)
        groups.setdefault(rate, []).append(parameter)
    fused = model_device(block.module).type in ("cpu", "cuda")
    return torch.optim.AdamW([{"params": p, "lr": lr} for lr, p in groups.items()], weight_decay=0.0, fused=fused)


def _rounding_only(block: Block, stage: BlockwiseStage) -> torch.optim.Optimizer:
    """Returns sign-SGD over weights, each within half a step, and log-scales."""
    modules = [layer for layer in block.quantized().values() if id(layer.weight) not in block.shared]
    weights, steps, bounds = [], [], []
    for module in modules:
        step = module.restored(module.step_sizes())
        weight = module.get_parameter("weight")
        weights.append(weight)
        steps.append(step)
        bounds.append((weight.detach() - 0.5 * step, weight.detach() + 0.5 * step))
    scales = [module.log_scale for module in modules if module.log_scale is not None]
    rate = 1.0 / stage.iterations
    return SignSGD([{"params": weights, "lr": rate, "steps": steps, "bounds": bounds}, {"params": scales, "lr": rate}])


_OPTIMIZERS: dict[str, Callable[[Block, BlockwiseStage], torch.optim.Optimizer]] = {
    "weights": _all_parameters,
    "rounding": _rounding_only,
}

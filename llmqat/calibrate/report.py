"""What quantization did to each layer: error of weights and of output, codes moved, clipping.

Measured against the original weights, which the calibration set aside, on inputs of the full-precision model. So it can
be taken after any stage, and after training as well.

Letters: O out features, I in features.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.calibrate.blocks import Block, find_blocks
from llmqat.calibrate.chains import Chain
from llmqat.calibrate.forward import input_of
from llmqat.calibrate.masters import Originals
from llmqat.calibrate.walk import Walk, open_walk
from llmqat.data.blocks import Rows
from llmqat.grid import quantize
from llmqat.kernels import WeightPages
from llmqat.layers import QuantLinear, QuantModule, quantizers_off
from llmqat.models import visiting

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one layer.

    Attributes:
        name: dotted name.
        scheme: label of its weights' scheme, 'int4 g64'.
        sqnr: signal to quantization noise of the weight, decibel: 10 log10(|W|^2 / |W - Ŵ|^2).
        output_error: E|x (W - Ŵ)^T|^2 / E|x W^T|^2, x the full-precision model's inputs; None without text, for
            stacked experts, whose inputs are not seen, and for layers that the text does not reach.
        moved: share of weights whose code is not the nearest to the original weight at the scale they have now.
        clip_ratio: reach of the grid over the largest original weight of a group, mean over groups; below 1 it clips.
    """

    name: str
    scheme: str
    sqnr: float
    output_error: float | None
    moved: float
    clip_ratio: float

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready form."""
        return asdict(self)


@torch.no_grad()
def report_layers(
    model: PreTrainedModel, originals: Originals, ids: Tensor | Rows | None, dtype: torch.dtype = torch.bfloat16
) -> list[LayerReport]:
    """Returns what quantization did to each quantized weight of the blocks of `model`, in order.

    Args:
        model: prepared; as a stage, or training, has left it.
        originals: the weights before.
        ids: token blocks [N, L] for the output error; None leaves it out, and so does a model that cannot be walked.
        dtype: what the forward computes in.
    """
    found: list[LayerReport] = []
    walk = None if ids is None else _walk(model, ids, dtype)
    if walk is None:
        for name, module in find_blocks(model).items():
            block = Block(0, name, module)
            found += _reports(block, originals.of(block), {})
        return found
    with walk:
        for block in walk.blocks:
            weights = originals.of(block)
            with visiting(block.module):
                errors = _output_errors(block, originals, weights, walk.full)
                found += _reports(block, weights, errors)
            WeightPages().let_go((*block.module.parameters(), *block.module.buffers(), *weights.values()))
    return found


def _walk(model: PreTrainedModel, ids: Tensor | Rows, dtype: torch.dtype) -> Walk | None:
    """Returns the walk that gives the layers their inputs; logs a warning and returns None where none can be opened."""
    try:
        return open_walk(model, ids, len(ids), dtype=dtype)
    except ValueError as error:
        log.warning("the errors of layers' outputs are not measured: %s", error)
        return None


def _reports(block: Block, weights: dict[str, Tensor], errors: dict[str, float]) -> list[LayerReport]:
    found = []
    for full, layer in block.quantized().items():
        name = full.removeprefix(f"{block.name}.")
        original = _as_matrix(weights[f"{name}.weight"], layer).float().to(layer.weight.device)
        scale, zero_point = layer.scale_and_zero_point()
        noise = (original - layer.quantized_matrix(torch.float32)).square().sum()
        nearest = quantize(original, scale, zero_point, layer.grid)
        found.append(
            LayerReport(
                name=full,
                scheme=layer.weights.label,
                sqnr=10 * math.log10(float(original.square().sum()) / max(float(noise), 1e-30)),
                output_error=errors.get(name),
                moved=float((nearest != layer.codes()).float().mean()),
                clip_ratio=_clip_ratio(original, scale, layer),
            )
        )
    return found


def _clip_ratio(original: Tensor, scale: Tensor, layer: QuantModule) -> float:
    groups = original.reshape(scale.numel(), -1)
    size = scale.reshape(-1).abs()
    low, high = layer.grid.qmin + layer.grid.offset, layer.grid.qmax + layer.grid.offset
    if layer.grid.symmetric:
        reach, largest = max(-low, high) * size, groups.abs().amax(-1)
    else:  # the whole range, and 0 is in it
        reach, largest = (high - low) * size, groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    return float((reach / largest.clamp(min=1e-12)).mean())


def _output_errors(block: Block, originals: Originals, weights: dict[str, Tensor], chain: Chain) -> dict[str, float]:
    """Returns the output error of each linear layer by name in the block; takes `chain` past the block."""
    layers = {name: module for name, module in block.module.named_modules() if isinstance(module, QuantLinear)}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in layers}
    pairs = {
        name: (
            layer.quantized_matrix(block.dtype),
            _as_matrix(weights[f"{name}.weight"], layer).to(layer.weight.device, block.dtype),
        )
        for name, layer in layers.items()
    }

    def hook(name: str) -> Callable[..., None]:
        def measure(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            quantized, original = pairs[name]
            x = input_of(inputs, options)
            x = x.reshape(-1, x.shape[-1]).to(original.dtype)
            wanted = x @ original.t()
            error = (x @ (original.float() - quantized.float()).to(x.dtype).t()).float().square().sum()
            sums[name] += torch.tensor([float(error), float(wanted.float().square().sum())], dtype=torch.float64)

        return measure

    with ExitStack() as stack:
        stack.enter_context(originals.in_place(block))
        stack.enter_context(quantizers_off(block.module))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        block.run(chain, chain)
    return {name: float(error / size) for name, (error, size) in sums.items() if size > 0}


def _as_matrix(weight: Tensor, layer: QuantModule) -> Tensor:
    """Returns an original weight as [O, I], as `QuantModule.matrix` sees its own."""
    weight = weight.mT if layer.transposed else weight
    return weight.reshape(-1, weight.shape[-1])

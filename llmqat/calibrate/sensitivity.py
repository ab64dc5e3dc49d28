"""Which layers need their bits: what each scheme would cost each layer, and the best assignment under a budget.

The divergence that a change of weights causes is, to second order, KL = 1/2 ΔW^T F ΔW, with F the Fisher information of
the model's own predictions: the second moment of the gradient of log p(y) with y drawn from the model. Rounding errors
of different weights are nearly independent, so the diagonal of F does: one backward pass for each of a few token
blocks, squared and added up. Then every layer and every candidate scheme costs one rounding and one sum, no forward.

The assignment is a knapsack with one choice a layer, solved exactly by dynamic programming over bits.

Letters: N token blocks, L length, O out features, I in features, C candidate schemes.
Source: Fisher information for quantization, SqueezeLLM (2306.07629) section 4.1; labels drawn from the model, Kunstner
et al. (1905.12558) section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmqat.calibrate.forward import Wrap, check_seen
from llmqat.data.blocks import Rows, rows_of
from llmqat.grid import fake_quantize, keep_lattice, search_scale
from llmqat.layers import Override, QuantConfig, QuantModule, WeightConfig, prepare, quantizers_off
from llmqat.layers.prepare import overridden
from llmqat.metrics import Predictor, predictor_of
from llmqat.models import capture_hidden, cast_parameters, model_device

MAX_CELLS = 2_000_000
"""Budget steps of the dynamic programme; sizes are rounded up to units so coarse that no more are needed."""
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class LayerSensitivity:
    """What candidate schemes would cost a layer.

    Attributes:
        name: dotted name.
        weights: number of weights.
        cost: bits -> predicted KL from full precision a token, nats, of quantizing this layer alone.
    """

    name: str
    weights: int
    cost: dict[int, float]


@dataclass(frozen=True)
class Allocation:
    """An assignment of bits to layers.

    Attributes:
        target_bits: the budget, bits a weight on average; scales not counted.
        average_bits: what the assignment takes.
        predicted_kl: sum of the chosen costs, nats a token.
        bits: layer name -> bits.
    """

    target_bits: float
    average_bits: float
    predicted_kl: float
    bits: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready form."""
        return asdict(self)

    def applied_to(self, quant: QuantConfig) -> QuantConfig:
        """Returns `quant` with an override of `num_bits` for every layer whose bits are not the scheme's own."""
        changed = {
            name: Override(weights=quant.weights.model_copy(update={"num_bits": bits}))
            for name, bits in self.bits.items()
            if bits != quant.weights.num_bits
        }
        return quant.model_copy(update={"overrides": {**quant.overrides, **changed}})


def check_choices(quant: QuantConfig, choices: Sequence[int]) -> None:
    """Raises where the weights of a scheme cannot have each of `choices` of bits.

    Raises:
        ValueError: names the scheme, the bits and the way out.
    """
    weights = quant.weights
    if weights.levels != "integer":
        raise ValueError(
            f"bits are chosen for each layer among {', '.join(map(str, choices))}, and quant.weights is "
            f"{weights.label}, which has no others; give a scheme of integers, such as preset int4, or no target"
        )


def measure_sensitivity(
    model: nn.Module,
    quant: QuantConfig,
    choices: Sequence[int],
    ids: Tensor | Rows,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    wrap: Wrap = iter,
) -> list[LayerSensitivity]:
    """Prepares `model` in place and returns what `choices` of bits would cost each layer under the default scheme.

    Layers under an override keep what it says, and are left out.

    Args:
        model: a full-precision causal language model; its weights are not changed.
        quant: says which layers, and the scheme but for its bits.
        choices: bits to choose among.
        ids: token ids [N, L], or token blocks with their documents.
        seed: of the labels that the model draws.
        dtype: what forwards compute in.
        wrap: put around the iteration over token blocks, for a progress bar.

    Raises:
        ValueError: when there is no token block, no layer to choose for, or the scheme has no other bits.
    """
    if len(ids) == 0:
        raise ValueError("sensitivity got no token block; give it at least one")
    check_choices(quant, choices)
    own = overridden(model, quant)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    ends_named = {name for name, module in model.named_modules() if any(module is end for end in ends)}
    prepare(model, quant)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantModule) and module.weights == quant.weights and name not in own | ends_named
    }
    if not layers:
        raise ValueError("no layer has the scheme of quant.weights, so there is none to choose bits for")
    information = fisher_diagonal(model, layers, ids, seed=seed, dtype=dtype, wrap=wrap)
    return [
        LayerSensitivity(name, layer.rows * layer.columns, _costs(layer, information.pop(name), quant.weights, choices))
        for name, layer in layers.items()
    ]


def fisher_diagonal(
    model: nn.Module,
    layers: Mapping[str, QuantModule],
    ids: Tensor | Rows,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    wrap: Wrap = iter,
) -> dict[str, Tensor]:
    """Returns for each layer the diagonal of the Fisher information a token, [O, I] float32.

    Args:
        model: prepared; runs with its quantizers off.
        layers: by name.
        ids: token ids [N, L], or token blocks with their documents.
        seed: of the labels drawn from the model's own distribution.
        dtype: what forwards compute in.
        wrap: put around the iteration over token blocks.

    Raises:
        ValueError: when the text does not reach a layer.
    """
    rows, device = rows_of(ids), model_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    found = {name: torch.zeros(layer.rows, layer.columns, device=device) for name, layer in layers.items()}
    seen = dict.fromkeys(layers, False)
    wanted = {id(layer.weight) for layer in layers.values()}
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(id(parameter) in wanted)
        stack.enter_context(quantizers_off(model))
        for index in wrap(range(len(rows))):
            with cast_parameters(model, dtype), capture_hidden(model) as captured:
                model(**rows[index : index + 1].inputs(device), use_cache=False)
                hidden = captured.take()[0]
                hidden.backward(_label_gradient(hidden.detach(), predictor_of(model).detached(), generator))
            for name, layer in layers.items():
                if layer.weight.grad is None:  # an expert that no token chose
                    continue
                seen[name] = True
                gradient = layer.weight.grad.mT if layer.transposed else layer.weight.grad
                found[name] += gradient.reshape(found[name].shape).float().square()
                layer.weight.grad = None
    check_seen(seen)
    return {name: total.div_(rows.stored.numel()) for name, total in found.items()}


def _label_gradient(hidden: Tensor, predictor: Predictor, generator: torch.Generator) -> Tensor:
    """Returns the gradient of sum_t log p(y_t) with respect to hidden states [L, D], y_t drawn from p."""
    gradient = torch.empty_like(hidden)
    for start in range(0, hidden.shape[0], CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        leaf = hidden[rows].clone().requires_grad_()
        log_probs = F.log_softmax(predictor.logits(leaf).float(), dim=-1)
        labels = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        (gradient[rows],) = torch.autograd.grad(log_probs.gather(-1, labels).sum(), leaf)
    return gradient


@torch.no_grad()
def _costs(layer: QuantModule, information: Tensor, weights: WeightConfig, choices: Sequence[int]) -> dict[int, float]:
    original, dense = layer.matrix().float(), layer.dense_matrix().float()
    importance = information.sum(0)
    costs = {}
    for bits in choices:
        grid = weights.model_copy(update={"num_bits": bits}).grid
        found = search_scale(original, grid, layer.scale_shape, importance)
        scale, zero_point, _ = keep_lattice(original, grid, *found)
        error = fake_quantize(original, scale, zero_point, grid) - dense
        costs[bits] = 0.5 * float((information * error.square()).sum(dtype=torch.float64))
    return costs


def allocate_bits(layers: Sequence[LayerSensitivity], target_bits: float) -> Allocation:
    """Returns the assignment with the least total cost whose average is `target_bits` a weight at most.

    Exact where the sizes of layers have a common divisor that leaves at most `MAX_CELLS` steps of budget, as those of
    real models do; else sizes are rounded up, and the budget is kept but may not be used up, by less than one unit a
    layer.

    Raises:
        ValueError: when the budget is below the smallest choice of every layer.
    """
    choices = sorted(layers[0].cost)
    total = sum(layer.weights for layer in layers)
    smallest = choices[0]
    if target_bits < smallest:
        raise ValueError(f"target_bits={target_bits} is below the smallest choice of {smallest}; choose at least that")
    # Steps of budget above the smallest choice for all: a layer takes (bits - smallest) * weights / unit of them.
    unit = math.gcd(*(layer.weights for layer in layers))
    spare = (target_bits - smallest) * total
    unit = max(unit, math.ceil(spare / MAX_CELLS))
    most = sum(math.ceil(layer.weights / unit) for layer in layers) * (choices[-1] - smallest)
    budget = min(int(spare / unit + 1e-9), most)
    best = np.zeros(budget + 1)
    taken = []
    for layer in layers:
        options = np.full((len(choices), budget + 1), np.inf)
        for number, bits in enumerate(choices):
            steps = (bits - smallest) * math.ceil(layer.weights / unit)
            if steps <= budget:
                options[number, steps:] = best[: budget + 1 - steps] + layer.cost[bits]
        taken.append(options.argmin(0).astype(np.uint8))
        best = options.min(0)
    left, chosen = budget, {}
    for layer, options in zip(reversed(layers), reversed(taken), strict=True):
        bits = choices[options[left]]
        chosen[layer.name] = bits
        left -= (bits - smallest) * math.ceil(layer.weights / unit)
    bits_of = {layer.name: chosen[layer.name] for layer in layers}
    return Allocation(
        target_bits=target_bits,
        average_bits=sum(bits_of[layer.name] * layer.weights for layer in layers) / total,
        predicted_kl=sum(layer.cost[bits_of[layer.name]] for layer in layers),
        bits=bits_of,
    )

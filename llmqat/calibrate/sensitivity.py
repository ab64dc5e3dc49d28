"""Which layers need their bits: what each scheme would cost each layer, and the best assignment under a budget.

The divergence that a change of weights causes is, to second order, KL = 1/2 ΔW^T F ΔW, with F the Fisher information of
the model's own predictions: the second moment of the gradient of log p(y) with y drawn from the model. Rounding errors
of different weights are nearly independent, so the diagonal of F does: one backward pass for each of a few token
blocks, squared and added up (fisher.py). Then every layer and every candidate scheme costs one rounding and one sum.

Candidates are bits of one scheme, or schemes by name, such as nvfp4 and fp8. Named ones may quantize inputs, which
costs as well: 1/2 E[sum_i (d log p / d x_i)^2 (x̂_i - x_i)^2], over the tokens of the text. For bits, whose inputs are
alike, this is left out.

The assignment is a knapsack with one choice a layer, solved exactly by dynamic programming over bits.

Letters: N token blocks, L length, O out features, I in features, C candidate schemes.
Source: Fisher information for quantization, SqueezeLLM (2306.07629) section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmqat.calibrate.fisher import fisher_diagonals
from llmqat.calibrate.forward import Wrap, input_of
from llmqat.data.blocks import Rows, rows_of
from llmqat.grid import fake_quantize, keep_lattice, search_scale
from llmqat.layers import (
    ActivationQuantizer,
    LayerScheme,
    Override,
    QuantConfig,
    QuantLinear,
    QuantModule,
    WeightConfig,
    prepare,
    stored_bytes,
)
from llmqat.layers.prepare import overridden

Choice = int | str
"""Bits of the weights, or the name of a scheme."""

MAX_CELLS = 2_000_000
"""Budget steps of the dynamic programme; sizes are rounded up to units so coarse that no more are needed."""


@dataclass(frozen=True)
class LayerSensitivity:
    """What candidate schemes would cost a layer.

    Attributes:
        name: dotted name.
        weights: number of weights.
        cost: choice -> predicted KL from full precision a token, nats, of quantizing this layer alone.
        bits_per_weight: choice -> bits a weight in the checkpoint, scales counted; None where choices are bits.
    """

    name: str
    weights: int
    cost: dict[Choice, float]
    bits_per_weight: dict[Choice, float] | None = None

    def size(self, choice: Choice) -> int:
        """Returns the bits that the layer takes, which count against the budget."""
        return round(self.weights * (float(choice) if self.bits_per_weight is None else self.bits_per_weight[choice]))


@dataclass(frozen=True)
class Allocation:
    """An assignment of bits to layers.

    Attributes:
        target_bits: the budget, bits a weight on average; scales count where choices are names of schemes.
        average_bits: what the assignment takes.
        predicted_kl: sum of the chosen costs, nats a token.
        bits: layer name -> its choice, bits or the name of a scheme.
    """

    target_bits: float
    average_bits: float
    predicted_kl: float
    bits: dict[str, Choice]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready form."""
        return asdict(self)

    def applied_to(self, quant: QuantConfig) -> QuantConfig:
        """Returns `quant` with an override for every layer whose choice is not the scheme's own."""
        own = scheme_of_layers(quant)
        schemes = schemes_of(quant, sorted(set(self.bits.values()), key=str))
        changed = {}
        for name, choice in self.bits.items():
            if (scheme := schemes[choice]) != own:
                inputs = "default" if scheme.input_activations == own.input_activations else scheme.input_activations
                changed[name] = Override(weights=scheme.weights, input_activations=inputs)
        return quant.model_copy(update={"overrides": {**quant.overrides, **changed}})


def scheme_of_layers(quant: QuantConfig) -> LayerScheme:
    """Returns what layers without an override get."""
    return LayerScheme(weights=quant.weights, input_activations=quant.input_activations)


def schemes_of(quant: QuantConfig, choices: Sequence[Choice]) -> dict[Choice, LayerScheme]:
    """Returns what each of `choices` gives a layer: bits change the default scheme, and names are presets.

    Raises:
        ValueError: bits for a scheme that has no others, a name that is no scheme of layers; with the way out.
    """
    weights, found = quant.weights, dict[Choice, LayerScheme]()
    for choice in choices:
        if isinstance(choice, str):
            found[choice] = _named_scheme(choice, weights)
        elif weights.levels != "integer":
            raise ValueError(
                f"bits are chosen for each layer among {', '.join(map(str, choices))}, and quant.weights is "
                f"{weights.label}, which has no others; give a scheme of integers, such as preset int4, or name "
                "schemes to choose among, such as allocate.choices=[nvfp4, fp8]"
            )
        else:
            changed = weights.model_copy(update={"num_bits": choice})
            found[choice] = LayerScheme(weights=changed, input_activations=quant.input_activations)
    return found


def _named_scheme(choice: str, own: WeightConfig) -> LayerScheme:
    """Returns the scheme of layers that a name stands for; `own` is that of layers that are not chosen for."""
    named = QuantConfig.preset(choice)
    scheme, plain = scheme_of_layers(named), QuantConfig()
    fields = set(QuantConfig.model_fields) - set(LayerScheme.model_fields)
    more = {key for key in fields if getattr(named, key) != getattr(plain, key)}
    if more:
        raise ValueError(
            f"allocate.choices: {choice} also says {', '.join(sorted(more))}, which is not a layer's; name the scheme "
            "of its weights and inputs there, and give the rest in quant"
        )
    for label, weights in ((choice, scheme.weights), ("quant", own)):
        if weights.sparsity is not None:
            raise ValueError(
                f"allocate.choices: {label} has weights that stay zero, and what these cost is not predicted; leave "
                "sparsity out where schemes are chosen by layer"
            )
    if scheme.weights.strategy == "block":
        raise ValueError(
            f"allocate.choices: {choice} has one scale for a block, and what that costs is not predicted; choose among "
            "schemes with scales of rows or groups, such as fp8"
        )
    return scheme


def with_choices(quant: QuantConfig, choices: Sequence[Choice]) -> QuantConfig:
    """Returns `quant` with overrides for no layer that have all of `choices`, for checks of the schemes of a model.

    Raises:
        ValueError: as `schemes_of`.
    """
    schemes = schemes_of(quant, choices).items()
    entries = {f"allocate.choices {choice}": Override(**dict(scheme)) for choice, scheme in schemes}
    return quant.model_copy(update={"overrides": {**quant.overrides, **entries}})


def possible_schemes(quant: QuantConfig, choices: Sequence[Choice]) -> list[QuantConfig]:
    """Returns `quant` with the scheme that each of `choices` gives its layers.

    Raises:
        ValueError: as `schemes_of`.
    """
    return [quant.model_copy(update=dict(scheme)) for scheme in schemes_of(quant, choices).values()]


def sizes_of(schemes: Mapping[Choice, LayerScheme], rows: int, columns: int, name: str) -> dict[Choice, float] | None:
    """Returns the bits a weight of a matrix [rows, columns] by each scheme, scales counted; None where these are bits.

    Raises:
        ValueError: the groups of a scheme do not fit the layer `name`.
    """
    if not all(isinstance(choice, str) for choice in schemes):
        return None
    return {
        choice: 8 * stored_bytes(scheme.weights, rows, columns, name) / (rows * columns)
        for choice, scheme in schemes.items()
    }


def measure_sensitivity(
    model: nn.Module,
    quant: QuantConfig,
    choices: Sequence[Choice],
    ids: Tensor | Rows,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    hidden_memory: float = 4.0,
    wrap: Wrap = iter,
) -> list[LayerSensitivity]:
    """Prepares `model` in place and returns what each of `choices` would cost each layer under the default scheme.

    Layers under an override keep what it says, and are left out.

    Args:
        model: a full-precision causal language model; its weights are not changed.
        quant: says which layers, and the scheme but for its bits.
        choices: bits to choose among, or names of schemes.
        ids: token ids [N, L], or token blocks with their documents.
        seed: of the labels that the model draws.
        dtype: what forwards compute in.
        hidden_memory: gigabytes of hidden states and gradients kept in memory; above that they lie in temporary files.
        wrap: put around the iteration over transformer blocks, for a progress bar.

    Raises:
        ValueError: when there is no token block, no layer to choose for, or the scheme has no other bits; or as
            `fisher_diagonals`.
    """
    rows = rows_of(ids)
    if len(rows) == 0:
        raise ValueError("sensitivity got no token block; give it at least one")
    schemes = schemes_of(quant, choices)
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
    sizes = {name: sizes_of(schemes, layer.rows, layer.columns, name) for name, layer in layers.items()}
    noise = InputNoise(layers, {} if None in sizes.values() else schemes, rows.stored.numel())
    with closing(
        fisher_diagonals(
            *(model, layers, rows),
            seed=seed,
            dtype=dtype,
            memory_limit=hidden_memory * 1e9,
            wrap=wrap,
            watch=noise.watch,
        )
    ) as diagonals:
        costs = {name: _costs(layers[name], information, schemes) for name, information in diagonals}
    return [
        LayerSensitivity(
            name,
            layer.rows * layer.columns,
            {choice: of_weights + noise.cost(name, choice) for choice, of_weights in costs[name].items()},
            sizes[name],
        )
        for name, layer in layers.items()
    ]


class InputNoise:
    """What quantized inputs cost: 1/2 sum_i (d log p / d x_i)^2 (x̂_i - x_i)^2, added up over tokens and features."""

    def __init__(self, layers: Mapping[str, QuantModule], schemes: Mapping[Choice, LayerScheme], tokens: int) -> None:
        """Makes a quantizer for each layer and each scheme that quantizes inputs.

        Args:
            layers: by name. Experts that are stacked as one matrix have no quantized inputs.
            schemes: candidates.
            tokens: of the text.
        """
        self.tokens = tokens
        self.layers = {name: layer for name, layer in layers.items() if isinstance(layer, QuantLinear)}
        self._total: dict[tuple[str, Choice], Tensor] = {}
        self._quantizers: dict[str, dict[Choice, ActivationQuantizer]] = {}
        inputs = {choice: config for choice, scheme in schemes.items() if (config := scheme.input_activations)}
        for name in self.layers if inputs else ():
            self._quantizers[name] = {choice: ActivationQuantizer(one, name=name) for choice, one in inputs.items()}

    def cost(self, name: str, choice: Choice) -> float:
        """Returns the cost a token, nats."""
        total = self._total.get((name, choice))
        return 0.0 if total is None else 0.5 * float(total) / self.tokens

    def watch(self, stack: ExitStack) -> None:
        """Watches the inputs and their gradients until `stack` is left."""
        for name in self._quantizers:
            hook = partial(self._enter, name)
            stack.callback(self.layers[name].register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _enter(
        self, name: str, layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Gives the layer a view of its input, since layers that read the same tensor have gradients of their own."""
        x = input_of(inputs, options)
        if not x.numel():  # an expert that no token chose
            return inputs, options
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        own.register_hook(partial(self._add, name, x.detach()))
        if inputs:
            return (own, *inputs[1:]), options
        return (), {**options, next(iter(options)): own}

    @torch.no_grad()
    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        weight = gradient.float().square()
        for choice, quantizer in self._quantizers[name].items():
            if any(one.device != x.device for one in quantizer.found()):
                quantizer.to(x.device)  # where the layer is, or visits
            if any(bool(one.isnan().any()) for one in quantizer.found()):  # as large as the first block
                quantizer.set_range(*torch.stack(torch.aminmax(x)).tolist())
            added = (weight * (quantizer(x) - x).float().square()).sum(dtype=torch.float64)
            key = name, choice
            self._total[key] = self._total[key] + added if key in self._total else added


@torch.no_grad()
def _costs(layer: QuantModule, information: Tensor, schemes: Mapping[Choice, LayerScheme]) -> dict[Choice, float]:
    original, dense = layer.matrix().float(), layer.dense_matrix().float()
    importance = information.sum(0)
    costs: dict[Choice, float] = {}
    for choice, scheme in schemes.items():
        grid, shape = scheme.weights.grid, scheme.weights.scale_shape(layer.rows, layer.columns)
        found = search_scale(original, grid, shape, importance)
        scale, zero_point, _ = keep_lattice(original, grid, *found)
        error = fake_quantize(original, scale, zero_point, grid) - dense
        costs[choice] = 0.5 * float((information * error.square()).sum(dtype=torch.float64))
    return costs


def check_budget(layers: Sequence[LayerSensitivity], target_bits: float) -> None:
    """Raises ValueError when `target_bits` a weight are fewer than the smallest choice of every layer takes."""
    choices = sorted(layers[0].cost, key=layers[0].size)
    total = sum(layer.weights for layer in layers)
    smallest = sum(min(map(layer.size, choices)) for layer in layers)
    if target_bits * total < smallest * (1 - 1e-9):
        least = choices[0] if layers[0].bits_per_weight is None else f"{smallest / total:.4g} ({choices[0]})"
        raise ValueError(f"target_bits={target_bits} is below the smallest choice of {least}; choose at least that")


def allocate_bits(layers: Sequence[LayerSensitivity], target_bits: float) -> Allocation:
    """Returns the assignment with the least total cost whose average is `target_bits` a weight at most.

    Exact where the sizes of layers have a common divisor that leaves at most `MAX_CELLS` steps of budget, as those of
    most models have; else sizes are rounded up, and the budget is kept but may not be used up, by less than one unit a
    layer.

    Raises:
        ValueError: when the budget is below the smallest choice of every layer.
    """
    check_budget(layers, target_bits)
    choices = sorted(layers[0].cost, key=layers[0].size)
    sizes = [[layer.size(choice) for choice in choices] for layer in layers]
    total, smallest = sum(layer.weights for layer in layers), [min(of_layer) for of_layer in sizes]
    # Steps of budget above the smallest choice of each layer: a choice takes its further bits / unit of them.
    further = [[size - least for size in of_layer] for of_layer, least in zip(sizes, smallest, strict=True)]
    spare = target_bits * total - sum(smallest)
    unit = max(math.gcd(*(bits for of_layer in further for bits in of_layer)) or 1, math.ceil(spare / MAX_CELLS))
    steps = [[-(-bits // unit) for bits in of_layer] for of_layer in further]
    budget = min(int(spare / unit + 1e-9), sum(map(max, steps)))
    best = np.zeros(budget + 1)
    taken = []
    for layer, of_layer in zip(layers, steps, strict=True):
        options = np.full((len(choices), budget + 1), np.inf)
        for number, (choice, step) in enumerate(zip(choices, of_layer, strict=True)):
            if step <= budget:
                options[number, step:] = best[: budget + 1 - step] + layer.cost[choice]
        taken.append(options.argmin(0).astype(np.uint8))
        best = options.min(0)
    left, chosen = budget, {}
    for layer, of_layer, options in zip(reversed(layers), reversed(steps), reversed(taken), strict=True):
        number = int(options[left])
        chosen[layer.name] = choices[number]
        left -= of_layer[number]
    bits_of = {layer.name: chosen[layer.name] for layer in layers}
    return Allocation(
        target_bits=target_bits,
        average_bits=sum(layer.size(bits_of[layer.name]) for layer in layers) / total,
        predicted_kl=sum(layer.cost[bits_of[layer.name]] for layer in layers),
        bits=bits_of,
    )

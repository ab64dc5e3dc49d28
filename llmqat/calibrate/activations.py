"""Static ranges of layer inputs, from observers over token blocks.

    minmax          the smallest and largest entry seen
    moving_average  of each batch's smallest and largest entry, the newest weighing a tenth
    percentile      the range that leaves a given share of entries outside, from a histogram
    mse             the clip ratio of the full range with the least squared error, from the same histogram

The histogram needs the full range first, so the last two pass over the text twice. Layers that read the same tensor
(q, k and v) see the same entries and end with equal ranges, and so are quantized once.

Source: Jacob et al. (1712.05877) section 3.1 for the moving average.

Letters: N blocks, L length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmqat.calibrate.forward import Wrap, check_finite, check_seen, observe_inputs
from llmqat.data.blocks import Rows
from llmqat.layers import ActivationConfig, ActivationQuantizer, QuantLinear, StateQuantizer
from llmqat.layers.activation import range_parameters, row_codes, row_values

MOMENTUM = 0.1
"""Weight of the newest batch in a moving average."""
BINS = 2048
CLIP_RATIOS = tuple(1.0 - 0.01 * step for step in range(70))

Range = tuple[float, float]
"""The smallest and the largest entry; of keys and values with a scale a head, lists of them."""


def calibrate_activations(model: nn.Module, blocks: Tensor | Rows, batch_size: int = 4, wrap: Wrap = iter) -> int:
    """Sets every static activation range of `model` in place, from token `blocks` [N, L]; returns their number.

    These are the ranges of layer inputs, and of keys and values in floating-point formats.

    Args:
        model: a prepared causal language model; runs with its quantizers off.
        blocks: token ids [N, L], or token blocks with their documents.
        batch_size: blocks per forward.
        wrap: put around the iteration over batches, for a progress bar.

    Raises:
        ValueError: when there is no block, a layer saw no input, or an activation is not finite.
    """
    layers: dict[str, nn.Module] = {**static_layers(model), **static_caches(model)}
    if not layers:
        return 0
    ranges = _full_ranges(model, layers, blocks, batch_size, wrap)
    binned = {name: layer for name, layer in layers.items() if _config(layer).observer in ("percentile", "mse")}
    if binned:
        counts = _histograms(model, binned, ranges, blocks, batch_size, wrap)
        ranges |= {name: _from_histogram(_config(layer), ranges[name], counts[name]) for name, layer in binned.items()}
    for name, layer in layers.items():
        quantizer = layer.input_quantizer if isinstance(layer, QuantLinear) else layer
        assert isinstance(quantizer, (ActivationQuantizer, StateQuantizer))
        quantizer.set_range(*ranges[name])
    return len(layers)


def static_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Returns the linear layers of `model` whose input has a static range or NVFP4's global scale, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and module.input_quantizer is not None and _config(module).calibrated
    }


def static_caches(model: nn.Module) -> dict[str, StateQuantizer]:
    """Returns what quantizes keys or values of `model` with a scale that calibration finds, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, StateQuantizer)}
    return {name: module for name, module in found.items() if module.scale is not None}


def _config(layer: nn.Module) -> ActivationConfig:
    """Returns the scheme of a layer's inputs; keys and values are observed as such inputs by default are."""
    if not isinstance(layer, QuantLinear):
        return ActivationConfig(dynamic=False)
    assert layer.input_quantizer is not None
    return layer.input_quantizer.config


def _full_ranges(
    model: nn.Module, layers: dict[str, nn.Module], blocks: Tensor | Rows, batch_size: int, wrap: Wrap
) -> dict[str, Range]:
    kept: dict[str, Tensor] = {}  # [2] or [2, H] float64: the ends stay on the device until the text is at its end

    def record(name: str, x: Tensor) -> None:
        layer = layers[name]
        by_head = isinstance(layer, StateQuantizer) and layer.config.strategy == "attn_head"
        new = torch.stack(torch.aminmax(x.transpose(0, 1).flatten(1), dim=1) if by_head else torch.aminmax(x)).double()
        if name not in kept:
            kept[name] = new
            return
        old = kept[name]
        if _config(layers[name]).observer == "moving_average":
            kept[name] = old + MOMENTUM * (new - old)
        else:
            kept[name] = torch.stack([torch.minimum(new[0], old[0]), torch.maximum(new[1], old[1])])

    observe_inputs(model, layers, record, blocks, batch_size, wrap)
    check_seen({name: name in kept for name in layers})
    check_finite({name: bool(ends.isfinite().all()) for name, ends in kept.items()})
    return {name: tuple(ends.tolist()) for name, ends in kept.items()}


def _histograms(
    model: nn.Module,
    layers: dict[str, nn.Module],
    ranges: dict[str, Range],
    blocks: Tensor | Rows,
    batch_size: int,
    wrap: Wrap,
) -> dict[str, Tensor]:
    counts: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        new = torch.histc(x.float(), BINS, *ranges[name]).double()
        counts[name] = counts[name].add_(new) if name in counts else new

    observe_inputs(model, layers, record, blocks, batch_size, wrap)
    return {name: counts[name].cpu() for name in layers}


def _from_histogram(config: ActivationConfig, full: Range, counts: Tensor) -> Range:
    """Returns the range that the observer chooses, given the full range and the counts [BINS] in it."""
    low, high = full
    width = (high - low) / BINS
    centres = low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)
    if config.observer == "percentile":
        return _percentile(config, centres, counts, width)
    best, least = full, float("inf")
    for ratio in CLIP_RATIOS:
        scale, zero_point = range_parameters(
            torch.tensor(low * ratio).double(), torch.tensor(high * ratio).double(), config.grid
        )
        rounded = row_values(row_codes(centres, scale, zero_point, config.grid), scale, zero_point)
        error = float(torch.dot((rounded - centres).square(), counts))
        if error < least:
            best, least = (low * ratio, high * ratio), error
    return best


def _percentile(config: ActivationConfig, centres: Tensor, counts: Tensor, width: float) -> Range:
    outside = float(counts.sum()) * (1 - config.percentile / 100)
    if config.symmetric:
        order = centres.abs().argsort()
        inside = counts[order].cumsum(0) <= float(counts.sum()) - outside
        reach = float(centres.abs()[order][inside].max()) + width / 2 if bool(inside.any()) else width / 2
        return -reach, reach
    from_below, from_above = counts.cumsum(0), counts.flip(0).cumsum(0).flip(0)
    kept = centres[(from_below > outside / 2) & (from_above > outside / 2)]
    return float(kept.min()) - width / 2, float(kept.max()) + width / 2

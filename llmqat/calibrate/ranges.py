"""Setting every weight's starting scale: plain range, percentile, least squared error, or that weighted by E[x^2].

The search is hundreds of elementwise passes over slices that fit a core's cache; splitting each of them over cores
costs more than it gives. So on a CPU the layers are spread over threads, and each thread computes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmqat.data.processes import ALONE, Processes
from llmqat.grid import keep_lattice, minmax_scale, most_important, percentile_scale, search_scale
from llmqat.kernels import WeightPages
from llmqat.layers import QuantLinear, QuantModule
from llmqat.models import visited_device, visiting

METHODS = ("minmax", "percentile", "mse", "weighted_mse")
"""Ways to set a scale."""


@torch.no_grad()
def calibrate_ranges(
    model: nn.Module,
    method: str,
    moments: Mapping[str, Tensor] | None = None,
    wrap: Callable[[Iterable[str]], Iterable[str]] = iter,
    percentile: float = 99.9,
    processes: Processes = ALONE,
) -> None:
    """Sets the starting scale (and zero point) of every quantized weight of `model`, in place.

    Groups that already lie on the lattice of their scheme get its scale, whatever the method. Where the scheme has
    sparsity and moments are used, the zero weights are chosen first, by |w| times the rms of the input.

    Args:
        model: a prepared model.
        method: a name in `METHODS`.
        moments: layer name -> E[x^2] [I], from `collect_moments`; "weighted_mse" needs those of linear layers, and
            takes equal weights for embeddings and experts that have none.
        wrap: put around the iteration over layer names, for a progress bar.
        percentile: share of a group's weights inside the range, in percent; only for "percentile".
        processes: share the layers; all get the scales of all of them.

    Raises:
        ValueError: for an unknown method, or moments missing for a linear layer.
    """
    if method not in METHODS:
        raise ValueError(f"calibrate.method={method!r} is unknown; choose {', '.join(METHODS[:-1])} or {METHODS[-1]}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    if not layers:
        raise ValueError("the model has no QuantLinear to calibrate; call llmqat.prepare(model, config) first")
    known = {} if moments is None or method != "weighted_mse" else moments
    missing = [name for name, layer in layers.items() if isinstance(layer, QuantLinear) and name not in known]
    if method == "weighted_mse" and missing:
        raise ValueError(f"method weighted_mse needs E[x^2] of {missing[0]}; run collect_moments on this model first")

    device = visited_device(model)

    @torch.no_grad()
    def start(name: str) -> tuple[Tensor, Tensor | None]:
        home = layers[name].weight.device
        with visiting(layers[name], device):
            scale, zero_point = _start(layers[name], method, known.get(name), percentile)
        return scale.to(home), None if zero_point is None else zero_point.to(home)

    on_cpu = all(layer.weight.device.type == "cpu" for layer in layers.values())
    names, pages = list(layers), WeightPages(model)
    workers = torch.get_num_threads() if on_cpu and device is None else 1
    with _one_thread_an_operation(), ThreadPoolExecutor(workers) as pool:
        own = processes.share(names)
        for name, found in zip(wrap(own), pool.map(start, own), strict=True):
            layers[name].set_scale(*found)
            pages.let_go([layers[name].weight])
    for index, layer in enumerate(layers.values()):
        processes.copy(quantizer_tensors(layer), processes.owner(index))


def quantizer_tensors(layer: QuantModule) -> list[Tensor]:
    """Returns what holds the scale and zero point of a layer, and which of its weights are zero."""
    held = (layer.initial_scale, layer.clip_ratio, layer.log_scale, layer.zero_point, layer.nonzero)
    return [tensor for tensor in held if tensor is not None]


def _start(layer: QuantModule, method: str, moments: Tensor | None, percentile: float) -> tuple[Tensor, Tensor | None]:
    """Returns scale and zero point of a layer by a method, and chooses the zero weights where there are moments [I]."""
    if moments is not None:
        rms = moments.to(layer.weight.device).sqrt()
        layer.choose_zeros(lambda keep, of: most_important(layer.dense_matrix().abs() * rms, keep, of))
    weight, grid, shape = layer.as_groups(layer.matrix()), layer.grid, layer.kept_shape
    if method == "minmax":
        found = minmax_scale(weight, grid, shape)
    elif method == "percentile":
        found = percentile_scale(weight, grid, shape, percentile)
    else:
        found = search_scale(weight, grid, shape, None if moments is None else layer.importance_of_groups(moments))
    return keep_lattice(weight, grid, *found)[:2]


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """Inside, torch runs each operation on the thread that called it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

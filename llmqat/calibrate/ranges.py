"""Setting every layer's starting scale: plain range, least squared error, or that error weighted by E[x^2].

The search is hundreds of elementwise passes over slices that fit a core's cache; splitting each of them over cores
costs more than it gives. So on a CPU the layers are spread over threads, and each thread computes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmqat.grid import minmax_scale, search_scale
from llmqat.layers import QuantLinear


@torch.no_grad()
def calibrate_ranges(
    model: nn.Module,
    method: str,
    moments: Mapping[str, Tensor] | None = None,
    wrap: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Sets the starting scale (and zero point) of every QuantLinear of `model`, in place.

    Args:
        model: a prepared model.
        method: "minmax", "mse" or "weighted_mse".
        moments: layer name -> E[x^2] [I], from `collect_moments`; needed by "weighted_mse".
        wrap: put around the iteration over layer names, for a progress bar.

    Raises:
        ValueError: for an unknown method, or moments missing for a layer.
    """
    if method not in ("minmax", "mse", "weighted_mse"):
        raise ValueError(f"calibrate.method={method!r} is unknown; choose minmax, mse or weighted_mse")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError("the model has no QuantLinear to calibrate; call llmqat.prepare(model, config) first")
    missing = [name for name in layers if moments is None or name not in moments]
    if method == "weighted_mse" and missing:
        raise ValueError(f"method weighted_mse needs E[x^2] of {missing[0]}; run collect_moments on this model first")

    @torch.no_grad()
    def start(name: str) -> tuple[Tensor, Tensor | None]:
        layer = layers[name]
        shape = (layer.log_scale.shape[0], layer.log_scale.shape[1])
        if method == "minmax":
            return minmax_scale(layer.weight, layer.grid, shape)
        importance = moments[name] if moments is not None and method == "weighted_mse" else None
        return search_scale(layer.weight, layer.grid, shape, importance)

    on_cpu = all(layer.weight.device.type == "cpu" for layer in layers.values())
    workers = torch.get_num_threads() if on_cpu else 1
    with _one_thread_an_operation(), ThreadPoolExecutor(workers) as pool:
        for name, found in zip(wrap(list(layers)), pool.map(start, layers), strict=True):
            layers[name].set_scale(*found)


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """Inside, torch runs each operation on the thread that called it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

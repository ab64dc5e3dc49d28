"""Setting every layer's starting scale: plain range, least squared error, or that error weighted by E[x^2]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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
    for name in wrap(list(layers)):
        layer = layers[name]
        shape = (layer.log_scale.shape[0], layer.log_scale.shape[1])
        if method == "minmax":
            layer.set_scale(*minmax_scale(layer.weight, layer.grid, shape))
            continue
        importance = None
        if method == "weighted_mse":
            if moments is None or name not in moments:
                raise ValueError(f"method weighted_mse needs E[x^2] of {name}; run collect_moments on this model first")
            importance = moments[name]
        layer.set_scale(*search_scale(layer.weight, layer.grid, shape, importance))

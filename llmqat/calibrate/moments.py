"""E[x^2] of every input feature of every quantized linear, in one streaming pass over token blocks.

Nothing is stored but one float64 sum per input feature: a forward pre-hook on each layer squares what comes in, adds
it up, and lets it go. The pass runs with quantizers off, so the moments are the full-precision model's.

Letters: N blocks, L length, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.layers import QuantLinear, quantizers_off
from llmqat.models import capture_hidden


@torch.no_grad()
def collect_moments(
    model: nn.Module,
    blocks: Tensor,
    batch_size: int = 4,
    wrap: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> dict[str, Tensor]:
    """Returns, for each QuantLinear of `model`, the mean square of each input feature: name -> [I] float32.

    Args:
        model: a prepared causal language model.
        blocks: [N, L] token ids.
        batch_size: blocks per forward.
        wrap: put around the iteration over batches, for a progress bar.

    Raises:
        ValueError: when there is no block, a layer saw no input, or an activation is not finite.
    """
    if blocks.shape[0] == 0:
        raise ValueError("calibration got no token block; give it at least one")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError("the model has no QuantLinear to calibrate; call llmqat.prepare(model, config) first")
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            sums[name] += x.square().sum(0).cpu()
            counts[name] += x.shape[0]

        return hook

    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        stack.enter_context(quantizers_off(model))
        captured = stack.enter_context(capture_hidden(model))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(record(name)).remove)
        device = next(model.parameters()).device
        for batch in wrap(blocks.split(batch_size)):
            model(input_ids=batch.to(device), use_cache=False)
            captured.take()
    _check(sums, counts)
    return {name: (total / counts[name]).float() for name, total in sums.items()}


def _check(sums: dict[str, Tensor], counts: dict[str, int]) -> None:
    unseen = [name for name, count in counts.items() if not count]
    if unseen:
        raise ValueError(f"calibration reached no input of {', '.join(unseen[:3])}…; is the layer used in the forward?")
    broken = [name for name, total in sums.items() if not bool(torch.isfinite(total).all())]
    if broken:
        raise ValueError(
            f"the input of {broken[0]} holds NaN or infinity during calibration ({len(broken)} layers in all); "
            "check the model in float32 before quantizing it"
        )

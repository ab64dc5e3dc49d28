"""The full-precision passes over token blocks that calibration takes: quantizers off, no gradients, no logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.data.blocks import Rows, rows_of
from llmqat.data.processes import ALONE, Processes
from llmqat.kernels import float_products, weights_let_go
from llmqat.layers import StateQuantizer, quantizers_off
from llmqat.models import capture_hidden, model_device

Wrap = Callable[[Iterable[int]], Iterable[int]]
"""Put around the iteration over batches, for a progress bar."""


@torch.no_grad()
def observe_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    record: Callable[[str, Tensor], None],
    blocks: Tensor | Rows,
    batch_size: int,
    wrap: Wrap = iter,
    after_batch: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> None:
    """Runs `model` over token `blocks` [N, L], its quantizers off, and shows `record` each input of `layers`.

    Args:
        model: a causal language model.
        layers: modules by name; the first input of each, by position or keyword, is recorded.
        record: called with the name and the input [tokens, features]; with keys and values [B, H, L, D] as they are.
        blocks: token ids [N, L], or token blocks with their documents.
        batch_size: blocks per forward.
        wrap: put around the iteration over batches.
        after_batch: called after each forward.
        processes: share the batches; each records its own.

    Raises:
        ValueError: when there is no block.
    """
    rows = rows_of(blocks)
    if len(rows) == 0:
        raise ValueError("calibration got no token block; give it at least one")

    def hook(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            x = input_of(inputs, options).detach()
            if x.numel():  # an expert that no token chose may be called with none
                record(name, x if isinstance(module, StateQuantizer) else x.reshape(-1, x.shape[-1]))

        return observe

    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        stack.enter_context(quantizers_off(model))
        stack.enter_context(weights_let_go(model))
        stack.enter_context(float_products())
        captured = stack.enter_context(capture_hidden(model))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        device = model_device(model)
        for start in wrap(processes.share(range(0, len(rows), batch_size))):
            model(**rows[start : start + batch_size].inputs(device), use_cache=False)
            captured.take()
            after_batch()


def input_of(inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor:
    """Returns what a layer was called with, by position or by keyword."""
    found: Tensor = inputs[0] if inputs else next(iter(options.values()))
    return found


def check_seen(seen: Mapping[str, bool]) -> None:
    """Raises ValueError where a layer got no input during calibration; `seen` says so by layer name."""
    unseen = [name for name, reached in seen.items() if not reached]
    if unseen:
        others = f" and {len(unseen) - 3} more layers" if len(unseen) > 3 else ""
        raise ValueError(
            f"calibration reached no input of {', '.join(unseen[:3])}{others}: this text does not use them; give more "
            "text, leave them alone with quant.ignore, or use a method that looks at weights alone (ranges by mse)"
        )


def check_finite(finite: Mapping[str, bool]) -> None:
    """Raises ValueError where the inputs of a layer were not finite; `finite` says so by layer name."""
    broken = [name for name, fine in finite.items() if not fine]
    if broken:
        raise ValueError(
            f"the input of {broken[0]} holds NaN or infinity during calibration ({len(broken)} layers in all); "
            "check the model in float32 before quantizing it"
        )

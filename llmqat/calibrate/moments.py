"""E[x^2] of every input feature of every quantized linear, in one streaming pass over token blocks.

Nothing is stored but one float64 sum per input feature: a forward pre-hook on each layer squares what comes in, adds
it up where it lies, and lets it go, so that a GPU is not waited for before the text ends. The pass runs with quantizers
off, so the moments are the full-precision model's.

Letters: N blocks, L length, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmqat.calibrate.forward import Wrap, check_finite, check_seen, observe_inputs
from llmqat.data.blocks import Rows
from llmqat.data.processes import ALONE, Processes
from llmqat.layers import KVQuantizer, QuantLinear, QuantModule
from llmqat.models import visited_device


def collect_moments(
    model: nn.Module,
    blocks: Tensor | Rows,
    batch_size: int = 4,
    wrap: Wrap = iter,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Returns, for each QuantLinear of `model`, the mean square of each input feature: name -> [I] float32.

    Args:
        model: a prepared causal language model.
        blocks: token ids [N, L], or token blocks with their documents.
        batch_size: blocks per forward.
        wrap: put around the iteration over batches, for a progress bar.
        processes: share the batches; all get the moments of all of them.

    Raises:
        ValueError: when there is no block, a layer saw no input, or an activation is not finite.
    """
    if not any(isinstance(module, (QuantModule, KVQuantizer)) for module in model.modules()):
        raise ValueError("the model has no QuantLinear to calibrate; call llmqat.prepare(model, config) first")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    # Allocated before the pass: small lasting tensors among its large short-lived ones would fragment the heap.
    found = {
        name: torch.zeros(layer.in_features, dtype=torch.float64, device=visited_device(model) or layer.weight.device)
        for name, layer in layers.items()
    }
    counts = {name: torch.zeros((), dtype=torch.int64) for name in layers}

    def record(name: str, x: Tensor) -> None:
        found[name] += x.float().square().sum(0)
        counts[name] += x.shape[0]

    observe_inputs(model, layers, record, blocks, batch_size, wrap, processes=processes)
    sums = {name: total.cpu() for name, total in found.items()}
    for total in (*sums.values(), *counts.values()):
        processes.add(total)
    check_seen({name: bool(count > 0) for name, count in counts.items()})
    check_finite({name: bool(torch.isfinite(total).all()) for name, total in sums.items()})
    return {name: (total / counts[name]).float() for name, total in sums.items()}

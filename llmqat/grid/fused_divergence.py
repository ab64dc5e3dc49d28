"""The KL divergence of a chunk of logits and its gradient as one kernel, made by torch.compile on GPUs.

Eager, they are a dozen passes over float32 tensors of the logits' shape [T, V], which on a GPU take longer than the
products with the output head of a small model. On a CPU blocks of rows stay in the cache, and the compiled kernel is
1.3 times as fast, which does not pay for 24 seconds of compiling (2 AMD cores, V = 49,152). So it is compiled on GPUs,
inside `fusing()`, and used after a trial. It was never run on a GPU.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.grid.fused import compiled_after_trial, is_fusing

Divergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits [T, V], the teacher's [T, V], weights [T, 1]) -> (KL [T] float32, gradient [T, V] in the logits' dtype)."""

DEVICES = ("cuda",)
_TRIAL_SHAPE = (67, 1031)
_TOLERANCE = 1e-3
"""Share of its norm by which what is compiled may differ: sums are taken in another order."""


def divergence_and_gradient(logits: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns KL(p || q) [T] float32 and weight (q - p) [T, V] in the dtype of `logits`, by eager passes.

    Args:
        logits: [T, V], of which q is the softmax.
        teacher: logits [T, V], of which p is the softmax.
        weights: [T, 1] float32.
    """
    log_q, log_p = (F.log_softmax(one.float(), -1) for one in (logits, teacher))
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), ((log_q.exp() - p) * weights).to(logits.dtype)


def fused_divergence(logits: Tensor) -> Divergence | None:
    """Returns what gives `divergence_and_gradient` in one kernel for `logits`; None where there is no such kernel."""
    if not is_fusing() or logits.device.type not in DEVICES:
        return None
    return _tried(logits.dtype, logits.device.type)


@functools.cache
def _tried(dtype: torch.dtype, device: str) -> Divergence | None:
    generator = torch.Generator().manual_seed(0)
    logits, noise = (torch.randn(_TRIAL_SHAPE, generator=generator) for _ in range(2))
    weights = torch.rand(len(logits), 1, generator=generator).to(device)
    tensors = logits.to(device, dtype), (logits + noise).to(device, dtype), weights

    def agree(compiled: Divergence) -> bool:
        pairs = zip(compiled(*tensors), divergence_and_gradient(*tensors), strict=True)
        return all((own.float() - other.float()).norm() <= _TOLERANCE * other.float().norm() for own, other in pairs)

    found = compiled_after_trial([divergence_and_gradient], agree, "the KL divergence")
    return None if found is None else found[0]

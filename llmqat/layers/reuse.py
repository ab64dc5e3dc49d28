"""One quantized weight for all micro-batches of an optimizer step, and for the recomputation of checkpointed layers.

The weight does not move between the micro-batches that an optimizer step accumulates, so it is quantized once. The
gradients with respect to the quantized weight add up in float32, and the quantizer's backward, which is linear in them,
runs once, in the backward of the last micro-batch: that is where parameters get their gradients, so DDP sees what it
expects. What is held for it is one weight in the compute dtype and one gradient in float32; the latter takes the place
of the master's own, which comes only in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class ReusedWeight:
    """The quantized weight of an optimizer step, and the gradient that micro-batches have left for it.

    Attributes:
        last: whether the micro-batch is the last of the optimizer step.
        gradient: float32, of the quantized weight, summed over the micro-batches so far.
    """

    def __init__(self) -> None:
        self.last = False
        self.gradient: Tensor | None = None
        self._made: Tensor | None = None
        self._key: Hashable = None
        self._anchor = torch.zeros((), requires_grad=True)

    def read(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Returns the weight, made by `make` at the first call, with a gradient that waits for the last micro-batch.

        Raises:
            RuntimeError: when what the weight depends on (`key`) changes between micro-batches.
        """
        if self._made is None:
            # Identity hooks replace those of gradient checkpointing, which would drop what the quantizer saves.
            with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
                self._key, self._made = key, make()
        elif key != self._key:
            raise RuntimeError(f"the quantized weight changed within an optimizer step: {self._key} became {key}")
        if not self._made.requires_grad:
            return self._made
        if self.last:
            return _WithEarlier.apply(self._made, self)  # type: ignore[no-untyped-call]
        return _Waiting.apply(self._anchor, self._made.detach(), self)  # type: ignore[no-untyped-call]

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient of a micro-batch."""
        if self.gradient is None:
            self.gradient = gradient.to(torch.float32, copy=True)
        else:
            self.gradient += gradient

    def finish(self) -> None:
        """Runs the backward that is still due if the last micro-batch did not use the layer, and drops the weight."""
        if self.gradient is not None and self._made is not None:
            self._made.backward(self.gradient.to(self._made.dtype))
        self.gradient = self._made = None


def _itself(saved: Tensor) -> Tensor:
    return saved


class _Waiting(torch.autograd.Function):
    """The weight as a leaf; its gradient is kept."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weight: Tensor, reused: ReusedWeight) -> Tensor:
        ctx.reused = reused
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.reused.add(grads[0])
        return None, None, None


class _WithEarlier(torch.autograd.Function):
    """The weight; its gradient goes on to what it was made of, together with that of earlier micro-batches."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, reused: ReusedWeight) -> Tensor:
        ctx.reused = reused
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        reused: ReusedWeight = ctx.reused
        if reused.gradient is None:
            return grads[0], None
        total = reused.gradient.add_(grads[0]).to(grads[0].dtype)
        reused.gradient = None
        return total, None

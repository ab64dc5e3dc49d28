"""QuantModule: a master weight that is fake-quantized at every forward; linear layers, embeddings, experts share it.

The master weight stays a parameter, shared with the module it came from. What the forward computes with is
`quantized_weight`: the number that evaluation and the packed file also hold. Where its scale comes from:
- learned: initial_scale * exp(log_scale), snapped to bfloat16, so a step of log_scale is a relative one; an asymmetric
  grid also learns its zero point, in codes;
- fixed: initial_scale, as calibration left it;
- dynamic: the range of the weight as it is, times `clip_ratio`, anew at each forward.
All of its state is in the state dict.

A weight is seen as a matrix [O, I] whose rows are output features, whatever its own layout: transposed in
transformers' Conv1D and in gpt-oss' experts, three-dimensional in experts.

Letters: O rows (output features, vocabulary entries, experts times output features), I in features, G scales per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmqat.grid import (
    Grid,
    fake_quantize,
    gradient_factor,
    keep_lattice,
    minmax_scale,
    most_important,
    of_all_rows,
    of_each_weight,
    on_lattice,
    quantize,
    round_zero_point,
    scale_from_log,
    snap_scale,
)
from llmqat.layers.config import WeightConfig
from llmqat.layers.kept import dtypes_kept
from llmqat.layers.reuse import ReusedWeight

QUANTIZER_PARAMETERS = ("weight", "log_scale", "zero_point")
"""Parameters of a QuantModule that stay float32 masters; the quantizer makes the numbers of the checkpoint of them."""

SCALES = ("log_scale", "initial_scale", "clip_ratio", "zero_point")
"""What a QuantModule holds in float32, whatever the dtype of the model."""


class Adapter(Protocol):
    """What is added to a master weight inside its quantizer."""

    def adapted(self, weight: Tensor) -> Tensor:
        """Returns the weight plus what the adapter adds, float32; the weight itself where the adapter is inactive."""
        ...

    def factors(self) -> Iterator[nn.Parameter]:
        """Yields the parameters it is made of."""
        ...

    def is_folded(self) -> bool:
        """Returns whether the weight holds already what the adapter adds; unfolds it where it is switched off."""
        ...

    def state(self) -> tuple[Any, ...]:
        """Returns what `adapted` depends on besides the parameters; hashable."""
        ...


class QuantModule(nn.Module):
    """A fake-quantized weight.

    Attributes:
        weight: master weight, float32 where it trains; [O, I] or the layout of the module it came from.
        log_scale: [O, G] float32 parameter theta, 0 at the start; None unless scales are learned. With one scale for
            a block of rows it is [ceil(O / block), G].
        initial_scale: of its shape, float32 buffer, signed; None when scales are dynamic.
        clip_ratio: of its shape, float32 buffer, signed; only when scales are dynamic.
        zero_point: [O, G] float32 in codes, or None: a parameter when learned (rounded in the forward), else a buffer.
        nonzero: [O, I] bool buffer, which weights are not held at zero; None without sparsity.
        weights: the scheme.
        transposed: the weight's last two dimensions are [I, O].
        enabled: False makes the forward use the master weight.
        adapters: what adds LoRA to the master weight (lora.py), or nothing.
        strength: share of the quantized weight in the forward, below 1 only during the warm-up of training.
        recognized: number of groups that already were codes times a scale when the module was made. The scale starts so
            that they keep their codes.
        compute_dtype: dtype of the forward where no float input says it (token ids, code that reads the weight). None
            means the master's own.
    """

    weight: Tensor
    log_scale: Tensor | None
    zero_point: Tensor | None
    initial_scale: Tensor | None
    clip_ratio: Tensor | None
    nonzero: Tensor | None

    def __init__(self, weight: Tensor, weights: WeightConfig, name: str = "", transposed: bool = False) -> None:
        """Takes over `weight` (shared, not copied); the scale starts at plain rounding's.

        Raises:
            ValueError: when the group size does not divide I, or a scale would not be finite.
        """
        super().__init__()
        self.weights, self.transposed = weights, transposed
        self.enabled, self.strength = True, 1.0
        self.compute_dtype: torch.dtype | None = None
        self.adapters: tuple[Adapter, ...] = ()  # in a tuple no module of theirs becomes one of this module's
        self._kept: dict[Any, Tensor] | None = None
        self._reused: ReusedWeight | None = None
        self.weight = weight
        self.register_buffer("nonzero", None)
        self.rows, self.columns = self.dense_matrix().shape
        self.scale_shape = weights.scale_shape(self.rows, self.columns, name or "the layer")
        self.kept_shape = weights.stored_shape(self.rows, self.columns, name or "the layer")
        if weight.dim() == 3 and self.rows // len(weight) % weights.block:
            raise ValueError(
                f"{name or 'the layer'}: blocks of {weights.block} rows do not divide the {self.rows // len(weight)} "
                f"of an expert; give it one scale a channel with quant.overrides['{name}']={{num_bits: 8, "
                "levels: float, strategy: channel}"
            )
        self.choose_zeros()
        matrix = self.matrix()
        learned, dynamic = weights.scales == "learned", weights.scales == "dynamic"
        theta = nn.Parameter(torch.zeros(self.kept_shape, device=weight.device)) if learned else None
        self.register_parameter("log_scale", theta)
        plain = self._plain_range(matrix)
        scale, zero_point = (None, None) if dynamic else plain
        self.recognized = 0
        if scale is not None and not scale.is_meta and not bool(torch.isfinite(scale).all()):
            raise ValueError(
                f"{name or 'the layer'} has weights beyond what a scale can stand for (NaN, infinity, or the end of "
                f"bfloat16's range); leave it out with quant.ignore, or check where its weights come from"
            )
        self.register_buffer("initial_scale", scale)
        self.register_buffer("clip_ratio", torch.ones(self.kept_shape, device=weight.device) if dynamic else None)
        if learned and zero_point is not None:
            self.zero_point = nn.Parameter(zero_point)
        else:
            self.register_buffer("zero_point", zero_point)
        if not matrix.is_meta:
            found, zeros, self.recognized = keep_lattice(self.as_groups(matrix), self.grid, *plain)
            if self.recognized:
                self.set_scale(found, zeros)

    @property
    def grid(self) -> Grid:
        """The code range."""
        return self.weights.grid

    @property
    def _gradient_factor(self) -> float:
        return gradient_factor(self.rows * self.columns // (self.kept_shape[0] * self.kept_shape[1]), self.grid)

    def parameter(self) -> Tensor:
        """Returns the master weight as peft's parametrization, if there is one, gives it."""
        own = self._parameters.get("weight")
        return self.weight if own is None else own

    def master(self) -> Tensor:
        """Returns the master weight in its own layout, adapters included, differentiable.

        Raises:
            RuntimeError: when peft put an adapter on it that has not been adopted, and works in low precision.
        """
        weight = self.parameter()
        if self.adapters:
            for adapter in self.adapters:
                weight = adapter.adapted(weight)
            return weight
        if "parametrizations" in self._modules and (
            weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
        ):
            raise RuntimeError(
                "under autocast, or on weights that are not float32, peft makes LoRA's product in low precision, of "
                "which other codes come than from the merged weight; call llmqat.adopt_adapters(model) once "
                "(QATTrainer and llmqat.load_adapter do)"
            )
        return weight

    def matrix(self) -> Tensor:
        """Returns what is quantized, [O, I]: the master weight, adapters included, with the zeros of its sparsity.

        Differentiable.
        """
        dense = self.dense_matrix()
        return dense if self.nonzero is None else dense * self.nonzero

    def dense_matrix(self) -> Tensor:
        """Returns the master weight, adapters included, as [O, I], differentiable."""
        weight = self.master()
        weight = weight.mT if self.transposed else weight
        return weight.reshape(-1, weight.shape[-1])

    def base(self) -> Tensor:
        """Returns the master weight without adapters, in float32 and its own layout."""
        return self.weight.float()

    def put_base(self, weight: Tensor) -> Tensor:
        """Makes `weight`, in its own layout, the master weight; returns the one before."""
        before, self.weight.data = self.weight.data, weight
        return before

    def put_back(self, before: Tensor) -> None:
        """Undoes `put_base`, which returned `before`."""
        self.weight.data = before

    @torch.no_grad()
    def choose_zeros(self, choose: Callable[[int, int], Tensor] | None = None) -> None:
        """Chooses which weights are zero from now on, where the scheme has sparsity.

        For 'unstructured' sparsity without a share, the zeros are those that the weights had when the module was made.

        Args:
            choose: takes (n, m), returns which n of every m weights of a row stay, bool [O, I]. By default the largest.
        """
        if self.weights.sparsity is None:
            return
        counts = self.weights.sparsity.kept_of(self.columns)
        if counts is not None:
            self.nonzero = most_important(self.dense_matrix().abs(), *counts) if choose is None else choose(*counts)
        elif self.nonzero is None:
            self.nonzero = self.dense_matrix() != 0

    def scale(self) -> Tensor:
        """Returns the scale [O, G] of the forward: float32, on the bfloat16 grid, differentiable in log_scale."""
        return self.scale_and_zero_point()[0]

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor | None]:
        """Returns scale and zero point [O, G] of the forward, differentiable in what is learned."""
        if self.clip_ratio is not None:
            return self._dynamic_range(self.clip_ratio)
        assert self.initial_scale is not None
        if self.log_scale is None:
            return self.of_rows(snap_scale(self.initial_scale, self.grid)), self.zero_point
        scale = self.of_rows(scale_from_log(self.initial_scale, self.log_scale, self._gradient_factor, self.grid))
        if self.zero_point is None:
            return scale, None
        return scale, round_zero_point(self.zero_point, self.grid, self._gradient_factor)

    @torch.no_grad()
    def set_scale(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Makes `scale` (and `zero_point`) the starting point: log_scale returns to 0.

        A dynamic scale keeps the ratio of `scale` to the weight's range now, and makes its zero point of it.

        Args:
            scale: of `kept_shape`.
            zero_point: of its shape, or None.

        Raises:
            ValueError: when a shape differs, a value is not finite, or a zero point is missing or not wanted.
        """
        if scale.shape != self.kept_shape or not bool(torch.isfinite(scale).all()):
            raise ValueError(f"scale must be finite of shape {tuple(self.kept_shape)}, got {tuple(scale.shape)}")
        if (zero_point is None) != self.grid.symmetric:
            raise ValueError("a zero point belongs to an asymmetric scheme and only to it")
        if self.clip_ratio is not None:
            self.clip_ratio.copy_(scale / self._plain_range(self.matrix())[0])
            return
        assert self.initial_scale is not None
        self.initial_scale.copy_(scale)
        if self.log_scale is not None:
            self.log_scale.zero_()
        if zero_point is not None and self.zero_point is not None:
            self.zero_point.copy_(zero_point)

    def quantized_weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight of the forward in `dtype` and the master's layout; differentiable in what is trained."""
        holder = self._reused if torch.is_grad_enabled() else self._kept
        if holder is None:
            return self._made(dtype)
        key = dtype, self.enabled, self.strength, *(adapter.state() for adapter in self.adapters)
        if isinstance(holder, ReusedWeight):
            return holder.read(key, lambda: self._made(dtype))
        if key not in holder:
            holder.clear()
            holder[key] = self._made(dtype)
        return holder[key]

    def _made(self, dtype: torch.dtype) -> Tensor:
        if not self.enabled:
            return self.master().to(dtype)
        quantized = self.restored(self.quantized_matrix(dtype))
        if self.strength == 1.0:
            return quantized
        return torch.lerp(self.master().to(dtype), quantized, self.strength)

    def quantized_matrix(self, dtype: torch.dtype) -> Tensor:
        """Returns the quantized weight as [O, I] in `dtype`, whatever is switched off or warming up."""
        return self.quantized_rows(self.matrix(), None, dtype)

    def quantized_rows(self, rows: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Returns rows of the matrix [n, I] fake-quantized; `index` [n] says which, None means all."""
        scale, zero_point = self.scale_and_zero_point()
        if index is not None and scale.shape[0] > 1:
            scale, zero_point = scale[index], None if zero_point is None else zero_point[index]
        return fake_quantize(rows, scale, zero_point, self.grid, dtype)

    @torch.no_grad()
    def step_sizes(self) -> Tensor:
        """Returns how far apart the levels of each weight lie where it is, [O, I] float32: of integers |scale|."""
        size = of_each_weight(self.scale_and_zero_point()[0].abs(), self.rows, self.columns)
        return size * self.grid.spacing(self.matrix().float() / size)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Returns the codes [O, I] of the forward's weight."""
        return quantize(self.matrix(), *self.scale_and_zero_point(), self.grid)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        with dtypes_kept(self, SCALES):
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def kept_groups(self) -> Tensor | None:
        """Returns which groups still have the codes that they had before quantization, bool of the scale's shape.

        None where the weight lay on no lattice when the module was made.
        """
        if not self.recognized:
            return None
        return on_lattice(self.matrix(), *self.scale_and_zero_point(), self.grid)

    def extra_repr(self) -> str:
        """Returns the line that print(model) shows."""
        return f"{'×'.join(map(str, self.parameter().shape))}, weights={self.weights.label}"

    def restored(self, matrix: Tensor) -> Tensor:
        """Returns a matrix [O, I] in the layout of the master weight."""
        shape = self.parameter().shape
        if not self.transposed:
            return matrix.view(shape)
        return matrix.view(*shape[:-2], shape[-1], shape[-2]).mT

    def of_rows(self, kept: Tensor) -> Tensor:
        """Returns what is kept for each scale, [*kept_shape], as [O, G] where the rows of a block share a scale."""
        return of_all_rows(kept, self.weights.block, self.rows)

    def as_groups(self, matrix: Tensor) -> Tensor:
        """Returns a matrix [O, I] with the weights of each kept scale side by side: [*kept_shape[0], *], or as it is.

        A block's rows follow one another; rows of zeros fill the last block.
        """
        if self.weights.block == 1:
            return matrix
        (rows, groups), block = self.kept_shape, self.weights.block
        padded = F.pad(matrix, (0, 0, 0, rows * block - self.rows))
        return padded.view(rows, block, groups, block).transpose(1, 2).reshape(rows, -1)

    def importance_of_groups(self, importance: Tensor) -> Tensor:
        """Returns the importance of input features [I] as that of the columns of `as_groups`."""
        block = self.weights.block
        if block == 1:
            return importance
        return importance.view(-1, 1, block).expand(-1, block, -1).reshape(-1)

    def _plain_range(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns scale and zero point [*kept_shape] of plain rounding of a matrix [O, I]."""
        return minmax_scale(self.as_groups(matrix), self.grid, self.kept_shape)

    def _dynamic_range(self, ratio: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, zero_point = self._plain_range(self.matrix())
        clipped = snap_scale(scale * ratio, self.grid)
        if zero_point is None:
            return self.of_rows(clipped), None
        low = self.matrix().detach().reshape(clipped.numel(), -1).amin(-1).clamp(max=0).view(clipped.shape)
        return clipped, torch.round(-low.float() * ratio / clipped).clamp_(self.grid.qmin, self.grid.qmax)


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Inside, every quantizer of `model` (weights, inputs, KV cache) lets its input through."""
    switched = [module for module in model.modules() if isinstance(getattr(module, "enabled", None), bool)]
    before = [module.enabled for module in switched]
    try:
        for module in switched:
            module.enabled = False  # type: ignore[assignment]
        yield
    finally:
        for module, enabled in zip(switched, before, strict=True):
            module.enabled = enabled


@contextmanager
def at_least_bits(model: nn.Module, num_bits: int | None) -> Iterator[None]:
    """Inside, weights of fewer bits than `num_bits` are rounded to integers of so many; None changes nothing.

    Scales suit one grid only: they are to be found anew inside, and again after it.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantModule)]
    before = [layer.weights for layer in layers]
    try:
        for layer in layers:
            if num_bits is not None and layer.weights.num_bits < num_bits:
                integers = {"num_bits": num_bits, "levels": "integer", "scale_dtype": "bfloat16"}
                layer.weights = layer.weights.model_copy(update=integers)
        yield
    finally:
        for layer, weights in zip(layers, before, strict=True):
            layer.weights = weights


@contextmanager
def quantized_once(model: nn.Module) -> Iterator[None]:
    """Inside, forwards of `model` without gradients quantize each weight once; nothing may be trained meanwhile."""
    layers = [module for module in model.modules() if isinstance(module, QuantModule)]
    try:
        for layer in layers:
            layer._kept = {}
        yield
    finally:
        for layer in layers:
            layer._kept = None


@contextmanager
def reused_in_step(model: nn.Module, last: bool) -> Iterator[None]:
    """Inside, one micro-batch of an optimizer step runs forward and backward over the weights that the first one made.

    Args:
        model: a prepared model; nothing of it may change between the micro-batches of a step.
        last: whether this micro-batch is the last of its step; after it the weights are forgotten.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantModule)]
    done = False
    try:
        for layer in layers:
            layer._reused = layer._reused or ReusedWeight()
            layer._reused.last = last
        yield
        if last:
            for layer in layers:
                if layer._reused is not None:
                    layer._reused.finish()
        done = not last
    finally:
        if not done:
            for layer in layers:
                layer._reused = None


def without_adapter(module: nn.Module) -> nn.Module:
    """Returns the module that peft has put an adapter around, or `module` itself; without importing peft."""
    inner: Callable[[], nn.Module] | None = getattr(module, "get_base_layer", None)
    return module if inner is None else inner()


def without_adapters(model: nn.Module) -> nn.Module:
    """Returns the model inside peft's wrapper of a model, or `model` itself; without importing peft."""
    inner: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the autocast dtype where autocast is on, or else x's."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype

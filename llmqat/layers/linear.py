"""QuantLinear: a linear layer whose weight, and perhaps whose input, is fake-quantized at every forward.

Some modeling code reads the weight of a layer in place of calling it, on some devices or in training only, or asks for
its dtype. While such a module runs, `layer.weight` is what a packed layer gives it: the quantized weight, in the dtype
that the forward computes in. Elsewhere it is the master weight.

Letters: O out features, I in features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from llmqat.layers.activation import ActivationQuantizer
from llmqat.layers.config import ActivationConfig, WeightConfig
from llmqat.layers.quantized import QuantModule, compute_dtype, without_adapter

_READ = "llmqat_reads"
"""Attribute of a module whose code reads weights: the names of their layers, below it."""


class QuantLinear(QuantModule):
    """A linear layer with a fake-quantized weight.

    Attributes:
        bias: [O] or None, never quantized.
        input_quantizer: what fake-quantizes the input, or None.
        values_read: whether other modules compute with the weight; False where they ask for its dtype or shape alone.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weights: WeightConfig,
        name: str = "",
        input_activations: ActivationConfig | None = None,
        transposed: bool = False,
    ) -> None:
        """Takes over `weight` [O, I] ([I, O] when transposed) and `bias`: shared, not copied.

        Raises:
            ValueError: when the group size does not divide I.
        """
        self.values_read, self._readers_running = False, 0
        super().__init__(weight, weights, name, transposed)
        self.out_features, self.in_features = self.rows, self.columns
        self.register_parameter("bias", bias)  # type: ignore[arg-type]
        self.input_quantizer = (
            None if input_activations is None else ActivationQuantizer(input_activations, weight.device, name)
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        weights: WeightConfig,
        name: str = "",
        input_activations: ActivationConfig | None = None,
    ) -> QuantLinear:
        """Returns a QuantLinear over weight and bias of an nn.Linear or Conv1D, shared. Works on the meta device."""
        transposed = isinstance(linear, Conv1D)
        quantized = cls(linear.weight, linear.bias, weights, name, input_activations, transposed)  # type: ignore[arg-type]
        quantized.train(linear.training)
        return quantized

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The master weight; for the modules that read it while they run, what a packed layer would give them."""
        own = self._parameters.get("weight")
        if own is None:
            raise AttributeError("weight")
        return self._as_packed(own) if self._readers_running else own

    def _as_packed(self, own: Tensor) -> Tensor:
        dtype = self.compute_dtype or own.dtype
        if self.values_read:
            return self.quantized_weight(dtype)
        # Only the dtype or shape is read. NaN shows at once if code computes with the values after all.
        return own if dtype == own.dtype else own.new_full((), float("nan"), dtype=dtype).expand(own.shape)

    def to_linear(self) -> nn.Module:
        """Returns the nn.Linear (or Conv1D) that shares the master weight and bias: the inverse of `from_linear`."""
        linear: nn.Module
        if self.transposed:
            with torch.device("meta"):
                linear = Conv1D(self.out_features, self.in_features)
        else:
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.register_parameter("weight", self.get_parameter("weight"))
        linear.register_parameter("bias", None if self.bias is None else self.get_parameter("bias"))
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [*, I] @ ŵ.T + bias, [*, O], in the autocast dtype or else x's."""
        dtype = compute_dtype(x)
        inputs = x.to(dtype) if self.input_quantizer is None else self.input_quantizer(x, dtype)
        weight = self.quantized_weight(dtype)
        return F.linear(
            inputs, weight.mT if self.transposed else weight, None if self.bias is None else self.bias.to(dtype)
        )

    def extra_repr(self) -> str:
        """Returns the line that print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weights={self.weights.label}"
        )


def let_read(reader: nn.Module, path: str) -> None:
    """Makes `weight` of a QuantLinear read as that of a packed layer while `reader` runs.

    Args:
        reader: a module whose code reads the weight.
        path: dotted name of the QuantLinear below `reader`.
    """
    known: tuple[str, ...] = reader.__dict__.get(_READ, ())
    reader.__dict__[_READ] = (*known, path)
    if not known:
        reader.register_forward_pre_hook(_begin)
        reader.register_forward_hook(_end, always_call=True)


def _begin(reader: nn.Module, inputs: tuple[Any, ...]) -> None:
    for layer in _read_by(reader):
        layer._readers_running += 1


def _end(reader: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    for layer in _read_by(reader):
        layer._readers_running -= 1


def _read_by(reader: nn.Module) -> list[QuantLinear]:
    layers = (without_adapter(reader.get_submodule(path)) for path in reader.__dict__[_READ])
    return [layer for layer in layers if isinstance(layer, QuantLinear)]

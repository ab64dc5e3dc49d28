"""QuantLinear: a linear layer whose weight, and perhaps whose input, is fake-quantized at every forward.

Letters: O out features, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from llmqat.layers.activation import ActivationQuantizer
from llmqat.layers.config import ActivationConfig, WeightConfig
from llmqat.layers.quantized import QuantModule, compute_dtype


class QuantLinear(QuantModule):
    """A linear layer with a fake-quantized weight.

    Attributes:
        bias: [O] or None, never quantized.
        input_quantizer: what fake-quantizes the input, or None.
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

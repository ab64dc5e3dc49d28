"""Quantized experts: the stacked, three-dimensional weights of a mixture of experts.

transformers keeps the linear maps of all experts of a layer in one parameter [E, O, I] (or [E, I, O]: gpt-oss), which
the experts' forward reads by its name. Here a module of that name takes the parameter's place, holding the master
weight and its scales, or the packed codes. Around each forward of the experts, hooks put the quantized weight where the
parameter was; so no modeling file is copied, and every way of computing experts (loop, grouped or batched products)
works.

Letters: E experts, O out features, I in features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmqat.layers.config import WeightConfig
from llmqat.layers.packed import PackedModule
from llmqat.layers.quantized import QuantModule, compute_dtype, without_adapter


class QuantExperts(QuantModule):
    """The stacked weight of a layer's experts, fake-quantized."""


class PackedExperts(PackedModule):
    """The stacked weight of a layer's experts as packed codes, seen as one matrix [E * O, I].

    Attributes:
        experts: E.
        transposed: the experts read [E, I, O].
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        weights: WeightConfig,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        name: str = "",
        transposed: bool = False,
    ) -> None:
        """Makes empty experts of the parameter's `shape`, to be filled by `load_state_dict` or `from_quant_experts`."""
        rows, columns = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        super().__init__(shape[0] * rows, columns, weights, dtype, device, name)
        self.experts, self.transposed = shape[0], transposed

    @classmethod
    def from_quant_experts(cls, layer: QuantExperts, dtype: torch.dtype = torch.bfloat16) -> PackedExperts:
        """Returns the packed form of `layer`; its scales are stored in `dtype`."""
        experts, first, second = layer.weight.shape
        packed = cls((experts, first, second), layer.weights.stored, dtype, "meta", transposed=layer.transposed)
        packed.take_codes(layer, dtype)
        return packed.train(layer.training)

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight as the experts read it: [E, O, I], or [E, I, O] when transposed."""
        stacked = super().dequantized_weight(dtype).view(self.experts, -1, self.columns)
        return stacked.mT if self.transposed else stacked


def stacked_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the stacked expert weights that `module` itself holds, by name; empty for all other modules."""
    if getattr(module, "is_transposed", None) is None:  # set by transformers on every experts class
        return {}
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point()
    }


def replace_stacked(parent: nn.Module, name: str, module: QuantExperts | PackedExperts) -> None:
    """Puts `module` in the place of the parameter (or module) `name` of an experts module, and hooks the latter."""
    hooked = any(isinstance(child, (QuantExperts, PackedExperts)) for child in parent.children())
    parent._parameters.pop(name, None)
    parent._modules.pop(name, None)
    parent.add_module(name, module)
    if not hooked:
        parent.register_forward_pre_hook(_put_weights, with_kwargs=True)
        parent.register_forward_hook(_take_weights, always_call=True)


def _put_weights(parent: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    given = (value for value in (*inputs, *named.values()) if isinstance(value, Tensor))
    dtype = compute_dtype(next(value for value in given if value.is_floating_point()))
    for name, child in parent._modules.items():
        # An entry of the instance's own dictionary is found before its submodules.
        child = None if child is None else without_adapter(child)
        if isinstance(child, QuantExperts):
            parent.__dict__[name] = child.quantized_weight(dtype)
        elif isinstance(child, PackedExperts):
            parent.__dict__[name] = child.dequantized_weight(dtype)


def _take_weights(parent: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    for name, child in parent._modules.items():
        if child is not None and isinstance(without_adapter(child), (QuantExperts, PackedExperts)):
            parent.__dict__.pop(name, None)

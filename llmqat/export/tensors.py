"""What every format writes from: the codes, scales and zero points of a model, and its other tensors, by name.

Formats differ in how they lay codes out. What they lay out is the same everywhere, read from the one packing that is
proved at saving, so that no format can round a weight again.

Letters: O rows, I columns, G scales per row, b bits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.export.compressed_tensors import packed_state_dict, quantized_layers
from llmqat.export.description import ModelDescription
from llmqat.export.settings import KEPT
from llmqat.grid import dequantize, unpack_codes, unpack_int32
from llmqat.layers import PackedModule, QuantModule, WeightConfig


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight as it is stored.

    Attributes:
        layer: the module it is of.
        scheme: the scheme on disk.
        packed: as `grid.pack_codes` gives it, int32 words for integers; or int8 [O, I], 8-bit codes not packed.
        scale: [O, G].
        packed_zeros: int32 [ceil(O * b / 32), G], packed along O; None where symmetric.
    """

    layer: QuantModule | PackedModule
    scheme: WeightConfig
    packed: Tensor
    scale: Tensor
    packed_zeros: Tensor | None

    @property
    def per_scale(self) -> int:
        """Columns that share a scale."""
        return self.layer.columns // self.scale.shape[1]

    def codes(self) -> Tensor:
        """Returns the codes [O, I] of the grid's code dtype: integers are int8 around zero, or uint8 above it."""
        return unpack_codes(self.packed, self.scheme.grid, self.layer.columns)

    def zero_point(self) -> Tensor | None:
        """Returns the zero points [O, G], uint8, or None where symmetric."""
        if self.packed_zeros is None:
            return None
        return unpack_int32(self.packed_zeros.t().contiguous(), self.scheme.grid, self.layer.rows).t()

    def unsigned(self, num_bits: int) -> tuple[Tensor, Tensor]:
        """Returns codes [O, I] and zero points [O, G], uint8, as unsigned integers of `num_bits` (b or more)."""
        zero_point = self.zero_point()
        if zero_point is not None:
            return self.codes(), zero_point
        middle = 2 ** (num_bits - 1)
        shifted = (self.codes().to(torch.int16) + middle).to(torch.uint8)
        return shifted, torch.full(self.scale.shape, middle, dtype=torch.uint8)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight [O, I] of the model's forward."""
        return dequantize(self.codes(), self.scale, self.zero_point(), dtype)


def stored_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype of a packed model's scales; of a prepared one bfloat16, which training keeps them in."""
    layers = (layer for _, layer in quantized_layers(model) if isinstance(layer, PackedModule))
    return next((layer.dtype for layer in layers), torch.bfloat16)


def stored_tensors(model: PreTrainedModel) -> tuple[dict[str, StoredWeight], dict[str, Tensor]]:
    """Returns the quantized weights by module name, and all other tensors by their own, both in the model's order.

    Scales and parameters left in high precision are in `stored_dtype(model)`.

    Args:
        model: prepared or packed; not changed.
    """
    layers = dict(quantized_layers(model))
    state = packed_state_dict(model, stored_dtype(model))
    weights = {
        name: StoredWeight(
            layer,
            layer.weights.stored,
            state.pop(f"{name}.weight" if f"{name}.weight" in state else f"{name}.weight_packed"),
            state.pop(f"{name}.weight_scale"),
            state.pop(f"{name}.weight_zero_point", None),
        )
        for name, layer in layers.items()
    }
    return weights, {name: tensor for name, tensor in state.items() if not name.endswith(".weight_shape")}


def check_weights_only(description: ModelDescription, format: str) -> None:
    """Raises where a model quantizes more than matrices of integers, which `format` cannot say.

    Raises:
        ValueError: inputs or the KV cache are quantized, weights are floats, stacked experts are quantized, or nothing
            is.
    """
    if not description.layers:
        raise ValueError(
            "the model has no quantized weight to write; give a packed checkpoint (`llmqat quantize MODEL --out "
            "FOLDER` makes one), or in Python prepare the model first"
        )
    for layer in description.layers:
        if layer.scheme.input_activations is not None:
            raise ValueError(
                f"{layer.name} has quantized inputs, which {format} cannot say; export it as compressed-tensors"
            )
        if layer.scheme.weights.levels == "float":
            raise ValueError(
                f"{layer.name} has floats ({layer.scheme.weights.label}), and {format} is written from integers here; "
                "quantize the model to integers, such as int4-g32, or keep the compressed-tensors checkpoint"
            )
        if layer.kind == "experts":
            raise ValueError(f"{layer.name} are stacked experts, which are not written to {format} here")
    if description.kv_cache is not None:
        raise ValueError(
            f"the model has a quantized KV cache, which {format} cannot say; export it as compressed-tensors"
        )


def check_language_model(description: ModelDescription, model_types: Collection[str], format: str) -> None:
    """Raises where a model is none of the language models that `format` is written for, or more than its weights.

    Args:
        description: of the model.
        model_types: what `format` is written for.
        format: what it is called.

    Raises:
        ValueError: says what, and the way out.
    """
    if description.model_type not in model_types:
        raise ValueError(
            f"{format} of model type {description.model_type!r} is not written here; {', '.join(model_types)} are"
        )
    check_weights_only(description, format)
    if description.rotary is None:
        raise ValueError(
            f"{description.architecture} has no language model named 'model', so {format} of it is not written here; "
            f"{KEPT}"
        )


def too_small_for_float16(scale: Tensor) -> bool:
    """Returns whether float16 would round some of the scales, and only such as lie below its normal range."""
    rounded = scale.float()[scale.to(torch.float16).float() != scale.float()].abs()
    return bool(rounded.numel()) and float(rounded.max()) < torch.finfo(torch.float16).tiny


def exact_float16(scale: Tensor, name: str, format: str) -> Tensor:
    """Returns `scale` as float16.

    Raises:
        ValueError: float16 does not hold it exactly.
    """
    half = scale.to(torch.float16)
    if not torch.equal(half.float(), scale.float()):
        raise ValueError(f"{name} has a scale that float16 cannot hold exactly; {format} would round it")
    return half

"""What an export or a server has to know of a quantized model, without its weights.

A `ModelDescription` says which layers are quantized, how, and how they lie on disk. It is made from a prepared or a
packed model, on the meta device as well, so that the same rules speak before training and after saving.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmqat.export.compressed_tensors import quantized_layers
from llmqat.export.forms import PACKED_FORMAT, form_of, stored_scheme, weight_config
from llmqat.export.stock import StockTrial
from llmqat.export.text_part import text_part
from llmqat.layers import (
    KVCacheConfig,
    LayerScheme,
    PackedEmbedding,
    PackedExperts,
    PackedModule,
    QuantConfig,
    QuantEmbedding,
    QuantExperts,
    QuantModule,
    TiedHead,
    WeightConfig,
    kv_scheme,
    linear_maps,
)
from llmqat.layers.roles import end_of

Kind = Literal["linear", "conv1d", "experts", "embedding", "head"]
"""Linear layer, transformers' Conv1D, stacked experts, token embedding, output head with a weight of its own."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM and SGLang call several layers that they compute as one product -> their leaf names."""

_LANGUAGE_MODELS = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@dataclass(frozen=True)
class DescribedLayer:
    """A quantized weight.

    Attributes:
        name: the module's dotted name.
        kind: what kind of layer it is.
        scheme: what lies on disk.
        rows: out features; of experts, those of all together.
        columns: in features.
        form: name of its layout on disk in compressed-tensors, one of `forms.FORMS`.
    """

    name: str
    kind: Kind
    scheme: LayerScheme
    rows: int
    columns: int
    form: str = PACKED_FORMAT

    @property
    def per_scale(self) -> int:
        """Columns that share a scale."""
        return self.scheme.weights.group_size or self.columns

    @property
    def has_floats(self) -> bool:
        """Whether its weights or its inputs are floats."""
        inputs = self.scheme.input_activations
        return self.scheme.weights.levels == "float" or (inputs is not None and inputs.levels == "float")

    @property
    def label(self) -> str:
        """Short name of the scheme: 'int4 g64', 'int8 channel, a8 token'."""
        inputs = self.scheme.input_activations
        return self.scheme.weights.label + (f", {inputs.label}" if inputs else "")


@dataclass(frozen=True)
class ModelDescription:
    """A quantized model, as exports and servers see it.

    Attributes:
        architecture: the name of its class.
        layers: its quantized weights, in the model's order.
        kept: names of linear layers that are not quantized.
        stacked: whether it has stacked (3-D) weights of experts, quantized or not.
        kv_cache: the scheme of keys and values, or None.
        tied: the output head reads a quantized embedding.
        attention: whether attention of its class can be replaced, which vLLM's and SGLang's general back end needs.
        config: the model's configuration.
        rotary: its rotary embedding, with its numbers, where it has one as `model.rotary_emb`.
        trial: what stock transformers made of its checkpoint, where that was tried.
        text: the language model alone, of a model that also reads images or sound.
    """

    architecture: str
    layers: tuple[DescribedLayer, ...]
    kept: tuple[str, ...]
    stacked: bool
    kv_cache: KVCacheConfig | None
    tied: bool
    attention: bool
    config: PreTrainedConfig = field(compare=False)
    rotary: nn.Module | None = field(default=None, compare=False)
    trial: StockTrial | None = None
    text: ModelDescription | None = None

    @property
    def model_type(self) -> str:
        """The model type in transformers, such as `llama`."""
        return str(self.config.model_type)

    def with_scheme(self, quant: QuantConfig, int_quantized: bool = False) -> ModelDescription:
        """Returns the same model with all its linear layers, experts and its KV cache as `quant` has them by default.

        Embeddings and output head stay as they are.

        Raises:
            ValueError: a group size does not divide.
        """
        layers = []
        for layer in self.layers:
            if layer.kind in ("embedding", "head"):
                layers.append(layer)
                continue
            quant.weights.scale_shape(layer.rows, layer.columns, layer.name)
            inputs = None if layer.kind == "experts" else quant.input_activations
            scheme = LayerScheme(weights=quant.weights.stored, input_activations=inputs)
            layers.append(replace(layer, scheme=scheme, form=form_of(scheme, int_quantized)))
        text = None if self.text is None else self.text.with_scheme(quant, int_quantized)
        return replace(self, layers=tuple(layers), kv_cache=quant.kv_cache, trial=None, text=text)

    def in_form(self, int_quantized: bool) -> ModelDescription:
        """Returns the same model with W4A8 on disk as `int-quantized`, or packed."""
        layers = tuple(replace(layer, form=form_of(layer.scheme, int_quantized)) for layer in self.layers)
        return replace(self, layers=layers)


def products(description: ModelDescription) -> Iterator[list[str]]:
    """Yields the names of layers that servers compute as one product."""
    names = {layer.name for layer in description.layers} | set(description.kept)
    for name in sorted(names):
        parent, _, leaf = name.rpartition(".")
        for leaves in FUSED.values():
            members = [f"{parent}.{other}" for other in leaves]
            if leaf == leaves[0] and all(member in names for member in members):
                yield members


def mixed_product(description: ModelDescription) -> list[str]:
    """Returns the first layers of one product that have several schemes, or none."""
    schemes = {layer.name: layer.scheme for layer in description.layers}
    mixed = (names for names in products(description) if len({schemes.get(name) for name in names}) > 1)
    return next(mixed, [])


def product_rows(description: ModelDescription) -> dict[str, int]:
    """Returns, by the name of a quantized layer, the rows of the product that it is part of."""
    rows = {layer.name: layer.rows for layer in description.layers}
    whole = {name: sum(rows.get(other, 0) for other in names) for names in products(description) for name in names}
    return rows | {name: count for name, count in whole.items() if name in rows}


def together(names: Sequence[str]) -> str:
    """Returns layers of one parent as one name: 'model.layers.0.mlp.gate_proj, up_proj'."""
    return ", ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


def describe(
    model: PreTrainedModel, *, int_quantized: bool | None = None, trial: StockTrial | None = None
) -> ModelDescription:
    """Returns the description of a prepared or packed model.

    Args:
        model: unwrapped; may be on the meta device.
        int_quantized: W4A8 is to be written as `int-quantized`; where not given, as the model's checkpoint has it.
        trial: what stock transformers made of its checkpoint.
    """
    layers = tuple(_layers(model, int_quantized))
    maps = linear_maps(model)
    return ModelDescription(
        architecture=type(model).__name__,
        layers=layers,
        kept=tuple(name for name, entry in maps.items() if not entry.stacked),
        stacked=any(entry.stacked for entry in maps.values()) or any(layer.kind == "experts" for layer in layers),
        kv_cache=kv_scheme(model),
        tied=any(isinstance(module, TiedHead) for module in model.modules()),
        attention=bool(type(model).is_backend_compatible()),
        config=model.config,
        rotary=_rotary(model),
        trial=trial,
        text=None if (text := text_part(model, _LANGUAGE_MODELS)) is model else describe(text),
    )


def _stored_forms(model: PreTrainedModel) -> dict[tuple[Any, ...], str]:
    """Returns the form on disk by scheme, of a model that was loaded from a packed checkpoint."""
    described = getattr(model.config, "quantization_config", None)
    if not isinstance(described, dict):
        return {}
    return {
        _key(weight_config(QuantizationArgs(**group["weights"])), group.get("input_activations")): (
            group.get("format") or described.get("format", PACKED_FORMAT)
        )
        for group in described.get("config_groups", {}).values()
    }


def _key(weights: WeightConfig, inputs: object | None) -> tuple[Any, ...]:
    return weights, inputs is not None


def _layers(model: PreTrainedModel, int_quantized: bool | None) -> Iterator[DescribedLayer]:
    head, forms = end_of(model, "get_output_embeddings"), {} if int_quantized is not None else _stored_forms(model)
    for name, layer in quantized_layers(model):
        scheme = stored_scheme(layer)
        key = _key(scheme.weights, scheme.input_activations)
        form = forms.get(key, form_of(scheme, bool(int_quantized)))
        kind = "head" if layer is head else _kind(layer)
        yield DescribedLayer(name, kind, scheme, layer.rows, layer.columns, form)


def _kind(layer: QuantModule | PackedModule) -> Kind:
    if isinstance(layer, (QuantExperts, PackedExperts)):
        return "experts"
    if isinstance(layer, (QuantEmbedding, PackedEmbedding)):
        return "embedding"
    return "conv1d" if getattr(layer, "transposed", False) else "linear"


def _rotary(model: PreTrainedModel) -> nn.Module | None:
    """Returns the rotary embedding of a model, made again where that of a model without weights has no numbers."""
    try:
        rotary: Any = model.get_submodule("model.rotary_emb")
    except AttributeError:
        return None
    if any(buffer.is_meta for buffer in rotary.buffers()):
        with torch.device("cpu"):
            return cast("nn.Module", type(rotary)(config=rotary.config))
    return cast("nn.Module", rotary)

"""Quantized token embeddings, and the output head that is tied to them.

A tied pair has one weight, one set of scales and one set of codes: the head reads those of the embedding and holds
nothing of its own, so the two cannot drift apart, in training or on disk.

Letters: V vocabulary, D hidden size, G scales per row, b bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmqat.layers.config import WeightConfig
from llmqat.layers.packed import PackedModule
from llmqat.layers.quantized import QuantModule, compute_dtype


class QuantEmbedding(QuantModule):
    """A token embedding whose rows are fake-quantized as they are looked up.

    Attributes:
        multiplier: what the rows are multiplied with (Gemma's sqrt(D)), 1 for most models.
    """

    multiplier: Tensor | None

    def __init__(self, weight: Tensor, weights: WeightConfig, name: str = "", multiplier: Tensor | None = None) -> None:
        """Takes over `weight` [V, D]: shared, not copied.

        Raises:
            ValueError: when the group size does not divide D.
        """
        super().__init__(weight, weights, name)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("multiplier", multiplier, persistent=False)

    @classmethod
    def from_embedding(cls, embedding: nn.Module, weights: WeightConfig, name: str = "") -> QuantEmbedding:
        """Returns a QuantEmbedding over the weight of an nn.Embedding, perhaps one that scales its rows."""
        quantized = cls(embedding.weight, weights, name, embedding_multiplier(embedding))  # type: ignore[arg-type]
        quantized.train(embedding.training)
        return quantized

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the rows [*, D] of token ids [*], in `compute_dtype` or the master's dtype."""
        dtype = self.compute_dtype or self.weight.dtype
        rows = F.embedding(ids, self.weight)
        if self.enabled:
            quantized = self.quantized_rows(rows.flatten(0, -2), ids.flatten(), dtype).view(rows.shape)
            rows = quantized if self.strength == 1.0 else torch.lerp(rows.to(dtype), quantized, self.strength)
        return _multiplied(rows.to(dtype), self.multiplier)


class PackedEmbedding(PackedModule):
    """A token embedding over packed codes; only the rows that are looked up are unpacked."""

    multiplier: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        weights: WeightConfig,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        name: str = "",
        multiplier: Tensor | None = None,
    ) -> None:
        """Makes an empty embedding, to be filled by `load_state_dict` or `from_quant_embedding`."""
        super().__init__(num_embeddings, embedding_dim, weights, dtype, device, name)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("multiplier", multiplier, persistent=False)

    @classmethod
    def from_quant_embedding(cls, layer: QuantEmbedding, dtype: torch.dtype = torch.bfloat16) -> PackedEmbedding:
        """Returns the packed form of `layer`; its scales are stored in `dtype`."""
        packed = cls(
            layer.num_embeddings, layer.embedding_dim, layer.weights.stored, dtype, "meta", multiplier=layer.multiplier
        )
        packed.take_codes(layer, dtype)
        return packed.train(layer.training)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the rows [*, D] of token ids [*], in the dtype of the checkpoint."""
        rows = self.packed_weight().rows(ids.flatten()).dequantized(self.dtype)
        return _multiplied(rows.view(*ids.shape, -1), self.multiplier)


class TiedHead(nn.Module):
    """An output head that reads the weight of a quantized embedding, and holds nothing but a bias perhaps.

    Attributes:
        bias: [V] or None, never quantized.
        kernel: for a packed embedding, "auto" or the name of the kernel to insist on.
    """

    bias: Tensor | None

    def __init__(self, embedding: QuantEmbedding | PackedEmbedding, bias: Tensor | None = None) -> None:
        """Ties the head to `embedding`."""
        super().__init__()
        # In a tuple, so that it is no submodule: its tensors are the embedding's alone in the state dict.
        self._embedding = (embedding,)
        self.register_parameter("bias", bias)  # type: ignore[arg-type]
        self.kernel = "auto"

    @property
    def embedding(self) -> QuantEmbedding | PackedEmbedding:
        """The embedding that the head is tied to."""
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        """The embedding's weight [V, D]: the master, or what the forward computes with where that has another dtype."""
        embedding = self.embedding
        if isinstance(embedding, QuantEmbedding) and embedding.compute_dtype not in (None, embedding.weight.dtype):
            return embedding.quantized_weight(embedding.compute_dtype or embedding.weight.dtype)
        return embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [*, D] @ ŵ.T + bias, [*, V]."""
        embedding = self.embedding
        dtype = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        if isinstance(embedding, PackedEmbedding):
            return embedding.product(x, bias, self.kernel)
        return F.linear(x.to(dtype), embedding.quantized_weight(dtype), bias)


def embedding_multiplier(embedding: nn.Module) -> Tensor | None:
    """Returns what an embedding multiplies its rows with, or None.

    Raises:
        ValueError: for an embedding that does something else with its rows.
    """
    if type(embedding).forward is nn.Embedding.forward:
        return None
    factor = getattr(embedding, "embed_scale", None)
    if isinstance(factor, Tensor) and factor.numel() == 1:
        return factor
    if isinstance(factor, (int, float)):
        return torch.tensor(float(factor))
    raise ValueError(
        f"quant.embeddings: {type(embedding).__name__} does more than look rows up, and llmqat does not know what; "
        "use embeddings 'keep'"
    )


def _multiplied(rows: Tensor, multiplier: Tensor | None) -> Tensor:
    return rows if multiplier is None else rows * multiplier.to(rows.dtype)

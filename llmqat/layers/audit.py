"""The coverage audit: every parameter tensor of a model, quantized how, or left alone and why.

Most failures of quantization toolkits are layers skipped in silence. Here each tensor has a line, with its bytes in a
bfloat16 checkpoint before and in the packed checkpoint after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from llmqat.layers.linear import QuantLinear
from llmqat.layers.packed import PackedLinear

BYTES_HIGH_PRECISION = 2
SHAPE_BYTES = 16
KEPT = "kept"


@dataclass(frozen=True)
class AuditEntry:
    """One parameter tensor.

    Attributes:
        name: dotted name in the state dict of the unprepared model.
        shape: of the tensor.
        treatment: the scheme's label ('int4 g64'), or 'kept'.
        reason: why it was left alone; empty when quantized.
        bytes_before: in a bfloat16 checkpoint.
        bytes_after: in the packed checkpoint, scales and shape included.
    """

    name: str
    shape: tuple[int, ...]
    treatment: str
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class CoverageAudit:
    """What quantization covers in a model."""

    entries: tuple[AuditEntry, ...]

    @property
    def quantized(self) -> tuple[AuditEntry, ...]:
        """The quantized tensors."""
        return tuple(entry for entry in self.entries if entry.treatment != KEPT)

    @property
    def kept(self) -> tuple[AuditEntry, ...]:
        """The tensors left in high precision."""
        return tuple(entry for entry in self.entries if entry.treatment == KEPT)

    @property
    def average_bits(self) -> float:
        """Bits a quantized weight takes on disk, scales included, shape records not."""
        weights = sum(entry.numel for entry in self.quantized)
        return 8 * sum(entry.bytes_after - SHAPE_BYTES for entry in self.quantized) / max(weights, 1)

    @property
    def average_bits_of_all(self) -> float:
        """Bits an average parameter of the whole model takes on disk."""
        counted = [entry for entry in self.entries if entry.bytes_before]
        return 8 * self.bytes_after / max(sum(entry.numel for entry in counted), 1)

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors in a bfloat16 checkpoint; tied tensors once."""
        return sum(entry.bytes_before for entry in self.entries)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors in the packed checkpoint."""
        return sum(entry.bytes_after for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready form."""
        return {
            "average_bits": self.average_bits,
            "average_bits_of_all": self.average_bits_of_all,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "entries": [asdict(entry) for entry in self.entries],
        }


def audit(model: nn.Module, reasons: Mapping[str, str] | None = None) -> CoverageAudit:
    """Returns the coverage audit of a prepared or converted model (or of one not quantized at all).

    Args:
        model: any module.
        reasons: module name -> why it was left alone, where `prepare` knows more than the module's type says.
    """
    entries: list[AuditEntry] = []
    seen: dict[int, str] = {}
    owned: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, PackedLinear)):
            entries.append(_quantized_entry(name, module))
            owned.update(f"{name}.{own}" for own in ("weight", "log_scale"))
            if isinstance(module, PackedLinear) and module.bias is not None:
                size = module.bias.numel() * BYTES_HIGH_PRECISION
                entries.append(AuditEntry(f"{name}.bias", tuple(module.bias.shape), KEPT, "bias", size, size))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in owned:
            continue
        owner, _, leaf = name.rpartition(".")
        shape = tuple(parameter.shape)
        if id(parameter) in seen:
            entries.append(AuditEntry(name, shape, KEPT, f"tied to {seen[id(parameter)]}", 0, 0))
            continue
        seen[id(parameter)] = name
        reason = (reasons or {}).get(owner) or _reason(model.get_submodule(owner), leaf)
        size = parameter.numel() * BYTES_HIGH_PRECISION
        entries.append(AuditEntry(name, shape, KEPT, reason, size, size))
    return CoverageAudit(tuple(entries))


def _quantized_entry(name: str, layer: QuantLinear | PackedLinear) -> AuditEntry:
    out_features, in_features, bits = layer.out_features, layer.in_features, layer.weights.num_bits
    scales = layer.weights.scale_shape(out_features, in_features, name)
    zeros = 0 if layer.weights.symmetric else -(-scales[0] * bits // 32) * 4 * scales[1]
    packed = out_features * -(-in_features * bits // 32) * 4
    after = packed + scales[0] * scales[1] * BYTES_HIGH_PRECISION + zeros + SHAPE_BYTES
    before = out_features * in_features * BYTES_HIGH_PRECISION
    return AuditEntry(f"{name}.weight", (out_features, in_features), layer.weights.label, "", before, after)


def _reason(module: nn.Module, leaf: str) -> str:
    kind = type(module).__name__
    if leaf == "bias":
        return "bias"
    if "norm" in kind.lower():
        return "normalization stays in high precision"
    if isinstance(module, nn.Embedding):
        return "embedding, left alone by default"
    return f"{kind} is not a quantized module type"

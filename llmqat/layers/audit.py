"""The coverage audit: every parameter tensor of a model, quantized how, or left alone and why.

Most failures of quantization toolkits are layers skipped in silence. Here each tensor has a line, with its bytes in a
bfloat16 checkpoint before and in the packed checkpoint after.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import nn

from llmqat.grid import packed_shape
from llmqat.layers.attention import KVQuantizer
from llmqat.layers.config import WeightConfig
from llmqat.layers.embedding import PackedEmbedding, QuantEmbedding, TiedHead
from llmqat.layers.experts import PackedExperts, QuantExperts
from llmqat.layers.originals import dequantized_note
from llmqat.layers.packed import PackedLinear, PackedModule
from llmqat.layers.quantized import QUANTIZER_PARAMETERS, QuantModule

BYTES_HIGH_PRECISION = 2
SHAPE_BYTES = 16
KEPT = "kept"
UNTIED = "llmqat_untied"
"""Attribute of an output head that rotation untied from the embeddings."""
REASONS = "llmqat_reasons"
"""Attribute of a prepared model: name of a linear map -> why it was left alone."""
DROPPED = "llmqat_dropped"
"""Attribute of a prepared model: what to say of weights that transformers dropped when it loaded the original."""
ROUTER = "router, stays in high precision"
LATTICE = "llmqat_lattice"
"""Attribute of a prepared model: what to say of weights that already lay on the lattice of their scheme, or nothing."""
IDLE = "text does not reach"
"""Begins the reason, and the note, of what does not run on text."""
SHARE = "high precision: "
"""Begins the note on what is left of a model that is not quantized."""
WISHES = ("quant.", "no quant.")
"""Beginnings of the reasons that the configuration gives."""
FEWEST_ON_LATTICE = 0.01
"""Share of the groups from which on a note says that they already lie on the lattice: a few may by chance, or be nearly
empty."""
MOST_KEPT = 0.1
"""Share of the weights, embeddings and output head aside, that may stay in high precision without a note."""
MOST_NAMED = 3
"""Reasons that a note names."""


@dataclass(frozen=True)
class AuditEntry:
    """One parameter tensor.

    Attributes:
        name: dotted name in the state dict of the unprepared model.
        shape: of the tensor.
        treatment: the scheme's label ('int4 g64'), or 'kept'.
        reason: why it was left alone, or what else there is to know of it.
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
    """What quantization covers in a model.

    Attributes:
        entries: one for each parameter tensor.
        notes: what is quantized beside parameters, and what loaders other than llmqat's will see of the checkpoint.
    """

    entries: tuple[AuditEntry, ...]
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[AuditEntry, ...]:
        """The quantized tensors, tied ones once."""
        return tuple(entry for entry in self.entries if entry.treatment != KEPT and entry.bytes_before)

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
            "notes": list(self.notes),
            "entries": [asdict(entry) for entry in self.entries],
        }


def audit(model: nn.Module) -> CoverageAudit:
    """Returns the coverage audit of a prepared or converted model (or of one not quantized at all)."""
    reasons: dict[str, str] = getattr(model, REASONS, {})
    entries: list[AuditEntry] = []
    seen: dict[int, str] = {}
    owned: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, (QuantModule, PackedModule)):
            entries.append(_quantized_entry(name, module))
            owned.update(f"{name}.{own}" for own in QUANTIZER_PARAMETERS)
        if isinstance(module, PackedLinear) and module.bias is not None:
            size = module.bias.numel() * BYTES_HIGH_PRECISION
            entries.append(AuditEntry(f"{name}.bias", tuple(module.bias.shape), KEPT, "bias", size, size))
        if isinstance(module, TiedHead):
            entries.append(_tied_entry(model, name, module))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in owned:
            continue
        owner, _, leaf = name.rpartition(".")
        shape = tuple(parameter.shape)
        if id(parameter) in seen:
            entries.append(AuditEntry(name, shape, KEPT, f"tied to {seen[id(parameter)]}", 0, 0))
            continue
        seen[id(parameter)] = name
        known = reasons.get(name) or reasons.get(owner)
        reason = "bias" if leaf == "bias" else known or _reason(model.get_submodule(owner), leaf)
        size = parameter.numel() * BYTES_HIGH_PRECISION
        entries.append(AuditEntry(name, shape, KEPT, reason, size, size))
    return CoverageAudit(tuple(entries), (*_share_notes(model, entries), *_idle_notes(entries), *_notes(model)))


def kept_notes(model: nn.Module) -> tuple[str, ...]:
    """Returns the notes of the audit on what is left in high precision."""
    return tuple(note for note in audit(model).notes if note.startswith((SHARE, IDLE)))


def _share_notes(model: nn.Module, entries: Sequence[AuditEntry]) -> Iterator[str]:
    """Yields a note where much of a model that is quantized stays in high precision."""
    counted = _counted(model, entries)
    kept, all_of_them = [entry for entry in counted if entry.treatment == KEPT], sum(e.numel for e in counted)
    share = sum(entry.numel for entry in kept) / max(all_of_them, 1)
    if share <= MOST_KEPT or len(kept) == len(counted):
        return
    sizes: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for entry in kept:
        reason = _without_numbers(entry.reason)
        sizes[reason] = sizes.get(reason, 0) + entry.numel
        names.setdefault(reason, []).append(_without_numbers(entry.name))
    largest = sorted(sizes, key=lambda reason: -sizes[reason])
    named = "; ".join(
        f"{sizes[reason] / all_of_them:.0%} {names[reason][0]}{', …' if len(set(names[reason])) > 1 else ''} ({reason})"
        for reason in largest[:MOST_NAMED]
    )
    more = "; …" if len(largest) > MOST_NAMED else ""
    bits = CoverageAudit(tuple(entries)).average_bits_of_all
    yield (
        f"{SHARE}{share:.0%} of the weights outside embeddings and output head are not quantized, so that a parameter "
        f"of the whole model takes {bits:.1f} bits on average: {named}{more}"
    )


def is_asked_for(model: nn.Module, entries: Sequence[AuditEntry]) -> bool:
    """Returns whether the configuration explains what stays in high precision, so that no warning is due.

    It does when the weights kept for other reasons are at most `MOST_KEPT` of the counted ones.
    """
    counted = _counted(model, entries)
    others = [entry for entry in counted if entry.treatment == KEPT and not entry.reason.startswith(WISHES)]
    return sum(entry.numel for entry in others) <= MOST_KEPT * sum(entry.numel for entry in counted)


def _counted(model: nn.Module, entries: Sequence[AuditEntry]) -> list[AuditEntry]:
    """Returns the weights that are not those of embeddings and output head."""
    ends = _ends(model)
    return [entry for entry in entries if len(entry.shape) > 1 and entry.bytes_before and entry.name not in ends]


def _ends(model: nn.Module) -> set[str]:
    """Returns the names of the weights of embeddings and output head."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    kinds = nn.Embedding, QuantEmbedding, PackedEmbedding
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds) or module is head}


def _idle_notes(entries: Sequence[AuditEntry]) -> Iterator[str]:
    """Yields a note for each part of a model that is left alone because text does not reach it."""
    idle: dict[str, int] = {}
    for entry in entries:
        if entry.reason.startswith(IDLE):
            part = _without_numbers(entry.reason.removeprefix(IDLE).strip())
            idle[part] = idle.get(part, 0) + entry.numel
    for part, weights in idle.items():
        pattern = re.escape(part).replace(r"\*", r"\d+")
        yield (
            f"{IDLE} {part}, whose linear layers ({weights:,} weights) are left in high precision; "
            f"to quantize them as well, give quant.targets=['Linear', 're:{pattern}']"
        )


def _without_numbers(name: str) -> str:
    """Returns a dotted name with `*` for the numbers in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def stored_bytes(weights: WeightConfig, rows: int, columns: int, name: str = "") -> int:
    """Returns the bytes of a matrix [rows, columns] in a checkpoint: codes, scales and zero points.

    Raises:
        ValueError: the group size does not divide `columns`; names `name`.
    """
    weights = weights.stored
    scales = weights.stored_shape(rows, columns, name)
    zeros = 0 if weights.symmetric else -(-scales[0] * weights.num_bits // 32) * 4 * scales[1]
    shape, kind = packed_shape(rows, columns, weights.grid)
    scale_bytes = BYTES_HIGH_PRECISION if weights.scale_dtype == "bfloat16" else 1
    return prod(shape) * kind.itemsize + scales[0] * scales[1] * scale_bytes + zeros


def _quantized_entry(name: str, layer: QuantModule | PackedModule) -> AuditEntry:
    after = stored_bytes(layer.weights, layer.rows, layer.columns, name) + SHAPE_BYTES
    before = layer.rows * layer.columns * BYTES_HIGH_PRECISION
    label = layer.weights.label if isinstance(layer, QuantModule) else layer.label
    inputs = getattr(layer, "input_quantizer", None)
    stacked = isinstance(layer, (QuantExperts, PackedExperts))
    return AuditEntry(
        name if stacked else f"{name}.weight",
        (layer.rows, layer.columns),
        label if inputs is None else f"{label} {inputs.config.label}",
        "experts stacked as one matrix; their inputs stay in high precision" if stacked else "",
        before,
        after,
    )


def _tied_entry(model: nn.Module, name: str, head: TiedHead) -> AuditEntry:
    embedding = head.embedding
    source = next(other for other, module in model.named_modules() if module is embedding)
    label = embedding.weights.label
    return AuditEntry(f"{name}.weight", (embedding.rows, embedding.columns), label, f"tied to {source}.weight", 0, 0)


def _notes(model: nn.Module) -> list[str]:
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, (QuantModule, PackedModule))]
    caches = [module for module in modules if isinstance(module, KVQuantizer)]
    notes = []
    if caches:
        config = caches[0].config
        plain = "llmqat.load runs it so, other loaders read keys and values in high precision"
        who = "llmqat.load, transformers and vLLM run it so" if config.calibrated else plain
        notes.append(f"KV cache: {config.label} in {len(caches)} attention layers; {who}")
    if any(layer.weights.levels == "seq" for layer in layers if isinstance(layer, QuantModule)):
        notes.append("int2-seq has half-integer levels, which no format knows: stored exactly, in 3 bits a code")
    if any(isinstance(layer, QuantModule) for layer in layers) and (note := dequantized_note(model)):
        notes.append(note)
    notes += [note for attribute in (DROPPED, LATTICE) if (note := getattr(model, attribute, ""))]
    untied = next((module for module in modules if getattr(module, UNTIED, False)), None)
    if untied is not None:
        size = untied.get_parameter("weight").numel() * BYTES_HIGH_PRECISION
        notes.append(
            f"rotation untied the output head from the embedding: {size:,} bytes more in a bfloat16 checkpoint"
        )
    return notes


def lattice_note(model: nn.Module) -> str:
    """Returns a note on weights that already were codes times a scale before `prepare`; empty where they are few.

    Checkpoints from quantization-aware training have such weights (grid/lattice.py).
    """
    layers = [module for module in model.modules() if isinstance(module, QuantModule)]
    found = [layer for layer in layers if layer.recognized]
    count, groups = sum(layer.recognized for layer in found), sum(prod(layer.scale_shape) for layer in layers)
    if count <= FEWEST_ON_LATTICE * groups:
        return ""
    labels = ", ".join(sorted({layer.weights.label for layer in found}))
    return (
        f"{count:,} of {groups:,} groups already lie on the lattice of their scheme "
        f"({labels}), as quantization-aware training leaves weights: quantization starts from the codes that they "
        "have, and calibration keeps them"
    )


def _reason(module: nn.Module, leaf: str) -> str:
    kind = type(module).__name__
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    if "norm" in kind.lower():
        return "normalization stays in high precision"
    if "router" in kind.lower():
        return ROUTER
    if isinstance(module, nn.Embedding):
        return "embedding, left alone by default"
    if isinstance(module, nn.Linear):
        return "left in high precision"
    return f"{kind} is not a quantized module type"

"""The modules that hold quantized weights, what puts them into a model, and the audit that says what they cover."""

from llmqat.layers.audit import AuditEntry, CoverageAudit, audit
from llmqat.layers.config import PRESETS, QuantConfig, WeightConfig
from llmqat.layers.linear import QuantLinear, quantizers_off
from llmqat.layers.packed import PackedLinear
from llmqat.layers.prepare import convert, prepare

__all__ = [
    "PRESETS",
    "AuditEntry",
    "CoverageAudit",
    "PackedLinear",
    "QuantConfig",
    "QuantLinear",
    "WeightConfig",
    "audit",
    "convert",
    "prepare",
    "quantizers_off",
]

"""Checkpoints: one file a format, and saving with proof on top of them."""

from llmqat.export.checkpoint import FORMATS, ExportReport, ProofError, load, load_any, prove, save
from llmqat.export.gguf import write_gguf

CONVERSIONS = {"gguf": write_gguf}
"""Formats that a packed checkpoint is written to beside its own: (model, tokenizer, path) -> bytes by block type."""

__all__ = ["CONVERSIONS", "FORMATS", "ExportReport", "ProofError", "load", "load_any", "prove", "save", "write_gguf"]

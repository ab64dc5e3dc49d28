"""Checkpoints: one file a format, and saving with proof on top of them."""

from llmqat.export.checkpoint import FORMATS, ExportReport, ProofError, load, load_any, prove, save

__all__ = ["FORMATS", "ExportReport", "ProofError", "load", "load_any", "prove", "save"]

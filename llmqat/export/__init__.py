"""Packed checkpoints: saving and loading them, and writing them in the formats of other programs.

checkpoint.py             saves, proves and loads packed checkpoints
compressed_tensors.py     llmqat's own format (forms.py: one layer in it, experts.py and names.py: what others write)
tensors.py                codes, scales and zero points that all other formats are written from
gguf.py, gptq.py, onnx.py, peft.py    one other format each (gguf_tokenizer.py: the tokenizer in a GGUF file)
settings.py, text_part.py             configuration that a format must hold, and the language model it is written of
description.py            a quantized model without its weights
serving.py, vllm.py       which programs can load a checkpoint
stock.py                  what transformers without llmqat makes of it
prepared.py               checkpoints of a model that is still in training
card.py, hub.py, registry.py          model card, Hugging Face hub, MLflow
commands.py               the commands that are proposed when another command has finished

A format of your own is a function, added by `@CONVERSIONS.register("name")`.
"""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.config import Registry
from llmqat.export.checkpoint import (
    FORMATS,
    ExportReport,
    ProofError,
    is_packed,
    keep_record,
    load,
    load_any,
    prove,
    save,
    save_again,
)
from llmqat.export.description import ModelDescription, describe
from llmqat.export.gguf import write_gguf
from llmqat.export.gptq import write_gptq
from llmqat.export.onnx import write_onnx
from llmqat.export.serving import CLIENTS, Verdict, served_by
from llmqat.export.tensors import StoredWeight, stored_tensors

Conversion = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], dict[str, int]]
"""Writes a packed model and its tokenizer to a file or folder, the codes as they are; returns bytes by part."""

CONVERSIONS: Registry[Conversion] = Registry("format")
"""Formats that a packed checkpoint is written to, by the name that `llmqat export --format` takes."""
CONVERSIONS.register("compressed-tensors", save_again)
CONVERSIONS.register("gguf", write_gguf)
CONVERSIONS.register("gptq", write_gptq)
CONVERSIONS.register("onnx", write_onnx)

PACKAGES = {"gguf": "gguf", "onnx": "onnx"}
"""Format -> the optional module that writes it."""

__all__ = [
    "CLIENTS",
    "CONVERSIONS",
    "FORMATS",
    "PACKAGES",
    "Conversion",
    "ExportReport",
    "ModelDescription",
    "ProofError",
    "StoredWeight",
    "Verdict",
    "describe",
    "is_packed",
    "keep_record",
    "load",
    "load_any",
    "prove",
    "save",
    "save_again",
    "served_by",
    "stored_tensors",
    "write_gguf",
    "write_gptq",
    "write_onnx",
]

"""llmqat: low-bit quantization-aware training of Hugging Face causal language models.

Public names are resolved on first use, so that `import llmqat` and `llmqat --help` load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from llmqat.data.hub import answer_rows
    from llmqat.data.synthesis import synthesize
    from llmqat.evaluate.perplexity import evaluate
    from llmqat.export.checkpoint import load, save
    from llmqat.heap import keep_freed_memory
    from llmqat.layers.cache import QuantizedCache
    from llmqat.layers.config import QuantConfig
    from llmqat.layers.lora import adopt_adapters, lora_config
    from llmqat.layers.prepare import convert, prepare
    from llmqat.train.adapter import load_adapter, save_adapter
    from llmqat.train.arguments import QATArguments
    from llmqat.train.sft import QATSFTConfig, QATSFTTrainer
    from llmqat.train.trainer import QATTrainer

_HOMES = {
    "QATArguments": "llmqat.train.arguments",
    "QATSFTConfig": "llmqat.train.sft",
    "QATSFTTrainer": "llmqat.train.sft",
    "QATTrainer": "llmqat.train.trainer",
    "QuantConfig": "llmqat.layers.config",
    "QuantizedCache": "llmqat.layers.cache",
    "adopt_adapters": "llmqat.layers.lora",
    "answer_rows": "llmqat.data.hub",
    "convert": "llmqat.layers.prepare",
    "evaluate": "llmqat.evaluate.perplexity",
    "keep_freed_memory": "llmqat.heap",
    "load": "llmqat.export.checkpoint",
    "load_adapter": "llmqat.train.adapter",
    "lora_config": "llmqat.layers.lora",
    "prepare": "llmqat.layers.prepare",
    "save": "llmqat.export.checkpoint",
    "save_adapter": "llmqat.train.adapter",
    "synthesize": "llmqat.data.synthesis",
}

__all__ = [
    "QATArguments",
    "QATSFTConfig",
    "QATSFTTrainer",
    "QATTrainer",
    "QuantConfig",
    "QuantizedCache",
    "adopt_adapters",
    "answer_rows",
    "convert",
    "evaluate",
    "keep_freed_memory",
    "load",
    "load_adapter",
    "lora_config",
    "prepare",
    "save",
    "save_adapter",
    "synthesize",
]


def __getattr__(name: str) -> Any:
    """Returns the public object `name`, importing its home module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llmqat' has no attribute {name!r}; public names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Returns the public names, also those that nobody has used yet."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

"""llmqat: low-bit quantization-aware training of Hugging Face causal language models.

    import llmqat
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(NAME, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(NAME, dtype="float32")
    llmqat.prepare(model, llmqat.QuantConfig.preset("int4"))  # in place; returns what is quantized, and what is not
    args = llmqat.QATArguments(output_dir="run", max_steps=60, learning_rate=1e-4)
    llmqat.QATTrainer(model=model, teacher=teacher, args=args, train_dataset=...).train()
    llmqat.save(model, "out", tokenizer)  # packs, and proves what lies on disk
    model = llmqat.load("out")  # packed, ready to generate

What there is, each with its own help():

    models      load_model: model and tokenizer from a hub id, a folder, a .gguf file or package:NAME/FILE.gguf
    scheme      QuantConfig: presets by name (int4, w4a8, int8-g128), and every field of a scheme
    model       prepare, convert; save and load of packed checkpoints; QuantizedCache for generation
    text        synthesize: token blocks that the model writes itself; answer_rows: conversations as labelled rows
    training    QATTrainer and QATArguments, on those of transformers; QATSFTTrainer and QATSFTConfig, on those of TRL
    adapters    lora_config and adopt_adapters: peft's LoRA inside the quantizers; save_adapter, load_adapter
    judging     evaluate: perplexity, and divergence from the original
    memory      keep_freed_memory: fewer page faults in a training on CPUs

    llmqat.calibrate    calibrate(model, quant, [RangesStage(), GPTQStage()], ids), and its stages
    llmqat.data         load_blocks(DataConfig(...), tokenizer): text from files, the hub and conversations
    llmqat.export       other formats (gguf, gptq, onnx), and who serves a checkpoint
    llmqat.recipe       run(load_recipe("recipe.yaml")): what `llmqat train` does

Schemes, stages, sources and formats of your own: recipes/python in the repository, or `llmqat recipes`. On the command
line, begin with `llmqat --help`.

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
    from llmqat.models import load_model
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
    "load_model": "llmqat.models",
    "lora_config": "llmqat.layers.lora",
    "prepare": "llmqat.layers.prepare",
    "save": "llmqat.export.checkpoint",
    "save_adapter": "llmqat.train.adapter",
    "synthesize": "llmqat.data.synthesis",
}

_NEEDS = {"llmqat.train.sft": "trl"}
"""Home -> the optional package without which it cannot be imported."""

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
    "load_model",
    "lora_config",
    "prepare",
    "save",
    "save_adapter",
    "synthesize",
]


def __getattr__(name: str) -> Any:
    """Returns the public object `name`, importing its home module on first use (PEP 562)."""
    if name not in _HOMES:
        import difflib

        near = difflib.get_close_matches(name, __all__, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise AttributeError(f"module 'llmqat' has no attribute {name!r}; {guess}public names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Returns the public names, also those that nobody has used yet; not those that need a package that is not there.

    `help(llmqat)` and `inspect.getmembers` import all that are returned.
    """
    from llmqat.extras import missing

    lacking = {name for name in _HOMES if _HOMES[name] in _NEEDS and missing(_NEEDS[_HOMES[name]])}
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))} - lacking)

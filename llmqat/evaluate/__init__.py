"""Judging a model: perplexity and divergence, speed and size, and the table that compares models.

loading.py      loads any model that is to be measured
tokenizers.py   whether models read a text as the same tokens
protocols.py    texts, and how each protocol cuts them into windows
perplexity.py   windows of a text, perplexity, KL and agreement with a reference
bootstrap.py    intervals of these figures (breakdown.py: the figures by position and by kind of token)
generations.py  what models write after prompts, counted (samples.py: a few answers to read)
tasks.py        zero-shot tasks of lm-eval
speed.py        decoded tokens a second, bytes on disk by part (memory.py, energy.py)
layers.py       what quantization did to each layer
adapters.py     what is lost where an adapter is served beside a packed base
compare.py      one table and one JSON over several models
gate.py         limits that a model must keep, for CI
advice.py       what to do with a model, by its KL
budget.py       what training tokens buy, as it was measured
report.py       a comparison with its gate and advice (html.py, pictures.py, tables.py write it)
documents.py    every field of what is written as JSON

This package and the public function `llmqat.evaluate` share a name, and Python puts the package under it as soon as any
module in here is imported. So the package is callable, and calling it is calling `perplexity.evaluate`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from llmqat.evaluate.perplexity import evaluate

        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage

"""Judging a model: perplexity and divergence, speed and size, and the table that compares models.

perplexity.py  windows of a text, perplexity, KL and agreement with a reference
speed.py       decoded tokens a second, bytes on disk by part
compare.py     one table and one JSON over several models
advice.py      what to do with a model, by its KL
budget.py      what training tokens buy, as it was measured
documents.py   every field of what is written as JSON

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

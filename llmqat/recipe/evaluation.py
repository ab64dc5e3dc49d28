"""Texts cut into windows, and models compared on them, as the recipe's `evaluate` section says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmqat.data.pydoc import pydoc_text
from llmqat.data.text import read_texts
from llmqat.evaluate.compare import Comparison, candidate_from, compare, progress_bar
from llmqat.evaluate.perplexity import TokenWindows, windows_from_text
from llmqat.models import load_tokenizer, resolve_spec
from llmqat.recipe.config import PYDOC, EvaluationSettings


def evaluation_windows(settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, TokenWindows]:
    """Returns the windows of each text by the name that the table shows.

    Raises:
        FileNotFoundError: a text is not there.
        ValueError: a text is not UTF-8, or shorter than a window.
    """
    windows = {}
    for source in settings.texts:
        name = source if source == PYDOC else Path(source).name
        text = pydoc_text() if source == PYDOC else "\n\n".join(read_texts(Path(source)))
        windows[name] = windows_from_text(
            text, tokenizer, settings.window, settings.stride, settings.max_windows, source
        )
    return windows


def compare_models(specs: Sequence[str], settings: EvaluationSettings, reference: str | None = None) -> Comparison:
    """Returns the comparison of models, loaded one at a time, on the windows that `settings` describe.

    Args:
        specs: what `export.load_any` takes.
        settings: texts and windows.
        reference: the full-precision model that divergence is measured from; it need not be among `specs`.

    Raises:
        FileNotFoundError: a model or a text is not there.
        ValueError: a model or a text does not do.
    """
    listed = [*([] if reference is None or reference in specs else [reference]), *specs]
    candidates = [candidate_from(spec, "full precision" if spec == reference else "other", spec) for spec in listed]
    windows = evaluation_windows(settings, load_tokenizer(resolve_spec(listed[0]), listed[0]))
    with progress_bar() as progress:
        return compare(candidates, windows, batch_size=settings.batch_size, speed=settings.speed, progress=progress)

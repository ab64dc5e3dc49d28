"""Texts cut into windows, and models compared on them, as the recipe's `evaluate` section says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmqat.data.blocks import hash_text
from llmqat.data.documents import document_hash
from llmqat.data.pydoc import pydoc_text
from llmqat.data.text import hash_file, text_files
from llmqat.evaluate.compare import Comparison, candidate_from, compare, progress_bar
from llmqat.evaluate.perplexity import TokenWindows
from llmqat.evaluate.protocols import HUB_PREFIX, PYDOC, text_windows
from llmqat.export.checkpoint import RUN_FILE
from llmqat.models import load_tokenizer, resolve_spec
from llmqat.recipe.config import EvaluationSettings


def evaluation_windows(
    settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase, model_length: int | None = None
) -> dict[str, TokenWindows]:
    """Returns the windows of each text by the name that the table shows.

    Args:
        settings: protocol, texts and windows.
        tokenizer: of the models.
        model_length: tokens that the models take at most, for protocols that use all of them.

    Raises:
        FileNotFoundError: a text is not there.
        ValueError: a text cannot be read, or is shorter than a window.
    """
    return {
        source if source.startswith((PYDOC, HUB_PREFIX)) else Path(source).name: text_windows(
            settings.protocol,
            source,
            tokenizer,
            window=settings.window,
            stride=settings.stride,
            max_windows=settings.max_windows,
            model_length=model_length,
        )
        for source in settings.texts
    }


TRAINED_TEXTS = ("text", "calibration_text")
"""Entries of a run's record that say which text a model has seen."""


def check_untrained(settings: EvaluationSettings, record: Mapping[str, Any], owner: str) -> None:
    """Raises ValueError where a text is to be scored that `record`, a run's facts, lists among what was learned.

    Documents are told by the hash of their whole text, so the same words in another file are not found.

    Args:
        settings: texts, and whether such a text is allowed.
        record: of a run, as `llmqat.json` holds it.
        owner: whose record it is, for the message.
    """
    if settings.allow_trained_text:
        return
    seen = {
        digest
        for name in TRAINED_TEXTS
        for digest in ((record.get(name) or {}).get("documents") or {}).get("hashes", "").split()
    }
    for source in settings.texts if seen else ():
        for name, digest in _documents_of(source).items():
            if digest in seen:
                raise ValueError(
                    f"evaluate.texts: {name} is text that {owner} calibrates or trains on, so its figures would say "
                    "nothing of other text; choose another text, or ask for it: evaluate.allow_trained_text=true "
                    "(--allow-trained-text)"
                )


def _documents_of(source: str) -> dict[str, str]:
    """Returns the hash of each document of an evaluation text, by name; none of a data set on the hub."""
    if source.startswith(HUB_PREFIX):
        return {}
    if source == PYDOC:
        return {PYDOC: hash_text(document_hash(pydoc_text()))}
    found = {str(file): hash_file(file) for file in text_files(Path(source))}
    return {name: hash_text(digest) for name, digest in found.items() if digest is not None}


def _record_of(spec: str) -> dict[str, Any]:
    """Returns the run's facts beside a local checkpoint; nothing where there are none."""
    file = Path(spec) / RUN_FILE
    if not file.is_file():
        return {}
    return json.loads(file.read_text(encoding="utf-8")).get("run") or {}


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
    for spec in listed:
        check_untrained(settings, _record_of(spec), spec)
    windows = evaluation_windows(settings, load_tokenizer(resolve_spec(listed[0]), listed[0]))
    with progress_bar() as progress:
        return compare(candidates, windows, batch_size=settings.batch_size, speed=settings.speed, progress=progress)

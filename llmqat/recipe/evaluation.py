"""Texts cut into windows, and models compared on them, as the recipe's `evaluate` section says."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmqat.data import TextSplits, open_text
from llmqat.data.blocks import hash_number
from llmqat.data.config import HUB_PREFIX, PYDOC, hub_keys
from llmqat.data.documents import document_hash
from llmqat.data.hub import check_name
from llmqat.data.pydoc import pydoc_text
from llmqat.data.text import hash_file, is_rows, text_config, text_files
from llmqat.evaluate.compare import (
    Candidate,
    Comparison,
    ComparisonProgress,
    Extra,
    candidate_from,
    compare,
    progress_bar,
)
from llmqat.evaluate.gate import Rule, check_rules, check_same_prompts, check_same_texts
from llmqat.evaluate.generations import Prompts, answered, open_prompts
from llmqat.evaluate.layers import weight_errors
from llmqat.evaluate.loading import check_can_be_read, check_window, longest_of
from llmqat.evaluate.perplexity import TokenWindows, windows_from_rows
from llmqat.evaluate.protocols import text_windows
from llmqat.evaluate.samples import answers, completions
from llmqat.evaluate.tasks import TaskSettings, opened_tasks
from llmqat.evaluate.tokenizers import shared_tokenizer
from llmqat.export.checkpoint import record_of
from llmqat.extras import check_installed
from llmqat.layers import audit
from llmqat.models import PACKAGE_PREFIX, model_file, read_config, resolve_spec
from llmqat.paths import same_place
from llmqat.recipe.config import EvaluationSettings
from llmqat.recipe.findings import all_of
from llmqat.recipe.folder import CHECKPOINT_FOLDER

log = logging.getLogger(__name__)


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
        name: source_windows(settings, source, tokenizer, model_length)
        for name, source in text_names(settings.texts).items()
    }


def source_windows(
    settings: EvaluationSettings, source: str, tokenizer: PreTrainedTokenizerBase, model_length: int | None = None
) -> TokenWindows:
    """Returns the windows of one text, as `evaluation_windows` does of all."""
    return text_windows(
        settings.protocol,
        source,
        tokenizer,
        window=settings.window,
        stride=settings.stride,
        max_windows=settings.max_windows,
        model_length=model_length,
    )


HELD_OUT = "held-out answers"
"""What tables call the answers that a recipe keeps from training."""


def held_out_windows(text: TextSplits, settings: EvaluationSettings) -> dict[str, TokenWindows]:
    """Returns the answers of the validation split as a text of the table, a conversation a window; none without labels.

    As many conversations as have the tokens of another text's windows, one at least.
    """
    held_out = text.validation
    if held_out is None or held_out.rows.scored is None:
        return {}
    window = settings.window or held_out.block_size
    most = None if settings.max_windows is None else settings.max_windows * window
    return {HELD_OUT: windows_from_rows(held_out.rows, held_out.source, most)}


def answer_extras(
    windows: Mapping[str, TokenWindows], tokenizer: PreTrainedTokenizerBase, own: str
) -> dict[str, Extra]:
    """Returns what lets the original and the row `own` answer the first conversations of the table, if any."""
    chats = next((one for one in windows.values() if one.answers), None)
    if chats is None:
        return {}

    def take(model: torch.nn.Module, candidate: Candidate) -> list[dict[str, str]] | None:
        answer = candidate.role == "full precision" or candidate.name == own
        return answers(model, tokenizer, chats) if answer else None

    return {"answers": take}


ANSWERED = "longest prompt + max_new_tokens"
"""What errors call the most tokens that a model reads when it answers."""


def evaluation_prompts(settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase) -> Prompts | None:
    """Returns the prompts that models are to answer; None for none.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: one cannot be read.
    """
    if settings.prompts is None:
        return None
    return open_prompts(settings.prompts, tokenizer, settings.max_prompts, settings.max_new_tokens)


def generation_extras(
    prompts: Prompts | None, tokenizer: PreTrainedTokenizerBase, progress: ComparisonProgress
) -> dict[str, Extra]:
    """Returns what lets every model of a comparison answer `prompts`, if any."""
    if prompts is None:
        return {}

    def take(model: Any, candidate: Candidate) -> dict[str, Any]:
        return answered(model, tokenizer, prompts, partial(progress, f"{candidate.name} writing"))

    return {"generations": take}


def text_names(sources: Sequence[str]) -> dict[str, str]:
    """Returns texts by what tables call them: the last part of a path, longer where that does not tell them apart.

    A text that is given twice is there once.
    """
    texts = _once(sources)
    named = [source == PYDOC or source.startswith(HUB_PREFIX) for source in texts]
    parts = [[text] if whole else list(Path(text).parts) for text, whole in zip(texts, named, strict=True)]
    return dict(zip(_told_apart(parts) or texts, texts, strict=True))


def _once(given: Iterable[str]) -> list[str]:
    """Returns models or texts without those that are there already, perhaps by another path."""
    kept: list[str] = []
    for entry in given:
        if not any(entry == other or (Path(entry).exists() and same_place(entry, other)) for other in kept):
            kept.append(entry)
    return kept


def _told_apart(parts: Sequence[Sequence[str]]) -> list[str] | None:
    """Returns the fewest last parts that tell names apart, as many of each; None where all of them do not."""
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-count:]).replace("//", "/") for part in parts]
        if len(set(names)) == len(names):
            return names
    return None


TRAINED_TEXTS = ("text", "calibration_text")
"""Entries of a run's record that say which text a model has seen."""
EARLIER_TEXTS = "earlier_texts"
"""Entry of a run's record that lists what the checkpoint it began with had seen, as entries like those."""


def check_untrained(settings: EvaluationSettings, seen: Iterable[Tensor], owner: str) -> None:
    """Raises ValueError where a text is to be scored that is among what was learned.

    Documents are told by the hash of their whole text, so the same words in another file are not found.

    Args:
        settings: texts, and whether such a text is allowed.
        seen: hashes of the documents that were learned, int64 [M] each.
        owner: who has learned them, for the message.
    """
    learned = [hashes for hashes in seen if len(hashes)]
    if settings.allow_trained_text or not learned:
        return
    for source in settings.texts:
        for name, digest in _documents_of(source).items():
            if any(bool((hashes == digest).any()) for hashes in learned):
                raise ValueError(
                    f"evaluate.texts: {name} is text that {owner} calibrates or trains on, so its figures would say "
                    "nothing of other text; choose another text, or ask for it: evaluate.allow_trained_text=true "
                    "(--allow-trained-text)"
                )


def documents_learned(text: TextSplits) -> list[Tensor]:
    """Returns the hashes of all documents that a run calibrates or trains on, however many there are."""
    splits = (text.train, text.calibrated_on)
    return [blocks.documents for blocks in splits if blocks.documents is not None]


def documents_recorded(record: Mapping[str, Any]) -> list[Tensor]:
    """Returns the hashes of documents that `record`, a run's facts in `llmqat.json`, says its checkpoint has seen."""
    found = [entry.get("document_hashes") or {} for entry in texts_seen(record)]
    return [torch.tensor([hash_number(text) for text in hashes.get("hashes", "").split()]) for hashes in found]


def texts_seen(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the texts that `record`, a run's facts, says its checkpoint has seen, the earliest first."""
    own = [record[name] for name in TRAINED_TEXTS if record.get(name)]
    return [*(record.get(EARLIER_TEXTS) or []), *own]


def _documents_of(source: str) -> dict[str, int]:
    """Returns the hash of each document of an evaluation text, by name; none of a data set on the hub."""
    if source.startswith(HUB_PREFIX):
        return {}
    if source == PYDOC:
        return {PYDOC: document_hash(pydoc_text())}
    path = Path(source)
    if is_rows(path):
        rows = open_text(text_config(source)).pieces()
        return {f"row of {source}, document {number}": piece.document for number, piece in enumerate(rows)}
    found = {str(file): hash_file(file) for file in text_files(path)}
    return {name: digest for name, digest in found.items() if digest is not None}


def compare_models(
    specs: Sequence[str],
    settings: EvaluationSettings,
    reference: str | None = None,
    *,
    tasks: TaskSettings | None = None,
    details: bool = False,
    rules: Sequence[Rule] = (),
    baseline: Mapping[str, Any] | None = None,
) -> Comparison:
    """Returns the comparison of models, loaded one at a time, on the windows that `settings` describe.

    Args:
        specs: what `evaluate.loading` loads.
        settings: texts and windows.
        reference: the full-precision model that divergence is measured from; it need not be among `specs`. The first of
            them where not given and there are several.
        tasks: zero-shot tasks to run as well.
        details: also take what the HTML report shows: samples, errors of layers, coverage.
        rules: the gate that the result will be judged by; what it asks for must be measured.
        baseline: the report that it will be judged against; it must be of the same windows.

    Raises:
        FileNotFoundError: a model or a text is not there.
        ValueError: a model or a text does not do.
        ImportError: tasks are asked for and lm-eval is not installed, or a package that reads a model is not.
        NotMeasured: one of the models could not be loaded or measured, and others were.
    """
    if reference is None and len(specs) > 1:
        reference = specs[0]
    given = [*([] if reference is None else [reference]), *specs]
    if tasks is not None:
        check_installed("lm_eval", "a zero-shot task")
    if any(spec.endswith(".gguf") for spec in given):
        check_installed("gguf", "a .gguf file")
    listed = _once(given)
    if len(listed) < len({*given}):
        log.warning("some of the models are one folder or file; it is measured once: %s", ", ".join(listed))
    models = dict(zip(short_names(listed), listed, strict=True))
    texts = [partial(check_there, text) for text in settings.texts]
    all_of([*texts, *(partial(_check_model, spec) for spec in listed)])
    for spec in listed:
        check_untrained(settings, documents_recorded(record_of(spec)), spec)

    def windows_of(tokenizer: Any) -> dict[str, TokenWindows]:
        return evaluation_windows(settings, tokenizer, longest_of(listed[0]))

    shared = shared_tokenizer(models, windows_of, prompted=settings.prompts is not None)
    candidates = [
        candidate_from(spec, "full precision" if spec == reference else "other", name, notes=shared.notes.get(name, ()))
        for name, spec in models.items()
    ]
    tokenizer = shared.tokenizer
    if baseline is not None:
        check_same_texts({name: windows.described() for name, windows in shared.windows.items()}, baseline)
    for spec in listed:
        check_window(spec, max(cut.read_length for cut in shared.windows.values()))
    prompts = _opened_prompts(settings, tokenizer, listed, baseline)
    given_settings = {**settings.model_dump(mode="json"), "reference": reference, "models": list(specs)}
    extras = _details(tokenizer, reference) if details else {}
    with ExitStack() as stack:
        ready = None if tasks is None else stack.enter_context(opened_tasks(tasks))
        check_rules(
            rules,
            [*models],
            None if reference is None else next(iter(models)),
            baseline,
            speed=settings.speed,
            prompts=prompts is not None,
            words=any(windows.words is not None for windows in shared.windows.values()),
            tasks=() if ready is None else ready.names,
        )
        if ready is not None:
            extras["tasks"] = lambda model, _: ready.run(model, tokenizer)
        progress = stack.enter_context(progress_bar())
        return compare(
            candidates,
            shared.windows,
            batch_size=settings.batch_size,
            speed=settings.speed,
            progress=progress,
            tokenizer=tokenizer,
            extras={**extras, **generation_extras(prompts, tokenizer, progress)},
            settings=given_settings,
        )


def _opened_prompts(
    settings: EvaluationSettings, tokenizer: Any, specs: Sequence[str], baseline: Mapping[str, Any] | None
) -> Prompts | None:
    """Returns the prompts that the models `specs` are to answer; None for none.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: one cannot be read, a model does not take it, or the baseline's models have answered others.
    """
    prompts = evaluation_prompts(settings, tokenizer)
    if prompts is not None:
        for spec in specs:
            check_window(spec, prompts.longest, ANSWERED)
        for row in () if baseline is None else baseline["rows"]:
            check_same_prompts(prompts.described(), row)
    return prompts


def check_there(text: str) -> None:
    """Raises where a text is not there, or is none; it is not read."""
    if text.startswith(HUB_PREFIX):
        check_name(hub_keys(text)["name"])
    elif text != PYDOC and not (is_rows(Path(text)) and Path(text).exists()):
        text_files(Path(text))


def _check_model(spec: str) -> None:
    """Raises where a model is not there, or what reads it is not; a file is read when it is loaded."""
    if model_file(spec) is None:
        read_config(resolve_spec(spec), spec)
        check_can_be_read(spec)


def short_names(specs: Sequence[str]) -> list[str]:
    """Returns what tables call models: the last part of their path, longer where that is not enough to tell them apart.

    A checkpoint in a run folder, RUN/model, is called by its run.
    """
    parts = [[part for part in spec.removeprefix(PACKAGE_PREFIX).split("/") if part] for spec in specs]
    return _told_apart([part[:-1] if len(part) > 1 and part[-1] == CHECKPOINT_FOLDER else part for part in parts]) or [
        *specs
    ]


def _details(tokenizer: PreTrainedTokenizerBase, reference: str | None) -> dict[str, Extra]:
    details: dict[str, Extra] = {
        "samples": lambda model, _: completions(model, tokenizer),
        "coverage": lambda model, _: audit(model).to_dict(),
    }
    if reference is not None:
        details["weight_errors"] = lambda model, _: weight_errors(model, reference)
    return details

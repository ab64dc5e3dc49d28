"""Zero-shot tasks, scored by lm-eval, the library: its own tasks by name, or a folder of local ones.

A local task is a file `NAME.jsonl` with a line for each question:

    {"query": "Question: what is ...", "choices": ["one", "another"], "gold": 1}

It becomes a harness task of multiple choice: each choice is scored as the continuation of the query, `acc` takes the
most probable one, `acc_norm` the most probable a byte. A query that begins with "Question:" is closed by "Answer:":
lm-eval asks ARC and PIQA so, and figures agree with those of its own tasks on the same questions.

Models run as they are, packed ones with llmqat's kernels; log-probabilities are taken in float32.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmqat.data.text import read_text
from llmqat.extras import check_installed, require
from llmqat.files import write_whole
from llmqat.kernels import float_products
from llmqat.terminal.bars import bars_move

log = logging.getLogger(__name__)

FIELDS = {"query", "choices", "gold"}
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks, and how much of them."""

    names: tuple[str, ...] = ()
    """Tasks of lm-eval, or files of `folder` without their suffix, which come first; all of the folder if not given."""
    folder: Path | None = None
    """Local tasks."""
    limit: int | None = None
    """Questions of each task; None means all."""
    fewshot: int | None = None
    """Answered questions that precede each; None leaves it to the task."""
    batch_size: int = 8


def write_task_folder(source: Path, folder: Path) -> list[str]:
    """Writes a harness task (.yaml) into `folder` for each .jsonl file of `source`; returns their names.

    Raises:
        FileNotFoundError: there is no such file in `source`.
        ValueError: a line of a file is no question, or a file holds none.
    """
    files = sorted(source.glob("*.jsonl")) if source.is_dir() else []
    if not files:
        raise FileNotFoundError(f"task folder {source} holds no .jsonl file of query, choices and gold")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        _check_questions(file)
        task = {
            "task": file.stem,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{query.strip()}}{% if query.startswith('Question:') and 'Answer:' not in query %}"
            "\nAnswer:{% endif %}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS],
            "metadata": {"version": 1.0},
        }
        write_whole(folder / f"{file.stem}.yaml", json.dumps(task, indent=2) + "\n")  # JSON is YAML
    return [file.stem for file in files]


@contextmanager
def opened_tasks(settings: TaskSettings) -> Iterator[Tasks]:
    """Yields the tasks, ready to run; local ones live in a temporary folder meanwhile.

    Raises:
        ImportError: lm-eval is not installed.
        FileNotFoundError: the folder holds no task.
        ValueError: a task is unknown, or its questions cannot be read.
    """
    check_installed("lm_eval", "a zero-shot task")
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as temporary:
        local = [] if settings.folder is None else write_task_folder(settings.folder, Path(temporary))
        names = settings.names or tuple(local)
        if not names:
            raise ValueError("no task was given; give --tasks NAME,NAME or --task-folder DIR")
        only_local = set(names) <= set(local)
        manager = TaskManager(include_path=temporary if local else None, include_defaults=not only_local)
        if unknown := [name for name in names if name not in manager.all_tasks]:
            raise ValueError(
                f"unknown tasks: {', '.join(unknown)}; local ones: {', '.join(local) or 'none'}; those of lm-eval are "
                "listed by `lm-eval ls tasks`"
            )
        _check_readable(names, manager)
        yield Tasks(names, manager, settings)


def _check_readable(names: Sequence[str], manager: Any) -> None:
    """Raises ValueError where lm-eval cannot read the questions of a task: now, and not when a model is loaded."""
    for name in names:
        try:
            manager.load(name)
        except Exception as error:  # a task is code and a data set, which can fail in any way
            raise ValueError(f"task {name} cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def _no_search_for_a_commit() -> Iterator[None]:
    """Inside, lm-eval does not ask git for the commit of the working directory: git says "fatal:" where it is none."""
    check_installed("lm_eval", "a zero-shot task")
    import lm_eval.evaluator

    usual = lm_eval.evaluator.get_git_commit_hash
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        lm_eval.evaluator.get_git_commit_hash = usual


@dataclass(frozen=True)
class Tasks:
    """Tasks that are ready to be run on one model after the other."""

    names: tuple[str, ...]
    manager: Any  # lm_eval's TaskManager
    settings: TaskSettings

    def run(self, model: nn.Module, tokenizer: Any) -> dict[str, dict[str, Any]]:
        """Returns, by task, each metric's mean, and under `samples` its value for each question."""
        lm_eval = require("lm_eval", "a zero-shot task")
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=self.settings.batch_size,
            softmax_dtype=torch.float32,
        )
        if not bars_move():
            for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(harness, name, partial(getattr(harness, name), disable_tqdm=True))
        with _no_search_for_a_commit(), float_products():
            found = lm_eval.simple_evaluate(
                model=harness,
                tasks=list(self.names),
                task_manager=self.manager,
                num_fewshot=self.settings.fewshot,
                limit=self.settings.limit,
                bootstrap_iters=0,
            )
        return {name: _summary(samples, found["results"][name]) for name, samples in found["samples"].items()}


def average(tasks: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Returns the mean over tasks of `acc_norm`, or of `acc` where a task has no other."""
    headline = [task.get("acc_norm", task.get("acc")) for task in tasks.values()]
    known = [value for value in headline if value is not None]
    return sum(known) / len(known) if known else None


def _summary(samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns figures of a task and what each question scored; where answers are filtered, those of each filter.

    Args:
        samples: lm-eval's record of each question.
        results: lm-eval's figures by "metric,filter". What is no mean over questions, such as a perplexity, is taken
            from here, and has no value for each question.
    """
    filters = [*dict.fromkeys(str(sample.get("filter", "none")) for sample in samples)]
    values: dict[str, list[float]] = {}
    means: dict[str, float] = {}
    count = 0
    for one in filters:
        own = [sample for sample in samples if str(sample.get("filter", "none")) == one]
        ordered = sorted(own, key=lambda sample: int(sample["doc_id"]))
        count = len(ordered)
        for name in ordered[0]["metrics"]:
            key = name if len(filters) == 1 else f"{name},{one}"
            figure = results.get(f"{name},{one}")
            if isinstance(ordered[0].get(name), (int, float)):
                entries = [float(sample[name]) for sample in ordered]
                means[key] = sum(entries) / count if figure is None else float(figure)
                if math.isclose(means[key], sum(entries) / count, rel_tol=1e-6, abs_tol=1e-9):
                    values[key] = entries
            elif isinstance(figure, (int, float)):
                means[key] = float(figure)
    return {"questions": count, **means, "samples": values}


def _check_questions(file: Path) -> None:
    """Raises ValueError where a line of `file` is no question; says which line and why."""
    asked: dict[str, int] = {}
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        wrong = _wrong_with(line)
        if wrong is not None:
            raise ValueError(f"{file} line {number} is no question: {wrong}")
        question = json.loads(line)
        key = json.dumps([question["query"], question["choices"]])
        if key in asked:
            log.warning("%s line %d asks what line %d asks; it counts twice", file, number, asked[key])
        asked.setdefault(key, number)
    if not asked:
        raise ValueError(f"{file} holds no question; a line is JSON with the keys {', '.join(sorted(FIELDS))}")


def _wrong_with(line: str) -> str | None:
    """Returns what keeps a line from being a question; None where nothing does."""
    try:
        question = json.loads(line)
    except ValueError as error:
        return f"it is not JSON ({error})"
    if not isinstance(question, dict) or not question.keys() >= FIELDS:
        return f"expected JSON with the keys {', '.join(sorted(FIELDS))}"
    query, choices, gold = question["query"], question["choices"], question["gold"]
    if not isinstance(query, str) or not query.strip():
        return f"query={query!r} is no text"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        return f"choices={choices!r} are not two texts or more"
    if any(not choice.strip() for choice in choices):
        return f"choices={choices!r} are not all there"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        return f"gold={gold!r} is not the number of a choice, 0 to {len(choices) - 1}"
    if choices.count(choices[gold]) > 1:  # wrong ones may be there twice, as in ARC
        return f"choices={choices!r} have the right one, {choices[gold]!r}, more than once"
    return None

"""Zero-shot tasks, scored by lm-eval, the library: its own tasks by name, or a folder of local ones.

A local task is a file `NAME.jsonl` with a line for each question:

    {"query": "Question: what is ...", "choices": ["one", "another"], "gold": 1}

It becomes a harness task of multiple choice: each choice is scored as the continuation of the query, `acc` takes the
most probable one, `acc_norm` the most probable a byte. A query that begins with "Question:" is closed by "Answer:":
lm-eval asks ARC and PIQA so, and figures agree with those of its own tasks on the same questions.

Models run as they are, packed ones with llmqat's kernels; log-probabilities are taken in float32.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmqat.models import write_whole

FIELDS = {"query", "choices", "gold"}
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks, and how much of them."""

    names: tuple[str, ...] = ()
    """Tasks of lm-eval, or files of `folder` without their suffix; all of the folder where not given."""
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
        ValueError: the first line of a file is no question.
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
        ValueError: a task is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("tasks are scored by lm-eval, which is not installed; run `pip install 'llmqat[eval]'`")
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
        yield Tasks(names, manager, settings)


@dataclass(frozen=True)
class Tasks:
    """Tasks that are ready to be run on one model after the other."""

    names: tuple[str, ...]
    manager: Any  # lm_eval's TaskManager
    settings: TaskSettings

    def run(self, model: nn.Module, tokenizer: Any) -> dict[str, dict[str, Any]]:
        """Returns, by task, each metric's mean, and under `samples` its value for each question."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=self.settings.batch_size,
            softmax_dtype=torch.float32,
        )
        found = lm_eval.simple_evaluate(
            model=harness,
            tasks=list(self.names),
            task_manager=self.manager,
            num_fewshot=self.settings.fewshot,
            limit=self.settings.limit,
            bootstrap_iters=0,
        )
        return {name: _summary(samples) for name, samples in found["samples"].items()}


def average(tasks: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Returns the mean over tasks of `acc_norm`, or of `acc` where a task has no other."""
    headline = [task.get("acc_norm", task.get("acc")) for task in tasks.values()]
    known = [value for value in headline if value is not None]
    return sum(known) / len(known) if known else None


def _summary(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    metrics = [name for name in ordered[0]["metrics"] if isinstance(ordered[0].get(name), (int, float))]
    values = {name: [float(sample[name]) for sample in ordered] for name in metrics}
    means = {name: sum(entries) / len(entries) for name, entries in values.items()}
    return {"questions": len(ordered), **means, "samples": values}


def _check_questions(file: Path) -> None:
    with file.open(encoding="utf-8") as lines:
        first = next(lines, "")
    try:
        question = json.loads(first)
    except ValueError:
        question = None
    if not isinstance(question, dict) or not question.keys() >= FIELDS:
        raise ValueError(f"{file} line 1 is no question: expected JSON with the keys {', '.join(sorted(FIELDS))}")

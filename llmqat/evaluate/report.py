"""A comparison with its verdict: the gate, the advice, and the files that show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from llmqat.evaluate.advice import THRESHOLD, Advice, advice, first_steps
from llmqat.evaluate.bootstrap import mean_difference
from llmqat.evaluate.compare import Comparison, render, render_parts, to_json
from llmqat.evaluate.documents import head
from llmqat.evaluate.gate import REFERENCE, Check, Rule, judge, read_report
from llmqat.evaluate.html import to_html
from llmqat.evaluate.tables import accuracy_metric, to_csv, to_markdown
from llmqat.files import write_whole
from llmqat.paths import check_outputs, same_place


@dataclass(frozen=True)
class Verdict:
    """What a comparison amounts to."""

    comparison: Comparison
    report: Mapping[str, Any]  # the comparison as JSON takes it, with checks and advice
    checks: tuple[Check, ...]
    advice: tuple[Advice, ...]
    drift: tuple[str, ...]  # what changed since the baseline, a line a model and text

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return not self.broken

    def rendered(self) -> RenderableType:
        """Returns for the terminal what the comparison's own tables do not say."""
        lines = [Text(line) for line in (*_task_lines(self.report), *self.drift)]
        lines += [Text(str(check), style="green" if check.passed else "bold red") for check in self.checks]
        lines += [Text(one.said, style="bold") for one in self.advice]
        return Group(*lines)

    @property
    def broken(self) -> tuple[Check, ...]:
        """Limits that are not kept."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def next(self) -> list[str]:
        """Commands to run, by the advice; those that lead to one where there is none."""
        return [line for one in self.advice for line in one.next] or first_steps(self.report)

    def write(self, json_file: Path | None, csv: Path | None, markdown: Path | None, html: Path | None) -> list[Path]:
        """Writes the files that are asked for, each whole or not at all, and as many of them as can be; returns them.

        Raises:
            OSError: one could not be written, when all the others are.
        """
        written: list[Path] = []
        failed: list[str] = []
        for file, make in ((json_file, to_json), (csv, to_csv), (markdown, to_markdown), (html, to_html)):
            if file is None:
                continue
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, make(self.report))
                written.append(file)
            except OSError as error:
                failed.append(f"{file} could not be written: {error.strerror or error}")
        if failed:
            raise OSError("; ".join(failed))
        return written


def measured(comparison: Comparison) -> RenderableType:
    """Returns the tables of a comparison for the terminal."""
    return Group(render(comparison), render_parts(comparison))


def check_files(files: Mapping[str, Path | None], read: Iterable[str | Path]) -> None:
    """Raises where a report could not be written, or would replace another, or what is read.

    Args:
        files: by their options; None where one was not given.
        read: models, texts and whatever else is read. In a folder of these, an existing file is replaced only if it is
            an earlier report, or its name ends with .html or .csv.

    Raises:
        OSError: a file cannot be written.
        ValueError: it would replace something.
    """
    sources = list(read)
    check_outputs(files, sources)
    for option, file in files.items():
        if file is None or not file.exists() or file.suffix in (".html", ".csv"):
            continue
        among = any(Path(source).is_dir() and same_place(source, file.parent) for source in sources)
        if among and not _is_report(file):
            raise ValueError(f"{option}={file} would replace a file of {file.parent}, which is read; give another file")


def _is_report(file: Path) -> bool:
    try:
        read_report(file)
    except ValueError:
        return False
    return True


def verdict_on(
    comparison: Comparison,
    rules: Sequence[Rule] = (),
    baseline: Mapping[str, Any] | None = None,
    threshold: float = THRESHOLD,
) -> Verdict:
    """Returns the verdict on `comparison`.

    Args:
        comparison: what was measured.
        rules: the gate.
        baseline: an earlier report of the same text, which relative rules and the drift are about.
        threshold: KL from the reference, nats a token, up to which a model is as good as it.

    Raises:
        ValueError: a rule asks for what was not measured, or the baseline is of another text.
    """
    report = comparison.to_dict()
    checks = judge(rules, report, baseline)
    said = advice(report, threshold)
    drift = () if baseline is None else tuple(_drift(report, baseline))
    judged = [{"rule": str(check.rule), "said": str(check), "passed": check.passed} for check in checks]
    advised = [one.to_dict() for one in said]
    document = {**head("comparison"), **report, "gate": judged, "advice": advised, "drift": list(drift)}
    return Verdict(comparison, document, checks, said, drift)


def _drift(report: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    before = {row["name"]: row for row in baseline["rows"]}
    lines = []
    for row in report["rows"]:
        for text, now in row["texts"].items():
            then = before.get(row["name"], {}).get("texts", {}).get(text)
            if then is not None and then["perplexity"]:
                change = now["perplexity"] / then["perplexity"] - 1
                lines.append(
                    f"{row['name']} on {text}: perplexity {then['perplexity']:.4f} then, {now['perplexity']:.4f} now "
                    f"({change:+.2%})"
                )
    return lines


def _task_lines(report: Mapping[str, Any]) -> list[str]:
    """Returns a line for each model's accuracies, with paired intervals of their differences from the reference's."""
    reference = next((row for row in report["rows"] if row["role"] == REFERENCE), None)
    lines = []
    for row in report["rows"]:
        for name, task in (row.get("tasks") or {}).items():
            judged_by = accuracy_metric(task)
            metric = judged_by or next(iter(task["samples"]), None)
            if metric is None:  # it has no figure for each question
                continue
            shown = "" if judged_by else f" {metric}"
            line = f"{row['name']}: {name}{shown} {task[metric]:.4f} of {task['questions']} questions"
            others = {} if reference is None else (reference.get("tasks") or {}).get(name, {}).get("samples", {})
            if reference is not None and row is not reference and metric in others and metric in task["samples"]:
                apart = mean_difference(task["samples"][metric], others[metric])
                noise = ", noise" if apart.holds_zero else ""
                line += f" ({apart.low:+.4f} to {apart.high:+.4f} from {reference['name']}{noise})"
            lines.append(line)
    return lines

"""A report as CSV and as Markdown: a line for each model and text, the same columns in both."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from typing import Any

from llmqat.terminal import markdown_table

Cell = str | int | float | None
COLUMNS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Cell]] = {
    "model": lambda row, _: row["name"],
    "made by": lambda row, _: row.get("method") or row["role"],
    "bits a weight": lambda row, _: row["bits_per_weight"],
    "MB on disk": lambda row, _: None if row["bytes_on_disk"] is None else row["bytes_on_disk"] / 1e6,
    "perplexity": lambda _, text: text["perplexity"],
    "± (95 %)": lambda _, text: _half_width(text, "perplexity"),
    "word perplexity": lambda _, text: text.get("word_perplexity"),
    "KL": lambda _, text: text["kl"],
    "KL ±": lambda _, text: _half_width(text, "kl"),
    "reverse KL": lambda _, text: text.get("reverse_kl"),
    "top-1": lambda _, text: text["top1"],
    "top-5 overlap": lambda _, text: text.get("top5"),
    "decode tok/s": lambda row, _: row["decode_tokens_per_second"],
    "first token ms": lambda row, _: _cost(row, "first_token_seconds", 1e3),
    "batch tok/s": lambda row, _: _cost(row, "batch_tokens_per_second"),
    "load s": lambda row, _: _cost(row, "load_seconds"),
    "peak MB": lambda row, _: _cost(row, "peak_bytes", 1e-6),
    "J a token": lambda row, _: _cost(row, "joules_per_token"),
    "not ended": lambda row, _: _written(row, "not_ended"),
    "tokens an answer": lambda row, _: _written(row, "length"),
    "repeated 4-grams": lambda row, _: _written(row, "repeated"),
}
"""Heading -> the cell of a row and one of its texts."""


def to_csv(report: Mapping[str, Any]) -> str:
    """Returns the report as CSV, figures in full precision; what was not measured is empty."""
    headings, lines = _lines(report)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(["" if cell is None else cell for cell in line] for line in lines)
    return buffer.getvalue()


def to_markdown(report: Mapping[str, Any]) -> str:
    """Returns the report as a Markdown table, columns that hold nothing left out, and where it was measured below."""
    headings, lines = _lines(report)
    kept = [index for index in range(len(headings)) if any(line[index] is not None for line in lines)]
    rows = [[_shown(line[index]) for index in kept] for line in lines]
    table = markdown_table([headings[index] for index in kept], rows)
    texts = "".join(
        f"- {name}: {text['windows']} windows of {text['window']} tokens, {text['tokens']:,} scored, "
        f"sha256 {text['sha256'][:12]}\n"
        for name, text in report["texts"].items()
    )
    machine = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    made = f"- llmqat {report['llmqat']}, {report['date']}: `{report['command']}`\n" if "schema" in report else ""
    return f"{table}\n\n{texts}- {machine}\n{made}"


def _lines(report: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    tasks = list(dict.fromkeys(name for row in report["rows"] for name in row.get("tasks") or {}))
    headings = ["text", *COLUMNS, *tasks]
    lines: list[list[Cell]] = []
    for name in report["texts"]:
        for row in report["rows"]:
            cells = [column(row, row["texts"][name]) for column in COLUMNS.values()]
            lines.append([name, *cells, *(accuracy(row, task) for task in tasks)])
    return headings, lines


def accuracy(row: Mapping[str, Any], task: str) -> float | None:
    """Returns a task's headline figure of a row: `acc_norm`, or else `acc`; None where it was not run."""
    found = (row.get("tasks") or {}).get(task, {})
    metric = accuracy_metric(found)
    return None if metric is None else found[metric]


def accuracy_metric(task: Mapping[str, Any]) -> str | None:
    """Returns the name of the figure that a task is judged by: `acc_norm`, or else `acc`; None where it has neither."""
    return next((name for name in ("acc_norm", "acc") if name in task), None)


def _half_width(text: Mapping[str, Any], metric: str) -> float | None:
    found = text.get("intervals", {}).get(metric)
    return None if found is None else (found["high"] - found["low"]) / 2


def _cost(row: Mapping[str, Any], name: str, factor: float = 1.0) -> float | None:
    value = (row.get("costs") or {}).get(name)
    return None if value is None else value * factor


def _written(row: Mapping[str, Any], name: str) -> float | None:
    value: float | None = (row.get("generations") or {}).get(name)
    return value


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)

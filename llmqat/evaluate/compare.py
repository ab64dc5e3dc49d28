"""One table over several models: what rounding cost, what was recovered, and at what size and speed.

    candidates (loaded one at a time) x texts (cut into windows once) -> compare -> Comparison -> table | JSON

A quantized model is judged against three others, on the same tokens: the full-precision model, plain rounding (what
doing nothing gives), and the best that needs no training. The share of the gap recovered is

    (rounding - row) / (rounding - full precision)

for perplexity, and the same for KL from full precision, whose own KL is 0. The two can disagree, and then KL is right:
perplexity on a text also falls when a model learns that text's domain, KL does not. Where training has made a model
worse than its training-free start, the table says so in red and what to try.

`Comparison` is plain data; `render` and `to_dict` are the two ways to show it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich import box
from rich.console import Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from llmqat.evaluate.perplexity import Evaluation, Reference, TokenWindows, evaluate, keep_reference
from llmqat.evaluate.speed import decode_speed, disk_usage
from llmqat.export import load_any
from llmqat.models import resolve_spec

Role = Literal["full precision", "plain rounding", "training-free", "without adapter", "trained", "other"]
"""What a model stands for in the comparison; each but the last two is borne by one model at most.

Where a fine-tuned adapter is merged into the full-precision model, its base is the one 'without adapter'."""

ComparisonProgress = Callable[[str, int, int], None]
"""Called with what is being measured, the steps done and the steps in all."""


@dataclass(frozen=True)
class Candidate:
    """A model to compare, not loaded yet."""

    name: str  # as the table shows it
    load: Callable[[], nn.Module]  # called once; the model is let go before the next one is loaded
    role: Role = "other"
    bits_per_weight: float | None = None  # of the quantized linears on disk, scales included
    bytes_on_disk: int | None = None  # of the weight files, tokenizer and configuration not counted


@dataclass(frozen=True)
class Row:
    """What was measured of one model."""

    name: str
    role: Role
    bits_per_weight: float | None
    bytes_on_disk: int | None
    decode_tokens_per_second: float | None
    evaluations: Mapping[str, Evaluation]  # by text name


@dataclass(frozen=True)
class Recovered:
    """Shares of the gap between plain rounding and full precision; 1 is all of it, below 0 is worse than rounding."""

    perplexity: float | None
    kl: float | None


@dataclass(frozen=True)
class Finding:
    """Something that the reader of the table must know."""

    level: Literal["warning", "note"]
    text: str


@dataclass(frozen=True)
class Comparison:
    """All rows of a comparison, in the order in which they were given."""

    rows: tuple[Row, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the texts, the first being the one that a headline quotes."""
        return tuple(self.rows[0].evaluations) if self.rows else ()

    def row(self, role: Role) -> Row | None:
        """Returns the first row of `role`, or None."""
        return next((row for row in self.rows if row.role == role), None)

    def recovered(self, row: Row, text: str) -> Recovered:
        """Returns the shares of the rounding gap that `row` recovered on `text`; None where there is no gap."""
        full, rounding = self.row("full precision"), self.row("plain rounding")
        if full is None or rounding is None:
            return Recovered(None, None)
        low, high, own = (entry.evaluations[text] for entry in (full, rounding, row))
        return Recovered(
            perplexity=_share(low.perplexity, high.perplexity, own.perplexity), kl=_share(low.kl, high.kl, own.kl)
        )

    def findings(self) -> tuple[Finding, ...]:
        """Returns warnings and notes about rows of role 'trained', and what is left of an adapter, text by text."""
        found: list[Finding] = []
        for row in self.rows:
            if row.role == "trained":
                found += [finding for text in self.texts for finding in self._judge(row, text)]
        for text in self.texts:
            found += self._adapter_loss(text)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as JSON takes it; a row's own perplexity, kl and top1 are those of the first text."""
        first = self.rows[0].evaluations if self.rows else {}
        return {
            "texts": {
                name: {
                    "sha256": entry.text_sha256,
                    "windows": entry.windows,
                    "window": entry.window,
                    "stride": entry.stride,
                    "tokens": entry.tokens,
                }
                for name, entry in first.items()
            },
            "rows": [self._row_dict(row) for row in self.rows],
            "findings": [{"level": finding.level, "text": finding.text} for finding in self.findings()],
            "environment": dict(self.environment),
        }

    def _row_dict(self, row: Row) -> dict[str, Any]:
        by_text = {text: self._text_dict(row, text) for text in self.texts}
        headline = by_text[self.texts[0]]
        return {
            "name": row.name,
            "role": row.role,
            "bits_per_weight": row.bits_per_weight,
            **headline,
            "bytes_on_disk": row.bytes_on_disk,
            "decode_tokens_per_second": row.decode_tokens_per_second,
            "texts": by_text,
        }

    def _text_dict(self, row: Row, text: str) -> dict[str, Any]:
        entry, recovered = row.evaluations[text], self.recovered(row, text)
        return {
            "perplexity": entry.perplexity,
            "kl": entry.kl,
            "top1": entry.top1,
            "recovered": {"perplexity": recovered.perplexity, "kl": recovered.kl},
        }

    def _adapter_loss(self, text: str) -> Iterator[Finding]:
        """Yields how far each quantized row is from the merged model, next to how far the adapter took that."""
        base = self.row("without adapter")
        effect = None if base is None else base.evaluations[text].kl
        if not effect:
            return
        judged = [row for row in self.rows if row.role in ("plain rounding", "training-free", "trained")]
        lost = [f"{row.name} {(row.evaluations[text].kl or 0.0) / effect:.0%}" for row in judged]
        yield Finding(
            "note",
            f"On {text} the adapter moves the model by a KL of {effect:.4f}; so much of that is what quantization "
            f"changes: {', '.join(lost)}.",
        )

    def _judge(self, row: Row, text: str) -> Iterator[Finding]:
        own = row.evaluations[text]
        for role in ("training-free", "plain rounding"):
            rival = self.row(role)
            if rival is not None and (worse := _worse(own, rival.evaluations[text])):
                yield Finding("warning", f"{row.name} is worse than {rival.name} on {text}: {worse}. {WHAT_TO_TRY}")
                break
        full = self.row("full precision")
        if full is not None and own.perplexity < full.evaluations[text].perplexity:
            yield Finding(
                "note",
                f"{row.name} has a lower perplexity on {text} ({own.perplexity:.2f}) than full precision "
                f"({full.evaluations[text].perplexity:.2f}): it has learned the domain of its training text, which is "
                "not recovery. Read the KL column, and a text of another domain.",
            )


WHAT_TO_TRY = (
    "Try a third of train.learning_rate; more tokens (data.tokens) or fewer epochs over the same ones; check that the "
    "training loss fell, that the teacher is the unquantized model, and that the training text resembles what the "
    "model will read. The training-free checkpoint is the better one to ship meanwhile."
)


def compare(
    candidates: Sequence[Candidate],
    texts: Mapping[str, TokenWindows],
    *,
    batch_size: int = 4,
    speed: bool = True,
    progress: ComparisonProgress | None = None,
) -> Comparison:
    """Returns the measurements of all candidates on all texts; one model is in memory at a time.

    Args:
        candidates: in the order of the rows. The one whose role is 'full precision' is the reference of every KL; it is
            measured first. Without one there is no KL.
        texts: windows by name, the first being the headline's.
        batch_size: windows in a forward; the same for all models, since bfloat16 sums depend on it.
        speed: whether to time decoding as well.
        progress: called with what is being measured, tokens done, tokens in all.

    Raises:
        ValueError: if there is nothing to compare, a name is given twice, or two models claim one role.
    """
    _check(candidates, texts)
    references: dict[str, Reference] = {}
    measured: dict[str, Row] = {}
    for candidate in sorted(candidates, key=lambda entry: entry.role != "full precision"):
        measured[candidate.name] = _measure(candidate, texts, references, batch_size, speed, progress)
        gc.collect()
    return Comparison(tuple(measured[candidate.name] for candidate in candidates), environment())


def candidate_from(
    spec: str, role: Role = "other", name: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> Candidate:
    """Returns the candidate for what `export.load_any` loads: a packed folder, a model folder, a hub id, a GGUF file.

    Args:
        spec: where the model is.
        role: what it stands for.
        name: as the table shows it; the last part of `spec` when None.
        dtype: of the parameters that are not packed.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if its files are damaged.
    """
    source = resolve_spec(spec)
    usage = disk_usage(source) if isinstance(source, Path) else None
    return Candidate(
        name=name or Path(spec).name,
        load=lambda: load_any(spec, dtype)[0],
        role=role,
        bits_per_weight=None if usage is None else usage.bits_per_weight,
        bytes_on_disk=None if usage is None else usage.weight_bytes,
    )


def render(comparison: Comparison, title: str | None = None) -> RenderableType:
    """Returns the comparison as a rich table, a section for each text, with the findings below it."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("bits", "MB on\ndisk", "tok/s", "perplexity", "KL", "top-1", "gap closed\nppl / KL"):
        table.add_column(heading, justify="right", vertical="bottom")
    for position, text in enumerate(comparison.texts):
        if len(comparison.texts) > 1:
            table.add_row(Text(text, style="bold"), style="dim")
        for row in comparison.rows:
            cost = _cost_cells(row) if position == 0 else ["", "", ""]
            style = "bold" if row.role == "trained" else None
            table.add_row(row.name, *cost, *_quality_cells(comparison, row, text), style=style)
        table.add_section()
    lines = [Text(_describe(name, comparison.rows[0].evaluations[name]), style="dim") for name in comparison.texts]
    colours = {"warning": "bold red", "note": "yellow"}
    lines += [Text(finding.text, style=colours[finding.level]) for finding in comparison.findings()]
    return Group(table, *lines)


def write_json(comparison: Comparison, path: Path | str) -> None:
    """Writes the comparison to `path`; the file appears whole or not at all, and replaces one that is there."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(_finite(comparison.to_dict()), indent=2) + "\n", encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def progress_bar() -> Iterator[ComparisonProgress]:
    """Yields a callback for `compare` that draws a bar with rate and time left for each measurement."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens, {task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.remove_task(task)
                tasks.clear()
                tasks[what] = bar.add_task(what, total=total, rate=0.0)
            task = tasks[what]
            bar.update(task, completed=done, rate=bar.tasks[0].speed or 0.0)

        yield advance


def environment() -> dict[str, Any]:
    """Returns what speeds and the last digits of bfloat16 figures depend on."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": "cpu" if accelerator is None else str(accelerator),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _check(candidates: Sequence[Candidate], texts: Mapping[str, TokenWindows]) -> None:
    if not candidates or not texts:
        raise ValueError("a comparison needs at least one model and one text")
    names = [candidate.name for candidate in candidates]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"more than one model is called {', '.join(twice)}; give each a name of its own")
    roles = [candidate.role for candidate in candidates]
    for role in ("full precision", "plain rounding", "training-free", "without adapter"):
        if roles.count(role) > 1:
            raise ValueError(f"{roles.count(role)} models claim the role {role!r}; only one can have it")


def _measure(
    candidate: Candidate,
    texts: Mapping[str, TokenWindows],
    references: dict[str, Reference],
    batch_size: int,
    speed: bool,
    progress: ComparisonProgress | None,
) -> Row:
    """Returns the candidate's row; the full-precision candidate also fills `references`."""
    model = candidate.load()
    evaluations: dict[str, Evaluation] = {}
    for text, windows in texts.items():
        report = _report(progress, f"{candidate.name} on {text}")
        if candidate.role == "full precision":
            references[text] = keep_reference(model, windows, batch_size=batch_size, progress=report)
            evaluations[text] = references[text].evaluation
        else:
            reference = references.get(text)
            evaluations[text] = evaluate(model, windows, reference, batch_size=batch_size, progress=report)
    return Row(
        name=candidate.name,
        role=candidate.role,
        bits_per_weight=candidate.bits_per_weight,
        bytes_on_disk=candidate.bytes_on_disk,
        decode_tokens_per_second=decode_speed(model).decode_tokens_per_second if speed else None,
        evaluations=evaluations,
    )


def _report(progress: ComparisonProgress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)


def _share(low: float | None, high: float | None, own: float | None) -> float | None:
    if low is None or high is None or own is None or not high > low:
        return None
    return (high - own) / (high - low)


def _worse(own: Evaluation, rival: Evaluation) -> str:
    """Returns in which figures `own` is worse than `rival`, in words; empty when it is worse in none."""
    figures = []
    if own.kl is not None and rival.kl is not None and own.kl > rival.kl:
        figures.append(f"KL {own.kl:.4f} against {rival.kl:.4f}")
    if own.perplexity > rival.perplexity:
        figures.append(f"perplexity {own.perplexity:.2f} against {rival.perplexity:.2f}")
    return ", ".join(figures)


def _cost_cells(row: Row) -> list[str]:
    return [
        _number(row.bits_per_weight, ".2f"),
        _number(None if row.bytes_on_disk is None else row.bytes_on_disk / 1e6, ".1f"),
        _number(row.decode_tokens_per_second, ".1f"),
    ]


def _quality_cells(comparison: Comparison, row: Row, text: str) -> list[str]:
    entry, recovered = row.evaluations[text], comparison.recovered(row, text)
    anchor = row.role in ("full precision", "plain rounding") or recovered == Recovered(None, None)
    closed = "" if anchor else f"{_number(recovered.perplexity, '.0%')} / {_number(recovered.kl, '.0%')}"
    return [
        _number(entry.perplexity, ".2f" if entry.perplexity < 1e4 else ".3g"),
        _number(entry.kl, ".4f"),
        _number(entry.top1, ".1%"),
        closed,
    ]


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def _describe(name: str, entry: Evaluation) -> str:
    overlap = "no overlap" if entry.stride >= entry.window - 1 else f"stride {entry.stride}"
    return (
        f"{name}: {entry.windows} windows of {entry.window}, {overlap}, {entry.tokens:,} tokens scored, "
        f"sha256 {entry.text_sha256[:12]}"
    )


def _finite(value: Any) -> Any:
    """Returns `value` with infinities and NaN as None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""One table over several models: what rounding cost, what was recovered, and at what size and speed.

    candidates (loaded one at a time) x texts (cut into windows once) -> compare -> Comparison -> table | JSON

A quantized model is judged against three others, on the same tokens: the full-precision model, plain rounding (what
doing nothing gives), and the best that needs no training. The share of the gap recovered is

    (rounding - row) / (rounding - full precision)

for perplexity, and the same for KL from full precision, whose own KL is 0. The two can disagree, and then KL is right:
perplexity on a text also falls when a model learns that text's domain, KL does not. A model that was to learn answers
is judged by their perplexity instead: its KL from the original grows with all that it learns. Where training has made a
model worse than its training-free start, the table says so in red and what to try.

Figures come with 95 % intervals by bootstrap over windows (bootstrap.py), and two models whose difference is smaller
than the noise of the text are said to be alike, not ranked.

`Comparison` is plain data; `render` and `to_dict` are two ways to show it; tables.py and html.py show the second.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich.console import Group, RenderableType
from rich.text import Text
from torch import nn

from llmqat.evaluate.bootstrap import METRICS, difference, interval
from llmqat.evaluate.breakdown import Part, by_kind, by_position
from llmqat.evaluate.documents import head
from llmqat.evaluate.generations import HEADINGS as WRITTEN_HEADINGS
from llmqat.evaluate.generations import apart, described, is_worse, said, table_cells
from llmqat.evaluate.loading import known_of, load_to_judge
from llmqat.evaluate.perplexity import Evaluation, Reference, TokenWindows, evaluate, keep_reference
from llmqat.evaluate.speed import Costs, measure_costs
from llmqat.files import write_whole
from llmqat.layers.audit import kept_notes
from llmqat.models import default_device
from llmqat.terminal import Bar, Column, FittedTable, duration

log = logging.getLogger(__name__)

Role = Literal["full precision", "plain rounding", "training-free", "without adapter", "trained", "other"]
"""What a model stands for in the comparison; each but the last two is borne by one model at most.

Where a fine-tuned adapter is merged into the full-precision model, its base is the one 'without adapter'."""

COLUMNS = (
    Column("model", 0, "name"),
    Column("bits", 3),
    Column("MB on\ndisk", 4),
    Column("tok/s", 7),
    Column("perplexity", 2),
    Column("KL", 1),
    Column("top-1", 5),
    Column("gap closed\nppl / KL", 6),
)
"""Of the table that compares models."""

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
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else is known of it, as JSON takes it
    notes: tuple[str, ...] = ()  # what the reader of its figures must know
    from_files: bool = True  # `load` reads the model's own files; if not, what loading costs is not measured


Extra = Callable[[nn.Module, Candidate], Any]
"""Measures something else of a loaded model; what it returns, if not None, is put into the row, as JSON takes it."""


@dataclass(frozen=True)
class Row:
    """What was measured of one model."""

    name: str
    role: Role
    bits_per_weight: float | None
    bytes_on_disk: int | None
    decode_tokens_per_second: float | None
    evaluations: Mapping[str, Evaluation]  # by text name
    costs: Costs | None = None
    seconds: float | None = None  # that its evaluations took
    parts: Mapping[str, Mapping[str, Sequence[Part]]] = field(default_factory=dict)  # by text, then position and kind
    extras: Mapping[str, Any] = field(default_factory=dict)  # by name, as `Extra` gave them; and the candidate's facts
    notes: tuple[str, ...] = ()  # the candidate's


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
    settings: Mapping[str, Any] = field(default_factory=dict)  # what was asked for, so that it can be asked again
    fine_tuned: bool = False  # whether training had answers to learn, and not only its original to be like
    stopped: str = ""  # why rows are missing, where a model could not be measured

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
        if full is None or rounding is None or self.is_learned(text):
            return Recovered(None, None)
        low, high, own = (entry.evaluations[text] for entry in (full, rounding, row))
        return Recovered(
            perplexity=_share(low.perplexity, high.perplexity, own.perplexity), kl=_share(low.kl, high.kl, own.kl)
        )

    def is_learned(self, text: str) -> bool:
        """Returns whether `text` has answers as the model was trained on; there it is to differ from its original."""
        return self.fine_tuned and self.rows[0].evaluations[text].answers

    def findings(self) -> tuple[Finding, ...]:
        """Returns warnings and notes: of each row, on trained rows, on adapters, on rows that no text tells apart."""
        found = [Finding("warning", self.stopped)] if self.stopped else []
        found += [Finding("warning", note) for row in self.rows for note in row.notes]
        if unpacked := [row.name for row in self.rows if row.costs and str(row.extras.get("spec")).endswith(".gguf")]:
            found.append(
                Finding(
                    "note",
                    f"{', '.join(unpacked)}: bits and size are those of the file; it is read as bfloat16, which is "
                    "what speed and memory here belong to.",
                )
            )
        for row in self.rows:
            if row.role == "trained":
                found += [finding for text in self.texts for finding in self._judge(row, text)]
        for text in self.texts:
            found += [*self._adapter_loss(text), *self._alike(text)]
        found += [finding for row in self.rows for finding in self._judge_written(row)]
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
                    "ids_sha256": entry.ids_sha256,
                    "answers": entry.answers,
                }
                for name, entry in first.items()
            },
            "settings": dict(self.settings),
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
            "costs": None if row.costs is None else row.costs.to_dict(),
            "seconds": row.seconds,
            "texts": by_text,
            **row.extras,
            **self._written_dict(row),
        }

    def _written_dict(self, row: Row) -> dict[str, Any]:
        """Returns what is said of what `row` writes, with how far it is from what the reference writes."""
        full, own = self.row("full precision"), row.extras.get("generations")
        if own is None or full is None or full is row or "generations" not in full.extras:
            return {}
        found = apart(own, full.extras["generations"])
        return {"generations": {**own, "from_reference": {name: one.to_dict() for name, one in found.items()}}}

    def _text_dict(self, row: Row, text: str) -> dict[str, Any]:
        entry, recovered = row.evaluations[text], self.recovered(row, text)
        intervals = {metric: interval(entry, metric) for metric in METRICS}
        full = self.row("full precision")
        lost = None if full is None or full is row else difference(entry, full.evaluations[text], "perplexity")
        found: dict[str, Any] = {
            "nll": entry.nll,
            "perplexity": entry.perplexity,
            "kl": entry.kl,
            "top1": entry.top1,
            "recovered": {"perplexity": recovered.perplexity, "kl": recovered.kl},
            "reverse_kl": entry.reverse_kl,
            "top5": entry.top5,
            "intervals": {metric: found.to_dict() for metric, found in intervals.items() if found is not None},
        }
        if lost is not None:
            found["perplexity_lost"] = {**lost.to_dict(), "noise": lost.holds_zero}
        if entry.word_perplexity is not None:
            found["word_perplexity"] = entry.word_perplexity
        if text in row.parts:
            found["parts"] = {way: [part.to_dict() for part in parts] for way, parts in row.parts[text].items()}
        return found

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
        if self.fine_tuned:
            yield from self._judge_answers(row, text) if self.is_learned(text) else self._judge_moved(row, text)
            return
        own = row.evaluations[text]
        for role in ("training-free", "plain rounding"):
            rival = self.row(role)
            if rival is not None and (worse := _worse(own, rival.evaluations[text])):
                yield Finding("warning", f"{row.name} is worse than {rival.name} on {text}: {worse}. {WHAT_TO_TRY}")
                break
        yield from self._gained(row, text)
        full = self.row("full precision")
        if full is not None and own.perplexity < full.evaluations[text].perplexity:
            yield Finding(
                "note",
                f"{row.name} has a lower perplexity on {text} ({own.perplexity:.2f}) than full precision "
                f"({full.evaluations[text].perplexity:.2f}): it has learned the domain of its training text, which is "
                "not recovery. Read the KL column, and a text of another domain.",
            )

    def _gained(self, row: Row, text: str) -> Iterator[Finding]:
        """Yields by how much `row` is nearer to the original than it was before training, where that is no noise."""
        rival = self.row("training-free") or self.row("plain rounding")
        apart = None if rival is None else difference(row.evaluations[text], rival.evaluations[text], "kl")
        if rival is None or apart is None or not apart.high < 0:
            return
        yield Finding(
            "note",
            f"{row.name} is nearer to full precision on {text} than {rival.name}, beyond noise: its KL minus that of "
            f"{rival.name} is {apart.low:.3g} to {apart.high:.3g} (95 %, paired by window).",
        )

    def _judge_answers(self, row: Row, text: str) -> Iterator[Finding]:
        """Yields how likely answers that were held out are to the original and now; no praise: examples show more."""
        full, own = self.row("full precision"), row.evaluations[text]
        if full is None:
            return
        before = full.evaluations[text]
        apart = difference(before, own, "perplexity")
        around = interval(own, "perplexity")
        spread = "" if around is None else f", {around.low:.4g} to {around.high:.4g}"
        figures = (
            f"{text}: perplexity {before.perplexity:.2f} ({full.name}) -> {own.perplexity:.2f} ({row.name}{spread}), "
            f"conversations: {own.windows}"
        )
        figures += "; one says little, raise data.validation_share" if own.windows == 1 else ""
        if own.perplexity < before.perplexity and (apart is None or not apart.holds_zero):
            yield Finding("note", f"{figures}. Whether the answers are good, the examples show.")
            return
        yield Finding("warning", f"{figures}. That is no gain beyond noise. {WHAT_TO_TRY_WITH_ANSWERS}")

    def _judge_moved(self, row: Row, text: str) -> Iterator[Finding]:
        """Yields what learning the answers has cost on a text that has none of them."""
        for role in ("training-free", "plain rounding"):
            rival = self.row(role)
            if rival is not None and (worse := _worse(row.evaluations[text], rival.evaluations[text])):
                yield Finding(
                    "note",
                    f"{row.name} is further from the original on {text} than {rival.name}: {worse}. That is the price "
                    "of what it has learned; a higher train.kl_weight, a lower train.learning_rate or fewer steps make "
                    "it smaller.",
                )
                return

    def _judge_written(self, row: Row) -> Iterator[Finding]:
        """Yields how `row` writes otherwise than the reference does, beyond noise."""
        full, own = self.row("full precision"), row.extras.get("generations")
        if own is None or full is None or full is row or "generations" not in full.extras:
            return
        reference = full.extras["generations"]
        words = said(row.name, own, full.name, reference)
        if words is None:
            return
        rambles = is_worse(apart(own, reference)) and not self.fine_tuned
        yield Finding("warning" if rambles else "note", words)

    def _alike(self, text: str) -> Iterator[Finding]:
        """Yields a note for each two rows, neighbours in rank, whose difference is no more than the text's noise."""
        kl = self.row("full precision") is not None and not self.is_learned(text)
        metric, heading = ("kl", "KL") if kl else ("perplexity", "perplexity")
        rows = [row for row in self.rows if row.role != "full precision"]
        rows.sort(key=lambda row: getattr(row.evaluations[text], metric))
        for better, worse in pairwise(rows):
            apart = difference(worse.evaluations[text], better.evaluations[text], metric)
            if apart is not None and apart.holds_zero:
                yield Finding(
                    "note",
                    f"{better.name} and {worse.name} cannot be told apart on {text}: {heading} of {worse.name} minus "
                    f"that of {better.name} is {apart.low:.3g} to {apart.high:.3g} (95 %, paired by window).",
                )


class NotMeasured(ValueError):
    """A model could not be loaded or measured; `comparison` holds what was measured before."""

    def __init__(self, message: str, comparison: Comparison) -> None:
        super().__init__(message)
        self.comparison = comparison


WHAT_TO_TRY = (
    "Try a third of train.learning_rate; more tokens (data.tokens) or fewer epochs over the same ones; check that the "
    "training loss fell, that the teacher is the unquantized model, and that the training text resembles what the "
    "model will read. The training-free checkpoint is the better one to ship meanwhile."
)

WHAT_TO_TRY_WITH_ANSWERS = (
    "Where the training loss fell, the model overfits the training chats: fewer epochs, or more chats. Where it did "
    "not: a higher train.learning_rate, more steps, or a higher train.cross_entropy_weight."
)


def compare(
    candidates: Sequence[Candidate],
    texts: Mapping[str, TokenWindows],
    *,
    batch_size: int = 4,
    speed: bool = True,
    progress: ComparisonProgress | None = None,
    tokenizer: Any = None,
    extras: Mapping[str, Extra] | None = None,
    settings: Mapping[str, Any] | None = None,
    fine_tuned: bool = False,
) -> Comparison:
    """Returns the measurements of all candidates on all texts; one model is in memory at a time.

    Args:
        candidates: in the order of the rows. The one whose role is 'full precision' is the reference of every KL; it is
            measured first. Without one there is no KL.
        texts: windows by name, the first being the headline's.
        batch_size: windows in a forward; the same for all models, since bfloat16 sums depend on it.
        speed: whether loading and decoding are measured as well: time, memory, energy.
        progress: called with what is being measured, tokens done, tokens in all.
        tokenizer: of all models; with it, figures by position and by kind of token are kept.
        extras: what else to measure of each model, by the key in its row.
        settings: what was asked for, kept as it is.
        fine_tuned: whether the trained model was to learn answers, and not only to be like its original.

    Raises:
        ValueError: if there is nothing to compare, a name is given twice, or two models claim one role.
        NotMeasured: if a model cannot be loaded or measured, and others were.
    """
    _check(candidates, texts)
    references: dict[str, Reference] = {}
    measured: dict[str, Row] = {}
    for candidate in sorted(candidates, key=lambda entry: entry.role != "full precision"):
        try:
            measured[candidate.name] = _measured(
                candidate, texts, references, batch_size, speed, progress, tokenizer, extras or {}
            )
        except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
            if not measured:
                raise
            why = f"{candidate.name} could not be measured: {error}"
            rows = tuple(measured[entry.name] for entry in candidates if entry.name in measured)
            raise NotMeasured(why, Comparison(rows, environment(), settings or {}, fine_tuned, why)) from error
        gc.collect()
    rows = tuple(measured[candidate.name] for candidate in candidates)
    return Comparison(rows, environment(), settings or {}, fine_tuned)


def _timed(candidate: Candidate) -> tuple[nn.Module, Costs | None]:
    """Returns the model and what loading and decoding take; None for a model that does not decode as others do."""
    try:
        return measure_costs(candidate.load, from_files=candidate.from_files)
    except (AttributeError, IndexError, TypeError) as error:
        log.warning(
            "speed and memory of %s are not measured, as it decodes in a way of its own: %s", candidate.name, error
        )
    return candidate.load(), None


def _measured(
    candidate: Candidate,
    texts: Mapping[str, TokenWindows],
    references: dict[str, Reference],
    batch_size: int,
    speed: bool,
    progress: ComparisonProgress | None,
    tokenizer: Any,
    extras: Mapping[str, Extra],
) -> Row:
    """Loads one model and returns what is measured of it; the full-precision one also fills `references`."""
    begun = time.perf_counter()
    model, costs = _timed(candidate) if speed else (candidate.load(), None)
    start = time.perf_counter()
    evaluations = _evaluations(model, candidate, texts, references, batch_size, progress)
    row = Row(
        name=candidate.name,
        role=candidate.role,
        bits_per_weight=candidate.bits_per_weight,
        bytes_on_disk=candidate.bytes_on_disk,
        decode_tokens_per_second=None if costs is None else costs.decode_tokens_per_second,
        evaluations=evaluations,
        costs=costs,
        seconds=time.perf_counter() - start,
        parts={} if tokenizer is None else {text: _parts(one, tokenizer) for text, one in evaluations.items()},
        extras={**candidate.facts, **_taken(extras, model, candidate)},
        notes=(*candidate.notes, *(f"{candidate.name}: {note}." for note in kept_notes(model))),
    )
    log.info("%s: measured in %s", candidate.name, duration(time.perf_counter() - begun))
    return row


def _taken(extras: Mapping[str, Extra], model: nn.Module, candidate: Candidate) -> dict[str, Any]:
    found = {name: take(model, candidate) for name, take in extras.items()}
    return {name: value for name, value in found.items() if value is not None}


def candidate_from(
    spec: str,
    role: Role = "other",
    name: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    notes: tuple[str, ...] = (),
) -> Candidate:
    """Returns the candidate for anything that loading.py loads: hub ids, folders, packed ones, GGUF, adapters.

    Args:
        spec: where the model is.
        role: what it stands for.
        name: as the table shows it; the last part of `spec` when None.
        dtype: of the parameters that are not packed.
        notes: what the reader of its figures must know.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if its files are damaged.
    """
    known = known_of(spec)
    return Candidate(
        name=name or Path(spec).name,
        load=lambda: load_to_judge(spec, dtype),
        role=role,
        bits_per_weight=known.bits_per_weight,
        bytes_on_disk=known.bytes_on_disk,
        facts={
            "spec": spec,
            "method": known.method,
            "run": dict(known.run),
            "layers": dict(known.layers),
            "scheme": dict(known.scheme),
        },
        notes=notes,
    )


def render(comparison: Comparison, title: str | None = None) -> RenderableType:
    """Returns the comparison as a rich table, a section for each text, with the findings below it."""
    table = FittedTable(COLUMNS, title)
    for position, text in enumerate(comparison.texts):
        if len(comparison.texts) > 1:
            table.add_row(text, style="bold")
        for row in comparison.rows:
            cost = _cost_cells(row) if position == 0 else ["", "", ""]
            style = "bold" if row.role == "trained" else None
            table.add_row(row.name, *cost, *_quality_cells(comparison, row, text), style=style)
        table.add_section()
    lines = [Text(_describe(name, comparison.rows[0].evaluations[name]), style="dim") for name in comparison.texts]
    lines += [Text(line, style="dim") for line in (*_losses(comparison), *_word_perplexities(comparison))]
    colours = {"warning": "bold red", "note": "yellow"}
    lines += [Text(finding.text, style=colours[finding.level]) for finding in comparison.findings()]
    costs = [_costs_table(comparison)] if any(row.costs for row in comparison.rows) else []
    return Group(table, *lines, *costs, *_written_table(comparison))


def render_parts(comparison: Comparison) -> RenderableType:
    """Returns where each model is weak: KL (or perplexity) by position in the window and by kind of token."""
    tables = []
    for text in comparison.texts:
        for way in ("position", "kind"):
            rows = [(row, row.parts[text][way]) for row in comparison.rows if text in row.parts]
            if not rows:
                continue
            kl = all(part.kl is not None for _, parts in rows for part in parts)
            title = f"{'KL' if kl else 'perplexity'} by {way} on {text}"
            columns = [Column(f"{part.name}\n({part.tokens:,})", 1) for part in rows[0][1]]
            table = FittedTable([Column("model", 0, "name"), *columns], title)
            for row, parts in rows:
                if not (kl and row.role == "full precision"):
                    cells = (_number(part.kl, ".4f") if kl else _number(part.perplexity, ".1f") for part in parts)
                    table.add_row(row.name, *cells)
            tables.append(table)
    return Group(*tables)


def _costs_table(comparison: Comparison) -> FittedTable:
    sizes = {row.costs.batch_size for row in comparison.rows if row.costs is not None}
    together = f"tok/s,\n{'/'.join(map(str, sorted(sizes)))} at once"
    columns = (
        Column("model", 0, "name"),
        Column("load\ns", 5),
        Column("first\ntoken, ms", 2),
        Column("tok/s,\nalone", 1),
        Column(together, 4),
        Column("peak\nMB", 3),
        Column("joules\na token", 6),
    )
    table = FittedTable(columns)
    for row in comparison.rows:
        if (costs := row.costs) is not None:
            table.add_row(
                row.name,
                _number(costs.load_seconds, ".1f"),
                f"{1e3 * costs.first_token_seconds:.0f}",
                f"{costs.decode_tokens_per_second:.1f}",
                f"{costs.batch_tokens_per_second:.1f}",
                _number(None if costs.peak_bytes is None else costs.peak_bytes / 1e6, ".0f"),
                "not available" if costs.joules_per_token is None else f"{costs.joules_per_token:.3g}",
            )
    return table


def _written_table(comparison: Comparison) -> Iterator[RenderableType]:
    """Yields the table of what models write, and what was asked, where they were asked."""
    rows = [(row, row.extras["generations"]) for row in comparison.rows if "generations" in row.extras]
    if not rows:
        return
    full = comparison.row("full precision")
    reference = None if full is None else full.extras.get("generations")
    columns = [Column(heading, rank) for heading, rank in zip(WRITTEN_HEADINGS, (1, 4, 2, 3, 5, 6), strict=True)]
    table = FittedTable([Column("model", 0, "name"), *columns])
    for row, own in rows:
        table.add_row(row.name, *table_cells(own, reference))
    yield table
    yield Text(described(rows[0][1]["prompts"]), style="dim")


def _losses(comparison: Comparison) -> Iterator[str]:
    for text in comparison.texts:
        if comparison.rows[0].evaluations[text].answers:
            figures = ", ".join(f"{row.name} {row.evaluations[text].nll:.3f}" for row in comparison.rows)
            yield f"{text}: loss, nats a token: {figures}"


def _word_perplexities(comparison: Comparison) -> Iterator[str]:
    for text in comparison.texts:
        found = {row.name: row.evaluations[text].word_perplexity for row in comparison.rows}
        figures = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if value is not None)
        if figures:
            yield f"{text}: word perplexity (lm-eval's): {figures}"


def write_json(comparison: Comparison, path: Path | str) -> None:
    """Writes the comparison to `path`; the file appears whole or not at all, and replaces one that is there."""
    write_report({**head("comparison"), **comparison.to_dict()}, path)


def write_report(report: Mapping[str, Any], path: Path | str) -> None:
    """Writes a report as JSON, what is infinite or no number as null; whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, to_json(report))


def to_json(report: Mapping[str, Any]) -> str:
    """Returns a report as JSON, what is infinite or no number as null."""
    return json.dumps(_finite(dict(report)), indent=2) + "\n"


@contextmanager
def progress_bar() -> Iterator[ComparisonProgress]:
    """Yields a callback for `compare` that shows how far each measurement is."""
    with ExitStack() as stack:
        shown: dict[str, Bar] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in shown:
                stack.close()
                shown.clear()
                shown[what] = stack.enter_context(Bar(what, "token", total=total, shown=True))
            shown[what].update(done, total)
            if done >= total:  # what follows is not its own
                stack.close()
                shown.clear()

        yield advance


def environment() -> dict[str, Any]:
    """Returns what speeds and the last digits of bfloat16 figures depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(default_device()),
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


def _evaluations(
    model: nn.Module,
    candidate: Candidate,
    texts: Mapping[str, TokenWindows],
    references: dict[str, Reference],
    batch_size: int,
    progress: ComparisonProgress | None,
) -> dict[str, Evaluation]:
    """Returns the evaluations of a loaded candidate by text; the full-precision one also fills `references`."""
    found: dict[str, Evaluation] = {}
    for text, windows in texts.items():
        report = _report(progress, f"{candidate.name} on {text}")
        if candidate.role == "full precision":
            references[text] = keep_reference(model, windows, batch_size=batch_size, progress=report)
            found[text] = references[text].evaluation
        else:
            reference = references.get(text)
            found[text] = evaluate(model, windows, reference, batch_size=batch_size, progress=report)
    return found


def _parts(found: Evaluation, tokenizer: Any) -> dict[str, Sequence[Part]]:
    return {"position": by_position(found), "kind": by_kind(found, tokenizer)}


def _report(progress: ComparisonProgress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)


def _share(low: float | None, high: float | None, own: float | None) -> float | None:
    if low is None or high is None or own is None or not high > low:
        return None
    return (high - own) / (high - low)


def _worse(own: Evaluation, rival: Evaluation) -> str:
    """Returns in which figures `own` is worse than `rival` beyond noise, in words; empty when it is worse in none."""
    figures = []
    for metric, heading, style in (("kl", "KL", ".4f"), ("perplexity", "perplexity", ".2f")):
        mine, theirs = getattr(own, metric), getattr(rival, metric)
        apart = difference(own, rival, metric)
        if mine is not None and theirs is not None and mine > theirs and (apart is None or not apart.holds_zero):
            figures.append(f"{heading} {mine:{style}} against {theirs:{style}}")
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
        _with_spread(entry, "perplexity", ".2f" if entry.perplexity < 1e4 else ".3g"),
        _with_spread(entry, "kl", ".4f"),
        _number(entry.top1, ".1%"),
        closed,
    ]


def _with_spread(entry: Evaluation, metric: str, style: str) -> str:
    """Returns a figure, and half the width of its interval where it has one."""
    found = interval(entry, metric)
    spread = "" if found is None or found.low == found.high else f" ±{_short((found.high - found.low) / 2)}"
    return _number(getattr(entry, metric), style) + spread


def _short(spread: float) -> str:
    """Returns half an interval with two digits, and no more decimals than the figures have."""
    return f"{spread:,.0f}" if spread >= 9.5 else f"{max(round(spread, 4), 1e-4):.2g}"


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def _describe(name: str, entry: Evaluation) -> str:
    windows = "1 window" if entry.windows == 1 else f"{entry.windows} windows"
    if entry.answers:
        return (
            f"{name}: {windows}, each of one conversation, {entry.tokens:,} tokens of answers scored, "
            f"sha256 {entry.text_sha256[:12]}"
        )
    overlap = "no overlap" if entry.stride >= entry.window - 1 else f"stride {entry.stride}"
    return (
        f"{name}: {windows} of {entry.window}, {overlap}, {entry.tokens:,} tokens scored, "
        f"sha256 {entry.text_sha256[:12]}"
    )


def _finite(value: Any) -> Any:
    """Returns `value` with infinities and NaN as None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

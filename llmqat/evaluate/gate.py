"""A gate for CI: limits that a model must keep, and what the field advises when it does not.

    perplexity<=1.02x, top1>=0.95, size<=0.3x, piqa>=0.99x

A limit with an x is a multiple of the reference's figure in the same report; with a saved report as baseline, of the
same model's figure in that report, which must have been taken on the same windows of the same text: so drift is seen.
Figures of quality must be kept on every text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmqat.evaluate.documents import check_schema
from llmqat.evaluate.generations import FIGURES, SAME

ON_TEXT = ("perplexity", "word_perplexity", "kl", "reverse_kl", "top1", "top5")
COSTS = {
    "size": ("bytes_on_disk",),
    "bits": ("bits_per_weight",),
    "speed": ("decode_tokens_per_second",),
    "batch_speed": ("costs", "batch_tokens_per_second"),
    "first_token": ("costs", "first_token_seconds"),
    "load": ("costs", "load_seconds"),
    "memory": ("costs", "peak_bytes"),
    "energy": ("costs", "joules_per_token"),
}
"""Figures that do not depend on a text, and where they are in a row."""
WRITTEN = {name: ("generations", name) for name in FIGURES}
"""Figures of what models write after prompts, and where they are in a row."""
OF_MODEL = {**COSTS, **WRITTEN}
UNITS: dict[str, tuple[float, str, str]] = {
    **dict.fromkeys(("size", "memory"), (1e-6, ",.1f", " MB")),
    **dict.fromkeys(("top1", "top5", "not_ended", "repeated"), (100, ".1f", " %")),
    "length": (1, ".1f", " tokens an answer"),
    **dict.fromkeys(("speed", "batch_speed"), (1, ".1f", " tok/s")),
    **dict.fromkeys(("first_token", "load"), (1, ".3g", " s")),
    "bits": (1, ".2f", " bits a weight"),
    "energy": (1, ".3g", " J a token"),
}
"""Figure -> factor, form and unit in which tables show it; the rest are shown as they are."""
REFERENCE = "full precision"
DIVERGENCES = ("kl", "reverse_kl", "top1", "top5")
"""Figures that are measured from the reference."""
SAME_REFERENCE = 1e-3
"""Share of its perplexity by which one reference may differ between two machines."""

_RULE = re.compile(r"^(?P<metric>[\w.-]+)\s*(?P<operator><=|>=)\s*(?P<limit>[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(?P<x>x?)$")


@dataclass(frozen=True)
class Rule:
    """One limit."""

    metric: str
    operator: Literal["<=", ">="]
    limit: float
    relative: bool  # `limit` times the figure of the reference, or of the baseline

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.limit:g}{'x' if self.relative else ''}"


@dataclass(frozen=True)
class Check:
    """The result of one rule for one model."""

    rule: Rule
    model: str
    text: str | None  # None for figures that do not depend on one
    value: float
    bound: float  # in the figure's own unit
    multiple_of: tuple[str, float] | None = None  # whose figure an x is a multiple of, and that figure

    @property
    def passed(self) -> bool:
        """Whether the limit is kept; a figure that is no number keeps none, nor one that is compared with none."""
        if math.isnan(self.value) or not math.isfinite(self.bound):
            return False
        return self.value <= self.bound if self.rule.operator == "<=" else self.value >= self.bound

    def __str__(self) -> str:
        where = "" if self.text is None else f" on {self.text}"
        verdict = "kept" if self.passed else "BROKEN"
        given = [self.value, self.bound, *([] if self.multiple_of is None else [self.multiple_of[1]])]
        value, bound, *base = _shown(self.rule.metric, given)
        whose = "" if self.multiple_of is None else f" (of {base[0]}, {self.multiple_of[0]})"
        return f"{verdict}: {self.rule}: {self.model}{where}: {value}, bound {bound}{whose}"


def _shown(metric: str, figures: Sequence[float]) -> list[str]:
    """Returns figures as tables show them; with all their digits where these would look alike and are not."""
    factor, style, unit = UNITS.get(metric, (1, ".6g", ""))
    shown = [f"{factor * figure:{style}}{unit}" for figure in figures]
    alike = len(set(shown[:2])) < len(set(figures[:2]))
    return [f"{factor * figure:.9g}{unit}" for figure in figures] if alike else shown


def parse_gate(text: str) -> tuple[Rule, ...]:
    """Returns the rules in `text`, which commas separate.

    Raises:
        ValueError: for what is no rule.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError("the gate is empty; write for example perplexity<=1.02x, top1>=0.95, size<=0.3x")
    rules = []
    for part in parts:
        found = _RULE.match(part)
        if found is None:
            known = ", ".join((*ON_TEXT, *OF_MODEL))
            raise ValueError(
                f"{part!r} is no rule of a gate; write FIGURE<=LIMIT or FIGURE>=LIMIT, an x behind the limit for a "
                f"multiple of the reference; figures: {known}, or the name of a task"
            )
        operator: Literal["<=", ">="] = "<=" if found["operator"] == "<=" else ">="
        rules.append(Rule(found["metric"], operator, float(found["limit"]), bool(found["x"])))
    return tuple(rules)


def judge(
    rules: Sequence[Rule], report: Mapping[str, Any], baseline: Mapping[str, Any] | None = None
) -> tuple[Check, ...]:
    """Returns the result of each rule for each model, on each text where the figure depends on one.

    The reference is judged only where it is the only model.

    Args:
        rules: from `parse_gate`.
        report: `Comparison.to_dict()`.
        baseline: an earlier report, which relative limits are multiples of.

    Raises:
        ValueError: a figure was not measured, there is nothing to compare with, or the texts differ.
    """
    rows = [row for row in report["rows"] if row["role"] != REFERENCE] or report["rows"]
    if baseline is not None:
        check_same_texts(report["texts"], baseline)
    checks = []
    for row in rows:
        for rule in rules:
            against = _compared_with(row, report, baseline) if rule.relative else None
            if against is not None and rule.metric in WRITTEN and "generations" in row:
                check_same_prompts(row["generations"]["prompts"], against)
            if against is not None and baseline is not None:
                _check_same_measure(rule.metric, row, against, report, baseline)
            for text in report["texts"] if rule.metric in ON_TEXT else (None,):
                value = _figure(row, rule.metric, text)
                base = None if against is None else _figure(against, rule.metric, text)
                whose = None if against is None or base is None else (_whose(against, rule.metric, baseline), base)
                bound = rule.limit * (1.0 if base is None else base)
                checks.append(Check(rule, row["name"], text, value, bound, whose))
    return tuple(checks)


def _whose(against: Mapping[str, Any], metric: str, baseline: Mapping[str, Any] | None) -> str:
    """Returns whose figure a limit with an x is a multiple of, in words."""
    what = f"the files of {against['name']}" if metric == "size" else str(against["name"])
    return what if baseline is None else f"{what} in the baseline"


def check_rules(
    rules: Sequence[Rule],
    models: Sequence[str],
    reference: str | None,
    baseline: Mapping[str, Any] | None = None,
    *,
    speed: bool,
    words: bool,
    prompts: bool,
    tasks: Sequence[str],
) -> None:
    """Raises ValueError where a rule asks for what will not be measured; before hours of work.

    Args:
        rules: from `parse_gate`.
        models: names of the rows.
        reference: which of them KL is measured from.
        baseline: an earlier report, which relative limits are multiples of.
        speed: whether speed, memory and energy are measured.
        words: whether perplexity is counted by words too.
        prompts: whether models write answers to prompts.
        tasks: names of the tasks that are run.
    """
    unmeasured = set() if words else {"word_perplexity"}
    unmeasured |= set() if reference is not None else set(ON_TEXT) - {"perplexity", "word_perplexity"}
    unmeasured |= set() if speed else {*COSTS} - {"size", "bits"}
    unmeasured |= set() if prompts else {*WRITTEN}
    for rule in rules:
        if rule.metric in tasks and rule.metric in (*ON_TEXT, *OF_MODEL):
            raise ValueError(f"{rule.metric} in the gate is a figure and a task; rename the file of the task")
        if rule.metric in unmeasured:
            raise _not_measured(rule.metric, ", ".join(models))
        if rule.metric not in (*ON_TEXT, *OF_MODEL) and not tasks:
            raise _no_figure(rule.metric, ())
        for name in [name for name in models if name != reference] or models:
            if rule.relative:
                _compared_with({"name": name}, {"rows": [{"role": REFERENCE}] if reference else []}, baseline)


def read_report(path: Path) -> dict[str, Any]:
    """Returns a report that `--json` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else, or of a later llmqat.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no report at {path}; write one with --json")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if isinstance(report, dict):
        check_schema(report, path)
    kinds = {"rows": list, "texts": dict, "settings": dict}
    if not isinstance(report, dict) or any(not isinstance(report.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} is no report of llmqat eval or compare: it lacks rows, texts or settings")
    if not all(isinstance(row, dict) and {"name", "role", "texts"} <= row.keys() for row in report["rows"]):
        raise ValueError(f"{path} is no report of llmqat eval or compare: a row of it lacks name, role or texts")
    return report


def _compared_with(
    row: Mapping[str, Any], report: Mapping[str, Any], baseline: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    if baseline is not None:
        same = [entry for entry in baseline["rows"] if entry["name"] == row["name"]]
        others = [entry for entry in baseline["rows"] if entry["role"] != REFERENCE]
        found = same or (others if len(others) == 1 else [])
        where = f"the baseline has no row {row['name']!r}: {', '.join(entry['name'] for entry in baseline['rows'])}"
    else:
        found = [entry for entry in report["rows"] if entry["role"] == REFERENCE]
        where = "a limit with an x needs a model to compare with; give --reference MODEL or --baseline REPORT"
    if not found:
        raise ValueError(where)
    return found[0]


def check_same_texts(texts: Mapping[str, Mapping[str, Any]], baseline: Mapping[str, Any]) -> None:
    """Raises ValueError where `texts`, as a report describes them, are not those of the report `baseline`."""
    for name, text in texts.items():
        before = baseline["texts"].get(name)
        if before is None or any(text[key] != before[key] for key in ("sha256", "windows", "window", "stride")):
            raise ValueError(
                f"the baseline was taken on other windows or another text than {name}; leave --text and --window out "
                "to score what the baseline scored"
            )
        tokens = text.get("ids_sha256")  # reports of earlier versions lack it
        if tokens is not None and before.get("ids_sha256") not in (None, tokens):
            raise ValueError(
                f"the baseline read {name} with another tokenizer, so figures by the token cannot be compared; give a "
                "baseline of models with this tokenizer"
            )


def _check_same_measure(
    metric: str,
    row: Mapping[str, Any],
    before: Mapping[str, Any],
    report: Mapping[str, Any],
    baseline: Mapping[str, Any],
) -> None:
    """Raises ValueError where a figure of the baseline's row `before` was taken from another reference or questions."""
    asked, earlier = ((found.get("tasks") or {}).get(metric) for found in (row, before))
    if asked is not None and earlier is not None and asked["questions"] != earlier["questions"]:
        raise ValueError(
            f"{before['name']} in the baseline has answered {earlier['questions']} questions of {metric}, and "
            f"{row['name']} {asked['questions']}; give --task-limit as the baseline had it"
        )
    if metric not in DIVERGENCES:
        return
    for text in report["texts"]:
        ours, theirs = (_perplexity_of_reference(found, text) for found in (report, baseline))
        if ours is not None and theirs is not None and not math.isclose(ours, theirs, rel_tol=SAME_REFERENCE):
            raise ValueError(
                f"{metric} in the baseline was measured from another reference than here (its perplexity on {text} is "
                f"{theirs:.4g}, here {ours:.4g}); give the same --reference, or a baseline that was measured from it"
            )


def _perplexity_of_reference(report: Mapping[str, Any], text: str) -> float | None:
    """Returns the perplexity of the model that KL is measured from; None where the report has none."""
    rows = [row for row in report["rows"] if row["role"] == REFERENCE]
    found: float | None = rows[0]["texts"].get(text, {}).get("perplexity") if rows else None
    return found


def check_same_prompts(prompts: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Raises ValueError where `row` of a report has answered other prompts than `prompts`, as a report describes them.

    A row that has answered none is let through: nothing is compared with it.
    """
    before = (row.get("generations") or {}).get("prompts")
    if before is not None and any(prompts[key] != before[key] for key in SAME):
        raise ValueError(
            f"{row['name']} in the baseline has answered other prompts, or up to another number of tokens, than "
            f"{prompts['source']}; leave out --prompts, --max-prompts and --max-new-tokens to use those of the baseline"
        )


def _figure(row: Mapping[str, Any], metric: str, text: str | None) -> float:
    if text is not None:
        value = row["texts"].get(text, {}).get(metric)
        measured = metric in row["texts"].get(text, {})
        # An infinite perplexity is null in JSON.
        value = math.inf if value is None and measured and metric.endswith("perplexity") else value
    elif metric in OF_MODEL:
        value = row
        for key in OF_MODEL[metric]:
            value = None if value is None else value.get(key)
    else:
        task = (row.get("tasks") or {}).get(metric)
        if task is None:
            raise _no_figure(metric, row.get("tasks") or ())
        value = task.get("acc_norm", task.get("acc"))
    if value is None:
        raise _not_measured(metric, row["name"])
    return float(value)


def _no_figure(metric: str, tasks: Iterable[str]) -> ValueError:
    known = ", ".join((*ON_TEXT, *OF_MODEL, *tasks))
    return ValueError(f"the gate asks for {metric!r}, which is no figure of the report; figures: {known}")


def _not_measured(metric: str, name: str) -> ValueError:
    return ValueError(
        f"the gate asks for {metric!r} of {name}, which was not measured (KL and agreement need --reference, speed and "
        "memory `llmqat compare`, word perplexity --protocol wikitext, what models write --prompts, energy a machine "
        "that counts it)"
    )

"""A report as one HTML page that needs nothing else: no network, no script; light or dark as the reader's system is.

The page is made of the JSON report alone, so that a saved report can be shown later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from llmqat.evaluate.gate import REFERENCE
from llmqat.evaluate.generations import HEADINGS, described, table_cells
from llmqat.evaluate.layers import BLOCK_NUMBER, kind_of
from llmqat.evaluate.pictures import COLOURS, Point, bars, heat_map, lines, scatter
from llmqat.evaluate.tables import accuracy

Report = Mapping[str, Any]
Cell = str | tuple[str, float]
"""A cell's HTML, and perhaps how deep its colour is, 0 to 1."""

SHOWN_ANSWERS = 6
LONG_TITLE = 60
"""Letters from which the models' names are too many for a heading."""
STYLE = """
:root{color-scheme:light dark;--page:#f9f9f7;--card:#fff;--ink:#14140f;--soft:#55534c;--line:#e3e2dc;--good:#12741f;
--bad:#c02b2b;--c0:#8d8b83;--c1:#2a78d6;--c2:#d9541f;--c3:#12906a;--c4:#b07a00;--c5:#c14f80;--c6:#4a3aa7;--c7:#0f7c86;
--c8:#8a5a2b}
@media(prefers-color-scheme:dark){:root{--page:#121211;--card:#1c1c1a;--ink:#f3f2ec;--soft:#b5b3a8;--line:#34332f;
--good:#5fc86d;--bad:#ff7d7d;--c0:#8f8d85;--c1:#5a9df0;--c2:#f0793f;--c3:#35b58a;--c4:#d9a023;--c5:#e07fa6;--c6:#9a8cf0;
--c7:#3cb0ba;--c8:#c08e58}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1400px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}h2{font-size:18px;margin:36px 0 10px}
h3{font-size:15px;margin:18px 0 6px}p{margin:4px 0;max-width:80ch}.soft,figcaption span{color:var(--soft)}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 9px;font-size:14px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:13px;vertical-align:bottom}
tr:last-child td{border-bottom:0}th:first-child,td:first-child{text-align:left;white-space:normal;min-width:170px}
td small{color:var(--soft)}
.key{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:8px}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr))}.wide svg{max-width:520px}
figure,.card{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:14px 16px;min-width:0}
figcaption{display:flex;flex-direction:column;margin-bottom:8px}figcaption span{font-size:13px}
svg{width:100%;height:auto;display:block;overflow:visible}svg text{font-size:12px;fill:var(--ink)}
svg text.tick,svg text.value{fill:var(--soft);font-variant-numeric:tabular-nums}svg text.tick{font-size:11px}
svg .grid{stroke:var(--line);fill:none}svg .axis{stroke:var(--soft);fill:none}
svg .whisker{stroke:var(--ink);stroke-width:1.5;fill:none}svg .line{fill:none;stroke-width:2;stroke-linejoin:round}
svg .dot{stroke:var(--card);stroke-width:2}
svg .cell{fill:color-mix(in oklab,var(--c1) var(--d),var(--card))}
td.heat{background:color-mix(in oklab,var(--c1) var(--d),var(--card))}
ul{margin:6px 0;padding-left:20px}.good{color:var(--good)}.bad{color:var(--bad);font-weight:600}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.45 ui-monospace,Menlo,Consolas,monospace}
details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px;margin:8px 0}
summary{cursor:pointer;font-weight:600}details .scroll{border:0;margin-top:8px}
"""


def to_html(report: Report) -> str:
    """Returns the whole page."""
    colours = _colours(report)
    sections: tuple[tuple[str, Callable[[Report, Mapping[str, int]], str]], ...] = (
        ("Verdict", _verdict),
        ("Results", _results),
        ("Pictures", _pictures),
        ("Where each model is weak", _parts),
        ("Layers", _layers),
        ("Training", _training),
        ("What they write", _samples),
        ("Coverage", _coverage),
        ("Recipes", _recipes),
        ("Where it was measured", _environment),
    )
    bodies = [(title, make(report, colours)) for title, make in sections]
    names = ", ".join(row["name"] for row in report["rows"] if row["role"] != REFERENCE)
    body = "".join(f"<section><h2>{escape(title)}</h2>{inner}</section>" for title, inner in bodies if inner)
    head = f"<title>llmqat: {escape(names)}</title><style>{STYLE}</style>"
    heading = names if len(names) < LONG_TITLE else "Comparison"
    top = f'<h1>{escape(heading)}</h1><p class="soft">{escape(_subtitle(report))}</p>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1">{head}</head>'
        f"<body><main>{top}{body}</main></body></html>\n"
    )


def _colours(report: Report) -> dict[str, int]:
    """Returns which colour each model has everywhere; the reference is grey."""
    others = [row["name"] for row in report["rows"] if row["role"] != REFERENCE]
    own = {name: 1 + index % COLOURS for index, name in enumerate(others)}
    return {row["name"]: own.get(row["name"], 0) for row in report["rows"]}


def _subtitle(report: Report) -> str:
    reference = next((row["name"] for row in report["rows"] if row["role"] == REFERENCE), None)
    texts = ", ".join(f"{name} ({text['tokens']:,} tokens)" for name, text in report["texts"].items())
    return f"measured on {texts}" + ("" if reference is None else f", against {reference}")


def _verdict(report: Report, colours: Mapping[str, int]) -> str:
    entries = [(check["said"], "good" if check["passed"] else "bad") for check in report.get("gate", ())]
    for one in report.get("advice", ()):
        entries += [(one["said"], ""), *((f"next: {line}", "") for line in one["next"])]
    entries += [(said, "") for said in report.get("drift", ())]
    entries += [(found["text"], "bad" if found["level"] == "warning" else "") for found in report["findings"]]
    if not entries:
        return ""
    items = "".join(f'<li class="{kind}">{escape(said)}</li>' for said, kind in entries)
    return f'<div class="card"><ul>{items}</ul></div>'


def _results(report: Report, colours: Mapping[str, int]) -> str:
    tasks = list(dict.fromkeys(name for row in report["rows"] for name in row.get("tasks") or {}))
    found = []
    for name, text in report["texts"].items():
        headings = ["model", "made by", "bits a<br>weight", "MB", "perplexity", "KL", "reverse<br>KL"]
        headings += [
            "top-1",
            "top-5<br>overlap",
            "first<br>token ms",
            "tok/s",
            "tok/s<br>batch",
            "load s",
            "peak<br>MB",
            "J a<br>token",
        ]
        headings += [escape(task) for task in tasks]
        rows = [_result_cells(row, row["texts"][name], tasks, colours) for row in report["rows"]]
        cut = f"{text['windows']} windows of {text['window']} tokens"
        words = f"{name}: {cut}; ± half of the 95 % interval by bootstrap over windows"
        found.append(f'<p class="soft">{escape(words)}</p>{_table(headings, rows)}')
    return "".join(found) + _written(report, colours)


def _written(report: Report, colours: Mapping[str, int]) -> str:
    """Returns the table of what models write after prompts; nothing where they were not asked."""
    asked = {row["name"]: row["generations"] for row in report["rows"] if row.get("generations")}
    if not asked:
        return ""
    reference = next((asked[row["name"]] for row in report["rows"] if row["role"] == REFERENCE), None)
    headings = ["model", *(heading.replace("\n", "<br>") for heading in HEADINGS)]
    rows = [[_name(name, colours), *table_cells(own, reference)] for name, own in asked.items()]
    words = f"{described(next(iter(asked.values()))['prompts'])}; 95 % intervals by bootstrap, paired by prompt"
    return f'<p class="soft">{escape(words)}</p>{_table(headings, rows)}'


def _result_cells(row: Report, text: Report, tasks: Sequence[str], colours: Mapping[str, int]) -> list[str]:
    costs = row.get("costs") or {}
    return [
        _name(row["name"], colours),
        escape(row.get("method") or row["role"]),
        _number(row["bits_per_weight"], ".2f"),
        _number(_scaled(row["bytes_on_disk"], 1e-6), ".1f"),
        _with_spread(text, "perplexity", ".2f"),
        _with_spread(text, "kl", ".4f"),
        _number(text.get("reverse_kl"), ".4f"),
        _number(text["top1"], ".1%"),
        _number(text.get("top5"), ".1%"),
        _number(_scaled(costs.get("first_token_seconds"), 1e3), ".0f"),
        _number(costs.get("decode_tokens_per_second"), ".1f"),
        _number(costs.get("batch_tokens_per_second"), ".1f"),
        _number(costs.get("load_seconds"), ".1f"),
        _number(_scaled(costs.get("peak_bytes"), 1e-6), ".0f"),
        _number(costs.get("joules_per_token"), ".3g"),
        *(_number(accuracy(row, task), ".1%") for task in tasks),
    ]


def _pictures(report: Report, colours: Mapping[str, int]) -> str:
    found = []
    for text in report["texts"]:
        kl = any(row["texts"][text]["kl"] for row in report["rows"])
        metric, label = ("kl", "KL from the reference, nats a token") if kl else ("perplexity", "perplexity")
        found.append(
            bars(_points(report, text, "perplexity", colours), f"Perplexity on {text}", "lower is better", ".2f")
        )
        if kl:
            quantized = [point for point in _points(report, text, "kl", colours) if point.colour]
            found.append(bars(quantized, f"KL on {text}", "nats a token from the reference; lower is better", ".4f"))
        for heading, unit, take in (
            ("size", "MB on disk", lambda row: _scaled(row["bytes_on_disk"], 1e-6)),
            ("speed", "decoded tokens a second", lambda row: row["decode_tokens_per_second"]),
        ):
            placed = _placed(report, text, metric, take, colours)
            title = f"Quality against {heading}, {text}"
            found.append(scatter(placed, title, f"{label}; lower is better", unit, label.split(",")[0]))
    shown = "".join(found)
    return f'<div class="grid wide">{shown}</div>' if shown else ""


def _placed(
    report: Report, text: str, metric: str, take: Callable[[Report], float | None], colours: Mapping[str, int]
) -> list[Point]:
    """Returns the models that have both figures: `take`'s across, `metric` upwards."""
    placed = []
    for row in report["rows"]:
        across, up = take(row), row["texts"][text][metric]
        if across is not None and up is not None and up != float("inf"):
            placed.append(Point(row["name"], colours[row["name"]], across, up))
    return placed


def _points(report: Report, text: str, metric: str, colours: Mapping[str, int]) -> list[Point]:
    points = []
    for row in report["rows"]:
        entry = row["texts"][text]
        if entry[metric] is not None and entry[metric] != float("inf"):
            spread = entry.get("intervals", {}).get(metric, {})
            points.append(
                Point(row["name"], colours[row["name"]], entry[metric], 0, spread.get("low"), spread.get("high"))
            )
    return points


def _parts(report: Report, colours: Mapping[str, int]) -> str:
    found = []
    for text in report["texts"]:
        for way, heading in (("position", "tokens of the window read before"), ("kind", "kind of the token")):
            rows = [(row["name"], row["texts"][text].get("parts", {}).get(way)) for row in report["rows"]]
            rows = [(name, parts) for name, parts in rows if parts]
            kl = any(part["kl"] for _, parts in rows for part in parts)
            metric, style = ("kl", ".4f") if kl else ("perplexity", ".1f")
            rows = [(name, parts) for name, parts in rows if not kl or colours[name]]
            if not rows:
                continue
            largest = max(part[metric] for _, parts in rows for part in parts) or 1.0
            headings = [
                f"{'KL' if kl else 'perplexity'} by {heading}",
                *(f"{escape(part['name'])}<br>{part['tokens']:,}" for part in rows[0][1]),
            ]
            cells: list[list[Cell]] = [
                [_name(name, colours), *((_number(part[metric], style), part[metric] / largest) for part in parts)]
                for name, parts in rows
            ]
            found.append(f"<h3>{escape(text)}</h3>{_table(headings, cells)}")
    return "".join(found)


def _layers(report: Report, colours: Mapping[str, int]) -> str:
    found = [(row["name"], *_layer_errors(row)) for row in report["rows"] if row["role"] != REFERENCE]
    found = [(name, what, cells) for name, what, cells in found if cells]
    bounds: dict[str, tuple[float, float]] = {}
    for _, what, cells in found:  # one scale for all models of which the same was measured
        low, high = bounds.get(what, (float("inf"), 0.0))
        values = [value for row in cells.values() for value in row.values()]
        bounds[what] = min(low, *values), max(high, *values)
    maps = "".join(heat_map(cells, name, f"{what}, by block", ".2%", bounds[what]) for name, what, cells in found)
    return f'<div class="grid wide">{maps}</div>' if maps else ""


def _layer_errors(row: Report) -> tuple[str, dict[str, dict[int, float]]]:
    """Returns what was measured of a model's layers, and it by kind of layer and block."""
    stage, reports = next(reversed((row.get("layers") or {}).items()), ("", []))
    errors = {entry["name"]: entry["output_error"] for entry in reports if entry.get("output_error") is not None}
    what = f"output error, {stage}" if errors else "weight error |W - Ŵ|² / |W|²"
    errors = errors or {name: error for name, error in (row.get("weight_errors") or {}).items() if error > 0}
    cells: dict[str, dict[int, float]] = {}
    for name, error in errors.items():
        number = BLOCK_NUMBER.search(name)
        if number is not None:
            cells.setdefault(kind_of(name), {})[int(number[1])] = error
    return what, cells


_CURVES = {
    "loss": ("Training loss", "nats a token"),
    "eval_loss": ("Evaluation loss", "nats a token"),
    "eval_perplexity": ("Evaluation perplexity", "of the weights as they would be packed"),
    "quantization/flipped": ("Codes that flip", "share of the codes looked at, a step"),
    "quantization/oscillating": ("Codes that flip back and forth", "share of the codes looked at"),
    "quantization/scale_drift": ("Drift of scales", "mean |log scale / starting scale|"),
    "quantization/clipped": ("Weights clipped", "share of the weights looked at"),
    "grad_norm": ("Norm of the gradient", ""),
    "learning_rate": ("Learning rate", "of weights"),
}


_OF_A_TEXT = re.compile(r"eval_(.+)_perplexity")


def _training(report: Report, colours: Mapping[str, int]) -> str:
    found = []
    histories = {row["name"]: _history(row) for row in report["rows"]}
    for key, (title, note) in _curves_of(histories.values()).items():
        series = {}
        for name, history in histories.items():
            points = [(entry["step"], entry[key]) for entry in history if isinstance(entry.get(key), (int, float))]
            if points:
                series[name] = (colours[name], points)
        found.append(lines(series, title, note, "optimizer step"))
    return f'<div class="grid">{"".join(found)}</div>' if any(found) else ""


def _history(row: Report) -> Sequence[Report]:
    return ((row.get("run") or {}).get("training") or {}).get("history") or ()


def _curves_of(histories: Iterable[Sequence[Report]]) -> dict[str, tuple[str, str]]:
    """Returns title and note of each curve by its key; texts that were watched by name have curves of their own."""
    keys = dict.fromkeys(key for history in histories for entry in history for key in entry)
    named = {key: found[1] for key in keys if (found := _OF_A_TEXT.fullmatch(key))}
    title, note = _CURVES["eval_perplexity"]
    return {**_CURVES, **{key: (f"{title}, {text}", note) for key, text in named.items()}}


def _samples(report: Report, colours: Mapping[str, int]) -> str:
    beginnings = {row["name"]: row["samples"] for row in report["rows"] if row.get("samples")}
    answers = {row["name"]: row["generations"]["answers"] for row in report["rows"] if row.get("generations")}
    found = []
    if beginnings:
        count = len(next(iter(beginnings.values())))
        found += [
            '<p class="soft">The most probable token each time.</p>',
            _completions(beginnings, range(count), colours),
        ]
    if answers:
        said = f"Prompts whose answers differ most in length ({SHOWN_ANSWERS} at most)."
        found += [f'<p class="soft">{said}</p>', _completions(answers, _most_apart(report), colours)]
    return "".join(found)


def _completions(
    found: Mapping[str, Sequence[Mapping[str, str]]], places: Iterable[int], colours: Mapping[str, int]
) -> str:
    """Returns some prompts, and side by side what each model of `found` writes after them."""
    shown = []
    for place in places:
        cards = "".join(
            f'<div class="card"><p>{_name(name, colours)}</p><pre>{escape(entries[place]["completion"])}</pre></div>'
            for name, entries in found.items()
        )
        prompt = next(iter(found.values()))[place]["prompt"]
        shown.append(f'<h3><pre>{escape(prompt.strip())}</pre></h3><div class="grid">{cards}</div>')
    return "".join(shown)


def _most_apart(report: Report) -> list[int]:
    """Returns the numbers of the prompts whose answers differ most in length between models."""
    lengths = [row["generations"]["samples"]["length"] for row in report["rows"] if row.get("generations")]
    spread = [max(entries) - min(entries) for entries in zip(*lengths, strict=True)]
    return sorted(range(len(spread)), key=lambda place: -spread[place])[:SHOWN_ANSWERS]


def _coverage(report: Report, colours: Mapping[str, int]) -> str:
    found = []
    for row in report["rows"]:
        coverage = row.get("coverage")
        if coverage is None or row["role"] == REFERENCE:
            continue
        rows = [
            [escape(pattern), str(count), escape(shape), escape(treatment), f"{before:,}", f"{after:,}"]
            for pattern, count, shape, treatment, before, after in _alike(coverage["entries"])
        ]
        headings = ["tensors", "number", "shape", "treatment", "bytes in bfloat16", "bytes packed"]
        notes = "".join(f"<li>{escape(note)}</li>" for note in coverage["notes"])
        found.append(
            f"<details><summary>{escape(row['name'])}: {coverage['average_bits_of_all']:.2f} bits a parameter of the "
            f"whole model</summary>{_table(headings, rows)}<ul>{notes}</ul></details>"
        )
    return "".join(found)


def _alike(entries: Sequence[Report]) -> Iterator[tuple[str, int, str, str, int, int]]:
    groups: dict[tuple[str, str, str], list[Report]] = {}
    for entry in entries:
        treatment = f"{entry['treatment']}: {entry['reason']}" if entry["reason"] else entry["treatment"]
        key = (BLOCK_NUMBER.sub(".*.", entry["name"], count=1), "×".join(map(str, entry["shape"])), treatment)
        groups.setdefault(key, []).append(entry)
    for (name, shape, treatment), group in groups.items():
        yield (
            name,
            len(group),
            shape,
            treatment,
            *(sum(e[key] for e in group) for key in ("bytes_before", "bytes_after")),
        )


def _recipes(report: Report, colours: Mapping[str, int]) -> str:
    found = []
    for row in report["rows"]:
        run = row.get("run") or {}
        shown = run.get("recipe") or {
            key: run[key] for key in ("model", "calibrate", "text", "allocation") if key in run
        }
        if shown:
            text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
            found.append(f"<details><summary>{escape(row['name'])}</summary><pre>{escape(text)}</pre></details>")
    return "".join(found)


def _environment(report: Report, colours: Mapping[str, int]) -> str:
    made = {key: report[key] for key in ("llmqat", "date", "command") if key in report}
    facts = {**made, **report["environment"], **{f"asked: {key}": value for key, value in report["settings"].items()}}
    rows = [
        [escape(key), escape(value if isinstance(value, str) else json.dumps(value))] for key, value in facts.items()
    ]
    rows += [[escape(f"sha256 of {name}"), text["sha256"]] for name, text in report["texts"].items()]
    return f"<details><summary>machine, versions, settings</summary>{_table(['', ''], rows)}</details>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Returns a table of HTML cells; columns that hold nothing are left out."""
    kept = [index for index in range(len(headings)) if any(_text(row[index]) != "–" for row in rows)]
    head = "".join(f"<th>{headings[index]}</th>" for index in kept)
    body = "".join(f"<tr>{''.join(_cell(row[index]) for index in kept)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{cell}</td>"
    return f'<td class="heat" style="--d:{55 * cell[1]:.0f}%">{cell[0]}</td>'


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _name(name: str, colours: Mapping[str, int]) -> str:
    return f'<span class="key" style="background:var(--c{colours[name]})"></span>{escape(name)}'


def _with_spread(text: Report, metric: str, style: str) -> str:
    found = text.get("intervals", {}).get(metric)
    spread = (
        ""
        if found is None or found["low"] == found["high"]
        else f" <small>±{(found['high'] - found['low']) / 2:.2g}</small>"
    )
    return _number(text[metric], style) + spread


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor

"""The table of clients.py: each answer beside llmqat's own, and in words what is not as it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

VERDICTS = {
    "reference": "what others are compared with",
    "equal": "loads; perplexity within the limit, and on tiny models the same greedy tokens",
    "differs": "loads, with other numbers",
    "no reference": "loads, and there is no answer of llmqat on the same windows",
    "refused": "does not load, in the client's own words",
    "not written": "llmqat does not write this model in this format, for the reason given",
    "not installed": "the client's environment is not there",
    "not run": "needs a GPU",
}
"""What can be said of a cell."""
FIGURES = ("perplexity", "windows", "window", "first_token_s", "tokens_per_s", "peak_mb", "said", "versions", "extra")
WINDOWS = ("windows", "window", "text_sha256")
"""What two answers must have alike to be compared."""
END = "<|im_end|>"
"""Of an answer to a chat; what runners let follow it is no part of it."""


def rows_of(answers: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Returns a row an answer: its figures, how far they are from the reference's, and a verdict."""
    own = {(answer["model"], answer["variant"]): answer for answer in answers if answer["client"] == reference}
    rows = [_row(answer, own.get((answer["model"], answer["variant"]), {}), reference) for answer in answers]
    return [_against_rule(row, answer.get("rule")) for row, answer in zip(rows, answers, strict=True)]


def _against_rule(row: dict[str, Any], rule: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns a row with what llmqat's rule says of it, and whether that is what was seen."""
    if rule is None:
        return row
    if row["status"] not in ("run", "not written"):
        return {**row, "rule": rule}
    return {**row, "rule": rule, "rule_holds": rule["serves"] == bool(row["verdict"] not in ("refused", "not written"))}


def _row(answer: Mapping[str, Any], own: Mapping[str, Any], reference: str) -> dict[str, Any]:
    row = {key: answer[key] for key in ("client", "model", "variant", "format", "status")}
    row |= {key: answer[key] for key in FIGURES if answer.get(key) not in (None, "", {})}
    if not answer.get("loads"):
        return {**row, "verdict": "refused" if answer["status"] == "run" else answer["status"]}
    if answer["client"] == reference:
        return {**row, "verdict": "reference"}
    if not own.get("loads") or any(own.get(key) != answer.get(key) for key in WINDOWS):
        return {**row, "verdict": "no reference"}
    pairs = [
        pair
        for ours, theirs in zip(own["tokens"], answer["tokens"], strict=True)
        for pair in zip(ours, theirs, strict=True)
    ]
    row["relative"] = answer["perplexity"] / own["perplexity"] - 1
    row["limit"] = answer["limit"]
    row["tokens_equal"], row["tokens"] = sum(ours == theirs for ours, theirs in pairs), len(pairs)
    if "chat" in answer["extra"]:
        said = [found["extra"].get("chat", "").partition(END)[0] for found in (own, answer)]
        row["chat_equal"] = said[0] == said[1]
    fits = abs(row["relative"]) <= row["limit"]
    # What a client says twice in two ways, such as at once and as a stream.
    fits = fits and not any(value is False for key, value in answer["extra"].items() if key.endswith("_equal"))
    if answer["model"].startswith("tiny-"):  # its next tokens are sure
        fits = fits and row["tokens_equal"] == row["tokens"] and row.get("chat_equal", True)
    return {**row, "verdict": "equal" if fits else "differs"}


def render(rows: Sequence[Mapping[str, Any]], clients: Mapping[str, Any], machine: str) -> str:
    """Returns the rows as Markdown: a table a real model, one of the tiny ones, versions, and what clients said.

    Args:
        rows: from `rows_of`.
        clients: name -> its line in the registry of clients.py.
        machine: what it was run on.
    """
    notes: dict[str, int] = {}
    models = list(dict.fromkeys(row["model"] for row in rows))
    real = [model for model in models if not model.startswith("tiny-")]
    tiny = [model for model in models if model.startswith("tiny-")]
    parts = [
        "# Who reads the checkpoints",
        f"Made by `make clients` on {machine}. In a cell: perplexity and its difference from llmqat's own, greedy "
        "tokens equal to llmqat's, seconds to the first token, tokens a second, peak of resident memory. **Bold** is "
        "more than the limit (0.5 %, with activations in 8 bits 2 %), or other tokens of a tiny model. Numbers in "
        "brackets lead to the client's own words, or to those of llmqat's rule where nothing was run.",
    ]
    some = [row for row in rows if clients[row["client"]].only is not None]
    every = [row for row in rows if clients[row["client"]].only is None]
    for chosen, title in [*(([model], model) for model in real), (tiny, "tiny models")]:
        found = [row for row in every if row["model"] in chosen]
        if found:
            parts += [f"## {title}", _table(found, clients, notes, brief=title == "tiny models")]
    if some:
        parts += ["## Servers, over HTTP", _servers(some, clients, notes)]
    if against := [row for row in rows if not row.get("rule_holds", True)]:
        parts += ["## Against the rule", "\n".join(map(_against, against))]
    parts += ["## Versions", *_versions(rows, clients)]
    if notes:
        parts += ["## In their own words", "\n".join(f"{number}. {said}" for said, number in notes.items())]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]], clients: Mapping[str, Any], notes: dict[str, int], *, brief: bool) -> str:
    """Returns a table, a line a checkpoint and a column a client and format."""
    columns = list(dict.fromkeys((name, format) for name in clients for format in clients[name].formats))
    columns = [column for column in columns if any((row["client"], row["format"]) == column for row in rows)]
    lines = list(dict.fromkeys((row["model"], row["variant"]) for row in rows))
    found = {(row["model"], row["variant"], row["client"], row["format"]): row for row in rows}
    windows = Counter(row["windows"] for row in rows if row["verdict"] == "reference" and "windows" in row).most_common(
        1
    )
    common = windows[0][0] if windows else None
    head = ["checkpoint", *(_title(clients[name], format) for name, format in columns)]
    shown = [head, ["---"] * len(head)]
    for model, variant in lines:
        cells = [found.get((model, variant, *column)) for column in columns]
        shown.append(
            [f"{model}, {variant}" if brief else variant, *(_cell(cell, notes, brief, common) for cell in cells)]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in shown)


def _servers(rows: Sequence[Mapping[str, Any]], clients: Mapping[str, Any], notes: dict[str, int]) -> str:
    """Returns a table of clients that are given some checkpoints only, a line each."""
    shown = [["server", "checkpoint", "figures", "beside"], ["---"] * 4]
    for row in rows:
        more = {"chat_equal": row["chat_equal"]} if "chat_equal" in row else {}
        extra = {**more, **row.get("extra", {})}
        told = [f"{key.replace('_', ' ')}: {_told(value)}" for key, value in extra.items() if key != "chat"]
        place = f"{row['model']}, {row['variant']}"
        shown.append([clients[row["client"]].title, place, _cell(row, notes, brief=False), "; ".join(told)])
    return "\n".join("| " + " | ".join(line) + " |" for line in shown)


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _title(client: Any, format: str) -> str:
    return client.title if len(client.formats) == 1 else f"{client.title}: {format}"


def _on(row: Mapping[str, Any], windows: int | None) -> str:
    """Returns on how many windows a figure is, where that is not said of the table."""
    return "" if windows in (None, row.get("windows")) else f", {row['windows']} windows"


def _cell(row: Mapping[str, Any] | None, notes: dict[str, int], brief: bool, windows: int | None = None) -> str:
    """Returns one cell; `windows` are those of most others."""
    if row is None:
        return ""
    rule = row.get("rule", {})
    if row["verdict"] == "not run" and rule:
        # What it loses is said where it serves, why not where it does not.
        mark = f" [{notes.setdefault(rule['note'], len(notes) + 1)}]" if rule["note"] else ""
        return f"not run; by the rule {'yes' if rule['serves'] else 'no'}{mark}"
    said = row.get("said", "")
    mark = f" [{notes.setdefault(said, len(notes) + 1)}]" if said else ""
    if row["verdict"] in ("refused", "not written", "not installed", "not run"):
        return {"refused": "no"}.get(row["verdict"], row["verdict"]) + mark
    if brief and row["verdict"] == "reference":
        return f"{row['perplexity']:.4g}"
    rate = row["tokens_per_s"]
    speed = f"{row['first_token_s']:.2g} s" + (f", {rate:.3g} tok/s" if rate is not None else "")
    memory = f", {row['peak_mb']:,.0f} MB" if row.get("peak_mb") else ""
    if row["verdict"] == "reference":
        return f"{row['perplexity']:.4g}<br>{speed}{memory}"
    if "relative" not in row:
        return f"{row['perplexity']:.4g}, not compared"
    relative = f"{100 * row['relative']:+.2f} %"
    figures = relative if brief else f"{row['perplexity']:.4g} ({relative}{_on(row, windows)})"
    figures += f"<br>{row['tokens_equal']} of {row['tokens']}"
    if row["verdict"] == "differs":
        # What the rule says is lost may be why; of what is alike it needs no words.
        mark = f" [{notes.setdefault(rule['note'], len(notes) + 1)}]" if rule.get("note") else ""
        figures = f"**{figures}**{mark}"
    return figures if brief else f"{figures}<br>{speed}{memory}"


def _against(row: Mapping[str, Any]) -> str:
    place = ", ".join(row[part] for part in ("client", "format", "model", "variant"))
    rule = "serves" if row["rule"]["serves"] else f"does not serve ({row['rule']['note']})"
    return f"- {place}: {row['verdict']}, where the rule says that it {rule}"


def _versions(rows: Sequence[Mapping[str, Any]], clients: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in clients:
        of_client = [row["versions"] for row in rows if row["client"] == name and "versions" in row]
        for versions in {tuple(sorted(found.items())): found for found in of_client}.values():
            told = ", ".join(f"{package} {version}" for package, version in versions.items())
            lines.append(f"- {clients[name].title}: {told}")
    return ["\n".join(lines)] if lines else ["No client was run."]

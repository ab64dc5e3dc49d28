"""The law of KL against training tokens that `budget.py` fits to its cells, and the plot of it.

    KL(T) = floor + (start - floor) (1 + T / scale) ^ -power

`start` is the measured KL of the calibrated start, so the law is exact at 0 tokens and falls from there. Two numbers
are fitted where there is no floor, three where there is one, by the least squared relative error. The form is taken
that better predicts each measured budget from the others (leave one out); the root mean square of these relative errors
is the error of the law.

Shapes: S scales, P powers of the grid, N budgets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from llmqat.evaluate.bootstrap import mean_difference, mean_interval
from llmqat.evaluate.budget import FORMAT, OWN_TEXT, Law
from llmqat.extras import check_installed
from llmqat.files import file_in_progress

FEWEST = 3
"""Budgets above 0 that a law needs."""
SCALES, POWERS = (1e2, 1e8), (0.02, 4.0)
"""Where the numbers of a law may lie."""
GRID, ZOOMS = 61, 8

Rows = Sequence[Mapping[str, Any]]
"""Cells as the report of budget.py has them."""


def laws_of(rows: Rows, facts: Mapping[str, Any]) -> list[Law]:
    """Returns laws for each scheme and text: of the texts that are not the model's own together, then of each text.

    Args:
        rows: of all schemes and texts.
        facts: model, parameters, stages and group size of a law.
    """
    facts = {**facts, "model": plain_name(facts["model"])}
    found = []
    for scheme, text in sorted({(row["scheme"], row["text"]) for row in rows}, reverse=True):
        own = [row for row in rows if (row["scheme"], row["text"]) == (scheme, text)]
        if sum(1 for tokens in {row["tokens"] for row in own} if tokens) < FEWEST or own[0]["tokens"]:
            continue
        names = [*own[0]["texts"]]
        together = [name for name in names if name != OWN_TEXT] or names
        each = [(name,) for name in names if (name,) != tuple(together)]
        found += [
            law_of(own, judged_on, {**facts, "scheme": scheme, "text": text}) for judged_on in (tuple(together), *each)
        ]
    return found


def plain_name(model: str) -> str:
    """Returns a model's name without folders and the ending of a GGUF file."""
    return re.sub(r"(\.\w+)?\.gguf$", "", model.rpartition("/")[2])


def law_of(rows: Rows, judged_on: tuple[str, ...], facts: Mapping[str, Any]) -> Law:
    """Returns the law of the cells of a scheme on a text, by their mean KL on the texts `judged_on`."""
    budgets = sorted({row["tokens"] for row in rows})
    windows = {tokens: [pooled(row, judged_on) for row in rows if row["tokens"] == tokens] for tokens in budgets}
    points = [(tokens, fmean(fmean(kl) for kl in windows[tokens])) for tokens in budgets]
    fitted, error = fit(points)
    law = Law(
        **facts,
        **fitted,
        judged_on=judged_on,
        start=points[0][1],
        error=round(error, 4),
        least=budgets[1],
        most=budgets[-1],
        enough_below=None,
        points=tuple((tokens, round(kl, 6)) for tokens, kl in points),
    )
    change = noise(windows[0][0], windows[budgets[1]])
    in_vain = takewhile(lambda point: law.start - point[1] <= change, points[1:])
    paying = max([law.tokens_at(law.start - change), *(tokens for tokens, _ in in_vain)])
    return law if paying >= law.most else law.model_copy(update={"enough_below": rounded_up(paying)})


def pooled(row: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """Returns the KL of every window of some texts."""
    return [kl for name in names for kl in row["texts"][name]["window_kl"]]


def noise(start: Sequence[float], trained: Sequence[Sequence[float]]) -> float:
    """Returns the change of KL that means nothing: half of its paired interval, or how far seeds are apart.

    Args:
        start: KL of each window before training.
        trained: and after the smallest training, by seed.
    """
    apart = [mean_difference(windows, start) for windows in trained]
    means = [fmean(windows) for windows in trained]
    return max(max((one.high - one.low) / 2 for one in apart), max(means) - min(means))


def rounded_up(tokens: float) -> int:
    """Returns a number of tokens to two digits."""
    unit = 10 ** max(math.floor(math.log10(tokens)) - 1, 0) if tokens >= 1 else 1
    return math.ceil(tokens / unit) * unit


def fit(points: Sequence[tuple[int, float]]) -> tuple[dict[str, float], float]:
    """Returns the law's floor, scale and power, and its relative error on budgets that it has not seen.

    Args:
        points: tokens and KL, the start first, then `FEWEST` budgets or more.
    """
    tokens, kls = (np.array(side, dtype=float) for side in zip(*points[1:], strict=True))
    start = points[0][1]
    forms = [False, True] if len(tokens) > FEWEST else [False]
    errors = {with_floor: _unseen(start, tokens, kls, with_floor) for with_floor in forms}
    best = min(errors, key=lambda form: errors[form])
    return _fitted(start, tokens, kls, best), errors[best]


def _unseen(start: float, tokens: np.ndarray, kls: np.ndarray, with_floor: bool) -> float:
    errors = []
    for place, (left_out, kl) in enumerate(zip(tokens, kls, strict=True)):
        others = np.arange(len(tokens)) != place
        found = _fitted(start, tokens[others], kls[others], with_floor)
        predicted = found["floor"] + (start - found["floor"]) * (1 + left_out / found["scale"]) ** -found["power"]
        errors.append(predicted / kl - 1)
    return math.sqrt(fmean(error**2 for error in errors))


def _fitted(start: float, tokens: np.ndarray, kls: np.ndarray, with_floor: bool) -> dict[str, float]:
    """Returns the numbers of least squared relative error: a grid of scales and powers, made finer around the best."""
    bounds = np.log([SCALES, POWERS])
    lowest, highest = bounds.T
    for _ in range(ZOOMS):
        scales, powers = (np.exp(np.linspace(*side, GRID)) for side in zip(lowest, highest, strict=True))
        errors, floors = _errors(start, tokens, kls, scales, powers, with_floor)
        best = np.unravel_index(errors.argmin(), errors.shape)
        found = {"floor": float(floors[best]), "scale": float(scales[best[0]]), "power": float(powers[best[1]])}
        center, half = np.log([found["scale"], found["power"]]), (highest - lowest) / 4
        lowest, highest = np.maximum(center - half, bounds[:, 0]), np.minimum(center + half, bounds[:, 1])
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def _errors(
    start: float, tokens: np.ndarray, kls: np.ndarray, scales: np.ndarray, powers: np.ndarray, with_floor: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean squared relative errors [S, P], and the floor [S, P] that is best for each scale and power."""
    left = (1 + tokens / scales[:, None, None]) ** -powers[None, :, None]  # [S, P, N]
    floors = np.zeros(left.shape[:2])
    if with_floor:
        gone, missing = (1 - left) / kls, 1 - start * left / kls
        floors = ((gone * missing).sum(-1) / (gone**2).sum(-1)).clip(0, min(kls.min(), start))
    predicted = floors[..., None] + (start - floors[..., None]) * left
    return ((predicted / kls - 1) ** 2).mean(-1), floors


def sentence(law: Law) -> str:
    """Returns a law in a line."""
    end = f"power {law.power:.3g}, floor {law.floor:.3g}, error {law.error:.1%}. {law.enough()}"
    names = " and ".join(law.judged_on)
    return f"law of {law.scheme} on {law.text}, KL on {names} from {law.start:.4g}; scale {law.scale:.3g} tokens, {end}"


def document(laws: Sequence[Law], command: str) -> dict[str, Any]:
    """Returns what llmqat/evaluate/budget.json holds: for each scheme and text the law of the texts together."""
    kept: dict[tuple[str, str], Law] = {}
    for law in laws:
        kept.setdefault((law.scheme, law.text), law)
    return {"format": FORMAT, "command": command, "laws": [law.model_dump(mode="json") for law in kept.values()]}


def draw(rows: Rows, laws: Sequence[Law], path: Path) -> None:
    """Draws what was measured, with its 95 % intervals, and the laws: a panel for each scheme, the KL of all texts.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_installed("matplotlib", "a plot of the budgets")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    schemes = sorted({row["scheme"] for row in rows}, reverse=True)
    figure = Figure(figsize=(4.2 * len(schemes), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, scheme in enumerate(schemes, 1):
        axes = figure.add_subplot(1, len(schemes), place)
        for number, text in enumerate(sorted({row["text"] for row in rows})):
            own = [row for row in rows if (row["scheme"], row["text"]) == (scheme, text)]
            law = next((law for law in laws if (law.scheme, law.text) == (scheme, text)), None)
            _draw_curve(axes, own, law, f"C{number}", f"trained on {'own text' if text == OWN_TEXT else text}")
        axes.set_xscale("symlog", linthresh=min((row["tokens"] for row in rows if row["tokens"]), default=1))
        axes.set_ylim(bottom=0)
        axes.set_title(scheme)
        axes.set_xlabel("tokens trained on")
        axes.legend()
    scored = " and ".join(_scored(rows[0])) if rows else ""
    figure.axes[0].set_ylabel(f"KL from full precision, nats per token\nmean over {scored}")
    with file_in_progress(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:])


def _draw_curve(axes: Any, rows: Rows, law: Law | None, color: str, label: str) -> None:
    if not rows:
        return
    names = _scored(rows[0])
    windows = [pooled(row, names) for row in rows]
    tokens, means = [row["tokens"] for row in rows], [fmean(one) for one in windows]
    intervals = [mean_interval(one) for one in windows]
    below = [mean - one.low for mean, one in zip(means, intervals, strict=True)]
    above = [one.high - mean for mean, one in zip(means, intervals, strict=True)]
    axes.errorbar(tokens, means, [below, above], fmt="o", color=color, label=label, capsize=2)
    if law is not None:
        line = np.concatenate([np.linspace(0, law.least, 30), np.geomspace(law.least, law.most, 60)])
        axes.plot(line, [law.kl(tokens) for tokens in line], color=color, linewidth=1)


def _scored(row: dict[str, Any]) -> list[str]:
    """Returns the texts whose KL is drawn: those that the model has not written, where there are some."""
    return [name for name in row["texts"] if name != OWN_TEXT] or [*row["texts"]]

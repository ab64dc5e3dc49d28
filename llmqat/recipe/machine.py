"""How fast this machine trains, from what finished runs and probes took here: `plan` tells the time from it.

One small JSON file in llmqat's cache folder. A measurement is of one machine, number of processes, model size, scheme,
method and length of a sample; a later one of the same replaces it. What cannot be read or written is left alone, since
a run must not fail over it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from llmqat.files import write_whole
from llmqat.layers import CoverageAudit
from llmqat.models import cache_folder
from llmqat.recipe.config import Recipe, kept_top_k

log = logging.getLogger(__name__)

FILE = "machine.json"
TRAINING = "train"
"""Stage of a run whose time goes with the tokens."""


@dataclass(frozen=True)
class Measured:
    """What a run or a probe took."""

    tokens_per_second: float | None
    """Trained on, by all processes together; None of a run that trained nothing."""
    other_seconds: float | None
    """Of a run's other stages: text, calibration, saving, evaluation; None of a probe."""
    others: str
    """Hash of the sections of the recipe that the other stages follow."""
    date: str
    """Day, UTC."""
    by: str
    """`a run` or `a probe`."""


@dataclass(frozen=True)
class ExpectedTime:
    """The time that a run is expected to take here."""

    seconds: float
    whole: bool
    """Whether all stages are counted, and not training alone."""
    measured: Measured


def remember_run(
    recipe: Recipe,
    coverage: CoverageAudit,
    processes: int,
    training: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
    *,
    goes_on: bool,
) -> None:
    """Keeps what a finished run took; nothing of one that was interrupted, whose stages were not timed whole.

    Args:
        recipe: of the run.
        coverage: of its model.
        processes: that trained.
        training: the facts of its training; None where there was none.
        seconds: wall-clock time of each stage.
        goes_on: whether it was interrupted and went on.
    """
    if goes_on:
        return
    facts = training or {}
    if kept_top_k(recipe) is not None and facts["teacher_cache"] is None:  # the model could not keep it after all
        return
    others = sum(value for stage, value in seconds.items() if stage != TRAINING)
    measured = Measured(facts.get("tokens_per_second"), others, _others(recipe), _today(), "a run")
    _keep(_key(recipe, coverage, processes), measured)


def remember_probe(recipe: Recipe, coverage: CoverageAudit, processes: int, tokens_per_second: float) -> None:
    """Keeps how fast a probe has trained, unless a run has been measured, whose figures say more."""
    key = _key(recipe, coverage, processes)
    before = _read().get(key)
    if before is None or before["by"] == "a probe":
        _keep(key, Measured(tokens_per_second, None, "", _today(), "a probe"))


def expected_time(recipe: Recipe, coverage: CoverageAudit, processes: int, tokens: int | None) -> ExpectedTime | None:
    """Returns how long a training on `tokens` would take here; None where nothing like it was measured, or asked."""
    found = _read().get(_key(recipe, coverage, processes))
    if found is None or tokens is None:
        return None
    measured = Measured(**found)
    whole = measured.other_seconds is not None and measured.others == _others(recipe)
    others = measured.other_seconds if whole and measured.other_seconds is not None else 0.0
    if tokens == 0 or measured.tokens_per_second is None:
        return ExpectedTime(others, whole, measured) if whole and tokens == 0 else None
    return ExpectedTime(tokens / measured.tokens_per_second + others, whole, measured)


def _key(recipe: Recipe, coverage: CoverageAudit, processes: int) -> str:
    parameters = sum(entry.numel for entry in coverage.entries)
    trains = "adapters" if recipe.lora is not None else recipe.train.get("trainable", "all")
    trains = trains if recipe.trains else "nothing"
    no_teacher = recipe.teacher_cache is not None or kept_top_k(recipe) is not None  # a quarter faster
    return (
        f"{_machine()}, processes {processes}: {parameters} parameters, {recipe.quant.weights.label}, trains {trains}, "
        f"samples of {recipe.data.block_size}" + (", from a cache" if no_teacher else "")
    )


def _machine() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{platform.node()} {platform.processor() or platform.machine()}, threads {torch.get_num_threads()}"


def _others(recipe: Recipe) -> str:
    """Returns the hash of what text, calibration and evaluation follow."""
    sections = recipe.model_dump(mode="json", include={"data", "calibrate", "evaluate", "allocate"})
    sections["data"].pop("server", None)
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:16]


def _today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def _read() -> dict[str, Any]:
    file = _file()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: asdict(Measured(**values)) for key, values in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # there is none yet, or another llmqat has written it


def _keep(key: str, measured: Measured) -> None:
    file = _file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({**_read(), key: asdict(measured)}, indent=2) + "\n")
    except OSError as error:
        log.warning("how fast this machine trains could not be kept in %s: %s", file, error)


def _file() -> Path:
    return cache_folder() / FILE

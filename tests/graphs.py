"""A stand-in for CUDA graphs where there is no GPU: it records what is run, and gives no more than a graph does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from llmqat.kernels import graphs

Run = Callable[[], tuple[Tensor, ...]]


def stand_in(run: Run) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Reads and writes the same tensors at each replay, as a graph does, and leaves nothing in them in between."""
    outputs = run()

    def replay() -> None:
        for out, new in zip(outputs, run(), strict=True):
            out.copy_(new)

    return replay, outputs


def holds_nothing(run: Run) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """What torch records where the kernels run on another device than the stream."""
    outputs = run()
    return lambda: None, outputs


def record_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Has recorders record as on a GPU; returns what was recorded, which grows."""
    runs: list[Run] = []

    def record(run: Run) -> Any:
        runs.append(run)
        return stand_in(run)

    monkeypatch.setattr(graphs, "_may_record", lambda tensors: True)
    monkeypatch.setattr(graphs, "_record", record)
    return runs

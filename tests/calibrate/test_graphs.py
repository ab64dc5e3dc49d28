"""CUDA graphs without a GPU: a stand-in that records what is run, and the codes of GPTQ by it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmqat.calibrate import gptq, graphs
from llmqat.calibrate.gptq import Curvature, graphs_kept, round_by_gptq
from llmqat.calibrate.graphs import Recorder
from llmqat.grid import Grid

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


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """A GPU whose recordings are counted."""
    runs: list[Run] = []

    def record(run: Run) -> Any:
        runs.append(run)
        return stand_in(run)

    monkeypatch.setattr(graphs, "_may_record", lambda tensors: True)
    monkeypatch.setattr(graphs, "_record", record)
    monkeypatch.setattr(gptq, "_recorder", Recorder())
    return runs


def problem(symmetric: bool, some_known: bool) -> dict[str, Any]:
    """A layer of 160 in features, which are no whole number of blocks of columns."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 160, generator=generator)
    grid = Grid(3, symmetric=symmetric)
    zeros = None if symmetric else torch.randint(0, 8, (24, 5), generator=generator).float()
    kept = torch.rand(24, 5, generator=generator) < 0.3 if some_known else None
    return {
        "weight": torch.randn(24, 160, generator=generator),
        "inputs": Curvature.of(x.T @ x / 400 + 0.01 * torch.eye(160)),
        "scale": torch.rand(24, 5, generator=generator) + 0.1,
        "zero_point": zeros,
        "grid": grid,
        "kept": kept,
    }


@pytest.mark.parametrize("some_known", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_graph_finds_the_codes_of_the_loop(
    symmetric: bool, some_known: bool, monkeypatch: pytest.MonkeyPatch, recorded: list[Run]
) -> None:
    layer = problem(symmetric, some_known)
    by_graph = [round_by_gptq(**layer) for _ in range(2)]
    assert len(recorded) == 2  # of 64 and of the last 32 columns, once each
    monkeypatch.setattr(graphs, "_may_record", lambda tensors: False)
    direct = round_by_gptq(**layer)
    assert all(torch.equal(codes, direct) for codes in by_graph)


def test_graphs_are_let_go_with_the_stage(recorded: list[Run]) -> None:
    with graphs_kept():
        round_by_gptq(**problem(True, False))
        assert gptq._recorder._recorded
    assert not gptq._recorder._recorded


def test_other_grids_and_shapes_have_recordings_of_their_own(recorded: list[Run]) -> None:
    round_by_gptq(**problem(True, False))
    round_by_gptq(**problem(False, False))
    round_by_gptq(**problem(True, True))
    assert len(recorded) == 6


def test_a_recording_that_fails_or_gives_other_numbers_is_not_used(
    monkeypatch: pytest.MonkeyPatch, recorded: list[Run], caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(run: Run) -> Any:
        replay, outputs = stand_in(run)
        return lambda: (replay(), outputs[0].add_(1)), outputs

    def no_memory(run: Run) -> Any:
        raise RuntimeError("out of memory")

    x = torch.arange(3.0)
    failing = {wrong: "gave other numbers", holds_nothing: "gave other numbers", no_memory: "could not be recorded"}
    for record, said in failing.items():
        caplog.clear()
        monkeypatch.setattr(graphs, "_record", record)
        recorder = Recorder()
        with caplog.at_level(logging.INFO, logger="llmqat"):
            found = [recorder("double", lambda t: (2 * t,), x)[0] for _ in range(2)]
        assert all(torch.equal(one, 2 * x) for one in found)
        assert sum(said in record.getMessage() for record in caplog.records) == 1


def test_nothing_is_recorded_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_record", lambda run: pytest.fail("recorded"))
    assert torch.equal(Recorder()("double", lambda t: (2 * t,), torch.ones(2))[0], torch.full((2,), 2.0))

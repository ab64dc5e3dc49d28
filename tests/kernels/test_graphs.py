"""CUDA graphs without a GPU: a stand-in that records what is run, and the codes of GPTQ by it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from llmqat.calibrate import gptq
from llmqat.calibrate.gptq import Curvature, graphs_kept, round_by_gptq
from llmqat.grid import Grid
from llmqat.kernels import graphs
from llmqat.kernels.graphs import Recorder
from tests.graphs import Run, holds_nothing, record_on_a_cpu, stand_in


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """A GPU whose recordings are counted."""
    monkeypatch.setattr(gptq, "_recorder", Recorder())
    return record_on_a_cpu(monkeypatch)


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


def test_a_graph_that_reads_what_has_changed_since_is_found_at_the_second_check(recorded: list[Run]) -> None:
    state, x, recorder = {"factor": torch.tensor(2.0)}, torch.ones(3), Recorder(checks=2)

    def scaled(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * state["factor"],)

    first = recorder("scaled", scaled, x)[0].clone()
    (graph,) = recorder._recorded.values()
    assert graph is not None
    old = state["factor"]
    graph.replay = lambda: graph.outputs[0].copy_(graph.inputs[0] * old)  # a graph keeps to the memory that it knows
    state["factor"] = torch.tensor(3.0)
    assert first.tolist() == [2.0] * 3
    assert [recorder("scaled", scaled, x)[0].tolist() for _ in range(2)] == [[3.0] * 3] * 2


def test_what_adds_up_in_any_order_may_differ_a_little(recorded: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def about(run: Run) -> Any:
        replay, outputs = stand_in(run)
        return lambda: (replay(), outputs[0].mul_(1.001)), outputs

    monkeypatch.setattr(graphs, "_record", about)
    x = torch.arange(3.0)
    exact, loose = Recorder(), Recorder(tolerance=0.01)
    assert torch.equal(exact("double", lambda t: (2 * t,), x)[0], 2 * x)
    assert torch.equal(loose("double", lambda t: (2 * t,), x)[0], 2 * x * 1.001)

"""Two processes calibrate and write text together: bit-equal on both, and as one alone would (see shared.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.children import ROOT, launched, torchrun


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    out = tmp_path_factory.mktemp("shared")
    launched(*torchrun(2), str(ROOT / "tests" / "calibrate" / "shared.py"), str(out))
    processes = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [process["count"] for process in processes] == [2, 2]
    return processes


def test_a_shared_calibration_ends_alike_everywhere_and_as_one_process_does(found: list[dict[str, Any]]) -> None:
    first, second = (process["shared"] for process in found)
    alone = found[0]["alone"]
    assert first["digest"] == second["digest"]
    assert first["files"] == alone["files"]  # the first process alone has written, and it wrote everything
    ranges, gptq, blockwise = zip(first["after"], alone["after"], strict=True)
    assert ranges[0] == pytest.approx(ranges[1], rel=1e-5)
    assert gptq[0] == pytest.approx(gptq[1], rel=1e-3)
    assert blockwise[0] == pytest.approx(blockwise[1], rel=0.02)
    # Moments, gradients and so codes differ by the order of float32 sums: a weight at the very edge between two codes
    # may fall to the other side, and training carries that on.
    differing = sum(ours != theirs for ours, theirs in zip(first["codes"], alone["codes"], strict=True))
    assert differing < 0.001 * len(alone["codes"])


def test_blocks_that_keep_their_own_forwards_end_alike_everywhere(found: list[dict[str, Any]]) -> None:
    assert found[0]["carried"] == found[1]["carried"]


def test_shards_written_together_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    assert found[0]["written"] == found[1]["written"] == found[0]["written alone"]

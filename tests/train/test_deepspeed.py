"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes: a step is the step of the whole model (see zero.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.children import ROOT, launched, torchrun
from tests.train.zero import FLOAT32, STAGES

pytest.importorskip("deepspeed", reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found, by case."""
    out = tmp_path_factory.mktemp("zero")
    launched(*torchrun(2), str(ROOT / "tests" / "train" / "zero.py"), str(out))
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", FLOAT32)
def test_a_step_under_zero_is_the_step_whole(name: str, stage: int, steps: list[dict[str, Any]]) -> None:
    found = [process[f"{name}, ZeRO-{stage}"] for process in steps]
    assert [(process["processes"], process["stage"]) for process in found] == [(2, stage), (2, stage)]
    assert sum(process["loss"] for process in found) == pytest.approx(found[0]["all rows"], rel=1e-5)
    assert found[0]["weights"] < 1e-6
    assert found[0]["moved"] > 0
    assert [process["codes"] for process in found] == [0, 0]

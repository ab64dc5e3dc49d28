"""FSDP2 on several processes: a step of a sharded student is the step of the whole one (see sharded.py)."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.children import ROOT, launched, torchrun
from tests.train.sharded import CASES

PROCESSES = int(os.environ.get("LLMQAT_TEST_PROCESSES", "2"))  # 1, 2 or 4: a batch has four rows
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """Case -> what each process found."""
    out = tmp_path_factory.mktemp("sharded")
    launched(*torchrun(PROCESSES), str(ROOT / "tests" / "train" / "sharded.py"), str(out))
    found = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]
    return {name: [process[name] for process in found] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_step_sharded_is_the_step_whole(name: str, steps: dict[str, Found]) -> None:
    assert [process["world_size"] for process in steps[name]] == PROCESSES * [PROCESSES]
    for process in steps[name]:
        # The same rows through the same products: gathered weights, and so codes, are those of the whole model.
        assert process["sharded"] == process["same rows"]
    case, first = CASES[name], steps[name][0]
    assert sum(process["sharded"] for process in steps[name]) == pytest.approx(
        first["all rows"], rel=0.02 if case.bf16 else 1e-5
    )
    if case.bf16:
        return  # gradients of half a batch are rounded to bfloat16 before they are added: 2^-8 each
    # Sums of float32 products in another order: 2^-24 a term, growing with the root of some ten thousand terms.
    assert max(first["gradients"]) < 6e-6
    assert max(first["weights"]) < 1e-6
    assert first["moved"] > 0
    assert first["codes"] == 0

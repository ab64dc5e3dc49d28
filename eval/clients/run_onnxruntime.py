"""ONNX Runtime on the CPU: the graph of an ONNX folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
from graph import Graph, Outputs, is_cache
from job import run


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what ONNX Runtime makes of one folder."""
    session = onnxruntime.InferenceSession(Path(job["path"]) / "model.onnx", providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    cache = {entry.name: (entry.shape[1], entry.shape[3]) for entry in session.get_inputs() if is_cache(entry.name)}

    def compute(feed: Outputs) -> Outputs:
        return dict(zip(names, session.run(names, feed), strict=True))

    return Graph(compute, cache).answer(job)


if __name__ == "__main__":
    run(("onnxruntime", "numpy"), answer)

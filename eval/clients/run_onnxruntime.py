"""ONNX Runtime on the CPU: the graph of an ONNX folder, fed by hand with its cache of keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from job import run, timed
from logits import perplexity_of


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what ONNX Runtime makes of one folder."""
    graph = onnxruntime.InferenceSession(Path(job["path"]) / "model.onnx", providers=["CPUExecutionProvider"])
    perplexity = perplexity_of(lambda window: outputs(graph, window)["logits"][0], job["windows"])
    timings = timed(lambda prompt, count: generated(graph, prompt, count), job)
    return {"perplexity": perplexity, **timings}


def outputs(
    graph: Any, tokens: list[int], before: dict[str, np.ndarray] | None = None, position: int = 0
) -> dict[str, np.ndarray]:
    """Returns the graph's outputs by name for new tokens after `position` others, whose outputs are `before`."""
    ids = np.array([tokens], dtype=np.int64)
    places = np.arange(position, position + len(tokens), dtype=np.int64)[None]
    feed = {"input_ids": ids, "attention_mask": np.ones((1, position + len(tokens)), np.int64), "position_ids": places}
    for entry in graph.get_inputs():
        if entry.name.startswith("past_key_values."):
            empty = np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
            feed[entry.name] = empty if before is None else before[entry.name.replace("past_key_values", "present")]
    names = [entry.name for entry in graph.get_outputs()]
    return dict(zip(names, graph.run(names, feed), strict=True))


def generated(graph: Any, prompt: list[int], count: int) -> list[int]:
    """Returns `count` greedy tokens after `prompt`; no token ends them."""
    found = outputs(graph, prompt)
    tokens = [int(found["logits"][0, -1].argmax())]
    while len(tokens) < count:
        found = outputs(graph, tokens[-1:], found, len(prompt) + len(tokens) - 1)
        tokens.append(int(found["logits"][0, -1].argmax()))
    return tokens


if __name__ == "__main__":
    run(("onnxruntime", "numpy"), answer)

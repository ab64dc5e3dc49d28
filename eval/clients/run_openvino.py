"""OpenVINO on the CPU: an ONNX folder by its runtime, and a GGUF file by OpenVINO GenAI.

OpenVINO GenAI makes a model of OpenVINO's own format from the file when it loads it. Both round the inputs of quantized
layers to 8 bits on most processors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from graph import Graph, Outputs, inputs, is_cache
from job import run, timed
from logits import perplexity_of


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what OpenVINO makes of one checkpoint."""
    return of_gguf(job) if job["format"] == "gguf" else of_onnx(job)


def of_onnx(job: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a graph with its cache of keys and values."""
    model = openvino.Core().compile_model(Path(job["path"]) / "model.onnx", "CPU")
    shapes = {entry.any_name: entry.partial_shape for entry in model.inputs if is_cache(entry.any_name)}
    cache = {name: (shape[1].get_length(), shape[3].get_length()) for name, shape in shapes.items()}

    def compute(feed: Outputs) -> Outputs:
        return {output.any_name: value for output, value in model(feed).items()}

    return Graph(compute, cache).answer(job)


def of_gguf(job: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of OpenVINO GenAI, with perplexity from the model that it has made of the file."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "model.gguf"
        file.symlink_to(job["path"])  # what it makes lies beside the file that it is given
        found = of_pipeline(openvino_genai.LLMPipeline(file, "CPU", enable_save_ov_model=True), job)
        request = openvino.Core().compile_model(file.with_name("openvino_model.xml"), "CPU").create_infer_request()
        return {"perplexity": perplexity_of(lambda window: logits(request, window), job["windows"]), **found}


def of_pipeline(pipeline: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Returns what a pipeline writes."""
    extra = {}
    if job["chat"] is not None:
        talk = openvino_genai.ChatHistory(job["chat"])
        extra["answer"] = str(pipeline.generate(talk, greedy(job["max_new_tokens"])))
    return {**timed(lambda prompt, count: written(pipeline, prompt, count), job), "extra": extra}


def greedy(count: int) -> Any:
    """Returns settings for `count` greedy tokens; no token ends them."""
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens, settings.ignore_eos, settings.do_sample = count, True, False
    return settings


def written(pipeline: Any, prompt: list[int], count: int) -> list[int]:
    """Returns `count` greedy tokens after `prompt`."""
    found = pipeline.generate(openvino.Tensor(np.array([prompt], dtype=np.int64)), greedy(count))
    return [int(token) for token in found.tokens[0]]


def logits(request: Any, tokens: list[int]) -> np.ndarray:
    """Returns the logits [L, V] of a window, by a model that keeps its cache itself."""
    request.reset_state()
    found: np.ndarray = request.infer({**inputs(tokens), "beam_idx": np.zeros(1, dtype=np.int32)})["logits"]
    return found[0]


if __name__ == "__main__":
    run(("openvino", "openvino-genai", "openvino-tokenizers", "numpy"), answer)

"""One packed checkpoint in every format, run by other programs: whether its weights are the same, and its perplexity.

    python eval/formats.py --model runs/smollm2-135m-int4/model --max-windows 8

The checkpoint is exported to a temporary folder. "weights" counts layers whose dequantized weight is bit for bit ours.
onnxruntime computes in float32; transformers reads the GGUF file into bfloat16; llama.cpp, where llama-cpp-python is
installed, rounds activations to 8 bits. The last lines are the headline, `name: number` (perplexities, and how far
onnxruntime's is from ours, in percent).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made import made, recorded, result_options
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmqat.data.pydoc import pydoc_text
from llmqat.data.text import read_text
from llmqat.evaluate.perplexity import TokenWindows, windows_from_text
from llmqat.export import load, write_gguf, write_onnx
from llmqat.files import write_whole
from llmqat.layers import PackedLinear
from llmqat.models import load_tokenizer, resolve_spec
from llmqat.paths import check_outputs, user_path
from llmqat.terminal import plain_console, show_any_text

Logits = Callable[[Tensor], Tensor]
"""Token ids [1, L] -> logits [1, L, V]."""


def main() -> None:
    """Exports, reads and runs each format, prints the table, then the headline."""
    show_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[result_options(json_file=False)],
    )
    parser.add_argument("--model", required=True, help="packed checkpoint, weights only")
    parser.add_argument("--text", type=user_path, help="UTF-8 file; Python's own manual where not given")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--max-windows", type=int, default=8, help="windows from the text's start")
    parser.add_argument("--json", type=user_path, help="file for the results")
    options = parser.parse_args()
    check_outputs({"--json": options.json}, [options.model, *([options.text] if options.text else [])])
    model = load(options.model, kernel="reference")
    tokenizer = load_tokenizer(resolve_spec(options.model), options.model)
    text = pydoc_text() if options.text is None else read_text(options.text)
    windows = windows_from_text(text, tokenizer, options.window, None, options.max_windows, str(options.text))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_onnx(model, tokenizer, folder / "onnx")
        write_gguf(model, tokenizer, folder / "model.gguf")
        rows = measured(model, folder, windows)
    show(rows, windows)
    if options.json is not None:
        facts = {
            **made("formats.py"),
            "model": options.model,
            "text_sha256": windows.sha256,
            "windows": len(windows),
            "rows": rows,
        }
        write_whole(options.json, json.dumps(facts, indent=2) + "\n")


def measured(model: PreTrainedModel, folder: Path, windows: TokenWindows) -> dict[str, dict[str, Any]]:
    """Returns bytes, layers whose weights are equal, and perplexity, by reader."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    rows: dict[str, dict[str, Any]] = {}
    rows["llmqat"] = {"perplexity": perplexity(lambda ids: model(ids).logits, windows)}
    data = sum(path.stat().st_size for path in (folder / "onnx").glob("model.onnx*"))
    equal = equal_in_onnx(folder / "onnx", layers)
    rows["onnxruntime"] = {"bytes": data, "equal": equal, "perplexity": perplexity(onnx_logits(folder), windows)}
    size = (folder / "model.gguf").stat().st_size
    rows["transformers, GGUF"] = {"bytes": size, **read_by_transformers(folder, layers, windows)}
    if importlib.util.find_spec("llama_cpp") is not None:
        rows["llama.cpp, GGUF"] = {"bytes": size, "perplexity": perplexity(llama_logits(folder, windows), windows)}
    for row in rows.values():
        row["layers"] = len(layers)
    return rows


def read_by_transformers(folder: Path, layers: dict[str, PackedLinear], windows: TokenWindows) -> dict[str, float]:
    """Returns what transformers' own reader makes of the GGUF file."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16)
    equal = sum(
        torch.equal(theirs.get_submodule(name).weight, layer.dequantized_weight(torch.bfloat16))
        for name, layer in layers.items()
    )
    return {"equal": equal, "perplexity": perplexity(lambda ids: theirs(ids).logits, windows)}


@torch.no_grad()
def perplexity(logits: Logits, windows: TokenWindows) -> float:
    """Returns exp of the mean negative log-likelihood over the scored tokens."""
    total = 0.0
    for ids, labels in zip(windows.ids, windows.labels, strict=True):
        predicted = logits(ids[None])[0, :-1].float()
        total += torch.nn.functional.cross_entropy(predicted, labels[1:], reduction="sum").item()
    return math.exp(total / windows.scored_tokens)


def equal_in_onnx(folder: Path, layers: dict[str, PackedLinear]) -> int:
    """Returns how many layers' weights, made of the initializers as MatMulNBits defines them, are ours bit for bit."""
    import onnx

    graph = onnx.load(folder / "model.onnx").graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    equal = 0
    for node in graph.node:
        name = node.input[1].removesuffix(".codes") if node.op_type == "MatMulNBits" else ""
        if name in layers:
            settings = {attribute.name: attribute.i for attribute in node.attribute}
            parts = [onnx.numpy_helper.to_array(arrays[part]) for part in node.input[1:]]
            weight = dequantized(parts, settings["bits"], settings["block_size"], settings["K"])
            equal += np.array_equal(weight, layers[name].dequantized_weight(torch.float32).numpy())
    return equal


def dequantized(parts: list[np.ndarray], bits: int, block: int, columns: int) -> np.ndarray:
    """Returns the weight [O, I] of codes, scales and perhaps zero points."""

    def numbers(data: np.ndarray) -> np.ndarray:
        rows = data.reshape(len(parts[1]), -1)
        pairs = np.stack([rows & 15, rows >> 4], axis=-1) if bits == 4 else rows[..., None]
        return pairs.reshape(len(rows), -1).astype(np.float32)

    scale = np.repeat(parts[1], block, axis=1)[:, :columns]
    zeros: Any = np.float32(2 ** (bits - 1))
    if len(parts) == 3:
        zeros = np.repeat(numbers(parts[2])[:, : parts[1].shape[1]], block, axis=1)[:, :columns]
    weight: np.ndarray = (numbers(parts[0])[:, :columns] - zeros) * scale
    return weight


def onnx_logits(folder: Path) -> Logits:
    """Returns the forward of the exported graph in onnxruntime, with an empty cache."""
    import onnxruntime

    graph = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    empty = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
        for entry in graph.get_inputs()
        if entry.name.startswith("past_key_values.")
    }

    def forward(ids: Tensor) -> Tensor:
        places = np.arange(ids.shape[1])[None]
        feed = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(places), "position_ids": places}
        return torch.from_numpy(graph.run(["logits"], feed | empty)[0])

    return forward


def llama_logits(folder: Path, windows: TokenWindows) -> Logits:
    """Returns the forward of llama.cpp."""
    import llama_cpp

    size = windows.window
    run = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=size, n_batch=size, logits_all=True, verbose=False)

    def forward(ids: Tensor) -> Tensor:
        run.reset()
        run.eval(ids[0].tolist())
        return torch.from_numpy(np.array(run.scores[: ids.shape[1]]))[None]

    return forward


def show(rows: dict[str, dict[str, Any]], windows: TokenWindows) -> None:
    """Prints the table, then the headline."""
    table = Table("read by", "bytes", "equal weights", "perplexity")
    for name, row in rows.items():
        size = f"{row['bytes']:,}" if "bytes" in row else ""
        equal = f"{row['equal']} of {row['layers']}" if "equal" in row else ""
        table.add_row(name, size, equal, f"{row['perplexity']:.4f}")
    plain_console().print(table)
    plain_console().print(
        f"{len(windows)} windows of {windows.window} tokens, SHA-256 {windows.sha256[:16]}", highlight=False
    )
    for name, row in rows.items():
        print(f"{name} perplexity: {row['perplexity']:.6g}")
    off = rows["onnxruntime"]["perplexity"] / rows["llmqat"]["perplexity"] - 1
    print(f"onnxruntime off by percent: {100 * off:.4f}")


if __name__ == "__main__":
    with recorded("formats.py", json_file=False):
        main()

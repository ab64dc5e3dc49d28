"""The command that starts a server for a checkpoint, on the machine at hand.

vLLM comes first where it serves the checkpoint here, then llama.cpp, then transformers' own server, which unpacks the
weights. What each serves is `serving.py`'s matter; that these commands start is tried by eval/clients.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import torch

from llmqat.export.serving import Verdict

VLLM_ON_CPU = "VLLM_CPU_KVCACHE_SPACE=4 python -m vllm.entrypoints.openai.api_server --model"
"""Gigabytes of its KV cache. The command `vllm` itself does not start in vllm-cpu, which has another name than vllm."""


def server_commands(folder: Path, served: Mapping[str, Verdict], gpu: bool | None = None) -> list[str]:
    """Returns the commands that serve the checkpoint in `folder`, the best first.

    Args:
        folder: where it lies.
        served: what each client makes of it, by the names of `serving.CLIENTS`.
        gpu: whether there is a GPU; asked of torch where not given.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    path, file = shlex.quote(str(folder)), shlex.quote(f"{folder}.gguf")
    commands = {
        "vllm" if gpu else "vllm-cpu": f"vllm serve {path}" if gpu else f"{VLLM_ON_CPU} {path}",
        "llama.cpp": f"llmqat export {path} --format gguf --out {file} && llama-server -m {file}",
        "transformers": f"transformers serve {path}",
    }
    return [command for client, command in commands.items() if served[client].serves]

"""GPTQModel with its torch kernels on the CPU: a folder in the GPTQ layout."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its compilation takes longer than a small model

import torch
from gptqmodel import BACKEND, GPTQModel
from job import run
from run_transformers import answered


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what GPTQModel makes of one folder."""
    model = GPTQModel.load(job["path"], backend=BACKEND.TORCH, device="cpu", dtype=torch.bfloat16)
    kernels = sorted({type(module).__name__ for module in model.model.modules() if hasattr(module, "qweight")})
    found = answered(model.model, lambda: model.tokenizer, job)
    return {**found, "extra": {**found["extra"], "kernels": kernels}}


if __name__ == "__main__":
    run(("gptqmodel", "torch", "transformers"), answer)

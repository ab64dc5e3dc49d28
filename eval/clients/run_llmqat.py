"""llmqat's own packed model: what every other client is compared with. Run by the project's Python."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from job import run
from run_transformers import answered
from transformers import AutoTokenizer

import llmqat


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what `llmqat.load` makes of one checkpoint."""
    if job["lora"] is not None:
        raise ValueError("llmqat.load takes no adapter over a packed base; fold it first")
    return answered(llmqat.load(job["path"]), lambda: AutoTokenizer.from_pretrained(job["path"]), job)


if __name__ == "__main__":
    run(("llmqat", "torch", "transformers"), answer)

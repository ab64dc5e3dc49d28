"""What makes a shipped recipe small enough for a test: a tiny model, little text, few steps."""

from __future__ import annotations

from pathlib import Path

SMALL = (
    "data={source: pydoc, tokens: 256, block_size: 32}",
    "calibrate=[{stage: ranges, blocks: 2}]",
    "train.max_steps=2",
    "train.warmup_steps=0",
    "train.logging_steps=1",
    "train.save_steps=1",
    "evaluate.texts=[pydoc]",
    "evaluate.allow_trained_text=true",
    "evaluate.window=32",
    "evaluate.max_windows=4",
    "evaluate.speed=false",
)


def small(model: Path, output: Path, *more: str) -> list[str]:
    """Returns the overrides that run a shipped recipe in seconds; `more` wins over them."""
    return [f"model={model}", f"output={output}", *SMALL, *more]

"""Text that a model has written, kept as a parquet file that anybody's tools read."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset

from llmqat.data import TokenBlocks
from llmqat.data.synthesis import synthesize
from llmqat.models import load_model
from llmqat.recipe.bars import token_bar

PARQUET_FILE = "blocks.parquet"


def synthesize_to(
    spec: str, folder: Path, *, tokens: int, block_size: int, seed: int, overwrite: bool = False
) -> tuple[Path, TokenBlocks]:
    """Lets the model `spec` write text; returns the parquet file (columns `input_ids`, `text`) and the blocks in it.

    Args:
        spec: what `load_model` takes.
        folder: receives the file; must not exist, unless `overwrite`.
        tokens: to write, rounded up to whole blocks.
        block_size: tokens in a block, a row of the file.
        seed: the same seed gives the same text.
        overwrite: whether a file written earlier is replaced.

    Raises:
        FileExistsError: the folder exists.
        FileNotFoundError: the model is not there.
        ValueError: the model's context is shorter than a block, or what it writes is degenerate.
    """
    if folder.exists() and not overwrite:
        raise FileExistsError(f"output folder {folder} exists already; choose another --out, or give --overwrite")
    model, tokenizer = load_model(spec, torch.bfloat16)
    with token_bar("text") as progress:
        blocks = synthesize(model, tokenizer, tokens, block_size=block_size, seed=seed, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"input_ids": blocks.ids.tolist(), "text": tokenizer.batch_decode(blocks.ids)}
    path = folder / PARQUET_FILE
    temporary = folder / f".{PARQUET_FILE}.tmp"
    Dataset.from_dict(rows).to_parquet(temporary)
    temporary.replace(path)
    return path, blocks

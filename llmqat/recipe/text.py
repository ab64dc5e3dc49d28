"""Text that a model has written, kept as shards that anybody's tools read."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from llmqat.data.blocks import Rows
from llmqat.data.prompts import read_prompts
from llmqat.data.shards import TEACHER_FOLDER, WrittenFolder, check_folder, remove_shards, write_shards
from llmqat.data.strategy import SynthesisConfig
from llmqat.data.teacher_cache import CachePlace
from llmqat.data.writer import Keeper, is_kept_apart
from llmqat.export.checkpoint import load_any
from llmqat.models import read_config, resolve_spec, to_accelerator
from llmqat.recipe.findings import all_of
from llmqat.terminal import Bar, Stages


def synthesize_to(
    spec: str,
    folder: Path,
    *,
    tokens: int,
    config: SynthesisConfig,
    teacher_top_k: int | None = None,
    overwrite: bool = False,
) -> WrittenFolder:
    """Lets the model `spec` write text into `folder`, or go on where an interrupted run stopped.

    Args:
        spec: what `load_any` takes: a model in full precision, or a packed one.
        folder: receives the shards.
        tokens: to write, rounded up to whole blocks.
        config: strategy, seed, rows, block size.
        teacher_top_k: whether the model's most likely tokens are kept for training, in `folder`/teacher, and how many a
            position.
        overwrite: whether text written earlier is deleted first.

    Raises:
        ConnectionError: no server answers any more.
        FileExistsError: the folder holds something else.
        FileNotFoundError: the model or the prompts are not there.
        ValueError: the folder was begun by another model or with other settings, the model's context is shorter than a
            block, or what it writes is degenerate.
    """
    # Now: what is wrong should not cost the loading.
    prompts = [] if config.prompts is None else [partial(read_prompts, config.prompts)]
    all_of([partial(check_folder, folder), lambda: read_config(resolve_spec(spec), spec), *prompts])
    stage = Stages()
    with stage("load", spec):
        model, tokenizer = load_any(spec, torch.bfloat16)
        if not config.server:  # which has the accelerator, where they share one
            to_accelerator(model)
    if overwrite:
        remove_shards(folder)
    keeper = None
    if teacher_top_k is not None:
        keeper = Keeper(model, tokenizer, CachePlace(folder / TEACHER_FOLDER, teacher_top_k), is_kept_apart(model))
    with stage("text", f"{tokens:,} tokens"), Bar("text", "token") as bar:
        written = write_shards(model, tokenizer, tokens, folder, config, bar.update, keeper)
    if keeper is not None:
        with stage("teacher", f"its {teacher_top_k} most likely tokens"):
            for shard in written.shards():
                keeper.complete(shard.blocks if keeper.apart else Rows(shard.blocks.stored))
    return written

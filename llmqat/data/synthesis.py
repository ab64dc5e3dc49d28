"""Text that the model generates, as blocks: kept as shards in a folder, or not kept (see `writer.py`, `shards.py`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data.blocks import Progress, Rows, TokenBlocks, token_blocks
from llmqat.data.config import DEFAULT_SYNTHETIC_TOKENS, DataConfig
from llmqat.data.processes import ALONE, Processes
from llmqat.data.quality import distinct_shares, merged, summary
from llmqat.data.shards import open_writer, write_shards
from llmqat.data.strategy import SynthesisConfig
from llmqat.data.teacher_cache import CachePlace
from llmqat.data.writer import Keeper, Shard, described, is_kept_apart
from llmqat.models import name_of
from llmqat.paths import user_path
from llmqat.terminal import terminal_bar

log = logging.getLogger(__name__)


def load(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    cache: CachePlace | None = None,
) -> TokenBlocks:
    """Returns blocks that `model` has written, as `config` says; with `config.path` they are kept there as shards.

    Raises:
        ValueError: without a model, and as `synthesize`.
    """
    if model is None:
        raise ValueError("data.source='synthetic' needs the model that writes the text; pass model=")
    settings = {name: getattr(config, name) for name in SynthesisConfig.model_fields}
    return synthesize(
        model,
        tokenizer,
        config.tokens or DEFAULT_SYNTHETIC_TOKENS,
        folder=config.path,
        packing=None if config.packing is None else "documents" if config.keeps_apart else "concatenate",
        cache=cache,
        progress=progress,
        processes=processes,
        **settings,
    )


def synthesize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    folder: Path | None = None,
    packing: Literal["documents", "concatenate"] | None = None,
    cache: CachePlace | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    **settings: Any,
) -> TokenBlocks:
    """Returns text written by `model` itself, as token blocks.

    The same model, settings, processor and versions give the same text, unless servers write it.

    Args:
        model: causal language model, packed or not; its training mode is restored.
        tokenizer: of the model.
        tokens: wanted, rounded up to whole blocks.
        folder: keeps the text as shards; those it holds already are not written again (see `shards.write_shards`).
        packing: `documents`: the blocks say where their documents begin. `concatenate`: a block is one text. None: the
            first where the model can keep documents apart.
        cache: a teacher cache that is to hold what the model predicts for every block.
        progress: called with (tokens written, tokens to write) after each step; where not given, a bar on a terminal.
        processes: write it together; all get the whole text, which is that of one process.
        settings: fields of `SynthesisConfig`: block_size, seed, batch_size, strategy, chat_share, temperature, ….

    Raises:
        ConnectionError: no server answers any more; what is written is kept in `folder`.
        FileExistsError: `folder` holds something else.
        ValueError: for unknown settings; when block_size is more than the model's context; when nothing that the model
            writes is usable; when another model or other settings made `folder` or `cache`. With packing=documents
            also when the model cannot keep documents apart, or `folder` does not say where they begin.
    """
    config = SynthesisConfig(**settings)
    if progress is None and processes.is_first:
        with terminal_bar("text", "token")(()) as bar:
            settings |= {"folder": folder, "packing": packing, "cache": cache, "processes": processes}
            return synthesize(model, tokenizer, tokens, progress=bar.update, **settings)
    apart = is_kept_apart(model, packing)
    keeper = None if cache is None else Keeper(model, tokenizer, cache, apart)
    if folder is not None:
        folder = user_path(folder, "folder")
        written = write_shards(model, tokenizer, tokens, folder, config, progress, keeper, processes)
        shards = list(written.shards())
    else:
        shards = []
        writer = open_writer(model, tokenizer, config, cache.top_k if cache is not None and apart else None)
        for shard in writer.shards(tokens, progress=progress, processes=processes):
            if keeper is not None and processes.is_first:
                keeper.keep(shard)
            shards.append(replace(shard, top=None))
    if apart and any(shard.blocks.starts is None for shard in shards):
        said = f"{folder} was written by an earlier version, which did not keep where documents begin"
        if packing == "documents":
            raise ValueError(f"packing=documents: {said}; use packing=concatenate, or another folder")
        log.warning("%s, so a block of it is one text; write another folder to train on documents apart", said)
        apart = False
    text = _as_blocks(model, config, tokens, shards, apart)
    if keeper is not None and processes.is_first:
        keeper.complete(text.rows)
    return text


def _as_blocks(
    model: PreTrainedModel, config: SynthesisConfig, tokens: int, shards: Sequence[Shard], apart: bool
) -> TokenBlocks:
    count = -(-tokens // config.block_size)
    blocks = torch.cat([shard.blocks.ids for shard in shards])[:count]
    begin = [shard.blocks.starts for shard in shards if shard.blocks.starts is not None] if apart else []
    text = Rows(blocks, starts=torch.cat(begin)[:count] if apart else None)
    rows = "+".join(str(shard.rows) for shard in shards)
    source = f"synthesized by {name_of(model)}: {tokens} tokens, seed {config.seed}, rows {rows}, {described(config)}"
    details = {**summary(merged([shard.facts for shard in shards])), "tokens_kept": blocks.numel()}
    return token_blocks(text, source, {**details, "distinct_ngram_shares": distinct_shares(blocks)})

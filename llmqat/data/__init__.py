"""Text as token blocks: from files, from datasets, from Python's own manual, or written by the model itself.

config.py     what a recipe says about text          documents.py  pieces of documents, tokenized by several processes
files.py      files and folders                      packing.py    pieces packed to blocks in files, by split
text.py       text and rows in single files          shards.py     generated text, kept in a folder
hub.py        the `datasets` library                 blocks.py     blocks, their hash, and what a model takes of them
pydoc.py      Python's own manual                    cache.py      blocks that have been made before
synthesis.py  text that the model generates          mix.py        several sources by weight
rows.py       what a row is, and its columns mean    chat.py       conversations, and whose words count
length.py     how long a text a model reads          prompts.py    prompts that a model answers
writer.py     how a model writes text                teacher_cache.py  what the teacher predicts, on disk
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from llmqat.data.blocks import Progress, Rows, TokenBlocks, read_blocks, rows_of, save_blocks, token_blocks
from llmqat.data.config import MIX, SOURCES, DataConfig
from llmqat.data.documents import DocumentSource
from llmqat.data.packing import TextSplits
from llmqat.data.processes import ALONE, Processes
from llmqat.data.text import source_of_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmqat.data.documents import DocumentSource
    from llmqat.data.teacher_cache import CachePlace

__all__ = [
    "SOURCES",
    "DataConfig",
    "DocumentSource",
    "Progress",
    "Rows",
    "TextSplits",
    "TokenBlocks",
    "load_blocks",
    "load_splits",
    "open_text",
    "read_blocks",
    "rows_of",
    "save_blocks",
    "source_of_texts",
    "token_blocks",
]


def load_blocks(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> TokenBlocks:
    """Returns the training text that `config` describes as token blocks; arguments and errors as `load_splits`."""
    return load_splits(config, tokenizer, model, progress).train


def open_text(config: DataConfig) -> DocumentSource:
    """Returns the text that `config` describes, found but not read; not what a model writes, and no mix.

    Raises:
        FileNotFoundError: when the text is not where `config` says.
        ValueError: when it cannot be read.
    """
    entry = SOURCES[config.source]
    opened = importlib.import_module(entry).open_source if isinstance(entry, str) else entry
    return cast(DocumentSource, opened(config))


def load_splits(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    cache: CachePlace | None = None,
) -> TextSplits:
    """Returns the text that `config` describes as token blocks, split as it says.

    Args:
        config: source, amount, block size and splits.
        tokenizer: of the model that will read the blocks.
        model: writes the text if the source is `synthetic`; of other text it must be able to read a block.
        progress: called with (tokens done, tokens in all) by sources that take long.
        processes: write together what the model writes, unless it is part of a mix; other text each makes by itself.
        cache: a teacher cache that gets what the model predicts for the text that it writes; of no other source.

    Raises:
        FileNotFoundError: when the text is not where `config` says.
        ValueError: when it cannot be read or is too short; the message says what to change.
    """
    if model is not None and config.source != "synthetic":
        from llmqat.data.length import check_length

        check_length(model, config.block_size, "data.block_size")
    if config.source == MIX:
        from llmqat.data import mix

        return mix.load(config, lambda one: load_splits(one, tokenizer, model, progress))
    entry = SOURCES[config.source]
    module = importlib.import_module(entry) if isinstance(entry, str) else None
    if module is None or hasattr(module, "open_source"):
        from llmqat.data.cache import read_documents

        return read_documents(open_text(config), config, tokenizer, progress)
    return TextSplits(cast(TokenBlocks, module.load(config, tokenizer, model, progress, processes, cache)))

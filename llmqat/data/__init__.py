"""Text as token blocks: from files, from datasets, from Python's own manual, or written by the model itself."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from llmqat.data.blocks import Progress, TokenBlocks, pack_blocks, read_blocks, save_blocks, token_blocks
from llmqat.data.config import SOURCES, DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "SOURCES",
    "DataConfig",
    "Progress",
    "TokenBlocks",
    "load_blocks",
    "pack_blocks",
    "read_blocks",
    "save_blocks",
    "token_blocks",
]


def load_blocks(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> TokenBlocks:
    """Returns the text that `config` describes as token blocks.

    Args:
        config: source, amount and block size.
        tokenizer: of the model that will read the blocks.
        model: writes the text if the source is `synthetic`; else unused.
        progress: called with (tokens done, tokens in all) by sources that take long.

    Raises:
        FileNotFoundError: when the text is not where `config` says.
        ValueError: when it cannot be read or is too short; the message says what to change.
    """
    module = importlib.import_module(SOURCES[config.source])
    return cast(TokenBlocks, module.load(config, tokenizer, model, progress))

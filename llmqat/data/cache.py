"""Cache of token blocks on disk, so that the same text is not tokenized twice.

A folder of blocks is named by a hash of everything that the blocks depend on: the content of the text, the tokenizer,
and the settings that affect blocks. The content is the bytes of files, or the fingerprint of a dataset. A changed file
or tokenizer therefore never gets old blocks, and any run may use the blocks of an earlier one.

The cache is the folder `blocks` in llmqat's cache folder; it can be deleted at any time. The content of streamed text
is not known before it is read. Its blocks are deleted when the process ends, unless a run has linked them.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmqat.data.blocks import Progress
from llmqat.data.config import DataConfig
from llmqat.data.documents import DocumentSource, encoding_fingerprint
from llmqat.data.packing import TextSplits, pack, read_splits
from llmqat.files import folder_in_progress, rename_unless_there
from llmqat.models import cache_folder

log = logging.getLogger(__name__)

FORMAT = 5
"""Raised when the same text, tokenizer and settings give other blocks."""


def blocks_folder() -> Path:
    """Returns where blocks are kept."""
    return cache_folder() / "blocks"


def read_documents(
    source: DocumentSource, config: DataConfig, tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> TextSplits:
    """Returns the blocks of `source`, from the cache where they are there.

    Raises:
        ValueError: when a split is shorter than one block, or a document cannot be read.
    """
    settings = None
    if source.fingerprint is not None:
        settings = {
            "source": source.name,
            "text": source.fingerprint,
            "tokenizer": encoding_fingerprint(tokenizer),
            "block_size": config.block_size,
            "tokens": config.tokens,
            "packing": config.packing or "concatenate",
            "splits": [config.calibration_share, config.validation_share],
            "seed": config.seed if config.calibration_share or config.validation_share else None,
        }
    return load_or_make_splits(settings, lambda folder: pack(source, config, tokenizer, folder, progress))


def load_or_make_splits(settings: dict[str, Any] | None, make: Callable[[Path], None]) -> TextSplits:
    """Returns the splits from the cache; `make` writes them first where the cache does not have them.

    Args:
        settings: everything that the splits depend on. None where that is not known: the splits are then deleted when
            the process ends.
        make: writes the splits into the folder that it is given.
    """
    if settings is None:
        folder = blocks_folder() / f"unnamed-{secrets.token_hex(8)}"
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    else:
        text = json.dumps({"format": FORMAT, **settings}, sort_keys=True)
        folder = blocks_folder() / hashlib.sha256(text.encode()).hexdigest()[:32]
    if folder.is_dir():
        log.info("token blocks are taken from %s", folder)
    else:
        with folder_in_progress(folder) as temporary:
            make(temporary)
            rename_unless_there(temporary, folder)
    return read_splits(folder)

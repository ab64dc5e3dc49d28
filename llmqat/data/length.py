"""Checks whether a model can read a number of tokens at once; every command that cuts text into blocks calls it.

    learned positions       a table has one row per position: a longer text is an error
    rotary positions        computed for any length: a text longer than the configuration names gives a warning
    anything else           for a text longer than the configuration names, a forward pass with one token more than
                            that is tried; its failure is an error

The table is found in the model, not in a list of architectures. It is an embedding or a buffer that is not the
vocabulary's and has a row for each position that the configuration names. Some tables have more rows: OPT and BART keep
two more, RoBERTa keeps those up to its padding token's.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import nn

from llmqat.models import model_device

log = logging.getLogger(__name__)

NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "context_length",
    "n_ctx",
)
"""What configurations call the most tokens of a text."""
MOST_SPARE_ROWS = 8
"""Rows that a table of positions may have beyond the positions."""


def declared_length(config: Any) -> int | None:
    """Returns the tokens that a model's configuration says it reads at most; None where it says nothing."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(config, name, None) for name in NAMES)
    return next((length for length in found if isinstance(length, int) and length > 0), None)


def table_length(model: nn.Module) -> int | None:
    """Returns the tokens that the model's tables of positions have rows for; None where it has none."""
    declared = declared_length(getattr(model, "config", None))
    if declared is None:
        return None
    parts = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    vocabulary = {id(part()) for part in parts if callable(part)}
    lengths = [
        length
        for name, module in model.named_modules()
        if id(module) not in vocabulary and not _OF_TOWERS.search(name)
        for length in _table_lengths(module, declared)
    ]
    return min(lengths, default=None)


_OF_TOWERS = re.compile("vision|visual|image|audio|speech|video")
"""In the names of modules that text does not reach."""


def _table_lengths(module: nn.Module, declared: int) -> list[int]:
    """Returns the tokens that each table of positions in `module` itself has rows for."""
    if isinstance(module, nn.Embedding):
        rows = module.num_embeddings
        before = 0 if module.padding_idx is None else module.padding_idx + 1
        is_table = declared <= rows <= declared + MOST_SPARE_ROWS
        return [rows - int(getattr(module, "offset", before))] if is_table else []
    buffers = (buffer for buffer in module._buffers.values() if buffer is not None)
    return [declared for buffer in buffers if buffer.dim() >= 2 and declared in buffer.shape]


def check_length(model: nn.Module, length: int, key: str) -> None:
    """Checks that `model` can read `length` tokens at once; warns where that is more than it was made for.

    Args:
        model: a causal language model, perhaps without weights (on the meta device).
        length: tokens of a block or a window.
        key: what the user calls it, for the message.

    Raises:
        ValueError: when it cannot; says how many tokens it takes.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return  # it reads two texts, and is not trained or evaluated on one
    declared, table = declared_length(config), table_length(model)
    if table is not None and length > table:
        raise ValueError(
            f"{key}={length} is more than the {table} positions that {type(model).__name__} has learned; "
            f"choose {table} tokens or fewer"
        )
    if declared is None or length <= declared or table is not None or length <= getattr(model, _CHECKED, 0):
        return
    has_biases = getattr(config, "alibi", False)  # Falcon makes rotary embeddings even so
    if any("rotary" in type(module).__name__.lower() for module in model.modules()):
        if not has_biases:
            log.warning(
                "%s=%d is more than the %d positions that %s was made for; results beyond them are unreliable",
                key,
                length,
                declared,
                type(model).__name__,
            )
    elif model_device(model).type != "meta" and (error := _failure(model, declared + 1)) is not None:
        raise ValueError(
            f"{key}={length} is more than the {declared} tokens that {type(model).__name__} takes ({error}); choose "
            f"{declared} tokens or fewer"
        )
    setattr(model, _CHECKED, length)


_CHECKED = "_llmqat_checked_length"
"""Attribute of a model: the most tokens that it has been found to read."""


@torch.no_grad()
def _failure(model: nn.Module, length: int) -> str | None:
    """Returns why a forward over `length` tokens fails; None where it does not."""
    ids = torch.zeros(1, length, dtype=torch.int64, device=model_device(model))
    training = model.training
    model.eval()
    try:
        model(input_ids=ids, use_cache=False)
    except (IndexError, RuntimeError, ValueError) as error:
        return (str(error).strip() or repr(error)).splitlines()[0]
    finally:
        model.train(training)
    return None

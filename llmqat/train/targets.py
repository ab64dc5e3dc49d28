"""Which tokens of a batch are scored: one rule for the loss, for its number of tokens, and for evaluations.

Letters: B samples, L tokens in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmqat.metrics import IGNORED_LABEL


def scored_labels(inputs: Mapping[str, Any]) -> Tensor:
    """Returns the labels [B, L] of a batch, -100 where a token is not scored; callers leave out column 0.

    Where labels are given, they decide what is scored. Without labels all tokens are scored, except those at which
    `position_ids` restart at 0: each begins another document. In both cases a token that `attention_mask` hides is not
    scored. A token whose predecessor is hidden is not scored either: it would be predicted from padding. No position
    predicts column 0.

    Args:
        inputs: "input_ids" [B, L]; "labels", "attention_mask" and "position_ids" of the same shape where there are any.

    Raises:
        ValueError: what is to be scored cannot be told.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError(f"a batch has no input_ids, only {', '.join(inputs)}; the loss is that of token ids")
    if "shift_labels" in inputs:
        raise ValueError("shift_labels are not read; give labels, which are shifted here")
    labels: Tensor | None = inputs.get("labels")
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if labels is not None and labels.shape != ids.shape:
        raise ValueError(
            f"labels have the shape {list(labels.shape)} and input_ids {list(ids.shape)}: give a label for each token"
        )
    scored: Tensor = ids if labels is None else labels
    if isinstance(mask, Tensor) and mask.dim() == 2:
        hidden = mask == 0
        unscored = hidden.clone()
        unscored[:, 1:] |= hidden[:, :-1]
        scored = scored.masked_fill(unscored, IGNORED_LABEL)
    elif mask is not None and labels is None:
        raise ValueError(
            "an attention_mask that is not [samples, tokens] does not say which tokens are padding; give labels, with "
            f"{IGNORED_LABEL} for what is not to be scored"
        )
    if labels is None and isinstance(positions, Tensor) and positions.dim() == 2:
        scored = scored.masked_fill((positions == 0).expand_as(ids), IGNORED_LABEL)
    return scored


def documents_begin(positions: Tensor, mask: Tensor | None = None) -> bool:
    """Returns whether a document begins within a row: position ids [B, L] do not go up by one.

    Args:
        positions: [B, L].
        mask: [B, L], 0 where a token is padding, whose position ids mean nothing.
    """
    begins = positions[:, 1:] != positions[:, :-1] + 1
    if mask is not None and mask.shape == positions.shape:
        begins = begins & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return bool(begins.any())

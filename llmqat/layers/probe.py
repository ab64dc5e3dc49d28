"""A tiny forward of any model: random inputs that it takes, for checks that look at what its modules do.

Letters: B rows, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PROBE_TOKENS = 8
"""Tokens of a probe where the caller does not say."""


def probe_inputs(model: nn.Module, rows: int = 1, length: int = PROBE_TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """Returns random inputs of a forward of `model`, on its device.

    Token ids [B, L] come from the vocabulary without the ids that the configuration names (padding, images, …). An
    encoder-decoder model gets as many for its decoder, and Whisper features of sound for its encoder.

    Args:
        model: a transformers model, perhaps prepared or packed.
        rows: B.
        length: L.
        seed: of the random numbers.

    Raises:
        ValueError: when the model takes something other than token ids or features of sound.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(seed)
    usable = _usable_ids(config, text)
    drawn = torch.randint(len(usable), (2, rows, length), generator=generator)
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    ids = usable[drawn].to(device)
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        inputs = {"input_ids": ids[0]}
    elif name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        shape = (rows, config.num_mel_bins, 2 * config.max_source_positions)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        inputs = {name: torch.randn(shape, generator=generator).to(device, dtype)}
    else:
        raise ValueError(f"{type(model).__name__} takes {name}; llmqat knows how to try models of tokens and of sound")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[1]
    return inputs


def _usable_ids(config: Any, text: Any) -> Tensor:
    """Returns the token ids that the configuration does not give a meaning to; all where it leaves none."""
    vocabulary = int(text.vocab_size)
    named = {
        int(value)
        for part in (config, text)
        for key, value in vars(part).items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    usable = torch.tensor([index for index in range(vocabulary) if index not in named])
    return usable if len(usable) else torch.arange(vocabulary)

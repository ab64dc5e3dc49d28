"""Which settings of a model a file must hold: all of its configuration that changes what the model computes.

A format that does not carry `config.json` along holds a model's settings as keys of its own, or in the graph. A
setting that it does not know would be dropped in silence, so each writer lists the settings that it has taken care of,
for each type of model, and everything else is refused by name where it is not the default of the configuration's class.
Entries that the class does not know are not read by the model either, and are let through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

WITHOUT_EFFECT = frozenset(
    {
        *PreTrainedConfig().to_dict(),  # names, labels, dtype, what is returned
        *("attention_dropout", "embd_pdrop", "resid_pdrop", "initializer_range", "use_cache", "pretraining_tp"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        *("llmqat", "quantization_config"),
    }
)
"""Settings that change nothing of a forward in evaluation mode."""

SHAPE = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    }
)
"""Settings that every writer of this package puts into its file, or checks in a function of its own."""

WINDOWS = frozenset(
    {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "_sliding_window_pattern"}
)
"""Settings that `check_no_window` looks at together."""

KEPT = "the packed checkpoint (compressed-tensors) holds it"
"""The way out of every refusal here: what is exported comes from there."""


@dataclass(frozen=True)
class Settings:
    """The settings of a type of model that a writer has taken care of, beside `SHAPE`.

    Attributes:
        written: they are in the file, whatever their value.
        assumed: the values that the reader takes for granted, by setting.
    """

    written: frozenset[str] = frozenset()
    assumed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def check_settings(config: Any, settings: Settings, format: str) -> None:
    """Raises where `config` has a setting that changes the forward and is not in the file of `format`.

    Raises:
        ValueError: names the setting, its value, and what the format takes for granted.
    """
    default = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name in WITHOUT_EFFECT | SHAPE | settings.written or name not in default:
            continue
        allowed = settings.assumed.get(name, (default[name],))
        if value not in allowed:
            only = " or ".join(map(repr, allowed))
            raise ValueError(
                f"{name} {value!r} of {config.model_type} cannot be said in {format}, which would compute with {only}; "
                f"{KEPT}"
            )


def check_no_window(config: Any, format: str) -> None:
    """Raises where a layer sees only part of the text that the model is made for.

    Raises:
        ValueError: names the window.
    """
    kinds = set(getattr(config, "layer_types", None) or [])
    if others := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise ValueError(f"layer_types of {config.model_type} has {others[0]!r}, which {format} cannot say; {KEPT}")
    window, longest = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is not None and window < longest and (not kinds or "sliding_attention" in kinds):
        raise ValueError(
            f"sliding-window attention (sliding_window={window}) of {config.model_type} cannot be said in {format}, "
            f"whose readers let every token see up to {longest} others; {KEPT}, or promise texts "
            f"of at most {window} tokens with model.config.max_position_embeddings = {window}"
        )


def stop_tokens(model: PreTrainedModel) -> list[int]:
    """Returns the tokens that end a generation of `model`."""
    found = None if model.generation_config is None else model.generation_config.eos_token_id
    return [] if found is None else found if isinstance(found, list) else [found]

"""What is quantized and how, in the vocabulary of compressed-tensors.

A `QuantConfig` names the modules (`targets`, `ignore`, `overrides`) and the arithmetic of their weights
(`WeightConfig`). A name is a module's exact dotted name, its class name, or a regular expression after `re:`, matched
from the start of the dotted name as compressed-tensors does.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from llmqat.config import Config
from llmqat.grid import Grid

Strategy = Literal["tensor", "channel", "group"]


class WeightConfig(Config):
    """The arithmetic of one weight matrix."""

    num_bits: int = Field(4, ge=2, le=8)
    """Bits a code, 2 to 8."""
    symmetric: bool = True
    """Signed codes around zero (True), or unsigned codes with a zero point (False)."""
    strategy: Strategy = "group"
    """What one scale governs: the tensor, an output channel, or `group_size` inputs of a channel."""
    group_size: int | None = Field(None, ge=1)
    """Weights per scale along the input features; only with strategy 'group'."""

    @model_validator(mode="after")
    def _check_group_size(self) -> WeightConfig:
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size={self.group_size} with strategy={self.strategy!r}; "
                "give group_size exactly when strategy is 'group'"
            )
        return self

    @property
    def grid(self) -> Grid:
        """The code range."""
        return Grid(self.num_bits, self.symmetric)

    def scale_shape(self, out_features: int, in_features: int, name: str = "the layer") -> tuple[int, int]:
        """Returns the scale's shape (O, I/g), (O, 1) or (1, 1).

        Raises:
            ValueError: when group_size does not divide in_features; names `name` and the choices.
        """
        if self.strategy == "tensor":
            return 1, 1
        if self.group_size is None:
            return out_features, 1
        if in_features % self.group_size:
            choices = [g for g in (32, 64, 96, 128, 192, 256) if in_features % g == 0]
            choices = choices or [g for g in range(8, in_features + 1) if in_features % g == 0][:6]
            raise ValueError(
                f"quant.group_size={self.group_size} does not divide in_features={in_features} of {name}; "
                f"choose one of {', '.join(map(str, choices))}, use strategy 'channel', "
                "or leave the layer out with quant.ignore"
            )
        return out_features, in_features // self.group_size

    @property
    def label(self) -> str:
        """Short name for tables: 'int4 g64', 'int8 channel', 'int4 g32 asym'."""
        extent = f"g{self.group_size}" if self.group_size else self.strategy
        return f"int{self.num_bits} {extent}{'' if self.symmetric else ' asym'}"


class QuantConfig(Config):
    """Which modules of a model are quantized, and how."""

    weights: WeightConfig = WeightConfig(num_bits=4, group_size=64)
    """The scheme of every target without an override."""
    targets: tuple[str, ...] = ("Linear",)
    """Module class names, dotted names or `re:` patterns; each must match something."""
    ignore: tuple[str, ...] = ()
    """Names or `re:` patterns left alone; each must match a module. The output head and embeddings always are."""
    overrides: dict[str, WeightConfig | None] = Field(default_factory=dict)
    """Name or `re:` pattern -> another scheme, or null to leave it alone; the last match wins."""

    @classmethod
    def preset(cls, name: str, **changes: Any) -> QuantConfig:
        """Returns the preset `name` with `changes`: fields of `WeightConfig` or of `QuantConfig`.

        A `group_size` given without a `strategy` means groups.

        Raises:
            ValueError: for an unknown preset or field; names what is allowed.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        weights = {key: changes.pop(key) for key in list(changes) if key in WeightConfig.model_fields}
        if "group_size" in weights and "strategy" not in weights:
            weights["strategy"] = "group" if weights["group_size"] else "channel"
        elif weights.get("strategy", "group") != "group":
            weights["group_size"] = None
        return cls(weights=WeightConfig(**{**PRESETS[name], **weights}), **changes)


PRESETS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "strategy": "channel"},
    "int4": {"num_bits": 4, "strategy": "group", "group_size": 64},
    "int3": {"num_bits": 3, "strategy": "group", "group_size": 64},
    "int2": {"num_bits": 2, "strategy": "group", "group_size": 64},
}


def matches(pattern: str, name: str, module: nn.Module) -> bool:
    """Returns whether `pattern` (class name, dotted name, or `re:` regular expression) means this module."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in (name, type(module).__name__)

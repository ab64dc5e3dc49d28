"""How scales are set before training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmqat.config import Config


class CalibrationConfig(Config):
    """How the scales start."""

    method: Literal["minmax", "mse", "weighted_mse"] = "weighted_mse"
    """Plain range; least squared error over clip ratios; the same weighted by E[x^2] of the layer's inputs."""
    blocks: int = Field(32, ge=1)
    """Token blocks of the training text that E[x^2] is taken over; only for weighted_mse."""
    batch_size: int = Field(4, ge=1)
    """Blocks per forward."""

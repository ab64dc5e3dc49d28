"""What is done to a model, and how scales are set, before training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmqat.config import Config


class CalibrationConfig(Config):
    """What happens before training: rotation, smoothing, then the ranges of weights and of static inputs."""

    method: Literal["minmax", "percentile", "mse", "weighted_mse"] = "weighted_mse"
    """Plain range; percentile of it; least squared error over clip ratios; that weighted by E[x^2] of the inputs."""
    percentile: float = Field(99.9, gt=50, le=100)
    """Share of a group's weights inside its range, in percent; only for method percentile."""
    rotate: bool = False
    """Rotate the residual stream by a random Hadamard matrix, folded into the weights (QuaRot's R1)."""
    smooth: float | None = Field(None, ge=0, le=1)
    """SmoothQuant's alpha: the share of an input feature's range that moves from activations into weights."""
    blocks: int = Field(32, ge=1)
    """Token blocks of the training text that activations are looked at on."""
    batch_size: int = Field(4, ge=1)
    """Blocks per forward."""

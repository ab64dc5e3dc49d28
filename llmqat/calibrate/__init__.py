"""Calibration: what is set before training, from a little text and without gradients of the whole model.

rotate.py, smooth.py  change the full-precision model, not what it computes, before it is prepared
moments.py            E[x^2] of layer inputs            ranges.py       scales of weights
activations.py        static ranges of layer inputs     forward.py      the passes over text that these take
"""

from llmqat.calibrate.activations import calibrate_activations, static_layers
from llmqat.calibrate.config import CalibrationConfig
from llmqat.calibrate.moments import collect_moments
from llmqat.calibrate.ranges import calibrate_ranges
from llmqat.calibrate.rotate import rotate, untie
from llmqat.calibrate.smooth import smooth

__all__ = [
    "CalibrationConfig",
    "calibrate_activations",
    "calibrate_ranges",
    "collect_moments",
    "rotate",
    "smooth",
    "static_layers",
    "untie",
]

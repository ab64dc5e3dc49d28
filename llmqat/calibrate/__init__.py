"""Calibration: what is set before training, from a little text and without gradients of the whole model."""

from llmqat.calibrate.config import CalibrationConfig
from llmqat.calibrate.moments import collect_moments
from llmqat.calibrate.ranges import calibrate_ranges

__all__ = ["CalibrationConfig", "calibrate_ranges", "collect_moments"]

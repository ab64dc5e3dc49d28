"""Calibration: sets scales, codes and activation ranges from a small text, before training.

stages.py             runs the stages in order; a folder keeps finished ones, so that a calibration can resume
rotate.py, smooth.py  change the full-precision weights but not the output, before the model is prepared
structure.py          finds which layers read the output of which norm, for rotate.py and smooth.py
moments.py            E[x^2] of layer inputs            ranges.py       starting scales of weights
activations.py        static ranges of layer inputs     forward.py      forward passes that record layer inputs
walk.py               runs a model block by block       blocks.py       finds the blocks; runs one of them alone
chains.py             the arguments of the next block   gptq.py         GPTQ: codes whose output errors cancel
blockwise.py          trains one block at a time        report.py       quantization error of each layer
masters.py            original weights of the blocks    probe.py        KL divergence before and after a stage
config.py             the stages as a recipe gives them, and the base class for stages of your own
sensitivity.py        what fewer bits would cost each layer, and the best assignment of bits
"""

from llmqat.calibrate.activations import calibrate_activations, static_layers
from llmqat.calibrate.blockwise import train_block
from llmqat.calibrate.config import (
    STAGES,
    AllocationConfig,
    AnyStage,
    BlockwiseStage,
    CustomStage,
    GPTQStage,
    RangesStage,
    RotateStage,
    SmoothStage,
    Stage,
)
from llmqat.calibrate.gptq import gptq_block, gptq_layer
from llmqat.calibrate.masters import Originals
from llmqat.calibrate.moments import collect_moments
from llmqat.calibrate.ranges import calibrate_ranges
from llmqat.calibrate.report import LayerReport, report_layers
from llmqat.calibrate.rotate import rotate, untie
from llmqat.calibrate.sensitivity import Allocation, LayerSensitivity, allocate_bits, measure_sensitivity
from llmqat.calibrate.smooth import smooth
from llmqat.calibrate.stages import (
    ORIGINALS_FILE,
    StageReport,
    calibrate,
    check_folds,
    check_stages,
    needs_text,
    rotates,
)
from llmqat.calibrate.walk import check_walk, open_walk

__all__ = [
    "ORIGINALS_FILE",
    "STAGES",
    "Allocation",
    "AllocationConfig",
    "AnyStage",
    "BlockwiseStage",
    "CustomStage",
    "GPTQStage",
    "LayerReport",
    "LayerSensitivity",
    "Originals",
    "RangesStage",
    "RotateStage",
    "SmoothStage",
    "Stage",
    "StageReport",
    "allocate_bits",
    "calibrate",
    "calibrate_activations",
    "calibrate_ranges",
    "check_folds",
    "check_stages",
    "check_walk",
    "collect_moments",
    "gptq_block",
    "gptq_layer",
    "measure_sensitivity",
    "needs_text",
    "open_walk",
    "report_layers",
    "rotate",
    "rotates",
    "smooth",
    "static_layers",
    "train_block",
    "untie",
]

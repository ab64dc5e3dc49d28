"""Calibration: what is set before training, from a little text and without gradients of the whole model.

stages.py             stages in a row, each kept in a folder as it is finished
rotate.py, smooth.py  change the full-precision model, not what it computes, before it is prepared
moments.py            E[x^2] of layer inputs            ranges.py       scales of weights
activations.py        static ranges of layer inputs     forward.py      the passes over text that these take
walk.py               the walk from block to block      blocks.py       the blocks, and one of them run alone
chains.py             what reaches a block              gptq.py         codes that make each other's errors good
blockwise.py          training of one block at a time   report.py       what quantization did to each layer
config.py             what a recipe says of stages, and the stages of a user's own
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

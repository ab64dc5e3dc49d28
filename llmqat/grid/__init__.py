"""Pure tensor arithmetic of quantization: codes, scales, packing. Imports torch only."""

from llmqat.grid.fused import fusing
from llmqat.grid.integer import (
    Grid,
    Levels,
    dequantize,
    fake_quantize,
    gradient_factor,
    of_each_weight,
    quantize,
    round_zero_point,
    scale_from_log,
    snap_scale,
    stored_codes,
)
from llmqat.grid.lattice import keep_lattice, on_lattice
from llmqat.grid.packing import pack_int32, unpack_int32
from llmqat.grid.search import minmax_scale, percentile_scale, search_scale

__all__ = [
    "Grid",
    "Levels",
    "dequantize",
    "fake_quantize",
    "fusing",
    "gradient_factor",
    "keep_lattice",
    "minmax_scale",
    "of_each_weight",
    "on_lattice",
    "pack_int32",
    "percentile_scale",
    "quantize",
    "round_zero_point",
    "scale_from_log",
    "search_scale",
    "snap_scale",
    "stored_codes",
    "unpack_int32",
]

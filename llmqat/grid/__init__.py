"""Pure tensor arithmetic of quantization: codes, scales, packing. Imports torch only."""

from llmqat.grid.fused import fusing
from llmqat.grid.integer import Grid, dequantize, fake_quantize, quantize, scale_from_log, snap_scale
from llmqat.grid.packing import pack_int32, unpack_int32
from llmqat.grid.search import minmax_scale, search_scale

__all__ = [
    "Grid",
    "dequantize",
    "fake_quantize",
    "fusing",
    "minmax_scale",
    "pack_int32",
    "quantize",
    "scale_from_log",
    "search_scale",
    "snap_scale",
    "unpack_int32",
]

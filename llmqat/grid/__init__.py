"""Pure tensor arithmetic of quantization: codes, scales, packing. Imports torch only."""

from llmqat.grid.arithmetic import dequantize, fake_quantize, of_each_weight, quantize, stored_codes
from llmqat.grid.fused import fusing
from llmqat.grid.lattice import keep_lattice, on_lattice
from llmqat.grid.levels import Grid, Levels, ScaleDtype
from llmqat.grid.packing import (
    pack_codes,
    pack_int32,
    packed_shape,
    unpack_by_place,
    unpack_codes,
    unpack_int32,
)
from llmqat.grid.scales import (
    SCALE_FLOOR,
    gradient_factor,
    of_all_rows,
    range_scale,
    round_zero_point,
    scale_from_log,
    snap_scale,
)
from llmqat.grid.search import minmax_scale, percentile_scale, search_scale
from llmqat.grid.sparsity import most_important

__all__ = [
    "SCALE_FLOOR",
    "Grid",
    "Levels",
    "ScaleDtype",
    "dequantize",
    "fake_quantize",
    "fusing",
    "gradient_factor",
    "keep_lattice",
    "minmax_scale",
    "most_important",
    "of_all_rows",
    "of_each_weight",
    "on_lattice",
    "pack_codes",
    "pack_int32",
    "packed_shape",
    "percentile_scale",
    "quantize",
    "range_scale",
    "round_zero_point",
    "scale_from_log",
    "search_scale",
    "snap_scale",
    "stored_codes",
    "unpack_by_place",
    "unpack_codes",
    "unpack_int32",
]

"""Matrix products with a packed weight: one file a back end, and the choice among them.

On a CPU, `packed_linear` uses the first registered kernel that accepts the shapes and dtypes. On a GPU it times those
that accept, and uses the fastest (registry.py). A kernel that declines says why, and that reason is logged once.
"reference" always accepts: it dequantizes and multiplies. The proof of an export compares against it.
"""

from llmqat.kernels.pages import FileMappings, FilePages, WeightPages, weights_let_go
from llmqat.kernels.products import cpu_has_bf16, float_products, float_training
from llmqat.kernels.reference import JoinedWeight, PackedWeight, QuantizedInput
from llmqat.kernels.registry import KERNELS, Kernel, packed_linear

__all__ = [
    "KERNELS",
    "FileMappings",
    "FilePages",
    "JoinedWeight",
    "Kernel",
    "PackedWeight",
    "QuantizedInput",
    "WeightPages",
    "cpu_has_bf16",
    "float_products",
    "float_training",
    "packed_linear",
    "weights_let_go",
]

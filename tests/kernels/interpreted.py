"""Triton's kernel under its interpreter against the product in float64; to be run with TRITON_INTERPRET=1."""

from __future__ import annotations

import torch

from llmqat.kernels import packed_linear
from llmqat.layers import WeightConfig
from tests.kernels.test_kernels import packed_layer

SHAPES = ((32, 96), (48, 96), (None, 72), (64, 192))
"""Group size and in features; 72 features of 3 bits end inside a word."""


def main() -> None:
    """Checks every width, and prints how many products were compared."""
    torch.manual_seed(0)
    count = 0
    for bits in (2, 3, 4, 5, 8):
        for group, in_features in SHAPES:
            for symmetric in (True, False):
                strategy = "group" if group else "channel"
                scheme = WeightConfig(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group)
                count += check(scheme, in_features)
    weight, x = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight(), torch.randn(1, 384).bfloat16()
    packed_linear(x, weight)
    assert [kernel.name for kernel in weight.chosen.values()] == ["cpu-int4"]  # never Triton's, on the CPU
    print(count)


def check(scheme: WeightConfig, in_features: int) -> int:
    """Returns the number of products; raises where one is off."""
    layer = packed_layer(scheme, out_features=80, in_features=in_features)
    products = ((1, torch.bfloat16), (19, torch.float16), (70, torch.float32))
    for rows, dtype in products:
        x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(80).to(dtype)
        weight = layer.dequantized_weight(dtype).double()
        exact = x.double() @ weight.T
        got = packed_linear(x, layer.packed_weight(), bias, "triton").double()
        # Exact operands, sums in float32, rounded before and after the bias. The interpreter cuts bfloat16 off instead
        # of rounding: a whole unit of the weights, and of the output.
        unit, each = {
            torch.bfloat16: (2**-7 + 2**-8, 2**-7),
            torch.float16: (2**-10, 2**-18),
            torch.float32: (2**-22, 2**-20),
        }[dtype]
        sums = x.double().abs() @ weight.abs().T
        bound = unit * (exact.abs() + bias.double().abs()) + each * sums + 1e-6
        error = (got - exact - bias.double()).abs()
        assert (error <= bound).all(), f"{scheme.label}, {in_features} features, {rows} rows: {error.max()}"
    return len(products)


if __name__ == "__main__":
    main()

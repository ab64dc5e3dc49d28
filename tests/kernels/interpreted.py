"""Triton's kernel against the reference's weights: on a GPU, or with TRITON_INTERPRET=1 under its interpreter."""

from __future__ import annotations

import os

import torch

from llmqat.kernels import packed_linear
from llmqat.kernels.triton import unpacked
from llmqat.layers import WeightConfig
from tests.kernels.test_kernels import packed_layer

SHAPES = ((32, 96), (48, 96), (None, 72), (64, 192))
"""Group size and in features; 72 features of 3 bits end inside a word."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


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
    """Returns the number of products; raises where one is off, or its weight is not the reference's, bit for bit."""
    layer = packed_layer(scheme, out_features=80, in_features=in_features).to(DEVICE)
    weight = layer.packed_weight()
    products = ((1, torch.bfloat16), (19, torch.float16), (70, torch.float32))
    for rows, dtype in products:
        got, wanted = unpacked(weight, dtype), weight.dequantized(dtype)
        if INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts bfloat16 off instead of rounding
            got, wanted = got.float(), weight.dequantized(torch.float32)
            assert ((got - wanted).abs() <= 2**-7 * wanted.abs()).all(), f"{scheme.label}, {in_features} features"
        else:
            assert torch.equal(got, wanted), f"{scheme.label}, {in_features} features, {dtype}"
        x, bias = torch.randn(rows, in_features).to(DEVICE, dtype), torch.randn(80).to(DEVICE, dtype)
        dequantized = layer.dequantized_weight(dtype).double()
        exact = x.double() @ dequantized.T
        product = packed_linear(x, weight, bias, "triton").double()
        # Exact operands, sums in float32, rounded before and after the bias. The interpreter cuts bfloat16 off instead
        # of rounding: a whole unit of the weights, and of the output.
        unit, each = {
            torch.bfloat16: (2**-7 + 2**-8, 2**-7),
            torch.float16: (2**-10, 2**-18),
            torch.float32: (2**-22, 2**-20),
        }[dtype]
        sums = x.double().abs() @ dequantized.abs().T
        bound = unit * (exact.abs() + bias.double().abs()) + each * sums + 1e-6
        error = (product - exact - bias.double()).abs()
        assert (error <= bound).all(), f"{scheme.label}, {in_features} features, {rows} rows: {error.max()}"
    return len(products)


if __name__ == "__main__":
    main()

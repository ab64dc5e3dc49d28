"""gemlite's products under Triton's interpreter, in float32, against the reference. Run with TRITON_INTERPRET=1.

gemlite asks for a GPU when it is imported; what it asks is answered here. Its kernel for 64 rows and more calls a
method that the interpreter's integers do not have, and bfloat16 is multiplied as integers there: neither is tried, so
that its trial, which has 128 rows, is left out.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton.runtime import driver

from llmqat.kernels import JoinedWeight, gemlite, packed_linear
from llmqat.layers import WeightConfig
from tests.kernels.test_kernels import packed_layer


def main() -> None:
    """Checks every width, and prints how many products were compared."""
    pretend_gpu()
    gemlite.load_gemlite().set_autotune(False)
    gemlite.refusal = lambda *_: None
    torch.manual_seed(0)
    count = 0
    for bits in (2, 3, 4, 8):
        for group in (32, 64, None):
            for symmetric in (True, False):
                strategy = "group" if group else "channel"
                count += check(WeightConfig(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group))
    count += check(WeightConfig(num_bits=2, levels="ternary", group_size=64))
    print(count)


def pretend_gpu() -> None:
    """Answers what gemlite and Triton ask of a GPU."""
    properties = SimpleNamespace(name="interpreter", multi_processor_count=1)
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.get_device_properties = lambda *_: properties
    tools = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 99_000})
    answers = SimpleNamespace(
        get_current_target=lambda: SimpleNamespace(backend="cuda"),
        get_benchmarker=lambda: lambda run, **_: (run(), [0.0, 0.0, 0.0])[1],  # of two tiles, the first will do
        utils=tools,
    )
    driver.set_active(answers)


def check(scheme: WeightConfig) -> int:
    """Returns the number of products; raises where one is off by more than sums in float32 may be."""
    layers = [packed_layer(scheme, rows, 192).to(torch.float32) for rows in (64, 16)]
    joined, bias = JoinedWeight([layer.packed_weight() for layer in layers]), torch.randn(80)
    weight = torch.cat([layer.dequantized_weight(torch.float32) for layer in layers]).double()
    rows = [1, 3, 17, 48]
    if scheme.num_bits == 8 and scheme.group_size:
        rows.remove(1)
        with pytest.raises(ValueError, match="one or two rows of 8 bits in groups below 128 are wrong"):
            packed_linear(torch.randn(1, 192), joined, None, "gemlite")
    for count in rows:
        x = torch.randn(count, 192)
        exact, sums = x.double() @ weight.T + bias.double(), x.double().abs() @ weight.abs().T
        error = (packed_linear(x, joined, bias, "gemlite").double() - exact).abs()
        assert (error <= 2**-20 * (sums + bias.abs()) + 1e-6).all(), f"{scheme.label}, {count} rows: {error.max()}"
    return len(rows)


if __name__ == "__main__":
    main()

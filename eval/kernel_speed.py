"""Products of packed weights: every kernel that accepts, beside torch's product with a bfloat16 weight.

    python eval/kernel_speed.py --shapes 4096x4096 14336x4096 --rows 1 16 512

A shape is OUTxIN. Weights are random, and as many of a shape as fill `--cached` megabytes take turns, so that none is
read from a cache that a whole model would not fit in. On a GPU the turns are replayed as one CUDA graph, since starting
kernels one by one from Python takes longer than they run, and "called" is what one call takes when it is started so.
Times are medians of `--repeats`, in microseconds; the fastest of llmqat's kernels is the headline.

"error" is the largest difference of an output from the float32 product of the same weight, "of bound" the largest share
of what rounding to bfloat16 may cost: a unit of the output, and one of each weight.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

import torch
from made import recorded, result_options
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from llmqat.evaluate.speed import Clock
from llmqat.grid import Grid
from llmqat.kernels import KERNELS, PackedWeight
from llmqat.terminal import plain_console, show_any_text

PLAIN = "bfloat16"
ROUNDS = 5
"""Times that all weights of a shape take their turns in one measurement."""


class Measured(NamedTuple):
    """What was measured of one kernel."""

    replayed: float
    """Microseconds of a product, replayed as a graph on a GPU."""
    called: float
    """Microseconds of a product, each started from Python."""
    error: float
    """Largest difference of an output from the float32 product."""
    of_bound: float
    """Largest difference as a share of its bound: above 1, the kernel computes something else."""


def main() -> None:
    """Times every shape and number of rows, prints the table, then the headline."""
    show_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096"], help="OUTxIN of the weights")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 512], help="rows of activations")
    parser.add_argument("--bits", type=int, default=4, help="of the weights")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--cached", type=int, default=256, help="megabytes that the weights of a shape fill at least")
    parser.add_argument("--repeats", type=int, default=5, help="measurements, after one that is thrown away")
    options = parser.parse_args()
    if min(*options.rows, options.repeats, options.group_size) < 1:
        parser.error("--rows, --repeats and --group-size are 1 or more")
    for shape in options.shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape) or int(shape.split("x")[1]) % options.group_size:
            parser.error(f"--shapes {shape}: write OUTxIN, IN a multiple of --group-size {options.group_size}")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    shown = Table("out x in", "rows", "kernel", "µs", "of bfloat16", *(["called, µs"] if on_gpu else []))
    for heading in ("error", "of bound"):
        shown.add_column(heading)
    headline = {}
    for shape, rows in itertools.product(options.shapes, options.rows):
        out_features, in_features = map(int, shape.split("x"))
        found = measured(out_features, in_features, rows, options, device)
        plain = found[PLAIN].replayed
        for name, own in found.items():
            numbers = (f"{own.replayed:.1f}", f"{own.replayed / plain:.2f}", *([f"{own.called:.1f}"] if on_gpu else []))
            shown.add_row(shape, str(rows), name, *numbers, f"{own.error:.3g}", f"{own.of_bound:.2f}")
        name, ratio = fastest(found)
        headline[f"{shape}, {rows} rows, {name}, of bfloat16"] = ratio
    plain_console().print(torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads", shown)
    for name, ratio in headline.items():
        print(f"{name}: {ratio:.3f}")


def fastest(found: Mapping[str, Measured]) -> tuple[str, float]:
    """Returns the fastest of llmqat's exact kernels, and its time as a share of that of a bfloat16 weight."""
    replayed, name = min((own.replayed, name) for name, own in found.items() if name != PLAIN and KERNELS[name].exact)
    return name, replayed / found[PLAIN].replayed


@torch.no_grad()
def measured(
    out_features: int, in_features: int, rows: int, options: argparse.Namespace, device: torch.device
) -> dict[str, Measured]:
    """Returns what torch's product of a bfloat16 weight takes, and each kernel that accepts, with their errors.

    Args:
        out_features: of the weight.
        in_features: of the weight.
        rows: of activations.
        options: `bits` and `group_size` of the weight, `cached` megabytes at least, `repeats`.
        device: where it runs.
    """
    x = torch.randn(rows, in_features, device=device).bfloat16()
    count = max(2, -(-options.cached * 2**20 // (out_features * in_features * options.bits // 8)))
    plain = torch.randn(out_features, in_features, device=device).bfloat16()
    weights = [plain.clone() for _ in range(max(2, count * options.bits // 16))]
    times = timed([lambda w=w: F.linear(x, w) for w in weights], options.repeats, device)
    found = {PLAIN: Measured(*times, *error_of(F.linear(x, plain), x, plain))}
    del weights
    packed = [random_weight(out_features, in_features, options, device) for _ in range(count)]
    dequantized = packed[0].dequantized(x.dtype)
    for name, kernel in KERNELS.items():
        if kernel.declines(x, packed[0]) is None:
            products = [lambda w=w, k=kernel: k.linear(x, w, None) for w in packed]
            error = error_of(products[0](), x, dequantized)
            found[name] = Measured(*timed(products, options.repeats, device), *error)
            for weight in packed:
                weight.layouts.clear()
    return found


def error_of(output: Tensor, x: Tensor, weight: Tensor) -> tuple[float, float]:
    """Returns the largest error of a product, and the largest share of its bound.

    Args:
        output: [rows, O], the product.
        x: [rows, I].
        weight: [O, I], dequantized, in the dtype of `x`.
    """
    exact = F.linear(x.float(), weight.float())
    bound = torch.finfo(x.dtype).eps * (exact.abs() + F.linear(x.float().abs(), weight.float().abs()))
    error = (output.float() - exact).abs()
    return float(error.max()), float((error / bound).max())


def random_weight(
    out_features: int, in_features: int, options: argparse.Namespace, device: torch.device
) -> PackedWeight:
    """Returns a packed weight of random codes."""
    words = torch.randint(-(2**31), 2**31, (out_features, -(-in_features * options.bits // 32)), device=device)
    scale = torch.rand(out_features, in_features // options.group_size, device=device).bfloat16()
    return PackedWeight(words.to(torch.int32), scale, None, Grid(options.bits), in_features)


def timed(products: list[Callable[[], Tensor]], repeats: int, device: torch.device) -> tuple[float, float]:
    """Returns the median microseconds of one of `products` in turn: replayed as a graph on a GPU, and called."""
    clock = Clock(device)

    def turns() -> None:
        for product in products:
            product()

    def timing(run: Callable[[], None]) -> float:
        found = []
        for _ in range(repeats + 1):
            start = clock.now()
            for _ in range(ROUNDS):
                run()
            found.append((clock.now() - start) / ROUNDS / len(products) * 1e6)
        return median(found[1:])

    called = timing(turns)
    if device.type != "cuda":
        return called, called
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turns()
    return timing(graph.replay), called


if __name__ == "__main__":
    with recorded("kernel_speed.py"):
        main()

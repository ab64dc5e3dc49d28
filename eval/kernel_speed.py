"""Products of packed weights: every kernel that accepts, beside torch's product with a bfloat16 weight.

    python eval/kernel_speed.py --shapes 4096x4096 14336x4096 --rows 1 16 512

A shape is OUTxIN. Weights are random, and as many of a shape as fill `--cached` megabytes take turns, so that none is
read from a cache that a whole model would not fit in. On a GPU the turns are replayed as one CUDA graph, since starting
kernels one by one from Python takes longer than they run, and "called" is what one call takes when it is started so.
Times are medians of `--repeats`, in microseconds; the fastest of llmqat's kernels is the headline.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable
from statistics import median

import torch
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


def main() -> None:
    """Times every shape and number of rows, prints the table, then the headline."""
    show_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    headline = {}
    for shape, rows in itertools.product(options.shapes, options.rows):
        out_features, in_features = map(int, shape.split("x"))
        times = measured(out_features, in_features, rows, options, device)
        for name, (taken, called) in times.items():
            numbers = (f"{taken:.1f}", f"{taken / times[PLAIN][0]:.2f}", *([f"{called:.1f}"] if on_gpu else []))
            shown.add_row(shape, str(rows), name, *numbers)
        fastest = min((taken, name) for name, (taken, _) in times.items() if name != PLAIN)
        headline[f"{shape}, {rows} rows, {fastest[1]}, of bfloat16"] = fastest[0] / times[PLAIN][0]
    plain_console().print(torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads", shown)
    for name, ratio in headline.items():
        print(f"{name}: {ratio:.3f}")


@torch.no_grad()
def measured(
    out_features: int, in_features: int, rows: int, options: argparse.Namespace, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Returns microseconds of a product, replayed and called, of torch's product and of each kernel that accepts."""
    x = torch.randn(rows, in_features, device=device).bfloat16()
    count = max(2, -(-options.cached * 2**20 // (out_features * in_features * options.bits // 8)))
    plain = torch.randn(out_features, in_features, device=device).bfloat16()
    weights = [plain.clone() for _ in range(max(2, count * options.bits // 16))]
    times = {PLAIN: timed([lambda w=w: F.linear(x, w) for w in weights], options.repeats, device)}
    del weights
    packed = [random_weight(out_features, in_features, options, device) for _ in range(count)]
    for name, kernel in KERNELS.items():
        if kernel.declines(x, packed[0]) is None:
            products = [lambda w=w, k=kernel: k.linear(x, w, None) for w in packed]
            times[name] = timed(products, options.repeats, device)
            for weight in packed:
                weight.layouts.clear()
    return times


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
    main()

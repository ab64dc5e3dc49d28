"""Methods without end-to-end training, side by side: perplexity, KL from full precision, wall time and memory.

Each row quantizes the model anew on the same token blocks, in this process, and is scored on the same windows of
another text; llmqat's rows as packed, saved and reloaded. `autoround` is Intel's AutoRound (pip install auto-round), a
peer: 20 iterations, batches of 8 blocks, its own model as it leaves it. Seconds are those of the calibration alone for
llmqat and of `quantize()` for AutoRound, without loading and saving. Memory is the peak above what the process held
before (Linux only), loading and saving included, so the model in bfloat16 as well. Without --text the model writes the
text that it is calibrated on. The last lines are the headline, `name: number`.

    python eval/calibration.py --model MODEL --text wikitext-2/valid.txt --test wikitext-2/test.txt
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from made import made, recorded, result_options
from rich.table import Table
from torch import Tensor, nn

import llmqat
from llmqat.data import load_blocks
from llmqat.data.text import read_text
from llmqat.evaluate.memory import forget_peak, resident
from llmqat.evaluate.perplexity import evaluate, keep_reference, windows_from_text
from llmqat.files import write_whole
from llmqat.models import load_model
from llmqat.paths import check_outputs, user_path
from llmqat.recipe.quantize import METHODS, quantize_model, text_source
from llmqat.terminal import plain_console, show_any_text

PEER = "autoround"
BITS = {"int4": 4, "int3": 3, "int2": 2}


def main() -> None:
    """Runs every row, prints the table, then the headline."""
    show_any_text()
    options = parse_options()
    check_outputs({"--json": options.json}, [options.model, options.test])
    full, tokenizer = load_model(options.model, torch.bfloat16)
    text = read_text(options.test)
    windows = windows_from_text(text, tokenizer, options.window, None, options.max_windows, source=str(options.test))
    reference = keep_reference(full, windows)
    del full
    rows: list[dict[str, Any]] = []
    for scheme in options.schemes:
        for method in options.methods:
            make: Callable[..., tuple[nn.Module, float]] = autoround if method == PEER else packed
            before = forget_peak()
            model, seconds = make(options, scheme, method)
            peak = resident("VmHWM")
            found = evaluate(model, windows, reference)
            rows.append(
                {
                    "scheme": scheme,
                    "method": method,
                    "perplexity": found.perplexity,
                    "kl": found.kl,
                    "top1": found.top1,
                    "seconds": seconds,
                    "peak_bytes": None if before is None or peak is None else peak - before,
                }
            )
            if options.json:
                write_whole(options.json, json.dumps({**made("calibration.py"), "rows": rows}, indent=2) + "\n")
    plain_console(width=100).print(table(rows, reference.evaluation.perplexity))
    for row in rows:
        print(f"{row['scheme']} {row['method']}: {row['perplexity']:.3f}")


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[result_options(json_file=False)],
    )
    parser.add_argument("--model", required=True, help="full-precision model: hub id, folder, GGUF file")
    parser.add_argument("--text", type=user_path, help="UTF-8 file to calibrate on; the model's own text else")
    parser.add_argument("--test", type=user_path, required=True, help="UTF-8 file to score on; another text")
    parser.add_argument("--schemes", nargs="+", default=["int4"], help="presets of QuantConfig")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, PEER], default=["search", "gptq", "blockwise"])
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--blocks", type=int, default=32, help="token blocks to calibrate on")
    parser.add_argument("--window", type=int, default=512, help="tokens in a block and in a window")
    parser.add_argument("--max-windows", type=int, default=40, help="windows scored, from the text's start")
    parser.add_argument("--json", type=user_path, help="file for the results")
    return parser.parse_args()


def packed(options: argparse.Namespace, scheme: str, method: str) -> tuple[nn.Module, float]:
    """Returns llmqat's model, loaded from its packed checkpoint, and the seconds of its calibration."""
    with tempfile.TemporaryDirectory() as folder:
        done = quantize_model(
            options.model,
            Path(folder) / "model",
            scheme=scheme,
            group_size=options.group_size,
            method=method,
            text=None if method == "rtn" else options.text,
            tokens=options.blocks * options.window,
            block_size=options.window,
        )
        return llmqat.load(done.report.folder), sum(stage.seconds for stage in done.stages)


def autoround(options: argparse.Namespace, scheme: str, method: str) -> tuple[nn.Module, float]:
    """Returns AutoRound's model, fake-quantized, and the seconds it took; symmetric at 4 bits, asymmetric below."""
    from auto_round import AutoRound  # not a dependency of llmqat

    model, tokenizer = load_model(options.model, torch.bfloat16)
    data = text_source(options.text, options.blocks * options.window, options.window, seed=0)
    ids = load_blocks(data, tokenizer, model).ids
    start = time.perf_counter()
    made = AutoRound(
        model,
        tokenizer,
        bits=BITS[scheme],
        group_size=options.group_size,
        sym=BITS[scheme] > 3,
        iters=20,
        nsamples=options.blocks,
        seqlen=options.window,
        batch_size=8,
        dataset=Batches(ids),
        low_gpu_mem_usage=False,
        device_map="cpu",
    ).quantize()
    seconds = time.perf_counter() - start
    return (made[0] if isinstance(made, tuple) else made).to(torch.bfloat16), seconds


class Batches:
    """Token blocks in the form that AutoRound takes."""

    batch_size = 8

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        """Returns the number of batches."""
        return -(-len(self.ids) // self.batch_size)

    def __iter__(self) -> Any:
        """Yields batches of token blocks."""
        for rows in self.ids.split(self.batch_size):
            yield {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def table(rows: list[dict[str, Any]], full: float) -> Table:
    """Returns the figures as a table."""
    shown = Table("scheme", "method", "perplexity", "KL", "top-1", "seconds", "MB at peak")
    shown.add_row("full precision", "", f"{full:.2f}", "0", "100 %", "", "")
    for row in rows:
        shown.add_row(
            row["scheme"],
            row["method"],
            f"{row['perplexity']:.4g}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['seconds']:.0f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        )
    return shown


if __name__ == "__main__":
    with recorded("calibration.py", json_file=False):
        main()

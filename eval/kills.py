"""A run over several processes that is killed again and again: does the same command go on to the same bytes?

A tiny random Llama is calibrated (ranges, gptq, blockwise), trained, packed and compared by `llmqat train` on two
processes (torchrun, gloo). First undisturbed, then once for each kill: one process, the main one and another in turn,
gets SIGKILL at another share of the time from its first write to its end. It is measured how long the others live on,
and whether the same command, given again, ends with the same bytes in every file of the packed model. A kill that was
measured is not repeated. The last lines are the headline, `name: number`.

    python eval/kills.py --out runs/kills
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from inference import byte_tokenizer, random_llama
from made import recorded, result_options
from rich.table import Table

from llmqat.files import write_whole
from llmqat.paths import user_path
from llmqat.status import RESULTS_FILE, STATUS_FILE
from llmqat.terminal import plain_console, show_any_text

RECIPE = """
model: {model}
output: {output}
quant: {{preset: int4, group_size: 32}}
data: {{source: text, path: {text}, tokens: 2048, block_size: 64}}
calibrate: [{{stage: ranges, blocks: 8}}, {{stage: gptq, blocks: 8}}, {{stage: blockwise, blocks: 8, iterations: 16}}]
train: {{max_steps: 8, per_device_train_batch_size: 2, learning_rate: 1.0e-4, save_steps: 2, logging_steps: 2}}
evaluate: {{texts: [pydoc], window: 64, max_windows: 4, speed: false}}
"""
LIMIT = 300.0
"""Seconds after which a run that does not end is given up."""


@dataclass(frozen=True)
class Kill:
    """What came of one.

    Attributes:
        victim: rank of the process that was killed.
        moment: seconds after the first write.
        doing: stage that the run's status file named then; "" before there is one.
        others: seconds until all processes had ended.
        same: whether the same command then ended with the bytes of the undisturbed run.
    """

    victim: int
    moment: float
    doing: str
    others: float
    same: bool


def main() -> None:
    """Kills, goes on and compares as often as it was asked to; prints the table, then the headline."""
    show_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument("--out", type=user_path, required=True, help="folder of the runs")
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--processes", type=int, default=2, help="of each run")
    options = parser.parse_args()
    if min(options.kills, options.processes) < 1:
        parser.error("--kills and --processes are 1 or more")
    write_inputs(options.out)
    seconds, first = undisturbed(options.out, options.processes)
    kept = options.out / "kills.json"
    found = [Kill(**one) for one in json.loads(kept.read_text(encoding="utf-8"))] if kept.is_file() else []
    expected = digests(options.out / "undisturbed" / "model")
    for number in range(len(found), options.kills):
        moment = (seconds - first) * (number + 0.5) / options.kills
        found.append(killed(options.out / "killed", number % options.processes, moment, options.processes, expected))
        write_whole(kept, json.dumps([asdict(one) for one in found], indent=2) + "\n")
    show(found[: options.kills])


def show(found: Sequence[Kill]) -> None:
    """Prints the table and the headline."""
    table = Table("killed", "after, s", "during", "others ended after, s", "same bytes")
    for one in found:
        cells = (f"{one.moment:.1f}", one.doing or "start", f"{one.others:.1f}", "yes" if one.same else "NO")
        table.add_row("main process" if one.victim == 0 else f"process {one.victim}", *cells)
    plain_console(width=100).print(table)
    print(f"kills: {len(found)}")
    print(f"same bytes: {sum(one.same for one in found)}")
    print(f"slowest end of the others, s: {max(one.others for one in found):.1f}")


def write_inputs(out: Path) -> None:
    """Writes a tiny random model and a text into `out`, where they are not there."""
    model = out / "model"
    if not model.is_dir():
        out.mkdir(parents=True, exist_ok=True)
        random_llama("tiny").save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        (out / "text.txt").write_text(some_text(), encoding="utf-8")


def some_text() -> str:
    """Returns lines of words in no order, which are enough for the recipe."""
    words, drawn = ("one", "day", "the", "river", "went", "over", "its", "stones", "and", "sang"), random.Random(0)
    return "\n".join(" ".join(drawn.choices(words, k=12)) for _ in range(400))


def undisturbed(out: Path, processes: int) -> tuple[float, float]:
    """Returns the seconds of a run that nobody kills, and of its first write; runs it if that was not done."""
    times, folder = out / "seconds.json", out / "undisturbed"
    if not times.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        begun = time.monotonic()
        run = started(folder, processes)
        wait_for_write(run, folder)
        first = time.monotonic() - begun
        finish(run, folder)
        write_whole(times, json.dumps([time.monotonic() - begun, first]))
    seconds, first = json.loads(times.read_text(encoding="utf-8"))
    return seconds, first


def killed(folder: Path, victim: int, moment: float, processes: int, expected: dict[str, str]) -> Kill:
    """Starts a run, kills one of its processes, waits for the others, gives the command again, and compares."""
    shutil.rmtree(folder, ignore_errors=True)
    run = started(folder, processes)
    wait_for_write(run, folder)
    begun = time.monotonic()
    while time.monotonic() - begun < moment and run.poll() is None:
        time.sleep(0.02)
    doing = stage_of(folder)
    os.kill(process_of_rank(run.pid, victim), signal.SIGKILL)
    at = time.monotonic()
    run.wait(LIMIT)
    others = time.monotonic() - at
    if run.returncode == 0:
        raise SystemExit(f"{folder}: the run ended well, though process {victim} was killed after {moment:.1f} s")
    if not (folder / RESULTS_FILE).is_file():  # else it was finished, and died on its way out
        finish(started(folder, processes), folder)
    return Kill(victim, moment, doing, others, digests(folder / "model") == expected)


def wait_for_write(run: subprocess.Popen[str], folder: Path) -> None:
    """Waits until a run has written its status."""
    while run.poll() is None and not (folder / STATUS_FILE).is_file():
        time.sleep(0.02)


def started(folder: Path, processes: int) -> subprocess.Popen[str]:
    """Starts the recipe with its output in `folder`; what it prints is in a file beside that."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(
        RECIPE.format(model=folder.parent / "model", output=folder, text=folder.parent / "text.txt"), encoding="utf-8"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with folder.with_suffix(".log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, "-m", "llmqat", "train", str(recipe)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def finish(run: subprocess.Popen[str], folder: Path) -> None:
    """Waits for a run that nobody kills."""
    if run.wait(LIMIT):
        log = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"{folder} failed:\n{log[-3000:]}")


def process_of_rank(launcher: int, rank: int) -> int:
    """Returns the process id of a rank that torchrun has started; waits until it is there."""
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables:
                return int(child)
        time.sleep(0.05)
    raise SystemExit(f"process {rank} did not start")


def stage_of(folder: Path) -> str:
    """Returns the stage that the run's status file names."""
    file = folder / STATUS_FILE
    return str(json.loads(file.read_text(encoding="utf-8"))["stage"]) if file.is_file() else ""


def digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of the weights and the configuration of a packed model, by name."""
    files = sorted((*folder.glob("*.safetensors"), folder / "config.json"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


if __name__ == "__main__":
    with recorded("kills.py"):
        main()

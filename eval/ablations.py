"""More gain a token: what each change of the recipe buys in the CPU seconds of the baseline, at 4, 3 and 2 bits.

An arm of `ARMS` changes settings of the recipe, stages of calibration, or the training itself (ablation_levers.py).
The baseline calibrates by `--calibrate` and distills `--tokens` tokens with the settings of
recipes/smollm2-135m-SCHEME.yaml. Arms are combined by a plus: average+cell-0.25.

Equal seconds: a step of an arm is timed beside one of the baseline in a short training of its own (`process_time` of
this process, so use --threads 1), and so is its calibration where that differs. The arm trains as many steps as bring
it nearest to the seconds of the baseline, calibration included, with a schedule that ends there. An arm that changes
learning rates alone makes the baseline's steps. What teacher and text cost is the same for all and not counted.

Training text is what calibration has not looked at (`--train-on fresh`), or begins with it (`--train-on calibrated`, as
a recipe does). Each seed has blocks of its own, and an order of its own; all arms of a seed begin with the same blocks.

A cell is scored as packed, saved and reloaded, on the windows of every `--eval` text. The change is the mean over
windows of the arm's KL less the baseline's at the same seed, averaged over seeds; its 95 % interval is the percentile
bootstrap over windows (llmqat/evaluate/bootstrap.py). It holds no noise of seeds, so the change of each seed stands
beside it. Choose on some texts and report others.

The same command continues: a finished cell is not done again, one that was killed begins anew, several processes may
work in one folder. `--json` and `--table` are written after each cell. The last lines are the headline,
`name: number`.

    python eval/ablations.py --schemes int4 --seeds 0 1 --eval own wikitext-2/valid.txt pydoc --work runs/ablations \
        --threads 1 --json eval/results/ablations.json --table eval/results/ablations.md
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from ablation_levers import (
    Averaged,
    Centred,
    Chosen,
    Damped,
    Frozen,
    Hidden,
    Lever,
    Mixed,
    Orthogonal,
    OwnOptimizer,
    ScalesLast,
    StepSized,
    WindowsStage,
    feature_order,
    rotated_heads,
)
from budget import (
    OWN,
    Bench,
    add_bench_options,
    amount,
    files_read,
    held,
    name_texts,
    reported,
    samples_of,
    schedule,
    steps_for,
)
from made import line_of, made
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from llmqat.calibrate import BlockwiseStage, RotateStage, Stage, rotates
from llmqat.data import TokenBlocks, token_blocks
from llmqat.evaluate.bootstrap import mean_difference
from llmqat.evaluate.compare import write_report
from llmqat.files import write_whole
from llmqat.heap import give_back_freed_memory
from llmqat.models import load_model
from llmqat.paths import check_outputs, user_path
from llmqat.recipe.config import Recipe, training_arguments
from llmqat.terminal import show_any_text
from llmqat.train import QATTrainer

BASELINE = "baseline"
CPU_FILE = "cpu.json"
AS_FAST = frozenset(
    ("learning_rate", "scale_learning_rate", "zero_point_learning_rate", "norm_learning_rate", "lr_scheduler_type")
)
"""Settings of a training that change no step's seconds."""

log = logging.getLogger("llmqat.eval.ablations")


@dataclass(frozen=True)
class Arm:
    """A change of the baseline."""

    about: str
    """What it is, and where it comes from."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Settings under `train` of the recipe."""
    times: Mapping[str, float] = field(default_factory=dict)
    """Settings under `train` -> factor of what the recipe says."""
    first: tuple[Stage, ...] = ()
    """Stages before those of `--calibrate`."""
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name of a stage of `--calibrate` -> its settings that change."""
    then: tuple[Stage, ...] = ()
    """Stages after those."""
    levers: tuple[type[Lever], ...] = ()
    """What it changes in a training beside settings."""
    within: Callable[[], AbstractContextManager[None]] | None = None
    """Context in which it calibrates."""
    schemes: tuple[str, ...] = ()
    """Those that it is meant for; all where none is named."""

    @property
    def starts_otherwise(self) -> bool:
        """Whether its calibration is not the baseline's."""
        return bool(self.first or self.stages or self.then) or self.within is not None

    def calibration(self, stages: Sequence[Stage]) -> tuple[Stage, ...]:
        """Returns the stages that it calibrates with, from those of `--calibrate`.

        Raises:
            ValueError: it changes a stage that is not among them.
        """
        if missing := self.stages.keys() - {stage.stage for stage in stages}:
            raise ValueError(f"the arm changes the stage {min(missing)}, which --calibrate does not have")
        changed = (type(stage)(**{**stage.model_dump(), **self.stages.get(stage.stage, {})}) for stage in stages)
        return (*self.first, *changed, *self.then)

    def facts(self) -> dict[str, Any]:
        """Returns what decides its figures, as JSON takes it."""
        return {
            "train": dict(self.train),
            "times": dict(self.times),
            "calibrate": {
                "first": [stage.model_dump(mode="json") for stage in self.first],
                "stages": {name: dict(settings) for name, settings in self.stages.items()},
            }
            if self.first or self.stages
            else None,
            "then": [stage.model_dump(mode="json") for stage in self.then],
            "levers": [lever.label() for lever in self.levers],
            "within": None if self.within is None else self.within.__name__,
        }


ARMS: dict[str, Arm] = {
    BASELINE: Arm("the recipe's settings after --calibrate"),
    "average": Arm("means of weights, scales and norms over the last third (SWA, 1803.05407)", levers=(Averaged,)),
    "lr-0.25": Arm("a quarter of the learning rate of weights", times={"learning_rate": 0.25}),
    "lr-0.5": Arm("half the learning rate of weights", times={"learning_rate": 0.5}),
    "lr-2": Arm("twice the learning rate of weights", times={"learning_rate": 2}),
    "lr-4": Arm("four times the learning rate of weights", times={"learning_rate": 4}),
    "scale-lr-1e-4": Arm("scales learn at 1e-4, a tenth of the recipe's", train={"scale_learning_rate": 1e-4}),
    "cell-0.25": Arm("weights begin within 0.25 steps of their codes", levers=(Centred.by(cell=0.25),)),
    "cell-0.4": Arm("weights begin within 0.4 steps of their codes", levers=(Centred.by(cell=0.4),)),
    "lr-steps": Arm("the learning rate of weights is relative to the scale of their group", levers=(StepSized,)),
    "dampen": Arm("weights are pulled to the levels of their codes, more and more (2203.11086)", levers=(Damped,)),
    "freeze": Arm("weights whose codes go back and forth freeze (2203.11086)", levers=(Frozen,)),
    "hidden-l2": Arm("squared error of three hidden states beside the KL (mlx-lm's DWQ)", levers=(Hidden,)),
    "hidden-l1": Arm("absolute error of three hidden states beside the KL (DWQ)", levers=(Hidden.by(order=1),)),
    "reverse-half": Arm("half forward, half reverse KL (DWQ)", levers=(Mixed,)),
    "cakld": Arm(
        "reverse KL by the teacher's mean confidence, else forward (BitDistiller, 2402.10631)",
        levers=(Mixed.by(reverse=None),),
    ),
    "batch-2x": Arm(
        "twice the batch, 1.4 times the learning rates",
        train={"gradient_accumulation_steps": 2},
        times={"learning_rate": 1.4, "scale_learning_rate": 1.4},
    ),
    "batch-4x": Arm(
        "four times the batch, twice the learning rates",
        train={"gradient_accumulation_steps": 4},
        times={"learning_rate": 2, "scale_learning_rate": 2},
    ),
    "muon": Arm("Muon for matrices, steps of Adam's size (2502.16982)", levers=(Orthogonal,)),
    "muon-batch-4x": Arm(
        "the same with four times the batch and twice the learning rates",
        train={"gradient_accumulation_steps": 4},
        times={"learning_rate": 2, "scale_learning_rate": 2},
        levers=(Orthogonal,),
    ),
    "adam-row": Arm(
        "Adam with one second moment a row (Adam-mini, 2406.16793)", levers=(OwnOptimizer.by(shared="row"),)
    ),
    "adam-tensor": Arm("Adam with one second moment a matrix", levers=(OwnOptimizer.by(shared="tensor"),)),
    "scales-only": Arm(
        "scales, norms and biases alone (EfficientQAT's end-to-end phase)", train={"trainable": "scales"}
    ),
    "scales-last": Arm("the last quarter trains scales, norms and biases alone (2407.11062)", levers=(ScalesLast,)),
    "embeddings-frozen": Arm("embeddings and output head do not train", train={"freeze_embeddings": True}),
    "choose": Arm(
        "codes drawn from the two beside each weight, less and less by chance (the idea of GSQ, 2604.18556)",
        levers=(Chosen,),
        schemes=("int3", "int2"),
    ),
    "blockwise": Arm("block-wise training before it (2407.11062)", then=(BlockwiseStage(blocks=80, iterations=20),)),
    "windows": Arm(
        "the same over overlapping windows of two blocks (CBQ, 2312.07950)",
        then=(WindowsStage(blocks=80, iterations=10),),
    ),
    "gptq-feature-order": Arm("GPTQ without activation order", within=feature_order),
    "gptq-quantized-target": Arm(
        "GPTQ aims at what a layer gives from the inputs it gets (2210.17323)",
        stages={"gptq": {"target": "quantized"}},
    ),
    "gptq-80": Arm("GPTQ looks at 80 blocks", stages={"gptq": {"blocks": 80}}),
    "rotate": Arm("the residual stream is rotated first (R1; QuaRot, 2404.00456)", first=(RotateStage(),)),
    "rotate-heads": Arm(
        "and what each head writes (R1 and R2; SpinQuant, 2405.16406)",
        first=(RotateStage(),),
        within=rotated_heads,
    ),
    "ranges-minmax": Arm(
        "scales of the plain range, clipping learned by training alone",
        stages={"ranges": {"method": "minmax"}},
    ),
    "ranges-mse": Arm(
        "clipping of the least error of weights, inputs not looked at",
        stages={"ranges": {"method": "mse"}},
    ),
}
"""Name -> change."""


def arm_of(name: str) -> Arm:
    """Returns the arm of a name, or of several joined by a plus.

    Raises:
        ValueError: a name is unknown, or two of the arms change the same thing.
    """
    parts = name.split("+")
    if unknown := [part for part in parts if part not in ARMS]:
        raise ValueError(f"there is no arm {unknown[0]!r}; choose {', '.join(ARMS)}, or several joined by a plus")
    arms = [ARMS[part] for part in parts]
    if len(arms) == 1:
        return arms[0]
    keys = [key for arm in arms for key in (*arm.train, *arm.times, *arm.stages)]
    stages = [arm.first for arm in arms if arm.first]
    contexts = [arm.within for arm in arms if arm.within is not None]
    kinds = [
        OwnOptimizer if issubclass(lever, OwnOptimizer) else lever.__name__ for arm in arms for lever in arm.levers
    ]
    if any(len(set(found)) < len(found) for found in (keys, kinds)) or len(stages) > 1 or len(contexts) > 1:
        raise ValueError(f"{name}: two of its arms change the same thing")
    return Arm(
        about=" and ".join(arm.about for arm in arms),
        train={key: value for arm in arms for key, value in arm.train.items()},
        times={key: value for arm in arms for key, value in arm.times.items()},
        first=stages[0] if stages else (),
        stages={key: value for arm in arms for key, value in arm.stages.items()},
        then=tuple(stage for arm in arms for stage in arm.then),
        levers=tuple(lever for arm in arms for lever in arm.levers),
        within=contexts[0] if contexts else None,
        schemes=tuple(dict.fromkeys(scheme for arm in arms for scheme in arm.schemes)),
    )


def trainer_class(levers: Sequence[type[Lever]]) -> type[QATTrainer]:
    """Returns the trainer with all `levers` in it; QATTrainer itself for none."""
    return type("Ablation", tuple(levers), {}) if levers else QATTrainer


@dataclass(frozen=True)
class Seconds:
    """CPU seconds of a calibration, and of a training step."""

    calibration: float
    step: float


def steps_of(arm: Seconds, baseline: Seconds, steps: int) -> int:
    """Returns how many steps bring an arm nearest to the seconds of the baseline, which makes `steps`."""
    left = baseline.calibration + steps * baseline.step - arm.calibration
    return max(round(left / arm.step), 0)


@dataclass(frozen=True)
class Cell:
    """One training."""

    scheme: str
    text: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.scheme}-{self.text}-{self.arm}-{self.seed}"


def main() -> None:
    """Does the cells that are missing, prints the tables, then the headline."""
    show_any_text()
    options = parse_options()
    check_outputs({"--json": options.json, "--table": options.table}, files_read(options))
    report = reported(Ablations, options)
    print(markdown(report))
    for row in report["rows"]:
        for text, found in row["texts"].items():
            if "change" in found:
                print(f"{row['scheme']}, {row['arm']}, {text} kl change: {found['change']:.5g}")


def parse_options() -> argparse.Namespace:
    """Returns the command line's options, and the cells that are meant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bench_options(parser)
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}; A+B for both"
    )
    parser.add_argument("--text", default=OWN, help="text to calibrate and train on: own, or a UTF-8 file")
    parser.add_argument("--tokens", type=amount, default=40_000, help="that the baseline trains on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the blocks and their order")
    parser.add_argument(
        "--train-on", choices=["fresh", "calibrated"], default="fresh", help="where training text begins"
    )
    parser.add_argument("--reserved", type=int, default=80, help="blocks at the start of the text, for calibration")
    parser.add_argument("--probe-steps", type=int, default=3, help="steps that are timed, of each arm")
    parser.add_argument("--table", type=user_path, help="file for the tables (Markdown)")
    options = parser.parse_args()
    options.texts = [options.text]
    name_texts(parser, options)
    options.text = next(iter(options.texts))
    cells = []
    for seed, scheme, name in product(
        sorted(set(options.seeds)), options.schemes, dict.fromkeys([BASELINE, *options.arms])
    ):
        try:
            arm = arm_of(name)
        except ValueError as error:
            parser.error(f"--arms: {error}")
        if not arm.schemes or scheme in arm.schemes:
            cells.append(Cell(scheme, options.text, name, seed))
    options.cells = cells
    return options


class Clock(TrainerCallback):
    """Measures the CPU seconds of a step, but for the first, in which kernels are made."""

    def __init__(self) -> None:
        """Begins with no step."""
        self._times: list[float] = []
        self.facts: dict[str, Any] = {}  # what the levers say of the training

    def on_step_end(self, *args: Any, **_: Any) -> None:
        """Notes the time."""
        self._times.append(time.process_time())

    @property
    def seconds(self) -> float | None:
        """CPU seconds a step, None of fewer than two."""
        count = len(self._times) - 1
        return (self._times[-1] - self._times[0]) / count if count > 0 else None


class Ablations(Bench):
    """The work folder of the ablations."""

    result_file = "ablation.json"
    results_key = "cells"

    def settings(self) -> dict[str, Any]:
        """Returns what the cells have in common, and what each arm changes."""
        options = self.options
        arms = {f"arm {cell.arm}": arm_of(cell.arm).facts() for cell in options.cells}
        own = {"tokens": options.tokens, "train on": options.train_on, "reserved": options.reserved}
        return {**super().settings(), **own, **arms}

    def cell_of(self, result: dict[str, Any]) -> Cell:
        """Returns the cell that has found `result`."""
        return Cell(result["scheme"], result["text"], result["arm"], result["seed"])

    @property
    def calibration_blocks(self) -> int:
        """Blocks that are kept for calibration, whichever arms are asked for."""
        return int(self.options.reserved)

    # Cells

    def found(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """Returns what is known of a cell once it is trained, packed and scored."""
        plan = self.plan(cell.scheme, cell.arm)
        recipe = self.recipe(cell.scheme, cell.arm, plan["steps"], cell.seed, folder)
        blocks = self.blocks(cell.seed, recipe)
        model, calibration, _ = self.begun(cell.scheme, cell.arm)
        training = None
        if plan["steps"]:
            clock = Clock()
            training = self.train(cell.text, model, blocks, recipe, self.maker(cell.arm, clock))
            training |= {"cpu_seconds_a_step": clock.seconds, "levers": clock.facts}
        saved = self.saved(model, folder)
        del model
        give_back_freed_memory()
        return {
            **asdict(cell),
            "facts": arm_of(cell.arm).facts(),
            "plan": plan,
            "blocks": len(blocks),
            "text_sha256": blocks.sha256,
            "calibration": calibration,
            "training": training,
            **saved,
            **self.scored(folder),
        }

    def recipe(self, scheme: str, name: str, steps: int, seed: int, folder: Path) -> Recipe:
        """Returns the recipe of an arm, whose schedule ends after `steps`.

        Raises:
            ValueError: a stage looks at text that training is to have for itself.
        """
        arm = arm_of(name)
        recipe = self.recipe_of(scheme)
        recipe = recipe.model_copy(update={"calibrate": arm.calibration(recipe.calibrate)})
        looked = max((getattr(stage, "blocks", 0) for stage in recipe.calibrate), default=0)
        if looked > self.options.reserved:
            raise ValueError(f"arm {name}: a stage looks at {looked} blocks; give --reserved {looked}")
        defaults = training_arguments(recipe)
        train = {
            **recipe.train,
            **arm.train,
            **{key: factor * getattr(defaults, key) for key, factor in arm.times.items()},
            **schedule(recipe, steps),
            "logging_steps": min(defaults.logging_steps, max(steps // 4, 1)),
            "save_strategy": "no",
        }
        return recipe.model_copy(update={"train": train, "seed": seed, "output": folder})

    def baseline_steps(self, scheme: str) -> int:
        """Returns how many steps the baseline makes."""
        return steps_for(self.options.tokens, self.recipes[scheme])

    def blocks(self, seed: int, recipe: Recipe) -> TokenBlocks:
        """Returns the blocks of a training: the first of its seed, all of which it goes over again where it needs more.

        A seed has those of the baseline and a quarter more, for arms that are faster.

        Raises:
            ValueError: the text has no block beside those for calibration.
        """
        own = max(self.baseline_steps(scheme) * samples_of(one) for scheme, one in self.recipes.items())
        region = own + own // 4
        first = self.options.reserved if self.options.train_on == "fresh" else 0
        text = self.text(self.options.text, first + (seed + 1) * region)
        if len(text) <= first:
            raise ValueError(
                f"{self.options.text} has {len(text)} blocks, of which --reserved {first} are for calibration; give "
                "more text, or --train-on calibrated"
            )
        wanted = recipe.train["max_steps"] * samples_of(recipe)
        places = first + (seed * region + torch.arange(min(wanted, region))) % (len(text) - first)
        return token_blocks(text.ids[places.unique()], text.source)

    def original(self) -> PreTrainedModel:
        """Returns the full-precision model, in bfloat16."""
        return load_model(self.model, torch.bfloat16)[0]

    def maker(self, name: str, clock: Clock) -> Callable[..., QATTrainer]:
        """Returns what makes the trainer of an arm, timed by `clock`."""
        levers = arm_of(name).levers

        def make(**given: Any) -> QATTrainer:
            trainer = trainer_class(levers)(**given, **({"original": self.original} if levers else {}))
            trainer.add_callback(clock)
            clock.facts = getattr(trainer, "facts", {})
            return trainer

        return make

    # Seconds

    def plan(self, scheme: str, name: str) -> dict[str, Any]:
        """Returns how many steps an arm makes, and from which CPU seconds that follows."""
        arm, steps = arm_of(name), self.baseline_steps(scheme)
        stages = self.recipe(scheme, name, steps, 0, self.work).calibrate
        if not arm.starts_otherwise and not arm.levers and AS_FAST.issuperset({*arm.train, *arm.times}):
            return {"steps": steps, "baseline_steps": steps}
        as_fast = not arm.levers and AS_FAST.issuperset({*arm.train, *arm.times}) and not rotates(stages)
        timed = self._timed(scheme, name, only_baseline=as_fast)
        own, baseline = (
            Seconds(self.begun(scheme, one)[2], timed[key])
            for one, key in ((name, "step"), (BASELINE, "baseline_step"))
        )
        return {
            "steps": steps_of(own, baseline, steps),
            "baseline_steps": steps,
            "seconds": asdict(own),
            "baseline_seconds": asdict(baseline),
        }

    def _timed(self, scheme: str, name: str, only_baseline: bool) -> dict[str, float]:
        """Returns the CPU seconds of a step of an arm and of the baseline, timed one after the other."""
        file = self.work / f"step-{scheme}-{name}.json"
        with held(file.with_suffix(".lock")):
            if not file.is_file():
                baseline = self._step_seconds(scheme, BASELINE)
                own = baseline if only_baseline else self._step_seconds(scheme, name)
                log.info("%s, %s: %.2f s a step, baseline %.2f", scheme, name, own, baseline)
                write_whole(file, json.dumps({"step": own, "baseline_step": baseline}) + "\n")
        return json.loads(file.read_text(encoding="utf-8"))

    def _step_seconds(self, scheme: str, name: str) -> float:
        """Returns the CPU seconds of a step, by a training of a few."""
        clock = Clock()
        one = self.recipe(scheme, name, 1, 0, self.work)
        steps = 1 + max(round(self.options.probe_steps * samples_of(self.recipes[scheme]) / samples_of(one)), 1)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            recipe = self.recipe(scheme, name, steps, 0, Path(folder))
            model = self.begun(scheme, name)[0]
            self.train(self.options.text, model, self.blocks(0, recipe), recipe, self.maker(name, clock))
        assert clock.seconds is not None
        return clock.seconds

    def begun(self, scheme: str, name: str) -> tuple[nn.Module, list[dict[str, Any]], float]:
        """Returns the calibrated model that an arm begins with, what each stage did, and the CPU seconds of all.

        A calibration that was interrupted is begun anew: the seconds of its first part are not known.
        """
        arm = arm_of(name)
        parts = [part for part in name.split("+") if ARMS[part].starts_otherwise]
        start = f"start-{scheme}-{self.options.text}-{'+'.join(parts) or BASELINE}"
        file = self.work / start / CPU_FILE
        recipe = self.recipe(scheme, name, 1, 0, self.work)
        self.text(self.options.text, 0)  # so that writing it counts for none
        with held(self.work / f"{start}.lock"), _inside(arm.within):
            if not file.is_file():
                shutil.rmtree(file.parent, ignore_errors=True)
            before = time.process_time()
            model, stages = self.start(start, self.options.text, recipe)
            if not file.is_file():
                write_whole(file, json.dumps({"seconds": time.process_time() - before}) + "\n")
        return model, stages, float(json.loads(file.read_text(encoding="utf-8"))["seconds"])

    # The report

    def report(self) -> dict[str, Any]:
        """Returns what all cells in the folder have found, and writes it to `--json` and `--table` where given."""
        with held(self.work / "report.lock"):
            cells = self.results()
            report = {
                **made("ablations.py"),
                "settings": json.loads((self.work / "settings.json").read_text(encoding="utf-8")),
                "rows": rows_of(cells),
                "cells": cells,
            }
            if self.options.json:
                write_report(report, self.options.json)
            if self.options.table:
                self.options.table.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.options.table, markdown(report))
        return report


@contextmanager
def _inside(context: Callable[[], AbstractContextManager[None]] | None) -> Iterator[None]:
    with ExitStack() as stack:
        if context is not None:
            stack.enter_context(context())
        yield


def rows_of(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each scheme and arm: means over seeds, and the change from the baseline of the same seeds."""
    known = {(cell["scheme"], cell["arm"], cell["seed"]): cell for cell in cells}
    order = {name: place for place, name in enumerate(ARMS)}
    pairs = sorted(
        {(cell["scheme"], cell["arm"]) for cell in cells}, key=lambda pair: (pair[0], order.get(pair[1], 99), pair[1])
    )
    rows = []
    for scheme, arm in pairs:
        seeds = sorted(seed for one, name, seed in known if (one, name) == (scheme, arm))
        own = [known[scheme, arm, seed] for seed in seeds]
        both = [seed for seed in seeds if (scheme, BASELINE, seed) in known]
        texts = {}
        for text in own[0]["texts"]:
            texts[text] = {"kl": fmean(cell["texts"][text]["kl"] for cell in own)}
            if arm != BASELINE and both:
                texts[text] |= _change(
                    *(
                        [known[scheme, name, seed]["texts"][text]["window_kl"] for seed in both]
                        for name in (arm, BASELINE)
                    )
                )
        rows.append(
            {
                "scheme": scheme,
                "arm": arm,
                "about": arm_of(arm).about,
                "seeds": seeds,
                "steps": own[0]["plan"]["steps"],
                "share_of_seconds": _share_of_seconds(own),
                "texts": texts,
            }
        )
    return rows


def _change(own: list[list[float]], baseline: list[list[float]]) -> dict[str, Any]:
    """Returns the change of KL over windows, given for each seed: its mean, interval, and those of single seeds."""
    one, other = ([fmean(window) for window in zip(*seeds, strict=True)] for seeds in (own, baseline))
    changes = [fmean(left) - fmean(right) for left, right in zip(own, baseline, strict=True)]
    return {"change": fmean(changes), **mean_difference(one, other).to_dict(), "changes": changes}


def _share_of_seconds(cells: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the CPU seconds planned for an arm as a share of the baseline's; None where steps are as fast."""
    plan = cells[0]["plan"]
    if "seconds" not in plan:
        return None
    own, baseline = (
        plan[kind]["calibration"] + plan[steps] * plan[kind]["step"]
        for kind, steps in (("seconds", "steps"), ("baseline_seconds", "baseline_steps"))
    )
    return own / baseline


def markdown(report: Mapping[str, Any]) -> str:
    """Returns the tables of all schemes."""
    settings, rows = report["settings"], report["rows"]
    lines = ["# Ablations", "", f"{line_of(report)}.", ""]
    lines += [
        f"The change of KL from the baseline in the same CPU seconds: {settings['tokens']:,} tokens of distillation, "
        f"on text that calibration {'has not looked at' if settings['train on'] == 'fresh' else 'has looked at'}. "
        f"Packed, saved and reloaded; {settings['max_windows']} windows of {settings['window']} tokens. ± is half the "
        "95 % interval, paired by windows, on the mean of the seeds; in brackets the seeds, each by itself. Bold: the "
        "interval lies below 0.",
    ]
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        own = [row for row in rows if row["scheme"] == scheme]
        texts = list(own[0]["texts"])
        lines += [
            "",
            f"## {scheme}",
            "",
            f"| arm | steps | seconds | {' | '.join(texts)} |",
            "|---" * (3 + len(texts)) + "|",
        ]
        for row in own:
            share = row["share_of_seconds"]
            cells = [row["arm"], str(row["steps"]), "" if share is None else f"{share:.0%}"]
            cells += [_cell(row["texts"][text]) for text in texts]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Arms",
        "",
        *(f"- {name}: {about}" for name, about in {row["arm"]: row["about"] for row in rows}.items()),
    ]
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Any]) -> str:
    if "change" not in found:
        return f"KL {found['kl']:.4f}"
    change = f"{found['change']:+.4f} ±{(found['high'] - found['low']) / 2:.2g}"
    change = f"**{change}**" if found["high"] < 0 else change
    return f"{change} ({', '.join(f'{one:+.4f}' for one in found['changes'])})"


if __name__ == "__main__":
    main()

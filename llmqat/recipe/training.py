"""What a training says while it runs: a bar on a terminal, else a line now and then.

    14:03:02 step 12 of 40, loss 0.1042, lr 3.6e-05, 184 tokens/s, 6.1 min left

It stands in for the callbacks by which transformers prints dictionaries of strings. A line comes with the first and the
last step, and where at least a minute has passed since the last one; evaluations are always said.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import has_length
from transformers.training_args import TrainingArguments

from llmqat.terminal import Bar, duration
from llmqat.terminal.bars import BESIDE_BAR, SECONDS_BETWEEN_LINES
from llmqat.train import QATTrainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """How far a training is."""

    step: int
    steps: int
    loss: float | None
    learning_rate: float | None
    tokens_per_second: float | None
    seconds_left: float | None

    def __str__(self) -> str:
        """Returns it in words."""
        parts = [
            f"step {self.step:,} of {self.steps:,}",
            None if self.loss is None else f"loss {self.loss:.4g}",
            None if self.learning_rate is None else f"lr {self.learning_rate:.2g}",
            None if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s",
            f"{duration(self.seconds_left)} left" if self.seconds_left and self.step < self.steps else None,
        ]
        return ", ".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON takes them."""
        return asdict(self)


class TrainingLines(TrainerCallback):
    """Says how far a training is, and how an evaluation went."""

    def __init__(self, trainer: QATTrainer, tell: Callable[[Step], None] | None = None) -> None:
        """Takes what is trained, and who else is told of each step that is logged, if anybody."""
        self.trainer, self.tell = trainer, tell
        self._bar: Bar | None = None
        self._evaluation: Bar | None = None
        self._start, self._steps_before, self._said = 0.0, 0, -SECONDS_BETWEEN_LINES

    @classmethod
    @contextmanager
    def of(cls, trainer: QATTrainer, tell: Callable[[Step], None] | None = None) -> Iterator[None]:
        """Puts one into `trainer`, in place of what prints there; takes its bars away at the end and after errors."""
        for other in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(other)
        lines = cls(trainer, tell)
        trainer.add_callback(lines)
        try:
            yield
        finally:
            lines.close()

    def close(self) -> None:
        """Takes the bars away that are left."""
        for bar in (self._bar, self._evaluation):
            if bar is not None:
                bar.__exit__(None, None, None)
        self._bar = self._evaluation = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Shows the bar."""
        self._start, self._steps_before = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self._bar = Bar("train", "step", total=state.max_steps, logged=False).__enter__()
            self._bar.done_before(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Says the figures of a step, or of an evaluation."""
        if not state.is_world_process_zero or logs is None:
            return
        if (evaluated := _evaluated(logs)) is not None:
            log.info("step %s of %s, %s", f"{state.global_step:,}", f"{state.max_steps:,}", evaluated)
        if "loss" not in logs:
            return
        step = self._step(state, logs)
        if self.tell is not None:
            self.tell(step)
        if self._bar is not None:
            self._bar.update(state.global_step, note=", ".join(str(step).split(", ")[1:3]))
        now = time.monotonic()
        is_end = state.global_step in (self._steps_before + 1, state.max_steps)
        if is_end or now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            log.info("%s", step, extra=BESIDE_BAR)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Moves the bar of an evaluation."""
        if not state.is_world_process_zero:
            return
        if self._evaluation is None:
            batches = given.get("eval_dataloader")
            total = len(batches) if batches is not None and has_length(batches) else None
            self._evaluation = Bar("evaluation", "batch", total=total).__enter__()
        self._evaluation.update(self._evaluation.done + 1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Takes the bar of an evaluation away."""
        if self._evaluation is not None:
            self._evaluation.__exit__(None, None, None)
            self._evaluation = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def _step(self, state: TrainerState, logs: Mapping[str, Any]) -> Step:
        made, seconds = state.global_step - self._steps_before, time.monotonic() - self._start
        left = None if made == 0 else (state.max_steps - state.global_step) * seconds / made
        tokens = self.trainer.tokens_here * self.trainer.args.world_size
        rate = logs.get("learning_rate")
        return Step(
            step=state.global_step,
            steps=state.max_steps,
            loss=float(logs["loss"]),
            learning_rate=None if rate is None else float(rate),
            tokens_per_second=tokens / seconds if tokens and seconds > 0 else None,
            seconds_left=left,
        )


def _evaluated(logs: Mapping[str, Any]) -> str | None:
    """Returns what an evaluation found, in words; None where the figures are of none."""
    found = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
    unsaid = ("runtime", "samples_per_second", "steps_per_second")
    figures = [
        f"{key.replace('_', ' ')} {value:.4g}"
        for key, value in found.items()
        if isinstance(value, (int, float)) and not key.endswith(unsaid)
    ]
    return "evaluation: " + ", ".join(figures) if figures else None

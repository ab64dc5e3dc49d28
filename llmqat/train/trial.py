"""A trainer without weights, made to see what training would refuse before anything is loaded.

Much of what Trainer refuses it refuses when it makes its parts: the optimizer (a rate below zero, a package that is
missing), the schedule (a keyword that it does not take, a warm-up longer than the training), the loader, the trackers.
That is hours of text and calibration after the recipe was read. So these parts are made of a model on the meta device,
and thrown away.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from llmqat.data.blocks import token_blocks
from llmqat.status import USER_MISTAKES
from llmqat.train.arguments import QATArguments
from llmqat.train.trainer import QATTrainer

T = TypeVar("T")
UNKNOWN_STEPS = 10**9
"""Steps of a training whose length is known only when the text is there: no warm-up is too long for it."""


def refused_by_training(
    model: nn.Module, args: QATArguments, steps: int | None, length: int, watched: Sequence[str] | None
) -> list[Exception]:
    """Returns what a training of `model` would raise when it begins, and the user has to mend.

    Args:
        model: prepared, perhaps with adapters, on the meta device; what trains is chosen on it, in place.
        args: of the training; not changed.
        steps: optimizer steps; None where they are not known yet.
        length: tokens in a block.
        watched: names of the data sets that are evaluated while training; None for a single one without a name.
    """
    found: list[Exception] = []
    for name in args.report_to:
        _note(found, partial(_check_tracker, name))
    if _shards(args):
        return found  # its parts need the processes and their devices
    with tempfile.TemporaryDirectory(prefix="llmqat-") as folder, torch.random.fork_rng(devices=[]):
        own = copy.copy(args)
        own.output_dir, own.push_to_hub, own.report_to = folder, False, []
        own.kl_weight, own.cross_entropy_weight = 0.0, 1.0  # without a teacher
        blocks = _blocks(own, length)
        evaluated: Any = None if args.eval_strategy == "no" else blocks
        if evaluated is not None and watched:
            evaluated = dict.fromkeys(watched, blocks)
        trainer = _note(found, partial(_Trial, model=model, args=own, train_dataset=blocks, eval_dataset=evaluated))
        if trainer is not None:
            _note(found, trainer.get_train_dataloader)
            optimizer = _note(found, trainer.create_optimizer) or torch.optim.SGD([nn.Parameter(torch.zeros(1))])
            total = UNKNOWN_STEPS if steps is None else steps
            _note(found, partial(trainer.create_scheduler, total, optimizer))
    return found


def _note(found: list[Exception], make: Callable[[], T]) -> T | None:
    """Returns what `make` makes; None where it raises what the user has to mend, which goes to `found`."""
    try:
        return make()
    except USER_MISTAKES as error:
        found.append(error)
    except TypeError as error:  # of a keyword that a schedule does not take, or needs
        found.append(ValueError(f"train: {error}"))
    return None


class _Trial(QATTrainer):
    """A trainer whose model has no weights; its optimizer has one parameter in each group."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        pass

    def _parameter_groups(self, model: nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
        groups = super()._parameter_groups(model, rate, decay)
        return [{**group, "params": [nn.Parameter(torch.zeros(2, 2))]} for group in groups]


def _blocks(args: TrainingArguments, length: int) -> Dataset[dict[str, Tensor]]:
    """Returns as many samples as the processes take at once."""
    samples = args.per_device_train_batch_size * args.world_size
    return token_blocks(torch.zeros(samples, length, dtype=torch.int64), "trial").dataset()


def _check_tracker(name: str) -> None:
    try:
        for callback in get_reporting_integration_callbacks([name]):
            callback()
    except (RuntimeError, ImportError) as error:
        raise ImportError(f"train.report_to={name!r}: {error}; or leave {name} out of train.report_to") from error


def _shards(args: TrainingArguments) -> bool:
    asked = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(args.fsdp or args.deepspeed) or any(os.environ.get(name, "").lower() in ("1", "true") for name in asked)

"""What stops a training: numbers that are not finite, and settings that can have no effect.

Each optimizer step looks at one number, the norm of the gradients that clipping has computed anyhow, together with the
loss. Only when that is not finite is the step repeated, with hooks, to find where it began; weights are still those
from before the step then, so nothing of it is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from llmqat.train.checkpoints import last_checkpoint


def is_finite(tensor: Tensor) -> bool:
    """Returns whether every entry is finite; of a sharded tensor, every entry that lies here."""
    local: Any = tensor
    return bool(torch.isfinite(local.to_local() if hasattr(local, "to_local") else local).all())


def not_finite_parameter(model: nn.Module) -> str | None:
    """Returns the name of the first parameter that holds NaN or infinity; None where there is none."""
    named = model.named_parameters()
    return next((name for name, parameter in named if parameter.is_floating_point() and not is_finite(parameter)), None)


def where_not_finite(model: nn.Module, repeat: Callable[[], None]) -> str:
    """Returns where NaN or infinity came first when a step is repeated: a weight, an output, or a gradient.

    Args:
        model: as it was before the step.
        repeat: runs forward and backward of the step again.
    """
    if name := not_finite_parameter(model):
        return f"the parameter {name}"
    found: list[str] = []
    model.zero_grad()
    with _watched(model, found):
        repeat()
    return found[0] if found else "nothing of the model when the step was repeated"


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Inside, outputs and gradients that are not finite are appended to `found` in the order they are made."""
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: _note(found, f"the output of {name}", output))
        for name, module in model.named_modules()
        if name
    ]
    handles += [
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, name=name: _note(found, f"the gradient of {name}", parameter.grad)
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(found: list[str], what: str, value: Any) -> None:
    if any(tensor.is_floating_point() and not is_finite(tensor) for tensor in _tensors(value)):
        found.append(what)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def not_finite_error(step: int, what: str, where: str, folder: Path) -> FloatingPointError:
    """Returns the error to raise where training meets NaN or infinity.

    Args:
        step: number of the optimizer step, from 1.
        what: the number that showed it.
        where: from `where_not_finite`.
        folder: of the checkpoints.
    """
    last = last_checkpoint(folder)
    kept = f"the last good checkpoint is {last}" if last is not None else "there is no checkpoint yet"
    return FloatingPointError(
        f"training stopped in step {step}: {what}, and what was not finite first is {where}; nothing of it was saved, "
        f"{kept}. Lower learning_rate and scale_learning_rate, give more warmup_steps or a smaller max_grad_norm, and "
        "look at the text if it is always this step"
    )


def check_warmups(total: int, arguments: TrainingArguments) -> None:
    """Raises ValueError where a warm-up does not end before training does; of no steps at all there is no warm-up.

    Args:
        total: optimizer steps of the training.
        arguments: say in how many steps learning rates rise, and (QATArguments) weights are quantized in part.
    """
    warmups = {
        "warmup_steps": arguments.get_warmup_steps(total),
        "quantization_warmup_steps": getattr(arguments, "quantization_warmup_steps", 0),
    }
    for name, steps in warmups.items():
        if steps and 0 < total <= steps:
            raise ValueError(
                f"{name}={steps} does not end within the {total} steps of the training; give fewer, or train longer"
            )

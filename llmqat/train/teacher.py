"""A teacher is another model than the student, in full precision, and stays what it is while the student trains."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from llmqat.layers import ActivationQuantizer, KVQuantizer, PackedModule, QuantModule
from llmqat.models import shortened

logger = logging.getLogger(__name__)


def check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError where `teacher` is `model`, is prepared itself, or would change while `model` trains.

    A packed teacher is allowed, with a warning. The two models may share weights that are not trained (under adapters,
    or with trainable="scales").

    Args:
        model: the student, with what trains chosen and raised to its masters.
        teacher: the model that it is to be like.
    """
    copied = "give the original model, loaded again or made by copy.deepcopy(model) before llmqat.prepare"
    if teacher is model or any(teacher is module for module in model.modules()):
        raise ValueError(
            f"the teacher is the model that is trained; {copied} (or teacher=None with adapters: the model with its "
            "quantizers off is its own teacher then)"
        )
    if any(isinstance(module, PackedModule) for module in teacher.modules()):
        logger.warning("the teacher is packed, so the student learns what rounding has left of the original model")
    elif prepared := [name for name, module in teacher.named_modules() if _quantizes(module)]:
        raise ValueError(f"the teacher is prepared itself: {shortened(prepared)} are quantized; {copied}")
    if shared := shared_with(model, teacher):
        raise ValueError(
            f"the teacher shares memory with what is trained ({shortened(shared)}), so it would change along; {copied}"
        )


def shared_with(model: nn.Module, teacher: nn.Module) -> list[str]:
    """Returns the names of trainable parameters of `model` whose memory a parameter or buffer of `teacher` lies in."""
    known = sorted(
        (*span, None) for tensor in (*teacher.parameters(), *teacher.buffers()) if (span := _span(tensor)) is not None
    )
    trained = sorted(
        (*span, name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (span := _span(parameter)) is not None
    )
    found, place = [], 0
    for device, begin, end, name in trained:
        while place < len(known) and (known[place][0], known[place][2]) <= (device, begin):
            place += 1
        if place < len(known) and known[place][0] == device and known[place][1] < end:
            found.append(name)
    return found


def _quantizes(module: nn.Module) -> bool:
    return isinstance(module, (QuantModule, ActivationQuantizer, KVQuantizer)) and module.enabled


def _span(tensor: Tensor) -> tuple[str, int, int] | None:
    """Returns the device and the first and last address of a tensor; None where it has none of its own."""
    if tensor.device.type == "meta" or hasattr(tensor, "to_local") or tensor.numel() == 0:
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return str(tensor.device), begin, begin + (last + 1) * tensor.element_size()

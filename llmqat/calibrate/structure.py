"""Which layers read the output of which normalization, found by running a few tokens through the model.

Smoothing and rotation fold things from a norm into the layers that read it, in any architecture. No modeling file is
consulted: every norm's output and every reader's input is looked at in one forward, and equal memory means that one
reads the other.

Letters: D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmqat.calibrate.forward import input_of
from llmqat.layers import QuantModule, linear_maps, model_kind, note_moved
from llmqat.layers.probe import probe_inputs
from llmqat.models import output_head

TOLERANCE = 2e-3
"""Largest change of a logit, as a share of the logits' standard deviation, that counts as rounding in float32."""


@dataclass
class Norm:
    """A normalization and who reads its output.

    Attributes:
        module: the norm.
        offset: 1 where the norm multiplies with 1 + weight (Gemma), else 0.
        readers: modules that multiply its output with a weight of theirs, by name: linear layers, output head, routers,
            experts.
        source: name of the linear layer whose output it normalizes, or empty.
    """

    module: nn.Module
    offset: float
    source: str = ""
    readers: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def gain(self) -> Tensor:
        """What the norm multiplies with, [D]."""
        return self.module.weight.detach() + self.offset  # type: ignore[operator]

    @torch.no_grad()
    def set_gain(self, gain: Tensor) -> None:
        """Makes the norm multiply with `gain` [D]."""
        weight = self.module.get_parameter("weight")
        weight.copy_(gain - self.offset)


@torch.no_grad()
def find_norms(model: nn.Module) -> dict[str, Norm]:
    """Returns the norms of `model` by name, with their readers; runs a few tokens through it."""
    offsets = {
        name: _offset(module)
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    norms = {name: Norm(model.get_submodule(name), offset) for name, offset in offsets.items() if offset is not None}
    maps = {id(entry.owner) for entry in linear_maps(model).values()}
    head = output_head(model)
    readers = {
        name: module
        for name, module in model.named_modules()
        if id(module) in maps or module is head or _has_own_matrix(module)
    }
    trace = _Trace(norms)
    with ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.module.register_forward_hook(trace.after_norm(name), with_kwargs=True).remove)
        for name, module in readers.items():
            stack.callback(module.register_forward_pre_hook(trace.before_reader(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(trace.after_reader(name)).remove)
        _probe(model)
    return norms


class _Trace:
    """Notes, during one forward, which memory was written by whom, and who reads it."""

    def __init__(self, norms: dict[str, Norm]) -> None:
        self.norms = norms
        self.by_norm: dict[int, str] = {}
        self.by_reader: dict[int, str] = {}
        self.kept: list[Tensor] = []  # so that no memory is used again during the forward

    def after_norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> None:
            self.kept.append(output)
            self.by_norm[output.data_ptr()] = name
            self.norms[name].source = self.by_reader.get(input_of(inputs, options).data_ptr(), "")

        return hook

    def before_reader(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            for value in (*inputs, *options.values()):
                if isinstance(value, Tensor) and value.data_ptr() in self.by_norm:
                    self.norms[self.by_norm[value.data_ptr()]].readers[name] = module

        return hook

    def after_reader(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.kept.append(output)
                self.by_reader[output.data_ptr()] = name

        return hook


def input_last(reader: nn.Module) -> Tensor:
    """Returns the weight of a linear layer, Conv1D or output head as [O, I], sharing its memory."""
    weight: Tensor = reader.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(reader, Conv1D) else weight


def check_foldable(model: nn.Module, what: str) -> None:
    """Raises ValueError for a model that `what` (smoothing, rotation) cannot go into: prepared, or not in float32."""
    if any(isinstance(module, QuantModule) for module in model.modules()):
        raise ValueError(f"the model is prepared already; {what} goes into the original model first, then prepare it")
    other = next((parameter.dtype for parameter in model.parameters() if parameter.dtype != torch.float32), None)
    if other is not None:
        raise ValueError(f"{what} needs the model in float32, not {other}; load it with dtype=torch.float32")


@contextmanager
def unchanged_logits(model: nn.Module, what: str) -> Iterator[None]:
    """Checks that what happens inside leaves the full-precision logits of a probe as they were, within rounding.

    Notes in the model that its weights are others now.

    Raises:
        ValueError: when it does not; `what` was done to the model, which must then be loaded anew.
    """
    before = _probe(model)
    note_moved(model)
    yield
    change = float((_probe(model) - before).abs().max() / before.std())
    if not change <= TOLERANCE:
        raise ValueError(
            f"{what} changed the full-precision logits of {model_kind(model)} by {change:.3g} of their spread, so it "
            "does not fit this architecture; load the model anew and leave it out"
        )


@torch.no_grad()
def _probe(model: nn.Module) -> Tensor:
    training = model.training
    model.eval()
    try:
        logits: Tensor = model(**probe_inputs(model), use_cache=False).logits
    finally:
        model.train(training)
    return logits.float()


def _has_own_matrix(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return False
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


@torch.no_grad()
def _offset(norm: nn.Module) -> float | None:
    """Returns 1.0 for a norm that multiplies with 1 + weight, by what it gives for a weight of zeros; else 0.0.

    None for a norm that asks for more than its input, such as a gate.
    """
    weight = norm.get_parameter("weight")
    own = weight.detach().clone()
    example = torch.ones(1, 1, weight.numel(), dtype=weight.dtype, device=weight.device)
    example[..., ::2] = -1
    bias = getattr(norm, "bias", None)
    shift = torch.zeros_like(example) if bias is None else bias.detach().expand_as(example)
    weight.zero_()
    try:
        zero = bool(torch.allclose(norm(example).float(), shift.float(), atol=1e-3))
    except (TypeError, AttributeError):
        return None
    finally:
        weight.copy_(own)
    return 0.0 if zero else 1.0

"""A forward whose parameters read in another dtype, so that training computes what the checkpoint will."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from llmqat.kernels import WeightPages, pages
from llmqat.layers import (
    QUANTIZER_PARAMETERS,
    PackedModule,
    QuantModule,
    kept_in_float32,
    without_adapters,
)
from llmqat.layers.buffers import buffers_of_checkpoint
from llmqat.models.visits import named_blocks, visited_device


@contextmanager
def cast_parameters(model: nn.Module, dtype: torch.dtype, stays: Callable[[str], bool] | None = None) -> Iterator[None]:
    """Inside, every float parameter that no quantizer handles reads as `parameter.to(dtype)`, with gradients.

    The exported checkpoint holds norms, embeddings and biases in `dtype`; with this the training forward uses those
    numbers too, and the residual stream runs in `dtype`. It must enclose the backward pass as well, so that gradient
    checkpointing recomputes the same forward. Tied parameters stay tied. Parameters that have `dtype` already are left
    alone, and so are those of quantizers and adapters. Buffers of a prepared model become those that a model loaded
    from the checkpoint has.

    Args:
        model: the unwrapped model, or a part of one.
        dtype: what parameters read as.
        stays: returns whether the parameter of a given name is left alone. By default these are the ones that
            transformers keeps in float32, which only a whole model knows.
    """
    stays = kept_in_float32(model) if stays is None else stays
    names = {module: found for module, found in _cast_names(model, dtype, stays).items() if found}
    quantizers = [(module, module.compute_dtype) for module in model.modules() if isinstance(module, QuantModule)]
    late = _cast_later(model, names)
    at_once = {module: found for module, found in names.items() if module not in late}
    try:
        for quantizer, _ in quantizers:
            quantizer.compute_dtype = dtype
        with (
            buffers_of_checkpoint(without_adapters(model), dtype),
            _cast_at_once(at_once, dtype),
            _cast_within_forwards(late, dtype),
        ):
            yield
    finally:
        for quantizer, before in quantizers:
            quantizer.compute_dtype = before


def _cast_later(model: nn.Module, names: Mapping[nn.Module, list[str]]) -> dict[nn.Module, list[str]]:
    """Returns those of `names`, parameters by their module, that are cast when the module's forward begins.

    All where FSDP2 gathers them then. Those of the blocks where a whole model lies in files or comes to a GPU block by
    block: it may be larger than memory, and so would be the casts.
    """
    if is_sharded(model):
        return dict(names)
    if not isinstance(model, PreTrainedModel):
        return {}
    if visited_device(model) is None:
        # Asked for in every training step, where norms and embeddings alone are cast: files are looked for last.
        size = sum(getattr(module, name).nbytes for module, found in names.items() for name in found)
        if size < pages.LEAST_BYTES or not WeightPages(model):
            return {}
    inside = {module for block in named_blocks(model).values() for module in block.modules()}
    return {module: found for module, found in names.items() if module in inside}


def is_sharded(model: nn.Module) -> bool:
    """Returns whether FSDP2 holds parameters of `model`, which are then whole only within a forward or backward."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _cast_names(model: nn.Module, dtype: torch.dtype, stays: Callable[[str], bool]) -> dict[nn.Module, list[str]]:
    """Returns the names of each module's own parameters that are to be read in `dtype`."""
    layers = [module for module in model.modules() if isinstance(module, QuantModule)]
    factors = {id(factor) for layer in layers for adapter in layer.adapters for factor in adapter.factors()}

    def is_cast(prefix: str, module: nn.Module, name: str, parameter: Tensor | None) -> bool:
        if parameter is None or parameter.dtype == dtype or not parameter.is_floating_point():
            return False
        if name in QUANTIZER_PARAMETERS and isinstance(module, (QuantModule, PackedModule)):
            return False
        return id(parameter) not in factors and not stays(f"{prefix}.{name}")

    return {
        module: [name for name, parameter in module._parameters.items() if is_cast(prefix, module, name, parameter)]
        for prefix, module in model.named_modules()
    }


@contextmanager
def _cast_at_once(names: Mapping[nn.Module, list[str]], dtype: torch.dtype) -> Iterator[None]:
    """Inside, the named parameters are replaced by one cast each."""
    casts: dict[int, Tensor] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for module, own in names.items():
            for name in own:
                parameter = module._parameters[name]
                assert parameter is not None
                if id(parameter) not in casts:
                    casts[id(parameter)] = parameter.to(dtype)
                replaced.append((module, name, parameter))
                module._parameters[name] = casts[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


@contextmanager
def _cast_within_forwards(names: Mapping[nn.Module, list[str]], dtype: torch.dtype) -> Iterator[None]:
    """Inside, each module casts its named parameters when its forward begins, where FSDP2 has gathered them."""
    waiting: dict[nn.Module, list[dict[str, nn.Parameter | None]]] = {module: [] for module in names}

    def cast(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        waiting[module].append({name: module._parameters[name] for name in names[module]})
        for name, parameter in waiting[module][-1].items():
            assert parameter is not None
            module._parameters[name] = parameter.to(dtype)  # type: ignore[assignment]

    def restore(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        module._parameters.update(waiting[module].pop())

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(cast).remove)
            # Before FSDP2's own hook lets the parameters go, and when recomputation ends a forward early.
            stack.callback(module.register_forward_hook(restore, prepend=True, always_call=True).remove)
        yield

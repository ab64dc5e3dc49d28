"""What is asked of a causal language model whatever its architecture: its hidden states, its head, its logits.

The hidden states that enter the output head are wanted so that losses can make logits a few tokens at a time.

Letters: B batch, L length, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedModel,
)

from llmqat.layers import (
    PackedModule,
    QuantModule,
    TiedHead,
    kv_heads,
    quantizers_off,
    without_adapter,
    without_adapters,
)
from llmqat.models.specs import check_next_token

MOST_DOCUMENT_DIFFERENCE = 0.05
"""Relative difference of a packed document's hidden states from its own alone that is rounding (bfloat16), no more."""
_HEAD_NOT_REACHED = "the forward did not reach the model's output head; is it a causal language model?"


@dataclass
class CapturedHidden:
    """Holds, after a forward inside `capture_hidden`, the input of the output head."""

    hidden: Tensor | None = None

    def take(self) -> Tensor:
        """Returns the hidden states [B, L, D] of the last forward and forgets them.

        Raises:
            RuntimeError: when no forward reached the output head.
        """
        if self.hidden is None:
            raise RuntimeError(_HEAD_NOT_REACHED)
        hidden, self.hidden = self.hidden, None
        return hidden


@contextmanager
def capture_hidden(model: nn.Module) -> Iterator[CapturedHidden]:
    """Inside, a forward of `model` stops short of its output head and leaves the head's input in the yielded object.

    The head returns a tensor [B, L, 1] in place of logits, so no [B, L, V] tensor is ever made. This works through
    wrappers (DDP), because the forward itself is the model's own.

    Args:
        model: a transformers causal language model (not a wrapper of one).
    """
    captured = CapturedHidden()

    def stand_in(hidden: Tensor) -> Tensor:
        captured.hidden = hidden
        return hidden[..., :1]

    with _in_place_of_head(model, stand_in):
        yield captured


@contextmanager
def loss_in_forward(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a forward of `model` returns `loss_of(hidden)`, made where the output head runs, and makes no logits.

    FSDP2 and ZeRO-3 gather parameters only for the forward pass, so only there is the head's weight whole. Head and
    model return the loss, so a wrapper that hooks their outputs sees where the backward pass begins.

    Args:
        model: a causal language model, perhaps inside peft's wrapper of a model, but in no other wrapper.
        loss_of: given the head's input [B, L, D], returns a scalar.
    """
    made: list[Tensor] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the loss makes its own gradient
    def stand_in(hidden: Tensor) -> Tensor:
        # As wide as logits may be: models scale and cap what their head gives.
        return loss_of(hidden).expand(*hidden.shape[:-1], 1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        made[:] = [output]

    def give(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        if not made:
            raise RuntimeError(_HEAD_NOT_REACHED)
        return made.pop().flatten()[0]

    own = without_adapters(model)
    handles = (
        output_head(own).register_forward_hook(keep),  # after the wrapper's own: ZeRO-3 gathers the head again by them
        model.register_forward_hook(give, prepend=True),  # before the wrapper's own, which look at the output
    )
    try:
        with _in_place_of_head(own, stand_in):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_place_of_head(model: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `stand_in` is what the output head of `model` computes; its hooks stay its own."""
    check_next_token(model)
    head = output_head(model)
    own = head.__dict__.get("forward")  # accelerate's device hooks are such a forward of the instance
    head.forward = stand_in
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def output_head(model: nn.Module) -> nn.Module:
    """Returns the module that makes logits from hidden states.

    Raises:
        ValueError: when the model has none.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no output head; llmqat evaluates and trains causal language models"
        )
    return head


def head_weight(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns the output head's weight [V, D] and bias [V] or None; a quantized weight as the forward computes with it.

    Inside `cast_parameters` both are in its dtype. Made anew at each call where the head is quantized.
    """
    bias: Tensor | None = getattr(output_head(model), "bias", None)
    source = _head_source(model)
    if isinstance(source, QuantModule):
        dtype = source.compute_dtype or source.weight.dtype
        return source.quantized_weight(dtype), None if bias is None else bias.to(dtype)
    if isinstance(source, PackedModule):
        return source.dequantized_weight(source.dtype), bias
    weight: Any = source.weight
    # Of a teacher that is sharded itself, whose forward is over.
    return weight.full_tensor() if isinstance(weight, DTensor) else weight, bias


def vocabulary_size(model: nn.Module) -> int:
    """Returns the number of logits that the output head makes."""
    source: Any = _head_source(model)
    return int(source.rows if isinstance(source, (QuantModule, PackedModule)) else source.weight.shape[0])


class Heads(NamedTuple):
    """Attention's heads as a configuration states them."""

    queries: int
    keys: int
    """Heads of keys, and as many of values."""
    size: int


def heads_of(config: Any) -> Heads:
    """Returns the heads of a text model's `config`; a model without attention counts as one head of its width."""
    if not getattr(config, "num_attention_heads", None):
        return Heads(1, 1, int(config.hidden_size))
    queries = config.num_attention_heads
    return Heads(queries, kv_heads(config), int(getattr(config, "head_dim", None) or config.hidden_size // queries))


def _head_source(model: nn.Module) -> nn.Module:
    """Returns the module that holds the head's weight: the embedding, where the head is tied to a quantized one."""
    head = _active_copy(output_head(model))
    inner = without_adapter(head)
    if inner is not head:
        if not isinstance(inner, (QuantModule, PackedModule)):
            raise ValueError("an adapter on an output head that is not quantized is not trained; leave the head out")
        return inner
    return head.embedding if isinstance(head, TiedHead) else head


def _active_copy(head: nn.Module) -> nn.Module:
    """Returns the copy of the head that peft's `modules_to_save` trains, where it is active, or `head` itself."""
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    active = [name for name in head.active_adapters if name in copies]  # type: ignore[union-attr]
    found: nn.Module = copies[active[0]] if active and not head.disable_adapters else head.original_module  # type: ignore[assignment]
    return found


def model_device(model: nn.Module) -> torch.device:
    """Returns the device that the model's inputs belong on."""
    return next(tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def uploaded(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Returns `tensor` on `device`, in `dtype` if given; a copy from pageable memory to CUDA does not block.

    CUDA has read pageable memory when such a copy returns, so the caller may overwrite it at once. For pinned memory
    that does not hold, so its copy blocks.
    """
    at_once = tensor.device.type == "cpu" and torch.device(device).type in ("cpu", "cuda") and not tensor.is_pinned()
    return tensor.to(device, dtype or tensor.dtype, non_blocking=at_once)


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Returns whether `model` keeps the documents of a row apart where position ids restart at 0.

    This is tried on 16 tokens: the second of two documents must give the hidden states that it gives alone. Models that
    do not keep documents apart, such as Falcon, BLOOM and OPT, differ by tens of percent. Quantizers are off meanwhile:
    inputs of few bits make several percent of the last digit (SmolLM2-135M in float32: w8a8 9 %, fp8 6 %, plain 1e-6).
    """
    device, training = model_device(model), model.training
    ids = torch.randint(vocabulary_size(model), (1, 16), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None].to(device)
    model.eval()
    try:
        with quantizers_off(model), capture_hidden(model) as captured:
            model(input_ids=ids, position_ids=positions, use_cache=False)
            packed = captured.take()[:, 7:].float()
            model(input_ids=ids[:, 7:], use_cache=False)
            alone = captured.take().float()
    except TypeError:  # a forward without position ids
        return False
    finally:
        model.train(training)
    return float((packed - alone).norm()) < MOST_DOCUMENT_DIFFERENCE * float(alone.norm())


def logit_transform(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Returns what the model does to logits after its head (scaling, soft-capping), or None for nothing.

    Args:
        config: a transformers model configuration (Cohere's `logit_scale`, Granite's `logits_scaling`, Falcon-H1's
            `lm_head_multiplier`, Muse's `output_multiplier`, Gemma's `final_logit_softcapping` and its other names).
    """
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    names: tuple[str, ...] = ("logit_scale", "lm_head_multiplier", "output_multiplier")
    if getattr(config, "model_type", None) == "mpt":  # whose configuration has one that its model does not read
        names = ()
    factor = next((getattr(config, name) for name in names if getattr(config, name, None)), 1.0)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    if getattr(config, "model_type", None) == "hyperclovax":  # the only one that multiplies by it
        divisor = 1 / divisor
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    cap = next((getattr(config, name) for name in caps if getattr(config, name, None) is not None), None)
    if factor == 1.0 and divisor == 1.0 and cap is None:
        return None

    def transform(logits: Tensor) -> Tensor:
        logits = logits * (factor / divisor)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform

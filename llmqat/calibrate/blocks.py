"""A model walked block by block, with two chains of hidden states side by side: full precision and quantized.

What a transformer block gets besides hidden states (masks, positions, rotary tables) is recorded from the model's own
forward, block by block; from then on a block is run alone. So a calibration holds one block's graph at a time, whatever
the depth of the model, and no modeling file is known. Blocks are the modules that transformers names for splitting a
model over devices (`_no_split_modules`). A model that changes hidden states between its blocks is refused.

Letters: N token blocks, L length, B token blocks in a batch, D hidden size.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.layers import QuantModule, model_kind, quantized_once, quantizers_off
from llmqat.models import capture_hidden, cast_parameters, model_device


@dataclass
class Block:
    """A transformer block, and what its forward gets besides hidden states.

    Attributes:
        index: its number.
        name: dotted name of the module.
        module: the module.
        dtype: what it computes in, and what its hidden states are kept in.
        calls: batch size -> (name of the argument that takes hidden states or None for the first, other positional
            arguments, keyword arguments).
    """

    index: int
    name: str
    module: nn.Module
    dtype: torch.dtype = torch.bfloat16
    calls: dict[int, tuple[str | None, tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Returns the hidden states [B, L, D] after the block; its parameters are read as they are."""
        keyword, others, options = self.calls[hidden.shape[0]]
        output = (
            self.module(hidden, *others, **options) if keyword is None else self.module(**{keyword: hidden}, **options)
        )
        return output if isinstance(output, Tensor) else output[0]

    def quantized(self) -> dict[str, QuantModule]:
        """Returns the quantized weights in the block, by full name."""
        return {
            f"{self.name}.{name}": module
            for name, module in self.module.named_modules()
            if isinstance(module, QuantModule)
        }

    @torch.no_grad()
    def run(self, hidden: Tensor, out: Tensor, batch_size: int) -> Tensor:
        """Writes the hidden states after the block to `out` [N, L, D], which may be `hidden` itself; returns `out`."""
        device = model_device(self.module)
        with cast_parameters(self.module, self.dtype), quantized_once(self.module):
            for rows in _batches(hidden.shape[0], batch_size):
                out[rows] = self(hidden[rows].to(device)).to(out.device)
        return out

    @torch.no_grad()
    def run_until(self, layer: nn.Module, record: Callable[[Tensor], None], hidden: Tensor, batch_size: int) -> None:
        """Shows `record` the inputs of `layer`, a module of the block, for hidden states [N, L, D]; goes no further."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            record(inputs[0])
            raise _Reached

        device, handle = model_device(self.module), layer.register_forward_pre_hook(hook)
        try:
            with cast_parameters(self.module, self.dtype), quantized_once(self.module):
                for rows in _batches(hidden.shape[0], batch_size):
                    with suppress(_Reached):
                        self(hidden[rows].to(device))
        finally:
            handle.remove()

    def run_full(self, hidden: Tensor, out: Tensor, batch_size: int) -> Tensor:
        """Writes what the block gives with its quantizers off to `out`, as `run` does."""
        with quantizers_off(self.module):
            return self.run(hidden, out, batch_size)


@dataclass
class Walk:
    """The blocks of a model, and the hidden states that reach the first of them.

    Attributes:
        blocks: in order.
        full: [N, L, D] in the blocks' dtype, of the full-precision chain.
        quantized: the same of the quantized chain; it differs where embeddings are quantized.
    """

    blocks: list[Block]
    full: Tensor
    quantized: Tensor


class _Reached(Exception):
    """Ends a forward at the first block."""


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the transformer blocks of `model` that hold quantized weights, by name, in order.

    Raises:
        ValueError: when transformers names no such block.
    """
    found = _blocks(model)
    if not found:
        kinds = getattr(model, "_no_split_modules", None) or ()
        raise ValueError(
            f"{model_kind(model)} has no transformer block with quantized weights (_no_split_modules: {list(kinds)}), "
            "so it cannot be walked block by block; leave the stages gptq and blockwise out"
        )
    return found


def has_blocks(model: nn.Module) -> bool:
    """Returns whether `model` has transformer blocks with quantized weights that transformers names."""
    return bool(_blocks(model))


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    kinds = getattr(model, "_no_split_modules", None) or ()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and any(isinstance(inner, QuantModule) for inner in module.modules())
    }


@torch.no_grad()
def open_walk(
    model: nn.Module,
    ids: Tensor,
    batch_size: int,
    memory_limit: float = math.inf,
    dtype: torch.dtype = torch.bfloat16,
) -> Walk:
    """Returns the walk over `model` for the token blocks `ids` [N, L].

    Args:
        model: a prepared causal language model.
        ids: token ids.
        batch_size: token blocks in a forward.
        memory_limit: bytes of both chains together above which they lie in temporary files.
        dtype: what is computed in, and what hidden states are kept in.

    Raises:
        ValueError: when there is no token block, or the model changes hidden states between its blocks.
    """
    if ids.shape[0] == 0:
        raise ValueError("calibration got no token block; give it at least one")
    blocks = [Block(index, name, module, dtype) for index, (name, module) in enumerate(find_blocks(model).items())]
    device, training = model_device(model), model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        model.eval()
        stack.enter_context(cast_parameters(model, dtype))
        with quantizers_off(model), capture_hidden(model):
            for size in {min(batch_size, ids.shape[0]), ids.shape[0] % batch_size} - {0}:
                _record_calls(model, blocks, ids[:size].to(device))
        chains = _hidden_states(ids, _first_input(model, blocks[0], ids[:1].to(device)).shape[-1], memory_limit, dtype)
        for rows in _batches(ids.shape[0], batch_size):
            chains[1][rows] = _first_input(model, blocks[0], ids[rows].to(device)).to(chains[1].device)
            with quantizers_off(model):
                chains[0][rows] = _first_input(model, blocks[0], ids[rows].to(device)).to(chains[0].device)
    return Walk(blocks, *chains)


def _record_calls(model: nn.Module, blocks: list[Block], ids: Tensor) -> None:
    """Runs `ids` through the model and notes what each block gets; checks that each takes over from the one before."""
    outputs: list[Tensor] = []

    def before(block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            keyword = None if inputs else "hidden_states"
            hidden = inputs[0] if inputs else options["hidden_states"]
            if outputs and not torch.equal(outputs.pop(), hidden):
                raise ValueError(
                    f"{model_kind(model)} changes hidden states between its blocks (before {block.name}), so it cannot "
                    "be walked block by block; leave the stages gptq and blockwise out"
                )
            others = {key: value for key, value in options.items() if key != keyword}
            block.calls[ids.shape[0]] = keyword, inputs[1:], others

        return hook

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outputs[:] = [output if isinstance(output, Tensor) else output[0]]

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.module.register_forward_pre_hook(before(block), with_kwargs=True).remove)
            stack.callback(block.module.register_forward_hook(after).remove)
        model(input_ids=ids, use_cache=False)


def _first_input(model: nn.Module, block: Block, ids: Tensor) -> Tensor:
    """Returns the hidden states that reach the first block; the forward goes no further."""
    reached: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        reached.append(inputs[0] if inputs else options["hidden_states"])
        raise _Reached

    handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_Reached):
            model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return reached[0].to(block.dtype)


def _hidden_states(ids: Tensor, width: int, memory_limit: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns room for two chains of hidden states [N, L, D]: in memory, or in files where they take too much of it."""
    shape = (*ids.shape, width)
    size = math.prod(shape)
    if 2 * size * dtype.itemsize <= memory_limit:
        return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="llmqat-") as folder:  # a mapping outlives the name of its file
        files = (str(Path(folder) / name) for name in ("full", "quantized"))
        full, quantized = (torch.from_file(file, True, size, dtype=dtype).view(shape) for file in files)
    return full, quantized


def _batches(count: int, batch_size: int) -> Iterator[slice]:
    for start in range(0, count, batch_size):
        yield slice(start, min(start + batch_size, count))

"""A model walked block by block, with two chains of hidden states side by side: full precision and quantized.

What a transformer block gets besides hidden states (masks, positions, rotary tables) is recorded from the model's own
forward, block by block; from then on a block is run alone. So a calibration holds one block's graph at a time, whatever
the depth of the model, and no modeling file is known. Where documents within token blocks are kept apart, what a block
gets differs from one token block to the next, and is recorded for each. Blocks are the modules that transformers names
for splitting a model over devices (`_no_split_modules`). A model that changes hidden states between its blocks is
refused.

Letters: N token blocks, L length, B token blocks in a batch, D hidden size.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.data.blocks import Rows, rows_of
from llmqat.data.processes import ALONE, Processes
from llmqat.layers import QuantModule, model_kind, quantized_once, quantizers_off
from llmqat.models import capture_hidden, cast_parameters, model_device

Call = tuple[str | None, tuple[Any, ...], dict[str, Any]]
"""Name of the argument that takes hidden states, or None for the first; other positional arguments; keyword arguments.
"""


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
        calls_of_rows: the same for each token block, at batch size 1; empty where all get the same.
    """

    index: int
    name: str
    module: nn.Module
    dtype: torch.dtype = torch.bfloat16
    calls: dict[int, Call] = field(default_factory=dict)
    calls_of_rows: list[Call] = field(default_factory=list)

    def __call__(self, hidden: Tensor, rows: slice | Tensor) -> Tensor:
        """Returns the hidden states [B, L, D] after the block; its parameters are read as they are.

        Args:
            hidden: before the block.
            rows: which token blocks of the walk they are.
        """
        keyword, others, options = self.calls[hidden.shape[0]] if self.calls else self._call_of(rows)
        output = (
            self.module(hidden, *others, **options) if keyword is None else self.module(**{keyword: hidden}, **options)
        )
        return output if isinstance(output, Tensor) else output[0]

    def _call_of(self, rows: slice | Tensor) -> Call:
        calls = self.calls_of_rows[rows] if isinstance(rows, slice) else [self.calls_of_rows[row] for row in rows]
        keyword, others, options = zip(*calls, strict=True)
        return keyword[0], _joined(others), _joined(options)

    def quantized(self) -> dict[str, QuantModule]:
        """Returns the quantized weights in the block, by full name."""
        return {
            f"{self.name}.{name}": module
            for name, module in self.module.named_modules()
            if isinstance(module, QuantModule)
        }

    @torch.no_grad()
    def run(self, hidden: Tensor, out: Tensor, batch_size: int, processes: Processes = ALONE) -> Tensor:
        """Writes the hidden states after the block to `out` [N, L, D], which may be `hidden` itself; returns `out`.

        `processes` share the batches, and all get the states of all of them.
        """
        device, batches = model_device(self.module), list(_batches(hidden.shape[0], batch_size))
        with cast_parameters(self.module, self.dtype), quantized_once(self.module):
            for rows in processes.share(batches):
                out[rows] = self(hidden[rows].to(device), rows).to(out.device)
        for index, rows in enumerate(batches):
            processes.copy([out[rows]], processes.owner(index))
        return out

    @torch.no_grad()
    def run_until(
        self,
        layer: nn.Module,
        record: Callable[[Tensor], None],
        hidden: Tensor,
        batch_size: int,
        processes: Processes = ALONE,
    ) -> None:
        """Shows `record` the inputs of `layer`, a module of the block, for hidden states [N, L, D]; goes no further.

        `processes` share the batches; each records its own.
        """

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            record(inputs[0])
            raise _Reached

        device, handle = model_device(self.module), layer.register_forward_pre_hook(hook)
        try:
            with cast_parameters(self.module, self.dtype), quantized_once(self.module):
                for rows in processes.share(list(_batches(hidden.shape[0], batch_size))):
                    with suppress(_Reached):
                        self(hidden[rows].to(device), rows)
        finally:
            handle.remove()

    def run_full(self, hidden: Tensor, out: Tensor, batch_size: int, processes: Processes = ALONE) -> Tensor:
        """Writes what the block gives with its quantizers off to `out`, as `run` does."""
        with quantizers_off(self.module):
            return self.run(hidden, out, batch_size, processes)


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
    ids: Tensor | Rows,
    batch_size: int,
    memory_limit: float = math.inf,
    dtype: torch.dtype = torch.bfloat16,
    processes: Processes = ALONE,
) -> Walk:
    """Returns the walk over `model` for token blocks.

    Args:
        model: a prepared causal language model.
        ids: token ids [N, L], or token blocks with their documents.
        batch_size: token blocks in a forward.
        memory_limit: bytes of both chains together above which they lie in temporary files.
        dtype: what is computed in, and what hidden states are kept in.
        processes: those that will share the token blocks of a batch.

    Raises:
        ValueError: when there is no token block, or the model changes hidden states between its blocks.
    """
    rows = rows_of(ids)
    if len(rows) == 0:
        raise ValueError("calibration got no token block; give it at least one")
    blocks = [Block(index, name, module, dtype) for index, (name, module) in enumerate(find_blocks(model).items())]
    device, training = model_device(model), model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        model.eval()
        stack.enter_context(cast_parameters(model, dtype))
        with quantizers_off(model), capture_hidden(model):
            _record_calls(model, blocks, rows, batch_size, processes)
        width = _first_input(model, blocks[0], rows[:1].inputs(device)).shape[-1]
        chains = _hidden_states(tuple(rows.stored.shape), width, memory_limit, dtype)
        for part in _batches(len(rows), batch_size):
            inputs = rows[part].inputs(device)
            chains[1][part] = _first_input(model, blocks[0], inputs).to(chains[1].device)
            with quantizers_off(model):
                chains[0][part] = _first_input(model, blocks[0], inputs).to(chains[0].device)
    return Walk(blocks, *chains)


def _record_calls(model: nn.Module, blocks: list[Block], rows: Rows, batch_size: int, processes: Processes) -> None:
    """Notes what each block gets: at each batch size, or with documents apart for each token block."""
    device = model_device(model)
    if rows.starts is None:
        sizes = {min(batch_size, len(rows)), len(rows) % batch_size}
        for size in sizes.union(len(processes.share(range(size))) for size in sizes) - {0}:
            for block, call in zip(blocks, _calls(model, blocks, rows[:size].inputs(device)), strict=True):
                block.calls[size] = call
        return
    # A token block that is one document would get no mask: each runs beside one that is two.
    two = torch.tensor([[1, 1, *[0] * (rows.stored.shape[1] - 2)]], dtype=torch.uint8)
    for index in range(len(rows)):
        row = rows[index : index + 1]
        assert row.starts is not None
        pair = Rows(row.stored.repeat(2, 1), starts=torch.cat([row.starts, two]))
        kept: dict[int, Tensor] = {}  # blocks get the same tensors
        for block, call in zip(blocks, _calls(model, blocks, pair.inputs(device)), strict=True):
            block.calls_of_rows.append(_first_row(call, kept))


def _calls(model: nn.Module, blocks: list[Block], inputs: Mapping[str, Tensor]) -> list[Call]:
    """Runs the model and returns what each block gets; checks that each takes over from the one before."""
    outputs: list[Tensor] = []
    found: list[Call] = []

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
            found.append((keyword, inputs[1:], others))

        return hook

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outputs[:] = [output if isinstance(output, Tensor) else output[0]]

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.module.register_forward_pre_hook(before(block), with_kwargs=True).remove)
            stack.callback(block.module.register_forward_hook(after).remove)
        model(**inputs, use_cache=False)
    return found


def _first_row(value: Any, kept: dict[int, Tensor]) -> Any:
    """Returns what a block got for the first of two token blocks; a tensor that `kept` has is not copied again."""
    if isinstance(value, (tuple, list)):
        return type(value)(_first_row(entry, kept) for entry in value)
    if isinstance(value, Mapping):
        return {key: _first_row(entry, kept) for key, entry in value.items()}
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == 2:
        return kept.setdefault(id(value), value[:1].clone())
    return value


def _joined(values: Sequence[Any]) -> Any:
    """Returns what single token blocks get as what they get together."""
    first = values[0]
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(entries) for entries in zip(*values, strict=True))
    if isinstance(first, Mapping):
        return {key: _joined([value[key] for value in values]) for key in first}
    return torch.cat(list(values)) if isinstance(first, Tensor) and first.dim() > 1 and len(first) == 1 else first


def _first_input(model: nn.Module, block: Block, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the hidden states that reach the first block; the forward goes no further."""
    reached: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        reached.append(inputs[0] if inputs else options["hidden_states"])
        raise _Reached

    handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_Reached):
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return reached[0].to(block.dtype)


def _hidden_states(
    blocks: tuple[int, ...], width: int, memory_limit: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns room for two chains of hidden states [N, L, D]: in memory, or in files where they take too much of it."""
    shape = (*blocks, width)
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

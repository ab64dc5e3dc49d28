"""Runs a model block by block on a text, with two chains side by side: full precision and quantized.

So a calibration holds the graph of one block at a time, whatever the depth of the model, and reads no modeling file. A
walk is right when every block gets what the model's own forward gives it. This is checked each time a walk is opened: a
few short texts of random tokens go through the model and through the walk, with quantizers off and on. The hidden
states after every block must agree up to rounding (`TOLERANCE`). Chains (chains.py) are tried from the cheapest kind to
the most faithful. A model that fits none is an error.

Letters: N token blocks, L length, B token blocks in a batch, D hidden size.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.calibrate.blocks import Block, find_blocks
from llmqat.calibrate.chains import (
    Call,
    Chain,
    PausedChain,
    Recorded,
    RecordedChain,
    Stopped,
    batches,
    first_row,
    hidden_of,
)
from llmqat.data.blocks import Rows, rows_of
from llmqat.data.processes import ALONE, Processes
from llmqat.kernels import WeightPages, float_training, weights_let_go
from llmqat.layers import kept_in_float32, model_kind, quantizers_off
from llmqat.layers.probe import probe_inputs
from llmqat.models import capture_hidden, cast_parameters, model_device, visited_device

log = logging.getLogger(__name__)

CHECK_ROWS = 3
"""Token blocks of the texts that a walk is tried on: a batch of two, and one that is left over."""
CHECK_TOKENS = 24
TOLERANCE = 0.01
"""Relative difference of hidden states that is rounding, and no more."""
_LEAVE_OUT = "leave the stages gptq and blockwise out"


@dataclass
class Walk:
    """The blocks of a model, and two chains that have reached the first of them.

    Attributes:
        blocks: in the order they run.
        full: the full-precision chain.
        quantized: the quantized chain; it differs from the start where embeddings are quantized.
    """

    blocks: list[Block]
    full: Chain
    quantized: Chain

    def __enter__(self) -> Walk:
        """Returns the walk itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets go what the chains hold."""
        self.full.close()
        self.quantized.close()


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
        memory_limit: bytes of the hidden states of both chains above which they lie in temporary files. What a model
            needs that is walked by its own forwards (`PausedChain`) lies in memory all the same.
        dtype: what is computed in, and what hidden states are kept in.
        processes: those that will share the token blocks of a batch.

    Raises:
        ValueError: when there is no token block, or no walk gives what the model's own forward gives.
    """
    rows = rows_of(ids)
    if len(rows) == 0:
        raise ValueError("calibration got no token block; give it at least one")
    named = _blocks(model, dtype)
    with _at_rest(model, dtype):
        for blocks, way in _right_ways(model, named, _sample(model, rows), dtype):
            with suppress(_Varies):
                return way(model, blocks, rows, rows, batch_size, memory_limit, dtype, processes)
    raise AssertionError("without a right way there was an error")


@torch.no_grad()
def check_walk(model: nn.Module, ids: Tensor | Rows, dtype: torch.dtype = torch.bfloat16) -> None:
    """Raises ValueError unless a walk over `model` gives what its own forward gives, after every block, on this text.

    Args:
        model: a prepared causal language model.
        ids: token ids [N, L], or token blocks with their documents; a few short ones. They are cut into batches of two.
        dtype: what is computed in.
    """
    named = _blocks(model, dtype)
    with _at_rest(model, dtype):
        next(_right_ways(model, named, rows_of(ids), dtype))


@contextmanager
def _at_rest(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `model` evaluates in `dtype`, and makes no logits."""
    training, device = model.training, model_device(model)
    model.eval()
    try:
        with cast_parameters(model, dtype), weights_let_go(model), capture_hidden(model), float_training(device):
            yield
    finally:
        model.train(training)


# Does the walk give what the model gives?


@dataclass
class _Seen:
    """What a block got and gave in a forward of the model.

    Attributes:
        block: the block.
        keyword: name of the argument that takes hidden states, or None for the first.
        others: what it got beside hidden states, positional and keyword arguments.
        takes_over: whether its hidden states are those that the block before it gave.
        hidden: what it got; None where it has no such argument, or nobody asked.
        output: hidden states that it gave; None where nobody asked.
    """

    block: Block
    keyword: str | None
    others: Call
    takes_over: bool = True
    hidden: Tensor | None = None
    output: Tensor | None = None

    @classmethod
    def of(cls, block: Block, args: tuple[Any, ...], options: dict[str, Any]) -> _Seen:
        """Returns it from the arguments of a call."""
        keyword = None if args else "hidden_states"
        hidden = args[0] if args else options.get("hidden_states")
        others = args[1:], {key: value for key, value in options.items() if key != keyword}
        return cls(block, keyword, others, hidden=hidden if isinstance(hidden, Tensor) else None)


def _sample(model: nn.Module, rows: Rows) -> Rows:
    """Returns a short text of random tokens, its documents apart where those of `rows` are."""
    length = min(CHECK_TOKENS, rows.stored.shape[1])
    ids = probe_inputs(model, CHECK_ROWS, length, seed=1)["input_ids"].cpu()
    if rows.starts is None:
        return Rows(ids)
    starts = torch.zeros_like(ids, dtype=torch.uint8)
    for row in range(CHECK_ROWS):  # two documents each, as even a single one gets a mask that way
        starts[row, [0, min(1 + 3 * row, length - 1)]] = 1
    return Rows(ids, starts=starts)


def _right_ways(
    model: nn.Module, blocks: list[Block], sample: Rows, dtype: torch.dtype
) -> Iterator[tuple[list[Block], _Way]]:
    """Yields (`blocks` in the order they run, a way to open a walk) for each way that is right on `sample`.

    The cheapest way comes first. The caller asks for the next one where the first does not fit the actual text.

    Raises:
        ValueError: when no way is left.
    """
    device = model_device(model)
    cut = batches(len(sample), 2)
    inputs = [sample[rows].inputs(device) for rows in cut]
    count, length = sample.stored.shape
    other = Rows(probe_inputs(model, count, length, seed=2)["input_ids"].cpu(), starts=sample.starts)
    with quantizers_off(model):
        full = [_observed(model, blocks, entry) for entry in inputs]
        others = [_observed(model, blocks, other[rows].inputs(device)) for rows in cut]
    for seen in (*full, *others):
        _check_reached(model, blocks, seen)
    quantized = [_observed(model, blocks, inputs[0])]
    blocks = [entry.block for entry in full[0]]
    fault = "it varies with the text"
    ways: list[_Way] = [_recorded] if all(map(_may_be_recorded, full, others)) else []
    if visited_device(model) is None:  # else every forward that waits would keep a block there
        ways.append(_paused)
    for way in ways:
        with suppress(_Varies), way(model, blocks, sample, other, 2, math.inf, dtype, ALONE) as walk:
            fault = _first_difference(walk, cut, full, quantized)
            if not fault:
                yield blocks, way
    raise ValueError(
        f"{model_kind(model)} cannot be walked block by block: what a block gets from its own forward is not found "
        f"({fault}); {_LEAVE_OUT}"
    )


def _blocks(model: nn.Module, dtype: torch.dtype) -> list[Block]:
    """Returns the blocks of `model`, each with its parameters that are not its alone."""
    found = find_blocks(model)
    holders: dict[int, set[str]] = {}
    inside: set[int] = set()
    for name, module in found.items():
        inside |= {id(inner) for inner in module.modules()}
        for parameter in module.parameters():
            holders.setdefault(id(parameter), set()).add(name)
    for module in model.modules():
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                holders.setdefault(id(parameter), set()).add("")
    shared = frozenset(key for key, names in holders.items() if len(names) > 1)
    is_wide = kept_in_float32(model)
    return [Block(index, name, module, dtype, shared, is_wide) for index, (name, module) in enumerate(found.items())]


def _observed(
    model: nn.Module, blocks: Sequence[Block], inputs: Mapping[str, Tensor], with_states: bool = True
) -> list[_Seen]:
    """Runs the model and returns what its blocks get and give, in the order they run; hidden states where asked for."""
    found: list[_Seen] = []
    last: list[Tensor] = []

    def before(block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            seen = _Seen.of(block, args, options)
            if seen.hidden is None or (last and not torch.equal(last[0], seen.hidden)):
                seen.takes_over = False
            if not with_states:
                seen.hidden = None
            found.append(seen)

        return hook

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        last[:] = [hidden_of(output)]
        if with_states:
            next(seen for seen in reversed(found) if seen.block.module is module).output = last[0].clone()

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.module.register_forward_pre_hook(before(block), with_kwargs=True).remove)
            stack.callback(block.module.register_forward_hook(after).remove)
        model(**inputs, use_cache=False)
    return found


def _check_reached(model: nn.Module, blocks: Sequence[Block], seen: Sequence[_Seen]) -> None:
    """Raises ValueError where a forward does not run each block once."""
    reached = [entry.block.name for entry in seen]
    never = [block.name for block in blocks if block.name not in reached]
    if never:
        raise ValueError(
            f"text does not reach {_listed(never)} of {model_kind(model)}, so {'it' if len(never) == 1 else 'they'} "
            f"cannot be calibrated on text; leave such layers alone (quant.ignore: ['re:{_prefix(never)}.*']), or "
            f"{_LEAVE_OUT}"
        )
    often = [block.name for block in blocks if reached.count(block.name) > 1]
    if often:
        raise ValueError(
            f"{model_kind(model)} runs {_listed(often)} {reached.count(often[0])} times in one forward, so it cannot "
            f"be walked block by block; {_LEAVE_OUT}"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more blocks" if len(names) > 3 else "")


def _prefix(names: Sequence[str]) -> str:
    """Returns the dotted path that all `names` begin with."""
    parts = [name.split(".") for name in names]
    same = [level[0] for level in zip(*parts, strict=False) if len(set(level)) == 1]
    return r"\.".join(same)


def _may_be_recorded(first: Sequence[_Seen], second: Sequence[_Seen]) -> bool:
    """Returns whether blocks take over from each other, and get the same for two texts beside hidden states."""
    return all(
        one.block is two.block and one.takes_over and two.takes_over and _equal(one.others, two.others)
        for one, two in zip(first, second, strict=True)
    )


def _equal(one: Any, two: Any) -> bool:
    """Returns whether two arguments are equal; objects that may hold a state are not, even to themselves."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.shape == two.shape and torch.equal(one, two)
    if type(one) is not type(two):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(map(_equal, one, two))
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(_equal(value, two[key]) for key, value in one.items())
    if isinstance(one, nn.Module) or callable(one):
        return one is two
    plain = (bool, int, float, str, torch.dtype, torch.device, type(None))
    return isinstance(one, plain) and one == two


def _first_difference(
    walk: Walk, cut: Sequence[slice], full: Sequence[Sequence[_Seen]], quantized: Sequence[Sequence[_Seen]]
) -> str:
    """Takes a walk to its end and returns where it leaves the model's own forwards; empty where it does not."""
    for number, block in enumerate(walk.blocks):
        with block.cast(), quantizers_off(block.module):
            tried = block(walk.full, cut[0])
        block.run_full(walk.full, walk.full)
        block.run(walk.quantized, walk.quantized)
        found = [
            *(("full-precision", walk.full[rows], seen[number]) for rows, seen in zip(cut, full, strict=True)),
            ("full-precision", tried, full[0][number]),
            ("quantized", walk.quantized[cut[0]], quantized[0][number]),
        ]
        for kind, hidden, seen in found:
            assert seen.output is not None
            difference = _difference(hidden, seen.output)
            if not difference <= TOLERANCE:
                return f"after {block.name} the {kind} hidden states are {difference:.1%} off"
        WeightPages().let_go(block.module.parameters())
    return ""


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Returns |found - wanted| / |wanted|; infinity for another shape, or other entries that are not finite."""
    wanted = wanted.to(found.device)
    finite = wanted.isfinite()
    if found.shape != wanted.shape or not torch.equal(finite, found.isfinite()):
        return math.inf
    wide, other = wanted[finite].double(), found[finite].double()
    return float((other - wide).norm() / wide.norm().clamp(min=1e-30))


# The ways to open a walk

_Way = Callable[[nn.Module, list[Block], Rows, Rows, int, float, torch.dtype, Processes], Walk]
"""(model, blocks, token blocks, those that arguments are recorded from, batch size, memory limit, dtype, processes) ->
the walk."""


class _Varies(Exception):
    """What a block gets beside hidden states is not the same for every text."""


def _paused(
    model: nn.Module,
    blocks: list[Block],
    rows: Rows,
    source: Rows,
    batch_size: int,
    memory_limit: float,
    dtype: torch.dtype,
    processes: Processes,
) -> Walk:
    """Returns a walk by the model's own forwards."""
    unit = max(1, batch_size // processes.count)
    full, quantized = (PausedChain(model, blocks, rows, unit, dtype, is_full) for is_full in (True, False))
    return Walk(blocks, full, quantized)


def _recorded(
    model: nn.Module,
    blocks: list[Block],
    rows: Rows,
    source: Rows,
    batch_size: int,
    memory_limit: float,
    dtype: torch.dtype,
    processes: Processes,
) -> Walk:
    """Returns a walk by what blocks got once.

    Raises:
        _Varies: when a block gets something else for the last token block than for the first, or the first block for
            any batch.
    """
    device = model_device(model)
    with quantizers_off(model):
        _check_constant(model, blocks, rows)
        calls = _recordings(model, blocks, source, batch_size, processes)
    first = _first_call(model, blocks[0], rows[:1].inputs(device)).hidden
    if first is None or first.shape[0] != 1:
        raise _Varies
    chains = hidden_states(2, (len(rows), *first.shape[1:]), memory_limit, dtype)
    for part in batches(len(rows), batch_size):
        inputs = rows[part].inputs(device)
        seen = _first_call(model, blocks[0], inputs)
        known = calls[blocks[0].index].of_size
        if known and not _equal(seen.others, known[part.stop - part.start]):
            raise _Varies
        with quantizers_off(model):
            clean = _first_call(model, blocks[0], inputs)
        for chain, reached in zip(chains, (clean, seen), strict=True):
            assert reached.hidden is not None
            chain[part] = reached.hidden.to(chain)
    full, quantized = (RecordedChain(hidden, batch_size, calls) for hidden in chains)
    return Walk(blocks, full, quantized)


def _check_constant(model: nn.Module, blocks: Sequence[Block], rows: Rows) -> None:
    """Raises _Varies when a block gets something else for the last token block than for the first, at full length.

    Some models hand over more when a text is long: the tokens to attend to, where there are more than are attended to.
    """
    if len(rows) == 1 or rows.stored.shape[1] <= CHECK_TOKENS:
        return  # which the check on short texts has seen
    starts = None if rows.starts is None else rows.starts[:1]
    first, last = (
        _taking_over(model, blocks, Rows(row, starts=starts).inputs(model_device(model)))
        for row in (rows.stored[:1], rows.stored[-1:])
    )
    if not _may_be_recorded(first, last):
        raise _Varies


def _recordings(
    model: nn.Module, blocks: Sequence[Block], rows: Rows, batch_size: int, processes: Processes
) -> dict[int, Recorded]:
    """Returns what each block gets, by its number: at each batch size, or with documents apart for each token block."""
    device = model_device(model)
    found = {block.index: Recorded() for block in blocks}
    if rows.starts is None:
        sizes = {min(batch_size, len(rows)), len(rows) % batch_size}
        for size in sizes.union(len(processes.share(range(size))) for size in sizes) - {0}:
            for seen in _taking_over(model, blocks, rows[:size].inputs(device)):
                found[seen.block.index].keyword = seen.keyword
                found[seen.block.index].of_size[size] = seen.others
        return found
    # transformers makes no mask for a batch of single documents, so each row runs in a batch with a row of two.
    two = torch.tensor([[1, 1, *[0] * (rows.stored.shape[1] - 2)]], dtype=torch.uint8)
    for index in range(len(rows)):
        row = rows[index : index + 1]
        assert row.starts is not None
        pair = Rows(row.stored.repeat(2, 1), starts=torch.cat([row.starts, two]))
        kept: dict[int, Tensor] = {}  # blocks get the same tensors
        for seen in _taking_over(model, blocks, pair.inputs(device)):
            found[seen.block.index].keyword = seen.keyword
            found[seen.block.index].of_row.append(first_row(seen.others, kept))
    return found


def _taking_over(model: nn.Module, blocks: Sequence[Block], inputs: Mapping[str, Tensor]) -> list[_Seen]:
    """Returns what blocks get that take over from each other.

    Raises:
        _Varies: when one does not.
    """
    found = _observed(model, blocks, inputs, with_states=False)
    if not all(seen.takes_over for seen in found):
        raise _Varies
    return found


def _first_call(model: nn.Module, block: Block, inputs: Mapping[str, Tensor]) -> _Seen:
    """Returns what reaches the first block; the forward goes no further."""
    reached: list[_Seen] = []

    def hook(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        reached.append(_Seen.of(block, args, options))
        raise Stopped

    handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(Stopped):
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return reached[0]


def hidden_states(count: int, shape: tuple[int, ...], memory_limit: float, dtype: torch.dtype) -> list[Tensor]:
    """Returns `count` tensors of a shape for hidden states: in memory, or in files where they take too much of it.

    Raises:
        OSError: the disk has no room for the files.
    """
    size = math.prod(shape)
    if count * size * dtype.itemsize <= memory_limit:
        return [torch.empty(shape, dtype=dtype) for _ in range(count)]
    with tempfile.TemporaryDirectory(prefix="llmqat-") as folder:  # a mapping outlives the name of its file
        files = [Path(folder) / str(number) for number in range(count)]
        for file in files:
            _take_room(file, size * dtype.itemsize)
        return [torch.from_file(str(file), True, size, dtype=dtype).view(shape) for file in files]


def _take_room(file: Path, size: int) -> None:
    """Makes a file of so many bytes that the disk really has: else a write to the mapped file would end the process."""
    with file.open("wb") as opened:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, size)
            else:
                opened.truncate(size)
        except OSError as error:
            raise OSError(
                f"hidden states take {size / 1e9:.1f} GB in {file.parent.parent}, which has no room ({error}); "
                "set TMPDIR to a folder on a larger disk, or take fewer token blocks"
            ) from error

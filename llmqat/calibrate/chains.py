"""Chains: the token blocks of a calibration on their way through a model, from one transformer block to the next.

A chain knows all arguments of the next block for some token blocks: hidden states, masks, positions, rotary tables,
and whatever else the model's own forward passes on. There are two kinds:

    RecordedChain   stores only hidden states, in memory or in files. The other arguments of a block are recorded once
                    and used for every batch. For models that pass the same arguments for every text, which most do.
                    Where documents are kept apart, arguments are recorded once per token block.
    PausedChain     keeps the model's own forward passes, one per batch. Each runs in a thread that waits where the next
                    block begins. So a block gets exactly what the model passes: tensors that belong to the text, keys
                    and values of earlier blocks, dictionaries that blocks write to, hidden states of any shape.
                    All that a forward pass holds at that point stays in memory.

Which kind fits a model is found by trying both against the model's own forward (walk.py).

Letters: N token blocks, L length, B token blocks in a batch, D hidden size.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llmqat.data.blocks import Rows
from llmqat.data.processes import ALONE, Processes
from llmqat.layers import model_kind, quantizers_off
from llmqat.models import cast_parameters, model_device, uploaded

if TYPE_CHECKING:
    from llmqat.calibrate.blocks import Block

Some = slice | Tensor
"""Some of a walk's token blocks, by their numbers."""
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block."""


class Stopped(Exception):
    """Ends a forward before its time."""


def hidden_of(output: Any) -> Tensor:
    """Returns the hidden states in what a block returned: the output itself, or its first entry."""
    found = output if isinstance(output, Tensor) else output[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"a transformer block returns {type(found).__name__} where hidden states are expected")
    return found


def batches(count: int, batch_size: int) -> list[slice]:
    """Returns `count` token blocks cut into batches; the last may be smaller."""
    return [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


class Chain(ABC):
    """Token blocks on their way through a model.

    Attributes:
        batches: slices of the token blocks, in order, each run as one batch.
        unit: number of token blocks that only go through a block together; 1 where each can go alone.
    """

    batches: list[slice]
    unit: int

    def __len__(self) -> int:
        """Number of token blocks."""
        return int(self.batches[-1].stop)

    @property
    def units(self) -> int:
        """Number of units."""
        return -(-len(self) // self.unit)

    @abstractmethod
    def __getitem__(self, rows: Some) -> Tensor:
        """Returns the hidden states [B, L, D], or of the model's own shape, that the last block gave for `rows`."""

    @abstractmethod
    def parts(self, units: Tensor) -> Sequence[Some]:
        """Returns the token blocks of some units, those together that go through a block in one call."""

    @abstractmethod
    def last(self, count: int, size: int) -> Sequence[slice]:
        """Returns the last `count` token blocks in parts of `size`, or as near to that as units allow."""

    @abstractmethod
    def call(self, block: Block, rows: Some) -> Call:
        """Returns the arguments that `block`, the next one, gets for the token blocks `rows`."""

    @abstractmethod
    def batches_of(self, processes: Processes) -> Sequence[slice]:
        """Returns the batches that this one of `processes` runs, in their order, where they share a run."""

    @abstractmethod
    def run(self, block: Block, into: Chain, processes: Processes = ALONE) -> None:
        """Runs `block` on all token blocks, and leaves what it gives in `into`.

        Args:
            block: the next one.
            into: this chain, which then has passed the block, or another of the same walk, which only keeps the hidden
                states.
            processes: may share the batches; all get the states of all of them.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets go what the chain holds beside hidden states."""


# What all token blocks get alike


@dataclass
class Recorded:
    """What a block gets beside hidden states.

    Attributes:
        keyword: name of the argument that takes hidden states, or None for the first.
        of_size: batch size -> other positional arguments, keyword arguments.
        of_row: the same for each token block, at batch size 1; empty where all get the same.
    """

    keyword: str | None = None
    of_size: dict[int, Call] = field(default_factory=dict)
    of_row: list[Call] = field(default_factory=list)

    def call(self, hidden: Tensor, rows: Some) -> Call:
        """Returns the arguments of the block for hidden states [B, L, D] of the token blocks `rows`."""
        others, options = self.of_size[hidden.shape[0]] if self.of_size else self._of_rows(rows)
        if self.keyword is None:
            return (hidden, *others), options
        return others, {self.keyword: hidden, **options}

    def _of_rows(self, rows: Some) -> Call:
        calls = self.of_row[rows] if isinstance(rows, slice) else [self.of_row[row] for row in rows]
        others, options = zip(*calls, strict=True)
        return _joined(others), _joined(options)


class RecordedChain(Chain):
    """Hidden states, and what every batch gets beside them."""

    unit = 1

    def __init__(self, hidden: Tensor, batch_size: int, calls: Mapping[int, Recorded]) -> None:
        """Takes hidden states [N, L, D], which the chain overwrites, and what each block gets, by its number."""
        self.hidden, self.calls = hidden, calls
        self.batches = batches(hidden.shape[0], batch_size)

    def __getitem__(self, rows: Some) -> Tensor:
        """Returns the hidden states [B, L, D] that the last block gave for `rows`."""
        return self.hidden[rows]

    def parts(self, units: Tensor) -> Sequence[Some]:
        """Returns the token blocks together."""
        return [units] if len(units) else []

    def last(self, count: int, size: int) -> Sequence[slice]:
        """Returns the last `count` token blocks in parts of `size`, which divides `count`."""
        return [slice(start, start + size) for start in range(len(self) - count, len(self), size)]

    def call(self, block: Block, rows: Some) -> Call:
        """Returns what `block` gets for `rows`."""
        return self.calls[block.index].call(uploaded(self.hidden[rows], model_device(block.module)), rows)

    def batches_of(self, processes: Processes) -> Sequence[slice]:
        """Returns the share of this one of `processes`."""
        return processes.share(self.batches)

    def run(self, block: Block, into: Chain, processes: Processes = ALONE) -> None:
        """Runs `block` on all token blocks; `processes` share the batches."""
        assert isinstance(into, RecordedChain)
        for rows in self.batches_of(processes):
            into.hidden[rows] = block(self, rows).to(into.hidden.device)
        for index, rows in enumerate(self.batches):
            processes.copy([into.hidden[rows]], processes.owner(index))

    def close(self) -> None:
        """Does nothing: arguments are small."""


def first_row(value: Any, kept: dict[int, Tensor]) -> Any:
    """Returns what a block got for the first of two token blocks; a tensor that `kept` has is not copied again."""
    if isinstance(value, (tuple, list)):
        return type(value)(first_row(entry, kept) for entry in value)
    if isinstance(value, Mapping):
        return {key: first_row(entry, kept) for key, entry in value.items()}
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


# The model's own forwards


class PausedChain(Chain):
    """The model's own forwards, one a batch, each waiting where the next block begins."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], rows: Rows, unit: int, dtype: torch.dtype, is_full: bool
    ) -> None:
        """Takes the model, its blocks, the text, token blocks a forward, and whether quantizers are off."""
        self.model, self.blocks, self.rows, self.unit = model, blocks, rows, unit
        self.dtype, self.is_full = dtype, is_full
        self.batches = batches(len(rows), unit)
        self.outputs: list[Tensor] = []
        self._forwards: list[_Forward] = []
        weakref.finalize(self, _stop, self._forwards)

    def __getitem__(self, rows: Some) -> Tensor:
        """Returns the hidden states, of the model's own shape, that the last block gave for `rows`."""
        if isinstance(rows, slice) and rows in self.batches:
            return self.outputs[self.batches.index(rows)]
        return torch.cat(self.outputs)[rows]

    def parts(self, units: Tensor) -> Sequence[Some]:
        """Returns the token blocks of some units, each by itself."""
        return [self.batches[int(unit)] for unit in units]

    def last(self, count: int, size: int) -> Sequence[slice]:
        """Returns the last batches, with `count` token blocks or some more."""
        return [rows for rows in self.batches if rows.stop > len(self) - count]

    def call(self, block: Block, rows: Some) -> Call:
        """Returns a copy of what `block` gets for `rows`, which are a batch."""
        assert isinstance(rows, slice)
        args, options = self._forward_of(block, self.batches.index(rows)).arguments
        kept: dict[int, Any] = {}
        return _copied(args, kept), _copied(options, kept)

    def batches_of(self, processes: Processes) -> Sequence[slice]:
        """Returns all of them."""
        return self.batches

    def run(self, block: Block, into: Chain, processes: Processes = ALONE) -> None:
        """Runs `block` on all token blocks; every process does all of them, since each holds its own forwards."""
        assert isinstance(into, PausedChain)
        if into is not self:
            into.outputs = [block(self, rows).detach() for rows in self.batches]
            return
        found = []
        with self._between_blocks(cast=block is not self.blocks[-1]):
            for number in range(len(self.batches)):
                forward = self._forward_of(block, number)
                args, options = forward.arguments
                output = block.module.forward(*args, **options)
                found.append(hidden_of(output).detach())
                if block is not self.blocks[-1]:
                    forward.resume(output)
        self.outputs = found

    def close(self) -> None:
        """Ends the forwards where they are."""
        _stop(self._forwards)

    def _forward_of(self, block: Block, number: int) -> _Forward:
        if not self._forwards:
            with self._between_blocks():
                for rows in self.batches:
                    inputs = self.rows[rows].inputs(model_device(self.model))
                    self._forwards.append(_Forward(self.model, self.blocks, inputs))
        forward = self._forwards[number]
        if forward.at is not block:
            raise ValueError(
                f"{model_kind(self.model)} runs {forward.at.name if forward.at else 'no block'} where another text "
                f"runs {block.name}, so it cannot be walked block by block; leave the stages gptq and blockwise out"
            )
        return forward

    @contextmanager
    def _between_blocks(self, cast: bool = True) -> Iterator[None]:
        """Inside, what lies between the blocks computes as this chain does."""
        with ExitStack() as stack:
            if cast:
                stack.enter_context(cast_parameters(self.model, self.dtype))
                if self.is_full:
                    stack.enter_context(quantizers_off(self.model))
            yield


class _Forward:
    """A forward of the model on some token blocks, in a thread of its own, that waits before each block.

    Attributes:
        at: the block that it waits for, or None when it has ended.
        arguments: what that block gets.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], inputs: Mapping[str, Tensor]) -> None:
        self.blocks = blocks
        self.at: Block | None = None
        self.arguments: Call = ((), {})
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._found: SimpleQueue[BaseException | tuple[Block, Call] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(model, inputs), daemon=True)
        with self._gates():
            self._thread.start()
            self._wait()

    def resume(self, output: Any) -> None:
        """Goes on with what the block has returned, up to the next block."""
        self.arguments = ((), {})
        with self._gates():
            self._answers.put(output)
            self._wait()

    def stop(self) -> None:
        """Ends the forward where it is."""
        self.arguments = ((), {})
        if self._thread.is_alive():
            self._answers.put(Stopped())
            self._thread.join()

    def _run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        try:
            with torch.no_grad():
                model(**inputs, use_cache=False)
            self._found.put(None)
        except BaseException as error:
            self._found.put(error)

    def _wait(self) -> None:
        found = self._found.get()
        if isinstance(found, BaseException):
            raise found
        self.at, self.arguments = found if found is not None else (None, ((), {}))

    @contextmanager
    def _gates(self) -> Iterator[None]:
        """Inside, a block that is called hands its arguments over and waits for what it is to return."""

        def gate(block: Block) -> Callable[..., Any]:
            def forward(*args: Any, **options: Any) -> Any:
                self._found.put((block, (args, options)))
                answer = self._answers.get()
                if isinstance(answer, Stopped):
                    raise answer
                return answer

            return forward

        own = [block.module.__dict__.get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.module.forward = gate(block)
            yield
        finally:
            for block, before in zip(self.blocks, own, strict=True):
                if before is None:
                    del block.module.forward
                else:
                    block.module.forward = before


def _stop(forwards: list[_Forward]) -> None:
    while forwards:
        forwards.pop().stop()


def _copied(value: Any, kept: dict[int, Any]) -> Any:
    """Returns a copy of arguments: tensors, containers and caches anew, each once; modules and plain values as is."""
    if id(value) in kept:
        return kept[id(value)]
    if isinstance(value, Tensor):
        kept[id(value)] = value.clone()
    elif isinstance(value, tuple):
        entries = [_copied(entry, kept) for entry in value]
        kept[id(value)] = type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    elif isinstance(value, (MutableMapping, MutableSequence)):
        found = kept[id(value)] = copy.copy(value)
        for key, entry in value.items() if isinstance(value, MutableMapping) else enumerate(value):
            found[key] = _copied(entry, kept)
    elif _holds_state(value):
        found = kept[id(value)] = copy.copy(value)
        for name, entry in vars(value).items():
            found.__dict__[name] = _copied(entry, kept)
    return kept.get(id(value), value)


def _holds_state(value: Any) -> bool:
    """Returns whether `value` is an object that blocks may keep tensors in, such as a cache."""
    if isinstance(value, (nn.Module, PreTrainedConfig, Enum, type)) or not hasattr(value, "__dict__"):
        return False
    return dataclasses.is_dataclass(value) or type(value).__module__.startswith("transformers")

"""CUDA graphs of work that starts many small kernels: GPTQ starts some eight for every column of a matrix.

On a GPU such work takes as long as Python needs to start its kernels. A graph holds them all and starts them at once.
It is recorded at the first call with tensors of some shapes, and used from then on if it gave the same numbers then.

Written without a GPU at hand: recording was never run. The tests put a stand-in in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
"""Of tensors, or None in the place of one; it may write to them. It must not wait for the device."""

logger = logging.getLogger(__name__)


class Recorder:
    """Runs a function of tensors as a CUDA graph where they are on an NVIDIA GPU, and as it is elsewhere."""

    def __init__(self, checks: int = 1, tolerance: float = 0.0) -> None:
        """Makes a recorder without graphs.

        Args:
            checks: calls of each graph whose numbers are compared. More than 1 where a function reads tensors that are
                not its arguments: those must have changed in between, so that a graph that reads old ones is found.
            tolerance: by which a result may differ, as a share of its norm. 0 where kernels add in a fixed order.
        """
        self.checks, self.tolerance = checks, tolerance
        self._recorded: dict[Hashable, _Recorded | None] = {}

    def __call__(self, name: Hashable, function: Function, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Returns what `function` gives; read it before the next call, which overwrites it.

        Args:
            name: tells apart functions, and what they do besides by the tensors.
            function: to be run; it may be run more than once.
            tensors: its arguments. A graph reads copies, so what the function writes to them does not arrive.
        """
        if not _may_record(tensors):
            return function(*tensors)
        key = name, *(None if one is None else (one.shape, one.dtype, one.device) for one in tensors)
        if key not in self._recorded:
            self._recorded[key] = _recorded_or_none(function, tensors)
        recorded = self._recorded[key]
        if recorded is None:
            return function(*tensors)
        if recorded.checked == self.checks:
            return recorded(tensors)
        expected = function(*(None if one is None else one.clone() for one in tensors))
        found = recorded(tensors)
        if not all(self._is_same(*pair) for pair in zip(found, expected, strict=True)):
            logger.info("a CUDA graph gave other numbers, so kernels are started one by one")
            self._recorded[key] = None
            return expected
        recorded.checked += 1
        return found

    def clear(self) -> None:
        """Lets the graphs go, and the memory that they read and write."""
        self._recorded.clear()

    def _is_same(self, found: Tensor, expected: Tensor) -> bool:
        if self.tolerance == 0:
            return torch.equal(found, expected)
        return bool((found - expected).norm() <= self.tolerance * expected.norm())


class _Recorded:
    """A graph, the tensors that it reads and those that it writes.

    Attributes:
        checked: calls whose numbers were compared and found right.
    """

    def __init__(self, function: Function, tensors: Sequence[Tensor | None]) -> None:
        self.inputs = [None if one is None else one.clone(memory_format=torch.contiguous_format) for one in tensors]
        self.checked = 0
        self.device = next(one.device for one in tensors if one is not None)
        with _current(self.device):
            self.replay, self.outputs = _record(lambda: function(*self.inputs))
        for output in self.outputs:  # what a graph that holds nothing does not write is not taken for its result
            output.fill_(torch.nan)

    def __call__(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, tensors, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        with _current(self.device):
            self.replay()
        return self.outputs


def _recorded_or_none(function: Function, tensors: Sequence[Tensor | None]) -> _Recorded | None:
    before = torch.cuda.current_stream() if torch.cuda.is_available() else None
    try:
        return _Recorded(function, tensors)
    except Exception as error:  # of a driver, of memory, or what waits for the device: the function itself is right
        logger.info("a CUDA graph could not be recorded, so kernels are started one by one: %s", error)
        if before is not None:  # a capture that failed leaves its own stream
            torch.cuda.set_stream(before)
        return None


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Returns what makes a GPU the one on which streams and graphs are made."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _may_record(tensors: Sequence[Tensor | None]) -> bool:
    return all(one is None or one.is_cuda for one in tensors) and not torch.cuda.is_current_stream_capturing()


def _record(run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Returns what runs `run` again, and the tensors in which its results are then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # what kernels and libraries set up at their first call must not be recorded
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs

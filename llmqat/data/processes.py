"""The processes of a distributed run, for work that they share out and whose result all of them get.

Work is shared only where the caller passes `Processes.all()`. The caller must be certain that every process makes the
same calls in the same order. By default (`ALONE`), each process does all of the work itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """A group of processes that share out work; by default one process that does all of it.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes in the group.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def all(cls) -> Processes:
        """Returns those of torch's process group, or this one alone where there is none."""
        if not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have made."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns the items that are this process's to do: every `count`-th one."""
        return items[self.rank :: self.count]

    def owner(self, index: int) -> int:
        """Returns the rank of the process whose item `index` is."""
        return index % self.count

    def add(self, tensor: Tensor) -> Tensor:
        """Returns the sum of all processes' tensors, in place: the same bits everywhere."""
        if self.count > 1:
            moved = tensor.to(_device())
            distributed.all_reduce(moved)
            tensor.copy_(moved)
        return tensor

    def copy(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Overwrites `tensors` by those of the process `source`."""
        if self.count == 1:
            return
        for tensor in tensors:
            moved = tensor.detach().to(_device()).contiguous()
            distributed.broadcast(moved, source)
            tensor.detach().copy_(moved)

    def agreed(self, value: T) -> T:
        """Returns the first process's `value`."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, 0, device=_device())
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """Returns the values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values = [value] * self.count
        distributed.all_gather_object(values, value)
        return values


ALONE = Processes()


def _device() -> torch.device:
    """Returns where the process group takes tensors from."""
    if "gloo" in distributed.get_backend():
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    return torch.device("cpu") if device is None else device

"""What a module keeps: tensors that stay in their dtype when a model is cast, and ranges that calibration finds.

`model.half()` and `model.to(dtype)` are meant for weights. Scales and calibrated ranges would be rounded, small ones to
zero and large ones to infinity; codes of eight bits that are floats would become other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def dtypes_kept(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Inside, the parameters and buffers `names` of `module` itself may be moved, but keep their dtype and numbers."""
    own = {**module._parameters, **module._buffers}
    kept = {name: tensor.data for name in names if (tensor := own.get(name)) is not None}
    yield
    for name, numbers in kept.items():
        now = module._parameters.get(name, module._buffers.get(name))
        if now is not None and now.dtype != numbers.dtype:
            now.data = numbers.to(now.device)


class RangedModule(nn.Module):
    """A module with a range that calibration finds: float32 buffers, whatever the dtype of the model.

    Attributes:
        name: what the range is of, for errors: "the static input range of model.layers.0.mlp.up_proj".
    """

    def __init__(self, name: str) -> None:
        """Makes a module whose range is not read yet."""
        super().__init__()
        self.name = name
        self._numbers: tuple[float, ...] | None = None

    def found(self) -> tuple[Tensor, ...]:
        """Returns the buffers of the range, the scale first, which is NaN until it is calibrated; none without one."""
        raise NotImplementedError

    @property
    def is_calibrated(self) -> bool:
        """Whether it has all that calibration is to find."""
        return not any(bool(tensor.isnan().any()) for tensor in self.found())

    def numbers(self) -> tuple[float, ...] | None:
        """Returns the range as numbers, read once; None where there is none, or none to read (on the meta device).

        Raises:
            RuntimeError: it is not calibrated.
        """
        found = self.found()
        if not found or found[0].is_meta:
            return None
        if self._numbers is None:
            if not self.is_calibrated:
                raise RuntimeError(
                    f"{self.name} is not calibrated; call "
                    f"llmqat.calibrate.calibrate_activations(model, blocks) first{self.way_out}"
                )
            self._numbers = tuple(number for tensor in found for number in tensor.flatten().tolist())
        return self._numbers

    @property
    def way_out(self) -> str:
        """What else than calibrating helps, for the end of a message."""
        return ""

    def check_range(self, low: float, high: float) -> None:
        """Checks that [low, high] is a finite range, and drops the cached numbers of the old range.

        Raises:
            ValueError: when it is not finite, or `low` is above `high`.
        """
        if not (low <= high and abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError(f"{self.name} cannot be [{low}, {high}], which is not finite")
        self._numbers = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RangedModule:
        self._numbers = None
        with dtypes_kept(self, self._buffers):
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._numbers = None
        super()._load_from_state_dict(*args, **options)

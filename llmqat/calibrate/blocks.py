"""The transformer blocks of a model: which modules they are, and how one of them is run alone on a chain's text.

Blocks are those of `models.named_blocks` that hold quantized weights.

Letters: N token blocks, L length, B token blocks in a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.calibrate.chains import Call, Chain, Some, Stopped, hidden_of
from llmqat.calibrate.forward import input_of
from llmqat.data.processes import ALONE, Processes
from llmqat.kernels import float_training
from llmqat.layers import QuantModule, model_kind, quantized_once, quantizers_off
from llmqat.models import cast_parameters, model_device, named_blocks, visiting


@dataclass
class Block:
    """A transformer block.

    Attributes:
        index: its number among the blocks of the model, from 0.
        name: dotted name of the module.
        module: the module.
        dtype: dtype of its forward pass.
        shared: `id()` of every parameter that two blocks, or a block and the rest of the model, have in common.
        is_wide: takes a parameter's name in the model; True where transformers keeps that parameter in float32.
    """

    index: int
    name: str
    module: nn.Module
    dtype: torch.dtype = torch.bfloat16
    shared: frozenset[int] = frozenset()
    is_wide: Callable[[str], bool] = lambda name: False

    def __call__(self, chain: Chain, rows: Some) -> Tensor:
        """Returns the hidden states [B, L, D] after the block; its parameters are read as they are.

        Args:
            chain: that has reached the block; it stays where it is.
            rows: which token blocks of the chain.
        """
        return self.output(chain.call(self, rows))

    def output(self, call: Call) -> Tensor:
        """Returns the hidden states [B, L, D] after the block, of its arguments."""
        args, options = call
        return hidden_of(self.module.forward(*args, **options))  # hooks of the block have changed the arguments already

    @contextmanager
    def cast(self) -> Iterator[None]:
        """Inside, the block computes in its dtype, as `cast_parameters` has the model do, and where it visits."""
        is_wide = self.is_wide
        with (
            visiting(self.module),
            float_training(model_device(self.module)),
            cast_parameters(self.module, self.dtype, lambda name: is_wide(f"{self.name}.{name}")),
        ):
            yield

    def quantized(self) -> dict[str, QuantModule]:
        """Returns the quantized weights in the block, by full name."""
        return {
            f"{self.name}.{name}": module
            for name, module in self.module.named_modules()
            if isinstance(module, QuantModule)
        }

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the float parameters that the block alone holds, by name in it: those that may be trained."""
        return {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if parameter.is_floating_point() and id(parameter) not in self.shared
        }

    @torch.no_grad()
    def run(self, chain: Chain, into: Chain, processes: Processes = ALONE) -> None:
        """Runs the block on all token blocks of `chain` and stores its output in `into`.

        Args:
            chain: a chain that has reached the block.
            into: `chain` itself, which then moves past the block; or another chain of the same walk, which only stores
                the hidden states.
            processes: share the batches; each process gets the hidden states of all batches.
        """
        with self.cast(), quantized_once(self.module):
            chain.run(self, into, processes)

    def run_full(self, chain: Chain, into: Chain, processes: Processes = ALONE) -> None:
        """Leaves what the block gives with its quantizers off in `into`, as `run` does."""
        with quantizers_off(self.module):
            self.run(chain, into, processes)

    @torch.no_grad()
    def watch(
        self,
        layers: Iterable[nn.Module],
        record: Callable[[nn.Module, Tensor], None],
        chain: Chain,
        batches: Iterable[Some],
        calls: int = 0,
    ) -> None:
        """Runs the block on `batches` of `chain` and passes each input of `layers` to `record`.

        Args:
            layers: modules of the block.
            record: called with the layer and its input.
            chain: a chain that has reached the block; it does not move past the block.
            batches: which token blocks of the chain run together.
            calls: number of calls of all `layers` in one forward pass, which ends after the last of them. 0: unknown,
                so the pass runs to its end.
        """
        left = [0]

        def show(module: nn.Module, x: Tensor) -> None:
            record(module, x)
            left[0] -= 1
            if left[0] == 0:
                raise Stopped

        with showing_inputs(layers, show), self.cast(), quantized_once(self.module):
            for rows in batches:
                left[0] = calls
                with suppress(Stopped):
                    self(chain, rows)


@contextmanager
def showing_inputs(modules: Iterable[nn.Module], record: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Inside, each of `modules` shows `record` its input whenever it is called."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        record(module, input_of(inputs, options))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the transformer blocks of `model` that hold quantized weights, by name.

    Raises:
        ValueError: when there is no such block.
    """
    found = _blocks(model)
    if not found:
        raise ValueError(
            f"{model_kind(model)} has no transformer block with quantized weights, so it cannot be walked block by "
            "block; leave the stages gptq and blockwise out"
        )
    return found


def has_blocks(model: nn.Module) -> bool:
    """Returns whether `model` has transformer blocks with quantized weights."""
    return bool(_blocks(model))


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    return named_blocks(model, lambda module: any(isinstance(inner, QuantModule) for inner in module.modules()))

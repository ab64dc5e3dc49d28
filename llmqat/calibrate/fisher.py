"""The diagonal of the Fisher information of a model's own predictions: the mean square of d log p(y) / dw, y from p.

Gradients go through the model block by block, from the last to the first. The hidden states before each block are kept,
in memory or in files, and the gradients after it. A block runs again for its own backward pass, over all of the text.
So the gradients and the information of one block are held at a time, and the weights of one block where they lie in
files or come to a GPU one by one. The numbers are those of backward passes through the whole model, bit for bit where
hidden states have the dtype of the forward. Such passes are taken where a block gets more than the hidden states of
the one before it, such as its keys and values (walk.py), and where a layer lies in no block. No weight is in two
blocks: those that are tied are not quantized.

Letters: N token blocks, L length, D hidden size, V vocabulary, O out features, I in features.
Source: labels drawn from the model, Kunstner et al. (1905.12558) section 2.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmqat.calibrate.blocks import Block
from llmqat.calibrate.chains import RecordedChain, batches, hidden_of
from llmqat.calibrate.forward import Wrap, check_seen
from llmqat.calibrate.walk import TOLERANCE, hidden_states, open_walk
from llmqat.data.blocks import Rows
from llmqat.kernels import WeightPages, float_training
from llmqat.layers import QuantModule, quantizers_off
from llmqat.metrics import Predictor, predictor_of
from llmqat.models import capture_hidden, cast_parameters, model_device, uploaded, visited_device, visiting

log = logging.getLogger(__name__)

CHUNK_TOKENS = 256
"""Tokens whose logits are made at once."""


def fisher_diagonals(
    model: nn.Module,
    layers: Mapping[str, QuantModule],
    rows: Rows,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    memory_limit: float = math.inf,
    wrap: Wrap = iter,
    watch: Callable[[ExitStack], None] = lambda stack: None,
) -> Generator[tuple[str, Tensor], None, None]:
    """Yields the name of each of `layers`, in some order, and the Fisher information a token, [O, I] float32.

    Args:
        model: prepared; runs with its quantizers off.
        layers: by name.
        rows: token blocks [N, L].
        seed: of the labels drawn from the model's own distribution.
        dtype: what forwards compute in.
        memory_limit: bytes of hidden states and gradients above which they lie in temporary files.
        wrap: put around the iteration over blocks.
        watch: called before the backward passes with a stack that is left after them, to watch layers.

    Raises:
        ValueError: when the text does not reach a layer; or when the blocks of the model come to a GPU one by one and
            cannot run by themselves; says why.
    """
    device = model_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        stack.enter_context(quantizers_off(model))
        wanted = {id(layer.weight) for layer in layers.values()}
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(id(parameter) in wanted)
        try:
            backward = _Backward.of(model, layers, rows, dtype, memory_limit)
        except _CannotRunAloneError as error:
            if (visited := visited_device(model)) is not None:
                raise ValueError(
                    f"{type(model).__name__} does not fit into the memory of {visited}, and its blocks cannot run one "
                    f"by one ({error}); measure sensitivities on the CPU, with CUDA_VISIBLE_DEVICES= before the command"
                ) from error
            log.info("sensitivities take the gradients of the whole model in memory: %s", error)
            stack.enter_context(watching(watch))
            sums = _Sums(layers, device)
            for index in wrap(range(len(rows))):
                with cast_parameters(model, dtype), capture_hidden(model) as captured, float_training(device):
                    model(**rows[index : index + 1].inputs(device), use_cache=False)
                    _take_back(model, captured.take()[0], generator)
                sums.add()
            yield from sums.taken(rows.stored.numel())
            return
        for block in wrap(backward.through_the_end(generator)):
            yield from backward.through(block, watch)


@contextmanager
def watching(watch: Callable[[ExitStack], None]) -> Iterator[None]:
    """Inside, layers are watched by what `watch` put on them."""
    with ExitStack() as stack:
        watch(stack)
        yield


class _Sums:
    """Squares of the gradients of some layers, added up."""

    def __init__(self, layers: Mapping[str, QuantModule], device: torch.device) -> None:
        self.layers = layers
        self.total = {name: torch.zeros(one.rows, one.columns, device=device) for name, one in layers.items()}
        self.seen = dict.fromkeys(layers, False)

    def add(self) -> None:
        """Adds the squares of the gradients that the weights have, and drops these."""
        for name, layer in self.layers.items():
            if layer.weight.grad is None:  # an expert that no token chose
                continue
            self.seen[name] = True
            gradient = layer.weight.grad.mT if layer.transposed else layer.weight.grad
            self.total[name] += gradient.reshape(self.total[name].shape).float().square()
            layer.weight.grad = None

    def taken(self, tokens: int) -> Iterator[tuple[str, Tensor]]:
        """Yields the name of each layer and its sum a token, and lets each go.

        Raises:
            ValueError: when the text does not reach a layer.
        """
        check_seen(self.seen)
        while self.total:
            name, total = self.total.popitem()
            yield name, total.div_(tokens)


class _CannotRunAloneError(Exception):
    """Why the blocks of a model do not run by themselves."""


@dataclass
class _Backward:
    """A backward pass through a model, block by block.

    Attributes:
        model: runs with its quantizers off.
        blocks: in the order they run.
        chain: what they get beside hidden states.
        layers: by name; all lie in the blocks.
        rows: token blocks.
        dtype: what forwards compute in.
        states: [blocks + 1, N, L, D] hidden states before each block, and after the last; gradients take their place.
        forms: what each block returns, by name.
    """

    model: nn.Module
    blocks: Sequence[Block]
    chain: RecordedChain
    layers: Mapping[str, QuantModule]
    rows: Rows
    dtype: torch.dtype
    states: Tensor
    forms: dict[str, Form] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, layers: Mapping[str, QuantModule], rows: Rows, dtype: torch.dtype, memory_limit: float
    ) -> _Backward:
        """Runs the forward through all blocks, and returns what the backward pass needs.

        Raises:
            _CannotRunAloneError: the blocks do not.
        """
        try:
            walk = open_walk(model, rows, 1, memory_limit / 2, dtype)
        except (ValueError, TypeError, KeyError) as error:
            raise _CannotRunAloneError(str(error)) from error
        with walk:
            blocks, chain = walk.blocks, walk.full
            if not isinstance(chain, RecordedChain):
                raise _CannotRunAloneError("its blocks get more from each other than hidden states")
            if outside := set(layers).difference(*(block.quantized() for block in blocks)):
                raise _CannotRunAloneError(f"{min(outside)} is in none of them")
            (states,) = hidden_states(1, (len(blocks) + 1, *chain.hidden.shape), memory_limit / 2, dtype)
            found = cls(model, blocks, chain, layers, rows, dtype, states)
            found._run()
            return found

    def _run(self) -> None:
        """Fills `states`, and checks that what follows the blocks reads the states after the last one alone.

        Raises:
            _CannotRunAloneError: it does not.
        """
        self.states[0].copy_(self.chain.hidden)
        for block, before, after in zip(self.blocks, self.states, self.states[1:], strict=False):
            with torch.no_grad(), block.cast():
                for row in batches(len(self.rows), 1):
                    hidden = uploaded(before[row], model_device(block.module))
                    args, options = self.chain.calls[block.index].call(hidden, row)
                    output = block.module.forward(*args, **options)
                    after[row] = hidden_of(output).to(after.device)
            self.forms[block.name] = _form_of(output)
            WeightPages(self.model).let_go(block.module.parameters())
        first = slice(0, 1)
        with (
            torch.no_grad(),
            cast_parameters(self.model, self.dtype),
            capture_hidden(self.model) as captured,
            float_training(model_device(self.model)),
        ):
            self.model(**self.rows[first].inputs(model_device(self.model)), use_cache=False)
            own = captured.take()
        with torch.no_grad(), self._end(first, self.states[-1, first]) as alone:
            pass
        if not bool(((alone - own).float().norm() <= TOLERANCE * own.float().norm()).all()):
            raise _CannotRunAloneError("what follows them reads more than the hidden states after the last")

    @contextmanager
    def _end(self, row: slice, hidden: Tensor) -> Iterator[Tensor]:
        """Yields what enters the output head, [B, L, D], for the states after the last block."""
        with (
            without_blocks(self.model, self.forms, uploaded(hidden, model_device(self.model))),
            cast_parameters(self.model, self.dtype),
            capture_hidden(self.model) as captured,
            float_training(model_device(self.model)),
        ):
            self.model(**self.rows[row].inputs(model_device(self.model)), use_cache=False)
            yield captured.take()

    def through_the_end(self, generator: torch.Generator) -> Sequence[int]:
        """Takes the gradients of drawn labels back to the last block; returns the numbers of the blocks, last first."""
        for row in batches(len(self.rows), 1):
            leaf = uploaded(self.states[-1, row], model_device(self.model)).requires_grad_()
            with self._end(row, leaf) as hidden:
                _take_back(self.model, hidden[0], generator)
            self.states[-1, row] = _taken(leaf).to(self.states.device)
        return range(len(self.blocks) - 1, -1, -1)

    def through(self, number: int, watch: Callable[[ExitStack], None]) -> Iterator[tuple[str, Tensor]]:
        """Takes the gradients from after a block, in its `states`, to before it; yields what its layers have."""
        block, before, gradients = self.blocks[number], self.states[number], self.states[number + 1]
        own = {name: layer for name, layer in block.quantized().items() if name in self.layers}
        with visiting(block.module), watching(watch):
            device = model_device(block.module)
            sums = _Sums(own, device)
            for row in batches(len(self.rows), 1):
                leaf = uploaded(before[row], device).requires_grad_()
                with block.cast():
                    args = self.chain.calls[block.index].call(leaf, row)
                    block.output(args).backward(uploaded(gradients[row], device))
                before[row] = _taken(leaf).to(before.device)
                sums.add()
            yield from sums.taken(self.rows.stored.numel())
        WeightPages(self.model).let_go(block.module.parameters())


Form = Callable[[Tensor], Any]
"""Makes what a block returns of its hidden states."""


def _form_of(output: Any) -> Form:
    # What else a block gives, such as attention weights, nobody asks for.
    others = None if isinstance(output, Tensor) else [None if isinstance(one, Tensor) else one for one in output[1:]]
    return lambda hidden: hidden if others is None else (hidden, *others)


@contextmanager
def without_blocks(model: nn.Module, forms: Mapping[str, Form], hidden: Tensor) -> Iterator[None]:
    """Inside, a forward of `model` runs none of its blocks: `hidden` is what each of them gives.

    Args:
        model: has its blocks at the names of `forms`.
        forms: what the blocks return.
        hidden: states [B, L, D].
    """
    homes = {name: model.get_submodule(name.rpartition(".")[0]) for name in forms}
    blocks = {name: model.get_submodule(name) for name in forms}
    try:
        for name, home in homes.items():
            home._modules[name.rpartition(".")[2]] = _StandIn(blocks[name], forms[name](hidden))
        yield
    finally:
        for name, home in homes.items():
            home._modules[name.rpartition(".")[2]] = blocks[name]


class _StandIn(nn.Module):
    """In the place of a block, whose attributes it has: returns what it was given, whatever it is called with."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _output=output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **options: Any) -> Any:
        return self._output


def _taken(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _take_back(model: nn.Module, hidden: Tensor, generator: torch.Generator) -> None:
    """Takes sum_t log p(y_t), y_t drawn from p, back from the hidden states [L, D] that enter the output head."""
    hidden.backward(_label_gradient(hidden.detach(), predictor_of(model).detached(), generator))


def _label_gradient(hidden: Tensor, predictor: Predictor, generator: torch.Generator) -> Tensor:
    """Returns the gradient of sum_t log p(y_t) with respect to hidden states [L, D], y_t drawn from p."""
    gradient = torch.empty_like(hidden)
    for start in range(0, hidden.shape[0], CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        leaf = hidden[rows].clone().requires_grad_()
        log_probs = F.log_softmax(predictor.logits(leaf).float(), dim=-1)
        labels = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        (gradient[rows],) = torch.autograd.grad(log_probs.gather(-1, labels).sum(), leaf)
    return gradient

"""The diagonal of the Fisher information of a model's own predictions: the mean square of d log p(y) / dw, y from p.

Gradients go through the model block by block, from the last to the first. The hidden states before each block are kept,
in memory or in files, and the gradients after it. A block runs again for its own backward pass, over all of the text.
So the gradients and the information of one block are held at a time, and the weights of one block where they lie in
files or come to a GPU one by one. The numbers are those of backward passes through the whole model, bit for bit. Such
passes are taken where blocks get more from each other than hidden states (walk.py), or a layer lies in no block.

Letters: N token blocks, L length, D hidden size, V vocabulary, O out features, I in features.
Source: labels drawn from the model, Kunstner et al. (1905.12558) section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmqat.calibrate.blocks import Block
from llmqat.calibrate.chains import RecordedChain, batches, hidden_of
from llmqat.calibrate.forward import Wrap, check_seen
from llmqat.calibrate.walk import hidden_states, open_walk
from llmqat.data.blocks import Rows
from llmqat.kernels import WeightPages
from llmqat.layers import QuantModule, quantizers_off
from llmqat.metrics import Predictor, predictor_of
from llmqat.models import capture_hidden, cast_parameters, model_device, uploaded, visited_device, visiting

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
) -> Iterator[tuple[str, Tensor]]:
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
            get more from each other than hidden states.
    """
    device = model_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        stack.enter_context(quantizers_off(model))
        opened = _opened(model, layers, rows, dtype, memory_limit)
        wanted = {id(layer.weight) for layer in layers.values()}
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(id(parameter) in wanted)
        watched = stack.enter_context(ExitStack())
        if opened is not None:
            blocks, chain = opened
            yield from _by_blocks(model, blocks, chain, layers, rows, generator, dtype, memory_limit, wrap, watch)
            return
        if visited_device(model) is not None:
            raise ValueError(
                f"{type(model).__name__} does not fit into the memory of {visited_device(model)}, and its blocks do "
                "not run one by one; measure sensitivities on the CPU, with CUDA_VISIBLE_DEVICES= before the command"
            )
        watch(watched)
        sums = _Sums(layers, device)
        for index in wrap(range(len(rows))):
            with cast_parameters(model, dtype), capture_hidden(model) as captured:
                model(**rows[index : index + 1].inputs(device), use_cache=False)
                _backward(model, captured.take()[0], generator)
            sums.add()
        yield from sums.taken(rows.stored.numel())


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


def _opened(
    model: nn.Module, layers: Mapping[str, QuantModule], rows: Rows, dtype: torch.dtype, memory_limit: float
) -> tuple[list[Block], RecordedChain] | None:
    """Returns the blocks of `model` in their order and a chain before the first; None where they do not run alone."""
    try:
        walk = open_walk(model, rows, 1, memory_limit, dtype)
    except ValueError:  # what is wrong is told by the passes through the whole model, or nothing is
        return None
    inside = {name for block in walk.blocks for name in block.quantized()}
    if not isinstance(walk.full, RecordedChain) or not inside.issuperset(layers):
        walk.__exit__(None, None, None)
        return None
    return walk.blocks, walk.full


def _by_blocks(
    model: nn.Module,
    blocks: Sequence[Block],
    chain: RecordedChain,
    layers: Mapping[str, QuantModule],
    rows: Rows,
    generator: torch.Generator,
    dtype: torch.dtype,
    memory_limit: float,
    wrap: Wrap,
    watch: Callable[[ExitStack], None],
) -> Iterator[tuple[str, Tensor]]:
    count = len(rows)
    (states,) = hidden_states(1, (len(blocks) + 1, *chain.hidden.shape), memory_limit, dtype)
    gradients, forms = states[-1], dict[str, Form]()
    for block, before in zip(blocks, states, strict=False):
        before.copy_(chain.hidden)
        with torch.no_grad(), block.cast():
            for row in batches(count, 1):
                args, options = chain.call(block, row)
                output = block.module.forward(*args, **options)
                chain.hidden[row] = hidden_of(output).to(chain.hidden.device)
        forms[block.name] = _form_of(output)
        WeightPages(model).let_go(block.module.parameters())
    device = model_device(model)
    for row in batches(count, 1):
        leaf = uploaded(chain.hidden[row], device).requires_grad_()
        with without_blocks(model, forms, leaf), cast_parameters(model, dtype), capture_hidden(model) as captured:
            model(**rows[row].inputs(device), use_cache=False)
            _backward(model, captured.take()[0], generator)
        gradients[row] = _taken(leaf).to(gradients.device)
    for number in wrap(range(len(blocks))):
        block, before = blocks[-1 - number], states[len(blocks) - 1 - number]
        own = {name: layer for name, layer in block.quantized().items() if name in layers}
        with visiting(block.module), ExitStack() as stack:
            device = model_device(block.module)
            sums = _Sums(own, device)
            watch(stack)
            for row in batches(count, 1):
                leaf = uploaded(before[row], device).requires_grad_()
                with block.cast():
                    block.output(chain.calls[block.index].call(leaf, row)).backward(uploaded(gradients[row], device))
                gradients[row] = _taken(leaf).to(gradients.device)
                sums.add()
            yield from sums.taken(rows.stored.numel())
        WeightPages(model).let_go(block.module.parameters())


Form = Callable[[Tensor], Any]
"""Makes what a block returns of its hidden states."""


def _form_of(output: Any) -> Form:
    others = None if isinstance(output, Tensor) else output[1:]
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


def _backward(model: nn.Module, hidden: Tensor, generator: torch.Generator) -> None:
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

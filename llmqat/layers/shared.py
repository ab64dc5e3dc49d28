"""Products that several packed layers share: q, k and v, or gate and up, multiply one input as one matrix.

One product with all their rows costs less than several with few: fewer calls, and enough rows for every core. The
layers stay what they are (names, state dict, codes on disk); the first one that is called computes for all and keeps
the others' part until they come with the very same input tensor. A layer that comes with another input computes by
itself, so an architecture in which the inputs differ is slower, never wrong. Products of scales in training, and of
layers that are to run on different kernels, are not shared.

Letters: I in features, O out features of all members together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import get_ident

import torch
from torch import Tensor, nn

from llmqat.kernels import JoinedWeight, PackedWeight, packed_linear
from llmqat.layers.packed import PackedLinear, version_of
from llmqat.layers.quantized import compute_dtype

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers of one parent that read one input, in transformers' modeling files."""

MAX_MISSES = 3


class SharedProduct:
    """The joined product of some packed layers.

    Attributes:
        members: the layers, in the order of their rows.
    """

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        self.members = tuple(members)
        self._rows = [member.out_features for member in members]
        self._weight: JoinedWeight | None = None
        # Of each thread, so that two of them that run the model do not take each other's parts: the input, its version,
        # and the parts that wait for their members.
        self._waiting: dict[int, tuple[Tensor, int | None, dict[int, Tensor]]] = {}
        self._misses = 0

    def take(self, member: PackedLinear, x: Tensor) -> Tensor | None:
        """Returns the product [*, O of the member] of `x` [*, I], or None where the member must compute by itself."""
        index = self.members.index(member)
        thread = 0 if torch.compiler.is_compiling() else get_ident()
        found = self._waiting.get(thread)
        if found is not None:
            given, version, waiting = found
            if given is x and version == version_of(x) and index in waiting:
                part = waiting.pop(index)
                if not waiting:
                    del self._waiting[thread]
                    self._misses = 0
                return part
            del self._waiting[thread]  # somebody did not come with the same input
            self._misses += 1
        if self._misses >= MAX_MISSES or not self._usable(x):
            return None
        parts = dict(enumerate(self._product(x)))
        own = parts.pop(index)
        self._waiting[thread] = (x, version_of(x), parts)
        return own

    def _usable(self, x: Tensor) -> bool:
        # Parameters are looked up where modules keep them: this is asked for every token.
        kernel = self.members[0].kernel
        return all(
            member._parameters["log_scale"] is None and not member.adapters and member.kernel == kernel
            for member in self.members
        )

    def _product(self, x: Tensor) -> Sequence[Tensor]:
        dtype, first = compute_dtype(x), self.members[0]
        bias = None
        if first.bias is not None:
            bias = torch.cat([member.bias for member in self.members if member.bias is not None]).to(dtype)
        out = packed_linear(first.inputs(x, dtype), self.weight(), bias, first.kernel)
        return torch.split_with_sizes(out, self._rows, dim=-1)

    def weight(self) -> JoinedWeight:
        """Returns the members' weights as one; made anew when a member's was replaced."""
        weight = self._weight
        if weight is None or not all(map(_is_current, self.members, weight.members)):
            weight = self._weight = JoinedWeight([member.packed_weight() for member in self.members])
        return weight


def share_products(model: nn.Module) -> None:
    """Lets packed layers of `model` that read one input share its product, where they are alike."""
    for parent in model.modules():
        for names in SIBLINGS:
            found = [parent._modules.get(name) for name in names]
            members = [member for member in found if isinstance(member, PackedLinear)]
            if len(members) == len(names) and _alike(members):
                shared = SharedProduct(members)
                for member in members:
                    member.shared = shared


def products(model: nn.Module) -> Iterator[SharedProduct | PackedLinear]:
    """Yields every product that a forward of `model` computes: the shared ones once, and the layers on their own."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, PackedLinear) and id(module.shared) not in seen:
            yield module.shared or module
            if module.shared is not None:
                seen.add(id(module.shared))


def _alike(members: Sequence[PackedLinear]) -> bool:
    first = members[0]
    quantizers = [member.input_quantizer for member in members]
    configs = [None if quantizer is None else quantizer.config for quantizer in quantizers]
    return all(
        (member.weights, member.in_features) == (first.weights, first.in_features)
        and (member.bias is None) == (first.bias is None)
        and (member.dtype, member.weight_scale.dtype) == (first.dtype, first.weight_scale.dtype)
        and config == configs[0]
        and (config is None or not config.calibrated)
        for member, config in zip(members, configs, strict=True)
    )


def _is_current(member: PackedLinear, weight: PackedWeight) -> bool:
    return member._runtime is weight and member.is_current()

"""Reads experts that other tools packed one by one as the stacked weights of transformers' models.

compressed-tensors packs linear layers one by one. So a checkpoint (Kimi K2, Qwen3-MoE) has `experts.7.gate_proj` and
`experts.7.up_proj` for each expert, while the model has one parameter `experts.gate_up_proj` [E, O, I]. Each row is
packed on its own, so the packed stack is the concatenation of the experts' rows. transformers' conversion mapping,
which also loads full-precision checkpoints, says which tensors make which stack, and in what order.

Letters: E experts, O out features of one of them, I in features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from llmqat.layers import PackedExperts
from llmqat.models import shortened

_CODES = (".weight_packed", ".weight")
"""What holds the codes of a linear layer, in forms that pack them and in others."""
_MAY_BE_ONE = ("weight_scale", "weight_global_scale")
"""What may be one number for all rows of a layer."""
_PARTS = ("weight_packed", "weight", *_MAY_BE_ONE, "weight_zero_point")


def single_experts(model: PreTrainedModel, stored: Iterable[str], stacks: Mapping[str, bool]) -> dict[str, list[str]]:
    """Returns, for each stack whose experts lie one by one, the names on disk of its linear layers in order of rows.

    Args:
        model: whose class says what transformers stacks.
        stored: names of tensors on disk.
        stacks: names of stacked weights in the model, and whether they lie as [E, I, O].

    Raises:
        ValueError: a stack is made in another way than by laying rows below each other, or lacks an expert.
    """
    scaled = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    names = [name for name in sorted(scaled) if re.search(r"\.\d+\.[^.]+$", name) and name not in stacks]
    if not stacks or not names:
        return {}
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    found: dict[str, dict[tuple[int, int], str]] = {}
    for name in names:
        key = f"{name}.weight"
        for renaming in renamings:
            key = renaming.rename_source_key(key)[0]
        for converter in converters:
            stack, pattern = converter.rename_source_key(key)
            if pattern is None or stack not in stacks:
                continue
            if stacks[stack] or not all(
                isinstance(step, (MergeModulelist, Concatenate)) for step in converter.operations
            ):
                raise ValueError(
                    f"{name} is an expert packed by itself, but {type(model).__name__} has the stack {stack} in "
                    "another layout, which would have to be packed anew; start from the full-precision model"
                )
            number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
            assert number is not None
            found.setdefault(stack, {})[int(number[1]), converter.source_patterns.index(pattern)] = name
    return {stack: _in_order(model, stack, parts) for stack, parts in found.items()}


def _in_order(model: PreTrainedModel, stack: str, parts: Mapping[tuple[int, int], str]) -> list[str]:
    """Returns the names in `parts`, by expert and source, expert by expert.

    Raises:
        ValueError: one is missing.
    """
    leaves = {source: name.rpartition(".")[2] for (_, source), name in parts.items()}
    experts = range(model.get_parameter(stack).shape[0])
    wanted = [(expert, source) for expert in experts for source in sorted(leaves)]
    if missing := [f"the {leaves[source]} of expert {n}" for n, source in wanted if (n, source) not in parts]:
        raise ValueError(
            f"{stack} lacks {len(missing)} of {len(wanted)} packed parts: {shortened(missing)}; copy the folder again"
        )
    return [parts[place] for place in wanted]


def stacked(
    layers: Mapping[str, PackedExperts], singles: Mapping[str, list[str]], stored: Mapping[str, tuple[Tensor, Path]]
) -> dict[str, tuple[Tensor, Path]]:
    """Returns `stored`, the tensors of experts that lie one by one as those of their stacks.

    Args:
        layers: packed stacks by name.
        singles: from `single_experts`.
        stored: tensors by name on disk, and the files that they lie in.
    """
    found = dict(stored)
    for stack, names in singles.items():
        for leaf in _PARTS:
            if parts := {name: found.pop(f"{name}.{leaf}") for name in names if f"{name}.{leaf}" in found}:
                _check_all(stack, leaf, names, parts)
                tensors = [tensor for tensor, _ in parts.values()]
                if leaf in _MAY_BE_ONE and layers[stack].weights.block == 1:
                    sizes = [_rows(stored, name) for name in names]
                    tensors = [_written_out(tensor, size) for tensor, size in zip(tensors, sizes, strict=True)]
                found[f"{stack}.{leaf}"] = torch.cat(tensors), parts[names[0]][1]
        for name in names:
            found.pop(f"{name}.weight_shape", None)
        path = found[f"{stack}.weight_scale"][1]
        found[f"{stack}.weight_shape"] = torch.tensor([layers[stack].rows, layers[stack].columns]), path
    return found


def _check_all(stack: str, leaf: str, names: Iterable[str], parts: Mapping[str, object]) -> None:
    """Raises ValueError where some of an expert's tensors are there and others are not."""
    if missing := [f"{name}.{leaf}" for name in names if name not in parts]:
        raise ValueError(f"{stack} lacks {shortened(missing)}, which others of its experts have; copy the folder again")


def _rows(stored: Mapping[str, tuple[Tensor, Path]], name: str) -> int:
    """Returns the out features of a linear layer on disk."""
    return next(stored[name + end][0].shape[0] for end in _CODES if name + end in stored)


def _written_out(tensor: Tensor, rows: int) -> Tensor:
    """Returns the one number of a layer for each of its `rows`; any other tensor as it is."""
    return tensor.reshape(1, 1).expand(rows, 1) if tensor.numel() == 1 else tensor

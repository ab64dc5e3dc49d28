"""Names of tensors on disk that are not those in the model: transformers renames some while it loads.

llmqat writes the names of the model. Others save by `save_pretrained`, which goes back to the names of the first
checkpoints of an architecture: `language_model.model.layers…` for Gemma 3's `model.language_model.layers…`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

T = TypeVar("T")


def in_model(model: PreTrainedModel, stored: Mapping[str, T]) -> dict[str, T]:
    """Returns `stored`, by name on disk, by the names in `model`; what fits neither way keeps its name.

    Args:
        model: whose class says what transformers renames.
        stored: by name on disk; a name whose module is in the model is not renamed.
    """
    modules = {name for name, _ in model.named_modules()}
    known = {name: value for name, value in stored.items() if _owner(name) in modules}
    if len(known) == len(stored):
        return known
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    for name in (name for name in stored if name not in known):
        new = name
        for renaming in renamings:
            new = renaming.rename_source_key(new)[0]
        known.setdefault(new if _owner(new) in modules else name, stored[name])
    return known


def _owner(name: str) -> str:
    return name.rpartition(".")[0]

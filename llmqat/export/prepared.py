"""Prepared checkpoints: what `save_pretrained` and a Trainer write of a model between `prepare` and `save`.

Their weights are masters in high precision, with scales and zero points beside them; `config.json` holds the
configuration that they were prepared with, as `llmqat`. Stock loaders drop all but the weights without a word. Here
the model is made anew: its weights first, then `prepare` as it was, then what the quantizers have learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from llmqat.layers import QuantConfig, prepare
from llmqat.layers.prepare import CONFIG_KEY, quantizer_state
from llmqat.models import check_safetensors, class_of, empty_model, shortened, weight_files


def is_prepared(config: PreTrainedConfig) -> bool:
    """Returns whether a model configuration is that of a prepared model."""
    return getattr(config, CONFIG_KEY, None) is not None


def read_prepared(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Returns the prepared model in `folder`, in evaluation mode, in the dtypes that it was stored in.

    Raises:
        FileNotFoundError: a weights file is missing.
        ValueError: tensors are missing or left over; names them.
    """
    quant = QuantConfig.model_validate(getattr(config, CONFIG_KEY))
    stored = _read_tensors(folder)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = empty_model(class_of(config), config)
    own = set(model.state_dict())
    places = {name: _stored_name(name, stored) for name in own}
    weights = {name: stored[place] for name, place in places.items() if place is not None}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights(missing_keys=own - set(weights), recompute_mapping=False)
    if left := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{folder} lacks {len(left)} tensors that config.json calls for: {shortened(left)}")
    prepare(model, quant)
    expected = set(quantizer_state(model))
    learned = {name: tensor for name, tensor in stored.items() if name in expected}
    if absent := sorted(expected - set(learned)):
        raise ValueError(f"{folder} lacks {len(absent)} tensors of its quantizers: {shortened(absent)}")
    if left := sorted(set(stored) - expected - set(places.values())):
        raise ValueError(f"{folder} holds tensors that the model of config.json has no place for: {shortened(left)}")
    model.load_state_dict(learned, strict=False)
    return model.eval()


def _stored_name(name: str, stored: Mapping[str, Tensor]) -> str | None:
    """Returns the name in a prepared checkpoint of the unprepared model's tensor `name`; None where it is not there.

    Preparing turns a stacked parameter of experts into a module, so its tensor becomes `name`.weight.
    """
    return next((place for place in (name, f"{name}.weight") if place in stored), None)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of the folder's safetensors by name, mapped from its file."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors

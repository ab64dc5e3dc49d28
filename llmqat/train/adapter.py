"""LoRA adapters in training: how they are saved and loaded, and how their frozen base model serves as the teacher.

With its base weights frozen, a model with LoRA inside the quantizers holds its own teacher. The teacher is the same
modules with quantizers and adapters off, so there is only one copy of the weights. It is the original model only while
every parameter that it reads is bit-identical to the source. So `prepare` notes a checksum of each parameter. If one
has changed since (by GPTQ, block-wise training or rotation), or would be trained, an error is raised.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from llmqat.config import Config
from llmqat.layers import PackedModule, QuantModule, changed_since_prepared, quantizer_state, quantizers_off
from llmqat.layers.lora import QuantLora, adapters_off, adopt_adapters, lora_config
from llmqat.layers.prepare import CONFIG_KEY, noted_source, other_than
from llmqat.layers.source import Checksum, checksums_from_json, checksums_to_json
from llmqat.models import check_safetensors, save_whole, shortened
from llmqat.paths import user_path

_BASE_KEY = "llmqat_base"
"""Key in the metadata of adapters, of the checksums of the weights that they were trained on."""


class LoraSettings(Config):
    """Adapters that are trained inside the quantizers, and folded into the codes at the end."""

    r: int = Field(16, ge=1)
    """Rank."""
    lora_alpha: float = Field(32, gt=0)
    """The adapter counts lora_alpha / r times, or lora_alpha / sqrt(r) with use_rslora."""
    use_rslora: bool = False
    """Rank-stabilized scaling (2312.03732)."""
    targets: tuple[str, ...] | None = None
    """Last parts of the names of layers, such as q_proj; all quantized linear weights where not given."""

    def attach(self, model: nn.Module, seed: int = 0) -> PeftModel:
        """Returns a prepared `model` with new adapters on it, drawn from `seed`; its own weights are frozen, in place.

        Raises:
            ValueError: for a target that no quantized weight has.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, lora_config(model, **self.model_dump()))
        adopt_adapters(adapted)
        return adapted


@contextmanager
def original_model(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what it did before it was prepared and adapted, and takes no gradients."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(quantizers_off(model))
        stack.enter_context(adapters_off(model))
        yield


def is_own_teacher(model: nn.Module) -> bool:
    """Returns whether `model` with quantizers and adapters off is, and stays, the original model."""
    try:
        check_self_teacher(model)
    except ValueError:
        return False
    return True


def check_self_teacher(model: nn.Module) -> None:
    """Raises ValueError where `model` with quantizers and adapters off is not, or would not stay, the original one."""
    advice = "give QATTrainer the original model as teacher=…"
    own = {id(p) for m in model.modules() if isinstance(m, QuantLora) for p in m.factors()}
    own |= {id(p) for m in model.modules() if isinstance(m, QuantModule) for p in (m.log_scale, m.zero_point)}
    trained = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if trained:
        raise ValueError(
            f"the model cannot be its own teacher: {shortened(trained)} would be trained, and the teacher reads them; "
            f"{advice}, or freeze them and train LoRA adapters (llmqat.lora_config)"
        )
    changed = changed_since_prepared(model)
    if changed is None:
        raise ValueError(
            "the model cannot be its own teacher: whether its weights are still those of the original model is not "
            f"known, for it was rotated or smoothed, or not prepared in this process; {advice}"
        )
    if changed:
        raise ValueError(
            "the model cannot be its own teacher: these weights are no longer those of the original model (after gptq, "
            f"block-wise training or other training): {shortened(changed)}; {advice}"
        )


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Writes an ordinary peft folder in which the quantizers travel with the adapter.

    `adapter_model.safetensors` also holds the scales and zero points as they are, which stock
    `PeftModel.from_pretrained(prepared, folder)` loads with it, and in its metadata the QuantConfig and checksums of
    the weights of the original model.

    Raises:
        ValueError: when the base weights are not those of the original model, which whoever loads the adapter has.
    """
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise ValueError(
            "the adapters are on a packed model, whose codes are to become those of the sum: fold them with "
            "merge_and_unload(), then call llmqat.convert and llmqat.save"
        )
    if changed_since_prepared(model) != []:
        raise ValueError(
            "the base weights were moved (by gptq, block-wise training, rotation, or training), so the adapter alone "
            "does not make this model; fold it with merge_and_unload() and call llmqat.save"
        )
    folder = user_path(folder, "folder")
    model.save_pretrained(str(folder))
    add_quantizers(model, folder, noted_source(model))


def load_adapter(model: nn.Module, folder: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Returns a prepared `model` with the adapter, and the scales, that `save_adapter` wrote to `folder`.

    Args:
        model: prepared with the same QuantConfig, and with the weights of the original model.
        folder: written by `save_adapter`, or a hub id. The QuantConfig and the weights are compared only for a local
            folder.
        is_trainable: whether the adapter is to be trained further.

    Raises:
        ValueError: when the model is not prepared, the adapter was trained under another QuantConfig or on other
            weights, or its files lack the scales that it was trained with.
    """
    folder = user_path(folder, "folder")
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise ValueError(
            f"the model is packed, and adapters of packed models are folded when they are trained; to go on from "
            f"{folder}, give it to QATTrainer.train(resume_from_checkpoint=…)"
        )
    if not any(isinstance(module, QuantModule) for module in model.modules()):
        raise ValueError(
            f"the model is not prepared, so the scales of {folder} have no place; call llmqat.prepare(model, config) "
            "with the scheme that the adapter was trained in"
        )
    theirs = scheme_in(folder)
    ours: dict[str, Any] = getattr(getattr(model, "config", None), CONFIG_KEY, None) or {}
    differing = [key for key in ours if theirs is not None and theirs.get(key) != ours[key]]
    if theirs is not None and differing:
        raise ValueError(
            f"{folder} was trained with another scheme than the model is prepared with: "
            + ", ".join(f"{key}={theirs.get(key)} (here {ours[key]})" for key in differing)
        )
    others = other_than(model, checksums_in(folder))
    if others:
        raise ValueError(
            f"{folder} was trained on other weights than the model has, in {shortened(others)}; load the model that it "
            "was trained on, in no narrower dtype than then, and prepare it"
        )
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    adopt_adapters(adapted)
    return adapted


def scheme_in(folder: Path) -> dict[str, Any] | None:
    """Returns the QuantConfig, as JSON, that the adapter in `folder` was trained in.

    None for an ordinary adapter, and where no file is there, as of a hub id.

    Raises:
        ValueError: the file is damaged, or the adapter is on weights inside quantizers and lacks their scales.
    """
    config, file = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return None
    metadata = _metadata_of(file)
    found: dict[str, Any] | None = json.loads(metadata.get(CONFIG_KEY, "null"))
    adapted = json.loads(config.read_text(encoding="utf-8")).get("target_parameters") if config.is_file() else None
    if CONFIG_KEY not in metadata and adapted and all(name.endswith(".weight") for name in adapted):
        raise ValueError(
            f"{folder} holds an adapter that was trained inside quantizers, without the scales that it was trained "
            "with: peft's save_pretrained leaves them out; save it with llmqat.save_adapter(model, folder)"
        )
    return found


def checksums_in(folder: Path) -> dict[str, Checksum]:
    """Returns checksums of the weights that the adapter in `folder` was trained on; empty where they are not known.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    return checksums_from_json(_metadata_of(file).get(_BASE_KEY, "{}")) if file.is_file() else {}


def trained_dtype(folder: Path) -> torch.dtype | None:
    """Returns the dtype of the base weights that the adapter in `folder` was trained on; None where it is not known."""
    dtypes = Counter(entry.dtype for entry in checksums_in(folder).values())
    return dtypes.most_common(1)[0][0] if dtypes else None


def _metadata_of(file: Path) -> dict[str, str]:
    check_safetensors(file)
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def add_quantizers(model: PeftModel, folder: Path, base: Mapping[str, Checksum] | None = None) -> None:
    """Puts the state of the quantizers of `model` into the adapter files that peft wrote to `folder`, atomically.

    Args:
        model: has the adapters.
        folder: holds their files.
        base: checksums of the weights that whoever loads the adapter must have; None where they are not known.
    """
    config = getattr(model.get_base_model().config, CONFIG_KEY, None)
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config)}
    if base is not None:
        metadata[_BASE_KEY] = checksums_to_json(base)
    for name in model.peft_config:
        file = (folder if name == "default" else folder / name) / SAFETENSORS_WEIGHTS_NAME
        save_whole(file, {**load_file(file), **quantizer_state(model)}, metadata)

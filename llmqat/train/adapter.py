"""Adapters in a training: their checkpoint, and the teacher that their frozen base already is.

With its base weights frozen, a model with LoRA inside the quantizers holds its own teacher: the same modules with
quantizers and adapters off, in one copy of the weights. That is the original model only while every parameter it reads
is bit-identical to the source, so `prepare` notes a checksum of each, and what has been moved since (by gptq or
block-wise training, by rotation, or because it trains) is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from llmqat.layers import QuantModule, changed_since_prepared, quantizer_state, quantizers_off
from llmqat.layers.lora import QuantLora, adapters_off
from llmqat.layers.prepare import CONFIG_KEY
from llmqat.models import save_whole, shortened


@contextmanager
def original_model(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what it did before it was prepared and adapted, and takes no gradients."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(quantizers_off(model))
        stack.enter_context(adapters_off(model))
        yield


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
    `PeftModel.from_pretrained(prepared, folder)` loads with it, and in its metadata the QuantConfig.
    """
    model.save_pretrained(str(folder))
    add_quantizers(model, Path(folder))


def add_quantizers(model: PeftModel, folder: Path) -> None:
    """Puts the state of the quantizers of `model` into the adapter file that peft wrote to `folder`, atomically."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    config = getattr(model.get_base_model().config, CONFIG_KEY, None)
    save_whole(file, {**load_file(file), **quantizer_state(model)}, {"format": "pt", CONFIG_KEY: json.dumps(config)})

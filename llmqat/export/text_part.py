"""The language model inside a model that also reads images or sound, for formats that hold language models alone."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from llmqat.models import empty_model


def text_part(model: PreTrainedModel, model_types: Container[str]) -> PreTrainedModel:
    """Returns the language model of `model`, which shares its modules; `model` itself where it is nothing else.

    Args:
        model: of any class.
        model_types: of language models that are asked for; a `model` whose text part is none of them is returned.
    """
    config: Any = model.config.get_text_config(decoder=True)
    if config is model.config or config.model_type not in model_types or model.config.model_type in model_types:
        return model
    with no_init_weights(), init_empty_weights(include_buffers=True):
        text = empty_model(AutoModelForCausalLM, config, dtype=model.dtype)
    setattr(text, text.base_model_prefix, model.get_decoder())
    text.set_output_embeddings(model.get_output_embeddings())
    text.generation_config = model.generation_config
    return text.eval()

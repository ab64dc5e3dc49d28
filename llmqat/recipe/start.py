"""What a recipe starts from: a full-precision model, or one that is packed already.

A packed model has no full-precision weights to calibrate or to train, and keeps its scheme. Its scales are trained as
they lie, or LoRA adapters inside its quantizers, which change its codes. Beside it is named the model that it is to be
like. It may be llmqat's own or another tool's.
"""

from __future__ import annotations

import logging

from torch import nn

from llmqat.evaluate.tokenizers import reading_difference, vocabulary_difference
from llmqat.export import is_packed, load
from llmqat.models import load_tokenizer, resolve_spec
from llmqat.recipe.config import TRAINS_NOTHING, UNPACKED_ONLY, Recipe, training_arguments
from llmqat.train import choose_trained

log = logging.getLogger(__name__)

WAYS = "train its scales with train.trainable=scales, or adapters with lora={r: 16}, or give the model it was made from"
"""What can be done with a packed model."""


def starts_packed(recipe: Recipe) -> bool:
    """Returns whether the model of `recipe` is packed already.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: it is packed, and the recipe asks for what cannot be done to it or names no teacher; or it is not,
            and the recipe names one.
    """
    if not is_packed(recipe.model):
        if recipe.teacher is not None:
            raise ValueError(
                f"teacher={recipe.teacher}: model {recipe.model!r} is in full precision and is its own teacher; leave "
                "teacher out"
            )
        return False
    given = [key for key in UNPACKED_ONLY if key in recipe.model_fields_set and getattr(recipe, key) not in (None, ())]
    if given:
        words = [f"{key}=null" for key in given] + ([] if recipe.teacher else ["teacher=MODEL"])
        raise ValueError(
            f"{given[0]}: model {recipe.model!r} is packed already and keeps its scheme; leave out "
            f"{', '.join(given)} (behind a recipe: {' '.join(words)}), or give the model it was made from"
        )
    if not recipe.trains:
        raise ValueError(
            f"model {recipe.model!r} is packed already, and {TRAINS_NOTHING}, so there is nothing to do; {WAYS}"
        )
    if recipe.lora is None and training_arguments(recipe).trainable != "scales":
        raise ValueError(f"model {recipe.model!r} is packed, so it has no weights to train; {WAYS}")
    if recipe.teacher is None:
        raise ValueError(
            f"model {recipe.model!r} is packed and cannot teach itself; give the full-precision model it was made from "
            "as teacher=MODEL"
        )
    return True


def check_packed_start(recipe: Recipe) -> None:
    """Raises where what `recipe` trains of its packed model cannot be, or its tokenizer is not its teacher's.

    Raises:
        ValueError: says which.
    """
    model: nn.Module = load(recipe.model)
    if recipe.lora is not None:
        model = recipe.lora.attach(model)
    choose_trained(model, training_arguments(recipe).trainable)
    own, taught = (load_tokenizer(resolve_spec(spec), spec) for spec in (recipe.model, recipe.source))
    differing = " ".join(vocabulary_difference(taught, own)).strip() or reading_difference(taught, own)
    if differing:
        raise ValueError(
            f"teacher={recipe.teacher} has another tokenizer than model {recipe.model!r}, so their predictions are not "
            f"of the same tokens ({differing}); give the model it was made from"
        )
    if own.chat_template != taught.chat_template:
        log.warning(
            "teacher=%s has another chat template than model %r; the checkpoint gets that of the teacher",
            recipe.teacher,
            recipe.model,
        )

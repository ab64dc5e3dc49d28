"""Loading the tokenizer of a model, and whether the model has an embedding for each of its tokens."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from llmqat.models.specs import adapter_base, check_in_reach, read_config
from llmqat.models.weights import TOKENIZER_FILES, first_line, shortened
from llmqat.paths import user_path

logger = logging.getLogger(__name__)


def load_tokenizer(source: str | Path, spec: str) -> PreTrainedTokenizerBase:
    """Returns the tokenizer beside a resolved model; `spec` is what errors call it.

    Raises:
        ValueError: There is none that can be read, or it knows no word.
    """
    if adapter_base(spec) is not None and (user_path(spec) / "tokenizer_config.json").is_file():
        source = user_path(spec)
    if not isinstance(source, Path):
        check_in_reach(source, TOKENIZER_FILES, spec)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model {spec!r} has no readable tokenizer ({first_line(error)}); copy tokenizer.json and "
            f"tokenizer_config.json of the original model beside its weights"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what some classes make of a folder without a tokenizer
        raise ValueError(
            f"model {spec!r} has no tokenizer: its folder has no usable tokenizer files; copy tokenizer.json and "
            "tokenizer_config.json of the original model there"
        )
    if adapter_base(spec) is None:  # what an adapter has made of the vocabulary, load_model knows
        config = read_config(source, spec).get_text_config()
        size = getattr(config, "vocab_size", None)
        if isinstance(size, int) and size > 0:
            check_vocabulary(tokenizer, size + (getattr(config, "additional_vocab_size", None) or 0), spec)
    return tokenizer


_MEDIA = ("image", "video", "audio", "boi", "eoi", "boa", "eoa")
"""In the names that a tokenizer gives to tokens which stand for what is no text."""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, spec: str) -> None:
    """Raises ValueError where a tokenizer gives ids that a model's embedding of `rows` rows has no row for.

    Two kinds of tokens may be beyond it, and are logged: those of images and sounds, which no text becomes (Gemma 3's
    language model has one), and those that the tokenizer's class adds by itself, such as Qwen 2's end of text, unless
    texts end with it.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    named = tokenizer.special_tokens_map.items()
    allowed = {str(token) for name, token in named if any(word in name for word in _MEDIA)}
    allowed |= {str(entry.default) for entry in inspect.signature(type(tokenizer)).parameters.values()}
    around = {*tokenizer("a")["input_ids"], tokenizer.eos_token_id}
    found = sorted(token for token, number in beyond.items() if token not in allowed or number in around)
    if found:
        raise ValueError(
            f"model {spec!r}: its tokenizer has {len(found)} tokens that the model's embedding of {rows} rows does not "
            f"have ({shortened(found)}); resize the model and save it again: "
            "model.resize_token_embeddings(len(tokenizer)), or give the tokenizer that it was trained with"
        )
    logger.info("model %r: the embedding lacks tokens that texts do not have: %s", spec, ", ".join(sorted(beyond)))

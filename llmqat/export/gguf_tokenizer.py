"""The tokenizer in a GGUF file: what llama.cpp is told, from what the tokenizer does.

llama.cpp has tokenizers of its own and knows flags and names, not rules. So each fact is taken from the tokenizer's
behaviour or rules, and a rule that llama.cpp has no name for is refused:

    gpt2     BPE over bytes (GPT-2, SmolLM, Llama 3, Qwen): tokens, merges, the name of how text is cut
    llama    BPE with byte fallback (Llama 2, Mistral, Gemma, Phi-3): tokens, scores in the order of merging
    both     kinds of tokens, special tokens, whether a begin or an end is added, chat templates by name
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}
"""Regular expressions by which tokenizers cut text -> llama.cpp's names for them."""
_WHOLE_WORDS = ("llama-bpe",)
"""Names with which llama.cpp takes a word that is a token as it is, without merging."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"


def write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int, stops: Iterable[int] = ()) -> None:
    """Writes `tokenizer` for a model whose embedding has `size` rows.

    Args:
        writer: gguf-py's.
        tokenizer: BPE, over bytes or with byte fallback.
        size: entries of the vocabulary; those that the tokenizer does not have are written as unused.
        stops: ids of the tokens that end a generation, beside the tokenizer's own.

    Raises:
        ValueError: llama.cpp cannot do what the tokenizer does; says what.
    """
    described = _described(tokenizer)
    model = described["model"]
    vocabulary: dict[str, int] = model["vocab"]
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    if (last := max([*vocabulary.values(), *added])) >= size:
        raise ValueError(f"the tokenizer has the token {last}, but the model's vocabulary ends at {size - 1}")
    tokens, kinds = _unused(size, {*vocabulary, *(entry["content"] for entry in added.values())}), [_UNUSED] * size
    for token, index in vocabulary.items():
        tokens[index], kinds[index] = token, _NORMAL
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if model.get("byte_fallback"):
        _write_fallback_kind(writer, described, tokens, kinds, merges)
    else:
        _write_byte_kind(writer, described, merges)
    _check_added(added.values())
    for index, entry in added.items():
        tokens[index], kinds[index] = entry["content"], _CONTROL if entry["special"] else _USER_DEFINED
    if (unknown := model.get("unk_token")) is not None:
        kinds[tokens.index(unknown)] = _UNKNOWN
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _write_ends(writer, tokenizer)
    _write_special(writer, tokenizer, [index for index in dict.fromkeys(stops) if index < size])
    _write_templates(writer, tokenizer.chat_template)


def _described(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the tokenizer as tokenizers' JSON has it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"a {type(tokenizer).__name__} is not written to GGUF here; a fast tokenizer of BPE is")
    described: dict[str, Any] = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer of type {model['type']} is not written to GGUF here; BPE is")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"the tokenizer has {key}={model[key]!r}, which llama.cpp does not do")
    return described


def _unused(size: int, taken: set[str]) -> list[str]:
    """Returns names for `size` tokens, none of them `taken`."""
    names = (f"[PAD{index}]" for index in range(size))
    return [name if name not in taken else f"{name[:-1]}_]" for name in names]


def _check_added(entries: Iterable[Mapping[str, Any]]) -> None:
    """Warns of tokens that take the spaces beside them, or are looked for as whole words."""
    keys = ("lstrip", "rstrip", "single_word")
    if found := [entry["content"] for entry in entries if any(entry.get(key) for key in keys)]:
        logger.warning(
            "GGUF: the tokenizer looks at what stands beside the tokens %s (lstrip, rstrip, single_word), which "
            "llama.cpp does not do: spaces beside them stay in the text",
            ", ".join(found),
        )


# Bytes


def _write_byte_kind(writer: Any, described: Mapping[str, Any], merges: list[list[str]]) -> None:
    """Writes what llama.cpp's tokenizer "gpt2" needs: merges, and the name of how text is cut before merging."""
    if (spaced := next((merge for merge in merges if any(" " in part for part in merge)), None)) is not None:
        raise ValueError(f"the tokenizer merges {spaced}, and GGUF keeps merges with a space between their halves")
    name = _pre_tokenizer(described)
    _check_normalizer(described["normalizer"])
    # Where each token can be reached by merging, taking words whole changes nothing.
    whole = bool(described["model"].get("ignore_merges"))
    words = set(described["model"]["vocab"]) - {entry["content"] for entry in described["added_tokens"]}
    if whole != (name in _WHOLE_WORDS) and not _all_reachable(words, merges):
        raise ValueError(
            f"the tokenizer has ignore_merges={whole}, but llama.cpp's {name!r}, which cuts text as it does, has not"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([" ".join(merge) for merge in merges])


def _all_reachable(vocabulary: Iterable[str], merges: list[list[str]]) -> bool:
    made = {"".join(merge) for merge in merges}
    return all(len(token) <= 1 or token in made for token in vocabulary)


def _check_normalizer(normalizer: Mapping[str, Any] | None) -> None:
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    for step in steps:
        if step["type"] != "NFC":
            raise ValueError(f"the tokenizer normalizes text by {step['type']}, which llama.cpp does not do")
        logger.warning("GGUF: the tokenizer composes accents (NFC) first, which llama.cpp does not do")


def _pre_tokenizer(described: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for how the tokenizer cuts text before merging.

    llama.cpp knows a list of names, not rules; these are told apart by their rules.
    """
    pre = described["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and last.get("add_prefix_space"):
        raise ValueError("the tokenizer puts a space before each text, which llama.cpp's tokenizer over bytes does not")
    if last.get("use_regex", True) == (kinds == ["Split", "ByteLevel"]) and "use_regex" in last:
        kinds[-1] = f"ByteLevel(use_regex={last['use_regex']})"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits", True):
        return "smollm"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and steps[0].get("behavior", "Isolated") == "Isolated":
        pattern = str(steps[0].get("pattern", {}).get("Regex", ""))
        if pattern in _SPLITS and not steps[0].get("invert"):
            return _SPLITS[pattern]
    raise ValueError(f"the tokenizer cuts text by {kinds}, for which llmqat knows no name in llama.cpp")


# Byte fallback


def _write_fallback_kind(
    writer: Any, described: Mapping[str, Any], tokens: list[str], kinds: list[int], merges: list[list[str]]
) -> None:
    """Writes what llama.cpp's tokenizer "llama" needs: which tokens are bytes, and scores in the order of merging."""
    scores = dict.fromkeys(tokens, -float(len(merges) + 1))
    for rank, merge in reversed(list(enumerate(merges))):
        scores["".join(merge)] = -float(rank)
    for byte in range(256):
        if (name := f"<0x{byte:02X}>") in scores:
            kinds[tokens.index(name)] = _BYTE
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([scores[token] for token in tokens])
    writer.add_add_space_prefix(_begins_with_space(described))


def _begins_with_space(described: Mapping[str, Any]) -> bool:
    """Returns whether the tokenizer puts a space before a text.

    Raises:
        ValueError: it changes the text in a way that llama.cpp does not know.
    """
    normalizer, pre = described["normalizer"] or {}, described["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    prepends = any(step["type"] == "Prepend" for step in steps)
    if all(_is_spaces(step) for step in steps):
        if pre.get("type") == "Metaspace" and pre.get("replacement", _SPACE) == _SPACE:
            scheme = pre.get("prepend_scheme", "always")
            if scheme == "first":
                logger.warning(
                    "GGUF: the tokenizer puts a space before the first word of a text only; llama.cpp puts one after "
                    "each special token too"
                )
            return prepends or bool(scheme != "never")
        if pre.get("type") is None or (pre["type"] == "Split" and pre.get("pattern") in (None, {"String": " "})):
            return prepends
    kinds = [step["type"] for step in steps], pre.get("type")
    raise ValueError(f"the tokenizer changes text by {kinds}, for which llmqat knows no setting in llama.cpp")


def _is_spaces(step: Mapping[str, Any]) -> bool:
    """Returns whether a normalizer only writes spaces as llama.cpp does."""
    if step["type"] == "Prepend":
        return bool(step.get("prepend", _SPACE) == _SPACE)
    pattern, content = step.get("pattern", {"String": " "}), step.get("content", _SPACE)
    return bool(step["type"] == "Replace" and pattern == {"String": " "} and content == _SPACE)


# Special tokens and templates


def _write_ends(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes whether a begin and an end are added to a text, as the tokenizer does with one.

    Raises:
        ValueError: it adds something else.
    """
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    for begins in (False, True):
        for ends in (False, True):
            begin = [tokenizer.bos_token_id] if begins else []
            end = [tokenizer.eos_token_id] if ends else []
            if whole == [*begin, *plain, *end]:
                writer.add_add_bos_token(begins)
                writer.add_add_eos_token(ends)
                return
    raise ValueError(
        f"the tokenizer makes {tokenizer.convert_ids_to_tokens(whole)} of 'a'; llama.cpp can add a begin "
        f"({tokenizer.bos_token}) and an end ({tokenizer.eos_token}) to a text, nothing else"
    )


def _write_special(writer: Any, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> None:
    """Writes the special tokens; what ends a generation beside the end of text goes where llama.cpp looks for it."""
    for name in ("bos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(stops), None)
    if end is None:
        return
    writer.add_eos_token_id(end)
    others = [index for index in stops if index != end]
    for add, index in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(index)
    if len(others) > 2:
        names = tokenizer.convert_ids_to_tokens(others[2:])
        logger.warning("GGUF: three tokens can end a generation; llama.cpp is not told of %s", ", ".join(names))


def _write_templates(writer: Any, templates: str | Mapping[str, str] | None) -> None:
    """Writes the chat template, or several by their names."""
    if isinstance(templates, Mapping):
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])
    elif templates:
        writer.add_chat_template(templates)

"""Whether models read a text as the same tokens, without which figures by the token say nothing.

Perplexity a token, KL and agreement compare what two models say of one token. So the models of a comparison are scored
on the same windows, and their tokenizers must agree. They are compared by what they do, not by their files:

    every token that both have has one id in both, and every id that both have is one token
    the very windows that are scored are the same

Padding may differ, and so may chat templates where no conversation is scored. Prompts are written by the template of
the first model for all, and it is said where another model's differs. A model without a chat template is scored
on conversations as the first model's template writes them, and it is said. Where an id has another name because an
added token was renamed, such as <|reserved_1|> to <|im_start|>, or where one tokenizer has more tokens than the other,
the models are compared and it is said. A GGUF file's tokenizer is what transformers makes of it: where that alone cuts
the text in another way, the file is judged on the tokens of the others, and it is said. All else is refused, before a
model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmqat.evaluate.perplexity import TokenWindows
from llmqat.models import load_tokenizer, model_file, resolve_spec, shortened

log = logging.getLogger(__name__)

Windows = Mapping[str, TokenWindows]
"""Windows of texts, by the text's name."""

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
"""Patterns of the files that tokenizers lie in."""
PROBES = (
    "The sun rose at 06:30; 1,234 people (and one dog) saw it - didn't they?",
    "  two  spaces,\ttabs\r\nand\n\nlines \n",
    "\u00dcn\u00efc\u00f6d\u00e9 \ufb01ne \u00bd \uff21\uff22, \u00e9 or e\u0301, \u65e5\u672c, \u0440\u0443",
    "def f(x):\n    return x ** 2  # <s></s> [INST] <|endoftext|> <unk>",
)
"""Texts in which normalizers, the cutting of text and special tokens show, where no other text is at hand."""


@dataclass(frozen=True)
class Shared:
    """What models that read a text as the same tokens are judged with."""

    tokenizer: Any
    windows: Windows
    notes: Mapping[str, tuple[str, ...]]  # by model, what its reader must know


def shared_tokenizer(models: Mapping[str, str], windows_of: Callable[[Any], Windows], prompted: bool = False) -> Shared:
    """Returns the tokenizer that all models are judged with, and the windows that it makes.

    It is that of the first model that has one; a model without one is judged with it too.

    Args:
        models: specs by the names that tables call the models.
        windows_of: cuts the texts with a tokenizer.
        prompted: the models also answer prompts, which the first model's chat template writes.

    Raises:
        ValueError: no model has a tokenizer, one cannot be read, or two read the texts as other tokens.
    """
    own = {name: own_tokenizer(spec) for name, spec in models.items()}
    found = [name for name in models if own[name] is not None]
    if not found:
        raise ValueError(
            f"there is no tokenizer beside {shortened(list(models))}; copy tokenizer.json and tokenizer_config.json of "
            "the original model beside the weights"
        )
    first = next((name for name in found if not is_gguf(models[name])), found[0])
    windows = windows_of(own[first])
    notes: dict[str, tuple[str, ...]] = {}
    for name, spec in models.items():
        if own[name] is None:
            notes[name] = (f"{name} has no tokenizer beside it: it is judged on the tokens of {first}.",)
        elif name != first:
            templates = _prompts_noted(name, own[name], first, own[first]) if prompted else ()
            notes[name] = (*templates, *_noted(name, spec, own[name], first, own[first], windows, windows_of))
    return Shared(own[first], windows, {name: said for name, said in notes.items() if said})


def _prompts_noted(name: str, tokenizer: Any, first: str, reference: Any) -> tuple[str, ...]:
    """Returns what is to be said of a model that would be asked in another way than the first model."""
    own, theirs = tokenizer.chat_template, reference.chat_template
    if own == theirs:
        return ()
    asked = f"without, as {first} has none" if theirs is None else f"with that of {first}"
    return (f"{name} has {'no' if own is None else 'another' if theirs else 'a'} chat template: it is asked {asked}.",)


def _noted(
    name: str,
    spec: str,
    tokenizer: Any,
    first: str,
    reference: Any,
    windows: Windows,
    windows_of: Callable[[Any], Windows],
) -> tuple[str, ...]:
    """Returns what is to be said of a model whose tokenizer is nearly that of the first.

    Raises:
        ValueError: it is another.
    """
    said: list[str] = []
    scores_chats = any(one.answers for one in windows.values())
    if scores_chats and tokenizer.chat_template is None and reference.chat_template is not None:
        tokenizer.chat_template = reference.chat_template
        said.append(f"{name} has no chat template: it is judged on conversations as {first} writes them.")
    alike = works_alike(tokenizer, reference)
    if alike and not (scores_chats and tokenizer.chat_template != reference.chat_template):
        return tuple(said)
    clash, note = vocabulary_difference(tokenizer, reference)
    cut = None if clash else _windows_difference(tokenizer, windows, windows_of)
    if alike and cut:
        raise ValueError(
            f"{name} has another chat template than {first}, by which the conversations are other tokens: {cut}. Score "
            "each in a call of its own, or copy the chat template of one beside the other"
        )
    if clash or (cut and not is_gguf(spec)):
        raise ValueError(
            f"{name} has another tokenizer than {first}: {clash or cut}. Perplexity, KL and agreement are figures by "
            "the token, so the two cannot be compared by them; score each in a call of its own, and compare their "
            "word perplexity (--protocol wikitext), which does not depend on the tokenizer"
        )
    if note:
        said.append(f"{name} has nearly the tokenizer of {first}: {note}.")
    if cut:
        said.append(
            f"The tokenizer that transformers makes of {name} differs from that of {first}: {cut}. It is judged on the "
            f"tokens of {first}."
        )
    return tuple(said)


def is_gguf(spec: str) -> bool:
    """Returns whether `spec` names a GGUF file."""
    file = model_file(spec)
    return file is not None and file.suffix == ".gguf"


def own_tokenizer(spec: str) -> Any:
    """Returns the tokenizer beside the model `spec`, or None where there is none.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: the tokenizer is not readable.
    """
    source = resolve_spec(spec)
    if isinstance(source, Path) and not any(True for pattern in TOKENIZER_FILES for _ in source.glob(pattern)):
        return None
    return load_tokenizer(source, spec)


def works_alike(one: Any, other: Any) -> bool:
    """Returns whether two tokenizers are known to do the same, by what they are made of."""
    if not (hasattr(one, "backend_tokenizer") and hasattr(other, "backend_tokenizer")):
        return False
    ids = [(tokenizer.bos_token_id, tokenizer.eos_token_id) for tokenizer in (one, other)]
    return ids[0] == ids[1] and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()


def vocabulary_difference(own: Any, reference: Any) -> tuple[str, str]:
    """Returns how the ids of two tokenizers clash, and how else they differ; each empty where they do not."""
    ours, theirs = own.get_vocab(), reference.get_vocab()
    moved = [token for token in ours if token in theirs and ours[token] != theirs[token]]
    if moved:
        token = min(moved, key=lambda token: ours[token])
        return f"{len(moved)} tokens have other ids, such as {token!r}: {ours[token]}, there {theirs[token]}", ""
    own_names, names = ({number: token for token, number in ids.items()} for ids in (ours, theirs))
    renamed = [number for number in sorted(own_names) if number in names and own_names[number] != names[number]]
    shown = shortened([f"{number}: {own_names[number]!r}, there {names[number]!r}" for number in renamed], 3)
    if any(
        number not in own.added_tokens_decoder or number not in reference.added_tokens_decoder for number in renamed
    ):
        return f"{len(renamed)} ids are other tokens: {shown}", ""
    notes = [f"added tokens have other names ({shown})"] if renamed else []
    for more, less, whose in ((own_names, names, "more"), (names, own_names, "fewer")):
        if beyond := [repr(more[number]) for number in sorted(more) if number not in less]:
            notes.append(f"{len(beyond)} tokens {whose} ({shortened(beyond, 3)})")
    return "", "; ".join(notes)


def reading_difference(own: Any, reference: Any, texts: Sequence[str] = PROBES) -> str:
    """Returns which of `texts` two tokenizers read as other tokens; empty where they read all alike."""
    for text in texts:
        ours, theirs = (list(tokenizer(text, verbose=False)["input_ids"]) for tokenizer in (own, reference))
        if ours != theirs:
            return f"{text[:40]!r} is {shortened(list(map(str, ours)))}, there {shortened(list(map(str, theirs)))}"
    return ""


def _windows_difference(tokenizer: Any, windows: Windows, windows_of: Callable[[Any], Windows]) -> str:
    """Returns where the windows that a tokenizer makes are not `windows`; empty where they are."""
    try:
        found = windows_of(tokenizer)
    except ValueError as error:  # by its tokens the text is too short
        return str(error)
    for name, theirs in windows.items():
        ours = found[name]
        if ours.ids.shape == theirs.ids.shape and torch.equal(ours.ids, theirs.ids):
            continue
        count = min(ours.ids.numel(), theirs.ids.numel())
        pair = [side.ids.flatten()[:count] for side in (ours, theirs)]
        at = next(iter((pair[0] != pair[1]).nonzero().flatten().tolist()), count)
        here, there = (repr(tokenizer.decode(side[at : at + 1].tolist())) for side in pair)
        return f"token {at} of {name} is {here}, there {there}"
    return ""

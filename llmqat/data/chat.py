"""Conversations as token ids, and which of them the assistant wrote: those alone are labels.

A conversation is rendered by the tokenizer's chat template. Where the template marks the assistant's words with
`{% generation %}`, transformers says which tokens they are. Where it does not, they are found from prefixes: the
template of the messages before an answer, opened for the answer, must begin the template of the messages up to it, and
that must begin the whole; what lies between is the answer, up to its end-of-turn token. A template that rewrites
earlier turns (one that drops their reasoning, for example) fails this, and is refused, never guessed at.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat(NamedTuple):
    """A conversation."""

    messages: list[dict[str, Any]]
    """As the chat template takes them: mappings with `role` and `content`."""
    where: str
    """Names it in errors."""
    answers_from: int = 0
    """Number of the first message that may count as an answer; what stands before is a prompt."""
    template: str | None = None
    """Chat template in place of the tokenizer's own."""

    @property
    def size(self) -> int:
        """Characters, about."""
        return sum(len(str(message.get("content"))) for message in self.messages)


class Completion(NamedTuple):
    """A prompt and its completion, plain text."""

    prompt: str
    completion: str

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.prompt) + len(self.completion)


def check_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """Returns `messages` as a list of mappings, without fields that are None.

    Raises:
        ValueError: when they are no list of mappings with a role, or none is the assistant's.
    """
    given = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not given or not all(isinstance(message, Mapping) and message.get("role") for message in messages):
        raise ValueError(f"{where} is no conversation: a list of mappings with `role` and `content` is needed")
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if not any(message["role"] == ASSISTANT for message in kept):
        roles = ", ".join(str(message["role"]) for message in kept) or "none"
        raise ValueError(f"{where} has no message of the role {ASSISTANT!r} to learn from; its roles: {roles}")
    return kept


def chat_content(messages: Sequence[Mapping[str, Any]]) -> str:
    """Returns the text that a conversation is hashed by."""
    return json.dumps(messages, ensure_ascii=False, sort_keys=True)


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns a conversation's ids, and 1 for each that is the assistant's, else 0.

    Raises:
        ValueError: when there is no chat template, or the assistant's words cannot be told from it.
    """
    template = chat.template or tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(
            "the tokenizer has no chat template (or several), and conversations need one; give data.chat_template=FILE"
        )
    if _GENERATION.search(template) and chat.answers_from == 0:
        return _by_markers(chat, tokenizer, template)
    return _by_prefixes(chat, tokenizer, template)


def _by_markers(chat: Chat, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(
        chat.messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, scored = list(found["input_ids"]), list(found["assistant_masks"])
    if not any(scored):
        raise ValueError(
            f"{chat.where}: the chat template marks no token as the assistant's; check its "
            "{% generation %} … {% endgeneration %}"
        )
    return ids, scored


def _by_prefixes(chat: Chat, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[list[int], list[int]]:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for, which a chat template "
            "without {% generation %} markers needs; give a template with markers: data.chat_template=FILE"
        )
    whole = _rendered(chat.messages, tokenizer, template)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins = [begin for begin, _ in found["offset_mapping"]]
    scored = [0] * len(begins)
    for number, message in enumerate(chat.messages):
        if message["role"] != ASSISTANT or number < chat.answers_from:
            continue
        start, end = _answer(chat, number, whole, tokenizer, template)
        low, high = bisect_left(begins, start), bisect_right(begins, end - 1)
        scored[low:high] = [1] * (high - low)
    if not any(scored):
        raise ValueError(f"{chat.where}: all answers are empty, so there is nothing to learn from")
    return list(found["input_ids"]), scored


def _answer(chat: Chat, number: int, whole: str, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[int, int]:
    """Returns where the characters of message `number` begin and end in `whole`, white space at its end left out."""
    if number == 0:
        raise ValueError(
            f"{chat.where} begins with the assistant, where a chat template without {{% generation %}} markers does "
            "not tell its words from the rest; give a template with markers: data.chat_template=FILE"
        )
    before = _rendered(chat.messages[:number], tokenizer, template, add_generation_prompt=True)
    after = _rendered(chat.messages[: number + 1], tokenizer, template)
    if not (len(before) < len(after) and after.startswith(before) and whole.startswith(after)):
        raise ValueError(
            f"{chat.where}: the chat template has no {{% generation %}} markers, and renders message {number} "
            "differently when others follow or it is asked for, so the assistant's words cannot be told from the rest; "
            "give a template with markers: data.chat_template=FILE"
        )
    return len(before), max(len(before), len(after.rstrip()))


def _rendered(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))


def encode_completion(
    pair: Completion, tokenizer: PreTrainedTokenizerBase, before: list[int], after: list[int]
) -> tuple[list[int], list[int]]:
    """Returns the ids of a prompt and its completion, tokenized apart, and 1 for each of the completion's and the end.

    Args:
        pair: the texts.
        tokenizer: makes ids of them.
        before: what stands before a text.
        after: what ends it.
    """
    prompt, completion = (list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in pair)
    prompt, completion = before + prompt, completion + after
    return prompt + completion, [0] * len(prompt) + [1] * len(completion)

"""Converts conversations to token ids, and marks the assistant's tokens: only these are labels.

The tokenizer's chat template renders a conversation. It also gets the row's tools, documents and variables. The
assistant's tokens are found in one of two ways:

    markers    the template encloses them in `{% generation %}`, and transformers reports them
    prefixes   used without markers, or where the first messages are only a prompt (`Chat.answers_from`). The template
               renders the messages before an answer with the generation prompt, and the messages up to the answer.
               The first text must begin the second, and the second must begin the whole conversation. What lies
               between their ends is the answer, with its end-of-turn token.

A template that rewrites earlier turns, for example one that drops their reasoning, breaks the prefixes. Then an error
is raised; labels are never guessed.

Nothing of a conversation is dropped. Where the template does not read something (tools, a tool call, an unknown role),
an error names it.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ASSISTANT = "assistant"
ROLES = {"human": "user", "gpt": ASSISTANT}
"""Roles as ShareGPT calls them, and their names elsewhere."""
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that a template is given under each of these names, by older transformers as well."""
_CONTENT_FIELDS = ("tool_calls", "function_call", "tool_plan", "documents", "citations", *_REASONING)
"""Fields of a message, beside `content`, that hold some of its words."""
_LOSS_FIELDS = ("weight", "train", "training", "trainable", "loss")
"""Fields of a message by which other programs leave it out of the loss."""
_WORDS = "USERWORDS"
_THINK = re.compile(r"</?think(?:ing)?>")
"""What encloses reasoning within an answer."""


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
    tools: list[dict[str, Any]] | None = None
    """What the template gets as `tools`."""
    documents: list[dict[str, Any]] | None = None
    """What the template gets as `documents`."""
    variables: dict[str, Any] | None = None
    """What the template gets besides, by name."""
    unread: tuple[str, ...] = ()
    """Columns of its row that nobody reads."""

    @property
    def size(self) -> int:
        """Characters, about."""
        return sum(len(str(message.get("content"))) for message in self.messages)

    def template_arguments(self) -> dict[str, Any]:
        """Returns what the template gets beside the messages; `variables` win, as in TRL."""
        return {"tools": self.tools, "documents": self.documents, **(self.variables or {})}


class Completion(NamedTuple):
    """A prompt and its completion, plain text."""

    prompt: str
    completion: str

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.prompt) + len(self.completion)


def check_messages(messages: Any, where: str, *, answered: bool = True) -> list[dict[str, Any]]:
    """Returns `messages` as a list of mappings with `role`, without fields that are None.

    `from` and `value`, as in ShareGPT's data, become `role` and `content`.

    Args:
        messages: of one conversation.
        where: names it in errors.
        answered: whether one of them must be the assistant's.

    Raises:
        ValueError: when they are no list of mappings with a role, one says nothing, or an answer is missing.
    """
    given = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not given or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"{where} is no conversation: a list of mappings with `role` and `content` is needed")
    kept = [_message(message) for message in messages]
    for number, message in enumerate(kept):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{where} is no conversation: message {number} has no `role`")
        if not {"content", *_CONTENT_FIELDS} & message.keys():
            raise ValueError(f"{where}: message {number} (role {message['role']!r}) has no `content`")
        _texts(message.get("content"), f"{where}: message {number}")
        for name in _LOSS_FIELDS:
            if message.get(name, 1) not in (1, True):
                raise ValueError(
                    f"{where}: message {number} has {name}={message[name]!r}, which llmqat does not read: all that the "
                    "assistant says is learned; leave the field out, or give rows with `prompt` and `completion`"
                )
    if answered and not any(message["role"] == ASSISTANT for message in kept):
        roles = ", ".join(str(message["role"]) for message in kept) or "none"
        raise ValueError(f"{where} has no message of the role {ASSISTANT!r} to learn from; its roles: {roles}")
    return kept


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in given.items() if value is not None}
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message["role"] = ROLES.get(role, role)
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    return message


def _texts(content: Any, where: str) -> list[str]:
    """Returns the texts that a message's content holds: itself, or those of its parts."""
    if not isinstance(content, list):
        return [content] if isinstance(content, str) else []
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{where} holds a part of type {kind!r}, and llmqat trains on text alone")
        texts.append(text)
    return texts


def chat_content(messages: Sequence[Mapping[str, Any]]) -> str:
    """Returns the text that a conversation is hashed by."""
    return json.dumps(messages, ensure_ascii=False, sort_keys=True, default=str)


# Rendering


def render_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a conversation as text.

    Raises:
        ValueError: when there is no chat template, or it does not take all of the conversation.
    """
    return _opened(chat, tokenizer)[1]


def encode_asked(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids of a conversation, and of what the template puts before the answer that the model is to write.

    Raises:
        ValueError: when there is no chat template, or it does not take all of the conversation.
    """
    chat, _ = _opened(chat, tokenizer)
    text = _rendered(chat.messages, chat, tokenizer, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def around_words(tokenizer: Any) -> tuple[str, str, str]:
    """Returns what a chat template puts before a user's first words, before later ones, and before the answer."""
    turns = [("user", "FIRSTWORDS"), (ASSISTANT, "ANSWERWORDS"), ("user", "LASTWORDS")]
    messages = [{"role": role, "content": words} for role, words in turns]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception:  # there is none, or it takes no such conversation: templates may fail in any way
        return "", "", ""
    before, _, rest = text.partition("FIRSTWORDS")
    between, _, after = rest.partition("ANSWERWORDS")[2].partition("LASTWORDS")
    return before, between, after


def _opened(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[Chat, str]:
    """Returns the conversation as its template takes it, the template among its fields, and its text."""
    template = _template_of(chat, tokenizer)
    chat = chat._replace(template=template)
    _check_beside(chat, template)
    _check_fields(chat, template)
    chat = chat._replace(messages=[_as_taken(chat, message, tokenizer) for message in chat.messages])
    chat, whole = _with_arguments(chat, tokenizer)
    _check_words(chat, whole)
    return chat, whole


def _template_of(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the conversation's template; of several that the tokenizer has, the one that transformers would take."""
    asked = (chat.variables or {}).get("chat_template") or chat.template
    try:
        return tokenizer.get_chat_template(asked, chat.template_arguments()["tools"])
    except ValueError as error:
        raise ValueError(
            "the tokenizer has no chat template (or several, none of them the default), and conversations need one; "
            "give data.chat_template=FILE"
        ) from error


@lru_cache(maxsize=64)
def _variables_of(template: str) -> frozenset[str]:
    """Returns the variables that a chat template reads."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)  # nothing is rendered
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template))))
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is no Jinja template: {error}") from error


def _check_beside(chat: Chat, template: str) -> None:
    """Raises where the template does not read what it is to get, or what it reads is in a column of its own."""
    known = _variables_of(template)
    reserved = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
        *("tools", "documents", "chat_template", "kwargs")
    }
    for name, value in chat.template_arguments().items():
        if name in reserved or name == "messages":
            raise ValueError(f"{chat.where}: {name!r} in `chat_template_kwargs` is not for rows to say; leave it out")
        if value and name not in known and name != "chat_template":
            column = name if name in ("tools", "documents") else "chat_template_kwargs"
            raise ValueError(
                f"{chat.where}: the row has {name!r}, which the chat template does not read; give one that does "
                f"(data.chat_template=FILE), or set the column aside: data.ignore_columns=[{column}]"
            )
    if meant := sorted(known & set(chat.unread)):
        raise ValueError(
            f"{chat.where}: the chat template reads a variable {meant[0]!r}, which is a column of its own; give it in "
            f"a column `chat_template_kwargs`, or set it aside: data.ignore_columns=[{meant[0]}]"
        )


_said: set[str] = set()


def _check_fields(chat: Chat, template: str) -> None:
    """Raises where messages have fields with words in them that the template does not name; logs other fields once."""
    named = set(re.findall(r"\w+", template))
    fields = {name for message in chat.messages for name, value in message.items() if value or name == "content"}
    unread = sorted(fields - named - {*_LOSS_FIELDS, *(_REASONING if named & set(_REASONING) else ())})
    if lost := [name for name in unread if name in _CONTENT_FIELDS]:
        raise ValueError(
            f"{chat.where}: messages have {lost[0]!r}, which the chat template does not read; give one that does: "
            "data.chat_template=FILE"
        )
    if unread:
        names = ", ".join(unread)
        _say_once(names, "%s: fields of messages that the chat template does not read: %s", chat.where, names)


def _say_once(key: str, *said: str) -> None:
    if key not in _said:
        _said.add(key)
        log.warning(*said)


def _as_taken(chat: Chat, message: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns `message` with its content as text or as a list of parts, whichever the template takes."""
    reasoning = next((message[name] for name in _REASONING if message.get(name)), None)
    if reasoning is not None:
        message = {**message, **dict.fromkeys(_REASONING, reasoning)}
    content = message.get("content")
    if not isinstance(content, (str, list)):
        return message
    takes_text, takes_parts = _content_forms(tokenizer, str(chat.template))
    if isinstance(content, str):
        parts = takes_parts and not takes_text
        return {**message, "content": [{"type": "text", "text": content}]} if parts else message
    if takes_parts:
        return message
    texts = _texts(content, chat.where)
    if len(texts) > 1:
        raise ValueError(
            f"{chat.where}: the content of a message is a list of {len(texts)} parts, and the chat template takes text "
            "alone; join them in the rows, or give a template that takes parts: data.chat_template=FILE"
        )
    return {**message, "content": "".join(texts)}


@lru_cache(maxsize=8)
def _content_forms(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[bool, bool]:
    """Returns whether a template takes content as text, and as a list of parts; of one that takes neither, text."""

    def takes(content: Any) -> bool:
        messages = [{"role": "user", "content": content}, {"role": ASSISTANT, "content": content}]
        try:
            found = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except Exception:  # a template may fail in any way on what it does not take
            return False
        return _WORDS in found and "'type'" not in found and '"type"' not in found

    text, parts = takes(_WORDS), takes([{"type": "text", "text": _WORDS}])
    return text or not parts, parts


def _with_arguments(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[Chat, str]:
    """Returns the conversation and its text, arguments of tool calls as mappings where the template needs them so.

    Templates write them as JSON; what is JSON already would be written as a string within a string.
    """
    given = [
        call.get("function", call).get("arguments")
        for message in chat.messages
        for call in message.get("tool_calls") or ()
    ]
    texts = [arguments for arguments in given if isinstance(arguments, str)]
    if not texts:
        return chat, _rendered(chat.messages, chat, tokenizer)
    try:
        whole = _rendered(chat.messages, chat, tokenizer)
    except ValueError:
        whole = None
    if whole is not None and not any(json.dumps(text, ensure_ascii=False) in whole for text in texts):
        return chat, whole
    chat = chat._replace(messages=[_with_parsed_arguments(message, chat.where) for message in chat.messages])
    return chat, _rendered(chat.messages, chat, tokenizer)


def _with_parsed_arguments(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        if isinstance(arguments := function.get("arguments"), str):
            try:
                function = {**function, "arguments": json.loads(arguments)}
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: arguments of a tool call are no JSON: {arguments[:60]!r}") from error
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def _check_words(chat: Chat, whole: str) -> None:
    """Raises where the template has left out what somebody says; of reasoning in earlier answers it is logged."""
    last = max((number for number, one in enumerate(chat.messages) if one["role"] == ASSISTANT), default=None)
    for number, message in enumerate(chat.messages):
        if message["role"] == ASSISTANT:
            _check_answer(chat, number, whole, is_last=number == last)
            continue
        for text in _texts(message.get("content"), chat.where):
            if not _is_in(text.strip(), whole, exact=message["role"] not in ("system", "developer")):
                raise ValueError(
                    f"{chat.where}: the chat template leaves out the words of message {number} (role "
                    f"{message['role']!r}); give one that has them: data.chat_template=FILE"
                )


def _check_answer(chat: Chat, number: int, whole: str, is_last: bool) -> None:
    """Raises where the template has left out reasoning, or the rest, of the last answer; of others it logs it once."""
    parts = [part for text in _texts(chat.messages[number].get("content"), chat.where) for part in _THINK.split(text)]
    if all(_is_in(part.strip(), whole, exact=False) for part in parts):
        return
    lost = f"{chat.where}: the chat template leaves out words of message {number}, an answer"
    if is_last:
        raise ValueError(f"{lost}, such as its reasoning; give one that has them: data.chat_template=FILE")
    _say_once("answers", "%s; they are not learned", lost)


def _is_in(text: str, whole: str, exact: bool) -> bool:
    """Returns whether `whole` holds a text, perhaps as JSON; of one that is not exact, half of its words will do."""
    if text in whole or json.dumps(text, ensure_ascii=False)[1:-1] in whole:
        return True
    words = text.split()  # some templates take commands, such as /no_think, out of a system message
    return not exact and sum(word in whole for word in words) * 2 >= len(words)


def _rendered(messages: list[dict[str, Any]], chat: Chat, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    return str(_applied(messages, chat, tokenizer, tokenize=False, **options))


def _applied(messages: list[dict[str, Any]], chat: Chat, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """Returns what the tokenizer makes of `messages` with all that the template is to get.

    Raises:
        ValueError: when the template cannot render them.
    """
    given = {**chat.template_arguments(), "chat_template": chat.template}
    try:
        return tokenizer.apply_chat_template(messages, **given, **options)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{chat.where}: the chat template cannot render it: {error}") from error


# Labels


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns a conversation's ids, and 1 for each that is the assistant's, else 0.

    Raises:
        ValueError: when there is no chat template, it does not take all of the conversation, or the assistant's words
            cannot be told from it.
    """
    chat, whole = _opened(chat, tokenizer)
    if _GENERATION.search(str(chat.template)) and chat.answers_from == 0:
        return _by_markers(chat, tokenizer)
    return _by_prefixes(chat, whole, tokenizer)


def _by_markers(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    found = _applied(chat.messages, chat, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, scored = list(found["input_ids"]), list(found["assistant_masks"])
    if not any(scored):
        raise ValueError(
            f"{chat.where}: the chat template marks no token as the assistant's; check its "
            "{% generation %} … {% endgeneration %}"
        )
    return ids, scored


def _by_prefixes(chat: Chat, whole: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for, which a chat template "
            "without {% generation %} markers needs; give a template with markers: data.chat_template=FILE"
        )
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins = [begin for begin, _ in found["offset_mapping"]]
    scored = [0] * len(begins)
    for number, message in enumerate(chat.messages):
        if message["role"] != ASSISTANT or number < chat.answers_from:
            continue
        start, end = _answer(chat, number, whole, tokenizer)
        low, high = bisect_left(begins, start), bisect_right(begins, end - 1)
        if low > 0 and found["offset_mapping"][low - 1][1] > start:
            low -= 1
            token = whole[slice(*found["offset_mapping"][low])]
            _say_once("within", "%s: %s", chat.where, _WITHIN.format(token=token, number=number))
        scored[low:high] = [1] * (high - low)
    if not any(scored):
        raise ValueError(f"{chat.where}: all answers are empty, so there is nothing to learn from")
    return list(found["input_ids"]), scored


_WITHIN = (
    "the token {token!r} begins in the generation prompt and ends in the answer (message {number}). It is learned, but "
    "a server cuts the prompt before it; where the prompt ends in a space, move that space to the front of the answer: "
    "data.chat_template=FILE"
)


def _answer(chat: Chat, number: int, whole: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Returns where the characters of message `number` begin and end in `whole`, white space at its end left out."""
    if number == 0:
        raise ValueError(
            f"{chat.where} begins with the assistant, where a chat template without {{% generation %}} markers does "
            "not tell its words from the rest; give a template with markers: data.chat_template=FILE"
        )
    before = _rendered(chat.messages[:number], chat, tokenizer, add_generation_prompt=True)
    after = _rendered(chat.messages[: number + 1], chat, tokenizer)
    if not (len(before) < len(after) and after.startswith(before) and whole.startswith(after)):
        raise ValueError(
            f"{chat.where}: the chat template has no {{% generation %}} markers, and renders message {number} "
            "differently when others follow or it is asked for, so the assistant's words cannot be told from the rest; "
            "give a template with markers: data.chat_template=FILE"
        )
    return len(before), max(len(before), len(after.rstrip()))


def encode_completion(
    pair: Completion, tokenizer: PreTrainedTokenizerBase, before: list[int], after: list[int]
) -> tuple[list[int], list[int]]:
    """Returns the token ids of a prompt with its completion, and for each id 1 where it is a label, else 0.

    Prompt and completion are tokenized separately. The completion and the ids in `after` are labels.

    Args:
        pair: the two texts.
        tokenizer: tokenizes them, without special tokens.
        before: ids put in front of the prompt, such as begin-of-text.
        after: ids put behind the completion, such as end-of-text.
    """
    prompt, completion = (list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in pair)
    prompt, completion = before + prompt, completion + after
    return prompt + completion, [0] * len(prompt) + [1] * len(completion)

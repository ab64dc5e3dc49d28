"""Prompts that a model answers or continues: words, the beginning of a text, or messages that wait for an answer.

    a text file                 a prompt a line
    rows (.jsonl, ...), hub:    `prompt` (words, or messages), `messages` up to the first answer, or `text`;
                                in .jsonl files a line may also be the words alone, as a JSON string
    instructions                64 plain instructions that come with llmqat

Words become a user's turn if the tokenizer has a chat template; otherwise they are the beginning of a text. Rows whose
`prompt` and `completion` are both text are trained without the chat template. So their prompt is always the beginning
of a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmqat.data.blocks import leading_ids
from llmqat.data.chat import ASSISTANT, Chat, Completion, check_messages, encode_asked
from llmqat.data.config import HUB_PREFIX
from llmqat.data.hub import open_hub, open_local
from llmqat.data.instructions import INSTRUCTIONS
from llmqat.data.rows import MESSAGES_COLUMNS, TEMPLATE_COLUMNS, RowReader, without_nulls
from llmqat.data.text import check_prose, is_rows, nearest, read_text, text_config

BUILT_IN = "instructions"
"""Names the prompts that come with llmqat."""

Prompt = str | Completion | Chat
"""Words; the beginning of a text; or messages."""


def read_prompts(source: str | Path, most: int | None = None) -> list[Prompt]:
    """Returns the first `most` prompts of `source`, all of them where it is None.

    Args:
        source: `instructions`, a text file, a file or folder of rows, or hub:NAME[:CONFIG[:SPLIT]].
        most: how many are read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line or row is no prompt, or there is none.
    """
    found = list(islice(_prompts(str(source)), most))
    if not found:
        raise ValueError(f"{source} holds no prompt")
    return found


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids of `prompt`, by the chat template where the tokenizer has one, up to where the model writes.

    Raises:
        ValueError: it is a conversation, and there is no chat template or it does not take it.
    """
    if isinstance(prompt, str) and tokenizer.chat_template is not None:
        prompt = Chat([{"role": "user", "content": prompt}], f"the prompt {prompt[:40]!r}")
    if isinstance(prompt, Chat):
        return encode_asked(prompt, tokenizer)
    words = prompt.prompt if isinstance(prompt, Completion) else prompt
    return leading_ids(tokenizer) + list(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])


def _prompts(source: str) -> Iterator[Prompt]:
    path = Path(source)
    if source == BUILT_IN:
        yield from INSTRUCTIONS
    elif source.startswith(HUB_PREFIX):
        config = text_config(source)
        yield from _of_rows(open_hub(config, config.split or "train"), source)
    elif not path.exists():
        raise FileNotFoundError(
            f"no prompts at {path}{nearest(path)}; give a text file with a prompt a line, a .jsonl file, or {BUILT_IN}"
        )
    elif is_rows(path) and not (path.is_file() and path.suffix in (".jsonl", ".ndjson")):
        yield from _of_rows(open_local(path, "train"), source)
    elif path.is_dir():
        raise ValueError(f"{path} is a folder of texts; give a text file with a prompt a line, or rows")
    else:
        yield from _of_lines(path)


def _of_lines(path: Path) -> Iterator[Prompt]:
    """Yields a prompt for each line of a text file, or of a .jsonl file."""
    rows = is_rows(path)
    if not rows:
        check_prose(path)
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield _of_json(line, f"{path} line {number}") if rows else line


def _of_json(line: str, where: str) -> Prompt:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {line[:60]!r} ({error})") from error
    return _of_row(found, line, where)


def _of_rows(rows: Any, source: str) -> Iterator[Prompt]:
    for number, row in enumerate(rows):
        yield _of_row(without_nulls(row), json.dumps(row, default=str), f"row {number} of {source}")


def _of_row(row: Any, line: str, where: str) -> Prompt:
    if isinstance(row, Mapping):
        asked = next((row[name] for name in ("prompt", *MESSAGES_COLUMNS) if isinstance(row.get(name), list)), None)
        if asked is not None:
            return _of_messages(row, asked, where)
        words = row.get("prompt", row.get("text"))
        if isinstance(words, str) and isinstance(row.get("completion"), str) and words.strip():
            return Completion(words, row["completion"])
    else:
        words = row
    if not isinstance(words, str) or not words.strip():
        raise ValueError(
            f'{where} has no prompt: {line[:60]!r}; write a string, {{"prompt": "..."}} or {{"messages": [...]}}'
        )
    return words


def _of_messages(row: Mapping[str, Any], given: list[Any], where: str) -> Chat:
    """Returns the messages before the first answer, with all that the chat template gets beside them."""
    messages = check_messages(given, where, answered=False)
    count = next((n for n, message in enumerate(messages) if message["role"] == ASSISTANT), len(messages))
    if not count:
        raise ValueError(f"{where} has no message before the assistant's, so there is nothing to answer")
    chat = RowReader("messages", "messages", ("messages", *TEMPLATE_COLUMNS), where).chat(row, messages[:count], where)
    assert isinstance(chat.content, Chat)
    return chat.content

"""Reads rows of a dataset as documents: finds the format of the rows (as TRL names it) and what each column means.

A column is used, or an error names it, or it means nothing here and the log names it once. Columns that are used:

    text                        plain text
    messages                    a conversation
    prompt, completion          text or messages; with `label`, only rows whose answer was wanted
    chosen, rejected            the chosen side; what both have in common is the prompt where no `prompt` is given
    tools, documents,           go to the chat template with a conversation
    chat_template_kwargs

Source: TRL, "Dataset formats and types"; transformers, "Chat templates".
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from llmqat.data.chat import ASSISTANT, Chat, Completion, chat_content, check_messages
from llmqat.data.documents import Piece, document_hash, pieces_of

log = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "content", "document", "article", "raw_content", "page")
"""Column names taken for the text when several columns hold strings; the first that is there."""
MESSAGES_COLUMNS = ("messages", "conversations", "conversation")
"""Column names taken for a conversation."""
COLUMN_OF = {"prompt_completion": "completion", "preference": "chosen"}
"""Format -> the column that its answers are in."""
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
"""Columns that the chat template gets with a conversation."""
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_OF_A_CONVERSATION = ("system", "system_prompt", "functions", "function_call", "tool_calls")
_SET_ASIDE = "to ignore it: data.ignore_columns=[{column}]"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowReader:
    """How the rows of a dataset are read."""

    format: str
    """A key of `_READERS`."""
    column: str
    """Holds the text, the conversation or the answer."""
    columns: tuple[str, ...]
    """All that are read."""
    where: str
    """Names the dataset in errors."""
    filled: tuple[str, ...] = ()
    """Columns of structures, in which Arrow writes null for what a row does not have."""
    unread: tuple[str, ...] = ()
    """Columns that are not read; refused where they are variables of the chat template."""
    template: str | None = None
    """Chat template in place of the tokenizer's own."""
    all_labels: bool = False
    """Whether all tokens of conversations, prompts and completions are labels, not the answers alone."""

    @property
    def labelled(self) -> bool:
        """Whether some tokens are no labels."""
        return self.format != "text" and not self.all_labels

    def pieces(self, number: int, row: Row) -> Iterator[Piece]:
        """Yields row `number` as a document, or nothing where it holds no text.

        Raises:
            ValueError: when the row is not what its format says.
        """
        if self.filled:
            row = {**row, **{name: without_nulls(row[name]) for name in self.filled}}
        found = _READERS[self.format](row, self, f"row {number} of dataset {self.where}, column {self.column}")
        return (piece._replace(all_labels=True) for piece in found) if self.all_labels else found

    def chat(self, row: Row, messages: list[dict[str, Any]], where: str, answers_from: int = 0) -> Piece:
        """Returns a conversation of `row` as a piece.

        Raises:
            ValueError: when what the chat template is to get with it cannot be read.
        """
        given = {name: row.get(name) for name in TEMPLATE_COLUMNS}
        chat = Chat(
            messages,
            where,
            answers_from,
            self.template,
            tools=_mappings(given["tools"], f"{where}: `tools`"),
            documents=_mappings(given["documents"], f"{where}: `documents`"),
            variables=_variables(given["chat_template_kwargs"], f"{where}: `chat_template_kwargs`"),
            unread=self.unread,
        )
        beside = {name: value for name, value in chat.template_arguments().items() if value}
        return Piece(chat, document_hash(chat_content([*messages, beside] if beside else messages)))


def row_reader(
    rows: Any,
    where: str,
    *,
    format: str | None = None,
    column: str | None = None,
    template: str | None = None,
    ignored: Sequence[str] = (),
    all_labels: bool = False,
) -> RowReader:
    """Returns how `rows` are read; says in the log which of their columns are not.

    Args:
        rows: a dataset with `column_names` and `features`.
        where: names it in errors.
        format: what a row is; found from the columns where not given.
        column: holds the text, the conversation or the answer; found where not given.
        template: chat template in place of the tokenizer's own.
        ignored: columns that are not looked at.
        all_labels: whether all tokens are labels, whatever a row is.

    Raises:
        ValueError: when format or column are not clear, or a column means something that cannot be done.
    """
    if unknown := [name for name in ignored if name not in rows.column_names]:
        raise ValueError(_no_column(rows, unknown[0], where, "ignore_columns"))
    names = [name for name in rows.column_names if name not in ignored]
    if format is None and column is None:
        _check_answers(names, where)
    found = format or find_format(names, column, where)
    column = column or find_column(rows, names, found, where)
    _check_column(rows, column, found, where)
    _check_meanings(names, column, found, where)
    read = [column, *_also_read(found, names)]
    unread = tuple(name for name in names if name not in read)
    if said := [name for name in unread if name not in ("rejected", "input_ids")]:
        log.info("dataset %s: format %s, column %s; not read: %s", where, found, column, ", ".join(said))
    filled = tuple(name for name in read if _is_filled(rows.features[name]))
    unread = () if found == "text" else unread
    return RowReader(found, column, tuple(read), where, filled, unread, template, all_labels)


def _also_read(format: str, names: Sequence[str]) -> list[str]:
    """Returns the columns that are read beside the one of a format."""
    beside: dict[str, tuple[str, ...]] = {
        "text": (),
        "messages": TEMPLATE_COLUMNS,
        "prompt_completion": ("prompt", "label", *TEMPLATE_COLUMNS),
        "preference": ("prompt", *(() if "prompt" in names else ("rejected",)), *TEMPLATE_COLUMNS),
    }
    return [name for name in beside[format] if name in names]


def _check_answers(names: Sequence[str], where: str) -> None:
    """Raises where rows are of a type of TRL's that has no answer to learn from, or are tokenized already."""
    if "completions" in names and "labels" in names:
        raise ValueError(
            f"dataset {where} has the columns `completions` and `labels` of stepwise supervision, whose steps are not "
            "all to be learned; write the right ones as `completion` beside `prompt`"
        )
    if "prompt" in names and not {"text", *MESSAGES_COLUMNS, *COLUMN_OF.values()} & set(names):
        raise ValueError(
            f"dataset {where} has a column `prompt` and no answers (`completion` or `chosen`) to learn from; let the "
            "model write them (data.source=synthetic data.strategy=prompts), name the column that holds them "
            "(data.format=prompt_completion data.column=ANSWERS), or read prompts as text (data.column=prompt)"
        )
    if "input_ids" in names and "text" not in names:
        raise ValueError(
            f"dataset {where} has a column `input_ids`: it is tokenized already, and llmqat tokenizes text itself; "
            "give the dataset as it was before, or name the column that holds the text: data.column=NAME"
        )


def _check_meanings(names: Sequence[str], column: str, format: str, where: str) -> None:
    """Raises where a column means something that does not reach the text."""
    for name in names:
        if name == column:
            continue
        reason = None
        if name in _MEDIA:
            reason = "holds what is no text, and llmqat trains on text alone"
        elif name in _OF_A_CONVERSATION and format != "text":
            reason = "belongs to a conversation; write it into the messages (`tools` has a column of its own)"
        if reason is not None:
            raise ValueError(f"column {name!r} of dataset {where} {reason}; or {_SET_ASIDE.format(column=name)}")


# Formats


def _text_row(row: Row, reader: RowReader, where: str) -> Iterator[Piece]:
    text = row[reader.column]
    if text and text.strip():
        yield from pieces_of([text], document_hash(text))


def _messages_row(row: Row, reader: RowReader, where: str) -> Iterator[Piece]:
    yield reader.chat(row, check_messages(row[reader.column], where), where)


def _answer_row(row: Row, reader: RowReader, where: str) -> Iterator[Piece]:
    """Yields a prompt, if there is one, and what answers it: both text, or either of them messages."""
    if not _is_wanted(row.get("label", True), where):
        return
    prompt, answer = row.get("prompt"), row[reader.column]
    if answer is None:
        raise ValueError(f"{where}: `{reader.column}` is empty; write the answer into it, or leave the row out")
    if prompt is None and row.get("rejected"):
        prompt, answer = _common_prompt(answer, row["rejected"])
    if isinstance(answer, str):
        if not isinstance(prompt, str):
            raise ValueError(f"{where} is text, so a column `prompt` with text is needed beside it")
        if given := [name for name in TEMPLATE_COLUMNS if row.get(name)]:
            raise ValueError(
                f"{where} is text, which no chat template is applied to, and `{given[0]}` is for the chat template; "
                f"give messages, or {_SET_ASIDE.format(column=given[0])}"
            )
        yield Piece(Completion(prompt, answer), document_hash(chat_content([{"prompt": prompt, "answer": answer}])))
        return
    _check_kinds({"prompt": prompt, reader.column: answer}, where)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
    before, after = (check_messages(part, where, answered=False) for part in (asked, answer))
    messages, count = _joined(before, after, reader.column, where)
    yield reader.chat(row, check_messages(messages, where), where, count)


def _check_kinds(given: Mapping[str, Any], where: str) -> None:
    """Raises where a prompt or an answer is neither text nor messages."""
    for name, value in given.items():
        if isinstance(value, date):
            raise ValueError(
                f"{where}: `{name}` was read as a date, {value}, since each of its values looks like one; give the "
                "rows as Parquet, where a column says that it is text"
            )
        if value is not None and not isinstance(value, (str, list, tuple, dict)):
            raise ValueError(
                f"{where}: `{name}` is {value!r}, a {type(value).__name__}, and text or messages are needed; write it "
                "as text"
            )


def _joined(
    before: list[dict[str, Any]], after: list[dict[str, Any]], column: str, where: str
) -> tuple[list[dict[str, Any]], int]:
    """Returns the messages of a prompt and its answer, which may hold the prompt, and how many are the prompt.

    Raises:
        ValueError: the answer looks like a whole conversation, and the prompt is not in it, or is so several times.
    """
    if after[: len(before)] == before:
        return after, len(before)
    continued = not before or before[-1]["role"] in (ASSISTANT, "system", "developer")
    if continued or not after or after[0]["role"] == ASSISTANT:
        return [*before, *after], len(before)
    plain, whole = ([(one["role"], str(one.get("content")).strip()) for one in part] for part in (before, after))
    ends = [end for end in range(len(before), len(after) + 1) if whole[end - len(before) : end] == plain]
    if len(ends) != 1:
        found = "nowhere" if not ends else f"{len(ends)} times"
        raise ValueError(
            f"{where}: `{column}` begins with the role {after[0]['role']!r}, as a whole conversation does, and has "
            f"`prompt` in it {found}; give the answer alone there, or {_SET_ASIDE.format(column='prompt')}"
        )
    return after, ends[0]


def _is_wanted(label: Any, where: str) -> bool:
    """Returns what an unpaired preference says of its answer: whether it was wanted."""
    if label not in (True, False):
        raise ValueError(
            f"{where}: `label` is {label!r}; beside a completion it says whether that was wanted, true or false; "
            f"rename it, or {_SET_ASIDE.format(column='label')}"
        )
    return bool(label)


def _common_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any]:
    """Returns what chosen and rejected begin with alike, and the rest of the chosen side, which is never empty.

    Source: trl.extract_prompt. A space before the first difference belongs to the answer.
    """
    pairs = zip(chosen, rejected, strict=False)
    length = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    length = min(length, max(len(chosen) - 1, 0))
    if isinstance(chosen, str) and chosen[:length].endswith(" "):
        length -= 1
    return chosen[:length], chosen[length:]


_READERS: dict[str, Callable[[Row, RowReader, str], Iterator[Piece]]] = {
    "text": _text_row,
    "messages": _messages_row,
    "prompt_completion": _answer_row,
    "preference": _answer_row,
}


# What the chat template gets


def _mappings(given: Any, where: str) -> list[dict[str, Any]] | None:
    """Returns a list of mappings, given as such or as JSON; None for nothing."""
    found = _from_json(given, where)
    if not found:
        return None
    if isinstance(found, Sequence) and not isinstance(found, str):
        found = [_from_json(entry, where) for entry in found]
        if all(isinstance(entry, Mapping) for entry in found):
            return [dict(entry) for entry in found]
    raise ValueError(f"{where} is {shortened(given)}; a list of mappings is needed, or the same as JSON")


def _variables(given: Any, where: str) -> dict[str, Any] | None:
    """Returns a mapping, given as such or as JSON, without entries that are None; None for nothing."""
    found = _from_json(given, where)
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} is {shortened(given)}; a mapping is needed, or the same as JSON")
    return {name: value for name, value in found.items() if value is not None}


def _from_json(given: Any, where: str) -> Any:
    if not isinstance(given, str) or not given.strip():
        return given or None
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is {shortened(given)}, which is no JSON: {error}") from error


def shortened(given: Any) -> str:
    """Returns the beginning of what was given, for an error."""
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_filled(feature: Any) -> bool:
    """Returns whether a column's type has structures: there Arrow writes null for each field that a row has not."""
    if isinstance(feature, Mapping):
        return True
    if isinstance(feature, (list, tuple)):
        return any(map(_is_filled, feature))
    return _is_filled(feature.feature) if hasattr(feature, "feature") else False


def without_nulls(value: Any) -> Any:
    """Returns a nested value without the entries of mappings that are None.

    Source: trl.trainer.utils.remove_none_values. Columns that `datasets` reads as JSON keep theirs.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


# Which format, which column


def find_format(columns: Sequence[str], column: str | None, where: str) -> str:
    """Returns what the rows are, told from the names of their columns, or from the one that is asked for.

    Raises:
        ValueError: when they could be several things.
    """
    names = set(columns) if column is None or column not in columns else {column}
    found = []
    if names & set(MESSAGES_COLUMNS):
        found.append("messages")
    if "completion" in names and "prompt" in columns:
        found.append("prompt_completion")
    if "chosen" in names:
        found.append("preference")
    if "text" in names:
        found.append("text")
    if len(found) > 1:
        raise ValueError(
            f"dataset {where} has columns for {' and '.join(found)}; choose with data.format={'|'.join(found)}"
        )
    return found[0] if found else "text"


def find_column(rows: Any, names: Sequence[str], format: str, where: str) -> str:
    """Returns the column, of `names`, that rows of a format are read from.

    Raises:
        ValueError: when it is not clear which is meant.
    """
    if format == "text":
        return find_text_column(rows, where, names)
    known = MESSAGES_COLUMNS if format == "messages" else (COLUMN_OF[format],)
    found = [name for name in known if name in names]
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"dataset {where} has {'several columns' if found else 'no column'} for data.format={format} "
        f"({', '.join(found or known)}); choose with data.column={'|'.join(found or names)}"
    )


def find_text_column(rows: Any, where: str, names: Sequence[str] | None = None) -> str:
    """Returns the name of the only column of strings, or of the first in TEXT_COLUMNS.

    Raises:
        ValueError: when there is no column of strings, or it is not clear which is meant.
    """
    strings = [name for name in names or rows.column_names if _holds_strings(rows, name)]
    likely = [name for name in TEXT_COLUMNS if name in strings]
    if likely:
        return likely[0]
    if len(strings) == 1:
        return strings[0]
    if not strings:
        raise ValueError(f"dataset {where} has no column of strings; its columns: {', '.join(rows.column_names)}")
    raise ValueError(f"dataset {where} has several columns of strings; choose with data.column={'|'.join(strings)}")


def _check_column(rows: Any, column: str, format: str, where: str) -> None:
    if column not in rows.column_names:
        raise ValueError(_no_column(rows, column, where))
    if format == "text" and not _holds_strings(rows, column):
        raise ValueError(f"data.column={column!r} of dataset {where} holds {rows.features[column]}, not strings")


def _no_column(rows: Any, column: str, where: str, key: str = "column") -> str:
    near = difflib.get_close_matches(column, rows.column_names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"data.{key}={column!r} is not in dataset {where}; {guess}columns: {', '.join(rows.column_names)}"


def _holds_strings(rows: Any, column: str) -> bool:
    return getattr(rows.features[column], "dtype", None) in ("string", "large_string")

"""Text from the `datasets` library: a dataset of the Hugging Face hub, or local files and folders.

Rows are taken in stored order, each one a document, until enough tokens are there. What a row is follows TRL's formats:
plain text, a conversation, a prompt and its completion, or a preference, of which the chosen side is taken.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmqat.data.chat import Chat, Completion, chat_content, check_messages
from llmqat.data.config import DataConfig
from llmqat.data.documents import DocumentSource, Piece, document_hash, pieces_of

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".txt": "text",
}
"""File suffixes that can be read, and the `datasets` builder for each."""
MANIFEST_FILE = "llmqat.json"
"""Lies beside shards of text that a model has written, and is no data."""
TEXT_COLUMNS = ("text", "content", "document", "article", "raw_content")
"""Column names taken for the text when several columns hold strings; the first that is there."""


MESSAGES_COLUMNS = ("messages", "conversations", "conversation")
"""Column names taken for a conversation."""

Row = Mapping[str, Any]


def open_source(config: DataConfig) -> DocumentSource:
    """Returns the rows of a dataset as documents.

    Raises:
        FileNotFoundError: when there is nothing at `config.path`, or the hub has no such dataset.
        ValueError: for an unknown split or column, or when the format or the column cannot be guessed.
    """
    split = config.split or "train"
    where = str(config.path) if config.name is None else config.name
    rows = open_local(config.path, split, config.streaming) if config.path is not None else open_hub(config, split)
    if config.streaming and rows.column_names is None:
        rows = rows._resolve_features()
    format = config.format or find_format(rows.column_names, config.column, where)
    column = config.column or find_column(rows, format, where)
    check_column(rows, column, format, where)
    template = None if config.chat_template is None else _read_template(config.chat_template)
    content = None if config.streaming else _content_hash(config, rows)
    read = _READERS[format]
    names = [name for name in dict.fromkeys([column, "prompt"]) if name in rows.column_names]

    def pieces() -> Iterator[Piece]:
        for number, row in enumerate(rows.select_columns(names)):
            yield from read(row, column, f"row {number} of dataset {where}, column {column}", template)

    parts = [f"dataset {where}", config.config_name, config.revision and f"revision {config.revision}"]
    parts += [f"split {split}", f"column {column}", None if format == "text" else f"format {format}"]
    return DocumentSource(
        ", ".join(str(part) for part in parts if part),
        pieces,
        None if config.streaming else f"{content}, {format}, {template}",
        labelled=format != "text",
        details={} if config.streaming else {"rows": len(rows), "fingerprint": content},
    )


def _content_hash(config: DataConfig, rows: Any) -> str:
    """Returns a hash of local files' bytes, or the fingerprint of a hub dataset."""
    if config.path is None:
        return str(rows._fingerprint)
    files = sorted(config.path.rglob("*")) if config.path.is_dir() else [config.path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            with file.open("rb") as content:
                while data := content.read(1 << 20):
                    digest.update(data)
    return digest.hexdigest()


def _read_template(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no chat template at data.chat_template={path}; give a Jinja file")
    return path.read_text(encoding="utf-8")


# What a row is


def _text_row(row: Row, column: str, where: str, template: str | None) -> Iterator[Piece]:
    text = row[column]
    if text and text.strip():
        yield from pieces_of([text], document_hash(text))


def _messages_row(row: Row, column: str, where: str, template: str | None) -> Iterator[Piece]:
    messages = check_messages(row[column], where)
    yield Piece(Chat(messages, where, template=template), document_hash(chat_content(messages)))


def _answer_row(row: Row, column: str, where: str, template: str | None) -> Iterator[Piece]:
    """Yields a prompt, if there is one, and what answers it: both text, or either of them messages."""
    prompt, answer = row.get("prompt"), row[column]
    if isinstance(answer, str):
        if not isinstance(prompt, str):
            raise ValueError(f"{where} is text, so a column `prompt` with text is needed beside it")
        yield Piece(Completion(prompt, answer), document_hash(chat_content([{"prompt": prompt, "answer": answer}])))
        return
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
    answer = list(answer or ())
    if answer[: len(before)] == before:  # the answer holds the prompt
        before = []
    messages = check_messages([*before, *answer], where)
    yield Piece(
        Chat(messages, where, answers_from=len(before), template=template), document_hash(chat_content(messages))
    )


_READERS: dict[str, Callable[[Row, str, str, str | None], Iterator[Piece]]] = {
    "text": _text_row,
    "messages": _messages_row,
    "prompt_completion": _answer_row,
    "preference": _answer_row,
}
_COLUMN_OF = {"prompt_completion": "completion", "preference": "chosen"}


def find_format(columns: list[str], column: str | None, where: str) -> str:
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


def find_column(rows: Any, format: str, where: str) -> str:
    """Returns the column that rows of a format are read from.

    Raises:
        ValueError: when it is not clear which is meant.
    """
    if format == "text":
        return find_text_column(rows, where)
    names = MESSAGES_COLUMNS if format == "messages" else (_COLUMN_OF[format],)
    found = [name for name in names if name in rows.column_names]
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"dataset {where} has {'several columns' if found else 'no column'} for data.format={format} "
        f"({', '.join(found or names)}); choose with data.column={'|'.join(found or rows.column_names)}"
    )


def check_column(rows: Any, column: str, format: str, where: str) -> None:
    """Checks that `column` exists, and holds strings where the format is text.

    Raises:
        ValueError: when it does not; names the nearest column and all there are.
    """
    if format == "text":
        check_text_column(rows, column, where)
    elif column not in rows.column_names:
        raise ValueError(_no_column(rows, column, where))


# Finding the rows


def open_hub(config: DataConfig, split: str) -> Any:
    """Returns the rows of the hub dataset `config.name`.

    Raises:
        FileNotFoundError: when the hub has no such dataset, or cannot be reached and nothing is cached.
        ValueError: for an unknown configuration or split.
    """
    import datasets

    try:
        return datasets.load_dataset(
            config.name, config.config_name, split=split, revision=config.revision, **_streamed(config.streaming)
        )
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"data.name={config.name!r} was not found on the hub, or the hub cannot be reached: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"data.name={config.name!r} with config_name={config.config_name!r}, split={split!r}: {error}"
        ) from error


def _streamed(streaming: bool) -> dict[str, bool]:
    return {"streaming": True} if streaming else {}


def open_local(path: Path, split: str, streaming: bool = False) -> Any:
    """Returns the rows of a local file, of a folder of files of one kind, or of a folder made by `save_to_disk`.

    Raises:
        FileNotFoundError: when there is nothing to read at `path`.
        ValueError: for an unreadable file or an unknown split.
    """
    import datasets
    import pyarrow

    if not path.exists():
        raise FileNotFoundError(f"no dataset at {path}")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            rows = _choose_split(datasets.load_from_disk(str(path)), split, path)
            return rows.to_iterable_dataset() if streaming else rows
        files = _data_files(path)
        builder = BUILDERS[files[0].suffix]
        options = {"sample_by": "document"} if builder == "text" else {}
        rows = datasets.load_dataset(
            builder,
            data_files={split: [str(file) for file in files]},
            split=split,
            **options,
            **_streamed(streaming),
        )
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path} could not be read as a dataset: {error.__cause__ or error}") from error
    return rows


def _data_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"{path} has an unknown kind of file; allowed: {', '.join(BUILDERS)}")
        return [path]
    pattern = "shard-*.parquet" if (path / MANIFEST_FILE).is_file() else "*"
    files = sorted(file for file in path.rglob(pattern) if file.suffix in BUILDERS)
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no file of a known kind: {', '.join(BUILDERS)}")
    kinds = sorted({file.suffix for file in files})
    if len({BUILDERS[kind] for kind in kinds}) > 1:
        raise ValueError(f"the folder {path} mixes {' and '.join(kinds)} files; give the path of one of them")
    return files


def _choose_split(loaded: Any, split: str, path: Path) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"data.split={split!r} is not in {path}; it has {', '.join(map(str, loaded))}")
    return loaded[split]


def find_text_column(rows: Any, where: str) -> str:
    """Returns the name of the only column of strings, or of the first in TEXT_COLUMNS.

    Raises:
        ValueError: when there is no column of strings, or it is not clear which is meant.
    """
    strings = [name for name in rows.column_names if _holds_strings(rows, name)]
    likely = [name for name in TEXT_COLUMNS if name in strings]
    if likely:
        return likely[0]
    if len(strings) == 1:
        return strings[0]
    if not strings:
        raise ValueError(f"dataset {where} has no column of strings; its columns: {', '.join(rows.column_names)}")
    raise ValueError(f"dataset {where} has several columns of strings; choose with data.column={'|'.join(strings)}")


def check_text_column(rows: Any, column: str, where: str) -> None:
    """Checks that `column` exists and holds strings.

    Raises:
        ValueError: when it does not; names the nearest column and all there are.
    """
    if column not in rows.column_names:
        raise ValueError(_no_column(rows, column, where))
    if not _holds_strings(rows, column):
        raise ValueError(f"data.column={column!r} of dataset {where} holds {rows.features[column]}, not strings")


def _no_column(rows: Any, column: str, where: str) -> str:
    near = difflib.get_close_matches(column, rows.column_names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"data.column={column!r} is not in dataset {where}; {guess}columns: {', '.join(rows.column_names)}"


def _holds_strings(rows: Any, column: str) -> bool:
    return getattr(rows.features[column], "dtype", None) in ("string", "large_string")

"""Text from the `datasets` library: a dataset of the Hugging Face hub, or local files and folders.

Rows are taken in stored order, each one a document, until enough tokens are there. What a row is, rows.py says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmqat.data.config import DataConfig
from llmqat.data.documents import DocumentSource, Piece, encoded
from llmqat.data.rows import RowReader, row_reader, shortened
from llmqat.data.text import (
    ROW_BUILDERS,
    files_under,
    is_saved,
    nearest,
    read_text,
    stream_text,
    suffix_of,
    text_config,
)
from llmqat.hub import check_dataset_in_reach, looks_like_path
from llmqat.metrics import IGNORED_LABEL

BUILDERS = {**ROW_BUILDERS, ".txt": "text"}
"""File suffixes that can be read, and the `datasets` builder for each."""
log = logging.getLogger(__name__)

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words in names of files that say so (those of the `datasets` library)."""
MANIFEST_FILE = "llmqat.json"
"""Lies beside shards of text that a model has written, and is no data."""


def open_source(config: DataConfig) -> DocumentSource:
    """Returns the rows of a dataset as documents; errors as `open_rows`."""
    split = config.split or "train"
    where = str(config.path) if config.name is None else config.name
    rows, reader = open_rows(config)
    content = None if config.streaming else _content_hash(config, rows)

    parts = [f"dataset {where}", config.config_name, config.revision and f"revision {config.revision}"]
    parts += [
        f"split {split}",
        f"column {reader.column}",
        None if reader.format == "text" else f"format {reader.format}",
        "all tokens are labels" if reader.all_labels and reader.format != "text" else None,
    ]
    known = f"{content}, {reader.format}, {reader.template}, {sorted(config.ignore_columns)}"
    return DocumentSource(
        ", ".join(str(part) for part in parts if part),
        partial(row_pieces, rows, reader),
        None if config.streaming else known,
        labelled=reader.labelled,
        details={} if config.streaming else {"rows": len(rows), "fingerprint": content},
    )


def row_pieces(rows: Any, reader: RowReader) -> Iterator[Piece]:
    """Yields the documents of `rows`, as `open_rows` gives both.

    Raises:
        ValueError: when a row cannot be read.
    """
    with _named(reader.where, []):  # errors of rows name them already
        for number, row in enumerate(rows.select_columns(list(reader.columns))):
            yield from reader.pieces(number, row)


def open_rows(config: DataConfig) -> tuple[Any, RowReader]:
    """Returns the rows of a dataset, and how they are read.

    Raises:
        FileNotFoundError: when there is nothing at `config.path`, or the hub has no such dataset.
        ValueError: for an unknown split or column, or when the format or the column cannot be guessed.
    """
    split = config.split or "train"
    where = str(config.path) if config.name is None else config.name
    rows = open_local(config.path, split, config.streaming) if config.path is not None else open_hub(config, split)
    if config.streaming and rows.column_names is None:
        with _named(where, [], opening=True):
            rows = rows._resolve_features()
    template = None if config.chat_template is None else read_template(config.chat_template)
    reader = row_reader(
        rows,
        where,
        format=config.format,
        column=config.column,
        template=template,
        ignored=config.ignore_columns,
        all_labels=config.labels == "all",
    )
    return rows, reader


def _content_hash(config: DataConfig, rows: Any) -> str:
    """Returns a hash of the names and bytes of the local files that are read, or the fingerprint of a hub dataset."""
    path = config.path
    if path is None:
        return str(rows._fingerprint)
    files = files_under(path) if is_saved(path) else _of_split(_data_files(path), path, config.split or "train")
    digest = hashlib.sha256()
    for file in files:
        if path.is_dir():  # rows that move from one file to another may be in other order, or another split
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while data := content.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()


def read_template(path: Path) -> str:
    """Returns the chat template in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no chat template at data.chat_template={path}; give a Jinja file")
    template = read_text(path)
    if not template.strip():
        raise ValueError(f"the chat template data.chat_template={path} is empty")
    return template


def use_chat_template(config: DataConfig, tokenizer: Any) -> None:
    """Replaces the chat template of `tokenizer` by `data.chat_template`, where all dataset sources name the same file.

    Held-out conversations are then rendered by that template, and checkpoints carry it. Where the sources of a mix
    differ in it, the tokenizer keeps its own template.
    """
    given = {one.chat_template for one in config.mix or (config,) if one.source == "dataset"}
    path = given.pop() if len(given) == 1 else None
    if path is not None:
        tokenizer.chat_template = read_template(path)


# Finding the rows


def open_hub(config: DataConfig, split: str) -> Any:
    """Returns the rows of the hub dataset `config.name`.

    Raises:
        FileNotFoundError: when the hub has no such dataset, or cannot be reached and nothing is cached.
        ValueError: for an unknown configuration or split.
    """
    import datasets

    assert config.name is not None
    check_name(config.name)
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


def check_name(name: str) -> None:
    """Raises FileNotFoundError where `name` cannot be a dataset of the hub, or is in no cache and the hub is silent."""
    if Path(name).exists():
        return
    if looks_like_path(name):
        raise FileNotFoundError(
            f"data.name={name!r} is no id of a data set on the hub, and no file or folder is there either; give a name "
            "such as Salesforce/wikitext, or data.path=FILE_OR_FOLDER"
        )
    check_dataset_in_reach(name, f"data.name={name!r}")


def _streamed(streaming: bool) -> dict[str, bool]:
    return {"streaming": True} if streaming else {}


def open_local(path: Path, split: str, streaming: bool = False) -> Any:
    """Returns the rows of a local file, of a folder of files of one kind, or of a folder made by `save_to_disk`.

    Raises:
        FileNotFoundError: when there is nothing to read at `path`.
        ValueError: for an unreadable file or an unknown split.
    """
    import datasets

    if not path.exists():
        raise FileNotFoundError(
            f"no dataset at {path}{nearest(path)}; give a file of rows, a folder of them, or hub:NAME"
        )
    if is_saved(path):
        with _named(path, [], opening=True):
            loaded = datasets.load_from_disk(str(path))
        rows = _choose_split(loaded, split, path)
        return rows.to_iterable_dataset() if streaming else _with_rows(rows, path)
    files = _of_split(_data_files(path), path, split)
    builder = BUILDERS[suffix_of(files[0])]
    options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
    if builder == "csv":
        options["keep_default_na"] = False  # words such as NA and None are text, too
    if suffix_of(files[0]) == ".tsv":
        options["sep"] = "\t"
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{path} is empty: it holds no rows")
    with _named(path, files, opening=True):
        rows = datasets.load_dataset(
            builder,
            data_files={split: [str(file) for file in files if file.stat().st_size]},
            split=split,
            **options,
            **_streamed(streaming),
        )
    return rows if streaming else _with_rows(rows, path)


def _with_rows(rows: Any, path: Path) -> Any:
    if not len(rows):
        raise ValueError(f"{path} holds no rows")
    return rows


@contextmanager
def _named(where: Path | str, files: Sequence[Path], opening: bool = False) -> Iterator[None]:
    """Inside, what `datasets` and the libraries below it raise becomes a ValueError that names the dataset.

    Of text files the first byte that is not UTF-8 is named, of lines of JSON the first that is none. `opening` adds the
    errors of files that hold no table.
    """
    import datasets
    import pyarrow

    failures: tuple[type[Exception], ...] = (
        *(datasets.exceptions.DatasetGenerationError, pyarrow.ArrowException, UnicodeDecodeError, StopIteration),
        *((ValueError, KeyError, TypeError) if opening else ()),
    )
    reader = logging.getLogger("datasets.packaged_modules.json.json")  # what it logs is raised as well
    level = reader.level
    try:
        reader.setLevel(logging.CRITICAL)
        yield
    except failures as error:
        for file in files:
            if file.suffix in (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt"):
                for _ in stream_text(file):
                    pass
            if file.suffix in (".jsonl", ".ndjson"):
                _check_lines(file, error)
        reason = error.__cause__ or error
        raise ValueError(f"{where} could not be read as a dataset: {str(reason) or 'it holds no rows'}") from error
    finally:
        reader.setLevel(level)


def _check_lines(file: Path, cause: Exception) -> None:
    """Raises ValueError where a line of `file` is no JSON object, for the first such line."""
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line.strip() or "{}")
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file} line {number}: not JSON ({error.msg} at column {error.colno}): {shortened(line.strip())}"
                ) from cause
            if not isinstance(found, dict):
                raise ValueError(f"{file} line {number}: not a JSON object, but {shortened(found)}") from cause


def _data_files(path: Path) -> list[Path]:
    if path.is_file():
        if suffix_of(path) not in BUILDERS:
            raise ValueError(f"{path} has an unknown kind of file; allowed: {', '.join(BUILDERS)}")
        return [path]
    pattern = "shard-*.parquet" if (path / MANIFEST_FILE).is_file() else "*"
    files = [file for file in files_under(path, pattern) if suffix_of(file) in BUILDERS]
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no file of a known kind: {', '.join(BUILDERS)}")
    kinds = sorted({suffix_of(file) for file in files})
    if len({BUILDERS[kind] for kind in kinds}) > 1:
        raise ValueError(f"the folder {path} mixes {' and '.join(kinds)} files; give the path of one of them")
    return files


def _of_split(files: list[Path], path: Path, split: str) -> list[Path]:
    """Returns those of a folder's files that are of a split, where files are named after splits, as `datasets` does.

    Raises:
        ValueError: there are such names, and none is of this split; or another than train is asked of files without.
    """
    if path.is_file():
        return files
    named = {file: _split_in(file.relative_to(path)) for file in files}
    known = sorted({found for found in named.values() if found})
    chosen = [file for file, found in named.items() if found == split]
    if chosen:
        left = len(files) - len(chosen)
        if left:
            log.info("%s: %d files of the split %s are read, %d others are not", path, len(chosen), split, left)
        return chosen
    if known or split != "train":
        raise ValueError(
            f"data.split={split!r}: no file in {path} is named after it; "
            + (f"there are {', '.join(known)}" if known else "none is named after a split, so leave data.split out")
            + ", or give the path of a file"
        )
    return files


def _split_in(file: Path) -> str | None:
    """Returns the split that a relative path is named after, or None: train.jsonl, data/valid-00001.parquet."""
    for split, words in SPLIT_WORDS.items():
        if re.search(rf"(?:^|[-._ 0-9/])(?:{'|'.join(words)})(?:[-._ 0-9/]|$)", file.as_posix().lower()):
            return split
    return None


def _choose_split(loaded: Any, split: str, path: Path) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"data.split={split!r} is not in {path}; it has {', '.join(map(str, loaded))}")
    return loaded[split]


# Rows as text


def texts_of(rows: Any, reader: RowReader) -> list[str]:
    """Returns the text of each row, empty ones included.

    Raises:
        ValueError: when rows are conversations, or prompts with completions.
    """
    if reader.format != "text":
        raise ValueError(
            f"{reader.where} has rows of the format {reader.format}, and running text is needed here; give a text, or "
            "rows with a column of text"
        )
    return [text or "" for text in rows[reader.column]]


def answer_rows(text: str, tokenizer: Any) -> Any:
    """Returns conversations, or prompts with completions, as a `datasets.Dataset` that TRL and Trainer take tokenized.

    Columns are `input_ids`, and `labels`, which are -100 where a token is no answer's. Answers are told from the rest
    as in a recipe, so a chat template needs no {% generation %} markers.

    Args:
        text: a file or folder of rows, or hub:NAME[:CONFIG[:SPLIT]].
        tokenizer: renders conversations by its chat template.

    Raises:
        FileNotFoundError: there is no such text.
        ValueError: it is no rows with answers, or a row cannot be read.
    """
    import datasets

    config = text_config(text)
    reader = open_rows(config)[1] if config.source == "dataset" else None
    if reader is None or not reader.labelled:
        raise ValueError(
            f"{text} has no answers to learn: rows of `messages`, `conversations`, or `prompt` and `completion` are "
            "needed"
        )
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for piece in encoded(open_source(config).pieces(), tokenizer):
        scored = np.ones(len(piece.ids)) if piece.scored is None else piece.scored
        found["input_ids"].append(piece.ids.tolist())
        found["labels"].append(np.where(scored == 1, piece.ids, IGNORED_LABEL).tolist())
    return datasets.Dataset.from_dict(found)

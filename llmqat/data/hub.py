"""Text from the `datasets` library: a dataset of the Hugging Face hub, or local files and folders.

Rows are taken in stored order, each one a document, until enough tokens are there. What a row is, rows.py says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmqat.data.config import DataConfig
from llmqat.data.documents import DocumentSource, Piece
from llmqat.data.rows import row_reader

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
    template = None if config.chat_template is None else _read_template(config.chat_template)
    reader = row_reader(
        rows,
        where,
        format=config.format,
        column=config.column,
        template=template,
        ignored=config.ignore_columns,
    )
    content = None if config.streaming else _content_hash(config, rows)

    def pieces() -> Iterator[Piece]:
        for number, row in enumerate(rows.select_columns(list(reader.columns))):
            yield from reader.pieces(number, row)

    parts = [f"dataset {where}", config.config_name, config.revision and f"revision {config.revision}"]
    parts += [
        f"split {split}",
        f"column {reader.column}",
        None if reader.format == "text" else f"format {reader.format}",
    ]
    return DocumentSource(
        ", ".join(str(part) for part in parts if part),
        pieces,
        None if config.streaming else f"{content}, {reader.format}, {template}, {sorted(config.ignore_columns)}",
        labelled=reader.format != "text",
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

"""Text from the `datasets` library: a dataset of the Hugging Face hub, or local files and folders.

Rows are taken in stored order, each one a document, until enough tokens are there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data.blocks import Progress, TokenBlocks, pack_blocks, token_blocks, tokenize
from llmqat.data.config import DataConfig

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


def load(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> TokenBlocks:
    """Returns blocks of a dataset's text column.

    Raises:
        FileNotFoundError: when there is nothing at `config.path`, or the hub has no such dataset.
        ValueError: for an unknown split or column, when the column cannot be guessed, or for too little text.
    """
    split = config.split or "train"
    where = str(config.path) if config.name is None else config.name
    rows = open_local(config.path, split) if config.path is not None else open_hub(config, split)
    column = config.column or find_text_column(rows, where)
    check_text_column(rows, column, where)
    ids = pack_blocks(tokenize(_texts(rows, column), tokenizer), config.block_size, config.tokens, f"dataset {where}")
    described = [f"dataset {where}", config.config_name, config.revision and f"revision {config.revision}"]
    source = ", ".join(str(part) for part in [*described, f"split {split}", f"column {column}"] if part)
    return token_blocks(ids, source, {"rows": len(rows), "fingerprint": rows._fingerprint})


def open_hub(config: DataConfig, split: str) -> Any:
    """Returns the rows of the hub dataset `config.name`.

    Raises:
        FileNotFoundError: when the hub has no such dataset, or cannot be reached and nothing is cached.
        ValueError: for an unknown configuration or split.
    """
    import datasets

    try:
        return datasets.load_dataset(config.name, config.config_name, split=split, revision=config.revision)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"data.name={config.name!r} was not found on the hub, or the hub cannot be reached: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"data.name={config.name!r} with config_name={config.config_name!r}, split={split!r}: {error}"
        ) from error


def open_local(path: Path, split: str) -> Any:
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
            return _choose_split(datasets.load_from_disk(str(path)), split, path)
        files = _data_files(path)
        builder = BUILDERS[files[0].suffix]
        options = {"sample_by": "document"} if builder == "text" else {}
        rows = datasets.load_dataset(builder, data_files={split: [str(file) for file in files]}, split=split, **options)
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
        near = difflib.get_close_matches(column, rows.column_names, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"data.column={column!r} is not in dataset {where}; {guess}columns: {', '.join(rows.column_names)}"
        )
    if not _holds_strings(rows, column):
        raise ValueError(f"data.column={column!r} of dataset {where} holds {rows.features[column]}, not strings")


def _holds_strings(rows: Any, column: str) -> bool:
    return getattr(rows.features[column], "dtype", None) in ("string", "large_string")


def _texts(rows: Any, column: str) -> Iterator[str]:
    for row in rows.select_columns([column]):
        text = row[column]
        if text and text.strip():
            yield text

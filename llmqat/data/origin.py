"""Whether the files that blocks were made from are still the same, for runs that go on.

    origin_of(config)            -> fingerprints of local text, and sizes and times of its files, as JSON
    has_changed(config, origin)  -> whether it is another text now

Text that is not local, is read as a stream, or is written by a model has no origin here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmqat.data import open_text
from llmqat.data.config import DataConfig
from llmqat.data.mix import component_config
from llmqat.data.text import files_under


def origin_of(config: DataConfig) -> dict[str, Any]:
    """Returns fingerprints of local text by its source, and sizes in bytes and times in nanoseconds of its files.

    Raises:
        FileNotFoundError: a text is not there.
        ValueError: a text cannot be read.
    """
    return {"fingerprints": _fingerprints(config), "files": _stamps(config)}


def has_changed(config: DataConfig, origin: Mapping[str, Any]) -> bool:
    """Returns whether local text is another than at the time of `origin`; files of the same size and time are not read.

    Raises:
        FileNotFoundError: a text is not there.
        ValueError: a text cannot be read.
    """
    return origin["files"] != _stamps(config) and origin["fingerprints"] != _fingerprints(config)


def _local(config: DataConfig) -> Iterator[DataConfig]:
    for one in [component_config(config, part) for part in config.mix] if config.mix else [config]:
        if one.source in ("text", "dataset") and one.path is not None and not one.streaming:
            yield one


def _fingerprints(config: DataConfig) -> dict[str, str | None]:
    return {source.name: source.fingerprint for source in map(open_text, _local(config))}


def _stamps(config: DataConfig) -> dict[str, list[int]]:
    paths: list[Path] = []
    for one in _local(config):
        assert one.path is not None
        paths += files_under(one.path)
        paths += [] if one.chat_template is None else [one.chat_template]
    stats = {str(path): path.stat() for path in paths if path.exists()}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}

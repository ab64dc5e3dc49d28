"""The source `text`: files and folders of prose, or of rows, which hub.py reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from llmqat.data import hub
from llmqat.data.config import DataConfig
from llmqat.data.documents import DocumentSource, Piece, pieces_of, signed
from llmqat.data.text import _feed, is_rows, stream_text, text_files


def open_source(config: DataConfig) -> DocumentSource:
    """Returns the text at `config.path`, rows as `hub.open_source` does.

    Raises:
        FileNotFoundError: when nothing is there.
        ValueError: when a file is not UTF-8, or the text is empty.
    """
    assert config.path is not None
    path = config.path
    if is_rows(path):
        return hub.open_source(config)
    whole = hashlib.sha256()
    documents: dict[Path, int] = {}
    for file in text_files(path):
        own, longer = hashlib.sha256(), whole.copy()
        if _feed(file, own, longer):
            longer.update(b"\0")
            whole, documents[file] = longer, signed(own)
    if not documents:
        raise ValueError(f"the text at {path} is empty")

    def pieces() -> Iterator[Piece]:
        for file, document in documents.items():
            yield from pieces_of(stream_text(file), document)

    details = {"files": len(documents), "text_sha256": whole.hexdigest()}
    return DocumentSource(f"text {path}", pieces, whole.hexdigest(), details=details)

"""Text from files: one UTF-8 file, or all .txt and .md files of a folder in the order of their paths.

Each file is a document. Files are read twice, a little at a time: for their hashes, and to be tokenized.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from pathlib import Path

from llmqat.data.config import DataConfig
from llmqat.data.documents import DocumentSource, Piece, pieces_of, signed

SUFFIXES = (".txt", ".md")
READ_BYTES = 1 << 20


def open_source(config: DataConfig) -> DocumentSource:
    """Returns the text at `config.path`.

    Raises:
        FileNotFoundError: when nothing is there.
        ValueError: when a file is not UTF-8, or the text is empty.
    """
    assert config.path is not None
    path = config.path
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


def text_files(path: Path) -> list[Path]:
    """Returns the file `path`, or every .txt and .md file under the folder `path`.

    Raises:
        FileNotFoundError: when there is no such file, or no such file in the folder.
    """
    if not path.exists():
        raise FileNotFoundError(f"no text at {path}; give a text file, or a folder of {' and '.join(SUFFIXES)} files")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no {' or '.join(SUFFIXES)} file")
    return files


def read_texts(path: Path) -> list[str]:
    """Returns the text of the file `path`, or of every .txt and .md file under the folder `path`.

    Raises:
        FileNotFoundError: when there is no such file, or no such file in the folder.
        ValueError: when a file is not UTF-8, or all are empty.
    """
    texts = [text for text in map(read_text, text_files(path)) if text.strip()]
    if not texts:
        raise ValueError(f"the text at {path} is empty")
    return texts


def read_text(path: Path) -> str:
    """Returns the content of a UTF-8 file, without a byte-order mark.

    Raises:
        ValueError: when the file is not UTF-8; names the byte.
    """
    return "".join(stream_text(path))


def stream_text(path: Path) -> Iterator[str]:
    r"""Yields the content of a UTF-8 file in parts, without a byte-order mark, `\n` for `\r\n`.

    Raises:
        ValueError: when the file is not UTF-8; names the byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, held = 0, ""
    with path.open("rb") as file:
        while True:
            data = file.read(READ_BYTES)
            try:
                text = held + decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                offset = read - (len(error.object) - len(data)) + error.start
                raise ValueError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset}; "
                    f"convert it, for example with: iconv -f LATIN1 -t UTF-8 {path}"
                ) from error
            if read == 0:
                text = text.removeprefix("\ufeff")
            read += len(data)
            held = "\r" if data and text.endswith("\r") else ""  # its \n may be in the next part
            yield text.removesuffix(held).replace("\r\n", "\n")
            if not data:
                return


def hash_file(path: Path) -> int | None:
    """Returns the hash of a text file as a document, by its text and not its bytes; None for one without text."""
    own = hashlib.sha256()
    return signed(own) if _feed(path, own) else None


def _feed(path: Path, *digests: hashlib._Hash) -> bool:
    """Gives the text of a file to `digests`; returns whether there is any."""
    found = False
    for text in stream_text(path):
        content = text.encode()
        for digest in digests:
            digest.update(content)
        found = found or bool(text.strip())
    return found


def sha256_of_texts(texts: list[str]) -> str:
    """Returns the SHA-256 of the texts' UTF-8 bytes, a zero byte after each."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()

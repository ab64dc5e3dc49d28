"""Text from files: one UTF-8 file, or all .txt and .md files of a folder in the order of their paths.

Each file is a document. Files are read twice, a little at a time: for their hashes, and to be tokenized. A file of rows
(.jsonl, .parquet, .csv, ...) is no prose, whoever asks for it: its rows are read, as hub.py does.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmqat.data.config import HUB_PREFIX, PYDOC, DataConfig, hub_keys
from llmqat.data.documents import DocumentSource, Piece, document_hash, pieces_of, signed
from llmqat.paths import nearest_name, user_path

log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md")
ROW_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Suffixes of files of rows, and the `datasets` builder for each."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes behind those of rows that `datasets` unpacks."""
READ_BYTES = 1 << 20
MOST_SNIFFED_LINES = 3
"""Lines at the beginning of a text that are looked at for JSON."""
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip data", "unpack it with gunzip"),
    (b"PK\x03\x04", "a zip archive (as .docx and .xlsx are)", "unpack it, or save it as plain text"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "unpack it with zstd -d"),
    (b"BZh", "bzip2 data", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "xz data", "unpack it with unxz"),
    (b"PAR1", "a parquet file", "give it the suffix .parquet"),
    (b"ARROW1", "an Arrow file", "give it the suffix .arrow"),
    (b"%PDF-", "a PDF", "extract its text, for example with pdftotext"),
    (b"GGUF", "a GGUF model", "give a text"),
    (b"\xff\xfe", "UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 FILE"),
    (b"\xfe\xff", "UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 FILE"),
)
"""How files begin that are no UTF-8 text: what they are, and what to do."""


def suffix_of(path: Path) -> str:
    """Returns a file's suffix in small letters; of a compressed file, the one before."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


def is_rows(path: Path) -> bool:
    """Returns whether `path` is a file of rows, a folder of such files, or one that `save_to_disk` made.

    A folder that holds prose as well is prose; what is not read of it is logged.
    """
    if not path.is_dir():
        return suffix_of(path) in ROW_BUILDERS
    if is_saved(path):
        return True
    files = files_under(path)
    rows = [file for file in files if suffix_of(file) in ROW_BUILDERS]
    if not any(file.suffix.lower() in SUFFIXES for file in files) or any(
        file.name.startswith("shard-") for file in rows
    ):
        return bool(rows)  # beside shards of text that a model has written lies a README.md
    if rows:
        others = "" if len(rows) == 1 else f" and {len(rows) - 1} more"
        log.warning("the folder %s holds prose and rows; the rows are not read: %s%s", path, rows[0].name, others)
    return False


def is_saved(path: Path) -> bool:
    """Returns whether `path` is a folder that `save_to_disk` of datasets made."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def files_under(folder: Path, pattern: str = "*") -> list[Path]:
    """Returns the files under a folder whose names match `pattern`, sorted, without hidden ones; of a file, itself.

    Hidden is what has a dot before its name, or lies in such a folder: editors and notebooks keep copies there.
    """
    if folder.is_file():
        return [folder]
    found = sorted(file for file in folder.rglob(pattern) if file.is_file())
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def text_config(text: str, hub_split: str = "train", labels: str = "answers", **more: Any) -> DataConfig:
    """Returns how a text is read that a command names in a word.

    Args:
        text: `pydoc`, a file or folder of prose or of rows, or hub:NAME[:CONFIG[:SPLIT]].
        hub_split: of a dataset of the hub, where the word names none.
        labels: which tokens of conversations, prompts and completions count; as in DataConfig.
        **more: other fields of DataConfig.

    Raises:
        ValueError: the word means no text.
    """
    if text == PYDOC:
        return DataConfig(source="pydoc", **more)
    if text.startswith(HUB_PREFIX):
        return DataConfig(**{"split": hub_split, **hub_keys(text), "labels": labels, **more})
    path = user_path(text, "text")
    own: dict[str, Any] = {"source": "dataset", "labels": labels} if is_rows(path) else {"source": "text"}
    return DataConfig(**own, path=path, **more)


def nearest(path: Path) -> str:
    """Returns words for an error on a path that is not there: the nearest name that is, or nothing."""
    found = nearest_name(path)
    return "" if found is None else f" (the nearest name there is {found})"


def text_files(path: Path) -> list[Path]:
    """Returns the file `path`, or every .txt and .md file under the folder `path`.

    Raises:
        FileNotFoundError: when there is no such file, or no such file in the folder.
        ValueError: when what is found holds rows of a dataset and no prose.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no text at {path}{nearest(path)}; give a text file, a file of rows ({', '.join(ROW_BUILDERS)}), or a "
            f"folder of {' and '.join(SUFFIXES)} files or of rows"
        )
    if is_rows(path):
        raise ValueError(f"{path} holds rows and no prose; give it as data.source=dataset data.path={path}")
    files = [path] if path.is_file() else [file for file in files_under(path) if file.suffix.lower() in SUFFIXES]
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no {' or '.join(SUFFIXES)} file")
    for file in files:
        check_prose(file)
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
        ValueError: when the file is not UTF-8 text; says what it is, or names the byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, held = 0, ""
    with path.open("rb") as file:
        while True:
            data = file.read(READ_BYTES)
            if read == 0:
                _check_begins_as_text(data, path)
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


def _check_begins_as_text(data: bytes, path: Path) -> None:
    for begin, kind, way_out in _FOREIGN:
        if data.startswith(begin):
            raise ValueError(f"{path} is no UTF-8 text: it is {kind}; {way_out}")
    if b"\0" in data:
        raise ValueError(f"{path} is no UTF-8 text: it has a zero byte at offset {data.index(0)}; give a text file")


def check_prose(path: Path) -> None:
    """Raises ValueError where a file that is to be read as prose begins with lines of JSON objects."""
    with path.open("rb") as file:
        begin = file.read(READ_BYTES)
    lines = [line for line in begin.splitlines() if line.strip()][:MOST_SNIFFED_LINES]
    if lines and all(line.lstrip().startswith(b"{") and _is_json_object(line) for line in lines):
        raise ValueError(f"{path} holds rows of JSON and no prose; give it the suffix .jsonl, and its rows are read")


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


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


def source_of_texts(name: str, texts: Sequence[str]) -> DocumentSource:
    """Returns documents that are in memory as a source.

    Args:
        name: where they come from, in words that suffice to get them again.
        texts: one a document.
    """

    def pieces() -> Iterator[Piece]:
        for text in texts:
            yield from pieces_of([text], document_hash(text))

    digest = sha256_of_texts(texts)
    return DocumentSource(name, pieces, digest, details={"text_sha256": digest})


def sha256_of_texts(texts: Sequence[str]) -> str:
    """Returns the SHA-256 of the texts' UTF-8 bytes, a zero byte after each."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()

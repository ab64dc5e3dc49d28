"""Text from files: one UTF-8 file, or all .txt and .md files of a folder in the order of their paths."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data.blocks import Progress, TokenBlocks, pack_blocks, token_blocks, tokenize
from llmqat.data.config import DataConfig

SUFFIXES = (".txt", ".md")


def load(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> TokenBlocks:
    """Returns blocks of the text at `config.path`.

    Raises:
        FileNotFoundError: when nothing is there.
        ValueError: when a file is not UTF-8, or the text is empty or shorter than one block.
    """
    assert config.path is not None
    texts = read_texts(config.path)
    ids = pack_blocks(tokenize(texts, tokenizer), config.block_size, config.tokens, str(config.path))
    return token_blocks(ids, f"text {config.path}", {"files": len(texts), "text_sha256": sha256_of_texts(texts)})


def read_texts(path: Path) -> list[str]:
    """Returns the text of the file `path`, or of every .txt and .md file under the folder `path`.

    Raises:
        FileNotFoundError: when there is no such file, or no such file in the folder.
        ValueError: when a file is not UTF-8, or all are empty.
    """
    if not path.exists():
        raise FileNotFoundError(f"no text at {path}; give a text file, or a folder of {' and '.join(SUFFIXES)} files")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no {' or '.join(SUFFIXES)} file")
    texts = [text for text in map(read_text, files) if text.strip()]
    if not texts:
        raise ValueError(f"the text at {path} is empty")
    return texts


def read_text(path: Path) -> str:
    """Returns the content of a UTF-8 file, without a byte-order mark.

    Raises:
        ValueError: when the file is not UTF-8; names the byte.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{found:02x} at offset {error.start}; "
            f"convert it, for example with: iconv -f LATIN1 -t UTF-8 {path}"
        ) from error


def sha256_of_texts(texts: list[str]) -> str:
    """Returns the SHA-256 of the texts' UTF-8 bytes, a zero byte after each."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()

"""Files that are there whole or not at all: written under another name, then renamed."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def folder_in_progress(folder: Path) -> Iterator[Path]:
    """Yields a new empty folder beside `folder`, to be renamed to it when all is written.

    What has not been renamed is deleted on leaving, so that a failure leaves nothing behind.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rename_unless_there(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder`, unless another process has finished the same folder first."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise it holds the same bytes
            raise


def write_whole(path: Path, text: str) -> None:
    """Writes `text` beside `path` and renames, so that `path` is absent or whole."""
    with file_in_progress(path) as temporary:
        # Names of files that are not UTF-8 hold halves of characters, which JSON writes in this way too.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def give_usual_rights(path: Path) -> None:
    """Gives a file, or all files in a folder, the rights that any new file has there (umask).

    safetensors and ONNX write files that only their owner may read, which a server of another user then cannot.
    """
    folder = path if path.is_dir() else path.parent
    usual = folder / f".{secrets.token_hex(8)}"
    usual.touch()
    try:
        mode = usual.stat().st_mode
    finally:
        usual.unlink()
    for file in [path] if path.is_file() else [file for file in folder.rglob("*") if file.is_file()]:
        if file.stat().st_mode != mode:
            file.chmod(mode)


@contextmanager
def file_in_progress(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to, which is then renamed; where either fails, nothing is left of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_locked_by_us(file: IO[str]) -> bool:
    """Returns whether the open `file` is locked now by this process, until it is closed.

    Where the system has no locks it counts as locked. A file that another process has removed does not.
    """
    if importlib.util.find_spec("fcntl") is None:
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return os.fstat(file.fileno()).st_nlink > 0  # else who had it has just ended and removed it

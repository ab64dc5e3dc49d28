"""Files that are there whole or not at all: written under another name, forced to disk, then renamed."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

COPY_AGAIN = "copy it again"
"""What to do about a damaged file of a model."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def folder_in_progress(folder: Path) -> Iterator[Path]:
    """Yields a new empty folder beside `folder`, to be renamed to it when all is written.

    What has not been renamed is deleted on leaving, so that a failure leaves nothing behind.

    Raises:
        OSError: the disk is full; says what to do.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with _full_disk_named(folder):
            temporary.mkdir(parents=True)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rename_unless_there(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder`, unless another process has finished the same folder first."""
    force_folder_to_disk(temporary)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise it holds the same bytes
            raise


def write_whole(path: Path, text: str, *, lasting: bool = True) -> None:
    """Writes `text` beside `path` and renames, so that `path` is absent or whole.

    Args:
        path: the file.
        text: what it is to hold.
        lasting: whether it is to be there after a power cut as well; False for what is written again and again.

    Raises:
        OSError: the disk is full, or fails.
    """
    with file_in_progress(path, lasting=lasting) as temporary:
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
def file_in_progress(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """Yields a name beside `path` to write to, which is then renamed; where either fails, nothing is left of it.

    `lasting` is as in `write_whole`.

    Raises:
        OSError: the disk is full; says what to do.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _full_disk_named(path):
            yield temporary
            if lasting:
                force_to_disk(temporary)
            temporary.replace(path)
            if lasting:
                force_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """Inside, an error of a full disk names `path`, what is free, and what to do.

    safetensors and tokenizers raise it as exceptions of their own, with the number in their words.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) not in _FULL and not any(f"(os error {code})" in str(error) for code in _FULL):
            raise
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
        raise OSError(
            f"{path} could not be written: the disk is full ({free:,} bytes free). Free some space, or write to "
            "another disk, and give the same command again"
        ) from error


def force_folder_to_disk(folder: Path) -> None:
    """Returns when a folder with all that is in it is on the disk, and would be there after a power cut."""
    for path in sorted(folder.rglob("*")):
        force_to_disk(path)
    force_to_disk(folder)


def force_to_disk(path: Path) -> None:
    """Returns when a file, or the list of files in a folder, is on the disk; at once where a system cannot tell.

    Raises:
        OSError: the disk is full, or fails.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems over a network
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path, mend: str = "delete it, and give the same command again") -> Any:
    """Returns what a JSON file holds.

    Args:
        path: the file.
        mend: what to do where it is damaged; by default for a file that llmqat has written and would write again.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON; names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no JSON ({error}); {mend}") from error


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

"""Paths as users give them, and outputs that are tried before hours of work.

Every path enters through `user_path`: the fields of a configuration (config.py does so by the type of the field), the
arguments of the command line (cli.py, by the type of the parameter), the functions that a user calls, the scripts in
eval/. A command that writes a file at its end calls `check_outputs` at its beginning.
"""

from __future__ import annotations

import difflib
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path


def user_path(given: str | Path, what: str = "a path") -> Path:
    """Returns the path that a user gave, with the home folder in place of `~`.

    Args:
        given: as it was typed.
        what: what errors call it, such as "output" or "--json".

    Raises:
        ValueError: it is empty, begins or ends with a space, holds a zero byte, or names the home of nobody.
    """
    text = os.fspath(given)
    if not text.strip():
        raise ValueError(f"{what} is an empty path; give a file or a folder, or leave it out")
    if text != text.strip():
        raise ValueError(
            f"{what}={text!r} begins or ends with a space, which no path is meant to; write {text.strip()!r}"
        )
    if "\0" in text:
        raise ValueError(f"{what}={text!r} holds a zero byte, which no path has")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{what}={text!r} begins with a user that does not exist; for a folder of that name: ./{text}"
        ) from error


def user_spec(given: str, what: str = "a model") -> str:
    """Returns what a user gave to name a model or a text, a hub id perhaps, with the home folder in place of `~`.

    Raises:
        ValueError: as `user_path`.
    """
    path = user_path(given, what)  # not returned: ./model is another name than model, and hub:NAME is no path
    return str(path) if given.startswith("~") else given


def nearest_name(path: Path) -> str | None:
    """Returns the path that is there whose name is nearest to that of `path`, which is not; None for none alike.

    Where folders above it are missing too, the name of the topmost of them is looked at.
    """
    missing = path
    try:
        while not missing.parent.is_dir() and missing.parent != missing:
            missing = missing.parent
        names = {entry.name.lower(): entry.name for entry in missing.parent.iterdir()}
    except OSError:  # no right to look
        return None
    alike = difflib.get_close_matches(missing.name.lower(), names, 1)
    return str(missing.parent / names[alike[0]]) if alike else None


def same_place(first: str | Path, second: str | Path) -> bool:
    """Returns whether two paths name one file or folder, be it there or not."""
    one, other = Path(first), Path(second)
    try:
        return one.samefile(other)
    except OSError:
        return one.resolve() == other.resolve()


def check_outputs(files: Mapping[str, Path | None], inputs: Iterable[str | Path] = ()) -> None:
    """Raises where one of the files that are to be written could not be, or would replace another or an input.

    A file is tried by writing one beside it, which is then removed; folders that are missing are not made yet.

    Args:
        files: by the option that names them; None where it was not given.
        inputs: what is read, files and folders; names that are no path, such as hub ids, do no harm.

    Raises:
        OSError: a file cannot be written.
        ValueError: two outputs are one file, or an output is an input.
    """
    given = {option: path for option, path in files.items() if path is not None}
    for option, path in given.items():
        for other, earlier in given.items():
            if other == option:
                break
            if same_place(path, earlier):
                raise ValueError(f"{other} and {option} are both {path}; give each a file of its own")
        for source in inputs:
            if same_place(path, source):
                raise ValueError(f"{option}={path} would replace what is read; give another file")
        check_file_output(path, option)


def check_file_output(path: Path, what: str) -> None:
    """Raises OSError where the file `path` could not be written; `what` is what errors call it."""
    _try_to_write(path.parent, path.name, f"{what}={path}")
    if path.is_dir():
        raise IsADirectoryError(f"{what}={path} is a folder; give a file in it")
    if path.exists() and not path.is_file():  # /dev/null, a pipe: files are renamed into place, and it would be gone
        raise OSError(f"{what}={path} is no ordinary file; give one that can be replaced")


def check_folder_output(path: Path, what: str) -> None:
    """Raises OSError where the folder `path` could not be made or written into; `what` is what errors call it."""
    _try_to_write(path if _exists(path, f"{what}={path}") else path.parent, path.name, f"{what}={path}")


def check_new(out: Path, what: str, *, overwrite: bool | None = None) -> None:
    """Raises FileExistsError where an output is there already.

    Args:
        out: the file or folder.
        what: the option that names it.
        overwrite: whether it may be there; None where the command has no `--overwrite`.
    """
    if out.exists() and not overwrite:
        way = "" if overwrite is None else ", or give --overwrite"
        raise FileExistsError(f"output {out} exists already; choose another {what}{way}")


def _try_to_write(folder: Path, name: str, what: str) -> None:
    """Writes a file called about `name` into `folder`, or the nearest folder above that is there, and removes it."""
    place = folder
    while not _exists(place, what) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{what} cannot be written: {place} is a file, not a folder; give another place")
    trial = place / f".{name}.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise OSError(f"{what} cannot be written: {error.strerror or error} in {place}; give another place") from error


def _exists(place: Path, what: str) -> bool:
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # no right to look, a name that is too long
        raise OSError(f"{what} cannot be written: {error.strerror or error}; give another place") from error
    return True

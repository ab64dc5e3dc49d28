"""What comes with llmqat to be copied: recipes, scripts and configurations of accelerate, found by name.

They lie in recipes/ at the top of the repository, and travel in the wheel as llmqat/recipes. A recipe is called by its
file's name without the ending (`lora-int4`), everything else by its path in that folder (`accelerate/1-gpu.yaml`), with
or without the ending. A folder is called by its name (`python`), and stands for all that is in it.
"""

from __future__ import annotations

import ast
import difflib
import shutil
from pathlib import Path

LONGEST_TITLE = 100
"""Characters."""


def shipped_folder() -> Path:
    """Returns the folder of all that is shipped: in the installed package, or else in the checkout around it."""
    package = Path(__file__).resolve().parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_files() -> dict[str, Path]:
    """Returns name -> file, recipes first."""
    folder, recipes = shipped_folder(), shipped_recipes()
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return recipes | {file.relative_to(folder).as_posix(): file for file in files if file not in recipes.values()}


def shipped_recipes() -> dict[str, Path]:
    """Returns name -> file of the recipes alone, which commands take by name."""
    return {file.stem: file for file in sorted(shipped_folder().glob("*.yaml"))}


def find_shipped(name: str) -> Path:
    """Returns the shipped file that is called `name`; the ending may be there or not.

    Raises:
        FileNotFoundError: nothing is called so; the nearest name is told, or else all.
    """
    files = shipped_files()
    short = {Path(one).with_suffix("").as_posix(): file for one, file in files.items()}
    if (found := files.get(name) or files.get(name.removesuffix(".yaml")) or short.get(name)) is None:
        raise FileNotFoundError(f"nothing that llmqat ships is called {name!r}; {advice(name, list(files))}")
    return found


def advice(name: str, names: list[str]) -> str:
    """Returns which of `names` may be meant by `name`, or else all of them."""
    near = difflib.get_close_matches(name.removesuffix(".yaml"), names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? `llmqat recipes` lists all" if near else f"there are: {', '.join(names)}"


def copy_shipped(name: str, folder: Path) -> list[Path]:
    """Copies the shipped file or folder `name` into `folder`, which is made where it is not there; returns the copies.

    Raises:
        FileNotFoundError: nothing is called so.
        FileExistsError: a file of this name is in the folder already; then nothing is copied.
    """
    inside = [file for one, file in shipped_files().items() if one.startswith(f"{name.rstrip('/')}/")]
    sources = inside or [find_shipped(name)]
    folder = folder / name if inside else folder
    targets = [folder / source.name for source in sources]
    if there := [str(target) for target in targets if target.exists()]:
        raise FileExistsError(f"{', '.join(there)} exists already; remove it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in zip(sources, targets, strict=True):
        shutil.copyfile(source, target)
    return targets


def title(file: Path) -> str:
    """Returns the first sentence of what a shipped file says of itself.

    It is that of a script's docstring, of a page's heading, or of a YAML file's comment below its head (the lines up to
    the first empty comment, which say command, machine, time and result).
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    elif file.suffix == ".md":
        said = text.partition("\n")[0].lstrip("# ")
    else:
        head, separator, below = text.partition("\n#\n")
        lines = (below if separator and head.startswith("# command:") else text).splitlines()
        comment = lines[: next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))]
        said = " ".join(line.lstrip("# ") for line in comment)
    sentence = " ".join(said.split()).partition(". ")[0].rstrip(".")
    return sentence.partition(": ")[0] if len(sentence) > LONGEST_TITLE else sentence

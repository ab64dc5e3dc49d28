"""The run folder: what one run leaves on disk, and how an interrupted run is found again.

    recipe.yaml          the recipe, overrides included
    blocks.safetensors   the text that was trained on, and calibrated on where it has no text of its own
    calibration.safetensors, validation.safetensors      text of the other splits, where there are any
    teacher/             what the model predicts for text that it wrote, removed when the run has finished
    calibration/         what the stages of the calibration have done, removed when the run has finished
    checkpoints/         the trainer's own, removed when the run has finished
    model/               the packed checkpoint
    adapter/             what `lora` has trained, before it was folded; not where the weights under it were moved
    plan.json            bits by layer, where the recipe has them chosen
    layers.json, .png    what quantization did to each layer; the picture where matplotlib is installed
    results.json         the figures; written last, so a run is finished when it is there
    status.json          where the run is, or how it ended (record.py), for `llmqat status`

A folder that holds anything else is never touched, not even with `--overwrite`; logs (.log) may lie there before.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from llmqat.calibrate import RotateStage, SmoothStage
from llmqat.data import DataConfig, TextSplits, read_blocks, save_blocks
from llmqat.data.origin import has_changed, origin_of
from llmqat.data.processes import ALONE, Processes
from llmqat.data.shards import TEACHER_FOLDER
from llmqat.data.teacher_cache import HEADER_FILE, CachePlace, read_header
from llmqat.evaluate.layers import JSON_FILE as LAYERS_FILE
from llmqat.evaluate.layers import PICTURE_FILE as LAYERS_PICTURE
from llmqat.files import is_locked_by_us, read_json, write_whole
from llmqat.recipe.allocation import PLAN_FILE
from llmqat.recipe.config import RECIPE_FILE, TRAINER_FOLDER, Recipe, kept_top_k, master_dtype
from llmqat.recipe.reading import load_recipe
from llmqat.train.checkpoints import last_checkpoint

log = logging.getLogger(__name__)

BLOCKS_FILES = {
    "train": "blocks.safetensors",
    "calibration": "calibration.safetensors",
    "validation": "validation.safetensors",
}
"""Split of the text -> its file."""
ORIGIN_FILE = "text.json"
"""Says which files those were made from."""
CALIBRATION_FOLDER = "calibration"
CHECKPOINT_FOLDER = "model"
ADAPTER_FOLDER = "adapter"
RESULTS_FILE = "results.json"
MAY_DIFFER = (
    *("output", "train.per_device_train_batch_size", "train.gradient_accumulation_steps"),
    *("data.num_proc", "data.server"),
)
"""Keys that may change when an interrupted run goes on. With another number of processes a step must be cut up
differently; that it has as many samples as before, the trainer checks."""
LOCK_FILE = f".{RECIPE_FILE}.lock"
"""Is locked while a process runs the recipe, and removed by it."""

_MADE_BY: dict[str, tuple[str, ...]] = {
    "text": (*BLOCKS_FILES.values(), ORIGIN_FILE),
    "allocate": (PLAN_FILE,),
    "calibrate": (CALIBRATION_FOLDER,),
    "teacher": (TEACHER_FOLDER,),
    "train": (TRAINER_FOLDER, CHECKPOINT_FOLDER, ADAPTER_FOLDER, LAYERS_FILE, LAYERS_PICTURE),
    "evaluate": (RESULTS_FILE,),
}
"""Stage of a run, in their order -> files and folders that it makes."""
_FIRST_CHANGED = {
    "train.bf16": "allocate",  # calibration computes in it
    "train.use_cpu": "allocate",
    "train": "train",
    "monitor": "train",
    "teacher_top_k": "teacher",
    "teacher_bits": "train",
    "teacher_cache": "train",  # whether it fits the text is checked when the text is there
    "lora": "calibrate",  # in other masters
    "lora.*": "train",
    "calibrate": "calibrate",
    "quant": "allocate",
    "allocate": "allocate",
    "evaluate": "evaluate",
    "serve": "evaluate",
}
"""Key, or section of keys -> the first stage that it changes; of all that are not here, the first of all."""
_FOLDS = (RotateStage, SmoothStage)


def open_run_folder(recipe: Recipe, *, overwrite: bool = False) -> bool:
    """Makes the run folder of `recipe`, or finds what an interrupted run has left for it.

    What an interrupted run has made is used again up to the first stage that `recipe` changes. What it made after that
    is removed if it cost only seconds; otherwise FileExistsError is raised.

    Args:
        recipe: its `output` is the folder.
        overwrite: whether what an earlier run left there is removed. Only a folder that holds a recipe is.

    Returns:
        Whether an interrupted run goes on.

    Raises:
        FileExistsError: as `check_run_folder`.
    """
    folder, file = recipe.output, recipe.output / RECIPE_FILE
    changes = check_run_folder(recipe, overwrite=overwrite)
    goes_on = file.is_file() and not overwrite
    if changes is not None:
        _remove(folder, changes)
        if changes.keys:
            kept = any((folder / name).exists() for names in _MADE_BY.values() for name in names)
            goes_on = goes_on and kept
            log.info(
                "%s: an earlier start there had other values (there -> now): %s; %s",
                folder,
                "; ".join(changes.keys),
                "what it made that does not depend on them is used"
                if kept
                else "it left nothing worth keeping, so the run begins anew with this recipe",
            )
    folder.mkdir(parents=True, exist_ok=True)
    _write_recipe(recipe, file)
    return goes_on


def what_is_kept(recipe: Recipe) -> str:
    """Returns in words what of an interrupted run of `recipe` is used, and where its training begins."""
    folder = recipe.output
    there = {
        "text": (folder / BLOCKS_FILES["train"]).is_file(),
        "bits of layers": (folder / PLAN_FILE).is_file(),
        "calibration": any((folder / CALIBRATION_FOLDER).rglob("*.safetensors")),
        "teacher": any((folder / TEACHER_FOLDER).glob("*.safetensors")),
    }
    kept = ", ".join(name for name, is_there in there.items() if is_there) or "nothing"
    last = last_checkpoint(folder / TRAINER_FOLDER)
    training = (
        "training begins at step 1, no checkpoint is there" if last is None else f"training goes on from {last.name}"
    )
    return f"kept: {kept}" + (f"; {training}" if recipe.trains else "")


def check_run_folder(recipe: Recipe, *, overwrite: bool = False) -> Changes | None:
    """Returns how `recipe` differs from the run in its folder; None where there is no run. Changes nothing.

    Raises:
        FileExistsError: the folder holds a finished run, something that is no run, or work of an interrupted run that
            `recipe` cannot use and that would be lost; says what.
    """
    folder, file = recipe.output, recipe.output / RECIPE_FILE
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output={folder} is a file; choose another output")
    if _is_empty(folder):
        return None
    if not file.is_file():
        raise FileExistsError(f"output={folder} exists and is no run of llmqat; choose another output=FOLDER")
    if overwrite:
        return Changes((), "text")
    if (folder / RESULTS_FILE).is_file():
        raise FileExistsError(
            f"output={folder} holds a finished run; use its {CHECKPOINT_FOLDER}/, choose another output=FOLDER, "
            "or run it anew with --overwrite"
        )
    earlier = load_recipe(folder)
    changes = _changes(earlier, recipe)
    if lost := _work(folder, earlier, changes):
        raise FileExistsError(
            f"output={folder} holds an interrupted run of another recipe (there -> now): {'; '.join(changes.keys)}; "
            f"with these values it would lose {', '.join(lost)}. Give the same values to resume it, choose another "
            "output=FOLDER, or start anew with --overwrite"
        )
    return changes


@contextmanager
def held_run_folder(folder: Path) -> Iterator[None]:
    """Inside, no other process runs a recipe in `folder`, which is made; a folder that is no run is left as it is.

    Raises:
        FileExistsError: another process does now.
    """
    may_be_made = _is_empty(folder) or (folder / RECIPE_FILE).is_file()
    if not may_be_made or importlib.util.find_spec("fcntl") is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK_FILE
    with lock.open("w") as file:
        if not is_locked_by_us(file):
            raise FileExistsError(
                f"output={folder} is in use: another process runs a recipe there now; wait for it, or choose another "
                "output=FOLDER"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _is_empty(folder: Path) -> bool:
    """Returns whether `folder` is not there, or holds nothing but logs and what killed starts of a run leave."""
    if not folder.exists():
        return True
    left = (f".{RECIPE_FILE}.",)
    return folder.is_dir() and all(
        path.name.startswith(left) or (path.suffix == ".log" and path.is_file()) for path in folder.iterdir()
    )


def _write_recipe(recipe: Recipe, file: Path) -> None:
    values = recipe.model_dump(mode="json", exclude_unset=True)
    write_whole(file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


# What an interrupted run of another recipe has made


@dataclass(frozen=True)
class Changes:
    """How a recipe differs from the one of an interrupted run."""

    keys: tuple[str, ...]
    """Each key with its value there and now."""
    stage: str | None
    """The first stage of the run that they change; None for none."""
    calibrated: int = 0
    """Stages of the calibration, from the first, that they do not change."""

    def is_changed(self, stage: str) -> bool:
        """Returns whether `stage`, or one before it, is changed."""
        stages = [*_MADE_BY]
        return self.stage is not None and stages.index(stage) >= stages.index(self.stage)


def _changes(earlier: Recipe, recipe: Recipe) -> Changes:
    there, now = (_flat(one.model_dump(mode="json")) for one in (earlier, recipe))
    keys = [key for key in sorted(there.keys() | now.keys()) if there.get(key) != now.get(key)]
    keys = [key for key in keys if key not in MAY_DIFFER]
    shown = tuple(f"{key}: {there.get(key)!r} -> {now.get(key)!r}" for key in keys)
    toggled = [key for key in there.keys() ^ now.keys() if "." not in key]  # a section that is there once
    changed = {_first_changed(key) for key in (*keys, *toggled)}
    if master_dtype(earlier) != master_dtype(recipe):  # codes are found for weights as they are held
        changed.add("calibrate")
    stage = next((stage for stage in _MADE_BY if stage in changed), None)
    same = 0
    if [key for key in keys if _first_changed(key) == "calibrate"] == ["calibrate"]:
        pairs = zip(earlier.calibrate, recipe.calibrate, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if any(isinstance(one, _FOLDS) for one in (*earlier.calibrate[same:], *recipe.calibrate[same:])):
            same = 0
    return Changes(shown, stage, same)


def _first_changed(key: str) -> str:
    section, *inside = key.split(".")
    first = next(iter(_MADE_BY))
    return (
        _FIRST_CHANGED.get(key)
        or _FIRST_CHANGED.get(f"{section}.*" if inside else "")
        or (_FIRST_CHANGED.get(section, first))
    )


def _work(folder: Path, earlier: Recipe, changes: Changes) -> list[str]:
    """Returns what costs more than seconds in `folder`, made by stages that are changed."""
    found = []
    if changes.is_changed("text") and (folder / BLOCKS_FILES["train"]).is_file() and _written_by_model(earlier):
        found.append(f"the text that the model wrote ({BLOCKS_FILES['train']})")
    if changes.is_changed("allocate") and (folder / PLAN_FILE).is_file():
        found.append(f"the bits that were chosen for each layer ({PLAN_FILE})")
    if changes.is_changed("calibrate"):
        places = _calibration_folders(folder, changes.calibrated if changes.stage == "calibrate" else 0)
        done = [place.name for place in places if any(place.glob("*.safetensors"))]
        found += [f"the calibration ({CALIBRATION_FOLDER}/: {', '.join(done)})"] if done else []
    if changes.is_changed("train"):
        last = last_checkpoint(folder / TRAINER_FOLDER)
        if last is not None:
            found.append(f"the training ({TRAINER_FOLDER}/{last.name})")
        elif (folder / CHECKPOINT_FOLDER / "config.json").is_file():
            found.append(f"the {'trained' if earlier.trains else 'packed'} model ({CHECKPOINT_FOLDER}/)")
    return found


def _written_by_model(recipe: Recipe) -> bool:
    """Returns whether the model wrote text of `recipe`, and the run folder alone keeps it."""
    return any(source.source == "synthetic" and source.path is None for source in (recipe.data.mix or (recipe.data,)))


def _calibration_folders(folder: Path, done: int) -> list[Path]:
    """Returns the folders of the calibration's stages after the first `done`."""
    places = sorted(path for path in (folder / CALIBRATION_FOLDER).glob("[0-9][0-9]-*") if path.is_dir())
    return [place for place in places if int(place.name[:2]) > done]


def _remove(folder: Path, changes: Changes) -> None:
    """Removes what stages have made that are changed."""
    for stage, names in _MADE_BY.items():
        if not changes.is_changed(stage):
            continue
        paths = [folder / name for name in names]
        if stage == "calibrate" and changes.stage == "calibrate" and changes.calibrated:
            paths = _calibration_folders(folder, changes.calibrated)
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def kept_place(recipe: Recipe) -> CachePlace | None:
    """Returns where the writer of the recipe's text keeps what it predicts: with the text; None where it does not.

    Raises:
        ValueError: what lies there is damaged.
    """
    top_k = kept_top_k(recipe)
    if top_k is None:
        return None
    folder = (recipe.data.path or recipe.output) / TEACHER_FOLDER
    if recipe.teacher_top_k == "auto" and (folder / HEADER_FILE).is_file():  # of `llmqat synthesize`, or an earlier run
        top_k = read_header(folder).top_k
    return CachePlace(folder, top_k)


def kept_text(
    folder: Path, data: DataConfig, make: Callable[[], TextSplits], processes: Processes = ALONE
) -> TextSplits:
    """Returns the run's text: from the folder where an earlier start has left it there, else made and left there.

    Where `processes` make it together, the first one leaves it there.

    Raises:
        ValueError: the files that it was made from have changed since.
    """
    files = {split: folder / name for split, name in BLOCKS_FILES.items()}
    if processes.agreed(files["train"].is_file()):
        _check_unchanged(folder, data)
        return TextSplits(**{split: read_blocks(file) for split, file in files.items() if file.is_file()})
    origin = origin_of(data) if processes.is_first else {}
    text = make()
    if not processes.is_first:
        return text
    write_whole(folder / ORIGIN_FILE, json.dumps(origin, indent=2) + "\n")
    for split, blocks in reversed(text.given().items()):  # the training text last: where it is, all are
        save_blocks(blocks, files[split])
    return text


def _check_unchanged(folder: Path, data: DataConfig) -> None:
    """Raises ValueError where `folder` holds blocks of other text than `data` names now."""
    file = folder / ORIGIN_FILE
    if file.is_file() and has_changed(data, read_json(file)):
        raise ValueError(
            f"the text has changed since {folder} was begun with it; put it back, or begin anew (--overwrite, or "
            "another output)"
        )

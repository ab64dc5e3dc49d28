"""The run folder: what one run leaves on disk, and how an interrupted run is found again.

    recipe.yaml          the recipe, overrides included
    blocks.safetensors   the text that was trained on, and calibrated on where it has no text of its own
    calibration.safetensors, validation.safetensors      text of the other splits, where there are any
    calibration/         what the stages of the calibration have done, removed when the run has finished
    checkpoints/         the trainer's own, removed when the run has finished
    model/               the packed checkpoint
    adapter/             what `lora` has trained, before it was folded; not where the weights under it were moved
    plan.json            bits by layer, where the recipe has them chosen
    layers.json, .png    what quantization did to each layer; the picture where matplotlib is installed
    results.json         the figures; written last, so a run is finished when it is there

A folder that holds anything else is never touched, not even with `--overwrite`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from llmqat.data import TextSplits, read_blocks, save_blocks
from llmqat.data.processes import ALONE, Processes
from llmqat.evaluate.layers import JSON_FILE as LAYERS_FILE
from llmqat.evaluate.layers import PICTURE_FILE as LAYERS_PICTURE
from llmqat.models import write_whole
from llmqat.recipe.allocation import PLAN_FILE
from llmqat.recipe.config import RECIPE_FILE, TRAINER_FOLDER, Recipe, load_recipe

BLOCKS_FILES = {
    "train": "blocks.safetensors",
    "calibration": "calibration.safetensors",
    "validation": "validation.safetensors",
}
"""Split of the text -> its file."""
CALIBRATION_FOLDER = "calibration"
CHECKPOINT_FOLDER = "model"
ADAPTER_FOLDER = "adapter"
RESULTS_FILE = "results.json"
MAY_DIFFER = ("output", "train.per_device_train_batch_size", "train.gradient_accumulation_steps")
"""Keys that may change when an interrupted run goes on. With another number of processes a step must be cut up
differently; that it has as many samples as before, the trainer checks."""


def open_run_folder(recipe: Recipe, *, overwrite: bool = False) -> bool:
    """Makes the run folder of `recipe`, or finds the interrupted run of the same recipe in it.

    Args:
        recipe: its `output` is the folder.
        overwrite: whether what an earlier run left there is removed. Only a folder that holds a recipe is.

    Returns:
        Whether an interrupted run goes on.

    Raises:
        FileExistsError: the folder holds a finished run, the run of another recipe, or something that is no run.
    """
    folder = recipe.output
    file = folder / RECIPE_FILE
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output={folder} is a file; choose another output")
    if folder.is_dir() and any(path for path in folder.iterdir() if not path.name.startswith(f".{RECIPE_FILE}.")):
        if not file.is_file():
            raise FileExistsError(f"output={folder} exists and is no run of llmqat; choose another output=FOLDER")
        if not overwrite:
            _check_same_run(recipe, folder)
            _write_recipe(recipe, file)
            return True
        for name in (CALIBRATION_FOLDER, TRAINER_FOLDER, CHECKPOINT_FOLDER, ADAPTER_FOLDER):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (RESULTS_FILE, PLAN_FILE, LAYERS_FILE, LAYERS_PICTURE, *BLOCKS_FILES.values(), RECIPE_FILE):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write_recipe(recipe, file)
    return False


def _write_recipe(recipe: Recipe, file: Path) -> None:
    values = recipe.model_dump(mode="json", exclude_unset=True)
    write_whole(file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _check_same_run(recipe: Recipe, folder: Path) -> None:
    if (folder / RESULTS_FILE).is_file():
        raise FileExistsError(
            f"output={folder} holds a finished run; use its {CHECKPOINT_FOLDER}/, choose another output=FOLDER, "
            "or run it anew with --overwrite"
        )
    earlier = _flat(load_recipe(folder).model_dump(mode="json"))
    now = _flat(recipe.model_dump(mode="json"))
    differing = [
        f"{key}: {earlier.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key) != now.get(key) and key not in MAY_DIFFER
    ]
    if differing:
        raise FileExistsError(
            f"output={folder} holds an interrupted run of another recipe (there -> now): {'; '.join(differing)}; give "
            "the same values to go on with it, choose another output=FOLDER, or start anew with --overwrite"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def kept_text(folder: Path, make: Callable[[], TextSplits], processes: Processes = ALONE) -> TextSplits:
    """Returns the run's text: from the folder where an earlier start has left it there, else made and left there.

    Where `processes` make it together, the first one leaves it there.
    """
    files = {split: folder / name for split, name in BLOCKS_FILES.items()}
    if processes.agreed(files["train"].is_file()):
        return TextSplits(**{split: read_blocks(file) for split, file in files.items() if file.is_file()})
    text = make()
    if not processes.is_first:
        return text
    for split, blocks in reversed(text.given().items()):  # the training text last: where it is, all are
        save_blocks(blocks, files[split])
    return text

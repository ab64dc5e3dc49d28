"""Checkpoints of a training: each is written in another folder, synced to disk and renamed, so none is ever partial.

    OUTPUT/checkpoint-40/               as transformers.Trainer writes it, and MANIFEST_FILE
    OUTPUT/unfinished/checkpoint-60/    being written; what a killed process leaves there is deleted at the next saving

The manifest lists every file with its size. So a folder that was cut short later (a full disk, a broken copy, an
interrupted deletion) is recognized as incomplete. Older checkpoints are deleted only when the new one is in place.

The manifest also holds how many tokens were trained on, and how many samples a step had. The order of the data depends
on the seed alone. So a run can resume with another number of processes if the samples per step stay the same.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmqat.files import force_folder_to_disk, force_to_disk, read_json

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
UNFINISHED_FOLDER = "unfinished"


def checkpoint_step(path: Path) -> int:
    """Returns the optimizer step at which the checkpoint folder `path` was written."""
    return int(path.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint in the trainer's `folder`; None where there is none."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()]
    for path in sorted(found, key=checkpoint_step, reverse=True):
        if lacking := what_it_lacks(path):
            log.warning("%s is not whole (%s) and is left out", path, lacking)
        else:
            return path
    return None


def what_it_lacks(path: Path) -> str | None:
    """Returns why the checkpoint folder `path` is not whole; None where it is."""
    try:
        files: dict[str, int] = read_json(path / MANIFEST_FILE)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable {MANIFEST_FILE}: {type(error).__name__}"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes of {size:,}"
    return None


def check_resumable(path: Path, samples: int) -> None:
    """Raises ValueError where training cannot go on from `path` as if it had not been interrupted.

    Args:
        path: a checkpoint folder.
        samples: in an optimizer step now, all processes together.
    """
    if lacking := what_it_lacks(path):
        raise ValueError(
            f"resume_from_checkpoint={path} is not whole: {lacking}; give another checkpoint, or True for the newest "
            "whole one"
        )
    before = read_json(path / MANIFEST_FILE)
    if before["samples_per_step"] != samples:
        raise ValueError(
            f"{path} was trained with {before['samples_per_step']} samples a step ({before['processes']} processes), "
            f"now a step has {samples}; give the same number: it is per_device_train_batch_size x "
            "gradient_accumulation_steps x processes"
        )


def check_steps(path: Path, steps: int) -> None:
    """Raises ValueError where a training of `steps` optimizer steps cannot resume from the checkpoint `path`.

    The checkpoint has made more steps, or steps remain and it holds no optimizer state.
    """
    made = checkpoint_step(path)
    if made > steps:
        raise ValueError(
            f"{path} has made {made} optimizer steps, and the training has {steps}; give an earlier checkpoint, or "
            "more steps (max_steps, num_train_epochs)"
        )
    files = read_json(path / MANIFEST_FILE)["files"]
    if made < steps and not any("optim" in name for name in files):
        raise ValueError(
            f"{path} holds the model alone (save_only_model), so the optimizer would begin anew; train from the start, "
            "or load the model from it and train that"
        )


def tokens_of(path: Path) -> int | None:
    """Returns how many tokens the checkpoint `path` was trained on, all processes together; None where not known."""
    tokens: int | None = read_json(path / MANIFEST_FILE).get("tokens")
    return tokens


def batch_size_of(path: Path) -> int | None:
    """Returns the batch size that `auto_find_batch_size` had come to in the checkpoint `path`."""
    file = path / TRAINER_STATE_NAME
    size: int | None = read_json(file).get("train_batch_size") if file.is_file() else None
    return size


def publish(unfinished: Path, folder: Path, *, samples: int, processes: int, tokens: int | None = None) -> None:
    """Gives `unfinished` a manifest, forces it to disk and renames it to `folder`, replacing what is there.

    Raises:
        OSError: the disk is full, or fails.
    """
    files = {str(path.relative_to(unfinished)): path.stat().st_size for path in _files(unfinished)}
    manifest = {"samples_per_step": samples, "processes": processes, "tokens": tokens, "files": files}
    (unfinished / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    force_folder_to_disk(unfinished)
    if folder.exists():
        replaced = unfinished.with_name(f"replaced-{folder.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    unfinished.rename(folder)
    force_to_disk(folder.parent)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def is_writing_error(error: BaseException) -> bool:
    """Returns whether `error` is that of a file that could not be written, as torch and safetensors also raise it."""
    return isinstance(error, (OSError, SafetensorError)) or "inline_container.cc" in str(error)


def writing_error(error: BaseException, folder: Path, step: int) -> OSError:
    """Returns the error to raise where the checkpoint of `step` could not be written into the trainer's `folder`."""
    last = last_checkpoint(folder)
    kept = f"{last} is whole, and training goes on from it" if last is not None else "there is no earlier one"
    free = shutil.disk_usage(folder).free
    return OSError(
        f"the checkpoint of step {step} could not be written to {folder} ({free:,} bytes free): {error}; {kept}. Free "
        "some space, or write to another disk, and give the same command again"
    )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())

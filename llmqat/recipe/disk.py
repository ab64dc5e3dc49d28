"""The disk that a run takes, by arithmetic, and what is free where it writes.

    text           token ids of all splits, 2 or 4 bytes each
    teacher        what the model predicts for text that it wrote: for each token kept of a position its id, 2 or 4
                   bytes, and 2 of its logarithm
    calibration    the original weights of the blocks in bfloat16; for each stage that trains or codes blocks, these in
                   the masters' dtype; scales for each stage `ranges`
    checkpoints    what trains in float32 with its optimizer, as many times as are kept, and once more while one is
                   written
    model          the packed checkpoint

All of it lies there at once when the last checkpoint is written; all but text and model are removed when the run has
finished.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import torch

from llmqat.calibrate import BlockwiseStage, GPTQStage, RangesStage
from llmqat.layers import CoverageAudit
from llmqat.recipe.config import Recipe, kept_top_k, master_dtype
from llmqat.recipe.memory import Calibration, Method, ModelSize
from llmqat.train import QATArguments

TIGHT = 0.9
"""Share of the free bytes from which it is said that they may not do."""


@dataclasses.dataclass(frozen=True)
class Disk:
    """Bytes that a run writes into its folder."""

    text: float
    teacher: float
    calibration: float
    checkpoint: float
    """One of the trainer's."""
    checkpoints: int
    """How many of them lie there at most."""
    model: float

    @property
    def peak(self) -> float:
        """All of it."""
        return self.text + self.teacher + self.calibration + self.checkpoints * self.checkpoint + self.model

    @property
    def least(self) -> float:
        """What no run does without: one checkpoint, where any is written, and the packed one."""
        return self.text + self.teacher + self.calibration + min(self.checkpoints, 1) * self.checkpoint + self.model

    def parts(self) -> dict[str, float]:
        """Returns the bytes of each part at most."""
        return {
            "text": self.text,
            "teacher": self.teacher,
            "calibration": self.calibration,
            "checkpoints": self.checkpoints * self.checkpoint,
            "model": self.model,
        }


def disk_of(
    recipe: Recipe,
    arguments: QATArguments,
    coverage: CoverageAudit,
    size: ModelSize,
    method: Method | Calibration,
    blocks: int | None,
    steps: int | None,
) -> Disk:
    """Returns the disk that `recipe` takes; text of an unknown amount is not counted."""
    ids = 0 if blocks is None else blocks * recipe.data.block_size
    width = 2 if size.vocabulary <= 2**16 else 4
    return Disk(
        text=float(ids * width),
        teacher=float(ids * ((width + 2) * (kept_top_k(recipe) or 0))),
        calibration=_calibration_bytes(recipe, size),
        checkpoint=0.0 if isinstance(method, Calibration) else _checkpoint_bytes(arguments, size, method),
        checkpoints=_checkpoints(arguments, steps),
        model=float(coverage.bytes_after),
    )


def _calibration_bytes(recipe: Recipe, size: ModelSize) -> float:
    if size.packed_bytes == 0 or not recipe.calibrate:
        return 0.0
    blocks = float(size.block * size.layers)
    width = 4.0 if master_dtype(recipe) == torch.float32 else 2.0
    found = 2.0 * blocks
    for stage in recipe.calibrate:
        if isinstance(stage, (GPTQStage, BlockwiseStage)):
            found += width * blocks + 4.0 * size.groups
        elif isinstance(stage, RangesStage):
            found += 4.0 * size.groups
    return found


def _checkpoint_bytes(arguments: QATArguments, size: ModelSize, method: Method) -> float:
    states = 0.0 if arguments.save_only_model else method.optimizer * method.trained
    if method.trains == "all":
        return 4.0 * size.parameters + 8.0 * size.groups + states
    if method.trains == "lora":
        return 4.0 * method.trained + states
    rest = size.parameters - size.quantized
    return size.packed_bytes * size.quantized + 6.0 * size.groups + 2.0 * rest + states


def _checkpoints(arguments: QATArguments, steps: int | None) -> int:
    """Returns how many checkpoints lie there at most: those that are kept, and one that is being written."""
    if arguments.save_strategy == "no" or steps == 0:
        return 0
    every = arguments.save_steps * (1 if arguments.save_steps >= 1 else steps or 1)
    epochs = math.ceil(arguments.num_train_epochs)
    made = epochs if arguments.save_strategy == "epoch" else None if steps is None else math.ceil(steps / max(every, 1))
    if arguments.save_strategy == "best":
        made = None
    kept = arguments.save_total_limit
    if kept is not None and arguments.load_best_model_at_end:
        kept = max(kept, 2)  # the best and the last
    most = min((n for n in (made, None if kept is None else kept + 1) if n is not None), default=2)
    return max(most, 1)


def free_bytes(folder: Path) -> int:
    """Returns the bytes that are free where `folder` is, or would be made, and those that it holds already."""
    place = folder
    while not place.is_dir() and place != place.parent:
        place = place.parent
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return shutil.disk_usage(place).free + held


def disk_problem(disk: Disk, folder: Path) -> tuple[str, bool] | None:
    """Returns what to say where the disk does not do, and whether that is certain; None where it does."""
    free = free_bytes(folder)
    if disk.peak <= TIGHT * free:
        return None
    parts = ", ".join(f"{name} {_gigabytes(count)}" for name, count in disk.parts().items() if count)
    ways = "write to another disk (output=FOLDER)"
    if disk.checkpoints:
        ways += (
            ", keep fewer checkpoints (train.save_total_limit=1), leave the optimizer out of them "
            "(train.save_only_model=true), or write none (train.save_strategy=no)"
        )
    certain = disk.least > free
    needs = f"output={folder} {'needs' if certain else 'may need'} {_gigabytes(disk.peak)} GB ({parts})"
    return f"{needs}, and {_gigabytes(free)} GB are free; {ways}", certain


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}" if count >= 1e7 else f"{count / 1e9:.4f}"

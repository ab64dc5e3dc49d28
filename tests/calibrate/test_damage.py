"""Whatever happens to a file that a calibration has left: the same bits in the end, or a refusal by its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmqat.calibrate import calibrate
from tests.calibrate.test_stages import BLOCKWISE, INT3, stages, state, text
from tests.tiny import tiny_llama

LAST = ("03-blockwise/report.json", "03-blockwise/block-0001.safetensors")
"""What is removed, so that there is something left to do."""


def calibrated(folder: Path) -> dict[str, Tensor]:
    model = tiny_llama()
    calibrate(model, INT3, stages("ranges", "gptq", {**BLOCKWISE, "learning_rate": 1e-4}), text(), folder=folder)
    return state(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("calibration")
    return folder, calibrated(folder)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :]


DAMAGE = {"flipped": flip, "halved": lambda content: content[: len(content) // 2], "emptied": lambda content: b""}


@pytest.mark.parametrize("damage", [*DAMAGE, "deleted"])
def test_a_damaged_file_is_named_or_made_anew(
    damage: str, whole: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    source, expected = whole
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    assert len(files) > 8
    for file in (file for file in files if str(file) not in LAST):
        folder = Path(shutil.copytree(source, tmp_path / "work"))
        for name in LAST:
            (folder / name).unlink()
        if damage == "deleted":
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(DAMAGE[damage]((folder / file).read_bytes()))
        said = ""
        try:
            found = calibrated(folder)
        except ValueError as error:
            said = str(error)
        if said:
            assert str(folder / file) in said
            (folder / file).unlink()
            found = calibrated(folder)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), file
        shutil.rmtree(folder)

"""Files that are written whole: what a full disk says, what a power cut leaves, and JSON that is damaged."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from llmqat.files import file_in_progress, folder_in_progress, read_json, write_whole
from llmqat.models import read_checked, save_checked

FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),  # of tokenizers
)


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("way", [file_in_progress, folder_in_progress])
def test_a_full_disk_is_said_by_the_name_of_what_is_not_written(
    way: type[file_in_progress], error: Exception, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "out" if way is folder_in_progress else tmp_path / "out"
    said = rf"{re.escape(str(target))} could not be written: the disk is full \([\d,]+ bytes free\)\. Free some space"
    with pytest.raises(OSError, match=said), way(target):
        raise error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), SafetensorError("of another kind")])
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, file_in_progress(tmp_path / "out"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("lasting", [True, False])
def test_a_file_is_forced_to_disk_before_it_has_its_name(
    lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[str] = []

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        forced.append("folder" if is_folder else f"file, {'there' if (tmp_path / 'out').exists() else 'not there yet'}")

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "out", "text", lasting=lasting)
    assert forced == (["file, not there yet", "folder"] if lasting else [])


@pytest.mark.parametrize(("code", "is_raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_force_is_no_failure(
    code: int, is_raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(code, "as it is told")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="as it is told") if is_raised else nullcontext():
        write_whole(tmp_path / "out", "text")
    assert (tmp_path / "out").exists() is not is_raised


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}"])
def test_damaged_json_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is damaged, or no JSON \(.*\); delete it, and give"):
        read_json(file)
    with pytest.raises(ValueError, match=r"; copy it again$"):
        read_json(file, "copy it again")


def test_every_byte_of_a_checked_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4, dtype=torch.int8), "c": torch.tensor(2.0).bfloat16()}
    save_checked(path, tensors, {"facts": "{}"})
    found, metadata = read_checked(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert metadata["facts"] == "{}"
    assert set(read_checked(path, lambda name: name == "b")[0]) == {"b"}
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is damaged"):
            read_checked(path)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        read_checked(path)

"""Files that somebody has tampered with: each is refused by name, before anything large is allocated."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmqat import load
from llmqat.export import save
from llmqat.models import load_model
from tests.export.test_formats import prepared
from tests.export.test_import import INT8_INPUTS, foreign
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
WEIGHTS, SHARD = "model.safetensors", "model-00001-of-00001.safetensors"
UP = "model.layers.0.mlp.up_proj"


def with_header(folder: Path, change: Callable[[dict[str, Any]], None], name: str = WEIGHTS) -> None:
    """Rewrites the header of a safetensors file, and nothing else of it."""
    data = (folder / name).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def with_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def with_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def with_index(folder: Path, **names: Any) -> None:
    (folder / WEIGHTS).rename(folder / SHARD)  # a single file would be read without the index
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def overlapping(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        first, second = sorted(name for name in header if name.endswith("weight_packed"))[:2]
        header[second]["data_offsets"] = header[first]["data_offsets"]

    with_header(folder, change)


def gigantic(folder: Path) -> None:
    with_header(folder, lambda header: header[f"{UP}.weight_packed"].update(shape=[2**40, 2**40]))


def long_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + data[8:])


def other_dtype(folder: Path) -> None:
    with_header(folder, lambda header: header[f"{UP}.weight_packed"].update(dtype="F32"))


def entry(value: float) -> Callable[[Path], None]:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale.view(-1)[3] = value
        return scale

    return lambda folder: with_tensor(folder, f"{UP}.weight_scale", change)


def two_files(folder: Path) -> None:
    save_file({f"{UP}.weight_scale": torch.ones(1)}, folder / "other.safetensors")
    with_index(folder, a=SHARD, b="other.safetensors")


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, rf"{WEIGHTS} is truncated or no safetensors file"),
    "overlapping offsets": (overlapping, rf"{WEIGHTS} is truncated or no safetensors file \(.*[Oo]ffset"),
    "gigantic shape": (gigantic, rf"{WEIGHTS} is truncated or no safetensors file"),
    "header longer than the file": (long_header, rf"{WEIGHTS} is truncated or no safetensors file \(.*[Hh]eader"),
    "another dtype": (other_dtype, rf"{UP}.weight_packed is torch.float32, but the format stores it as torch.int32"),
    "scale not a number": (entry(float("nan")), rf"{UP}.weight_scale holds scales that are zero, infinite"),
    "infinite scale": (entry(float("-inf")), rf"{UP}.weight_scale holds scales that are zero, infinite"),
    "scale zero": (entry(0.0), rf"{UP}.weight_scale holds scales that are zero, infinite"),
    "path out of the folder": (lambda folder: with_index(folder, a="../x.safetensors"), "'../x.safetensors'"),
    "absolute path": (lambda folder: with_index(folder, a="/etc/x.safetensors"), "'/etc/x.safetensors'"),
    "pickle in the index": (lambda folder: with_index(folder, a="model.bin"), "'model.bin'"),
    "index of other types": (lambda folder: with_index(folder, a=3), "names the file 3"),
    "tensor in two files": (two_files, rf"{UP}.weight_scale lies in {SHARD} as well"),
    "too many layers": (lambda folder: with_config(folder, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "too large a vocabulary": (lambda folder: with_config(folder, vocab_size=10**12), r"vocab_size \* hidden_size is"),
    "too large a head": (lambda folder: with_config(folder, head_dim=10**13), "head_dim is"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "out"
    save(prepared(tiny_llama(), group_size=32), folder, tiny_tokenizer())
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoint_is_refused_by_name(name: str, good: Path, tmp_path: Path) -> None:
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tamper, message = HOSTILE[name]
    tamper(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_codes_outside_of_their_bits_are_refused(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "theirs", num_bits=8, strategy="channel", group_size=None, inputs=INT8_INPUTS)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"_proj: codes span \[.*outside \[-8, 7\] of 4 bits"):
        load(folder)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickles.*llmqat reads none"):
        load_model(str(tmp_path))


def test_no_file_of_the_package_unpickles_or_runs_code_of_a_repository() -> None:
    files = sorted((ROOT / "llmqat").rglob("*.py"))
    assert len(files) > 50
    for path in files:
        source = path.read_text(encoding="utf-8")
        assert not re.search(
            r"torch\.load\(|torch\.save\(|^\s*(import|from) (pickle|joblib|dill|marshal)\b", source, re.M
        ), path
        assert "trust_remote_code=True" not in source, path
        assert not re.search(r"(?<![\w.])(eval|exec)\(", source), path

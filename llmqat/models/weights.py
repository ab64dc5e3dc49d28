"""The files of a model's folder: which there are, whether they are whole, and how they are written."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmqat.files import file_in_progress, give_usual_rights, write_whole
from llmqat.layers.source import checksum

logger = logging.getLogger(__name__)

_SCALES = (".weight_scale", ".weight_scale_inv")
"""How the names of scales end that belong to a quantized weight beside them."""

_CHECKSUMS = "checksums"
"""Key of a file's metadata: JSON, name of a tensor -> its checksum; "" -> that of all other metadata."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model"),
    *("tekken.json", "sentencepiece.bpe.model"),
)
"""A tokenizer has one of these files at least."""
FOLDERS_OF_OTHERS = {
    "*.onnx": "an ONNX export",
    "openvino_*.xml": "an OpenVINO export",
    "onnx/*.onnx": "an ONNX export",
    "*.mlpackage": "a Core ML export",
    "*.engine": "a TensorRT engine",
    "*.tflite": "a TensorFlow Lite export",
    "*.pte": "an ExecuTorch export",
    "mlc-chat-config.json": "a model of MLC",
}
"""Files by which a folder without safetensors is told -> what it is."""


def check_safetensors(path: Path) -> None:
    """Raises where `path` is not a complete safetensors file; reads its header only.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated or its header is unreadable.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, though the checkpoint's index names it; copy it there again")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}; {path.stat().st_size} bytes); copy it again"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint folder: the single one, or those its index names.

    Of a folder that has both, transformers reads the single file, and so does this; it is logged.

    Raises:
        FileNotFoundError: The folder holds no safetensors.
        ValueError: The index is unreadable, or names a file outside of the folder.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        if index.is_file():
            logger.warning("%s holds %s and %s; the first is read", folder, single.name, index.name)
        return [single]
    if not index.is_file():
        what = other_folder(folder) or f"holds neither {single.name} nor {index.name}: there are no weights in it"
        raise FileNotFoundError(f"{folder} {what}")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a readable safetensors index: {error!r}; copy it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the file {name!r}; only safetensors in the folder itself are read, so it is refused"
            )
    return [folder / name for name in sorted(names)]


def write_shards(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Writes `tensors` into `folder` as `model.safetensors`, or as shards and their index where they are larger.

    Args:
        tensors: by name; contiguous, on the CPU.
        folder: exists, and holds `config.json`.
        max_shard_size: bytes of a shard, or a text such as "5GB".
    """
    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    give_usual_rights(folder)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def save_whole(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors` as safetensors beside `path` and renames, so that `path` is absent or whole."""
    with file_in_progress(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        give_usual_rights(temporary)


def save_checked(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors` as `save_whole` does, with a checksum of each, for `read_checked`."""
    metadata = metadata or {}
    sums = {name: checksum(tensor) for name, tensor in tensors.items()} | {"": _checksum_of_text(metadata)}
    save_whole(path, tensors, {**metadata, _CHECKSUMS: json.dumps(sums)})


def _checksum_of_text(metadata: Mapping[str, str]) -> int:
    return zlib.crc32(json.dumps(metadata, sort_keys=True).encode())


def read_checked(
    path: Path, wanted: Callable[[str], bool] | None = None, *, again: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file of `save_checked`, mapped from it, and its metadata.

    Args:
        path: the file.
        wanted: returns whether the tensor of a name is wanted; all are by default.
        again: whether they were checked before, or just written: then no tensor is read.

    Raises:
        ValueError: the file is damaged: no safetensors, or a tensor has other bytes than were written; names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if wanted is None or wanted(name)}  # noqa: SIM118
        sums = json.loads(metadata.pop(_CHECKSUMS, "{}"))
        found = {} if again else {name: checksum(tensor) for name, tensor in tensors.items()}
        found[""] = _checksum_of_text(metadata)
        damage = shortened([name or "its metadata" for name, value in found.items() if sums.get(name) != value])
    except (SafetensorError, ValueError) as error:
        damage = str(error)
    if damage:
        raise ValueError(f"{path} is damaged ({damage}); delete it, and give the same command again")
    return tensors, metadata


def other_folder(folder: Path) -> str:
    """Returns what a folder without a checkpoint is, and what to give in its place; empty where nothing says it."""
    for pattern, kind in FOLDERS_OF_OTHERS.items():
        if any(folder.glob(pattern)):
            return f"is {kind}, which llmqat does not read: give the folder that it was made from"
    if has_only_pickles(folder):
        return "has its weights as pickles (pytorch_model*.bin), which can run code when read; llmqat reads none"
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return "holds a tokenizer and no weights: there is no model in it"
    return ""


def has_only_pickles(folder: Path) -> bool:
    """Returns whether the weights in `folder` are pickles, which are never loaded."""
    return any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors*"))


def check_loading_info(info: dict[str, Any], spec: str) -> None:
    """Raises ValueError where `from_pretrained` says that weights were missing, or of other shapes."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(
            f"model {spec!r}: the checkpoint lacks {len(missing)} of the model's tensors ({shortened(missing)}), "
            f"which would be left random; give a complete checkpoint"
        )
    if mismatched:
        raise ValueError(f"model {spec!r}: tensors of another shape than config.json says: {shortened(mismatched)}")
    if scales := sorted(name for name in info["unexpected_keys"] if name.endswith(_SCALES)):
        raise ValueError(
            f"model {spec!r}: the checkpoint holds scales of quantized weights ({shortened(scales)}), but its "
            "config.json does not say how (quantization_config); get the config.json that belongs to it"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning(
            "model %r: %d tensors of the checkpoint are not used: %s", spec, len(unexpected), shortened(unexpected)
        )


def shortened(names: list[str], limit: int = 6) -> str:
    """Returns the first `limit` of `names` in a line, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or what the error is where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]

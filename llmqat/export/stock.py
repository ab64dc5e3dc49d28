"""What stock transformers makes of a packed checkpoint, found by trying it.

Whether another loader reads a checkpoint depends on its modeling code as much as on ours: some models read weights
while they are built, and fail; for some, transformers puts other modules in place, which stay random. So nothing is
promised that was not tried:
    on the meta device   the model is built and loaded from names, shapes and types alone: no file is read, no memory
                         is needed. It fails as the real loading fails, and says which tensors stay random.
    with its weights     a small model is loaded as it is, and its logits on a few tokens are compared with ours.
A model that is only read when its weights are dequantized at loading says so in its config.json (`dequantize`), which
transformers takes from there.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import CompressedTensorsConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from llmqat.models import class_of, read_config, shortened, weight_files

ONLY_HERE = "only_llmqat_loads_this"
"""Key of a group in a checkpoint that other loaders would get wrong; compressed-tensors refuses unknown keys."""
MOST_PARAMETERS = 50_000_000
"""Elements of all stored tensors, an int32 word of packed codes being one; logits are compared below this number."""
MOST_DIFFERENCE = 0.01
"""Relative difference of its logits from ours that is rounding, no more."""

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMultimodalLM",
    "AutoModel",
)
"""What people load models with, in the order in which they are looked at."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StockTrial:
    """What stock transformers made of a checkpoint.

    Attributes:
        loader: the class of transformers that loads it.
        loads: whether it does, to the model that was saved.
        dequantized: whether it has to dequantize the weights at loading.
        silent: True if it does not load and transformers raises no error: tensors stay random or are left out, or the
            logits differ.
        reason: why it does not load, in transformers' words if it raises an error; empty if it loads.
        compared: "logits", or "tensors" where only names and shapes were.
    """

    loader: str
    loads: bool
    dequantized: bool = False
    silent: bool = False
    reason: str = ""
    compared: str = "tensors"

    @property
    def note(self) -> str:
        """What its user has to be told; empty where it loads."""
        if self.loads:
            return ""
        told = "refuses the checkpoint, whose config.json says so" if self.silent else "does not load the checkpoint"
        return f"stock transformers {told}: {self.reason}"


@dataclass(frozen=True)
class ExpectedLogits:
    """What a model computes.

    Attributes:
        inputs: of its forward.
        logits: what comes out.
    """

    inputs: Mapping[str, Tensor]
    logits: Tensor


def try_stock(folder: Path, expected: ExpectedLogits | None = None) -> StockTrial:
    """Returns what stock transformers makes of the packed checkpoint in `folder`.

    Args:
        folder: a packed checkpoint.
        expected: what it has to compute, on the reference kernel; compared where the model is small.
    """
    config, tensors = read_config(folder, str(folder)), _without_data(folder)
    small = expected is not None and sum(tensor.numel() for tensor in tensors.values()) < MOST_PARAMETERS
    return _trial(folder, config, tensors, expected if small else None)


def try_tensors(config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> StockTrial:
    """Returns what stock transformers would make of a checkpoint that is not written yet.

    Args:
        config: as it would be written.
        tensors: on the meta device, by the names on disk.
    """
    return _trial(None, config, tensors, None)


def _trial(
    folder: Path | None, config: PreTrainedConfig, tensors: Mapping[str, Tensor], expected: ExpectedLogits | None
) -> StockTrial:
    loader, compared = loader_of(config), "tensors" if expected is None else "logits"
    described: Any = config.quantization_config
    for group in described.get("config_groups", {}).values():
        group.pop(ONLY_HERE, None)  # which an earlier trial has put there
    dequantizes = bool(described.get("dequantize"))
    silent, reason = _tried(folder, config, tensors, expected, dequantizes)
    if not reason:
        return StockTrial(loader, True, dequantizes, compared=compared)
    # Dequantizing at loading, transformers takes the scheme of the first group for all, and no quantized inputs.
    groups = list(described.get("config_groups", {}).values())
    may_help = not dequantizes and len(groups) == 1 and groups[0].get("input_activations") is None
    if may_help and not _tried(folder, config, tensors, expected, dequantize=True)[1]:
        return StockTrial(loader, True, True, compared=compared)
    return StockTrial(loader, False, silent=silent, reason=reason, compared=compared)


def loader_of(config: PreTrainedConfig) -> str:
    """Returns the name of the Auto class that gives the class of `config`; that of the class itself without one."""
    kind = class_of(config)
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        if kind is auto or auto._model_mapping.get(type(config), None) is kind:
            return name
    return str(kind.__name__)


def _without_data(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of the folder's files on the meta device; reads the headers only."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                entry = file.get_slice(name)
                tensors[name] = torch.empty(entry.get_shape(), dtype=_DTYPES[entry.get_dtype()], device="meta")
    return tensors


def _tried(
    folder: Path | None,
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    expected: ExpectedLogits | None,
    dequantize: bool,
) -> tuple[bool, str]:
    """Returns whether a failure is silent, and what fails; nothing where the model is loaded as it was saved."""
    options: dict[str, Any] = {"output_loading_info": True, "dtype": config.dtype, "trust_remote_code": False}
    if dequantize:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    kind = class_of(config)
    try:
        with _quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
            if expected is None:
                options |= {"config": deepcopy(config), "device_map": {"": "meta"}}
                _, found = kind.from_pretrained(None, state_dict=dict(tensors), **options)
                different = ""
            else:
                assert folder is not None
                model, found = kind.from_pretrained(folder, **options)
                different = _difference(model, expected)
    except Exception as error:  # a loader of others fails in any way
        return False, f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}"
    if missing := sorted(found["missing_keys"]):
        return True, f"{len(missing)} tensors would stay random ({shortened(missing, 2)})"
    if unexpected := sorted(found["unexpected_keys"]):
        return True, f"{len(unexpected)} tensors would be left out ({shortened(unexpected, 2)})"
    return bool(different), different


def _difference(model: Any, expected: ExpectedLogits) -> str:
    """Returns how far the model's logits are from those expected, in words; nothing where they are near."""
    device = expected.logits.device
    model = model.to(device).eval()
    output = model(**expected.inputs, use_cache=False)
    found, wanted = (output.logits if "logits" in output else output[0]).float(), expected.logits.float()
    difference = float((found - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny))
    return "" if difference < MOST_DIFFERENCE else f"its logits would differ by {difference:.2g} of their size"


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers and compressed-tensors show no bars and no reports: nobody asked for this model."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

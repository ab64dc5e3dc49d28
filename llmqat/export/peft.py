"""An adapter as a plain peft folder over a packed checkpoint, for servers that hold several on one base.

llmqat trains LoRA inside the quantizers, ŵ = fq(W + s B A), and folds it into the codes: one checkpoint for each
adapter, exactly what was trained. A server with one base for many adapters computes fq(W) x + s B A x instead. That is
another model, since rounding W + s B A is not rounding W: by how much is measured where it is written
(`llmqat.evaluate.adapters`).

The folder is what peft writes for an adapter beside linear layers: `target_modules` instead of parameters, A and B
under the names they had, no scales.

Letters: O out features, I in features, r rank.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from llmqat.files import write_whole
from llmqat.layers import PackedLinear
from llmqat.models import check_safetensors, save_whole

FOLD = "serve it folded: llmqat train and llmqat.save write it so"
_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Returns the configuration of the adapter in `folder`, and A [r, I] and B [O, r] of each layer, by its name.

    Raises:
        FileNotFoundError: a file is missing.
    """
    config_file, file = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    for path in (config_file, file):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; give the folder of an adapter, such as RUN/adapter")
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    check_safetensors(file)
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        for ending in _FACTORS:
            if name.endswith(ending):
                layer = name.removesuffix(ending).removeprefix(_PREFIX)
                factors.setdefault(layer, {})[ending[-8]] = tensor
    return config, factors


def check_inside(folder: Path) -> None:
    """Raises unless `folder` holds an adapter that was trained inside quantizers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is an ordinary one.
    """
    if not read_adapter(folder)[0].get("target_parameters"):
        raise ValueError(f"{folder} is an ordinary peft adapter already, beside its layers; serve it as it is")


def write_peft(folder: Path, base: nn.Module, base_folder: Path, out: Path) -> dict[str, int]:
    """Writes the adapter in `folder` to the new folder `out` as one over the packed `base`; returns bytes by part.

    Args:
        folder: of an adapter that was trained inside quantizers, such as RUN/adapter of `llmqat train` with `lora`.
        base: the packed checkpoint, loaded.
        base_folder: where it lies, which the adapter's configuration names.
        out: must not exist.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: a file of the adapter is missing.
        ValueError: the adapter is on what is no packed linear layer of the base.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another folder")
    config, factors = read_adapter(folder)
    modules = dict(base.named_modules())
    for name, parts in factors.items():
        _check_layer(name, modules.get(name), parts, base_folder)
    targets = {name.rpartition(".")[2] for name in factors}
    also_meant = [name for name in modules if name.rpartition(".")[2] in targets and name not in factors]
    plain = {**config, "target_parameters": None, "base_model_name_or_path": str(base_folder)}
    plain["target_modules"] = sorted(factors) if also_meant else sorted(targets)
    for key, pattern in _PATTERNS.items():
        own = {name: _of_layer(config, key, name) for name in sorted(factors)}
        plain[pattern] = {name: value for name, value in own.items() if value != config[key]}
    state = {f"{_PREFIX}{name}.lora_{key}.weight": part for name, both in factors.items() for key, part in both.items()}
    out.mkdir(parents=True)
    save_whole(out / SAFETENSORS_WEIGHTS_NAME, state, {"format": "pt"})
    write_whole(out / CONFIG_NAME, json.dumps(plain, indent=2, sort_keys=True))
    return {"A and B": sum(tensor.nbytes for tensor in state.values())}


def scaling_of(config: dict[str, Any], name: str) -> float:
    """Returns the factor s of B A of the layer `name`: alpha / r, or alpha / sqrt(r) where it is rank-stabilized."""
    rank, alpha = (_of_layer(config, key, name) for key in ("r", "lora_alpha"))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def _of_layer(config: dict[str, Any], key: str, name: str) -> Any:
    """Returns rank or alpha of the layer `name`, by peft's rule: the first pattern that its name ends with."""
    patterns = config.get(_PATTERNS[key]) or {}
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", own) for own in (name, f"{name}.weight")):
            return value
    return config[key]


def _check_layer(name: str, layer: nn.Module | None, parts: dict[str, Tensor], base_folder: Path) -> None:
    """Raises ValueError unless a server could compute the adapter beside `layer`."""
    if not isinstance(layer, PackedLinear):
        kind = "not a layer" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(
            f"the adapter is on {name}, which is {kind} of {base_folder}; beside a packed linear layer alone can a "
            f"server compute it; {FOLD}"
        )
    if layer.transposed:
        raise ValueError(
            f"the adapter is on {name}, a Conv1D, whose A and B lie the other way round; vLLM takes no such adapter; "
            f"{FOLD}"
        )
    shape = tuple(parts["B"].shape[:1]) + tuple(parts["A"].shape[1:])
    if shape != (layer.out_features, layer.in_features):
        raise ValueError(f"the adapter's {name} is for a weight of {shape}, but {base_folder} has another shape there")

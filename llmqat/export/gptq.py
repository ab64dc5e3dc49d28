"""The GPTQ layout, for gptqmodel, vLLM, SGLang and TensorRT-LLM: another order of the same codes.

A quantized linear NAME is stored as
    NAME.qweight  int32 [I * b / 32, O]: unsigned codes, packed along the input, element 0 in the lowest bits
    NAME.qzeros   int32 [G, O * b / 32]: unsigned zero points, packed along the output
    NAME.scales   float16 [G, O]
    NAME.g_idx    int32 [I]: the group of each input
and means weight[o, i] = (code - zero) * scale. Symmetric codes are shifted by their middle 2^(b-1), which is their
zero. Zero points have two conventions. `checkpoint_format: gptq`, which every loader reads, stores zero - 1 and cannot
hold a zero of 0. `gptq_v2` stores the zero itself. Symmetric models are written in the first, models with zero points
in the second. b is 2, 3, 4 or 8: codes of 5 to 7 bits are kept in 8.

`config.json` alone says how to load it, `quantize_config.json` says the same to older tools. `dynamic` lists the layers
in high precision, and those whose scheme is not that of the first layer. GPTQModel looks for a layer's own name. vLLM
fuses q, k and v, and gate and up, so `dynamic` also has the fused name where all parts are alike. GPTQModel reads all
that is written here; vLLM reads symmetric codes of 4 and 8 bits. The layout has no place for a quantized embedding or
head, so these are written dequantized. So is a layer whose scales are too small for float16. Stacked experts raise an
error, and so does a model in which only Conv1D layers are quantized.

Source: AutoGPTQ's QuantLinear and its successor GPTQModel's, `checkpoint_format` of GPTQModel's QuantizeConfig.
Letters: O out features, I in features, G scales per row, b bits.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

import llmqat
from llmqat.export.companions import keep_companions
from llmqat.export.description import FUSED, ModelDescription, describe
from llmqat.export.tensors import (
    StoredWeight,
    check_weights_only,
    exact_float16,
    stored_dtype,
    stored_tensors,
    too_small_for_float16,
)
from llmqat.files import folder_in_progress
from llmqat.grid import Grid, pack_int32
from llmqat.layers import PackedLinear, QuantLinear
from llmqat.models import write_shards
from llmqat.paths import user_path

logger = logging.getLogger(__name__)

KIND = "the GPTQ layout"
WIDTHS = {2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Bits of a scheme -> bits of a code in the file."""

_MULTIPLE = 32
"""What loaders want both sides of a weight to be divided by."""


def write_gptq(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> dict[str, int]:
    """Writes a prepared or packed `model` and its tokenizer to `folder`; returns bytes by part.

    Args:
        model: linear layers in its blocks are quantized, weights only.
        tokenizer: written beside the weights.
        folder: must not exist; appears whole or not at all.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: the layout cannot hold the model; says what.
    """
    folder = user_path(folder, "folder")
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; choose another name")
    check_gptq(describe(model))
    weights, others = stored_tensors(model)
    dtype = stored_dtype(model)
    head = model.get_output_embeddings()
    linears = {
        name: weight for name, weight in weights.items() if _is_linear(weight.layer) and weight.layer is not head
    }
    if small := [name for name, weight in linears.items() if too_small_for_float16(weight.scale)]:
        logger.warning(
            "%s: %d layers have scales too small for float16, the first is %s: they are written as the numbers they "
            "stand for, not as codes",
            KIND,
            len(small),
            small[0],
        )
        linears = {name: weight for name, weight in linears.items() if name not in small}
    if not linears:
        raise ValueError(f"no linear layer of the model's blocks keeps its codes, so {KIND} has nothing to hold")
    v2 = any(not weight.scheme.symmetric for weight in linears.values())
    parts: dict[str, dict[str, Tensor]] = {"codes": {}, "scales": {}, "zero_points": {}, "dequantized": {}}
    for name, weight in linears.items():
        for part, tensors in _layout(name, weight, v2).items():
            parts[part] |= tensors
    for name, weight in weights.items():
        if name not in linears:
            matrix = weight.dequantized(dtype)
            parts["dequantized"][f"{name}.weight"] = (
                matrix.mT.contiguous() if getattr(weight.layer, "transposed", False) else matrix
            )
    parts["other"] = others
    with folder_in_progress(folder) as temporary:
        _write_config(model, temporary, _settings(model, linears, v2))
        write_shards({name: tensor for part in parts.values() for name, tensor in part.items()}, temporary)
        tokenizer.save_pretrained(temporary)
        keep_companions(model, temporary)
        temporary.rename(folder)
    return {part: sum(tensor.nbytes for tensor in tensors.values()) for part, tensors in parts.items()}


def check_gptq(description: ModelDescription) -> None:
    """Raises for the first thing in a model's schemes that the layout cannot hold.

    Raises:
        ValueError: says what, and the way out.
    """
    check_weights_only(description, KIND)
    linears = [layer for layer in description.layers if layer.kind == "linear"]
    if not linears:
        raise ValueError(f"no linear layer of the model's blocks is quantized, so {KIND} has nothing to hold")
    for layer in linears:
        if layer.rows % _MULTIPLE or layer.columns % _MULTIPLE:
            raise ValueError(
                f"{layer.name} is {layer.rows} x {layer.columns}; {KIND} needs both divided by {_MULTIPLE}; leave it "
                "out with quant.ignore, or export it as compressed-tensors"
            )


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, (QuantLinear, PackedLinear)) and not layer.transposed


def _layout(name: str, weight: StoredWeight, v2: bool) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of one layer by part and name."""
    layer, bits = weight.layer, WIDTHS[weight.scheme.num_bits]
    codes, zeros = weight.unsigned(bits)
    grid = Grid(bits, symmetric=False)
    groups = torch.arange(layer.columns, dtype=torch.int32) // weight.per_scale
    stored_zeros = zeros.t().to(torch.int64) - (0 if v2 else 1)
    return {
        "codes": {f"{name}.qweight": pack_int32(codes, grid).t().contiguous()},
        "scales": {f"{name}.scales": exact_float16(weight.scale, name, KIND).t().contiguous()},
        "zero_points": {f"{name}.qzeros": pack_int32(stored_zeros, grid), f"{name}.g_idx": groups},
    }


def _settings(model: nn.Module, linears: Mapping[str, StoredWeight], v2: bool) -> dict[str, Any]:
    """Returns the `quantization_config` of config.json."""
    first = next(iter(linears.values()))
    differs = {name: _scheme(weight) for name, weight in linears.items() if _scheme(weight) != _scheme(first)}
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    left: dict[str, dict[str, Any]] = {
        name: {}
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, QuantLinear, PackedLinear))
        and module is not head
        and name not in linears
    }
    dynamic = {f"+:^{re.escape(name)}$": scheme for name, scheme in _with_fused(differs).items()}
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in _with_fused(left)}
    settings = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        **_scheme(first),
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"llmqat:{llmqat.__version__}"]},
    }
    return settings | ({"dynamic": dynamic} if dynamic else {})


def _with_fused(schemes: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns `schemes` by layer name, and by vLLM's fused name where all parts of a fused layer have one scheme."""
    found = dict(schemes)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in schemes):
        for fused, parts in FUSED.items():
            first, *others = (schemes.get(f"{parent}.{part}") for part in parts)
            if first is not None and all(other == first for other in others):
                found[f"{parent}.{fused}"] = first
    return found


def _scheme(weight: StoredWeight) -> dict[str, Any]:
    return {
        "bits": WIDTHS[weight.scheme.num_bits],
        "group_size": weight.scheme.group_size or -1,
        "sym": weight.scheme.symmetric,
    }


def _write_config(model: PreTrainedModel, folder: Path, settings: dict[str, Any]) -> None:
    config = deepcopy(model.config)
    if hasattr(config, "llmqat"):
        del config.llmqat
    config.architectures = [type(model).__name__]
    config.dtype = stored_dtype(model)
    config.quantization_config = settings
    config.save_pretrained(folder)
    (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

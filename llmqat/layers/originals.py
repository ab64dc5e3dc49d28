"""Refuses models that are not whole and in full precision: quantized already, offloaded, partly without weights.

And says what of its checkpoint a model has not: layers for multi-token prediction, say, which transformers drops.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

PLAIN = (nn.Parameter, Tensor, DTensor, FakeTensor)
"""Classes of tensors whose numbers are what they seem."""
FULL_PRECISION = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
QUANTIZERS = (
    *("aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "fbgemm_gpu", "flute", "fouroversix"),
    *("fp_quant", "gptqmodel", "hqq", "optimum.quanto", "quark", "quanto", "sinq", "spqr_quant", "torchao", "vptq"),
    "transformers.integrations",
)
"""Packages whose modules hold quantized weights."""
DEQUANTIZED_FROM = "_llmqat_dequantized"
"""Attribute of a model whose weights were dequantized at loading: by what they had been quantized."""
PACKED_NAMES = ("weight", "packed", "qzeros", "codes", "w_q", "blocks")
"""Parts of the names of tensors of integers that stand for weights."""


def check_original(model: nn.Module) -> None:
    """Raises unless `model` has all its weights in full precision; a model that is wholly on the meta device passes.

    Raises:
        ValueError: it is quantized already, offloaded, or has weights on the meta device beside others; says by what.
    """
    _check_whole(model)
    evidence = next(_quantized_parts(model), "")
    method = _method(model)
    if evidence or (method and not is_dequantized(model)):
        by = f" by {method}" if method else ""
        where = f" ({evidence})" if evidence else " (its configuration has quantization_config)"
        raise ValueError(
            f"{type(model).__name__} is quantized already{by}{where}, and its weights would be rounded a second time; "
            "load the original model, in full precision"
        )


def is_dequantized(model: nn.Module) -> bool:
    """Returns whether transformers has turned the quantized weights of a checkpoint into plain numbers at loading."""
    return hasattr(model, DEQUANTIZED_FROM) or bool(_setting(_quantization_config(model), "dequantize"))


def dequantized_note(model: nn.Module) -> str:
    """Returns what to say of a model whose weights were dequantized; empty for others."""
    if not is_dequantized(model):
        return ""
    method = getattr(model, DEQUANTIZED_FROM, None) or _method(model)
    return f"the original was quantized by {method} and dequantized at loading: full precision here means that"


def dropped_note(model: nn.Module) -> str:
    """Returns what to say of weights of its checkpoint that `model` was loaded without; empty for none."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    if not patterns:
        return ""
    own = set(model.state_dict())
    names = [name for name in _stored_names(model) if name.endswith(".weight") and name not in own]
    dropped = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
    if not dropped:
        return ""
    return (
        f"transformers does not load {len(dropped)} weights of the original ({dropped[0]}, …), so they are in no "
        "checkpoint that is saved of it: layers for multi-token prediction, say"
    )


def _stored_names(model: nn.Module) -> list[str]:
    """Returns the names of the tensors in the checkpoint that `model` was loaded from; nothing where it is not here."""
    spec = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    index, single = (_stored_file(spec, name) for name in ("model.safetensors.index.json", "model.safetensors"))
    try:
        if index is not None:
            return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if single is not None:
            with safe_open(single, framework="pt") as file:
                return list(file.keys())
    except (OSError, ValueError, KeyError, SafetensorError):  # it was loaded, and has been changed since
        pass
    return []


def _stored_file(spec: str, name: str) -> Path | None:
    if not spec:
        return None
    if Path(spec).is_dir():
        found: Any = Path(spec) / name
    else:
        try:
            found = try_to_load_from_cache(spec, name)
        except HFValidationError:
            return None
    return Path(found) if isinstance(found, (str, Path)) and Path(found).is_file() else None


def _check_whole(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(getattr(hook, "offload", False) for hook in _hooks(module)):
            raise ValueError(
                f"accelerate offloads the weights of {name or type(model).__name__} and brings them for the forward "
                "alone; load the model whole: without device_map, or with one that leaves nothing to 'cpu' or 'disk'"
            )
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty and len(empty) < sum(1 for _ in model.parameters()):
        raise ValueError(
            f"{empty[0]} and {len(empty) - 1} other parameters are on the meta device and hold no numbers; load "
            "the model whole: without device_map, or with one that offloads nothing"
        )


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yields the hooks that accelerate has put on a module."""
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", () if hook is None else (hook,))


def _quantized_parts(model: nn.Module) -> Iterator[str]:
    """Yields what there is in `model` that holds quantized weights."""
    for name, module in model.named_modules():
        kind = type(module)
        if f"{kind.__module__}.".startswith(tuple(f"{package}." for package in QUANTIZERS)):
            yield f"{name or 'it'} is a {kind.__module__}.{kind.__name__}"
        if getattr(module, "quantization_status", None) is not None:
            yield f"{name} is compressed by compressed-tensors"
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (what := _packed(leaf, tensor)):
                yield f"{name}.{leaf} holds {what}"


def _packed(leaf: str, tensor: Tensor) -> str:
    """Returns what a tensor of codes holds; empty for a tensor of numbers."""
    plain = type(tensor) in PLAIN and (type(tensor) is not nn.Parameter or type(tensor.data) in PLAIN)
    if not plain and not _is_peft(tensor):
        return type(tensor if type(tensor) is not nn.Parameter else tensor.data).__name__
    if tensor.dtype in FULL_PRECISION:
        return ""
    is_weight = isinstance(tensor, nn.Parameter) or any(part in leaf.lower() for part in PACKED_NAMES)
    return str(tensor.dtype).removeprefix("torch.") if is_weight and tensor.dim() else ""


def _is_peft(tensor: Tensor) -> bool:
    return type(tensor).__module__.startswith(("peft.", "deepspeed."))


def _quantization_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(part, "quantization_config", None) for part in (config, text))
    quantizer = getattr(model, "hf_quantizer", None)
    return next((part for part in found if part), getattr(quantizer, "quantization_config", None))


def _setting(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _method(model: nn.Module) -> str:
    """Returns what a model says that it was quantized by; empty where it does not."""
    config = _quantization_config(model)
    method = _setting(config, "quant_method") or getattr(model, "quantization_method", None)
    if method is None and (config or getattr(model, "hf_quantizer", None) is not None):
        method = type(config or model.hf_quantizer).__name__
    return str(getattr(method, "value", method) or "")

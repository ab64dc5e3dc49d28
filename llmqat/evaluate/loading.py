"""Loads whatever is to be judged, and tells what is known of it: size on disk, and how it was made.

peft adapter folder         base model from its adapter_config.json, adapter folded in; one that was trained inside
                            llmqat's quantizers is packed with the very codes it was trained with
compressed-tensors, packed  llmqat's own loader and kernels
any other quantization      stock transformers, with the package that made it
the rest                    `models.load_model`: hub ids, folders, GGUF files (dequantized, sized as they are)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.quantizers import AutoHfQuantizer

from llmqat.data.length import check_length, declared_length
from llmqat.evaluate.layers import JSON_FILE
from llmqat.evaluate.speed import disk_usage
from llmqat.export import load_any
from llmqat.export.card import stages_of
from llmqat.export.checkpoint import RUN_FILE
from llmqat.export.compressed_tensors import MIXED_FORMAT
from llmqat.export.forms import FORMS, input_config, weight_config
from llmqat.extras import check_all_installed, require
from llmqat.layers import QuantConfig, convert, prepare
from llmqat.models import (
    DEQUANTIZED,
    adapter_base,
    empty_model,
    load_adapter_base,
    model_file,
    read_config,
    resolve_spec,
    to_accelerator,
    token_model_class,
)
from llmqat.train.adapter import load_adapter, scheme_in, trained_dtype

_BITS_OF_TYPE = re.compile(r"I?Q(\d)")
PACKED_FORMATS = (*FORMS, None)
"""Formats of compressed-tensors that llmqat's loader takes; None: the configuration does not say."""
PACKAGES = {
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("accelerate", "gptqmodel"),
    "bitsandbytes": ("accelerate", "bitsandbytes"),
}
"""Method of quantization -> the packages with which transformers reads it; it names one of them at a time."""


@dataclass(frozen=True)
class Known:
    """What the files of a model say about it, before it is loaded."""

    bits_per_weight: float | None = None  # of the linear layers on disk, scales included
    bytes_on_disk: int | None = None  # of the weight files
    run: Mapping[str, Any] = field(default_factory=dict)  # llmqat's facts of how it was made (llmqat.json)
    layers: Mapping[str, Any] = field(default_factory=dict)  # reports on layers by stage (layers.json of its run)
    scheme: Mapping[str, Any] = field(default_factory=dict)  # nearest preset and group size, as `quant` in a recipe

    @property
    def method(self) -> str:
        """How it was made, in a word or two; empty where nobody wrote it down."""
        if self.run.get("training"):
            return "trained"
        return ", ".join(stages_of(self.run)) or ("plain rounding" if self.run else "")


def load_to_judge(spec: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Returns the model that `spec` names, in evaluation mode, on the accelerator where there is one.

    Raises:
        FileNotFoundError: it, or the base of an adapter, is not there.
        ValueError: it cannot be loaded.
        ImportError: the package that quantized it is not installed.
    """
    return to_accelerator(_loaded(spec, dtype)).eval()


def check_can_be_read(spec: str) -> None:
    """Raises where what stock transformers needs to read the quantized model `spec` is not here; loads nothing.

    Raises:
        ImportError: a package is not installed, or too old.
        ValueError: transformers does not know the method, or it does not run on this machine.
    """
    found = _quantization_of_others(spec)
    if found is None:
        return
    method = found.get("quant_method")
    named = f"model {spec!r}, which {method} has quantized,"
    check_all_installed(PACKAGES.get(str(method), ()), named)
    try:
        quantizer = AutoHfQuantizer.from_config(dict(found), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except ImportError as error:
        raise ImportError(f"{named} needs a package that is not here: {error}") from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{named} cannot be read on this machine: {error}") from error


def longest_of(spec: str) -> int | None:
    """Returns the tokens that the model takes at most, where its configuration says."""
    return declared_length(read_config(resolve_spec(spec), spec))


def check_window(spec: str, window: int, key: str = "window") -> None:
    """Raises where `window` is longer than the model `spec` can read at once; loads no weights.

    Args:
        spec: names it.
        window: tokens that it is to read at once.
        key: what the user calls them.

    Raises:
        ValueError: when it has not.
    """
    config = read_config(resolve_spec(spec), spec)
    declared = declared_length(config)
    if declared is not None and window > declared:
        with torch.device("meta"), no_init_weights():
            check_length(empty_model(token_model_class(config, spec), config), window, key)


def known_of(spec: str) -> Known:
    """Returns what the files of the model `spec` say; nothing for a model on the hub, and for an adapter.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its files are damaged.
    """
    if adapter_base(spec) is not None:
        return Known()
    file = model_file(spec)
    if file is not None and file.suffix == ".gguf":
        return _known_of_gguf(file)
    source = resolve_spec(spec)
    if not isinstance(source, Path):
        return Known()
    usage = disk_usage(source)
    run = {**(_read_json(source / RUN_FILE) or {}).get("run", {})}
    run.pop("results", None)  # an earlier report, which this one replaces
    layers = _read_json(source.parent / JSON_FILE) or {}
    scheme = _nearest_scheme((_read_json(source / "config.json") or {}).get("quantization_config") or {})
    return Known(usage.bits_per_weight, usage.weight_bytes, run, layers, scheme)


def _loaded(spec: str, dtype: torch.dtype) -> nn.Module:
    if adapter_base(spec) is not None and (scheme := scheme_in(Path(spec).expanduser())) is not None:
        folder = Path(spec).expanduser()
        base = load_adapter_base(spec, trained_dtype(folder) or torch.float32)
        prepare(base, QuantConfig.model_validate(scheme))
        return convert(load_adapter(base, folder).merge_and_unload(), dtype)
    found = _quantization_of_others(spec)
    if found is None:
        return load_any(spec, dtype)[0]
    check_can_be_read(spec)
    source, method = resolve_spec(spec), found.get("quant_method")
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"model {spec!r} (quantized by {method}) could not be loaded: {error}") from error
    return model


def _quantization_of_others(spec: str) -> dict[str, Any] | None:
    """Returns the `quantization_config` of a model that stock transformers has to read; None where llmqat reads it."""
    file = model_file(spec)
    if file is not None:
        return None
    found = getattr(read_config(resolve_spec(spec), spec), "quantization_config", None)
    method, kind = (found.get(key) for key in ("quant_method", "format")) if isinstance(found, dict) else (None, None)
    groups = (found.get("config_groups") or {}).values() if isinstance(found, dict) else ()
    forms = {group.get("format") for group in groups} if kind == MIXED_FORMAT else {kind}
    own = method is None or method in DEQUANTIZED or (method == "compressed-tensors" and forms <= set(PACKED_FORMATS))
    return None if own else found


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    return found


def _nearest_scheme(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preset and group size of a `quantization_config` of integers; nothing of any other."""
    if found.get("quant_method") in ("gptq", "awq"):
        return _preset(found.get("bits", 4), group_size=found.get("group_size"))
    groups = (found.get("config_groups") or {}).values()
    # Of the layers, not of the embedding or the output head: the group for a class, or else with the most names.
    sizes = ((("Linear" in one.get("targets", ()), len(one.get("targets", ()))), one) for one in groups)
    group: Mapping[str, Any] = max(sizes, key=lambda pair: pair[0], default=((), {}))[1]
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    if weights.get("type") == "float":
        return {} if found.get("kv_cache_scheme") else _floats(weights, inputs)
    if weights.get("type") != "int" or inputs.get("type", "int") != "int":
        return {}
    cache = found.get("kv_cache_scheme") or {}
    if cache.get("strategy") == "attn_head":  # which no name says
        return {}
    kept = "fp8" if cache.get("type") == "float" else cache.get("num_bits")
    return _preset(weights["num_bits"], inputs.get("num_bits"), kept, weights.get("group_size"))


def _floats(weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preset of a group of floats; nothing where llmqat has none."""
    try:
        label = weight_config(QuantizationArgs(**weights)).label
        own = input_config(QuantizationArgs(**inputs)) if inputs else None
    except ValueError:
        return {}
    kind, extent = label.split()
    usual = QuantConfig.preset(kind)
    of_extent = "" if usual.weights.label == label else f"-{extent}"
    if own is None:
        return {"preset": f"{kind}a16{of_extent}"}
    wanted = QuantConfig.preset(f"{kind}{of_extent}")
    return {"preset": f"{kind}{of_extent}"} if own == wanted.input_activations else {}


def _preset(
    bits: int, input_bits: int | None = None, cache_bits: int | str | None = None, group_size: int | None = None
) -> dict[str, Any]:
    cache = "" if cache_bits is None else f"kv{cache_bits}"
    name = f"int{bits}" if input_bits is None and not cache else f"w{bits}a{input_bits or 16}{cache}"
    return {"preset": name, **({"group_size": group_size} if group_size and group_size > 0 else {})}


def _known_of_gguf(path: Path) -> Known:
    """Returns the bits of an average weight of the blocks' matrices, by their types, and the bytes of the file."""
    gguf = require("gguf", f"reading {path}")
    blocks = [
        entry for entry in gguf.GGUFReader(path).tensors if entry.name.startswith("blk.") and len(entry.shape) > 1
    ]
    weights = sum(int(entry.n_elements) for entry in blocks)
    if not weights:
        return Known(None, path.stat().st_size)
    kinds = [entry.tensor_type.name for entry in blocks]
    digits = _BITS_OF_TYPE.match(max(kinds, key=kinds.count))
    scheme = {} if digits is None else _preset(int(digits[1]), group_size=32)
    return Known(8 * sum(int(entry.n_bytes) for entry in blocks) / weights, path.stat().st_size, scheme=scheme)

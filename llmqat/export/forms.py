"""How one quantized layer lies in a compressed-tensors checkpoint: its form, its tensors, and the words for its scheme.

Integers, symmetric or with zero points:
    pack-quantized          weight_packed int32 [O, ceil(I * b / 32)], weight_scale [O, G], weight_shape [2]
    int-quantized           weight int8 [O, I], weight_scale [O, 1]
Floats (grid/levels.py):
    nvfp4-pack-quantized    weight_packed uint8 [O, I / 2], weight_scale E4M3 [O, I / 16], weight_global_scale [1]:
                            what a group is multiplied with is weight_scale / weight_global_scale
    mxfp4-pack-quantized    weight_packed uint8 [O, I / 2], weight_scale uint8 [O, I / 32]: its exponent, plus 127
    mxfp8-quantized         weight E4M3 [O, I], weight_scale likewise
    float-quantized         weight E4M3 [O, I], weight_scale [O, G], or [ceil(O / g), I / g] where it is for blocks;
                            inputs quantized
    naive-quantized         the same, inputs as they are
In memory all of them are a `PackedModule`: codes as `grid.pack_codes` gives them, scales in the checkpoint's dtype or,
where it does not hold them, in float32.

vLLM computes q, k and v as one product, gate and up as another, and knows one weight_global_scale for each. So layers
that are such siblings are written with the same one; it is a power of two, so nothing of a scale is lost. Others write
any number. What a group is multiplied with is then no bfloat16 number: such layers hold float32 scales, and are written
with the number that they were read with. So do layers of other float formats whose scales are float32 on disk.

Letters: O out features, I in features, G scales per row, b bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from llmqat.grid import Grid, of_all_rows, pack_int32, packed_shape, unpack_int32
from llmqat.layers import (
    SIBLINGS,
    ActivationConfig,
    KVCacheConfig,
    KVTensorConfig,
    LayerScheme,
    PackedExperts,
    PackedModule,
    QuantModule,
    WeightConfig,
)
from llmqat.layers.config import Observer
from llmqat.layers.finite import is_finite
from llmqat.layers.packed import check_cast

PACKED_FORMAT = "pack-quantized"
PLAIN_FORMAT = "int-quantized"
"""int8 codes, not packed."""
FLOAT_FORMATS = {
    (4, "e4m3"): "nvfp4-pack-quantized",
    (4, "e8m0"): "mxfp4-pack-quantized",
    (8, "e8m0"): "mxfp8-quantized",
    (8, "bfloat16"): "float-quantized",
}
"""Bits and dtype of scales -> form of floats."""
FLOAT_WEIGHTS_ALONE = "naive-quantized"
"""The form of FP8 weights whose inputs are not quantized."""
FORMS = (PACKED_FORMAT, PLAIN_FORMAT, *FLOAT_FORMATS.values(), FLOAT_WEIGHTS_ALONE)
"""All that are written and read."""
_FP8_CACHE = (8, "float", True, False)
_E8M0_BIAS = 127
SCALE_DTYPES = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}
"""What scales that are no bfloat16 numbers are stored as."""
_PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def stored_scheme(layer: QuantModule | PackedModule) -> LayerScheme:
    """Returns the scheme on disk."""
    quantizer = getattr(layer, "input_quantizer", None)
    return LayerScheme(weights=layer.weights.stored, input_activations=None if quantizer is None else quantizer.config)


def has_integer_inputs(model: nn.Module) -> bool:
    """Returns whether a layer of `model` quantizes its inputs to integers; else `int_quantized` says nothing."""
    layers = [one for one in model.modules() if isinstance(one, (QuantModule, PackedModule))]
    inputs = [stored_scheme(layer).input_activations for layer in layers]
    return any(one is not None and one.levels == "integer" for one in inputs)


def form_of(scheme: LayerScheme, int_quantized: bool) -> str:
    """Returns how the weights of a stored scheme lie on disk.

    Source: `_is_dynamic_token_w8a8`, `_is_static_tensor_w8a8`, `_is_dynamic_token_w4a8_int` and `_is_wNaM_int` of
    vLLM's `compressed_tensors.py`; for floats, which compressor of compressed-tensors takes them.
    """
    weights, inputs = scheme.weights, scheme.input_activations
    if weights.levels == "float":
        form = FLOAT_FORMATS[weights.num_bits, weights.scale_dtype]
        return FLOAT_WEIGHTS_ALONE if form == "float-quantized" and inputs is None else form
    if inputs is None or inputs.num_bits != 8 or inputs.levels == "float" or not weights.symmetric:
        return PACKED_FORMAT
    if weights.num_bits == 8 and weights.strategy == "channel":
        return PLAIN_FORMAT
    return PLAIN_FORMAT if int_quantized and weights.num_bits == 4 and inputs.dynamic else PACKED_FORMAT


def may_have(weights: WeightConfig, form: str) -> bool:
    """Returns whether a stored scheme of weights may lie in a form, whoever wrote it."""
    if weights.levels != "float":
        return form in (PACKED_FORMAT, PLAIN_FORMAT)
    own = FLOAT_FORMATS[weights.num_bits, weights.scale_dtype]
    return form == own or (own == "float-quantized" and form == FLOAT_WEIGHTS_ALONE)


# Tensors


def tensors_on_disk(
    name: str, packed: PackedModule, form: str, dtype: torch.dtype, global_scale: float | None
) -> dict[str, Tensor]:
    """Returns the tensors of a weight by the last part of their names, as they are stored; no bias, no input's range.

    Args:
        name: of the layer, for errors.
        packed: the layer.
        form: of `FORMS`.
        dtype: of scales that are no E4M3 or E8M0, unless the layer has float32 ones.
        global_scale: of NVFP4.

    Raises:
        ValueError: a scale is not one of its format; names the layer.
    """
    scale = packed.scale().detach()
    scale = scale[:: packed.weights.block]
    if packed.has_float32_scales:
        dtype = torch.float32
    if form in (PACKED_FORMAT, PLAIN_FORMAT):
        tensors = {"weight_scale": scale.to(dtype)}
        if form == PLAIN_FORMAT:
            tensors["weight"] = unpack_int32(packed.weight_packed, packed.grid, packed.columns)
        else:
            plain = packed.weight_packed.dtype == torch.int8
            words = pack_int32(packed.weight_packed, packed.grid) if plain else packed.weight_packed
            tensors |= {"weight_packed": words, "weight_shape": packed.weight_shape}
        if packed.weight_zero_point is not None:
            tensors["weight_zero_point"] = packed.weight_zero_point
        return tensors
    tensors = {
        codes_name(form): packed.weight_packed,
        "weight_scale": _scale_on_disk(scale, packed.grid, dtype, global_scale),
    }
    if global_scale is not None:
        tensors["weight_global_scale"] = torch.tensor([global_scale], device=scale.device)
    if packed.grid.scale_dtype == "e4m3" and packed.has_float32_scales and packed.global_scale is None:
        raise ValueError(
            f"{name}: its experts were read one by one, each with a weight_global_scale of its own, and a stack is "
            "written with one; keep the checkpoint that they came from"
        )
    back = scale_in_memory(tensors["weight_scale"], tensors.get("weight_global_scale"), packed.grid)
    if not scale.is_meta and not torch.equal(back, scale.float()):
        raise ValueError(
            f"{name}: {int((back != scale).sum())} of {scale.numel()} scales are no numbers of "
            f"{packed.weights.label}; its largest is {float(scale.max()):.3g}, its smallest {float(scale.min()):.3g}. "
            f"Leave the layer out with quant.ignore, or give it another scheme with quant.overrides"
        )
    return tensors


def shapes_on_disk(layer: QuantModule | PackedModule, form: str, dtype: torch.dtype, name: str) -> Mapping[str, Any]:
    """Returns shape and dtype of what `tensors_on_disk` gives, by the last part of the name."""
    weights = layer.weights.stored
    if isinstance(layer, PackedModule) and layer.has_float32_scales:
        dtype = torch.float32
    rows, groups = weights.stored_shape(layer.rows, layer.columns, name)
    shapes: dict[str, Any] = {"weight_scale": ((rows, groups), SCALE_DTYPES.get(weights.scale_dtype, dtype))}
    codes = packed_shape(layer.rows, layer.columns, weights.grid)
    if form == PLAIN_FORMAT:
        codes = (layer.rows, layer.columns), torch.int8
    shapes[codes_name(form)] = codes
    if form == PACKED_FORMAT:
        shapes["weight_shape"] = (2,), torch.int64
    if not weights.symmetric:
        shapes["weight_zero_point"] = (-(-layer.rows * weights.num_bits // 32), groups), torch.int32
    if weights.scale_dtype == "e4m3":
        shapes["weight_global_scale"] = (1,), torch.float32
    return shapes


def codes_name(form: str) -> str:
    """Returns the last part of the name under which a form holds the codes."""
    return "weight_packed" if "pack" in form else "weight"


def _scale_on_disk(scale: Tensor, grid: Grid, dtype: torch.dtype, global_scale: float | None) -> Tensor:
    if grid.scale_dtype == "e8m0":
        return (torch.frexp(scale.float()).exponent - 1 + _E8M0_BIAS).to(torch.uint8)
    if global_scale is not None:
        return (scale.float() * global_scale).to(torch.float8_e4m3fn)
    return scale.to(dtype)


def scale_in_memory(stored: Tensor, global_scale: Tensor | None, grid: Grid) -> Tensor:
    """Returns what a group is multiplied with, float32 [O, G], from its stored form."""
    if grid.scale_dtype == "e8m0":
        return torch.exp2(stored.float() - _E8M0_BIAS)
    return stored.float() if global_scale is None else stored.float() / global_scale


def take_floats(name: str, layer: PackedModule, found: dict[str, tuple[Tensor, Path]]) -> None:
    """Puts codes and scales of a float format, as they lie on disk, in the form that the layer holds them in.

    If none of the tensors is there, nothing is changed: the caller reports all missing tensors together.

    Args:
        name: of the layer.
        layer: empty.
        found: tensors on disk by name, each with its file; changed.

    Raises:
        ValueError: some of the tensors are missing, one has another dtype than the format or is not finite; names it.
    """
    kind = layer.grid
    wanted: dict[str, torch.dtype | None] = {
        codes_name(FLOAT_FORMATS[kind.num_bits, kind.scale_dtype]): layer.weight_packed.dtype,
        "weight_scale": SCALE_DTYPES.get(kind.scale_dtype),
        **({"weight_global_scale": torch.float32} if kind.scale_dtype == "e4m3" else {}),
    }
    own = {leaf: found[f"{name}.{leaf}"] for leaf in wanted if f"{name}.{leaf}" in found}
    for leaf, (tensor, path) in own.items():
        kept = wanted[leaf]
        if tensor.dtype != kept and (kept is not None or tensor.dtype not in _PLAIN_DTYPES):
            raise ValueError(f"{path}: {name}.{leaf} is {tensor.dtype}, but the format stores it as {kept or 'floats'}")
        if not is_finite(tensor):
            raise ValueError(f"{path}: {name}.{leaf} holds NaN or infinity")
    if len(own) < len(wanted):
        if own:
            lacking = ", ".join(f"{name}.{leaf}" for leaf in wanted if leaf not in own)
            raise ValueError(f"{next(iter(own.values()))[1]} lacks {lacking}, which belongs to {layer.weights.label}")
        return
    codes, (stored, place), *shared = own.values()
    scale = _scale_of(f"{place}: {name}", layer, stored, shared[0][0] if shared else None)
    for leaf in wanted:
        del found[f"{name}.{leaf}"]
    found[f"{name}.weight_packed"], found[f"{name}.weight_scale"] = codes, (scale, place)
    found[f"{name}.weight_shape"] = torch.tensor([layer.rows, layer.columns], dtype=torch.int64), codes[1]


def _scale_of(where: str, layer: PackedModule, stored: Tensor, shared: Tensor | None) -> Tensor:
    """Returns the scale that a layer holds, of its stored form; `where` begins what is said of a wrong one."""
    sizes = (1, layer.rows) if isinstance(layer, PackedExperts) else (1,)  # of experts one by one, one a row
    if shared is not None and (shared.numel() not in sizes or float(shared.min()) <= 0):
        raise ValueError(f"{where}.weight_global_scale is {shared.flatten()[:3].tolist()}; it is one positive number")
    wanted = layer.weights.stored_shape(layer.rows, layer.columns)
    if layer.weights.block > 1 and stored.shape != wanted:
        raise ValueError(f"{where}.weight_scale is of {list(stored.shape)}, but config.json makes it {list(wanted)}")
    scale = scale_in_memory(stored, None if shared is None else shared.reshape(-1, 1), layer.grid)
    check_cast(scale, layer.dtype, where)
    if not torch.equal(scale.to(layer.dtype).to(torch.bfloat16).float(), scale):
        numbers = set() if shared is None else set(shared.flatten().tolist())
        layer.hold_float32_scales(numbers.pop() if len(numbers) == 1 else None)
    if layer.weights.block == 1 and scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(layer.rows, 1)
    return of_all_rows(scale, layer.weights.block, layer.rows).to(layer.weight_scale.dtype).contiguous()


def global_scales(layers: Mapping[str, QuantModule | PackedModule]) -> dict[str, float]:
    """Returns the weight_global_scale of each NVFP4 layer by its name.

    One for siblings, a power of two; or the number that a layer was read with, where its scales need it.
    """
    most = torch.finfo(torch.float8_e4m3fn).max
    read = {name: given for name, layer in layers.items() if (given := getattr(layer, "global_scale", None))}
    scales = {
        name: layer.scale().detach()
        for name, layer in layers.items()
        if layer.weights.scale_dtype == "e4m3" and name not in read
    }
    own = {
        name: 2.0 ** math.floor(math.log2(most / float(scale.abs().max())))
        for name, scale in scales.items()
        if not scale.is_meta
    }
    return read | {name: min(own[other] for other in _siblings(name) if other in own) for name in own}


def _siblings(name: str) -> list[str]:
    parent, dot, leaf = name.rpartition(".")
    return next(([f"{parent}{dot}{other}" for other in leaves] for leaves in SIBLINGS if leaf in leaves), [name])


# The words for a scheme


def weight_args(weights: WeightConfig) -> QuantizationArgs:
    """Returns a stored scheme of weights in compressed-tensors' vocabulary."""
    return QuantizationArgs(
        num_bits=weights.num_bits,
        type="float" if weights.levels == "float" else "int",
        symmetric=weights.symmetric,
        strategy="tensor_group" if weights.scale_dtype == "e4m3" else weights.strategy,
        group_size=weights.group_size if weights.strategy == "group" else None,
        block_structure=[weights.block, weights.block] if weights.strategy == "block" else None,
        dynamic=False,
        scale_dtype=SCALE_DTYPES.get(weights.scale_dtype),
    )


def weight_config(weights: QuantizationArgs) -> WeightConfig:
    """Returns the scheme of weights that compressed-tensors' vocabulary stands for.

    Raises:
        ValueError: it is none of llmqat's.
    """
    strategy = {"tensor_group": "group", "tensor": "channel"}.get(str(weights.strategy), weights.strategy)
    sides = set(weights.block_structure or ())
    sizes = {"group": weights.group_size, "block": sides.pop() if len(sides) == 1 else None}  # square blocks alone
    return WeightConfig(
        num_bits=weights.num_bits,
        symmetric=weights.symmetric,
        strategy=strategy,
        group_size=sizes.get(strategy),
        **_levels(weights),
    )


def input_args(config: ActivationConfig | None) -> QuantizationArgs | None:
    """Returns a scheme of inputs in compressed-tensors' vocabulary."""
    if config is None:
        return None
    local = config.scale_dtype == "e4m3"
    return QuantizationArgs(
        num_bits=config.num_bits,
        type="float" if config.levels == "float" else "int",
        symmetric=config.symmetric,
        strategy=config.strategy,
        group_size=config.group_size,
        dynamic="local" if local else config.dynamic,
        observer="static_minmax" if local else None if config.dynamic else config.observer,
        scale_dtype=SCALE_DTYPES.get(config.scale_dtype),
    )


def input_config(inputs: QuantizationArgs | None) -> ActivationConfig | None:
    """Returns the scheme of inputs that compressed-tensors' vocabulary stands for.

    Raises:
        ValueError: it is none of llmqat's.
    """
    if inputs is None:
        return None
    known = {} if inputs.dynamic or inputs.observer not in get_args(Observer) else {"observer": inputs.observer}
    return ActivationConfig(
        num_bits=inputs.num_bits,
        symmetric=inputs.symmetric,
        dynamic=bool(inputs.dynamic),
        group_size=inputs.group_size if inputs.strategy in ("group", "tensor_group") else None,
        **_levels(inputs),
        **known,
    )


def cache_args(config: KVCacheConfig | None) -> QuantizationArgs | None:
    """Returns a scheme of the KV cache in compressed-tensors' vocabulary; None for what that cannot say."""
    if config is None or not config.calibrated:
        return None
    return QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=config.key.strategy, dynamic=False)


def cache_config(cache: QuantizationArgs | None) -> KVCacheConfig | None:
    """Returns the scheme of the KV cache that compressed-tensors' vocabulary stands for.

    Raises:
        ValueError: it is none of llmqat's.
    """
    if cache is None:
        return None
    found = (cache.num_bits, cache.type, cache.symmetric, bool(cache.dynamic))
    if found != _FP8_CACHE or cache.strategy not in ("tensor", "attn_head"):
        raise ValueError("a KV cache quantized otherwise than in FP8 with calibrated scales of layers or heads")
    floats = KVTensorConfig(levels="float", strategy=cache.strategy)
    return KVCacheConfig(key=floats, value=floats)


def runs_inputs(inputs: QuantizationArgs | None) -> bool:
    """Returns whether an `ActivationConfig` can express this scheme of inputs."""
    if inputs is None:
        return True
    try:
        config = input_config(inputs)
    except ValueError:
        return False
    return config is not None and config.strategy == inputs.strategy


def _levels(args: QuantizationArgs) -> dict[str, Any]:
    stored = {dtype: name for name, dtype in SCALE_DTYPES.items()}
    kind = "float" if args.type == "float" else "integer"
    return {"levels": kind, "scale_dtype": stored.get(args.scale_dtype, "bfloat16")}

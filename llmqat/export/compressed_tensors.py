"""The compressed-tensors checkpoint: a model's state dict and `quantization_config`, and the way back.

A quantized linear NAME of integers (forms.py has those of floats) is stored `pack-quantized`, as
    NAME.weight_packed      int32 [O, ceil(I * b / 32)]: code - qmin, element 0 in the lowest bits, codes straddle words
    NAME.weight_scale       [O, G] in the checkpoint's dtype
    NAME.weight_shape       int64 [2]: O, I
    NAME.weight_zero_point  int32 [ceil(O * b / 32), G], packed along O; asymmetric schemes only
    NAME.bias               [O], where the layer has one
    NAME.input_scale        [1], and NAME.input_zero_point int8 [1]: static ranges of inputs
or, 8-bit weights with one scale a channel whose inputs have 8 bits (W8A8), `int-quantized`, as
    NAME.weight             int8 [O, I]: the codes as they are
    NAME.weight_scale       [O, 1] in the checkpoint's dtype
Bias and input ranges are as above. vLLM serves W8A8 in this form only. 4-bit weights with 8-bit inputs (W4A8) are
`pack-quantized`, which vLLM serves everywhere. With `int_quantized=True` they are `int-quantized`, one byte per code:
then vLLM's build for CPUs computes with 8-bit inputs, in usable time on Arm only.

Everything else is as in any safetensors checkpoint. Stacked experts are one matrix [E * O, I] under the name of their
parameter; a quantized embedding is stored like a linear layer, and a head tied to it not at all.

`config.json` holds `quantization_config`, which is generated through compressed-tensors' own classes and is all that a
loader needs: stock transformers, vLLM and `read` below recover from it which modules are packed and how. It is derived
from the modules themselves, never from the configuration that once prepared them, so it cannot disagree with the
tensors. A KV cache of integers, whose scales come with each token, which the format cannot say, stands beside it
as `llmqat_kv_cache`; one in FP8 is its `kv_cache_scheme`, with ATTENTION.k_scale and ATTENTION.v_scale,
[1] or one for each KV head [H, 1, 1].

Stock transformers would leave Conv1D layers and stacked experts random, without an error (`stock.py` tries it). Such a
checkpoint has a key of llmqat's in each group (`ONLY_HERE`), so that stock transformers refuses it. vLLM, which serves
packed Conv1D, ignores the key. Some checkpoints load in transformers only if it dequantizes the weights at loading:
those with zero points, and models that look at weights while they are built. They have the key `dequantize`, which is
transformers' own.

Letters: O out features, I in features, G scales per row, b bits.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.utils.match import match_named_modules, match_targets
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from llmqat.export.experts import single_experts, stacked
from llmqat.export.forms import (
    FORMS,
    PLAIN_FORMAT,
    cache_args,
    cache_config,
    form_of,
    global_scales,
    input_args,
    input_config,
    may_have,
    runs_inputs,
    shapes_on_disk,
    stored_scheme,
    take_floats,
    tensors_on_disk,
    weight_args,
    weight_config,
)
from llmqat.export.names import in_model
from llmqat.export.stock import ONLY_HERE, StockTrial, try_tensors
from llmqat.files import write_whole
from llmqat.grid import Grid, pack_int32
from llmqat.kernels import FileMappings, WeightPages
from llmqat.layers import (
    KVCacheConfig,
    LayerScheme,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    PackedModule,
    QuantExperts,
    QuantLinear,
    QuantModule,
    TiedHead,
    WeightConfig,
    check_held,
    check_packable,
    install,
    kept_in_float32,
    kv_scheme,
    linear_maps,
    packed_form,
    quantize_kv,
)
from llmqat.layers.attention import IMPLEMENTATION_PREFIX
from llmqat.layers.buffers import make_buffers
from llmqat.layers.embedding import embedding_multiplier
from llmqat.layers.packed import check_cast
from llmqat.models import check_safetensors, class_of, empty_model, shortened, weight_files, write_shards

QUANT_METHOD = "compressed-tensors"
MIXED_FORMAT = "mixed-precision"
"""What the format of a whole checkpoint is called where its groups have several."""
KV_KEY = "llmqat_kv_cache"
STACKED_KEY = "llmqat_stacked"
"""Key of `config.json`: stacked experts whose class does not say how they lie -> whether as [E, I, O]."""

_EXTRA_KEYS = ("version", "sparsity_config", "transform_config", "dequantize", "run_compressed")
"""Keys of a `quantization_config` that do not belong to compressed-tensors' own QuantizationConfig."""
_RENAMED = {
    "input_quantizer.scale": "input_scale",
    "input_quantizer.zero_point": "input_zero_point",
    "input_quantizer.global_scale": "input_global_scale",
    "kv_quantizer.key.scale": "k_scale",
    "kv_quantizer.value.scale": "v_scale",
}
"""Ends of the names of calibrated ranges: in the model, on disk."""
_IN_MODEL = {disk: module for module, disk in _RENAMED.items()}
_INPUT_DTYPES = {"input_quantizer.zero_point": torch.int8, "input_quantizer.global_scale": torch.float32}
"""What they are stored as, where that is not the checkpoint's dtype."""
_OF_THE_WEIGHT = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_SCALES = (".weight_scale", *(f".{name}" for name in _RENAMED if not name.endswith("zero_point")))
_STRATEGIES = {"int": ("group", "channel"), "float": ("group", "channel", "tensor_group", "tensor", "block")}
"""What a scale of weights may govern."""
_NEIGHBOURHOOD = 65_536
"""Bytes that Linux maps of a file when one of them is touched: a small norm would keep its neighbours in memory."""


# Writing


def write(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, max_shard_size: int | str, int_quantized: bool = False
) -> dict[str, Tensor]:
    """Writes weights and `config.json` of a prepared or converted model into an existing folder.

    Args:
        model: holds at least one quantized weight; not changed.
        folder: receives `model.safetensors`, or shards and their index, and `config.json`.
        dtype: of scales, biases and all parameters left in high precision.
        max_shard_size: bytes of a shard, or a text such as "5GB".
        int_quantized: write W4A8 as `int-quantized`, for vLLM on Arm CPUs.

    Returns:
        The tensors that were written, by name.
    """
    state = packed_state_dict(model, dtype, int_quantized)
    _config_of(model, dtype, int_quantized).save_pretrained(folder)
    write_shards(state, folder, max_shard_size)
    return state


def packed_state_dict(model: nn.Module, dtype: torch.dtype, int_quantized: bool = False) -> dict[str, Tensor]:
    """Returns the checkpoint's tensors by name, on the CPU, contiguous, tied ones once; the model is not changed.

    Parameters left in high precision are cast to `dtype`; buffers keep their own. `int_quantized` is as in `write`.

    Raises:
        ValueError: a weight, a scale or a parameter is not finite, or `dtype` cannot hold it; names it.
    """
    state: dict[str, Tensor] = {}
    layers = dict(quantized_layers(model))
    shared, pages = global_scales(layers), WeightPages(model)
    for name, layer in layers.items():
        check_packable(name, layer, dtype)
        if (bias := getattr(layer, "bias", None)) is not None:
            check_held(f"{name}.bias", bias, dtype)
        packed = layer if isinstance(layer, PackedModule) else packed_form(layer, dtype)
        form = form_of(stored_scheme(layer), int_quantized)
        own = tensors_on_disk(name, packed, form, dtype, shared.get(name))
        for key, tensor in packed.state_dict().items():
            if key not in _OF_THE_WEIGHT:
                own[_RENAMED.get(key, key)] = tensor.to(_INPUT_DTYPES.get(key, dtype))
        state |= {f"{name}.{leaf}": tensor.detach().cpu().contiguous() for leaf, tensor in own.items()}
        pages.let_go(layer.parameters())
    for name, owner, kept in _unpacked(model, layers, dtype):
        if isinstance(owner, nn.Parameter):
            check_held(name, owner, kept)
        state[name] = _for_disk(owner, kept)
    return state


def try_unwritten(
    model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16, int_quantized: bool = False
) -> StockTrial:
    """Returns what stock transformers would make of a checkpoint of `model`, which may be on the meta device."""
    return try_tensors(_config_of(model, dtype, int_quantized), packed_shapes(model, dtype, int_quantized))


def packed_shapes(model: nn.Module, dtype: torch.dtype, int_quantized: bool = False) -> dict[str, Tensor]:
    """Returns what `packed_state_dict` does on the meta device: names, shapes and types, and no numbers."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    layers = dict(quantized_layers(model))
    for name, layer in layers.items():
        scheme = stored_scheme(layer)
        inputs, own = scheme.input_activations, dict(shapes_on_disk(layer, form_of(scheme, int_quantized), dtype, name))
        if (bias := getattr(layer, "bias", None)) is not None:
            own["bias"] = tuple(bias.shape), dtype
        if inputs is not None and inputs.calibrated and inputs.dynamic:
            own["input_global_scale"] = (1,), torch.float32
        elif inputs is not None and inputs.calibrated:
            own["input_scale"] = (1,), dtype
            if not inputs.symmetric:
                own["input_zero_point"] = (1,), torch.int8
        shapes |= {f"{name}.{leaf}": entry for leaf, entry in own.items()}
    shapes |= {name: (tuple(tensor.shape), kept) for name, tensor, kept in _unpacked(model, layers, dtype)}
    return {name: torch.empty(shape, dtype=kind, device="meta") for name, (shape, kind) in shapes.items()}


def _unpacked(
    model: nn.Module, layers: Container[str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Yields name, tensor and type on disk of all that is not a quantized layer's, tied tensors once."""
    tied, in_float32 = _tied_names(model), kept_in_float32(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    written: set[int] = set()
    for name, tensor in model.state_dict().items():
        owner = parameters.get(name, tensor)
        if _owner(name) in layers or name in tied or id(owner) in written:
            continue
        written.add(id(owner))
        stored = _on_disk(name)
        plain = owner is tensor and stored == name  # a buffer of the model's own
        yield stored, owner, tensor.dtype if plain or in_float32(name) else dtype


def _owner(name: str) -> str:
    """Returns the name of the module that a tensor of the state dict belongs to; an input's range is its layer's."""
    return name.rpartition(".")[0].removesuffix(".input_quantizer")


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantModule | PackedModule]]:
    """Yields name and module of every quantized weight of `model`, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, (QuantModule, PackedModule)):
            yield name, module


def quantization_config(model: nn.Module, int_quantized: bool = False) -> dict[str, Any]:
    """Returns the `quantization_config` of `config.json` for a prepared or converted model.

    If all quantized layers are linear and have one scheme, its target is the class `Linear`. Otherwise each scheme
    lists its modules. It also does if the model has stacked (3-D) expert weights, which loaders take for linear layers.
    `ignore` lists linear layers in high precision, and heads tied to a quantized embedding.

    Raises:
        ValueError: there is no quantized layer.
    """
    members: dict[LayerScheme, list[str]] = {}
    layers = dict(quantized_layers(model))
    for name, layer in layers.items():
        members.setdefault(stored_scheme(layer), []).append(name)
    if not members:
        raise ValueError(
            f"{type(model).__name__} has no quantized layer; call llmqat.prepare(model, config) before saving it packed"
        )
    linear = all(isinstance(layer, (QuantLinear, PackedLinear)) and not layer.transposed for layer in layers.values())
    by_class = linear and len(members) == 1 and not any(parameter.dim() == 3 for parameter in model.parameters())
    groups = {
        f"group_{index}": QuantizationScheme(
            targets=["Linear"] if by_class else names,
            weights=weight_args(scheme.weights),
            input_activations=input_args(scheme.input_activations),
            format=form_of(scheme, int_quantized),
        )
        for index, (scheme, names) in enumerate(members.items())
    }
    forms = {group.format for group in groups.values()}
    config = QuantizationConfig(
        config_groups=groups,
        format=forms.pop() if len(forms) == 1 else MIXED_FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        kv_cache_scheme=cache_args(kv_scheme(model)),
        ignore=[name for name, module in model.named_modules() if isinstance(module, (nn.Linear, TiedHead))],
    )
    dumped: dict[str, Any] = json.loads(config.model_dump_json())
    return dumped


def tell_others(folder: Path, trial: StockTrial) -> None:
    """Writes into the `config.json` in `folder` what stock transformers has to know.

    Args:
        folder: a checkpoint that `write` has written.
        trial: what stock transformers made of it.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    described = config["quantization_config"]
    if trial.loads and trial.dequantized:
        described["dequantize"] = True
    elif trial.silent:
        for group in described["config_groups"].values():
            group[ONLY_HERE] = True
    else:
        return
    write_whole(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _config_of(model: PreTrainedModel, dtype: torch.dtype, int_quantized: bool) -> PreTrainedConfig:
    """Returns the configuration that a checkpoint of `model` has."""
    config = deepcopy(model.config)
    if hasattr(config, "llmqat"):
        del config.llmqat
    config.architectures = [type(model).__name__]
    if _is_untied(model):  # by hand: some servers would take the embedding for the head
        for part in {id(one): one for one in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
    config.dtype = dtype
    config.quantization_config = quantization_config(model, int_quantized)
    if (scheme := kv_scheme(model)) is not None and not scheme.calibrated:
        setattr(config, KV_KEY, scheme.model_dump(mode="json"))
    if stacked := _unmarked_stacks(model):
        setattr(config, STACKED_KEY, stacked)
    return config


def _is_untied(model: PreTrainedModel) -> bool:
    """Returns whether the head has weights of its own, whatever the configuration says."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return type(head) is nn.Linear and isinstance(embedding, nn.Embedding) and head.weight is not embedding.weight


def _unmarked_stacks(model: nn.Module) -> dict[str, bool]:
    """Returns the stacked experts whose owner does not say whether they are transposed, and whether they are."""
    return {
        name: layer.transposed
        for name, layer in quantized_layers(model)
        if isinstance(layer, (QuantExperts, PackedExperts))
        and not hasattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed")
    }


def _tied_names(model: nn.Module) -> set[str]:
    """Returns the names that transformers leaves out of a checkpoint because they are tied to another."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        target
        for target, source in tied.items()
        if target in parameters and parameters[target] is parameters.get(source)
    }


def _for_disk(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `tensor` as safetensors take it; only floating ones are cast."""
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


# Reading


def is_packed(config: PreTrainedConfig) -> bool:
    """Returns whether a model configuration describes a checkpoint of this format."""
    found = getattr(config, "quantization_config", None)
    return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD


def read(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, attention: Mapping[str, str] | None = None
) -> PreTrainedModel:
    """Returns the packed model in `folder`, in evaluation mode, its tensors mapped from the files.

    Args:
        folder: holds the weights; `config.json` alone says which modules are packed and how.
        config: the model's configuration, from `config.json`.
        dtype: of scales and high-precision parameters; buffers such as rotary frequencies stay float32.
        attention: the attention implementation of the whole model (by "") and of its parts, or None for the default.

    Raises:
        FileNotFoundError: a weights file is missing.
        ValueError: a scheme that llmqat does not run, or a file or tensor that is unreadable, missing, left over, or
            of another shape or dtype than `config.json` says.
    """
    schemes = _read_schemes(config, folder)
    stored = _read_tensors(folder)
    _check_plausible(config, folder, len(stored))
    kind = class_of(config)
    options: dict[str, Any] = {}
    if attention is not None:
        plain = {part: name.removeprefix(IMPLEMENTATION_PREFIX) for part, name in attention.items()}
        options["attn_implementation"] = plain if len(plain) > 1 else plain[""]
    # Without no_init_weights, transformers draws random numbers for the weights on the meta device: half the time.
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = empty_model(kind, config, dtype=dtype, **options)
    make_buffers(model)
    singles = _install(model, schemes, dtype, getattr(config, STACKED_KEY, {}), stored)
    if (cache := getattr(config, KV_KEY, None)) is not None:
        quantize_kv(model, KVCacheConfig.model_validate(cache))
    elif (floats := cache_config(schemes.kv_cache_scheme)) is not None:
        quantize_kv(model, floats)
    packed = {name: layer for name, layer in quantized_layers(model) if isinstance(layer, PackedExperts)}
    tensors = _repacked(model, in_model(model, stacked(packed, singles, stored)))
    expected = model.state_dict()
    _check_tensors(model, tensors, expected, folder)
    _assign(model, {name: tensor for name, (tensor, _) in tensors.items()}, expected, dtype)
    mappings = FileMappings({path for _, path in tensors.values()})
    for _, layer in quantized_layers(model):
        if isinstance(layer, PackedModule):
            layer.mapped_by(mappings)
    mappings.let_go()
    return model.eval()


def _read_schemes(config: PreTrainedConfig, folder: Path) -> QuantizationConfig:
    described = deepcopy(config.quantization_config)
    _pop_extra_keys(described, folder)
    try:
        for group in described.get("config_groups", {}).values():
            group.pop(ONLY_HERE, None)
        parsed = QuantizationConfig.model_validate(described)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: quantization_config is not valid: {error}") from error
    for name, scheme in parsed.config_groups.items():
        reason = _unsupported(scheme, parsed)
        if reason:
            raise ValueError(
                f"{folder / 'config.json'}: quantization_config group {name!r} has {reason}, which llmqat does not "
                f"run; load it with transformers' AutoModelForCausalLM.from_pretrained"
            )
    return parsed


def _pop_extra_keys(described: dict[str, Any], folder: Path) -> None:
    """Takes the keys `_EXTRA_KEYS` out of a `quantization_config`; raises where they say what is not run here."""
    beside = {key: described.pop(key, None) for key in _EXTRA_KEYS}
    sparsity = (beside["sparsity_config"] or {}).get("format", "dense")
    if sparsity != "dense" or beside["transform_config"]:
        what = f"sparse weights ({sparsity})" if sparsity != "dense" else "transforms of weights and inputs"
        raise ValueError(f"{folder / 'config.json'}: quantization_config has {what}, which llmqat does not run")


def _unsupported(scheme: QuantizationScheme, config: QuantizationConfig) -> str | None:
    weights, form = scheme.weights, scheme.format or config.format
    checks = (
        (form in FORMS, f"format {form!r} (not {', '.join(FORMS)})"),
        (config.quantization_status == QuantizationStatus.COMPRESSED, f"status {config.quantization_status!r}"),
        (
            _runs_cache(config.kv_cache_scheme),
            "a KV cache quantized otherwise than in FP8 with calibrated scales of layers or heads",
        ),
        (scheme.output_activations is None, "quantized output activations"),
        (weights is not None and 2 <= weights.num_bits <= 8, "weights of fewer than 2 or more than 8 bits"),
        (
            weights is not None and weights.strategy in _STRATEGIES[weights.type],
            "weights not scaled by group, channel or block",
        ),
        (
            runs_inputs(scheme.input_activations),
            "inputs scaled neither by token, by group nor by tensor as llmqat does",
        ),
    )
    found = next((reason for holds, reason in checks if not holds), None)
    if found is not None:
        return found
    try:
        own = weight_config(weights)
    except ValueError:
        return f"weights of a format ({weights.num_bits} bits, {weights.type}, groups of {weights.group_size})"
    return None if may_have(own, form) else f"format {form!r} with weights of {own.label}"


def _runs_cache(cache: QuantizationArgs | None) -> bool:
    try:
        cache_config(cache)
    except ValueError:
        return False
    return True


def _check_plausible(config: PreTrainedConfig, folder: Path, entries: int) -> None:
    """Raises, before anything is allocated, where `config.json` calls for far more than the files can hold.

    Raises:
        ValueError: names the key; a hostile or mixed-up configuration would otherwise fill the memory.
    """
    text: Any = config.get_text_config(decoder=True)
    bits = 8 * sum(path.stat().st_size for path in weight_files(folder))
    checks = (
        ("num_hidden_layers", _number(text, "num_hidden_layers"), entries),
        ("vocab_size * hidden_size", _number(text, "vocab_size") * _number(text, "hidden_size"), bits),
        ("head_dim", _number(text, "head_dim"), bits),
    )
    for name, value, most in checks:
        if value > most:
            raise ValueError(
                f"{folder / 'config.json'}: {name} is {value}, more than the weight files ({entries} tensors, "
                f"{bits // 8} bytes) could hold; they do not belong together"
            )


def _number(config: Any, name: str) -> int:
    """Returns a number of a configuration; 0 where it has none, or one for each layer (Gemma 4)."""
    try:
        found = getattr(config, name)
    except (AttributeError, RuntimeError, ValueError):
        return 0
    return found if isinstance(found, int) else 0


def _install(
    model: PreTrainedModel,
    config: QuantizationConfig,
    dtype: torch.dtype,
    unmarked: Mapping[str, bool],
    stored: Iterable[str],
) -> dict[str, list[str]]:
    """Puts an empty packed module in the place of everything that a group of `config` targets.

    Returns the stacks of experts that lie packed one by one, and their names on disk.

    Args:
        model: as its class makes it.
        config: what is packed.
        dtype: of scales.
        unmarked: stacked experts of which the model does not know it, and whether they are transposed.
        stored: names of tensors on disk.
    """
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    stacks = {name: entry.transposed for name, entry in linear_maps(model).items() if entry.stacked} | dict(unmarked)
    singles = single_experts(model, stored, {name: layout for name, layout in stacks.items() if name not in schemes})
    configs = {
        target: (weight_config(scheme.weights), input_config(scheme.input_activations))
        for target, scheme in schemes.items()
    }
    plain = {target for target, scheme in schemes.items() if _holds_int8(scheme, config)}
    for name, module in list(match_named_modules(model, list(schemes), config.ignore)):
        # The most specific target comes first: an exact name before a pattern before a class.
        target = match_targets(name, module, list(schemes))[0]
        weights, inputs = configs[target]
        if isinstance(module, nn.Embedding):
            _install_embedding(model, name, module, weights, dtype)
        elif isinstance(module, (nn.Linear, Conv1D)):
            packed = PackedLinear(*_features(module), module.bias is not None, weights, dtype, "meta", name, inputs)
            packed.transposed = isinstance(module, Conv1D)
            if target in plain:
                packed.hold_int8()
            install(model, name, packed)
    for name, transposed in stacks.items():
        if name in schemes:
            target = name
        elif name in singles:
            target = _target_of_experts(singles[name][0], schemes)
        else:
            continue
        shape = tuple(model.get_parameter(name).shape)
        install(model, name, PackedExperts(shape, configs[target][0], dtype, "meta", name, transposed))
    return singles


def _target_of_experts(name: str, schemes: Mapping[str, QuantizationScheme]) -> str:
    """Returns the target that means a linear layer of an expert, which the model has no module for.

    Raises:
        ValueError: there is none, or inputs are quantized.
    """
    targets = match_targets(name, nn.Linear(1, 1, device="meta"), list(schemes))
    if not targets:
        raise ValueError(f"{name} is packed, but no group of quantization_config targets it")
    if schemes[targets[0]].input_activations is not None:
        raise ValueError(f"{name} is of an expert and has quantized inputs, which llmqat does not run")
    return str(targets[0])


def _holds_int8(scheme: QuantizationScheme, config: QuantizationConfig) -> bool:
    """Returns whether a layer keeps its codes in memory as they are on disk, int8, one per byte."""
    weights: QuantizationArgs = scheme.weights
    return (scheme.format or config.format) == PLAIN_FORMAT and weights.num_bits == 8 and weights.symmetric


def _features(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Returns in and out features."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf


def _install_embedding(
    model: nn.Module, name: str, embedding: nn.Embedding, weights: WeightConfig, dtype: torch.dtype
) -> None:
    multiplier = embedding_multiplier(embedding)
    size = embedding.num_embeddings, embedding.embedding_dim
    packed = PackedEmbedding(*size, weights, dtype, "meta", name, multiplier)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    heads = [target.removesuffix(".weight") for target, source in tied.items() if source == f"{name}.weight"]
    install(model, name, packed)
    for head in heads:
        install(model, head, TiedHead(packed, getattr(model.get_submodule(head), "bias", None)))


def _read_tensors(folder: Path) -> dict[str, tuple[Tensor, Path]]:
    """Returns every tensor of the folder's safetensors by name, mapped from the file that is given beside it."""
    tensors: dict[str, tuple[Tensor, Path]] = {}
    for path in weight_files(folder):
        check_safetensors(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    if _in_module(name) in tensors:
                        raise ValueError(f"{path}: {name} lies in {tensors[_in_module(name)][1].name} as well")
                    tensors[_in_module(name)] = _widened(name, file.get_tensor(name)), path
        except SafetensorError as error:
            raise ValueError(f"{path} has an unreadable tensor: {error}; copy it again") from error
    return tensors


def _repacked(model: nn.Module, tensors: dict[str, tuple[Tensor, Path]]) -> dict[str, tuple[Tensor, Path]]:
    """Returns `tensors` in the layout that the model's layers hold.

    `int-quantized` codes are packed into int32 words, except in layers that hold 8-bit codes as int8. Float formats are
    converted by `take_floats`.

    Raises:
        ValueError: a code or a zero point lies outside the range of its bits, or as `take_floats`; names it.
    """
    found = dict(tensors)
    for name, layer in quantized_layers(model):
        if not isinstance(layer, PackedModule):
            continue
        if layer.grid.levels == "float":
            take_floats(name, layer, found)
            continue
        if f"{name}.weight" not in found or f"{name}.weight_packed" in found:
            continue
        codes, path = found.pop(f"{name}.weight")
        grid = Grid(layer.weights.num_bits)  # codes are around zero in this format, those with zero points as well
        try:
            plain = layer.weight_packed.dtype == torch.int8
            found[f"{name}.weight_packed"] = codes if plain else pack_int32(_int8_matrix(codes), grid), path
            if f"{name}.weight_zero_point" in found:
                zeros, zeros_path = found[f"{name}.weight_zero_point"]
                packed = pack_int32(_int8_matrix(zeros).t(), grid).t().contiguous()
                found[f"{name}.weight_zero_point"] = packed, zeros_path
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        found[f"{name}.weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64), path
    return found


def _int8_matrix(values: Tensor) -> Tensor:
    if values.dtype != torch.int8 or values.dim() != 2:
        raise ValueError(f"its codes are {values.dtype} of shape {list(values.shape)}; a matrix of torch.int8 is read")
    return values


def _in_module(name: str) -> str:
    """Returns the name in the model of a tensor on disk."""
    owner, dot, leaf = name.rpartition(".")
    return f"{owner}{dot}{_IN_MODEL.get(leaf, leaf)}"


def _on_disk(name: str) -> str:
    """Returns the name on disk of a tensor in the model."""
    end = next((end for end in _RENAMED if name.endswith(f".{end}")), None)
    return name if end is None else name.removesuffix(end) + _RENAMED[end]


def _widened(name: str, tensor: Tensor) -> Tensor:
    """Returns the tensor, an input's zero point as the float that the module computes with."""
    return tensor.float() if name.endswith(".input_zero_point") else tensor


def _check_tensors(
    model: nn.Module, tensors: Mapping[str, tuple[Tensor, Path]], expected: Mapping[str, Tensor], folder: Path
) -> None:
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if missing := sorted(map(_on_disk, set(expected) - set(tensors) - set(tied) - set(tied.values()))):
        raise ValueError(f"{folder} lacks {len(missing)} tensors that config.json calls for: {shortened(missing)}")
    if unexpected := sorted(set(tensors) - set(expected)):
        raise ValueError(
            f"{folder} holds {len(unexpected)} tensors that the model of config.json has no place for: "
            f"{shortened(unexpected)}"
        )
    for name, (tensor, path) in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}, but config.json makes it {list(wanted.shape)}"
            )
        if tensor.dtype != wanted.dtype and not (tensor.is_floating_point() and wanted.is_floating_point()):
            raise ValueError(f"{path}: {name} is {tensor.dtype}, but the format stores it as {wanted.dtype}")
        if name.endswith(_SCALES) and not bool((torch.isfinite(tensor) & (tensor != 0)).all()):
            raise ValueError(f"{path}: {name} holds scales that are zero, infinite or not a number")


def _assign(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    in_float32 = kept_in_float32(model)
    wanted = {name: torch.float32 if in_float32(name) else tensor.dtype for name, tensor in expected.items()}
    # Modeling code makes some parameters in float32 whatever the model's dtype; the proof computes with `dtype`.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in wanted and parameter.is_floating_point() and not in_float32(name):
            wanted[name] = dtype
    for name, tensor in tensors.items():
        if name.endswith(_SCALES):
            check_cast(tensor, wanted[name], name)
    state = {name: _settled(name, tensor.to(wanted[name])) for name, tensor in tensors.items()}
    _put(model, state)
    # As from_pretrained does: tied to whichever was stored, and not at all where both were and differ.
    model.tie_weights(missing_keys=set(wanted) - set(tensors), recompute_mapping=False)
    held = chain(model.named_parameters(), model.named_buffers())
    if left := [name for name, tensor in held if tensor.is_meta]:
        raise ValueError(f"{type(model).__name__}: no weights were found for {shortened(left)}")
    for name, layer in quantized_layers(model):
        shape = [layer.rows, layer.columns]
        if isinstance(layer, PackedModule) and layer.weight_shape.tolist() != shape:
            raise ValueError(f"{name}.weight_shape is {layer.weight_shape.tolist()}, but config.json makes it {shape}")


def _put(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts tensors in the place of those of a model that was just made, as load_state_dict(assign=True) does.

    That would check once more what `_check_tensors` has checked, for a fifth of the time that loading takes.
    """
    modules = dict(model.named_modules())
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        if leaf in module._parameters:
            before = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=before is not None and before.requires_grad)
        else:
            module._buffers[leaf] = tensor


def _settled(name: str, tensor: Tensor) -> Tensor:
    """Returns `tensor`, copied out of its file if it is small: mapped, it would keep 64 KiB of the file in memory.

    `weight_scale` stays mapped, because kernels give its pages back.
    """
    small = tensor.is_floating_point() and tensor.nbytes < _NEIGHBOURHOOD
    return tensor.clone() if small and not name.endswith(".weight_scale") else tensor

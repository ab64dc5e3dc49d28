"""The compressed-tensors `pack-quantized` format: a model's state dict and `quantization_config`, and the way back.

A quantized linear NAME is stored as
    NAME.weight_packed      int32 [O, ceil(I * b / 32)]: code - qmin, element 0 in the lowest bits, codes straddle words
    NAME.weight_scale       [O, G] in the checkpoint's dtype
    NAME.weight_shape       int64 [2]: O, I
    NAME.weight_zero_point  int32 [ceil(O * b / 32), G], packed along O; asymmetric schemes only
    NAME.bias               [O], where the layer has one
and everything else as in any safetensors checkpoint. `config.json` holds `quantization_config`, which is generated
through compressed-tensors' own classes and is all that a loader needs: stock transformers, vLLM and `read` below
recover from it which modules are packed and how. It is derived from the modules themselves, never from the
configuration that once prepared them, so it cannot disagree with the tensors.

Letters: O out features, I in features, G scales per row, b bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.utils.match import match_named_modules, match_targets
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmqat.grid import pack_int32, unpack_int32
from llmqat.layers import PackedLinear, QuantLinear, WeightConfig
from llmqat.models import check_safetensors, kept_in_float32, weight_files

QUANT_METHOD = "compressed-tensors"
PACKED_FORMAT = "pack-quantized"


# Writing


def write(model: PreTrainedModel, folder: Path, dtype: torch.dtype, max_shard_size: int | str) -> dict[str, Tensor]:
    """Writes weights and `config.json` of a prepared or converted model into an existing folder.

    Args:
        model: holds at least one QuantLinear or PackedLinear; not changed.
        folder: receives `model.safetensors`, or shards and their index, and `config.json`.
        dtype: of scales, biases and all parameters left in high precision.
        max_shard_size: bytes of a shard, or a text such as "5GB".

    Returns:
        The tensors that were written, by name.
    """
    state = packed_state_dict(model, dtype)
    _write_config(model, folder, dtype)
    plan = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        # safetensors writes files that only their owner may read; config.json has the rights the user is used to.
        (folder / file).chmod((folder / "config.json").stat().st_mode)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return state


def packed_state_dict(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the checkpoint's tensors by name, on the CPU, contiguous, tied ones once; the model is not changed.

    Parameters left in high precision are cast to `dtype`; buffers keep their own.
    """
    state: dict[str, Tensor] = {}
    layers = dict(quantized_layers(model))
    for name, layer in layers.items():
        packed = layer if isinstance(layer, PackedLinear) else PackedLinear.from_quant_linear(layer, dtype)
        for key, tensor in _scaled_by_row(packed).items():
            state[f"{name}.{key}"] = _for_disk(tensor, dtype)
    tied, in_float32 = _tied_names(model), kept_in_float32(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    written: set[int] = set()
    for name, tensor in model.state_dict().items():
        owner = parameters.get(name, tensor)
        if name.rpartition(".")[0] in layers or name in tied or id(owner) in written:
            continue
        written.add(id(owner))
        is_cast = owner is not tensor and not in_float32(name)
        state[name] = _for_disk(tensor, dtype if is_cast else tensor.dtype)
    return state


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear | PackedLinear]]:
    """Yields name and module of every quantized linear of `model`, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, PackedLinear)):
            yield name, module


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """Returns the `quantization_config` of `config.json` for a prepared or converted model.

    With one scheme its target is the class `Linear`; with several, each names its modules. So does a model with stacked
    (3-D) expert weights, which loaders take for linears too, though llmqat leaves them alone. Linears left alone are
    listed in `ignore`.

    Raises:
        ValueError: there is no quantized layer.
    """
    members: dict[WeightConfig, list[str]] = {}
    for name, layer in quantized_layers(model):
        members.setdefault(_stored_scheme(layer.weights), []).append(name)
    if not members:
        raise ValueError(
            f"{type(model).__name__} has no quantized layer; call llmqat.prepare(model, config) before saving it packed"
        )
    by_class = len(members) == 1 and not any(parameter.dim() == 3 for parameter in model.parameters())
    groups = {
        f"group_{index}": QuantizationScheme(
            targets=["Linear"] if by_class else names,
            weights=_quantization_args(weights),
            format=PACKED_FORMAT,
        )
        for index, (weights, names) in enumerate(members.items())
    }
    config = QuantizationConfig(
        config_groups=groups,
        format=PACKED_FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
    )
    dumped: dict[str, Any] = json.loads(config.model_dump_json())
    return dumped


def _stored_scheme(weights: WeightConfig) -> WeightConfig:
    """Returns the scheme on disk. One scale a tensor is written as that scale in every row, which all loaders run."""
    return weights if weights.strategy != "tensor" else weights.model_copy(update={"strategy": "channel"})


def _scaled_by_row(layer: PackedLinear) -> dict[str, Tensor]:
    """Returns the tensors of `layer` by their names on disk; see `_stored_scheme`."""
    tensors: dict[str, Tensor] = layer.state_dict()
    if layer.weights.strategy != "tensor":
        return tensors
    rows = layer.out_features
    tensors["weight_scale"] = tensors["weight_scale"].expand(rows, 1)
    if "weight_zero_point" in tensors:
        zero_point = unpack_int32(tensors["weight_zero_point"].t().contiguous(), layer.grid, columns=1)
        tensors["weight_zero_point"] = pack_int32(zero_point.expand(1, rows), layer.grid).t()
    return tensors


def _quantization_args(weights: WeightConfig) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=weights.num_bits,
        type="int",
        symmetric=weights.symmetric,
        strategy=weights.strategy,
        group_size=weights.group_size,
        dynamic=False,
    )


def _write_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    config = deepcopy(model.config)
    if hasattr(config, "llmqat"):
        del config.llmqat
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.quantization_config = quantization_config(model)
    config.save_pretrained(folder)


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


def read(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """Returns the packed model in `folder`, in evaluation mode, its tensors mapped from the files.

    Args:
        folder: holds the weights; `config.json` alone says which modules are packed and how.
        config: the model's configuration, from `config.json`.
        dtype: of scales and high-precision parameters; buffers such as rotary frequencies stay float32.
        attention: the attention implementation, or None for the default.

    Raises:
        FileNotFoundError: a weights file is missing.
        ValueError: a scheme that llmqat does not run, or a file or tensor that is unreadable, missing, left over, or
            of another shape or dtype than `config.json` says.
    """
    schemes = _read_schemes(config, folder)
    options = {} if attention is None else {"attn_implementation": attention}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    _install(model, schemes, dtype)
    tensors = _read_tensors(folder)
    _check_tensors(model, tensors, folder)
    _assign(model, {name: tensor for name, (tensor, _) in tensors.items()})
    return model.eval()


def _read_schemes(config: PreTrainedConfig, folder: Path) -> QuantizationConfig:
    try:
        parsed = QuantizationConfig.model_validate(config.quantization_config)
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


def _unsupported(scheme: QuantizationScheme, config: QuantizationConfig) -> str | None:
    weights, form = scheme.weights, scheme.format or config.format
    checks = (
        (form == PACKED_FORMAT, f"format {form!r} (not {PACKED_FORMAT!r})"),
        (config.quantization_status == QuantizationStatus.COMPRESSED, f"status {config.quantization_status!r}"),
        (config.kv_cache_scheme is None, "a quantized KV cache"),
        (scheme.input_activations is None and scheme.output_activations is None, "quantized activations"),
        (weights is not None and weights.type == "int", "weights that are not integers"),
        (weights is not None and 2 <= weights.num_bits <= 8, "weights of fewer than 2 or more than 8 bits"),
        (weights is not None and weights.strategy in ("group", "channel"), "weights not scaled by group or channel"),
    )
    return next((reason for holds, reason in checks if not holds), None)


def _install(model: nn.Module, config: QuantizationConfig, dtype: torch.dtype) -> None:
    """Puts an empty PackedLinear in the place of every nn.Linear that a group of `config` targets."""
    schemes = {target: scheme.weights for scheme in config.config_groups.values() for target in scheme.targets}
    for name, module in list(match_named_modules(model, list(schemes), config.ignore)):
        if not isinstance(module, nn.Linear):
            continue
        # The most specific target comes first: an exact name before a pattern before a class.
        weights = schemes[match_targets(name, module, list(schemes))[0]]
        has_bias, size = module.bias is not None, (module.in_features, module.out_features)
        packed = PackedLinear(*size, has_bias, _weight_config(weights), dtype, device="meta", name=name)
        model.set_submodule(name, packed)


def _weight_config(weights: QuantizationArgs) -> WeightConfig:
    return WeightConfig(
        num_bits=weights.num_bits,
        symmetric=weights.symmetric,
        strategy=weights.strategy,
        group_size=weights.group_size if weights.strategy == "group" else None,
    )


def _read_tensors(folder: Path) -> dict[str, tuple[Tensor, Path]]:
    """Returns every tensor of the folder's safetensors by name, mapped from the file that is given beside it."""
    tensors: dict[str, tuple[Tensor, Path]] = {}
    for path in weight_files(folder):
        check_safetensors(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: (file.get_tensor(name), path) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} has an unreadable tensor: {error}; copy it again") from error
    return tensors


def _check_tensors(model: nn.Module, tensors: Mapping[str, tuple[Tensor, Path]], folder: Path) -> None:
    expected = model.state_dict()
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if missing := sorted(set(expected) - set(tensors) - set(tied) - set(tied.values())):
        raise ValueError(f"{folder} lacks {len(missing)} tensors that config.json calls for: {_shortened(missing)}")
    if unexpected := sorted(set(tensors) - set(expected)):
        raise ValueError(
            f"{folder} holds {len(unexpected)} tensors that the model of config.json has no place for: "
            f"{_shortened(unexpected)}"
        )
    for name, (tensor, path) in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}, but config.json makes it {list(wanted.shape)}"
            )
        if tensor.dtype != wanted.dtype and not (tensor.is_floating_point() and wanted.is_floating_point()):
            raise ValueError(f"{path}: {name} is {tensor.dtype}, but the format stores it as {wanted.dtype}")


def _assign(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    in_float32 = kept_in_float32(model)
    wanted = {name: torch.float32 if in_float32(name) else tensor.dtype for name, tensor in model.state_dict().items()}
    state = {name: tensor.to(wanted[name]) for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=False, assign=True)
    # As from_pretrained does: tied to whichever was stored, and not at all where both were and differ.
    model.tie_weights(missing_keys=set(wanted) - set(tensors), recompute_mapping=False)
    if left := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise ValueError(f"{type(model).__name__}: no weights were found for {_shortened(left)}")
    for name, layer in quantized_layers(model):
        shape = [layer.out_features, layer.in_features]
        if isinstance(layer, PackedLinear) and layer.weight_shape.tolist() != shape:
            raise ValueError(f"{name}.weight_shape is {layer.weight_shape.tolist()}, but config.json makes it {shape}")


def _shortened(names: Iterable[str], limit: int = 6) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")

"""GGUF: one file for llama.cpp, its blocks written from the codes that were trained, never through floats.

    int2, int3, int4 symmetric     Q4_0   blocks of 32: d (float16) and codes + 8, two a byte, element j beside j + 16
    int2, int3, int4 asymmetric    Q4_1   blocks of 32: d, m (float16) and codes, likewise; weight = d * code + m
    int5 .. int8 symmetric         Q8_0   blocks of 32: d (float16) and int8 codes
    not quantized                  BF16 matrices (F16 of a float16 checkpoint), F32 vectors

A block's d is the layer's scale s, repeated where a group or a channel is longer than 32. A bfloat16 scale of at least
2^-17 is exact in float16. The m of Q4_1 is -z * s, z being the zero point. For an even z it fits into float16's 11
significant bits. For an odd z the block is written mirrored: codes 15 - q, zero point 15 - z and scale -s give the same
weights. Rounding the weights again instead would change most of them. The export raises an error for what GGUF cannot
hold: zero points with more than 4 bits, quantized inputs, a quantized KV cache, groups that 32 does not divide.

Letters: O rows, I in features, G scales per row, N blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.export.description import ModelDescription, describe
from llmqat.export.gguf_tokenizer import write_tokenizer
from llmqat.export.settings import KEPT, WINDOWS, Settings, check_no_window, check_settings, stop_tokens
from llmqat.export.tensors import (
    StoredWeight,
    check_language_model,
    exact_float16,
    stored_dtype,
    stored_tensors,
    too_small_for_float16,
)
from llmqat.export.text_part import text_part
from llmqat.extras import require
from llmqat.models import heads_of
from llmqat.paths import user_path

logger = logging.getLogger(__name__)

BLOCK = 32
KIND = "GGUF"
_HIGHEST = 15
"""Largest code of a Q4_1 block."""


@dataclass(frozen=True)
class Architecture:
    """What GGUF does with the models of a type.

    Attributes:
        name: the architecture's name in gguf-py.
        permuted: query and key rows lie in another order (pairs of rotary features side by side).
        norms_from_one: norm weights are stored with the 1 added that the model adds in its forward.
        own: the function that checks and writes what only this architecture has, or None.
        settings: what of the configuration is written or assumed, beside the shape.
        fixed_head: the readers take hidden_size / num_attention_heads for the head size.
        partial: part of a head may be rotated.
        rope: kinds of rotary embedding that are written.
    """

    name: str
    permuted: bool = False
    norms_from_one: bool = False
    own: Callable[[Any, Any], None] | None = None
    settings: Settings = field(default_factory=Settings)
    fixed_head: bool = False
    partial: bool = False
    rope: tuple[str, ...] = ("default", "linear")


def _gemma2_settings(writer: Any, config: Any) -> None:
    _check_gemma(config, period=2, layers_of_27b=46)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not getattr(config, name):
            raise ValueError(f"{name}={getattr(config, name)} of gemma2 cannot be said in GGUF; {KEPT}")
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3_settings(writer: Any, config: Any) -> None:
    _check_gemma(config, period=6, layers_of_27b=62)
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        raise ValueError("GGUF's gemma3 has no soft-capping of logits, but the model has")
    writer.add_sliding_window(config.sliding_window)


def _phi3_settings(writer: Any, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings or config.max_position_embeddings)
    check_no_window(config, KIND)  # llama.cpp reads the key of this architecture, and leaves the window out


def _check_gemma(config: Any, period: int, layers_of_27b: int) -> None:
    """Raises unless the model is as llama.cpp assumes: it is told neither layer types nor scale.

    It takes the model of `layers_of_27b` layers for the one of 27 billion weights, whose scale is hidden size / heads.
    """
    assumed, name = config.head_dim, "head_dim"
    if config.num_hidden_layers == layers_of_27b:
        assumed, name = config.hidden_size // config.num_attention_heads, "hidden_size / num_attention_heads"
    if config.query_pre_attn_scalar != assumed:
        raise ValueError(
            f"query_pre_attn_scalar={config.query_pre_attn_scalar} is not {name}={assumed}, which llama.cpp "
            f"takes it for; GGUF cannot say it; {KEPT}"
        )
    expected = [
        "full_attention" if (index + 1) % period == 0 else "sliding_attention"
        for index in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != expected:
        raise ValueError(
            f"layer_types {config.layer_types} are not one full attention in {period}, as llama.cpp has it"
        )


_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
_TIED = frozenset({"tie_word_embeddings"})
"""Needs no key in the file: a head that is not tied is a tensor there."""
_BIASES = frozenset({"attention_bias", "mlp_bias"})
"""Need no key either: biases are tensors, which llama.cpp reads for the architecture of Llama."""
_GEMMA: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
}
_CAPS = frozenset({"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"})

ARCHITECTURES = {
    "llama": Architecture(
        "LLAMA", permuted=True, settings=Settings(_TIED | _BIASES, _SILU), rope=("default", "linear", "llama3")
    ),
    "mistral": Architecture("LLAMA", permuted=True, settings=Settings(_TIED | WINDOWS, _SILU)),
    "qwen2": Architecture("QWEN2", settings=Settings(_TIED | WINDOWS, _SILU), fixed_head=True),
    "qwen3": Architecture("QWEN3", settings=Settings(_TIED | WINDOWS, {**_SILU, "attention_bias": (False,)})),
    "gemma": Architecture(
        "GEMMA", norms_from_one=True, settings=Settings(assumed={**_GEMMA, "tie_word_embeddings": (True,)})
    ),
    "gemma2": Architecture(
        "GEMMA2",
        norms_from_one=True,
        own=_gemma2_settings,
        settings=Settings(_CAPS | WINDOWS, {**_GEMMA, "tie_word_embeddings": (True,)}),
    ),
    "gemma3_text": Architecture(
        "GEMMA3", norms_from_one=True, own=_gemma3_settings, settings=Settings(_TIED | _CAPS | WINDOWS, _GEMMA)
    ),
    "phi3": Architecture(
        "PHI3",
        own=_phi3_settings,
        settings=Settings(_TIED | WINDOWS | {"original_max_position_embeddings"}, _SILU),
        fixed_head=True,
        partial=True,
    ),
}
"""transformers' model type -> what GGUF does with it."""

_MATRICES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q8_0": "MOSTLY_Q8_0"}


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> dict[str, int]:
    """Writes a prepared or packed `model` and its tokenizer to the GGUF file `path`; returns bytes by block type.

    Args:
        model: of one of `ARCHITECTURES`, or one that reads images whose language model is; that alone is written.
        tokenizer: a BPE tokenizer over bytes (GPT-2, SmolLM, Llama 3 and Qwen kinds) or with byte fallback
            (Llama 2, Mistral, Gemma and Phi-3 kinds).
        path: must not exist; appears whole or not at all.

    Raises:
        FileExistsError: `path` exists.
        ImportError: the package gguf is not installed.
        ValueError: GGUF, or this writer, cannot hold the model or the tokenizer; says what.
    """
    gguf = require("gguf", "writing GGUF")
    path = user_path(path, "path")
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name")
    whole, model = model, text_part(model, ARCHITECTURES)
    if model is not whole:
        logger.warning(
            "GGUF: the language model of %s is written, without what reads images or sound: llama.cpp takes that from "
            "a second file (mmproj), which its convert_hf_to_gguf.py makes from the original model",
            type(whole).__name__,
        )
    config: Any = model.config
    check_gguf(describe(model))
    architecture = ARCHITECTURES[config.model_type]
    blocks = dict(_tensors(model, architecture))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]])
    try:
        _write_config(writer, gguf, config, blocks)
        if architecture.own is not None:
            architecture.own(writer, config)
        write_tokenizer(writer, tokenizer, config.vocab_size, stop_tokens(model))
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name], config.num_hidden_layers)
        for name, (kind, data) in blocks.items():
            short = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if short is None:
                raise ValueError(f"GGUF has no name for the tensor {name} of {config.model_type}")
            writer.add_tensor(short, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        if (factors := _frequency_factors(model)) is not None:
            writer.add_tensor("rope_freqs.weight", factors, raw_dtype=gguf.GGMLQuantizationType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    sizes: dict[str, int] = {}
    for kind, data in blocks.values():
        sizes[kind] = sizes.get(kind, 0) + data.nbytes
    return sizes


def check_gguf(description: ModelDescription) -> None:
    """Raises for the first thing in a model's type, settings or schemes that GGUF, or this writer, cannot hold.

    Raises:
        ValueError: says what, and the way out.
    """
    if description.text is not None and description.text.model_type in ARCHITECTURES:
        description = description.text
    check_language_model(description, ARCHITECTURES, KIND)
    _check_settings(description)
    for layer in description.layers:
        weights = layer.scheme.weights
        if layer.per_scale % BLOCK:
            raise ValueError(
                f"{layer.name} has a scale for {layer.per_scale} weights; GGUF's blocks need groups that {BLOCK} "
                "divides"
            )
        if not weights.symmetric and weights.num_bits > 4:
            raise ValueError(
                f"{layer.name} has zero points and {weights.num_bits} bits; GGUF's blocks have zero points up to 4 bits"
            )


# Weights


def _tensors(model: PreTrainedModel, architecture: Architecture) -> Iterator[tuple[str, tuple[str, np.ndarray]]]:
    """Yields the name in the model, the block type and the bytes of every tensor."""
    weights, others = stored_tensors(model)
    small = [name for name, weight in weights.items() if too_small_for_float16(weight.scale)]
    if small:
        logger.warning(
            "GGUF: %d weights have scales too small for float16, the first is %s: they are written as the numbers they "
            "stand for, not as codes",
            len(small),
            small[0],
        )
    for name, weight in weights.items():
        if name not in small:
            yield f"{name}.weight", _blocks(name, weight, _order(model, architecture, name))
    matrices = {f"{name}.weight": weights[name].dequantized(stored_dtype(model)) for name in small}
    for name, tensor in {**matrices, **others}.items():
        order = _order(model, architecture, name.rpartition(".")[0])
        kept = tensor if order is None else order(tensor)
        if kept.dim() == 1:
            vector = kept.float() + 1 if architecture.norms_from_one and name.endswith("norm.weight") else kept.float()
            yield name, ("F32", vector.numpy())
        else:
            yield name, (_MATRICES[kept.dtype], kept.contiguous().view(torch.uint8).numpy())


def _blocks(name: str, weight: StoredWeight, order: Callable[[Tensor], Tensor] | None) -> tuple[str, np.ndarray]:
    """Returns the block type and the blocks, uint8 [O, N * bytes], of a quantized weight."""
    num_bits, codes, zeros = weight.scheme.num_bits, weight.codes(), weight.zero_point()
    scale = _by_block(weight.scale, weight)
    zeros = None if zeros is None else _by_block(zeros, weight)
    if order is not None:
        codes, scale, zeros = order(codes), order(scale), None if zeros is None else order(zeros)
    grouped = codes.unflatten(1, (-1, BLOCK))
    if zeros is not None:
        mirrored = zeros % 2 == 1
        grouped = torch.where(mirrored[..., None], _HIGHEST - grouped, grouped)
        signed = torch.where(mirrored, -scale, scale)
        minimum = -torch.where(mirrored, _HIGHEST - zeros, zeros).float() * signed.float()
        heads = [_float16_bytes(signed, name), _float16_bytes(minimum, name)]
        return "Q4_1", _joined(*heads, _nibbles(grouped))
    head = _float16_bytes(scale, name)
    if num_bits > 4:
        return "Q8_0", _joined(head, grouped.contiguous().numpy().view(np.uint8))
    return "Q4_0", _joined(head, _nibbles((grouped + 8).to(torch.uint8)))


def _by_block(values: Tensor, weight: StoredWeight) -> Tensor:
    """Returns values per scale [O, G] as values per block [O, N]."""
    return values.repeat_interleave(weight.per_scale // BLOCK, dim=1)


def _nibbles(codes: Tensor) -> np.ndarray:
    """Returns unsigned 4-bit codes [O, N, 32] as bytes [O, N, 16]."""
    both: np.ndarray = (codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)).numpy()
    return both


def _float16_bytes(values: Tensor, name: str) -> np.ndarray:
    """Returns values [O, N], which float16 must hold, as bytes [O, N, 2]."""
    halves = exact_float16(values, name, "GGUF's blocks")
    return np.ascontiguousarray(halves.numpy())[..., None].view(np.uint8)


def _joined(*parts: np.ndarray) -> np.ndarray:
    blocks = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(blocks.reshape(blocks.shape[0], -1))


def _order(model: PreTrainedModel, architecture: Architecture, name: str) -> Callable[[Tensor], Tensor] | None:
    """Returns how GGUF orders the rows of the layer `name`, or None for as they are."""
    config: Any = model.config
    leaf = name.rpartition(".")[2]
    if not architecture.permuted or leaf not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads

    def interleaved(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()

    return interleaved


# Configuration and tokenizer


def _write_config(writer: Any, gguf: Any, config: Any, blocks: dict[str, tuple[str, np.ndarray]]) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(heads_of(config).size)
    writer.add_value_length(heads_of(config).size)
    rope = _rope(config)
    writer.add_rope_dimension_count(_rotated(config, rope))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kinds = [kind for kind, _ in blocks.values()]
    main = max(_FILE_TYPES, key=kinds.count)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[main]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _check_settings(description: ModelDescription) -> None:
    """Raises ValueError for the first setting that changes the forward and that llama.cpp cannot be told."""
    config: Any = description.config
    architecture = ARCHITECTURES[config.model_type]
    check_settings(config, architecture.settings, KIND)
    if architecture.settings.written >= WINDOWS and architecture.own is None:
        check_no_window(config, KIND)
    plain = config.hidden_size // config.num_attention_heads
    if architecture.fixed_head and heads_of(config).size != plain:
        raise ValueError(
            f"head_dim={heads_of(config).size} of {config.model_type} is not hidden_size / num_attention_heads="
            f"{plain}, which llama.cpp takes it for; {KEPT}"
        )
    _check_rotation(config, description.rotary, architecture)


def _check_rotation(config: Any, rotary: Any, architecture: Architecture) -> None:
    """Raises ValueError unless the model turns queries and keys as llama.cpp will from what the file says."""
    rope = _rope(config)
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not architecture.partial:
        raise ValueError(
            f"partial_rotary_factor={rope['partial_rotary_factor']} of {config.model_type} cannot be said in GGUF; "
            f"{KEPT}"
        )
    local = {"rope_theta": 10_000.0}
    said: dict[str, dict[str, Any]] = {
        "inv_freq": rope,
        "full_attention_inv_freq": rope,
        "sliding_attention_inv_freq": local,
    }
    for name, settings in said.items():
        found = getattr(rotary, name, None)
        if found is None or settings.get("rope_type") == "llama3":  # whose frequencies are a tensor in the file
            continue
        size = _rotated(config, settings)
        steps = torch.arange(0, size, 2, dtype=torch.float32, device=found.device) / size
        factor = settings["factor"] if settings.get("rope_type") == "linear" else 1.0
        wanted = 1.0 / settings["rope_theta"] ** steps / factor
        scaling = getattr(rotary, name.replace("inv_freq", "attention_scaling"), 1.0)
        if found.shape != wanted.shape or not torch.allclose(found.float(), wanted, rtol=1e-2) or scaling != 1.0:
            raise ValueError(f"rope_parameters={config.rope_parameters} cannot be said in GGUF; {KEPT}")


def _rotated(config: Any, rope: dict[str, Any]) -> int:
    """Returns how many features of a head are turned."""
    return int(heads_of(config).size * rope.get("partial_rotary_factor", 1.0))


def _rope(config: Any) -> dict[str, Any]:
    """Returns the rotary settings of the layers with full attention.

    Raises:
        ValueError: they are of a kind that is not written here.
    """
    rope: dict[str, Any] = config.rope_parameters
    if "full_attention" in rope:
        local = rope.get("sliding_attention", {})
        if local.get("rope_type", "default") != "default" or local.get("rope_theta", 10_000.0) != 10_000.0:
            raise ValueError(f"GGUF cannot say the rotary settings of sliding attention {local}; base 10000 is assumed")
        rope = rope["full_attention"]
    kinds = ARCHITECTURES[config.model_type].rope
    if rope.get("rope_type", "default") not in kinds:
        kind = f"rope_type {rope['rope_type']!r} of {config.model_type}"
        raise ValueError(f"{kind} is not written to GGUF here; {', '.join(kinds)} are; {KEPT}")
    return rope


def _frequency_factors(model: PreTrainedModel) -> np.ndarray | None:
    """Returns what llama.cpp divides each rotary frequency by, float32 [H / 2], for Llama 3's scaling; else None."""
    config: Any = model.config
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled: Tensor = model.get_submodule("model.rotary_emb").inv_freq.float()
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled)))
    return (plain / scaled).numpy()

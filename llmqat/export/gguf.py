"""GGUF: one file for llama.cpp, its blocks written from the codes that were trained, never through floats.

    int2, int3, int4 (symmetric)   Q4_0   blocks of 32: d (float16) and codes + 8, two a byte, element j beside j + 16
    int5 .. int8 (symmetric)       Q8_0   blocks of 32: d (float16) and int8 codes
    not quantized                  BF16 matrices, F32 vectors

A block's d is our scale, repeated where a group or a channel is longer than 32; a bfloat16 scale of at least 2^-17 is a
float16 exactly. Rounding the weights again instead would change most of them. What GGUF cannot hold (asymmetric codes,
quantized inputs, a quantized KV cache, groups that 32 does not divide) is refused by name.

Letters: O rows, I in features, G scales per row, N blocks.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.export.compressed_tensors import packed_state_dict, quantized_layers
from llmqat.grid import unpack_int32
from llmqat.layers import KVQuantizer

BLOCK = 32
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""transformers' model type -> the name of GGUF's architecture."""

PERMUTED = ("llama", "mistral")
"""Model types whose query and key rows GGUF keeps in another order (pairs of rotary features side by side)."""

_FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q8_0": "MOSTLY_Q8_0"}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}
"""Regular expressions by which tokenizers cut text -> llama.cpp's names for them."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> dict[str, int]:
    """Writes a prepared or packed `model` and its tokenizer to the GGUF file `path`; returns bytes by block type.

    Args:
        model: of one of `ARCHITECTURES`.
        tokenizer: a byte-level BPE tokenizer (GPT-2, SmolLM, Llama 3 and Qwen kinds).
        path: must not exist; appears whole or not at all.

    Raises:
        FileExistsError: `path` exists.
        ImportError: the package gguf is not installed.
        ValueError: GGUF, or this writer, cannot hold the model or the tokenizer; says what.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("writing GGUF needs the package gguf; run `pip install gguf`")
    import gguf

    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name")
    config: Any = model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"GGUF of model type {config.model_type!r} is not written here; {', '.join(ARCHITECTURES)} are"
        )
    _check_model(model)
    blocks = dict(_tensors(model))
    temporary = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]])
    try:
        _write_config(writer, gguf, config, blocks)
        _write_tokenizer(writer, tokenizer, config.vocab_size)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]], config.num_hidden_layers)
        for name, (kind, data) in blocks.items():
            short = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if short is None:
                raise ValueError(f"GGUF has no name for the tensor {name} of {config.model_type}")
            writer.add_tensor(short, data, raw_dtype=gguf.GGMLQuantizationType[kind])
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


# Weights


def _check_model(model: PreTrainedModel) -> None:
    if not dict(quantized_layers(model)):
        raise ValueError("the model has no quantized weight to write; give a packed checkpoint, or prepare the model")
    for name, layer in quantized_layers(model):
        if not layer.weights.symmetric:
            raise ValueError(
                f"{name} is asymmetric ({layer.weights.label}), whose zero points GGUF's blocks cannot hold"
            )
        if getattr(layer, "input_quantizer", None) is not None:
            raise ValueError(f"{name} has quantized inputs, which GGUF cannot say; export it as compressed-tensors")
    if any(isinstance(module, KVQuantizer) for module in model.modules()):
        raise ValueError("the model has a quantized KV cache, which GGUF cannot say; export it as compressed-tensors")


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, tuple[str, np.ndarray]]]:
    """Yields the name in the model, the block type and the bytes of every tensor."""
    layers = dict(quantized_layers(model))
    state = packed_state_dict(model, torch.bfloat16)
    for name, layer in layers.items():
        scheme, order = layer.weights.stored, _order(model, name)
        codes = unpack_int32(state[f"{name}.weight_packed"], scheme.grid, layer.columns)
        yield f"{name}.weight", _blocks(name, codes, state[f"{name}.weight_scale"], scheme.num_bits, order)
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        if owner in layers and leaf != "bias":
            continue
        order = _order(model, owner)
        kept = tensor.float() if order is None else order(tensor.float())
        yield name, ("F32", kept.numpy()) if kept.dim() == 1 else ("BF16", _bfloat16_bytes(kept))


def _blocks(
    name: str, codes: Tensor, scale: Tensor, num_bits: int, order: Callable[[Tensor], Tensor] | None
) -> tuple[str, np.ndarray]:
    """Returns the block type and the blocks, uint8 [O, N * bytes], of codes [O, I] with scales [O, G]."""
    per_scale = codes.shape[1] // scale.shape[1]
    if per_scale % BLOCK:
        raise ValueError(f"{name} has a scale for {per_scale} weights; GGUF's blocks need groups that {BLOCK} divides")
    scale = scale.repeat_interleave(per_scale // BLOCK, dim=1)
    if order is not None:
        codes, scale = order(codes), order(scale)
    d = scale.to(torch.float16)
    if not torch.equal(d.float(), scale.float()):
        raise ValueError(f"{name} has a scale that float16 cannot hold exactly; GGUF's blocks would round it")
    heads = np.ascontiguousarray(d.numpy())[..., None].view(np.uint8)  # [O, N, 2]
    grouped = codes.unflatten(1, (-1, BLOCK))
    if num_bits > 4:
        return "Q8_0", _joined(heads, grouped.contiguous().numpy().view(np.uint8))
    nibbles = (grouped + 8).to(torch.uint8)
    both = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)
    return "Q4_0", _joined(heads, both.numpy())


def _joined(heads: np.ndarray, bodies: np.ndarray) -> np.ndarray:
    blocks = np.concatenate([heads, bodies], axis=-1)
    return np.ascontiguousarray(blocks.reshape(blocks.shape[0], -1))


def _bfloat16_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()


def _order(model: PreTrainedModel, name: str) -> Callable[[Tensor], Tensor] | None:
    """Returns how GGUF orders the rows of the layer `name`, or None for as they are."""
    config: Any = model.config
    leaf = name.rpartition(".")[2]
    if config.model_type not in PERMUTED or leaf not in ("q_proj", "k_proj"):
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
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not written to GGUF here; 'default' is")
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kinds = [kind for kind, _ in blocks.values()]
    main = max(("Q4_0", "Q8_0"), key=kinds.count)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[main]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE":
        raise ValueError(f"a tokenizer of type {described['model']['type']} is not written to GGUF here; BPE is")
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [_UNUSED] * size
    for token, index in described["model"]["vocab"].items():
        tokens[index], kinds[index] = token, _NORMAL
    for added in described["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(described))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(tokenizer("", verbose=False)["input_ids"] == [tokenizer.bos_token_id])
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """Returns llama.cpp's name for how the tokenizer cuts text before merging.

    llama.cpp knows a list of names, not rules; these are told apart by their rules.
    """
    pre = described["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    patterns = [str(step.get("pattern", {}).get("Regex", "")) for step in steps if step.get("type") == "Split"]
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and patterns[0] in _SPLITS:
        return _SPLITS[patterns[0]]
    raise ValueError(f"the tokenizer cuts text by {kinds}, for which llmqat knows no name in llama.cpp")

"""What lies in an exported file, read without llmqat: by the format's own library, or from its definition.

A reader returns for every quantized layer, by its name in the model, integer levels (code - zero point) and scales,
both [O, I]: one scale a weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors import safe_open

Layers = dict[str, tuple[np.ndarray, np.ndarray]]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def spread(values: np.ndarray, columns: int) -> np.ndarray:
    """One a group [O, G] as one a weight [O, I]."""
    return np.repeat(values, columns // values.shape[1], axis=1)


def read_compressed_tensors(folder: Path, model_type: str) -> Layers:
    """By compressed-tensors' own unpacking."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    bits, tensors, layers = group["weights"]["num_bits"], tensors_of(folder), {}
    for name in (key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")):
        shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
        levels = unpack_from_int32(tensors[f"{name}.weight_packed"], bits, shape).numpy().astype(int)
        scale = tensors[f"{name}.weight_scale"].float().numpy()
        if f"{name}.weight_zero_point" in tensors:
            packed = tensors[f"{name}.weight_zero_point"]
            zeros = unpack_from_int32(packed, bits, torch.Size(scale.shape), packed_dim=0).numpy().astype(int)
            levels = levels - spread(zeros, shape[1])
        layers[name] = levels, spread(scale, shape[1])
    return layers


def read_gptq(folder: Path, model_type: str) -> Layers:
    """By AutoGPTQ's definition: the shifts and masks of its QuantLinear.forward, written out for every bit."""
    settings, tensors, layers = json.loads((folder / "config.json").read_text()), tensors_of(folder), {}
    settings = settings["quantization_config"]
    assert settings == json.loads((folder / "quantize_config.json").read_text())
    bits = settings["bits"]
    for name in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        codes = numbers(tensors[f"{name}.qweight"].numpy().T, bits).T  # [I, O]
        zeros = numbers(tensors[f"{name}.qzeros"].numpy(), bits)  # [G, O]
        zeros = zeros + (1 if settings["checkpoint_format"] == "gptq" else 0)
        groups = tensors[f"{name}.g_idx"].numpy()
        scales = tensors[f"{name}.scales"]
        assert scales.dtype == torch.float16
        layers[name] = (codes - zeros[groups]).T, scales.float().numpy()[groups].T
    return layers


def numbers(words: np.ndarray, bits: int) -> np.ndarray:
    """The numbers of `bits` bits that lie one after another in int32 words [R, W], from the lowest bit on."""
    every = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return every.reshape(len(words), -1, bits).astype(int) @ (1 << np.arange(bits))


def read_gguf(path: Path, model_type: str) -> Layers:
    """By gguf-py's reader of files, llama.cpp's names of tensors, and ggml's definition of blocks."""
    reader, layers = gguf.GGUFReader(path), {}
    architecture = str(bytes(reader.fields["general.architecture"].parts[-1]), "utf-8")
    heads = {".attn_q.": "head_count", ".attn_k.": "head_count_kv"}
    for tensor in reader.tensors:
        block, _, leaf = tensor.name.removesuffix(".weight").rpartition(".")
        if leaf not in GGUF_NAMES or tensor.tensor_type.name not in BLOCKS:
            continue
        name = f"model.layers.{block.removeprefix('blk.')}.{GGUF_NAMES[leaf]}"
        levels, scales = BLOCKS[tensor.tensor_type.name](tensor.data)
        for part, key in heads.items():
            if part in tensor.name and model_type in ("llama", "mistral"):
                count = int(reader.fields[f"{architecture}.attention.{key}"].parts[-1][0])
                levels, scales = (rotated(rows, count) for rows in (levels, scales))
        layers[name] = levels, scales
    return layers


GGUF_NAMES = {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"} | {
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def rotated(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows undone, as its converter does it, backwards."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def half(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def nibbles(data: np.ndarray) -> np.ndarray:
    return np.concatenate([data & 15, data >> 4], axis=-1).astype(int)


def read_q4_0(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    blocks = data.reshape(len(data), -1, 18)
    return whole(nibbles(blocks[..., 2:]) - 8, half(blocks[..., :2]))


def read_q4_1(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    blocks = data.reshape(len(data), -1, 20)
    scale, minimum = half(blocks[..., :2]), half(blocks[..., 2:4])
    zeros = -minimum.astype(np.float64) / scale
    assert np.array_equal(zeros, zeros.round())
    return whole(nibbles(blocks[..., 4:]) - zeros.astype(int), scale)


def read_q8_0(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    blocks = data.reshape(len(data), -1, 34)
    return whole(np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(int), half(blocks[..., :2]))


def whole(levels: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = len(levels)
    return levels.reshape(rows, -1), np.broadcast_to(scale, levels.shape).reshape(rows, -1)


BLOCKS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "Q4_0": read_q4_0,
    "Q4_1": read_q4_1,
    "Q8_0": read_q8_0,
}


def read_onnx(folder: Path, model_type: str) -> Layers:
    """By onnx's reader, and the definition of MatMulNBits in onnxruntime's ContribOperators.md."""
    import onnx

    graph = onnx.load(folder / "model.onnx").graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    layers = {}
    for node in graph.node:
        if node.op_type != "MatMulNBits" or not node.input[1].startswith("model.layers."):
            continue
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        codes, scales, *rest = (onnx.numpy_helper.to_array(arrays[name]) for name in node.input[1:])
        assert codes.dtype == np.uint8
        rows, blocks, _ = codes.shape
        levels = halves(codes.reshape(rows, -1), settings["bits"])[:, : settings["K"]]
        zeros: Any = 2 ** (settings["bits"] - 1)
        if rest:
            zeros = halves(rest[0].reshape(rows, -1), settings["bits"])[:, :blocks]
            zeros = np.repeat(zeros, settings["block_size"], axis=1)[:, : settings["K"]]
        scale = np.repeat(scales.reshape(rows, blocks), settings["block_size"], axis=1)[:, : settings["K"]]
        layers[node.input[1].removesuffix(".codes")] = levels - zeros, scale
    return layers


def halves(data: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return data.astype(int)
    return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1).astype(int)


READERS: dict[str, Callable[[Path, str], Layers]] = {
    "compressed-tensors": read_compressed_tensors,
    "gguf": read_gguf,
    "gptq": read_gptq,
    "onnx": read_onnx,
}

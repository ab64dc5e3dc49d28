"""ONNX, for onnxruntime and ONNX Runtime GenAI: a decoder with a KV cache, quantized layers as MatMulNBits of codes.

The graph is built here node by node, not traced, so it holds what the model does and nothing of how torch does it:
ONNX operators of opset 23 (RMSNormalization, RotaryEmbedding, Attention), and com.microsoft's MatMulNBits for every
quantized layer. Inputs and outputs have the names that optimum's ORTModelForCausalLM looks for:

    input_ids [B, L], attention_mask [B, P + L], position_ids [B, L]    int64
    past_key_values.N.key, .value [B, K, P, H]                          float32; P is 0 at first
    logits [B, L, V], present.N.key, .value [B, K, P + L, H]            float32

`genai_config.json` says these names, the shape of the cache and the tokens that end a text to ONNX Runtime GenAI, which
runs the folder as it is.

A quantized layer NAME has the initializers
    NAME.codes   uint8 [O, blocks, block * b / 8]: unsigned codes, two a byte at 4 bits, element 0 in the low half
    NAME.scales  float32 [O, blocks]
    NAME.zeros   uint8 [O, ceil(blocks * b / 8)], packed likewise; only with zero points (2^(b-1) otherwise)
with b 4 (codes of 2 to 4 bits) or 8, and blocks of a power of two, which repeat the scale where groups are longer.
A quantized embedding is gathered from such codes too, and shares them with the head tied to it. Everything else is kept
as it is stored and computed with in float32, so the only difference to the model is rounding of activations.

Letters: B batch, L new tokens, P past tokens, K key-value heads, H head size, D hidden size, V vocabulary, O, I, G as
in tensors.py, b bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llmqat
from llmqat.export.companions import keep_companions
from llmqat.export.description import ModelDescription, describe
from llmqat.export.settings import KEPT, WINDOWS, Settings, check_no_window, check_settings, stop_tokens
from llmqat.export.tensors import StoredWeight, check_language_model, stored_tensors
from llmqat.extras import require
from llmqat.files import folder_in_progress, give_usual_rights
from llmqat.models import heads_of
from llmqat.paths import user_path

_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
_TENSORS = frozenset({"tie_word_embeddings", "attention_bias", "mlp_bias"})
"""Settings that say which tensors there are; the graph has a node for each."""

ARCHITECTURES = {
    "llama": Settings(_TENSORS, _SILU),
    "mistral": Settings(_TENSORS | WINDOWS, _SILU),
    "qwen2": Settings(_TENSORS | WINDOWS, _SILU),
    "qwen3": Settings(_TENSORS | WINDOWS, _SILU),
}
"""Model types whose graph this file builds -> the settings that it takes care of."""

FILE, DATA_FILE, GENAI_FILE = "model.onnx", "model.onnx.data", "genai_config.json"
OPSET = 23
MICROSOFT = "com.microsoft"
KIND = "ONNX"
_INPUTS = ("input_ids", "attention_mask", "position_ids")
_LOGITS, _PAST, _PRESENT = "logits", "past_key_values.{}.{}", "present.{}.{}"
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""Settings of generation that ONNX Runtime GenAI has under the same names."""
_ELEMENTS = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float32: "FLOAT"}
_SMALLEST_BLOCK, _LARGEST_BLOCK, _PADDED_BLOCK = 16, 256, 32
_MASKED = float(torch.finfo(torch.float32).min)  # finite, so that a row with nothing to see makes no NaN


def write_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> dict[str, int]:
    """Writes a prepared or packed `model` and its tokenizer to `folder`; returns bytes by part.

    Args:
        model: of one of `ARCHITECTURES`; weights only are quantized.
        tokenizer: written beside `model.onnx`.
        folder: must not exist; appears whole or not at all.

    Raises:
        FileExistsError: `folder` exists.
        ImportError: the package onnx is not installed.
        ValueError: this writer cannot express the model; says what.
    """
    onnx = require("onnx", "writing ONNX")
    folder = user_path(folder, "folder")
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; choose another name")
    check_onnx(describe(model))
    graph = _Graph(onnx, *stored_tensors(model))
    _decoder(graph, model)
    proto = graph.model()
    sizes = {part: sum(graph.bytes[name] for name in names) for part, names in graph.parts().items()}
    with folder_in_progress(folder) as temporary:
        onnx.save_model(proto, temporary / FILE, save_as_external_data=True, location=DATA_FILE, size_threshold=1024)
        onnx.checker.check_model(temporary / FILE)  # the file: in memory it checks 2 GiB at most
        give_usual_rights(temporary)
        _write_config(model, temporary)
        _write_genai_config(model, tokenizer, temporary)
        tokenizer.save_pretrained(temporary)
        keep_companions(model, temporary)
        temporary.rename(folder)
    return sizes


def check_onnx(description: ModelDescription) -> None:
    """Raises for the first thing in a model's type, settings or schemes that this writer cannot express.

    Raises:
        ValueError: says what, and the way out.
    """
    config: Any = description.config
    check_language_model(description, ARCHITECTURES, KIND)
    check_settings(config, ARCHITECTURES[config.model_type], KIND)
    if ARCHITECTURES[config.model_type].written >= WINDOWS:
        check_no_window(config, KIND)
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in ("default", "linear", "llama3", "yarn"):  # frequencies that do not depend on the length
        raise ValueError(
            f"rope_type {rope_type!r} is not written to {KIND} here; default, linear, llama3, yarn are; {KEPT}"
        )
    rotary: Any = description.rotary
    rotated = 2 * len(rotary.inv_freq)
    if rotated != heads_of(config).size:
        raise ValueError(
            f"partial_rotary_factor: {rotated} of {heads_of(config).size} features of a head are rotated, which is not "
            f"written to {KIND} here; {KEPT}"
        )
    for layer in description.layers:
        _block_size(layer.name, layer.per_scale, layer.columns)


def _write_config(model: PreTrainedModel, folder: Path) -> None:
    config = deepcopy(model.config)
    for name in ("llmqat", "quantization_config"):  # the graph says it, and loaders would look for packed safetensors
        if hasattr(config, name):
            delattr(config, name)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def _write_genai_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes what ONNX Runtime GenAI has to know of the graph and of generation.

    Source: the configuration reference of ONNX Runtime GenAI, and its model builder.
    """
    config: Any = model.config
    search = {name: value for name in _SEARCH if (value := getattr(model.generation_config, name, None)) is not None}
    ends = list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *stop_tokens(model)) if i is not None))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    begin = tokenizer.bos_token_id
    settings = {
        "model": {
            "type": config.model_type,
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            **({} if begin is None else {"bos_token_id": begin}),
            "eos_token_id": ends,
            "pad_token_id": pad,
            "decoder": {
                "filename": FILE,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": heads_of(config).size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    **{name: name for name in _INPUTS},
                    "past_key_names": _PAST.format("%d", "key"),
                    "past_value_names": _PAST.format("%d", "value"),
                },
                "outputs": {
                    "logits": _LOGITS,
                    "present_key_names": _PRESENT.format("%d", "key"),
                    "present_value_names": _PRESENT.format("%d", "value"),
                },
            },
        },
        # The graph returns a cache that has grown; it does not write into one of full length.
        "search": {"max_length": config.max_position_embeddings, "past_present_share_buffer": False, **search},
    }
    (folder / GENAI_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# The decoder


def _decoder(graph: _Graph, model: PreTrainedModel) -> None:
    """Adds the whole model to `graph`."""
    config: Any = model.config
    size = heads_of(config).size
    cache = ["batch", config.num_key_value_heads, "past", size]
    grown = ["batch", config.num_key_value_heads, "total", size]
    columns = ("length", "total", "length")
    ids, visible, positions = (
        graph.input(name, "INT64", ["batch", last]) for name, last in zip(_INPUTS, columns, strict=True)
    )
    rotary: Any = model.get_submodule("model.rotary_emb")
    cos, sin = _angles(graph, positions, rotary.inv_freq.float(), float(rotary.attention_scaling))
    mask = _mask(graph, ids, visible)
    hidden = graph.gathered("model.embed_tokens", ids)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        past = [graph.input(_PAST.format(index, part), "FLOAT", cache) for part in ("key", "value")]
        present = [graph.output(_PRESENT.format(index, part), "FLOAT", grown) for part in ("key", "value")]
        normed = graph.norm(f"{layer}.input_layernorm", hidden, config.rms_norm_eps)
        mixed = _attention(graph, f"{layer}.self_attn", normed, (cos, sin, mask, *past), present, config, size)
        hidden = graph.node("Add", [hidden, mixed])
        normed = graph.norm(f"{layer}.post_attention_layernorm", hidden, config.rms_norm_eps)
        gate = graph.linear(f"{layer}.mlp.gate_proj", normed)
        gated = graph.node(
            "Mul",
            [graph.node("Mul", [gate, graph.node("Sigmoid", [gate])]), graph.linear(f"{layer}.mlp.up_proj", normed)],
        )
        hidden = graph.node("Add", [hidden, graph.linear(f"{layer}.mlp.down_proj", gated)])
    normed = graph.norm("model.norm", hidden, config.rms_norm_eps)
    logits = graph.output(_LOGITS, "FLOAT", ["batch", "length", config.vocab_size])
    tied = "lm_head" not in graph.weights and "lm_head.weight" not in graph.others
    graph.linear("model.embed_tokens" if tied else "lm_head", normed, logits)


def _attention(
    graph: _Graph,
    name: str,
    x: str,
    shared: Sequence[str],
    present: Sequence[str],
    config: Any,
    size: int,
) -> str:
    """Adds an attention layer; `shared` are cosines, sines, mask, past keys and past values."""
    cos, sin, mask, past_key, past_value = shared

    def heads(part: str) -> str:
        rows = graph.node("Reshape", [graph.linear(f"{name}.{part}_proj", x), graph.integers([0, 0, -1, size])])
        if f"{name}.{part}_norm.weight" in graph.others:
            rows = graph.norm(f"{name}.{part}_norm", rows, config.rms_norm_eps)
        return graph.node("Transpose", [rows], perm=[0, 2, 1, 3])

    query = graph.node("RotaryEmbedding", [heads("q"), cos, sin])
    key = graph.node("RotaryEmbedding", [heads("k"), cos, sin])
    mixed = graph.name("Attention")
    graph.add("Attention", [query, key, heads("v"), mask, past_key, past_value], [mixed, *present])
    rows = graph.node("Transpose", [mixed], perm=[0, 2, 1, 3])
    return graph.linear(f"{name}.o_proj", graph.node("Reshape", [rows, graph.integers([0, 0, -1])]))


def _angles(graph: _Graph, positions: str, frequencies: Tensor, factor: float) -> tuple[str, str]:
    """Returns cosines and sines [B, L, H / 2] of the positions [B, L]."""
    columns = graph.node("Unsqueeze", [graph.cast(positions, "FLOAT"), graph.integers([-1])])
    angles = graph.node("Mul", [columns, graph.array("inverse_frequencies", frequencies.numpy())])
    both = graph.node("Cos", [angles]), graph.node("Sin", [angles])
    if factor == 1.0:
        return both
    scale = graph.array("rotary_scale", np.array(factor, dtype=np.float32))
    return graph.node("Mul", [both[0], scale]), graph.node("Mul", [both[1], scale])


def _mask(graph: _Graph, ids: str, visible: str) -> str:
    """Returns what is added to attention scores, [B, 1, L, P + L]: 0 where a token sees, the least number elsewhere."""
    length = graph.node("Squeeze", [graph.node("Shape", [ids], start=1, end=2)])
    total = graph.node("Squeeze", [graph.node("Shape", [visible], start=1, end=2)])
    zero, one = graph.array("zero", np.array(0, np.int64)), graph.array("one", np.array(1, np.int64))
    rows = graph.node("Range", [graph.node("Sub", [total, length]), total, one])
    columns = graph.node("Range", [zero, total, one])
    before = graph.node("LessOrEqual", [columns, graph.node("Unsqueeze", [rows, graph.integers([-1])])])
    seen = graph.node("Unsqueeze", [graph.cast(visible, "BOOL"), graph.integers([1, 2])])
    allowed = graph.node("And", [before, seen])
    open_, closed = (
        graph.array("seen", np.array([0], dtype=np.float32)),
        graph.array("masked", np.array([_MASKED], dtype=np.float32)),
    )
    return graph.node("Where", [allowed, open_, closed])


# The graph


@dataclass
class _Graph:
    """An ONNX graph in the making; values are named by strings."""

    onnx: Any
    weights: dict[str, StoredWeight]
    others: dict[str, Tensor]
    nodes: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    initializers: dict[str, Any] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def input(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        """Adds an input; returns its name."""
        self.inputs.append(self._value(name, kind, shape))
        return name

    def output(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        """Adds an output, which a node is yet to make; returns its name."""
        self.outputs.append(self._value(name, kind, shape))
        return name

    def _value(self, name: str, kind: str, shape: Sequence[int | str]) -> Any:
        return self.onnx.helper.make_tensor_value_info(name, self._type(kind), list(shape))

    def _type(self, kind: str) -> int:
        return int(getattr(self.onnx.TensorProto, kind))

    def name(self, operator: str) -> str:
        """Returns a new name for what an operator makes."""
        return f"{operator}_{len(self.nodes)}"

    def add(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **options: Any
    ) -> None:
        """Adds a node."""
        label = f"{self.name(operator)}_node"
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, outputs, label, domain=domain, **options))

    def node(self, operator: str, inputs: Sequence[str], **options: Any) -> str:
        """Adds a node with one output; returns the output's name."""
        output = self.name(operator)
        self.add(operator, inputs, [output], **options)
        return output

    def cast(self, value: str, kind: str) -> str:
        """Returns `value` in another type."""
        return self.node("Cast", [value], to=self._type(kind))

    def array(self, name: str, values: np.ndarray) -> str:
        """Adds an initializer unless it is there; returns its name."""
        if name not in self.initializers:
            self.initializers[name] = self.onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
            self.bytes[name] = values.nbytes
        return name

    def integers(self, values: list[int]) -> str:
        """Returns the int64 vector `values`."""
        return self.array(f"integers_{'_'.join(map(str, values))}", np.array(values, dtype=np.int64))

    def tensor(self, name: str) -> str:
        """Returns a tensor that is not quantized as float32."""
        return self.cast(self.stored(name), "FLOAT")

    def stored(self, name: str) -> str:
        """Returns a tensor that is not quantized, as it is on disk."""
        if name not in self.initializers:
            tensor = self.others[name]
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            kind, shape = self._type(_ELEMENTS[tensor.dtype]), tuple(tensor.shape)
            self.initializers[name] = self.onnx.helper.make_tensor(name, kind, shape, data, raw=True)
            self.bytes[name] = len(data)
        return name

    def norm(self, name: str, x: str, epsilon: float) -> str:
        """Returns RMSNorm of x over its last dimension."""
        return self.node("RMSNormalization", [x, self.tensor(f"{name}.weight")], axis=-1, epsilon=epsilon)

    def linear(self, name: str, x: str, output: str | None = None) -> str:
        """Returns x [*, I] times the weight of the layer `name` transposed, plus its bias; named `output` if given."""
        bias = f"{name}.bias" if f"{name}.bias" in self.others else None
        last = output or self.name("Linear")
        product = self.name("Product") if bias else last
        if name in self.weights:
            codes, block, bits = self.blocks(name)
            weight = self.weights[name]
            shape = {"K": weight.layer.columns, "N": weight.layer.rows, "bits": bits, "block_size": block}
            self.add("MatMulNBits", [x, *codes], [product], MICROSOFT, **shape)
        else:
            transposed = self.node("Transpose", [self.tensor(f"{name}.weight")], perm=[1, 0])
            self.add("MatMul", [x, transposed], [product])
        if bias:
            self.add("Add", [product, self.tensor(bias)], [last])
        return last

    def gathered(self, name: str, ids: str) -> str:
        """Returns the rows [B, L, D] of the embedding `name` that `ids` [B, L] name."""
        if name not in self.weights:
            return self.cast(self.node("Gather", [self.stored(f"{name}.weight"), ids]), "FLOAT")
        (codes, scales, *zeros), _, bits = self.blocks(name)
        levels = self._numbers(self.node("Gather", [codes, ids]), bits)
        middle: str = self.array(f"middle_{bits}", np.array([2 ** (bits - 1)], dtype=np.float32))
        if zeros:
            count = self.integers([self.block_count(name)])
            packed = self._numbers(self.node("Gather", [zeros[0], ids]), bits)
            kept = self.node("Slice", [packed, self.integers([0]), count, self.integers([-1])])
            middle = self.node("Unsqueeze", [kept, self.integers([-1])])
        scale = self.node("Unsqueeze", [self.node("Gather", [scales, ids]), self.integers([-1])])
        rows = self.node("Mul", [self.node("Sub", [levels, middle]), scale])
        flat = self.node("Reshape", [rows, self.integers([0, 0, -1])])
        columns = self.integers([self.weights[name].layer.columns])
        return self.node("Slice", [flat, self.integers([0]), columns, self.integers([-1])])

    def _numbers(self, packed: str, bits: int) -> str:
        """Returns bytes [*, n] of packed numbers as float32 [*, n * 8 / bits]."""
        if bits == 8:
            return self.cast(packed, "FLOAT")
        low = self.node("BitwiseAnd", [packed, self.array("fifteen", np.array([15], dtype=np.uint8))])
        high = self.node("BitShift", [packed, self.array("four", np.array([4], dtype=np.uint8))], direction="RIGHT")
        parts = [self.node("Unsqueeze", [part, self.integers([-1])]) for part in (low, high)]
        pairs = self.node("Concat", parts, axis=-1)
        shape = self.node("Shape", [packed], start=0, end=-1)
        target = self.node("Concat", [shape, self.integers([-1])], axis=0)
        return self.cast(self.node("Reshape", [pairs, target]), "FLOAT")

    def block_count(self, name: str) -> int:
        """Returns the number of blocks in a row of the quantized weight `name`."""
        return int(self.initializers[f"{name}.scales"].dims[1])

    def blocks(self, name: str) -> tuple[list[str], int, int]:
        """Returns the initializers of the quantized weight `name` (codes, scales, zeros), block size and bits."""
        weight = self.weights[name]
        bits = 4 if weight.scheme.num_bits <= 4 else 8
        block = _block_size(name, weight.per_scale, weight.layer.columns)
        names = [f"{name}.codes", f"{name}.scales"] + ([] if weight.scheme.symmetric else [f"{name}.zeros"])
        if names[0] in self.initializers:
            return names, block, bits
        codes, zeros = weight.unsigned(bits)
        count = -(-weight.layer.columns // block)
        repeats = -(-count // weight.scale.shape[1])
        padded = torch.nn.functional.pad(codes, (0, count * block - weight.layer.columns))
        bytes_ = _packed_bytes(padded.numpy(), bits).reshape(weight.layer.rows, count, -1)
        self.array(names[0], bytes_)
        self.array(names[1], weight.scale.float().repeat_interleave(repeats, dim=1).numpy())
        if len(names) == 3:
            self.array(names[2], _packed_bytes(zeros.repeat_interleave(repeats, dim=1).numpy(), bits))
        return names, block, bits

    def parts(self) -> dict[str, list[str]]:
        """Returns the names of the initializers by what they hold."""
        groups: dict[str, list[str]] = {"codes": [], "scales": [], "zeros": [], "other": []}
        for name in self.initializers:
            leaf = name.rpartition(".")[2]
            groups[leaf if leaf in groups else "other"].append(name)
        return groups

    def model(self) -> Any:
        """Returns the finished model."""
        helper = self.onnx.helper
        graph = helper.make_graph(
            self.nodes, "decoder", self.inputs, self.outputs, initializer=list(self.initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=11, producer_name="llmqat", producer_version=llmqat.__version__
        )


def _block_size(name: str, per_scale: int, columns: int) -> int:
    """Returns the weights in a block: the largest power of two that divides `per_scale`, at most 256.

    With one scale for each row it is 32 where that power is below 16; the last block is then padded.

    Raises:
        ValueError: 16 does not divide the size of a group; names the layer.
    """
    block = min(per_scale & -per_scale, _LARGEST_BLOCK)
    if block >= _SMALLEST_BLOCK:
        return block
    if per_scale == columns:
        return _PADDED_BLOCK
    raise ValueError(
        f"{name} has a scale for {per_scale} weights; MatMulNBits needs groups that {_SMALLEST_BLOCK} divides"
    )


def _packed_bytes(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Returns unsigned numbers [R, C] as bytes: as they are, or two in a byte, the first in the low half."""
    if bits == 8:
        return numbers
    even = np.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2)))
    return even[:, 0::2] | (even[:, 1::2] << 4)

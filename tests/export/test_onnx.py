"""ONNX run by onnxruntime and ONNX Runtime GenAI: its own dequantized weights, its logits, decoding with the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel

from llmqat.export import load, save, write_onnx
from llmqat.layers import QuantLinear
from tests.export.test_formats import prepared
from tests.tiny import LLAMA3, VOCAB_SIZE, tiny_architecture, tiny_llama, tiny_qwen2, tiny_qwen3, tiny_tokenizer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama, all in 4 bits": (tiny_llama, {"group_size": 16, "embeddings": "int4"}),
    "llama, head of its own": (lambda: tiny_llama(tied=False), {"strategy": "channel", "lm_head": "int8"}),
    "llama 3's rotary": (lambda: tiny_llama(rope_parameters=LLAMA3), {"group_size": 32}),
    "qwen2 with zero points": (tiny_qwen2, {"group_size": 32, "symmetric": False}),
    "qwen3, all in 8 bits": (tiny_qwen3, {"preset": "int8", "embeddings": "int8"}),
    "odd width": (lambda: tiny_llama(intermediate_size=104), {"strategy": "channel", "ignore": ("re:.*o_proj",)}),
}


def session(folder: Path) -> Any:
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def run(
    graph: Any, ids: torch.Tensor, past: dict[str, np.ndarray] | None = None, visible: torch.Tensor | None = None
) -> dict[str, np.ndarray]:
    """Outputs by name for new tokens [B, L] after those in `past`."""
    before = 0 if past is None else past["past_key_values.0.key"].shape[2]
    visible = torch.ones(len(ids), before + ids.shape[1], dtype=torch.int64) if visible is None else visible
    positions = (visible.cumsum(1) - 1).clamp(min=0)[:, before:]
    feed = {"input_ids": ids, "attention_mask": visible, "position_ids": positions}
    values = {name: tensor.numpy() for name, tensor in feed.items()}
    for entry in graph.get_inputs()[3:]:
        values[entry.name] = np.zeros((len(ids), entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
    names = [entry.name for entry in graph.get_outputs()]
    return dict(zip(names, graph.run(None, values | (past or {})), strict=True))


def as_past(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    present = (name for name in outputs if name.startswith("present."))
    return {name.replace("present", "past_key_values"): outputs[name] for name in present}


def token_ids() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_model_s_and_decoding_with_the_cache_equals_a_full_forward(name: str, tmp_path: Path) -> None:
    make, changes = CASES[name]
    model = prepared(make(), **changes)
    save(model, tmp_path / "packed")
    write_onnx(model, tiny_tokenizer(), tmp_path / "onnx")
    graph, ids = session(tmp_path / "onnx"), token_ids()
    outputs = run(graph, ids)
    with torch.no_grad():
        expected = load(tmp_path / "packed", dtype=torch.float32, kernel="reference")(ids).logits.numpy()
    # Both sum in float32, in another order: a few hundred roundings of 2^-24 each.
    assert np.abs(outputs["logits"] - expected).max() < 1e-4 * np.abs(expected).max()
    start = run(graph, ids[:, :7])
    rest = run(graph, ids[:, 7:], as_past(start))
    assert np.allclose(rest["logits"], outputs["logits"][:, 7:], rtol=0, atol=1e-5)
    assert rest["present.1.value"].shape == outputs["present.1.value"].shape
    padded = run(graph, torch.cat([ids[:, :3], ids], dim=1), visible=torch.tensor([[0] * 3 + [1] * 12] * 2))
    assert np.allclose(padded["logits"][:, 3:], outputs["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("preset", ["int4", "int3", "int8"])
def test_onnxruntime_s_own_dequantized_weights_are_the_model_s(preset: str, symmetric: bool, tmp_path: Path) -> None:
    """MatMulNBits of the unit matrix: each entry is one weight times 1, so nothing is rounded."""
    model = prepared(tiny_qwen2(), preset, group_size=32, symmetric=symmetric)
    write_onnx(model, tiny_tokenizer(), tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "MatMulNBits"][:7]:
        layer = model.get_submodule(node.input[1].removesuffix(".codes"))
        assert isinstance(layer, QuantLinear)
        value = onnx.helper.make_tensor_value_info
        lonely = onnx.helper.make_graph(
            [node],
            "one",
            [value(node.input[0], onnx.TensorProto.FLOAT, [layer.columns, layer.columns])],
            [value(node.output[0], onnx.TensorProto.FLOAT, [layer.columns, layer.rows])],
            initializer=[arrays[name] for name in node.input[1:]],
        )
        opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
        proto = onnx.helper.make_model(lonely, opset_imports=opsets, ir_version=11)
        found = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        (product,) = found.run(None, {node.input[0]: np.eye(layer.columns, dtype=np.float32)})
        assert torch.equal(torch.tensor(product.T), layer.quantized_matrix(torch.float32)), node.input[1]


def test_files_beside_the_graph_say_what_the_model_is(tmp_path: Path) -> None:
    sizes = write_onnx(prepared(tiny_llama(), group_size=32), tiny_tokenizer(), tmp_path / "onnx")
    assert {path.name for path in (tmp_path / "onnx").iterdir()} >= {"model.onnx", "model.onnx.data", "config.json"}
    assert sizes["codes"] == 36864
    config = AutoConfig.from_pretrained(tmp_path / "onnx")
    assert config.model_type == "llama"
    assert not hasattr(config, "quantization_config")
    assert not hasattr(config, "llmqat")
    assert AutoTokenizer.from_pretrained(tmp_path / "onnx").chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("name", ["llama, all in 4 bits", "qwen2 with zero points", "qwen3, all in 8 bits"])
def test_genai_config_names_what_the_graph_has(name: str, tmp_path: Path) -> None:
    """Each name that ONNX Runtime GenAI will ask for is an input or output of the graph, and no other is left."""
    make, changes = CASES[name]
    write_onnx(prepared(make(), **changes), tiny_tokenizer(), tmp_path / "onnx")
    settings = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    decoder, graph = settings["model"]["decoder"], session(tmp_path / "onnx")
    layers = range(decoder["num_hidden_layers"])
    for side, entries in (("inputs", graph.get_inputs()), ("outputs", graph.get_outputs())):
        named = [pattern % layer for pattern in decoder[side].values() if "%d" in pattern for layer in layers]
        named += [pattern for pattern in decoder[side].values() if "%d" not in pattern]
        assert sorted(named) == sorted(entry.name for entry in entries)
    cache = next(entry for entry in graph.get_inputs() if entry.name == decoder["inputs"]["past_key_names"] % 0)
    assert cache.shape == ["batch", decoder["num_key_value_heads"], "past", decoder["head_size"]]
    assert graph.get_outputs()[-1].shape[-1] == settings["model"]["vocab_size"]
    assert settings["search"] == {"max_length": 256, "past_present_share_buffer": False}


@pytest.mark.parametrize("name", ["llama, all in 4 bits", "qwen2 with zero points", "qwen3, all in 8 bits"])
def test_genai_runs_the_folder_as_it_is(name: str, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    make, changes = CASES[name]
    model = prepared(make(), **changes)
    write_onnx(model, tiny_tokenizer(), tmp_path / "onnx")
    ids, graph = token_ids()[:1], session(tmp_path / "onnx")
    reader = genai.Model(str(tmp_path / "onnx"))
    settings = genai.GeneratorParams(reader)
    settings.set_search_options(max_length=ids.shape[1] + 8)
    generator = genai.Generator(reader, settings)
    generator.append_tokens(ids[0].tolist())
    assert np.allclose(generator.get_output("logits"), run(graph, ids)["logits"], rtol=0, atol=1e-5)
    while not generator.is_done():
        generator.generate_next_token()
        expected = run(graph, ids)["logits"][0, -1].argmax()
        assert generator.get_next_tokens()[0] == expected
        ids = torch.cat([ids, torch.tensor([[expected]])], dim=1)


@pytest.mark.parametrize("ends", [1, [1, 7]])
def test_genai_config_says_the_tokens_and_the_settings_of_generation(ends: int | list[int], tmp_path: Path) -> None:
    model, tokenizer = prepared(tiny_llama(), group_size=32), tiny_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=ends, do_sample=True, top_k=7, temperature=0.5)
    tokenizer.pad_token = None
    write_onnx(model, tokenizer, tmp_path / "onnx")
    settings = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    tokens = {name: value for name, value in settings["model"].items() if name.endswith("token_id")}
    assert tokens == {"bos_token_id": 0, "eos_token_id": ends if isinstance(ends, list) else [ends], "pad_token_id": 1}
    assert settings["search"] | {"do_sample": True, "top_k": 7, "temperature": 0.5} == settings["search"]


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (lambda: tiny_architecture("gemma2"), {"group_size": 32}, "model type 'gemma2'"),
        (tiny_llama, {"preset": "w4a8", "group_size": 32}, "quantized inputs"),
        (tiny_llama, {"preset": "w4a8kv8", "group_size": 32, "input_activations": None}, "quantized KV cache"),
        (tiny_llama, {"group_size": 8}, "scale for 8 weights"),
        (lambda: tiny_llama(hidden_act="gelu"), {"group_size": 32}, "hidden_act 'gelu'"),
        (lambda: tiny_architecture("mistral", sliding_window=16), {"group_size": 32}, "sliding-window"),
    ],
)
def test_what_is_not_written_is_refused(
    make: Callable[[], PreTrainedModel], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_onnx(prepared(make(), **changes), tiny_tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())

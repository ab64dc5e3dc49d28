"""Every setting of every model that is written without its config.json: in the file, or refused by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from llmqat import QuantConfig, prepare
from llmqat.export.gguf import ARCHITECTURES as GGUF
from llmqat.export.gguf import write_gguf
from llmqat.export.onnx import ARCHITECTURES as ONNX
from llmqat.export.onnx import write_onnx
from llmqat.export.settings import SHAPE, WITHOUT_EFFECT, Settings, check_settings
from llmqat.models import cast_parameters, load_model
from tests.export.test_gguf import fallback_tokenizer
from tests.tiny import LLAMA3, VOCAB_SIZE, tiny_model

TYPES = [("GGUF", name, entry.settings) for name, entry in GGUF.items()]
TYPES += [("ONNX", name, settings) for name, settings in ONNX.items()]
PASSED_ON = {"_attn_implementation", "get_text_config"}
"""What modeling code reads of a configuration that is no setting of the forward."""
ROPE: dict[str, Any] = {"rope_theta": 10_000.0}
LONG = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "relu"),
    "hidden_activation": ("gelu", "silu"),
    "attention_bias": (True,),
    "mlp_bias": (True,),
    "tie_word_embeddings": (True, False),
    "rms_norm_eps": (1e-2,),
    "num_key_value_heads": (1, 4),
    "head_dim": (32,),
    "max_position_embeddings": (64,),
    "original_max_position_embeddings": (64,),
    "sliding_window": (8,),
    "use_sliding_window": (True,),
    "layer_types": (["full_attention"] * 2, ["sliding_attention"] * 2),
    "query_pre_attn_scalar": (64,),
    "attn_logit_softcapping": (None, 3.0),
    "final_logit_softcapping": (None, 3.0),
    "use_bidirectional_attention": (True,),
    "pretraining_tp": (2,),
    "rope_parameters": (
        {**ROPE, "rope_type": "default", "rope_theta": 500.0},
        {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5},
        {**ROPE, "rope_type": "linear", "factor": 4.0},
        {**ROPE, "rope_type": "dynamic", "factor": 4.0},
        {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {**ROPE, "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, **LONG},
        LLAMA3,
    ),
}
"""Other values of the settings that change a forward."""
MORE: dict[str, dict[str, Any]] = {
    "sliding_window": {"use_sliding_window": True, "max_window_layers": 0},
    "use_sliding_window": {"sliding_window": 8, "max_window_layers": 0},
    "layer_types": {"use_sliding_window": True, "sliding_window": 8},
}
"""What a setting needs beside it to have an effect."""
BASE: dict[str, dict[str, Any]] = {
    # transformers reads the head sizes and scales of these from nowhere, and takes the default ones.
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "sliding_window": 8},
    "gemma3_text": {"head_dim": 256, "sliding_window": 8},
    "mistral": {"sliding_window": None},
    "phi3": {"pad_token_id": 1},
}
UNREAD = {
    "attention_bias": "blk.0.attn_q.bias",
    "mlp_bias": "blk.0.ffn_up.bias",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "linear": "rope.scaling.factor",
    "llama3": "rope_freqs.weight",
    "partial_rotary_factor": "rope.dimension_count",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
}
"""What transformers' reader leaves out of what GGUF holds and llama.cpp reads: it is then looked for in the file."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQAT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(("format", "model_type", "settings"), TYPES)
def test_the_writer_has_an_opinion_on_all_that_the_model_reads(
    format: str, model_type: str, settings: Settings
) -> None:
    """Fails when a release of transformers adds a setting to a model that is written here."""
    model = tiny_model(model_type, **BASE.get(model_type, {}))
    known = WITHOUT_EFFECT | SHAPE | settings.written | set(settings.assumed) | PASSED_ON
    kinds = {type(module) for module in model.modules() if type(module).__module__.startswith("transformers.models")}
    read = {name for kind in kinds for name in re.findall(r"\bconfig\.(\w+)", inspect.getsource(kind))}
    read |= {
        name for kind in kinds for name in re.findall(r"getattr\((?:self\.)?config, \"(\w+)\"", inspect.getsource(kind))
    }
    assert len(read) > 8
    assert read <= known
    assert set(type(model.config)().to_dict()) <= known


def cases() -> Iterator[Any]:
    for format, model_type, _ in TYPES:
        fields = type(tiny_model(model_type, **BASE.get(model_type, {})).config)().to_dict()
        for name in [name for name in VALUES if name in fields]:
            for number, value in enumerate(VALUES[name]):
                kind = value["rope_type"] if isinstance(value, dict) else number
                yield pytest.param(format, model_type, name, value, id=f"{format}-{model_type}-{name}-{kind}")


def other_model(model_type: str, name: str, value: Any) -> PreTrainedModel | None:
    """A model with another value of a setting, its biases random; None where the model has no such value."""
    if model_type == "gemma3_text" and isinstance(value, dict):
        value = {"full_attention": value, "sliding_attention": {**ROPE, "rope_type": "default"}}
    try:
        model = tiny_model(model_type, **{**BASE.get(model_type, {}), **MORE.get(name, {}), name: value})
    except (ValueError, KeyError, RuntimeError, StrictDataclassError):
        return None
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    prepare(model, QuantConfig.preset("int8", strategy="group", group_size=32))
    return model


@torch.no_grad()
def distance(model: PreTrainedModel, found: np.ndarray, ids: torch.Tensor) -> float:
    with cast_parameters(model, torch.bfloat16), torch.autocast("cpu", enabled=False):
        wanted = model(ids).logits[0].float().numpy()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("format", "model_type", "name", "value"), list(cases()))
def test_another_value_is_in_the_file_or_refused_by_name(
    format: str, model_type: str, name: str, value: Any, tmp_path: Path
) -> None:
    model = other_model(model_type, name, value)
    if model is None:
        return
    ids = torch.randint(3, 258, (1, 40), generator=torch.Generator().manual_seed(4))
    words = {"use_sliding_window": "sliding", "layer_types": "layer_types|sliding|full attention"}
    words |= {"rope_parameters": "rope|rotary", "attn_logit_softcapping": "softcapping|soft-capping"}
    words |= {"final_logit_softcapping": "softcapping|soft-capping", "tie_word_embeddings": "tie_word|lm_head"}
    path = tmp_path / "model.gguf" if format == "GGUF" else tmp_path
    if (refusal := written(model, format, path)) is not None:
        assert re.search(words.get(name, name), refusal), refusal
        assert not list(tmp_path.iterdir())
    elif format == "ONNX":
        assert distance(model, onnx_logits(path / "out", ids), ids) < 0.03
    elif (unread := unread_setting(name, value)) is not None or model_type == "gemma":
        reader = gguf.GGUFReader(path)
        held = [*reader.fields, *(tensor.name for tensor in reader.tensors)]
        assert unread is None or any(key.endswith(UNREAD[unread]) for key in held)
        # What transformers leaves out is put in its place when llmqat reads the file, or refused.
        assert (found := read_again(path, ids)) is None or distance(model, found, ids) < 0.03
    else:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.bfloat16)
        with torch.no_grad():
            assert distance(model, theirs(ids).logits[0].float().numpy(), ids) < 0.03


def written(model: PreTrainedModel, format: str, path: Path) -> str | None:
    """Writes a model to `path`; returns the message of a refusal."""
    tokenizer = fallback_tokenizer(prepends=True)
    tokenizer.pad_token = "</s>"
    try:
        if format == "GGUF":
            write_gguf(model, tokenizer, path)
        else:
            write_onnx(model, tokenizer, path / "out")
    except ValueError as error:
        return str(error)
    return None


def read_again(path: Path, ids: torch.Tensor) -> np.ndarray | None:
    """Returns the logits of a GGUF file as llmqat reads it; None where it refuses."""
    try:
        model = load_model(str(path))[0]
    except ValueError:
        return None
    with torch.no_grad():
        found: np.ndarray = model(ids).logits[0].float().numpy()
    return found


def unread_setting(name: str, value: Any) -> str | None:
    """Returns the key of `UNREAD` that a setting is, or None."""
    if not isinstance(value, dict):
        return name if name in UNREAD and value not in (None, False) else None
    kind = "partial_rotary_factor" if "partial_rotary_factor" in value else value["rope_type"]
    return kind if kind in UNREAD else None


def onnx_logits(folder: Path, ids: torch.Tensor) -> np.ndarray:
    from tests.export.test_onnx import run, session

    found: np.ndarray = run(session(folder), ids)["logits"][0]
    return found


def test_llama_cpp_computes_every_setting_that_is_written(tmp_path: Path) -> None:
    """Runs where llama-cpp-python is installed; `make` does not, as it takes minutes to compile."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ids = torch.randint(3, 258, (1, 40), generator=torch.Generator().manual_seed(4))
    done = 0
    for number, case in enumerate(cases()):
        format, model_type, name, value = case.values
        path = tmp_path / f"{number}.gguf"
        model = other_model(model_type, name, value) if format == "GGUF" else None
        if model is not None and written(model, format, path) is None:
            theirs = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
            theirs.eval(ids[0].tolist())
            # Its kernels round activations to 8 bits.
            assert distance(model, np.array(theirs.scores[:40]), ids) < 0.06, case.id
            done += 1
    assert done > 40


def test_an_entry_that_the_class_does_not_know_is_let_through_and_a_new_setting_is_not() -> None:
    config = LlamaConfig(vocab_size=VOCAB_SIZE, unsloth_version="1", transformers_js_config={})
    check_settings(config, GGUF["llama"].settings, "GGUF")
    with pytest.raises(ValueError, match=r"mlp_bias True of llama cannot be said in GGUF, .* compute with False"):
        check_settings(LlamaConfig(mlp_bias=True), Settings(GGUF["llama"].settings.written - {"mlp_bias"}), "GGUF")


def test_rotary_factors_of_llama_3_are_read_back(tmp_path: Path) -> None:
    model = tiny_model(
        "llama", rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192}, max_position_embeddings=16_384
    )
    prepare(model, QuantConfig.preset("int8", strategy="group", group_size=32))
    assert written(model, "GGUF", tmp_path / "model.gguf") is None
    read = load_model(str(tmp_path / "model.gguf"))[0]
    assert read.config.rope_parameters["rope_type"] == "llama3"
    assert torch.equal(read.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)

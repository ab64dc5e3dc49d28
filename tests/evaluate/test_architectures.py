"""The sweep over architectures (eval/architectures.py): a tenth of it, one of each kind, and what its table says."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eval.architectures import CHANGES, examined, headline, markdown, silent, tiny_config

KINDS = {
    "llama": "plain",
    "gpt2": "Conv1D, learned positions",
    "bloom": "ALiBi",
    "gptj": "rotary tables that follow the dtype",
    "falcon": "modeling code that reads weights while it is built",
    "bart": "a decoder of an encoder-decoder model",
    "mamba": "state space, a weight that is read",
    "jamba": "state space, attention and experts",
    "rwkv": "recurrent",
    "qwen3_next": "linear attention and experts",
    "mixtral": "stacked experts",
    "llama4_text": "experts without transformers' decorator",
    "gpt_oss": "transposed experts with biases",
    "jetmoe": "a router inside a router module",
    "deepseek_v32": "latent attention, an indexer",
    "gemma4_text": "inputs for each layer, shared keys and values",
    "gemma3": "towers",
    "zamba2": "blocks that share weights",
    "recurrent_gemma": "recurrent and attention",
}
"""Model type -> what it stands for."""


def test_a_tenth_of_the_architectures_is_examined_here() -> None:
    assert set(KINDS) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(KINDS) >= len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) // 10


@pytest.mark.parametrize("model_type", KINDS)
def test_nothing_is_wrong_in_silence(model_type: str, tmp_path: Path) -> None:
    row = examined(model_type, tmp_path)
    assert row["silent"] == []
    assert row["saved"] == "proved"
    assert row["loaded"].startswith(("equal", "within"))
    assert not row["walk"].startswith("crash"), row["walk"]
    assert row["training"].split(" of ")[0] > "0"


def test_sizes_are_given_for_architectures_that_exist() -> None:
    assert set(CHANGES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert tiny_config("gemma3").get_text_config().hidden_size == 64


SOUND = {
    "silent": [],
    "parameters": 10,
    "quantized": 0.9,
    "notes": [],
    "quantizers": 2,
    "without effect": [],
    "never run": [],
    "walk": "equal",
    "training": "2 of 2 moved",
    "saved": "proved",
    "said": [],
    "loaded": "equal",
    "stock": "equal",
}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"without effect": ["mixer.dt_proj"]}, "mixer.dt_proj"),
        ({"never run": ["mixer.dt_proj"]}, "mixer.dt_proj"),
        ({"quantized": 0.2}, "20%"),
        ({"walk": "DIFFERS by 0.7"}, "0.7"),
        ({"loaded": "DIFFERS by 0.3"}, "llmqat.load"),
        ({"stock": "24 tensors random: x"}, "transformers"),
    ],
)
def test_each_fault_counts_as_silent(change: dict[str, object], word: str) -> None:
    assert silent(SOUND) == []
    assert any(word in fault for fault in silent({**SOUND, **change}))
    assert (
        silent({**SOUND, **change, "notes": ["x"], "said": ["x"]}) == [] or "walk" in change or word != "transformers"
    )


def test_the_headline_counts_rows_and_the_table_has_each() -> None:
    rows = {
        "sound": SOUND,
        "lost": {**SOUND, "saved": "refused: ProofError", "loaded": "", "stock": ""},
        "odd": {"silent": [], "not built": "ImportError: timm"},
        "no": {"silent": [], "parameters": 3, "refused": "ValueError: x | y"},
    }
    assert headline(rows) == {
        "entries": 4,
        "built and run": 3,
        "refused before training": 1,
        "saved and reloaded equal": 1,
        "equal in plain transformers": 1,
        "crashed": 1,
        "silent": 0,
    }
    table = markdown(rows, {"torch": "1"})
    assert all(f"| {name} |" in table for name in rows)
    assert "x / y" in table

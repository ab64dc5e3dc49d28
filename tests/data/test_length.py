"""The tokens that a model reads at most: found in the model, and checked before a text is read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import llmqat
from llmqat.calibrate import RangesStage, calibrate
from llmqat.data import DataConfig, load_splits
from llmqat.data.length import check_length, table_length
from llmqat.evaluate.loading import check_window
from llmqat.evaluate.perplexity import evaluate
from llmqat.recipe import load_recipe
from llmqat.recipe.chat import Conversation
from llmqat.recipe.plan import plan_run
from llmqat.recipe.quantize import quantize_model, sensitivity_of
from tests.tiny import tiny_gpt2, tiny_llama, tiny_model, tiny_tokenizer

MOST = 64
LEARNED: dict[str, dict[str, Any]] = {
    "gpt2": {"max_position_embeddings": MOST},
    "gpt_neo": {
        "max_position_embeddings": MOST,
        "num_layers": 2,
        "attention_types": [[["global"], 2]],
    },
    "gptj": {"max_position_embeddings": MOST, "rotary_dim": 8},
    "opt": {"max_position_embeddings": MOST, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "biogpt": {"max_position_embeddings": MOST},
    "openai-gpt": {"max_position_embeddings": MOST},
    "roberta": {"max_position_embeddings": MOST + 2, "is_decoder": True},
    "bart": {"max_position_embeddings": MOST, "decoder_layers": 2, "d_model": 64, "decoder_ffn_dim": 64},
}
"""Architectures that learn a row for each position; RoBERTa keeps two for padding."""
UNLIMITED: dict[str, dict[str, Any]] = {
    "bloom": {},
    "falcon": {"alibi": True, "max_position_embeddings": MOST},
    "mamba": {},
}
"""Architectures that read any length: linear biases, states."""


def model_of(model_type: str, changes: dict[str, Any]) -> PreTrainedModel:
    if model_type in ("bart", "roberta", "mamba"):
        sizes = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "decoder_attention_heads": 4}
        sizes |= {"num_attention_heads": 4, "intermediate_size": 128}
        known = AutoConfig.for_model(model_type)
        shape = {name: value for name, value in sizes.items() if hasattr(known, name) and name not in changes}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape, **changes)).eval()
    return tiny_model(model_type, **changes)


def forward(model: PreTrainedModel, length: int) -> None:
    with torch.no_grad():
        model(input_ids=torch.full((1, length), 5), use_cache=False)


@pytest.mark.parametrize("model_type", LEARNED)
def test_the_table_of_positions_is_found_whatever_it_is_called(model_type: str):
    model = model_of(model_type, LEARNED[model_type])
    assert table_length(model) == MOST
    forward(model, MOST)
    with pytest.raises((IndexError, RuntimeError)):
        forward(model, MOST + 1)
    check_length(model, MOST, "window")
    with pytest.raises(ValueError, match=f"window={MOST + 1} is more than the {MOST} positions"):
        check_length(model, MOST + 1, "window")


@pytest.mark.parametrize("model_type", UNLIMITED)
def test_a_model_without_positions_reads_any_length(model_type: str, caplog: pytest.LogCaptureFixture):
    model = model_of(model_type, UNLIMITED[model_type])
    check_length(model, 4 * MOST, "window")
    forward(model, 4 * MOST)
    assert not [record for record in caplog.records if record.name.startswith("llmqat")]


def test_rotary_positions_beyond_the_configured_ones_are_warned_of_once(caplog: pytest.LogCaptureFixture):
    model = tiny_llama(max_position_embeddings=MOST)
    with caplog.at_level(logging.WARNING, "llmqat"):
        for _ in range(2):
            check_length(model, MOST + 1, "window")
    assert [record.getMessage()[:40] for record in caplog.records] == ["window=65 is more than the 64 positions "]


def test_a_length_that_only_a_forward_can_tell_is_tried():
    model = tiny_model("mpt", max_seq_len=MOST, d_model=64, n_heads=4, n_layers=2)
    assert table_length(model) is None
    for _ in range(2):
        with pytest.raises(ValueError, match=f"more than the {MOST} tokens that MptForCausalLM takes"):
            check_length(model, MOST + 1, "window")


# Every command


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    tiny_gpt2(max_position_embeddings=MOST).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a small text of some words. " * 40)
    return tmp_path / "model"


def recipe_of(gpt2: Path, **changes: str) -> Any:
    file = gpt2.parent / "recipe.yaml"
    keys = {"block": "32", "window": "32", **changes}
    file.write_text(
        f"model: {gpt2}\noutput: {gpt2.parent / 'run'}\nquant: {{preset: int4, group_size: 32}}\ncalibrate: []\n"
        f"data: {{source: text, path: {gpt2.parent / 'text.txt'}, block_size: {keys['block']}}}\n"
        "train: {max_steps: 1, bf16: false, use_cpu: true, disable_tqdm: true}\nmonitor: null\n"
        f"evaluate: {{texts: [{gpt2.parent / 'text.txt'}], window: {keys['window']}, allow_trained_text: true}}\n"
    )
    return load_recipe(file)


def test_every_command_that_cuts_a_text_refuses_more_than_the_learned_positions(gpt2: Path):
    text, refused = gpt2.parent / "text.txt", pytest.raises(ValueError, match=f"than the {MOST} positions")
    allocation = llmqat.recipe.config.AllocationConfig(target_bits=4, blocks=1)
    with refused:
        quantize_model(str(gpt2), gpt2.parent / "out", group_size=32, method="search", text=text, block_size=65)
    with refused:
        sensitivity_of(str(gpt2), allocation, group_size=32, text=text, block_size=65)
    with refused:
        plan_run(recipe_of(gpt2, block="65"))
    with refused:
        llmqat.recipe.run(recipe_of(gpt2, block="65"))
    with refused:
        llmqat.recipe.run(recipe_of(gpt2, window="65"), overwrite=True)
    with refused:
        check_window(str(gpt2), 65)
    model, ids = tiny_gpt2(max_position_embeddings=MOST), torch.randint(384, (1, 65))
    with refused:
        evaluate(model, ids)
    with refused:
        calibrate(model, llmqat.QuantConfig.preset("int4", group_size=32), [RangesStage()], ids)
    with refused:
        load_splits(DataConfig(source="text", path=text, block_size=65), tiny_tokenizer(), model)
    with pytest.raises(ValueError, match=f"context of {MOST} tokens"):
        load_splits(DataConfig(block_size=65, tokens=65), tiny_tokenizer(), model)


def test_an_answer_ends_where_the_positions_end(gpt2: Path):
    talk = Conversation.open(str(gpt2), max_new_tokens=500, temperature=0, seed=0)
    talk.say("hello")
    with pytest.raises(ValueError, match=f"has learned {MOST} positions; begin a new one"):
        talk.say("and more " * 20)

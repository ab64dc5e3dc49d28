"""The stages on the real model: its last two blocks, from the full-precision model to the packed checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import llmqat
from llmqat.calibrate import BlockwiseStage, GPTQStage, RangesStage, calibrate
from llmqat.data import DataConfig, load_blocks


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_comes_nearer_with_each_stage_and_is_saved_as_it_is(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    full, tokenizer = smollm2
    model = copy.deepcopy(full)
    ids = load_blocks(DataConfig(source="pydoc", tokens=8 * 128, block_size=128), tokenizer, full).ids
    quant = llmqat.QuantConfig.preset("int3", group_size=64, skip_first=28)
    stages = [RangesStage(blocks=8), BlockwiseStage(blocks=8, iterations=8), GPTQStage(blocks=8)]
    reports = calibrate(model, quant, stages, ids, folder=tmp_path / "kept")
    plain, (searched, trained, rounded) = reports[0].kl_before, (report.kl_after for report in reports)
    assert searched < 0.75 * plain
    assert trained < 0.95 * searched
    assert rounded < 0.75 * trained
    llmqat.save(model, tmp_path / "model", tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(stock(ids[:1]).logits, model.eval()(ids[:1]).logits)

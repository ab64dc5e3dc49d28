"""Random inputs of a tiny forward, for models of every kind."""

from __future__ import annotations

import pytest
import torch

from llmqat.layers.probe import probe_inputs
from tests.layers.test_architectures import t5, whisper
from tests.tiny import ARCHITECTURES, tiny_architecture


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_probe_runs_and_is_the_same_each_time(model_type: str) -> None:
    model = tiny_architecture(model_type)
    inputs = probe_inputs(model, rows=2, length=6)
    assert inputs["input_ids"].shape == (2, 6)
    assert not set(inputs["input_ids"].flatten().tolist()) & {0, 1}, "beginning, end and padding are no text"
    assert torch.equal(inputs["input_ids"], probe_inputs(model, rows=2, length=6)["input_ids"])
    assert not torch.equal(inputs["input_ids"], probe_inputs(model, rows=2, length=6, seed=1)["input_ids"])
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == (2, 6)


@pytest.mark.parametrize("make", [t5, whisper])
def test_an_encoder_and_a_decoder_both_get_inputs(make) -> None:  # type: ignore[no-untyped-def]
    model, _, _ = make()
    inputs = probe_inputs(model, length=6)
    assert set(inputs) == {model.main_input_name, "decoder_input_ids"}
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == (1, 6)


def test_a_model_of_other_inputs_is_refused_by_name() -> None:
    model = tiny_architecture("llama")
    model.main_input_name = "pixel_values"
    with pytest.raises(ValueError, match=r"LlamaForCausalLM takes pixel_values"):
        probe_inputs(model)

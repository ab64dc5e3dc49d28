from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from llmqat.data import decode
from llmqat.data.decode import LockstepDecoder, StockDecoder, lockstep_attention_in, lockstep_obstacle, open_decoder
from llmqat.kernels import graphs
from llmqat.layers import QuantConfig, prepare
from tests.graphs import Run, holds_nothing, record_on_a_cpu
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_model, tiny_qwen2, tiny_qwen3

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama with grouped queries": tiny_llama,
    "llama without": lambda: tiny_llama(num_key_value_heads=4),
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
}
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PIECE", 4)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    return record_on_a_cpu(monkeypatch)


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoded(decoder: LockstepDecoder | StockDecoder, ids: Tensor, starts: Tensor) -> Tensor:
    steps = zip(ids.unbind(1), starts.unbind(1), strict=True)
    return torch.stack([decoder.step(*pair).clone() for pair in steps], dim=1)


@pytest.mark.parametrize("by_graph", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_lockstep_logits_are_those_of_a_full_forward(name: str, by_graph: bool, recorded: list[Run]):
    model, ids = MODELS[name](), random_ids(3, 19)
    with lockstep_attention_in(model):
        found = decoded(LockstepDecoder(model, ids.shape[1], by_graph), ids, torch.zeros_like(ids))
    torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert len(recorded) == by_graph  # one graph serves every position


@torch.no_grad()
def test_a_step_that_cannot_be_recorded_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch, recorded: list[Run]):
    monkeypatch.setattr(graphs, "_record", holds_nothing)
    model, ids = tiny_llama(), random_ids(3, 19)
    with lockstep_attention_in(model):
        found = decoded(LockstepDecoder(model, ids.shape[1], by_graph=True), ids, torch.zeros_like(ids))
    torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [LockstepDecoder, StockDecoder])
@torch.no_grad()
def test_a_document_does_not_see_what_lies_before_it_in_its_row(kind: type[LockstepDecoder | StockDecoder]):
    model, ids = tiny_llama(), random_ids(2, 15)
    begins = [(0, 6, 9), (0, 1)]
    starts = torch.tensor([[max(b for b in row if b <= position) for position in range(15)] for row in begins])
    with open_decoder(model, 15) as decoder:
        assert isinstance(decoder, LockstepDecoder)
        found = decoded(decoder if kind is LockstepDecoder else StockDecoder(tiny_llama()), ids, starts)
    for row, at in enumerate(begins):
        for begin, end in zip(at, (*at[1:], 15), strict=True):
            alone = model(ids[row : row + 1, begin:end]).logits
            torch.testing.assert_close(found[row : row + 1, begin:end], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by_graph", [False, True])
@torch.no_grad()
def test_rows_that_are_kept_go_on_as_before(by_graph: bool, recorded: list[Run]):
    model, ids = tiny_llama(), random_ids(5, 19)
    rows, found = torch.arange(5), []
    with lockstep_attention_in(model):
        decoder = LockstepDecoder(model, ids.shape[1], by_graph)
        for position in range(ids.shape[1]):
            for at, kept in ((6, [4, 0, 2]), (9, [0, 2]), (12, [1])):  # PIECE is 4: within a piece, and between two
                if position == at:
                    decoder.keep(torch.tensor(kept))
                    rows = rows[kept]
            logits = decoder.step(ids[rows, position], torch.zeros(len(rows), dtype=torch.int64))
            found += [(int(row), position, one.clone()) for row, one in zip(rows, logits, strict=True)]
    assert rows.tolist() == [2]
    expected = model(ids).logits
    for row, position, one in found:
        torch.testing.assert_close(one, expected[row, position], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_logits_are_as_near_to_float32_as_stock_ones():
    exact, model, ids = tiny_llama(), tiny_llama().to(torch.bfloat16), random_ids(4, 33)
    expected = exact(ids).logits
    with lockstep_attention_in(model):
        found = decoded(LockstepDecoder(model, ids.shape[1]), ids, torch.zeros_like(ids))
    error, stock_error = ((logits.float() - expected).norm() for logits in (found, model(ids).logits))
    assert error < 1.5 * stock_error


@pytest.mark.real
@torch.no_grad()
def test_the_real_model_in_bfloat16(smollm2: tuple[PreTrainedModel, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "PIECE", 16)
    model = smollm2[0]
    ids = torch.randint(20, 49152, (2, 20), generator=torch.Generator().manual_seed(0))
    with lockstep_attention_in(model):
        found = decoded(LockstepDecoder(model, ids.shape[1]), ids, torch.zeros_like(ids)).float().log_softmax(-1)
    expected = model(ids).logits.float().log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    assert divergence.mean() < 0.005  # nats; the stock cached forward is at 0.002, and itself 0.0016 from float32


def test_the_model_is_left_as_it_was():
    model = tiny_llama()
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), open_decoder(model, 8):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)), "window of 8"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=64)), "softcap"),
    ],
)
def test_other_attention_falls_back_and_says_why(
    model: Callable[[], PreTrainedModel], reason: str, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING), open_decoder(model().eval(), 16) as decoder:
        assert isinstance(decoder, StockDecoder)
    assert reason in caplog.text


STATES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "time_step_rank": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "mamba_d_state": 8, "num_experts": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("model_type", STATES)
@torch.no_grad()
def test_layers_with_a_state_begin_each_document_without_one(model_type: str):
    model = tiny_model(model_type, **STATES[model_type])
    ids = random_ids(2, 12).clamp(min=3)
    starts = torch.tensor([[0] * 12, [0] * 5 + [5] * 7])
    with open_decoder(model, 12) as decoder:
        assert isinstance(decoder, StockDecoder)
        found = decoded(decoder, ids, starts)
    for row, begin, end in ((0, 0, 12), (1, 0, 5), (1, 5, 12)):
        alone = model(input_ids=ids[row : row + 1, begin:end], use_cache=False).logits
        torch.testing.assert_close(found[row : row + 1, begin:end], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["rwkv", "recurrent_gemma"])
def test_a_model_whose_decoding_gives_other_logits_is_refused(model_type: str):
    sizes = {"rwkv": {"attention_hidden_size": 64}, "recurrent_gemma": {"lru_width": 64, "num_hidden_layers": 3}}
    with (
        pytest.raises(ValueError, match=r"cannot write text: its logits, token by token.* give text"),
        open_decoder(tiny_model(model_type, **sizes[model_type]), 16),
    ):
        pass


def test_layers_that_all_slide_are_an_obstacle():
    model = tiny_model("qwen3", layer_types=["sliding_attention"] * 2, sliding_window=8, use_sliding_window=True)
    assert "window of 8 tokens is shorter than 24" in str(lockstep_obstacle(model, 24))
    assert lockstep_obstacle(model, 8) is None


def test_a_long_enough_window_is_no_obstacle():
    with open_decoder(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=64)).eval(), 16) as decoder:
        assert isinstance(decoder, LockstepDecoder)


def test_quantized_keys_and_values_are_not_left_out():
    model = tiny_llama().to(torch.bfloat16)
    prepare(model, QuantConfig.preset("w8a8kv8"))
    assert decode.lockstep_obstacle(model, 16) == "its keys and values are quantized"


def test_an_unaware_attention_is_reported():
    with pytest.raises(decode.LockstepError, match="does not hand keywords down"):
        decode.lockstep_attention(nn.Identity(), *[torch.zeros(1, 1, 1, 4)] * 3, None)

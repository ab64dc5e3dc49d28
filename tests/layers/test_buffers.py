"""Buffers that no checkpoint holds: training computes with those that a loaded model has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmqat import QATArguments, QATTrainer, QuantConfig, load, prepare, save
from llmqat.layers.buffers import float_buffers
from llmqat.models import cast_parameters
from tests.tiny import tiny_llama, tiny_model

CONFIG = QuantConfig.preset("int4", group_size=16)


def ids(rows: int = 2, length: int = 20) -> Tensor:
    return torch.randint(2, 258, (rows, length), generator=torch.Generator().manual_seed(5))


def gptj() -> PreTrainedModel:
    return tiny_model("gptj", n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256)


def minimax() -> PreTrainedModel:
    return tiny_model("minimax", num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64)


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "codegen": lambda: tiny_model("codegen", n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256, n_ctx=256),
    "gemma2": lambda: tiny_model("gemma2"),
    "gptj": gptj,
    "llama": tiny_llama,
    "minimax": minimax,
    "xglm": lambda: tiny_model("xglm", d_model=64, ffn_dim=128, num_layers=2, attention_heads=4),
}
"""Buffers that follow the dtype, that do not, that are made in it, that are saved."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_has_the_buffers_that_transformers_gives_it(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MAKERS[name]()
    model.save_pretrained(tmp_path / "plain")
    stock = dict(float_buffers(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)))
    prepare(model, CONFIG)
    save(model, tmp_path / "packed", dtype=dtype)
    loaded = dict(float_buffers(load(tmp_path / "packed")))
    with cast_parameters(model, dtype):
        trained = dict(float_buffers(model))
    for buffer, (wanted, _) in stock.items():
        assert loaded[buffer][0].dtype == trained[buffer][0].dtype == wanted.dtype, buffer
        assert torch.equal(loaded[buffer][0], wanted), buffer
        assert torch.equal(trained[buffer][0], wanted), buffer


def to_bfloat16(model: PreTrainedModel) -> object:
    return model.to(torch.bfloat16)


def to_half_and_back(model: PreTrainedModel) -> object:
    return model.half().float()


def read_a_long_text(model: PreTrainedModel) -> object:
    return model(ids(1, 80))


@pytest.mark.parametrize("after", [False, True], ids=["before prepare", "after it"])
@pytest.mark.parametrize("change", [to_bfloat16, PreTrainedModel.half, to_half_and_back, read_a_long_text])
@pytest.mark.parametrize("name", ["gemma2", "gptj"])
def test_a_model_that_was_cast_trains_and_is_saved(
    name: str, change: Callable[[PreTrainedModel], object], after: bool, tmp_path: Path
) -> None:
    model = MAKERS[name]()
    teacher = copy.deepcopy(model)
    if not after:
        change(model)
    prepare(model, CONFIG)
    if after:
        change(model)
    arguments = QATArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        learning_rate=1e-3,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids(4)]
    QATTrainer(model=model, teacher=teacher, args=arguments, train_dataset=rows).train()
    save(model, tmp_path / "out")  # proved
    assert all(
        parameter.dtype == torch.float32 for key, parameter in model.named_parameters() if key.endswith("log_scale")
    )


def test_rounded_frequencies_are_given_back() -> None:
    model = tiny_llama()
    wanted = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), wanted)
    prepare(model, CONFIG)
    assert torch.equal(model.model.rotary_emb.inv_freq, wanted)


def test_a_changed_buffer_is_refused_by_name() -> None:
    model = tiny_llama()
    model.model.rotary_emb.inv_freq.mul_(1.01)
    with pytest.raises(ValueError, match=r"buffer model.rotary_emb.inv_freq of LlamaForCausalLM is not what"):
        prepare(model, CONFIG)


def test_frequencies_that_follow_the_text_begin_anew() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = tiny_llama(max_position_embeddings=32, rope_parameters=rope)
    wanted = model.model.rotary_emb.inv_freq.clone()
    model(ids(1, 80))
    assert not torch.equal(model.model.rotary_emb.inv_freq, wanted)
    prepare(model, CONFIG)
    assert torch.equal(model.model.rotary_emb.inv_freq, wanted)


def test_buffers_are_put_back_after_a_forward_in_another_dtype() -> None:
    model = gptj()
    prepare(model, CONFIG)
    before = {name: buffer for name, (buffer, _) in float_buffers(model)}
    with cast_parameters(model, torch.bfloat16):
        model(ids())
    after = {name: buffer for name, (buffer, _) in float_buffers(model)}
    assert all(after[name] is buffer for name, buffer in before.items())

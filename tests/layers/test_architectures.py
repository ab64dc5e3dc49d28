"""Every architecture through every step: prepare, train, convert, save, load; the exact list of what was quantized."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from llmqat import QATArguments, QATTrainer, QuantConfig, convert, load, prepare, save
from llmqat.layers import KVCacheConfig, KVQuantizer, PackedModule, QuantModule, attention_layers
from llmqat.models import cast_parameters
from tests.tiny import ARCHITECTURES, linear_names, tiny_architecture

BYPASS = {"bloom", "falcon"}


def ids(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(2, 258, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    with cast_parameters(model, torch.bfloat16):
        return model(input_ids=ids()).logits


def quantized_names(model: nn.Module, kind: type) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture_goes_through_every_step(model_type: str, tmp_path: Path) -> None:
    teacher = tiny_architecture(model_type)
    model = copy.deepcopy(teacher)
    report = prepare(model, QuantConfig.preset("int4", group_size=32))
    expected = linear_names(model_type)
    assert quantized_names(model, QuantModule) == expected
    assert {entry.name.removesuffix(".weight") for entry in report.quantized} == expected
    assert not torch.equal(logits(model), logits(teacher))

    before = {name: module.weight.detach().clone() for name, module in model.named_modules() if name in expected}
    arguments = QATArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    data = [{"input_ids": row, "labels": row} for row in ids(4)]
    trainer = QATTrainer(model=model, teacher=teacher, args=arguments, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    for name, old in before.items():
        module = model.get_submodule(name)
        assert not torch.equal(module.weight, old), name
        assert module.log_scale.abs().max() > 0, name

    model.eval()
    trained = logits(model)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", kernel="reference")
    assert quantized_names(loaded, PackedModule) == expected
    assert torch.equal(logits(loaded), trained)
    converted = convert(model)
    for module in converted.modules():
        if hasattr(module, "kernel"):
            module.kernel = "reference"
    assert torch.equal(logits(converted), trained)


@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - BYPASS))
def test_every_attention_layer_reads_quantized_keys_and_values(
    model_type: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_architecture(model_type)
    plain = logits(model)
    prepare(model, QuantConfig(targets=(), kv_cache=KVCacheConfig()))
    calls: list[KVQuantizer] = []
    forward = KVQuantizer.forward

    def counted(self: KVQuantizer, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(self)
        return forward(self, key, value)

    monkeypatch.setattr(KVQuantizer, "forward", counted)
    quantized = logits(model)
    assert len(calls) == len({id(call) for call in calls}) == model.config.num_hidden_layers
    error = (quantized - plain).abs().mean() / plain.std()  # the mean: a router may choose another expert for a token
    assert 0 < error < 0.1  # 8 bits move logits a little; a lost mask or a wrong head would move them far


@pytest.mark.parametrize("model_type", sorted(BYPASS))
def test_attention_past_the_interface_is_refused_by_name(model_type: str) -> None:
    model = tiny_architecture(model_type)
    with pytest.raises(ValueError, match=rf"Attention of {model_type} computes attention by itself"):
        prepare(model, QuantConfig.preset("w4a8kv8", group_size=32))
    assert not quantized_names(model, QuantModule)
    with pytest.raises(ValueError, match=model_type):
        attention_layers(model)


def test_an_unknown_model_works_by_module_type_and_the_audit_shows_what_was_left() -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) ** 2

    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)
            self.odd = Odd(64, 64)
            self.table = nn.Parameter(torch.randn(3, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.odd(self.inner(x)) + self.table.sum()

    model = Unknown()
    report = prepare(model, QuantConfig.preset("int4", group_size=32))
    assert [entry.name for entry in report.quantized] == ["inner.weight"]
    reasons = {entry.name: entry.reason for entry in report.kept}
    assert reasons["odd.weight"] == "Odd has a forward of its own"
    assert "not a quantized module type" in reasons["table"]


def test_routers_stay_in_high_precision() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(64, 4)
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    report = prepare(Mixture(), QuantConfig.preset("int4", group_size=32))
    assert {entry.name for entry in report.quantized} == {f"experts.{index}.weight" for index in range(4)}
    assert {entry.reason for entry in report.kept if entry.name == "gate.weight"} == {"router, stays in high precision"}


def t5() -> tuple[PreTrainedModel, dict[str, torch.Tensor], int]:
    config = T5Config(
        vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    # Self-attention (4) and feed-forward (2) in each layer, cross-attention (4) in the decoder's.
    return T5ForConditionalGeneration(config).eval(), {"input_ids": ids(), "decoder_input_ids": ids()}, 2 * 6 + 2 * 10


def whisper() -> tuple[PreTrainedModel, dict[str, torch.Tensor], int]:
    config = WhisperConfig(
        vocab_size=384,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=20,
        max_target_positions=40,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids()}
    return WhisperForConditionalGeneration(config).eval(), inputs, 2 * 6 + 2 * 10


@pytest.mark.parametrize("make", [t5, whisper])
def test_encoder_decoder_models_are_prepared_and_converted(make) -> None:  # type: ignore[no-untyped-def]
    model, inputs, count = make()
    report = prepare(model, QuantConfig.preset("w4a8", group_size=32))
    assert len(report.quantized) == count
    with torch.no_grad():
        prepared = model(**inputs).logits
        convert(model, torch.float32)
        for module in model.modules():
            if hasattr(module, "kernel"):
                module.kernel = "reference"
        assert torch.equal(model(**inputs).logits, prepared)

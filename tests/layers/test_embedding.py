"""Quantized embeddings and heads: tied, untied, scaled, trained, packed, saved and reloaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmqat import QATArguments, QATTrainer, QuantConfig, convert, load, prepare, save
from llmqat.layers import PackedEmbedding, PackedLinear, QuantEmbedding, QuantLinear, TiedHead, quantizers_off
from llmqat.models import cast_parameters, head_weight, vocabulary_size
from tests.tiny import VOCAB_SIZE, tiny_architecture, tiny_llama

MODELS = {
    "tied": tiny_llama,
    "untied": lambda: tiny_llama(tied=False),
    "tied and scaled": lambda: tiny_architecture("gemma3_text"),
    "tied conv": lambda: tiny_architecture("gpt2"),
}


def ids() -> torch.Tensor:
    return torch.randint(2, 258, (2, 16), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    with cast_parameters(model, torch.bfloat16):
        return model(input_ids=ids()).logits


def prepared(name: str, policy: str) -> PreTrainedModel:
    model = MODELS[name]()
    prepare(model, QuantConfig.preset("int4", group_size=32, embeddings=policy, lm_head=policy))
    for module in model.modules():
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            with torch.no_grad():
                module.log_scale.normal_(std=0.1)
    return model


@pytest.mark.parametrize("policy", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_and_head_go_end_to_end(name: str, policy: str, tmp_path: Path) -> None:
    model = prepared(name, policy)
    tied = name != "untied"
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), TiedHead if tied else QuantLinear)
    expected = logits(model)
    report = save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", kernel="reference")
    assert isinstance(loaded.get_input_embeddings(), PackedEmbedding)
    assert isinstance(loaded.get_output_embeddings(), TiedHead if tied else PackedLinear)
    assert torch.equal(logits(loaded), expected)
    columns = 64 if policy == "int8" else 32
    own = VOCAB_SIZE * columns + VOCAB_SIZE * (2 if policy == "int8" else 4) + 16
    positions = 256 * 64 * 2 if name == "tied conv" else 0  # GPT-2's own, left alone
    assert report.bytes["embeddings"] == own + positions
    assert report.bytes["head"] == (0 if tied else own)
    assert report.bits_per_weight == 4.5
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if tied and key.startswith("lm_head")]  # noqa: SIM118
    convert(model)
    model.get_output_embeddings().kernel = "reference"
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.kernel = "reference"
    assert torch.equal(logits(model), expected)


def test_embedding_rows_are_those_of_the_quantized_matrix() -> None:
    model = prepared("tied", "int8")
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        assert torch.equal(embedding(ids()), embedding.quantized_weight(torch.float32)[ids()])
        assert torch.equal(head_weight(model)[0], embedding.quantized_weight(torch.float32))
        with quantizers_off(model):
            assert torch.equal(embedding(ids()), embedding.weight[ids()])
    assert vocabulary_size(model) == VOCAB_SIZE


def test_both_ends_of_a_tied_pair_train_the_one_weight(tmp_path: Path) -> None:
    model = prepared("tied", "int8")
    teacher = tiny_llama()
    embedding = model.get_input_embeddings()
    before, theta = embedding.weight.detach().clone(), embedding.log_scale.detach().clone()
    arguments = QATArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="steps",
        save_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=2,
    )
    data = [{"input_ids": row, "labels": row} for row in ids()]
    QATTrainer(model=model, teacher=teacher, args=arguments, train_dataset=data).train()
    unused = [row for row in range(VOCAB_SIZE) if row not in ids()]
    assert not torch.equal(embedding.weight[unused], before[unused])  # through the head
    assert not torch.equal(embedding.log_scale, theta)
    assert model.get_output_embeddings().embedding is embedding
    resumed = prepared("tied", "int8")
    trainer = QATTrainer(model=resumed, teacher=teacher, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_stock_transformers_fails_loudly_on_quantized_embeddings(tmp_path: Path) -> None:
    saved = save(prepared("tied", "int8"), tmp_path / "out")
    assert any("stock transformers does not load" in note and "AttributeError" in note for note in saved.notes)
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    report = prepare(tiny_llama(), QuantConfig.preset("int4", group_size=32, embeddings="int8"))
    entries = {entry.name: entry for entry in report.entries}
    assert entries["lm_head.weight"].reason == "tied to model.embed_tokens.weight"
    assert entries["lm_head.weight"].bytes_after == 0
    assert entries["model.embed_tokens.weight"].treatment == "int8 channel"


def test_the_audit_counts_a_tied_matrix_once() -> None:
    report = prepare(tiny_llama(), QuantConfig.preset("int4", group_size=32, embeddings="int8"))
    linear = sum(entry.numel for entry in report.quantized if "layers" in entry.name)
    table = VOCAB_SIZE * 64
    assert len(report.quantized) == 15
    bits = (linear * 4.5 + table * 8 + VOCAB_SIZE * 16) / (linear + table)
    assert report.average_bits == pytest.approx(bits)


def test_transformers_ties_nothing_to_a_quantized_embedding() -> None:
    model = prepared("tied", "int8")
    expected = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    assert "lm_head.weight" not in model.state_dict()


def test_an_untied_quantized_head_loads_in_stock_transformers(tmp_path: Path) -> None:
    model = tiny_llama(tied=False)
    prepare(model, QuantConfig.preset("int4", group_size=32, lm_head="int8"))
    save(model, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(logits(stock), logits(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert ["lm_head"] in [group["targets"] for group in config["config_groups"].values()]


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (tiny_llama, {"embeddings": "int8", "lm_head": "int4"}, "tied to one weight"),
        (tiny_llama, {"lm_head": "int8"}, "tied to one weight"),
        (lambda: tiny_architecture("gpt2", hidden_size=72), {"embeddings": "int4"}, "do not divide 72"),
    ],
)
def test_policies_that_do_not_do_are_refused(make, changes: dict[str, str], message: str) -> None:  # type: ignore[no-untyped-def]
    model = make()
    before = copy.deepcopy(list(model.state_dict()))
    with pytest.raises(ValueError, match=message):
        prepare(model, QuantConfig.preset("int8", **changes))
    assert list(model.state_dict()) == before

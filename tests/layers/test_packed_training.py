"""Scales of packed weights: trained as they lie, with the gradients of the prepared model, and put in place exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmqat
from llmqat import QATTrainer, QuantConfig, convert, prepare
from llmqat.layers import PackedModule, QuantLinear, WeightConfig
from llmqat.layers.packed import PackedLinear
from tests.tiny import tiny_architecture, tiny_llama, tiny_tokenizer
from tests.train.test_trainer import Blocks, _arguments

SCHEMES = {
    "int4": WeightConfig(num_bits=4, group_size=16),
    "int3 asymmetric": WeightConfig(num_bits=3, group_size=16, symmetric=False),
    "int8 channel": WeightConfig(num_bits=8, strategy="channel"),
    "ternary": WeightConfig(num_bits=2, group_size=16, levels="ternary"),
}


def pair(weights: WeightConfig, bias: bool) -> tuple[QuantLinear, PackedLinear]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 24, bias)
    quantized = QuantLinear.from_linear(linear, weights)
    packed = PackedLinear.from_quant_linear(quantized, torch.float32)
    packed.train_scales()
    return quantized, packed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_output_and_its_gradient_are_those_of_the_prepared_layer(name: str, bias: bool) -> None:
    quantized, packed = pair(SCHEMES[name], bias)
    x = torch.randn(3, 5, 32)
    results = []
    for layer in (quantized, packed):
        inputs = x.clone().requires_grad_()
        output = layer(inputs)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append((output.detach(), inputs.grad))
    (output, to_x), (packed_output, packed_to_x) = results
    assert torch.equal(output, packed_output)
    assert torch.allclose(to_x, packed_to_x, atol=1e-6)


def test_the_gradient_of_the_scale_is_that_of_the_dequantized_weight() -> None:
    _, packed = pair(SCHEMES["int4"], False)
    x = torch.randn(7, 32)
    packed(x).square().sum().backward()
    scale = packed.scale().detach().requires_grad_()
    codes = (
        packed.dequantized_weight(torch.float32).detach().view(24, 2, 16) / packed.scale().detach()[..., None]
    ).round()
    (x @ (codes * scale[..., None]).view(24, 32).t()).square().sum().backward()
    factor = 1 / (16 * 7) ** 0.5
    assert packed.log_scale is not None
    assert torch.allclose(packed.log_scale.grad, scale.grad * scale.detach() * factor, rtol=1e-4, atol=1e-6)


def test_no_weight_is_kept_for_the_backward() -> None:
    _, packed = pair(SCHEMES["int4"], False)
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packed(torch.randn(2, 32, requires_grad=True))
    assert kept
    assert all(tensor.numel() < packed.rows * packed.columns for tensor in kept)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_a_packed_checkpoint_is_trained_further_and_saved_again(model_type: str, tmp_path: Path) -> None:
    teacher = tiny_architecture(model_type)
    student = tiny_architecture(model_type)
    prepare(student, QuantConfig.preset("int3", group_size=16))
    llmqat.save(student, tmp_path / "packed", tiny_tokenizer())
    model = llmqat.load(tmp_path / "packed")
    codes = {
        name: module.weight_packed.clone() for name, module in model.named_modules() if isinstance(module, PackedModule)
    }
    arguments = _arguments(tmp_path / "run", trainable="scales", scale_learning_rate=5e-2, bf16=True, max_steps=12)
    trainer = QATTrainer(model=model, teacher=teacher, args=arguments, train_dataset=Blocks())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses[-3:]) < losses[0]
    with pytest.raises(ValueError, match="scales of packed weights are being trained"):
        llmqat.save(model, tmp_path / "again")
    convert(model)
    llmqat.save(model, tmp_path / "again")
    again = llmqat.load(tmp_path / "again")
    ids = Blocks().ids[:2]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    for name, code in codes.items():
        layer = again.get_submodule(name)
        assert isinstance(layer, PackedModule)
        assert torch.equal(layer.weight_packed, code)


def test_quantized_embeddings_stay_as_they_are(tmp_path: Path) -> None:
    student = tiny_llama()
    prepare(student, QuantConfig.preset("int4", group_size=16, embeddings="int8"))
    llmqat.save(student, tmp_path / "packed")
    model = llmqat.load(tmp_path / "packed")
    arguments = _arguments(tmp_path / "run", trainable="scales", scale_learning_rate=5e-2)
    QATTrainer(model=model, teacher=tiny_llama(), args=arguments, train_dataset=Blocks()).train()
    llmqat.save(convert(model), tmp_path / "again")
    assert torch.equal(llmqat.load(tmp_path / "again")(Blocks().ids).logits, model.eval()(Blocks().ids).logits)


def test_a_resumed_run_ends_bit_identical(tmp_path: Path) -> None:
    student = tiny_llama()
    prepare(student, QuantConfig.preset("int3", group_size=16))
    llmqat.save(student, tmp_path / "packed")

    def run(resume: str | None) -> dict[str, Tensor]:
        model = llmqat.load(tmp_path / "packed")
        options: dict[str, Any] = {"trainable": "scales", "save_strategy": "steps", "save_steps": 4}
        arguments = _arguments(tmp_path / "run", scale_learning_rate=5e-2, **options)
        QATTrainer(model=model, teacher=tiny_llama(), args=arguments, train_dataset=Blocks()).train(resume)
        return model.state_dict()

    whole = run(None)
    resumed = run(str(tmp_path / "run" / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), resumed.values(), strict=True))


def test_weights_of_a_packed_model_are_not_trained(tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=16))
    with pytest.raises(ValueError, match="is packed, so it has no weights to train"):
        QATTrainer(model=convert(model), teacher=tiny_llama(), args=_arguments(tmp_path), train_dataset=Blocks())

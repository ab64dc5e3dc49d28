"""LoRA inside the quantizers of packed weights: that of the prepared model, and folded into the codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import llmqat
from llmqat import QATTrainer, QuantConfig, convert, prepare
from llmqat.grid import unpack_int32
from llmqat.layers import PackedModule, QuantLinear, WeightConfig
from llmqat.layers.lora import QuantLora, adopt_adapters, lora_config
from llmqat.layers.packed import PackedLinear, keep_dequantized
from llmqat.train.adapter import LoraSettings
from tests.tiny import tiny_architecture, tiny_llama, tiny_tokenizer
from tests.train.test_trainer import Blocks, _arguments

SCHEMES = {
    "int4": WeightConfig(num_bits=4, group_size=16),
    "int3 asymmetric": WeightConfig(num_bits=3, group_size=16, symmetric=False),
    "int8 channel": WeightConfig(num_bits=8, strategy="channel"),
    "fp8": WeightConfig(num_bits=8, strategy="channel", levels="float"),
    "fp8 block": WeightConfig(num_bits=8, strategy="block", group_size=16, levels="float"),
    "mxfp4": WeightConfig(num_bits=4, group_size=32, levels="float", scale_dtype="e8m0"),
    "nvfp4": WeightConfig(num_bits=4, group_size=16, levels="float", scale_dtype="e4m3"),
}


class _Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.norm(x))
        return out


def pair(weights: WeightConfig, kind: str = "linear") -> tuple[PeftModel, PeftModel]:
    """A packed layer, and a prepared one whose master weight is the dequantized one, with the same adapters."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [Conv1D(32, 64) if kind == "conv1d" else nn.Linear(64, 32) for _ in range(2)]
    layers[0].weight.data = torch.randn(layers[0].weight.shape)
    packed = PackedLinear.from_quant_linear(QuantLinear.from_linear(layers[0], weights), torch.float32)
    layers[1].weight.data, layers[1].bias.data = packed.base(), packed.bias
    quantized = QuantLinear.from_linear(layers[1], weights)
    zero_point = packed.packed_weight().zero_point
    quantized.set_scale(
        packed.weight_scale[:: weights.block].float(), None if zero_point is None else zero_point.float()
    )
    packed.train_scales()
    adapted = []
    for layer in (packed, quantized):
        net = _Net(layer)
        model = get_peft_model(net, lora_config(net, r=4))
        adopt_adapters(model)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape)
        assert layer.log_scale is not None
        layer.log_scale.requires_grad_(True)
        layer.log_scale.data = 0.02 * torch.randn(layer.log_scale.shape)
        adapted.append(model)
    return adapted[0], adapted[1]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("name", SCHEMES)
def test_forward_and_gradients_are_those_of_the_prepared_layer(name: str, kind: str) -> None:
    found = []
    for model in pair(SCHEMES[name], kind):
        x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        output = model(x)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        gradients = {n.replace(".base_layer", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((output.detach(), x.grad, gradients))
    (output, to_x, gradients), (expected, expected_to_x, expected_gradients) = found
    assert torch.equal(output, expected)
    assert torch.allclose(to_x, expected_to_x, atol=1e-6)
    learned = {n for n in expected_gradients if "zero_point" not in n}  # packed zero points stay
    assert any("lora_A" in n for n in learned)
    assert any("log_scale" in n for n in learned)
    assert all(torch.allclose(gradients[n], expected_gradients[n], rtol=1e-5, atol=1e-6) for n in learned)


@pytest.mark.parametrize("name", SCHEMES)
def test_folding_keeps_every_code_and_is_undone(name: str) -> None:
    model, _ = pair(SCHEMES[name])
    x = torch.randn(5, 64)
    layer = model.get_base_model().layer.base_layer
    assert isinstance(layer, PackedLinear)
    layer.kernel, before = "reference", layer.weight_packed.clone()  # others add up in another order
    with torch.no_grad():
        trained = model(x)
        with model.disable_adapter():
            base = model(x)
        model.merge_adapter()
        assert torch.equal(model(x), trained)
        assert not torch.equal(layer.weight_packed, before)
        with model.disable_adapter():  # which takes them out of the codes
            assert torch.equal(model(x), base)
        assert torch.equal(layer.weight_packed, before)
        folded = model.merge_and_unload()
        assert isinstance(folded.layer, PackedLinear)
        assert torch.equal(folded(x), trained)
        weight = folded.layer.dequantized_weight(torch.float32)
        assert torch.equal(convert(folded).layer.dequantized_weight(torch.float32), weight)


@pytest.mark.parametrize("kind", ["packed", "prepared"])
def test_what_merging_keeps_aside_moves_with_the_model(kind: str) -> None:
    model = pair(SCHEMES["int4"])[kind == "prepared"]
    model.merge_adapter()
    model.to("meta")
    model.unmerge_adapter()
    layer = model.get_base_model().layer.base_layer
    assert (layer.weight_packed if kind == "packed" else layer.weight).is_meta


def test_an_adapter_that_adds_nothing_changes_nothing() -> None:
    for weights in SCHEMES.values():
        torch.manual_seed(0)
        net = _Net(PackedLinear.from_quant_linear(QuantLinear.from_linear(nn.Linear(64, 32), weights)))
        x = torch.randn(5, 64)
        with torch.no_grad():
            expected = net(x)
            model = get_peft_model(net, lora_config(net, r=4))
            adopt_adapters(model)
            assert torch.allclose(model(x), expected, atol=1e-5)
            assert torch.equal(net.layer.base_layer.dequantized_weight(torch.bfloat16), net.layer.base_layer.weight)


def packed_model(model_type: str, folder: Path, **options: Any) -> nn.Module:
    student = tiny_architecture(model_type)
    prepare(student, QuantConfig.preset("int3", group_size=16, **options))
    llmqat.save(student, folder, tiny_tokenizer())
    return llmqat.load(folder)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "qwen2"])
def test_a_packed_checkpoint_is_trained_with_adapters_and_saved_again(model_type: str, tmp_path: Path) -> None:
    teacher = tiny_architecture(model_type)
    model = packed_model(model_type, tmp_path / "packed")
    codes = {n: m.weight_packed.clone() for n, m in model.named_modules() if isinstance(m, PackedModule)}
    adapted = LoraSettings(r=4).attach(model)
    arguments = _arguments(tmp_path / "run", learning_rate=1e-3, scale_learning_rate=1e-3, bf16=True, max_steps=16)
    trainer = QATTrainer(model=adapted, teacher=teacher, args=arguments, train_dataset=Blocks())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert model_type == "gpt2" or min(losses[-3:]) < losses[0]  # of three bits' few steps that of gpt2 finds none
    with pytest.raises(ValueError, match="has LoRA adapters"):
        llmqat.save(adapted, tmp_path / "again")
    folded = convert(adapted.merge_and_unload())
    llmqat.save(folded, tmp_path / "again")
    again = llmqat.load(tmp_path / "again")
    ids = Blocks().ids[:2]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, folded.eval()(ids).logits)
    changed = {n for n, code in codes.items() if not torch.equal(again.get_submodule(n).weight_packed, code)}
    linear = {name for name in codes if isinstance(again.get_submodule(name), PackedLinear)}
    assert changed
    assert changed <= linear  # experts and embeddings keep their codes


def test_a_resumed_run_ends_bit_identical(tmp_path: Path) -> None:
    packed_model("llama", tmp_path / "packed")

    def run(resume: str | None) -> dict[str, Tensor]:
        model = LoraSettings(r=4).attach(llmqat.load(tmp_path / "packed"))
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 2e-2}
        arguments = _arguments(tmp_path / "run", scale_learning_rate=5e-2, **options)
        QATTrainer(model=model, teacher=tiny_llama(), args=arguments, train_dataset=Blocks()).train(resume)
        return model.state_dict()

    whole = run(None)
    resumed = run(str(tmp_path / "run" / "checkpoint-4"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (WeightConfig(num_bits=2, group_size=16, levels="ternary"), r"has the levels -1, 0 and 1 alone"),
        (WeightConfig(num_bits=2, group_size=16, levels="seq"), "has the levels of int2-seq alone"),
        (WeightConfig(num_bits=4, group_size=16, sparsity="2:4"), "has at most 2 weights of 4 that are not zero"),
    ],
)
def test_codes_that_are_to_stay_few_are_refused(weights: WeightConfig, said: str) -> None:
    torch.manual_seed(0)
    net = _Net(PackedLinear.from_quant_linear(QuantLinear.from_linear(nn.Linear(64, 32), weights)))
    with pytest.raises(ValueError, match=said):
        lora_config(net)


def test_its_own_teacher_and_its_adapter_alone_are_refused(tmp_path: Path) -> None:
    model = LoraSettings(r=4).attach(packed_model("llama", tmp_path / "packed"))
    assert all(isinstance(module, QuantLora) for name, module in model.named_modules() if name.endswith("q_proj"))
    with pytest.raises(ValueError, match="cannot be its own teacher"):
        QATTrainer(model=model, args=_arguments(tmp_path / "run"), train_dataset=Blocks())
    with pytest.raises(ValueError, match="the adapters are on a packed model"):
        llmqat.save_adapter(model, tmp_path / "adapter")


def test_a_packed_output_head_is_adapted(tmp_path: Path) -> None:
    model = packed_model("llama", tmp_path / "packed", lm_head="int8")
    adapted = LoraSettings(r=4).attach(model)
    assert any(name.endswith("lm_head") for name, module in adapted.named_modules() if isinstance(module, QuantLora))
    arguments = _arguments(tmp_path / "run", learning_rate=1e-3, max_steps=2)
    QATTrainer(model=adapted, teacher=tiny_architecture("llama"), args=arguments, train_dataset=Blocks()).train()
    folded = convert(adapted.merge_and_unload())
    llmqat.save(folded, tmp_path / "again")


def test_adapters_that_are_not_adopted_do_not_vanish() -> None:
    net = _Net(PackedLinear.from_quant_linear(QuantLinear.from_linear(nn.Linear(64, 32), SCHEMES["int4"])))
    model = get_peft_model(net, lora_config(net, r=4))
    with pytest.raises(RuntimeError):
        model.merge_and_unload()
    adopt_adapters(model)
    assert not net.layer.base_layer.shows_weight
    assert bool(torch.isfinite(net.layer.base_layer.weight).all())


def test_what_moves_the_base_is_refused_and_other_layers_do_not_count() -> None:
    ternary = WeightConfig(num_bits=2, group_size=16, levels="ternary")
    net = _Net(PackedLinear.from_quant_linear(QuantLinear.from_linear(nn.Linear(64, 32), SCHEMES["int4"])))
    net.other = PackedLinear.from_quant_linear(QuantLinear.from_linear(nn.Linear(64, 32), ternary))
    with pytest.raises(ValueError, match="has the levels -1, 0 and 1 alone"):
        lora_config(net)
    with pytest.raises(ValueError, match="takes the start of an adapter out of the weight under it"):
        lora_config(net, targets=["layer"], init_lora_weights="pissa")
    adopt_adapters(get_peft_model(net, lora_config(net, targets=["layer"], r=4)))
    assert isinstance(net.layer, QuantLora)
    assert isinstance(net.other, PackedLinear)


def test_scales_that_do_not_train_stay_beside_adapters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = packed_model("llama", tmp_path / "packed")
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.weight_scale = (module.weight_scale.float() * 1.001).half()
    adapted = LoraSettings(r=4).attach(model)
    arguments = _arguments(tmp_path / "run", learning_rate=1e-3, max_steps=2)
    QATTrainer(model=adapted, teacher=tiny_llama(), args=arguments, train_dataset=Blocks()).train()
    assert "adapters are trained, and no scale with them" in caplog.text
    assert all(module.log_scale is None for module in adapted.modules() if isinstance(module, PackedModule))
    convert(adapted.merge_and_unload())


def test_dequantized_weights_are_not_kept_where_adapters_change_them(tmp_path: Path) -> None:
    model = LoraSettings(r=4).attach(packed_model("llama", tmp_path / "packed"))
    assert keep_dequantized(model, 1 << 30) == []
    folded = model.merge_and_unload()
    assert len(keep_dequantized(folded, 1 << 30)) == 14


def test_int8_codes_stay_int8() -> None:
    layer = PackedLinear.from_quant_linear(QuantLinear.from_linear(nn.Linear(64, 32), SCHEMES["int8 channel"]))
    expected, words = layer.dequantized_weight(torch.float32), layer.weight_packed
    layer.weight_packed = unpack_int32(words, layer.grid, 64).to(torch.int8)
    before = layer.put_base(layer.base() * 0.5)
    assert before.dtype == layer.weight_packed.dtype == torch.int8
    assert bool(((layer.dequantized_weight(torch.float32) - 0.5 * expected).abs() <= layer.scale()).all())

"""What is not finite stops a training and is named; what can have no effect is refused; odd figures are warned of."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback

from llmqat import QATTrainer, QuantConfig, prepare
from llmqat.calibrate import BlockwiseStage, RangesStage, calibrate
from llmqat.grid import SCALE_FLOOR
from llmqat.layers import QuantModule
from llmqat.models import load_model
from llmqat.train import MonitorSettings, QuantizationMonitor
from llmqat.train.checkpoints import last_checkpoint
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.train.test_trainer import Blocks, _arguments, _pair


class Spoil(TrainerCallback):
    """Does something to the model when a step begins."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.step - 1:
            self.action(given["model"])


def nan_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")


def nan_output(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *given: given[2] * float("inf"))


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * float("nan")


def nan_gradient(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *given: _NanGradient.apply(given[2]))


CAUSES = {
    "weight": (nan_weight, r"the loss is nan.*first is the parameter model\.layers\.1\.mlp\.up_proj\.weight"),
    "output": (nan_output, r"the loss is nan.*first is the output of model\.layers\.0\.self_attn\.o_proj"),
    "gradient": (nan_gradient, r"the norm of the gradients nan.*the gradient of model\.layers\.1\.mlp\.gate_proj"),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("cause", CAUSES)
def test_what_is_not_finite_stops_the_run_and_is_named(tmp_path: Path, cause: str, accumulation: int) -> None:
    spoil, message = CAUSES[cause]
    student, teacher = _pair()
    arguments = _arguments(
        tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2, gradient_accumulation_steps=accumulation
    )
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
    trainer.add_callback(Spoil(4, spoil))
    with pytest.raises(FloatingPointError, match=r"training stopped in step 4: .*" + message) as caught:
        trainer.train()
    last = last_checkpoint(tmp_path)
    assert last == tmp_path / "checkpoint-3"
    assert f"the last good checkpoint is {last}" in str(caught.value)
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(last / "model.safetensors").values())


def test_a_step_that_spoils_the_weights_is_not_saved(tmp_path: Path) -> None:
    class AfterStep(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 1:
                nan_weight(given["model"])

    student, teacher = _pair()
    arguments = _arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer = QATTrainer(
        model=student, teacher=teacher, args=arguments, train_dataset=Blocks(), callbacks=[AfterStep()]
    )
    with pytest.raises(FloatingPointError, match=r"in step 2: the step itself .*up_proj\.weight.*checkpoint-1"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 8}, "warmup_steps=8 does not end within the 8 steps"),
        ({"quantization_warmup_steps": 9}, "quantization_warmup_steps=9 does not end within the 8 steps"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 is negative; 0 means"),
        ({"zero_point_learning_rate": 0.1}, "zero_point_learning_rate=0.1: there are no zero points that train"),
        ({"norm_learning_rate": 0.1}, "norm_learning_rate=0.1: there are no norms that train"),
        ({"scale_learning_rate": 0.1}, "scale_learning_rate=0.1: there are no log scales that train"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    teacher = tiny_llama()
    student = tiny_llama()
    prepare(student, QuantConfig.preset("int4", group_size=32, scales="fixed"))
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.dim() > 1)

    def train() -> None:
        arguments = _arguments(tmp_path, **changes)
        QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks()).train()

    with pytest.raises(ValueError, match=message):
        train()


def test_a_damaged_source_model_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][2, 2] = float("inf")
    tensors["model.norm.weight"][7] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    message = r"2 of its tensors hold NaN or infinity \(model\.layers\.1\.mlp\.down_proj\.weight, model\.norm\.weight\)"
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))


def test_block_wise_training_names_the_block(tmp_path: Path) -> None:
    quant, ids = QuantConfig.preset("int4", group_size=32), Blocks().ids
    stages = [RangesStage(blocks=2), BlockwiseStage(blocks=4, iterations=4, learning_rate=1e30)]
    with pytest.raises(
        FloatingPointError, match=r"training of model\.layers\.0 has no finite error in iteration 2 of 4"
    ):
        calibrate(tiny_llama(), quant, stages, ids)
    spoiled = tiny_llama()
    with torch.no_grad():
        spoiled.model.layers[1].mlp.down_proj.weight[0, 0] = 3e38  # finite, and too large for sums
        spoiled.model.layers[1].mlp.up_proj.weight[:, 0] = 3e38
    gives = r"model\.layers\.1 gives NaN or infinity before "
    with pytest.raises(FloatingPointError, match=gives):
        calibrate(spoiled, quant, [RangesStage(method="minmax"), BlockwiseStage(blocks=4, iterations=4)], ids)


def test_dead_scales_and_spikes_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = _pair()
    layers = {name: module for name, module in student.named_modules() if isinstance(module, QuantModule)}
    floor, zero, unmoved = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        layers[floor].initial_scale[0, 0] = SCALE_FLOOR / 2
        layers[zero].weight[1, :32] = 0.0
    layers[unmoved].log_scale.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([2]), 0.0))
    arguments = _arguments(tmp_path, max_steps=8, learning_rate=1e-5)
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
    QuantizationMonitor(MonitorSettings(every=4, layers=100, weights=1_000_000)).attach(trainer)

    def shake(model: PreTrainedModel) -> None:
        with torch.no_grad():
            model.model.norm.weight.mul_(-3)

    trainer.add_callback(Spoil(7, shake))
    with caplog.at_level(logging.WARNING, logger="llmqat"):
        trainer.train()
    text = caplog.text
    assert f"step 4: {floor}: 1 of 256 scales: at the floor" in text
    assert f"step 4: {zero}: 1 of 256 scales: all codes zero" in text
    assert f"step 4: {unmoved}: 2 of 256 scales: unmoved since training began" in text
    assert text.count("unmoved") == 1
    assert "step 7: the loss is" in text
    assert "step 6: the loss is" not in text
    shares = [log["quantization/dead_scales"] for log in trainer.state.log_history if "quantization/clipped" in log]
    groups = sum(module.log_scale.numel() for module in layers.values())
    assert shares[0] == pytest.approx(4 / groups)

"""Training with LoRA inside the quantizer: the model is its own teacher, and what is saved reloads and resumes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from llmqat import QATTrainer, QuantConfig, adopt_adapters, load_adapter, lora_config, prepare, save_adapter
from llmqat.calibrate import BlockwiseStage, RangesStage, RotateStage, calibrate
from llmqat.layers import QuantModule
from llmqat.layers.lora import QuantLora
from tests.tiny import tiny_architecture, tiny_llama
from tests.train.test_trainer import Blocks, _arguments

INT3 = QuantConfig.preset("int3", group_size=32)


def adapted(model: PreTrainedModel, r: int = 4) -> PeftModel:
    prepare(model, INT3)
    torch.manual_seed(0)
    return get_peft_model(model, lora_config(model, r=r, lora_alpha=4 * r))


def adapted_and_adopted(model: PreTrainedModel) -> PeftModel:
    peft_model = adapted(model)
    adopt_adapters(peft_model)
    return peft_model


def losses(trainer: QATTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_the_model_is_its_own_teacher(model_type: str, bf16: bool, tmp_path: Path) -> None:
    original = tiny_architecture(model_type)
    for parameter in original.parameters():  # as a bfloat16 model is loaded; .to() would round its frequencies as well
        parameter.data = parameter.data.to(torch.bfloat16 if bf16 else torch.float32)
    alone = adapted(copy.deepcopy(original).float())
    beside = copy.deepcopy(alone)
    before = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    arguments = _arguments(tmp_path, bf16=bf16, learning_rate=3e-3)
    first = QATTrainer(model=alone, args=arguments, train_dataset=Blocks())
    assert first.teacher is None
    first.train()
    second = QATTrainer(model=beside, teacher=original, args=arguments, train_dataset=Blocks())
    second.train()
    assert losses(first) == losses(second)
    assert losses(first)[-1] < losses(first)[0]
    moved = {name for name, tensor in alone.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name or name.endswith("log_scale")}


def test_gradient_checkpointing_and_the_teacher_go_together(tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapted(tiny_llama())
        arguments = _arguments(tmp_path, bf16=True, gradient_checkpointing=checkpointing)
        QATTrainer(model=model, args=arguments, train_dataset=Blocks()).train()
        results.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))


@pytest.mark.parametrize("reuse", [False, True])
def test_checkpointing_makes_each_quantized_weight_twice_a_step_or_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reuse: bool
) -> None:
    made: dict[int, int] = {}
    original = QuantModule.quantized_rows

    def counted(layer: QuantModule, *args: Any) -> torch.Tensor:
        made[id(layer)] = made.get(id(layer), 0) + 1
        return original(layer, *args)

    monkeypatch.setattr(QuantModule, "quantized_rows", counted)
    model = adapted(tiny_llama())
    options = {"gradient_checkpointing": True, "reuse_quantized_weights": reuse}
    arguments = _arguments(tmp_path, max_steps=1, bf16=True, **options)
    trainer = QATTrainer(model=model, args=arguments, train_dataset=Blocks())
    made.clear()
    trainer.train()
    layers = [module for module in model.modules() if isinstance(module, QuantModule)]
    # In the forward, and once more for the backward; the teacher's forward makes none.
    assert sorted(made.values()) == [1 if reuse else 2] * len(layers)


def test_the_fold_after_training_keeps_every_code(tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    QATTrainer(model=model, args=_arguments(tmp_path, bf16=True, learning_rate=1e-2), train_dataset=Blocks()).train()
    codes = {name: module.codes() for name, module in model.named_modules() if isinstance(module, QuantModule)}
    merged = model.merge_and_unload()
    folded = [module.codes() for module in merged.modules() if isinstance(module, QuantModule)]
    assert all(torch.equal(a, b) for a, b in zip(codes.values(), folded, strict=True))


def test_a_checkpoint_is_a_peft_folder_with_the_scales(tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    arguments = _arguments(tmp_path, save_strategy="steps", save_steps=8, learning_rate=1e-2)
    QATTrainer(model=model, args=arguments, train_dataset=Blocks()).train()
    fresh = tiny_llama()
    prepare(fresh, INT3)
    reloaded = PeftModel.from_pretrained(fresh, str(tmp_path / "checkpoint-8"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), reloaded.state_dict().values(), strict=True)
    )


def test_a_resumed_run_ends_bit_identical(tmp_path: Path) -> None:
    whole = adapted(tiny_llama())
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    QATTrainer(model=whole, args=_arguments(tmp_path, **options), train_dataset=Blocks()).train()
    again = adapted(tiny_llama())
    trainer = QATTrainer(model=again, args=_arguments(tmp_path, **options), train_dataset=Blocks())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_model_that_trains_its_base_is_not_its_own_teacher(tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, INT3)
    with pytest.raises(ValueError, match=r"embed_tokens.* would be trained, and the teacher reads them"):
        QATTrainer(model=model, args=_arguments(tmp_path), train_dataset=Blocks())


@pytest.mark.parametrize("stage", ["blockwise", "rotate"])
def test_a_model_that_was_moved_is_not_its_own_teacher(stage: str, tmp_path: Path) -> None:
    ids = torch.randint(2, 258, (4, 16))
    stages: list[Any] = [RangesStage(), BlockwiseStage(iterations=4, batch_size=2)]
    model = tiny_llama()
    calibrate(model, INT3, stages if stage == "blockwise" else [RotateStage(), RangesStage()], ids)
    peft_model = get_peft_model(model, lora_config(model, r=2))
    message = "no longer those of the original model" if stage == "blockwise" else "rotated or smoothed"
    with pytest.raises(ValueError, match=message):
        QATTrainer(model=peft_model, args=_arguments(tmp_path), train_dataset=Blocks())
    QATTrainer(model=peft_model, teacher=tiny_llama(), args=_arguments(tmp_path), train_dataset=Blocks())


def test_a_calibrated_range_does_not_count_as_moved(tmp_path: Path) -> None:
    model = tiny_llama()
    calibrate(model, INT3, [RangesStage()], torch.randint(2, 258, (4, 16)))
    peft_model = get_peft_model(model, lora_config(model, r=2))
    trainer = QATTrainer(model=peft_model, args=_arguments(tmp_path), train_dataset=Blocks())
    trainer.train()
    assert any(isinstance(module, QuantLora) for module in peft_model.modules())


def test_attaching_first_and_training_twice_keep_the_teacher(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"])
    model = get_peft_model(tiny_llama(), config)
    prepare(model, INT3)
    for _ in range(2):
        trainer = QATTrainer(model=model, args=_arguments(tmp_path, learning_rate=1e-2), train_dataset=Blocks())
        trainer.train()


def test_a_start_that_moves_the_base_is_no_teacher(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"], init_lora_weights="pissa")
    model = get_peft_model(tiny_llama(), config)
    prepare(model, INT3)
    with pytest.raises(ValueError, match="is not known"):
        QATTrainer(model=model, args=_arguments(tmp_path), train_dataset=Blocks())


def test_an_adapter_loaded_for_inference_is_not_trained(tmp_path: Path) -> None:
    save_adapter(adapted_and_adopted(tiny_llama()), tmp_path / "adapter")
    model = tiny_llama()
    prepare(model, INT3)
    frozen = load_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="no adapter is trainable; load it with"):
        QATTrainer(model=frozen, args=_arguments(tmp_path), train_dataset=Blocks())


def test_scales_alone_and_adapters_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainable='scales' trains no adapter"):
        QATTrainer(model=adapted(tiny_llama()), args=_arguments(tmp_path, trainable="scales"), train_dataset=Blocks())

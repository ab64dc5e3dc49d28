"""A teacher is another model than the student, and stays what it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from llmqat import QATTrainer, QuantConfig, convert, lora_config, prepare
from llmqat.train.teacher import shared_with
from tests.tiny import tiny_llama
from tests.train.test_trainer import Blocks, _arguments

INT4 = QuantConfig.preset("int4", group_size=32)


def _assigned(student: PreTrainedModel) -> nn.Module:
    teacher = tiny_llama()
    teacher.load_state_dict(student.state_dict(), assign=True)
    return teacher


def _one_parameter(student: PreTrainedModel) -> nn.Module:
    teacher = tiny_llama()
    teacher.model.norm.weight = student.model.norm.weight
    return teacher


def _view(student: PreTrainedModel) -> nn.Module:
    teacher = tiny_llama()
    layer = student.model.layers[0].mlp.up_proj
    teacher.model.layers[0].mlp.up_proj.weight = nn.Parameter(layer.weight.detach().view_as(layer.weight))
    return teacher


def _buffer(student: PreTrainedModel) -> nn.Module:
    teacher = tiny_llama()
    weight = teacher.model.layers[0].mlp.up_proj.weight.detach()
    del teacher.model.layers[0].mlp.up_proj.weight
    student.model.layers[0].mlp.up_proj.weight.data = weight
    teacher.model.layers[0].mlp.up_proj.register_buffer("weight", weight[:])
    return teacher


SHARING: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "the model itself": lambda student: student,
    "copy.copy": copy.copy,
    "load_state_dict(assign=True)": _assigned,
    "a parameter": _one_parameter,
    "a view": _view,
    "a buffer": _buffer,
}


@pytest.mark.parametrize("how", SHARING)
def test_a_teacher_that_would_change_is_refused(how: str, tmp_path: Path) -> None:
    student = tiny_llama()
    teacher = SHARING[how](student)
    prepare(student, INT4)
    with pytest.raises(
        ValueError, match=r"the teacher (is the model|is prepared|shares memory).*give the original model"
    ):
        QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path), train_dataset=Blocks())


def test_a_prepared_teacher_is_refused_unless_its_quantizers_are_off(tmp_path: Path) -> None:
    student, teacher = tiny_llama(), tiny_llama()
    prepare(student, INT4)
    prepare(teacher, INT4)
    with pytest.raises(ValueError, match=r"the teacher is prepared itself: model\.layers\.0"):
        QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path), train_dataset=Blocks())
    for module in teacher.modules():
        if hasattr(module, "enabled"):
            module.enabled = False
    QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path), train_dataset=Blocks())


def test_a_packed_teacher_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = tiny_llama(), tiny_llama()
    prepare(student, INT4)
    prepare(teacher, INT4)
    convert(teacher)
    QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path), train_dataset=Blocks())
    assert "the teacher is packed" in caplog.text


def test_weights_that_do_not_train_may_be_shared(tmp_path: Path) -> None:
    student = tiny_llama(tied=False)
    teacher = tiny_llama(tied=False)
    teacher.load_state_dict(student.state_dict(), assign=True)
    prepare(student, INT4)
    adapted = get_peft_model(student, lora_config(student, r=4))
    with torch.no_grad():
        before = teacher(Blocks(1).ids).logits
    trainer = QATTrainer(model=adapted, teacher=teacher, args=_arguments(tmp_path, bf16=False), train_dataset=Blocks())
    trainer.train()
    with torch.no_grad():
        assert torch.equal(teacher(Blocks(1).ids).logits, before)


def test_a_teacher_in_training_mode_is_taken_out_of_it(tmp_path: Path) -> None:
    losses = []
    for training in (False, True):
        student, teacher = tiny_llama(attention_dropout=0.5), tiny_llama(attention_dropout=0.5)
        prepare(student, INT4)
        teacher.train(training)
        arguments = _arguments(tmp_path, bf16=False)
        trainer = QATTrainer(model=student, teacher=teacher, args=arguments, eval_dataset=Blocks(4))
        losses.append(trainer.evaluate()["eval_loss"])
        assert not teacher.training
    assert losses[0] == losses[1]


def test_memory_is_shared_where_it_overlaps_and_not_where_it_is_near() -> None:
    storage = torch.zeros(64)

    def holder(part: torch.Tensor, trains: bool) -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(part, requires_grad=trains)
        return module

    assert shared_with(holder(storage[:32], True), holder(storage[31:40], False)) == ["weight"]
    assert shared_with(holder(storage[:32], True), holder(storage[32:], False)) == []
    assert shared_with(holder(storage[:32], False), holder(storage[:32], False)) == []
    assert shared_with(holder(torch.zeros(4, device="meta"), True), holder(torch.zeros(4, device="meta"), False)) == []

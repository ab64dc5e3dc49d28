"""Supervised fine-tuning through TRL: its data, llmqat's loss."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer

import llmqat
import llmqat.train.sft
from llmqat import QATArguments, QATSFTConfig, QATSFTTrainer, QATTrainer, QuantConfig, lora_config, prepare
from llmqat.layers import quantizers_off
from llmqat.layers.lora import adapters_off
from llmqat.train.arguments import FIELDS, TRAINER_ARGUMENTS
from llmqat.train.sft import REFUSED, WORKS
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.train.test_trainer import Blocks, _arguments

ROWS = [{"prompt": f"Question {n}: what is {n} and {n}? ", "completion": f"It is {2 * n}."} for n in range(12)]


def config(folder: Path, **changes: Any) -> QATArguments:
    return _arguments(folder, QATSFTConfig, **{"max_steps": 6, "learning_rate": 1e-2, "max_length": 64, **changes})


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trl_trains_adapters_inside_the_quantizer(gradient_checkpointing: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    adapted = get_peft_model(model, lora_config(model, r=4))
    trainer = QATSFTTrainer(
        model=adapted,
        args=config(tmp_path, kl_weight=0.2, gradient_checkpointing=gradient_checkpointing),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    masked = batch["labels"].ne(-100)
    assert 0 < int(masked.sum()) < batch["input_ids"].numel()  # TRL left the prompts out
    with torch.no_grad():
        loss = float(trainer.compute_loss(adapted, batch))
        own = adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        with quantizers_off(model), adapters_off(model):
            full = adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    keep, labels = masked[:, 1:], batch["labels"][:, 1:]
    q, p = (F.log_softmax(logits[:, :-1][keep].float(), -1) for logits in (own, full))
    expected = F.nll_loss(q, labels[keep]) + 0.2 * (p.exp() * (p - q)).sum(-1).mean()
    assert loss == pytest.approx(float(expected), rel=2e-2 if trainer.args.bf16 else 1e-4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


def test_the_example_trains_on_the_answers_and_saves(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "Ahoy!"}]
    Path("chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    lines = str(llmqat.train.sft.__doc__).splitlines()
    code = "\n".join(line.removeprefix("    ") for line in lines if line.startswith("    ") or not line)
    small = {
        '"MODEL"': repr(str(tiny_folder)),
        "group_size=64": "group_size=32",
        "max_steps=60": "max_steps=1, bf16=False",
    }
    for word, change in small.items():
        assert word in code
        code = code.replace(word, change)
    names: dict[str, Any] = {}
    exec(code, names)
    batch = next(iter(names["trainer"].get_train_dataloader()))
    assert names["tokenizer"].decode(batch["labels"][batch["labels"] != -100]) == "Ahoy!"
    assert llmqat.load(tmp_path / "run" / "model").config.model_type == "llama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "run"]


def test_rows_without_answers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "no answer"}\n', encoding="utf-8")
    (tmp_path / "prose.txt").write_text("no answer", encoding="utf-8")
    for name in ("rows.jsonl", "prose.txt"):
        with pytest.raises(ValueError, match=rf"{name} has no answers to learn"):
            llmqat.answer_rows(str(tmp_path / name), tiny_tokenizer())


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"loss_type": "dft"}, {}, "loss_type='dft' is refused: it belongs to TRL's own loss"),
        ({"router_aux_loss_coef": 0.1}, {}, r"router_aux_loss_coef=0\.1 is refused"),
        ({"model_init_kwargs": {"dtype": "float32"}}, {}, "model_init_kwargs=.* is refused: the model is loaded"),
        ({}, {"compute_loss_func": print}, "compute_loss_func is refused"),
        ({}, {"peft_config": object()}, "attach adapters first"),
        ({}, {"args": None}, "give a llmqat.QATSFTConfig"),
        ({}, {"model": "some/model"}, "load the model and prepare it"),
    ],
)
def test_what_would_be_ignored_is_refused(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = {"model": tiny_llama(), "args": config(tmp_path, **changes), **options}
    with pytest.raises(ValueError, match=message):
        QATSFTTrainer(**given, train_dataset=Dataset.from_list(ROWS), processing_class=tiny_tokenizer())


def test_every_field_and_argument_of_trl_is_known() -> None:
    own = {field.name for field in dataclasses.fields(SFTConfig)} - set(FIELDS)
    assert own == set(WORKS) | set(REFUSED), "decide what these do here"
    arguments = set(inspect.signature(SFTTrainer.__init__).parameters) - {"self", *TRAINER_ARGUMENTS}
    assert arguments == {"peft_config", "formatting_func", "quantization_config"}  # the second reads data


def test_a_quantization_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization_config"):
        QATSFTTrainer(model=tiny_llama(), args=config(tmp_path), quantization_config=object())


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 is refused"):
        config(tmp_path, label_smoothing_factor=0.1)


def test_defaults_are_those_of_trl(tmp_path: Path) -> None:
    ours, theirs = QATSFTConfig(output_dir=str(tmp_path)), SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    own = {
        "kl_weight",
        "cross_entropy_weight",
        "ddp_find_unused_parameters",
        "ddp_broadcast_buffers",
        "logging_nan_inf_filter",
        "bf16",
        "use_cpu",
    }
    own |= {"logging_dir", "run_name", "loss_type", "router_aux_loss_coef"}
    for name in {field.name for field in dataclasses.fields(SFTConfig)} - own:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_cross_entropy_alone_needs_no_teacher(tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    arguments = _arguments(tmp_path, kl_weight=0.0, cross_entropy_weight=1.0, bf16=False)
    trainer = QATTrainer(model=model, args=arguments, train_dataset=Blocks())
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    expected = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert float(trainer.compute_loss(model, batch)) == pytest.approx(float(expected), rel=1e-5)
    trainer.train()


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 1.0)])
def test_weights_that_make_no_loss_are_refused(weights: tuple[float, float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of them must count"):
        QATArguments(output_dir=str(tmp_path), kl_weight=weights[0], cross_entropy_weight=weights[1])

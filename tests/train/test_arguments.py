"""Every field of TrainingArguments and every argument of Trainer works here, or is refused by its name."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import Trainer, TrainingArguments

from llmqat import QATArguments, QATTrainer, QuantConfig, prepare
from llmqat.train.arguments import FIELDS, TRAINER_ARGUMENTS
from tests.tiny import tiny_mixtral, tiny_tokenizer
from tests.train.test_trainer import Blocks, _arguments, _pair

REFUSED: dict[str, Any] = {
    "optim": "lomo",
    "optim_target_modules": "all-linear",
    "num_train_epochs": -1.0,
    "max_grad_norm": None,
    "train_sampling_strategy": "by_length",
    "label_smoothing_factor": 0.1,
    "fp16": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "eval_use_gather_object": True,
    "label_names": ["targets"],
    "use_cache": True,
    "fsdp_config": "absent.json",
    "deepspeed": "absent.json",
    "debug": "tpu_metrics_debug",
    "parallelism_config": object(),
}
"""Field -> a value that would have no effect, or a wrong one."""


def trainer(folder: Path, options: dict[str, Any] | None = None, **changes: Any) -> QATTrainer:
    student, teacher = _pair()
    settings = {"bf16": False, "max_steps": 2, "optim": "sgd", **changes}
    given = {"train_dataset": Blocks(), "eval_dataset": Blocks(4, seed=1), **(options or {})}
    return QATTrainer(model=student, teacher=teacher, args=_arguments(folder, **settings), **given)


def weights(found: QATTrainer) -> Tensor:
    weight: Tensor = found.model.model.layers[0].mlp.up_proj.weight
    return weight.detach().clone()


def test_every_field_and_every_argument_of_the_installed_version_is_known() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not fields - FIELDS.keys(), "decide what these do here, and write it into FIELDS"
    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert not arguments - TRAINER_ARGUMENTS.keys(), "decide what these do here, and write it into TRAINER_ARGUMENTS"
    checked = {name for name, check in FIELDS.items() if check is not None}
    assert checked == {*REFUSED, "report_to"}  # which needs packages, and refuses nothing else


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_have_no_right_effect_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        QATArguments(output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=-1, **{name: REFUSED[name]})
    plain = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
    setattr(plain, name, REFUSED[name])
    student, teacher = _pair()
    with pytest.raises(ValueError, match=f"{name}="):
        QATTrainer(model=student, teacher=teacher, args=plain, train_dataset=Blocks())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name, reason in TRAINER_ARGUMENTS.items() if reason])
def test_arguments_of_trainer_that_the_loss_does_not_see_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} is refused: "):
        trainer(tmp_path / "run", {name: lambda *_, **__: None})
    assert not (tmp_path / "run").exists()
    trainer(tmp_path / "run", {name: None})


def test_hyperparameter_search_is_refused_before_anything_is_asked_of_it(tmp_path: Path) -> None:
    found = trainer(tmp_path)
    for call in (lambda: found.hyperparameter_search(), lambda: found.train(trial={"learning_rate": 1.0})):
        with pytest.raises(ValueError, match="hyperparameter search makes the model anew"):
            call()


@pytest.mark.parametrize(("precision", "bf16"), [("fp16", False), ("fp8", False), ("bf16", True)])
def test_the_launcher_s_precision_is_looked_at(
    precision: str, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    if not bf16:
        with pytest.raises(ValueError, match=f"mixed_precision={precision} in accelerate's configuration is refused"):
            _arguments(tmp_path, bf16=False)
        return
    assert _arguments(tmp_path, bf16=False).bf16  # as its autocast would be


# What works although code of ours is in its way

Check = Callable[[QATTrainer, QATTrainer], bool]
"""Says of a training, and of one without the field, whether the field has done what transformers says."""


def same(found: QATTrainer, plain: QATTrainer) -> bool:
    return torch.equal(weights(found), weights(plain))


def other(found: QATTrainer, plain: QATTrainer) -> bool:
    return not same(found, plain) and found.state.global_step == plain.state.global_step


def evaluations(found: QATTrainer) -> list[int]:
    return [entry["step"] for entry in found.state.log_history if "eval_perplexity" in entry]


def losses(found: QATTrainer) -> list[float]:
    return [entry["loss"] for entry in found.state.log_history if "loss" in entry]


WORKING: dict[str, tuple[dict[str, Any], Check]] = {
    "neftune_noise_alpha": ({"neftune_noise_alpha": 5.0}, lambda a, b: losses(a)[0] > losses(b)[0]),
    "train_sampling_strategy": ({"train_sampling_strategy": "sequential"}, other),
    "group_by_length": ({"train_sampling_strategy": "group_by_length"}, other),
    "batch_rebalance": ({"train_sampling_strategy": "batch_rebalance"}, other),
    "include_num_input_tokens_seen": (
        {"include_num_input_tokens_seen": "non_padding"},
        lambda a, b: a.state.num_input_tokens_seen == 2 * 4 * 32 and same(a, b),
    ),
    "eval_on_start": (
        {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1},
        lambda a, b: evaluations(a) == [0, 1, 2] and same(a, b),
    ),
    "prediction_loss_only": (
        {"prediction_loss_only": True},
        lambda a, b: a.evaluate()["eval_loss"] == b.evaluate()["eval_loss"] and "eval_perplexity" not in a.evaluate(),
    ),
    "full_determinism": ({"full_determinism": True}, same),
    "torch_empty_cache_steps": ({"torch_empty_cache_steps": 1}, same),
    "average_tokens_across_devices": ({"average_tokens_across_devices": False}, same),
    "num_train_epochs": (
        {"max_steps": -1, "num_train_epochs": 0.5},
        lambda a, b: a.state.global_step == 2 and a.tokens_trained() == (256, 256),
    ),
    "accelerator_config": (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
        lambda a, b: a.tokens_trained() == (512, 512) and a.state.global_step == 2,
    ),
    "reentrant checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        same,
    ),
    "gradient_accumulation_steps": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        lambda a, b: torch.allclose(weights(a), weights(b), atol=1e-6),
    ),
    "max_steps": ({"max_steps": 0}, lambda a, b: a.state.global_step == 0 and torch.equal(weights(a), start())),
    "no epochs": (
        {"max_steps": -1, "num_train_epochs": 0},
        lambda a, b: a.state.global_step == 0 and torch.equal(weights(a), start()),
    ),
}


def start() -> Tensor:
    weight: Tensor = _pair()[0].model.layers[0].mlp.up_proj.weight
    return weight.detach()


NEWER = {"batch_rebalance"} if Version(importlib.metadata.version("transformers")) < Version("5.17") else set()
"""What the installed transformers does not have."""


def test_what_a_newer_transformers_brings_is_refused_with_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "5.16.0")
    with pytest.raises(ImportError, match=r"batch_rebalance' needs transformers 5.17 or newer, and 5.16.0 is"):
        QATArguments(output_dir=str(tmp_path), train_sampling_strategy="batch_rebalance")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize("name", [name for name in WORKING if name not in NEWER])
def test_it_does_what_transformers_says(name: str, tmp_path: Path) -> None:
    changes, check = WORKING[name]
    plain, found = trainer(tmp_path / "a"), trainer(tmp_path / "b", **changes)
    try:
        plain.train()
        found.train()
    finally:
        torch.use_deterministic_algorithms(False)
    assert check(found, plain)


def test_nothing_to_do_leaves_no_mean_loss(tmp_path: Path) -> None:
    output = trainer(tmp_path, max_steps=0, warmup_steps=3).train()
    assert output.global_step == 0
    assert output.training_loss != output.training_loss  # NaN: there is none
    assert "train_loss" not in output.metrics


def test_a_batch_size_that_is_found_is_trained_with_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = QATTrainer.compute_loss

    def full(found: QATTrainer, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        if len(inputs["input_ids"]) > 7:
            raise RuntimeError("CUDA out of memory.")
        return original(found, model, inputs, *rest, **options)

    monkeypatch.setattr(QATTrainer, "compute_loss", full)
    changes = {
        "per_device_train_batch_size": 8,
        "auto_find_batch_size": True,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    found, plain = trainer(tmp_path / "a", **changes), trainer(tmp_path / "b")
    found.train()
    plain.train()
    size = found.state.train_batch_size
    assert size <= 7
    assert found.tokens_trained() == (2 * size * 32, 2 * size * 32)
    resumed = trainer(tmp_path / "a", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert torch.equal(weights(resumed), weights(found))
    assert resumed.tokens_trained() == (2 * size * 32, size * 32)


def test_a_compiled_model_trains_as_it_does_without(tmp_path: Path) -> None:
    found = trainer(tmp_path / "a", max_steps=1, torch_compile=True, torch_compile_backend="eager")
    plain = trainer(tmp_path / "b", max_steps=1)
    found.train()
    plain.train()
    assert same(found, plain)


def test_weights_are_not_reused_where_each_micro_batch_must_have_a_gradient(tmp_path: Path) -> None:
    each: tuple[dict[str, Any], ...] = (
        {"ddp_static_graph": True},
        {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    )
    assert trainer(tmp_path, gradient_accumulation_steps=2)._reuse
    for changes in each:
        assert not trainer(tmp_path, gradient_accumulation_steps=2, **copy.deepcopy(changes))._reuse
        with pytest.raises(ValueError, match="reuse_quantized_weights=True gives a weight its gradient"):
            trainer(tmp_path, gradient_accumulation_steps=2, reuse_quantized_weights=True, **changes)


def test_a_loss_of_the_model_s_own_that_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student = tiny_mixtral(output_router_logits=True)
    prepare(student, QuantConfig.preset("int4", group_size=32))
    arguments = _arguments(tmp_path, bf16=False, max_steps=1)
    QATTrainer(model=student, teacher=tiny_mixtral(), args=arguments, train_dataset=Blocks()).train()
    assert "the loss that balances experts is no part of the loss" in caplog.text


# Data


def test_data_that_fills_no_batch_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"dataloader_drop_last=True drops all of the 3 training samples"):
        trainer(run, {"train_dataset": Blocks(3)}, dataloader_drop_last=True)
    assert not run.exists()
    found = trainer(run, {"train_dataset": []})
    with pytest.raises(ValueError, match="train_dataset has no sample"):
        found.train()
    found.train_dataset = Blocks(3)
    found.args.dataloader_drop_last = True
    with pytest.raises(ValueError, match="dataloader_drop_last=True drops"):
        found.train()
    assert not list(run.iterdir())


def test_steps_and_tokens_are_those_that_were_made(tmp_path: Path) -> None:
    """11 rows in batches of 4, 2 a step: an epoch is a whole step and one of the 3 rows that are left."""
    changes = {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 2}
    found = trainer(tmp_path / "a", {"train_dataset": Blocks(11)}, **changes)
    found.train()
    assert (found.state.global_step, found.tokens_trained()) == (4, (2 * 11 * 32, 2 * 11 * 32))
    dropped = trainer(tmp_path / "b", {"train_dataset": Blocks(11)}, **changes, dataloader_drop_last=True)
    dropped.train()
    assert (dropped.state.global_step, dropped.tokens_trained()) == (2, (2 * 8 * 32, 2 * 8 * 32))
    above = trainer(tmp_path / "c", {"train_dataset": Blocks(3)}, max_steps=2)
    above.train()
    assert (above.state.global_step, above.tokens_trained()) == (2, (2 * 3 * 32, 2 * 3 * 32))


def test_a_tokenizer_s_collator_and_its_tokens_are_kept(tmp_path: Path) -> None:
    found = trainer(tmp_path, {"processing_class": tiny_tokenizer()}, save_strategy="steps", save_steps=2)
    found.train()
    assert (tmp_path / "checkpoint-2" / "tokenizer.json").is_file()

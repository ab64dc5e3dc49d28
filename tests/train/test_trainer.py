"""QATTrainer and the loops that are not ours: they train a prepared model, and compute what they say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from llmqat import QATArguments, QATTrainer, QuantConfig, convert, prepare, save
from llmqat.data.blocks import Rows, TokenBlocks, token_blocks
from llmqat.data.teacher_cache import CacheHeader, TeacherCache, TeacherCacheWriter, cache_teacher
from llmqat.kernels import products
from llmqat.layers import QuantLinear, QuantModule, short_attention
from llmqat.metrics import top_probabilities
from llmqat.models import cast_parameters
from llmqat.train.adapter import LoraSettings
from tests.tiny import VOCAB_SIZE, tiny_architecture, tiny_llama, tiny_model, tiny_qwen2, tiny_tokenizer


class Blocks(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int = 16, length: int = 32, seed: int = 0) -> None:
        self.ids = torch.randint(2, 258, (count, length), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def _pair(bits: int = 3, tied: bool = True) -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = tiny_llama(tied)
    student = copy.deepcopy(teacher)
    prepare(student, QuantConfig.preset(f"int{bits}", group_size=32))
    return student, teacher


def _arguments(folder: Path, kind: type[QATArguments] = QATArguments, **changes: Any) -> QATArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return kind(**{**options, **changes})


def _kl(student: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    q = torch.log_softmax(student(ids).logits[:, :-1].float(), -1)
    p = torch.log_softmax(teacher(ids).logits[:, :-1].float(), -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def _documents(length: int = 32) -> TokenBlocks:
    ids = torch.randint(2, 258, (8, length), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(8, length, dtype=torch.uint8)
    starts[:, [0, 8, 20]] = 1
    return token_blocks(Rows(ids, starts=starts), "documents")


@pytest.mark.parametrize("teacher", ["live", "cached"])
def test_documents_stay_apart_with_any_collator(teacher: str, tmp_path: Path) -> None:
    student, original = _pair(bits=8)
    blocks = _documents()
    known: Any = original
    if teacher == "cached":
        known = cache_teacher(original, tiny_tokenizer(), blocks.rows, tmp_path / "cache", top_k=VOCAB_SIZE)
    losses = []
    for options in ({}, {"processing_class": tiny_tokenizer()}):  # which brings padding, and a mask of ones
        arguments = _arguments(tmp_path, bf16=False)
        trainer = QATTrainer(model=student, teacher=known, args=arguments, train_dataset=blocks.dataset(), **options)
        assert ("attention_mask" in next(iter(trainer.get_train_dataloader()))) == bool(options)
        losses.append(trainer.evaluate(blocks.dataset())["eval_loss"])
    assert losses[0] == losses[1]


def test_documents_that_cannot_be_kept_apart_are_refused(tmp_path: Path) -> None:
    for model_type in ("opt", "bloom"):  # one takes position ids, the other none
        teacher = tiny_model(model_type)
        student = copy.deepcopy(teacher)
        prepare(student, QuantConfig.preset("int8"))
        arguments = _arguments(tmp_path, max_steps=1, bf16=False)
        trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=_documents().dataset())
        with pytest.raises(ValueError, match=r"several documents .* attends beyond them"):
            trainer.train()
        plain = token_blocks(Rows(_documents().ids), "one text")
        QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=plain.dataset()).train()


def test_documents_in_padded_rows_are_refused(tmp_path: Path) -> None:
    student, teacher = _pair()
    trainer = QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path), train_dataset=Blocks())
    batch = {name: part[None] for name, part in _documents().dataset()[0].items()}
    mask = torch.ones_like(batch["input_ids"])
    mask[:, -3:] = 0
    with pytest.raises(ValueError, match=r"several documents .* and padding"):
        trainer.compute_loss(student, {**batch, "attention_mask": mask})
    ids = batch["input_ids"]
    left = (mask.flip(-1).cumsum(-1) - 1).clamp(min=0)  # padding on the left begins no document
    trainer.compute_loss(student, {"input_ids": ids, "attention_mask": mask.flip(-1), "position_ids": left})


def test_packed_scales_train_without_bf16(tmp_path: Path) -> None:
    student, teacher = _pair(bits=4)
    convert(student)  # a head in bfloat16, behind norms whose masters are float32
    arguments = _arguments(tmp_path, trainable="scales", bf16=False, max_steps=2)
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=_documents().dataset())
    assert trainer.train().training_loss > 0


def test_distillation_brings_the_student_nearer(tmp_path: Path) -> None:
    student, teacher = _pair(bits=2)
    ids = Blocks().ids
    with torch.no_grad():
        before = _kl(student, teacher, ids)
    trainer = QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path, bf16=False), train_dataset=Blocks())
    trainer.train()
    with torch.no_grad():
        after = _kl(student, teacher, ids)
    assert after < 0.8 * before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    layer = next(module for module in student.modules() if isinstance(module, QuantLinear))
    assert layer.log_scale.abs().max() > 0


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_the_plain_formula(tmp_path: Path, tied: bool, bf16: bool) -> None:
    student, teacher = _pair(tied=tied)
    ids = Blocks(4).ids
    plain = copy.deepcopy(student)
    trainer = QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path, bf16=bf16), train_dataset=Blocks())
    loss = trainer.training_step(student, {"input_ids": ids, "labels": ids}, torch.tensor(4 * 31))
    if bf16:
        with cast_parameters(plain, torch.bfloat16):
            expected = _kl(plain, teacher, ids)
            expected.backward()
    else:
        expected = _kl(plain, teacher, ids)
        expected.backward()
    tolerance = 0.02 if bf16 else 1e-5
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for (name, got), want in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert got.grad is not None, name
        error = (got.grad - want.grad).norm() / want.grad.norm()  # type: ignore[operator, union-attr]
        # bfloat16 rounds a gradient at every product: 2^-8 each, a few dozen of them in two layers.
        assert error < (0.1 if bf16 else 1e-4), (name, float(error))


def test_the_training_forward_computes_with_the_numbers_of_the_checkpoint(tmp_path: Path) -> None:
    student, teacher = _pair()
    seen: list[torch.Tensor] = []
    layer = student.model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    trainer = QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path, bf16=True), train_dataset=Blocks())
    seen.clear()
    ids = Blocks(2).ids
    trainer.training_step(student, {"input_ids": ids, "labels": ids}, torch.tensor(2 * 31))
    student.eval()
    with torch.no_grad(), cast_parameters(student, torch.bfloat16), short_attention():
        student(ids)
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], seen[1])


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    weights = []
    for batch, accumulation in ((8, 1), (2, 4)):
        student, teacher = _pair()
        data = Blocks()
        # Unequal numbers of labels per micro-batch: a mean of means would differ.
        labels = data.ids.clone()
        labels[::3, 10:] = -100
        rows = [{"input_ids": row, "labels": label} for row, label in zip(data.ids, labels, strict=True)]
        arguments = _arguments(
            tmp_path,
            bf16=False,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=0.0,
        )
        QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=rows).train()
        weights.append(student.model.layers[0].mlp.up_proj.weight.detach().clone())
    assert torch.allclose(*weights, atol=1e-6)
    assert not torch.equal(weights[0], tiny_llama().model.layers[0].mlp.up_proj.weight)


REUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "int3": ("llama", {"name": "int3"}, {}),
    "checkpointed": ("llama", {"name": "int3"}, {"gradient_checkpointing": True}),
    "zero points": ("qwen2", {"name": "int4", "symmetric": False}, {}),
    "ternary, warming up": ("llama", {"name": "ternary"}, {"quantization_warmup_steps": 1}),
    "embedding": ("llama", {"name": "int4", "embeddings": "int8"}, {}),
    "experts": ("mixtral", {"name": "int4"}, {}),
    "transposed": ("gpt2", {"name": "w4a8"}, {}),
}


@pytest.mark.parametrize("name", REUSED)
def test_a_weight_that_is_quantized_once_a_step_gets_the_same_gradients(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, scheme, changes = REUSED[name]
    made: dict[int, int] = {}
    original = QuantModule.quantized_matrix

    def counted(layer: QuantModule, dtype: torch.dtype) -> torch.Tensor:
        made[id(layer)] = made.get(id(layer), 0) + 1
        return original(layer, dtype)

    monkeypatch.setattr(QuantModule, "quantized_matrix", counted)
    moved, counts = [], []
    for reuse in (False, True):
        teacher = tiny_architecture(model_type)
        student = copy.deepcopy(teacher)
        prepare(student, QuantConfig.preset(**scheme, group_size=32))
        options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "optim": "sgd"}
        arguments = _arguments(tmp_path, bf16=False, reuse_quantized_weights=reuse, **options, **changes)
        trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
        made.clear()
        trainer.train()
        moved.append({key: value.detach().clone() for key, value in student.named_parameters()})
        counts.append(max(made.values()))
    assert counts[0] >= 6
    assert counts[1] == 2
    for key, parameter in moved[0].items():
        assert torch.allclose(parameter, moved[1][key], rtol=1e-5, atol=1e-7), key


def test_an_interrupted_step_leaves_no_weight_behind(tmp_path: Path) -> None:
    student, teacher = _pair()
    arguments = _arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
    layer = next(module for module in student.modules() if isinstance(module, QuantModule))
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    batch = {"input_ids": Blocks().ids[:2], "labels": Blocks().ids[:2]}
    trainer.training_step(student, dict(batch), 100)
    assert layer._reused is not None
    layer.enabled = False
    with pytest.raises(RuntimeError, match="changed within an optimizer step"):
        trainer.training_step(student, dict(batch), 100)
    assert layer._reused is None


def test_parameter_groups_have_their_own_rates_and_no_decay_on_scales(tmp_path: Path) -> None:
    student, teacher = _pair()
    arguments = _arguments(
        tmp_path, learning_rate=2e-5, scale_learning_rate=3e-3, norm_learning_rate=4e-4, weight_decay=0.1
    )
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    described = [
        ({names[id(p)].rsplit(".", 1)[-1] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in groups
    ]
    assert described == [({"weight"}, 2e-5, 0.1), ({"log_scale"}, 3e-3, 0.0), ({"weight"}, 4e-4, 0.0)]
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_zero_points_are_trained_at_their_own_rate(tmp_path: Path) -> None:
    teacher = tiny_llama()
    student = copy.deepcopy(teacher)
    prepare(student, QuantConfig.preset("int3", group_size=32, symmetric=False))
    before = {name: p.detach().clone() for name, p in student.named_parameters() if name.endswith("zero_point")}
    assert len(before) == 14
    arguments = _arguments(tmp_path, zero_point_learning_rate=0.3, weight_decay=0.1, max_steps=4)
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    group = next(g for g in trainer.create_optimizer().param_groups if g["lr"] == 0.3)
    assert {names[id(parameter)] for parameter in group["params"]} == set(before)
    assert group["weight_decay"] == 0.0
    trainer.train()
    moved = [p for name, p in student.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert moved
    layer = student.model.layers[0].mlp.up_proj
    _, zero_point = layer.scale_and_zero_point()
    assert torch.equal(zero_point, zero_point.round())
    assert torch.equal(
        convert(copy.deepcopy(student)).model.layers[0].mlp.up_proj.weight.float(),
        layer.quantized_weight(torch.bfloat16).float(),
    )


PRESETS_TO_TRAIN: dict[str, dict[str, Any]] = {
    "int2-seq": {"group_size": 32},
    "ternary": {"group_size": 32},
    "ternary tensor": {"strategy": "tensor"},
    "w8a8": {},
    "w4a8kv8": {"group_size": 32},
    "int4 dynamic": {"group_size": 32, "scales": "dynamic"},
    "int4 fixed": {"group_size": 32, "scales": "fixed"},
    "int4 asymmetric": {"group_size": 32, "symmetric": False},
    "fp8": {},
    "fp8-block32": {},
    "mxfp4": {},
    "nvfp4a16": {},
    "int4 embeddings": {"group_size": 32, "embeddings": "int4"},
}


@pytest.mark.parametrize("name", PRESETS_TO_TRAIN)
def test_loss_and_gradients_of_every_kind_of_scheme_are_those_of_the_plain_formula(tmp_path: Path, name: str) -> None:
    teacher = tiny_llama()
    student = copy.deepcopy(teacher)
    prepare(student, QuantConfig.preset(name.split()[0], **PRESETS_TO_TRAIN[name]))
    plain, ids = copy.deepcopy(student), Blocks(4).ids
    trainer = QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path, bf16=False), train_dataset=Blocks())
    loss = trainer.training_step(student, {"input_ids": ids, "labels": ids}, torch.tensor(4 * 31))
    expected = _kl(plain, teacher, ids)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for (parameter_name, got), want in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert got.grad is not None, parameter_name
        error = (got.grad - want.grad).norm() / want.grad.norm().clamp(min=1e-9)  # type: ignore[operator, union-attr]
        assert error < 1e-3, (parameter_name, float(error))


def test_the_warm_up_blends_in_training_only_and_ends_whole(tmp_path: Path) -> None:
    teacher = tiny_llama()
    student = copy.deepcopy(teacher)
    prepare(student, QuantConfig.preset("ternary", group_size=32))
    layer = student.model.layers[0].mlp.up_proj
    seen: list[float] = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(module.strength))
    arguments = _arguments(tmp_path, max_steps=5, quantization_warmup_steps=3)
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks(), eval_dataset=Blocks(4))
    seen.clear()
    trainer.train()
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0]
    trainer.evaluate()
    assert seen[-1] == 1.0
    layer.strength = 0.5
    with pytest.raises(ValueError, match=r"warm-up of quantization is not over \(quantization_warmup_steps\)"):
        save(student, tmp_path / "out")
    with pytest.raises(ValueError, match="quantization_warmup_steps=-1 is negative"):
        _arguments(tmp_path, quantization_warmup_steps=-1)


def test_scales_alone_are_trained(tmp_path: Path) -> None:
    student, teacher = _pair(bits=2)
    with torch.no_grad():
        before_kl = _kl(student, teacher, Blocks().ids)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    arguments = _arguments(tmp_path, trainable="scales", scale_learning_rate=2e-2, max_steps=16)
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
    trainer.train()
    moved = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.endswith("log_scale") or "norm" in name}
    with torch.no_grad():
        assert _kl(student, teacher, Blocks().ids) < 0.95 * before_kl
    state = {id(parameter) for parameter in trainer.optimizer.optimizer.state}
    assert state == {id(student.get_parameter(name)) for name in moved}


def test_scales_alone_need_learned_scales(tmp_path: Path) -> None:
    student, teacher = tiny_llama(), tiny_llama()
    prepare(student, QuantConfig.preset("int4", group_size=32, scales="fixed"))
    with pytest.raises(ValueError, match="needs learned scales"):
        QATTrainer(
            model=student, teacher=teacher, args=_arguments(tmp_path, trainable="scales"), train_dataset=Blocks()
        )
    with pytest.raises(ValueError, match="trainable='some' is unknown; choose one of all, scales"):
        _arguments(tmp_path, trainable="some")


def test_frozen_embeddings_do_not_move(tmp_path: Path) -> None:
    student, teacher = _pair()
    before = student.get_input_embeddings().weight.detach().clone()
    arguments = _arguments(tmp_path, max_steps=2, freeze_embeddings=True)
    QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks()).train()
    assert torch.equal(student.get_input_embeddings().weight, before)


@pytest.mark.parametrize("preset", ["int3", "w4a8kv8"])
def test_gradient_checkpointing_gives_the_same_weights(tmp_path: Path, preset: str) -> None:
    weights = []
    for checkpointing in (False, True):
        teacher = tiny_llama()
        student = copy.deepcopy(teacher)
        prepare(student, QuantConfig.preset(preset, group_size=32))
        arguments = _arguments(tmp_path, max_steps=2, bf16=True, gradient_checkpointing=checkpointing)
        QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks()).train()
        weights.append(student.model.layers[0].self_attn.q_proj.weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_oss", "gpt2"])
def test_a_resumed_run_ends_bit_identical(tmp_path: Path, model_type: str) -> None:
    def run(folder: Path, stop: int | None, resume: bool) -> PreTrainedModel:
        teacher = tiny_architecture(model_type)
        student = copy.deepcopy(teacher)
        prepare(student, QuantConfig.preset("w4a8kv8", group_size=32, symmetric=False))
        arguments = _arguments(folder, max_steps=6, save_strategy="steps", save_steps=3)
        trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
        if stop is not None:
            trainer.add_callback(_StopAt(stop))
        trainer.train(resume_from_checkpoint=resume or None)
        return student

    whole = run(tmp_path / "whole", None, False)
    run(tmp_path / "halves", 3, False)
    resumed = run(tmp_path / "halves", None, True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def _StopAt(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
            control.should_training_stop = state.global_step >= step
            return control

    return Stop()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_bitsandbytes_optimizers_keep_their_state_in_8_bits_and_resume(tmp_path: Path, optim: str) -> None:
    results = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        student, teacher = _pair(bits=2)
        arguments = _arguments(tmp_path, optim=optim, save_strategy="steps", save_steps=4)
        trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
        trainer.train(resume_from_checkpoint=resume)
        results.append(student.state_dict())
        state = trainer.optimizer.optimizer.state  # under accelerate's wrapper
    weights = [m.weight for m in student.modules() if isinstance(m, QuantLinear) and m.weight.numel() >= 4096]
    assert weights  # transformers keeps embeddings in 32 bits, bitsandbytes what is small
    for weight in weights:
        assert any(torch.is_tensor(entry) and entry.dtype == torch.uint8 for entry in state[weight].values())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))


def test_evaluation_reports_the_same_divergence(tmp_path: Path) -> None:
    student, teacher = _pair()
    trainer = QATTrainer(
        model=student,
        teacher=teacher,
        args=_arguments(tmp_path, bf16=False),
        train_dataset=Blocks(),
        eval_dataset=Blocks(8),
    )
    with torch.no_grad():
        expected = _kl(student, teacher, Blocks(8).ids).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_evaluation_reports_the_perplexity_of_labelled_tokens(tmp_path: Path) -> None:
    student, teacher = _pair()
    data = Blocks(6)
    labels = data.ids.clone()
    labels[0, 5:] = labels[3, :20] = -100
    samples = [{"input_ids": ids, "labels": wanted} for ids, wanted in zip(data.ids, labels, strict=True)]
    arguments = _arguments(tmp_path, bf16=False, per_device_eval_batch_size=4)
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=data, eval_dataset=samples)
    with torch.no_grad():
        expected = cross_entropy(student(data.ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).exp()
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(float(expected), rel=1e-5)
    arguments = _arguments(tmp_path, prediction_loss_only=True)
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=data, eval_dataset=samples)
    assert "eval_perplexity" not in trainer.evaluate()


def test_low_precision_masters_are_raised(tmp_path: Path) -> None:
    teacher = tiny_llama().to(torch.bfloat16)
    student = copy.deepcopy(teacher)
    prepare(student, QuantConfig.preset("int4", group_size=32))
    QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path), train_dataset=Blocks())
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_a_stock_trainer_trains_a_prepared_model(tmp_path: Path) -> None:
    student, _ = _pair()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=student, args=arguments, train_dataset=Blocks(4))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    layer = student.model.layers[0].mlp.up_proj
    assert layer.log_scale.abs().max() > 0


def test_a_plain_accelerate_loop_trains_a_prepared_model() -> None:
    student, _ = _pair()
    AcceleratorState._reset_state()  # a Trainer of another test has set the precision of the whole process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(student, optimizer, DataLoader(Blocks(8), batch_size=4))
    losses = []
    for _ in range(6):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_model_that_is_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call llmqat\.prepare"):
        QATTrainer(model=tiny_llama(), teacher=tiny_llama(), args=_arguments(tmp_path), train_dataset=Blocks())


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    student, _ = _pair()
    with pytest.raises(ValueError, match="vocabulary has 384 entries, the teacher's 400"):
        QATTrainer(model=student, teacher=tiny_qwen2(vocab_size=400), args=_arguments(tmp_path), train_dataset=Blocks())


@pytest.mark.parametrize(
    ("changes", "message"), [({"fp16": True}, "fp16=True is refused"), ({"scale_learning_rate": -1.0}, "is negative")]
)
def test_wrong_arguments_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _arguments(tmp_path, **changes)


def test_plain_training_arguments_are_checked_too(tmp_path: Path) -> None:
    student, teacher = _pair()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments.fp16 = True
    with pytest.raises(ValueError, match="fp16=True is refused"):
        QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
    arguments.fp16 = False
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
    assert trainer.args.ddp_find_unused_parameters is False
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {arguments.learning_rate, 1e-3}


def _cache(folder: Path, data: Blocks, top_k: int = 64) -> TeacherCache:
    return cache_teacher(tiny_llama(), tiny_tokenizer(), data.ids, folder, top_k=top_k)


def test_a_cache_teaches_what_the_model_does(tmp_path: Path) -> None:
    cache = _cache(tmp_path / "cache", Blocks(), VOCAB_SIZE)
    weights = []
    for teacher in (tiny_llama(), cache):
        student, _ = _pair()
        arguments = _arguments(tmp_path, bf16=False, optim="sgd", learning_rate=0.05, max_grad_norm=0.0)
        QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks()).train()
        weights.append(student.model.layers[0].mlp.up_proj.weight.detach().clone())
    start = _pair()[0].model.layers[0].mlp.up_proj.weight
    moved = (weights[0] - start).norm()
    assert (weights[1] - weights[0]).norm() < 0.02 * moved  # float16 keeps a probability to 2^-11


def test_a_run_from_a_cache_resumes_bit_identical_and_brings_the_student_nearer(tmp_path: Path) -> None:
    cache = _cache(tmp_path / "cache", Blocks())

    def run(folder: Path, stop: int | None, resume: bool) -> PreTrainedModel:
        student, _ = _pair(bits=2)
        arguments = _arguments(folder, max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2)
        arguments.per_device_train_batch_size = 2
        trainer = QATTrainer(
            model=student, teacher=cache, args=arguments, train_dataset=Blocks(), eval_dataset=Blocks(8)
        )
        if stop is not None:
            trainer.add_callback(_StopAt(stop))
        before = trainer.evaluate()["eval_loss"]
        trainer.train(resume_from_checkpoint=resume or None)
        assert trainer.evaluate()["eval_loss"] < before
        return student

    whole = run(tmp_path / "whole", None, False)
    run(tmp_path / "halves", 3, False)
    resumed = run(tmp_path / "halves", None, True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_padding_and_unlabelled_tokens_are_left_out_of_a_cached_loss(tmp_path: Path) -> None:
    student, teacher = _pair()
    ids, lengths = Blocks(3).ids, (32, 20, 9)
    with TeacherCacheWriter(tmp_path / "cache", CacheHeader.of(teacher, tiny_tokenizer(), VOCAB_SIZE)) as writer:
        for row, length in zip(ids, lengths, strict=True):
            with torch.no_grad():
                logits = teacher(row[None, :length]).logits[0, :-1]
            writer.add(row[:length], top_probabilities(logits, VOCAB_SIZE))
    mask = torch.stack([(torch.arange(32) < length).long() for length in lengths])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :10] = -100
    losses = []
    for taught in (teacher, TeacherCache(tmp_path / "cache")):
        trainer = QATTrainer(model=student, teacher=taught, args=_arguments(tmp_path, bf16=False), train_dataset=[])
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        losses.append(trainer.compute_loss(student, inputs, num_items_in_batch=torch.tensor(49)).item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_a_cache_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    cache = _cache(tmp_path / "cache", Blocks(4))
    student, _ = _pair()
    trainer = QATTrainer(model=student, teacher=cache, args=_arguments(tmp_path), train_dataset=Blocks())
    with pytest.raises(ValueError, match="is not in the teacher cache"):
        trainer.train()
    larger = tiny_qwen2(vocab_size=400)
    prepare(larger, QuantConfig.preset("int3", group_size=32))
    with pytest.raises(ValueError, match="vocabulary has 400 entries, the teacher's 384"):
        QATTrainer(model=larger, teacher=cache, args=_arguments(tmp_path), train_dataset=Blocks())


def test_logits_that_are_made_in_an_unknown_way_are_not_trained_on(tmp_path: Path) -> None:
    teacher, student = tiny_llama(), tiny_llama()
    prepare(student, QuantConfig.preset("int4", group_size=32))
    teacher.lm_head.register_forward_hook(lambda module, args, output: 3 * output)
    with pytest.raises(ValueError, match="computes its logits from the output head in a way that llmqat does not know"):
        QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path, bf16=False), train_dataset=Blocks())


class EmulatedProducts(TorchDispatchMode):
    """Counts products of bfloat16 matrices with more rows than are faster emulated."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        left = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(func.overloadpacket.__name__)
        if left is not None and args[left].dtype == torch.bfloat16 and args[left].shape[-2] > products.EMULATED_ROWS:
            self.found.append(f"{func} {list(args[left].shape)}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trains", ["all", "scales", "packed scales", "lora", "packed lora"])
def test_no_product_is_emulated_on_a_cpu_without_bfloat16(
    trains: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_HAS_BF16", False)
    student, teacher = _pair()
    teacher.bfloat16()
    if trains.startswith("packed"):
        convert(student, torch.bfloat16)
    if "lora" in trains:
        student = LoraSettings(r=2).attach(student)
    changes = {"trainable": "scales"} if "scales" in trains else {}
    arguments = _arguments(tmp_path, bf16=True, max_steps=2, gradient_checkpointing=checkpointing, **changes)
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks(), eval_dataset=Blocks())
    with EmulatedProducts() as emulated:
        trainer.train()
        trainer.evaluate()
    assert emulated.found == []

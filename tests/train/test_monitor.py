"""What is logged while a model trains, against codes taken beside it, and how it reaches TensorBoard and MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from llmqat.layers import QuantConfig, QuantModule, prepare
from llmqat.train import MonitorSettings, QATTrainer, QuantizationMonitor
from llmqat.train.monitor import clipped_share, codes_of, gradient_norms
from tests.tiny import tiny_llama
from tests.train.test_trainer import Blocks, _arguments, _pair

ALL = 1_000_000


class Recorder(TrainerCallback):
    """Keeps all codes after each step."""

    def __init__(self) -> None:
        self.codes: list[list[torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        layers = [module for module in given["model"].modules() if isinstance(module, QuantModule)]
        self.codes.append([layer.codes().clone() for layer in layers])


def trained(folder: Path, monitor: MonitorSettings | None, **changes: Any) -> tuple[QATTrainer, Recorder]:
    student, teacher = _pair(bits=2)
    recorder = Recorder()
    arguments = _arguments(folder, learning_rate=1e-2, scale_learning_rate=1e-2, **changes)
    trainer = QATTrainer(
        model=student,
        teacher=teacher,
        args=arguments,
        train_dataset=Blocks(),
        eval_dataset=Blocks(4, seed=1),
        callbacks=[recorder],
    )
    if monitor is not None:
        QuantizationMonitor(monitor).attach(trainer)
    trainer.train()
    return trainer, recorder


def looks(trainer: Trainer) -> dict[int, dict[str, float]]:
    return {entry["step"]: entry for entry in trainer.state.log_history if "quantization/clipped" in entry}


def share(masks: list[torch.Tensor]) -> float:
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


@pytest.mark.parametrize("every", [1, 4])
def test_flips_and_oscillation_are_those_of_all_codes(tmp_path: Path, every: int) -> None:
    trainer, recorder = trained(tmp_path, MonitorSettings(every=every, layers=100, weights=ALL))
    found = looks(trainer)
    assert sorted(found) == [step for step in range(1, 9) if step % every == 0]
    for step, entry in found.items():
        if step < 3:
            assert "quantization/oscillating" not in entry
            continue
        now, before, earlier = (recorder.codes[step - 1 - back] for back in range(3))
        changed = [new != old for new, old in zip(now, before, strict=True)]
        back = [c & (new == old) for c, new, old in zip(changed, now, earlier, strict=True)]
        assert entry["quantization/flipped"] == pytest.approx(share(changed))
        assert entry["quantization/oscillating"] == pytest.approx(share(back))
        assert entry["quantization/flipped"] > entry["quantization/oscillating"] >= 0
    layers = [module for module in trainer.model.modules() if isinstance(module, QuantModule)]
    drift = sum(float(layer.log_scale.detach().abs().mean()) for layer in layers) / len(layers)
    assert found[8]["quantization/scale_drift"] == pytest.approx(drift)
    assert found[8]["grad_norm/weights"] > 0
    assert found[8]["grad_norm/log_scales"] > 0


def test_drift_counts_from_the_calibration_after_a_resume(tmp_path: Path) -> None:
    def drift(resume: str | None) -> list[float]:
        student, teacher = _pair(bits=2)
        arguments = _arguments(tmp_path, max_steps=4, scale_learning_rate=1e-2, save_strategy="steps", save_steps=2)
        trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks())
        QuantizationMonitor(MonitorSettings(every=1)).attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["quantization/scale_drift"] for entry in looks(trainer).values()]

    whole = drift(None)
    assert drift(str(tmp_path / "checkpoint-2"))[-2:] == whole[-2:]


def test_watching_changes_nothing(tmp_path: Path) -> None:
    watched, _ = trained(tmp_path / "a", MonitorSettings(every=1, layers=3, weights=100))
    alone, _ = trained(tmp_path / "b", None)
    assert looks(alone) == {}
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (watched, alone)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    for (name, one), other in zip(watched.model.named_parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("scheme", [{}, {"symmetric": False}, {"strategy": "channel", "group_size": None}])
def test_clipping_counts_weights_beyond_the_grid(scheme: dict[str, Any]) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int3", **{"group_size": 32, **scheme}))
    layer = next(module for module in model.modules() if isinstance(module, QuantModule))
    scale, zero_point = layer.scale_and_zero_point()
    layer.set_scale(scale.detach() / 2, zero_point)
    steps = (layer.weight - layer.quantized_matrix(torch.float32)).abs() / layer.step_sizes()
    assert clipped_share(layer, ALL) == pytest.approx(float((steps > 0.5 + 1e-4).float().mean()), abs=1e-3)
    assert clipped_share(layer, ALL) > 0.01
    assert torch.equal(codes_of(layer, ALL), layer.codes())
    assert codes_of(layer, 1).shape == (1, 64)


def test_a_stock_trainer_is_watched_too(tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    arguments = TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, report_to="none", save_strategy="no")
    trainer = Trainer(model=model, args=arguments, train_dataset=Blocks())
    QuantizationMonitor(MonitorSettings(every=2)).attach(trainer)
    trainer.train()
    assert sorted(looks(trainer)) == [2, 4]
    with pytest.raises(ValueError, match="no quantized weight to look at"):
        QuantizationMonitor().attach(Trainer(model=tiny_llama(), args=arguments))


def test_norms_of_gradients_by_group() -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    ids = Blocks().ids[:2]
    model(input_ids=ids, labels=ids).loss.backward()
    found = gradient_norms(model)
    squares = {"weights": 0.0, "log_scales": 0.0, "norms": 0.0}
    for name, parameter in model.named_parameters():
        kind = "log_scales" if name.endswith("log_scale") else "weights" if parameter.dim() > 1 else "norms"
        squares[kind] += float(parameter.grad.square().sum())
    assert found == {f"grad_norm/{name}": pytest.approx(total**0.5, rel=1e-4) for name, total in squares.items()}


def test_tensorboard_holds_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: trackers)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    evaluations = {"eval_strategy": "steps", "eval_steps": 4}
    trainer, _ = trained(tmp_path, MonitorSettings(every=4, layers=2), report_to="tensorboard", **evaluations)
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = set(board.Tags()["scalars"])
    named = {f"train/quantization/{name}" for name in ("flipped", "oscillating", "scale_drift", "clipped")}
    assert named | {"train/loss", "train/grad_norm/weights", "train/grad_norm/log_scales"} <= tags
    assert len([tag for tag in tags if tag.startswith("train/quantization/clipped/model.layers.")]) == 2
    flips = {event.step: event.value for event in board.Scalars("train/quantization/flipped")}
    assert flips == {step: pytest.approx(entry["quantization/flipped"]) for step, entry in looks(trainer).items()}
    perplexities = {event.step: event.value for event in board.Scalars("eval/perplexity")}
    history = trainer.state.log_history
    assert perplexities == {e["step"]: pytest.approx(e["eval_perplexity"]) for e in history if "eval_perplexity" in e}
    assert sorted(perplexities) == [4, 8]


def test_mlflow_keeps_them_in_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (extra: mlflow)")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    trainer, _ = trained(tmp_path, MonitorSettings(every=4, layers=2), report_to="mlflow")
    run = mlflow.last_active_run()
    mlflow.end_run()
    assert run.data.metrics["quantization/flipped"] == pytest.approx(looks(trainer)[8]["quantization/flipped"])
    assert "quantization/scale_drift" in run.data.metrics

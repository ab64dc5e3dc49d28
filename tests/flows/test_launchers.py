"""`accelerate launch` and `torchrun` start the recipe: world size asserted, weights equal on all processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llmqat.recipe import load_recipe, run
from llmqat.train import QATTrainer
from tests.children import ROOT, launched, started, torchrun
from tests.flows.small import small

RECIPE = ROOT / "recipes" / "smollm2-135m-int4.yaml"
RECORDER = ROOT / "tests" / "flows" / "record_training.py"
# Eight blocks are one step of four on each of two processes, or of eight on one: every step sees the same text, so the
# loss must fall. Plain gradient descent in float32 makes it depend on the size of the gradient, which AdamW would hide.
STEPS = (
    "quant.preset=int2",
    "train={max_steps: 6, optim: sgd, max_grad_norm: 0, learning_rate: 0.3, scale_learning_rate: 0.3, "
    "lr_scheduler_type: constant, bf16: false, logging_steps: 1, save_steps: 3, per_device_train_batch_size: 4}",
    "monitor.every=2",
)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


# Adapters inside the quantizers, with the model as its own teacher and recomputed activations. They start at zero, and
# the last digit of their sums decides which codes flip: the second loss, a twentieth below the first, shows that
# gradients agree, to a hundredth of it; later ones drift.
ADAPTERS = (
    "quant.preset=int4",
    "lora={r: 4, lora_alpha: 32}",
    "train.gradient_checkpointing=true",
    "train.learning_rate=0.1",
    "train.scale_learning_rate=0.1",
)


@pytest.mark.parametrize(
    ("more", "steps_alike", "tolerance"), [((), 6, 1e-3), (ADAPTERS, 2, 1e-2)], ids=["weights", "adapters"]
)
def test_two_processes_train_the_same_weights_as_one(
    more: tuple[str, ...],
    steps_alike: int,
    tolerance: float,
    tiny_folder: Path,
    tmp_path: Path,
):
    both, one = tmp_path / "both", tmp_path / "one"
    both.mkdir()
    one.mkdir()
    words = ["train", str(RECIPE)]
    done = launched(*torchrun(2), str(RECORDER), str(both), *words, *small(tiny_folder, both / "run", *STEPS, *more))
    first, second = records(both)
    assert first["world_size"] == second["world_size"] == 2
    assert first["digest"] == second["digest"]
    assert all(map(math.isfinite, first["losses"]))
    assert first["losses"][-1] < (0.95 if more else 0.8) * first["losses"][0]
    results = json.loads((both / "run" / "results.json").read_text())
    assert results["training"]["processes"] == 2
    assert results["training"]["own_teacher"] == bool(more)
    assert results["training"]["tokens"] == 6 * 2 * 4 * 32
    assert done.stdout.count("checkpoint:") == 1  # one process reports

    alone = small(tiny_folder, one / "run", *STEPS, *more, "train.per_device_train_batch_size=8")
    launched("tests.flows.record_training", str(one), *words, *alone)
    expected = records(one)[0]["losses"]
    assert expected[:steps_alike] == pytest.approx(first["losses"][:steps_alike], rel=tolerance)


def test_a_run_goes_on_with_another_number_of_processes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    eight, four = ("train.per_device_train_batch_size=8",), ("train.per_device_train_batch_size=4",)
    whole = run(load_recipe(RECIPE, small(tiny_folder, tmp_path / "whole", *STEPS, *eight)))
    assert whole is not None
    training_step = QATTrainer.training_step

    def interrupted(trainer: QATTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        return training_step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(QATTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(load_recipe(RECIPE, small(tiny_folder, tmp_path / "run", *STEPS, *eight)))
    words = ["-m", "llmqat", "train", str(RECIPE), *small(tiny_folder, tmp_path / "run", *STEPS, *four)]
    launched(*torchrun(2), *words)
    training = json.loads((tmp_path / "run" / "results.json").read_text())["training"]
    assert training["resumed_from"] == "checkpoint-3"
    assert training["processes"] == 2
    losses = [[e["loss"] for e in facts["history"] if "loss" in e] for facts in (training, whole.training)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_accelerate_launch_runs_the_recipe(tiny_folder: Path, tmp_path: Path):
    words = ["train", str(RECIPE), *small(tiny_folder, tmp_path / "run")]
    accelerate = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    done = launched(*accelerate, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "llmqat", *words)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["training"]["processes"] == 1
    assert results["training"]["steps"] == 2
    assert "checkpoint:" in done.stdout


def test_accelerate_launch_on_a_cpu_starts_one_process_and_the_run_says_so(tiny_folder: Path, tmp_path: Path):
    words = ["train", str(RECIPE), *small(tiny_folder, tmp_path / "run")]
    configured = ["accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / "cpu.yaml")]
    done = started(*configured, "--num_processes", "2", "-m", "llmqat", *words)
    assert done.returncode != 0
    assert "2 or more processes were asked for, and 1 runs" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()

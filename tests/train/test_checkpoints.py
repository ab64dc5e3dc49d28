"""Checkpoints are whole or not there: killed runs end bit-identical, a full disk costs nothing, damage is noticed."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from transformers import TrainerCallback

from llmqat import QATTrainer, QuantConfig, prepare
from llmqat.train.checkpoints import MANIFEST_FILE, UNFINISHED_FOLDER, last_checkpoint, what_it_lacks
from tests.children import Moment, die_at
from tests.tiny import tiny_llama
from tests.train.test_trainer import Blocks, _arguments, _pair

KILLS = int(os.environ.get("LLMQAT_TEST_KILLS", "3"))
FINAL = "final.safetensors"


def train_until(output: Path, moment: Moment | None) -> None:
    """Trains, and leaves the weights, unless a SIGKILL ends it.

    The training has all that must be gone on with: epochs in an order of their own, accumulation, dropout, zero points,
    both warm-ups.
    """
    if moment is not None:
        die_at(moment, output)
    teacher = tiny_llama(attention_dropout=0.1)
    student = copy.deepcopy(teacher)
    prepare(student, QuantConfig.preset("int3", group_size=32, symmetric=False))
    arguments = _arguments(
        output,
        max_steps=2 * KILLS + 2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        warmup_steps=2,
        quantization_warmup_steps=5,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks(10))
    trainer.train(resume_from_checkpoint=last_checkpoint(output) is not None)
    save_model(student, str(output / FINAL))


def moments() -> Iterator[Moment | None]:
    """Yields the moments to be killed at, in a step or in a saving, then nothing."""
    draw = random.Random(0)
    for number in range(KILLS):
        yield ("module", draw.randint(1, 400)) if number % 2 else ("file", draw.randint(1, 50))
    yield None


def test_a_run_that_is_killed_ends_with_the_same_weights(tmp_path: Path, forkserver: ForkServerContext) -> None:
    saving = 0
    for moment in moments():
        child = forkserver.Process(target=train_until, args=(tmp_path / "run", moment))
        child.start()
        child.join(120)
        assert child.exitcode == (0 if moment is None else -signal.SIGKILL)
        saving += (tmp_path / "run" / UNFINISHED_FOLDER).is_dir()
    assert saving > 0
    assert [path.name for path in (tmp_path / "run").glob("*-*")] == [f"checkpoint-{2 * KILLS + 2}"]
    train_until(tmp_path / "whole", None)
    assert (tmp_path / "run" / FINAL).read_bytes() == (tmp_path / "whole" / FINAL).read_bytes()


def _saving_trainer(folder: Path, eval_dataset: Any = None, **changes: Any) -> QATTrainer:
    student, teacher = _pair()
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, **changes}
    arguments = _arguments(folder, **options)
    return QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks(), eval_dataset=eval_dataset)


class _AtStep(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == self.step:
            self.action()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB, which takes one checkpoint of the tiny model and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a disk that can be full needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("left", [0, 400_000, 1_000_000])
def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(small_disk: Path, left: int) -> None:
    output = small_disk / "run"

    def fill() -> None:
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "else").write_bytes(b"x" * (free - left))

    trainer = _saving_trainer(output)
    trainer.add_callback(_AtStep(2, fill))
    with pytest.raises(OSError, match=r"checkpoint of step 4 could not be written.* bytes free.*checkpoint-2 is whole"):
        trainer.train()
    assert [path.name for path in output.iterdir()] == ["checkpoint-2"]
    (small_disk / "else").unlink()
    resumed = _saving_trainer(output)
    resumed.train(resume_from_checkpoint=True)
    assert [path.name for path in output.iterdir()] == ["checkpoint-4"]
    undisturbed = _saving_trainer(small_disk.parent / "whole")
    undisturbed.train()
    for (name, one), other in zip(
        resumed.model.state_dict().items(), undisturbed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_what_was_cut_short_is_left_out(tmp_path: Path) -> None:
    _saving_trainer(tmp_path, save_total_limit=None).train()
    newest = tmp_path / "checkpoint-4"
    files = [path for path in newest.iterdir() if path.name != MANIFEST_FILE]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
        path.name for path in files
    }
    assert last_checkpoint(tmp_path) == newest
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert what_it_lacks(newest) == f"{path.name} has {len(content) // 2:,} bytes of {len(content):,}"
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
        path.unlink()
        assert what_it_lacks(newest) == f"{path.name} is missing"
        path.write_bytes(content)
    (newest / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 is not whole: no readable manifest\.json"):
        _saving_trainer(tmp_path).train(resume_from_checkpoint=str(newest))
    trainer = _saving_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert last_checkpoint(tmp_path) == newest  # written anew
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        _saving_trainer(tmp_path / "absent").train(resume_from_checkpoint=True)


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    trainer = _saving_trainer(
        tmp_path,
        eval_dataset=Blocks(8),
        max_steps=6,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # an early one, as the loss falls
        save_total_limit=2,
        learning_rate=1e-2,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {Path(best).name, "checkpoint-6"}
    recorded = json.loads((Path(best) / "trainer_state.json").read_text())
    assert recorded["best_model_checkpoint"] == best


def _no_step(*_: Any, **__: Any) -> None:
    raise AssertionError("a step was made")


@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": 3},  # in the middle of an epoch of 4 steps
        {"max_steps": 4},  # at its end
        {"max_steps": -1, "num_train_epochs": 1.5},
        {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch"},
    ],
    ids=["steps", "a whole epoch", "epochs and a half", "an epoch"],
)
def test_a_finished_training_makes_no_step_more(
    length: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _saving_trainer(tmp_path, **length)
    first.train()
    again = _saving_trainer(tmp_path, **length)
    monkeypatch.setattr(QATTrainer, "training_step", _no_step)
    output = again.train(resume_from_checkpoint=True)
    steps = first.state.global_step
    assert output.global_step == again.state.global_step == steps
    assert again.tokens_trained() == (first.tokens_trained()[0], 0) == (steps * 4 * 32, 0)
    for (name, found), wanted in zip(again.model.named_parameters(), first.model.parameters(), strict=True):
        assert torch.equal(found, wanted), name
    histories = [[entry for entry in one.state.log_history if "loss" in entry] for one in (first, again)]
    assert histories[0] == histories[1]
    assert output.training_loss != output.training_loss  # NaN: no step, no mean
    assert "train_loss" not in again.state.log_history[-1]


def test_a_checkpoint_of_more_steps_is_refused(tmp_path: Path) -> None:
    _saving_trainer(tmp_path, max_steps=4).train()
    with pytest.raises(
        ValueError, match="checkpoint-4 has made 4 optimizer steps, and the training has 3; give an earlier"
    ):
        _saving_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_a_model_without_its_optimizer_is_not_trained_further(tmp_path: Path) -> None:
    _saving_trainer(tmp_path, max_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match="checkpoint-2 holds the model alone"):
        _saving_trainer(tmp_path, max_steps=4, save_only_model=True).train(resume_from_checkpoint=True)
    finished = _saving_trainer(tmp_path, max_steps=2, save_only_model=True)
    finished.train(resume_from_checkpoint=True)
    assert finished.state.global_step == 2


def test_the_best_model_is_found_again_by_a_finished_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "eval_dataset": Blocks(8),
        "max_steps": 3,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "save_total_limit": 1,
        "learning_rate": 1e-2,
    }
    first = _saving_trainer(tmp_path / "run", **changes)
    first.train()
    best = first.state.best_global_step
    assert best < 3
    (tmp_path / "run").rename(tmp_path / "moved")
    again = _saving_trainer(tmp_path / "moved", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(QATTrainer, "training_step", _no_step)
        again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "moved" / f"checkpoint-{best}")
    for (name, found), wanted in zip(again.model.named_parameters(), first.model.parameters(), strict=True):
        assert torch.equal(found, wanted), name
    shutil.rmtree(tmp_path / "moved" / f"checkpoint-{best}")
    with pytest.raises(ValueError, match=r"load_best_model_at_end needs .*, the best so far"):
        _saving_trainer(tmp_path / "moved", **changes).train(resume_from_checkpoint=True)


def test_a_step_keeps_its_number_of_samples(tmp_path: Path) -> None:
    """Cut up in another way it is the same training: what a run with fewer processes needs."""
    losses = []
    for folder, batch, accumulation in ((tmp_path / "a", 4, 1), (tmp_path / "b", 1, 4)):
        _saving_trainer(folder, max_steps=2, lr_scheduler_type="constant").train()
        changed = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = _saving_trainer(folder, lr_scheduler_type="constant", **changed)
        trainer.train(resume_from_checkpoint=True)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    with pytest.raises(ValueError, match=r"4 samples a step \(1 processes\), now a step has 2"):
        _saving_trainer(tmp_path / "a", per_device_train_batch_size=2).train(resume_from_checkpoint=True)

"""Evaluations while training: perplexity always, and the logits for a function of the user's that asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, EvalPrediction, TrainingArguments

from llmqat import QATArguments, QATTrainer
from tests.tiny import VOCAB_SIZE
from tests.train.test_trainer import Blocks, _arguments, _pair

ROWS = [{"input_ids": ids, "labels": ids} for ids in Blocks(6).ids]


def trainer(folder: Path, options: dict[str, Any] | None = None, **changes: Any) -> QATTrainer:
    student, teacher = _pair()
    settings = {"bf16": False, "per_device_eval_batch_size": 4, **changes}
    given = {"eval_dataset": ROWS, "train_dataset": Blocks(), **(options or {})}
    return QATTrainer(model=student, teacher=teacher, args=_arguments(folder, **settings), **given)


@torch.no_grad()
def expected(found: QATTrainer) -> tuple[np.ndarray[Any, Any], float]:
    """The logits of all rows, and the perplexity of the rows."""
    ids = torch.stack([row["input_ids"] for row in ROWS])
    logits = found.model(ids).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return logits.numpy(), float(nll.exp())


class Own:
    """Accuracy, and what it was given."""

    def __init__(self) -> None:
        self.seen: list[EvalPrediction] = []

    def __call__(self, evaluated: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        self.seen.append(evaluated)
        return {"accuracy": 0.5} if compute_result else {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eval_accumulation_steps": 1},
        {"eval_do_concat_batches": False},
        {"batch_eval_metrics": True},
        {"include_for_metrics": ["inputs", "loss"]},
    ],
    ids=lambda changes: next(iter(changes), "plain"),
)
@pytest.mark.parametrize("own", [False, True])
def test_every_way_to_gather_gives_the_same_metrics(changes: dict[str, Any], own: bool, tmp_path: Path) -> None:
    function = Own()
    found = trainer(tmp_path, {"compute_metrics": function} if own else {}, **changes)
    logits, perplexity = expected(found)
    metrics = found.evaluate()
    assert metrics["eval_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert ("eval_accuracy" in metrics) == own
    if not own:
        return
    parts = [one.predictions for one in function.seen]
    if not changes.get("batch_eval_metrics"):
        (parts,) = ([part] if isinstance(part, np.ndarray) else part for part in parts)
    assert np.allclose(np.concatenate([np.asarray(part) for part in parts]), logits, atol=1e-4)
    first = function.seen[0]
    labels = first.label_ids if not isinstance(first.label_ids, list) else np.concatenate(first.label_ids)
    assert np.array_equal(np.asarray(labels)[:4], np.stack([row["labels"] for row in ROWS[:4]]))
    if "include_for_metrics" in changes:
        assert first.inputs.shape == (6, 32)
        assert len(first.losses) == 6


def test_logits_are_whole_only_where_they_are_asked_for(tmp_path: Path) -> None:
    function = Own()
    reduced = {"compute_metrics": function, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    found = trainer(tmp_path, reduced)
    logits, _ = expected(found)
    found.evaluate()
    assert np.array_equal(function.seen[0].predictions, logits.argmax(-1))
    plain = trainer(tmp_path)
    assert plain.evaluate().keys() - {"eval_accuracy"} == found.evaluate().keys() - {"eval_accuracy"}
    output = plain.predict(ROWS)
    assert output.predictions.shape == (6, 32, VOCAB_SIZE)
    assert np.allclose(output.predictions, logits, atol=1e-4)
    assert np.array_equal(output.label_ids, np.stack([row["labels"] for row in ROWS]))
    assert "test_perplexity" in output.metrics
    seen: list[torch.Size] = []
    original = plain.gather_function

    def watched(tensors: Any) -> Any:
        seen.extend(one.shape for one in (tensors if isinstance(tensors, tuple) else (tensors,)))
        return original(tensors)

    plain.gather_function = watched
    plain.evaluate()
    assert max(len(shape) for shape in seen) == 1


def test_a_function_that_takes_no_batches_is_refused_for_batches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute_result"):
        trainer(tmp_path, {"compute_metrics": lambda evaluated: {}}, batch_eval_metrics=True)


# The best model

STEPS = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
RISING = {"kl_weight": 0.0, "cross_entropy_weight": 1.0, "learning_rate": 3e-3}
"""Training whose perplexity on other text rises."""


@pytest.mark.parametrize("metric", ["perplexity", "eval_perplexity", "eval_loss", "loss"])
def test_perplexity_is_better_when_lower(metric: str, tmp_path: Path) -> None:
    other = {"eval_dataset": Blocks(6, seed=9)}
    found = trainer(tmp_path, other, **STEPS, **RISING, load_best_model_at_end=True, metric_for_best_model=metric)
    assert found.args.greater_is_better is False
    found.train()
    seen = {entry["step"]: entry["eval_perplexity"] for entry in found.state.log_history if "eval_perplexity" in entry}
    best = min(seen, key=lambda step: seen[step])
    assert max(seen.values()) > 1.01 * min(seen.values())
    assert found.state.best_global_step == best
    assert found.evaluate()["eval_perplexity"] == pytest.approx(seen[best], rel=1e-4)


def test_save_strategy_best_early_stopping_and_plateaus_follow_it(tmp_path: Path) -> None:
    other = {"eval_dataset": Blocks(6, seed=9), "callbacks": [EarlyStoppingCallback(1)]}
    changes = {**STEPS, **RISING, "max_steps": 20, "save_strategy": "best", "metric_for_best_model": "perplexity"}
    found = trainer(tmp_path, other, **changes, lr_scheduler_type="reduce_lr_on_plateau")
    found.train()
    seen = [entry["eval_perplexity"] for entry in found.state.log_history if "eval_perplexity" in entry]
    best = seen.index(min(seen))
    assert len(seen) == best + 2 < 10  # one evaluation after the best
    saved = sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert saved[-1] == 2 * (best + 1)
    assert found.lr_scheduler.mode == "min"
    assert found.lr_scheduler.num_bad_epochs == 1


def test_a_plateau_of_a_metric_that_is_to_rise_is_seen(tmp_path: Path) -> None:
    changes = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "accuracy"}
    for kind in ("reduce_lr_on_plateau", "greedy"):
        found = trainer(tmp_path, {"compute_metrics": Own()}, **changes, lr_scheduler_type=kind)
        found.train()
        assert found.lr_scheduler.mode == "max"


def test_plain_training_arguments_know_the_direction_too(tmp_path: Path) -> None:
    student, teacher = _pair()
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model="eval_perplexity")
    assert plain.greater_is_better
    QATTrainer(model=student, teacher=teacher, args=plain, train_dataset=Blocks())
    assert plain.greater_is_better is False


def test_a_wrong_direction_and_an_unknown_metric_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="greater_is_better=True with metric_for_best_model='perplexity' would keep"):
        QATArguments(output_dir=str(tmp_path), metric_for_best_model="perplexity", greater_is_better=True)
    named = {"eval_dataset": {"one": ROWS, "two": ROWS}}
    refused = "is none of what evaluations yield: eval_loss"
    with pytest.raises(ValueError, match=r"is none of what evaluations yield: .*eval_one_perplexity"):
        trainer(tmp_path, named, **STEPS, metric_for_best_model="perplexity")
    with pytest.raises(ValueError, match=refused):
        trainer(tmp_path, **STEPS, metric_for_best_model="accuracy")
    for options, changes in (({"compute_metrics": None}, {}), ({}, {"prediction_loss_only": True})):
        with pytest.raises(ValueError, match=refused):
            trainer(tmp_path, options, **STEPS, **changes, metric_for_best_model="perplexity")
    found = trainer(tmp_path, named, **{**STEPS, "max_steps": 2}, metric_for_best_model="eval_two_perplexity")
    found.train()
    assert found.state.best_metric is not None

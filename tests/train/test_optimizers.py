"""Every optimizer that transformers knows trains with our learning rates, or is refused before anything is trained."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.optimization import Adafactor
from transformers.training_args import OptimizerNames

from llmqat import QATArguments, QATTrainer, QuantConfig, prepare
from llmqat.train.optimizers import OPTIMIZERS, OptimizerFacts
from llmqat.train.trainer import group_of
from tests.tiny import tiny_llama
from tests.train.test_trainer import Blocks, _arguments

NAMES = [name.value for name in OptimizerNames]
RATES = {"weights": 1e-3, "log_scales": 2e-2, "zero_points": 3e-1, "norms": 4e-3}


def asymmetric() -> Any:
    student = tiny_llama()
    prepare(student, QuantConfig.preset("int2", group_size=32, symmetric=False))
    return student


def trainer(folder: Path, options: dict[str, Any] | None = None, **changes: Any) -> QATTrainer:
    """A trainer of one step, with a learning rate for each group."""
    settings = {
        "bf16": False,
        "max_steps": 1,
        "learning_rate": RATES["weights"],
        "lr_scheduler_type": "constant",
        **changes,
    }
    given = {"model": asymmetric(), "teacher": tiny_llama(seed=1), "train_dataset": Blocks(4), **(options or {})}
    return QATTrainer(args=_arguments(folder, **settings), **given)


def rates() -> dict[str, float]:
    return {
        "scale_learning_rate": RATES["log_scales"],
        "zero_point_learning_rate": RATES["zero_points"],
        "norm_learning_rate": RATES["norms"],
    }


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_here(facts: OptimizerFacts) -> bool:
    return facts.package is None or importlib.util.find_spec(facts.package) is not None


def test_every_optimizer_of_transformers_is_known() -> None:
    assert set(NAMES) == set(OPTIMIZERS)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    "optim", [name for name in NAMES if not OPTIMIZERS[name].refused and is_here(OPTIMIZERS[name])]
)
def test_it_trains_every_group_at_its_own_rate(optim: str, tmp_path: Path) -> None:
    steps = 6 if optim == "schedule_free_radam" else 1  # its first five do nothing
    found = trainer(tmp_path, optim=optim, weight_decay=0.1, max_steps=steps, **rates())
    before = snapshot(found.model)
    found.train()
    moved = {name for name, value in snapshot(found.model).items() if not torch.equal(value, before[name])}
    trained = {name for name, parameter in found.model.named_parameters() if parameter.requires_grad}
    groups = {group_of(name, before[name]) for name in trained}
    assert groups == set(RATES)
    names = {id(parameter): name for name, parameter in found.model.named_parameters()}
    for group in found.optimizer.param_groups:
        kinds = {group_of(names[id(parameter)], parameter) for parameter in group["params"]}
        assert len(kinds) == 1
        kind = kinds.pop()
        groups.discard(kind)
        assert float(group["lr"]) == pytest.approx(RATES[kind])
        assert group["weight_decay"] == (0.1 if kind == "weights" else 0.0)
        assert any(names[id(parameter)] in moved for parameter in group["params"]), kind
    assert not groups


@pytest.mark.parametrize("optim", [name for name in NAMES if OPTIMIZERS[name].refused or not is_here(OPTIMIZERS[name])])
def test_or_it_is_refused_before_anything_is_trained(optim: str, tmp_path: Path) -> None:
    message = rf"optim='{optim}' is refused: .*choose|optim='{optim}' needs .*pip install"
    with pytest.raises((ValueError, ImportError), match=message):
        QATArguments(output_dir=str(tmp_path / "run"), optim=optim)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, r"does not read 'momentun=0\.9'; it takes momentum=VALUE"),
        ({"optim": "sgd", "optim_args": "momentum"}, "does not read 'momentum'"),
        ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "does not read 'weight_decay"),  # a field says it
        ({"optim": "adamw_torch", "optim_args": "momentum=0.9"}, "takes none at all"),
    ],
)
def test_optim_args_without_effect_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _arguments(tmp_path, **changes)


def test_optim_args_that_are_read_arrive(tmp_path: Path) -> None:
    found = trainer(tmp_path, optim="sgd", optim_args="momentum=0.9, nesterov=true")
    assert {(group["momentum"], group["nesterov"]) for group in found.create_optimizer().param_groups} == {(0.9, True)}


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (torch.optim.SGD, {"lr": 0.01, "weight_decay": 0.2, "momentum": 0.5}),
        (Adafactor, {"lr": 0.01, "weight_decay": 0.2, "relative_step": False, "scale_parameter": False}),
    ],
)
def test_a_class_that_is_given_gets_our_groups(kind: Any, kwargs: dict[str, Any], tmp_path: Path) -> None:
    found = trainer(tmp_path, {"optimizer_cls_and_kwargs": (kind, dict(kwargs))}, **rates())
    found.train()
    seen = {group["lr"]: group["weight_decay"] for group in found.optimizer.param_groups}
    assert seen == {0.01: 0.2, RATES["log_scales"]: 0.0, RATES["zero_points"]: 0.0, RATES["norms"]: 0.0}
    assert isinstance(found.optimizer.optimizer, kind)


def test_a_class_that_takes_matrices_alone_is_refused_by_itself(tmp_path: Path) -> None:
    found = trainer(tmp_path, {"optimizer_cls_and_kwargs": (torch.optim.Muon, {"lr": 0.01})})
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        found.train()


def test_an_optimizer_that_is_given_must_fit_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, other = asymmetric(), tiny_llama(seed=2)
    with pytest.raises(
        ValueError, match=r"optimizers: .* are not of the model that is trained; make the optimizer after"
    ):
        trainer(tmp_path, {"model": model, "optimizers": (torch.optim.SGD(other.parameters(), lr=0.1), None)})
    some = torch.optim.SGD([model.model.norm.weight], lr=0.1)
    with pytest.raises(ValueError, match=r"scale_learning_rate=0\.02 has no effect on an optimizer that is given"):
        trainer(tmp_path, {"model": model, "optimizers": (some, None)}, **rates())
    found = trainer(tmp_path, {"model": model, "optimizers": (some, None)})
    assert "parameters that could train as they are" in caplog.text
    before = snapshot(model)
    found.train()
    moved = [name for name, value in snapshot(model).items() if not torch.equal(value, before[name])]
    assert moved == ["model.norm.weight"]


class TwoSets(torch.optim.SGD):
    """Schedule-free in small: trains at one place, and stands for the mean of the places it came through."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.switched: list[str] = []
        for group in self.param_groups:
            group["trains"], group["steps"] = True, 0
            for parameter in group["params"]:
                self.state[parameter]["other"] = parameter.detach().clone()

    @torch.no_grad()
    def _switch(self, trains: bool) -> None:
        for group in self.param_groups:
            if group["trains"] != trains:
                group["trains"] = trains
                for parameter in group["params"]:
                    other = self.state[parameter]["other"]
                    kept = parameter.detach().clone()
                    parameter.copy_(other)
                    other.copy_(kept)

    def train(self) -> None:
        self.switched.append("train")
        self._switch(True)

    def eval(self) -> None:
        self.switched.append("eval")
        self._switch(False)

    def step(self, closure: Any = None) -> Any:
        assert all(group["trains"] for group in self.param_groups), "a step in evaluation mode"
        done = super().step(closure)
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                self.state[parameter]["other"].lerp_(parameter.detach(), 1 / (group["steps"] + 1))
        return done

    def means(self) -> list[Tensor]:
        return [
            parameter.detach().clone() if not group["trains"] else self.state[parameter]["other"].clone()
            for group in self.param_groups
            for parameter in group["params"]
        ]


class Means(TrainerCallback):
    """Notes at each step what the optimizer stands for."""

    def __init__(self) -> None:
        self.at: dict[int, list[Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **rest: Any) -> None:
        self.at[state.global_step] = optimizer.optimizer.means()


def two_sets(folder: Path, max_steps: int, metrics: Any = None, **changes: Any) -> tuple[QATTrainer, TwoSets, Means]:
    model, means = asymmetric(), Means()
    optimizer = TwoSets([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    options = {"model": model, "optimizers": (optimizer, None), "callbacks": [means], "eval_dataset": Blocks(4, seed=1)}
    options |= {"compute_metrics": metrics} if metrics is not None else {}
    return trainer(folder, options, max_steps=max_steps, **changes), optimizer, means


def equal(found: Any, wanted: list[Tensor]) -> bool:
    trained = [parameter for parameter in found if parameter.requires_grad]
    return all(torch.equal(a, b) for a, b in zip(trained, wanted, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eval_strategy": "steps", "eval_steps": 1},
        {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["plain", "evaluated", "evaluated at the start"],
)
def test_the_model_ends_as_what_the_optimizer_stands_for(changes: dict[str, Any], tmp_path: Path) -> None:
    found, optimizer, means = two_sets(tmp_path, 3, **changes)
    found.train()
    assert equal(found.model.parameters(), means.at[3])
    optimizer.train()
    assert not equal(found.model.parameters(), means.at[3])


def test_checkpoints_and_the_best_model_hold_it_too_and_training_resumes(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole, _, means = two_sets(tmp_path / "whole", 4, **saved)
    whole.train()
    resumed, _, _ = two_sets(tmp_path / "whole", 4, **saved)
    resumed._load_from_checkpoint(str(tmp_path / "whole" / "checkpoint-2"))
    assert equal(resumed.model.parameters(), means.at[2])
    resumed, _, _ = two_sets(tmp_path / "whole", 4, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert equal(resumed.model.parameters(), means.at[4])

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    values = itertools.count(0, -1)  # the first evaluation is the best
    metrics = lambda _: {"step": next(values)}  # noqa: E731
    chosen, _, means = two_sets(tmp_path / "best", 4, metrics, metric_for_best_model="step", **saved, **best)
    chosen.train()
    assert chosen.state.best_global_step == 2
    assert equal(chosen.model.parameters(), means.at[2])


def test_a_run_imports_bitsandbytes_only_for_its_optimizers(tmp_path: Path) -> None:
    code = f"""
import sys
import llmqat.recipe
assert "bitsandbytes" not in sys.modules
from tests.train.test_trainer import Blocks, _arguments, _pair
def trained(folder, **changes):
    student, teacher = _pair()
    arguments = _arguments(folder, max_steps=1, bf16=False, **changes)
    llmqat.QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=Blocks()).train()
    return "bitsandbytes" in sys.modules
assert not trained({str(tmp_path / "plain")!r}, optim="adamw_torch")
assert trained({str(tmp_path / "few")!r}, optim="adamw_bnb_8bit")
import peft.import_utils
assert peft.import_utils.is_bnb_available() and peft.import_utils.is_bnb_4bit_available()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]

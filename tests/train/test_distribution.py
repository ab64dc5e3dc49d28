"""A run that is not distributed as it was asked to be stops, and the message says the way out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from torch.utils.data import TensorDataset

from llmqat import QATArguments, QATTrainer, QuantConfig, prepare
from llmqat.train import check_distribution
from llmqat.train.distribution import asked_processes
from tests.tiny import tiny_llama

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "FSDP_VERSION", *LAUNCHED, *ADDRESS):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 1),
        (LAUNCHED, 1),
        (ADDRESS, 1),  # of a cluster, say
        ({**LAUNCHED, **ADDRESS}, 2),
        ({**LAUNCHED, **ADDRESS, "WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "8"}, 8),
    ],
)
def test_what_launchers_leave_says_how_many_processes_were_asked_for(
    environment: dict[str, str], processes: int
) -> None:
    assert asked_processes(environment) == processes


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**LAUNCHED, **ADDRESS}, "2 or more processes were asked for, and 1 runs.*torchrun --nproc_per_node N"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP was asked for.*NO on cpu with 1 processes"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config.*is not supported"),
    ],
)
def test_the_trainer_stops_where_the_launcher_did_something_else(
    environment: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    arguments = QATArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        QATTrainer(model=model, teacher=tiny_llama(), args=arguments, train_dataset=TensorDataset(torch.ones(1, 4)))


def _arguments(got: DistributedType, **given: Any) -> Any:
    known = {"world_size": 2, "fsdp": None, "fsdp_config": None, "deepspeed": None, "bf16": False}
    state = SimpleNamespace(distributed_type=got)
    return SimpleNamespace(**{**known, **given}, distributed_state=state, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            _arguments(DistributedType.MULTI_CPU, fsdp=True, fsdp_config={}),
            "FSDP was asked for.*MULTI_CPU on cpu with 2",
        ),
        (_arguments(DistributedType.MULTI_GPU, fsdp=True, fsdp_config={"version": 1}), "fsdp_version=1.*use 2"),
        (_arguments(DistributedType.MULTI_CPU, deepspeed="zero3.json"), "DeepSpeed was asked for.*MULTI_CPU on cpu"),
        (_arguments(DistributedType.DEEPSPEED, deepspeed="zero3.json", bf16=True), "train.bf16=false"),
    ],
)
def test_sharding_that_is_not_done_or_would_round_masters_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_distribution(arguments)


def test_what_was_asked_for_and_got_passes() -> None:
    check_distribution(_arguments(DistributedType.MULTI_CPU))
    check_distribution(_arguments(DistributedType.MULTI_GPU, fsdp=True, fsdp_config={}))
    check_distribution(_arguments(DistributedType.DEEPSPEED, deepspeed="zero3.json"))

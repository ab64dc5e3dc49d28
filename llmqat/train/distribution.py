"""Checks that a run is distributed as the launcher and the arguments ask, and raises otherwise.

accelerate and transformers fall back silently: `accelerate launch --cpu --num_processes 2` starts one process, and FSDP
or DeepSpeed on a CPU becomes plain data parallelism. The request is in the environment that the launcher sets, and in
the arguments. The outcome is in accelerate's state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from accelerate import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer, TrainingArguments

from llmqat.models import is_sharded

UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config (tensor, context or sequence parallelism)",
}
"""Variable that `accelerate launch` sets -> what it stands for; it would split a weight's groups from their scales."""
_NO_ACCELERATOR = (DistributedType.NO, DistributedType.MULTI_CPU)


def check_distribution(args: TrainingArguments) -> None:
    """Raises where the launcher or `args` ask for a distribution that this process has not got, or must not have.

    Args:
        args: made in the process that is to train, since making them starts its process group.

    Raises:
        ValueError: there are fewer processes than asked for, the kind of parallelism is not supported, the model would
            not be sharded, or its float32 masters would be held in bfloat16.
    """
    asked = asked_processes(os.environ)
    if asked > args.world_size:
        raise ValueError(
            f"{asked} or more processes were asked for, and {args.world_size} runs (`accelerate launch` starts one "
            "on a CPU); use `torchrun --nproc_per_node N -m llmqat ...`, or --num_processes 1, and unset WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT if they were left by something else"
        )
    for variable, name in UNSUPPORTED.items():
        if _is_set(variable):
            raise ValueError(f"{name} is not supported; take it out of accelerate's configuration ({variable} is set)")
    got = args.distributed_state.distributed_type if args.distributed_state is not None else DistributedType.NO
    if args.fsdp or _is_set("ACCELERATE_USE_FSDP"):
        _check_fsdp(args, got)
    if args.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        _check_deepspeed(args, got)


def asked_processes(environment: Mapping[str, str]) -> int:
    """Returns how many processes the launcher was to start at least, as far as `environment` says.

    torchrun and `accelerate launch` on GPUs leave WORLD_SIZE. On a CPU `accelerate launch` leaves the address of a main
    process where it was asked for more than one, not how many, and starts one.
    """
    if environment.get("WORLD_SIZE", "").isdecimal():
        return int(environment["WORLD_SIZE"])
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    return 2 if launched and {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys() else 1


def whole_model(trainer: Trainer, make: Callable[[], nn.Module]) -> nn.Module | None:
    """Returns the trained model whole, to be converted or saved; all processes call this together.

    Args:
        trainer: after training.
        make: makes the model as it was given to the trainer; called where that has been sharded meanwhile.

    Returns:
        The trainer's own model where every process holds all of it. Else a new one with its state in the first
        process, and None in the others.
    """
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if is_sharded(model):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    elif deepspeed is not None and deepspeed.zero_stage == 3:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    else:
        return model
    if trainer.args.process_index != 0:
        return None
    whole = make()
    whole.load_state_dict(state)
    return whole


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _check_fsdp(args: TrainingArguments, got: DistributedType) -> None:
    if got in _NO_ACCELERATOR:
        raise ValueError(
            f"FSDP was asked for (train.fsdp, or accelerate's configuration) and {_described(args, got)} would run: "
            "accelerate shards on GPUs only, under torchrun or `accelerate launch`; leave it out here"
        )
    version = args.fsdp_config.get("version", 2) if args.fsdp else os.environ.get("FSDP_VERSION", "1")
    if int(version) != 2:
        raise ValueError(
            f"fsdp_version={version} flattens parameters, so that masters and scales lose their shapes; use 2"
        )


def _check_deepspeed(args: TrainingArguments, got: DistributedType) -> None:
    if got != DistributedType.DEEPSPEED:
        raise ValueError(
            f"DeepSpeed was asked for (train.deepspeed, or accelerate's configuration) and {_described(args, got)} "
            "would run: accelerate uses it on GPUs only; leave it out here"
        )
    if args.bf16:
        raise ValueError(
            "bf16=True under DeepSpeed shows the quantizers weights and scales in bfloat16, of which other codes come "
            "than of the masters; give train.bf16=false, or use FSDP2, which computes in bfloat16 over float32 masters"
        )


def _described(args: TrainingArguments, got: DistributedType) -> str:
    return f"{got.value} on {args.device.type} with {args.world_size} processes"

"""What `test_deepspeed.py` starts on two processes: `torchrun zero.py OUT`; each writes what it found to OUT.

Each model of sharded.py trains for one step twice: by all processes under DeepSpeed's engine on CPUs, and whole, in the
same process, on all of the batch.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from tests.train.sharded import CASES, Case, parts_of, quantized

STAGES = (2, 3)
FLOAT32 = [name for name, case in CASES.items() if not case.bf16]
"""Cases that DeepSpeed can have: its bfloat16 would round masters and scales."""


def one_step(case: Case, stage: int, out: Path) -> dict[str, Any]:
    import deepspeed

    student, _, trainer, ids, mine, tokens = parts_of(case, out)
    processes = distributed.get_world_size()
    single = copy.deepcopy(student)
    start = torch.cat([layer.codes().flatten() for layer in quantized(single)])
    settings = {
        "train_micro_batch_size_per_gpu": 4 // processes,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=student, optimizer=adamw(student), config=settings)
    found: dict[str, Any] = {"processes": processes, "stage": engine.zero_optimization_stage()}
    with trainer._checkpoint_numbers(engine):
        loss = trainer.compute_loss(engine, {"input_ids": mine, "labels": mine}, num_items_in_batch=tokens)
    engine.backward(loss)
    engine.step()
    with trainer._checkpoint_numbers(single):
        whole = trainer.compute_loss(single, {"input_ids": ids, "labels": ids}, num_items_in_batch=tokens)
    # Gradients are averaged over processes, and the loss is that many times as large to allow for it.
    (whole / processes).backward()
    torch.nn.utils.clip_grad_norm_(single.parameters(), 0.5)
    adamw(single).step()
    found["loss"], found["all rows"] = float(loss.detach()), float(whole.detach())
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        pairs = list(zip(engine.module.parameters(), single.parameters(), strict=True))
        found["weights"] = max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)
        now, expected = (torch.cat([m.codes().flatten() for m in quantized(model)]) for model in (engine, single))
    found["moved"], found["codes"] = int((now != start).sum()), int((now != expected).sum())
    return found


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """Returns an optimizer whose step is smooth in the gradient; its sign alone would amplify the rounding of sums."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-2)


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    results = {f"{name}, ZeRO-{stage}": one_step(CASES[name], stage, out) for name in FLOAT32 for stage in STAGES}
    (out / f"rank{distributed.get_rank()}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

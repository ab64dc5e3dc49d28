"""What `test_sharded.py` starts on several processes: `torchrun sharded.py OUT`; each writes what it found to OUT.

Every case trains a tiny model for one step twice: by all processes, sharded by FSDP2 or under DDP, each on its part of
the batch; and whole, in the same process, on all of it.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from transformers import PreTrainedModel

from llmqat import QATArguments, QATTrainer, QuantConfig, prepare
from llmqat.layers import QuantModule
from llmqat.train import LoraSettings, whole_model
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_qwen2

Shard = Callable[[nn.Module], nn.Module]


def by_blocks(model: nn.Module) -> nn.Module:
    """Shards each block, and what is left together, all of it let go after the forward."""
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for block in blocks:
        fully_shard(block)
    return fully_shard(model, reshard_after_forward=True)


def as_accelerate(model: nn.Module) -> nn.Module:
    """Shards `model` as accelerate does on GPUs: blocks, embedding, and the norm and head at the end."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    return fsdp2_prepare_model(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no"), model)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def quantized(model: nn.Module) -> list[QuantModule]:
    return [module for module in model.modules() if isinstance(module, QuantModule)]


def lora(model: PreTrainedModel) -> nn.Module:
    adapted = LoraSettings(r=4, lora_alpha=8).attach(model)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return adapted


@dataclass(frozen=True)
class Case:
    """A model, its scheme, and how it is sharded.

    Attributes:
        make: the model in full precision.
        scheme: arguments of QuantConfig.preset.
        shard: does it.
        bf16: compute in bfloat16.
        adapters: train LoRA, the model being its own teacher.
        teacher: shards the teacher as well; None leaves it whole.
    """

    make: Callable[[], PreTrainedModel]
    scheme: dict[str, Any]
    shard: Shard
    bf16: bool = False
    adapters: bool = False
    teacher: Shard | None = None


INT4 = {"name": "int4", "group_size": 32}
CASES = {
    "tied": Case(tiny_llama, INT4, by_blocks, teacher=by_blocks),
    "not sharded": Case(tiny_llama, INT4, DistributedDataParallel),
    "zero points": Case(lambda: tiny_llama(tied=False), {**INT4, "symmetric": False}, as_accelerate),
    "embedding": Case(tiny_llama, {**INT4, "embeddings": "int8"}, as_accelerate),
    "embedding in bf16": Case(tiny_llama, {**INT4, "embeddings": "int8"}, by_blocks, bf16=True),
    "head of odd rows in bf16": Case(
        lambda: tiny_qwen2(vocab_size=385), {**INT4, "lm_head": "int8"}, by_blocks, bf16=True
    ),
    "one scale, odd rows": Case(
        lambda: tiny_llama(intermediate_size=131), {"name": "int8", "strategy": "tensor"}, by_blocks
    ),
    "transposed": Case(tiny_gpt2, INT4, by_blocks),
    "experts": Case(tiny_mixtral, INT4, as_accelerate),
    "adapters": Case(tiny_llama, INT4, by_blocks, adapters=True),
    "adapters over bf16": Case(lambda: tiny_llama().bfloat16(), INT4, by_blocks, bf16=True, adapters=True),
}


class Parts(NamedTuple):
    """What a case trains: the student in `trainer`, the ids [4, 24] of all processes and of this one."""

    student: nn.Module
    teacher: PreTrainedModel | None
    trainer: QATTrainer
    ids: Tensor
    mine: Tensor
    tokens: Tensor


def parts_of(case: Case, out: Path) -> Parts:
    # Starts the process group as well.
    arguments = QATArguments(output_dir=str(out), use_cpu=True, report_to="none", bf16=case.bf16)
    teacher = case.make()
    student = copy.deepcopy(teacher)
    prepare(student, QuantConfig.preset(**case.scheme))
    if case.adapters:
        student, teacher = lora(student), None
    ids = torch.randint(2, 258, (4, 24), generator=torch.Generator().manual_seed(1))
    mine, tokens = ids.chunk(distributed.get_world_size())[distributed.get_rank()], torch.tensor(4 * 23)
    trainer = QATTrainer(model=student, teacher=teacher, args=arguments, train_dataset=TensorDataset(ids))
    return Parts(student, teacher, trainer, ids, mine, tokens)


def one_step(case: Case, out: Path) -> dict[str, Any]:
    student, teacher, trainer, ids, mine, tokens = parts_of(case, out)
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    if case.bf16:
        student.gradient_checkpointing_enable({"use_reentrant": False})
        student.train()
    single, other = copy.deepcopy(student), copy.deepcopy(student)
    start = torch.cat([layer.codes().flatten() for layer in quantized(single)])
    student = case.shard(student)
    if case.teacher is not None:
        case.teacher(teacher)
    found: dict[str, Any] = {"world_size": processes}
    for name, model, rows in (("sharded", student, mine), ("same rows", other, mine), ("all rows", single, ids)):
        with trainer._checkpoint_numbers(model):
            loss = trainer.compute_loss(model, {"input_ids": rows, "labels": rows}, num_items_in_batch=tokens)
            # What is sharded is averaged over processes, and the loss is that many times as large to allow for it.
            (loss if model is student else loss / processes).backward()
        found[name] = float(loss)
    trained = [pair for pair in zip(student.parameters(), single.parameters(), strict=True) if pair[1].requires_grad]
    found["gradients"] = [relative(whole(ours.grad), theirs.grad) for ours, theirs in trained]
    for model in (student, single):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        # So large an epsilon keeps the step smooth in the gradient; its sign alone would amplify the rounding of sums.
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-2).step()
    found["weights"] = [float((whole(ours) - theirs).abs().max()) for ours, theirs in trained]
    trainer.model_wrapped = student
    trained = whole_model(trainer, lambda: other)
    if rank == 0:
        assert trained is not None
        now, expected = (torch.cat([m.codes().flatten() for m in quantized(model)]) for model in (trained, single))
        found["moved"], found["codes"] = int((now != start).sum()), int((now != expected).sum())
    return found


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    results = {name: one_step(case, out) for name, case in CASES.items()}
    (out / f"rank{distributed.get_rank()}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

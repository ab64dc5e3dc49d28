"""What `test_processes.py` starts on several processes: `torchrun shared.py OUT`; each writes what it found to OUT."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from llmqat import QuantConfig
from llmqat.calibrate import BlockwiseStage, GPTQStage, RangesStage, calibrate
from llmqat.data.processes import ALONE, Processes
from llmqat.data.shards import write_shards
from llmqat.data.strategy import SynthesisConfig
from llmqat.data.teacher_cache import CachePlace, TeacherCache
from llmqat.data.writer import Keeper
from llmqat.layers import QuantModule
from tests.calibrate.carrying import carrying
from tests.tiny import tiny_llama, tiny_tokenizer


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def calibrated(processes: Processes, folder: Path) -> dict[str, Any]:
    """Calibrates a tiny model; five token blocks in batches of three, so that nothing divides evenly."""
    model = tiny_llama()
    ids = torch.randint(2, 258, (5, 16), generator=torch.Generator().manual_seed(0))
    stages = [
        RangesStage(blocks=5, batch_size=3),
        GPTQStage(blocks=5, batch_size=3),
        BlockwiseStage(blocks=5, batch_size=3, iterations=8),
    ]
    quant = QuantConfig.preset("int3", group_size=32)
    reports = calibrate(model, quant, stages, ids, folder=folder, dtype=torch.float32, processes=processes)
    return {
        "digest": digest(model.state_dict()),
        "codes": torch.cat([m.codes().flatten() for m in model.modules() if isinstance(m, QuantModule)]).tolist(),
        "after": [report.kl_after for report in reports],
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")),
    }


def carried(processes: Processes) -> str:
    """Calibrates a tiny model whose blocks hand each other more than hidden states; returns its digest."""
    model = carrying("gemma4_text")
    ids = torch.randint(2, 258, (5, 16), generator=torch.Generator().manual_seed(0))
    stages = [RangesStage(method="minmax"), GPTQStage(batch_size=3), BlockwiseStage(batch_size=3, iterations=4)]
    quant = QuantConfig.preset("int3", group_size=16, sparsity="2:4")
    calibrate(model, quant, stages, ids, dtype=torch.float32, processes=processes)
    return digest(model.state_dict())


def written(processes: Processes, folder: Path) -> str:
    """Lets a tiny model write three shards and keep what it knows; returns the digest of what lies in the folder."""
    model, tokenizer, config = tiny_llama(), tiny_tokenizer(), SynthesisConfig(block_size=32, batch_size=2, seed=3)
    keeper = Keeper(model, tokenizer, CachePlace(folder / "teacher", 8), apart=True)
    found = write_shards(model, tokenizer, 160, folder, config, keeper=keeper, processes=processes)
    cache, tensors = TeacherCache(folder / "teacher"), {}
    for shard in found.shards():
        assert shard.blocks.starts is not None
        tensors |= {f"{shard.number} ids": shard.blocks.stored, f"{shard.number} starts": shard.blocks.starts}
        known = sorted({*range(len(shard.blocks))} - {*cache.missing(shard.blocks)})
        assert known
        tensors[f"{shard.number} known"] = cache.lookup(**shard.blocks[torch.tensor(known)].inputs()).log_probs
    return digest(tensors)


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    out, together = Path(sys.argv[1]), Processes.all()
    found = {"count": together.count, "shared": calibrated(together, out / "shared"), "carried": carried(together)}
    found["written"] = written(together, out / "written")
    if together.is_first:
        found |= {"alone": calibrated(ALONE, out / "alone"), "written alone": written(ALONE, out / "written-alone")}
    (out / f"rank{together.rank}.json").write_text(json.dumps(found))
    distributed.barrier()


if __name__ == "__main__":
    main()

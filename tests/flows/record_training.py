"""Runs `llmqat train` and records what each process has after training: `python record_training.py OUT train ...`.

Run under a launcher, since it is the launcher's processes that it looks at.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from llmqat.cli import main
from llmqat.train import QATTrainer


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def recorded(folder: Path) -> None:
    original = QATTrainer.train

    def train(self: QATTrainer, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        facts = {
            "world_size": distributed.get_world_size() if distributed.is_initialized() else 1,
            "digest": digest(self.accelerator.unwrap_model(self.model)),
            "losses": [entry["loss"] for entry in self.state.log_history if "loss" in entry],
        }
        (folder / f"rank{self.args.process_index}.json").write_text(json.dumps(facts))
        return output

    QATTrainer.train = train


if __name__ == "__main__":
    recorded(Path(sys.argv.pop(1)))
    main()

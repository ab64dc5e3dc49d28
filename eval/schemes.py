"""Every scheme under one budget: perplexity before and after training, bytes, and who loads the checkpoint.

Each scheme is a run of a recipe with another `quant` section, on the same text; a run that is finished is not repeated,
and an interrupted one goes on. Figures come from the packed, saved and reloaded checkpoint. The last lines are the
headline, `name: number`.

    python eval/schemes.py --recipe recipes/smollm2-135m-int4.yaml --text wikitext-2/test.txt --out runs/schemes
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from made import made, recorded, result_options
from rich.table import Table
from transformers import AutoModelForCausalLM

import llmqat
from llmqat.files import write_whole
from llmqat.layers import KVQuantizer
from llmqat.paths import check_outputs, user_path
from llmqat.recipe import load_recipe, run
from llmqat.terminal import plain_console, show_any_text

GENTLE = ("train.learning_rate=2e-5", "train.scale_learning_rate=3e-4")
"""Rates for 8-bit weights alone, where little is to be repaired."""

SCHEMES: dict[str, tuple[str, ...]] = {
    "int8": ("quant={preset: int8}", *GENTLE),
    "int4": ("quant={preset: int4}",),
    "int4-g32": ("quant={preset: int4-g32}",),
    "int4-2:4": ("quant={preset: int4-2:4}",),
    "int4, int8 embedding": ("quant={preset: int4, embeddings: int8}",),
    "int3": ("quant={preset: int3}",),
    "int2": ("quant={preset: int2}",),
    "int2-seq": ("quant={preset: int2-seq}",),
    "ternary": ("quant={preset: ternary}",),
    "w8a8": ("quant={preset: w8a8}", "calibrate=[smooth, ranges]"),
    "w4a8": ("quant={preset: w4a8}",),
    "w4a8, smoothed": ("quant={preset: w4a8}", "calibrate=[smooth, ranges]"),
    "w4a8kv8": ("quant={preset: w4a8kv8}",),
    "w4a8kv4": ("quant={preset: w4a8kv4}",),
    "fp8": ("quant={preset: fp8}", *GENTLE),
    "fp8-block": ("quant={preset: fp8-block, group_size: 64}", *GENTLE),
    "nvfp4": ("quant={preset: nvfp4}",),
    "nvfp4a16": ("quant={preset: nvfp4a16}",),
    "mxfp4": ("quant={preset: mxfp4}",),
    "mxfp4a16": ("quant={preset: mxfp4a16}",),
    "int4-fp8kv": ("quant={preset: int4-fp8kv}",),
    "w4afp8": ("quant={preset: w4afp8}",),
    "int8, kv4": (
        "quant={preset: int8, kv_cache: {key: {num_bits: 4, symmetric: false, group_size: 32}, "
        "value: {num_bits: 4, symmetric: false, group_size: 32}}}",
        "train.learning_rate=5e-5",
    ),
}
"""Rows of the table: name -> what is changed in the recipe."""

PROBE = torch.arange(100, 148)[None]
COLUMNS = ("scheme", "bits", "MB", "rounded", "calibrated", "KL", "trained", "KL", "top-1", "stock transformers")


def main() -> None:
    """Runs what is missing, prints the table, then the headline."""
    show_any_text()
    options = parse_options()
    check_outputs({"--json": options.json}, [options.recipe, options.text])
    rows = []
    for name in options.schemes or SCHEMES:
        rows.append(measured(name, options))
        if options.json:
            write_whole(options.json, json.dumps({**made("schemes.py"), "rows": rows}, indent=2) + "\n")
    plain_console(width=140).print(table(rows))
    for row in rows:
        print(f"{row['scheme']}: {row['trained']['perplexity']:.3f}")


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[result_options(json_file=False)],
    )
    parser.add_argument("--recipe", type=user_path, required=True, help="recipe that says model, budget and rates")
    parser.add_argument("--model", help="another model than the recipe's")
    parser.add_argument("--text", type=user_path, required=True, help="UTF-8 file to evaluate on, used as it is")
    parser.add_argument("--out", type=user_path, required=True, help="folder of the runs")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), help="rows of the table; all where not given")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe keys to change in every run")
    parser.add_argument("--json", type=user_path, help="file for the results")
    return parser.parse_args()


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one scheme, after running it where that has not been done."""
    folder = options.out / name.replace(", ", "-").replace(" ", "-")
    results = folder / "results.json"
    changes = [f"output={folder}", f"evaluate.texts=[{options.text}]", "evaluate.speed=false", *SCHEMES[name]]
    model = [f"model={options.model}"] if options.model else []
    recipe = load_recipe(options.recipe, [*model, *changes, *options.set])
    if not results.is_file():
        run(recipe)
    found = json.loads(results.read_text(encoding="utf-8"))
    if found["recipe"] != recipe.model_dump(mode="json"):
        raise SystemExit(f"{folder} holds the run of another recipe; give another --out, or remove it")
    by_role = {row["role"]: row for row in found["comparison"]["rows"]}
    return {
        "scheme": name,
        "changes": list(SCHEMES[name]),
        "bits_per_weight": found["checkpoint"]["bits_per_weight"],
        "weight_bytes": found["checkpoint"]["weight_bytes"],
        "seconds": found["seconds"],
        "stock_transformers": stock(folder / "model"),
        **{role: figures(row) for role, row in by_role.items()},
    }


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns what a row of a comparison says about quality."""
    return {key: row[key] for key in ("perplexity", "kl", "top1")}


def stock(folder: Path) -> str:
    """Returns whether stock transformers loads the checkpoint, and with which logits."""
    ours = llmqat.load(folder, kernel="reference")
    caches = [one for one in ours.modules() if isinstance(one, KVQuantizer) and not one.config.calibrated]
    for cache in caches:  # stock transformers has those in FP8 only
        cache.enabled = False
    with torch.no_grad():
        try:
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(PROBE).logits
        except (ValueError, AttributeError) as error:
            return f"no ({type(error).__name__})"
        equal = torch.equal(ours(PROBE).logits, theirs)
    return f"yes, {'equal' if equal else 'OTHER'} logits{', KV cache in high precision' if caches else ''}"


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns the figures as a table; perplexities, KL after calibration and training, and the trained top-1."""
    shown = Table(*COLUMNS)
    shown.add_row(
        "full precision", "16", "", "", "", "", f"{rows[0]['full precision']['perplexity']:.2f}", "0", "100 %", ""
    )
    for row in rows:
        trained, calibrated = row["trained"], row.get("training-free")
        shown.add_row(
            row["scheme"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['plain rounding']['perplexity']:.4g}",
            "" if calibrated is None else f"{calibrated['perplexity']:.4g}",
            "" if calibrated is None else f"{calibrated['kl']:.4f}",
            f"{trained['perplexity']:.2f}",
            f"{trained['kl']:.4f}",
            f"{trained['top1']:.1%}",
            row["stock_transformers"],
        )
    return shown


if __name__ == "__main__":
    with recorded("schemes.py", json_file=False):
        main()

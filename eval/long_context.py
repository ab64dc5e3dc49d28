"""Peak memory of a training step by the length of the text and the size of the vocabulary, beside `llmqat plan`.

Small random Llamas, each step of one sequence with gradient checkpointing, every weight trained, a second model as the
teacher (`training_memory.py --ways all`, each cell in a process of its own). The loss takes its logits in chunks, so
memory above that of the weights must not grow with the vocabulary, and must grow by the token alone. The first length
is what others are compared with: `above the first` is what the tokens beyond it took. Linux only. The last lines are
the headline: kB that a token takes from the first length to the longest, by vocabulary.

    python eval/long_context.py --table eval/results/long-context.txt
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import training_memory
from made import recorded, result_options
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmqat.recipe import load_recipe
from llmqat.recipe.plan import plan_run
from llmqat.shipped import shipped_recipes
from llmqat.terminal import plain_console, show_any_text

STEPS = 3


def main() -> None:
    """Measures every cell, prints the table, then the headline."""
    show_any_text()
    options = parse_options()
    shown = Table("vocabulary", "tokens", "weights", "MB at peak", "above the first", "plan's MB", "plan / measured")
    headline: dict[str, float] = {}
    for vocabulary in options.vocabularies:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            weights = write_model(options, vocabulary, model)
            peaks = {length: measured(options, model, length) for length in options.lengths}
            planned = {length: plan_of(model, length, Path(folder) / "run") for length in options.lengths}
        first, longest = options.lengths[0], options.lengths[-1]
        for length, peak in peaks.items():
            shown.add_row(
                f"{vocabulary:,}",
                f"{length:,}",
                f"{weights / 1e6:.1f} M",
                f"{peak / 1e6:.0f}",
                f"{(peak - peaks[first]) / 1e6:.0f}",
                f"{planned[length] / 1e6:.0f}",
                f"{planned[length] / peak:.2f}",
            )
        headline[f"kB a token, {vocabulary:,} entries"] = (peaks[longest] - peaks[first]) / (longest - first) / 1e3
    plain_console(width=110).print(shown)
    for name, value in headline.items():
        print(f"{name}: {value:.3g}")


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="tokens of a sequence")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32768, 262144], help="entries")
    parser.add_argument("--hidden-size", type=int, default=64, help="width of the model")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks")
    options = parser.parse_args()
    if len(options.lengths) < 2 or sorted(set(options.lengths)) != options.lengths:
        parser.error("--lengths: give two or more, the shortest first")
    return options


def write_model(options: argparse.Namespace, vocabulary: int, folder: Path) -> int:
    """Writes a random Llama, and returns how many weights it has."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=options.hidden_size,
            intermediate_size=4 * options.hidden_size,
            num_hidden_layers=options.layers,
            num_attention_heads=2,
            max_position_embeddings=options.lengths[-1],
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))  # not used: the tokens are random
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def measured(options: argparse.Namespace, model: Path, length: int) -> int:
    """Returns the bytes that a training on sequences of `length` tokens holds at most."""
    words = ["--model", str(model), "--steps", str(STEPS), "--batch-size", "1", "--block-size", str(length)]
    words += ["--group-size", str(min(options.hidden_size, 64))]
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = training_memory.run(training_memory.parse_options(words), "all", folder)
    return int(found["peak"])


def plan_of(model: Path, length: int, output: Path) -> float:
    """Returns the bytes that `llmqat plan` says of the same training."""
    changes = [f"model={model}", f"output={output}", f"data.block_size={length}", "data.tokens=1000000"]
    changes += ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1"]
    recipe = load_recipe(shipped_recipes()["smollm2-135m-int4"], [*changes, "train.gradient_checkpointing=true"])
    return plan_run(recipe).memory.peak


if __name__ == "__main__":
    with recorded("long_context.py"):
        main()

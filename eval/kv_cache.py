"""Bytes of the KV cache after a prompt: transformers' own, and `llmqat.QuantizedCache` with 8 and 4 bits an entry.

    python eval/kv_cache.py --model MODEL --tokens 512

The last lines are the headline, `name: number` (MB).
"""

from __future__ import annotations

import argparse

import torch
from made import recorded, result_options
from rich.table import Table
from transformers import DynamicCache

from llmqat.layers import KVCacheConfig, KVTensorConfig, QuantizedCache
from llmqat.models import load_model
from llmqat.terminal import plain_console, show_any_text


def main() -> None:
    """Fills each cache with the same prompt, prints the table, then the headline."""
    show_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument("--model", required=True, help="folder, hub id, GGUF file")
    parser.add_argument("--tokens", type=int, default=512, help="tokens in the prompt")
    parser.add_argument("--group-size", type=int, default=32, help="entries that share a scale at 4 bits")
    options = parser.parse_args()
    four = KVTensorConfig(num_bits=4, symmetric=False, group_size=options.group_size)
    schemes = {
        "8 bits": KVCacheConfig(),
        f"4 bits, groups of {options.group_size}": KVCacheConfig(key=four, value=four),
    }
    model, tokenizer = load_model(options.model, torch.bfloat16)
    ids = torch.arange(options.tokens)[None] % len(tokenizer)
    sizes = {}
    with torch.no_grad():
        own = model(ids, past_key_values=DynamicCache()).past_key_values
        sizes["bfloat16"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in own.layers)
        for name, scheme in schemes.items():
            cache = QuantizedCache(model, scheme)
            model(ids, past_key_values=cache)
            sizes[name] = cache.nbytes
    shown = Table("KV cache", "MB", "of bfloat16")
    for name, size in sizes.items():
        shown.add_row(name, f"{size / 1e6:.2f}", f"{size / sizes['bfloat16']:.0%}")
    plain_console().print(shown)
    for name, size in sizes.items():
        print(f"{name}: {size / 1e6:.3f}")


if __name__ == "__main__":
    with recorded("kv_cache.py"):
        main()

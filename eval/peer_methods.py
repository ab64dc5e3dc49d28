"""The methods that `peers.py` compares; run as a script, it quantizes with one of them in a process of its own.

A method takes the full-precision model, in bfloat16, and token blocks [N, L], and leaves a folder: llmqat's its packed
checkpoint, the others a plain transformers model with the dequantized weights that their own runtime would multiply
with, in bfloat16 (llama.cpp's a GGUF file). Beside it lies `arm.json`: seconds and peak memory of the quantization
alone, without importing, loading and saving, bits of an average weight of the linear layers, settings, versions.

What is quantized is the same everywhere: the linear layers but the output head, in groups of `--group-size`, but for
llama.cpp's types, whose blocks are what they are. Peers are symmetric at 4 bits, as llmqat is everywhere, and have zero
points at 3 and 2, where their symmetric grids are far worse.

Only the interpreter that runs a method needs its package (peers-requirements.txt); llmqat it needs as well.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

MISSING = 3
"""Exit code where the method's package is not installed."""
MODEL_FOLDER = "model"
ARM_FILE = "arm.json"
BLOCKS_FILE = "blocks.safetensors"
STEP_BLOCKS = 4
"""Token blocks in an optimizer step of a method that trains."""
SCALE_BITS = 16
"""Bits of a scale, where a method does not say otherwise: bfloat16 or float16."""


@dataclass(frozen=True)
class Task:
    """What a method is given."""

    source: str  # full-precision model, as it was given to peers.py
    model: str  # the same as a folder, in bfloat16
    blocks: Path  # token blocks; the first `calibration` of them are calibrated on, all may be trained on
    text: Path  # what they were cut from
    folder: Path  # to be filled
    bits: int
    group_size: int
    calibration: int  # blocks
    steps: int  # optimizer steps of a method that trains
    recipes: Path  # llmqat's

    @property
    def asymmetric(self) -> bool:
        """Whether a peer that can choose has zero points."""
        return self.bits < 4


@dataclass
class Made:
    """What a method did; seconds and memory are filled in by `measured`."""

    bits_per_weight: float | None = None  # None: the files in the folder say it
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    processor_seconds: float = 0.0
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Method:
    """One of the methods.

    Attributes:
        make: does it.
        package: distribution whose version is recorded; the word for `--python`.
        bits: widths that it has.
        about: what was run, for the table's notes.
        grouped: whether it takes a group size; else it is run once for all of them.
    """

    make: Callable[[Task], Made]
    package: str
    bits: tuple[int, ...]
    about: str
    grouped: bool = True


@contextmanager
def measured(made: Made) -> Iterator[None]:
    """Writes into `made` what happens inside costs: wall and processor seconds, and memory.

    Memory is the most that the process held, the model included, above what it held before the model was loaded.
    """
    from llmqat.evaluate.memory import forget_peak, resident

    forget_peak()
    wall, processor = time.perf_counter(), time.process_time()
    yield
    made.seconds = time.perf_counter() - wall
    made.processor_seconds = time.process_time() - processor
    peak = resident("VmHWM")
    made.peak_bytes = None if peak is None or BARE is None else peak - BARE


BARE: int | None = None
"""Bytes that this process held once llmqat was imported and before it had loaded a model."""


def original(task: Task, dtype: str = "bfloat16") -> Any:
    """Returns the full-precision model."""
    import torch

    from llmqat.models import load_model

    return load_model(task.model, getattr(torch, dtype))[0]


def blocks_of(task: Task, count: int) -> Any:
    """Returns the first `count` token blocks, int64 [count, L].

    Raises:
        SystemExit: the text has fewer.
    """
    from safetensors.torch import load_file

    ids = load_file(task.blocks)["ids"]
    if len(ids) < count:
        raise SystemExit(f"{task.text} has {len(ids)} blocks of {ids.shape[1]} tokens, and {count} are needed")
    return ids[:count].long()


def quantized_layers(model: Any) -> dict[str, Any]:
    """Returns the linear layers but the output head, by name."""
    from torch import nn

    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def save_plain(task: Task, state: dict[str, Any]) -> None:
    """Writes the original model with the tensors of `state` in place of its own to the task's folder, in bfloat16."""
    from llmqat.models import load_model

    model, tokenizer = load_model(task.model)
    kept = {name: state[name] for name in model.state_dict()}
    model.load_state_dict(kept)
    model.save_pretrained(task.folder / MODEL_FOLDER)
    tokenizer.save_pretrained(task.folder / MODEL_FOLDER)


def llmqat_calibration(task: Task, method: str) -> Made:
    """Calibrates with llmqat by a `--method` of `llmqat quantize`, without end-to-end training."""
    import llmqat
    from llmqat.calibrate import calibrate
    from llmqat.models import load_tokenizer
    from llmqat.recipe.quantize import stages_of

    model = original(task)
    ids = blocks_of(task, task.calibration)
    quant = llmqat.QuantConfig.preset(f"int{task.bits}", group_size=task.group_size)
    made = Made(settings={"method": method})
    with measured(made):
        calibrate(model, quant, stages_of(method, task.calibration), ids, dtype=forward_dtype())
    llmqat.save(model, task.folder / MODEL_FOLDER, load_tokenizer(Path(task.model), task.model))
    return made


def llmqat_distillation(task: Task) -> Made:
    """Calibrates and distils with the recipe's stages and rates, on no more tokens than the other trainings."""
    import llmqat
    from llmqat.calibrate import calibrate
    from llmqat.data.blocks import token_blocks
    from llmqat.models import load_tokenizer
    from llmqat.recipe import load_recipe
    from llmqat.recipe.config import training_arguments

    name = f"smollm2-135m-int{task.bits}.yaml"
    recipe = load_recipe(task.recipes / name, [f"quant.group_size={task.group_size}", f"output={task.folder / 'run'}"])
    size = recipe.train["per_device_train_batch_size"]
    steps = min(recipe.train["max_steps"], task.steps * STEP_BLOCKS // size)
    train_changes = {"max_steps": steps, "save_strategy": "no", "disable_tqdm": True}
    recipe = recipe.model_copy(update={"train": {**recipe.train, **train_changes}})
    model, teacher = original(task, "float32"), original(task)
    blocks = token_blocks(blocks_of(task, task.steps * STEP_BLOCKS), str(task.text))
    made = Made(settings={"recipe": name, **recipe.model_dump(mode="json", include={"quant", "calibrate", "train"})})
    with measured(made):
        calibrate(model, recipe.quant, recipe.calibrate, blocks.ids, seed=recipe.seed, dtype=forward_dtype())
        arguments = training_arguments(recipe)
        trainer = llmqat.QATTrainer(model=model, teacher=teacher, args=arguments, train_dataset=blocks.dataset())
        trainer.train()
    made.settings["losses"] = losses_of(trainer)
    llmqat.save(model, task.folder / MODEL_FOLDER, load_tokenizer(Path(task.model), task.model))
    return made


def forward_dtype() -> Any:
    """Returns what llmqat's calibration computes in on this machine, as its commands choose it."""
    from llmqat.recipe.config import forward_dtype
    from llmqat.train import processor_has_bf16

    return forward_dtype(processor_has_bf16())


def losses_of(trainer: Any) -> tuple[float, float]:
    """Returns the first and the last loss that a trainer has logged, nats a token."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


def torchao_training(task: Task, loss: str, rate: float = 2e-5) -> Made:
    """Trains with torchao's fake quantizers in float32 masters under bfloat16 autocast."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    model = original(task, "float32")
    names = set(quantized_layers(model))
    base = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{task.bits}"),
        granularity=PerGroup(task.group_size),
        mapping_type=MappingType.ASYMMETRIC if task.asymmetric else MappingType.SYMMETRIC,
    )

    def chosen(module: Any, name: str) -> bool:
        return name in names

    made = Made(bits_of_groups(task), {"loss": loss, "learning_rate": rate, "steps": task.steps})
    teacher = original(task) if loss == "kl" else None
    with measured(made):
        quantize_(model, QATConfig(base, step="prepare"), filter_fn=chosen)
        made.settings["losses"] = train(task, model, teacher, rate)
        quantize_(model, QATConfig(base, step="convert"), filter_fn=chosen)
    state = model.state_dict()
    save_plain(task, {**state, **{f"{name}.weight": state[f"{name}.weight"].dequantize() for name in names}})
    return made


def twin(task: Task) -> Made:
    """Trains the full-precision model on the same tokens with the same cross-entropy, without quantizers."""
    model = original(task, "float32")
    made = Made(16.0, {"loss": "ce", "learning_rate": 2e-5, "steps": task.steps})
    with measured(made):
        made.settings["losses"] = train(task, model, None, 2e-5)
    save_plain(task, model.state_dict())
    return made


def train(task: Task, model: Any, teacher: Any, rate: float) -> tuple[float, float]:
    """Trains all weights for `steps` steps of four blocks; returns the first and the last loss, nats a token.

    transformers' Trainer with AdamW without decay, cosine, a tenth of warm-up, gradients clipped at 1. The loss,
    forward KL from `teacher` or cross-entropy where there is none, is llmqat's, made in chunks of tokens.
    """
    import tempfile

    import torch
    from transformers import Trainer, TrainingArguments

    from llmqat.data.blocks import token_blocks
    from llmqat.metrics import Teacher, predictor_of, token_loss
    from llmqat.models import capture_hidden
    from llmqat.train import processor_has_bf16

    def states(of: Any, ids: Any) -> Any:
        with capture_hidden(of) as captured:
            of(input_ids=ids, use_cache=False)
            return captured.take()[:, :-1].flatten(0, 1)

    class Taught(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **rest: Any) -> Any:
            ids = inputs["input_ids"]
            labels = ids[:, 1:].flatten()
            taught = None
            if teacher is not None:
                with torch.no_grad():
                    taught = Teacher(states(teacher, ids), predictor_of(teacher))
            weights = torch.full(labels.shape, 1 / labels.numel())
            hidden = states(model, ids)
            return token_loss(hidden, predictor_of(model), weights, taught, None if taught else labels)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=task.steps,
            per_device_train_batch_size=STEP_BLOCKS,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(task.steps // 10, 1),
            bf16=processor_has_bf16(),
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=0,
        )
        data = token_blocks(blocks_of(task, task.steps * STEP_BLOCKS), str(task.text)).dataset()
        trainer = Taught(model=model, args=arguments, train_dataset=data)
        trainer.train()
    return losses_of(trainer)


def autoround(task: Task) -> Made:
    """Runs AutoRound: 20 iterations for each transformer block."""
    from auto_round import AutoRound
    from calibration import Batches

    from llmqat.models import load_model

    model, tokenizer = load_model(task.model)
    ids = blocks_of(task, task.calibration)
    made = Made(bits_of_groups(task), {"iters": 20, "sym": not task.asymmetric})
    with measured(made):
        found = AutoRound(
            model,
            tokenizer,
            bits=task.bits,
            group_size=task.group_size,
            sym=not task.asymmetric,
            iters=20,
            nsamples=len(ids),
            seqlen=ids.shape[1],
            batch_size=Batches.batch_size,
            dataset=Batches(ids),
            low_gpu_mem_usage=False,
            device_map="cpu",
        ).quantize()
    save_plain(task, (found[0] if isinstance(found, tuple) else found).state_dict())
    return made


def gptq(task: Task, asymmetric: bool) -> Made:
    """Runs llm-compressor's GPTQ; symmetric with its observer of least squared error."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = original(task)
    ids = blocks_of(task, task.calibration)
    weights = {
        "num_bits": task.bits,
        "type": "int",
        "strategy": "group",
        "group_size": task.group_size,
        "symmetric": not asymmetric,
        "observer": "memoryless_minmax" if asymmetric else "memoryless_mse",
    }
    made = Made(bits_of_groups(task, asymmetric), weights)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": ids.ne(-1).long().tolist()})
    with measured(made):
        oneshot(
            model=model,
            dataset=data,
            recipe=GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]),
            num_calibration_samples=len(ids),
            max_seq_length=ids.shape[1],
        )
    rounded = {
        f"{name}.weight": fake_quantize(
            layer.weight, layer.weight_scale, layer.weight_zero_point, layer.quantization_scheme.weights
        )
        for name, layer in quantized_layers(model).items()
    }
    save_plain(task, {**model.state_dict(), **rounded})
    return made


def nf4(task: Task) -> Made:
    """Rounds to bitsandbytes' NF4, its scales in float32 (no double quantization); no text is used."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = original(task)
    made = Made(4 + 32 / task.group_size, {"quant_type": "nf4", "blocksize": task.group_size})
    rounded = {}
    with measured(made):
        for name, layer in quantized_layers(model).items():
            packed, state = quantize_4bit(layer.weight.data, blocksize=task.group_size, quant_type="nf4")
            rounded[f"{name}.weight"] = dequantize_4bit(packed, state).reshape(layer.weight.shape)
    save_plain(task, {**model.state_dict(), **rounded})
    return made


def hqq(task: Task) -> Made:
    """Runs HQQ with its own defaults; no text is used. Scale and zero of a group are bfloat16."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = original(task)
    made = Made(task.bits + 2 * SCALE_BITS / task.group_size, {"axis": 1})
    rounded = {}
    with measured(made):
        config = BaseQuantizeConfig(nbits=task.bits, group_size=task.group_size)
        for name, layer in quantized_layers(model).items():
            made_layer = HQQLinear(layer, config, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)
            rounded[f"{name}.weight"] = made_layer.dequantize().reshape(layer.weight.shape)
    save_plain(task, {**model.state_dict(), **rounded})
    return made


LLAMA_CPP_TYPES = {
    **dict.fromkeys(("Q4_0", "IQ4_NL", "Q4_K_S", "Q4_K_M"), 4),
    **dict.fromkeys(("Q3_K_S", "Q3_K_M"), 3),
    "Q2_K": 2,
}
"""Types of files that llama.cpp makes, and the bits of most codes in them: scales make far more of 3 and 2."""


def llama_cpp(task: Task, kind: str) -> Made:
    """Runs llama.cpp's quantize on the GGUF file that the model is; embedding and head in float16. No text is used.

    Raises:
        SystemExit: the model is no GGUF file, or quantize failed.
    """
    import llama_cpp as library

    from llmqat.models import model_file

    whole = model_file(task.source)
    if whole is None or whole.suffix != ".gguf":
        raise SystemExit(f"llama.cpp quantizes GGUF files, and {task.source} is none")
    made = Made(settings={"type": kind})
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = len(os.sched_getaffinity(0))
    settings.allow_requantize = True
    settings.token_embedding_type = settings.output_tensor_type = library.GGML_TYPE_F16
    (task.folder / MODEL_FOLDER).mkdir()
    target = task.folder / MODEL_FOLDER / f"{kind}.gguf"
    with measured(made):
        failed = library.llama_model_quantize(str(whole).encode(), str(target).encode(), settings)
    if failed:
        raise SystemExit(f"llama.cpp's quantize gave {failed}")
    return made


def bits_of_groups(task: Task, asymmetric: bool | None = None) -> float:
    """Returns the bits of a weight with its share of a 16-bit scale and, if any, a zero point as wide as a code."""
    zero = task.bits if (task.asymmetric if asymmetric is None else asymmetric) else 0
    return task.bits + (SCALE_BITS + zero) / task.group_size


METHODS: dict[str, Method] = {
    "llmqat gptq": Method(lambda task: llmqat_calibration(task, "gptq"), "llmqat", (5, 4, 3, 2), "ranges, gptq"),
    "llmqat blockwise": Method(
        lambda task: llmqat_calibration(task, "blockwise"), "llmqat", (5, 4, 3, 2), "ranges, gptq, blockwise"
    ),
    "llmqat distilled": Method(
        llmqat_distillation, "llmqat", (4, 3, 2), "ranges, gptq, blockwise, then forward KL at the recipe's rates"
    ),
    "torchao QAT": Method(lambda task: torchao_training(task, "ce"), "torchao", (4, 3, 2), "cross-entropy, rate 2e-5"),
    "full precision, trained": Method(
        twin,
        "llmqat",
        (16,),
        "torchao QAT's twin: the same tokens, cross-entropy and rate, no quantizers",
        grouped=False,
    ),
    "torchao QAT, distilled": Method(
        lambda task: torchao_training(task, "kl"), "torchao", (4, 3, 2), "forward KL, rate 2e-5"
    ),
    "torchao QAT, distilled at 1e-4": Method(
        lambda task: torchao_training(task, "kl", 1e-4), "torchao", (4, 3, 2), "forward KL, rate 1e-4"
    ),
    "AutoRound": Method(autoround, "auto-round", (4, 3, 2), "20 iterations a block"),
    "GPTQ": Method(
        lambda task: gptq(task, task.asymmetric),
        "llmcompressor",
        (4, 3, 2),
        "llm-compressor; least squared error at 4 bits",
    ),
    "GPTQ, zero points": Method(lambda task: gptq(task, True), "llmcompressor", (4,), "llm-compressor"),
    "NF4": Method(nf4, "bitsandbytes", (4,), "without text"),
    "HQQ": Method(hqq, "hqq", (4, 3, 2), "without text"),
    **{
        f"llama.cpp {kind}": Method(
            partial(llama_cpp, kind=kind), "llama-cpp-python", (bits,), "without text", grouped=False
        )
        for kind, bits in LLAMA_CPP_TYPES.items()
    },
}
"""Rows of the table, by name."""


def main() -> None:
    """Does one arm and writes its `arm.json`; exits with `MISSING` where the package is not there."""
    options = parse_options()
    method = METHODS[options.method]
    import torch

    from llmqat.evaluate.memory import resident

    global BARE
    BARE = resident("VmRSS")
    named = {name: getattr(options, name) for name in Task.__dataclass_fields__}
    try:
        made = method.make(Task(**named))
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        raise SystemExit(MISSING) from error
    arm = {
        "method": options.method,
        "bits": options.bits,
        "group_size": options.group_size if method.grouped else None,
        "bits_per_weight": made.bits_per_weight,
        "seconds": made.seconds,
        "processor_seconds": made.processor_seconds,
        "peak_bytes": made.peak_bytes,
        "threads": torch.get_num_threads(),
        "settings": made.settings,
        "versions": versions(method.package),
    }
    part = options.folder / f".{ARM_FILE}"
    part.write_text(json.dumps(arm, indent=2, default=str) + "\n", encoding="utf-8")
    part.rename(options.folder / ARM_FILE)


def versions(package: str) -> dict[str, str]:
    """Returns the versions that a figure depends on."""
    names = {"torch", "transformers", package} - {"llmqat"}
    return {name: importlib.metadata.version(name) for name in sorted(names)}


def parse_options() -> argparse.Namespace:
    """Returns the command line's options: the fields of a Task, and the method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, required=True)
    for name in ("source", "model"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("blocks", "text", "folder", "recipes"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("bits", "group-size", "calibration", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()

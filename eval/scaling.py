"""Memory of training at low bits on one GPU, and with traffic on 8 and 64, by the arithmetic of `llmqat plan`.

Nothing is run: models are made without weights, prepared, and counted. Prints Markdown, which is eval/scaling.md:

    python eval/scaling.py > eval/scaling.md
"""

from __future__ import annotations

import tempfile
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from llmqat.layers import QuantConfig, prepare
from llmqat.recipe import load_recipe
from llmqat.recipe.memory import (
    CHUNK_TOKENS,
    CPU_RUNTIME,
    Calibration,
    Devices,
    Method,
    ModelSize,
    calibration_memory,
    memory_of,
    size_of,
    traffic_of,
)
from llmqat.recipe.plan import plan_run
from llmqat.terminal import show_any_text
from llmqat.train import LoraSettings, choose_trained

LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
SHAPES = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "vocab_size": 49152,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        **LLAMA_3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        **LLAMA_3,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        **LLAMA_3,
    },
}
"""SmolLM2-135M, Llama-3.2-1B, Llama-3-8B and Llama-3-70B."""
QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
SETTINGS = (
    "train.gradient_checkpointing=true",
    "train.per_device_train_batch_size=1",
    "train.optim=adamw_bnb_8bit",
)
MANY_GPUS = ("8B", "70B")
ONE_GPU = {
    "LoRA, its own teacher": ("lora", False, False),
    "LoRA on the packed model, a teacher's cache": ("lora", True, True),
    "scales of the packed model, a teacher's cache": ("scales", True, False),
    "scales of the packed model, a teacher": ("scales", False, False),
    "all weights, a teacher": ("all", False, False),
}
"""What is trained -> (memory.Method.trains, whether the teacher takes less than a model, memory.Method.packed)."""
GPUS = (8, 64)
GPU_BYTES = 80e9
LENGTH, GROUP, RANK = 4096, 128, 16
SMALL_GROUP = 64
"""Where `GROUP` does not divide."""
CALIBRATION_TOKENS = 128 * 2048
BLOCKWISE = Calibration(CALIBRATION_TOKENS, 1, 2048, weight_bytes=2.0)
CALIBRATIONS = {
    f"block-wise, {CALIBRATION_TOKENS // 1024:,} k tokens, the model on the GPU": BLOCKWISE,
    "block-wise, a block at a time on the GPU": replace(BLOCKWISE, by_block=True),
    "GPTQ, a block at a time on the GPU": replace(BLOCKWISE, by_block=True, blockwise=False, gptq=True),
}
ONE = Devices(1, "ddp", "cuda")
METHODS = {
    "all weights, DDP, a teacher on each": ("all", "ddp", False),
    "all weights, ZeRO-2, a teacher on each": ("all", "zero2", False),
    "all weights, FSDP2, a teacher on each": ("all", "fsdp2", False),
    "all weights, FSDP2, the teacher sharded": ("all", "fsdp2", True),
    "LoRA, its own teacher, DDP": ("lora", "ddp", False),
    "LoRA, its own teacher, FSDP2": ("lora", "fsdp2", False),
    "scales of the packed model, DDP, a teacher on each": ("scales", "ddp", False),
    "scales of the packed model, DDP, a teacher's cache": ("scales", "ddp", True),
}
"""What is trained -> (memory.Method.trains, memory.Devices.kind, whether the teacher takes less than a model each)."""


def main() -> None:
    """Prints the page."""
    show_any_text()
    print(page())


def page() -> str:
    """Returns eval/scaling.md."""
    sizes = {name: counted(name) for name in SHAPES}
    parts = [
        HEAD,
        _one_gpu(sizes),
        _with_settings(),
        *(_section(name, *sizes[name]) for name in MANY_GPUS),
        _assumptions(),
    ]
    return "\n".join(parts).rstrip()


HEAD = f"""# Memory on one GPU, and on 8 and 64, on paper

Made by `python eval/scaling.py`, from the formulas of `llmqat plan` (llmqat/recipe/memory.py); nothing here was run.
The shapes of SmolLM2-135M and of Llama 3, to int4 in groups of {GROUP} ({SMALL_GROUP} at 135M); a micro-batch of one
sequence of {LENGTH:,} tokens a GPU, bfloat16 with float32 masters, AdamW, gradient checkpointing. GB (1e9 bytes) on
each GPU at the peak, and what a GPU sends in an optimizer step of one micro-batch; **bold** does not fit into
{GPU_BYTES / 1e9:.0f} GB.
"""


def _one_gpu(sizes: dict[str, tuple[ModelSize, dict[str, int]]]) -> str:
    lines = [
        "## One GPU",
        "",
        f"| | {' | '.join(f'{name}, GB' for name in sizes)} |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    rows = {
        label: [calibration_memory(size, how, ONE).peak for size, _ in sizes.values()]
        for label, how in CALIBRATIONS.items()
    }
    for label, (trains, less, packed) in ONE_GPU.items():
        methods = [replace(method_of(trains, trained[trains], less), packed=packed) for _, trained in sizes.values()]
        rows[label] = [
            memory_of(size, method, ONE).peak for (size, _), method in zip(sizes.values(), methods, strict=True)
        ]
    for label, peaks in rows.items():
        lines.append(f"| {label} | {' | '.join(_gigabytes(peak, 1 if peak < 1e10 else 0) for peak in peaks)} |")
    return "\n".join([*lines, ""])


def _with_settings() -> str:
    """Returns what `llmqat plan` says of a model and settings, which README names."""
    with tempfile.TemporaryDirectory() as temporary:
        Qwen3Config(**QWEN3_8B, architectures=["Qwen3ForCausalLM"]).save_pretrained(temporary)
        recipe = load_recipe("lora-int4", [f"model={temporary}", *SETTINGS])
        peak = plan_run(recipe, Devices(1, "ddp", "cuda")).memory.peak
    command = f"llmqat plan lora-int4 model=Qwen/Qwen3-8B {' '.join(SETTINGS)} --processes 1"
    return f"`{command}`: {peak / 1e9:.1f} GB.\n"


def _gigabytes(peak: float, digits: int = 0) -> str:
    shown = f"{peak / 1e9:,.{digits}f}"
    return f"**{shown}**" if peak > GPU_BYTES else shown


def _section(name: str, size: ModelSize, trained: dict[str, int]) -> str:
    lines = [
        f"## {name}: {size.parameters / 1e9:.2f} G parameters, {size.quantized / 1e9:.2f} G quantized, "
        f"{size.groups / 1e6:.0f} M scales",
        "",
        "| trained | parameters | " + " | ".join(f"{gpus} GPUs: GB | sent, GB" for gpus in GPUS) + " |",
        "|---|---" + "|---|---" * len(GPUS) + "|",
    ]
    for label, (trains, kind, less) in METHODS.items():
        cells = [label, f"{trained[trains] / 1e6:,.0f} M"]
        for gpus in GPUS:
            method, devices = method_of(trains, trained[trains], less), Devices(gpus, kind, "cuda")
            sent = traffic_of(size, method, devices)
            cells += [_gigabytes(memory_of(size, method, devices).peak), f"{sent / 1e9:,.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(_calibration_lines(size))
    return "\n".join([*lines, "", _parts(size, trained), ""])


def _parts(size: ModelSize, trained: dict[str, int]) -> str:
    """Returns one line of the parts of the methods on 8 GPUs."""
    shown = []
    for label in ("all weights, FSDP2, the teacher sharded", "LoRA, its own teacher, FSDP2"):
        trains, kind, less = METHODS[label]
        parts = memory_of(size, method_of(trains, trained[trains], less), Devices(GPUS[0], kind, "cuda")).parts()
        shown.append(f"{label}: " + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in parts.items() if v >= 5e7))
    return "Parts on 8 GPUs, not all at once: " + "; ".join(shown) + "."


def _calibration_lines(size: ModelSize) -> str:
    lines = []
    for label, how in CALIBRATIONS.items():
        cells = " | ".join([f"{_gigabytes(calibration_memory(size, how, ONE).peak)} | 0.0"] * len(GPUS))
        lines.append(f"| one GPU: {label} | {size.block / 1e6:,.0f} M a block | {cells} |")
    return "\n".join(lines)


def counted(name: str) -> tuple[ModelSize, dict[str, int]]:
    """Returns the size of a model, and how many parameters train by each method."""
    config = LlamaConfig(**SHAPES[name])
    trained: dict[str, int] = {}
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    group = SMALL_GROUP if config.hidden_size % GROUP else GROUP
    prepare(model, QuantConfig.preset("int4", group_size=group))
    size = size_of(model, config)
    for trains in ("all", "scales", "lora"):  # adapters last: they stay on the model
        chosen = LoraSettings(r=RANK, lora_alpha=2 * RANK).attach(model) if trains == "lora" else model
        choose_trained(chosen, "scales" if trains == "scales" else "all")
        trained[trains] = sum(p.numel() for p in chosen.parameters() if p.requires_grad)
    return size, trained


def method_of(trains: str, trained: int, less_teacher: bool) -> Method:
    """Returns how a row of the table is trained."""
    method = Method(
        trains=trains,
        trained=trained,
        teacher=0.0 if trains == "lora" else 2.0,
        head_trains=trains == "all",
        batch=1,
        length=LENGTH,
        checkpointing=True,
    )
    if not less_teacher:
        return method
    return replace(method, shards_teacher=True) if trains == "all" else replace(method, teacher=0.0)


def _assumptions() -> str:
    return f"""## What is assumed

- Parts and their bytes are those that `llmqat/recipe/memory.py` lists. Its prediction is held against measured peaks of
  a 135 M model on a CPU only ([eval/results](results/plan-smollm2-135m.txt)); nothing was measured on a GPU.
- Peaks leave out what CUDA, NCCL and the allocator's gaps take: plan with nine tenths of a GPU.
- The loss makes logits of {CHUNK_TOKENS} tokens at a time, so a vocabulary of 128,256 costs about 1.3 GB, whatever the
  length; training the head adds its gradient, made whole in float32.
- Under FSDP2 two blocks are whole at a time, and embeddings and head always; masters are gathered in float32, as their
  scales are needed with them. Frozen weights are gathered in bfloat16.
- A sharded teacher is gathered block by block once a micro-batch. llmqat's own launch files keep a teacher whole on
  each GPU; at 70B it has to be sharded, kept in 4 bits (`teacher_bits`), or run once (`llmqat cache-teacher`).
- The traffic is that of ring collectives, (W - 1) / W of what is moved; with more micro-batches a step, FSDP2 gathers
  again for each, DDP does not. Nothing is said of what is hidden behind computation.
- Activations are those of Llama's blocks in transformers with fused attention: a sequence twice as long keeps twice as
  much. Scores of attention are never whole.
- Block-wise training holds one block in float32 with AdamW. GPTQ holds one block, and of its widest layer six matrices
  of input features x input features. Hidden states lie in the memory of the machine, not on the GPU, up to 4 GB of each
  kind (`hidden_memory`); what is more lies in files. GPUs more than one only share the text.
- "A block at a time": `llmqat quantize` leaves weights in their safetensors files, or in the memory of the machine, and
  moves each block to the GPU when its turn comes. On a CPU the same is held in memory, with the
  hidden states, and {CPU_RUNTIME / 1e9:.1f} GB more. Stages `rotate` and `smooth` need all weights in memory.
"""


if __name__ == "__main__":
    main()

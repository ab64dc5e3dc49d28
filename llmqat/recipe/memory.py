"""The memory and the traffic of a training, by arithmetic: pure functions of a model's size and of how it is trained.

A step has three moments at which memory can be highest, on top of what always lies there (weights, scales, teacher,
optimizer): when the loss is made (all activations, a chunk of logits, the head's gradient), when the backward pass
begins (the same, and the head's gradient on its way), and when it ends (all gradients). `peak` is the highest of them.

Counted in bytes a device:
    weights       float32 masters where weights train, bfloat16 where they are frozen, packed codes where scales train,
                  and under adapters of a packed model;
                  for each group a starting scale and a log-scale in float32; a byte a weight where zeros are kept
    gradients     float32, of what trains; DDP holds them a second time in its buckets
    optimizer     8 bytes a trained parameter for AdamW, 2 in 8 bits
    teacher       bfloat16, or 1 or 0.5 bytes a linear weight; none for the model itself or a cache
    casts         bfloat16 copies of float32 parameters that no quantizer handles (embeddings, norms), and of gradients
    logits        512 tokens of student and teacher in bfloat16, and on a GPU four float32 copies of them
    activations   what a Llama's blocks keep for the backward pass (on a CPU attention's scores too), and their
                  quantized weights in bfloat16; with gradient checkpointing one hidden state a block, and all this for
                  one block

Letters: P parameters, D hidden size, F intermediate size, A attention width (heads x head size), K width of keys,
T tokens in a micro-batch, L blocks, W processes, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmqat.calibrate import fisher
from llmqat.layers import PackedModule, QuantModule
from llmqat.layers.causal import LONGEST
from llmqat.models import heads_of

CHUNK_TOKENS = 512
"""Tokens whose logits exist at once (metrics.token_loss)."""
KINDS = ("ddp", "zero2", "zero3", "fsdp2")
"""How a model is spread: ddp holds all of it on each device, zero2 shards gradients and optimizer, the others all."""
CPU_RUNTIME = 440_000_000
"""What a process on a CPU holds beside tensors, from measured peaks: 120 MB that a first step leaves (primitives,
buffers, threads), and freed memory between tensors, since the heap gives nothing back (heap.py)."""


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on of a prepared model."""

    parameters: int
    """All weights, tied ones once; without scales."""
    quantized: int
    """Weights that are quantized linear maps."""
    groups: int
    """Scales."""
    packed_bytes: float
    """Of one quantized weight, its scales not counted."""
    block: int
    """Parameters of the largest transformer block."""
    layers: int
    hidden: int
    intermediate: int
    """Width of the activated part of the MLP: with experts, those that one token meets."""
    heads: int
    """Of queries."""
    attention: int
    key_value: int
    vocabulary: int
    widest: int
    """Input features of the widest quantized weight."""
    sparse: int = 0
    """Quantized weights of schemes with sparsity."""


@dataclass(frozen=True)
class Method:
    """How a model is trained."""

    trains: str = "all"
    """`all` weights, `lora` adapters with the scales, or `scales` with the norms."""
    packed: bool = False
    """Whether the weights under adapters are packed."""
    trained: int = 0
    """Parameters that train, scales included."""
    teacher: float = 2.0
    """Bytes of one of the teacher's linear weights; 0 where no second model is held."""
    shards_teacher: bool = False
    """Whether the teacher is spread over the devices as well."""
    head_trains: bool = True
    """Whether the output head has a gradient."""
    frozen_bytes: float = 2.0
    """Of a frozen weight: bfloat16, or float32 where calibration folds weights into each other."""
    batch: int = 1
    length: int = 512
    accumulation: int = 1
    checkpointing: bool = False
    optimizer: float = 8.0
    """Bytes of the optimizer's state for one trained parameter."""
    embedding: int = 0
    """Trained weights of embeddings."""
    wide_embedding: bool = False
    """Whether the optimizer keeps 32 bits a number for embeddings, as the 8-bit ones of bitsandbytes do."""
    reuses: bool | None = None
    """Whether quantized weights are held through a step; None: where it has several micro-batches."""


@dataclass(frozen=True)
class Calibration:
    """How a model is calibrated that is not trained."""

    tokens: int
    """Of the text, as many as the stage that reads the most."""
    batch: int
    """Token blocks in a forward."""
    length: int
    """Of a token block."""
    weight_bytes: float
    """Of a weight: 2 in bfloat16, or 4 in float32 where weights are folded into each other."""
    gptq: bool = False
    """Whether stage `gptq` is among the stages."""
    blockwise: bool = True
    """Whether stage `blockwise` is."""
    hidden_memory: float = 4e9
    """Bytes of hidden states above which they lie in files."""
    by_block: bool = False
    """Whether weights stay in their files, or in the memory of the machine, until their block's turn comes."""
    sensitivity: int = 0
    """Tokens of the text that sensitivities are measured on before; 0 where none are."""
    sensitivity_memory: float = 4e9
    """Bytes of their hidden states above which these lie in files."""


@dataclass(frozen=True)
class Devices:
    """What the training is spread over."""

    processes: int = 1
    kind: str = "ddp"
    accelerator: str = "cpu"
    """`cpu` or `cuda`."""

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown way of spreading, or no process."""
        if self.kind not in KINDS:
            raise ValueError(f"sharding={self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if self.processes < 1:
            raise ValueError(f"processes={self.processes}: give at least 1")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    casts: float
    logits: float
    activations: float
    runtime: float
    peak: float

    def parts(self) -> dict[str, float]:
        """Returns all but the peak, which is less than their sum: they are not all there at once."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "peak"}


def size_of(model: nn.Module, config: Any, packed_bytes: float = 0.5) -> ModelSize:
    """Returns the size of a prepared model, perhaps on the meta device and perhaps with adapters, which do not count.

    Args:
        model: prepared.
        config: its transformers configuration.
        packed_bytes: of a quantized weight when packed.
    """
    text = config.get_text_config()
    hidden = text.hidden_size
    heads = heads_of(text)
    experts = getattr(text, "num_experts_per_tok", None) or 1
    wide = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * hidden
    weights = [module for module in model.modules() if isinstance(module, (QuantModule, PackedModule))]
    quantizers = {id(p) for module in weights for p in (module.log_scale, getattr(module, "zero_point", None))}
    own = [p for name, p in model.named_parameters() if id(p) not in quantizers and ".lora_" not in name]
    packed = sum(module.rows * module.columns for module in weights if isinstance(module, PackedModule))
    embeddings = {id(p) for name, p in model.named_parameters() if p.dim() == 2 and p.shape[0] == text.vocab_size}
    return ModelSize(
        parameters=sum(p.numel() for p in own) + packed,
        quantized=sum(module.rows * module.columns for module in weights),
        groups=sum(_scales(module) for module in weights),
        packed_bytes=packed_bytes,
        block=(sum(p.numel() for p in own if id(p) not in embeddings) + packed) // text.num_hidden_layers,
        layers=text.num_hidden_layers,
        hidden=hidden,
        intermediate=wide * experts,
        heads=heads.queries,
        attention=heads.queries * heads.size,
        key_value=heads.keys * heads.size,
        vocabulary=text.vocab_size,
        widest=max((module.columns for module in weights), default=0),
        sparse=sum(m.rows * m.columns for m in weights if isinstance(m, QuantModule) and m.nonzero is not None),
    )


def _scales(module: QuantModule | PackedModule) -> int:
    if isinstance(module, PackedModule):
        return module.weight_scale.numel()
    return module.kept_shape[0] * module.kept_shape[1]


def memory_of(size: ModelSize, method: Method, devices: Devices) -> Memory:
    """Returns what one device holds when `size` is trained by `method`."""
    shared = devices.processes if devices.kind in ("zero3", "fsdp2") else 1
    states = 1 if devices.kind == "ddp" else devices.processes
    gathered = 0.0 if shared == 1 else _gathered(size, method)
    weights = _weight_bytes(size, method) / shared + gathered
    gradients = 4.0 * method.trained / states
    if devices.kind == "ddp" and devices.processes > 1:
        gradients *= 2
    optimizer = method.optimizer * (method.trained + 3 * method.wide_embedding * method.embedding) / states
    teacher = _teacher_bytes(size, method)
    if method.shards_teacher:
        teacher = teacher / devices.processes + method.teacher * size.block + 2.0 * _outside(size)
    rest = size.parameters - size.quantized
    casts = 2.0 * rest if method.trains == "all" else 0.0
    head = float(size.vocabulary * size.hidden) if method.head_trains else 0.0
    logits = _logit_bytes(size, method, devices)
    activations = _activation_bytes(size, method, devices)
    runtime = float(CPU_RUNTIME) if devices.accelerator == "cpu" else 0.0
    always = weights + optimizer + teacher + casts + runtime + (gradients if method.accumulation > 1 else 0.0)
    at_loss = always + activations + logits + 4 * head
    at_start = always + activations + 10 * head  # float32 as it was made, scaled, and in bfloat16
    after = gradients if method.accumulation == 1 else 0.0
    at_end = always + after + casts + _block_bytes(size, method, devices)
    peak = max(at_loss, at_start, at_end)
    return Memory(weights, gradients, optimizer, teacher, 2 * casts, logits + 10 * head, activations, runtime, peak)


def traffic_of(size: ModelSize, method: Method, devices: Devices) -> float:
    """Returns the bytes that one device sends in an optimizer step, by rings of all devices.

    DDP reduces gradients to all (twice their size), ZeRO-2 to one each and gathers the new weights, FSDP2 and ZeRO-3
    gather weights in each forward and each backward pass and reduce gradients to one each.
    """
    share = (devices.processes - 1) / devices.processes
    gradients = 4.0 * method.trained
    if devices.kind in ("ddp", "zero2"):
        return share * 2 * gradients
    passes = 2 * method.accumulation
    teacher = _teacher_bytes(size, method) * method.accumulation if method.shards_teacher else 0.0
    return share * (passes * _weight_bytes(size, method) + gradients * method.accumulation + teacher)


def calibration_memory(size: ModelSize, calibration: Calibration, devices: Devices) -> Memory:
    """Returns what a device holds when `size` is calibrated and not trained, by parts.

    - weights: all of them; embeddings and output head alone where blocks come one by one
    - a block in training (stage `blockwise`): 24 bytes a weight, masters, gradients, AdamW, and the best ones so far
      twice while they are taken; and what it keeps of a batch
    - a block in stage `gptq`: 8, its weights in float32, the original and the quantized ones in bfloat16; and for its
      widest layer, of I input features and D output features, six matrices I x I and four I x D in float32: second
      moments and what they are to make up for, of two halves of the text, a factor and its copy
    - a block whose sensitivities are measured: 14, its weights in float32 and in the dtype of the forward, their
      gradients and Fisher information; what it keeps of a token block; logits, their probabilities and gradients of a
      chunk; and on a CPU the hidden states between all blocks, up to `sensitivity_memory`
    - on a CPU, hidden states of both chains, and with `gptq` the original inputs of layers, up to `hidden_memory` each;
      a GPU has them in the memory of the machine
    """
    tokens, hidden = calibration.tokens, size.hidden
    outside = 2.0 * _outside(size)
    weights = outside if calibration.by_block else calibration.weight_bytes * size.parameters + size.sparse
    block = calibration.batch * calibration.length * _kept_by_block(size)
    if calibration.blockwise:
        block += 24.0 * size.block
    on_cpu, most = devices.accelerator == "cpu", calibration.hidden_memory
    if calibration.gptq:
        inputs = 2.0 * tokens * (4 * hidden + size.attention + size.widest)
        matrices = 4.0 * size.widest * (6 * size.widest + 4 * hidden)
        block = max(block, 8.0 * size.block + matrices + (inputs if on_cpu and inputs <= most else 0.0))
    if calibration.blockwise or calibration.gptq:
        block += min(4.0 * tokens * hidden, most) if on_cpu else 0.0
    elif calibration.by_block:
        block += 2.0 * size.block
    if calibration.sensitivity:
        states = min(2.0 * calibration.sensitivity * hidden * (size.layers + 1), calibration.sensitivity_memory)
        own = 14.0 * size.block + calibration.length * _kept_by_block(size)
        own += 12.0 * fisher.CHUNK_TOKENS * size.vocabulary
        block = max(block, own + (states if on_cpu else 0.0))
    runtime = float(CPU_RUNTIME) if on_cpu else 0.0
    return Memory(weights, 0.0, 0.0, 0.0, 0.0, 0.0, block, runtime, weights + block + runtime)


def optimizer_bytes(name: str) -> float:
    """Returns the bytes of state that an optimizer of transformers keeps for one trained parameter."""
    if name in ("sgd", "adafactor") or name.startswith("galore_adafactor"):
        return 0.0  # adafactor: a row and a column of each matrix
    moments = 1 if any(word in name for word in ("lion", "rmsprop", "adagrad")) else 2
    width = 1.0 if "8bit" in name else 0.5 if "4bit" in name else 4.0
    return moments * width


def _weight_bytes(size: ModelSize, method: Method) -> float:
    rest = size.parameters - size.quantized
    if method.trains == "all":
        return 4.0 * size.parameters + 8.0 * size.groups + size.sparse
    if method.trains == "scales":  # codes, scales in bfloat16, log-scales
        return size.packed_bytes * size.quantized + 6.0 * size.groups + 2.0 * rest
    if method.packed:
        return size.packed_bytes * size.quantized + 2.0 * size.groups + 2.0 * rest + 4.0 * method.trained
    return method.frozen_bytes * size.parameters + 4.0 * method.trained + 4.0 * size.groups + size.sparse


def _teacher_bytes(size: ModelSize, method: Method) -> float:
    rest = size.parameters - size.quantized
    return 0.0 if method.teacher == 0 else method.teacher * size.quantized + 2.0 * rest


def _gathered(size: ModelSize, method: Method) -> float:
    """Returns what is whole at a time where weights are sharded: two blocks, a block's gradients, and embeddings."""
    width = 4.0 if method.trains == "all" else 2.0
    return width * (2 * size.block + _outside(size)) + (4.0 * size.block if method.trains == "all" else 0.0)


def _outside(size: ModelSize) -> int:
    """Returns the parameters that are in no block: embeddings, head, last norm."""
    return size.parameters - size.block * size.layers


def _logit_bytes(size: ModelSize, method: Method, devices: Devices) -> float:
    tokens = min(CHUNK_TOKENS, method.batch * method.length)
    working = 16.0 if devices.accelerator == "cuda" else 0.0  # on a CPU a few rows at a time
    return tokens * size.vocabulary * (4.0 + working)


def _kept_by_block(size: ModelSize) -> float:
    """Returns the bytes a token that a block keeps for its backward pass.

    16 D: two norms (float32 and bfloat16 copies of their inputs) and their outputs; 6 A + 4 K: queries, keys, values,
    and the outputs of attention; 8 F: gate, its activation, up, and their product.
    """
    return 16.0 * size.hidden + 6.0 * size.attention + 4.0 * size.key_value + 8.0 * size.intermediate


def _made_weights(size: ModelSize, method: Method) -> float:
    """Returns the bytes that quantized weights leave for the backward pass.

    Each weight takes 2 for its quantized value in bfloat16. With adapters, 4 more for the sum W + s B A. With sparsity,
    4 more for the masked weight in float32. Where only scales train, nothing is kept but for sparsity.
    """
    return {"all": 2.0, "lora": 6.0, "scales": 0.0}[method.trains] * size.quantized + 4.0 * size.sparse


def _scores(size: ModelSize, method: Method, devices: Devices) -> float:
    """Returns the bytes a token of attention's scores that a block keeps: on a CPU, of short sequences alone."""
    return 2.0 * size.heads * method.length if devices.accelerator == "cpu" and method.length <= LONGEST else 0.0


def _block_bytes(size: ModelSize, method: Method, devices: Devices) -> float:
    """Returns what one block needs in its own backward pass."""
    kept = (_kept_by_block(size) + _scores(size, method, devices)) * method.batch * method.length
    block = kept + _made_weights(size, method) / size.layers
    if method.trains == "scales":  # the largest matrix: dequantized, its gradient, and the product of both in float32
        block += 14.0 * size.hidden * size.intermediate
    return block


def _activation_bytes(size: ModelSize, method: Method, devices: Devices) -> float:
    tokens = method.batch * method.length
    ends = 12.0 * size.hidden * tokens  # hidden states of student and teacher before the head, and their gradients
    if method.checkpointing:
        whole = devices.kind == "ddp" and method.trains != "scales" and not method.packed
        reuses = method.accumulation > 1 if method.reuses is None else method.reuses
        reused = 2.0 * size.quantized if reuses and whole else 0.0
        return ends + 2.0 * size.hidden * tokens * size.layers + _block_bytes(size, method, devices) + reused
    kept = _kept_by_block(size) + _scores(size, method, devices)
    return ends + kept * tokens * size.layers + _made_weights(size, method)

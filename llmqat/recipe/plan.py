"""What a recipe would do, told from the model's configuration alone: coverage, steps, tokens, memory on each device.

Memory is memory.py's arithmetic on the model as it would be prepared, made without weights. A few steps on random
tokens (probe.py) say what it really takes here, and how long.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llmqat.calibrate import AllocationConfig, BlockwiseStage, GPTQStage, RangesStage, needs_text, rotates, untie
from llmqat.calibrate.sensitivity import possible_schemes
from llmqat.data import TokenBlocks
from llmqat.data.config import DEFAULT_SYNTHETIC_TOKENS
from llmqat.data.length import check_length
from llmqat.data.text import read_text
from llmqat.evaluate.budget import OWN_TEXT, Law, laws
from llmqat.export import is_packed, load
from llmqat.export.compressed_tensors import quantized_layers, try_unwritten
from llmqat.export.description import ModelDescription, describe
from llmqat.export.prepared import is_prepared
from llmqat.export.serving import NEED_ONE_SCHEME, Verdict, check_served, served_by
from llmqat.export.stock import try_stock
from llmqat.layers import DEQUANTIZED_FROM, CoverageAudit, QuantConfig, audit, prepare
from llmqat.models import (
    empty_model,
    is_dequantized_at_loading,
    plain_config,
    quantized_by,
    read_config,
    resolve_spec,
    token_model_class,
)
from llmqat.recipe.allocation import check_allocation
from llmqat.recipe.config import (
    Recipe,
    folds_weights,
    kept_top_k,
    master_dtype,
    moves_weights,
    teacher_obstacle,
    training_arguments,
)
from llmqat.recipe.disk import Disk, disk_of
from llmqat.recipe.memory import (
    Calibration,
    Devices,
    Memory,
    Method,
    ModelSize,
    calibration_memory,
    memory_of,
    optimizer_bytes,
    size_of,
)
from llmqat.recipe.reading import parse_yaml
from llmqat.recipe.start import starts_packed
from llmqat.train import LoraSettings, QATArguments, check_batch, choose_trained
from llmqat.train.stability import check_warmups

PROPOSED_RANK = 16
"""Of the adapters that are proposed where memory is short."""
NO_REUSE = "train.reuse_quantized_weights=false"
EIGHT_BIT_OPTIMIZER = optimizer_bytes("adamw_bnb_8bit")
"""Bytes of its state for one trained parameter."""
FEW_STEPS = 30
"""With fewer optimizer steps hardly any answer is learned."""
FEW_CONVERSATIONS, EPOCHS_OF_FEW = 100, 8
"""So few conversations want so many epochs, as recipes/chat-lora-int4.yaml was measured with."""
MOST_USED = 0.9
"""Share of a device's memory that a plan fills at most: allocators leave gaps."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe would do."""

    coverage: CoverageAudit
    """Every parameter tensor: quantized how, or left alone and why."""
    blocks: int | None
    """Blocks of training text; None where the amount is known only when the text is read."""
    steps: int | None
    """Optimizer steps; None as for blocks."""
    tokens: int | None
    """Tokens trained on, repeats counted."""
    target_bits: float | None
    """Average that the bits of layers are chosen under when the run begins; None where all have those of the scheme."""
    size: ModelSize
    """The model."""
    method: Method | Calibration
    """How it is trained, or calibrated where it is not trained."""
    devices: Devices
    """On what."""
    served: Mapping[str, Verdict]
    """Which clients would serve the checkpoint."""
    trained_by: Mapping[str, int]
    """Parameters that would train by other methods, `lora` (of rank 16) and `scales`, where the scheme allows them."""
    teacher: str
    """Who teaches, in words."""
    disk: Disk
    """Bytes that the run writes into its folder."""
    output: Path
    """The folder."""
    law: Law | None
    """What its tokens were worth where the like was measured; None where it was not."""
    moves: bool
    """Whether calibration may write to any weight."""

    @property
    def memory(self) -> Memory:
        """Bytes on each device."""
        if isinstance(self.method, Calibration):
            return calibration_memory(self.size, self.method, self.devices)
        return memory_of(self.size, self.method, self.devices)

    @property
    def by_block(self) -> Memory | None:
        """What the run holds where its blocks come one by one and weights stay in their files; None where they do not.

        Stages that may write to any weight have all of them in memory.
        """
        if not isinstance(self.method, Calibration) or self.moves:
            return None
        return calibration_memory(self.size, dataclasses.replace(self.method, by_block=True), self.devices)

    def fits(self, available: int) -> bool:
        """Returns whether the run as it is stays within `available` bytes of each device."""
        return self.memory.peak <= MOST_USED * available

    def fitting_batch(self, available: int) -> int:
        """Returns the most samples a device that a micro-batch may have within `available` bytes; 0 for none."""

        def fits(batch: int) -> bool:
            return dataclasses.replace(self, method=dataclasses.replace(self.method, batch=batch)).fits(available)

        batch = 1
        while fits(batch) and batch < 4096:
            batch *= 2
        low, high = batch // 2, batch  # low fits (or is 0), high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def cheaper(self, available: int) -> dict[str, Memory]:
        """Returns ways that fit into `available` bytes, by the keys of a recipe, those that change least first.

        Adapters and scales are proposed together with the other settings that save most. A recipe that only calibrates
        has none.
        """
        if isinstance(self.method, Calibration):
            return {}
        training = self.method
        small = {"batch": 1, "accumulation": training.accumulation * training.batch}
        least = {"checkpointing": True, "reuses": False, **small}
        ways: dict[str, dict[str, Any]] = {
            "train.gradient_checkpointing=true": {"checkpointing": True},
            f"train.per_device_train_batch_size=1 train.gradient_accumulation_steps={small['accumulation']}": small,
            "a teacher_cache (llmqat cache-teacher)": {"teacher": 0.0},
            f"these three together, {NO_REUSE}": {**least, "teacher": 0.0},
            f"train.optim=adamw_bnb_8bit, with checkpointing, a micro-batch of one and {NO_REUSE}": {
                **least,
                "optimizer": EIGHT_BIT_OPTIMIZER,
                "wide_embedding": True,
                "trained": training.trained if training.optimizer > EIGHT_BIT_OPTIMIZER else None,
            },
            f"lora={{r: {PROPOSED_RANK}}} calibrate=[ranges], its own teacher, with checkpointing and {NO_REUSE}": {
                **least,
                "trains": "lora",
                "trained": self.trained_by.get("lora"),
                "teacher": 0.0,
                "head_trains": False,
            },
            "train.trainable=scales, with checkpointing": {
                **least,
                "trains": "scales",
                "trained": self.trained_by.get("scales"),
                "head_trains": False,
            },
        }
        found = {
            name: memory_of(self.size, dataclasses.replace(training, **changes), self.devices)
            for name, changes in ways.items()
            if changes.get("trained", 1) is not None
        }
        return {name: memory for name, memory in found.items() if memory.peak <= MOST_USED * available}


def plan_run(recipe: Recipe, devices: Devices | None = None, blocks: int | None = None) -> Plan:
    """Returns what `recipe` would do; no weights are loaded, but a GGUF file is dequantized to the cache once.

    Args:
        recipe: from `load_recipe`.
        devices: what it is spread over; the processes there are, each on what is at hand, where not given.
        blocks: of training text, where they were counted; what the recipe wants where not given.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: the scheme or the trainer's arguments do not do.
    """
    arguments = training_arguments(recipe)
    here = Devices(processes=arguments.world_size, accelerator=arguments.device.type)
    devices = devices or here
    blocks = blocks or blocks_of(recipe)
    steps = steps_of(arguments, blocks, devices.processes)
    samples = samples_of(arguments, devices.processes)
    model, coverage = prepared_model(recipe)
    description = described(model)  # before adapters are put on it
    check_plan_served(description, recipe.serve, None if starts_packed(recipe) else recipe.quant, recipe.allocate)
    check_length(model, recipe.data.block_size, "data.block_size")
    size = size_of(model, model.config, packed_bytes(coverage))
    method = method_of(recipe, arguments, model)[0] if recipe.trains else calibration_of(recipe)
    return Plan(
        coverage=coverage,
        blocks=blocks,
        steps=steps,
        tokens=None if steps is None else steps * samples * recipe.data.block_size,
        target_bits=None if recipe.allocate is None else recipe.allocate.target_bits,
        size=size,
        method=method,
        devices=devices,
        served=served_by(description),
        trained_by=_trained_by(recipe),
        teacher=_teacher_in_words(recipe, method),
        disk=disk_of(recipe, arguments, coverage, size, method, blocks, steps),
        output=recipe.output,
        law=law_of_recipe(recipe, arguments),
        moves=moves_weights(recipe),
    )


def law_of_recipe(recipe: Recipe, arguments: QATArguments) -> Law | None:
    """Returns the law of KL against tokens that was measured with the scheme, stages and kind of text of `recipe`.

    None where none was, and for a training of adapters or scales, or of answers. A recipe that trains nothing has that
    of the training which could follow.
    """
    learns = arguments.cross_entropy_weight > 0 or arguments.kl_weight == 0
    in_part = recipe.lora is not None or arguments.trainable != "all"
    if (recipe.trains and (learns or in_part)) or recipe.allocate is not None:
        return None
    stages, own_text = {stage.stage for stage in recipe.calibrate}, recipe.data.source == "synthetic"
    for law in laws():
        is_alike = (law.text == OWN_TEXT) == own_text and stages.issuperset(law.stages)
        if is_alike and recipe.quant == QuantConfig.preset(law.scheme, group_size=law.group_size):
            return law
    return None


def blocks_of(recipe: Recipe) -> int | None:
    """Returns the blocks of training text that are wanted; None where the text says how many there are."""
    wanted = recipe.data.tokens or (DEFAULT_SYNTHETIC_TOKENS if recipe.data.source == "synthetic" else None)
    return None if wanted is None else math.ceil(wanted / recipe.data.block_size)


def samples_of(arguments: QATArguments, processes: int) -> int:
    """Returns the samples of an optimizer step, of all `processes` together."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * processes


def steps_of(arguments: QATArguments, blocks: int | None, processes: int) -> int | None:
    """Returns the optimizer steps of a training on `blocks`; None where they depend on an amount that is not known."""
    if arguments.max_steps >= 0:
        return arguments.max_steps
    if arguments.num_train_epochs == 0:
        return 0
    if blocks is None:
        return None
    return math.ceil(math.ceil(blocks / samples_of(arguments, processes)) * arguments.num_train_epochs)


def learns_answers(arguments: QATArguments, blocks: TokenBlocks) -> bool:
    """Returns whether the loss sees the answers that the text tells from the rest."""
    return arguments.cross_entropy_weight > 0 and blocks.rows.scored is not None


def check_blocks(arguments: QATArguments, blocks: TokenBlocks, processes: int) -> str | None:
    """Returns a warning where a training on `blocks` is too short to learn their answers; None where it is not.

    Raises:
        ValueError: the blocks fill no batch, or a warm-up does not end within the training.
    """
    check_batch(arguments, len(blocks))
    check_warmups(steps_of(arguments, len(blocks), processes) or 0, arguments)
    return few_steps(arguments, blocks, processes) if learns_answers(arguments, blocks) else None


def few_steps(arguments: QATArguments, blocks: TokenBlocks, processes: int) -> str | None:
    """Returns a warning where a training on answers is so short that it will hardly learn them, and what to give."""
    count, conversations = len(blocks), None if blocks.documents is None else len(blocks.documents)
    steps = steps_of(arguments, count, processes) or 0
    an_epoch = math.ceil(count / samples_of(arguments, processes))
    epochs = steps / an_epoch
    are_few = conversations is not None and conversations < FEW_CONVERSATIONS
    wanted = max(EPOCHS_OF_FEW if are_few else 1, math.ceil(FEW_STEPS / an_epoch))
    if steps >= FEW_STEPS and (not are_few or epochs >= EPOCHS_OF_FEW):
        return None
    text = "" if conversations is None else f" over {conversations:,} conversations"
    way = f"train.num_train_epochs={wanted}" if arguments.max_steps < 0 else f"train.max_steps={wanted * an_epoch}"
    return f"{steps} steps ({epochs:.3g} epochs{text}) are few to learn answers; give {way}"


def _trained_by(recipe: Recipe) -> dict[str, int]:
    """Returns how many parameters would train by the cheaper methods, counted on a model of its own."""
    model: Any = prepared_model(recipe)[0]
    found = {}
    for trains in ("scales",) if starts_packed(recipe) else ("scales", "lora"):  # adapters last: they stay on the model
        try:
            model = LoraSettings(r=PROPOSED_RANK).attach(model) if trains == "lora" else model
            choose_trained(model, "scales" if trains == "scales" else "all")
        except ValueError:  # the scheme does not allow it: scales that are not learned
            continue
        found[trains] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return found


def prepared_model(recipe: Recipe) -> tuple[PreTrainedModel, CoverageAudit]:
    """Returns the recipe's model, packed as it is or prepared without weights, and its coverage."""
    if starts_packed(recipe):
        packed = load(recipe.model)
        return packed, audit(packed)
    config = read_config(resolve_spec(recipe.model), recipe.model)
    return _prepared_without_weights(recipe.model, config, recipe.quant, rotates(recipe.calibrate))


def packed_bytes(coverage: CoverageAudit) -> float:
    """Returns the bytes of a quantized weight without its scale, from the average bits rounded down to whole bits."""
    weights = sum(entry.numel for entry in coverage.quantized)
    return int(coverage.average_bits) / 8 if weights else 0.0


def calibration_of(recipe: Recipe) -> Calibration:
    """Returns how the recipe calibrates a model that it does not train."""
    looks, allocate = needs_text(recipe.calibrate, recipe.quant), recipe.allocate
    blocks = max((getattr(stage, "blocks", 0) for stage in recipe.calibrate), default=0) if looks else 0
    batch = max((getattr(stage, "batch_size", 1) for stage in recipe.calibrate), default=1)
    return Calibration(
        tokens=blocks * recipe.data.block_size,
        batch=batch,
        length=recipe.data.block_size,
        weight_bytes=torch.finfo(master_dtype(recipe)).bits / 8,
        gptq=any(isinstance(stage, GPTQStage) for stage in recipe.calibrate),
        blockwise=any(isinstance(stage, BlockwiseStage) for stage in recipe.calibrate),
        hidden_memory=1e9 * max((getattr(stage, "hidden_memory", 0.0) for stage in recipe.calibrate), default=0.0),
        sensitivity=0 if allocate is None else allocate.blocks * recipe.data.block_size,
        sensitivity_memory=0.0 if allocate is None else 1e9 * allocate.hidden_memory,
    )


def method_of(recipe: Recipe, arguments: QATArguments, model: PreTrainedModel) -> tuple[Method, PreTrainedModel]:
    """Returns how the recipe trains `model`, and the model with its adapters, on which what trains is marked.

    Raises:
        ValueError: the recipe's adapters, or what it trains, do not fit the model.
    """
    trains = "lora" if recipe.lora is not None else arguments.trainable
    trained: Any = model if recipe.lora is None else recipe.lora.attach(model)
    choose_trained(trained, arguments.trainable)
    if arguments.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    method = Method(
        trains=trains,
        packed=starts_packed(recipe),
        trained=sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad),
        teacher=_teacher(recipe, arguments),
        head_trains=_head_trains(model),
        frozen_bytes=4.0 if folds_weights(recipe) else 2.0,
        batch=arguments.per_device_train_batch_size,
        length=recipe.data.block_size,
        accumulation=arguments.gradient_accumulation_steps,
        checkpointing=bool(arguments.gradient_checkpointing),
        optimizer=optimizer_bytes(str(arguments.optim.value)),
        embedding=_trained_embedding(model),
        wide_embedding="8bit" in arguments.optim.value and "torch" not in arguments.optim.value,
        reuses=arguments.reuse_quantized_weights,
    )
    return method, trained


def _trained_embedding(model: PreTrainedModel) -> int:
    weights = {id(p): p for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    return sum(weight.numel() for weight in weights.values() if weight.requires_grad)


def _head_trains(model: PreTrainedModel) -> bool:
    head = cast("torch.nn.Module", model.get_output_embeddings())
    return any(parameter.requires_grad for parameter in head.parameters())


def _teacher(recipe: Recipe, arguments: QATArguments) -> float:
    """Returns the bytes of one of the teacher's linear weights while training; 0 where no second model is held."""
    is_moved = starts_packed(recipe) or not all(isinstance(stage, RangesStage) for stage in recipe.calibrate)
    own = recipe.lora is not None and not is_moved
    if own or recipe.teacher_cache is not None or kept_top_k(recipe) is not None or arguments.kl_weight == 0:
        return 0.0
    return 2.0 if recipe.teacher_bits is None else recipe.teacher_bits / 8


def _teacher_in_words(recipe: Recipe, method: Method | Calibration) -> str:
    if isinstance(method, Calibration):
        return "none, since nothing is trained"
    if recipe.teacher_cache is not None:
        return f"the cache in {recipe.teacher_cache}; no model is in memory"
    if (top_k := kept_top_k(recipe)) is not None:
        return (
            f"the {top_k} most likely tokens that the model keeps while it writes its text (teacher_top_k); no second "
            "model is in memory or runs"
        )
    if recipe.train.get("kl_weight", 1.0) == 0:
        return "none"
    who = "the model itself, its quantizers and adapters off" if method.teacher == 0 else "a second model in memory"
    reason = "teacher_top_k is null" if recipe.teacher_top_k is None else teacher_obstacle(recipe)
    return f"{who}, which runs at each step" + (f" ({reason})" if recipe.data.source == "synthetic" else "")


# Devices

_READERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "NO": lambda values: "ddp",
    "MULTI_CPU": lambda values: "ddp",
    "MULTI_GPU": lambda values: "ddp",
    "FSDP": lambda values: "fsdp2",
    "DEEPSPEED": lambda values: f"zero{(values.get('deepspeed_config') or {}).get('zero_stage', 2)}",
}
"""distributed_type of accelerate -> how a model is spread."""


def devices_of(file: Path) -> Devices:
    """Returns what an accelerate configuration spreads a training over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of accelerate's, or of a kind that is not planned for.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no accelerate configuration at {file}; `accelerate config` writes one")
    values = parse_yaml(read_text(file), str(file))
    kind = values.get("distributed_type") if isinstance(values, dict) else None
    if kind is False:  # YAML reads a bare NO as false
        kind = "NO"
    if kind not in _READERS:
        raise ValueError(f"{file}: distributed_type={kind!r} is not planned for; known are {', '.join(_READERS)}")
    fsdp = values.get("fsdp_config") or {}
    if kind == "FSDP" and int(fsdp.get("fsdp_version", 1)) != 2:
        raise ValueError(f"{file}: fsdp_version={fsdp.get('fsdp_version', 1)}; scales shard with FSDP2 alone, give 2")
    on_cpu = values.get("use_cpu") or kind == "MULTI_CPU"
    return Devices(int(values.get("num_processes") or 1), _READERS[kind](values), "cpu" if on_cpu else "cuda")


def available_bytes(devices: Devices) -> int | None:
    """Returns the memory that is free for one of the processes here; None where they are for another kind of device."""
    if torch.cuda.is_available() and devices.accelerator == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    file = Path("/proc/meminfo")
    if devices.accelerator != "cpu" or not file.is_file():
        return None
    line = next(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024 // devices.processes


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a scheme makes of a model, found without its weights, or what lies in a packed checkpoint."""

    coverage: CoverageAudit
    """Every parameter tensor: quantized how, or left alone and why."""
    description: ModelDescription
    """What servers and exports have to know."""


def inspect_model(spec: str, quant: QuantConfig, rotated: bool = False) -> Inspection:
    """Returns what a packed or prepared checkpoint holds, or another model would hold as `quant` would leave it.

    What stock transformers makes of it is tried, on the meta device.

    Args:
        spec: what `load_model` takes, or a packed or prepared checkpoint.
        quant: the scheme.
        rotated: whether the model is rotated first, which unties its output head.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: a target matches nothing, or a group size does not divide.
    """
    source = resolve_spec(spec)
    config = read_config(source, spec)
    if is_packed(spec):
        model = load(spec)
        trial = try_stock(source) if isinstance(source, Path) else None
        found = audit(model)
        if trial is not None and trial.note:
            found = dataclasses.replace(found, notes=(*found.notes, trial.note))
        return Inspection(found, describe(model, trial=trial))
    if is_prepared(config):
        model = load(spec)
        return Inspection(audit(model), described(model))
    model, coverage = _prepared_without_weights(spec, config, quant, rotated)
    return Inspection(coverage, described(model))


def described(model: PreTrainedModel) -> ModelDescription:
    """Returns the description of a prepared model, with what stock transformers would make of its checkpoint."""
    return describe(model, trial=try_unwritten(model) if any(quantized_layers(model)) else None)


def coverage_of(spec: str, quant: QuantConfig, rotated: bool = False) -> CoverageAudit:
    """Returns the coverage audit of `inspect_model`, which says what the arguments are; tries nothing else."""
    config = read_config(resolve_spec(spec), spec)
    if is_packed(spec) or is_prepared(config):
        return audit(load(spec))
    return _prepared_without_weights(spec, config, quant, rotated)[1]


def check_spec_allocation(spec: str, quant: QuantConfig, allocate: AllocationConfig | None) -> None:
    """Checks choices and budget on the layers of the model `spec`, which is made without weights.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: as `check_allocation`.
    """
    if allocate is not None:
        config = read_config(resolve_spec(spec), spec)
        check_allocation(_prepared_without_weights(spec, config, quant, rotated=False)[0], quant, allocate)


def check_spec_served(
    spec: str, clients: Sequence[str], quant: QuantConfig, allocate: AllocationConfig | None, rotated: bool
) -> bool:
    """Returns what `check_plan_served` does of the model `spec` prepared with `quant`, which is made without weights.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: the scheme does not do for the model, or a client does not take it.
    """
    if not clients:
        coverage_of(spec, quant, rotated)
        return False
    return check_plan_served(inspect_model(spec, quant, rotated).description, clients, quant, allocate)


def check_plan_served(
    description: ModelDescription,
    clients: Sequence[str],
    quant: QuantConfig | None,
    allocate: AllocationConfig | None,
) -> bool:
    """Returns what `check_served` does; where bits are chosen by layer, each choice is looked at.

    Raises:
        ValueError: a client does not take the model, or needs one scheme where several are chosen.
    """
    if not clients:
        return False
    if quant is None or allocate is None:
        return check_served(description, clients, quant)
    if one := [client for client in clients if client in NEED_ONE_SCHEME and len(allocate.choices) > 1]:
        raise ValueError(
            f"serve: {', '.join(one)}: bits are chosen for each layer, and it needs one scheme for layers that are one "
            "product there (q, k and v; gate and up); give all layers the same bits, or leave it out of `serve`"
        )
    schemes = possible_schemes(quant, allocate.choices)
    forms = [check_served(description.with_scheme(scheme), clients, scheme) for scheme in schemes]
    return any(forms)


def _prepared_without_weights(
    spec: str, config: PreTrainedConfig, quant: QuantConfig, rotated: bool
) -> tuple[PreTrainedModel, CoverageAudit]:
    with torch.device("meta"):
        model = empty_model(token_model_class(config, spec), plain_config(config))
    if is_dequantized_at_loading(config):
        setattr(model, DEQUANTIZED_FROM, quantized_by(config))
    if rotated:
        untie(model)
    return model, prepare(model, quant)

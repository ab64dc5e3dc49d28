"""The recipe: one YAML file that says everything about a run.

A recipe names the model, the output folder and a seed. It has one section for each step: `quant`, `data`, `calibrate`,
`train`, `evaluate`. The subpackage that reads a section defines its configuration class; this file only puts them
together. `train` takes the fields of `transformers.TrainingArguments` verbatim. Any key can be given on the command
line as `train.learning_rate=1e-4`. An unknown key is an error that names the nearest key.

    recipe.yaml + key=value  ->  load_recipe  ->  Recipe (immutable)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError, ValidationInfo, field_validator, model_validator

from llmqat.calibrate import AllocationConfig, AnyStage, CustomStage, RotateStage, SmoothStage, check_stages
from llmqat.calibrate.sensitivity import with_choices
from llmqat.config import Config, UnknownKeyError
from llmqat.data.config import PYDOC, DataConfig
from llmqat.evaluate.protocols import PROTOCOLS
from llmqat.export.serving import known_clients
from llmqat.layers import QuantConfig, WeightConfig
from llmqat.paths import user_spec
from llmqat.train import LoraSettings, MonitorSettings, QATArguments, check_batch

RECIPE_FILE = "recipe.yaml"
"""Name of the recipe in a run folder."""
TRAINER_FOLDER = "checkpoints"
"""Name of the trainer's folder in a run folder."""


class EvaluationSettings(Config):
    """What the comparison at the end measures. Where nothing is said, the protocol's own text and windows stand."""

    protocol: str = "windows"
    """`windows`, `wikitext2` (as in GPTQ's papers) or `wikitext` (as lm-eval)."""
    texts: tuple[str, ...] = Field(default=(PYDOC,), min_length=1)
    """Texts to score: `pydoc`, UTF-8 files or folders, files of rows (.jsonl, .parquet), hub:NAME:CONFIG:SPLIT."""
    window: int | None = Field(default=512, ge=2)
    """Tokens in a window; nothing outside a window is seen when its tokens are scored. null: the model's longest."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens from the start of one window to the next; null: as many as `window`, so that windows do not overlap."""
    max_windows: int | None = Field(default=40, ge=1)
    """Windows scored in each text, from its start; null: all of it."""
    batch_size: int = Field(default=4, ge=1)
    """Windows in one forward pass."""
    speed: bool = True
    """Whether speed, memory and energy of decoding are measured as well."""
    prompts: str | None = None
    """Prompts that each model answers, greedily, to see whether answers end, how long they are and how much they repeat
    themselves: `instructions` (64 plain ones of llmqat), a text file with a prompt a line, or rows (.jsonl, .parquet,
    hub:NAME:CONFIG:SPLIT) with `prompt` or `messages`; null: none."""
    max_prompts: int | None = Field(default=64, ge=1)
    """Prompts that are answered, from the first on; null: all of them."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer at most; one that has not ended by then counts as not ended."""
    allow_trained_text: bool = False
    """Whether text may be scored that a model was calibrated or trained on; its figures say nothing of other text."""

    @model_validator(mode="before")
    @classmethod
    def _take_the_protocol_s_own(cls, values: Any) -> Any:
        if not isinstance(values, dict) or str(values.get("protocol")) not in PROTOCOLS:
            return values
        own = PROTOCOLS[str(values["protocol"])]
        return {"texts": (own.text,), "window": own.window, "max_windows": own.max_windows, **values}

    @field_validator("texts", mode="before")
    @classmethod
    def _refuse_no_text(cls, value: Any) -> Any:
        if value in ([], ()):
            raise ValueError(
                f"at least one text is needed, to see what the model still knows of other text; give [{PYDOC}], "
                "Python's own manual, which is always there, or paths of your texts, and few windows where it is to be "
                "quick: evaluate.max_windows=4"
            )
        return value

    @field_validator("texts")
    @classmethod
    def _take_texts_as_users_give_them(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(user_spec(text, "texts") for text in value)

    @model_validator(mode="after")
    def _refuse_amounts_of_no_prompts(self) -> EvaluationSettings:
        for name in ("max_prompts", "max_new_tokens"):
            value = getattr(self, name)
            if self.prompts is None and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}={value} means nothing without prompts; give prompts=instructions, which come with llmqat, "
                    "or a file of yours (--prompts)"
                )
        return self

    @field_validator("prompts")
    @classmethod
    def _take_prompts_as_users_give_them(cls, value: str | None) -> str | None:
        return None if value is None else user_spec(value, "prompts")

    @field_validator("protocol")
    @classmethod
    def _check_protocol(cls, value: str) -> str:
        if value not in PROTOCOLS:
            raise ValueError(f"{value!r} is unknown; choose one of {', '.join(PROTOCOLS)}")
        return value


DEFAULT_PRESET = "int4"
"""The scheme where a recipe names none."""
DEFAULT_STAGES: Any = ("ranges",)
"""What `calibrate` is where a recipe says nothing."""

TRAIN_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "logging_first_step": True,
    "logging_steps": 1,
    "save_total_limit": 1,
    "report_to": "none",
    "remove_unused_columns": False,
}
"""Where a recipe says nothing, these stand in place of the defaults of `TrainingArguments`."""

NO_TRAINING: dict[str, Any] = {"max_steps": 0}
"""What `train: null` is short for."""
TRAINS_NOTHING = "train (null, or max_steps: 0) trains nothing"
"""What errors say of a recipe that does not train."""
READ_WITHOUT_TRAINING = ("max_steps", "num_train_epochs", "bf16", "use_cpu")
"""Fields of `train` that are read where nothing is trained."""
UNPACKED_ONLY = ("quant", "calibrate", "allocate")
"""Keys that say how full-precision weights are quantized."""
ONLY_TRAINED = ("lora", "teacher", "teacher_cache", "teacher_bits")
"""Keys of a recipe that say something of its training alone."""

OWNED_BY_RECIPE = {"output_dir": "output", "seed": "seed"}
"""TrainingArguments fields that have a key of their own at the top of the recipe."""

FOR_SCRIPTS = ("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank")
"""TrainingArguments fields that Trainer never reads: they would have no effect in a recipe."""


class Recipe(Config):
    """Everything about one run. The same recipe, seed and versions give the same checkpoint."""

    model: str
    """Hub id, folder, .gguf file, or `package:` and the path of a file inside an installed Python package; a packed
    checkpoint, whose scales or adapters are trained, with a `teacher`."""
    output: Path
    """Run folder, made by the run; it holds the checkpoint in `model/`."""
    seed: int = 0
    """Seed of the order of samples, and of the text that the model writes unless data.seed says otherwise."""
    quant: QuantConfig = Field(default_factory=lambda: QuantConfig.preset(DEFAULT_PRESET))
    """Scheme: its name, or a section with `preset` (int4 where not said) and what differs from it, or with `weights`
    and the other fields of a QuantConfig."""
    serve: tuple[str, ...] = ()
    """Who is to serve the checkpoint, one or a list: transformers, vllm (on GPUs), vllm-cpu, sglang, llama.cpp,
    onnxruntime, gptqmodel, llmqat. A scheme that one of them does not take is refused before anything is done."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Text to calibrate and train on; by default the model writes it."""
    allocate: AllocationConfig | None = None
    """Bits chosen layer by layer under an average; every layer has those of `quant` where not given."""
    calibrate: tuple[AnyStage, ...] = Field(default=DEFAULT_STAGES, validate_default=True)
    """Stages before training, in order: names, or mappings with the key `stage`. None at all is plain rounding."""
    lora: LoraSettings | None = None
    """Adapters that are trained inside the quantizers in place of all weights; none where not given."""
    teacher: str | None = None
    """The full-precision model that a packed `model` is to be like; any other model is its own teacher."""
    teacher_cache: Path | None = None
    """Folder made by `llmqat cache-teacher` from this model and text: stands in for the teacher while training."""
    teacher_top_k: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """How many of its most likely tokens the model keeps at each position of the text that it generates. In training
    they replace the teacher, as a teacher_cache does. `auto`: 256, where that is possible; null: the teacher runs at
    each step."""
    teacher_bits: Literal[4, 8] | None = None
    """Holds the teacher's linear layers in 8 or 4 bits (bitsandbytes) while training; bfloat16 where not given."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Fields of QATArguments: those of transformers.TrainingArguments and a few more; checked by name and type. null is
    short for `max_steps: 0`: the calibrated model is packed and compared, and nothing is trained."""
    monitor: MonitorSettings | None = Field(default_factory=MonitorSettings)
    """What is logged of codes, scales and gradients while the model trains; null switches it off."""
    evaluate: EvaluationSettings = Field(default_factory=EvaluationSettings)
    """The comparison at the end."""

    @property
    def source(self) -> str:
        """The full-precision model: what teaches, writes text, and is compared with."""
        return self.teacher or self.model

    @property
    def trains(self) -> bool:
        """Whether the model is trained, and not calibrated alone."""
        steps = self.train.get("max_steps", -1)
        return steps > 0 or (steps < 0 and self.train.get("num_train_epochs", 1) > 0)

    @model_validator(mode="before")
    @classmethod
    def _seed_the_text(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(data := values.get("data", {}), dict) and "seed" in values:
            return {**values, "data": {"seed": values["seed"], **data}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _leave_out_of_packed(cls, values: Any) -> Any:
        """Takes out what is null beside a teacher, which means a packed model: `quant=null` behind a recipe."""
        if not isinstance(values, dict) or values.get("teacher") is None:
            return values
        return {key: value for key, value in values.items() if value is not None or key not in UNPACKED_ONLY}

    @field_validator("quant", mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            return QuantConfig.preset(value)
        if isinstance(value, QuantConfig):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{value!r} is no scheme; give a name, such as int4, or a section with preset: int4 (null leaves it "
                "out of a recipe for a packed model, beside teacher=MODEL)"
            )
        if "weights" not in value:
            changes = {str(key): entry for key, entry in value.items() if key != "preset"}
            return QuantConfig.preset(value.get("preset", DEFAULT_PRESET), **changes)
        beside = [key for key in ("preset", *WeightConfig.model_fields) if key in value]
        if beside:
            raise ValueError(
                f"{beside[0]} and weights exclude each other; put num_bits, group_size, … beside the preset"
            )
        return value

    @model_validator(mode="after")
    def _check_stages(self) -> Recipe:
        quant = self.quant if self.allocate is None else with_choices(self.quant, self.allocate.choices)
        check_stages(self.calibrate, quant)
        for key in ONLY_TRAINED:
            if not self.trains and getattr(self, key) is not None:
                raise ValueError(
                    f"{key} is read by training alone, and {TRAINS_NOTHING}; leave {key} out, or give train.max_steps=N"
                )
        if self.lora is not None and self.train.get("trainable", "all") != "all":
            raise ValueError(f"train.trainable={self.train['trainable']!r} trains no adapter; leave it out, or lora")
        for key in ("teacher_cache", "teacher_bits"):
            if getattr(self, key) is not None and self.train.get("kl_weight", 1.0) == 0:
                raise ValueError(f"{key}={getattr(self, key)} is not used with train.kl_weight=0; leave out either")
        if isinstance(self.teacher_top_k, int) and (obstacle := teacher_obstacle(self)) is not None:
            raise ValueError(f"teacher_top_k={self.teacher_top_k}: {obstacle}; leave teacher_top_k out")
        if self.teacher_cache is not None and self.teacher_bits is not None:
            raise ValueError(f"teacher_bits={self.teacher_bits}: a teacher_cache holds no model; leave out either")
        return self

    @model_validator(mode="after")
    def _check_watched_text(self) -> Recipe:
        asked = asked_evaluation(self)
        if asked is None or self.data.validation_share:
            return self
        where = f"{asked} without data.validation_share evaluates on"
        if self.teacher_cache is not None:
            raise ValueError(f"{where} evaluate.texts, which are not in teacher_cache; set data.validation_share")
        if self.train.get("load_best_model_at_end"):
            raise ValueError(
                f"{where} evaluate.texts, and train.load_best_model_at_end would choose by the text that judges the "
                "result; set data.validation_share"
            )
        return self

    @field_validator("calibrate", mode="before")
    @classmethod
    def _take_a_list(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{value!r} is no list of stages; write for example [ranges, {{stage: gptq, blocks: 32}}]")
        return value

    @field_validator("serve", mode="before")
    @classmethod
    def _take_one_client(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("serve")
    @classmethod
    def _check_clients(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return known_clients(value)

    @field_validator("model", "teacher")
    @classmethod
    def _take_models_as_users_give_them(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else user_spec(value, str(info.field_name))

    @field_validator("train", mode="before")
    @classmethod
    def _take_no_training(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(
                f"{value!r} is no section; give keys, as train.max_steps=60 does, or null to train nothing"
            )
        return dict(NO_TRAINING) if value is None else value

    @field_validator("train")
    @classmethod
    def _check_training_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_training_fields(value)


KEPT_TOP_K = 256
"""Likeliest tokens that a writer keeps where a recipe does not say how many."""


def teacher_obstacle(recipe: Recipe) -> str | None:
    """Returns why what a model predicts while it writes the recipe's text cannot be its teacher; None where it can."""
    if not recipe.trains:
        return TRAINS_NOTHING
    if recipe.data.source != "synthetic":
        return f"data.source={recipe.data.source} is not written by the model, so the teacher has to read it"
    if recipe.teacher_cache is not None:
        return f"teacher_cache={recipe.teacher_cache} is the teacher"
    if recipe.data.packing == "concatenate":
        return "data.packing=concatenate trains on blocks as one text, and their writer saw each document alone"
    if recipe.train.get("kl_weight", 1.0) == 0:
        return "train.kl_weight=0 learns from no teacher"
    if recipe.teacher_bits is not None:
        return f"teacher_bits={recipe.teacher_bits} asks for a teacher in memory"
    if (asked := asked_evaluation(recipe)) is not None:
        return f"{asked} needs the teacher for evaluate.texts"
    return None


def asked_evaluation(recipe: Recipe) -> str | None:
    """Returns what of the recipe asks for evaluations while it trains; None where nothing does."""
    if (strategy := recipe.train.get("eval_strategy", "no")) != "no":
        return f"train.eval_strategy={strategy}"
    return "train.eval_on_start=true" if recipe.train.get("eval_on_start") else None


def kept_top_k(recipe: Recipe) -> int | None:
    """Returns how many of its most likely tokens the writer of the recipe's text keeps; None where the teacher runs."""
    if recipe.teacher_top_k is None or teacher_obstacle(recipe) is not None:
        return None
    return KEPT_TOP_K if recipe.teacher_top_k == "auto" else recipe.teacher_top_k


def scheme_of(preset: str, group_size: int | None = None) -> QuantConfig:
    """Returns the scheme of a preset, with another group size where one is given.

    Raises:
        ValueError: for an unknown preset, or one that has no such groups.
    """
    changes = {} if group_size is None else {"group_size": group_size}
    try:
        return QuantConfig.preset(preset, **changes)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        size = "" if group_size is None else f" with --group-size {group_size}"
        raise ValueError(f"--scheme {preset}{size}: {said}") from error


def check_training_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` with the types that QATArguments declares for them (the text "1e-4" becomes a number).

    Raises:
        ValueError: for a name that QATArguments does not have, for one that the recipe sets itself, for one that has no
            effect in it, and for a value that is not of the declared type.
    """
    names = {field.name for field in dataclasses.fields(QATArguments) if field.init}
    hints = get_type_hints(QATArguments)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key in OWNED_BY_RECIPE:
            raise ValueError(f"train.{key} is not set here; use {OWNED_BY_RECIPE[key]!r} at the top of the recipe")
        if key in FOR_SCRIPTS:
            raise ValueError(
                f"train.{key} has no effect in a recipe; leave it out (an interrupted run is resumed by giving the "
                "same command again)"
            )
        if key not in names:
            raise UnknownKeyError(key, names, "train (QATArguments)")
        given = user_spec(value, f"train.{key}") if isinstance(value, str) and value.startswith("~") else value
        checked[key] = _of_declared_type(f"train.{key}", given, hints[key])
    return checked


def _of_declared_type(key: str, value: Any, hint: Any) -> Any:
    wanted = getattr(hint, "__name__", None) or str(hint)
    if isinstance(value, bool) and hint in (int, float):
        raise ValueError(f"{key}={value!r} is not a {wanted}")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{key}={value!r} is not a {wanted}: {error.errors()[0]['msg']}") from error


def unread(recipe: Recipe) -> str:
    """Returns what to say of the keys of `train` that nothing reads where nothing is trained; empty where all are."""
    keys = [f"train.{key}" for key in recipe.train if key not in READ_WITHOUT_TRAINING]
    return f"; not read: {', '.join(keys)}" if keys else ""


def folds_weights(recipe: Recipe) -> bool:
    """Returns whether calibration folds weights into each other, for which they are float32."""
    return any(isinstance(stage, (RotateStage, SmoothStage)) for stage in recipe.calibrate)


def moves_weights(recipe: Recipe) -> bool:
    """Returns whether calibration may write to any weight: folds them into each other, or has a stage of the user's."""
    return folds_weights(recipe) or any(isinstance(stage, CustomStage) for stage in recipe.calibrate)


def master_dtype(recipe: Recipe) -> torch.dtype:
    """Returns float32 for weights that are trained, folded into each other, or changed by a stage of the user's own.

    Frozen ones keep their bfloat16.
    """
    is_frozen = recipe.lora is not None or not recipe.trains
    moved = moves_weights(recipe)
    return torch.bfloat16 if is_frozen and not moved else torch.float32


def forward_dtype(bf16: bool) -> torch.dtype:
    """Returns what calibration computes in: bfloat16 where training would, else float32."""
    return torch.bfloat16 if bf16 else torch.float32


def training_arguments(recipe: Recipe) -> QATArguments:
    """Returns the trainer's arguments: `recipe.train` over `TRAIN_DEFAULTS`.

    Raises:
        ImportError: train.optim needs a package that is not installed.
        ValueError: when QATArguments refuses a value or a combination, or the text fills no batch.
    """
    fields = {**TRAIN_DEFAULTS, **recipe.train}
    try:
        arguments = QATArguments(output_dir=str(recipe.output / TRAINER_FOLDER), seed=recipe.seed, **fields)
        check_batch(arguments, recipe.data.wanted_blocks)
        return arguments
    except (TypeError, ValueError) as error:
        raise ValueError(f"train: {error}") from error

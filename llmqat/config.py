"""What every configuration of llmqat shares: frozen, typed, described; an unknown key is answered with the right one.

Each configuration class lives beside the code it configures and subclasses `Config`; `recipe.py` composes them. The
text under a field is its description: in `help()`, in `llmqat schema` and in the JSON Schema of a recipe.

What a name in a configuration stands for (a scheme, a source, a stage, a format) is looked up in a `Registry`. There
users add their own, all in the same way:

    @STAGES.register("clip")
    class ClipStage(Stage): ...
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo

from llmqat.paths import user_path

Entry = TypeVar("Entry")

ALIASES = {
    **dict.fromkeys(("model_name_or_path", "pretrained_model_name_or_path", "base_model", "model_name"), "model"),
    **dict.fromkeys(("model_id", "model_path"), "model"),
    **dict.fromkeys(("output_dir", "output_path", "out_dir", "save_dir", "out"), "output"),
    "random_seed": "seed",
    **dict.fromkeys(("quantization", "quantize", "quantization_config", "quant_config"), "quant"),
    **dict.fromkeys(("scheme", "quant_method"), "quant.preset"),
    **dict.fromkeys(("bits", "nbits", "n_bits", "w_bits", "wbits", "w_bit", "weight_bits"), "quant.num_bits"),
    **dict.fromkeys(("q_group_size", "groupsize", "group", "blocksize"), "quant.group_size"),
    **dict.fromkeys(("a_bits", "act_bits", "activation_bits", "activations"), "quant.input_activations"),
    **dict.fromkeys(("kv_bits", "kv_cache_bits", "kv_cache_dtype"), "quant.kv_cache"),
    "sym": "quant.symmetric",
    **dict.fromkeys(("modules_to_not_convert", "exclude", "ignored_layers", "ignore_layers"), "quant.ignore"),
    **dict.fromkeys(("dataset", "dataset_name", "datasets"), "data.name"),
    **dict.fromkeys(("dataset_config", "dataset_config_name", "subset"), "data.config_name"),
    "dataset_split": "data.split",
    **dict.fromkeys(("train_file", "data_path", "data_files", "dataset_path"), "data.path"),
    **dict.fromkeys(("text_column", "dataset_text_field", "text_field"), "data.column"),
    **dict.fromkeys(("max_length", "max_seq_length", "max_seq_len", "seq_len", "seqlen"), "data.block_size"),
    **dict.fromkeys(("sequence_len", "sequence_length", "cutoff_len", "context_length"), "data.block_size"),
    **dict.fromkeys(("num_tokens", "max_tokens"), "data.tokens"),
    **dict.fromkeys(("dataset_num_proc", "preprocessing_num_workers", "num_workers"), "data.num_proc"),
    **dict.fromkeys(("calibration", "stages", "method"), "calibrate"),
    **dict.fromkeys(("damp_percent", "percdamp"), "calibrate.gptq.damping"),
    **dict.fromkeys(("nsamples", "n_samples", "num_samples", "num_calibration_samples"), "calibrate.gptq.blocks"),
    **dict.fromkeys(("training", "trainer", "training_args", "training_arguments", "training_config"), "train"),
    "lr": "train.learning_rate",
    **dict.fromkeys(("batch_size", "train_batch_size", "micro_batch_size"), "train.per_device_train_batch_size"),
    "eval_batch_size": "train.per_device_eval_batch_size",
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs"), "train.num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps", "train_steps", "max_iters", "iters"), "train.max_steps"),
    **dict.fromkeys(("grad_accum", "grad_accum_steps", "accumulation_steps"), "train.gradient_accumulation_steps"),
    "optimizer": "train.optim",
    **dict.fromkeys(("scheduler", "lr_scheduler"), "train.lr_scheduler_type"),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps"), "train.warmup_steps"),
    "wd": "train.weight_decay",
    **dict.fromkeys(("grad_clip", "clip_grad", "max_norm", "gradient_clipping"), "train.max_grad_norm"),
    "evaluation_strategy": "train.eval_strategy",
    **dict.fromkeys(("tracker", "trackers", "log_with", "wandb"), "train.report_to"),
    "scale_lr": "train.scale_learning_rate",
    **dict.fromkeys(("kd_weight", "kd_ratio", "distillation_weight"), "train.kl_weight"),
    "ce_weight": "train.cross_entropy_weight",
    **dict.fromkeys(("peft", "adapter", "adapters", "peft_config", "lora_config"), "lora"),
    **dict.fromkeys(("lora_r", "lora_rank", "rank"), "lora.r"),
    "alpha": "lora.lora_alpha",
    **dict.fromkeys(("target_modules", "lora_target_modules"), "lora.targets"),
    "rslora": "lora.use_rslora",
    **dict.fromkeys(("teacher_model", "teacher_model_name_or_path", "teacher_path", "original"), "teacher"),
    **dict.fromkeys(("average_bits", "avg_bits", "bpw"), "allocate.target_bits"),
    **dict.fromkeys(("eval", "evaluation"), "evaluate"),
    **dict.fromkeys(("eval_dataset", "eval_text", "eval_texts", "eval_file"), "evaluate.texts"),
    **dict.fromkeys(("client", "clients", "server", "engine", "serve_with"), "serve"),
}
"""What keys are called elsewhere -> the key of a recipe, with its sections."""


class UnknownKeyError(ValueError):
    """A key that its section does not have."""

    def __init__(self, key: str, allowed: Iterable[str], owner: str, inside: str | None = None) -> None:
        """Says the nearest known key and all that are allowed.

        Args:
            key: as it was given.
            allowed: keys of the section.
            owner: the section.
            inside: where a part of the section has the key, such as weights.num_bits.
        """
        super().__init__(unknown_key_message(key, allowed, owner, inside))
        self.key, self.allowed = key, sorted(allowed)


def nearest_key(key: str, allowed: Iterable[str]) -> str | None:
    """Returns the one of `allowed` that `key` is another word for, or a slip of; None where none is near."""
    names = sorted(allowed)
    meant = ALIASES.get(key, "").rpartition(".")[2]
    if meant in names:
        return meant
    return next(iter(difflib.get_close_matches(key, names, n=1)), None)


def unknown_key_message(key: str, allowed: Iterable[str], owner: str, inside: str | None = None) -> str:
    """Returns the error text for `key`, which `owner` does not have: the nearest known key and all that are allowed."""
    names = sorted(allowed)
    near = nearest_key(key, names) or inside
    guess = f"did you mean {near!r}? " if near else ""
    return f"unknown key {key!r} in {owner}; {guess}allowed: {', '.join(names)}"


class Config(BaseModel):
    """Base of all configuration classes: immutable, strict about names, each field described by the text under it.

    Raises:
        pydantic.ValidationError: (a `ValueError`) for an unknown key or a value of the wrong type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Writes the fields into the class docstring, for `help()`."""
        super().__pydantic_init_subclass__(**kwargs)
        described = [_described(name, field) for name, field in cls.model_fields.items()]
        cls.__doc__ = with_attributes(cls.__doc__ or "", described)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            known = set(cls.model_fields)
            for key in values:
                if key not in known:
                    raise UnknownKeyError(str(key), known, cls.__name__, cls._place_inside(str(key)))
            return {key: cls._as_meant(key, value) for key, value in values.items()}
        return values

    @classmethod
    def _place_inside(cls, key: str) -> str | None:
        """Returns the field that holds a configuration with `key`, and what it is called there: `weights.num_bits`."""
        meant = ALIASES.get(key, key).rpartition(".")[2]
        for name, field in cls.model_fields.items():
            if any(meant in part.model_fields for part in _configs_in(field.annotation)):
                return f"{name}.{meant}"
        return None

    @classmethod
    def _as_meant(cls, key: str, value: Any) -> Any:
        """Returns the value of a key; paths as a user means them."""
        if isinstance(value, (str, Path)) and holds_path(cls.model_fields[key].annotation):
            return user_path(value, key)
        return value


def _configs_in(annotation: Any) -> list[type[Config]]:
    parts = get_args(annotation)
    if not parts and isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [found for part in parts for found in _configs_in(part)]


def holds_path(annotation: Any) -> bool:
    """Returns whether a field of this type may be a path."""
    return annotation is Path or any(holds_path(part) for part in get_args(annotation))


ATTRIBUTES = "\n\nAttributes:\n"
"""What a class docstring has before its attributes."""


def with_attributes(summary: str, described: Iterable[str]) -> str:
    """Returns a class docstring with a section of its attributes; one that is there already is replaced."""
    return inspect.cleandoc(summary.split(ATTRIBUTES)[0]) + ATTRIBUTES + "\n".join(described) + "\n"


def summary_of(owner: type[Any]) -> str:
    """Returns a class docstring without its attributes."""
    return (owner.__doc__ or "").split(ATTRIBUTES)[0]


def described_attribute(name: str, kind: str, default: str | None, description: str) -> str:
    """Returns the lines of one attribute in a docstring; a default of None says that it must be given."""
    ending = "must be given" if default is None else f"default {default}"
    text = f"{name} ({kind}): {' '.join(description.split())} ({ending})"
    return textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)


def type_name(annotation: Any) -> str:
    """Returns a type as people read it: `int | None`, `'keep' | 'int8'`, `tuple[str, ...]`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(parts[0])
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (Union, UnionType):
        return " | ".join(map(type_name, parts))
    if annotation is type(None) or annotation is Ellipsis:
        return "None" if annotation is not Ellipsis else "..."
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_name, parts))}]"
    return getattr(annotation, "__name__", str(annotation))


def _described(name: str, field: FieldInfo) -> str:
    default = None if field.is_required() else repr(field.get_default(call_default_factory=True))
    return described_attribute(name, type_name(field.annotation), default, field.description or "")


def describe_fields(owner: type[Entry]) -> type[Entry]:
    """Writes the fields that a dataclass itself declares into its docstring, from the `help` of their metadata."""
    own = inspect.get_annotations(owner)
    described = [
        described_attribute(field.name, str(field.type), _default_of(field), field.metadata["help"])
        for field in dataclasses.fields(owner)  # type: ignore[arg-type]
        if field.name in own
    ]
    owner.__doc__ = with_attributes(owner.__doc__ or "", described)
    return owner


def _default_of(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is dataclasses.MISSING:
        return repr(field.default)
    return f"{getattr(field.default_factory, '__name__', 'a factory')}()"


class Registry(dict[str, Entry], Generic[Entry]):
    """Names, and what they stand for; users add their own by `register`."""

    def __init__(self, kind: str, check: Callable[[str, Entry], None] | None = None) -> None:
        """Begins without a name.

        Args:
            kind: what the names are of, in errors: "preset", "stage".
            check: raises ValueError for an entry that does not fit.
        """
        super().__init__()
        self.kind, self._check = kind, check

    def register(self, name: str, entry: Entry | None = None) -> Callable[[Entry], Entry]:
        """Adds `entry` under `name`; without an entry it is a decorator of one: `@STAGES.register("clip")`.

        Raises:
            ValueError: the name is taken, or the entry does not fit.
        """

        def add(given: Entry) -> Entry:
            if name in self:
                raise ValueError(f"{self.kind} {name!r} is there already; choose another name")
            if self._check is not None:
                self._check(name, given)
            self[name] = given
            return given

        if entry is not None:
            add(entry)
        return add

    def find(self, name: str, what: str | None = None) -> Entry:
        """Returns what `name` stands for.

        Raises:
            ValueError: nothing has this name; the nearest one is named, and all that there are.
        """
        if name not in self:
            raise ValueError(self.unknown(name, what))
        return self[name]

    def unknown(self, name: Any, what: str | None = None) -> str:
        """Returns the error text for a name that nothing has; `what` is what it was to be, such as "--format"."""
        near = difflib.get_close_matches(str(name), self, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        return f"{what or self.kind} {name!r} is unknown; {guess}choose one of {', '.join(self)}"

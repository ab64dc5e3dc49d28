"""What a training is told: QATArguments, and what becomes of every field of transformers.TrainingArguments.

`FIELDS` and `TRAINER_ARGUMENTS` name each field and each argument of Trainer. Most are Trainer's own business and work
as transformers documents them. The others would have no effect on the loss or the optimizer here, or a wrong one: these
are refused, with the way out. A test compares both tables with the installed version, so that a new field is noticed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.utils import is_torch_cuda_available

from llmqat.config import describe_fields
from llmqat.extras import check_installed, check_version
from llmqat.kernels import cpu_has_bf16
from llmqat.train.optimizers import check_optimizer

logger = logging.getLogger(__name__)

TRAINABLE = ("all", "scales")
"""What QATArguments.trainable may be."""


def processor_has_bf16() -> bool:
    """Returns whether the accelerator, or else the CPU, multiplies bfloat16 matrices natively."""
    if is_torch_cuda_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return True
    return cpu_has_bf16()


@describe_fields
@dataclass
class QATArguments(TrainingArguments):
    """transformers.TrainingArguments with the learning rates of a quantized model.

    Differences of default: `bf16` is on where the processor has it, DDP looks for no unused parameters (the loss uses
    the output head outside the forward) and broadcasts no buffers. All other fields: `help(TrainingArguments)`, or
    `llmqat schema train`.
    """

    scale_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of log-scales: a relative change of the scale per step."}
    )
    zero_point_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of zero points of asymmetric schemes, in codes per step."}
    )
    quantization_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps over which the forward blends from full-precision to quantized weights, for "
            "schemes of few levels (ternary, 2 bits); inputs and KV cache are quantized from the start."
        },
    )
    trainable: str = field(
        default="all",
        metadata={
            "help": "What is trained: 'all', or 'scales': log-scales, zero points, norms and biases, and no weight "
            "(EfficientQAT's end-to-end phase), in a quarter of the optimizer's memory and less. Of a packed model the "
            "codes stay packed; a recipe packs the model before this training.",
            "choices": TRAINABLE,
        },
    )
    norm_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of norms and biases; learning_rate when not given."}
    )
    kl_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the forward KL from the original model; 0 needs no teacher."},
    )
    cross_entropy_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the cross-entropy on the labels: the student then learns the text as well."},
    )
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "Leave token embeddings (and an output head tied to them) untrained."}
    )
    reuse_quantized_weights: bool | None = field(
        default=None,
        metadata={
            "help": "Quantize each weight once an optimizer step, for all its micro-batches and for layers that "
            "gradient checkpointing computes again, and hold it meanwhile: 2 bytes a weight in bf16. By default where "
            "a step has several micro-batches and no process holds a part of the weights only (FSDP, ZeRO)."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "DDP looks for unused parameters; the loss uses the output head outside the forward."},
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "DDP broadcasts buffers at each forward."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite from the log; training stops at them anyhow."}
    )
    bf16: bool = field(
        default_factory=processor_has_bf16, metadata={"help": "Compute in bfloat16 over float32 masters."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a negative rate, an unknown word, or a field that has no right effect here."""
        if self.trainable not in TRAINABLE:
            raise ValueError(f"trainable={self.trainable!r} is unknown; choose one of {', '.join(TRAINABLE)}")
        for name in ("scale_learning_rate", "zero_point_learning_rate", "norm_learning_rate"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} is negative; a learning rate is 0 or more")
        if min(self.kl_weight, self.cross_entropy_weight) < 0 or self.kl_weight + self.cross_entropy_weight == 0:
            raise ValueError(
                f"kl_weight={self.kl_weight} and cross_entropy_weight={self.cross_entropy_weight}: neither may be "
                "negative, and one of them must count"
            )
        if self.quantization_warmup_steps < 0:
            raise ValueError(f"quantization_warmup_steps={self.quantization_warmup_steps} is negative; give 0 for none")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else TrainingArguments refuses bf16, which this processor may well have
        if is_lower_better(self.metric_for_best_model):
            if getattr(self, "greater_is_better", None):
                raise ValueError(
                    f"greater_is_better=True with metric_for_best_model={self.metric_for_best_model!r} would keep the "
                    "worst model; leave greater_is_better out"
                )
            self.greater_is_better = False
        check_arguments(self)
        given = self.accelerator_config
        super().__post_init__()
        if given is None and self.dataloader_pin_memory and not self.use_cpu and self.device.type == "cuda":
            self.accelerator_config.non_blocking = True  # batches do not wait for the GPU


Check = Callable[[TrainingArguments], str | None]
"""Returns what is wrong with a field, or None."""


def _refused(name: str, reason: str) -> Check:
    """Returns the check of a field that may only have its default."""
    default = next((known.default for known in fields(TrainingArguments) if known.name == name), None)

    def check(args: TrainingArguments) -> str | None:
        value = getattr(args, name, default)
        return f"{name}={value!r} is refused: {reason}" if value != default else None

    return check


def _check_labels(args: TrainingArguments) -> str | None:
    if args.label_names in (None, ["labels"]):
        return None
    return f"label_names={args.label_names}: the loss reads the column labels alone; rename yours, and leave this out"


def _check_debug(args: TrainingArguments) -> str | None:
    asked = args.debug.split() if isinstance(args.debug, str) else args.debug
    if DebugOption.TPU_METRICS_DEBUG in (asked or ()):  # a command line that does not name it gives None
        return "debug='tpu_metrics_debug' is refused: llmqat does not train on TPUs; leave it out"
    return None


def _check_gradient_norm(args: TrainingArguments) -> str | None:
    if args.max_grad_norm is None:
        return "max_grad_norm=None: give a number; 0 means that gradients are not clipped"
    if args.max_grad_norm < 0:
        return f"max_grad_norm={args.max_grad_norm} is negative; 0 means that gradients are not clipped"
    return None


def _check_sampling(args: TrainingArguments) -> str | None:
    asked = args.train_sampling_strategy
    if asked not in _SAMPLING:  # Trainer would sample at random, and say nothing
        return f"train_sampling_strategy={asked!r} is unknown; choose one of {', '.join(_SAMPLING)}"
    if (lowest := _SAMPLING[asked]) is not None:
        check_version("transformers", lowest, f"train_sampling_strategy={asked!r}")
    return None


_SAMPLING = {"random": None, "sequential": None, "group_by_length": None, "batch_rebalance": "5.17"}
"""Value of `train_sampling_strategy` -> the transformers that it came with, where that is newer than llmqat's bound."""


def _check_trackers(args: TrainingArguments) -> str | None:
    asked = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for name in asked:
        if name in _TRACKERS:
            check_installed(name, f"report_to={name!r}")
    return None


_TRACKERS = ("mlflow", "tensorboard", "trackio", "wandb")
"""Values of `report_to` that are also the names of modules."""


def _file_of(name: str) -> Check:
    """Returns the check of a field that may be the name of a JSON file."""

    def check(args: TrainingArguments) -> str | None:
        value = getattr(args, name, None)
        if isinstance(value, str) and value.endswith(".json") and not Path(value).expanduser().is_file():
            return f"{name}={value!r}: there is no such file; give a JSON file, or its content"
        return None

    return check


def _check_epochs(args: TrainingArguments) -> str | None:
    if args.max_steps < 0 and args.num_train_epochs < 0:
        return f"num_train_epochs={args.num_train_epochs} is negative; 0 trains nothing"
    return None


_INHERITED = """
    output_dir per_device_train_batch_size max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps
    average_tokens_across_devices bf16 tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
    eval_on_start eval_do_concat_batches eval_accumulation_steps include_for_metrics batch_eval_metrics
    save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub
    hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint
    full_determinism seed data_seed use_cpu accelerator_config dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
    length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout skip_memory_metrics
    do_train do_eval do_predict resume_from_checkpoint local_rank
    warmup_ratio logging_dir
""".split()  # noqa: SIM905
"""Fields that work as transformers documents them. The line before the last is for scripts, and Trainer reads none of
it; the last is of older transformers."""

_ELSEWHERE = ["fsdp"]
"""Fields checked only by `distribution.check_distribution`, which also checks `fsdp_config` and `deepspeed`."""

_HALF = "small scales and their gradients underflow; use bf16 or float32"
_FULL_EVAL = (
    "it would leave the masters and scales themselves in few bits after an evaluation; with bf16=True evaluations "
    "compute in bfloat16 over them"
)
_LIGER = "Liger's kernels replace the forward in which the loss is made; leave it out (logits are never whole here)"

FIELDS: dict[str, Check | None] = {
    **dict.fromkeys((*_INHERITED, *_ELSEWHERE)),
    "num_train_epochs": _check_epochs,
    "report_to": _check_trackers,
    "train_sampling_strategy": _check_sampling,
    "max_grad_norm": _check_gradient_norm,
    "optim": lambda args: check_optimizer(args.optim, args.optim_args, args.warmup_steps),
    "optim_args": None,  # with optim
    "fsdp_config": _file_of("fsdp_config"),
    "deepspeed": _file_of("deepspeed"),
    "optim_target_modules": _refused("optim_target_modules", "GaLore and APOLLO alone read it, which are refused"),
    "label_smoothing_factor": _refused(
        "label_smoothing_factor",
        "the loss does not look at it; distillation (kl_weight) smooths labels by what the teacher predicts",
    ),
    "fp16": _refused("fp16", _HALF),
    "fp16_full_eval": _refused("fp16_full_eval", _FULL_EVAL),
    "bf16_full_eval": _refused("bf16_full_eval", _FULL_EVAL),
    "use_liger_kernel": _refused("use_liger_kernel", _LIGER),
    "liger_kernel_config": _refused("liger_kernel_config", _LIGER),
    "eval_use_gather_object": _refused(
        "eval_use_gather_object", "it takes what an evaluation gathers apart; tensors of one shape need no such thing"
    ),
    "label_names": _check_labels,
    "use_cache": _refused(
        "use_cache", "no forward of a training keeps a cache, and the saved configuration says what the original says"
    ),
    "debug": _check_debug,
    "parallelism_config": _refused(
        "parallelism_config", "tensor, context or sequence parallelism would split groups of weights from their scales"
    ),
}
"""Field of TrainingArguments -> its check; None where it works whatever it says."""

TRAINER_ARGUMENTS: dict[str, str | None] = {
    **dict.fromkeys(
        (
            *("model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "callbacks"),
            *("compute_metrics", "preprocess_logits_for_metrics", "optimizers", "optimizer_cls_and_kwargs"),
        )
    ),
    "model_init": "a model is prepared before it is trained; prepare one, and give it as model=…",
    "compute_loss_func": (
        "the loss is forward KL and cross-entropy, by kl_weight and cross_entropy_weight; for another one subclass "
        "QATTrainer and write its compute_loss, as recipes/python/own_loss.py does"
    ),
}
"""Argument of Trainer.__init__ -> why it is refused; None where it works."""


def check_arguments(args: TrainingArguments) -> None:
    """Settles defaults of `args`, in place, and refuses what would have no effect on the training, or a wrong one.

    Raises:
        ImportError: the optimizer needs a package that is not installed.
        ValueError: for a field, by name, with the way out.
    """
    for check in FIELDS.values():
        if check is not None and (problem := check(args)):
            raise ValueError(problem)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # which Trainer follows where no field says more
    if precision not in ("no", "bf16") and not args.bf16:
        raise ValueError(f"mixed_precision={precision} in accelerate's configuration is refused: {_HALF}")
    if precision == "bf16" and not args.bf16:
        logger.info("bf16=True, as accelerate's configuration asks for")
        args.bf16 = True
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
    if is_lower_better(args.metric_for_best_model) and args.greater_is_better:
        logger.info("greater_is_better=False, as metric_for_best_model=%s is a perplexity", args.metric_for_best_model)
        args.greater_is_better = False


def check_trainer_arguments(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument of Trainer that QATTrainer does not take, by name, with the way out."""
    for name, value in options.items():
        reason = TRAINER_ARGUMENTS.get(name)
        if reason is not None and value is not None:
            raise ValueError(f"{name} is refused: {reason}")


def check_batch(args: TrainingArguments, samples: int | None) -> None:
    """Raises ValueError where `dataloader_drop_last` drops all of the `samples` there are; None for not known."""
    batch = args.per_device_train_batch_size
    if not args.accelerator_config.split_batches:
        batch *= args.world_size
    if args.dataloader_drop_last and samples is not None and samples < batch:
        raise ValueError(
            f"dataloader_drop_last=True drops all of the {samples} training samples: a batch of {args.world_size} "
            f"processes has {batch} (per_device_train_batch_size={args.per_device_train_batch_size}); give more data "
            "or a smaller batch"
        )


def is_lower_better(metric: str | None) -> bool:
    """Returns whether `metric` is one of this trainer's own that transformers would take as better when greater."""
    return metric is not None and metric.endswith("perplexity")

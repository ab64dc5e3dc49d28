"""QATTrainer: transformers.Trainer, with distillation from the full-precision model as its loss.

The teacher may be a cache on disk in place of a model in memory (data/teacher_cache.py): then it has no forward, and
the student is compared with it on its likeliest tokens and a bucket for the rest, in evaluations as well.

With peft's LoRA on the model (layers/lora.py) the adapters are inside the quantizers, and the model with both off is
its own teacher where no other is given (adapter.py).

One step: the teacher's forward without gradients, the student's forward with fake-quantized weights, the forward KL of
their next-token distributions made a few hundred tokens at a time (no logits are stored), one backward. The loss is
divided by the tokens of the whole optimizer step over all processes. It is made inside the student's forward, where its
output head runs: a student that is sharded (FSDP2, ZeRO-3) has its head's weight there and nowhere else.

The student's masters are float32. With `bf16` every other parameter reads as bfloat16 inside a step
(`models.cast_parameters`), so the training forward computes with the very numbers that the exported checkpoint holds,
and the residual stream, rotary tables and attention run in bfloat16. On a CPU short sequences attend by plain matrix
products, in half the time (layers/causal.py).

Weights, log-scales, zero points and norms are parameter groups with learning rates of their own. Gradients of the
quantizers are normalized in their backward, so a prepared model also trains in a stock Trainer or a plain loop.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, TrainOutput, rotate_checkpoints
from transformers.utils import is_torch_cuda_available

from llmqat.data.teacher_cache import TeacherCache
from llmqat.grid import fusing
from llmqat.layers import (
    ActivationQuantizer,
    KVQuantizer,
    PackedEmbedding,
    PackedModule,
    QuantModule,
    reused_in_step,
    short_attention,
    without_adapters,
)
from llmqat.layers.lora import adopt_adapters
from llmqat.metrics import IGNORED_LABEL, Predictor, Teacher, TopProbabilities, predictor_of, token_loss, token_scores
from llmqat.models import (
    capture_hidden,
    cast_parameters,
    check_can_be_rebuilt,
    check_next_token,
    is_sharded,
    loss_in_forward,
    vocabulary_size,
)
from llmqat.train.adapter import add_quantizers, check_self_teacher, original_model
from llmqat.train.checkpoints import (
    UNFINISHED_FOLDER,
    check_resumable,
    is_writing_error,
    last_checkpoint,
    publish,
    writing_error,
)
from llmqat.train.distribution import check_distribution
from llmqat.train.stability import check_lengths, is_finite, not_finite_error, not_finite_parameter, where_not_finite

logger = logging.getLogger(__name__)

TRAINABLE = ("all", "scales")
"""What QATArguments.trainable may be."""

FUSING_PAYS = 10_000_000
"""Quantized weights from which compiling the fake-quantize kernel (about ten seconds) pays in a short run."""


def processor_has_bf16() -> bool:
    """Returns whether the accelerator, or else the CPU, multiplies bfloat16 matrices natively."""
    if is_torch_cuda_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass
class QATArguments(TrainingArguments):
    """transformers.TrainingArguments with the learning rates of a quantized model.

    Differences of default: `bf16` is on where the processor has it, DDP looks for no unused parameters (the loss uses
    the output head outside the forward) and broadcasts no buffers.
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
            "codes stay packed; a recipe packs it first."
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
        """Raises ValueError for a negative rate, an unknown word or float16."""
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
        if self.max_grad_norm is not None and self.max_grad_norm < 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} is negative; 0 means that gradients are not clipped")
        if self.quantization_warmup_steps < 0:
            raise ValueError(f"quantization_warmup_steps={self.quantization_warmup_steps} is negative; give 0 for none")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else TrainingArguments refuses bf16, which this processor may well have
        _check_arguments(self)
        super().__post_init__()


class QATTrainer(Trainer):
    """Trains a prepared model to give the next-token distributions of its teacher."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        teacher: PreTrainedModel | TeacherCache | None = None,
        args: TrainingArguments | None = None,
        **options: Any,
    ) -> None:
        """Takes what transformers.Trainer takes, and a teacher.

        Args:
            model: a prepared model, or peft's LoRA over one; trainable parameters below float32 are raised to float32
                masters.
            teacher: the original model, any dtype; frozen here. Or a cache of what it predicts for the very samples
                that are trained and evaluated on; whether it was the original model that made it, `TeacherCache.check`
                says. None: `model` itself with quantizers and adapters off, which must then be what it was before it
                was prepared, and train nothing but adapters and scales.
            args: `QATArguments`; or `TrainingArguments`, where the fields that only QATArguments has take its defaults.
            **options: of transformers.Trainer. `train_dataset` yields {"input_ids", "labels"}; positions whose label is
                -100 are not distilled. `compute_metrics` is `perplexity_of` where not given, and is called with the
                same: negative log-likelihoods and counts, no logits.

        Raises:
            ValueError: when the model is not prepared, the vocabularies differ, or the model cannot be its own teacher.
        """
        if not any(isinstance(module, (QuantModule, PackedModule, KVQuantizer)) for module in model.modules()):
            raise ValueError("the model has no QuantLinear: call llmqat.prepare(model, config) before training")
        own = without_adapters(model)
        check_next_token(own)
        check_can_be_rebuilt(own)
        sizes = [_vocabulary(one) for one in (model, teacher) if one is not None]
        if sizes[0] != sizes[-1]:
            raise ValueError(
                f"the student's vocabulary has {sizes[0]} entries, the teacher's {sizes[-1]}; they must match"
            )
        args = TrainingArguments("tmp_trainer") if args is None else args  # as Trainer does
        _check_arguments(args)
        check_distribution(args)
        choose_trained(model, getattr(args, "trainable", "all"))
        if teacher is None and getattr(args, "kl_weight", 1.0) > 0:
            check_self_teacher(model)
        raise_masters(model)
        if getattr(args, "freeze_embeddings", False):
            model.get_input_embeddings().requires_grad_(False)
        super().__init__(model=model, args=args, **{"compute_metrics": perplexity_of, **options})
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process mean DataParallel, which this loss cannot be split over; start "
                "one process per GPU with `accelerate launch` or `torchrun`, or show it one GPU by CUDA_VISIBLE_DEVICES"
            )
        if self.is_fsdp_enabled:
            # Left to accelerate, weights and scales would be gathered in bfloat16, of which other codes come; what may
            # be rounded is cast after that (`models.cast_parameters`).
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        _share_starting_scales(model, self.args.world_size)
        # The loss is divided by num_items_in_batch in compute_loss; Trainer must count the tokens and not divide again.
        self.model_accepts_loss_kwargs = True
        self._fuse = sum(m.weight.numel() for m in model.modules() if isinstance(m, QuantModule)) >= FUSING_PAYS
        self._reuse = self._reuses()
        self._is_saving = False
        self._micro_batches: list[tuple[dict[str, Any], Tensor | int | None, Tensor]] = []
        self.teacher = teacher
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False).eval()
            if not getattr(teacher, "is_quantized", False):  # bitsandbytes has put its weights where they stay
                teacher.to(self.args.device)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Trains as Trainer does, from the newest whole checkpoint for True, or from the one given.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; nothing of it is saved.
            OSError: a checkpoint could not be written; the one before it is still there.
            ValueError: the checkpoint is not whole, or was trained with another number of samples a step.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(Path(self._get_output_dir(trial))) or "")
            if not resume_from_checkpoint:
                raise ValueError(f"there is no whole checkpoint in {self.args.output_dir}; train from the start")
        if resume_from_checkpoint:
            check_resumable(Path(resume_from_checkpoint), self._samples_per_step())
        return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs forward and backward; both read unquantized parameters in the checkpoint's dtype."""
        with (
            self._warming(model),
            self._checkpoint_numbers(model),
            short_attention(),
            fusing() if self._fuse else nullcontext(),
            reused_in_step(model, self.accelerator.sync_gradients) if self._reuse else nullcontext(),
        ):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append((inputs, num_items_in_batch, loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Returns the norm of the gradients of the step that is about to be made.

        Raises:
            FloatingPointError: it, or the loss, is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        done, self._micro_batches = self._micro_batches, []
        loss = torch.stack([loss for _, _, loss in done]).sum()
        seen = loss if norm is None else loss + norm  # one number, so the device is waited for once
        if is_finite(torch.as_tensor(seen)):
            return norm

        def repeat() -> None:
            for inputs, items, _ in done:
                self.training_step(model, inputs, items)

        where = where_not_finite(self.accelerator.unwrap_model(self.model), repeat)
        what = f"the loss is {float(loss):.4g}, the norm of the gradients {norm if norm is None else float(norm):.4g}"
        raise not_finite_error(self.state.global_step + 1, what, where, Path(self.args.output_dir))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Returns the schedule of the learning rates.

        Raises:
            ValueError: a warm-up does not end within the training.
        """
        quantization_warmup = getattr(self.args, "quantization_warmup_steps", 0)
        check_lengths(num_training_steps, self.args.get_warmup_steps(num_training_steps), quantization_warmup)
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss per token in nats: forward KL from teacher to student, and cross-entropy if asked for.

        Args:
            model: the student, perhaps wrapped.
            inputs: "input_ids" [B, L], "labels" [B, L]; -100 in labels leaves a token out.
            return_outputs: also return {"nll", "scored"}, both [B]: the negative log-likelihood of each sample's labels
                in nats, and how many there are. No logits are made.
            num_items_in_batch: labelled tokens of the whole optimizer step.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels", inputs["input_ids"])
        student = self.accelerator.unwrap_model(model)
        # The state at position t predicts the label of t + 1.
        mask = labels[:, 1:].ne(IGNORED_LABEL).flatten()
        tokens = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        distilled, supervised = self._weights()
        known = self._known(student, inputs) if distilled else None
        outputs: dict[str, Tensor] = {}

        def loss_of(hidden: Tensor) -> Tensor:
            with torch.autocast(hidden.device.type, enabled=False):  # dtypes are those of the checkpoint already
                predictor = predictor_of(without_adapters(student))
                if return_outputs:
                    outputs.update(_likelihoods(hidden, predictor, labels))
                return token_loss(
                    hidden[:, :-1].flatten(0, 1),
                    predictor,
                    mask.float() / tokens,
                    Teacher(known, self._teacher_predictor(student)) if isinstance(known, Tensor) else known,
                    labels[:, 1:].flatten() if supervised else None,
                    kl_weight=distilled,
                    cross_entropy_weight=supervised,
                )

        with loss_in_forward(student, loss_of):
            loss: Tensor = model(**inputs, use_cache=False)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DDP averages gradients over processes, and the token count is already that of all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _reuses(self) -> bool:
        """Returns whether weights are quantized once an optimizer step.

        Raises:
            ValueError: when that is asked for and each process holds a part of the weights only.
        """
        asked = getattr(self.args, "reuse_quantized_weights", None)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded(self.model)
        if asked and sharded:
            raise ValueError(
                "reuse_quantized_weights=True holds every weight whole through a step, which FSDP and ZeRO are there "
                "to avoid; leave it out"
            )
        return self.args.gradient_accumulation_steps > 1 and not sharded if asked is None else asked

    def _weights(self) -> tuple[float, float]:
        """Returns the weights of forward KL and cross-entropy."""
        return getattr(self.args, "kl_weight", 1.0), getattr(self.args, "cross_entropy_weight", 0.0)

    def _known(self, student: nn.Module, inputs: dict[str, Any]) -> Tensor | TopProbabilities:
        """Returns what the teacher makes of `inputs`, at the positions that have a next token, without gradients.

        Its final hidden states [T, D'], or of a cache its predictions.
        """
        if isinstance(self.teacher, TeacherCache):
            return self.teacher.lookup(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids"))
        with torch.no_grad() if self.teacher is not None else original_model(student):
            teacher = student if self.teacher is None else self.teacher
            training = teacher.training
            teacher.eval()
            with capture_hidden(without_adapters(teacher)) as captured:
                teacher(**inputs, use_cache=False)
                hidden = captured.take()
            teacher.train(training)
            return hidden[:, :-1].flatten(0, 1)

    def _teacher_predictor(self, student: nn.Module) -> Predictor:
        """Returns the teacher's predictor; to be called inside the student's forward, which may be its own teacher."""
        if isinstance(self.teacher, nn.Module):
            return predictor_of(self.teacher)
        with original_model(student):
            return predictor_of(without_adapters(student)).detached()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the loss of an evaluation batch, and what `perplexity_of` wants; logits are never whole."""
        with torch.no_grad(), self._checkpoint_numbers(model):
            loss, found = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        return loss.detach(), *((None, None) if prediction_loss_only else (found["nll"], found["scored"]))

    def _samples_per_step(self) -> int:
        """Returns the samples of an optimizer step, all processes together."""
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _get_output_dir(self, trial: Any) -> str:
        """Returns where checkpoints are: while one is written, where it lies until it is whole."""
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED_FOLDER) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint aside, puts it in place when it is whole, and only then deletes older ones.

        Raises:
            FloatingPointError: a parameter is not finite.
            OSError: it could not be written.
        """
        folder = Path(self._get_output_dir(trial))
        if name := not_finite_parameter(self.accelerator.unwrap_model(model)):
            what = "the step itself has made a parameter that is not finite"
            raise not_finite_error(self.state.global_step, what, f"the parameter {name}", folder)
        final = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = folder / UNFINISHED_FOLDER / final.name
        if self.args.should_save:
            shutil.rmtree(aside.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._is_saving = True
            super()._save_checkpoint(model, trial)
            self._is_saving = False
            if self.state.best_model_checkpoint == str(aside):
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            self._publish(aside, final)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not is_writing_error(error):
                raise
            shutil.rmtree(aside.parent, ignore_errors=True)
            raise writing_error(error, folder, self.state.global_step) from error
        finally:
            self._is_saving = False
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), limit, best_model_checkpoint=best, use_mtime=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _publish(self, aside: Path, final: Path) -> None:
        """Puts a checkpoint in place: the main process, and then one on each machine that has a disk of its own."""
        facts = {"samples": self._samples_per_step(), "processes": self.args.world_size}
        if self.args.process_index == 0:
            publish(aside, final, **facts)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and aside.is_dir():
            publish(aside, final, **facts)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads a checkpoint that is in place."""
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Writes the model as Trainer does; an adapter's folder takes the quantizers along."""
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel) and self.args.should_save:  # every process is here, and one has written
            add_quantizers(model, Path(output_dir or self.args.output_dir))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns the optimizer of `args.optim` over the parameter groups: weights, log-scales, zero points, norms."""
        if self.optimizer is None and getattr(self, "optimizer_cls_and_kwargs", None) is None:
            model = model or self.model
            optimizer, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer_cls_and_kwargs = optimizer, {**kwargs, "params": self._parameter_groups(model)}
            made: torch.optim.Optimizer = super().create_optimizer(model)
            self.optimizer_cls_and_kwargs = None  # type: ignore[assignment]  # Trainer has taken the groups out
            return made
        return super().create_optimizer(model)

    @contextmanager
    def _warming(self, model: nn.Module) -> Iterator[None]:
        """Inside, weights are quantized by the share that the warm-up has reached; outside always wholly."""
        steps = getattr(self.args, "quantization_warmup_steps", 0)
        share = min(1.0, (self.state.global_step + 1) / (steps + 1))
        layers = [] if share == 1.0 else [m for m in model.modules() if isinstance(m, QuantModule)]
        try:
            for layer in layers:
                layer.strength = share
            yield
        finally:
            for layer in layers:
                layer.strength = 1.0

    def _checkpoint_numbers(self, model: nn.Module) -> AbstractContextManager[None]:
        if not self.args.bf16:
            return nullcontext()
        return cast_parameters(self.accelerator.unwrap_model(model), torch.bfloat16)

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        args = self.args
        scale_rate = getattr(args, "scale_learning_rate", QATArguments.scale_learning_rate)
        zero_rate = getattr(args, "zero_point_learning_rate", QATArguments.zero_point_learning_rate)
        norm_rate = getattr(args, "norm_learning_rate", None)
        groups: dict[str, dict[str, Any]] = {
            "weights": {"params": [], "lr": args.learning_rate, "weight_decay": args.weight_decay},
            "log_scales": {"params": [], "lr": scale_rate, "weight_decay": 0.0},
            "zero_points": {"params": [], "lr": zero_rate, "weight_decay": 0.0},
            "norms": {
                "params": [],
                "lr": args.learning_rate if norm_rate is None else norm_rate,
                "weight_decay": 0.0,
            },
        }
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[group_of(name, parameter)]["params"].append(parameter)
        given = {
            "log_scales": ("scale_learning_rate", scale_rate, QATArguments.scale_learning_rate),
            "zero_points": ("zero_point_learning_rate", zero_rate, QATArguments.zero_point_learning_rate),
            "norms": ("norm_learning_rate", norm_rate, None),
        }
        for group, (key, rate, default) in given.items():
            if rate != default and not groups[group]["params"]:
                raise ValueError(f"{key}={rate}: there are no {group.replace('_', ' ')} that train; leave it out")
        return [group for group in groups.values() if group["params"]]


def perplexity_of(evaluated: EvalPrediction) -> dict[str, float]:
    """Returns {"perplexity"} of the evaluation text, from each sample's negative log-likelihood and count of labels."""
    nll, scored = (np.asarray(part, dtype=np.float64).sum() for part in evaluated)
    return {"perplexity": float(np.exp(nll / max(scored, 1)))}


@torch.no_grad()
def _likelihoods(hidden: Tensor, predictor: Predictor, labels: Tensor) -> dict[str, Tensor]:
    """Returns {"nll", "scored"}, float32 [B]: of each sample's labels [B, L], predicted from hidden [B, L, D]."""
    wanted = labels[:, 1:]
    mask = wanted.ne(IGNORED_LABEL)
    scores = token_scores(hidden[:, :-1].flatten(0, 1), predictor.detached(), wanted.flatten())
    nll = torch.zeros(mask.shape, device=hidden.device).masked_scatter_(mask, scores.nll.to(hidden.device))
    return {"nll": nll.sum(1), "scored": mask.sum(1).float()}


def _vocabulary(model: nn.Module | TeacherCache) -> int:
    """Returns the number of logits that a student or a teacher makes."""
    return model.header.vocabulary if isinstance(model, TeacherCache) else vocabulary_size(without_adapters(model))


def choose_trained(model: nn.Module, trainable: str) -> None:
    """Makes trainable, in place, what `trainable` says, and with adapters the quantizers as well.

    Raises:
        ValueError: when the model does not hold what is to be trained.
    """
    adapters = adopt_adapters(model)
    if trainable == "scales":
        if adapters:
            raise ValueError("trainable='scales' trains no adapter; take the adapters off, or leave trainable out")
        freeze_weights(model)
    elif any(isinstance(module, PackedModule) for module in model.modules()):
        raise ValueError(
            "the model is packed, so it has no weights to train; train its scales with "
            "QATArguments(trainable='scales'), or prepare the original model"
        )
    elif adapters:
        if not any(factor.requires_grad for adapter in adapters for factor in adapter.factors()):
            raise ValueError(
                "no adapter is trainable; load it with llmqat.load_adapter(model, folder, is_trainable=True)"
            )
        train_quantizers(model)


def train_quantizers(model: nn.Module) -> None:
    """Makes log-scales and learned zero points of `model` trainable, in place: peft freezes all but its adapters."""
    for module in model.modules():
        if isinstance(module, QuantModule):
            for parameter in (module.log_scale, module.zero_point):
                if isinstance(parameter, nn.Parameter):
                    parameter.requires_grad_(True)


def freeze_weights(model: nn.Module) -> None:
    """Leaves only vectors of `model` and the quantizers' scales and zero points trainable, in place.

    Of packed linear weights the scales become trainable as they lie; zero points, biases and packed embeddings stay.

    Raises:
        ValueError: when the scheme has no learned scale, and so next to nothing to train.
    """
    for module in model.modules():
        if isinstance(module, PackedModule) and not isinstance(module, PackedEmbedding):
            module.train_scales()
    holders = [module for module in model.modules() if isinstance(module, (QuantModule, PackedModule))]
    if all(module.log_scale is None for module in holders):
        raise ValueError("trainable='scales' needs learned scales; the scheme has scales: fixed or dynamic")
    kept = {id(p) for module in holders for p in (module.log_scale, getattr(module, "zero_point", None))}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept or parameter.dim() == 1)


def raise_masters(model: nn.Module) -> None:
    """Makes every trainable parameter of `model` float32, in place: a bfloat16 master does not move at QAT's rates."""
    raised = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
            raised += 1
    if raised:
        logger.info("raised %d trainable parameters to float32 masters", raised)


def _check_arguments(args: TrainingArguments) -> None:
    """Raises ValueError for float16; makes DDP not look for unused parameters unless the user said to."""
    if args.fp16:
        raise ValueError("fp16=True is refused: small scales and their gradients underflow; use bf16 or float32")
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False


def _share_starting_scales(model: nn.Module, world_size: int) -> None:
    """Gives every process the first one's starting scales: DDP without `broadcast_buffers` does not."""
    if world_size == 1 or not torch.distributed.is_initialized():
        return
    for module in model.modules():
        if isinstance(module, (QuantModule, ActivationQuantizer)):
            for tensor in module.buffers(recurse=False):
                torch.distributed.broadcast(tensor, src=0)


def group_of(name: str, parameter: nn.Parameter) -> str:
    """Returns the name of the parameter group: log_scales, zero_points, weights or norms."""
    if name.endswith(".log_scale"):
        return "log_scales"
    if name.endswith(".zero_point"):
        return "zero_points"
    return "weights" if parameter.dim() > 1 else "norms"

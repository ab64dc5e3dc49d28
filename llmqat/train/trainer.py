"""QATTrainer: transformers.Trainer, with distillation from the full-precision model as its loss.

The teacher may be a cache on disk in place of a model in memory (data/teacher_cache.py): then it has no forward, and
the student is compared with it on its most likely tokens and a bucket for the rest, in evaluations as well.

With peft's LoRA on the model (layers/lora.py) the adapters are inside the quantizers, and the model with both off is
its own teacher where no other is given (adapter.py).

One step: the teacher's forward pass without gradients, the student's forward pass with fake-quantized weights, the
forward KL between their next-token distributions, one backward pass. The KL is computed a few hundred tokens at a time,
so no logits are stored. The loss is divided by the scored tokens of the whole optimizer step over all processes. It
is computed inside the student's forward pass, in place of the output head. Only there does a sharded student (FSDP2,
ZeRO-3) have the whole weight of its head.

The student's masters are float32. With `bf16` every other parameter reads as bfloat16 inside a step
(`models.cast_parameters`), so the training forward computes with the very numbers that the exported checkpoint holds,
and the residual stream, rotary tables and attention run in bfloat16. On a CPU short sequences attend by plain matrix
products, in half the time (layers/causal.py).

Weights, log-scales, zero points and norms are parameter groups with learning rates of their own. Gradients of the
quantizers are normalized in their backward, so a prepared model also trains in a stock Trainer or a plain loop.
"""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    TrainOutput,
    has_length,
    rotate_checkpoints,
)

from llmqat.data.length import check_length
from llmqat.data.teacher_cache import TeacherCache
from llmqat.grid import fusing
from llmqat.kernels import float_training
from llmqat.layers import (
    KVQuantizer,
    PackedEmbedding,
    PackedModule,
    QuantModule,
    RangedModule,
    reused_in_step,
    short_attention,
    without_adapters,
)
from llmqat.layers.lora import adopt_adapters
from llmqat.layers.prepare import save_pretrained_allowed
from llmqat.metrics import (
    IGNORED_LABEL,
    Predictor,
    Teacher,
    TopProbabilities,
    check_predictor,
    predictor_of,
    token_loss,
    token_nll,
)
from llmqat.models import (
    capture_hidden,
    cast_parameters,
    check_can_be_rebuilt,
    check_next_token,
    is_sharded,
    keeps_documents_apart,
    loss_in_forward,
    to_accelerator,
    vocabulary_size,
)
from llmqat.train.adapter import add_quantizers, check_self_teacher, original_model
from llmqat.train.arguments import QATArguments, check_arguments, check_batch, check_trainer_arguments
from llmqat.train.checkpoints import (
    UNFINISHED_FOLDER,
    batch_size_of,
    check_resumable,
    check_steps,
    checkpoint_step,
    is_writing_error,
    last_checkpoint,
    publish,
    tokens_of,
    what_it_lacks,
    writing_error,
)
from llmqat.train.distribution import check_distribution
from llmqat.train.optimizers import check_own_optimizer, keep_weights_of
from llmqat.train.scores import EvaluationMetrics, known_metrics, logits_of
from llmqat.train.stability import check_warmups, is_finite, not_finite_error, not_finite_parameter, where_not_finite
from llmqat.train.targets import documents_begin, scored_labels
from llmqat.train.teacher import check_teacher

logger = logging.getLogger(__name__)

_NO_SEARCH = (
    "hyperparameter search makes the model anew for each trial, and here it is prepared and calibrated before: write a "
    "loop that prepares a model, trains it with QATTrainer, and compares what evaluate() returns"
)

FUSING_PAYS = 10_000_000
"""Quantized weights from which compiling the fake-quantize kernel (about ten seconds) pays in a short run."""


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
            teacher: the original model, any dtype; it is frozen here. Or a TeacherCache with its predictions for all
                samples of training and evaluation; `TeacherCache.check` verifies which model made a cache. None: the
                student itself with quantizers and adapters off. Its weights must then be unchanged since `prepare`, and
                only adapters, scales and zero points may train.
            args: `QATArguments`; or `TrainingArguments`, where the fields that only QATArguments has take its defaults.
            **options: of transformers.Trainer. `train_dataset` yields {"input_ids", "labels", "attention_mask"};
                tokens whose label is -100, or that are hidden, are not distilled (targets.py). Evaluations yield
                perplexity; logits are made whole only for a `compute_metrics` that is given, which gets them as
                transformers says.

        Raises:
            ImportError: the optimizer needs a package that is not installed.
            ValueError: when the model is not prepared, the vocabularies differ, the model cannot be its own teacher,
                the teacher would change with it, or an argument would have no right effect (arguments.py).
        """
        check_trainer_arguments(options)
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
        check_arguments(args)
        check_distribution(args)
        data = options.get("train_dataset")
        check_batch(args, len(data) if data is not None and has_length(data) else None)
        metrics = options.setdefault("compute_metrics", EvaluationMetrics())
        _check_best_metric(args, metrics, options.get("eval_dataset"))
        choose_trained(model, getattr(args, "trainable", "all"))
        if teacher is None and getattr(args, "kl_weight", 1.0) > 0:
            check_self_teacher(model)
        raise_masters(model)
        if getattr(args, "freeze_embeddings", False):
            model.get_input_embeddings().requires_grad_(False)
        _check_what_is_learned(model, teacher)
        self._check_optimizers(args, model, options)
        config: Any = own.config
        use_cache = getattr(config, "use_cache", None)
        super().__init__(model=model, args=args, **options)
        if use_cache is not None:  # Trainer puts that of its arguments there, and it would be saved with the model
            config.use_cache = use_cache
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
        self._gathers_logits = False
        self._longest = 0
        self._keeps_apart: bool | None = None
        self._tokens_before: int | None = 0
        self._tokens_here = 0
        self._steps_before = 0
        self._resumed_from: Path | None = None
        self.teacher = teacher
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False).eval()
            if not getattr(teacher, "is_quantized", False):  # bitsandbytes has put its weights where they stay
                to_accelerator(teacher, self.args.device)
        self._check_logits()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Trains as Trainer does, from the newest whole checkpoint for True, or from the one given.

        A training that was finished when the checkpoint was written makes no step more.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; nothing of it is saved.
            OSError: a checkpoint could not be written; the one before it is still there.
            ValueError: the checkpoint is not whole, was trained with another number of samples a step, or for more
                steps; or the data fills no batch.
        """
        if trial is not None:
            raise ValueError(_NO_SEARCH)
        if self.train_dataset is not None and has_length(self.train_dataset):
            if len(self.train_dataset) == 0:
                raise ValueError("train_dataset has no sample; give it some")
            check_batch(self.args, len(self.train_dataset))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(Path(self._get_output_dir(trial))) or "")
            if not resume_from_checkpoint:
                raise ValueError(f"there is no whole checkpoint in {self.args.output_dir}; train from the start")
        self._steps_before, self._tokens_before, self._resumed_from = 0, 0, None
        if resume_from_checkpoint:
            path = Path(resume_from_checkpoint)
            if self.args.auto_find_batch_size:
                self._train_batch_size = batch_size_of(path) or self.args.train_batch_size
            check_resumable(path, self._samples_per_step())
            self._steps_before, self._tokens_before, self._resumed_from = checkpoint_step(path), tokens_of(path), path
        output: TrainOutput = super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
        keep_weights_of(self.optimizer)
        return output if "train_loss" in output.metrics else output._replace(training_loss=float("nan"))

    def _check_logits(self) -> None:
        """Raises ValueError where the loss would be of other logits than the model's or the teacher's own."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # weights whole in no process
        for model in (self.model, self.teacher):
            if isinstance(model, nn.Module) and not is_sharded(model):
                with self._tried(model):
                    check_predictor(model)

    @contextmanager
    def _tried(self, model: nn.Module) -> Iterator[None]:
        """Inside, a whole forward of `model` can be run, whose parameters may be of several dtypes."""
        with ExitStack() as stack:
            stack.enter_context(self.accelerator.autocast())
            if not self.args.bf16:  # masters of norms are float32 before a head in bfloat16
                stack.enter_context(cast_parameters(model, predictor_of(without_adapters(model)).head.dtype))
            yield

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps `position_ids` for models that do not take them as well: where documents begin is looked at here."""
        super()._set_signature_columns_if_needed()
        if "position_ids" not in self._signature_columns:
            self._signature_columns.append("position_ids")

    def _keep_documents_apart(self, student: nn.Module, inputs: dict[str, Any]) -> None:
        """Sees to it that documents of a row, which `position_ids` begin, do not see each other.

        transformers keeps them apart only where there is no attention mask. Padding collators add one that hides
        nothing: it is taken out. Position ids are taken out where the model takes none and no document begins.

        Raises:
            ValueError: documents begin in rows that are padded too, or the model or its teacher cannot keep them apart.
        """
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if not isinstance(positions, Tensor) or positions.dim() != 2:
            return
        if isinstance(mask, Tensor) and mask.dim() == 2:
            if bool(mask.all()):
                del inputs["attention_mask"]
            elif documents_begin(positions, mask):
                raise ValueError(
                    "rows hold several documents (position_ids restart) and padding (attention_mask has zeros), and "
                    "transformers keeps documents apart only without a mask; give rows without padding, or a document "
                    "a row"
                )
        if self._keeps_apart is None:
            self._keeps_apart = all(map(self._is_known_to_keep_apart, (without_adapters(student), self.teacher)))
        if self._keeps_apart:
            return
        if documents_begin(positions, mask):
            raise ValueError(
                f"rows hold several documents (position_ids restart), and {type(without_adapters(student)).__name__} "
                "or its teacher attends beyond them; give blocks made with packing='concatenate'"
            )
        if "position_ids" not in inspect.signature(without_adapters(student).forward).parameters:
            del inputs["position_ids"]

    def _is_known_to_keep_apart(self, model: Any) -> bool:
        """Returns whether `model` keeps documents apart; True where it is no model, or cannot be tried."""
        if not isinstance(model, nn.Module) or self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded(model):
            return True
        with self._tried(model):
            return keeps_documents_apart(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as Trainer does; of no step there is no mean loss, which Trainer would call 0."""
        if self.state.global_step == self._steps_before:
            logs.pop("train_loss", None)
        super().log(logs, start_time)

    def hyperparameter_search(self, *args: Any, **options: Any) -> Any:
        """Raises ValueError: a model is prepared once, and then trained."""
        raise ValueError(_NO_SEARCH)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """Returns Trainer's own facts of the training: numbers of epochs, steps and samples.

        Raises:
            ValueError: the checkpoint to go on from has made more steps than asked for, or has no optimizer.
        """
        self._micro_batches, self._tokens_here = [], 0  # of an attempt with larger batches
        found = super().set_initial_training_values(args, dataloader)
        if self._resumed_from is not None:
            check_steps(self._resumed_from, found[-1])
        return found

    def _init_training_state(self, *args: Any, **options: Any) -> Any:
        """Returns what Trainer makes of the checkpoint; the best one is found again where the folder was moved.

        Raises:
            ValueError: the best model is to be loaded in the end, and its checkpoint is gone.
        """
        found = super()._init_training_state(*args, **options)
        best, known = self.state.best_global_step, self.state.best_model_checkpoint
        moved = known is None or not Path(known).is_dir()  # newer versions of transformers forget it where it is gone
        if best and moved and self.args.load_best_model_at_end:
            path = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{best}"
            if lacking := what_it_lacks(path):
                raise ValueError(
                    f"load_best_model_at_end needs {path}, the best so far: {lacking}; put it back, or train from the "
                    "start"
                )
            self.state.best_model_checkpoint = str(path)
        return found

    def _finalize_training(self, *args: Any, **options: Any) -> Any:
        """Ends the training as Trainer does, but keeps the last checkpoint as well as the best.

        By the last checkpoint, a later `train` sees that no step is left.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **options)
        finally:
            self.args.save_total_limit = limit

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Trains for an epoch, or not at all where all steps are made: Trainer would look only after another step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    @property
    def tokens_here(self) -> int:
        """How many tokens this process has trained on since it began."""
        return self._tokens_here

    def tokens_trained(self) -> tuple[int | None, int]:
        """Returns how many tokens were trained on: in all, and since this process began; all processes together.

        All processes call this together. The first number is None where a checkpoint did not say how many it had seen.
        """
        here = torch.tensor(self._tokens_here, device=self.args.device)
        now = int(self.accelerator.reduce(here, "sum"))
        return None if self._tokens_before is None else self._tokens_before + now, now

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs forward and backward; both read unquantized parameters in the checkpoint's dtype."""
        with (
            self._warming(model),
            self._checkpoint_numbers(model),
            float_training(self.args.device),
            short_attention(),
            fusing() if self._fuse else nullcontext(),
            reused_in_step(model, self.accelerator.sync_gradients) if self._reuse else nullcontext(),
        ):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append((inputs, num_items_in_batch, loss))
        self._tokens_here += inputs["input_ids"].numel()
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Returns how many tokens of some batches are scored, all processes together where they are averaged over."""
        if not batch_samples:
            return None
        counts = [scored_labels(batch)[:, 1:].ne(IGNORED_LABEL).sum() for batch in batch_samples]
        count = torch.stack(counts).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1)

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
        check_warmups(num_training_steps, self.args)
        if self.args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            # Trainer waits for a smaller metric, whatever greater_is_better says.
            mode = "max" if self.args.greater_is_better else "min"
            self.args.lr_scheduler_kwargs = {"mode": mode, **(self.args.lr_scheduler_kwargs or {})}
        return super().create_scheduler(num_training_steps, optimizer)

    def _check_length(self, student: nn.Module, length: int) -> None:
        """Raises ValueError for rows longer than the model's positions; with several processes it checks nothing.

        The check may run a forward pass of its own.
        """
        if length > self._longest and self.args.world_size == 1:
            check_length(without_adapters(student), length, "tokens in a row")
            self._longest = length

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
            inputs: "input_ids" [B, L]; "labels" and "attention_mask" say which tokens are scored (targets.py).
            return_outputs: also return {"nll", "scored"}, both [B], and "labels" [B, L]: the negative log-likelihood of
                each sample's labels in nats, and how many there are. Logits [B, L, V] are made where an evaluation has
                asked for them.
            num_items_in_batch: scored tokens of the whole optimizer step.
        """
        inputs = dict(inputs)
        student = self.accelerator.unwrap_model(model)
        self._keep_documents_apart(student, inputs)
        labels = scored_labels(inputs)
        inputs.pop("labels", None)
        if "position_ids" not in inputs:  # which begin anew in rows that hold several texts
            self._check_length(student, labels.shape[1])
        # The state at position t predicts the label of t + 1.
        mask = labels[:, 1:].ne(IGNORED_LABEL).flatten()
        tokens = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        distilled, supervised = self._weights()
        known = self._known(student, inputs) if distilled else None
        outputs: dict[str, Tensor] = {}

        def loss_of(hidden: Tensor) -> Tensor:
            if hidden.shape[:-1] != labels.shape:  # ProphetNet predicts several tokens at each
                raise ValueError(
                    f"{type(without_adapters(student)).__name__} gives its output head states {list(hidden.shape)} for "
                    f"{list(labels.shape)} tokens; QATTrainer trains models that predict one next token at each"
                )
            # Dtypes are those of the checkpoint already.
            with torch.autocast(hidden.device.type, enabled=False):
                predictor = predictor_of(without_adapters(student))
                if return_outputs:
                    outputs.update(_likelihoods(hidden, predictor, labels), labels=labels)
                    if self._gathers_logits:
                        outputs["logits"] = predictor.detached().logits(hidden.detach())
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
            ValueError: when that is asked for and each process holds a part of the weights only, or wants a gradient of
                every weight in every micro-batch.
        """
        asked = getattr(self.args, "reuse_quantized_weights", None)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded(self.model)
        if asked and sharded:
            raise ValueError(
                "reuse_quantized_weights=True holds every weight whole through a step, which FSDP and ZeRO are there "
                "to avoid; leave it out"
            )
        each = bool(self.args.ddp_static_graph)
        each |= bool(self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False))
        if asked and each:
            raise ValueError(
                "reuse_quantized_weights=True gives a weight its gradient in the last micro-batch of a step, and "
                "ddp_static_graph and sync_each_batch want one in each; leave one of them out"
            )
        return self.args.gradient_accumulation_steps > 1 and not sharded and not each if asked is None else asked

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
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Returns the loss of an evaluation batch, and what `EvaluationMetrics` wants."""
        with torch.no_grad(), self._checkpoint_numbers(model), float_training(self.args.device):
            loss, found = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        if not self._gathers_logits:
            return loss.detach(), (found["nll"], found["scored"]), found["scored"]
        logits, process = found["logits"], self._process_logits
        shown = logits if process is None else process(logits, found["labels"])
        return loss.detach(), (found["nll"], found["scored"], shown), found["labels"]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Returns metrics, and of `predict` the logits; these are whole only there, or for a given compute_metrics."""
        given = getattr(self, "compute_metrics", None)
        process = getattr(self, "preprocess_logits_for_metrics", None)
        own = None if isinstance(given, EvaluationMetrics) else given
        self._gathers_logits = own is not None or description == "Prediction"
        if given is not None:
            self.compute_metrics = EvaluationMetrics(own)
        self._process_logits, self.preprocess_logits_for_metrics = process, None
        try:
            output: EvalLoopOutput = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            gathered, self._gathers_logits = self._gathers_logits, False
            self.compute_metrics = given  # type: ignore[assignment]
            self.preprocess_logits_for_metrics = process
        if gathered and output.predictions is not None:
            return output._replace(predictions=logits_of(output.predictions))
        return output

    def _samples_per_step(self) -> int:
        """Returns the samples of an optimizer step, all processes together."""
        processes = 1 if self.args.accelerator_config.split_batches else self.args.world_size
        return self._train_batch_size * self.args.gradient_accumulation_steps * processes

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
        tokens, _ = self.tokens_trained()
        facts = {"samples": self._samples_per_step(), "processes": self.args.world_size, "tokens": tokens}
        if self.args.process_index == 0:
            publish(aside, final, **facts)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and aside.is_dir():
            publish(aside, final, **facts)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads a checkpoint that is in place."""
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model as Trainer does, with the weights that the optimizer stands for."""
        keep_weights_of(self.optimizer)  # the next step takes up those that it trains
        super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        """Loads the best model of the training in place of the last."""
        keep_weights_of(self.optimizer)  # after this it changes no weight
        super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Writes the model as Trainer does; an adapter's folder takes the quantizers along."""
        model = self.accelerator.unwrap_model(self.model)
        with save_pretrained_allowed(model) if self._is_saving else nullcontext():
            super()._save(output_dir, state_dict)
        if isinstance(model, PeftModel) and self.args.should_save:  # every process is here, and one has written
            add_quantizers(model, Path(output_dir or self.args.output_dir))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns the optimizer, of `args.optim` where none is given, over the parameter groups.

        These are weights, log-scales, zero points and norms. An `optimizer_cls_and_kwargs` gets them too, its own `lr`
        and `weight_decay` standing for those of weights.
        """
        if self.optimizer is not None:
            return self.optimizer
        model = model or self.model
        given = getattr(self, "optimizer_cls_and_kwargs", None)
        kind, kwargs = given or self.get_optimizer_cls_and_kwargs(self.args, model)
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):  # a factory takes the model
            made: torch.optim.Optimizer = super().create_optimizer(model)
            return made
        own = kwargs if given else {}
        rate, decay = own.get("lr", self.args.learning_rate), own.get("weight_decay", self.args.weight_decay)
        groups = kwargs.get("params") or self._parameter_groups(model, rate, decay)
        self.optimizer_cls_and_kwargs = kind, {**kwargs, "params": groups}
        try:
            made = super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given  # type: ignore[assignment]  # Trainer has taken the groups out
        return made

    def _check_optimizers(self, args: TrainingArguments, model: nn.Module, options: Mapping[str, Any]) -> None:
        """Raises ValueError where an optimizer that is given does not fit the model, or would not see our rates."""
        optimizer = (options.get("optimizers") or (None, None))[0]
        kind = (options.get("optimizer_cls_and_kwargs") or (None, {}))[0]
        if optimizer is not None:
            check_own_optimizer(optimizer, model)
        if optimizer is not None or (kind is not None and not isinstance(kind, type)):
            rates = ("scale_learning_rate", "zero_point_learning_rate", "norm_learning_rate")
            for name in rates:
                if getattr(args, name, None) not in (None, getattr(QATArguments, name)):
                    raise ValueError(
                        f"{name}={getattr(args, name)} has no effect on an optimizer that is given; use one"
                    )

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

    def _parameter_groups(self, model: nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
        """Returns the groups, `rate` and `decay` being those of weights."""
        args = self.args
        scale_rate = getattr(args, "scale_learning_rate", QATArguments.scale_learning_rate)
        zero_rate = getattr(args, "zero_point_learning_rate", QATArguments.zero_point_learning_rate)
        norm_rate = getattr(args, "norm_learning_rate", None)
        groups: dict[str, dict[str, Any]] = {
            "weights": {"params": [], "lr": rate, "weight_decay": decay},
            "log_scales": {"params": [], "lr": scale_rate, "weight_decay": 0.0},
            "zero_points": {"params": [], "lr": zero_rate, "weight_decay": 0.0},
            "norms": {
                "params": [],
                "lr": rate if norm_rate is None else norm_rate,
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
        for group, (key, value, default) in given.items():
            if value != default and not groups[group]["params"]:
                raise ValueError(f"{key}={value}: there are no {group.replace('_', ' ')} that train; leave it out")
        return [group for group in groups.values() if group["params"]]


@torch.no_grad()
def _likelihoods(hidden: Tensor, predictor: Predictor, labels: Tensor) -> dict[str, Tensor]:
    """Returns {"nll", "scored"}, float32 [B]: of each sample's labels [B, L], predicted from hidden [B, L, D]."""
    wanted = labels[:, 1:]
    mask = wanted.ne(IGNORED_LABEL)
    of_scored = token_nll(hidden[:, :-1].flatten(0, 1), predictor.detached(), wanted.flatten())
    nll = torch.zeros(mask.shape, device=hidden.device).masked_scatter_(mask, of_scored)
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
    elif adapters:
        if not any(factor.requires_grad for adapter in adapters for factor in adapter.factors()):
            raise ValueError(
                "no adapter is trainable; load it with llmqat.load_adapter(model, folder, is_trainable=True)"
            )
        train_quantizers(model)
    elif any(isinstance(module, PackedModule) for module in model.modules()):
        raise ValueError(
            "the model is packed, so it has no weights to train; train its scales with "
            "QATArguments(trainable='scales'), attach adapters with llmqat.lora_config(model), or prepare the original "
            "model"
        )


def train_quantizers(model: nn.Module) -> None:
    """Makes log-scales and learned zero points of `model` trainable, in place: peft freezes all but its adapters.

    Packed scales that cannot be trained stay as they are.
    """
    try:
        _train_packed_scales(model)
    except ValueError as error:
        logger.warning("adapters are trained, and no scale with them: %s", error)
    for module in model.modules():
        if isinstance(module, QuantModule):
            for parameter in (module.log_scale, module.zero_point):
                if isinstance(parameter, nn.Parameter):
                    parameter.requires_grad_(True)


def _train_packed_scales(model: nn.Module) -> None:
    """Makes the scales of packed linear weights trainable; of all of them, or of none where it raises."""
    found = [module for module in model.modules() if isinstance(module, PackedModule)]
    linear = [module for module in found if not isinstance(module, PackedEmbedding)]
    for module in linear:
        module.check_scales_train()
    for module in linear:
        module.train_scales()


def freeze_weights(model: nn.Module) -> None:
    """Leaves only vectors of `model` and the quantizers' scales and zero points trainable, in place.

    Of packed linear weights the scales become trainable as they lie; zero points, biases and packed embeddings stay.

    Raises:
        ValueError: when the scheme has no learned scale, and so next to nothing to train.
    """
    _train_packed_scales(model)
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
            raised += not parameter.is_meta  # a trial has no weights, and nothing to tell
    if raised:
        logger.info("raised %d trainable parameters to float32 masters", raised)


def _check_what_is_learned(model: nn.Module, teacher: nn.Module | TeacherCache | None) -> None:
    """Raises ValueError for a teacher that is none; warns of a loss of the model's own that is left out."""
    if isinstance(teacher, nn.Module):
        check_teacher(model, teacher)
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        logger.warning("output_router_logits=True: the loss that balances experts is no part of the loss here")


def _check_best_metric(args: TrainingArguments, compute_metrics: Any, data: Any) -> None:
    """Raises ValueError where no evaluation will yield `metric_for_best_model`, which Trainer would see too late."""
    metric = args.metric_for_best_model
    if (
        metric is None
        or args.eval_strategy == "no"
        or not (compute_metrics is None or args.prediction_loss_only or isinstance(compute_metrics, EvaluationMetrics))
    ):
        return
    has_perplexity = compute_metrics is not None and not args.prediction_loss_only
    known = known_metrics(list(data) if isinstance(data, dict) else None, has_perplexity)
    if (metric if metric.startswith("eval_") else f"eval_{metric}") not in known:
        raise ValueError(
            f"metric_for_best_model={metric!r} is none of what evaluations yield: {', '.join(sorted(known))}; choose "
            "one of these, or give a compute_metrics that yields it"
        )


def _share_starting_scales(model: nn.Module, world_size: int) -> None:
    """Gives every process the first one's starting scales: DDP without `broadcast_buffers` does not."""
    if world_size == 1 or not torch.distributed.is_initialized():
        return
    for module in model.modules():
        if isinstance(module, (QuantModule, RangedModule)):
            for tensor in module.buffers(recurse=False):
                if tensor.is_meta:  # of a trial
                    continue
                torch.distributed.broadcast(tensor, src=0)


def group_of(name: str, parameter: nn.Parameter) -> str:
    """Returns the name of the parameter group: log_scales, zero_points, weights or norms."""
    if name.endswith(".log_scale"):
        return "log_scales"
    if name.endswith(".zero_point"):
        return "zero_points"
    return "weights" if parameter.dim() > 1 else "norms"

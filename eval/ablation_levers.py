"""What the arms of ablations.py change beyond settings: prototypes of what training and calibration might do.

None of this is part of llmqat; what wins by more than noise moves there. A lever is a subclass of QATTrainer that calls
what it overrides, so several can be put into one trainer by inheritance. What changes calibration is a context in which
a function of the package is replaced, or a stage of its own.

Written from the papers that each names. Letters: O out features, I in features, N groups of weights that share a scale,
g weights of a group, B token blocks of a batch, L tokens of a block, D hidden size, K kept tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from llmqat import metrics
from llmqat.calibrate import CustomStage, Originals, open_walk, rotate, stages
from llmqat.calibrate.blocks import Block, find_blocks
from llmqat.calibrate.blockwise import FLOOR, learning_rate, relative_error
from llmqat.calibrate.chains import RecordedChain, hidden_of
from llmqat.calibrate.gptq import Curvature
from llmqat.calibrate.rotate import hadamard
from llmqat.calibrate.structure import unchanged_logits
from llmqat.data.blocks import Rows
from llmqat.data.teacher_cache import TeacherCache, block_key
from llmqat.grid import fusing
from llmqat.layers import QuantModule
from llmqat.metrics import IGNORED_LABEL, TopProbabilities
from llmqat.models import capture_hidden, save_whole
from llmqat.train import QATTrainer
from llmqat.train.targets import scored_labels
from llmqat.train.trainer import FUSING_PAYS, group_of


class Lever(QATTrainer):
    """A training with something changed: what runs before it, before and after each step, and after it."""

    given: Mapping[str, Any] = {}
    """Settings that `by` has changed."""

    def __init__(self, *args: Any, original: Callable[[], PreTrainedModel] | None = None, **options: Any) -> None:
        """Takes what QATTrainer takes, and what loads the full-precision model."""
        super().__init__(*args, **options)
        self.original = original
        self.facts: dict[str, Any] = {}  # for the report
        self.add_callback(_Steps(self))

    @classmethod
    def by(cls, **given: Any) -> type[Lever]:
        """Returns the lever with other settings.

        Raises:
            ValueError: the lever has no such setting.
        """
        if unknown := [name for name in given if not hasattr(cls, name)]:
            raise ValueError(f"{cls.__name__} has no setting {', '.join(unknown)}")
        return type(cls.__name__, (cls,), {**given, "given": given, "__doc__": cls.__doc__})

    @classmethod
    def label(cls) -> str:
        """Returns name and changed settings, such as 'Averaged(share=0.5)'."""
        return f"{cls.__name__}({', '.join(f'{name}={value}' for name, value in cls.given.items())})"

    @property
    def layers(self) -> list[QuantModule]:
        """The quantized weights that are trained."""
        found = [module for module in self.model.modules() if isinstance(module, QuantModule)]
        return [layer for layer in found if layer.parameter().requires_grad]

    @property
    def progress(self) -> float:
        """Share of the steps that are made."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def train(self, *args: Any, **options: Any) -> Any:
        """Trains as QATTrainer does, then calls `finish`."""
        output = super().train(*args, **options)
        self.finish()
        return output

    def before_training(self) -> None:
        """Runs once, when the optimizer is there."""

    def before_step(self) -> None:
        """Runs when gradients are there, clipped."""

    def after_step(self) -> None:
        """Runs after each optimizer step."""

    def finish(self) -> None:
        """Runs after the last step."""


class _Steps(TrainerCallback):
    """Tells a lever where the training is."""

    def __init__(self, lever: Lever) -> None:
        self.lever = lever

    def on_train_begin(self, *args: Any, **_: Any) -> None:
        with torch.no_grad():
            self.lever.before_training()

    def on_pre_optimizer_step(self, *args: Any, **_: Any) -> None:
        with torch.no_grad():
            self.lever.before_step()

    def on_step_end(self, *args: Any, **_: Any) -> None:
        with torch.no_grad():
            self.lever.after_step()


# Weights


class Averaged(Lever):
    """Means of weights, scales and norms over the last steps; codes are those of the means.

    Source: stochastic weight averaging (1803.05407), here within one training.
    """

    share = 1 / 3
    """Of the steps, those that are averaged over."""
    _count = 0

    def before_training(self) -> None:
        """Notes what is trained."""
        super().before_training()
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def after_step(self) -> None:
        """Takes the step's parameters into the means."""
        super().after_step()
        if self.progress <= 1 - self.share:
            return
        self._count += 1
        if self._count == 1:
            self._means = [parameter.detach().clone() for parameter in self._trained]
            return
        for mean, parameter in zip(self._means, self._trained, strict=True):
            mean.lerp_(parameter.detach(), 1 / self._count)

    @torch.no_grad()
    def finish(self) -> None:
        """Puts the means in place."""
        super().finish()
        if self._count:
            for mean, parameter in zip(self._means, self._trained, strict=True):
                parameter.copy_(mean)


class Centred(Lever):
    """Weights begin deeper in the cells of their codes: no further than `cell` steps from the level.

    GPTQ leaves a master at the edge of its code's cell where it was moved there, and a fifth of those of 4 bits lie
    within 2 % of a step of the edge, so that the first noise flips them. The codes stay the same.
    """

    cell = 0.25
    """How far from the level of its code a weight may begin, in steps; half a step is the edge."""

    def before_training(self) -> None:
        """Moves weights towards the levels of their codes."""
        super().before_training()
        for layer in self.layers:
            place_within(layer, self.cell)


@torch.no_grad()
def place_within(layer: QuantModule, cell: float) -> None:
    """Moves each weight of `layer` in place to within `cell` steps of the level of its code."""
    level, room = layer.quantized_matrix(torch.float32), cell * layer.step_sizes()
    placed = level + (layer.matrix().float() - level).clamp_(-room, room)
    layer.parameter().copy_(layer.restored(placed))


class Damped(Lever):
    """Pulls each weight towards the level of its code after each step, more and more.

    Source: oscillation dampening, Overcoming Oscillations in QAT (2203.11086) section 4.1: |level - w|^2 inside the
    grid, levels without gradients, its weight rising by a cosine. Deviation: the pull is apart from Adam's moments, as
    AdamW's decay is, and so in shares of the distance.
    """

    strength = 0.1
    """Share of the distance that the last step takes off."""

    def after_step(self) -> None:
        """Pulls."""
        super().after_step()
        share = self.strength * 0.5 * (1 - math.cos(math.pi * self.progress))
        for layer in self.layers:
            apart = layer.quantized_matrix(torch.float32).sub_(layer.matrix())
            apart.masked_fill_(apart.abs() > 0.5 * layer.step_sizes(), 0.0)  # beyond the last code
            layer.parameter().add_(layer.restored(apart), alpha=share)


class Frozen(Lever):
    """Freezes a weight whose code goes back and forth, at the mean of its codes.

    Source: iterative weight freezing, Overcoming Oscillations in QAT (2203.11086) section 4.2, algorithm 1: a change of
    code against the change before it is an oscillation; its frequency is a running mean, and so is the code; the
    threshold falls by a cosine. Deviation: a momentum for trainings of some dozens of steps.
    """

    momentum = 0.1
    """Of the running means: the share of the newest step."""
    thresholds = (0.15, 0.05)
    """Frequency above which a weight freezes, at the beginning and at the end; the newest oscillation counts 0.1."""

    def before_training(self) -> None:
        """Notes the codes."""
        super().before_training()
        self._seen = [_Seen.of(layer) for layer in self.layers]

    def after_step(self) -> None:
        """Counts oscillations and freezes."""
        super().after_step()
        first, last = self.thresholds
        threshold = last + (first - last) * 0.5 * (1 + math.cos(math.pi * self.progress))
        for seen in self._seen:
            seen.step(self.momentum, threshold)

    @property
    def frozen_share(self) -> float:
        """Share of the quantized weights that are frozen."""
        return sum(int(seen.frozen.sum()) for seen in self._seen) / sum(seen.frozen.numel() for seen in self._seen)

    def finish(self) -> None:
        """Notes how many weights are frozen."""
        super().finish()
        self.facts["frozen share"] = self.frozen_share


class _Seen:
    """What the codes of a layer have done."""

    def __init__(self, layer: QuantModule, codes: Tensor) -> None:
        self.layer, self.codes = layer, codes
        self.direction = torch.zeros_like(codes, dtype=torch.int8)  # of the last change
        self.frequency = torch.zeros_like(codes, dtype=torch.float32)
        self.mean = codes.float()
        self.frozen = torch.zeros_like(codes, dtype=torch.bool)

    @classmethod
    def of(cls, layer: QuantModule) -> _Seen:
        return cls(layer, layer.codes())

    def step(self, momentum: float, threshold: float) -> None:
        layer, now = self.layer, self.layer.codes()
        change = (now.to(torch.int16) - self.codes.to(torch.int16)).sign_().to(torch.int8)
        self.frequency.lerp_((change * self.direction == -1).float(), momentum)
        self.mean.lerp_(now.float(), momentum)
        torch.where(change != 0, change, self.direction, out=self.direction)
        fresh = (self.frequency > threshold) & ~self.frozen
        self.frozen |= fresh
        self.codes = torch.where(fresh, self.mean.round().to(now.dtype), torch.where(self.frozen, self.codes, now))
        scale, zero_point = layer.scale_and_zero_point()
        groups = self.codes.reshape(scale.numel(), -1).float()
        level = groups + layer.grid.offset if zero_point is None else groups - zero_point.reshape(-1, 1)
        held = (level * scale.reshape(-1, 1)).view(now.shape)
        layer.parameter().copy_(layer.restored(torch.where(self.frozen, held, layer.matrix())))


class Chosen(Lever):
    """Draws each code from the two beside its weight: the nearer, the likelier; less and less by chance.

    To the weight, in steps, logistic noise times a temperature is added before it is rounded. The difference of two
    Gumbel variables is logistic, so that is the hard sample of a Gumbel-softmax over two neighbouring codes whose
    logits are the distance from the edge between them over the temperature. Gradients are straight-through, and the
    scale's is that of the weight without its noise.

    Source: the idea of GSQ (2604.18556), of which only the abstract was at hand: codes and scales learned jointly
    through a Gumbel-softmax over the grid. Here the master weight stands for the logits, and end to end.
    """

    temperature = 0.05
    """Of the first step, in steps of the grid; it falls to 0 evenly, and is 0 over the last fifth."""

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Runs forward and backward on drawn codes."""
        left = max(1 - self.progress / 0.8, 0.0)
        with drawn(self.layers if left else [], self.temperature * left):
            return super().training_step(*args, **options)


@contextmanager
def drawn(layers: Sequence[QuantModule], temperature: float) -> Iterator[None]:
    """Inside, forwards round the weights of `layers` with logistic noise of `temperature` steps."""

    def matrix(layer: QuantModule) -> Tensor:
        plain = type(layer).matrix(layer)
        scale = layer.scale_and_zero_point()[0]
        noise = (
            torch.empty(scale.numel(), plain.numel() // scale.numel(), device=plain.device)
            .uniform_(1e-6, 1 - 1e-6)
            .logit_()
        )
        return plain + (noise.mul_(temperature) * scale.reshape(-1, 1)).view(plain.shape)

    try:
        for layer in layers:
            layer.matrix = partial(matrix, layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("matrix", None)


class ScalesLast(Lever):
    """Ends with a phase in which weights stand still, and scales, norms and biases have a schedule of their own.

    Source: EfficientQAT (2407.11062) section 3.3, its end-to-end phase.
    """

    share = 0.25
    """Of the steps, those of the second phase."""

    @property
    def first(self) -> int:
        """Steps of the first phase."""
        return round(self.args.max_steps * (1 - self.share))

    def _parameter_groups(self, model: nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
        kinds = {id(parameter): group_of(name, parameter) for name, parameter in model.named_parameters()}
        groups = super()._parameter_groups(model, rate, decay)
        return [{**group, "kind": kinds[id(group["params"][0])]} for group in groups]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Returns a cosine with the warm-up asked for, and for all but weights another after it."""
        optimizer = optimizer or self.optimizer
        first, warmup = self.first, int(self.args.warmup_steps)

        def share(step: int, kind: str) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if step < first:
                return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(first - warmup, 1)))
            rest = max(num_training_steps - first, 1)
            return 0.0 if kind == "weights" else 0.5 * (1 + math.cos(math.pi * (step - first) / rest))

        kinds = [group["kind"] for group in optimizer.param_groups]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [partial(share, kind=kind) for kind in kinds])
        return self.lr_scheduler

    def after_step(self) -> None:
        """Ends the first phase."""
        super().after_step()
        if self.state.global_step == self.first:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and group_of(name, parameter) == "weights":
                    parameter.requires_grad_(False)
                    parameter.grad = None


# Optimizers


class SharedAdam(torch.optim.Optimizer):
    """AdamW whose second moment may be one number for many entries, and whose steps may be multiplied.

    Groups may give `multiplied`: parameter's id -> a factor of each group of its entries, [N, 1].
    Source: Adam (1412.6980), AdamW (1711.05101); one second moment a row or a tensor, as in Adam-mini (2406.16793).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        shared: str = "entry",
        multipliers: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Takes parameter groups with `lr` and `weight_decay`.

        Args:
            groups: of matrices and vectors.
            betas: of both moments.
            eps: added to the root of the second.
            shared: the second moment is of each "entry", or of a matrix of each "row" or of the whole "tensor".
            multipliers: parameter's id -> a factor of each group of its entries, [N, 1]; 1 where it is not there.
        """
        if shared not in ("entry", "row", "tensor"):
            raise ValueError(f"shared={shared!r}; choose entry, row or tensor")
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.shared, self.multipliers = shared, multipliers or {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if group["weight_decay"]:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    self.move(parameter, parameter.grad, group)

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Moves one parameter."""
        state, (first, second) = self.state[parameter], group["betas"]
        square = gradient.square()
        if parameter.dim() > 1 and self.shared != "entry":
            square = square.mean(-1, keepdim=True) if self.shared == "row" else square.mean().reshape(1, 1)
        if not state:
            state |= {"steps": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(square)}
        state["steps"] += 1
        mean = state["mean"].lerp_(gradient, 1 - first)
        moment = state["square"].lerp_(square, 1 - second)
        size = (moment / (1 - second ** state["steps"])).sqrt_().add_(group["eps"])
        update = mean / size
        if (factor := self.multipliers.get(id(parameter))) is not None:
            update.view(factor.shape[0], -1).mul_(factor)
        parameter.add_(update, alpha=-group["lr"] / (1 - first ** state["steps"]))


class Muon(SharedAdam):
    """Steps of matrices are their momentum, orthogonalized; all others are Adam's.

    Source: Muon (Jordan 2024): Nesterov momentum, five Newton-Schulz iterations in bfloat16 with the published
    coefficients; the factor 0.2 sqrt(max(O, I)), which gives steps of Adam's size, of Moonshot (2502.16982) equation 4.
    """

    def __init__(self, *args: Any, matrices: set[int], momentum: float, **options: Any) -> None:
        """Takes what SharedAdam takes, the ids of the matrices, and their momentum."""
        super().__init__(*args, **options)
        self.matrices, self.momentum = matrices, momentum

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Moves one parameter."""
        if id(parameter) not in self.matrices:
            return super().move(parameter, gradient, group)
        state = self.state[parameter]
        if not state:
            state["held"] = torch.zeros_like(gradient)
        held = state["held"].mul_(self.momentum).add_(gradient)
        update = orthogonalized(gradient.add(held, alpha=self.momentum))
        parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))
        return None


def orthogonalized(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Returns about U V^T of matrix [O, I] = U S V^T, its singular values between 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.mT
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x if wide else x.mT).to(matrix.dtype)


class OwnOptimizer(Lever):
    """A training with an optimizer of this file."""

    shared = "entry"
    """Of SharedAdam."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns the optimizer over QATTrainer's groups."""
        if self.optimizer is None:
            groups = self._parameter_groups(model or self.model, self.args.learning_rate, self.args.weight_decay)
            self.optimizer = self.optimizer_of(groups, (self.args.adam_beta1, self.args.adam_beta2))
        return self.optimizer

    def optimizer_of(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
        """Returns the optimizer of parameter groups."""
        return SharedAdam(groups, betas=betas, eps=self.args.adam_epsilon, shared=self.shared)


class StepSized(OwnOptimizer):
    """Adam whose steps of quantized weights are in steps of their group: the learning rate times |scale| over its mean.

    A group of large scale then crosses as many codes as one of small scale.
    """

    @torch.no_grad()
    def optimizer_of(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
        """Returns Adam with the scales as factors; their mean over all weights is 1."""
        sizes = {id(layer.parameter()): layer.scale_and_zero_point()[0].abs().reshape(-1, 1) for layer in self.layers}
        counts = {id(layer.parameter()): layer.rows * layer.columns for layer in self.layers}
        mean = sum(float(size.mean()) * counts[key] for key, size in sizes.items()) / sum(counts.values())
        factors = {key: size / mean for key, size in sizes.items()}
        return SharedAdam(groups, betas=betas, eps=self.args.adam_epsilon, multipliers=factors)


class Orthogonal(OwnOptimizer):
    """Muon for quantized matrices, Adam for all else."""

    momentum = 0.95
    """Of Muon."""

    def optimizer_of(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
        """Returns Muon."""
        matrices = {id(layer.parameter()) for layer in self.layers if layer.parameter().dim() == 2}
        eps = self.args.adam_epsilon
        return Muon(groups, betas=betas, eps=eps, matrices=matrices, momentum=self.momentum)


# Losses


class Mixed(Lever):
    """KL in both directions: (1 - r) KL(teacher || student) + r KL(student || teacher).

    Over the teacher's kept tokens and one bucket for the rest, as all trainings from a teacher's cache.
    """

    reverse: float | None = 0.5
    """r; None: the mean probability that the teacher gives the next token of the text (CAKLD, BitDistiller 2402.10631
    section 3.2), so that the surer it is, the more the student keeps to what it finds likely."""

    def before_training(self) -> None:
        """Settles r."""
        super().before_training()
        if not isinstance(self.teacher, TeacherCache):
            raise ValueError("Mixed trains from a teacher's cache alone; give one")
        self._reverse = self.confidence() if self.reverse is None else self.reverse
        self.facts["reverse"] = self._reverse

    def confidence(self) -> float:
        """Returns the mean probability that the teacher gives the next token; 0 where it is none of the kept."""
        found = []
        for sample in self.train_dataset:
            inputs = self.data_collator([sample])
            top = self.teacher.lookup(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids"))
            labels = scored_labels(inputs)[:, 1:].flatten()
            known = (top.log_probs.exp() * (top.indices == labels.unsqueeze(-1))).sum(-1)
            found.append(known[labels != IGNORED_LABEL])
        return float(torch.cat(found).mean())

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        """Returns the loss of QATTrainer with the other divergence in it."""
        with mock.patch.object(metrics, "_bucketed_kl_", partial(mixed_kl_, metrics._bucketed_kl_, self._reverse)):
            return super().compute_loss(*args, **options)


_LEAST = -20.0
"""Log-probability of the teacher below which none is looked at: a reverse KL from what it rules out is infinite."""


def mixed_kl_(
    forward: Callable[..., tuple[Tensor, Tensor]],
    reverse: float,
    log_probs: Tensor,
    top: TopProbabilities,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns what metrics._bucketed_kl_ does, of the mixed divergence.

    With q, Q the student's masses of the kept tokens and of the rest, p, P the teacher's, the reverse KL is
    R = sum q log(q / p) + Q log(Q / P). Its gradient is q (log(q / p) - R) at kept tokens, q (log(Q / P) - R) at
    others.

    Args:
        forward: metrics._bucketed_kl_.
        reverse: share of the reverse KL.
        log_probs: the student's, [T, V]; overwritten.
        top: the teacher's kept tokens.
        weights: of KL and cross-entropy, [T, 2].
    """
    probs, own = log_probs.exp(), log_probs.gather(-1, top.indices)
    shares = torch.stack((weights[:, 0] * (1 - reverse), weights[:, 1]), -1)
    divergence, gradient = forward(log_probs, top, shares)
    mass = own.exp()
    rest = probs.scatter(-1, top.indices, 0.0).sum(-1).clamp_(min=torch.finfo(torch.float32).tiny)
    ratio, rest_ratio = own - top.log_probs.clamp(min=_LEAST), rest.log() - top.log_rest.clamp(min=_LEAST)
    back = torch.linalg.vecdot(mass, ratio) + rest * rest_ratio
    probs.mul_((rest_ratio - back).unsqueeze(-1))
    probs.scatter_(-1, top.indices, mass * (ratio - back.unsqueeze(-1)))
    gradient.add_(probs.mul_(reverse * weights[:, :1]))
    return divergence.mul_(1 - reverse).add_(back, alpha=reverse), gradient


class Hidden(Lever):
    """Adds the error of the hidden states after three blocks to the KL.

    Each token's error is a share of the size of its state in the original, so that the few tokens of huge states count
    as all others. What the original gives is kept in memory for the blocks of the training, as the teacher's most
    likely tokens are on disk; neither counts in a step's seconds.

    Source: mlx-lm's DWQ adds hidden states of some layers to the KL.
    """

    order = 2
    """Of the norm: 1 or 2 (squared)."""
    weight = 1.0
    """Of the mean over three blocks, beside the KL in nats."""

    def before_training(self) -> None:
        """Keeps what the original gives after the blocks.

        Raises:
            ValueError: the student's residual stream is rotated.
        """
        super().before_training()
        assert self.original is not None
        original = self.original().to(self.args.device).eval()
        names = list(find_blocks(self.model))
        self._names = [names[place] for place in sorted({len(names) // 3, 2 * len(names) // 3, len(names) - 1})]
        own, other = (model.get_input_embeddings().weight for model in (self.model, original))
        if not torch.equal(own.to(other.dtype), other):
            raise ValueError("the student's embeddings are not the original's, so its hidden states cannot be")
        self._bank: dict[bytes, Tensor] = {}
        for sample in self.train_dataset:
            inputs = self._prepare_inputs(self.data_collator([sample]))
            inputs.pop("labels", None)
            with watched(original, self._names) as seen, capture_hidden(original) as captured:
                original(**inputs, use_cache=False)
                captured.take()
            self._bank[_key(inputs)] = torch.stack([seen[name][0] for name in self._names])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of QATTrainer and the error."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scored = scored_labels(inputs)[:, 1:].ne(IGNORED_LABEL)
        rows = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(len(scored))]
        wanted = torch.stack([self._bank[_key(row)] for row in rows], 1)  # [3, B, L, D]
        with watched(self.accelerator.unwrap_model(model), self._names) as seen:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        errors = [self._error(seen[name], wanted[place])[:, :-1] for place, name in enumerate(self._names)]
        total = scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return loss + self.weight * (torch.stack(errors).mean(0) * scored).sum() / total

    def _error(self, states: Tensor, wanted: Tensor) -> Tensor:
        """Returns the error [B, L] of states [B, L, D] as a share of what is wanted."""
        apart, size = states.float() - wanted.float(), wanted.float()
        if self.order == 1:
            return apart.abs().sum(-1) / size.abs().sum(-1).clamp(min=1e-6)
        return apart.square().sum(-1) / size.square().sum(-1).clamp(min=1e-6)


def _key(inputs: Mapping[str, Tensor]) -> bytes:
    positions = inputs.get("position_ids")
    return block_key(inputs["input_ids"][0].cpu(), None if positions is None else positions[0].cpu())


@contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yields the hidden states [B, L, D] that the blocks called `names` give in a forward inside."""
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, inputs: Any, output: Any, name: str) -> None:
        seen[name] = hidden_of(output)

    handles = [model.get_submodule(name).register_forward_hook(partial(note, name=name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# Calibration


@contextmanager
def feature_order() -> Iterator[None]:
    """Inside, GPTQ rounds input features in the order they lie, not from the largest mean square to the least."""

    def of(hessian: Tensor) -> Curvature:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        order = torch.arange(len(hessian), device=hessian.device)
        return Curvature(hessian, order, torch.linalg.cholesky(inverse, upper=True))

    with mock.patch.object(Curvature, "of", staticmethod(of)):
        yield


@contextmanager
def rotated_heads() -> Iterator[None]:
    """Inside, the stage rotate also rotates what each head writes (R2 of SpinQuant, 2405.16406 section 3.1)."""

    def both(model: nn.Module, seed: int = 0) -> None:
        rotate(model, seed)
        rotate_heads(model, seed)

    with mock.patch.object(stages, "rotate", both):
        yield


@torch.no_grad()
def rotate_heads(model: nn.Module, seed: int) -> None:
    """Rotates values and the inputs of o_proj of a full-precision `model`, head by head, in place.

    Raises:
        ValueError: there is no attention of Llama's form.
    """
    found = [module for module in model.modules() if hasattr(module, "v_proj") and hasattr(module, "o_proj")]
    if not found:
        raise ValueError("rotate_heads looks for v_proj and o_proj, which this model has not")
    with unchanged_logits(model, "rotation of heads"):
        for attention in found:
            size = attention.head_dim
            turn = hadamard(size, seed + 1).to(attention.v_proj.weight.device)
            weight, out = attention.v_proj.weight, attention.o_proj.weight
            weight.copy_((turn.mT @ weight.double().unflatten(0, (-1, size))).flatten(0, 1))
            out.copy_((out.double().unflatten(1, (-1, size)) @ turn).flatten(1))
            if (bias := attention.v_proj.bias) is not None:
                bias.copy_((bias.double().unflatten(0, (-1, size)) @ turn).flatten())


class WindowsStage(CustomStage):
    """Trains two transformer blocks at a time to give what they gave in full precision; windows overlap by one.

    Source: CBQ (2312.07950) section 3.2, its cross-block reconstruction. Deviation: all weights, scales and norms are
    trained, as in the stage blockwise, in place of low-rank rounding; the error is the squared one alone.
    """

    stage: Literal["windows"] = "windows"
    """This stage's name, which no recipe knows."""
    iterations: int = Field(10, ge=1)
    """Of `batch_size` token blocks for each window; but for the ends each block is in two."""
    scale_learning_rate: float = Field(5e-3, ge=0)
    """Of log-scales."""


def _windows(run: Any, stage: WindowsStage, place: Path) -> tuple[float, dict[str, Any]]:
    """Does the stage, or takes what it left in `place`."""
    file = place / stages.STATE_FILE
    if file.is_file():
        run.model.load_state_dict(load_file(file), strict=False)
        return 0.0, {}
    originals, facts = Originals(run.folder / stages.ORIGINALS_FILE), {}
    rows: Rows | Tensor = run.text(stage)
    is_large = (
        sum(layer.weight.numel() for layer in run.model.modules() if isinstance(layer, QuantModule)) >= FUSING_PAYS
    )
    with (
        open_walk(run.model, rows, stage.batch_size, dtype=run.dtype) as walk,
        fusing() if is_large else nullcontext(),
    ):
        full, inputs, blocks = walk.full, walk.quantized, walk.blocks
        if not isinstance(inputs, RecordedChain):
            raise ValueError("windows wants a model whose blocks get the same beside hidden states, as Llama's do")
        _run_original(blocks[0], originals, full)
        for first, second in pairwise(blocks):
            _run_original(second, originals, full)
            facts[f"{first.name} and the next"] = _train_window((first, second), inputs, full, stage, run.seed)
            first.run(inputs, inputs)
        held = {f"{one.name}.{name}": value for one in blocks for name, value in one.module.state_dict().items()}
    save_whole(file, held)
    return 0.0, facts


def _run_original(block: Block, originals: Originals, chain: Any) -> None:
    with originals.in_place(block):
        block.run_full(chain, chain)


def _train_window(
    pair: tuple[Block, Block], inputs: RecordedChain, targets: Any, stage: WindowsStage, seed: int
) -> dict[str, float]:
    """Trains two blocks in place; returns their relative error before and after, on the last token blocks."""
    named = [item for block in pair for item in block.own_parameters().items()]
    trained = [parameter.requires_grad for _, parameter in named]
    bits = {id(layer.weight): layer.weights.num_bits for block in pair for layer in block.quantized().values()}
    groups = [
        {
            "params": [parameter],
            "lr": stage.scale_learning_rate
            if name.endswith("log_scale")
            else learning_rate(bits.get(id(parameter), 8)),
        }
        for name, parameter in named
    ]
    for _, parameter in named:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + pair[0].index)
    size = min(stage.batch_size, len(inputs))
    last = torch.arange(len(inputs) - size, len(inputs))

    def error(rows: Tensor) -> Tensor:
        hidden = pair[0](inputs, rows)
        args, options = inputs.calls[pair[1].index].call(hidden, rows)
        return relative_error(hidden_of(pair[1].module.forward(*args, **options)), targets[rows])

    @torch.no_grad()
    def checked() -> float:
        with pair[0].cast(), pair[1].cast():
            return float(error(last))

    before, begun = checked(), [parameter.detach().clone() for _, parameter in named]
    order = torch.empty(0, dtype=torch.long)
    for done in range(stage.iterations):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
        rows, order = order[:size], order[size:]
        share = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done / stage.iterations))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        with pair[0].cast(), pair[1].cast():
            error(rows).backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = checked()
    for (_, parameter), own, was in zip(named, begun, trained, strict=True):
        if not after < before:
            parameter.data.copy_(own)
        parameter.requires_grad_(was)
    return {"before": before, "after": after if after < before else before}


stages._DO[WindowsStage] = _windows

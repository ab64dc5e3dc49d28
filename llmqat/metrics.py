"""Token losses and divergences between a model and its reference, chunked over tokens.

A language model's logits are its largest tensor by far: 2,048 tokens of a 49,152-word vocabulary are 400 MB in float32.
Everything here therefore starts from the final hidden states [T, D] and the output head [V, D], makes the logits of a
few hundred tokens at a time, takes from them what is asked for, and lets them go. Training and evaluation share this
file, so that the divergence a run minimises is the one its table reports.

Shapes: T tokens, S scored tokens (those with a label), D hidden size, V vocabulary, B rows of text, K most likely
tokens of a cached teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmqat.grid.fused_divergence import fused_divergence
from llmqat.kernels import weights_let_go
from llmqat.models import capture_hidden, head_weight, logit_transform, model_device, uploaded

LogitTransform = Callable[[Tensor], Tensor]
"""What a model does to its logits after the head (soft-capping, scaling); same shape in and out."""

IGNORED_LABEL = -100
_CACHED_ROWS = 16


MOST_DIFFERENCE = 0.05
"""Of logits that are computed from hidden states, relative to the model's own: rounding in bfloat16, and no more."""
_IS_CHECKED = "_llmqat_logits_are_checked"


@dataclass(frozen=True)
class Predictor:
    """What turns final hidden states into logits: an output head and what the model does after it."""

    head: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    transform: LogitTransform | None = None  # soft-capping, scaling

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits [T, V] of hidden states [T, D], in the head's dtype, as the deployed model makes them."""
        logits = F.linear(hidden.to(self.head.dtype), self.head, self.bias)
        return logits if self.transform is None else self.transform(logits)

    def detached(self) -> Predictor:
        """Returns the same without gradients."""
        return Predictor(self.head.detach(), None if self.bias is None else self.bias.detach(), self.transform)


def predictor_of(model: nn.Module) -> Predictor:
    """Returns the predictor of a causal language model, its head as the forward computes with it."""
    head, bias = head_weight(model)
    return Predictor(head, bias, logit_transform(getattr(model, "config", None)))


@torch.no_grad()
def check_predictor(model: nn.Module) -> None:
    """Raises ValueError where `predictor_of` does not give the logits of `model` itself; tried once, on a few tokens.

    Perplexity, KL and the loss of distillation would be those of another model.
    """
    if model.__dict__.get(_IS_CHECKED) or any(p.is_meta for p in model.parameters()):
        return
    training, ids = model.training, torch.arange(1, 5, device=model_device(model))[None]
    model.eval()
    try:
        with torch.no_grad(), weights_let_go(model):
            wanted = model(input_ids=ids, use_cache=False).logits[0].float()
            with capture_hidden(model) as captured:
                model(input_ids=ids, use_cache=False)
                found = predictor_of(model).logits(captured.take()[0]).float()
    finally:
        model.train(training)
    if not bool(torch.isfinite(wanted).all()):
        return  # which others name
    if found.shape != wanted.shape or not float((found - wanted).norm()) <= MOST_DIFFERENCE * float(wanted.norm()):
        raise ValueError(
            f"{type(model).__name__} computes its logits from the output head in a way that llmqat does not know, so "
            "perplexity, KL and distillation would be wrong; `llmqat quantize --method rtn` needs none of them"
        )
    model.__dict__[_IS_CHECKED] = True


@dataclass(frozen=True)
class TokenScores:
    """What was measured at each scored token, in order: float32 [S] on the CPU.

    All but `nll` are None without a reference.
    """

    nll: Tensor  # negative log-likelihood of the label, nats
    kl: Tensor | None = None  # KL(reference || model), nats
    reverse_kl: Tensor | None = None  # KL(model || reference), nats
    top1: Tensor | None = None  # 1 where model and reference rank the same token first, else 0
    top5: Tensor | None = None  # share of the reference's five most probable tokens among the model's five

    def sum(self, name: str) -> float | None:
        """Returns the sum of the field `name`, taken in float64; None where it was not measured."""
        values: Tensor | None = getattr(self, name)
        return None if values is None else float(values.sum(dtype=torch.float64))

    @staticmethod
    def joined(parts: Sequence[TokenScores]) -> TokenScores:
        """Returns the scores of all `parts`, in order; all or none were taken against a reference."""
        measured = [field.name for field in fields(TokenScores) if getattr(parts[0], field.name) is not None]
        return TokenScores(**{name: torch.cat([getattr(part, name) for part in parts]) for name in measured})


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    model: Predictor,
    labels: Tensor,
    reference_hidden: Tensor | None = None,
    reference: Predictor | None = None,
    chunk_tokens: int = 512,
) -> TokenScores:
    """Returns likelihood, divergence from the reference in both directions, and agreement, of each labelled token.

    The logits are those of the deployed model: made and transformed in the dtype of its head, and widened to float32
    only for the log-softmax.

    Args:
        hidden: [T, D], the input of the model's head at the position that predicts the label.
        model: the model's head.
        labels: int64 [T], the next token; -100 is not scored. On the CPU they spare a GPU a wait.
        reference_hidden: [T, D'], of the reference model at the same positions.
        reference: the reference model's head.
        chunk_tokens: tokens whose logits (in the head's dtype) exist at once.

    Raises:
        ValueError: if only half of the reference is given, or the vocabularies differ.
    """
    found = _scores_of_labelled(hidden, model, labels, reference_hidden, reference, chunk_tokens).cpu()
    return TokenScores(*found[: 1 if reference is None else 5])


@torch.no_grad()
def token_nll(hidden: Tensor, model: Predictor, labels: Tensor, chunk_tokens: int = 512) -> Tensor:
    """Returns the negative log-likelihood of each labelled token in nats, float32 [S], on the device of `hidden`.

    Arguments are those of `token_scores`.
    """
    return _scores_of_labelled(hidden, model, labels, None, None, chunk_tokens)[0]


def _scores_of_labelled(
    hidden: Tensor,
    model: Predictor,
    labels: Tensor,
    reference_hidden: Tensor | None,
    reference: Predictor | None,
    chunk_tokens: int,
) -> Tensor:
    """Returns the fields of `TokenScores` as [5, S] on the device of `hidden`; without a reference only the first."""
    if (reference_hidden is None) != (reference is None):
        raise ValueError("reference_hidden and reference go together; give both or neither")
    if reference is not None and reference.head.shape[0] != model.head.shape[0]:
        raise ValueError(
            f"the model has a vocabulary of {model.head.shape[0]} and its reference one of {reference.head.shape[0]}; "
            "a divergence needs models that share a vocabulary"
        )
    scored = labels.ne(IGNORED_LABEL).nonzero().squeeze(-1)  # which waits for a GPU if the labels are there
    scored, labels = (uploaded(part, hidden.device) for part in (scored, labels))
    parts = [torch.zeros(5, 0, device=hidden.device)]
    for rows in scored.split(chunk_tokens):
        targets = None
        if reference is not None and reference_hidden is not None:
            targets = reference.logits(reference_hidden[rows])
        parts.append(_logit_scores(model.logits(hidden[rows]), labels[rows], targets))
    return torch.cat(parts, -1)


def _logit_scores(logits: Tensor, labels: Tensor, reference_logits: Tensor | None) -> Tensor:
    """Returns the scores [5, T] of logits [T, V] in any dtype, in blocks of rows that stay in a core's cache."""
    found = torch.zeros(5, logits.shape[0], device=logits.device)
    for rows in _row_blocks(logits):
        wide = logits[rows].float()
        log_probs = F.log_softmax(wide, dim=-1)
        found[0, rows] = -log_probs.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
        if reference_logits is None:
            continue
        reference_wide = reference_logits[rows].float()
        found[3, rows] = _argmax(wide).eq(_argmax(reference_wide)).float()
        found[4, rows] = _shared(_largest(wide, 5)[1], _largest(reference_wide, 5)[1])
        reference = F.log_softmax(reference_wide, dim=-1)
        probs = reference.exp()
        difference = reference.sub_(log_probs)
        found[1, rows] = torch.linalg.vecdot(probs, difference)
        found[2, rows] = -torch.linalg.vecdot(log_probs.exp_(), difference)
    return found


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns `values.topk(count)` of values [T, V] in half the time on a CPU; ties may be resolved differently.

    The columns are divided into parts; the largest values lie in the parts with the largest maxima. A part has every
    n-th column, so that the maxima are taken over neighboring memory. Fewer parts are larger, and more has to be read
    inside them: the number of parts balances the two costs.
    """
    width = values.shape[-1]
    deep = 1 << max(round(math.log2(width / count) / 2), 0)  # columns in a part
    if values.device.type != "cpu" or width % deep or width // deep < count:
        largest, indices = values.topk(min(count, width))
        return largest, indices
    parts = values.unflatten(-1, (deep, -1))
    winners = parts.amax(1).topk(count, sorted=False).indices
    inside = parts.gather(2, winners.unsqueeze(1).expand(-1, deep, -1)).flatten(1)
    largest, places = inside.topk(count)
    return largest, places // count * (width // deep) + winners.gather(1, places % count)


def _shared(left: Tensor, right: Tensor) -> Tensor:
    """Returns the share [T] of the entries of `right` [T, K] that are in `left` [T, K]."""
    return (right.unsqueeze(-1) == left.unsqueeze(-2)).any(-1).float().mean(-1)


def _argmax(logits: Tensor, block: int = 64) -> Tensor:
    """Returns `logits.argmax(-1)` [T], the first of equals, five times faster on a CPU.

    `amax` is vectorized there and `argmax` is not: find the block that holds the maximum, then look inside it.
    """
    if logits.shape[-1] % block:
        return logits.argmax(-1)
    blocks = logits.unflatten(-1, (-1, block))
    winner = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(len(blocks), device=logits.device), winner].argmax(-1)
    return winner * block + inside


@dataclass(frozen=True)
class Teacher:
    """What a student is to predict: the distributions of another model at the same positions."""

    hidden: Tensor  # [T, D']
    predictor: Predictor


@dataclass(frozen=True)
class TopProbabilities:
    """What a teacher predicts, as its k most likely tokens and one bucket for the rest; the masses sum to one.

    While text is generated the shapes are [B, T, K] and [B, T], and the dtypes those of `empty`.
    """

    indices: Tensor  # int64 [T, K]
    log_probs: Tensor  # float32 [T, K], of these tokens
    log_rest: Tensor  # float32 [T], of all others together; -inf where there is none

    def __getitem__(self, rows: slice) -> TopProbabilities:
        """Returns those of some tokens."""
        return TopProbabilities(self.indices[rows], self.log_probs[rows], self.log_rest[rows])

    def of_row(self, row: int) -> TopProbabilities:
        """Returns those of one row, [T, K], where this is [B, T, K]."""
        return TopProbabilities(self.indices[row], self.log_probs[row], self.log_rest[row])

    def to(self, device: torch.device) -> TopProbabilities:
        """Returns the same on a device."""
        return TopProbabilities(*(uploaded(getattr(self, f.name), device) for f in fields(TopProbabilities)))

    @staticmethod
    def empty(positions: tuple[int, ...], top_k: int, device: torch.device) -> TopProbabilities:
        """Returns room on a device for those of many positions, in half the bits: int32 and float16."""
        indices = torch.empty(*positions, top_k, dtype=torch.int32, device=device)
        log_probs = torch.empty(*positions, top_k, dtype=torch.float16, device=device)
        return TopProbabilities(indices, log_probs, torch.empty(positions, dtype=torch.float16, device=device))

    def put(self, column: int, top: TopProbabilities) -> None:
        """Writes those of one position of all rows, [B, K], where this is [B, T, K]."""
        self.indices[:, column] = top.indices
        self.log_probs[:, column] = top.log_probs
        self.log_rest[:, column] = top.log_rest

    @staticmethod
    def joined(parts: Sequence[TopProbabilities]) -> TopProbabilities:
        """Returns those of all `parts`, in order."""
        return TopProbabilities(
            *(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TopProbabilities))
        )


@torch.no_grad()
def top_probabilities(logits: Tensor, top_k: int) -> TopProbabilities:
    """Returns the `top_k` most likely tokens of logits [T, V] in any dtype, most likely first, and the rest's mass.

    Raises:
        ValueError: if the vocabulary has fewer tokens.
    """
    if not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k={top_k} of a vocabulary of {logits.shape[-1]} tokens; choose 1 to {logits.shape[-1]}")
    indices = torch.empty(len(logits), top_k, dtype=torch.int64, device=logits.device)
    found = torch.empty(len(logits), top_k, device=logits.device)
    rest = torch.empty(len(logits), device=logits.device)
    for rows in _row_blocks(logits):
        log_probs = F.log_softmax(logits[rows].float(), -1)
        found[rows], indices[rows] = _largest(log_probs, top_k)
        rest[rows] = log_probs.exp_().scatter_(-1, indices[rows], 0.0).sum(-1).log_()
    return TopProbabilities(indices, found, rest)


def top_of_(probs: Tensor, top_k: int) -> TopProbabilities:
    """Returns what `top_probabilities` does, of probabilities [T, V] in float32, few rows; they are overwritten."""
    found, indices = _largest(probs, top_k)
    rest = probs.scatter_(-1, indices, 0.0).sum(-1)
    return TopProbabilities(indices, found.clamp_(min=torch.finfo(torch.float32).tiny).log_(), rest.log_())


def token_loss(
    student_hidden: Tensor,
    student: Predictor,
    token_weights: Tensor,
    teacher: Teacher | TopProbabilities | None = None,
    labels: Tensor | None = None,
    *,
    kl_weight: float = 1.0,
    cross_entropy_weight: float = 1.0,
    chunk_tokens: int = 512,
) -> Tensor:
    """Returns sum_t weight_t * (a KL(teacher_t || student_t) - b log student_t[label_t]) in nats, with gradients.

    Each term is there when what it needs is given: the forward KL with a teacher, the cross-entropy with labels.

    A teacher known by its most likely tokens alone is compared on these and one bucket: sum over the K tokens of
    p log(p / q), and the same of the mass of all others, the student's being one less its own of those tokens. That is
    a lower bound of the exact KL, and all that it leaves out is how the rest is spread.

    The gradient is made in the forward pass, chunk by chunk, while the logits are there: they are never stored, and
    the vocabulary product is not repeated in the backward pass.

    Args:
        student_hidden: [T, D], the input of the student's head.
        student: the student's head; its weight and bias receive gradients if they require them.
        token_weights: [T] float; mask over tokens divided by the number of tokens of the optimizer step.
        teacher: no gradients.
        labels: int64 [T], the next token; where the weight is 0, any token id or a negative number.
        kl_weight: a.
        cross_entropy_weight: b.
        chunk_tokens: tokens whose logits (in the head's dtype) exist at once.

    Raises:
        ValueError: if the vocabularies differ, or there is neither a teacher nor labels. That TopProbabilities are of
            the student's vocabulary is for the caller to see to.

    Source: Hinton et al. 1503.02531, temperature 1; LLM-QAT (2305.17888) section 3.2 with soft labels only.
    """
    if teacher is None and labels is None:
        raise ValueError("a loss needs a teacher, labels, or both")
    if isinstance(teacher, Teacher) and student.head.shape[0] != teacher.predictor.head.shape[0]:
        raise ValueError(
            f"the student has a vocabulary of {student.head.shape[0]} and the teacher one of "
            f"{teacher.predictor.head.shape[0]}; distillation needs a teacher with the student's vocabulary"
        )
    shares = 0.0 if teacher is None else kl_weight, 0.0 if labels is None else cross_entropy_weight
    weights = torch.stack([token_weights.float() * share for share in shares], -1)
    if not torch.is_grad_enabled():
        student = student.detached()  # no product is made for a gradient that nobody takes
    loss: Tensor = _TokenLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden, student.head, student.bias, student.transform, weights, teacher, labels, chunk_tokens
    )
    return loss


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        transform: LogitTransform | None,
        weights: Tensor,
        teacher: Teacher | TopProbabilities | None,
        labels: Tensor | None,
        chunk_tokens: int,
    ) -> Tensor:
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden, dtype=head.dtype) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            states = hidden[rows].to(head.dtype)
            logits = F.linear(states, head, bias)
            targets = _targets(teacher, rows)
            wanted = None if labels is None else labels[rows]
            # From here on `logits` holds its own gradient.
            total += _loss_and_gradient_(logits, transform, weights[rows], targets, wanted)
            if grad_hidden is not None:
                grad_hidden[rows] = logits @ head
            if grad_head is not None:
                grad_head += logits.t() @ states
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_head, grad_bias)
        ctx.dtypes = hidden.dtype, head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head, grad_bias = ctx.saved_tensors
        hidden_dtype, head_dtype = ctx.dtypes
        scaled = None if grad_hidden is None else (grad_hidden * grads[0]).to(hidden_dtype)
        head = None if grad_head is None else (grad_head * grads[0]).to(head_dtype)
        bias = None if grad_bias is None else (grad_bias * grads[0]).to(head_dtype)
        return scaled, head, bias, None, None, None, None, None


def _targets(teacher: Teacher | TopProbabilities | None, rows: slice) -> Tensor | TopProbabilities | None:
    """Returns what some tokens are to predict: the teacher's logits, or its most likely tokens."""
    if isinstance(teacher, Teacher):
        return teacher.predictor.logits(teacher.hidden[rows])
    return None if teacher is None else teacher[rows]


def _loss_and_gradient_(
    logits: Tensor,
    transform: LogitTransform | None,
    weights: Tensor,
    targets: Tensor | TopProbabilities | None,
    labels: Tensor | None,
) -> Tensor:
    """Returns the loss of some tokens and overwrites `logits` [T, V] by its gradient with respect to them.

    `weights` [T, 2] are those of KL and cross-entropy; `targets` are the teacher's logits, or its most likely tokens.
    Worked in blocks of a few rows: a dozen elementwise passes over 49,152 words then stay in a core's cache, which is
    three times faster than passes over the whole chunk. On a GPU it is one kernel (grid/fused_divergence.py).
    """
    if isinstance(targets, Tensor) and labels is None and transform is None:
        fused = fused_divergence(logits)
        if fused is not None:
            divergence, gradient = fused(logits, targets, weights[:, :1])
            logits.copy_(gradient)
            return torch.dot(divergence, weights[:, 0])
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for rows in _row_blocks(logits):
        log_probs = F.log_softmax((logits[rows] if transform is None else transform(logits[rows])).float(), -1)
        wanted = None if labels is None else labels[rows].clamp(min=0).unsqueeze(-1)
        if wanted is not None:
            total -= torch.dot(log_probs.gather(-1, wanted).squeeze(-1), weights[rows, 1])
        if targets is None:
            gradient = log_probs.exp_().mul_(weights[rows, 1:])
        elif isinstance(targets, TopProbabilities):
            divergence, gradient = _bucketed_kl_(log_probs, targets[rows], weights[rows])
            total += torch.dot(divergence, weights[rows, 0])
        else:
            divergence, gradient = _kl_(log_probs, targets[rows], weights[rows], labels is not None)
            total += torch.dot(divergence, weights[rows, 0])
        if wanted is not None:
            gradient.scatter_add_(-1, wanted, -weights[rows, 1:])
        logits[rows] = gradient if transform is None else _through(transform, logits[rows], gradient)
    return total


def _row_blocks(logits: Tensor) -> list[slice]:
    """Returns slices of the rows of `logits` [T, V] that are worked on at once: few on a CPU, all elsewhere."""
    step = _CACHED_ROWS if logits.device.type == "cpu" else max(logits.shape[0], 1)
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]


def _kl_(log_probs: Tensor, teacher_logits: Tensor, weights: Tensor, supervised: bool) -> tuple[Tensor, Tensor]:
    """Returns KL(p || q) [T] and the gradient a (q - p) + b q [T, V], which takes the place of `log_probs` (log q)."""
    reference = F.log_softmax(teacher_logits.float(), -1)
    probs = reference.exp()
    divergence = torch.linalg.vecdot(probs, reference.sub_(log_probs))
    gradient = log_probs.exp_()
    if not supervised:
        return divergence, gradient.sub_(probs).mul_(weights[:, :1])
    return divergence, gradient.mul_(weights.sum(-1, keepdim=True)).sub_(probs.mul_(weights[:, :1]))


def _bucketed_kl_(log_probs: Tensor, top: TopProbabilities, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the KL [T] over the teacher's most likely tokens and the rest, and a times its gradient plus b q [T, V].

    With P and Q the masses of the rest, the gradient is q - p at the teacher's tokens, q (1 - P / Q) at all others. It
    takes the place of `log_probs` (log q).
    """
    kl_weights, all_weights = weights[:, :1], weights.sum(-1, keepdim=True)
    own = log_probs.gather(-1, top.indices)
    probs, rest = top.log_probs.exp(), top.log_rest.exp()
    gradient = log_probs.exp_()
    # Summed without the teacher's tokens rather than as one less their mass, which float32 cannot tell from 0.
    own_rest = gradient.scatter_(-1, top.indices, 0.0).sum(-1).clamp_(min=torch.finfo(torch.float32).tiny)
    divergence = torch.linalg.vecdot(probs, top.log_probs - own)
    divergence += torch.where(rest > 0, rest * (top.log_rest - own_rest.log()), 0.0)
    gradient.mul_(all_weights - kl_weights * (rest / own_rest)[:, None])
    return divergence, gradient.scatter_(-1, top.indices, all_weights * own.exp() - kl_weights * probs)


def _through(transform: LogitTransform, logits: Tensor, gradient: Tensor) -> Tensor:
    """Returns the gradient with respect to the logits before `transform`."""
    with torch.enable_grad():
        leaf = logits.detach().float().requires_grad_()
        (before,) = torch.autograd.grad(transform(leaf), leaf, gradient)
    return before

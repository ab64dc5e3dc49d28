"""Token losses and divergences between a model and its reference, chunked over tokens.

A language model's logits are its largest tensor by far: 2,048 tokens of a 49,152-word vocabulary are 400 MB in float32.
Everything here therefore starts from the final hidden states [T, D] and the output head [V, D], makes the logits of a
few hundred tokens at a time, takes from them what is asked for, and lets them go. Training and evaluation share this
file, so that the divergence a run minimises is the one its table reports.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmqat.models import head_weight, logit_transform

LogitTransform = Callable[[Tensor], Tensor]
"""What a model does to its logits after the head (soft-capping, scaling); same shape in and out."""

IGNORED_LABEL = -100
_CACHED_ROWS = 16


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


@dataclass(frozen=True)
class TokenStatistics:
    """Sums over scored tokens, so that statistics of batches add up to those of the whole text."""

    nll_sum: float  # negative log-likelihood of the labels, nats
    kl_sum: float | None  # KL(reference || model), nats; None without a reference
    top1_matches: int | None  # tokens where model and reference rank the same token first; None without a reference
    tokens: int  # tokens scored

    def __add__(self, other: TokenStatistics) -> TokenStatistics:
        """Returns the statistics of both sets of tokens together.

        Raises:
            ValueError: if only one of the two was taken against a reference.
        """
        if (self.kl_sum is None) != (other.kl_sum is None):
            raise ValueError("cannot add statistics taken with a reference to statistics taken without one")
        return TokenStatistics(
            nll_sum=self.nll_sum + other.nll_sum,
            kl_sum=None if self.kl_sum is None or other.kl_sum is None else self.kl_sum + other.kl_sum,
            top1_matches=None
            if self.top1_matches is None or other.top1_matches is None
            else self.top1_matches + other.top1_matches,
            tokens=self.tokens + other.tokens,
        )


@torch.no_grad()
def token_statistics(
    hidden: Tensor,
    model: Predictor,
    labels: Tensor,
    reference_hidden: Tensor | None = None,
    reference: Predictor | None = None,
    chunk_tokens: int = 512,
) -> TokenStatistics:
    """Returns likelihood, divergence from the reference, and top-1 agreement, summed over the labelled tokens.

    The logits are those of the deployed model: made and transformed in the dtype of its head, and widened to float32
    only for the log-softmax.

    Args:
        hidden: [T, D], the input of the model's head at the position that predicts the label.
        model: the model's head.
        labels: int64 [T], the next token; -100 is not scored.
        reference_hidden: [T, D'], of the reference model at the same positions.
        reference: the reference model's head.
        chunk_tokens: tokens whose logits (in the head's dtype) exist at once.

    Raises:
        ValueError: if only half of the reference is given, or the vocabularies differ.
    """
    if (reference_hidden is None) != (reference is None):
        raise ValueError("reference_hidden and reference go together; give both or neither")
    if reference is not None and reference.head.shape[0] != model.head.shape[0]:
        raise ValueError(
            f"the model has a vocabulary of {model.head.shape[0]} and its reference one of {reference.head.shape[0]}; "
            "a divergence needs models that share a vocabulary"
        )
    scored = labels.ne(IGNORED_LABEL).nonzero().squeeze(-1)
    total = TokenStatistics(0.0, None, None, 0) if reference is None else TokenStatistics(0.0, 0.0, 0, 0)
    for rows in scored.split(chunk_tokens):
        logits = model.logits(hidden[rows])
        if reference is None or reference_hidden is None:
            total += _logit_statistics(logits, labels[rows], None)
        else:
            total += _logit_statistics(logits, labels[rows], reference.logits(reference_hidden[rows]))
    return total


def _logit_statistics(logits: Tensor, labels: Tensor, reference_logits: Tensor | None) -> TokenStatistics:
    """Returns the statistics of logits [T, V] in any dtype; worked in blocks of rows that stay in a core's cache."""
    step = _CACHED_ROWS if logits.device.type == "cpu" else logits.shape[0]
    nll, kl, matches = 0.0, 0.0, 0
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        wide = logits[rows].float()
        log_probs = F.log_softmax(wide, dim=-1)
        nll -= float(log_probs.gather(-1, labels[rows].unsqueeze(-1)).sum(dtype=torch.float64))
        if reference_logits is None:
            continue
        reference_wide = reference_logits[rows].float()
        matches += int(_argmax(wide).eq(_argmax(reference_wide)).sum())
        reference = F.log_softmax(reference_wide, dim=-1)
        kl += float(torch.linalg.vecdot(reference.exp(), reference.sub_(log_probs)).sum(dtype=torch.float64))
    if reference_logits is None:
        return TokenStatistics(nll, None, None, labels.numel())
    return TokenStatistics(nll, kl, matches, labels.numel())


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


def forward_kl(
    student_hidden: Tensor,
    student: Predictor,
    teacher_hidden: Tensor,
    teacher: Predictor,
    token_weights: Tensor,
    chunk_tokens: int = 512,
) -> Tensor:
    """Returns sum_t weight_t * KL(teacher_t || student_t) in nats, a scalar float32 with gradients for the student.

    The gradient is made in the forward pass, chunk by chunk, while the logits are there: they are never stored, and
    the vocabulary product is not repeated in the backward pass.

    Args:
        student_hidden: [T, D], the input of the student's head.
        student: the student's head; its weight and bias receive gradients if they require them.
        teacher_hidden: [T, D'].
        teacher: the teacher's head; no gradients.
        token_weights: [T] float; mask over tokens divided by the number of tokens of the optimizer step.
        chunk_tokens: tokens whose logits (in the head's dtype) exist at once.

    Raises:
        ValueError: if the vocabularies differ.

    Source: Hinton et al. 1503.02531, temperature 1; LLM-QAT (2305.17888) section 3.2 with soft labels only.
    """
    if student.head.shape[0] != teacher.head.shape[0]:
        raise ValueError(
            f"the student has a vocabulary of {student.head.shape[0]} and the teacher one of {teacher.head.shape[0]}; "
            "distillation needs a teacher with the student's vocabulary"
        )
    loss: Tensor = _ForwardKL.apply(  # type: ignore[no-untyped-call]
        student_hidden,
        student.head,
        student.bias,
        student.transform,
        teacher_hidden,
        teacher,
        token_weights,
        chunk_tokens,
    )
    return loss


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        transform: LogitTransform | None,
        teacher_hidden: Tensor,
        teacher: Predictor,
        token_weights: Tensor,
        chunk_tokens: int,
    ) -> Tensor:
        wants_head, wants_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        grad_hidden = torch.empty_like(hidden, dtype=head.dtype)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            states = hidden[rows].to(head.dtype)
            logits = F.linear(states, head, bias)
            targets = F.linear(teacher_hidden[rows].to(teacher.head.dtype), teacher.head, teacher.bias)
            # From here on `logits` holds its own gradient.
            total += _kl_and_gradient_(logits, transform, targets, teacher.transform, token_weights[rows])
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
        scaled = (grad_hidden * grads[0]).to(hidden_dtype)
        head = None if grad_head is None else (grad_head * grads[0]).to(head_dtype)
        bias = None if grad_bias is None else (grad_bias * grads[0]).to(head_dtype)
        return scaled, head, bias, None, None, None, None, None


def _kl_and_gradient_(
    logits: Tensor,
    transform: LogitTransform | None,
    teacher_logits: Tensor,
    teacher_transform: LogitTransform | None,
    token_weights: Tensor,
) -> Tensor:
    """Returns sum_t weight_t * KL_t and overwrites `logits` [T, V] by the loss's gradient with respect to them.

    Worked in blocks of a few rows: a dozen elementwise passes over 49,152 words then stay in a core's cache, which is
    three times faster than passes over the whole chunk.
    """
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    step = _CACHED_ROWS if logits.device.type == "cpu" else logits.shape[0]
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        weights = token_weights[rows].float().unsqueeze(-1)
        targets = teacher_logits[rows]
        reference = F.log_softmax((targets if teacher_transform is None else teacher_transform(targets)).float(), -1)
        log_probs = F.log_softmax((logits[rows] if transform is None else transform(logits[rows])).float(), -1)
        probs = reference.exp()
        kl = torch.linalg.vecdot(probs, reference.sub_(log_probs))
        total += torch.dot(kl, weights.squeeze(-1))
        gradient = log_probs.exp_().sub_(probs).mul_(weights)
        logits[rows] = gradient if transform is None else _through(transform, logits[rows], gradient)
    return total


def _through(transform: LogitTransform, logits: Tensor, gradient: Tensor) -> Tensor:
    """Returns the gradient with respect to the logits before `transform`."""
    with torch.enable_grad():
        leaf = logits.detach().float().requires_grad_()
        (before,) = torch.autograd.grad(transform(leaf), leaf, gradient)
    return before

"""Chunked statistics and the chunked loss against plain full-logit computation."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from llmqat.grid import fused_divergence, fusing
from llmqat.metrics import (
    IGNORED_LABEL,
    LogitTransform,
    Predictor,
    Teacher,
    TokenScores,
    TopProbabilities,
    token_loss,
    token_scores,
    top_of_,
    top_probabilities,
)
from llmqat.metrics import _argmax as fast_argmax


def soft_cap(logits: Tensor) -> Tensor:
    return torch.tanh(logits / 3) * 3


def states(tokens: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Predictor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype)
    head = torch.randn(vocabulary, 16, generator=generator).mul(0.5).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(7))
    return hidden, Predictor(head, bias), labels


def plain_scores(
    hidden: Tensor, model: Predictor, labels: Tensor, reference_hidden: Tensor, reference: Predictor
) -> TokenScores:
    """All logits at once, in the model's dtype, then float64."""

    def log_probs(states: Tensor, predictor: Predictor) -> tuple[Tensor, Tensor]:
        logits = F.linear(states, predictor.head, predictor.bias)
        logits = logits if predictor.transform is None else predictor.transform(logits)
        return logits, F.log_softmax(logits.double(), dim=-1)

    logits, own = log_probs(hidden, model)
    reference_logits, target = log_probs(reference_hidden, reference)
    scored = labels != IGNORED_LABEL
    return TokenScores(
        nll=F.nll_loss(own[scored], labels[scored], reduction="none"),
        kl=F.kl_div(own[scored], target[scored], log_target=True, reduction="none").sum(-1),
        top1=(logits.argmax(-1) == reference_logits.argmax(-1))[scored].float(),
    )


def sums(scores: TokenScores) -> tuple[float | None, ...]:
    return scores.sum("nll"), scores.sum("kl"), scores.sum("top1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", [None, soft_cap])
@pytest.mark.parametrize("chunk_tokens", [1, 24, 512])
@pytest.mark.parametrize("vocabulary", [384, 101])
def test_statistics_equal_full_logits(
    dtype: torch.dtype, transform: LogitTransform | None, chunk_tokens: int, vocabulary: int
) -> None:
    hidden, model, labels = states(50, vocabulary, dtype)
    reference_hidden, reference, _ = states(50, vocabulary, dtype, seed=1)
    model = Predictor(model.head, model.bias, transform)
    labels[::7] = IGNORED_LABEL
    found = token_scores(hidden, model, labels, reference_hidden, reference, chunk_tokens)
    plain = plain_scores(hidden, model, labels, reference_hidden, reference)
    assert found.nll.numel() == plain.nll.numel() == 42
    # A matrix product in bfloat16 may round otherwise when its rows are taken in chunks: one unit in 2^8 of a logit.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert found.sum("nll") == pytest.approx(plain.sum("nll"), rel=tolerance)
    assert found.sum("kl") == pytest.approx(plain.sum("kl"), rel=tolerance)
    if dtype == torch.float32:
        assert found.sum("top1") == plain.sum("top1")


def test_no_token_means_nothing_is_counted() -> None:
    hidden, model, labels = states(5, 11, torch.float32)
    labels.fill_(IGNORED_LABEL)
    assert sums(token_scores(hidden, model, labels)) == (0.0, None, None)
    assert sums(token_scores(hidden, model, labels, hidden, model)) == (0.0, 0.0, 0.0)


def test_a_model_does_not_diverge_from_itself() -> None:
    hidden, model, labels = states(40, 200, torch.bfloat16)
    found = token_scores(hidden, model, labels, hidden, model)
    assert sums(found)[1:] == (0.0, 40.0)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    model = Predictor(torch.zeros(96, 4))
    found = token_scores(torch.randn(10, 4), model, torch.arange(10))
    assert found.sum("nll") == pytest.approx(10 * math.log(96), rel=1e-6)
    assert found.kl is None


def test_divergence_is_from_the_reference_to_the_model() -> None:
    # Bernoulli(3/4) as the reference, Bernoulli(1/2) as the model: 3/4 ln(3/2) + 1/4 ln(1/2).
    reference = Predictor(torch.zeros(2, 1), torch.tensor([math.log(3), 0.0]))
    model = Predictor(torch.zeros(2, 1))
    found = token_scores(torch.zeros(1, 1), model, torch.zeros(1, dtype=torch.long), torch.zeros(1, 1), reference)
    assert found.sum("kl") == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


def test_a_model_of_another_width_can_be_the_reference() -> None:
    hidden, model, labels = states(9, 30, torch.float32)
    found = token_scores(hidden, model, labels, torch.randn(9, 5), Predictor(torch.randn(30, 5)))
    assert found.kl is not None
    assert found.kl.min() > 0


def test_what_does_not_fit_is_refused() -> None:
    hidden, model, labels = states(3, 10, torch.float32)
    with pytest.raises(ValueError, match="give both or neither"):
        token_scores(hidden, model, labels, reference_hidden=hidden)
    with pytest.raises(ValueError, match="vocabulary of 10 and its reference one of 12"):
        token_scores(hidden, model, labels, hidden, Predictor(torch.zeros(12, 16)))
    with pytest.raises(ValueError, match="needs a teacher, labels, or both"):
        token_loss(hidden, model, torch.ones(3))
    with pytest.raises(ValueError, match="vocabulary of 10 and the teacher one of 12"):
        token_loss(hidden, model, torch.ones(3), Teacher(hidden, Predictor(torch.zeros(12, 16))))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    tail=st.sampled_from([0, 0, 1, 63]),
    levels=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_fast_argmax_is_argmax_with_ties(rows: int, blocks: int, tail: int, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (rows, 64 * blocks + tail), generator=generator).float()
    assert torch.equal(fast_argmax(logits), logits.argmax(-1))


@pytest.fixture
def gpu_that_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loss is compiled as it is on a GPU."""
    monkeypatch.setattr(fused_divergence, "DEVICES", ("cpu",))
    fused_divergence._tried.cache_clear()
    yield
    fused_divergence._tried.cache_clear()


@pytest.mark.parametrize("transform", [None, soft_cap])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 512])
@pytest.mark.parametrize(("kl_weight", "cross_entropy_weight"), [(1.0, None), (None, 1.0), (0.7, 0.4)])
def test_the_loss_and_its_gradients_equal_autograd(
    transform: LogitTransform | None, chunk_tokens: int, kl_weight: float | None, cross_entropy_weight: float | None
) -> None:
    hidden, student, labels = states(33, 70, torch.float32)
    teacher_hidden, teacher, _ = states(33, 70, torch.float32, seed=1)
    weights = torch.rand(33)
    weights[::5] = 0

    def leaves() -> tuple[Tensor, Tensor, Tensor]:
        assert student.bias is not None
        return (
            hidden.clone().requires_grad_(),
            student.head.clone().requires_grad_(),
            student.bias.clone().requires_grad_(),
        )

    chunked = leaves()
    own = Predictor(chunked[1], chunked[2], transform)
    loss = token_loss(
        chunked[0],
        own,
        weights,
        None if kl_weight is None else Teacher(teacher_hidden, teacher),
        None if cross_entropy_weight is None else torch.where(weights > 0, labels, IGNORED_LABEL),
        kl_weight=kl_weight or 1.0,
        cross_entropy_weight=cross_entropy_weight or 1.0,
        chunk_tokens=chunk_tokens,
    )
    plain = leaves()
    logits = F.linear(*plain)
    log_probs = F.log_softmax(logits if transform is None else transform(logits), dim=-1)
    target = F.log_softmax(F.linear(teacher_hidden, teacher.head, teacher.bias), dim=-1)
    divergence = F.kl_div(log_probs, target, log_target=True, reduction="none").sum(-1)
    per_token = (kl_weight or 0) * divergence - (cross_entropy_weight or 0) * log_probs[range(33), labels.clamp(min=0)]
    expected = (per_token * weights).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    for found, wanted in zip(chunked, plain, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_as_on_a_gpu_gives_the_loss_and_its_gradient(dtype: torch.dtype, gpu_that_is_a_cpu: None) -> None:
    hidden, student, _ = states(33, 70, dtype)
    teacher = Teacher(*states(33, 70, dtype, seed=1)[:2])
    weights = torch.rand(33)
    weights[::5] = 0

    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        loss = token_loss(leaf, student, weights, teacher, chunk_tokens=16)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    eager = loss_and_gradient()
    with fusing():
        assert fused_divergence.fused_divergence(hidden) is not None
        compiled = loss_and_gradient()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for found, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fault", ["no compiler", "other numbers"])
def test_a_kernel_of_the_loss_that_fails_its_trial_is_not_used(
    fault: str, gpu_that_is_a_cpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compiles(function: Any, **options: Any) -> Any:
        if fault == "no compiler":
            raise RuntimeError(fault)
        return lambda *tensors: tuple(1.1 * one for one in function(*tensors))

    monkeypatch.setattr(torch, "compile", compiles)
    with fusing(), caplog.at_level(logging.WARNING, logger="llmqat"):
        assert [fused_divergence.fused_divergence(torch.ones(2, 3)) for _ in range(2)] == [None, None]
    assert [fault in record.getMessage() for record in caplog.records] == [True]


def test_training_loss_and_evaluation_agree() -> None:
    hidden, model, labels = states(20, 64, torch.bfloat16)
    reference_hidden, reference, _ = states(20, 64, torch.bfloat16, seed=1)
    loss = token_loss(hidden, model, torch.ones(20), Teacher(reference_hidden, reference))
    scores = token_scores(hidden, model, labels, reference_hidden, reference)
    assert float(loss) == pytest.approx(scores.sum("kl"), rel=1e-5)


def dense_bucketed_kl(log_probs: Tensor, target: Tensor, top_k: int) -> Tensor:
    """KL [T] over the target's most likely tokens and one bucket, from whole distributions [T, V]."""
    indices = target.topk(top_k, -1).indices
    p, q = target.exp().gather(-1, indices), log_probs.exp().gather(-1, indices)
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    rest = (rest_p * (rest_p / rest_q).log()) if top_k < target.shape[-1] else 0
    return (p * (p / q).log()).sum(-1) + rest


@pytest.mark.parametrize("transform", [None, soft_cap])
@pytest.mark.parametrize("chunk_tokens", [1, 512])
@pytest.mark.parametrize("top_k", [1, 8, 70])
@pytest.mark.parametrize("cross_entropy_weight", [None, 0.4])
def test_the_loss_from_the_likeliest_tokens_and_its_gradients_equal_autograd(
    transform: LogitTransform | None, chunk_tokens: int, top_k: int, cross_entropy_weight: float | None
) -> None:
    hidden, student, labels = states(33, 70, torch.float64)
    teacher_hidden, teacher, _ = states(33, 70, torch.float64, seed=1)
    weights = torch.rand(33)
    weights[::5] = 0
    assert student.bias is not None
    chunked = [tensor.float().requires_grad_() for tensor in (hidden, student.head, student.bias)]
    loss = token_loss(
        chunked[0],
        Predictor(chunked[1], chunked[2], transform),
        weights,
        top_probabilities(teacher.logits(teacher_hidden), top_k),
        None if cross_entropy_weight is None else torch.where(weights > 0, labels, IGNORED_LABEL),
        kl_weight=0.7,
        cross_entropy_weight=cross_entropy_weight or 1.0,
        chunk_tokens=chunk_tokens,
    )
    plain = [tensor.clone().requires_grad_() for tensor in (hidden, student.head, student.bias)]
    logits = F.linear(*plain)
    log_probs = F.log_softmax(logits if transform is None else transform(logits), dim=-1)
    target = F.log_softmax(teacher.logits(teacher_hidden), dim=-1)
    per_token = 0.7 * dense_bucketed_kl(log_probs, target, top_k)
    per_token = per_token - (cross_entropy_weight or 0) * log_probs[range(33), labels]
    expected = (per_token * weights).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    for found, wanted in zip(chunked, plain, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)


def test_the_likeliest_tokens_and_the_rest_are_a_distribution_and_bound_the_exact_divergence() -> None:
    hidden, student, _ = states(20, 300, torch.bfloat16)
    teacher_hidden, teacher, _ = states(20, 300, torch.bfloat16, seed=1)
    logits, ones = teacher.logits(teacher_hidden), torch.ones(20)
    found = []
    for top_k in (1, 16, 64, 300):
        top = top_probabilities(logits, top_k)
        torch.testing.assert_close(top.log_probs.exp().sum(-1) + top.log_rest.exp(), ones)
        assert torch.equal(top.log_probs, F.log_softmax(logits.float(), -1).topk(top_k, -1).values)
        found.append(float(token_loss(hidden, student, ones, top)))
    assert found == sorted(found)
    assert found[-1] == pytest.approx(
        float(token_loss(hidden, student, ones, Teacher(teacher_hidden, teacher))), rel=1e-5
    )
    with pytest.raises(ValueError, match="top_k=301 of a vocabulary of 300 tokens; choose 1 to 300"):
        top_probabilities(logits, 301)


@pytest.mark.parametrize(("vocabulary", "top_k"), [(1536, 5), (4096, 16), (4096, 256), (4096, 4096), (999, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the second has many equals
def test_the_likeliest_are_found_among_the_maxima_of_parts(vocabulary: int, top_k: int, dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, wanted = top_probabilities(logits, top_k), F.log_softmax(logits.float(), -1)
    assert torch.equal(found.log_probs, wanted.topk(top_k).values)
    assert torch.equal(wanted.gather(-1, found.indices), found.log_probs)
    assert all(len(set(row)) == top_k for row in found.indices.tolist())
    same = top_of_(torch.softmax(logits.float(), -1), top_k)
    torch.testing.assert_close(same.log_probs, found.log_probs)
    torch.testing.assert_close(same.log_rest, found.log_rest)


def test_a_student_sure_of_the_teachers_tokens_takes_a_finite_step() -> None:
    # All mass on one token, of which the teacher gives the rest a tenth: the student's rest is below float32's least.
    top = TopProbabilities(
        torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[math.log(0.9)]]), torch.tensor([math.log(0.1)])
    )
    hidden = torch.tensor([[1.0]], requires_grad=True)
    loss = token_loss(hidden, Predictor(torch.tensor([[200.0], [0.0], [0.0]])), torch.ones(1), top)
    loss.backward()
    assert torch.isfinite(loss)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad.item() > 0

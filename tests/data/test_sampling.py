from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llmqat.data.sampling import Sampling, choose

COUNT = 20_000


def drawn_shares(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Shares of tokens drawn of one row of logits at evenly spread uniforms, and the tokens."""
    uniforms = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    parts = [
        choose(logits.expand(len(part), -1), part, torch.zeros(len(part), dtype=torch.bool), sampling)
        for part in uniforms.split(2000)
    ]
    drawn = torch.cat([part.tokens for part in parts])
    expected = torch.log_softmax(logits[0], -1)[drawn]
    torch.testing.assert_close(torch.cat([part.log_probs for part in parts]), expected)
    return torch.bincount(drawn, minlength=logits.shape[1]) / COUNT, drawn


def random_logits(vocabulary: int) -> Tensor:
    return 2 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vocabulary", [7, 256, 1000])
def test_sampling_inverts_the_distribution_function(vocabulary: int):
    logits = random_logits(vocabulary)
    shares, drawn = drawn_shares(logits, Sampling())
    torch.testing.assert_close(shares, torch.softmax(logits[0], -1), atol=2 / COUNT, rtol=0)
    assert torch.equal(drawn, drawn.sort().values)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.5),
        Sampling(top_k=5),
        Sampling(top_p=0.3),
        Sampling(top_p=0.99),  # more than the candidates that are looked at first
        Sampling(temperature=1.5, top_p=0.8, top_k=20),
    ],
    ids=str,
)
def test_truncated_sampling_is_that_of_generate(sampling: Sampling):
    logits = random_logits(1000)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    warpers.append(TopPLogitsWarper(sampling.top_p))
    expected = torch.softmax(warpers(torch.zeros(1, 1), logits.clone())[0], -1)
    shares, _ = drawn_shares(logits, sampling)
    torch.testing.assert_close(shares, expected, atol=2 / COUNT, rtol=0)


def test_sampling_never_draws_the_impossible():
    logits = torch.full((3, 600), float("-inf"))
    logits[0, 5], logits[1, 599], logits[2, [0, 300]] = 1.0, 1.0, 1.0
    for uniform in (0.0, 0.5, 1 - 2**-53):
        for sampling in (Sampling(), Sampling(top_p=0.9), Sampling(top_k=3)):
            uniforms = torch.full((3,), uniform, dtype=torch.float64)
            drawn = choose(logits, uniforms, torch.zeros(3, dtype=torch.bool), sampling).tokens
            assert drawn[:2].tolist() == [5, 599]
            assert drawn[2] in (0, 300)


def test_greedy_rows_take_the_most_likely_token():
    logits = random_logits(300).repeat(40, 1).to(torch.bfloat16)
    greedy = torch.arange(40) % 3 == 0
    drawn = choose(logits, torch.full((40,), 0.999, dtype=torch.float64), greedy, Sampling()).tokens
    assert (drawn[greedy] == logits[0].argmax()).all()
    assert (drawn[~greedy] != logits[0].argmax()).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0, top_p=0.5), Sampling(top_k=1)], ids=str)
def test_the_likeliest_tokens_are_the_models_own_however_it_is_drawn(sampling: Sampling):
    logits = torch.randn(40, 512, generator=torch.Generator().manual_seed(1))
    uniforms, greedy = torch.rand(40, dtype=torch.float64), torch.arange(40) % 7 == 0
    found, without = (choose(logits, uniforms, greedy, sampling, top_k) for top_k in (9, None))
    assert torch.equal(found.tokens, without.tokens)
    assert without.top is None
    wanted = torch.log_softmax(logits, -1).topk(9)
    assert torch.equal(found.top.indices, wanted.indices)
    torch.testing.assert_close(found.top.log_probs, wanted.values)
    torch.testing.assert_close(found.top.log_rest.exp(), 1 - wanted.values.exp().sum(-1))

"""How certain a figure is: percentile intervals by bootstrap over windows, paired where two models are compared.

Tokens of one window depend on each other, so what is drawn, with replacement, is whole windows (whole documents where
the protocol has them). Two models that scored the same windows are drawn together: what is hard for both cancels, and
the interval of their difference is far narrower than those of their figures. A difference whose interval holds 0 is
smaller than the noise of this text.

Source: Efron, Bootstrap methods (1979); Koehn, Statistical significance tests for machine translation (2004), paired.

Shapes: U windows, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmqat.evaluate.perplexity import Evaluation, ScoredTokens

RESAMPLES = 1000
LEVEL = 0.95
METRICS = ("perplexity", "kl", "reverse_kl", "top1", "top5")
"""Figures that an interval can be given of."""


@dataclass(frozen=True)
class Interval:
    """A percentile interval."""

    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether 0 lies within: a difference is then no more than noise."""
        return self.low <= 0 <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON takes them."""
        return asdict(self)


def interval(found: Evaluation, metric: str, *, seed: int = 0) -> Interval | None:
    """Returns the interval of `metric`; None where it was not measured, or there is one window only."""
    drawn = _resampled(found, metric, seed)
    return None if drawn is None else _percentiles(drawn)


def difference(found: Evaluation, other: Evaluation, metric: str, *, seed: int = 0) -> Interval | None:
    """Returns the interval of `metric` of `found` minus that of `other`, both resampled alike.

    None where one was not measured, or the two did not score the same tokens.
    """
    one, two = found.scored, other.scored
    if one is None or two is None or not torch.equal(one.token, two.token) or not torch.equal(one.unit, two.unit):
        return None
    left, right = _resampled(found, metric, seed), _resampled(other, metric, seed)
    return None if left is None or right is None else _percentiles(left - right)


def mean_difference(values: Sequence[float], others: Sequence[float], *, seed: int = 0) -> Interval:
    """Returns the interval of the mean of paired differences, such as of right answers to the same questions."""
    paired = torch.tensor(values, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    return _percentiles(_counts(len(paired), seed) @ paired / len(paired))


def ratio_of_means(values: Sequence[float], others: Sequence[float], *, seed: int = 0) -> Interval:
    """Returns the interval of the mean of `values` over that of `others`, which are positive, both drawn alike."""
    counts = _counts(len(values), seed)
    above, below = (counts @ torch.tensor(given, dtype=torch.float64) for given in (values, others))
    return _percentiles(above / below)


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Returns the interval of a mean."""
    return mean_difference(values, [0.0] * len(values), seed=seed)


def _resampled(found: Evaluation, metric: str, seed: int) -> Tensor | None:
    """Returns `metric` [R] on resampled windows."""
    if metric not in METRICS:
        raise ValueError(f"no interval of {metric!r}; choose one of {', '.join(METRICS)}")
    if found.scored is None:
        return None
    values = getattr(found.scored.scores, "nll" if metric == "perplexity" else metric)
    if values is None:
        return None
    sums, tokens = _by_unit(found.scored, values)
    if len(sums) < 2:
        return None
    counts = _counts(len(sums), seed)
    means = (counts @ sums) / (counts @ tokens)
    return means.exp() if metric == "perplexity" else means


def _by_unit(scored: ScoredTokens, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum of `values` and the number of tokens in each window, float64 [U]."""
    _, unit = scored.unit.unique(return_inverse=True)
    size = int(unit.max()) + 1
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, unit, values.double())
    return sums, torch.bincount(unit, minlength=size).double()


def _counts(size: int, seed: int) -> Tensor:
    """Returns how often each of `size` windows is drawn, float64 [R, size]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(size, (RESAMPLES, size), generator=generator)
    return torch.zeros(RESAMPLES, size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())


def _percentiles(drawn: Tensor) -> Interval:
    tail = (1 - LEVEL) / 2
    ordered = drawn.sort().values
    low, high = (ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (tail, 1 - tail))
    return Interval(float(low), float(high))

"""What an evaluation while training gathers: perplexity always, and logits only for a function that asks for them.

Letters: N samples, L tokens in each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers.trainer_utils import EvalPrediction


class EvaluationMetrics:
    """A `compute_metrics` for transformers.Trainer: perplexity, and the metrics of the user's own function.

    An evaluation passes, for each sample, the negative log-likelihood in nats and the number of scored tokens, both
    [N]. If the user gives a function, the logits [N, L, V] follow, and the function gets these. They come whole, or a
    batch at a time with `batch_eval_metrics`.
    """

    def __init__(self, own: Callable[..., dict[str, Any]] | None = None) -> None:
        self.own = own
        self._nll = self._scored = 0.0

    def __call__(self, evaluated: EvalPrediction, compute_result: bool | None = None) -> dict[str, Any]:
        """Returns the metrics of all that was seen so far.

        Args:
            evaluated: of the whole text where `compute_result` is None, else of a batch.
            compute_result: whether it is the last batch; the others need no metrics.

        Raises:
            ValueError: no token of the text is scored.
        """
        # A list has a batch in each entry (eval_do_concat_batches=False).
        parts = evaluated.predictions if isinstance(evaluated.predictions, list) else [evaluated.predictions]
        self._nll += sum(_total(nll) for nll, *_ in parts)
        self._scored += sum(_total(scored) for _, scored, *_ in parts)
        found: dict[str, Any] = {}
        if self.own is not None:
            given = EvalPrediction(
                predictions=logits_of(evaluated.predictions),
                label_ids=evaluated.label_ids,
                inputs=evaluated.inputs,
                losses=evaluated.losses,
            )
            found = self.own(given) if compute_result is None else self.own(given, compute_result=compute_result)
        if compute_result is False:
            return found
        if self._scored == 0:
            raise ValueError("no token of the evaluation text is scored: its labels are -100, or hidden, everywhere")
        return {"perplexity": float(np.exp(self._nll / self._scored)), **found}


def known_metrics(names: Sequence[str] | None, has_perplexity: bool) -> set[str]:
    """Returns the names of the metrics that an evaluation yields by itself.

    Args:
        names: of the data sets, where they have names.
        has_perplexity: whether perplexity is among them.
    """
    found = ["loss", "runtime", "samples_per_second", "steps_per_second", *(["perplexity"] if has_perplexity else [])]
    return {f"eval_{prefix}{name}" for prefix in ([f"{one}_" for one in names] if names else [""]) for name in found}


def logits_of(predictions: Any) -> Any:
    """Returns the logits among what an evaluation has gathered: whole, or of each batch."""
    return [entry[2] for entry in predictions] if isinstance(predictions, list) else predictions[2]


def _total(values: Any) -> float:
    numbers = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    return float(numbers.astype(np.float64).sum())

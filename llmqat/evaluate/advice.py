"""Training-free first: what rounding or calibration alone has lost, and whether training is worth its cost.

The field's rule: a checkpoint that was made without training is cheap and often enough; when it loses more than one is
willing to lose, train, from there. What training would cost is estimated from how fast the model was evaluated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmqat.evaluate.gate import REFERENCE

THRESHOLD = 0.02
"""Share of the reference's perplexity that may be lost."""
TRAINING_TOKENS = 60_000
"""A short distillation, as in recipes/smollm2-135m-int4.yaml."""
STEP_COST = 10
"""Forwards that a distillation step costs: teacher, student, backward and optimizer (measured: 8 to 12 on a CPU)."""
BYTES_A_PARAMETER = 18
"""Teacher in bfloat16, float32 masters and gradients, AdamW's two moments."""


def advice(report: Mapping[str, Any], threshold: float = THRESHOLD) -> tuple[str, ...]:
    """Returns a sentence or two on each quantized model of `report` (`Comparison.to_dict()`); none without a reference.

    Args:
        report: what was measured.
        threshold: share of the reference's perplexity, on the first text, that may be lost.

    Raises:
        ValueError: the threshold is negative.
    """
    if threshold < 0:
        raise ValueError(f"threshold={threshold} is negative; give the share that may be lost, such as 0.02")
    references = [row for row in report["rows"] if row["role"] == REFERENCE]
    if not references:
        return ()
    return tuple(_advise(row, references[0], report, threshold) for row in report["rows"] if row not in references)


def _advise(row: Mapping[str, Any], reference: Mapping[str, Any], report: Mapping[str, Any], threshold: float) -> str:
    lost = (row["perplexity"] or float("inf")) / reference["perplexity"] - 1
    said = f"{row['name']} loses {lost:.1%} of perplexity"
    trained = row["role"] == "trained" or row.get("method") == "trained"
    if lost <= threshold:
        return f"{said}, within {threshold:.0%}: " + ("ship it." if trained else "no training is needed.")
    if trained:
        return f"{said} after training, more than {threshold:.0%}: more tokens, or more bits for what is sensitive."
    return f"{said}, more than {threshold:.0%}: training is worth it. {' '.join(_cost(reference, report))}"


def _cost(reference: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[str]:
    tokens = sum(text["tokens"] for text in report["texts"].values())
    if reference.get("seconds"):
        minutes = TRAINING_TOKENS * STEP_COST / (tokens / reference["seconds"]) / 60
        yield f"A distillation on {TRAINING_TOKENS:,} tokens would take about {minutes:.0f} minutes here"
    else:
        yield f"A distillation on {TRAINING_TOKENS:,} tokens would do"
    size = reference.get("bytes_on_disk")
    if size is not None:
        yield f"and about {size / 2 * BYTES_A_PARAMETER / 1e9:.1f} GB of memory, activations on top"
    yield "(llmqat train; adapters and scales alone need less)."

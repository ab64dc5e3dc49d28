"""Sparsity: chooses the least important weights, which become zero, in every group of m weights or in each row.

n:m sparsity keeps n of every m weights that follow each other along the input features. The importance of a weight is
its score. It is the magnitude; the magnitude times the rms of the input (Wanda, 2306.11695, equation 1); or the error
of the output without the weight, after later weights compensate for it (SparseGPT, 2301.00774; calibrate/gptq.py).

Letters: O out features, I in features, n of m weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def most_important(score: Tensor, keep: int, of: int) -> Tensor:
    """Returns which weights stay, bool [O, I]: of every `of` of a row, the `keep` with the largest scores.

    Args:
        score: [O, I] float, not below 0.
        keep: weights that stay, n.
        of: of so many, m; divides I.
    """
    places = score.reshape(-1, of).topk(keep, dim=-1, sorted=False).indices
    kept = torch.zeros(score.numel() // of, of, dtype=torch.bool, device=score.device)
    return kept.scatter_(-1, places, True).view(score.shape)

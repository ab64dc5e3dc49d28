"""SmoothQuant: part of each input feature's range moves from the activations into the weights that read them.

A feature whose entries are a hundred times larger than the others' takes all of a token's 8 bits. Dividing the feature
by s_j, and multiplying column j of every weight that reads it by s_j, changes nothing in full precision and makes both
easier to quantize. The division is folded into what makes the feature: the gain of the norm before q, k, v and before
gate, up; and the rows of up_proj for the input of down_proj (a product with up_proj's output).

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

Source: SmoothQuant (2211.10438) equation 4; the fold into up_proj is an addition to it.

Letters: D input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmqat.calibrate.forward import Wrap, check_finite, check_seen, observe_inputs
from llmqat.calibrate.structure import Norm, check_foldable, find_norms, input_last, unchanged_logits
from llmqat.data.blocks import Rows
from llmqat.layers import linear_maps

_SMALLEST = 1e-5


@dataclass(frozen=True)
class _Fold:
    """A place to fold into: the readers' columns are multiplied by s, and the source is divided by it."""

    source: Norm | nn.Linear
    readers: tuple[nn.Module, ...]


def smooth(model: nn.Module, blocks: Tensor | Rows, alpha: float = 0.5, batch_size: int = 4, wrap: Wrap = iter) -> int:
    """Smooths the layer inputs of a full-precision `model`, in place; returns the number of places folded.

    Args:
        model: a causal language model that is not prepared yet.
        blocks: token ids [N, L], or token blocks, that ranges of activations are taken from.
        alpha: share of the range that moves into the weights, 0 to 1.
        batch_size: blocks per forward.
        wrap: put around the iteration over batches, for a progress bar.

    Raises:
        ValueError: when the model is prepared or not in float32, nothing can be folded, or an activation is not finite.
        ValueError: when folding changed what the model computes; it must then be loaded anew.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"calibrate.smooth={alpha} is no share; choose 0 to 1, 0.5 is usual")
    check_foldable(model, "smoothing")
    folds = _folds(model)
    first = {str(number): fold.readers[0] for number, fold in enumerate(folds)}
    reach: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        top = x.abs().amax(0).float()
        reach[name] = torch.maximum(reach[name], top) if name in reach else top

    observe_inputs(model, first, record, blocks, batch_size, wrap)
    if not reach:
        check_seen(dict.fromkeys(first, False))
    check_finite({name: bool(torch.isfinite(top).all()) for name, top in reach.items()})
    with unchanged_logits(model, "smoothing"):
        for number, fold in enumerate(folds):
            if str(number) in reach:  # not of a tower for pictures, or an expert, that the text does not reach
                _apply(fold, reach[str(number)], alpha)
    return len(reach)


def check_smoothing(model: nn.Module) -> None:
    """Raises ValueError where nothing of a full-precision `model` can be smoothed."""
    _folds(model)


def _folds(model: nn.Module) -> list[_Fold]:
    """Returns the places to fold into.

    Raises:
        ValueError: there are none.
    """
    maps = {name: entry.owner for name, entry in linear_maps(model).items() if not entry.stacked and not entry.refusal}
    folds = [
        _Fold(norm, tuple(norm.readers.values()))
        for norm in find_norms(model).values()
        if norm.readers and all(name in maps for name in norm.readers) and not _is_head(model, norm)
    ]
    for name, module in maps.items():
        owner, _, leaf = name.rpartition(".")
        source = maps.get(f"{owner}.up_proj")
        gated = f"{owner}.gate_proj" in maps
        if leaf == "down_proj" and gated and isinstance(source, nn.Linear):
            folds.append(_Fold(source, (module,)))
    if not folds:
        raise ValueError(
            f"{type(model).__name__} has no norm that only linear layers read, so nothing can be smoothed; "
            "leave out calibrate.smooth"
        )
    return folds


def _is_head(model: nn.Module, norm: Norm) -> bool:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return any(module is head for module in norm.readers.values())


@torch.no_grad()
def _apply(fold: _Fold, reach: Tensor, alpha: float) -> None:
    columns = torch.stack([input_last(reader).abs().amax(0).float() for reader in fold.readers]).amax(0)
    reach = reach.to(columns.device)
    scale = reach.clamp(min=_SMALLEST).pow(alpha) / columns.clamp(min=_SMALLEST).pow(1 - alpha)
    scale = torch.where((reach > 0) & (columns > 0), scale, 1.0).clamp(min=_SMALLEST)
    for reader in fold.readers:
        input_last(reader).mul_(scale)
    if isinstance(fold.source, Norm):
        fold.source.set_gain(fold.source.gain / scale)
        bias = getattr(fold.source.module, "bias", None)
    else:
        fold.source.weight.div_(scale.unsqueeze(-1))
        bias = fold.source.bias
    if bias is not None:
        bias.div_(scale)

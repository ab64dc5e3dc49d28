"""Perplexity of a text, and how far a model is from its reference on the same tokens.

A text is cut once into windows of equal length, and every model of a comparison scores exactly these windows:

    text -> tokens -> TokenWindows [N, L] -> final hidden states -> metrics.token_scores -> Evaluation

Nothing outside a window is seen when its tokens are scored. With a stride shorter than the window, windows overlap: the
overlap is context, and each token is scored once. Perplexity is exp(mean negative log-likelihood of the scored tokens).

The divergence is KL(reference || model), the mean over the same scored tokens. The reference runs once: its final
hidden states at the scored positions are kept ([S, D] in its own dtype, 23 MB for 40 windows of 512 at D = 576), its
logits never are. Judge a quantized model by this divergence first: a perplexity below that of full precision is a model
that has learned the text's domain, not one that is closer to its original.

An evaluation also keeps what each single token scored (`ScoredTokens`), from which intervals (bootstrap.py) and
breakdowns (breakdown.py) are made.

Shapes: N windows, L tokens in a window, B windows in a forward, S scored tokens, D hidden size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, StackDataset

from llmqat.data.blocks import Rows, sha256_of_rows
from llmqat.data.length import check_length
from llmqat.kernels import float_products, weights_let_go
from llmqat.metrics import IGNORED_LABEL, Predictor, TokenScores, check_predictor, predictor_of, token_nll, token_scores
from llmqat.models import capture_hidden, cast_parameters, model_device, uploaded

Progress = Callable[[int, int], None]
"""Called after each batch with the tokens done and the tokens in all."""


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """A text cut into windows of equal length, and which of their tokens are scored."""

    ids: Tensor  # int64 [N, L]
    labels: Tensor  # int64 [N, L], the ids where a token is scored at its own position, -100 elsewhere
    stride: int  # text tokens from the start of one window to the next
    sha256: str  # of the text in UTF-8, or of the token ids where no text was given
    source: str  # where the text came from, for the table
    lengths: Tensor | None = None  # int64 [N], tokens before the padding at a window's end; None: no window is padded
    units: Tensor | None = None  # int64 [N], the document of a window; None: each window is one of its own
    words: int | None = None  # words of the text, where perplexity is counted by words
    answers: bool = False  # whether a window is a conversation, of which the answers alone are scored

    @property
    def window(self) -> int:
        """Tokens in a window, its BOS token included."""
        return self.ids.shape[1]

    @property
    def read_length(self) -> int:
        """Tokens of a window that a model reads; with `lengths` one less, since the last is only predicted."""
        return self.window - (self.lengths is not None)

    @property
    def scored_tokens(self) -> int:
        """Tokens that are scored; a window's first token never is, because nothing precedes it."""
        return int(self.labels[:, 1:].ne(IGNORED_LABEL).sum())

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def ids_sha256(self) -> str:
        """SHA-256 of the token ids."""
        return _sha256_of(self.ids)

    def described(self) -> dict[str, Any]:
        """Returns what two reports must have alike to be of the same windows."""
        return {
            "sha256": self.sha256,
            "windows": len(self),
            "window": self.window,
            "stride": self.stride,
            "ids_sha256": self.ids_sha256,
        }

    def dataset(self) -> Dataset[dict[str, Tensor]]:
        """Returns the windows as samples {"input_ids", "labels"}, int64 [L], for a Trainer's evaluations."""
        return StackDataset(input_ids=self.ids, labels=self.labels)  # type: ignore[arg-type]  # tensors do as well

    def tokens_in(self, rows: slice) -> list[int]:
        """Returns the number of tokens that the model reads in each window of `rows`."""
        shape = self.ids[rows].shape
        return [shape[1]] * shape[0] if self.lengths is None else self.lengths[rows].tolist()


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """The scored tokens of all windows, in order, and what each scored; tensors are [S]."""

    scores: TokenScores
    unit: Tensor  # int64, the document or else the window that a token is in: what a bootstrap draws
    position: Tensor  # int64, tokens before it in its window
    token: Tensor  # int64, its id


@dataclass(frozen=True)
class Evaluation:
    """What one model scored on one text."""

    perplexity: float  # exp(nll)
    nll: float  # mean negative log-likelihood, nats a token
    kl: float | None  # mean KL(reference || model), nats a token; None without a reference
    top1: float | None  # share of tokens where model and reference rank the same token first
    tokens: int  # tokens scored
    windows: int
    window: int  # tokens in a window
    stride: int
    text_sha256: str
    reverse_kl: float | None = None  # mean KL(model || reference), nats a token
    top5: float | None = None  # share of the reference's five most probable tokens that are among the model's five
    words: int | None = None  # of the text, where perplexity is also counted by words
    answers: bool = False  # whether the answers of conversations alone were scored
    ids_sha256: str | None = None  # of the token ids of all windows: other tokenizers give others
    scored: ScoredTokens | None = field(default=None, repr=False, compare=False)

    @property
    def word_perplexity(self) -> float | None:
        """exp(summed negative log-likelihood / words of the text); None where words were not counted."""
        return None if self.words is None else _exp(self.nll * self.tokens / self.words)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON takes them, single tokens left out."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "scored"}
        return {**values, "word_perplexity": self.word_perplexity}


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference model's side of a comparison on one text: all that is needed of it after it is let go."""

    windows: TokenWindows
    hidden: Tensor  # [S, D] on the CPU, in the model's dtype: where the scored tokens are predicted
    predictor: Predictor
    evaluation: Evaluation  # of the reference itself: its divergence is 0 and its agreement 1


def windows_from_text(
    text: str,
    tokenizer: Any,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    source: str = "text",
) -> TokenWindows:
    """Returns `text` as windows of `window` tokens; what is left at the end and fills no window is not scored.

    Where the tokenizer puts a BOS token before a text, one opens every window and is not scored: such a model is never
    deployed without it.

    Args:
        text: all of it; the windows are taken from its start.
        tokenizer: a transformers tokenizer.
        window: tokens in a window, its BOS token included.
        stride: text tokens from the start of one window to the next; None means windows that do not overlap.
        max_windows: windows kept, from the start; None keeps all.
        source: where the text came from, for messages and the table.

    Raises:
        ValueError: if the text is empty or shorter than a window, or the numbers make no windows.
    """
    if not text.strip():
        raise ValueError(f"{source} is empty; evaluation needs a text of at least {window} tokens")
    prefix, ids = _tokenize(text, tokenizer)
    body = window - len(prefix)
    _check_shape(window, body, stride, max_windows)
    if len(ids) < body:
        raise ValueError(
            f"{source} has {len(ids)} tokens, fewer than one window of {window}; give a longer text or a shorter window"
        )
    stride = min(stride or body, body)
    bodies = torch.tensor(ids).unfold(0, body, stride)[:max_windows]
    labels = bodies.clone()
    labels[1:, : body - stride] = IGNORED_LABEL
    opening = torch.tensor(prefix, dtype=torch.int64).expand(len(bodies), -1)
    return TokenWindows(
        ids=torch.cat([opening, bodies], dim=1),
        labels=torch.cat([torch.full_like(opening, IGNORED_LABEL), labels], dim=1),
        stride=stride,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        source=source,
    )


def windows_from_blocks(ids: Tensor, source: str = "blocks", sha256: str | None = None) -> TokenWindows:
    """Returns token blocks [N, L] that exist already (held-out training blocks) as windows, all tokens scored.

    Args:
        ids: int64 [N, L].
        source: where they came from.
        sha256: hash of what they were made of; taken from the ids when None.
    """
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] < 2:
        raise ValueError(f"blocks of {source} have shape {tuple(ids.shape)}; expected [N >= 1, L >= 2]")
    return TokenWindows(ids=ids, labels=ids, stride=ids.shape[1], sha256=sha256 or _sha256_of(ids), source=source)


def windows_from_rows(rows: Rows, source: str, max_tokens: int | None = None) -> TokenWindows:
    """Returns conversations, a row each, as windows of which the answers are scored; the longest come first.

    Args:
        rows: of which the labels say what is scored; what stands behind the last label is not read.
        source: where they came from.
        max_tokens: rows are taken from the start while they have no more tokens in all, one at least; None takes all.
    """
    labels = rows.labels()
    labels[:, 0] = IGNORED_LABEL  # which nothing precedes
    places = torch.arange(1, labels.shape[1] + 1)
    lengths = torch.where(labels.ne(IGNORED_LABEL), places, 0).amax(1)
    kept = lengths.gt(0).nonzero().squeeze(1)
    if max_tokens is not None:
        within = lengths[kept].cumsum(0).le(max_tokens)
        within[:1] = True
        kept = kept[within]
    kept = kept[lengths[kept].argsort(descending=True, stable=True)]
    longest = int(lengths[kept].max()) if len(kept) else 0
    return TokenWindows(
        ids=rows.ids[kept, :longest],
        labels=labels[kept, :longest],
        stride=longest,
        sha256=sha256_of_rows(Rows(rows.stored[kept], None if rows.scored is None else rows.scored[kept])),
        source=source,
        lengths=lengths[kept],
        units=kept,
        answers=True,
    )


def _sha256_of(ids: Tensor) -> str:
    return hashlib.sha256(ids.to(torch.int64).cpu().contiguous().numpy().tobytes()).hexdigest()


def evaluate(
    model: nn.Module,
    windows: TokenWindows | Tensor,
    reference: Reference | nn.Module | None = None,
    *,
    batch_size: int = 4,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Returns the model's perplexity on `windows`, and its divergence from `reference` if there is one.

    Args:
        model: a transformers causal language model: plain, fake-quantized or packed.
        windows: from `windows_from_text` or `windows_from_blocks`, or token ids [N, L].
        reference: what the divergence is measured from. Give `keep_reference(...)` when several models are compared: a
            model given here runs anew.
        batch_size: windows in a forward.
        dtype: evaluate a model with float32 masters as its checkpoint of this dtype will be; None takes it as it is.
        progress: called with (tokens done, tokens in all) after each forward.

    Raises:
        ValueError: if the reference was kept for other windows, or has another vocabulary.
    """
    windows = windows_from_blocks(windows, "ids") if isinstance(windows, Tensor) else windows
    kept = keep_reference(reference, windows, batch_size=batch_size) if isinstance(reference, nn.Module) else reference
    pairs = [] if kept is None else [(kept.windows.ids, windows.ids), (kept.windows.labels, windows.labels)]
    if kept is not None and not all(torch.equal(*pair) for pair in pairs):
        raise ValueError(
            f"the reference was kept for the windows of {kept.windows.source} and the model is evaluated on those of "
            f"{windows.source}; a divergence needs the same windows"
        )
    parts: list[TokenScores] = []
    with _deployed(model, dtype):
        predictor = predictor_of(model).detached()
        done = 0
        for hidden, labels in _predicting_states(model, windows, batch_size, progress):
            rows = slice(done, done + len(labels))
            parts.append(_scores(predictor, hidden, labels, kept, rows))
            done = rows.stop
    return _evaluation(TokenScores.joined(parts), windows)


def keep_reference(
    model: nn.Module, windows: TokenWindows, *, batch_size: int = 4, progress: Progress | None = None
) -> Reference:
    """Returns what later comparisons with `model` on `windows` need; the model itself may then be let go."""
    kept: list[Tensor] = []
    parts: list[Tensor] = []
    with _deployed(model, None):
        predictor = predictor_of(model).detached()
        for hidden, labels in _predicting_states(model, windows, batch_size, progress):
            parts.append(token_nll(hidden, predictor, labels))
            kept.append(hidden.cpu())
    nll = torch.cat(parts).cpu()
    zeros, ones = torch.zeros_like(nll), torch.ones_like(nll)
    own = TokenScores(nll, kl=zeros, reverse_kl=zeros, top1=ones, top5=ones)
    return Reference(windows=windows, hidden=torch.cat(kept), predictor=predictor, evaluation=_evaluation(own, windows))


def _tokenize(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the BOS token that the tokenizer puts before a text, if any, and the tokens of the text without it."""
    empty = list(tokenizer("", verbose=False)["input_ids"])
    prefix = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
    return prefix, list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check_shape(window: int, body: int, stride: int | None, max_windows: int | None) -> None:
    if body < 2:
        raise ValueError(f"window={window} leaves {body} tokens of text in a window; choose at least 8")
    if stride is not None and not 1 <= stride <= window:
        raise ValueError(f"stride={stride} is not between 1 and window={window}; leave it out for no overlap")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows} scores nothing; choose at least 1, or leave it out for all")


@torch.no_grad()
def _predicting_states(
    model: nn.Module, windows: TokenWindows, batch_size: int, progress: Progress | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, a batch of windows at a time, final hidden states [s, D] and the tokens [s] that they are to predict.

    The tokens are on the CPU, where it is known which are scored, so that a GPU need not be asked.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} evaluates nothing; choose at least 1")
    check_length(model, windows.read_length, "window")
    check_predictor(model)
    device = model_device(model)
    done, total = 0, sum(windows.tokens_in(slice(None)))
    with weights_let_go(model), capture_hidden(model) as captured:
        for start in range(0, len(windows), batch_size):
            rows = slice(start, min(start + batch_size, len(windows)))
            lengths = windows.tokens_in(rows)
            # Padding lies behind the tokens, which a causal model does not see from there: no mask is needed.
            ids, labels = (side[rows, : max(lengths)] for side in (windows.ids, windows.labels))
            ids = uploaded(ids, device)
            model(input_ids=ids if windows.lengths is None else ids[:, :-1], use_cache=False)
            next_labels = labels[:, 1:]
            window, position = next_labels.ne(IGNORED_LABEL).nonzero(as_tuple=True)
            hidden = captured.take()
            places = uploaded(window * hidden.shape[1] + position, hidden.device)
            yield hidden.flatten(0, 1)[places], next_labels[window, position]
            done += sum(lengths)
            if progress is not None:
                progress(done, total)


@contextmanager
def _deployed(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the model drops nothing at random and its parameters read in `dtype`; afterwards it is as it was."""
    was_training = model.training
    model.eval()
    try:
        with float_products(), nullcontext() if dtype is None else cast_parameters(model, dtype):
            yield
    finally:
        model.train(was_training)


def _scores(
    predictor: Predictor, hidden: Tensor, labels: Tensor, reference: Reference | None, rows: slice
) -> TokenScores:
    """Returns the scores of one batch: hidden [s, D] predicts labels [s]; `rows` of the reference's states do too."""
    if reference is None:
        return token_scores(hidden, predictor, labels)
    states = uploaded(reference.hidden[rows], hidden.device)
    return token_scores(hidden, predictor, labels, states, _on(reference.predictor, hidden.device))


def _on(predictor: Predictor, device: torch.device) -> Predictor:
    bias = None if predictor.bias is None else predictor.bias.to(device)
    return Predictor(predictor.head.to(device), bias, predictor.transform)


def _evaluation(scores: TokenScores, windows: TokenWindows) -> Evaluation:
    tokens = scores.nll.numel()
    means = {
        name: None if (total := scores.sum(name)) is None else total / tokens
        for name in ("nll", "kl", "reverse_kl", "top1", "top5")
    }
    nll = means.pop("nll") or 0.0
    window, position = windows.labels[:, 1:].ne(IGNORED_LABEL).nonzero(as_tuple=True)
    return Evaluation(
        perplexity=_exp(nll),
        nll=nll,
        **means,
        tokens=tokens,
        windows=len(windows),
        window=windows.window,
        stride=windows.stride,
        text_sha256=windows.sha256,
        words=windows.words,
        answers=windows.answers,
        ids_sha256=windows.ids_sha256,
        scored=ScoredTokens(
            scores=scores,
            unit=window if windows.units is None else windows.units[window],
            position=position + 1,
            token=windows.labels[window, position + 1],
        ),
    )


def _exp(nll: float) -> float:
    return math.exp(nll) if not nll >= 700 else math.inf  # NaN stays NaN

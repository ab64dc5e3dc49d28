"""What models write, judged: the same prompts, answered by each model, the most probable token each time.

    prompts -> answered(model) -> whether each answer ends, how long it is, how much of it is repeated
            -> differences from the reference, paired by prompt, with 95 % intervals by bootstrap over prompts

Figures on given text (perplexity, KL) do not show whether a model stops: a distilled one can be near its teacher token
by token, and still ramble. So three figures of what it writes by itself are counted for each prompt:

    not_ended   1 where `max_new_tokens` are written and none of them ended the answer, else 0
    length      tokens written, the one that ends the answer included; no more than max_new_tokens
    repeated    share of the answer's 4-grams of tokens that have occurred in it before

Many answers are written side by side in lockstep (data/decode.py), prompts fed a token at a time like the rest; rows
whose answer has ended leave. Models that lockstep does not fit write with `generate`, prompts of one length together:
no answer depends on padding.

Letters: B rows, L tokens of a prompt, T tokens written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data.blocks import Progress
from llmqat.data.chat import around_words
from llmqat.data.decode import LockstepDecoder, lockstep_attention_in, lockstep_obstacle
from llmqat.data.prompts import encode_prompt, read_prompts
from llmqat.data.quality import NGRAM, repeated_share
from llmqat.data.script import end_ids, special_ids
from llmqat.data.text import sha256_of_texts
from llmqat.data.writer import CACHE_BYTES, WEIGHT_BYTES, cache_bytes_per_token
from llmqat.evaluate.bootstrap import Interval, mean_difference, mean_interval, ratio_of_means
from llmqat.kernels import float_products
from llmqat.layers import dequantized_once, new_cache
from llmqat.layers.packed import FEW_ROWS
from llmqat.models import check_next_token

log = logging.getLogger(__name__)

FIGURES = ("not_ended", "length", "repeated")
"""What is counted of each answer."""
KEPT_ROWS = 0.75
"""Rows that still write are moved together when they are no more than this share of those in the cache."""
SAME = ("sha256", "number", "max_new_tokens")
"""Of `Prompts.described()`: what must be alike where figures are compared."""


@dataclass(frozen=True)
class Prompts:
    """Prompts as ids, ready for every model with the tokenizer that made them."""

    source: str
    ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]  # as the models read them
    max_new_tokens: int
    chat_template: bool  # whether the tokenizer has one, so that words are a user's turn
    ends: frozenset[int]  # ids that end an answer, beside those of the model's own configuration

    @property
    def longest(self) -> int:
        """Tokens that a model reads at most: the longest prompt and its answer."""
        return max(map(len, self.ids)) + self.max_new_tokens

    def described(self) -> dict[str, Any]:
        """Returns what a report says of them."""
        return {
            "source": self.source,
            "sha256": sha256_of_texts(self.texts),
            "number": len(self.ids),
            "max_new_tokens": self.max_new_tokens,
            "chat_template": self.chat_template,
        }


def open_prompts(source: str, tokenizer: PreTrainedTokenizerBase, most: int | None, max_new_tokens: int) -> Prompts:
    """Returns the first `most` prompts of `source` (all where it is None), each once.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: one cannot be read, or the chat template does not take it.
    """
    given = [tuple(encode_prompt(prompt, tokenizer)) for prompt in read_prompts(source, most)]
    ids = tuple(dict.fromkeys(given))
    if len(ids) < len(given):
        log.warning("%s: prompts that were there before: %d; each is answered once", source, len(given) - len(ids))
    template = tokenizer.chat_template is not None
    return Prompts(
        source,
        ids,
        tuple(str(tokenizer.decode(list(one))) for one in ids),
        max_new_tokens,
        template,
        _turn_ends(tokenizer) if template else frozenset(),
    )


def _turn_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the special token that the chat template puts behind an answer, where there is one."""
    between = around_words(tokenizer)[1].lstrip()
    first = list(tokenizer(between, add_special_tokens=False)["input_ids"])[:1]
    return frozenset(first) & special_ids(tokenizer)


def answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, progress: Progress | None = None
) -> dict[str, Any]:
    """Returns how `model` answers `prompts`, as a row of a report holds it: figures, and under `samples` each answer's.

    Raises:
        ValueError: the model predicts no next token.
    """
    check_next_token(model)
    ends = prompts.ends | end_ids(model, tokenizer)
    written = write_answers(model, prompts.ids, prompts.max_new_tokens, ends, progress)
    samples = {
        "not_ended": [float(answer[-1] not in ends) for answer in written],
        "length": [float(len(answer)) for answer in written],
        "repeated": [repeated_share(answer) for answer in written],
    }
    found: dict[str, Any] = {"prompts": prompts.described()}
    found |= {name: sum(values) / len(values) for name, values in samples.items()}
    if len(written) > 1:
        found["intervals"] = {name: mean_interval(values).to_dict() for name, values in samples.items()}
    texts = [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in written]
    answers = [{"prompt": one, "completion": other} for one, other in zip(prompts.texts, texts, strict=True)]
    return {**found, "samples": samples, "answers": answers}


# Writing


def write_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: frozenset[int],
    progress: Progress | None = None,
) -> list[list[int]]:
    """Returns what `model` writes after each prompt, the most probable token each time, up to a token of `ends`."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    longest = len(prompts[order[-1]]) + max_new_tokens
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), float_products():
            obstacle = lockstep_obstacle(model, longest)
            if obstacle is None:
                rows = min(len(prompts), max(CACHE_BYTES // (cache_bytes_per_token(model) * longest), 1))
                write = _in_lockstep
            else:
                log.warning("%s writes with `generate`, which is slower: %s", type(model).__name__, obstacle)
                rows, write = len(prompts), _by_generate
            found: dict[int, list[int]] = {}
            with dequantized_once(model, 0 if rows <= FEW_ROWS else WEIGHT_BYTES):
                for begin in range(0, len(order), rows):
                    part = order[begin : begin + rows]
                    watch = _Watch(progress, begin * longest, len(part) * longest, len(order) * longest)
                    answers = write(model, [list(prompts[index]) for index in part], max_new_tokens, ends, watch)
                    found |= dict(zip(part, answers, strict=True))
            if progress is not None:
                progress(len(order) * longest, len(order) * longest)
            return [found[index] for index in range(len(prompts))]
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Watch:
    """Passes progress on, counted from what earlier parts have done."""

    progress: Progress | None
    done: int
    own: int
    total: int

    def __call__(self, share: float) -> None:
        if self.progress is not None:
            self.progress(self.done + int(share * self.own), self.total)


def _in_lockstep(
    model: PreTrainedModel, prompts: list[list[int]], most: int, ends: frozenset[int], watch: _Watch
) -> list[list[int]]:
    """Writes one token of every answer at each step; a row reads its prompt first."""
    longest = max(map(len, prompts))
    given = torch.tensor([[*prompt, *[-1] * (longest - len(prompt))] for prompt in prompts])  # [B, longest]
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the cache is of
    tokens = given[:, 0]
    with lockstep_attention_in(model):
        decoder = LockstepDecoder(model, longest + most)
        for position in range(1, longest + most):
            starts = torch.zeros(len(tokens), dtype=torch.int64, device=model.device)
            chosen = decoder.step(tokens.to(model.device), starts).argmax(-1).cpu()
            put_in = given[rows, position] if position < longest else torch.full_like(chosen, -1)
            tokens = torch.where(put_in < 0, chosen, put_in)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if position >= len(prompts[row]) and not _is_done(written[row], most, ends):
                    written[row].append(token)
            live = [place for place, row in enumerate(rows) if not _is_done(written[row], most, ends)]
            watch(position / (longest + most))
            if not live:
                break
            if len(live) <= KEPT_ROWS * len(rows):
                kept = torch.tensor(live)
                decoder.keep(kept)
                rows, tokens = [rows[place] for place in live], tokens[kept]
    return written


def _is_done(answer: Sequence[int], most: int, ends: frozenset[int]) -> bool:
    return len(answer) >= most or (bool(answer) and answer[-1] in ends)


def _by_generate(
    model: PreTrainedModel, prompts: list[list[int]], most: int, ends: frozenset[int], watch: _Watch
) -> list[list[int]]:
    """Writes with transformers' own loop, prompts of one length together, so that none is padded."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    found: dict[int, list[int]] = {}
    for group in by_length.values():
        ids = torch.tensor([prompts[index] for index in group], device=model.device)
        for index, row in zip(group, most_probable(model, ids, most, ends).tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            found[index] = row[: end + 1]
        watch(len(found) / len(prompts))
    return [found[index] for index in range(len(prompts))]


def most_probable(model: PreTrainedModel, ids: Tensor, most: int, ends: frozenset[int]) -> Tensor:
    """Returns what `generate` writes after ids [B, L], the most probable token each time: at most `most` tokens [B, T].

    The model's generation_config (penalties, least lengths, forbidden tokens) is not used. A row that has ended is
    padded with the smallest id of `ends`.

    Args:
        model: a causal language model.
        ids: [B, L], on its device, without padding.
        most: tokens that are written at most.
        ends: ids that end a row.
    """
    writer: Any = model
    own, writer.generation_config = writer.generation_config, GenerationConfig()
    try:
        output: Tensor = writer.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            past_key_values=new_cache(model),
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
        )
    finally:
        writer.generation_config = own
    return output[:, ids.shape[1] :]


# Compared with the reference


@dataclass(frozen=True)
class Apart:
    """How far a figure is from the reference's: of `length` as a share of it, else the difference."""

    value: float
    interval: Interval | None  # None where there is one prompt only

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval does not hold 0."""
        return self.interval is not None and not self.interval.holds_zero

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON takes it."""
        low, high = (None, None) if self.interval is None else (self.interval.low, self.interval.high)
        return {"value": self.value, "low": low, "high": high, "noise": not self.beyond_noise}


def apart(own: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Apart]:
    """Returns how far each figure of `own` is from that of `reference`, both of the same prompts, paired by prompt."""
    found = {}
    for name in FIGURES:
        values, others = own["samples"][name], reference["samples"][name]
        several = len(values) > 1
        if name == "length":
            found[name] = Apart(
                own[name] / reference[name] - 1, _less_one(ratio_of_means(values, others)) if several else None
            )
        else:
            found[name] = Apart(own[name] - reference[name], mean_difference(values, others) if several else None)
    return found


def _less_one(ratio: Interval) -> Interval:
    return Interval(ratio.low - 1, ratio.high - 1)


def is_worse(found: Mapping[str, Apart]) -> bool:
    """Returns whether a model ends its answers less often, writes longer or repeats itself more, beyond noise."""
    return any(one.beyond_noise and one.value > 0 for one in found.values())


def said(name: str, own: Mapping[str, Any], reference_name: str, reference: Mapping[str, Any]) -> str | None:
    """Returns in words how a model writes otherwise than its reference, beyond noise; None where it does not."""
    found = apart(own, reference)
    limit = own["prompts"]["max_new_tokens"]
    words = []
    if (length := found["length"]).beyond_noise:
        longer = "longer" if length.value > 0 else "shorter"
        words.append(
            f"its answers are {100 * abs(length.value):.0f} % {longer} than those of {reference_name} "
            f"({_span(length, '%')}; {own['length']:.0f} tokens against {reference['length']:.0f})"
        )
    if (ending := found["not_ended"]).beyond_noise:
        words.append(
            f"{100 * own['not_ended']:.0f} % of answers do not end within {limit} tokens, against "
            f"{100 * reference['not_ended']:.0f} % "
            f"({_span(ending)})"
        )
    if (repeated := found["repeated"]).beyond_noise:
        words.append(
            f"{100 * own['repeated']:.0f} % of their {NGRAM}-grams are repeated, against "
            f"{100 * reference['repeated']:.0f} % "
            f"({_span(repeated)})"
        )
    if not words:
        return None
    return f"{name}: {'; '.join(words)}; 95 %, paired over {own['prompts']['number']} prompts."


def _span(found: Apart, unit: str = "points") -> str:
    assert found.interval is not None
    return f"{100 * found.interval.low:+.1f} to {100 * found.interval.high:+.1f} {unit}"


def table_cells(own: Mapping[str, Any], reference: Mapping[str, Any] | None) -> Iterator[str]:
    """Yields the cells of a table: each figure, and how far it is from the reference's, by its interval."""
    found = {} if reference is None or reference is own else apart(own, reference)
    for name in FIGURES:
        yield f"{own[name]:.0f}" if name == "length" else f"{own[name]:.1%}"
        beside = found.get(name)
        if beside is None:
            yield "–"
        elif beside.interval is None:
            yield f"{100 * beside.value:+.1f}"
        else:
            yield f"{100 * beside.value:+.1f} ({100 * beside.interval.low:+.1f} to {100 * beside.interval.high:+.1f})"


HEADINGS = (
    "not\nended",
    "points from\nthe reference",
    "tokens an\nanswer",
    "% from the\nreference",
    f"repeated\n{NGRAM}-grams",
    "points from\nthe reference",
)
"""Of the cells."""


def described(prompts: Mapping[str, Any]) -> str:
    """Returns in a line what was asked."""
    asked = "as a user's turn" if prompts["chat_template"] else "as the beginning of a text"
    return (
        f"answers to {prompts['number']} prompts of {prompts['source']}, {asked}, up to {prompts['max_new_tokens']} "
        f"tokens, the most probable one each time, sha256 {prompts['sha256'][:12]}"
    )

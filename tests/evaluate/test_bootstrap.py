"""Intervals: what a known distribution gives, pairing, and differences that are noise."""

from __future__ import annotations

import math

import pytest
import torch

from llmqat.evaluate.bootstrap import Interval, difference, interval, mean_difference, mean_interval
from llmqat.evaluate.breakdown import by_kind, by_position, kinds_of
from llmqat.evaluate.perplexity import Evaluation, evaluate, keep_reference, windows_from_blocks, windows_from_text
from llmqat.layers import QuantConfig, prepare
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer


def quantized(preset: str) -> torch.nn.Module:
    model = tiny_llama()
    prepare(model, QuantConfig.preset(preset, group_size=32))
    return model


def evaluations(*presets: str, windows: int = 40) -> list[Evaluation]:
    ids = torch.randint(VOCAB_SIZE, (windows, 16), generator=torch.Generator().manual_seed(0))
    reference = keep_reference(tiny_llama(), windows_from_blocks(ids))
    return [reference.evaluation, *(evaluate(quantized(preset), reference.windows, reference) for preset in presets)]


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)).double()
    found = mean_interval(values.tolist())
    spread = 1.96 * float(values.std()) / math.sqrt(400)
    assert found.low == pytest.approx(float(values.mean()) - spread, abs=0.02)
    assert found.high == pytest.approx(float(values.mean()) + spread, abs=0.02)


def test_pairing_sees_what_two_intervals_do_not() -> None:
    hard = torch.randn(200, generator=torch.Generator().manual_seed(2)).double() * 10
    better = hard + 0.1
    assert mean_interval(better.tolist()).low < mean_interval(hard.tolist()).high
    assert mean_difference(better.tolist(), hard.tolist()) == Interval(pytest.approx(0.1), pytest.approx(0.1))


def test_intervals_hold_the_figure_and_order_models() -> None:
    full, four, two = evaluations("int4", "int2")
    for metric in ("perplexity", "kl", "reverse_kl", "top1", "top5"):
        found = interval(four, metric)
        assert found is not None
        assert found.low < getattr(four, metric) < found.high
    assert interval(full, "kl") == Interval(0.0, 0.0)
    apart = difference(two, four, "kl")
    assert apart is not None
    assert apart.low > 0
    same = difference(four, four, "kl")
    assert same == Interval(0.0, 0.0)
    assert same.holds_zero


def test_no_interval_without_windows_to_draw_or_the_same_tokens() -> None:
    (_, one), (_, other) = evaluations("int4", windows=1), evaluations("int4", windows=3)
    assert interval(one, "kl") is None
    assert difference(one, other, "kl") is None
    assert interval(evaluate(tiny_llama(), torch.arange(2, 66).view(4, 16)), "kl") is None
    with pytest.raises(ValueError, match="no interval of 'speed'; choose one of perplexity"):
        interval(one, "speed")


def test_both_divergences_and_the_leading_five_are_those_of_full_logits() -> None:
    model, reference = quantized("int3"), tiny_llama()
    ids = torch.randint(VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(3))
    found = evaluate(model, ids, reference)
    with torch.no_grad():
        own, target = (m(input_ids=ids).logits[:, :-1].flatten(0, 1) for m in (model, reference))
    p, q = target.double().log_softmax(-1), own.double().log_softmax(-1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.reverse_kl == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-4)
    shared = [
        len(set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist())) for a, b in zip(own, target, strict=True)
    ]
    assert found.top5 == pytest.approx(sum(shared) / len(shared) / 5)


def test_parts_add_up_to_the_whole() -> None:
    tokenizer = tiny_tokenizer()
    windows = windows_from_text("One fox, 22 dogs;\n a hat. " * 30, tokenizer, window=64)
    found = evaluate(quantized("int4"), windows, tiny_llama())
    for parts in (by_position(found), by_kind(found, tokenizer)):
        assert sum(part.tokens for part in parts) == found.tokens
        assert sum(part.tokens * part.kl for part in parts) / found.tokens == pytest.approx(found.kl)
    assert [part.name for part in by_position(found)] == ["1-7", "8-31", "32-127"]
    assert by_position(found)[0].tokens == 7 * len(windows)


def test_kinds_of_tokens() -> None:
    class Words:
        all_special_ids = (0,)
        words = ("<s>", " the", "ing", "42", " 7", ",", "\n\n", " (", "a")

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [8]

        def decode(self, ids: list[int]) -> str:
            return "".join(self.words[index] for index in ids)

        def batch_decode(self, rows: list[list[int]], **_: bool) -> list[str]:
            return [self.decode(row) for row in rows]

    kinds = kinds_of(range(8), Words())
    assert kinds == ["special", "word", "inner", "number", "number", "punctuation", "space", "punctuation"]

"""Windows of a text, perplexity against transformers' own loss, and divergence from a kept reference."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import PreTrainedModel

from llmqat.evaluate.perplexity import TokenWindows, evaluate, keep_reference, windows_from_blocks, windows_from_text
from llmqat.layers import QuantConfig, prepare
from llmqat.metrics import IGNORED_LABEL
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_model, tiny_qwen2, tiny_qwen3, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog; " * 40


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def with_bos() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def random_blocks(count: int = 6, length: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (count, length), generator=torch.Generator().manual_seed(seed))


# Windows


def test_windows_without_overlap_are_the_text_cut(tokenizer: Any) -> None:
    windows = windows_from_text(TEXT, tokenizer, window=50)
    ids = tokenizer(TEXT)["input_ids"]
    assert len(windows) == len(ids) // 50
    assert windows.ids.flatten().tolist() == ids[: len(windows) * 50]
    assert torch.equal(windows.labels, windows.ids)
    assert (windows.window, windows.stride, windows.scored_tokens) == (50, 50, len(windows) * 49)
    assert windows.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


@settings(max_examples=40, deadline=None)
@given(window=st.integers(2, 60), stride=st.integers(1, 60), length=st.integers(60, 200))
def test_each_token_is_scored_once_at_any_stride(window: int, stride: int, length: int) -> None:
    stride = min(stride, window)
    text = "".join(chr(33 + i % 90) for i in range(length))
    windows = windows_from_text(text, tiny_tokenizer(), window, stride)
    starts = torch.arange(len(windows)) * stride
    positions = starts.unsqueeze(1) + torch.arange(window)
    scored = positions[:, 1:][windows.labels[:, 1:] != IGNORED_LABEL].tolist()
    assert len(scored) == len(set(scored)) == windows.scored_tokens
    if stride < window:
        assert sorted(scored) == list(range(1, int(positions.max()) + 1))


def test_a_bos_token_opens_every_window_and_is_not_scored() -> None:
    tokenizer = with_bos()
    windows = windows_from_text(TEXT, tokenizer, window=20, stride=20)
    assert windows.ids[:, 0].eq(tokenizer.bos_token_id).all()
    assert windows.labels[:, 0].eq(IGNORED_LABEL).all()
    assert windows.stride == 19
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert windows.ids[:, 1:].flatten().tolist() == ids[: len(windows) * 19]
    assert windows.scored_tokens == len(windows) * 19


def test_max_windows_takes_the_first(tokenizer: Any) -> None:
    every = windows_from_text(TEXT, tokenizer, window=30, stride=10)
    some = windows_from_text(TEXT, tokenizer, window=30, stride=10, max_windows=3)
    assert torch.equal(some.ids, every.ids[:3])
    assert torch.equal(some.labels, every.labels[:3])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "my.txt is empty"),
        (" \n", {}, "my.txt is empty"),
        ("too short", {}, "my.txt has 9 tokens, fewer than one window of 64"),
        (TEXT, {"stride": 65}, "stride=65 is not between 1 and window=64"),
        (TEXT, {"stride": 0}, "stride=0"),
        (TEXT, {"max_windows": 0}, "max_windows=0"),
        (TEXT, {"window": 1}, "window=1"),
    ],
)
def test_windows_that_cannot_be_are_refused(tokenizer: Any, text: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windows_from_text(text, tokenizer, **{"window": 64, "source": "my.txt", **options})


def test_blocks_are_windows(tokenizer: Any) -> None:
    blocks = random_blocks()
    windows = windows_from_blocks(blocks)
    assert windows.scored_tokens == 6 * 31
    assert windows.sha256 == windows_from_blocks(blocks.clone()).sha256 != windows_from_blocks(blocks + 1).sha256
    with pytest.raises(ValueError, match=r"shape \(0, 5\)"):
        windows_from_blocks(torch.zeros(0, 5, dtype=torch.long))


# Perplexity


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_qwen3])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_perplexity_is_that_of_transformers(make: Any, batch_size: int) -> None:
    model: PreTrainedModel = make()
    blocks = random_blocks()
    found = evaluate(model, blocks, batch_size=batch_size)
    with torch.no_grad():
        loss = float(model(input_ids=blocks, labels=blocks).loss)
    assert found.nll == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert (found.tokens, found.windows, found.window, found.kl, found.top1) == (6 * 31, 6, 32, None, None)


def test_overlap_is_context_only() -> None:
    model = tiny_llama()
    windows = windows_from_text(TEXT, tiny_tokenizer(), window=40, stride=8, max_windows=5)
    found = evaluate(model, windows)
    expected: list[float] = []
    with torch.no_grad():
        for ids, labels in zip(windows.ids, windows.labels, strict=True):
            log_probs = F.log_softmax(model(input_ids=ids[None]).logits[0, :-1], dim=-1)
            expected += [-float(log_probs[t, label]) for t, label in enumerate(labels[1:].tolist()) if label >= 0]
    assert len(expected) == found.tokens == 39 + 4 * 8
    assert found.nll == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_divergence_is_that_of_full_logits() -> None:
    teacher, student = tiny_llama(), tiny_llama()
    prepare(student, QuantConfig.preset("int4", group_size=32))
    blocks = random_blocks()
    found = evaluate(student, blocks, teacher, batch_size=2)
    with torch.no_grad():
        own = F.log_softmax(student(input_ids=blocks).logits[:, :-1], dim=-1).flatten(0, 1)
        target = F.log_softmax(teacher(input_ids=blocks).logits[:, :-1], dim=-1).flatten(0, 1)
    assert found.kl == pytest.approx(float(F.kl_div(own, target, log_target=True, reduction="batchmean")), rel=1e-4)
    assert found.top1 == pytest.approx(float((own.argmax(-1) == target.argmax(-1)).float().mean()))
    assert found.kl > 0


def test_a_kept_reference_serves_without_its_model_and_counts_itself() -> None:
    model = tiny_llama()
    windows = windows_from_blocks(random_blocks())
    reference = keep_reference(model, windows, batch_size=2)
    assert reference.hidden.shape == (6 * 31, 64)
    assert (reference.evaluation.kl, reference.evaluation.top1) == (0.0, 1.0)
    assert reference.evaluation == evaluate(model, windows, reference, batch_size=2)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "cohere", "falcon_h1"])
def test_logits_that_are_scaled_or_capped_are_scored_as_the_model_gives_them(model_type: str) -> None:
    model, blocks = tiny_model(model_type), random_blocks()
    changes = {"final_logit_softcapping": 2.0, "logits_scaling": 3.0, "logit_scale": 0.3, "lm_head_multiplier": 0.25}
    for name, value in changes.items():
        if hasattr(model.config, name):
            setattr(model.config, name, value)
    model = type(model)(model.config).eval()  # which may keep such a number
    with torch.no_grad():
        expected = F.cross_entropy(model(input_ids=blocks).logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
    assert evaluate(model, blocks).nll == pytest.approx(float(expected), rel=1e-5)


def test_logits_that_are_made_in_an_unknown_way_are_refused() -> None:
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda module, args, output: 3 * output)
    with pytest.raises(ValueError, match="computes its logits from the output head in a way that llmqat does not know"):
        evaluate(model, random_blocks())


def test_float32_masters_are_evaluated_as_their_checkpoint() -> None:
    masters, deployed = tiny_llama(), tiny_llama().to(torch.bfloat16)
    blocks = random_blocks()
    as_checkpoint = evaluate(masters, blocks, dtype=torch.bfloat16)
    assert as_checkpoint.perplexity == pytest.approx(evaluate(deployed, blocks).perplexity, rel=1e-3)
    assert next(masters.parameters()).dtype == torch.float32


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    seen: list[tuple[int, int]] = []
    evaluate(model, random_blocks(), batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert model.training
    assert seen == [(128, 192), (192, 192)]
    assert model(input_ids=random_blocks()).logits.shape[-1] == VOCAB_SIZE
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_windows_than_the_reference_saw_are_refused() -> None:
    model = tiny_llama()
    reference = keep_reference(model, windows_from_blocks(random_blocks(), "one.txt"))
    with pytest.raises(ValueError, match=r"one\.txt and the model is evaluated on those of two\.txt"):
        evaluate(model, windows_from_blocks(random_blocks(seed=1), "two.txt"), reference)
    answers = windows_from_blocks(random_blocks(), "one.txt")
    labels = answers.labels.clone()
    labels[:, :8] = -100
    reference = keep_reference(model, replace(answers, labels=labels))
    other = answers.ids.clone()
    other[:, :8] = 5
    with pytest.raises(ValueError, match="a divergence needs the same windows"):
        evaluate(model, replace(answers, ids=other, labels=labels), reference)
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(model, random_blocks(), batch_size=0)


def test_a_model_that_knows_nothing_scores_infinity_not_an_error() -> None:
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    assert evaluate(model, random_blocks()).perplexity == math.inf


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_reads_prose(smollm2: tuple[PreTrainedModel, Any]) -> None:
    from pydoc_data.topics import topics

    model, tokenizer = smollm2
    windows = windows_from_text("\n\n".join(topics[key] for key in sorted(topics)), tokenizer, 256, max_windows=4)
    assert isinstance(windows, TokenWindows)
    found = evaluate(model, windows)
    with torch.no_grad():
        loss = float(model(input_ids=windows.ids, labels=windows.ids).loss)
    assert found.nll == pytest.approx(loss, rel=2e-3)
    assert 5 < found.perplexity < 40


@pytest.mark.parametrize("first", ["import llmqat.evaluate.compare", "llmqat.evaluate"])
def test_the_public_name_works_whatever_was_imported_first(first: str) -> None:
    script = f"import llmqat\n{first}\nassert callable(llmqat.evaluate)\nfrom llmqat.evaluate.speed import disk_usage\n"
    script += "try:\n    llmqat.evaluate()\nexcept TypeError as error:\n    assert 'windows' in str(error), error"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])

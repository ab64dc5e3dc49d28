"""Advice: one a model, by the interval of its KL, with commands that this llmqat takes."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from llmqat.calibrate import AllocationConfig
from llmqat.calibrate.sensitivity import schemes_of, sizes_of
from llmqat.cli import app
from llmqat.evaluate import budget
from llmqat.evaluate.advice import advice, first_steps
from llmqat.evaluate.documents import ComparisonDocument, head
from llmqat.layers import QuantConfig, stored_bytes
from llmqat.recipe import Recipe, load_recipe
from llmqat.recipe.quantize import scheme_of
from llmqat.schemes import SHIPPED

ORIGINAL = "someone/original"


@pytest.fixture(autouse=True)
def _no_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes with llmqat is measured anew now and then; test_budget.py has laws of its own."""
    monkeypatch.setattr(budget, "FILE", tmp_path / "missing.json")


def texts(perplexity: float, kl: float | None, spread: float | None, lost: float | None) -> dict[str, Any]:
    intervals = {} if spread is None or kl is None else {"kl": {"low": kl - spread, "high": kl + spread}}
    figures: dict[str, Any] = {"nll": math.log(perplexity), "perplexity": perplexity, "kl": kl, "top1": 0.9}
    figures |= {"reverse_kl": kl, "top5": 0.9, "recovered": {"perplexity": None, "kl": None}, "intervals": intervals}
    if lost is not None:
        low, high = perplexity - 20 - lost, perplexity - 20 + lost
        figures["perplexity_lost"] = {"low": low, "high": high, "noise": low <= 0 <= high}
    return figures


def row(
    name: str, kl: float | None, spread: float | None = 0.002, perplexity: float = 21.0, **more: Any
) -> dict[str, Any]:
    figures = texts(perplexity, kl, spread, 0.5)
    costs = {"bits_per_weight": 4.25, "bytes_on_disk": 80_000_000, "decode_tokens_per_second": None, "costs": None}
    scheme = {"preset": "int4", "group_size": 64}
    more = {
        "role": "other",
        "seconds": 5.0,
        "spec": f"runs/{name}/model",
        "method": "ranges, gptq",
        "scheme": scheme,
    } | more
    return {"name": name, **costs, **figures, "texts": {"pydoc": figures}, **more}


def report(*rows: dict[str, Any], windows: int = 40, asked: int | None = 40) -> dict[str, Any]:
    whole = row("original", 0.0, 0.0, 20.0, role="full precision", spec=ORIGINAL, bits_per_weight=16.0, method="")
    text = {"sha256": "0", "windows": windows, "window": 512, "stride": 512, "tokens": 20_000, "ids_sha256": "1"}
    settings = {"texts": ["pydoc"], "max_windows": asked, "window": 512, "protocol": "windows"}
    return {
        "texts": {"pydoc": text},
        "settings": settings,
        "rows": [{**whole, "bytes_on_disk": 269_000_000}, *rows],
        "findings": [],
        "environment": {},
    }


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"kl": 0.01}, "ship", "ship it, no training is needed"),
        (
            {"kl": 0.01, "method": "trained"},
            "ship",
            "KL 0.0100 (0.0080 to 0.0120) from original, no more than 0.02: ship",
        ),
        ({"kl": 0.019}, "measure more", "cannot tell from this text; give more windows (--max-windows 200)"),
        ({"kl": 0.01, "spread": None}, "measure more", "more windows"),
        ({"kl": 0.02}, "measure more", "too close to the limit"),
        ({"kl": 0.025}, "train", "Training usually leaves about 75 % of that, 0.019 nats; 60,000 tokens would take"),
        ({"kl": 0.07, "method": "plain rounding"}, "calibrate", "leaves about 25 % of that, 0.018 nats. Perplexity"),
        (
            {"kl": 0.1, "method": "plain rounding"},
            "calibrate",
            "train it then; 60,000 tokens would take about 2 minutes",
        ),
        (
            {"kl": 0.4, "role": "plain rounding"},
            "calibrate",
            "0.1 nats, still more than 0.02, as training would: more bits",
        ),
        ({"kl": None, "method": "plain rounding"}, "calibrate", "rounded plainly"),
        (
            {"kl": 0.08},
            "more bits",
            "0.06 nats, still more than 0.02. --target-bits chooses bits for each layer, which is",
        ),
        ({"kl": 0.4, "method": ""}, "more bits", "leaves about 25 % of that, 0.1 nats"),
        ({"kl": 0.08, "method": "trained"}, "more bits", "it is trained already"),
        ({"kl": None, "spread": None}, "more bits", "needs more bits"),
    ],
)
def test_the_interval_decides(changes: dict[str, Any], verdict: str, words: str, tmp_path: Path) -> None:
    found = report(row("four bits", **changes))
    (one,) = advice(found)
    assert one.verdict == verdict
    assert words in one.said
    assert "Perplexity 21, +5.0% (+2.5% to +7.5%)." in one.said
    ComparisonDocument.model_validate({**head("comparison"), **found, "advice": [one.to_dict()]})
    assert one.next
    for line in one.next:
        _check_runs(line, tmp_path)


def _check_runs(line: str, tmp_path: Path) -> None:
    """Parses a proposed command as the command line would, and a recipe's keys as `train` would."""
    program, name, *_ = shlex.split(line)
    if program == "llmqat":
        given = _params(line)
        assert name != "train" or _recipe(given, tmp_path).quant.weights.num_bits == 4


def _params(line: str) -> dict[str, Any]:
    _, name, *words = shlex.split(line)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    found: dict[str, Any] = command.make_context(name, words).params
    return found


def _recipe(given: dict[str, Any], tmp_path: Path) -> Recipe:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    kept = [word if not word.startswith("model=") else f"model={model}" for word in given["overrides"]]
    return load_recipe(given["recipe"], kept)


def test_each_next_step_is_one_that_the_words_call_for() -> None:
    def steps(kl: float, **changes: Any) -> list[str]:
        (one,) = advice(report(row("a", kl, **changes)))
        return [f"{line.split()[1]} {'mixed' if '--target-bits' in line else 'one'}" for line in one.next]

    plain = {"method": "plain rounding"}
    assert steps(0.07, **plain) == ["quantize one"]
    assert steps(0.1, **plain) == ["quantize one", "train one"]
    assert steps(0.4, **plain) == ["quantize one", "quantize mixed", "quantize one"]
    assert steps(0.025) == ["train one"]
    assert steps(0.08) == ["quantize mixed", "quantize one"]
    (one,) = advice(report(row("a", 0.07, **plain)))
    words = "--scheme int4 --group-size 64 --method gptq --out a-gptq"
    assert one.next == (f"llmqat quantize {ORIGINAL} {words}",)


@pytest.mark.parametrize("how", ["plain rounding", "gptq", "trained"])
@pytest.mark.parametrize("preset", [*SHIPPED, "fp8-tensor", "mxfp8", "int4-2:4", "ternary-g128", "nvfp4a16kvfp8"])
def test_every_scheme_gets_commands_that_can_be(preset: str, how: str, tmp_path: Path) -> None:
    weights = QuantConfig.preset(preset).weights
    bits = 8 * stored_bytes(weights, 768, 768, "a layer") / 768**2
    scheme = {"preset": preset, "group_size": weights.group_size if weights.levels == "integer" else None}
    for kl in (0.025, 0.08, 0.4):
        (one,) = advice(report(row("a", kl, method=how, bits_per_weight=bits, scheme=scheme)))
        assert one.next
        for line in one.next:
            given = _params(line)
            if line.split()[1] == "train":
                assert _recipe(given, tmp_path).quant.weights == weights
                continue
            quant = scheme_of(given["scheme"], given["group_size"])
            if given["target_bits"] is None:
                assert quant.weights.num_bits >= weights.num_bits
                continue
            choices = given["choices"] or AllocationConfig(target_bits=3.5).choices
            sizes = sizes_of(schemes_of(quant, choices), 768, 768, "a layer") or dict(
                zip(choices, choices, strict=True)
            )
            assert min(sizes.values()) <= given["target_bits"] <= max(sizes.values())


def test_the_threshold_is_the_users() -> None:
    found = report(row("four bits", 0.08))
    assert [advice(found, limit)[0].verdict for limit in (0.02, 0.07, 0.08, 0.1)] == [
        *("more bits", "train", "measure more", "ship")
    ]
    with pytest.raises(ValueError, match=r"--threshold=-1 is negative"):
        advice(found, -1)
    assert advice({**found, "rows": found["rows"][1:]}) == ()


def test_a_text_that_is_scored_whole_calls_for_a_longer_one() -> None:
    (one,) = advice(report(row("a", 0.019), windows=30))
    assert "give a longer text" in one.said
    assert "--text YOUR.txt" in one.next[0]


def test_a_model_and_its_export_have_one_advice() -> None:
    run = {"calibrate": [{"stage": "gptq"}]}
    made = row("a", 0.08, run=run)
    exported = row("a.gguf", 0.0805, perplexity=21.02, bits_per_weight=4.5, spec="a.gguf")
    (one,) = advice(report(made, row("a-gptq", 0.2, run=run), exported))
    assert one.models == ("a", "a-gptq", "a.gguf")
    assert one.said.startswith("a and a-gptq and a.gguf: KL 0.08")
    assert len(advice(report(made, row("b", 0.09), row("c", 0.0805, bits_per_weight=5.5)))) == 3


def test_the_worst_text_decides() -> None:
    found = report(row("a", 0.01))
    found["texts"]["other"] = found["texts"]["pydoc"]
    for entry in found["rows"]:
        entry["texts"]["other"] = texts(21.0, 0.3 if entry["name"] == "a" else 0.0, 0.01, 0.5)
    (one,) = advice(found)
    assert (one.verdict, one.text) == ("more bits", "other")
    assert "on other" in one.said


def test_a_model_that_learned_answers_is_judged_by_perplexity() -> None:
    run = {"recipe": {"model": ORIGINAL, "train": {"cross_entropy_weight": 1.0}}, "training": {"steps": 1}}
    learned = row("chat", 0.4, perplexity=15.0, method="trained", run=run)
    (one,) = advice(report(learned))
    assert (one.verdict, one.figure) == ("measure more", "perplexity")
    assert "perplexity -25.0% (-27.5% to -22.5%) from original: it predicts pydoc better than the original" in one.said
    assert "(perplexity 15 against 20); perplexity cannot tell whether answers are good" in one.said
    assert "ship" not in one.said
    assert "its perplexity is judged, not its KL" in one.said


def test_without_a_reference_the_next_step_finds_one() -> None:
    alone = report(row("a", None, run={"recipe": {"model": ORIGINAL}}))
    assert first_steps({**alone, "rows": alone["rows"][1:]}) == [f"llmqat eval runs/a/model --reference {ORIGINAL}"]
    whole = row("my model", None, scheme={}, spec="my model")
    assert first_steps({**alone, "rows": [whole]}) == ["llmqat quantize 'my model' --scheme int4 --out my-model-int4"]

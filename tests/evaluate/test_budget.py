"""The law of KL against tokens: it falls from the measured start, is read from one file, and speaks where it holds."""

from __future__ import annotations

import json
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmqat.cli import app
from llmqat.evaluate import budget
from llmqat.evaluate.advice import STEP_TOKENS, advice
from llmqat.evaluate.budget import FORMAT, Law, law_of, laws, read_laws
from llmqat.recipe import load_recipe
from llmqat.recipe.config import training_arguments
from llmqat.recipe.plan import law_of_recipe
from tests.evaluate.test_advice import report, row
from tests.flows.small import small
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
FACTS: dict[str, Any] = {"model": "SmolLM2-135M", "parameters": 134_515_008, "group_size": 64}
FACTS |= {"stages": ("ranges", "gptq"), "judged_on": ("test", "pydoc"), "least": 40_960, "most": 1_000_448}
SCRIPT = runpy.run_path(str(ROOT / "eval" / "budget_law.py"))
BUDGETS = (40_960, 100_352, 300_032, 1_000_448)


def law(**changes: Any) -> Law:
    given = {"scheme": "int4", "text": "own", "start": 0.1, "floor": 0.02, "scale": 50_000.0, "power": 0.5}
    given |= {"error": 0.02, "enough_below": 60_000, "points": ((0, 0.1), (40_960, 0.08))}
    return Law(**{**FACTS, **given, **changes})


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Law, ...]:
    found = (law(), law(text="valid", floor=0.0), law(scheme="int3", start=0.3, enough_below=None))
    document = SCRIPT["document"]([*found, law(judged_on=("pydoc",))], "a command")
    (tmp_path / "budget.json").write_text(json.dumps(document))
    monkeypatch.setattr(budget, "FILE", tmp_path / "budget.json")
    return found


def check_falls(one: Law) -> None:
    tokens = [0, 1, *(10**power for power in range(2, 9))]
    kls = [one.kl(count) for count in tokens]
    assert kls[0] == one.start == pytest.approx(one.points[0][1], abs=1e-6)
    assert kls == sorted(kls, reverse=True)
    assert kls[-1] >= one.floor
    assert one.left(0) == 1
    if (count := one.tokens_for(one.left(one.most))) is not None:
        assert one.kl(count) <= one.kl(one.most)


@pytest.mark.parametrize("changes", [{}, {"floor": 0.0}, {"power": 0.0}, {"floor": 0.1}, {"power": 3.0}])
def test_a_law_falls_from_its_start(changes: dict[str, Any]) -> None:
    one = law(**changes)
    check_falls(one)
    kl = one.kl(30_000)
    assert one.tokens_at(0.2) == one.tokens_at(one.start) == 0
    assert one.tokens_at(one.floor - 0.01) == float("inf")
    if kl < one.start:
        assert one.tokens_at(kl) == pytest.approx(30_000)
        assert one.tokens_for(one.left(30_000)) in (30_000, 30_001)
        assert one.tokens_for(one.left(2_000_000)) is None


def test_the_shipped_laws_hold() -> None:
    """Once eval/budget.py has written the file, what it says is what a plan of the shipped recipe says."""
    assert budget.FILE.is_file() == bool(laws())
    for one in laws():
        check_falls(one)
        assert one.least <= one.most == one.points[-1][0]
        assert one.enough_below is None or 0 <= one.enough_below <= one.most
        measured = [abs(one.kl(tokens) / kl - 1) for tokens, kl in one.points]
        assert max(measured) <= max(3 * one.error, 0.02)
        own = ("data.source=synthetic",) if one.text == "own" else ("data={source: text, path: README.md}",)
        stages = f"calibrate=[{', '.join(one.stages)}]"
        recipe = load_recipe(RECIPES / f"smollm2-135m-{one.scheme}.yaml", [stages, *own])
        assert law_of_recipe(recipe, training_arguments(recipe)) == one


def test_the_file(known: tuple[Law, ...], tmp_path: Path) -> None:
    assert laws() == known
    assert law_of("int4", 64, own_text=True) == known[0]
    assert law_of("int4", 64, own_text=False) == known[1]
    assert law_of("int4", 32, own_text=True) is law_of("int8", None, own_text=True) is None
    document = json.loads(budget.FILE.read_text())
    assert document["format"] == FORMAT
    other = tmp_path / "other.json"
    for wrong, message in (
        ({**document, "format": "llmqat budget 0"}, "format='llmqat budget 0'"),
        ({**document, "laws": []}, "laws"),
        ({**document, "laws": [{**document["laws"][0], "floor": 0.2}]}, "floor=0.2 lies above start=0.1"),
        ({**document, "laws": [{**document["laws"][0], "slope": 1}]}, "slope"),
    ):
        other.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            read_laws(other)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], 0),
        (["quant={preset: int3, group_size: 64}"], 2),
        (["data={source: text, path: README.md}"], 1),
        (["quant={preset: int4, group_size: 32}"], None),
        (["quant=int8"], None),
        (["calibrate=[ranges]"], None),
        (["lora={r: 4}"], None),
        (["train.trainable=scales"], None),
        (["train.cross_entropy_weight=1.0"], None),
    ],
)
def test_a_recipe_has_the_law_of_its_like(known: tuple[Law, ...], changes: list[str], expected: int | None) -> None:
    recipe = load_recipe(RECIPES / "smollm2-135m-int4.yaml", ["calibrate=[ranges, gptq]", *changes])
    found = law_of_recipe(recipe, training_arguments(recipe))
    assert found == (None if expected is None else known[expected])


def test_plan_says_what_tokens_are_worth(known: tuple[Law, ...], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = small(
        tmp_path / "model", tmp_path / "run", "calibrate=[ranges, gptq]", "quant={preset: int4, group_size: 64}"
    )
    words += ["data={source: synthetic, tokens: 65536, block_size: 32}", "train.max_steps=640"]

    def planned(*more: str) -> str:
        done = CliRunner().invoke(app, ["plan", str(RECIPES / "smollm2-135m-int4.yaml"), *words, *more])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    said = planned()
    assert (
        "training: steps 640, tokens 40,960 tokens: measured on SmolLM2-135M, int4 in groups of 64, text of its" in said
    )
    assert (
        "KL 0.1 after ranges and gptq, about 0.079 (±2 %) after training on 40,960 tokens, about 0.037 (±2 %) after"
        in said
    )
    assert "4 bits: below about 60,000 tokens calibration is as good. This is one model, of 135M parameters" in said
    assert "measured on" not in planned("quant=int8")
    calibrated = planned("train=null")
    assert "KL 0.1 after ranges and gptq, about 0.037 (±2 %) after training on 1,000,448 tokens, the most" in calibrated
    assert "after training on 0 tokens" not in calibrated


def test_worth_of_more_than_was_measured_is_not_guessed() -> None:
    assert "3 bits: calibration was as good as any training" in law(scheme="int3", enough_below=None).worth(1000)
    early = (
        "4 bits: 40,960 tokens, the fewest that were measured, do better than calibration; by the fit, below about 900"
    )
    assert early in law(enough_below=900).worth(1000)
    said = law().worth(5_000_000)
    assert "5,000,000" not in said
    assert "KL 0.1 after ranges and gptq, about 0.037 (±2 %) after 1,000,448 tokens, the most that was measured" in said


def test_advice_says_how_many_tokens(known: tuple[Law, ...]) -> None:
    (one,) = advice(report(row("one", 0.04)))
    assert one.verdict == "train"
    tokens = known[0].tokens_for(0.5)
    assert tokens is not None
    assert f"training on {tokens:,} tokens left about 50 %: here 0.02 nats; {tokens:,} tokens would take" in one.said
    assert "4 bits: below about 60,000 tokens calibration is as good." in one.said
    _, program, name, *given = [*shlex.split(one.next[0])[:1], *shlex.split(one.next[0])]
    recipe = load_recipe(RECIPES / f"{given[0]}.yaml", given[1:])
    assert (program, name, given[0]) == ("llmqat", "train", "smollm2-135m-int4")
    assert 0 <= recipe.train["max_steps"] * STEP_TOKENS - tokens < STEP_TOKENS
    assert recipe.data.tokens == recipe.train["max_steps"] * STEP_TOKENS
    assert [stage.stage for stage in recipe.calibrate] == ["ranges", "gptq"]
    (short,) = advice(report(row("one", 0.0225, spread=0.001)))
    assert "training on 40,960 tokens left about 79 %" in short.said  # no fewer than were measured
    (much,) = advice(report(row("one", 0.09)))
    assert much.verdict == "more bits"
    assert "training on 1,000,448 tokens left about 37 %: here 0.034 nats, still more than 0.02" in much.said
    (rounded,) = advice(report(row("one", 0.12, method="plain rounding")))
    assert "train it then" in rounded.said
    (other,) = advice(report(row("one", 0.025, scheme={"preset": "int4", "group_size": 32})))
    assert "Training usually leaves about 75 % of that, 0.019 nats; 60,000 tokens would take" in other.said


def test_a_step_of_the_recipes_has_as_many_tokens_as_the_advice_counts() -> None:
    for scheme in ("int4", "int3", "int2"):
        recipe = load_recipe(RECIPES / f"smollm2-135m-{scheme}.yaml")
        arguments = training_arguments(recipe)
        samples = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        assert samples * recipe.data.block_size == STEP_TOKENS


# The fit


def cells(kls: dict[int, list[float]], scheme: str = "int4") -> list[dict[str, Any]]:
    """Cells of one window a number, of seeds alike."""
    return [
        {"scheme": scheme, "text": "own", "tokens": tokens, "seed": seed, "texts": {
            "test": {"window_kl": windows}, "pydoc": {"window_kl": windows}, "own": {"window_kl": windows[:1]}}}
        for tokens, windows in kls.items()
        for seed in range(2 if tokens == BUDGETS[0] else 1)
    ]  # fmt: skip


FIT_FACTS = {"model": "package:a/SmolLM2.Q4_1.gguf", "parameters": 5, "stages": ("ranges",), "group_size": 64}


@pytest.mark.parametrize("true", [law(), law(floor=0.0, power=0.2), law(floor=0.05, scale=3e5, power=1.0)])
def test_the_fit_finds_the_law(true: Law) -> None:
    windows = {tokens: [true.kl(tokens) + apart for apart in (-0.01, 0, 0.01)] for tokens in (0, *BUDGETS)}
    pooled, *each = SCRIPT["laws_of"](cells(windows), FIT_FACTS)
    assert [one.judged_on for one in (pooled, *each)] == [("test", "pydoc"), ("test",), ("pydoc",), ("own",)]
    assert pooled.model == "SmolLM2"
    check_falls(pooled)
    assert pooled.error < 0.001
    for tokens in (*BUDGETS, 20_000, 500_000):
        assert pooled.kl(tokens) == pytest.approx(true.kl(tokens), rel=0.002)
    assert pooled.enough_below == 0  # the paired differences have no noise
    assert (pooled.least, pooled.most) == (BUDGETS[0], BUDGETS[-1])


def test_noise_says_when_calibration_is_enough() -> None:
    true = law()
    windows = {tokens: [true.kl(tokens)] * 40 for tokens in (0, *BUDGETS)}
    noisy = {**windows, BUDGETS[0]: [true.kl(BUDGETS[0]) + (0.02 if n % 2 else -0.02) for n in range(40)]}
    found = SCRIPT["laws_of"](cells(noisy), FIT_FACTS)[0]
    assert found.enough_below is not None
    assert 2000 < found.enough_below < 40_960
    assert found.enough_below % 10 ** (len(str(found.enough_below)) - 2) == 0


def test_a_budget_that_gained_nothing_is_not_said_to_pay() -> None:
    kls = dict(zip((0, *BUDGETS), (0.1, 0.1, 0.08, 0.06, 0.05), strict=True))
    found = SCRIPT["laws_of"](cells({tokens: [kl, kl] for tokens, kl in kls.items()}), FIT_FACTS)[0]
    assert found.enough_below is not None
    assert BUDGETS[0] <= found.enough_below < BUDGETS[1]
    assert "do better than calibration" not in found.enough()


def test_a_training_that_only_harms_has_a_law_without_gain() -> None:
    rising = {0: [0.1, 0.12], **{tokens: [0.11, 0.13] for tokens in BUDGETS}}
    found = SCRIPT["laws_of"](cells(rising), FIT_FACTS)[0]
    check_falls(found)
    assert found.left(found.most) > 0.99
    assert found.enough_below is None
    assert "calibration was as good as any training" in found.enough()


def test_a_law_needs_a_start_and_three_budgets() -> None:
    few = {tokens: [law().kl(tokens)] * 3 for tokens in (0, *BUDGETS[:2])}
    assert SCRIPT["laws_of"](cells(few), FIT_FACTS) == []
    no_start = {tokens: [law().kl(tokens)] * 3 for tokens in BUDGETS}
    assert SCRIPT["laws_of"](cells(no_start), FIT_FACTS) == []

"""The comparison: shares of the gap worked by hand, warnings, table, JSON, and one model in memory at a time."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from llmqat.calibrate import calibrate_ranges
from llmqat.evaluate.compare import (
    Candidate,
    Comparison,
    NotMeasured,
    Recovered,
    Role,
    Row,
    _short,
    candidate_from,
    compare,
    progress_bar,
    render,
    write_json,
)
from llmqat.evaluate.perplexity import Evaluation, TokenWindows, windows_from_blocks
from llmqat.evaluate.report import verdict_on
from llmqat.export import save
from llmqat.layers import QuantConfig, prepare
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer


def evaluation(perplexity: float, kl: float | None, top1: float | None = 0.9) -> Evaluation:
    return Evaluation(perplexity, 1.0, kl, top1, 100, 4, 32, 32, "0123456789abcdef")


def row(name: str, role: Role, **texts: tuple[float, float | None]) -> Row:
    return Row(name, role, 4.25, 90_000_000, 40.0, {text: evaluation(*figures) for text, figures in texts.items()})


def comparison(trained: tuple[float, float], full: float = 22.6) -> Comparison:
    return Comparison(
        (
            row("original", "full precision", prose=(full, 0.0)),
            row("rounded", "plain rounding", prose=(30.6, 0.4)),
            row("searched", "training-free", prose=(26.6, 0.2)),
            row("ours", "trained", prose=trained),
        )
    )


def windows(seed: int = 0) -> TokenWindows:
    ids = torch.randint(VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(seed))
    return windows_from_blocks(ids, f"text {seed}")


def quantized(method: str, num_bits: int = 3) -> nn.Module:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32) if num_bits == 4 else QuantConfig.preset("int3"))
    calibrate_ranges(model, method)
    return model


def rendered(found: Comparison, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    console.print(render(found, title="results"))
    return console.export_text(styles=True)


# What is derived


def test_the_share_of_the_gap_by_hand() -> None:
    found = comparison(trained=(24.6, 0.1))
    assert found.recovered(found.rows[2], "prose").perplexity == pytest.approx(0.5)
    assert found.recovered(found.rows[2], "prose").kl == pytest.approx(0.5)
    assert found.recovered(found.rows[3], "prose").perplexity == pytest.approx(0.75)
    assert found.recovered(found.rows[3], "prose").kl == pytest.approx(0.75)
    assert found.recovered(found.rows[1], "prose").kl == 0
    assert found.findings() == ()


def test_there_is_no_share_without_a_gap() -> None:
    lossless = Comparison((row("a", "full precision", t=(5.0, 0.0)), row("b", "plain rounding", t=(5.0, 0.0))))
    assert lossless.recovered(lossless.rows[1], "t").perplexity is None
    assert lossless.recovered(lossless.rows[1], "t").kl is None
    alone = Comparison((row("a", "other", t=(5.0, None)),))
    assert alone.recovered(alone.rows[0], "t").perplexity is None


@pytest.mark.parametrize("trained", [(26.0, 0.21), (27.0, 0.19), (40.0, 0.9)])
def test_training_that_made_it_worse_is_said_in_red_with_what_to_try(trained: tuple[float, float]) -> None:
    (finding,) = comparison(trained).findings()
    assert finding.level == "warning"
    assert "ours is worse than searched on prose" in finding.text
    for advice in ("learning_rate", "more tokens", "teacher"):
        assert advice in finding.text
    assert "\x1b[1;31mours is worse than searched" in rendered(comparison(trained))


def test_learning_the_domain_is_not_called_recovery() -> None:
    (finding,) = comparison(trained=(22.0, 0.15)).findings()
    assert finding.level == "note"
    assert "not recovery" in finding.text


def test_rows_that_were_not_trained_are_not_judged() -> None:
    found = comparison(trained=(24.0, 0.1))
    swapped = Comparison((*found.rows[:3], row("peer", "other", prose=(50.0, 1.0))))
    assert swapped.findings() == ()


def fine_tuned(answers: float, prose_kl: float) -> Comparison:
    def measured(name: str, role: Role, perplexity: float, kl: float) -> Row:
        found = row(name, role, chats=(perplexity, kl), prose=(22.6, kl))
        return replace(
            found, evaluations={**found.evaluations, "chats": replace(found.evaluations["chats"], answers=True)}
        )

    rows = [
        measured("original", "full precision", 12.0, 0.0),
        measured("rounded", "plain rounding", 14.0, 0.1),
        measured("ours", "trained", answers, prose_kl),
    ]
    return Comparison(tuple(rows), fine_tuned=True)


def test_a_model_that_was_to_learn_answers_is_judged_by_them() -> None:
    learned = fine_tuned(answers=4.0, prose_kl=0.2)
    said, moved = learned.findings()
    assert (said.level, moved.level) == ("note", "note")
    assert said.text.startswith("chats: perplexity 12.00 (original) -> 4.00 (ours), conversations: ")
    assert said.text.endswith("Whether the answers are good, the examples show.")
    assert "ours is further from the original on prose than rounded: KL 0.2000 against 0.1000" in moved.text
    assert learned.recovered(learned.rows[-1], "chats") == Recovered(None, None)
    assert learned.recovered(learned.rows[-1], "prose").kl == pytest.approx(-1.0)
    (failed,) = fine_tuned(answers=12.5, prose_kl=0.05).findings()
    assert failed.level == "warning"
    assert "That is no gain beyond noise" in failed.text
    assert "says little" not in failed.text


# What is shown


def test_the_table_holds_every_figure_and_fits_a_terminal() -> None:
    text = Console(width=100).render_str(rendered(comparison(trained=(24.6, 0.1)))).plain
    for figure in (
        "22.60",
        "30.60",
        "24.60",
        "0.1000",
        "4.25",
        "90.0",
        "40.0",
        "75% / 75%",
        "90.0%",
        "sha256 0123456789ab",
    ):
        assert figure in text
    plain = Console(width=90, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    plain.print(render(comparison(trained=(24.6, 0.1))))
    assert "…" not in plain.export_text()


def test_each_text_has_its_section_and_costs_are_shown_once() -> None:
    found = Comparison(
        (
            row("original", "full precision", prose=(22.6, 0.0), code=(10.0, 0.0)),
            row("ours", "trained", prose=(24.6, 0.1), code=(11.0, 0.05)),
        )
    )
    text = rendered(found)
    assert text.count("90.0") == 6  # two sizes, and the agreement of two rows on two texts
    assert text.count("ours") == 2
    assert "code: 4 windows of 32, no overlap, 100 tokens scored" in text


def test_what_is_unknown_is_a_dash() -> None:
    bare = Row("bare", "other", None, None, None, {"t": evaluation(12.0, None, None)})
    assert rendered(Comparison((bare, row("known", "other", t=(12.0, 0.1))))).count("–") >= 5
    assert "–" not in rendered(Comparison((bare,))), "a column without any figure is left out"


@pytest.mark.parametrize(
    ("spread", "words"),
    [(81e-6, "0.0001"), (3e-7, "0.0001"), (0.00186, "0.0019"), (1.34, "1.3"), (9.6, "10"), (1e4, "10,000")],
)
def test_half_an_interval_has_two_digits(spread: float, words: str) -> None:
    assert _short(spread) == words


def test_the_json_holds_rows_texts_and_findings(tmp_path: Path) -> None:
    write_json(comparison(trained=(27.0, 0.1)), tmp_path / "new" / "results.json")
    read: dict[str, Any] = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [entry["role"] for entry in read["rows"]] == [
        "full precision",
        "plain rounding",
        "training-free",
        "trained",
    ]
    ours = read["rows"][3]
    for key in ("name", "bits_per_weight", "perplexity", "kl", "top1", "bytes_on_disk", "decode_tokens_per_second"):
        assert key in ours
    assert ours["kl"] == ours["texts"]["prose"]["kl"] == 0.1
    assert ours["recovered"]["kl"] == pytest.approx(0.75)
    assert read["texts"]["prose"] == {
        "sha256": "0123456789abcdef",
        "windows": 4,
        "window": 32,
        "stride": 32,
        "tokens": 100,
        "ids_sha256": None,
        "answers": False,
    }
    assert read["findings"][0]["level"] == "warning"


def test_json_is_replaced_whole_and_knows_no_infinity(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    write_json(Comparison((row("broken", "other", t=(float("inf"), None)),)), path)
    assert json.loads(path.read_text())["rows"][0]["perplexity"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


# What is measured


def test_four_models_on_two_texts_one_in_memory_at_a_time() -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def loads(make: Any) -> Any:
        def load() -> nn.Module:
            gc.collect()
            assert all(reference() is None for reference in alive), "the previous model is still in memory"
            model: nn.Module = make()
            alive.append(weakref.ref(model))
            return model

        return load

    seen: list[str] = []
    found = compare(
        [
            Candidate("rounded", loads(lambda: quantized("minmax")), "plain rounding", 3.25, 1000),
            Candidate("searched", loads(lambda: quantized("mse")), "training-free", 3.25, 1000),
            Candidate("original", loads(tiny_llama), "full precision", 16, 4000),
            Candidate("four bits", loads(lambda: quantized("mse", 4)), "trained", 4.5, 1300),
        ],
        {"one": windows(1), "two": windows(2)},
        speed=False,
        progress=lambda what, done, total: seen.append(what),
    )
    assert [entry.name for entry in found.rows] == ["rounded", "searched", "original", "four bits"]
    assert found.texts == ("one", "two")
    rounded, searched, original, four = (entry.evaluations["one"].kl for entry in found.rows)
    assert original == 0.0
    assert rounded is not None
    assert searched is not None
    assert four is not None
    assert rounded > searched > four > 0
    assert len(alive) == 4
    assert list(dict.fromkeys(seen))[:2] == ["original on one", "original on two"]
    assert found.environment["torch"] == torch.__version__


def test_what_training_gained_is_said_where_it_is_no_noise() -> None:
    def gained(trained: Candidate) -> list[str]:
        others = [
            Candidate("original", tiny_llama, "full precision"),
            Candidate("rounded", lambda: quantized("minmax"), "plain rounding"),
            Candidate("searched", lambda: quantized("mse"), "training-free"),
        ]
        texts = [finding.text for finding in compare([*others, trained], {"one": windows(1)}, speed=False).findings()]
        return [text for text in texts if "beyond noise" in text]

    (said,) = gained(Candidate("four bits", lambda: quantized("mse", 4), "trained"))
    assert said.startswith("four bits is nearer to full precision on one than searched, beyond noise: its KL minus")
    low, high = (float(word) for word in said.partition("searched is ")[2].split(" (")[0].split(" to "))
    assert low <= high < 0
    assert gained(Candidate("the same", lambda: quantized("mse"), "trained")) == []
    assert gained(Candidate("worse", lambda: quantized("minmax"), "trained")) == []


def test_what_was_measured_outlives_a_model_that_cannot_be(tmp_path: Path) -> None:
    def broken() -> nn.Module:
        raise RuntimeError("out of memory")

    candidates = [Candidate("int3", broken), Candidate("original", tiny_llama, "full precision")]
    with pytest.raises(NotMeasured, match="int3 could not be measured: out of memory") as caught:
        compare(candidates, {"one": windows()}, speed=False)
    verdict = verdict_on(caught.value.comparison)
    verdict.write(tmp_path / "a.json", None, None, None)
    found = json.loads((tmp_path / "a.json").read_text())
    assert [entry["name"] for entry in found["rows"]] == ["original"]
    assert found["findings"][0] == {"level": "warning", "text": str(caught.value)}
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(candidates[:1], {"one": windows()}, speed=False)


def test_without_full_precision_there_is_no_divergence() -> None:
    found = compare([Candidate("alone", tiny_llama)], {"one": windows()})
    assert found.rows[0].evaluations["one"].kl is None
    assert found.rows[0].decode_tokens_per_second is not None


def test_candidates_from_folders(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "full")
    tiny_tokenizer().save_pretrained(tmp_path / "full")
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    save(model, tmp_path / "packed", tiny_tokenizer())
    with progress_bar() as progress:
        found = compare(
            [
                candidate_from(str(tmp_path / "full"), "full precision"),
                candidate_from(str(tmp_path / "packed"), name="int4"),
            ],
            {"one": windows()},
            speed=False,
            progress=progress,
        )
    assert [entry.name for entry in found.rows] == ["full", "int4"]
    assert [entry.bits_per_weight for entry in found.rows] == [16, 4.5]
    assert found.rows[1].evaluations["one"].kl is not None
    with pytest.raises(FileNotFoundError, match="nowhere"):
        candidate_from(str(tmp_path / "nowhere" / "at-all"))


@pytest.mark.parametrize(
    ("candidates", "texts", "message"),
    [
        ([], 1, "at least one model"),
        ([Candidate("a", tiny_llama)], 0, "one text"),
        ([Candidate("a", tiny_llama), Candidate("a", tiny_llama)], 1, "called a"),
        (
            [Candidate("a", tiny_llama, "full precision"), Candidate("b", tiny_llama, "full precision")],
            1,
            "2 models claim the role 'full precision'",
        ),
    ],
)
def test_comparisons_that_cannot_be_are_refused(candidates: list[Candidate], texts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(candidates, {"one": windows()} if texts else {})


def test_a_model_that_is_low_bit_in_part_says_so_below_the_table() -> None:
    def partly() -> nn.Module:
        model = tiny_llama()
        prepare(model, QuantConfig.preset("int4", group_size=32, ignore=["re:.*mlp.*"]))
        return model

    found = compare(
        [Candidate("original", tiny_llama, "full precision"), Candidate("part", partly)], {"one": windows()}
    )
    assert "67% of the weights outside embeddings and output head" in rendered(found)

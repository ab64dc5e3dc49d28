"""eval/budget.py on a tiny model: cells are done once, go on after a kill, and belong to one process at a time."""

from __future__ import annotations

import json
import logging
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmqat.evaluate.budget import read_laws
from llmqat.layers import QuantConfig
from llmqat.train import QATTrainer
from tests.evaluate.test_scripts import SCRIPTS, headline, run
from tests.tiny import tiny_llama, tiny_tokenizer

HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@pytest.fixture(autouse=True)
def _script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(SCRIPTS)  # as Python does for a script
    logger = logging.getLogger("llmqat")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    tiny_llama().save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    text, other = tmp_path / "domain.txt", tmp_path / "other.txt"
    text.write_text("".join(f"Sentence {n} of a text for training. " for n in range(40)), encoding="utf-8")
    other.write_text("Words of another kind that windows are made of. " * 4, encoding="utf-8")
    small = ["data.block_size=32", "train.logging_steps=1", "train.learning_rate=1e-4"]
    return [
        *("--model", str(tmp_path / "original"), "--schemes", "int3", "--texts", "own", str(text)),
        *("--tokens", "0", "64", "0.32k", "640", "--eval", str(other), "own", "--window", "32", "--max-windows", "4"),
        *("--calibrate", "[{stage: ranges, blocks: 4}]", "--set", *small),
        *("--top-k", "384", "--save-steps", "2", "--json", str(tmp_path / "out.json")),
    ]


def cells(report: dict[str, Any]) -> dict[tuple[str, int, int], dict[str, Any]]:
    return {(row["text"], row["asked_tokens"], row["seed"]): row["texts"] for row in report["rows"]}


def test_cells(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "out.json", tmp_path / "work"
    words += ["--work", str(work)]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")
    files = ["--law", str(tmp_path / "law.json"), "--plot", str(tmp_path / "plot.png")]
    run(monkeypatch, "budget.py", *words, "--only", "int3:own", *files)
    found = headline(capsys.readouterr().out)
    assert list(found)[-1] == "int3, own, 640 tokens, seed 0, own kl"
    whole = json.loads(out.read_text())
    assert {cell: len(texts) for cell, texts in cells(whole).items()} == {("own", n, 0): 2 for n in (0, 64, 320, 640)}
    start, trained = (cells(whole)["own", tokens, 0]["own"] for tokens in (0, 640))
    assert trained["kl"] == pytest.approx(sum(trained["window_kl"]) / 4, rel=1e-3)
    assert trained["from_start"]["kl"] == pytest.approx(trained["kl"] - start["kl"])
    assert trained["from_start"]["low"] <= trained["from_start"]["kl"] <= trained["from_start"]["high"] < 0
    assert not any((work / "int3-own-640-0" / part).exists() for part in ("model", "checkpoints"))

    (law,) = read_laws(tmp_path / "law.json")
    assert (law.scheme, law.text, law.judged_on, law.least, law.most) == ("int3", "own", ("other",), 64, 640)
    assert law.parameters == sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert law.points[0] == (0, pytest.approx(cells(whole)["own", 0, 0]["other"]["kl"], abs=1e-6))
    assert (tmp_path / "plot.png").stat().st_size > 1000

    # A finished cell is not run again: nothing is trained or scored, and the report holds all cells.
    with monkeypatch.context() as context:
        context.setattr(QATTrainer, "train", None)
        run(monkeypatch, "budget.py", *words, "--only", "int3:own:640")
        run(monkeypatch, "budget.py", *words, "--report")  # and none of those that are missing
    assert json.loads(out.read_text())["rows"] == whole["rows"]

    # Nor is one of an earlier report, such as that of another machine.
    (tmp_path / "earlier.json").write_text(json.dumps(whole))
    elsewhere = [*words[:-1], str(tmp_path / "elsewhere"), "--earlier", str(tmp_path / "earlier.json"), "--report"]
    run(monkeypatch, "budget.py", *elsewhere)
    assert json.loads(out.read_text())["rows"] == whole["rows"]
    (tmp_path / "earlier.json").write_text(json.dumps(whole | {"settings": {**whole["settings"], "window": 64}}))
    with pytest.raises(SystemExit, match="made with other settings: window; leave it out"):
        run(monkeypatch, "budget.py", *elsewhere)
    broken = [{**row, "texts": {name: {"kl": 0.1} for name in row["texts"]}} for row in whole["rows"]]
    empty = {**whole, "rows": [{**row, "texts": None} for row in whole["rows"]]}
    for wrong in ("[]", "{", json.dumps({**whole, "rows": broken}), json.dumps(empty), json.dumps({"rows": 5})):
        (tmp_path / "earlier.json").write_text(wrong)
        with pytest.raises(SystemExit, match=r"earlier\.json: no report of this script"):
            run(monkeypatch, "budget.py", *elsewhere)
    (tmp_path / "earlier.json").unlink()
    with pytest.raises(SystemExit, match=r"earlier\.json: no report of this script .*No such file"):
        run(monkeypatch, "budget.py", *elsewhere)

    # A training that is killed goes on from its checkpoint, to the same figures.
    again = [*words[:-1], str(tmp_path / "again"), "--only", "int3:own:640"]
    _kill_at(7, monkeypatch, again)
    run(monkeypatch, "budget.py", *again)
    resumed = json.loads(out.read_text())
    assert resumed["rows"][0]["training"]["resumed_from"] == "checkpoint-6"
    assert resumed["rows"][0]["training"]["tokens"] == 640
    assert cells(resumed)["own", 640, 0]["other"]["window_kl"] == cells(whole)["own", 640, 0]["other"]["window_kl"]


def _kill_at(step: int, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    def training_step(trainer: QATTrainer, *given: Any) -> Any:
        if trainer.state.global_step == step:
            raise KeyboardInterrupt
        return made(trainer, *given)

    made = QATTrainer.training_step
    with monkeypatch.context() as context:
        context.setattr(QATTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, "budget.py", *words)


def test_a_cell_has_one_process(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    words += ["--work", str(work), "--seeds", "0", "1", "--only", "int3:domain:64"]
    held = work / "int3-domain-64-0" / "lock"
    held.parent.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLD, held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        run(monkeypatch, "budget.py", *words)
        assert set(cells(json.loads((tmp_path / "out.json").read_text()))) == {("domain", 64, 1)}
        other.kill()
    run(monkeypatch, "budget.py", *words)
    found = cells(json.loads((tmp_path / "out.json").read_text()))
    assert set(found) == {("domain", 64, 0), ("domain", 64, 1)}
    one, two = (found["domain", 64, seed]["other"]["kl"] for seed in (0, 1))
    assert one != two
    with pytest.raises(SystemExit, match=r"begun with other settings .*: top_k, int3"):
        run(monkeypatch, "budget.py", *words, "--top-k", "8", "--group-size", "32")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "int4"], "--only int4 means no cell"),
        (["--eval", "pydoc", "--texts", "pydoc"], "--texts pydoc is scored as well"),
        (["--set", "seed=3"], "--set seed: this script sets it"),
        (["--tokens", "many"], "'many' is no number of tokens"),
    ],
)
def test_what_means_nothing_is_refused(
    words: list[str],
    more: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "budget.py", *words, "--work", str(tmp_path / "work"), *more)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("option", ["--json", "--law"])
def test_a_text_that_is_scored_is_not_overwritten(
    words: list[str], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "other.txt"
    before = text.read_text()
    with pytest.raises(ValueError, match="would replace what is read"):
        run(monkeypatch, "budget.py", *words, "--work", str(tmp_path / "work"), option, str(text))
    assert text.read_text() == before


def test_the_shipped_recipes_give_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPTS / "budget.py"))
    monkeypatch.setattr(sys, "argv", ["budget.py", "--eval", "pydoc", "--work", str(tmp_path)])
    options = script["parse_options"]()
    bench = script["Bench"](options)
    shares = {}
    for cell in options.cells:
        recipe, blocks = bench.budgeted(cell, tmp_path / cell.name)
        assert recipe.train["learning_rate"] == bench.recipes[cell.scheme].train["learning_rate"]
        shares[cell.scheme, cell.tokens] = (recipe.train["max_steps"], recipe.train["warmup_steps"], blocks)
    assert shares["int4", 40_000] == (40, 4, 80)
    assert shares["int2", 1_000_000] == (977, 98, 1954)
    assert len(options.cells) == 15


def test_a_scheme_that_was_written_before_a_field_came_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    differing = runpy.run_path(str(SCRIPTS / "budget.py"))["_differing"]
    now = {"quant": QuantConfig.preset("int3").model_dump(mode="json"), "calibrate": []}
    before = json.loads(json.dumps(now))
    del before["quant"]["weights"]["scale_dtype"]
    assert differing({"int3": now}, {"int3": before}) == []
    before["quant"]["weights"]["num_bits"] = 4
    assert differing({"int3": now, "top_k": 64}, {"int3": before, "top_k": 64}) == ["int3"]

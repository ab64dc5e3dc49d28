"""Gates, drift from a saved report, advice, and the tables and page made of a report."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from llmqat.evaluate.compare import Comparison, Row, write_report
from llmqat.evaluate.gate import OF_MODEL, ON_TEXT, Check, check_rules, judge, parse_gate, read_report
from llmqat.evaluate.html import to_html
from llmqat.evaluate.perplexity import Evaluation
from llmqat.evaluate.report import check_files, verdict_on
from llmqat.evaluate.speed import Costs
from llmqat.evaluate.tables import to_csv, to_markdown


def evaluation(
    perplexity: float, kl: float | None, top1: float | None = 0.9, sha256: str = "0123456789ab"
) -> Evaluation:
    return Evaluation(perplexity, 1.0, kl, top1, 20_000, 40, 512, 512, sha256, reverse_kl=kl, top5=top1)


def layer(block: int, kind: str, error: float) -> dict[str, Any]:
    return {"name": f"model.layers.{block}.{kind}", "output_error": error, "scheme": "int4 g64"}


def comparison(perplexity: float = 24.0, method: str = "ranges, gptq", **changes: Any) -> Comparison:
    history = [{"step": step, "loss": 1 / step, "quantization/flipped": 0.01 / step} for step in range(1, 6)]
    history += [{"step": step, "eval_manual_perplexity": 30 / step} for step in (1, 2, 3)]
    extras: dict[str, Any] = {
        "method": method,
        "run": {"recipe": {"model": "<tiny>", "seed": 0}, "training": {"history": history}},
        "layers": {
            "trained": [layer(b, k, 0.01 * (b + 1)) for b in range(3) for k in ("mlp.up_proj", "mlp.down_proj")]
        },
        "samples": [{"prompt": "Once", "completion": "upon <b>a</b> time"}],
        "tasks": {
            "quiz": {"acc": 0.5, "acc_norm": 0.6, "questions": 2, "samples": {"acc": [0, 1], "acc_norm": [1, 0]}}
        },
        "coverage": {
            "notes": ["a note"],
            "average_bits_of_all": 5.5,
            "entries": [
                {
                    "name": f"model.layers.{b}.mlp.up_proj.weight",
                    "shape": [8, 4],
                    "treatment": "int4 g64",
                    "reason": "",
                    "bytes_before": 64,
                    "bytes_after": 18,
                }
                for b in range(3)
            ],
        },
    }
    costs = Costs(0.5, 0.1, 30.0, 90.0, 8, 200_000_000, None)
    rows = (
        Row("original", "full precision", 16, 269_000_000, 20.0, {"prose": evaluation(22.0, 0.0, 1.0)}, seconds=10.0),
        Row(
            "four <bits>",
            "other",
            4.25,
            113_000_000,
            30.0,
            {"prose": evaluation(perplexity, 0.1)},
            costs,
            extras=extras,
        ),
    )
    return Comparison(rows, {"torch": "2"}, {"texts": ["prose.txt"], "window": 512, **changes})


def report(**changes: Any) -> dict[str, Any]:
    return comparison(**changes).to_dict()


def test_rules_by_hand() -> None:
    rules = parse_gate("perplexity<=1.1x, kl<=0.05, top1 >= 0.9,size<=0.5x, speed>=1x, quiz>=0.6, memory<=2e8")
    checks = judge(rules, report())
    assert [(str(check.rule), check.passed) for check in checks] == [
        ("perplexity<=1.1x", True),
        ("kl<=0.05", False),
        ("top1>=0.9", True),
        ("size<=0.5x", True),
        ("speed>=1x", True),
        ("quiz>=0.6", True),
        ("memory<=2e+08", True),
    ]
    assert checks[0].bound == pytest.approx(24.2)
    assert [str(check) for check in checks] == [
        "kept: perplexity<=1.1x: four <bits> on prose: 24, bound 24.2 (of 22, original)",
        "BROKEN: kl<=0.05: four <bits> on prose: 0.1, bound 0.05",
        "kept: top1>=0.9: four <bits> on prose: 90.0 %, bound 90.0 %",
        "kept: size<=0.5x: four <bits>: 113.0 MB, bound 134.5 MB (of 269.0 MB, the files of original)",
        "kept: speed>=1x: four <bits>: 30.0 tok/s, bound 20.0 tok/s (of 20.0 tok/s, original)",
        "kept: quiz>=0.6: four <bits>: 0.6, bound 0.6",
        "kept: memory<=2e+08: four <bits>: 200.0 MB, bound 200.0 MB",
    ]
    (near,) = judge(parse_gate("size<=112999999"), report())
    assert str(near) == "BROKEN: size<=1.13e+08: four <bits>: 113 MB, bound 112.999999 MB"
    (drifted,) = judge(parse_gate("size<=1x"), report(), report())
    assert str(drifted).endswith("(of 113.0 MB, the files of four <bits> in the baseline)")
    assert {check.model for check in checks} == {"four <bits>"}
    assert not judge(parse_gate("perplexity<=1000"), report(perplexity=float("inf")))[0].passed


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("", "the gate is empty"),
        ("perplexity<1", "'perplexity<1' is no rule of a gate"),
        ("perplexity<=about 3", "figures: perplexity, word_perplexity, kl"),
        ("piqa>=0.5", "'piqa', which is no figure of the report; .* quiz"),
        ("energy<=1", "'energy' of four <bits>, which was not measured"),
        ("word_perplexity<=60", "'word_perplexity' of four <bits>, which was not measured"),
    ],
)
def test_what_cannot_be_judged_is_refused(gate: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(parse_gate(gate), report())


def test_a_relative_rule_needs_something_to_be_relative_to() -> None:
    alone = Comparison(comparison().rows[1:]).to_dict()
    with pytest.raises(ValueError, match=r"give --reference MODEL or --baseline REPORT"):
        judge(parse_gate("perplexity<=1.02x"), alone)


def test_drift_from_a_saved_report(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "week.json")
    before = read_report(tmp_path / "week.json")
    same = verdict_on(comparison(), parse_gate("perplexity<=1.01x, size<=1x"), before)
    assert same.passed
    drifted = verdict_on(comparison(25.0), parse_gate("perplexity<=1.01x"), before)
    assert not drifted.passed
    assert "perplexity 24.0000 then, 25.0000 now (+4.17%)" in drifted.drift[1]
    other = Comparison((Row("four <bits>", "other", 4, 1, 1.0, {"prose": evaluation(24, 0.1, 0.9, "another")}),))
    with pytest.raises(ValueError, match="another text than prose"):
        verdict_on(other, (), before)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="is no report"):
        read_report(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="no report at"):
        read_report(tmp_path / "absent.json")


def test_csv_and_markdown_hold_the_figures() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(report()))))
    assert [row["model"] for row in rows] == ["original", "four <bits>"]
    assert float(rows[1]["KL"]) == 0.1
    assert rows[1]["made by"] == "ranges, gptq"
    assert float(rows[1]["quiz"]) == 0.6
    assert rows[0]["peak MB"] == ""
    assert float(rows[1]["top-5 overlap"]) == 0.9
    lines = to_markdown(report()).splitlines()
    assert lines[0].startswith("| text | model | made by |")
    assert "word perplexity" not in lines[0]  # which nobody measured
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "sha256 0123456789ab" in lines[5]


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    page = to_html(verdict_on(comparison(), parse_gate("kl<=0.05")).report)
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert "four &lt;bits&gt;" in page
    assert "<b>a</b>" not in page
    for section in ("Verdict", "Results", "Pictures", "Layers", "Training", "What they write", "Coverage", "Recipes"):
        assert f"<h2>{section}</h2>" in page
    assert "BROKEN: kl&lt;=0.05" in page
    assert "prefers-color-scheme:dark" in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 8  # two bars, two scatters, a heat map, loss, flips, perplexity
    assert "Evaluation perplexity, manual" in page
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert "nan" not in drawing
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for mark in root.iter("rect"):
            assert 0 <= float(mark.attrib["x"]) <= width
            assert 0 <= float(mark.attrib["y"]) <= height
    found = verdict_on(comparison()).report
    assert to_html(json.loads(json.dumps(found))) == to_html(found)


def test_the_page_of_a_bare_report_leaves_sections_out() -> None:
    bare = Comparison((Row("bare", "other", None, None, None, {"t": evaluation(12.0, None, None)}),)).to_dict()
    page = to_html(bare)
    assert "<h2>Results</h2>" in page
    assert "<h2>Training</h2>" not in page
    assert "<h2>Layers</h2>" not in page


ASKED: dict[str, Any] = {"speed": True, "words": True, "prompts": True, "tasks": ("quiz",)}


def test_a_gate_that_asks_for_what_is_not_measured_is_refused_before() -> None:
    every = parse_gate(", ".join(f"{figure}<=1x" for figure in (*ON_TEXT, *OF_MODEL, "quiz")))
    check_rules(every, ["full", "int4"], "full", **ASKED)
    refused = {
        "kl<=0.1": ({"reference": None}, "kl"),
        "top1>=0.9": ({"reference": None}, "top1"),
        "perplexity<=1.1x": ({"reference": None}, "model to compare with"),
        "word_perplexity<=30": ({"words": False}, "word perplexity"),
        "speed>=10": ({"speed": False}, "speed"),
        "energy<=10": ({"speed": False}, "energy"),
        "not_ended<=0.1": ({"prompts": False}, "what models write --prompts"),
        "quiz>=0.5": ({"tasks": ()}, "no figure of the report"),
        "kl<=0.2": ({"tasks": ("kl",)}, "is a figure and a task"),
    }
    for rule, (changes, words) in refused.items():
        given = {"reference": "full", **ASKED, **changes}
        with pytest.raises(ValueError, match=words):
            check_rules(parse_gate(rule), ["full", "int4"], given.pop("reference"), **given)
    report = comparison().to_dict()
    baseline = {**report, "rows": [{**row, "name": f"other {row['name']}"} for row in report["rows"] * 2]}
    with pytest.raises(ValueError, match="the baseline has no row 'int4'"):
        check_rules(parse_gate("perplexity<=1.1x"), ["full", "int4"], "full", baseline, **ASKED)


def test_a_baseline_of_another_tokenizer_is_refused() -> None:
    report = comparison().to_dict()
    (text,) = report["texts"]
    other = {**report, "texts": {text: {**report["texts"][text], "ids_sha256": "other"}}}
    own = {**report, "texts": {text: {**report["texts"][text], "ids_sha256": "own"}}}
    judge((), own, report)  # an earlier report says nothing of its ids
    judge((), own, own)
    with pytest.raises(ValueError, match="with another tokenizer"):
        judge((), own, other)


def test_a_baseline_of_other_questions_or_another_reference_is_refused() -> None:
    report = comparison().to_dict()
    rules = parse_gate("quiz>=0.9x, kl<=1.1x")
    judge(rules, report, report)
    fewer = json.loads(json.dumps(report))
    for row in fewer["rows"]:
        row["tasks"] = {"quiz": {"acc": 0.5, "questions": 7, "samples": {}}}
    with pytest.raises(ValueError, match=r"has answered 7 questions of quiz, and .* 2; give --task-limit"):
        judge(rules, report, fewer)
    other = json.loads(json.dumps(report))
    for row in other["rows"]:
        for values in row["texts"].values():
            values["perplexity"] *= 1.01 if row["role"] == "full precision" else 1
    with pytest.raises(ValueError, match="kl in the baseline was measured from another reference than here"):
        judge(parse_gate("kl<=1.1x"), report, other)
    judge(parse_gate("perplexity<=1.1x"), report, other)


def test_no_limit_is_kept_beside_a_figure_that_is_no_number() -> None:
    for value, base in ((math.nan, 1.0), (math.inf, math.inf), (1.0, math.inf), (1.0, math.nan)):
        check = Check(parse_gate("perplexity<=1.02x")[0], "a", "t", value, 1.02 * base, ("b", base))
        assert not check.passed


def test_files_that_can_be_written_are_written_where_another_cannot(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    verdict = verdict_on(comparison())
    with pytest.raises(OSError, match="folder could not be written"):
        verdict.write(tmp_path / "folder", tmp_path / "new" / "a.csv", tmp_path / "a.md", None)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.csv", "a.md", "folder", "new"]


def test_a_report_replaces_nothing_that_is_read(tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text.md"
    model.mkdir()
    text.write_text("a")
    for name in ("config.json", "report.json"):
        (model / name).write_text("{}")
    write_report(comparison().to_dict(), model / "report.json")
    check_files({"--json": model / "report.json", "--html": model / "new.html"}, [model, text, "someone/model"])
    with pytest.raises(ValueError, match=r"--json=.*config\.json would replace a file of"):
        check_files({"--json": model / "config.json"}, [model, text])
    with pytest.raises(ValueError, match=r"--markdown=.* would replace what is read"):
        check_files({"--markdown": text}, [model, text])


def test_names_are_shown_as_they_are_in_every_form(tmp_path: Path) -> None:
    name = "x [wip]/<b>&|é"
    found = comparison()
    rows = tuple(Row(**{**vars(row), "name": name if row.role == "other" else row.name}) for row in found.rows)
    report = verdict_on(Comparison(rows, found.environment, {"models": [name]}), parse_gate("perplexity<=1x")).report
    page = to_html(report)
    assert "<b>&|" not in page
    assert page.count("x [wip]/&lt;b&gt;&amp;|é") > 5
    assert "x [wip]/<b>&\\|é" in to_markdown(report)
    assert name in to_csv(report)

"""Law: every table fits what it is shown on, with its names whole wherever they can be."""

from __future__ import annotations

import ast
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Group, RenderableType

from llmqat.calibrate import LayerReport
from llmqat.calibrate.sensitivity import Allocation, LayerSensitivity
from llmqat.cli.audit import audit_table, served_table
from llmqat.cli.quantize import sensitivity_table
from llmqat.cli.train import written_table
from llmqat.evaluate.breakdown import Part
from llmqat.evaluate.compare import Comparison, Row, render, render_parts
from llmqat.evaluate.layers import render_layers
from llmqat.evaluate.perplexity import Evaluation
from llmqat.evaluate.speed import Costs
from llmqat.export.serving import Verdict
from llmqat.layers import AuditEntry, CoverageAudit
from llmqat.recipe.allocation import BitPlan
from llmqat.terminal import Column, FittedTable
from llmqat.terminal.consoles import PlainConsole
from llmqat.terminal.tables import broken

SOURCES = sorted((Path(__file__).resolve().parents[1] / "llmqat").rglob("*.py"))
LAYERS = [f"model.layers.{block}.mlp.down_proj" for block in (0, 29)]
MODELS = ["original", "SmolLM2-135M-Instruct.Q4_1.gguf", "my-organization-smollm2-135m-int4-g64"]


def comparison() -> Comparison:
    score = Evaluation(20.574, 1.0, 0.0987, 0.87, 20_400, 40, 512, 512, "0123456789abcdef")
    parts = {
        "position": [Part(f"{n}-{2 * n}", 100, 20.0, 0.1, 0.9) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)],
        "kind": [Part("digits", 1_234, 20.0, 0.1, 0.9)],
    }
    costs = Costs(1.2, 0.0345, 41.2, 301.5, 4, 912_000_000, None)
    rows = [
        Row(name, "full precision" if name == "original" else "trained", 4.25, 90_000_000, 40.0, {"prose": score})
        for name in MODELS
    ]
    return Comparison(tuple(replace(row, costs=costs, parts={"prose": parts}) for row in rows))


def answered() -> Comparison:
    prompts = {"number": 2, "source": "instructions", "chat_template": True, "max_new_tokens": 256, "sha256": "0" * 64}
    original = {
        "prompts": prompts,
        "not_ended": 0.5,
        "length": 133.5,
        "repeated": 0.2,
        "samples": {"not_ended": [1.0, 0.0], "length": [256.0, 11.0], "repeated": [0.3, 0.1]},
    }
    longer = {**original, "length": 166.5, "samples": {**original["samples"], "length": [256.0, 77.0]}}  # type: ignore[dict-item]
    made = comparison()
    extras = ({"generations": original}, *[{"generations": longer}] * 2)
    rows = [replace(row, extras=extra) for row, extra in zip(made.rows, extras, strict=True)]
    return replace(made, rows=tuple(rows))


def audit() -> FittedTable:
    entry = AuditEntry("model.layers.0.mlp.down_proj.weight", (576, 1536), "int4 g64", "", 1_769_472, 470_016)
    entries = [replace(entry, name=f"model.layers.{block}.mlp.down_proj.weight") for block in range(30)]
    kept = replace(entry, name="lm_head.weight", treatment="kept", reason="tied to the embedding, which is kept")
    return audit_table(CoverageAudit((*entries, kept)))


def served() -> FittedTable:
    verdict = Verdict(
        "vllm", "vLLM on a GPU", True, "", "rules.py", ("the KV cache stays in bfloat16",), "", "run here"
    )
    return served_table({"vllm": verdict, "gguf": replace(verdict, serves=False, reason="it has no 3-bit kernel")})


def sensitivity() -> FittedTable:
    layers = tuple(LayerSensitivity(name, 884_736, {2: 0.31, 3: 0.0123, 4: 0.0012, 8: 1e-7}) for name in LAYERS)
    return sensitivity_table(BitPlan(Allocation(3.5, 3.498, 0.0123, dict.fromkeys(LAYERS, 3)), layers))


def written() -> FittedTable:
    kind = {"mean_document_tokens": 29.3, "ended_share": 0.08, "perplexity": 258.02, "repeated_4gram_share": 0.0}
    kind |= {"dropped": {"repetitive": 3}, "dropped_token_share": 0.012}  # type: ignore[dict-item]
    by_kind = {"chat": kind, "plain": kind}
    return written_table({**kind, "by_kind": by_kind, "documents": 72, "documents_by_kind": {"chat": 14, "plain": 58}})


TABLES: dict[str, tuple[Callable[[], RenderableType], list[str]]] = {
    "audit_table": (audit, ["model.layers.0-29.mlp.down_proj.weight", "lm_head.weight"]),
    "written_table": (written, ["chat", "plain", "all"]),
    "served_table": (served, ["vLLM on a GPU"]),
    "sensitivity_table": (sensitivity, LAYERS),
    "render_layers": (
        lambda: render_layers([LayerReport(name, "int4 g64", 20.5, 0.012, 0.1, 1.0) for name in LAYERS]),
        ["mlp.down_proj"],
    ),
    "render": (lambda: render(comparison()), MODELS),
    "_costs_table": (lambda: render(comparison()), MODELS),
    "_written_table": (lambda: render(answered()), MODELS),
    "render_parts": (lambda: render_parts(comparison()), MODELS[1:]),
}
"""Function that makes a table -> an example of it, and the names in it."""


def makers(tree: ast.AST) -> Iterator[str]:
    """The functions of a file in which a table is made."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
            if any(isinstance(made, ast.Name) and made.id == "FittedTable" for made in calls):
                yield function.name


def shown(what: RenderableType, width: int | None) -> list[str]:
    stream = io.StringIO()
    PlainConsole(file=stream, width=width).print(what)
    return stream.getvalue().splitlines()


def test_every_table_is_a_fitted_one_and_is_tried_here():
    trees = {str(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    importing = [
        Path(name).name
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "rich.table"
    ]
    assert importing == ["tables.py"]
    assert {name for tree in trees.values() for name in makers(tree)} == set(TABLES)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("maker", TABLES)
def test_names_are_whole_and_no_line_is_too_long(maker: str, width: int):
    example, names = TABLES[maker]
    lines = shown(example(), width)
    assert max(map(cell_len, lines)) <= width
    assert not any("…" in line for line in lines)
    for name in names:
        assert any(line.startswith(name) for line in lines), f"{name} is broken at {width} columns"


@pytest.mark.parametrize("maker", TABLES)
def test_a_pipe_has_every_column_on_one_line_a_row(maker: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    made = TABLES[maker][0]()
    tables = [one for one in (made.renderables if isinstance(made, Group) else [made]) if isinstance(one, FittedTable)]
    assert tables
    lines = shown(made, None)
    assert not any("not shown" in line for line in lines)
    for table in tables:
        for cells, _ in table.rows:
            assert any(all(cell in line for cell in cells) for line in lines)
    assert not any(line != line.rstrip() for line in lines if line.strip())


def test_what_is_left_out_is_said_least_important_first_left_out():
    table = FittedTable([Column("model", 0, "name"), Column("MB on\ndisk", 2), Column("KL", 1), Column("tok/s", 3)])
    table.add_row("a" * 20, "90.0", "0.0123", "40.0")
    assert "model disk KL tok/s" in [" ".join(line.split()) for line in shown(table, 44)]
    assert "not shown at 36 columns: tok/s (" in " ".join(shown(table, 36))
    narrow = shown(table, 29)
    assert narrow[0].split() == ["model", "KL"]
    assert "not shown at 29 columns: MB on disk, tok/s (a wider terminal" in " ".join(" ".join(narrow).split())


def test_a_column_without_a_figure_is_left_out_in_silence():
    table = FittedTable([Column("model", 0, "name"), Column("KL", 1), Column("perplexity", 2)], "scores")
    table.add_row("a", "–", "20.1")
    table.add_row("b")
    assert table.layout(80) == ({0: 5, 2: 10}, [])
    with pytest.raises(ValueError, match="a row of 4 cells for 3 columns"):
        table.add_row("a", "b", "c", "d")


@given(
    names=st.lists(st.text("ab./-_ 日", min_size=1, max_size=60), min_size=1, max_size=3),
    prose=st.text("abc /", max_size=120),
    figures=st.lists(st.sampled_from(["1.5", "0.0987 ±0.0021", "–", "1,234,567"]), min_size=3, max_size=3),
    width=st.integers(40, 160),
)
def test_any_cells_fit_any_terminal(names: list[str], prose: str, figures: list[str], width: int):
    columns = [Column("name", 0, "name"), Column("why", 2, "prose"), *(Column("x", rank) for rank in (1, 3, 4))]
    table = FittedTable(columns)
    for name in names:
        table.add_row(name, prose, *figures)
    lines = shown(table, width)
    assert max(map(cell_len, lines)) <= width
    for name in names:
        if cell_len(name) <= width:
            assert any(line.startswith(name.rstrip()) for line in lines)


def test_a_name_that_is_too_long_is_broken_after_a_dot_or_a_slash():
    assert list(broken("model.layers.0.mlp.down_proj", 16)) == ["model.layers.0.", "mlp.down_proj"]
    assert list(broken("a" * 10, 4)) == ["aaaa", "aaaa", "aa"]

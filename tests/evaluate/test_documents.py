"""JSON that llmqat writes: every field is described, versions are told apart, and old documents are still read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

import llmqat
from llmqat.cli import app
from llmqat.evaluate.compare import Comparison, Row, write_json
from llmqat.evaluate.documents import DOCUMENTS, SCHEMA, command_line, document_schema, head
from llmqat.evaluate.gate import read_report
from llmqat.evaluate.perplexity import Evaluation


def report(path: Path, **changes: Any) -> Path:
    """Writes a report, some of its fields changed, those that are None left out."""
    found = Evaluation(12.0, 1.0, None, None, 20_000, 40, 512, 512, "0123456789ab")
    write_json(Comparison((Row("one", "other", 4.5, 1000, None, {"prose": found}),)), path)
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return path


def described(schema: dict[str, Any]) -> list[str]:
    """The fields of all objects of a JSON Schema that have no description."""
    objects = {schema.get("title", ""): schema, **schema.get("$defs", {})}
    return [
        f"{name}.{field}"
        for name, entry in objects.items()
        for field, values in entry.get("properties", {}).items()
        if not values.get("description")
    ]


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_every_field_is_described(kind: str) -> None:
    model: type[BaseModel] = DOCUMENTS[kind]
    schema = model.model_json_schema()
    assert not described(schema)
    begins = head(kind)
    assert set(begins) < set(schema["properties"])
    assert set(begins) <= set(schema["required"])
    assert begins["kind"] == kind == schema["properties"]["kind"]["const"]


def test_one_schema_holds_all_kinds() -> None:
    schema = document_schema()
    assert [entry["$ref"].rpartition("/")[2] for entry in schema["anyOf"]] == [
        model.__name__ for model in DOCUMENTS.values()
    ]
    assert not described(schema)
    printed = CliRunner().invoke(app, ["schema", "--reports"])
    assert json.loads(printed.stdout) == schema
    assert schema["title"] == "Documents of llmqat"


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("run", "run.training: section or null\n  Steps, tokens,"),
        ("rows.kl", "comparison.rows.kl: number or null\n  Mean KL(reference || model), nats a token"),
        ("rows.texts.kl", "comparison.rows.texts.kl: number or null\n"),
        ("training.loss", "training.loss is not described by itself; it is in\n\nrun.training: section or null"),
    ],
)
def test_a_field_is_described_as_text(key: str, shown: str) -> None:
    assert shown in CliRunner().invoke(app, ["schema", "--reports", key]).stdout


def test_a_field_that_no_report_has_names_the_nearest() -> None:
    refused = CliRunner().invoke(app, ["schema", "--reports", "perplexty"])
    assert refused.exit_code == 2
    assert "no JSON report has a field 'perplexty'; did you mean perplexity?" in refused.output
    assert "give one of comparison, audit, sensitivity, run" in refused.output


def test_a_report_says_what_wrote_it_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/llmqat", "eval", "my model", "--json", "a.json"])
    found = read_report(report(tmp_path / "a.json"))
    DOCUMENTS["comparison"].model_validate(found)
    assert found["llmqat"] == llmqat.__version__
    assert found["command"] == "llmqat eval 'my model' --json a.json"
    assert found["date"].endswith("+00:00")
    monkeypatch.setattr(sys, "argv", ["/checkout/llmqat/__main__.py", "audit"])
    assert command_line() == "llmqat audit"
    monkeypatch.setattr(sys, "argv", ["eval/peers.py", "--json", "a.json"])
    assert command_line() == "peers.py --json a.json"


def test_a_report_without_a_number_is_read_and_a_later_one_is_refused(tmp_path: Path) -> None:
    assert read_report(report(tmp_path / "old.json", schema=None, kind=None, llmqat=None))["rows"]
    later = report(tmp_path / "new.json", schema=SCHEMA + 1, llmqat="9.0")
    with pytest.raises(
        ValueError, match=rf"new\.json has schema {SCHEMA + 1}, written by llmqat 9\.0; .* reads schema"
    ):
        read_report(later)

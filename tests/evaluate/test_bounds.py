"""eval/bounds.py: what it reads of pyproject.toml, and how it counts. Environments are made by `make bounds` alone."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

EVAL = Path(__file__).resolve().parents[2] / "eval"
RESULTS = EVAL / "results" / "bounds.json"
sys.path.insert(0, str(EVAL))

bounds = importlib.import_module("bounds")


def test_every_requirement_but_the_tools_has_a_lower_bound_and_is_tried() -> None:
    pyproject = bounds._read_toml(bounds.ROOT / "pyproject.toml")
    optional = pyproject["project"]["optional-dependencies"]
    assert set(bounds.EXTRAS) == set(optional) - {"dev"}
    declared = bounds.declared()
    assert len(declared) == len(pyproject["project"]["dependencies"]) + sum(
        len(optional[extra]) for extra in bounds.EXTRAS
    ) + len(bounds.TEST_TOOLS)
    assert [name for name, requirement in declared.items() if bounds.lower_bound(requirement) is None] == []


def test_a_bound_that_nothing_reaches_is_named() -> None:
    lowest = {name: str(bounds.lower_bound(requirement)) for name, requirement in bounds.declared().items()}
    assert bounds.unreached({**lowest, "torch": f"{lowest['torch']}+cpu"}) == {}
    assert list(bounds.unreached({**lowest, "rich": "99.0"})) == ["rich"]


def test_every_part_is_there() -> None:
    paths = [path for part in bounds.PARTS.values() for path in part]
    assert [path for path in paths if not (bounds.ROOT / "tests" / path).exists()] == []


def test_counts(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="one" time="1.2"/><testcase classname="a" name="two">'
        '<failure/></testcase><testcase classname="" name="b"><error/></testcase><testcase classname="a" name="c">'
        "<skipped/></testcase></testsuite></testsuites>",
        encoding="utf-8",
    )
    assert bounds.counts(tmp_path / "x.xml") == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "seconds": 1,
        "failures": ["a::two", "::b"],
    }


def test_the_oldest_and_the_newest_python_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"/a": (3, 9), "/b": (3, 12), "/c": None, "/d": (3, 10), "/e": (3, 13)}
    monkeypatch.setattr(bounds, "_candidates", lambda: map(Path, versions))
    monkeypatch.setattr(bounds, "_version_of", lambda path: versions[str(path)])
    assert bounds.found_python(oldest=True) == Path("/d")
    assert bounds.found_python(oldest=False) == Path("/e")


def test_the_stored_result_is_of_the_bounds_of_now() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    lowest = results["environments"]["lowest"]
    assert set(lowest["versions"]) == set(bounds.declared())
    assert bounds.unreached(lowest["versions"]) == {}
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8") == bounds.render(results)

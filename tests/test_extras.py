"""Laws: no optional package is imported unchecked; what lacks is said before any work, in one form."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from llmqat.cli import app
from llmqat.extras import DISTRIBUTIONS, EXTRAS, check_version, missing, require
from llmqat.train.optimizers import check_optimizer

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "llmqat").rglob("*.py"))
CHECKS = ("require", "check_installed", "missing")
runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def unchecked(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Optional modules that a function, or the module itself, imports before it has called one of CHECKS for them."""
    for owner in (node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.FunctionDef))):
        checked: dict[str, int] = {}
        imports: list[tuple[str, int]] = []
        for node in own_nodes(owner):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CHECKS and node.args:
                name = node.args[0]
                if isinstance(name, ast.Constant):
                    checked.setdefault(str(name.value), node.lineno)
            elif isinstance(node, ast.Import):
                imports += [(alias.name.partition(".")[0], node.lineno) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imports.append(((node.module or "").partition(".")[0], node.lineno))
        yield from ((name, line) for name, line in imports if name in EXTRAS and checked.get(name, line) >= line)


def own_nodes(owner: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(owner):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from own_nodes(child)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_optional_package_is_imported_unchecked(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(unchecked(tree)) == []
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    advised = [word for word in words if re.search(rf"pip install \S*({'|'.join(EXTRAS)})(?![-\w])", word)]
    assert path.name == "extras.py" or advised == []


def test_the_law_sees_what_it_is_for() -> None:
    assert list(unchecked(ast.parse("import gguf"))) == [("gguf", 1)]
    assert list(unchecked(ast.parse("def f():\n  from trl.x import y\n  check_installed('trl', '')"))) == [("trl", 2)]
    assert list(unchecked(ast.parse("def f():\n  require('trl', '')\n  from trl.x import y\n  import onnx"))) == [
        ("onnx", 4)
    ]


def test_every_module_is_brought_by_its_extra() -> None:
    requirements = [Requirement(line) for line in importlib.metadata.requires("llmqat") or []]
    for module, extra in EXTRAS.items():
        name = DISTRIBUTIONS.get(module, module)
        found = [requirement for requirement in requirements if requirement.name == name]
        assert any(requirement.marker.evaluate({"extra": extra}) for requirement in found if requirement.marker), module


@pytest.mark.parametrize("module", EXTRAS)
def test_what_is_missing_or_too_old_is_said_in_one_form(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, module)
    advice = rf"; run `pip install 'llmqat\[{EXTRAS[module]}\]'`$"
    with pytest.raises(ImportError, match=rf"^the test needs \S+, which is not installed{advice}"):
        require(module, "the test")
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    assert re.search(
        r"\d or newer, and 0.0.1 is installed; run `pip install --upgrade 'llmqat\[", missing(module) or ""
    )


def test_a_core_package_that_one_thing_needs_newer_is_said() -> None:
    check_version("torch", "1.0", "the test")
    with pytest.raises(
        ImportError, match=r"the test needs torch 99.0 or newer, and .* `pip install --upgrade 'torch>=99"
    ):
        check_version("torch", "99.0", "the test")


def test_an_optimizer_of_another_package_is_refused_in_the_same_form(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "optimi")
    with pytest.raises(
        ImportError, match="needs torch-optimi, which is not installed; run `pip install 'torch-optimi'`"
    ):
        check_optimizer("stable_adamw", None, 0)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("gguf", "export FOLDER --format gguf --out OUT"),
        ("onnx", "export FOLDER --format onnx --out OUT"),
        ("gguf", "eval FOLDER/model.gguf"),
        ("gguf", "compare FOLDER FOLDER/model.gguf"),
        ("lm_eval", "eval FOLDER --tasks arc_easy"),
        ("matplotlib", "quantize FOLDER --scheme int4 --report OUT/report --out OUT/model"),
        ("tensorboard", "train RECIPE train.report_to=tensorboard"),
        ("mlflow", "plan RECIPE train.report_to=[mlflow]"),
    ],
)
def test_a_command_says_it_before_any_work(
    module: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is empty: whoever reads it first would complain of that."""
    hide(monkeypatch, module)
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe.yaml").write_text(f"model: {tmp_path / 'model'}\noutput: {tmp_path / 'out'}\n")
    names = {"FOLDER": "model", "OUT": "out", "RECIPE": "recipe.yaml"}
    given = [re.sub("[A-Z]{3,}", lambda name: str(tmp_path / names[name[0]]), word) for word in words.split()]
    done = runner.invoke(app, given)
    assert done.exit_code == 2, done.output
    assert re.search(
        rf"(error:|\d\.) .* needs .*, which is not installed; run `pip install 'llmqat\[{EXTRAS[module]}\]'`",
        done.output,
    )
    assert not (tmp_path / "out").exists()


def hide(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == module else original(name, *rest)
    )


def test_supervised_fine_tuning_without_trl_says_what_to_install() -> None:
    code = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *r: None if n == 'trl' else f(n, *r)\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "import llmqat.train.sft"], cwd=ROOT, capture_output=True, text=True
    )
    assert "needs trl, which is not installed; run `pip install 'llmqat[trl]'`" in done.stderr.splitlines()[-1]

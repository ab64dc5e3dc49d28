"""Law: a file imports only from rooms to its left, and the light files stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    *(
        "heap",
        "paths",
        "files",
        "extras",
        "shipped",
        "guides",
        "terminal",
        "status",
        "config",
        "schemes",
        "hub",
        "grid",
        "kernels",
        "layers",
        "models",
        "metrics",
        "data",
    ),
    *("calibrate", "train", "export", "evaluate", "recipe", "cli"),
)
FILES = sorted((ROOT / "llmqat").rglob("*.py"))
ENTRY_POINTS = {"__init__", "__main__"}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "llmqat").parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> list[str]:
    modules: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            assert node.module is not None
            names = [alias.name for alias in node.names]
            # `from llmqat import models` imports the room, not the package
            modules += [f"llmqat.{name}" for name in names] if node.module == "llmqat" else [node.module]
    return modules


def executed_at_import(tree: ast.Module) -> ast.Module:
    """The module without function bodies and without `if TYPE_CHECKING:` blocks."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node

    stripped = Strip().visit(tree)
    assert isinstance(stripped, ast.Module)
    return stripped


def test_every_room_is_known_and_present():
    rooms = {room_of(path) for path in FILES}
    assert rooms - ENTRY_POINTS == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_the_left(path: Path):
    room = room_of(path)
    if room in ENTRY_POINTS:
        return
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for module in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
        if module.startswith("llmqat."):
            target = module.split(".")[1]
            if target in ROOMS:  # anything else is a public name such as __version__
                assert target in allowed, f"{path.name} imports llmqat.{target}, which lies to the right of {room}"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) == "grid"], ids=lambda p: p.name)
def test_grid_imports_torch_only(path: Path):
    for module in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
        top = module.split(".")[0]
        assert top in {"torch", "llmqat"} | sys.stdlib_module_names, f"{path.name} imports {module}"


def test_only_the_command_line_imports_the_recipe():
    for path in FILES:
        if room_of(path) not in {"recipe", "cli"}:
            assert "llmqat.recipe" not in imported_modules(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) == "cli"], ids=lambda p: p.name)
def test_the_command_line_imports_no_torch_at_module_level(path: Path):
    modules = imported_modules(executed_at_import(ast.parse(path.read_text(encoding="utf-8"))))
    assert {module.split(".")[0] for module in modules} <= {"llmqat", "rich", "typer"} | sys.stdlib_module_names


@pytest.mark.parametrize("code", ["import llmqat", "import llmqat.cli", "import llmqat.config", "import llmqat.status"])
def test_light_modules_load_no_torch(code: str):
    check = f"{code}; import sys; heavy = {{'torch', 'transformers'}} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions count; those for type checkers do not."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    imports: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        blocks = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        unread = {id(node) for block in blocks for node in ast.walk(block)}
        found: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and id(node) not in unread:
                found |= {
                    full if (full := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names
                }
        packages = {name.rpartition(".")[0], name}  # a package imports the files in it to show what they have
        imports[name] = {one for one in found if one in modules} - packages
    circles = {name for name in imports if name in _reached(imports, name)}
    assert circles == set()


def _reached(imports: dict[str, set[str]], name: str) -> set[str]:
    """What a file imports, and what that imports, and so on."""
    seen: set[str] = set()
    waiting = [*imports[name]]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting += imports[one]
    return seen

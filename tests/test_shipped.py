"""What is shipped is found by name, listed and copied; the user's own files come first."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llmqat
from llmqat.cli import app
from llmqat.recipe import load_recipe
from llmqat.shipped import LONGEST_TITLE, copy_shipped, find_shipped, shipped_files, shipped_recipes, title

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
COMMANDS_OF_RECIPES = ("train", "plan", "cache-teacher")
runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def test_every_shipped_file_has_a_name_and_a_title_of_its_own() -> None:
    files = shipped_files()
    assert set(files.values()) == {path for path in RECIPES.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {"lora-int4", "smollm2-135m-int4"} <= set(shipped_recipes()) < set(files)
    titles = [title(file) for file in files.values()]
    assert all(titles)
    assert len(set(titles)) == len(titles)
    assert [said for said in map(title, shipped_recipes().values()) if not 10 < len(said) <= LONGEST_TITLE] == []


def test_the_command_lists_all_with_their_titles() -> None:
    output = runner.invoke(app, ["recipes"]).output
    lines = [line.split(maxsplit=1) for line in output.splitlines() if line.startswith("  ")]
    assert {name: said.strip() for name, said in lines} == {name: title(path) for name, path in shipped_files().items()}


@pytest.mark.parametrize("name", shipped_files())
def test_a_copy_is_exact_and_never_over_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = runner.invoke(app, ["recipes", "copy", name, "mine"])
    assert done.exit_code == 0, done.output
    copied = Path("mine", find_shipped(name).name)
    assert done.output.splitlines()[0] == str(copied)
    assert copied.read_bytes() == find_shipped(name).read_bytes()
    copied.write_text("changed")
    refused = runner.invoke(app, ["recipes", "copy", name, "mine"])
    assert refused.exit_code == 2
    assert "exists already" in refused.output
    assert copied.read_text() == "changed"


def test_an_ending_may_be_left_out_and_a_folder_is_copied_whole_or_not_at_all(tmp_path: Path) -> None:
    assert find_shipped("python/own_stage") == RECIPES / "python" / "own_stage.py"
    copied = copy_shipped("python", tmp_path)
    assert copied == sorted((tmp_path / "python").iterdir())
    assert len(copied) == 5
    copied[0].unlink()
    with pytest.raises(FileExistsError, match=r"own_loss\.py, .*own_stage\.py exists already"):
        copy_shipped("python", tmp_path)
    assert not copied[0].exists()


def test_a_recipe_is_found_by_name_and_the_users_file_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_recipe(RECIPES / "lora-int4.yaml", ["output=x"])
    assert load_recipe("lora-int4", ["output=x"]) == load_recipe("lora-int4.yaml", ["output=x"]) == shipped
    copy_shipped("lora-int4", Path())
    copied = Path("lora-int4.yaml")
    copied.write_text(copied.read_text().replace("seed: 0", "seed: 7"))
    assert load_recipe("lora-int4.yaml").seed == 7
    copied.rename("lora-int4")
    assert load_recipe("lora-int4").seed == 7
    with pytest.raises(FileNotFoundError, match=r"no recipe at smollm2-int4; .*did you mean 'smollm2-135m-int4'\?"):
        load_recipe("smollm2-int4")
    with pytest.raises(FileNotFoundError, match=r"no recipe at recipes/lora-int4.yaml; .*did you mean 'lora-int4'\?"):
        load_recipe("recipes/lora-int4.yaml")
    with pytest.raises(
        FileNotFoundError, match=r"nothing that llmqat ships is called 'lora'; did you mean 'lora-int4'\?"
    ):
        find_shipped("lora")


@pytest.mark.parametrize("command", COMMANDS_OF_RECIPES)
def test_every_command_that_takes_a_recipe_takes_a_name(command: str, tmp_path: Path) -> None:
    words = [command, "lora-int", "--out", str(tmp_path / "out")]
    done = runner.invoke(app, words if command == "cache-teacher" else words[:2])
    assert done.exit_code == 2
    assert "did you mean 'lora-int4'?" in " ".join(done.output.split())


def test_those_are_all_commands_that_take_a_recipe() -> None:
    found = set()
    for file in Path(llmqat.__file__).parent.joinpath("cli").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                annotations = [ast.unparse(argument.annotation) for argument in node.args.args if argument.annotation]
                found |= {node.name.replace("_", "-")} if "RecipeArgument" in annotations else set()
    assert found == set(COMMANDS_OF_RECIPES)

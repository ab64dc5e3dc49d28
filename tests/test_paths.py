from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import llmqat
import llmqat.cli.application as shared
from llmqat import cli
from llmqat.config import Config, holds_path
from llmqat.data.teacher_cache import TeacherCache
from llmqat.export import CONVERSIONS
from llmqat.export.hub import push
from llmqat.files import write_whole
from llmqat.models import cache_folder
from llmqat.paths import check_file_output, check_folder_output, check_outputs, same_place, user_path, user_spec
from llmqat.recipe import load_recipe
from llmqat.recipe.reading import recipe_from
from tests.tiny import tiny_llama, tiny_tokenizer

EVAL_SCRIPTS = sorted((Path(__file__).resolve().parents[1] / "eval").glob("*.py"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def configurations(kind: type[Config] = Config) -> Iterator[type[Config]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from configurations(inner)


def path_fields() -> list[tuple[type[Config], str]]:
    fields = [(kind, name) for kind in configurations() for name in kind.model_fields]
    own = (entry for entry in fields if entry[0].__module__.startswith("llmqat"))
    return [(kind, name) for kind, name in own if holds_path(kind.model_fields[name].annotation)]


def test_a_user_s_path_begins_at_the_home_folder(home: Path):
    assert user_path("~/run") == user_path(Path("~/run")) == home / "run"
    assert user_path("~") == home
    assert user_path("a/~/b") == Path("a/~/b")
    assert user_spec("~/model") == str(home / "model")
    assert user_spec("./model") == "./model"
    assert user_spec("hub:someone/rows:plain:test") == "hub:someone/rows:plain:test"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("a ", "space"),
        (" a", "space"),
        ("a\0b", "zero byte"),
        ("~nobody-here/x", "./~nobody"),
    ],
)
def test_what_is_no_path_is_refused_by_its_key(given: str, words: str):
    with pytest.raises(ValueError, match="output") as refused:
        user_path(given, "output")
    assert words in str(refused.value)


def test_every_path_of_a_configuration_begins_at_the_home_folder(home: Path):
    fields = path_fields()  # of the recipe and of all that it is put together of
    assert {name for _, name in fields} >= {"output", "path", "prompts", "chat_template", "teacher_cache"}
    for kind, name in fields:
        assert kind._as_meant(name, "~/x") == home / "x", f"{kind.__name__}.{name}"
        with pytest.raises(ValueError, match=f"{name} is an empty path"):
            kind.model_validate({name: ""})


def test_every_path_of_a_recipe_begins_at_the_home_folder(home: Path):
    recipe = recipe_from(
        {
            "model": "~/model",
            "output": "~/run",
            "teacher": "~/teacher",
            "teacher_cache": "~/cache",
            "data": {"source": "dataset", "path": "~/rows.jsonl", "chat_template": "~/chat.jinja"},
            "evaluate": {"texts": ["~/one.txt", "pydoc"]},
            "train": {"deepspeed": "~/zero2.json"},
        },
        "recipe.yaml",
    )
    assert (recipe.model, recipe.teacher) == (str(home / "model"), str(home / "teacher"))
    assert (recipe.output, recipe.teacher_cache) == (home / "run", home / "cache")
    assert (recipe.data.path, recipe.data.chat_template) == (home / "rows.jsonl", home / "chat.jinja")
    assert recipe.evaluate.texts == (str(home / "one.txt"), "pydoc")
    assert recipe.train["deepspeed"] == str(home / "zero2.json")
    mixed = recipe_from(
        {"model": "m", "output": "o", "data": {"mix": [{"source": "text", "path": "~/a"}, {"source": "pydoc"}]}}, "r"
    )
    assert mixed.data.mix is not None
    assert mixed.data.mix[0].path == home / "a"


def test_every_path_of_the_command_line_begins_at_the_home_folder(home: Path):
    commands = cli.app.registered_commands
    assert len(commands) > 10
    for registered in commands:
        assert registered.callback is not None
        assert hasattr(registered.callback, "__wrapped__"), "registered past `command`, which expands paths"
        for name, hint in get_type_hints(registered.callback, include_extras=True).items():
            told = " ".join(str(getattr(entry, "help", "")) for entry in getattr(hint, "__metadata__", ()))
            if "str" in str(hint) and name not in (*shared.SPECS, "format"):
                assert not re.search(r"[Ff]older|[Ff]ile\b", told), f"{registered.callback.__name__} --{name}: a Path?"
    assert shared._as_meant("anything", Path("~/x")) == home / "x"
    assert shared._as_meant("models", ["~/x", "someone/model"]) == [str(home / "x"), "someone/model"]


def calls(home: Path) -> dict[str, Callable[[], Any]]:
    packed, tokenizer = llmqat.load("~/packed"), tiny_tokenizer()
    writers = {
        name: lambda write=write, name=name: write(packed, tokenizer, f"~/{name}")
        for name, write in CONVERSIONS.items()
    }
    return {
        **writers,
        "again": lambda: llmqat.save(packed, "~/again"),
        "dry": lambda: push("~/packed", "someone/name", dry_run=Path("~/dry")),
    }


@pytest.mark.parametrize("name", [*CONVERSIONS, "again", "dry"])
def test_every_function_that_writes_a_checkpoint_begins_at_the_home_folder(name: str, home: Path):
    model = tiny_llama()
    llmqat.prepare(model, llmqat.QuantConfig.preset("int4", group_size=32))
    llmqat.save(model, "~/packed", tiny_tokenizer())
    calls(home)[name]()
    assert (home / name).exists()
    assert not Path("~").exists()


def test_every_function_that_reads_begins_at_the_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch):
    for read in (load_recipe, TeacherCache, lambda folder: push(folder, "someone/name")):
        with pytest.raises(FileNotFoundError, match=str(home)):
            read("~/nothing")
    monkeypatch.setenv("LLMQAT_CACHE", "~/cache")
    assert cache_folder() == home / "cache"
    monkeypatch.delenv("LLMQAT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/caches")
    assert cache_folder() == home / "caches" / "llmqat"


def test_paths_of_the_scripts_begin_at_the_home_folder():
    # Their paths come from the options of others.
    parts = {"peer_methods.py", "client_checkpoints.py", "client_table.py", "budget_law.py", "ablation_levers.py"}
    parts |= {"gpu_models.py", "gpu_steps.py", "gpu_tables.py", "made.py"}
    assert len(EVAL_SCRIPTS) > 15 + len(parts)
    for script in EVAL_SCRIPTS:
        if script.name not in parts:
            text = script.read_text()
            assert "type=Path" not in text, f"{script.name}: write type=user_path"
            assert "--json" not in text or "check_outputs(" in text, f"{script.name}: try --json before the work"
            assert "show_any_text()" in text, f"{script.name}: dies on a terminal that is not UTF-8"


def test_an_output_that_cannot_be_written_is_refused_before(tmp_path: Path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_text("here")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    before = sorted(tmp_path.rglob("*"))
    check_outputs({"--json": folder / "new" / "deep" / "report.json", "--html": file, "--csv": None})
    for path, words in {
        folder: "is a folder",
        file / "report.json": "is a file, not a folder",
        file / "deep" / "report.json": "is a file, not a folder",
        tmp_path / ("x" * 300) / "report.json": "too long",
        Path("/dev/null"): "no ordinary file",
        Path("/proc/report.json"): "cannot be written",
    }.items():
        with pytest.raises(OSError, match=words) as refused:
            check_outputs({"--json": path})
        assert f"--json={path}" in str(refused.value)
    if os.geteuid() != 0:  # to whom nothing is closed
        with pytest.raises(OSError, match="Permission denied"):
            check_outputs({"--json": closed / "report.json"})
    check_folder_output(folder / "new", "--report")
    with pytest.raises(NotADirectoryError, match=r"--report=.* is a file"):
        check_folder_output(file, "--report")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_replaces_no_other_and_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--json and --html are both"):
        check_outputs({"--json": Path("report"), "--html": tmp_path / "report"})
    with pytest.raises(ValueError, match=r"--json=text\.txt would replace what is read"):
        check_outputs({"--json": Path("text.txt")}, ["someone/model", tmp_path / "text.txt"])
    (tmp_path / "text.txt").write_text("a")
    (tmp_path / "other.txt").symlink_to("text.txt")
    assert same_place("other.txt", "text.txt")
    check_file_output(Path("other.txt"), "--json")


def test_a_file_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    write_whole(tmp_path / "file", "a name that is not UTF-8: \udce9")
    assert "UTF-8: \\udce9" in (tmp_path / "file").read_text()

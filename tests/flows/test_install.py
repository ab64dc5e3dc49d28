"""llmqat installed elsewhere: the wheel that pip makes of a clone has all that its commands need."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import llmqat
from llmqat.shipped import shipped_files

ROOT = Path(__file__).resolve().parents[2]


def done(*words: str | Path, folder: Path, **variables: str) -> str:
    """Runs words outside of the checkout, with no path that leads back into it; returns what was printed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    found = subprocess.run(
        [str(word) for word in words], cwd=folder, env={**kept, **variables}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return found.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked, as a git repository."""
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder], cwd=ROOT, check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    git = ("git", "-C", unpacked, "-c", "user.name=x", "-c", "user.email=x@x")
    for words in (("init", "-q"), ("add", "-A", "-f"), ("commit", "-q", "-m", "x")):
        done(*git, *words, folder=folder)
    return unpacked


def test_the_source_distribution_has_what_the_repository_has(source: Path) -> None:
    if not (ROOT / ".git").exists():  # this is an unpacked source distribution itself
        tracked = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    else:
        tracked = set(done("git", "ls-files", folder=ROOT).splitlines())
    wanted = {name for name in tracked if not name.startswith(".")}
    assert {name for name in wanted if (ROOT / name).is_file() and not (source / name).is_file()} == set()


@pytest.mark.slow
def test_a_clean_environment_runs_what_pip_installs_of_a_repository(
    source: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    done(sys.executable, "-m", "venv", "--without-pip", venv, folder=tmp_path)
    python = venv / "bin" / "python"
    purelib = done(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip()
    # The packages of this environment, but not what leads to the checkout: .pth files count in site folders alone.
    others = dict.fromkeys(
        (sysconfig.get_path("purelib"), str(Path(importlib.import_module("hatchling").__file__ or "").parents[1]))
    )
    Path(purelib, "others.pth").write_text("\n".join(others) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation")
    done(*pip, "--no-index", f"git+file://{source}", folder=tmp_path, PIP_DISABLE_PIP_VERSION_CHECK="1")
    where = Path(done(python, "-c", "import llmqat; print(llmqat.__file__)", folder=tmp_path).strip())
    assert where.is_relative_to(venv)
    command = venv / "bin" / "llmqat"
    assert f"llmqat {llmqat.__version__}" in done(command, "--version", folder=tmp_path)
    listed = done(command, "recipes", folder=tmp_path)
    assert [name for name in shipped_files() if name not in listed] == []
    words = (f"model={tiny_folder}", "data.block_size=64", "evaluate.window=64")
    assert "steps" in done(command, "plan", "lora-int4", *words, folder=tmp_path)
    done(command, "recipes", "copy", "lora-int4", "mine", folder=tmp_path)
    assert (tmp_path / "mine" / "lora-int4.yaml").is_file()


def test_the_wheel_has_recipes_types_and_license(source: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=source, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    folder = ROOT / "recipes"
    assert {f"llmqat/recipes/{file.relative_to(folder).as_posix()}" for file in shipped_files().values()} <= names
    assert "llmqat/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "eval/", "recipes/")) for name in names)
    for line in ("Project-URL: Homepage, https://", "Author: ", "Classifier: Programming Language :: Python :: 3.10"):
        assert line in metadata

"""Whether the version bounds in pyproject.toml are true, by running the quick tests at both ends of them.

Two environments are made: `lowest` has the lowest allowed version of every package that pyproject.toml names, on the
oldest Python that llmqat allows; `newest` has the newest of everything, on the newest Python of this machine. Packages
that llmqat only gets through others are the newest that fit. The quick tests (`PARTS`, without those marked real or
slow) run in both, and the result says the versions, and what passed and failed.

The versions are chosen by uv (`--resolution lowest-direct` and `highest`), which is installed from PyPI into the work
folder. A bound that nothing reaches, because another package asks for more, is named: it ought to be raised.

What is done is not done again: a part of the tests runs anew only where versions, tests or code have changed, so the
same command goes on after an interruption. The environments take 6 to 7 GB each where torch is a CUDA build, as PyPI's
is on Linux; `--torch-index https://download.pytorch.org/whl/cpu` makes them smaller.

    python eval/bounds.py --work .bounds --json eval/results/bounds.json --table eval/results/bounds.md
    python eval/bounds.py --work .bounds --environments lowest --parts cli export
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from llmqat.files import write_whole
from llmqat.paths import check_outputs, user_path
from llmqat.terminal import show_any_text

ROOT = Path(__file__).resolve().parents[1]
PARTS: dict[str, tuple[str, ...]] = {
    "cli": ("test_imports.py", "test_cli.py", "test_shipped.py", "test_models.py", "test_recipe.py"),
    "grid": ("grid",),
    "data": ("data/test_rows.py", "data/test_chat.py"),
    "layers": tuple(
        f"layers/test_{name}.py" for name in ("linear", "prepare", "lora", "attention", "embedding", "packed_training")
    ),
    "train": tuple(
        f"train/test_{name}.py" for name in ("arguments", "trainer", "sft", "optimizers", "adapter", "checkpoints")
    ),
    "export": tuple(
        f"export/test_{name}.py"
        for name in ("checkpoint", "formats", "gguf", "onnx", "peft", "stock", "hub", "registry")
    ),
    "evaluate": ("evaluate/test_tasks.py", "evaluate/test_layers.py", "evaluate/test_compare.py"),
}
"""The quick tests, by the name that --parts takes: files under tests/, chosen where other packages are called most."""
MARKED = "not real and not slow"
"""Which of them run."""
EXTRAS = ("energy", "eval", "gguf", "kernels", "mlflow", "onnx", "plots", "trackers", "triton", "trl")
"""All but `dev`: whether their bounds fit together is tried too."""
TEST_TOOLS = ("hypothesis", "pytest")
"""Of the extra `dev`: what runs the tests. The rest of it reads the code alone."""
OLDEST = (3, 10)
SECONDS = 7200
"""Time that a part may take."""


@dataclass(frozen=True)
class End:
    """One end of what pyproject.toml allows."""

    resolution: str
    """What uv calls it."""
    oldest_python: bool


ENDS = {"lowest": End("lowest-direct", True), "newest": End("highest", False)}


def main() -> None:
    """Makes what is missing, runs what is missing, and writes the result."""
    show_any_text()
    options = parse_options()
    check_outputs({"--json": options.json, "--table": options.table})
    for end in options.environments:
        python = options.python.get(end) or found_python(oldest=ENDS[end].oldest_python)
        environment = make_environment(end, python, options)
        for part in options.parts:
            run_part(end, environment, part, options.work)
            report(options)
    results = report(options)
    failed = sum(part["failed"] for end in results["environments"].values() for part in end["parts"].values())
    unreached = sum(len(end["unreached"]) for end in results["environments"].values())
    print(f"bounds that nothing reaches: {unreached}")
    print(f"tests failed: {failed}")
    sys.exit(1 if failed or unreached else 0)


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=user_path, required=True, help="folder of environments and of what is done")
    parser.add_argument("--environments", nargs="+", choices=list(ENDS), default=list(ENDS), help="both if not given")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="all if not given")
    parser.add_argument(
        "--python",
        nargs="*",
        default=[],
        type=named_python,
        metavar="END=PATH",
        help="an interpreter for lowest or newest; otherwise the oldest allowed and the newest that are found",
    )
    parser.add_argument("--torch-index", help="one more package index, for torch (a CPU build is far smaller)")
    parser.add_argument("--json", type=user_path, help="file for the results")
    parser.add_argument("--table", type=user_path, help="file for the tables, in Markdown")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.python = dict(options.python)
    return options


def named_python(given: str) -> tuple[str, Path]:
    """Returns the two sides of END=PATH."""
    end, _, path = given.partition("=")
    if end not in ENDS or not path:
        raise argparse.ArgumentTypeError(f"{given!r}: write lowest=PATH or newest=PATH, with a Python's path")
    return end, user_path(path)


# What pyproject.toml says


def declared() -> dict[str, Requirement]:
    """Returns the requirements that the tests need, by normalized name."""
    project = _read_toml(ROOT / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    tools = [line for line in extras["dev"] if Requirement(line).name in TEST_TOOLS]
    requirements = [Requirement(line) for line in (*lines, *tools)]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # a dependency of pytest and mypy there
    return tomllib.loads(path.read_text(encoding="utf-8"))


def lower_bound(requirement: Requirement) -> Version | None:
    """Returns the lowest version that a requirement allows."""
    found = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==")]
    return max(found) if found else None


def unreached(versions: Mapping[str, str]) -> dict[str, str]:
    """Returns package -> "BOUND, but VERSION is the lowest that fits": bounds lower than what can be installed."""
    bounds = {name: lower_bound(requirement) for name, requirement in declared().items()}
    return {
        name: f"{bound}, but {versions[name]} is the lowest that fits"
        for name, bound in bounds.items()
        if bound is not None and name in versions and Version(Version(versions[name]).public) != bound
    }


# Interpreters


def found_python(*, oldest: bool) -> Path:
    """Returns the oldest or the newest Python of this machine that llmqat allows.

    Raises:
        OSError: there is none.
    """
    found: dict[tuple[int, int], Path] = {}
    for path in _candidates():
        version = _version_of(path)
        if version is not None and version >= OLDEST:
            found.setdefault(version, path)
    if not found:
        raise OSError(f"no Python {OLDEST[0]}.{OLDEST[1]} or newer was found; give --python lowest=PATH newest=PATH")
    return found[min(found) if oldest else max(found)]


def _candidates() -> Iterable[Path]:
    names = [f"python3.{minor}" for minor in range(OLDEST[1], 30)]
    on_path = [shutil.which(name) for name in names]
    yield from (Path(name) for name in on_path if name is not None)
    for pattern in (".pyenv/versions/*/bin/python3.*", ".local/share/uv/python/*/bin/python3.*"):
        yield from (path for path in sorted(Path.home().glob(pattern)) if path.name in names)
    yield Path(sys.executable)


def _version_of(python: Path) -> tuple[int, int] | None:
    code = "import sys, venv; print(*sys.version_info[:2])"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:  # pyenv has a command for every version, also those that are not chosen
        return None
    major, minor = map(int, done.stdout.split())
    return major, minor


# Environments


def make_environment(end: str, python: Path, options: argparse.Namespace) -> Path:
    """Makes an environment with exactly the versions of one end, or changes it to that; returns its folder."""
    folder: Path = options.work / end
    uv = _uv(options.work)
    version = _version_of(python)
    assert version is not None, f"{python} does not run"
    run = _Uv(uv, options.work / "cache", options.torch_index)
    if not folder.is_dir() or _version_of(folder / "bin" / "python") != version:
        run("venv", "--quiet", "--clear", "--python", str(python), str(folder))
    print(f"{end}: Python {version[0]}.{version[1]}, installing into {folder}", file=sys.stderr, flush=True)
    own = options.work / f"{end}.in"
    own.write_text("".join(f"{requirement}\n" for requirement in declared().values()), encoding="utf-8")
    lock = options.work / f"{end}.txt"
    interpreter = str(folder / "bin" / "python")
    resolution = ("--resolution", ENDS[end].resolution)
    run("pip", "compile", "--quiet", *resolution, "--python", interpreter, str(own), "--output-file", str(lock))
    run("pip", "sync", "--quiet", "--python", interpreter, str(lock))
    return folder


@dataclass(frozen=True)
class _Uv:
    """Calls uv; its downloads lie in the work folder too, where environments can share their files."""

    program: Path
    cache: Path
    torch_index: str | None

    def __call__(self, *words: str) -> None:
        index = ["--extra-index-url", self.torch_index] if self.torch_index and words[0] == "pip" else []
        environment = {**_clean(), "UV_CACHE_DIR": str(self.cache), "UV_PYTHON_DOWNLOADS": "never"}
        done = subprocess.run(
            [str(self.program), *words, *index], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise OSError(f"uv {' '.join(words)} failed: {done.stderr.strip()}")


def _uv(work: Path) -> Path:
    """Returns uv, of this machine or else installed into the work folder."""
    if (known := shutil.which("uv")) is not None:
        return Path(known)
    folder = work / "uv"
    if not (folder / "bin" / "uv").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "uv"], check=True)
    return folder / "bin" / "uv"


def _clean() -> dict[str, str]:
    """Returns this process's variables without those that lead Python elsewhere, or make each start slow."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in left_out}


def installed(environment: Path) -> dict[str, str]:
    """Returns normalized name -> version of every package in an environment."""
    code = (
        "import importlib.metadata, json; "
        "print(json.dumps({d.metadata['Name']: d.version for d in importlib.metadata.distributions()}))"
    )
    done = subprocess.run(
        [str(environment / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True, env=_clean()
    )
    return {canonicalize_name(name): version for name, version in json.loads(done.stdout).items()}


# Tests


def run_part(end: str, environment: Path, part: str, work: Path) -> None:
    """Runs one part of the tests in an environment, unless it was run on the same code and versions."""
    versions = installed(environment)
    key = _key(versions, part)
    file = work / "done" / f"{end}.{part}.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["key"] == key:
        return
    print(f"{end}: {part}", file=sys.stderr, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    xml, log = file.with_suffix(".xml"), file.with_suffix(".log")
    xml.unlink(missing_ok=True)
    command = [str(environment / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", MARKED]
    variables = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", **_clean(), "PYTHONPATH": str(ROOT)}
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(
            [
                *command,
                "--continue-on-collection-errors",
                f"--junitxml={xml}",
                *(f"tests/{name}" for name in PARTS[part]),
            ],
            cwd=ROOT,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
        )
    if not xml.is_file():
        raise OSError(f"pytest did not finish in {environment}; see {log}")
    python = subprocess.run([*command[:1], "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]
    kept = {"key": key, "python": python, "versions": versions, **counts(xml)}
    write_whole(file, json.dumps(kept, indent=1) + "\n")


def _key(versions: Mapping[str, str], part: str) -> str:
    """Returns a hash of all that the result of a part comes from."""
    digest = hashlib.sha256(json.dumps([sorted(versions.items()), PARTS[part], MARKED]).encode())
    for folder in ("llmqat", "recipes", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".yaml", ".md"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def counts(xml: Path) -> dict[str, Any]:
    """Returns what passed, failed and was skipped, and the names of what failed, from pytest's JUnit file."""
    cases = list(ElementTree.parse(xml).iter("testcase"))
    wrong = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(wrong) - skipped,
        "failed": len(wrong),
        "skipped": skipped,
        "seconds": round(sum(float(case.get("time", 0)) for case in cases)),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in wrong],
    }


# The result


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the result of all that is done, and returns it."""
    environments: dict[str, Any] = {}
    for end in ENDS:
        files = {part: options.work / "done" / f"{end}.{part}.json" for part in PARTS}
        parts = {part: json.loads(file.read_text(encoding="utf-8")) for part, file in files.items() if file.is_file()}
        if parts:
            last = list(parts.values())[-1]
            versions = {name: last["versions"][name] for name in sorted(declared()) if name in last["versions"]}
            environments[end] = {
                "python": last["python"],
                "versions": versions,
                "unreached": unreached(versions) if end == "lowest" else {},
                "parts": {
                    name: {key: part[key] for key in ("passed", "failed", "skipped", "seconds", "failures")}
                    for name, part in parts.items()
                },
            }
    results = {"tests": MARKED, "system": f"{platform.system()} {platform.machine()}", "environments": environments}
    if options.json is not None:
        write_whole(options.json, json.dumps(results, indent=1) + "\n")
    if options.table is not None:
        write_whole(options.table, render(results))
    return results


def render(results: Mapping[str, Any]) -> str:
    """Returns the tables of versions and of tests, in Markdown."""
    ends = results["environments"]
    lines = [
        "# The bounds of pyproject.toml, tried",
        "",
        f"Made by `make bounds` on {results['system']}, without a GPU. `lowest` is the lowest allowed version of every",
        "package that pyproject.toml names, all together; `newest` is the newest that PyPI had. Tests: those of",
        f"{', '.join(PARTS)} that are marked {MARKED}.",
        "",
        _row(["", *ends]),
        _row(["---"] * (len(ends) + 1)),
        _row(["Python", *(end["python"] for end in ends.values())]),
    ]
    names = sorted({name for end in ends.values() for name in end["versions"]})
    lines += [_row([name, *(_public(end["versions"].get(name, "–")) for end in ends.values())]) for name in names]
    lines += ["", _row(["tests", *ends]), _row(["---"] * (len(ends) + 1))]
    for part in PARTS:
        cells = [_told(end["parts"][part]) if part in end["parts"] else "not run" for end in ends.values()]
        lines.append(_row([part, *cells]))
    for name, end in ends.items():
        failures = [failure for part in end["parts"].values() for failure in part["failures"]]
        if failures:
            lines += ["", f"Failed with the {name} versions:", "", *(f"- {failure}" for failure in failures)]
        if end["unreached"]:
            lines += ["", "Bounds that nothing reaches:", ""]
            lines += [f"- {package}: {said}" for package, said in end["unreached"].items()]
    return "\n".join(lines) + "\n"


def _told(part: Mapping[str, Any]) -> str:
    told = [f"{part['passed']} passed", *(f"{part[key]} {key}" for key in ("failed", "skipped") if part[key])]
    return ", ".join(told)


def _public(version: str) -> str:
    return re.sub(r"\+.*", "", version)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

"""Optional packages, and what to install where one is missing or too old: one check, one form of advice.

Every import of a package that llmqat's core does not need goes through `require`, or asks `missing` first, before any
work is done. The extras are those of pyproject.toml: `pip install 'llmqat[gguf]'`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from packaging.requirements import Requirement
from packaging.version import Version

EXTRAS = {
    "gguf": "gguf",
    "kernels": "kernels",
    "lm_eval": "eval",
    "matplotlib": "plots",
    "mlflow": "mlflow",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "pynvml": "energy",
    "tensorboard": "trackers",
    "triton": "triton",
    "trl": "trl",
}
"""Module -> the extra of llmqat that brings it."""

DISTRIBUTIONS = {
    "humming": "humming-kernels",
    "lm_eval": "lm-eval",
    "mlflow": "mlflow-skinny",
    "optimi": "torch-optimi",
    "pynvml": "nvidia-ml-py",
}
"""Module -> its name on PyPI, where that is another one."""


def installation(module: str) -> str:
    """Returns the command that installs `module`."""
    name = DISTRIBUTIONS.get(module, module)
    return f"pip install '{f'llmqat[{EXTRAS[module]}]' if module in EXTRAS else name}'"


def missing(module: str) -> str | None:
    """Returns why `module` cannot be used, with what to install; None where it can. Nothing is imported."""
    name = DISTRIBUTIONS.get(module, module)
    install = installation(module)
    if importlib.util.find_spec(module) is None:
        return f"{name}, which is not installed; run `{install}`"
    try:
        version = Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:  # brought by another distribution, such as mlflow
        return None
    lowest = _lowest(name)
    if lowest is not None and version < lowest:
        upgrade = install.replace("install", "install --upgrade", 1)
        return f"{name} {lowest} or newer, and {version} is installed; run `{upgrade}`"
    return None


def require(module: str, purpose: str) -> ModuleType:
    """Returns the optional module, imported.

    Args:
        module: its name.
        purpose: what needs it, the subject of the error's sentence.

    Raises:
        ImportError: it is not installed, or older than llmqat can use.
    """
    check_installed(module, purpose)
    return importlib.import_module(module)


def check_installed(module: str, purpose: str) -> None:
    """Raises ImportError where `module` is not installed, or too old; `purpose` is the subject of its sentence."""
    reason = missing(module)
    if reason is not None:
        raise ImportError(f"{purpose} needs {reason}")


def check_all_installed(modules: Sequence[str], purpose: str) -> None:
    """Raises ImportError where some of `modules` are not installed, with one line that installs them all."""
    absent = [DISTRIBUTIONS.get(module, module) for module in modules if importlib.util.find_spec(module) is None]
    if absent:
        raise ImportError(
            f"{purpose} needs {' and '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed; run "
            f"`pip install {' '.join(absent)}`"
        )
    for module in modules:
        check_installed(module, purpose)


def check_version(distribution: str, lowest: str, purpose: str) -> None:
    """Raises ImportError where a package of the core is older than `purpose` needs, though not than llmqat allows."""
    found = importlib.metadata.version(distribution)
    if Version(found) < Version(lowest):
        raise ImportError(
            f"{purpose} needs {distribution} {lowest} or newer, and {found} is installed; run "
            f"`pip install --upgrade '{distribution}>={lowest}'`"
        )


@contextmanager
def hidden(module: str) -> Iterator[None]:
    """Inside, importing `module` fails as if it were not installed, unless it was imported before.

    For a package that imports another one to see whether it is there, which takes seconds and prints warnings.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


@functools.cache  # kernels ask for every layer
def _lowest(distribution: str) -> Version | None:
    """Returns the lowest version that llmqat's own metadata allows; None where llmqat runs without being installed."""
    try:
        lines = importlib.metadata.requires("llmqat") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for requirement in map(Requirement, lines):
        if requirement.name == distribution:
            return max((Version(part.version) for part in requirement.specifier if part.operator == ">="), default=None)
    return None

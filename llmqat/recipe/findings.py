"""Collects the errors that checks find and raises them together, so that a user can mend all of them at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llmqat.status import USER_MISTAKES

log = logging.getLogger(__name__)


class PreflightError(ValueError):
    """Several things are wrong.

    Attributes:
        findings: what each check said.
    """

    def __init__(self, findings: Sequence[Exception]) -> None:
        listed = "\n".join(f"  {number}. {error}" for number, error in enumerate(findings, 1))
        super().__init__(f"{len(findings)} things are wrong, and nothing was done:\n{listed}")
        self.findings = tuple(findings)


@dataclass
class Findings:
    """What checks have found, each told once."""

    errors: list[Exception] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Inside, an error that is the user's to mend is noted, and ends the block."""
        try:
            yield
        except USER_MISTAKES as error:
            self.note(error)

    def note(self, error: Exception) -> None:
        """Notes an error, unless another check has said the same."""
        if str(error) not in map(str, self.errors):
            self.errors.append(error)

    def refuse(self) -> None:
        """Raises what was found: a single error as it is, several as a PreflightError; logs warnings."""
        for warning in self.warnings:
            log.warning("%s", warning)
        self.warnings = []
        if len(self.errors) > 1:
            raise PreflightError(self.errors)
        if self.errors:
            raise self.errors[0]


def all_of(checks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Makes all `checks`, and returns what each gave.

    Raises:
        Exception: a check's own, where one alone fails.
        PreflightError: several fail.
    """
    found = Findings()
    given: list[Any] = []
    for check in checks:
        with found.noting():
            given.append(check())
    found.refuse()
    return given

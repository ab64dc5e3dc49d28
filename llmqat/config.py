"""What every configuration of llmqat shares: frozen, typed, and an unknown key is an error that names the nearest one.

Each configuration class lives beside the code it configures and subclasses `Config`; `recipe.py` composes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


def unknown_key_message(key: str, allowed: Iterable[str], owner: str) -> str:
    """Returns the error text for `key`, which `owner` does not have: the nearest known key and all that are allowed."""
    names = sorted(allowed)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key {key!r} in {owner}; {guess}allowed: {', '.join(names)}"


class Config(BaseModel):
    """Base of all configuration classes: immutable, strict about names.

    Raises:
        pydantic.ValidationError: (a `ValueError`) for an unknown key or a value of the wrong type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            known = set(cls.model_fields)
            for key in values:
                if key not in known:
                    raise ValueError(unknown_key_message(str(key), known, cls.__name__))
        return values

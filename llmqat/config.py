"""What every configuration of llmqat shares: frozen, typed, and an unknown key is an error that names the nearest one.

Each configuration class lives beside the code it configures and subclasses `Config`; `recipe.py` composes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from llmqat.paths import user_path


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
            return {key: cls._as_meant(key, value) for key, value in values.items()}
        return values

    @classmethod
    def _as_meant(cls, key: str, value: Any) -> Any:
        """Returns the value of a key; paths as a user means them."""
        if isinstance(value, (str, Path)) and holds_path(cls.model_fields[key].annotation):
            return user_path(value, key)
        return value


def holds_path(annotation: Any) -> bool:
    """Returns whether a field of this type may be a path."""
    return annotation is Path or any(holds_path(part) for part in get_args(annotation))

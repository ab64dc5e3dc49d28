"""Reading a recipe: YAML, overrides of the command line, and errors that name the key and the way out."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from llmqat.config import UnknownKeyError
from llmqat.data.config import DataConfig, MixedSource
from llmqat.data.text import read_text
from llmqat.export.checkpoint import RUN_FILE
from llmqat.paths import user_path
from llmqat.recipe.config import DEFAULT_STAGES, NO_TRAINING, RECIPE_FILE, Recipe
from llmqat.shipped import advice, shipped_recipes


class _Loader(yaml.SafeLoader):
    """YAML as people write it: numbers as in 1e-4, `no` as text, and no key twice.

    YAML 1.1 calls 1e-4 text and no false, which transformers has as a setting (save_strategy: no). It calls the folder
    010 the number 8, 1:30 the number 90, 1:30.5 the number 90.5, and 2026-11-30 a date; here these are text.
    """


_BOOL, _INT, _FLOAT, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    letter: [resolver for resolver in resolvers if resolver[0] not in (_BOOL, _INT, _FLOAT, _DATE)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))

_Loader.add_implicit_resolver(_INT, re.compile("^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))

_DECIMAL = r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
_NO_NUMBER = r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"

_Loader.add_implicit_resolver(_FLOAT, re.compile(f"^({_DECIMAL}|{_NO_NUMBER})$"), list("-+0123456789."))


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def parse_yaml(text: str, source: str) -> Any:
    """Returns what the YAML `text` says; `source` names it in errors.

    Raises:
        ValueError: when the text is not YAML or gives a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Returns the recipe in the YAML file `path`, or in the run folder `path`, changed by `key=value` overrides.

    A checkpoint's llmqat.json, or the folder that holds it, repeats the run that made it. Where there is no such file,
    `path` is the name of a recipe that comes with llmqat (`llmqat recipes`), such as "lora-int4".

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for what is not YAML, for an unknown key, a wrong type, or an override that is not `key=value`.
    """
    file = user_path(path, "recipe")
    name = None
    if file.is_dir():
        recorded = file / RUN_FILE
        file = recorded if recorded.is_file() and not (file / RECIPE_FILE).is_file() else file / RECIPE_FILE
    elif not file.exists() and len(file.parts) == 1:
        name = file.name.removesuffix(".yaml")
        file = shipped_recipes().get(name, file)
    if not file.is_file():
        raise FileNotFoundError(
            f"no recipe at {file}; give a .yaml file, the folder of a run, or the name of a recipe that comes with "
            f"llmqat: {advice(file.name, list(shipped_recipes()))}"
        )
    source = name or str(file)
    values = parse_yaml(read_text(file), source)  # of which JSON is a part
    if file.name == RUN_FILE and isinstance(values, dict):
        values = _without_defaults((values.get("run") or {}).get("recipe"))
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no recipe: expected `key: value` lines, found {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    return recipe_from(values, source, overrides)


def _without_defaults(recorded: Any) -> Any:
    """Returns a recorded recipe, which names every key, as its writer gave it.

    Keys of `data` that say nothing to its source are left out. Where bits were chosen by layer, the overrides hold them
    already, so they are not chosen again.
    """
    if not isinstance(recorded, dict) or not isinstance(recorded.get("data"), dict):
        return recorded
    data = _given(recorded["data"], DataConfig) | {"seed": recorded["data"].get("seed", 0)}
    if isinstance(mix := recorded["data"].get("mix"), list):
        shared = {"block_size", "seed", "packing", "num_proc", "calibration_share", "validation_share", "tokens"}
        data["mix"] = [
            {key: value for key, value in _given(one, MixedSource).items() if key not in shared} for one in mix
        ]
    return {**recorded, "data": data, "allocate": None}


def _given(recorded: Mapping[str, Any], kind: type[DataConfig]) -> dict[str, Any]:
    """Returns what differs from the defaults of a configuration."""
    fields = kind.model_fields
    return {key: value for key, value in recorded.items() if key not in fields or value != fields[key].default}


def recipe_from(values: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Returns the recipe that `values` describe; errors name key and value, what is allowed, and who gave it.

    Args:
        values: of the recipe, overrides applied.
        source: where they come from, for errors.
        overrides: `key=value` of the command line that are among them; errors in these name the override.

    Raises:
        ValueError: for unknown keys, all of them at once, a missing one, or a value of the wrong type.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        words = {key: text for key, _, text in (override.partition("=") for override in overrides)}
        given = {key: text for key, text in words.items() if not text.startswith(("{", "["))}
        raise ValueError(_told(_all_wrong(values, error, given), source, given)) from error


class _Wrong(NamedTuple):
    """One thing that is wrong in a recipe."""

    place: str
    """The key, dotted."""
    head: str
    """What stands before the message where a file has the key."""
    message: str


def _told(wrong: Sequence[_Wrong], source: str, given: Mapping[str, str]) -> str:
    """Returns what is wrong, a line a key, those of the file `source` first."""
    of_file = [one.head + one.message for one in wrong if one.place not in given]
    of_command = [f"{one.place}={given[one.place]}: {one.message}" for one in wrong if one.place in given]
    lines = [*([f"{source}: " + "\n".join(of_file)] if of_file else []), *of_command]
    return "\n".join(dict.fromkeys(lines))


def _all_wrong(values: Mapping[str, Any], error: ValidationError, given: Mapping[str, str]) -> list[_Wrong]:
    """Returns what is wrong. A section names one unknown key at a time, so the rest is read without those named."""
    found, left = _explain_all(error, given), copy.deepcopy(dict(values))
    while [key for parts, key in _unknown_keys(error) if _remove(left, parts, key)]:
        try:
            Recipe.model_validate(left)
            break
        except ValidationError as more:
            error = more
            unknown_places = {".".join((*parts, key)) for parts, key in _unknown_keys(error)}
            found += [one for one in _explain_all(error, given) if one.place in unknown_places]
    return found


def _unknown_keys(error: ValidationError, inside: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the place of a section, and a key that it does not have."""
    for entry in error.errors():
        parts = (*inside, *_parts_of(entry))
        cause = entry.get("ctx", {}).get("error")
        if isinstance(cause, ValidationError):
            yield from _unknown_keys(cause, parts)
        elif isinstance(cause, UnknownKeyError):
            yield parts, cause.key


def _remove(values: Any, parts: Sequence[str], key: str) -> bool:
    """Removes `key` from the section at `parts`; returns whether it was there."""
    for part in parts:
        if isinstance(values, list) and part.isdecimal() and int(part) < len(values):
            values = values[int(part)]
        elif isinstance(values, dict):
            values = values.get(part)
    return isinstance(values, dict) and values.pop(key, values) is not values


_ALTERNATIVE = re.compile(r"^(function-\w+\[|literal\[|ActivationConfig$|WeightConfig$)")
"""Part of an error's place that names one of several types of a key, and is no key."""


def _parts_of(entry: Any) -> tuple[str, ...]:
    return tuple(str(part) for part in entry["loc"] if not _ALTERNATIVE.match(str(part)))


def _explain_all(error: ValidationError, given: Mapping[str, str], inside: str = "") -> list[_Wrong]:
    """Returns what is wrong; of a key that may also be a word, only what is wrong as a section."""
    entries = error.errors()
    sections = [entry for entry in entries if not any(str(part).startswith("literal[") for part in entry["loc"])]
    return [one for entry in sections or entries for one in _explain(entry, given, inside)]


def _explain(entry: Any, given: Mapping[str, str], inside: str = "") -> list[_Wrong]:
    key = ".".join(part for part in (inside, *_parts_of(entry)) if part)
    cause = entry.get("ctx", {}).get("error")
    if isinstance(cause, ValidationError):  # a preset builds its configuration inside a validator
        return _explain_all(cause, given, key)
    if isinstance(cause, UnknownKeyError):
        from llmqat.recipe.schema import explain_unknown

        place = ".".join(part for part in (key, cause.key) if part)
        values = entry["input"]
        value = given.get(place, values.get(cause.key) if isinstance(values, Mapping) else None)
        return [_Wrong(place, f"{key}: " if key else "", explain_unknown(key, cause, value))]
    message = str(entry["msg"]).removeprefix("Value error, ")
    if entry["type"] == "missing":
        return [_Wrong(key, "", f"{key} is missing; add it to the recipe or give {key}=VALUE")]
    if entry["type"] == "value_error":
        return [_Wrong(key, f"{key}: " if key else "", message)]
    return [_Wrong(key, f"{key}={entry['input']!r}: ", message)]


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one `dotted.key=value` in `values`, in place; the value is read as YAML.

    A stage of `calibrate` is meant by its name or its number: calibrate.blockwise.iterations=40.

    Raises:
        ValueError: when `=` is missing, the key goes through something that has no keys, or means no one stage.
    """
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ValueError(f"{override!r} is not an override; write key=value, for example train.learning_rate=1e-4")
    *parents, last = key.split(".")
    section: Any = values
    for depth, parent in enumerate(parents):
        inside = ".".join(parents[: depth + 1])
        if inside == "calibrate":
            section.setdefault(parent, [*DEFAULT_STAGES])
        elif inside == "quant" and isinstance(section.get(parent), str):
            section[parent] = {"preset": section[parent]}
        elif isinstance(section, dict) and section.get(parent) is None:
            # A section that was empty, or null, which may have a meaning.
            section[parent] = dict(NO_TRAINING) if inside == "train" and parent in section else {}
        inner = _entry(section, parent, inside) if isinstance(section, list) else section[parent]
        if not isinstance(inner, (dict, list)):
            raise ValueError(f"{override!r}: {inside} is {inner!r}, which has no key {last!r}")
        section = inner
    if re.search(r"(?:^|\s)#", re.sub(r"'[^']*'|\"[^\"]*\"", "", text)):
        raise ValueError(
            f"{override!r}: ' #' begins a comment in YAML, so the rest would be left out; put the value in quotes: "
            f"'{key}=\"{text}\"'"
        )
    value = parse_yaml(text, f"the value of {key}")
    if isinstance(section, list):
        section[section.index(_entry(section, last, key))] = value
    else:
        section[last] = value


def _entry(entries: list[Any], part: str, key: str) -> Any:
    """Returns the stage that `part` of an override means, by name or by number from 0; a bare name becomes a mapping.

    Raises:
        ValueError: when no stage, or more than one, is meant.
    """
    entries[:] = [{"stage": entry} if isinstance(entry, str) else entry for entry in entries]
    names = [entry.get("stage") if isinstance(entry, dict) else None for entry in entries]
    by_name = [index for index, name in enumerate(names) if name == part]
    chosen = [int(part)] if part.isdecimal() else by_name
    if len(chosen) != 1 or chosen[0] >= len(entries):
        raise ValueError(f"{key} means {len(chosen)} of the stages {names}; give the name of one, or a number")
    return entries[chosen[0]]

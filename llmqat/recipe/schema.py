"""The keys of a recipe: as JSON Schema for editors, as text for a terminal, and the right place of a misplaced one.

All three come from the configuration classes themselves: their types, limits, defaults and the text under each field.
`train` has the fields of QATArguments with the help that transformers gives them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from llmqat.calibrate import STAGES
from llmqat.config import ALIASES, ATTRIBUTES, UnknownKeyError, nearest_key
from llmqat.data.config import MIX, SOURCES
from llmqat.evaluate.documents import DOCUMENTS, document_schema
from llmqat.evaluate.protocols import PROTOCOLS
from llmqat.export.serving import CLIENTS
from llmqat.layers import PRESETS
from llmqat.recipe.config import FOR_SCRIPTS, OWNED_BY_RECIPE, TRAIN_DEFAULTS, Recipe
from llmqat.train import QATArguments

Node = dict[str, Any]
"""A JSON Schema, or a part of one."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCALARS = (str, int, float)
"""What a key=value shows of a given value."""
SCHEME_EXAMPLES = ["int5", "int8-g128"]
"""Names of schemes that are no presets."""
MANY_KEYS = 30
"""A list of more keys is not shown in an error."""


def recipe_schema() -> Node:
    """Returns the JSON Schema of a recipe."""
    schema = Recipe.model_json_schema()
    parts: dict[str, Node] = schema.pop("$defs")
    for kind in STAGES.values():
        stage = kind.model_json_schema()
        parts.update(stage.pop("$defs", {}))
        parts[kind.__name__] = {**stage, "required": ["stage", *stage.get("required", ())]}
    weights, scheme = parts["WeightConfig"]["properties"], parts.pop("QuantConfig")
    pattern = {"type": "string", "pattern": "^(?:[1-9][0-9]?:[1-9][0-9]?|unstructured)$"}
    weights["sparsity"]["anyOf"].insert(0, {**pattern, "examples": ["2:4", "unstructured"]})
    parts["SchemeName"] = {
        "description": "A preset, or a name that says bits, inputs, KV cache and group size: int5, w4a16, int8-g128.",
        "anyOf": [{"enum": [*PRESETS]}, {"type": "string", "pattern": _scheme_pattern(), "examples": SCHEME_EXAMPLES}],
    }
    preset = {"$ref": "#/$defs/SchemeName", "default": "int4", "description": "The scheme that the other keys change."}
    changes = {name: {**node} for name, node in weights.items()}
    for node in changes.values():  # the preset's own stand where they are not given
        del node["default"]
    parts["Scheme"] = {**scheme, "properties": {"preset": preset, **changes, **scheme["properties"]}}
    overrides = scheme["properties"]["overrides"]["additionalProperties"]["anyOf"]
    overrides.append({"$ref": "#/$defs/WeightConfig"})
    for owner in ("DataConfig", "MixedSource"):
        parts[owner]["properties"]["source"]["enum"] = [*SOURCES, MIX]
    parts["EvaluationSettings"]["properties"]["protocol"]["enum"] = [*PROTOCOLS]
    keys = schema["properties"]
    keys["quant"].pop("$ref", None)
    keys["quant"] |= {"anyOf": [{"$ref": "#/$defs/SchemeName"}, {"$ref": "#/$defs/Scheme"}], "default": "int4"}
    client = {"enum": [*CLIENTS]}
    keys["serve"] = {
        **{key: value for key, value in keys["serve"].items() if key not in ("type", "items")},
        "anyOf": [client, {"type": "array", "items": client}],
    }
    stages = [{"enum": [*STAGES]}, *({"$ref": f"#/$defs/{kind.__name__}"} for kind in STAGES.values())]
    keys["calibrate"]["items"] = {"anyOf": stages}
    parts.pop("Stage", None)
    section = {"type": "object", "additionalProperties": False, "properties": _training_keys()}
    keys["train"] = {"description": keys["train"]["description"], "anyOf": [section, {"type": "null"}]}
    return {
        "$schema": DIALECT,
        "title": "llmqat recipe",
        **_tidy(schema),
        "$defs": {k: _tidy(v) for k, v in parts.items()},
    }


@functools.cache
def _training_keys() -> dict[str, Node]:
    """Returns the fields of QATArguments that a recipe may set."""
    hints = get_type_hints(QATArguments)
    keys: dict[str, Node] = {}
    for field in dataclasses.fields(QATArguments):
        if not field.init or field.name in OWNED_BY_RECIPE or field.name in FOR_SCRIPTS:
            continue
        node = _inlined(TypeAdapter(hints[field.name]).json_schema())
        if "choices" in field.metadata:
            node = {"enum": [*field.metadata["choices"], *([None] if field.default is None else [])]}
        node["description"] = field.metadata["help"]
        default = TRAIN_DEFAULTS.get(field.name, field.default)
        if default is not dataclasses.MISSING:
            node["default"] = default.value if isinstance(default, Enum) else default
        keys[field.name] = node
    return keys


def _inlined(node: Node) -> Node:
    """Returns a field's schema without references: enumerations in place, and what has parts of its own as anything."""
    parts = node.pop("$defs", {})

    def resolved(one: Node) -> Node:
        if "$ref" in one:
            part = parts[one["$ref"].rpartition("/")[2]]
            return {"enum": part["enum"]} if "enum" in part else {}
        if "items" in one:
            return {**one, "items": resolved(one["items"])}
        return one

    options = [resolved(one) for one in node.get("anyOf", ())]
    if any("enum" in one for one in options):  # the words of an enumeration, and not any text as well
        options = [one for one in options if one != {"type": "string"}]
    return {"anyOf": options} if len(options) > 1 else options[0] if options else resolved(node)


def _tidy(node: Any) -> Any:
    """Returns a schema without pydantic's titles, and with descriptions as one text."""
    if isinstance(node, list):
        return [_tidy(one) for one in node]
    if not isinstance(node, dict):
        return node
    tidied: Node = {
        key: {name: _tidy(one) for name, one in value.items()} if key == "properties" else _tidy(value)
        for key, value in node.items()
        if key not in ("title", "format")
    }
    if "description" in tidied:
        tidied["description"] = " ".join(tidied["description"].split(ATTRIBUTES)[0].split())
    return tidied


def _scheme_pattern() -> str:
    """Returns what `llmqat.layers.config.scheme_fields` reads, for regular expressions without flags."""

    def word(letters: str) -> str:
        return "[-_ ]*".join(f"[{letter}{letter.upper()}]" if letter.isalpha() else letter for letter in letters)

    gap = "[-_ ]*"
    bits = f"(?:{word('int')}|{word('w')}){gap}[2-8]|[2-8]{gap}{word('bit')}(?:{gap}[sS])?"
    floats = "|".join(map(word, ("fp8", "nvfp4", "mxfp4", "mxfp8")))
    weights = f"(?:{bits}|{word('ternary')}|{word('int2seq')}|{floats})"
    inputs = f"(?:{gap}[aA]{gap}(?:[2-8]|16|{word('fp8')}))?"
    cache = f"(?:{gap}{word('kv')}{gap}(?:4|8|16|{word('fp8')})|{gap}{word('fp8kv')})?"
    block = f"{word('block')}(?:{gap}[1-9][0-9]*)?"
    extent = f"(?:{gap}(?:{word('channel')}|{word('tensor')}|{block}|[gG]{gap}[1-9][0-9]*))?(?:{gap}{word('asym')})?"
    zeros = f"(?:{gap}(?:2:4|4:8))?"
    return f"^(?:{weights}{inputs}{cache}{extent}{zeros}|[qQ]{gap}[48]{gap}0)$"


# Keys by their place


def recipe_keys(schema: Node) -> dict[str, Node]:
    """Returns the keys of a recipe by their dotted place, such as `train.learning_rate` or `calibrate.gptq.blocks`."""
    return dict(_keys_below(schema, schema, (), ()))


def _keys_below(schema: Node, node: Node, place: tuple[str, ...], seen: tuple[str, ...]) -> Iterator[tuple[str, Node]]:
    for owner, part in _parts(schema, node):
        if owner in seen:  # sources in a mix
            continue
        stage = part["properties"].get("stage", {}).get("const")
        inside = (*place, stage) if "items" in node and stage else place
        if inside != place:
            yield ".".join(inside), part
        for name, child in part["properties"].items():
            yield ".".join((*inside, name)), child
            yield from _keys_below(schema, child, (*inside, name), (*seen, owner) if owner else seen)


def _parts(schema: Node, node: Node) -> Iterator[tuple[str, Node]]:
    """Yields the sections that a key may hold, each with its name among the definitions."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        yield from ((owner or name, part) for owner, part in _parts(schema, schema["$defs"][name]))
    elif "properties" in node:
        yield "", node
    else:
        for one in (*node.get("anyOf", ()), *([node["items"]] if "items" in node else ())):
            yield from _parts(schema, one)


def describe_key(key: str) -> str:
    """Returns what a key of a recipe means, its type and default, and the keys inside it, as text.

    Raises:
        ValueError: a recipe has no such key; the nearest is named.
    """
    schema = recipe_schema()
    keys = recipe_keys(schema)
    if key not in keys:
        raise ValueError(f"a recipe has no key {key!r}; {_way_out(key, keys)}")
    return _described(schema, keys, key)


def key_rows() -> list[tuple[str, str, str, str]]:
    """Returns place, type, default (empty for none) and description of every key of a recipe, in their order."""
    schema = recipe_schema()
    return [
        (place, _kind(schema, node), _default(node), node.get("description", ""))
        for place, node in recipe_keys(schema).items()
    ]


def _inside(keys: Mapping[str, Node], key: str) -> list[str]:
    return [name for name in keys if name.startswith(f"{key}.") and "." not in name[len(key) + 1 :]]


def _described(schema: Node, keys: Mapping[str, Node], key: str) -> str:
    lines = [_headline(schema, key, keys[key]), _wrapped(keys[key].get("description", ""), 2)]
    for name in _inside(keys, key):
        lines += ["", _headline(schema, name, keys[name]), _wrapped(keys[name].get("description", ""), 2)]
    return "\n".join(lines)


def describe_report(key: str) -> str:
    """Returns what a field of a JSON report means, its type, and the fields inside it, as text.

    Args:
        key: a kind of report (comparison, audit, sensitivity, run), or a field by its dotted place in one; the kind and
            what stands before may be left out: run.training, training, rows.kl.

    Raises:
        ValueError: no report has such a field; the nearest is named.
    """
    schema = document_schema()
    parts = {name: _by_name_as_section(part) for name, part in schema["$defs"].items()}
    kinds = {kind: {"$ref": f"#/$defs/{model.__name__}"} for kind, model in DOCUMENTS.items()}
    described = {
        kind: {**node, "description": parts[DOCUMENTS[kind].__name__]["description"]} for kind, node in kinds.items()
    }
    schema = {"properties": described, "$defs": parts}
    keys = recipe_keys(schema)
    place = _place_in_reports(key, keys)
    above = key.rpartition(".")[0]
    if place is not None:
        return _described(schema, keys, place)
    if above and (place := _place_in_reports(above, keys)) is not None and not _inside(keys, place):
        return f"{key} is not described by itself; it is in\n\n{_described(schema, keys, place)}"
    near = difflib.get_close_matches(key, [*keys, *(place.rpartition(".")[2] for place in keys)], n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"no JSON report has a field {key!r}; {guess}give one of {', '.join(DOCUMENTS)}, or a field of one"
    )


def _place_in_reports(key: str, keys: Mapping[str, Node]) -> str | None:
    found = [place for place in keys if f".{place}".endswith(f".{key}")]
    return min(found, key=lambda place: place.count("."), default=None)


def _by_name_as_section(node: Any) -> Any:
    """Returns a schema in which entries of one form, by name, are that form."""
    if isinstance(node, list):
        return [_by_name_as_section(one) for one in node]
    if not isinstance(node, dict):
        return node
    found = {key: _by_name_as_section(value) for key, value in node.items()}
    entry = found.get("additionalProperties")
    if isinstance(entry, dict) and "$ref" in entry:
        found.pop("additionalProperties")
        found["anyOf"] = [entry]
    return found


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(text, 100, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _headline(schema: Node, key: str, node: Node) -> str:
    default = _default(node)
    shown = f", default {default}" if default else ""
    return textwrap.fill(f"{key}: {_kind(schema, node)}{shown}", 100, subsequent_indent="    ", break_on_hyphens=False)


def _default(node: Node) -> str:
    """Returns the default of a key as JSON, empty where it has none or is a section."""
    default = node.get("default", {})
    return "" if isinstance(default, dict) else json.dumps(default, ensure_ascii=False)


def _kind(schema: Node, node: Node) -> str:
    """Returns the type of a key in words."""
    if "$ref" in node:
        return _kind(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        kinds = [_kind(schema, one) for one in node["anyOf"]]
        kinds = ["a list of them" if kind == f"list of {kinds[0]}" else kind for kind in kinds]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in node or "enum" in node:
        words = node.get("enum") or [node["const"]]
        return f"{'one of ' if len(words) > 1 else ''}{', '.join('null' if one is None else str(one) for one in words)}"
    if "pattern" in node:
        return f"such a name as {' or '.join(node['examples'])}"
    if "items" in node:
        return f"list of {_kind(schema, node['items'])}"
    kind = str(node.get("type", "anything"))
    kind = {"object": "section", "string": "text", "boolean": "true or false"}.get(kind, kind)
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    if "minimum" in node and "maximum" in node:
        return f"{kind} {node['minimum']:g} to {node['maximum']:g}"
    found = [f"{words} {node[limit]:g}" for limit, words in limits.items() if limit in node]
    return f"{kind} {' and '.join(found)}".strip()


# The right place of a misplaced key


def explain_unknown(section: str, error: UnknownKeyError, value: Any) -> str:
    """Returns what to write in place of a key that a section of a recipe does not have.

    Args:
        section: its dotted place; empty for the top of the recipe.
        error: names the key and what the section has.
        value: of the key, as it was given.
    """
    keys = recipe_keys(recipe_schema())
    meant = _other_place(error.key, keys)
    alias = ALIASES.get(error.key, "").rpartition(".")[2]
    if meant and alias not in error.allowed:
        return f"unknown key {error.key!r}; {_told(error.key, meant, keys, value)}"
    near = nearest_key(error.key, error.allowed)
    guess = f"did you mean {near!r}? " if near else ""
    if near and isinstance(value, SCALARS) and not any(key.startswith(f"{near}.") for key in keys):
        guess += f"{'.'.join(part for part in (section, near) if part)}={value}; "
    if len(error.allowed) > MANY_KEYS:
        return f"unknown key {error.key!r}; {guess}`llmqat schema {section}` lists what it takes"
    return f"unknown key {error.key!r}; {guess}allowed: {', '.join(error.allowed)}"


def _other_place(key: str, keys: Iterable[str]) -> list[str]:
    """Returns where in a recipe `key` belongs: what it is called here, or sections that have it."""
    if key in ALIASES:
        return [ALIASES[key]]
    return [place for place in keys if place.rpartition(".")[2] == key and ".mix." not in place]


def _told(key: str, meant: list[str], keys: Mapping[str, Node], value: Any) -> str:
    first = min(meant, key=lambda place: (place.count("."), not place.startswith("train.")))
    section, _, name = first.rpartition(".")
    given = f"={value}" if isinstance(value, SCALARS) else ""
    if any(place.startswith(f"{first}.") for place in keys):
        return f"it is the section {first} here; see `llmqat schema {first}`"
    if name != key:
        return f"write {first}{given}" if given else f"it is called {first} here"
    if not section:
        return f"it belongs at the top of the recipe: {first}{given}"
    others = [place for place in meant if place != first]
    more = f" (or {', '.join(others[:3])})" if others else ""
    return f"it belongs in {section}: {first}{given}{more}"


def _way_out(key: str, keys: Mapping[str, Node]) -> str:
    last = key.rpartition(".")[2]
    meant = [place for place in _other_place(last, keys) if place in keys]
    if meant:
        return f"did you mean {' or '.join(meant[:4])}?"
    ends: dict[str, str] = {}
    for place in keys:
        ends.setdefault(place.rpartition(".")[2], place)
    near = difflib.get_close_matches(key, keys, n=1) or [
        ends[one] for one in difflib.get_close_matches(last, ends, n=1)
    ]
    top = ", ".join(place for place in keys if "." not in place)
    return f"did you mean {near[0]}?" if near else f"at the top are {top}"

"""The keys of a recipe: the schema agrees with what recipes are, every key is described, misplaced ones are placed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from llmqat.config import ALIASES
from llmqat.layers import PRESETS
from llmqat.recipe import load_recipe
from llmqat.recipe.reading import apply_override, parse_yaml, recipe_from
from llmqat.recipe.schema import describe_key, recipe_keys, recipe_schema

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
SCHEMA = recipe_schema()
KEYS = recipe_keys(SCHEMA)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
LATER = ("train.trainable=some", "train.eval_strategy=often")
"""What QATArguments refuses, before a run begins."""
SMALL: dict[str, Any] = {"model": "m", "output": "o"}


def part(node: dict[str, Any]) -> jsonschema.Draft202012Validator:
    """A validator of one key."""
    return jsonschema.Draft202012Validator({**node, "$defs": SCHEMA["$defs"]})


def changed(*overrides: str, **values: Any) -> dict[str, Any]:
    whole = {**SMALL, **values}
    for override in overrides:
        apply_override(whole, override)
    return whole


def refusal(*overrides: str, **values: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        recipe_from(changed(*overrides, **values), "here")
    return str(caught.value).removeprefix("here: ")


def test_it_is_a_schema_of_the_dialect_that_it_names():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["required"] == ["model", "output"]
    assert len(KEYS) > 200


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_fits_as_it_is_and_as_a_run_records_it(path: Path):
    VALIDATOR.validate(parse_yaml(path.read_text(encoding="utf-8"), path.name))
    VALIDATOR.validate(load_recipe(path).model_dump(mode="json"))


@pytest.mark.parametrize(
    "override",
    [
        *("lr=1e-4", "seed=many", "teacher_bits=3", "serve=tgi", "serve=[vllm, tgi]", "lora={rank: 8}"),
        *("quant=int9", "quant.preset=fp6", "quant.num_bits=9", "quant={num_bist: 3}", "quant.embeddings=int3"),
        *("quant.kv_cache={key: {bits: 4}}", "quant.overrides={down: {weight: {num_bits: 8}}}"),
        *("data.source=txt", "data.block_sise=32", "data.packing=tight", "data.mix=[{source: pidoc}]"),
        *("calibrate=[gtpq]", "calibrate=gptq", "calibrate=[{stage: gptq, damp: 1}]", "calibrate=[{rounds: 1}]"),
        *("train.learning_rat=1", "train.max_steps=2.5", *LATER),
        *("train.output_dir=x", "evaluate.protocol=c4", "evaluate.texts=[]", "allocate={}"),
    ],
)
def test_what_a_recipe_refuses_does_not_fit(override: str):
    assert not VALIDATOR.is_valid(changed(override))
    if override not in LATER:
        refusal(override)


@pytest.mark.parametrize(
    ("place", "many"),
    [("quant", False), ("quant.preset", False), ("calibrate", True), ("serve", False), ("evaluate.protocol", False)],
)
def test_every_word_that_the_schema_offers_is_taken(place: str, many: bool):
    node = KEYS[place]
    while "enum" not in node:
        node = (
            SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]
            if "$ref" in node
            else (node.get("anyOf") or [node["items"]])[0]
        )
    assert len(node["enum"]) >= 3
    for word in node["enum"]:
        value = f"[{word}]" if many else word
        recipe_from(changed(f"{place}={value}"), "here")
        VALIDATOR.validate(changed(f"{place}={value}"))


@pytest.mark.parametrize(
    "name",
    [
        *PRESETS,
        "int5",
        "W4A16",
        "4bit",
        "8 bits",
        "int8-g128",
        "w4a8kv8_g64",
        "Q4_0",
        "W4A16_ASYM",
        "ternary g32",
        "NVFP4A16",
        "w4afp8-g128",
    ],
)
def test_the_schema_takes_the_names_that_schemes_have(name: str):
    VALIDATOR.validate(changed(quant=name))
    recipe_from(changed(quant=name), "here")


@pytest.mark.parametrize("name", ["int1", "int9", "w4a9", "w4kv3", "int4-g0", "4", "q4_k_m", "int4-asym-g32"])
def test_the_schema_takes_no_other_names(name: str):
    assert not VALIDATOR.is_valid(changed(quant=name))
    assert "is unknown" in refusal(quant=name)


@pytest.mark.parametrize(
    "quant",
    [
        {
            "preset": "w4a8",
            "group_size": 32,
            "overrides": {"re:.*down": {"num_bits": 8, "strategy": "channel"}, "re:.*up": None},
        },
        {"num_bits": 3},
        {"weights": {"num_bits": 3, "strategy": "channel"}, "skip_last": 1},
    ],
)
def test_a_scheme_is_a_preset_with_changes_or_all_fields(quant: dict[str, Any]):
    VALIDATOR.validate(changed(quant=quant))
    recipe_from(changed(quant=quant), "here")


@pytest.mark.parametrize("place", KEYS)
def test_every_key_is_described_and_its_default_fits(place: str):
    assert KEYS[place].get("description")
    if "default" in KEYS[place]:
        part(KEYS[place]).validate(KEYS[place]["default"])


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("train.learning_rate", ["train.learning_rate: number, default 5e-05", "learning rate for the optimizer"]),
        ("train.per_device_train_batch_size", ["integer, default 4"]),
        ("quant", ["quant.group_size", "quant.kv_cache", "int4-g32"]),
        ("calibrate.gptq", ["calibrate.gptq.damping: number above 0, default 0.01", "Share of the mean"]),
        ("lora", ["section or null", "lora.r: integer at least 1, default 16"]),
        ("data.mix.weight", ["number above 0"]),
        ("data.validation_share", ["number at least 0 and below 1"]),
        ("quant.num_bits", ["integer 2 to 8"]),
        ("teacher_bits", ["one of 4, 8 or null"]),
        ("train", ["section or null", "train.trainable"]),
    ],
)
def test_a_key_is_explained(key: str, parts: list[str]):
    text = describe_key(key)
    assert all(part in text for part in parts), text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "train.learning_rate"),
        ("trian.learning_rate", "train.learning_rate"),
        ("group_size", "quant.group_size"),
        ("gptq", "calibrate.gptq"),
        ("foo", "model, output"),
    ],
)
def test_a_key_that_is_none_is_answered_with_the_nearest(key: str, meant: str):
    with pytest.raises(ValueError, match=f"a recipe has no key '{key}'; .*{meant}"):
        describe_key(key)


def test_other_tools_words_lead_to_keys_that_there_are():
    assert set(ALIASES.values()) <= set(KEYS)
    assert not set(ALIASES) & {place for place in KEYS if "." not in place}


@pytest.mark.parametrize("word", ALIASES)
def test_another_tools_word_at_the_top_is_answered_with_the_key(word: str):
    message = refusal(**{word: 7})
    assert f"unknown key {word!r}; " in message
    assert ALIASES[word] in message


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("lr=1e-4", "unknown key 'lr'; write train.learning_rate=0.0001"),
        ("bits=3", "write quant.num_bits=3"),
        ("quant.bits=3", "quant: unknown key 'bits'; did you mean 'num_bits'? quant.num_bits=3; allowed: embeddings"),
        ("quant.kv_cache.key.bits=4", "quant.kv_cache.key: unknown key 'bits'; did you mean 'num_bits'?"),
        (
            "learning_rate=1e-4",
            "it belongs in train: train.learning_rate=0.0001 (or calibrate.blockwise.learning_rate)",
        ),
        ("quant.learning_rate=1", "quant: unknown key 'learning_rate'; it belongs in train: train.learning_rate=1"),
        ("train.block_size=128", "train: unknown key 'block_size'; it belongs in data: data.block_size=128"),
        (
            "train.lr=1",
            "did you mean 'learning_rate'? train.learning_rate=1; `llmqat schema train` lists what it takes",
        ),
        ("train.model=x", "it belongs at the top of the recipe: model=x"),
        ("lora.rank=8", "lora: unknown key 'rank'; did you mean 'r'? lora.r=8; allowed: lora_alpha, r"),
        ("calibrate.ranges.damping=1", "calibrate.0: unknown key 'damping'; it belongs in calibrate.gptq: "),
        ("training.lr=1", "unknown key 'training'; did you mean 'train'?"),
        ("modle=x", "unknown key 'modle'; did you mean 'model'? model=x; allowed: allocate, calibrate"),
        ("nothing=x", "unknown key 'nothing'; allowed: allocate, calibrate"),
    ],
)
def test_a_misplaced_key_is_answered_with_its_place(override: str, answer: str):
    assert answer in refusal(override)


JUNK: list[Any] = [[], {}, "x", "", -1, 1.5, True, None, [[1]], {1: 2}, [{"a": 1}], {"stage": [1]}, {"preset": [1]}]


@pytest.mark.parametrize("section", [place for place in KEYS if "." not in place])
def test_a_value_of_any_kind_at_any_key_is_taken_or_refused(section: str):
    """Whatever a file says, what is wrong is a ValueError, which the command line shows without a traceback."""
    places = [place for place in KEYS if f"{place}.".startswith(f"{section}.") and ".mix." not in place]
    for place in places[:: 7 if section == "train" else 1]:  # whose keys are all checked by one function
        _, *parts = place.split(".")
        for value in JUNK:
            inside = value
            for part in reversed(parts[1:] if section == "calibrate" else parts):
                inside = {part: inside}
            if section == "calibrate" and len(parts) > 1:
                inside = [{"stage": parts[0], **inside}]
            elif section == "calibrate" and parts:
                inside = [inside]
            with contextlib.suppress(ValueError):
                recipe_from({**SMALL, section: inside}, "here")


def test_an_override_goes_into_a_scheme_that_is_a_name_and_a_section_that_is_empty():
    assert recipe_from(changed("quant.group_size=32", quant="w4a8"), "here").quant.weights.group_size == 32
    assert recipe_from(changed("lora.r=8", lora=None), "here").lora is not None
    assert "quant: 4 is no scheme; give a name, such as int4" in refusal(quant=4)
    assert "num_bits and weights exclude each other" in refusal(quant={"weights": {"group_size": 8}, "num_bits": 3})

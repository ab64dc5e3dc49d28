"""Laws over all configurations: every field is described, in `help()` too; and what a registry does with a name."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest

import llmqat.recipe  # noqa: F401 - imports every room that has a configuration
from llmqat.config import Config, Registry, UnknownKeyError, summary_of
from llmqat.layers import QuantConfig
from llmqat.train import QATArguments


def subclasses(owner: type[Any]) -> list[type[Any]]:
    return [each for one in owner.__subclasses__() for each in (one, *subclasses(one))]


CONFIGS = sorted(
    (one for one in subclasses(Config) if one.__module__.startswith("llmqat.")), key=lambda one: one.__name__
)


def test_the_configurations_of_every_room_were_found():
    names = {one.__name__ for one in CONFIGS}
    assert {"Recipe", "QuantConfig", "WeightConfig", "DataConfig", "GPTQStage", "LoraSettings"} <= names
    assert len(CONFIGS) >= 20


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_is_described_in_the_schema_and_in_help(config: type[Config]):
    assert summary_of(config)
    for name, field in config.model_fields.items():
        assert field.description, f"{config.__name__}.{name} has no text under it"
        assert re.search(rf"^    {name} \(", config.__doc__ or "", re.M), name
        assert " ".join(field.description.split())[:40] in " ".join((config.__doc__ or "").split())
    assert (config.__doc__ or "").count("Attributes:") == 1


def test_every_field_of_the_arguments_is_described():
    for field in dataclasses.fields(QATArguments):
        assert field.metadata.get("help"), field.name
    own = set(inspect.get_annotations(QATArguments))
    assert set(re.findall(r"^    (\w+) \(", QATArguments.__doc__ or "", re.M)) == own
    assert "scale_learning_rate (float): Learning rate of log-scales" in (QATArguments.__doc__ or "")


def test_an_unknown_key_knows_its_section_and_other_words_for_a_key():
    error = UnknownKeyError("lr", ["learning_rate", "seed"], "a section")
    assert str(error) == "unknown key 'lr' in a section; did you mean 'learning_rate'? allowed: learning_rate, seed"
    assert "did you mean" not in str(UnknownKeyError("zzz", ["seed"], "a section"))
    for given, meant in {"bits": "weights.num_bits", "group_size": "weights.group_size", "exclude": "ignore"}.items():
        with pytest.raises(ValueError, match=f"unknown key '{given}' in QuantConfig; did you mean '{meant}'"):
            QuantConfig.model_validate({given: 4})


def test_a_registry_refuses_double_and_unfit_names_and_answers_unknown_ones_with_the_nearest():
    def check(name: str, entry: int) -> None:
        if entry < 0:
            raise ValueError(f"{name} is negative")

    numbers: Registry[int] = Registry("number", check)
    numbers.register("one", 1)
    assert numbers.register("two")(2) == 2  # as a decorator it gives back what it was given
    assert list(numbers) == ["one", "two"]
    with pytest.raises(ValueError, match="number 'one' is there already; choose another name"):
        numbers.register("one", 3)
    with pytest.raises(ValueError, match="less is negative"):
        numbers.register("less", -1)
    assert (numbers.find("one"), len(numbers)) == (1, 2)
    with pytest.raises(ValueError, match=r"number 'twoo' is unknown; did you mean 'two'\? choose one of one, two"):
        numbers.find("twoo")
    with pytest.raises(ValueError, match="--number 'x' is unknown; choose one of one, two"):
        numbers.find("x", "--number")

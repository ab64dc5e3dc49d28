"""Schemes by name: each preset, and what else a name may say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmqat.layers import PRESETS, ActivationConfig, QuantConfig, WeightConfig
from llmqat.layers.config import scheme_fields

WEIGHTS = st.builds(
    dict, num_bits=st.integers(2, 8), symmetric=st.booleans(), levels=st.sampled_from(["integer", "ternary", "seq"])
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_name_says_in_any_spelling(name: str):
    for spelled in (name, name.upper(), name.replace("-", "_"), name.replace("-", "")):
        assert QuantConfig.preset(spelled) == QuantConfig.preset(name)


@given(WEIGHTS, st.sampled_from([None, 1, 32, 128]), st.sampled_from(["channel", "tensor"]))
def test_what_a_table_calls_a_scheme_is_its_name(fields: dict[str, object], group: int | None, wide: str):
    if fields["levels"] != "integer":
        fields |= {"num_bits": 2, "symmetric": True}
    weights = WeightConfig(**fields, strategy="group" if group else wide, group_size=group)
    assert QuantConfig.preset(weights.label).weights == weights


@pytest.mark.parametrize(
    ("name", "weights", "inputs", "cache"),
    [
        ("int5", "int5 g64", None, None),
        ("W4A16", "int4 g64", None, None),
        ("W4A16_ASYM", "int4 g64 asym", None, None),
        ("4bit", "int4 g64", None, None),
        ("8-bit", "int8 channel", None, None),
        ("w8", "int8 channel", None, None),
        ("w4g128", "int4 g128", None, None),
        ("int4_g64", "int4 g64", None, None),
        ("int8-g128", "int8 g128", None, None),
        ("w4a8-g64", "int4 g64", 8, None),
        ("w4a16kv8", "int4 g64", None, "kv8"),
        ("w6a8kv4-channel", "int6 channel", 8, "kv4 g32 asym"),
        ("q4_0", "int4 g32", None, None),
        ("Q8_0", "int8 g32", None, None),
        ("NVFP4A16", "nvfp4 g16", None, None),
        ("mxfp4_a16", "mxfp4 g32", None, None),
        ("fp8a16-tensor", "fp8 tensor", None, None),
    ],
)
def test_names_that_people_know(name: str, weights: str, inputs: int | None, cache: str | None):
    quant = QuantConfig.preset(name)
    assert quant.weights.label == weights
    assert quant.input_activations == (None if inputs is None else ActivationConfig(num_bits=inputs))
    assert (quant.kv_cache and quant.kv_cache.label) == cache


@pytest.mark.parametrize(
    ("name", "near"),
    [
        *(("int9", "int8"), ("int1", None), ("in4", "int4"), ("w4a12", "w4a8"), ("int4-g0", "int4-g32")),
        *(("int4kv3", None), ("int55", "int5"), ("w4a8kv16kv", "w4a8kv16")),
    ],
)
def test_a_name_of_nothing_is_refused_with_the_nearest_and_the_list(name: str, near: str | None):
    with pytest.raises(ValueError, match=rf"preset '{name}' is unknown[;:] .*int8, .*w4a8kv4") as caught:
        QuantConfig.preset(name)
    assert near is None or f"did you mean {near!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["fp6", "nf4", "q4_k_m", "gptq", "", "4", "w16a16"])
def test_what_the_grid_does_not_have_is_refused(name: str):
    with pytest.raises(ValueError, match="is unknown"):
        scheme_fields(name)


@pytest.mark.parametrize(("given", "meant"), [("bits", "num_bits"), ("groupsize", "group_size"), ("exclude", "ignore")])
def test_a_change_that_a_scheme_does_not_have_is_answered_with_the_right_one(given: str, meant: str):
    with pytest.raises(ValueError, match=f"unknown key '{given}' in the scheme int4; did you mean '{meant}'"):
        QuantConfig.preset("int4", **{given: 4})


def test_a_preset_of_ones_own_is_added_once_and_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(PRESETS, "mine", raising=False)
    PRESETS.register("mine", {"weights": {"num_bits": 3, "group_size": 16}, "skip_last": 1})
    try:
        assert QuantConfig.preset("mine", skip_first=1).skip_last == 1
        with pytest.raises(ValueError, match="preset 'mine' is there already; choose another name"):
            PRESETS.register("mine", {})
        with pytest.raises(ValueError, match="unknown key 'wieghts' in QuantConfig; did you mean 'weights'"):
            PRESETS.register("broken", {"wieghts": {}})
        with pytest.raises(ValueError, match="preset 'five' is 5; give a QuantConfig, or a mapping"):
            PRESETS.register("five", 5)
        assert "broken" not in PRESETS
    finally:
        del PRESETS["mine"]

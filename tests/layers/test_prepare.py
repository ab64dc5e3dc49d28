"""prepare and convert on whole models, the audit, and every way of asking for the wrong thing."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from llmqat import save
from llmqat.layers import (
    PRESETS,
    KVCacheConfig,
    KVTensorConfig,
    PackedLinear,
    QuantConfig,
    QuantLinear,
    WeightConfig,
    audit,
    convert,
    prepare,
)
from llmqat.models import cast_parameters
from tests.tiny import regrouped, tiny_llama, tiny_qwen2, tiny_qwen3, with_ranges

MODELS = {
    "llama-tied": lambda: tiny_llama(),
    "llama-untied": lambda: tiny_llama(tied=False),
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
}
KV4 = KVTensorConfig(num_bits=4, symmetric=False, group_size=8)


def _small(name: str) -> QuantConfig:
    """The preset, its groups small enough for the tiny models."""
    changes: dict[str, object] = regrouped(name, 32)
    if name == "w4a8kv4":
        changes["kv_cache"] = KVCacheConfig(key=KV4, value=KV4)
    return QuantConfig.preset(name, **changes)


CONFIGS = {
    **{name: _small(name) for name in PRESETS},
    "int4-asymmetric": QuantConfig.preset("int4", group_size=32, symmetric=False),
    "mixed": QuantConfig.preset(
        "int4", group_size=32, overrides={"re:.*down_proj": WeightConfig(num_bits=8, strategy="channel")}
    ),
}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), cast_parameters(model, torch.bfloat16):
        return model(ids).logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_convert_changes_no_logit(make, config: QuantConfig) -> None:  # type: ignore[no-untyped-def]
    model, ids = make(), torch.randint(2, 258, (2, 24))
    plain = _logits(model, ids)
    report = prepare(model, config)
    with_ranges(model)
    expected = {
        f"model.layers.{i}.{'self_attn' if p[0] in 'qkvo' else 'mlp'}.{p}.weight" for i in (0, 1) for p in PROJECTIONS
    }
    assert {entry.name for entry in report.quantized} == expected
    prepared = _logits(model, ids)
    assert not torch.equal(prepared, plain)
    convert(model)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == len(expected)
    for layer in packed:
        layer.kernel = "reference"
    assert torch.equal(_logits(model, ids), prepared)
    assert {entry.name for entry in audit(model).quantized} == expected
    assert audit(model).bytes_after == report.bytes_after


def test_the_audit_lists_every_tensor_once_with_its_reason() -> None:
    model = tiny_llama()
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    report = prepare(model, QuantConfig.preset("int4", group_size=32, ignore=["re:.*o_proj"]))
    assert sorted(entry.name for entry in report.entries) == sorted(names)
    reasons = {entry.name: entry.reason for entry in report.kept}
    assert reasons["model.layers.0.self_attn.o_proj.weight"] == "quant.ignore has 're:.*o_proj'"
    assert reasons["lm_head.weight"] == "tied to model.embed_tokens.weight"
    assert reasons["model.embed_tokens.weight"] == "embedding, left alone by default"
    assert reasons["model.norm.weight"] == "normalization stays in high precision"
    assert all(entry.reason for entry in report.kept)
    assert report.average_bits == 4.5


def test_average_bits_at_g64_are_four_and_a_quarter() -> None:
    report = prepare(tiny_llama(), QuantConfig.preset("int4", group_size=64))
    assert report.average_bits == 4.25


def test_an_untied_output_head_is_left_alone() -> None:
    report = prepare(tiny_llama(tied=False), QuantConfig.preset("int4", group_size=32))
    assert {entry.name: entry.reason for entry in report.kept}["lm_head.weight"] == "output head, left alone by default"


def test_tied_embeddings_stay_tied() -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    convert(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_prepare_shares_the_weights_and_records_the_configuration() -> None:
    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    config = QuantConfig.preset("int3", group_size=32)
    prepare(model, config)
    assert model.model.layers[0].mlp.up_proj.weight is weight
    assert QuantConfig.model_validate(model.config.llmqat) == config


@pytest.mark.parametrize("field", ["targets", "ignore", "overrides"])
def test_a_pattern_that_matches_nothing_is_an_error(field: str) -> None:
    value = {"re:.*dwn_proj": None} if field == "overrides" else ["re:.*dwn_proj"]
    model = tiny_llama()
    with pytest.raises(ValueError, match=rf"quant\.{field} has 're:\.\*dwn_proj', which matches no linear layer"):
        prepare(model, QuantConfig.preset("int4", group_size=32, **{field: value}))
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_a_group_size_that_does_not_divide_leaves_the_model_unchanged() -> None:
    model = tiny_llama()
    with pytest.raises(
        ValueError, match=r"group_size=48 does not divide in_features=64 of model\.layers\.0\.self_attn\.q_proj"
    ):
        prepare(model, QuantConfig.preset("int4", group_size=48))
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


@pytest.mark.parametrize("width", [1, 2, 7, 13, 22])
def test_both_ways_out_of_a_group_size_that_divides_nothing_work(width: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj") as refusal:
        prepare(tiny_llama(intermediate_size=width), QuantConfig.preset("int4", group_size=16))
    message = str(refusal.value)
    assert ("choose one of 11, or" if width == 22 else "no group of 8 or more does") in message
    override = re.search(r"quant\.overrides\['(\S+)'\]=\{num_bits: (\d), strategy: (\w+)\}", message)
    ignored = re.search(r"quant\.ignore=\['(\S+)'\]", message)
    assert override is not None
    assert ignored is not None
    names = [override[1].replace(".0.", f".{layer}.") for layer in range(2)]
    by_channel = {name: {"num_bits": int(override[2]), "strategy": override[3]} for name in names}
    for changes in ({"overrides": by_channel}, {"ignore": [ignored[1].replace(".0.", f".{i}.") for i in range(2)]}):
        model = tiny_llama(intermediate_size=width)
        prepare(model, QuantConfig.preset("int4", group_size=16, **changes))
        save(model, tmp_path / str(len(list(tmp_path.iterdir()))))


@pytest.mark.parametrize("preset", [*PRESETS])
@pytest.mark.parametrize("scales", ["learned", "fixed", "dynamic"])
def test_a_layer_of_small_weights_computes_as_one_of_others(preset: str, scales: str) -> None:
    """Weights that are 2^20 times smaller in one layer and larger in the next are the same model, bit for bit."""
    outputs = []
    for factor in (1.0, 2.0**-20):
        model = tiny_llama()
        attention = model.model.layers[0].self_attn
        with torch.no_grad():
            attention.v_proj.weight.mul_(factor)
            attention.o_proj.weight.div_(factor)
        quant = QuantConfig.preset(preset, **regrouped(preset, 16), kv_cache=None, scales=scales)
        if quant.input_activations is not None and quant.input_activations.calibrated:  # by a number of their size
            quant = quant.model_copy(update={"input_activations": None})
        prepare(model, quant)
        with torch.no_grad():
            outputs.append(model(torch.arange(2, 34)[None]).logits)
    assert torch.equal(*outputs)


def test_preparing_twice_and_converting_nothing_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="no quantized weight to convert"):
        convert(model)
    prepare(model, QuantConfig.preset("int4", group_size=32))
    with pytest.raises(ValueError, match="prepared already"):
        prepare(model, QuantConfig.preset("int4", group_size=32))


def test_ignoring_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is left to quantize"):
        prepare(tiny_llama(), QuantConfig.preset("int4", group_size=32, ignore=["Linear"]))


def test_any_module_can_be_prepared() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(3, 64)
    report = prepare(model, QuantConfig.preset("int8"))
    assert [entry.name for entry in report.quantized] == ["0.weight", "2.weight"]
    expected = copy.deepcopy(model)(x)
    assert torch.equal(convert(model, torch.float32)(x), expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_prepare_works_on_the_meta_device(config: QuantConfig) -> None:
    with torch.device("meta"):
        model = tiny_llama(tied=False)
    report = prepare(model, config)
    assert len(report.quantized) == 14
    assert all(tensor.is_meta for name, tensor in model.state_dict().items() if "proj" in name)
    real = tiny_llama(tied=False)
    prepare(real, config)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in real.state_dict().items()
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_state_of_a_prepared_model_round_trips(config: QuantConfig) -> None:
    model, other = tiny_llama(), tiny_llama(seed=1)
    prepare(model, config)
    prepare(other, config)
    with_ranges(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_scale"):
                parameter.normal_(std=0.2)
    missing, unexpected = other.load_state_dict(model.state_dict())
    assert not missing
    assert not unexpected
    ids = torch.randint(2, 258, (2, 12))
    assert torch.equal(_logits(other, ids), _logits(model, ids))
    assert QuantConfig.model_validate(model.config.llmqat) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_bits": 9}, "less than or equal to 8"),
        ({"num_bits": 4, "strategy": "group"}, "group_size=None"),
        ({"num_bits": 4, "strategy": "channel", "group_size": 32}, "group_size=32 with strategy='channel'"),
        ({"num_bitz": 4}, "did you mean 'num_bits'"),
    ],
)
def test_a_wrong_scheme_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightConfig.model_validate(values)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"preset 'int' is unknown; did you mean 'int\d'\? choose one of int8, int4.*A name is"
    ):
        QuantConfig.preset("int")
    with pytest.raises(ValueError, match=r"preset 'int9' is unknown: weights have 2 to 8 bits"):
        QuantConfig.preset("int9")


def test_the_first_and_last_layers_can_be_skipped() -> None:
    model = tiny_llama(num_hidden_layers=5)
    report = prepare(model, QuantConfig.preset("int4", group_size=32, skip_first=1, skip_last=2))
    assert {entry.name.split(".")[2] for entry in report.quantized} == {"1", "2"}
    reasons = {entry.name.split(".")[2]: entry.reason for entry in report.kept if "q_proj" in entry.name}
    assert reasons == {"0": "quant.skip_first=1", "3": "quant.skip_last=2", "4": "quant.skip_last=2"}
    with pytest.raises(ValueError, match="nothing is left to quantize"):
        prepare(tiny_llama(), QuantConfig.preset("int4", group_size=32, skip_first=2))


def test_overrides_by_layer_index_change_weights_or_inputs_alone() -> None:
    model = tiny_llama(num_hidden_layers=4)
    eight = {"num_bits": 8, "strategy": "channel"}
    config = QuantConfig.preset(
        "w4a8",
        group_size=32,
        overrides={
            "re:.*down_proj": {"weights": eight, "layers": [0, 1]},
            "re:.*o_proj": {"input_activations": None, "layers": [-1]},
        },
    )
    prepare(model, config)
    assert QuantConfig.model_validate(config.model_dump(mode="json")) == config
    bits = [layer.mlp.down_proj.weights.num_bits for layer in model.model.layers]
    assert bits == [8, 8, 4, 4]
    assert all(layer.mlp.down_proj.input_quantizer is not None for layer in model.model.layers)
    kept = [layer.self_attn.o_proj.input_quantizer is None for layer in model.model.layers]
    assert kept == [False, False, False, True]
    with pytest.raises(ValueError, match=r"layers=\[9\] matches no layer"):
        prepare(tiny_llama(), QuantConfig.preset("int4", group_size=32, overrides={"Linear": {"layers": [9]}}))


def test_the_output_head_is_decided_by_its_own_key() -> None:
    eight = {"num_bits": 8, "strategy": "channel"}
    for changes in ({"overrides": {"lm_head": eight}}, {"targets": ["Linear", "lm_head"]}):
        with pytest.raises(ValueError, match=r"which is the output head; quantize that with quant\.lm_head"):
            prepare(tiny_llama(tied=False), QuantConfig.preset("int4", group_size=32, **changes))
    with pytest.raises(ValueError, match=r"quant\.lm_head='int8', but quant\.ignore leaves lm_head alone"):
        prepare(tiny_llama(tied=False), QuantConfig.preset("int4", group_size=32, lm_head="int8", ignore=["lm_head"]))


def test_a_preset_takes_whole_weights_as_well_as_their_fields() -> None:
    eight = WeightConfig(num_bits=8, strategy="channel")
    assert QuantConfig.preset("w4a8", weights=eight).weights == eight


def test_overrides_win_over_the_default_and_the_last_one_over_the_first() -> None:
    model = tiny_llama()
    eight = WeightConfig(num_bits=8, strategy="channel")
    prepare(
        model,
        QuantConfig.preset(
            "int4", group_size=32, overrides={"re:.*down_proj": eight, "re:.*layers\\.1\\..*down_proj": None}
        ),
    )
    assert model.model.layers[0].mlp.down_proj.weights == eight
    assert isinstance(model.model.layers[1].mlp.down_proj, nn.Linear)
    assert model.model.layers[1].mlp.up_proj.weights.num_bits == 4

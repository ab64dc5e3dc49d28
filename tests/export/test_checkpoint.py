"""Saving with proof, and loading what is there: laws over formats, models and schemes, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.cli.serving.model_manager import ModelManager

from llmqat.calibrate import calibrate_activations
from llmqat.export import FORMATS, ProofError, checkpoint, compressed_tensors, load, load_any, prove, save
from llmqat.layers import (
    ActivationConfig,
    KVCacheConfig,
    KVTensorConfig,
    PackedLinear,
    PackedModule,
    QuantConfig,
    QuantLinear,
    WeightConfig,
    convert,
    kv_scheme,
    prepare,
    quantizers_off,
)
from llmqat.models import cast_parameters
from tests.tiny import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_qwen2, tiny_qwen3, tiny_tokenizer

MODELS = {
    "tied llama": tiny_llama,
    "untied llama": lambda: tiny_llama(tied=False),
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
}
WEIGHTS = "model.safetensors"
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def scheme(num_bits: int = 4, group_size: int | None = 32, symmetric: bool = True) -> WeightConfig:
    strategy = "group" if group_size else "channel"
    return WeightConfig(num_bits=num_bits, strategy=strategy, group_size=group_size, symmetric=symmetric)


def prepared(model: PreTrainedModel | None = None, **changes: Any) -> PreTrainedModel:
    """A prepared model whose scales have moved, as after training."""
    model = tiny_llama() if model is None else model
    prepare(model, QuantConfig(**{"weights": scheme(), **changes}))
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.log_scale.data.copy_(torch.randn(module.log_scale.shape, generator=generator) * 0.1)
    return model


def token_ids() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    with cast_parameters(model, dtype):
        return model(token_ids()).logits


def stock(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def corrupt(folder: Path, name: str, index: int = 0) -> None:
    """Changes one element of a tensor on disk."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
    flat = tensors[name].view(-1)
    flat[index] = flat[index] * 2 if tensors[name].is_floating_point() else flat[index] ^ 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# The law: training forward == packed by us == packed in stock transformers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, None], ids=["group", "channel"])
def test_logits_are_equal_everywhere(name: str, num_bits: int, group_size: int | None, tmp_path: Path) -> None:
    model = prepared(MODELS[name](), weights=scheme(num_bits, group_size))
    save(model, tmp_path / "out")
    expected = logits_of(model)
    assert torch.equal(logits_of(load(tmp_path / "out", kernel="reference")), expected)
    assert torch.equal(logits_of(stock(tmp_path / "out")), expected)


@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_override_gives_one_group_a_scheme(name: str, tmp_path: Path) -> None:
    overrides = {"re:.*down_proj": scheme(8, None), "re:.*layers\\.0\\.self_attn\\.q_proj": scheme(3, 16)}
    ignored = "re:.*layers\\.1\\.mlp\\.up_proj"
    model = prepared(MODELS[name](), overrides=overrides, ignore=(ignored,))
    save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    by_bits = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert by_bits[3] == ["model.layers.0.self_attn.q_proj"]
    assert by_bits[8] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert len(by_bits[4]) == 14 - 1 - 2 - 1
    assert sorted(config["ignore"]) == ["lm_head", "model.layers.1.mlp.up_proj"]
    ours = load(tmp_path / "out", kernel="reference")
    assert ours.get_submodule("model.layers.0.mlp.down_proj").weights == scheme(8, None)
    assert torch.equal(logits_of(ours), logits_of(model))
    assert torch.equal(logits_of(stock(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize(("num_bits", "group_size"), [(2, 32), (3, 16), (4, None), (8, 32)])
def test_asymmetric_weights_load_here_exactly(num_bits: int, group_size: int | None, tmp_path: Path) -> None:
    model = prepared(tiny_qwen2(), weights=scheme(num_bits, group_size, symmetric=False))
    save(model, tmp_path / "out")
    assert torch.equal(logits_of(load(tmp_path / "out", kernel="reference")), logits_of(model))


def test_asymmetric_weights_load_in_transformers_and_it_is_said_whether_it_dequantizes_them(tmp_path: Path) -> None:
    model = prepared(weights=scheme(4, 32, symmetric=False))
    report = save(model, tmp_path / "out")
    assert (report.stock.loads, report.notes) == (True, ())
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written.get("dequantize", False) == report.stock.dequantized  # transformers 5.13 needs not, 5.23 does
    assert torch.equal(logits_of(stock(tmp_path / "out")), logits_of(model))


INPUTS = {
    "dynamic symmetric": ActivationConfig(),
    "dynamic asymmetric": ActivationConfig(symmetric=False),
    "dynamic int4": ActivationConfig(num_bits=4),
    "static symmetric": ActivationConfig(dynamic=False),
    "static asymmetric": ActivationConfig(dynamic=False, symmetric=False, observer="mse"),
}


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_quantized_inputs_are_equal_everywhere_over_packed_weights(
    inputs: ActivationConfig, num_bits: int, tmp_path: Path
) -> None:
    override = {"re:.*layers\\.1\\.mlp\\.down_proj": {"input_activations": None}}
    model = prepared(tiny_qwen2(), weights=scheme(num_bits, 32), input_activations=inputs, overrides=override)
    calibrate_activations(model, token_ids())
    report = save(model, tmp_path / "out")
    assert report.bits_per_weight == pytest.approx(num_bits + 0.5, abs=0.01)
    ours = load(tmp_path / "out", kernel="reference")
    assert ours.model.layers[0].mlp.down_proj.input_quantizer.config.dynamic == inputs.dynamic
    assert ours.model.layers[1].mlp.down_proj.input_quantizer is None
    assert torch.equal(logits_of(ours), logits_of(model))
    assert torch.equal(logits_of(stock(tmp_path / "out")), logits_of(model))
    save(ours, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def forms_of(folder: Path) -> dict[str, str]:
    """The format of each group in config.json by its bits of weights and inputs, such as "w8a8", and of all."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    forms = {f"w{g['weights']['num_bits']}a{(g['input_activations'] or {}).get('num_bits', 16)}": g for g in groups}
    return {name: group["format"] for name, group in forms.items()} | {"all": config["format"]}


@pytest.mark.parametrize("inputs", [name for name in INPUTS if "int4" not in name])
@pytest.mark.parametrize("int_quantized", [False, True])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_eight_bit_inputs_are_written_in_the_form_that_servers_read(
    num_bits: int, int_quantized: bool, inputs: str, tmp_path: Path
) -> None:
    """W8A8 by channel is int-quantized. So is W4A8 where asked, with dynamic inputs; else it is packed."""
    weights = scheme(num_bits, None if num_bits == 8 else 32)
    model = prepared(tiny_qwen2(), weights=weights, input_activations=INPUTS[inputs])
    calibrate_activations(model, token_ids())
    report = save(model, tmp_path / "out", int_quantized=int_quantized)
    plain = num_bits == 8 or (int_quantized and INPUTS[inputs].dynamic)
    form = "int-quantized" if plain else "pack-quantized"
    assert forms_of(tmp_path / "out") == {f"w{num_bits}a8": form, "all": form}
    name, tensors = "model.layers.0.mlp.down_proj", load_file(tmp_path / "out" / WEIGHTS)
    layer, stored = model.get_submodule(name), {key.removeprefix(f"{name}.") for key in tensors if name in key}
    assert ("weight" in stored, "weight_packed" in stored, "weight_shape" in stored) == (plain, not plain, not plain)
    if plain:
        assert tensors[f"{name}.weight"].dtype == torch.int8
        assert torch.equal(tensors[f"{name}.weight"], layer.codes().to(torch.int8))
        assert torch.equal(tensors[f"{name}.weight_scale"].float(), layer.scale_and_zero_point()[0].detach().float())
    assert report.bytes["codes"] * 8 == report.quantized_weights * (8 if plain else 4)
    prove(model, tmp_path / "out", int_quantized=int_quantized)
    ours = load(tmp_path / "out", kernel="reference")
    assert ours.get_submodule(name).weight_packed.dtype == (torch.int8 if num_bits == 8 else torch.int32)
    assert torch.equal(logits_of(ours), logits_of(model))
    assert torch.equal(logits_of(stock(tmp_path / "out")), logits_of(model))
    save(ours, tmp_path / "again", int_quantized=int_quantized)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_a_checkpoint_of_two_forms_loads_everywhere(tmp_path: Path) -> None:
    override = {"re:.*mlp.*": {"weights": scheme(4, 32), "input_activations": None}}
    model = prepared(weights=scheme(8, None), input_activations=ActivationConfig(), overrides=override)
    save(model, tmp_path / "out")
    assert forms_of(tmp_path / "out") == {"w8a8": "int-quantized", "w4a16": "pack-quantized", "all": "mixed-precision"}
    assert torch.equal(logits_of(load(tmp_path / "out", kernel="reference")), logits_of(model))
    assert torch.equal(logits_of(stock(tmp_path / "out")), logits_of(model))


def test_w8a8_that_was_written_packed_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until int-quantized was written, words of four codes were."""
    model = prepared(weights=scheme(8, None), input_activations=ActivationConfig(symmetric=False))
    with monkeypatch.context() as before:
        before.setattr(compressed_tensors, "form_of", lambda *_: "pack-quantized")
        save(model, tmp_path / "old")
    old = load(tmp_path / "old", kernel="reference")
    assert old.model.layers[0].mlp.down_proj.weight_packed.dtype == torch.int32
    assert torch.equal(logits_of(old), logits_of(model))
    save(old, tmp_path / "new")
    assert forms_of(tmp_path / "new") == {"w8a8": "int-quantized", "all": "int-quantized"}
    assert torch.equal(logits_of(load(tmp_path / "new", kernel="reference")), logits_of(model))


def test_others_int8_codes_without_quantized_inputs_are_read_and_written_packed(tmp_path: Path) -> None:
    save(prepared(weights=scheme(8, None), input_activations=ActivationConfig()), tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    model = load(tmp_path / "theirs", kernel="reference")
    layer = model.model.layers[0].mlp.down_proj
    assert (layer.weight_packed.dtype, layer.input_quantizer) == (torch.int8, None)
    assert torch.equal(logits_of(stock(tmp_path / "theirs")), logits_of(model))
    save(model, tmp_path / "ours")
    assert forms_of(tmp_path / "ours") == {"w8a16": "pack-quantized", "all": "pack-quantized"}
    assert torch.equal(logits_of(load(tmp_path / "ours", kernel="reference")), logits_of(model))


@pytest.mark.parametrize("damage", ["dtype", "shape", "scale"])
def test_damaged_int8_codes_are_named(damage: str, tmp_path: Path) -> None:
    save(prepared(weights=scheme(8, None), input_activations=ActivationConfig()), tmp_path / "out")
    name, tensors = "model.layers.0.mlp.down_proj", load_file(tmp_path / "out" / WEIGHTS)
    changes = {
        "dtype": {f"{name}.weight": tensors[f"{name}.weight"].to(torch.int32)},
        "shape": {f"{name}.weight": tensors[f"{name}.weight"][:, :-1].contiguous()},
        "scale": {f"{name}.weight_scale": torch.full_like(tensors[f"{name}.weight_scale"], torch.nan)},
    }
    save_file(tensors | changes[damage], tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: {name}\.weight"):
        load(tmp_path / "out")


def test_int8_codes_are_computed_with_as_they_lie_in_the_file(tmp_path: Path) -> None:
    """Neither packed on loading nor copied for the product of integers, but where layers share one."""
    save(prepared(weights=scheme(8, None), input_activations=ActivationConfig()), tmp_path / "out")
    model = load(tmp_path / "out")
    layer, x = model.model.layers[0].mlp.down_proj, torch.randn(3, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        given = layer(x)
        expected = torch.nn.functional.linear(layer.input_quantizer(x, torch.bfloat16), layer.weight)
    torch.testing.assert_close(given, expected, atol=0.02, rtol=0.02)
    for codes, *_ in layer.packed_weight().layouts.values():
        assert codes.data_ptr() == layer.weight_packed.data_ptr()


def test_a_quantized_kv_cache_reloads_here_and_is_plain_elsewhere(tmp_path: Path) -> None:
    cache = KVCacheConfig(value=KVTensorConfig(num_bits=4, symmetric=False, group_size=8))
    model = prepared(kv_cache=cache)
    save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert KVCacheConfig.model_validate(config["llmqat_kv_cache"]) == cache
    assert "llmqat_" not in str(config.get("attn_implementation", config.get("_attn_implementation", "")))
    ours = load(tmp_path / "out", kernel="reference")
    assert kv_scheme(ours) == cache
    assert torch.equal(logits_of(ours), logits_of(model))
    with quantizers_off(ours), torch.no_grad():
        plain = ours(token_ids()).logits
    assert torch.equal(logits_of(stock(tmp_path / "out")), plain)
    save(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["llmqat_kv_cache"] == config["llmqat_kv_cache"]


@pytest.mark.parametrize("levels", ["ternary", "seq"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_levels_of_two_bits_are_equal_everywhere(levels: str, strategy: str, tmp_path: Path) -> None:
    group_size = 32 if strategy == "group" else None
    weights = WeightConfig(num_bits=2, levels=levels, strategy=strategy, group_size=group_size)
    model = prepared(weights=weights)
    save(model, tmp_path / "out")
    assert torch.equal(logits_of(load(tmp_path / "out", kernel="reference")), logits_of(model))
    assert torch.equal(logits_of(stock(tmp_path / "out")), logits_of(model))


def test_eight_bits_in_the_first_layers_and_four_elsewhere_load_in_stock_transformers(tmp_path: Path) -> None:
    override = {"re:.*down_proj": {"weights": {"num_bits": 8, "strategy": "channel"}, "layers": [0, 1]}}
    model = prepared(tiny_llama(num_hidden_layers=4), overrides=override, skip_last=1)
    save(model, tmp_path / "out")
    ours = load(tmp_path / "out", kernel="reference")
    bits = [getattr(layer.mlp.down_proj, "weights", None) for layer in ours.model.layers]
    assert [entry and entry.num_bits for entry in bits] == [8, 8, 4, None]
    assert torch.equal(logits_of(ours), logits_of(model))
    assert torch.equal(logits_of(stock(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_a_tensor_is_written_as_one_a_row(symmetric: bool, tmp_path: Path) -> None:
    model = prepared(weights=WeightConfig(num_bits=4, strategy="tensor", symmetric=symmetric))
    save(model, tmp_path / "out")
    ours = load(tmp_path / "out", kernel="reference")
    assert ours.model.layers[0].mlp.up_proj.weight_scale.shape == (128, 1)
    assert torch.equal(logits_of(ours), logits_of(model))
    if symmetric:
        assert torch.equal(logits_of(stock(tmp_path / "out")), logits_of(model))


def test_experts_left_alone_are_not_taken_for_linears(tmp_path: Path) -> None:
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    model = prepared(MixtralForCausalLM(config).eval(), ignore=(r"re:.*\.experts\.",))
    save(model, tmp_path / "out")
    group = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert "Linear" not in group["targets"]
    assert len(group["targets"]) == 8
    assert torch.equal(logits_of(load(tmp_path / "out", kernel="reference")), logits_of(model))
    assert torch.equal(logits_of(stock(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt2], ids=["experts", "Conv1D"])
def test_what_stock_transformers_would_leave_random_is_refused_by_it(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = prepared(make())
    save(model, tmp_path / "out")
    assert torch.equal(logits_of(load(tmp_path / "out", kernel="reference")), logits_of(model))
    with pytest.raises(ValueError, match="only_llmqat_loads_this"):
        stock(tmp_path / "out")


def test_tensors_that_transformers_keeps_in_float32_stay_so(tmp_path: Path) -> None:
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "num_key_value_heads": 4}
    heads = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    sizes = {"moe_intermediate_size": 64, "first_k_dense_replace": 1}
    config = DeepseekV3Config(**{**SMALL, **experts, **ranks, **heads, **sizes})
    model = DeepseekV3ForCausalLM(config).eval()
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.data = torch.tensor([1 / 3, 1 / 5, 1 / 7, 1 / 9])
    model = prepared(model, ignore=(r"re:.*\.experts\.",))
    save(model, tmp_path / "out")
    ours = load(tmp_path / "out", kernel="reference")
    for reloaded in (ours, stock(tmp_path / "out")):
        assert torch.equal(reloaded.model.layers[1].mlp.gate.e_score_correction_bias, bias)
        assert torch.equal(logits_of(reloaded), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_checkpoint_dtypes_are_proved_too(dtype: torch.dtype, tmp_path: Path) -> None:
    model = prepared()
    save(model, tmp_path / "out", dtype=dtype)
    ours = load(tmp_path / "out", kernel="reference")
    assert ours.dtype == dtype
    assert torch.equal(logits_of(ours, dtype), logits_of(model, dtype))


def test_converted_and_reloaded_models_are_saved_as_they_are(tmp_path: Path) -> None:
    model = prepared(tiny_qwen2())
    expected = logits_of(model)
    save(model, tmp_path / "first")
    save(load(tmp_path / "first"), tmp_path / "second")
    save(convert(model), tmp_path / "third")
    first = (tmp_path / "first" / WEIGHTS).read_bytes()
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == first
    assert (tmp_path / "third" / WEIGHTS).read_bytes() == first
    assert torch.equal(logits_of(load(tmp_path / "third", kernel="reference")), expected)


@pytest.mark.real
def test_real_model_is_equal_in_stock_transformers_and_here(
    smollm2: tuple[PreTrainedModel, Any], tmp_path: Path
) -> None:
    original, tokenizer = smollm2
    model = copy.deepcopy(original).float()
    prepare(model, QuantConfig.preset("int4", group_size=64))
    report = save(model, tmp_path / "out", tokenizer)
    assert report.bits_per_weight == 4.25
    ids = tokenizer("The capital of France is Paris, and", return_tensors="pt").input_ids
    ours = load(tmp_path / "out", kernel="reference")
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, stock(tmp_path / "out")(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


# What save writes


def test_save_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = prepared().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    save(model, tmp_path / "out")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.config.to_dict() == config
    assert all(module.training for module in model.modules())


def test_report_adds_up_to_the_file_size_and_states_bits_per_weight(tmp_path: Path) -> None:
    model = prepared(tiny_qwen2(), weights=scheme(4, 64))
    report = save(model, tmp_path / "out", tiny_tokenizer())
    assert sum(report.bytes.values()) == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert report.bits_per_weight == 4.25
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    weights = sum(layer.weight.numel() for layer in layers)
    assert report.quantized_weights == weights
    assert report.bytes["codes"] == weights // 2
    assert report.bytes["scales"] == weights // 64 * 2
    assert report.bytes["shapes"] == 16 * len(layers)
    assert report.bytes["zero_points"] == 0
    assert report.bytes["embeddings"] == report.bytes["head"] == VOCAB_SIZE * 64 * 2
    assert report.bytes["norms"] == 5 * 64 * 2
    assert report.bytes["other"] == 2 * (64 + 32 + 32) * 2  # the biases of q, k and v
    assert report.folder_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    facts = json.loads((tmp_path / "out/llmqat.json").read_text())
    assert facts["bytes"] == report.bytes
    assert facts["proof"] == report.proof
    assert set(facts["versions"]) >= {"llmqat", "torch", "transformers", "python"}


def test_shards_add_up_and_load(tmp_path: Path) -> None:
    model = prepared()
    report = save(model, tmp_path / "out", max_shard_size=30_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert report.weight_bytes == sum(shard.stat().st_size for shard in shards)
    assert torch.equal(logits_of(load(tmp_path / "out", kernel="reference")), logits_of(model))
    assert torch.equal(logits_of(stock(tmp_path / "out")), logits_of(model))


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    save(prepared(), tmp_path / "out")
    names = set(load_file(tmp_path / "out" / WEIGHTS))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    for model in (load(tmp_path / "out"), stock(tmp_path / "out")):
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("factor", [1, 2], ids=["equal", "different"])
def test_a_head_stored_beside_its_embedding_is_tied_only_where_equal(factor: int, tmp_path: Path) -> None:
    save(prepared(), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    ours, theirs = load(tmp_path / "out", kernel="reference"), stock(tmp_path / "out")
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (factor == 1)
    assert torch.equal(logits_of(ours), logits_of(theirs))
    del tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights were found for .*embed_tokens"):
        load(tmp_path / "out")


def test_config_carries_one_quantization_and_run_facts_lie_beside(tmp_path: Path) -> None:
    save(prepared(), tmp_path / "out", tiny_tokenizer(), run={"seed": 7, "recipe": {"train": {"lr": 1e-4}}})
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "llmqat" not in config
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["quantization_status"] == "compressed"
    facts = json.loads((tmp_path / "out/llmqat.json").read_text())
    assert facts["run"] == {"seed": 7, "recipe": {"train": {"lr": 1e-4}}}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_loaded_model_generates_and_keeps_rotary_in_float32(tmp_path: Path) -> None:
    model = prepared()
    model.generation_config.temperature = 0.3  # without do_sample, as many published models have it
    model.generation_config.max_new_tokens = 5
    save(model, tmp_path / "out")
    ours = load(tmp_path / "out")
    assert ours.generation_config.temperature == 0.3
    assert not ours.training
    assert ours.model.rotary_emb.inv_freq.dtype == torch.float32
    assert ours.model.norm.weight.dtype == torch.bfloat16
    assert sum(isinstance(module, PackedLinear) for module in ours.modules()) == 14
    assert ours.generate(token_ids()[:1], eos_token_id=VOCAB_SIZE).shape == (1, 21)


def test_loading_in_another_dtype_equals_stock(tmp_path: Path) -> None:
    save(prepared(tiny_qwen2()), tmp_path / "out")
    ours = load(tmp_path / "out", dtype=torch.float32, kernel="reference")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits_of(ours, torch.float32), logits_of(theirs, torch.float32))


def test_load_any_takes_packed_and_full_precision_folders(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "full")
    tiny_tokenizer().save_pretrained(tmp_path / "full")
    save(prepared(model), tmp_path / "packed", tiny_tokenizer())
    full, _ = load_any(tmp_path / "full", torch.float32)
    packed, tokenizer = load_any(str(tmp_path / "packed"))
    assert full.dtype == torch.float32
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    assert tokenizer("ab").input_ids == tiny_tokenizer()("ab").input_ids


def test_autocast_left_on_the_model_does_not_reach_the_proof(tmp_path: Path) -> None:
    model = prepared()
    plain = model.forward
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(plain)  # as accelerate does for mixed precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        save(model, tmp_path / "out", dtype=torch.float32)
    del model.forward
    assert torch.equal(
        logits_of(load(tmp_path / "out", kernel="reference"), torch.float32), logits_of(model, torch.float32)
    )


# The proof fails where it should


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_shape", "bias"])
def test_proof_finds_one_wrong_element(leaf: str, tmp_path: Path) -> None:
    model = prepared(tiny_qwen2())
    save(model, tmp_path / "out")
    assert prove(model, tmp_path / "out")["packed_layers"] == 14
    name = f"model.layers.1.self_attn.v_proj.{leaf}"
    corrupt(tmp_path / "out", name, index=1)
    with pytest.raises(ProofError, match=name.replace(".", r"\.")):
        prove(model, tmp_path / "out")


def test_proof_finds_one_flipped_bit_in_the_file(tmp_path: Path) -> None:
    model = prepared()
    save(model, tmp_path / "out")
    path = tmp_path / "out" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ProofError, match="read back"):
        prove(model, tmp_path / "out")


def test_proof_finds_a_weight_the_training_forward_does_not_have(tmp_path: Path) -> None:
    model = prepared()
    save(model, tmp_path / "out")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    written = FORMATS["compressed-tensors"].packed_state_dict(model, torch.bfloat16)
    layer.log_scale.data += 0.5
    with pytest.raises(ProofError, match=r"model\.layers\.0\.mlp\.up_proj"):
        checkpoint._prove(model, tmp_path / "out", torch.bfloat16, FORMATS["compressed-tensors"], None, written)


def test_proof_compares_logits_too(tmp_path: Path) -> None:
    model = prepared()
    save(model, tmp_path / "out")
    model.model.layers[0].self_attn.scaling *= 2  # what no tensor holds
    with pytest.raises(ProofError, match="logits"):
        prove(model, tmp_path / "out")


def test_diverged_model_is_refused(tmp_path: Path) -> None:
    model = prepared()
    model.model.norm.weight.data.fill_(3e38)
    with pytest.raises(ProofError, match="not finite"):
        save(model, tmp_path / "out")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN"):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existed", [False, True])
def test_failed_proof_leaves_the_destination_as_it_was(
    existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared()
    if existed:
        save(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*")}
    honest = FORMATS["compressed-tensors"].write

    def corrupting(model: Any, folder: Path, *rest: Any) -> dict[str, torch.Tensor]:
        written = honest(model, folder, *rest)
        corrupt(folder, "model.layers.0.mlp.down_proj.weight_scale", index=3)
        return written

    monkeypatch.setattr(FORMATS["compressed-tensors"], "write", corrupting)
    with pytest.raises(ProofError, match=r"model\.layers\.0\.mlp\.down_proj\.weight_scale"):
        save(model, tmp_path / "out", overwrite=existed)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existed else [])


# What save refuses


def test_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    model = prepared()
    save(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"exists already.*overwrite=True \(--overwrite\)"):
        save(model, tmp_path / "out")
    (tmp_path / "out" / "stale.txt").touch()
    save(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_does_not_delete_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no model"):
        save(prepared(), tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_overwrite_does_not_delete_what_lies_with_a_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(prepared(), out)
    (out / "src").mkdir()
    (out / "src" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other things than a model \(src\), so it is not deleted"):
        save(prepared(), out, overwrite=True)
    assert (out / "src" / "thesis.tex").exists()


def test_a_checkpoint_of_another_tool_keeps_its_dtype_where_nothing_is_to_be_rounded(tmp_path: Path) -> None:
    save(prepared(), tmp_path / "out", tiny_tokenizer(), dtype=torch.float16)
    own, _ = load_any(tmp_path / "out", None)
    layer = own.model.layers[0].mlp.up_proj
    assert layer.weight_scale.dtype == own.model.norm.weight.dtype == torch.float16
    assert load_any(tmp_path / "out")[0].model.norm.weight.dtype == torch.bfloat16


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    model = prepared()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tiny_llama(), {}, r"no quantized weight to pack; call llmqat\.prepare"),
        (torch.nn.DataParallel(model), {}, "unwrap_model"),
        (model, {"run": {"path": Path("x")}}, "JSON"),
        (model, {"dtype": torch.int8}, "bfloat16"),
        (model, {"format": "gguff"}, "compressed-tensors"),
    ]
    for bad, options, message in cases:
        with pytest.raises(ValueError, match=message):
            save(bad, tmp_path / "out", **options)
    with quantizers_off(model), pytest.raises(ValueError, match="switched off"):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# What load refuses


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "out"
    save(prepared(), folder, tiny_tokenizer(), max_shard_size=60_000)
    return folder


@pytest.fixture
def damaged(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "damaged"))


def edit(folder: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """Replaces or removes a tensor on disk, returning the file it was in."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    path = folder / index[name]
    tensors = load_file(path)
    tensors = {key: value for key, value in tensors.items() if key != name}
    save_file(tensors | ({} if tensor is None else {name: tensor}), path, metadata={"format": "pt"})
    return path


SCALE = "model.layers.0.mlp.up_proj.weight_scale"


def test_load_needs_config_json_alone(damaged: Path) -> None:
    (damaged / "llmqat.json").unlink()
    (damaged / "generation_config.json").unlink()
    assert load(damaged).generate(token_ids()[:1], max_new_tokens=2, eos_token_id=VOCAB_SIZE).shape[1] == 18


def test_truncated_shard_is_named(damaged: Path) -> None:
    shard = sorted(damaged.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated"):
        load(damaged)


def test_missing_shard_is_named(damaged: Path) -> None:
    shard = sorted(damaged.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load(damaged)


def test_missing_left_over_and_misshaped_tensors_are_named(damaged: Path) -> None:
    path = edit(damaged, SCALE, None)
    with pytest.raises(ValueError, match=rf"lacks 1 tensors .*{SCALE}"):
        load(damaged)
    edit_all = load_file(path) | {SCALE: torch.ones(128, 3, dtype=torch.bfloat16)}
    save_file(edit_all, path)
    with pytest.raises(ValueError, match=rf"{path.name}: {SCALE} has shape \[128, 3\].*\[128, 2\]"):
        load(damaged)
    save_file(edit_all | {SCALE: torch.ones(128, 2, dtype=torch.int32)}, path)
    with pytest.raises(ValueError, match=rf"{SCALE} is torch.int32, but .* torch.bfloat16"):
        load(damaged)
    save_file(edit_all | {SCALE: torch.ones(128, 2), "model.extra": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"no place for: model\.extra"):
        load(damaged)


def test_wrong_weight_shape_record_is_named(damaged: Path) -> None:
    name = SCALE.replace("weight_scale", "weight_shape")
    edit(damaged, name, torch.tensor([128, 65]))
    with pytest.raises(ValueError, match=name):
        load(damaged)


def test_schemes_we_do_not_run_are_refused(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    scheme = config["quantization_config"]["config_groups"]["group_0"]
    scheme["output_activations"] = {"num_bits": 8, "strategy": "token", "dynamic": True}
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantized output activations.*AutoModelForCausalLM"):
        load(damaged)
    scheme["input_activations"] = {"num_bits": 8, "colour": "red"}
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: quantization_config is not valid"):
        load(damaged)


def test_full_precision_folder_and_unknown_kernel_are_refused(good: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"not a packed checkpoint.*AutoModelForCausalLM"):
        load(tmp_path / "full")
    with pytest.raises(ValueError, match=r"choose auto, .*reference"):
        load(good, kernel="fastest")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nowhere" / "at" / "all")


@pytest.mark.parametrize("memory", ["much", -1, "12 apples", "", "-4MB", None, 1.5, True, [1]])
def test_what_is_no_amount_of_memory_is_refused_before_anything_is_read(memory: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"memory={re.escape(repr(memory))} is no amount of memory; give bytes, or text as '400MB'"
    ):
        load(tmp_path / "nothing", memory=memory)


def test_memory_for_dequantized_weights_is_used_layer_after_layer(tmp_path: Path) -> None:
    save(prepared(tiny_llama()), tmp_path / "out")
    kept = {}
    for memory in (0, "20KB", 20_000, "1GB"):
        packed = [
            module for module in load(tmp_path / "out", memory=memory).modules() if isinstance(module, PackedModule)
        ]
        kept[memory] = [module.packed_weight().kept is not None for module in packed]
        assert sum(2 * m.rows * m.columns for m, has in zip(packed, kept[memory], strict=True) if has) <= 20_000 or (
            memory == "1GB"
        )
    assert not any(kept[0])
    assert kept["20KB"] == kept[20_000]
    assert any(kept[20_000])
    assert not all(kept[20_000])
    assert all(kept["1GB"])


@pytest.mark.parametrize("device", ["nowhere", "meta", None, ["cpu"], *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_here_is_named_before_anything_is_read(device: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"device={re.escape(repr(str(device)))} cannot be used: .*; choose 'cpu'"):
        load(tmp_path / "nothing", device=device)


def test_generation_compiles_in_one_graph_and_gives_the_same_logits(tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler: nothing is compiled")
    save(prepared(tiny_llama(num_hidden_layers=1)), tmp_path / "out")
    prompt = torch.arange(2, 42)[None]
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 1}
    logits = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        model = load(tmp_path / "out", compile=compiled)
        output = model.generate(prompt, **settings, output_logits=True, return_dict_in_generate=True)
        logits.append(output.logits[1])  # of the first decoded token, whose input is the same in both
        frames = torch._dynamo.utils.counters["frames"]["ok"]
        assert (frames > 0) == compiled
    # A compiled graph keeps in float32 what eager mode rounds to bfloat16 between operations.
    torch.testing.assert_close(*logits, rtol=0, atol=2**-5 * logits[0].abs().max().item())
    if Version(torch.__version__) >= Version("2.13"):  # 2.10 cannot trace torch.is_autocast_available
        assert not torch._dynamo.utils.counters["graph_break"]


def test_transformers_serve_takes_the_folder(tmp_path: Path) -> None:
    save(prepared(), tmp_path / "out", tiny_tokenizer())
    # What `transformers serve FOLDER` does before it listens (listening needs fastapi, uvicorn and openai).
    manager = ModelManager(device="cpu", dtype="auto", force_model=None)
    model, processor = manager.load_model_and_processor(ModelManager.process_model_name(str(tmp_path / "out")))
    assert processor.chat_template == tiny_tokenizer().chat_template
    assert torch.equal(model(token_ids()).logits, load(tmp_path / "out", kernel="reference")(token_ids()).logits)
    manager.shutdown()

"""LoRA inside the quantizer: peft's adapters, the same arithmetic in either order, folded into the very codes."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from llmqat import QuantConfig, adopt_adapters, convert, load_adapter, lora_config, prepare, save, save_adapter
from llmqat.grid import fake_quantize
from llmqat.layers import QuantModule, quantized_once, quantizers_off
from llmqat.layers.lora import QuantLora, adapters_off
from llmqat.metrics import predictor_of
from llmqat.models import capture_hidden, head_weight
from tests.tiny import tiny_architecture, tiny_llama

INT4 = QuantConfig.preset("int4", group_size=16)
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {},
    "int4": {"group_size": 16},
    "int3": {"group_size": 32, "symmetric": False},
    "int2-seq": {"group_size": 16},
    "ternary": {"group_size": 16},
    "w4a8kv8": {"group_size": 16},
}


def ids() -> Tensor:
    return torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(0))


def layers_of(model: nn.Module) -> list[QuantModule]:
    return [module for module in model.modules() if isinstance(module, QuantModule)]


def adapted(model: nn.Module, quant: QuantConfig = INT4, **options: Any) -> PeftModel:
    prepare(model, quant)
    options = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, **options}
    peft_model = get_peft_model(model, lora_config(model, **options))
    adopt_adapters(peft_model)
    return peft_model


def trained(model: PeftModel, steps: int = 2) -> PeftModel:
    """Takes steps under autocast, as a stock loop would."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trainable)
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_weight_is_the_quantized_sum() -> None:
    layer = adapted(tiny_llama()).get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert isinstance(layer, QuantLora)
    summed = layer.layer.weight + 32 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    scale, zero_point = layer.layer.scale_and_zero_point()
    expected = fake_quantize(summed, scale, zero_point, layer.layer.grid, torch.float32)
    assert torch.equal(layer.layer.quantized_weight(torch.float32), expected)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("preset", SCHEMES)
def test_merging_keeps_every_code_of_the_training_forward(preset: str, use_rslora: bool) -> None:
    model = adapted(tiny_llama(), QuantConfig.preset(preset, **SCHEMES[preset]), use_rslora=use_rslora)
    original = [layer.weight.clone() for layer in layers_of(model)]
    trained(model)
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda module, *_: seen.append(module.codes())) for layer in layers_of(model)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids=ids()).logits
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers_of(model), original, strict=True))

    merged = model.merge_and_unload()
    assert sum(int((layer.codes() != codes).sum()) for layer, codes in zip(layers_of(merged), seen, strict=True)) == 0
    assert not any("lora" in name for name in merged.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merged(input_ids=ids()).logits, before)
    packed = convert(merged)
    assert not layers_of(packed)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_transposed_and_stacked_weights_are_adapted_as_well(model_type: str) -> None:
    model = adapted(tiny_architecture(model_type))
    adapters = [module for module in model.modules() if isinstance(module, QuantLora)]
    assert len(adapters) == len(layers_of(model))
    trained(model)
    codes = [layer.codes() for layer in layers_of(model)]
    before = model(input_ids=ids()).logits
    merged = model.merge_and_unload()
    assert all(torch.equal(layer.codes(), code) for layer, code in zip(layers_of(merged), codes, strict=True))
    assert torch.equal(merged(input_ids=ids()).logits, before)


def test_attaching_and_preparing_commute() -> None:
    names = ["q_proj.weight", "down_proj.weight"]
    config = LoraConfig(r=4, target_modules=[], target_parameters=names, init_lora_weights=False)
    quant = QuantConfig.preset("int4", group_size=16, ignore=["re:.*up_proj$"])
    first, second = tiny_llama(), tiny_llama()
    prepare(first, quant)
    torch.manual_seed(0)
    prepared_first = get_peft_model(first, config)
    torch.manual_seed(0)
    attached_first = get_peft_model(second, config)
    prepare(attached_first, quant)
    assert list(prepared_first.state_dict()) == list(attached_first.state_dict())
    stock = prepared_first(input_ids=ids()).logits  # outside autocast stock peft gives the same numbers
    adopt_adapters(prepared_first)
    assert torch.equal(prepared_first(input_ids=ids()).logits, stock)
    assert torch.equal(attached_first(input_ids=ids()).logits, stock)


def test_several_adapters_and_none() -> None:
    plain = tiny_llama()
    prepare(plain, INT4)
    model = get_peft_model(copy.deepcopy(plain), lora_config(plain, r=2, init_lora_weights=False))
    model.add_adapter("second", lora_config(plain, r=8, init_lora_weights=False))
    adopt_adapters(model)
    one = model(input_ids=ids()).logits
    model.set_adapter("second")
    other = model(input_ids=ids()).logits
    assert not torch.equal(one, other)
    model.base_model.set_adapter(["default", "second"])
    both = [layer.codes() for layer in layers_of(model)]
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids()).logits, plain(ids()).logits)
    with adapters_off(model), quantizers_off(model):
        assert torch.equal(model(input_ids=ids()).logits, tiny_llama()(ids()).logits)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    assert all(torch.equal(layer.codes(), codes) for layer, codes in zip(layers_of(merged), both, strict=True))


def test_merging_is_done_once_and_undone_bit_for_bit() -> None:
    model = adapted(tiny_llama().to(torch.bfloat16))
    weights = [layer.weight.clone() for layer in layers_of(model)]
    codes = [layer.codes() for layer in layers_of(model)]
    plain = tiny_llama().to(torch.bfloat16)
    prepare(plain, INT4)
    with torch.no_grad():
        off = plain(ids()).logits
        for _ in range(2):
            model.merge_adapter()
            assert all(torch.equal(layer.codes(), code) for layer, code in zip(layers_of(model), codes, strict=True))
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids()).logits, off)
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers_of(model), weights, strict=True))
        model.merge_adapter()
        model.unmerge_adapter()
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers_of(model), weights, strict=True))
        merged = model.merge_and_unload()
    assert all(torch.equal(layer.codes(), code) for layer, code in zip(layers_of(merged), codes, strict=True))


def test_a_weight_quantized_once_follows_the_adapters() -> None:
    model = adapted(tiny_llama())
    layer = layers_of(model)[0]
    with torch.no_grad(), quantized_once(model):
        own = layer.quantized_weight(torch.float32)
        with model.disable_adapter():
            assert not torch.equal(layer.quantized_weight(torch.float32), own)
        assert torch.equal(layer.quantized_weight(torch.float32), own)


def test_a_low_precision_base_is_adopted_when_it_is_loaded(tmp_path: Path) -> None:
    model = adapted(tiny_llama().to(torch.bfloat16))
    codes = [layer.codes() for layer in layers_of(model)]
    save_adapter(model, tmp_path)
    fresh = tiny_llama().to(torch.bfloat16)
    prepare(fresh, INT4)
    stock = PeftModel.from_pretrained(copy.deepcopy(fresh), str(tmp_path))
    with pytest.raises(RuntimeError, match="weights that are not float32"):
        stock(input_ids=ids())
    loaded = load_adapter(fresh, tmp_path)
    assert all(torch.equal(layer.codes(), code) for layer, code in zip(layers_of(loaded), codes, strict=True))


def test_an_adapter_of_another_scheme_or_base_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(tiny_llama()), tmp_path / "int4")
    other = tiny_llama()
    prepare(other, QuantConfig.preset("int3", group_size=16))
    with pytest.raises(ValueError, match=r"another scheme .*weights="):
        load_adapter(other, tmp_path / "int4")
    moved = adapted(tiny_llama())
    with torch.no_grad():
        layers_of(moved)[0].weight.add_(0.01)
    with pytest.raises(ValueError, match="the adapter alone does not make this model"):
        save_adapter(moved, tmp_path / "moved")


@pytest.mark.parametrize(("trained", "loaded"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_an_adapter_is_loaded_on_the_weights_it_was_trained_on(trained: str, loaded: str, tmp_path: Path) -> None:
    original = tiny_llama().to(torch.bfloat16)  # as files on the hub are
    save_adapter(adapted(copy.deepcopy(original).to(getattr(torch, trained))), tmp_path)
    same = copy.deepcopy(original).to(getattr(torch, loaded))
    prepare(same, INT4)
    load_adapter(same, tmp_path)
    other = copy.deepcopy(original).to(getattr(torch, loaded))
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3, 3] += 0.25
    prepare(other, INT4)
    with pytest.raises(ValueError, match=r"on other weights than the model has, in model\.layers\.0\.mlp\.up_proj"):
        load_adapter(other, tmp_path)


def test_an_adapter_without_its_scales_or_their_place_is_refused(tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    save_adapter(model, tmp_path / "whole")
    model.save_pretrained(str(tmp_path / "peft"))
    fresh = tiny_llama()
    with pytest.raises(ValueError, match=r"not prepared, so the scales of .* have no place"):
        load_adapter(fresh, tmp_path / "whole")
    prepare(fresh, INT4)
    with pytest.raises(ValueError, match=r"without the scales .*; save it with llmqat\.save_adapter"):
        load_adapter(fresh, tmp_path / "peft")


def test_ranks_and_alphas_of_single_layers_are_kept() -> None:
    model = tiny_llama()
    prepare(model, INT4)
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 64}}
    found = get_peft_model(model, lora_config(model, r=4, lora_alpha=8, **options))
    layers = {name: module for name, module in found.named_modules() if hasattr(module, "lora_A")}
    ranks = {name.rpartition(".")[2]: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    assert ranks["q_proj"] == (2, 4.0)
    assert ranks["k_proj"] == (4, 16.0)
    assert ranks["v_proj"] == (4, 2.0)


def test_adapters_that_share_scales_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_adapter(adapted(tiny_llama()), tmp_path)
    model = tiny_llama()
    prepare(model, INT4)
    found = PeftModel.from_pretrained(model, str(tmp_path))
    found.load_adapter(str(tmp_path), "second")
    adopt_adapters(found)
    assert "adapters default, second share the scales of the quantizers" in caplog.text


def test_a_head_that_is_trained_whole_is_the_one_that_the_loss_reads() -> None:
    model = tiny_llama(tied=False)
    prepare(model, QuantConfig.preset("int4", group_size=16, lm_head="int4"))
    found = get_peft_model(model, lora_config(model, ["q_proj"], r=2, modules_to_save=["lm_head"]))
    adopt_adapters(found)
    head = found.get_base_model().lm_head
    with torch.no_grad():
        head.modules_to_save["default"].log_scale.add_(5.0)
        for switch in (found.disable_adapter, contextlib.nullcontext):
            with switch():
                own = found(input_ids=ids()).logits
                with capture_hidden(found) as captured:
                    found(input_ids=ids())
                    made = predictor_of(found).logits(captured.take())
            torch.testing.assert_close(made, own, atol=1e-5, rtol=1e-5)


def test_adapters_of_any_name_keep_the_scales(tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, INT4)
    named = get_peft_model(model, lora_config(model, r=2, init_lora_weights=False), adapter_name="mine")
    adopt_adapters(named)
    save_adapter(named, tmp_path)
    fresh = tiny_llama()
    prepare(fresh, INT4)
    loaded = load_adapter(fresh, tmp_path / "mine")
    assert torch.equal(loaded(input_ids=ids()).logits, named(input_ids=ids()).logits)


def test_a_quantized_head_is_adapted_and_an_embedding_is_not() -> None:
    model = tiny_llama(tied=False)
    prepare(model, QuantConfig.preset("int4", group_size=16, lm_head="int8", embeddings="int8"))
    config = lora_config(model, r=2, init_lora_weights=False)
    head = get_peft_model(model, config)
    adopt_adapters(head)
    weight, _ = head_weight(head.get_base_model())
    adapter = head.get_submodule("base_model.model.lm_head")
    assert isinstance(adapter, QuantLora)
    assert torch.equal(weight, adapter.layer.quantized_weight(torch.float32))
    assert weight.requires_grad
    other = tiny_llama(tied=False)
    prepare(other, QuantConfig.preset("int4", group_size=16, embeddings="int8"))
    embedding = get_peft_model(other, LoraConfig(target_modules=[], target_parameters=["embed_tokens.weight"]))
    with pytest.raises(ValueError, match="embed_tokens is a quantized embedding, which takes no adapter"):
        adopt_adapters(embedding)


def test_an_adapter_on_the_head_does_not_make_prepare_quantize_it() -> None:
    config = LoraConfig(target_modules=[], target_parameters=["q_proj.weight", "lm_head.weight"])
    model = get_peft_model(tiny_llama(tied=False), config)
    coverage = prepare(model, INT4)
    assert next(entry for entry in coverage.entries if "lm_head" in entry.name).treatment == "kept"


def test_adapters_must_be_folded_before_packing() -> None:
    model = adapted(tiny_llama())
    for pack in (convert, lambda inner: save(inner, "never")):
        for inner in (model, model.get_base_model()):
            with pytest.raises(ValueError, match="fold them first"):
                pack(inner)


def test_scales_travel_with_the_adapter_and_stock_peft_reads_them(tmp_path: Path) -> None:
    model = adapted(tiny_llama(), QuantConfig.preset("int4", group_size=16, symmetric=False))
    with torch.no_grad():
        for layer in layers_of(model):
            assert layer.log_scale is not None
            layer.log_scale.uniform_(-0.2, 0.2)
    save_adapter(model, tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }

    fresh = tiny_llama()
    prepare(fresh, QuantConfig.preset("int4", group_size=16, symmetric=False))
    reloaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    assert torch.equal(reloaded(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_without_adoption_autocast_is_refused() -> None:
    model = tiny_llama()
    prepare(model, INT4)
    stock = get_peft_model(model, lora_config(model, r=2))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"call llmqat[.]adopt_adapters"):
        stock(input_ids=ids())


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_an_adapter_beside_the_quantizer_is_refused(targets: Any) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match="q_proj has a Linear adapter beside its weight, which could not be folded"):
        prepare(model, INT4)
    assert not layers_of(model)


def test_adapters_of_experts_come_after_preparing() -> None:
    config = LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"])
    model = get_peft_model(tiny_architecture("mixtral"), config)
    with pytest.raises(ValueError, match="prepare a mixture of experts first, then call get_peft_model"):
        prepare(model, INT4)


def test_what_would_not_be_inside_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="no quantized linear weight; call"):
        lora_config(model)
    prepare(model, INT4)
    with pytest.raises(ValueError, match=r"targets has 'qproj'.*choose among \['down_proj', 'gate_proj'"):
        lora_config(model, targets=["qproj"])
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1: inside a quantizer"):
        lora_config(model, lora_dropout=0.1)
    for key in ("target_modules", "exclude_modules"):
        with pytest.raises(ValueError, match=f"{key} means modules, beside whose quantizers"):
            lora_config(model, **{key: ["q_proj"]})
    peft_model = get_peft_model(model, lora_config(model, r=2, init_lora_weights=True))
    peft_model.peft_config["default"].init_lora_weights = "loftq"
    with pytest.raises(ValueError, match="starts as the rounding error"):
        adopt_adapters(peft_model)


def test_only_what_is_quantized_is_adapted() -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=16, skip_first=1, embeddings="int8"))
    peft_model = get_peft_model(model, lora_config(model, r=2))
    adopt_adapters(peft_model)
    names = [name for name, module in peft_model.named_modules() if isinstance(module, QuantLora)]
    assert len(names) == 7
    again = tiny_llama()
    prepare(again, QuantConfig.preset("int4", group_size=16, skip_first=1))
    assert lora_config(again, ["q_proj"], r=2).target_parameters == ["model.layers.1.self_attn.q_proj.weight"]
    assert all(".layers.1." in name for name in names)

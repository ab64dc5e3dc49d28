"""Models that are not whole and in full precision are refused, whatever quantized or offloaded them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Mxfp4Config, PreTrainedModel
from transformers.integrations import bitnet, eetq, finegrained_fp8, gemma_quant, metal_quantization
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from llmqat import QuantConfig, prepare, save
from llmqat.layers.originals import dropped_note
from tests.tiny import tiny_llama, tiny_model

CONFIG = QuantConfig.preset("int4", group_size=16)


@pytest.mark.parametrize("method", AUTO_QUANTIZATION_CONFIG_MAPPING)
@pytest.mark.parametrize("as_dictionary", [False, True])
def test_what_any_quantizer_of_transformers_has_made_is_refused_by_its_name(method: str, as_dictionary: bool) -> None:
    model, kind = tiny_llama(), AUTO_QUANTIZATION_CONFIG_MAPPING[method]
    described = kind.__new__(kind)  # some want their package for more
    described.quant_method = method
    model.config.quantization_config = {"quant_method": method} if as_dictionary else described
    with pytest.raises(ValueError, match=f"quantized already by {method}.*load the original"):
        prepare(model, CONFIG)


def _with_linear(make: Callable[[], nn.Module]) -> Callable[[], PreTrainedModel]:
    def model() -> PreTrainedModel:
        found = tiny_llama()
        found.model.layers[0].mlp.up_proj = make()
        return found

    return model


def _with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(64, 128, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Coded(Tensor):
    """A tensor whose numbers are codes."""


class QLinear(nn.Module):
    """As GPTQ's and AWQ's layers are: codes in a buffer, no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 128, dtype=torch.int32))


HELD: dict[str, Callable[[], PreTrainedModel]] = {
    "int8 weight": _with_linear(lambda: _with_weight(torch.zeros(128, 64, dtype=torch.int8))),
    "float8 weight": _with_linear(lambda: _with_weight(torch.zeros(128, 64).to(torch.float8_e4m3fn))),
    "4 bits in bytes": _with_linear(lambda: _with_weight(torch.zeros(4096, 1, dtype=torch.uint8))),
    "tensor subclass": _with_linear(lambda: _with_weight(torch.zeros(128, 64).as_subclass(Coded))),
    "codes in a buffer": _with_linear(QLinear),
    "FP8": _with_linear(lambda: finegrained_fp8.FP8Linear(64, 128)),
    "BitNet": _with_linear(lambda: bitnet.BitLinear(64, 128, bias=False)),
    "BitNet, trained online": _with_linear(lambda: bitnet.AutoBitLinear(64, 128, bias=False)),
    "EETQ": _with_linear(lambda: eetq.EetqLinear(64, 128)),
    "Metal": _with_linear(lambda: metal_quantization.MetalLinear(64, 128)),
    "Gemma": _with_linear(lambda: gemma_quant.QuantizedLinear(64, 128)),
}


@pytest.mark.parametrize("way", HELD)
def test_quantized_layers_are_found_where_nothing_else_says_so(way: str) -> None:
    with pytest.raises(ValueError, match=r"quantized already \(model.layers.0.mlp.up_proj.*load the original"):
        prepare(HELD[way](), CONFIG)


@pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_bitsandbytes_is_refused(bits: dict[str, bool], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**bits), device_map="cpu"
    )
    with pytest.raises(ValueError, match=r"quantized already by bitsandbytes \(model.layers.0.self_attn"):
        prepare(model, CONFIG)


@pytest.mark.parametrize("ran", [False, True])
def test_compressed_tensors_are_refused_before_and_after_they_are_unpacked(ran: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("w8a8"))
    save(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    if ran:
        loaded(torch.tensor([[2, 3]]))
    with pytest.raises(ValueError, match="quantized already by compressed-tensors"):
        prepare(loaded, CONFIG)
    del loaded.hf_quantizer, loaded.config.quantization_config
    with pytest.raises(ValueError, match="compressed by compressed-tensors"):
        prepare(loaded, CONFIG)


def test_a_model_that_was_dequantized_at_loading_is_prepared_and_says_so() -> None:
    model = tiny_llama()
    model.config.quantization_config = Mxfp4Config(dequantize=True)
    (note,) = prepare(model, CONFIG).notes
    assert "quantized by mxfp4 and dequantized at loading" in note


def _hooked() -> PreTrainedModel:
    model = tiny_llama()
    hooks = SequentialHook(AlignDevicesHook("cpu"), AlignDevicesHook("cpu", offload=True, weights_map={}))
    model.model.layers[0].mlp.up_proj._hf_hook = hooks
    return model


def _without_a_layer() -> PreTrainedModel:
    model = tiny_llama()
    model.model.layers[1].to("meta")
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: cpu_offload(tiny_llama(), torch.device("cpu")), "accelerate offloads"),
        (lambda: cpu_offload(tiny_llama(), torch.device("cpu"), offload_buffers=True), "accelerate offloads"),
        (_hooked, "accelerate offloads the weights of model.layers.0.mlp.up_proj"),
        (_without_a_layer, "model.layers.1.self_attn.q_proj.weight and 8 other parameters are on the meta device"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(make: Callable[[], PreTrainedModel], said: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=said):
        prepare(model, CONFIG)


def test_a_model_on_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accelerate offloads"):
        prepare(disk_offload(tiny_llama(), tmp_path, torch.device("cpu")), CONFIG)


def test_a_model_that_is_spread_over_devices_and_whole_is_prepared() -> None:
    model = tiny_llama()
    add_hook_to_module(model.model.layers[0], AlignDevicesHook("cpu", io_same_device=True))
    model.hf_device_map = {"": "cpu"}
    assert prepare(model, CONFIG).quantized


def test_weights_that_transformers_drops_at_loading_are_named(tmp_path: Path) -> None:
    sizes = {"n_routed_experts": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 64, "n_group": 1}
    tiny_model("glm4_moe", topk_group=1, num_experts_per_tok=2, **sizes).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {"model.layers.92.eh_proj.weight": torch.zeros(2, 2), "model.layers.92.bias": torch.zeros(2)}
    save_file(tensors | extra, tmp_path / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    (note,) = (note for note in prepare(model, CONFIG).notes if "multi-token" in note)
    assert "does not load 1 weights of the original (model.layers.92.eh_proj.weight, …)" in note
    assert note in save(model, tmp_path / "packed").notes
    assert not dropped_note(tiny_llama())

"""What the parts of a model are for: routers, experts, towers, weights that other code reads."""

from __future__ import annotations

import ast
import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
)

from llmqat import QuantConfig, convert, load, prepare, save
from llmqat.layers import CoverageAudit, LayerScheme, QuantExperts, QuantLinear, QuantModule, WeightConfig, audit
from llmqat.layers.roles import _has_stand_in, _stand_in_product, tried, unreached
from llmqat.models import cast_parameters
from tests.tiny import ARCHITECTURES, VOCAB_SIZE, tiny_architecture, tiny_llama, tiny_model

CONFIG = QuantConfig.preset("int4", group_size=16)
EXPERTS = 5
"""A width that nothing else in a tiny model has."""


def ids(rows: int = 2, length: int = 20) -> Tensor:
    return torch.randint(2, 258, (rows, length), generator=torch.Generator().manual_seed(5))


def names(report: CoverageAudit) -> set[str]:
    return {entry.name.removesuffix(".weight") for entry in report.quantized}


# Routers and experts

_DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "num_kv_shared_layers": 0,
    "enable_moe_block": True,
    "num_experts": EXPERTS,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}
_SIZES = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIXTURES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_experts": EXPERTS, **_SIZES, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": {**_DEEPSEEK, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 4},
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 64},
    "gpt_oss": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": 16},
    "granitemoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 2, "head_dim": 16},
    "jetmoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "kv_channels": 16},
    "llama4_text": {"num_local_experts": EXPERTS, "intermediate_size_mlp": 128, "moe_layers": [0, 1]},
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": EXPERTS, **_SIZES, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": EXPERTS, **_SIZES},
}
"""Mixtures of experts of every kind, by model type -> what makes them tiny, with `EXPERTS` experts."""


def gemma4() -> PreTrainedModel:
    config = tiny_model("gemma3_text").config
    known = {key: getattr(config, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16}
    wanted = AutoConfig.for_model("gemma4_text", vocab_size=VOCAB_SIZE, **known, **heads, **_GEMMA4)
    return AutoModelForCausalLM.from_config(wanted).eval()


def mixture(model_type: str) -> PreTrainedModel:
    return gemma4() if model_type == "gemma4_text" else tiny_model(model_type, **MIXTURES[model_type])


@pytest.mark.parametrize("model_type", [*MIXTURES, "gemma4_text"])
def test_no_router_is_quantized_and_all_experts_are(model_type: str) -> None:
    report = prepare(mixture(model_type), CONFIG)
    assert not [entry.name for entry in report.quantized if entry.shape[0] in (1, EXPERTS)]
    kept = sum(entry.numel for entry in report.kept if len(entry.shape) == 3 and "conv" not in entry.name)
    assert not kept, [entry for entry in report.kept if len(entry.shape) == 3]
    assert not [note for note in report.notes if note.startswith("high precision")]


@pytest.mark.parametrize("model_type", [*MIXTURES, "gemma4_text", *ARCHITECTURES, "mamba"])
def test_a_model_without_weights_is_told_apart_in_the_same_way(model_type: str) -> None:
    sizes = {"mamba": {"state_size": 16, "time_step_rank": 16}, "falcon": {"head_dim": None}}
    if model_type in MIXTURES or model_type == "gemma4_text":
        model = mixture(model_type)
    elif model_type in ARCHITECTURES:
        model = tiny_architecture(model_type)
    else:
        model = tiny_model(model_type, **sizes[model_type])
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    assert prepare(empty, CONFIG).entries == prepare(model, CONFIG).entries


def test_halves_of_gated_layers_and_gates_of_attention_are_no_routers() -> None:
    model = tiny_model("qwen3_next", **{**MIXTURES["qwen3_moe"], "shared_expert_intermediate_size": 64})
    report = prepare(model, CONFIG)
    assert any("shared_expert.gate_proj" in name for name in names(report))
    assert {entry.reason for entry in report.kept if "shared_expert_gate" in entry.name} == {
        "router, stays in high precision"
    }


@pytest.mark.parametrize("model_type", ["llama4_text", "jetmoe"])
def test_experts_without_transformers_decorator_are_saved_and_loaded(model_type: str, tmp_path: Path) -> None:
    model = mixture(model_type)
    prepare(model, CONFIG)
    stacked = {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}
    assert {module.transposed for module in stacked.values()} == {model_type == "llama4_text"}
    assert len(stacked) == 4 if model_type == "llama4_text" else 8
    save(model, tmp_path / "out")  # proved
    loaded = load(tmp_path / "out", kernel="reference")
    with torch.no_grad(), cast_parameters(model, torch.bfloat16):
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    save(loaded, tmp_path / "again")
    with torch.no_grad():
        again = load(tmp_path / "again", kernel="reference")
        assert torch.equal(again(ids()).logits, loaded(ids()).logits)


# Toys: one way of writing a layer each

WIDE, NARROW = 64, 32


class Experts(nn.Module):
    """Holds stacked matrices; `product` is how a class below computes with them."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.stacked, self.product = nn.Parameter(torch.randn(shape) / 8), product

    def forward(self, hidden: Tensor) -> Tensor:
        return self.product(hidden, self.stacked)


class Toy(PreTrainedModel):
    """Embeds tokens, runs one module, and has a head."""

    config_class = PreTrainedConfig
    _keep_in_fp32_modules_strict = ("precise",)

    def __init__(self, inner: nn.Module, width: int = WIDE) -> None:
        config = PreTrainedConfig()
        config.vocab_size = VOCAB_SIZE
        super().__init__(config)
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, WIDE)
        self.inner, self.head = inner, nn.Linear(width, VOCAB_SIZE, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        return self.head(self.inner(self.embed_tokens(input_ids)))


def _each(hidden: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([F.linear(hidden, weights[expert]) for expert in range(len(weights))]).sum(0)


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool | None]] = {
    "linear, one after another": (_each, False),
    "linear, unbound and cast": (lambda x, w: sum(F.linear(x, part.float()) for part in w.unbind(0)), False),
    "matmul": (lambda x, w: (x.unsqueeze(1) @ w).sum(1), True),
    "matmul of transposed": (lambda x, w: torch.matmul(x.unsqueeze(1), w.transpose(1, 2)).sum(1), False),
    "matmul of mT": (lambda x, w: torch.matmul(x.unsqueeze(1), w.mT).sum(1), False),
    "bmm": (lambda x, w: torch.bmm(x[:1].expand(len(w), -1, -1), w).sum(0, keepdim=True), True),
    "weight first": (lambda x, w: (w[0] @ x.mT).mT, False),
    "halves": (lambda x, w: sum(F.linear(x, half).sum(-1, keepdim=True) for half in w[1].chunk(2, dim=0)), False),
    "einsum": (lambda x, w: torch.einsum("bli,eoi->blo", x, w), None),
    "linear and matmul": (lambda x, w: F.linear(x, w[0]) + x @ w[0], None),
}
"""Ways of multiplying with stacked matrices -> whether they lie as [E, I, O]; None where that is not known."""


@pytest.mark.parametrize("way", PRODUCTS)
def test_the_product_says_how_stacked_matrices_lie(way: str) -> None:
    product, transposed = PRODUCTS[way]
    # Square: shapes say nothing.
    model = Toy(Experts(product, EXPERTS, WIDE, WIDE), 1 if way == "halves" else WIDE)
    before = model(ids()).detach()
    if transposed is None:
        with pytest.raises(ValueError, match="nothing is left to quantize"):
            prepare(model, CONFIG)
        return
    prepare(model, CONFIG)
    stacked = model.get_submodule("inner.stacked")
    assert isinstance(stacked, QuantExperts)
    assert stacked.transposed is transposed
    error = (model(ids()) - before).norm() / before.norm()
    assert 0 < error < 0.2
    wanted = model(ids())
    convert(model, torch.float32)
    assert torch.equal(model(ids()), wanted)


def test_experts_that_are_left_alone_are_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    model = Toy(nn.Sequential(nn.Linear(WIDE, WIDE), Experts(PRODUCTS["einsum"][0], EXPERTS, WIDE, WIDE)))
    report = prepare(model, CONFIG)
    (note,) = (note for note in report.notes if note.startswith("high precision"))
    assert "83% of the weights" in note
    assert "inner.*.stacked" in note
    assert "bits on average" in note
    assert note in caplog.text
    convert(model)
    assert note in audit(model).notes


def test_a_wish_is_noted_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    report = prepare(tiny_llama(), QuantConfig.preset("int4", group_size=16, ignore=["re:.*mlp.*"]))
    assert any("quant.ignore has 're:.*mlp.*'" in note for note in report.notes)
    assert not caplog.records


# Weights that other code reads


class Reads(nn.Module):
    """Has a layer whose weight a subclass reads, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.way(self.other(hidden))


class NeverCalled(Reads):
    def way(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.layer.weight, self.layer.bias)


class Transposed(Reads):
    def way(self, hidden: Tensor) -> Tensor:
        return hidden @ self.layer.weight.T


class Joined(Reads):
    def way(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, torch.cat([layer.weight for layer in (self.layer, self.layer)]))[..., :WIDE]


class Changes(Reads):
    def way(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.layer.weight.data.clamp_(-1, 1)
        return self.layer(hidden)


class CalledToo(Reads):
    def way(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden) + hidden @ self.layer.weight.to(hidden.dtype).T


class InTraining(Reads):
    def way(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.layer.weight, self.layer.bias) if self.training else self.layer(hidden)


class Asks(Reads):
    def way(self, hidden: Tensor) -> Tensor:
        assert isinstance(self.layer.weight, Tensor)
        assert self.layer.weight.shape == (WIDE, WIDE)
        return self.layer(hidden.to(self.layer.weight.dtype)).to(hidden.dtype)


@pytest.mark.parametrize("kind", [NeverCalled, Transposed, Joined, Changes])
def test_a_layer_that_is_read_and_not_called_is_left_alone(kind: type[Reads]) -> None:
    report = prepare(Toy(kind()), CONFIG)
    assert names(report) == {"inner.other"}
    (reason,) = (entry.reason for entry in report.kept if entry.name == "inner.layer.weight")
    assert reason.startswith(f"{kind.__name__} ")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [CalledToo, InTraining, Asks])
def test_reading_a_weight_gives_what_calling_its_layer_does(kind: type[Reads], training: bool) -> None:
    model = Toy(kind())
    assert names(prepare(model, CONFIG)) == {"inner.other", "inner.layer"}
    model.train(training)
    layer = model.inner.layer
    with cast_parameters(model, torch.bfloat16):
        prepared = model(ids())
        prepared.float().sum().backward()
    assert prepared.dtype == torch.bfloat16
    assert layer.weight is dict(model.named_parameters())["inner.layer.weight"]
    assert layer.log_scale.grad.abs().sum() > 0
    layer.enabled = False
    with torch.no_grad(), cast_parameters(model, torch.bfloat16):
        assert not torch.equal(model(ids()), prepared)
    layer.enabled = True
    convert(model, torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "kernel"):
            module.kernel = "reference"
    assert torch.equal(model(ids()), prepared)


def test_a_copy_of_a_prepared_model_reads_its_own_weights() -> None:
    model = Toy(InTraining())
    prepare(model, CONFIG)
    other = copy.deepcopy(model).train()
    with torch.no_grad():
        model.inner.layer.weight.zero_()
        assert not torch.equal(other(ids()), model.train()(ids()))


def test_every_weight_of_mamba_that_trains_is_quantized_where_it_is_used() -> None:
    model = tiny_model("mamba", state_size=16, time_step_rank=16)
    reasons = {entry.name: entry.reason for entry in prepare(model, CONFIG).kept}
    assert reasons["backbone.layers.0.mixer.dt_proj.weight"] == "MambaMixer reads its weight, and does not call it"
    plain = model(ids()).logits
    for module in model.modules():
        if isinstance(module, QuantModule):
            module.enabled = False
            assert not torch.equal(model(ids()).logits, plain)
            module.enabled = True


def test_a_forward_that_changes_weights_is_refused() -> None:
    model = tiny_model("rwkv", num_hidden_layers=2, rescale_every=1, attention_hidden_size=64, context_length=64)
    with pytest.raises(ValueError, match=r"RwkvModel changes the weight of .* rescale_every=0"):
        prepare(model, CONFIG)
    prepare(tiny_model("rwkv", rescale_every=0, attention_hidden_size=64, context_length=64), CONFIG)


def test_what_transformers_keeps_in_float32_is_left_alone() -> None:
    model = Toy(nn.Sequential())
    model.inner.add_module("precise", nn.Linear(WIDE, WIDE))
    model.inner.add_module("other", nn.Linear(WIDE, WIDE))
    report = prepare(model, CONFIG)
    assert names(report) == {"inner.other"}
    assert {e.reason for e in report.kept if e.name == "inner.precise.weight"} == {"Toy keeps it in float32"}


# Towers, and whatever else text does not reach

_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_AUDIO = {
    "d_model": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "num_mel_bins": 8,
    "max_source_positions": 20,
}


def gemma3() -> PreTrainedModel:
    text, vision = {**_TEXT, "sliding_window": 16}, {**_VISION, "vision_use_head": False}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=300)
    )


def llava() -> PreTrainedModel:
    vision = {**_VISION, "model_type": "clip_vision_model", "projection_dim": 64}
    text = {**_TEXT, "model_type": "llama"}
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=300, vision_feature_layer=-1)
    )


def qwen2_audio() -> PreTrainedModel:
    text = {key: value for key, value in _TEXT.items() if key != "head_dim"} | {"model_type": "qwen2"}
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=_AUDIO, text_config=text, audio_token_index=300)
    )


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize(
    ("make", "tower"),
    [(gemma3, "model.vision_tower"), (llava, "model.vision_tower"), (qwen2_audio, "model.audio_tower")],
)
def test_towers_are_left_alone_until_they_are_named(
    make: Callable[[], PreTrainedModel], tower: str, on_meta: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta" if on_meta else "cpu"), caplog.at_level(logging.INFO):
        report = prepare(make(), CONFIG)
        assert len(names(report)) == 14
        assert all("language_model" in name for name in names(report))
        (note,) = (note for note in report.notes if note.startswith(f"text does not reach {tower}"))
        assert note in caplog.text
        targets = note.partition("quant.targets=")[2]
        named = prepare(make(), QuantConfig.preset("int4", group_size=16, targets=tuple(ast.literal_eval(targets))))
    added = names(named) - names(report)
    assert added
    assert all(name.startswith(f"{tower}.") for name in added)


def test_a_tower_can_be_named_by_an_override() -> None:
    weights = WeightConfig(num_bits=8, strategy="channel")
    report = prepare(
        gemma3(), QuantConfig.preset("int4", group_size=16, overrides={"re:model.vision_tower.*": weights})
    )
    assert {entry.treatment for entry in report.quantized if "vision_tower" in entry.name} == {"int8 channel"}
    assert not any("multi_modal_projector" in name for name in names(report))


def test_a_pattern_that_also_means_other_layers_does_not_name_a_tower() -> None:
    report = prepare(gemma3(), QuantConfig.preset("int4", group_size=16, targets=("re:.*q_proj",)))
    assert all("language_model" in name for name in names(report))


def test_layers_that_never_run_are_left_alone() -> None:
    sizes = {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "decoder_layers": 2, "d_model": 64}
    model = tiny_model("bart", decoder_attention_heads=4, **sizes)  # a decoder without an encoder
    report = prepare(model, CONFIG)
    assert not any("encoder_attn" in name for name in names(report))
    assert any("fc1" in name for name in names(report))


class Sparse(nn.Module):
    """Sends all tokens to its first expert, and calls one of its two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(WIDE, WIDE)}) for _ in range(2))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU()) for _ in range(3))
        self.experts[2] = nn.Linear(WIDE, WIDE)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.experts[0](self.blocks[0]["up"](hidden))


@pytest.mark.parametrize("on_meta", [False, True])
def test_a_layer_whose_output_goes_nowhere_is_left_alone(on_meta: bool) -> None:
    """BigBird's pooler runs, and the output head does not look at it; the head's own dense layer counts."""
    with torch.device("meta" if on_meta else "cpu"):
        model = tiny_model("big_bird", is_decoder=True, attention_type="original_full")
    audit = prepare(model, QuantConfig.preset("int4", group_size=16))
    assert "bert.pooler" not in {entry.name.removesuffix(".weight") for entry in audit.quantized}
    assert "cls.predictions.transform.dense.weight" in {entry.name for entry in audit.quantized}
    reasons = {entry.name: entry.reason for entry in audit.kept}
    assert reasons["bert.pooler.weight"] == "its output is part of no logit"


def test_an_expert_that_gets_no_token_is_an_expert_all_the_same() -> None:
    report = prepare(Toy(Sparse()), CONFIG)
    assert names(report) == {"inner.blocks.0.up", "inner.experts.0.0", "inner.experts.1.0"}


def test_without_a_forward_towers_are_told_by_their_classes() -> None:
    model = gemma3()
    trial = tried(model)
    assert not trial.failure
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = {name for name in unreached(model, trial, every) if "vision_tower" in name}
    trial.failure = "no forward"
    assert {name for name in unreached(model, trial, every) if "vision_tower" in name} == wanted


def test_a_tiny_forward_changes_nothing() -> None:
    model = tiny_model("mixtral", **MIXTURES["mixtral"]).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    assert not tried(model).failure
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_weight_says_how_it_is_laid_out_in_every_state() -> None:
    model = tiny_model("gpt2")
    plain = model.transformer.h[0].attn.c_attn.weight.shape
    prepare(model, CONFIG)
    assert model.transformer.h[0].attn.c_attn.weight.shape == plain
    convert(model)
    assert model.transformer.h[0].attn.c_attn.weight.shape == plain


def test_a_layer_by_itself_reads_as_its_master_weight() -> None:
    linear = nn.Linear(WIDE, NARROW)
    quantized = QuantLinear.from_linear(linear, LayerScheme(weights=CONFIG.weights).weights)
    assert quantized.weight is linear.weight


_MAMBA = {"state_size": 16, "time_step_rank": 16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_type", ["mamba", "deepseek_v32", "hy_v4"])
def test_models_whose_code_looks_at_weights_are_saved_as_they_are_trained(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    sparse = {**MIXTURES["deepseek_v32"], "num_hidden_layers": 4}
    if model_type == "hy_v4":
        del sparse["first_k_dense_replace"]
    model = tiny_model(model_type, **(_MAMBA if model_type == "mamba" else sparse))
    prepare(model, CONFIG)
    save(model, tmp_path / "out", dtype=dtype, probe=ids(4, 48))  # proved


@pytest.mark.parametrize("bias", [None, torch.arange(5.0)])
def test_a_product_with_a_stand_in_is_what_torch_makes_of_it(bias: Tensor | None) -> None:
    x, weight = torch.randn(2, 3, 7), torch.tensor(0.01).expand(5, 7)
    assert _has_stand_in((x, weight))
    assert not _has_stand_in((x, weight.clone()))
    torch.testing.assert_close(_stand_in_product(x, weight, bias), F.linear(x, weight, bias))

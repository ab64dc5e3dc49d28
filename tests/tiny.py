"""Tiny random models and a tokenizer, made on the spot: what the tests train, pack and load."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmqat.layers import PRESETS, ActivationQuantizer, StateQuantizer

VOCAB_SIZE = 384
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Rotary settings of Llama 3's kind."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_llama(tied: bool = True, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Returns a random two-layer Llama in float32, evaluation mode."""
    torch.manual_seed(seed)
    return _sharpened(LlamaForCausalLM(LlamaConfig(**{**_SHAPE, "tie_word_embeddings": tied, **changes})))


def tiny_qwen2(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Returns a random two-layer Qwen2 (biases on q, k, v) in float32, evaluation mode."""
    torch.manual_seed(seed)
    shape = {key: value for key, value in _SHAPE.items() if key != "head_dim"}
    model = Qwen2ForCausalLM(Qwen2Config(**{**shape, "tie_word_embeddings": False, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return _sharpened(model)


def tiny_qwen3(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Returns a random two-layer Qwen3 (norms on q and k) in float32, evaluation mode."""
    torch.manual_seed(seed)
    return _sharpened(Qwen3ForCausalLM(Qwen3Config(**{**_SHAPE, "tie_word_embeddings": True, **changes})))


def tiny_mixtral(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Returns a random two-layer Mixtral (four stacked experts a layer) in float32, evaluation mode."""
    return tiny_model("mixtral", seed, num_local_experts=4, num_experts_per_tok=2, **changes)


def tiny_gpt2(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Returns a random two-layer GPT-2 (Conv1D layers) in float32, evaluation mode."""
    return tiny_model("gpt2", seed, **changes)


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Returns a random two-layer causal language model of any architecture in float32, evaluation mode."""
    torch.manual_seed(seed)
    known = AutoConfig.for_model(model_type)
    shape = {key: value for key, value in _SHAPE.items() if hasattr(known, key)}
    if model_type == "falcon":  # its head size is computed
        del shape["head_dim"]
    return _sharpened(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**shape, **changes})))


def _sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Enlarges the initial weights, so that outputs depend on the input visibly."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer of 384 entries with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    vocabulary |= {f"<unused{i}>": len(vocabulary) + i for i in range(VOCAB_SIZE - len(vocabulary))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


_LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_NEOX = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_OPT = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")

ARCHITECTURES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "granite", "smollm3"),
        ("model.layers", _LLAMA + _GATED, {}),
    ),
    "phi3": ("model.layers", ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"), {}),
    "gpt2": ("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), {}),
    "gpt_neox": ("gpt_neox.layers", ("attention.query_key_value", "attention.dense", *_NEOX), {}),
    "opt": ("model.decoder.layers", _OPT, {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "falcon": ("transformer.h", ("self_attention.query_key_value", "self_attention.dense", *_NEOX), {}),
    "bloom": ("transformer.h", ("self_attention.query_key_value", "self_attention.dense", *_NEOX), {}),
    "mixtral": ("model.layers", _LLAMA + _EXPERTS, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "model.layers",
        _LLAMA + _EXPERTS,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    ),
    "olmoe": ("model.layers", _LLAMA + _EXPERTS, {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "model.layers",
        _LLAMA + _EXPERTS,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
}
"""Model type -> where its layers are, the linear maps in each, and what a tiny configuration of it needs."""


def tiny_architecture(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Returns a tiny random model of a type in `ARCHITECTURES`."""
    return tiny_model(model_type, seed, **{**ARCHITECTURES[model_type][2], **changes})


def linear_names(model_type: str, layers: int = 2) -> set[str]:
    """Returns the names of all linear maps in the transformer layers of `tiny_architecture(model_type)`."""
    path, maps, _ = ARCHITECTURES[model_type]
    return {f"{path}.{index}.{name}" for index in range(layers) for name in maps}


_TEXT = {key: value for key, value in _SHAPE.items() if key != "max_position_embeddings"}
_VISION = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_SPECIALS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_SEQ2SEQ = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
_IMAGES = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
_QWEN_TEXT = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "hidden_size": 64, "patch_size": 14}

CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": (
        "llava",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "intermediate_size": 128},
            "image_token_index": 300,
        },
    ),
    "qwen2_vl": (
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {"text_config": _QWEN_TEXT, "vision_config": {**_QWEN_VISION, "embed_dim": 64}, **_IMAGES},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": _QWEN_TEXT,
            "vision_config": {**_QWEN_VISION, "out_hidden_size": 64, "intermediate_size": 128},
            **_IMAGES,
        },
    ),
    "gemma3": (
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_TEXT, "sliding_window": 16},
            "vision_config": {**_VISION, "intermediate_size": 128, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": 300,
        },
    ),
    "gemma4": (
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {
                **_TEXT,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                "global_head_dim": 32,
                "hidden_size_per_layer_input": 32,
                "vocab_size_per_layer_input": VOCAB_SIZE,
            },
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "patch_size": 4,
                "position_embedding_size": 64,
                "pooling_kernel_size": 2,
            },
            "image_token_id": 300,
            "video_token_id": 301,
            "audio_token_id": 302,
            "boi_token_id": 303,
            "eoi_token_id": 304,
        },
    ),
    "t5": (
        "t5",
        "T5ForConditionalGeneration",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 1,
            **_SPECIALS,
        },
    ),
    "bart": (
        "bart",
        "BartForConditionalGeneration",
        {"max_position_embeddings": 256, **_SPECIALS, **_SEQ2SEQ, **_HEADS},
    ),
    "whisper": (
        "whisper",
        "WhisperForConditionalGeneration",
        {
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 64,
            "decoder_start_token_id": 2,
            **_SPECIALS,
            **_SEQ2SEQ,
            **_HEADS,
        },
    ),
}
"""Name -> model type, class, and a tiny configuration, of models that AutoModelForCausalLM is not made for."""


def tiny_of_class(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Returns a tiny random model of a class in `CLASSES`, in float32 and evaluation mode."""
    torch.manual_seed(seed)
    model_type, kind, shape = CLASSES[name]
    return _sharpened(getattr(transformers, kind)(AutoConfig.for_model(model_type, **{**shape, **changes})))


def regrouped(preset: str, size: int) -> dict[str, Any]:
    """Changes of a preset for groups of `size`, which fit the tiny models; none where its groups are fixed."""
    weights = PRESETS[preset]["weights"]
    own = weights["strategy"] == "channel" or weights.get("scale_dtype", "bfloat16") != "bfloat16"
    return {} if own else {"group_size": size}


def with_ranges(model: PreTrainedModel, number: float = 0.1) -> PreTrainedModel:
    """Gives `model` some calibrated input ranges, where it is to have any."""
    for module in model.modules():
        if isinstance(module, ActivationQuantizer) and module.config.calibrated:
            (module.scale if module.global_scale is None else module.global_scale).fill_(number)
        elif isinstance(module, StateQuantizer) and module.scale is not None:
            module.scale.copy_(torch.arange(1, len(module.scale) + 1).view(module.scale.shape) / 256)
    return model

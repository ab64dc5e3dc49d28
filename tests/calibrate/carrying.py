"""Tiny models whose blocks hand each other more than hidden states, masks and positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TEXT: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_GEMMA: dict[str, Any] = {
    **TEXT,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 384,
    "num_kv_shared_layers": 2,
}
_LATENT: dict[str, Any] = {
    **TEXT,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 4,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CARRYING: dict[str, dict[str, Any]] = {
    "gemma4_text": {**_GEMMA, "global_head_dim": 16},  # inputs for each layer, a dictionary of keys and values
    "gemma3n_text": {**_GEMMA, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2, "laurel_rank": 16},
    "hy_v4": _LATENT,  # parameters in float32, lists that blocks write to
    "xlnet": {"vocab_size": 384, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},  # [L, N, D], two streams
    "xlm": {"vocab_size": 384, "emb_dim": 64, "n_layers": 2, "n_heads": 4},  # lists of attentions and of MLPs in turn
    "ctrl": {"vocab_size": 384, "n_embd": 64, "dff": 128, "n_layer": 2, "n_head": 4, "n_positions": 64},  # not named
}
"""Model types whose blocks get more than masks and positions, and what a tiny configuration of them needs."""


def carrying(model_type: str) -> PreTrainedModel:
    """Returns a random model of a type in `CARRYING` in float32, evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **CARRYING[model_type]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()

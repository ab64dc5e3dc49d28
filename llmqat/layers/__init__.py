"""The modules that hold quantized weights, the functions that put them into a model, and the coverage audit.

config.py      schemes, in compressed-tensors' words
prepare.py     prepare and convert: start here
audit.py       what is quantized, and why the rest is not

quantized.py   QuantModule: a fake-quantized weight
linear.py      QuantLinear
embedding.py   embeddings and the output head tied to them
experts.py     stacked weights of experts
activation.py  fake quantization of a linear layer's input
attention.py   keys and values, in training
cache.py       keys and values, in generation
packed.py      PackedModule: a weight as packed codes
lora.py        peft's LoRA inside the quantizer (not imported here: importing peft takes seconds)

originals.py   refuses models that are quantized already or incomplete
finite.py      refuses NaN, infinity, and scales that the checkpoint would round
roles.py       finds routers, image towers and experts by watching a tiny forward pass
probe.py       inputs for a tiny forward pass
source.py      whether weights are still those of the original model
buffers.py     buffers that no checkpoint holds, with the values that a loaded model has
kept.py        tensors that keep their dtype when a model is cast

reuse.py       one quantized weight for all micro-batches of an optimizer step
causal.py      fast CPU attention for short sequences
decoding.py    fast attention and fewer guards for one new token
shared.py      one matrix product for q, k and v
"""

from llmqat.layers.activation import ActivationQuantizer
from llmqat.layers.attention import (
    KVQuantizer,
    StateQuantizer,
    attention_layers,
    kv_heads,
    model_kind,
    quantize_kv,
)
from llmqat.layers.audit import AuditEntry, CoverageAudit, audit, lattice_note, stored_bytes
from llmqat.layers.cache import QuantizedCache, kv_scheme, new_cache
from llmqat.layers.causal import short_attention
from llmqat.layers.config import (
    PRESETS,
    ActivationConfig,
    KVCacheConfig,
    KVTensorConfig,
    LayerScheme,
    Override,
    QuantConfig,
    WeightConfig,
)
from llmqat.layers.decoding import decode_in_groups, is_checked
from llmqat.layers.embedding import PackedEmbedding, QuantEmbedding, TiedHead
from llmqat.layers.experts import PackedExperts, QuantExperts
from llmqat.layers.finite import check_held, check_packable, check_parameters
from llmqat.layers.kept import RangedModule
from llmqat.layers.linear import QuantLinear
from llmqat.layers.originals import DEQUANTIZED_FROM
from llmqat.layers.packed import PackedLinear, PackedModule, dequantized_once, keep_dequantized
from llmqat.layers.prepare import (
    LinearMap,
    changed_since_prepared,
    check_merged,
    convert,
    install,
    kept_in_float32,
    linear_maps,
    packed_form,
    plain_name,
    prepare,
    quantizer_state,
    untied_keys,
)
from llmqat.layers.quantized import (
    QUANTIZER_PARAMETERS,
    QuantModule,
    at_least_bits,
    quantized_once,
    quantizers_off,
    reused_in_step,
    without_adapter,
    without_adapters,
)
from llmqat.layers.shared import SIBLINGS, products, share_products
from llmqat.layers.source import note_moved

__all__ = [
    "DEQUANTIZED_FROM",
    "PRESETS",
    "QUANTIZER_PARAMETERS",
    "SIBLINGS",
    "ActivationConfig",
    "ActivationQuantizer",
    "AuditEntry",
    "CoverageAudit",
    "KVCacheConfig",
    "KVQuantizer",
    "KVTensorConfig",
    "LayerScheme",
    "LinearMap",
    "Override",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "PackedModule",
    "QuantConfig",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "QuantModule",
    "QuantizedCache",
    "RangedModule",
    "StateQuantizer",
    "TiedHead",
    "WeightConfig",
    "at_least_bits",
    "attention_layers",
    "audit",
    "changed_since_prepared",
    "check_held",
    "check_merged",
    "check_packable",
    "check_parameters",
    "convert",
    "decode_in_groups",
    "dequantized_once",
    "install",
    "is_checked",
    "keep_dequantized",
    "kept_in_float32",
    "kv_heads",
    "kv_scheme",
    "lattice_note",
    "linear_maps",
    "model_kind",
    "new_cache",
    "note_moved",
    "packed_form",
    "plain_name",
    "prepare",
    "products",
    "quantize_kv",
    "quantized_once",
    "quantizer_state",
    "quantizers_off",
    "reused_in_step",
    "share_products",
    "short_attention",
    "stored_bytes",
    "untied_keys",
    "without_adapter",
    "without_adapters",
]

"""Loading models, and the little that llmqat must know about their shapes.

specs.py      what a user calls a model, its configuration       gguf.py       GGUF files, dequantized once
loading.py    load_model: full precision, adapters merged        tokenizer.py  its tokenizer
weights.py    the files of a folder                              forward.py    hidden states, head and logits
casting.py    a forward in another dtype                          visits.py     blocks that come to the GPU in turn
"""

from __future__ import annotations

from llmqat.models.casting import cast_parameters, is_sharded
from llmqat.models.forward import (
    capture_hidden,
    head_weight,
    heads_of,
    keeps_documents_apart,
    logit_transform,
    loss_in_forward,
    model_device,
    output_head,
    uploaded,
    vocabulary_size,
)
from llmqat.models.gguf import cache_folder, gguf_folder
from llmqat.models.loading import (
    CALIBRATION_FILLED,
    check_few_bits,
    default_device,
    load_adapter_base,
    load_model,
    load_with_few_bits,
    name_of,
    to_accelerator,
)
from llmqat.models.specs import (
    ADAPTER_WEIGHTS_FILE,
    DEQUANTIZED,
    PACKAGE_PREFIX,
    adapter_base,
    check_can_be_rebuilt,
    check_full_precision,
    check_next_token,
    class_of,
    empty_model,
    is_dequantized_at_loading,
    model_file,
    plain_config,
    quantized_by,
    read_config,
    resolve_spec,
    token_model_class,
)
from llmqat.models.tokenizer import load_tokenizer
from llmqat.models.visits import let_blocks_visit, named_blocks, visited_device, visiting
from llmqat.models.weights import (
    check_safetensors,
    read_checked,
    save_checked,
    save_whole,
    shortened,
    weight_files,
    write_shards,
)

__all__ = [
    "ADAPTER_WEIGHTS_FILE",
    "CALIBRATION_FILLED",
    "DEQUANTIZED",
    "PACKAGE_PREFIX",
    "adapter_base",
    "cache_folder",
    "capture_hidden",
    "cast_parameters",
    "check_can_be_rebuilt",
    "check_few_bits",
    "check_full_precision",
    "check_next_token",
    "check_safetensors",
    "class_of",
    "default_device",
    "empty_model",
    "gguf_folder",
    "head_weight",
    "heads_of",
    "is_dequantized_at_loading",
    "is_sharded",
    "keeps_documents_apart",
    "let_blocks_visit",
    "load_adapter_base",
    "load_model",
    "load_tokenizer",
    "load_with_few_bits",
    "logit_transform",
    "loss_in_forward",
    "model_device",
    "model_file",
    "name_of",
    "named_blocks",
    "output_head",
    "plain_config",
    "quantized_by",
    "read_checked",
    "read_config",
    "resolve_spec",
    "save_checked",
    "save_whole",
    "shortened",
    "to_accelerator",
    "token_model_class",
    "uploaded",
    "visited_device",
    "visiting",
    "vocabulary_size",
    "weight_files",
    "write_shards",
]

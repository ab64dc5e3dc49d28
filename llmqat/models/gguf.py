"""GGUF files as models: dequantized once, and kept as bfloat16 safetensors in a cache folder.

SmolLM2-135M takes about 20 seconds the first time. The cache is `$LLMQAT_CACHE`, or else `llmqat` under
`$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmqat.extras import check_installed, require
from llmqat.files import folder_in_progress, give_usual_rights, rename_unless_there, write_whole
from llmqat.models.weights import check_loading_info
from llmqat.paths import user_path

logger = logging.getLogger(__name__)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Rotary scaling of Llama 3.1 to 3.3, of which a GGUF file holds the result."""
GGUF_READER = 3
"""Raised when the same GGUF file is to be dequantized to other files."""


def cache_folder() -> Path:
    """Returns where llmqat keeps what is dear to compute again; created by who writes to it."""
    if own := os.environ.get("LLMQAT_CACHE"):
        return user_path(own, "LLMQAT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return (user_path(base, "XDG_CACHE_HOME") if base else Path.home() / ".cache") / "llmqat"


def gguf_folder(path: Path) -> Path:
    """Returns a folder with the dequantized bfloat16 weights and the tokenizer of a GGUF file.

    The folder is named by the start of the file's SHA-256, `GGUF_READER` and the version of transformers. So a changed
    file or a fixed reader never gets old weights. The folder is written under a temporary name and renamed.

    Raises:
        ImportError: `gguf` is not installed.
        ValueError: The file is truncated, or of an architecture transformers does not read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file (it does not begin with 'GGUF'); download it again")
    digest = _sha256(path)
    folder = (
        cache_folder()
        / "gguf"
        / f"{digest[:20]}-{GGUF_READER}-transformers-{importlib.metadata.version('transformers')}"
    )
    if not folder.is_dir():
        _dequantize_gguf(path, folder)
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _dequantize_gguf(path: Path, folder: Path) -> None:
    check_installed("gguf", f"reading {path}")
    logger.info("dequantizing %s to %s; the next load takes it from there", path.name, folder)
    with folder_in_progress(folder) as temporary:
        _write_dequantized(path, temporary)
        rename_unless_there(temporary, folder)


def _write_dequantized(path: Path, folder: Path) -> None:
    options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    # Python 3.10 does not find out which distribution the module gguf is of, and transformers then parses "N/A".
    getattr(transformers.utils.import_utils, "PACKAGE_DISTRIBUTION_MAPPING", {}).setdefault("gguf", ["gguf"])
    # On a GPU, newer versions of transformers would otherwise leave the weights in their GGUF blocks.
    packed = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _has_gguf_config() else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.bfloat16, output_loading_info=True, **options, **packed
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except Exception as error:  # a parser that walks a broken file can fail in any way
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) could not be read as a GGUF model: {error!r}"
        ) from error
    check_loading_info(info, str(path))
    _take_unread_settings(path, model.config)
    # It calls itself quantized even now, and save_pretrained refuses it until that is undone.
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    give_usual_rights(folder)
    _drop_tokens_beyond(folder / "tokenizer.json", model.get_input_embeddings().weight.shape[0])


def _take_unread_settings(path: Path, config: Any) -> None:
    """Puts into `config` what the GGUF file says and transformers' reader leaves out: rotary scaling, soft-capping.

    Raises:
        ValueError: the file holds something that changes the forward and cannot be put there; names it.
    """
    reader = require("gguf", f"reading {path}").GGUFReader(path)
    said = {key.partition(".")[2]: field for key, field in reader.fields.items()}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if name in said and hasattr(config, name):
            setattr(config, name, float(said[name].contents()))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias")):
        if not getattr(config, name, True) and tensor in tensors:
            raise ValueError(f"{path} has biases ({tensor}), which transformers' reader of GGUF leaves out")
    rope = getattr(config, "rope_parameters", None)
    rope = rope.get("full_attention", rope) if isinstance(rope, dict) else None
    kind = said["rope.scaling.type"].contents() if "rope.scaling.type" in said else "none"
    if kind == "linear" and rope is not None:
        rope |= {"rope_type": "linear", "factor": float(said["rope.scaling.factor"].contents())}
    elif kind != "none":
        raise ValueError(
            f"{path} scales its rotary embedding by {kind!r}, which transformers' reader of GGUF leaves out"
        )
    if "rope.dimension_count" in said and rope is not None and "partial_rotary_factor" in rope:
        head = config.hidden_size // config.num_attention_heads
        rope["partial_rotary_factor"] = int(said["rope.dimension_count"].contents()) / head
    if "rope_freqs.weight" in tensors and rope is not None:
        factors = torch.tensor(tensors["rope_freqs.weight"].data)
        rope |= {**LLAMA3_ROPE, "factor": float(factors.max())}
        plain = 1 / rope["rope_theta"] ** (torch.arange(len(factors)) / len(factors))
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
        if not torch.allclose(plain / scaled, factors, rtol=1e-3):
            raise ValueError(f"{path} has rotary factors (rope_freqs.weight) that are not those of Llama 3.1 to 3.3")


def _drop_tokens_beyond(file: Path, rows: int) -> None:
    """Removes tokens that transformers adds when it reads a GGUF file (GPT-2's end of text), and no embedding has."""
    described = json.loads(file.read_text(encoding="utf-8"))
    kept = [token for token in described["added_tokens"] if token["id"] < rows]
    if len(kept) < len(described["added_tokens"]):
        write_whole(file, json.dumps({**described, "added_tokens": kept}, ensure_ascii=False))


def _has_gguf_config() -> bool:
    return hasattr(transformers, "GgufConfig")

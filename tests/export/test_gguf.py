"""GGUF read back by others' readers: gguf-py block by block, transformers as a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from llmqat import QuantConfig, load, prepare, save
from llmqat.export import gguf_tokenizer
from llmqat.export.gguf import write_gguf
from llmqat.layers import QuantLinear, QuantModule
from llmqat.models import cast_parameters
from tests.tiny import (
    LLAMA3,
    VOCAB_SIZE,
    tiny_architecture,
    tiny_llama,
    tiny_model,
    tiny_qwen2,
    tiny_qwen3,
    tiny_tokenizer,
)

# As models does where it reads GGUF files: Python 3.10 does not find out which distribution gguf is of.
getattr(transformers.utils.import_utils, "PACKAGE_DISTRIBUTION_MAPPING", {}).setdefault("gguf", ["gguf"])

MODELS = {
    "llama tied": tiny_llama,
    "llama untied": lambda: tiny_llama(tied=False),
    "qwen2": tiny_qwen2,
    "qwen3": lambda: tiny_qwen3(head_dim=128),  # transformers' reader takes no other head size for it
    # Its reader takes the default query_pre_attn_scalar of 256 for granted, which is the head size.
    "gemma2": lambda: tiny_architecture("gemma2", head_dim=256, sliding_window=8),
    "gemma3": lambda: tiny_architecture("gemma3_text", head_dim=256, sliding_window=8),
    "phi3": lambda: tiny_architecture("phi3"),
}


def prepared(model: PreTrainedModel, preset: str = "int4", **changes: Any) -> PreTrainedModel:
    prepare(model, QuantConfig.preset(preset, **changes))
    for module in model.modules():
        if isinstance(module, QuantModule):
            with torch.no_grad():
                module.log_scale.normal_(std=0.2)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(2, 258, (2, 16), generator=torch.Generator().manual_seed(4))
    with cast_parameters(model, torch.bfloat16):
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", ["int4", "int4 asym", "int3", "int8", "int2-seq"])
def test_transformers_reads_the_weights_bit_for_bit(name: str, preset: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {} if preset == "int8" else {"group_size": 32, "symmetric": "asym" not in preset}
    embeddings = {"embeddings": "int8", "lm_head": "int8"}
    model = prepared(MODELS[name](), preset.split()[0], **changes, **embeddings)
    sizes = write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf")
    assert sizes[{"int8": "Q8_0", "int4 asym": "Q4_1"}.get(preset, "Q4_0")] > 0
    assert "BF16" not in sizes  # nothing large is left
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.bfloat16)
    for layer, module in model.named_modules():
        if isinstance(module, QuantLinear):
            read = theirs.get_submodule(layer).weight
            assert torch.equal(read, module.quantized_weight(torch.bfloat16)), layer
    assert torch.equal(logits(theirs), logits(model))


def test_blocks_hold_the_codes_themselves(tmp_path: Path) -> None:
    model = prepared(tiny_qwen2(), group_size=64)
    write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layer = model.model.layers[1].mlp.down_proj
    blocks = tensors["blk.1.ffn_down.weight"].data.reshape(64, 4, 18)
    codes = layer.codes().reshape(64, 4, 32).numpy() + 8
    assert np.array_equal(blocks[..., 2:] & 15, codes[..., :16])
    assert np.array_equal(blocks[..., 2:] >> 4, codes[..., 16:])
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    assert np.array_equal(scales, layer.scale().repeat_interleave(2, dim=1).detach().half().numpy())
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.BF16


def test_a_packed_checkpoint_is_written_as_the_prepared_model_is(tmp_path: Path) -> None:
    model = prepared(tiny_llama(), group_size=32, embeddings="int8")
    write_gguf(model, tiny_tokenizer(), tmp_path / "prepared.gguf")
    save(model, tmp_path / "packed")
    write_gguf(load(tmp_path / "packed"), tiny_tokenizer(), tmp_path / "packed.gguf")
    assert (tmp_path / "prepared.gguf").read_bytes() == (tmp_path / "packed.gguf").read_bytes()


@pytest.mark.parametrize(
    ("make", "preset", "changes", "message"),
    [
        (tiny_llama, "int8", {"group_size": 32, "symmetric": False}, "zero points and 8 bits"),
        (tiny_llama, "w4a8", {"group_size": 32}, "quantized inputs"),
        (tiny_llama, "w4a8kv8", {"group_size": 32, "input_activations": None}, "quantized KV cache"),
        (tiny_llama, "int4", {"group_size": 16}, "scale for 16 weights"),
        (lambda: tiny_architecture("gpt2"), "int4", {"group_size": 32}, "model type 'gpt2'"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(make, preset, changes, message, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = prepared(make(), preset, **changes)
    with pytest.raises(ValueError, match=message):
        write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept_and_a_scale_is_never_rounded(tmp_path: Path) -> None:
    model = prepared(tiny_llama(), group_size=32)
    write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf")
    before = (tmp_path / "model.gguf").read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == before
    model.model.layers[0].mlp.up_proj.initial_scale.fill_(1e6)
    with pytest.raises(ValueError, match="float16 cannot hold"):
        write_gguf(model, tiny_tokenizer(), tmp_path / "other.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.real
def test_the_real_model_with_an_int8_embedding_goes_to_gguf_and_back(
    smollm2: tuple[PreTrainedModel, Any], tmp_path: Path
) -> None:
    original, tokenizer = smollm2
    model = copy.deepcopy(original).float()
    prepare(model, QuantConfig.preset("int4", group_size=64, embeddings="int8"))
    report = save(model, tmp_path / "packed", tokenizer)
    assert report.weight_bytes < 90_000_000
    ids = tokenizer("The capital of France is Paris, and", return_tensors="pt").input_ids
    with torch.no_grad():
        packed = load(tmp_path / "packed", kernel="reference")(ids).logits
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.bfloat16)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "The capital of France is Paris, and 12,345 é\n  are <|im_start|>."
    assert read(text).input_ids == tokenizer(text).input_ids
    assert read.chat_template == tokenizer.chat_template
    assert (read.bos_token_id, read.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, packed)


def test_a_tokenizer_that_cuts_text_in_an_unknown_way_is_refused() -> None:
    def described(regex: str) -> dict[str, Any]:
        steps = [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel"}]
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}

    known = {name: regex for regex, name in gguf_tokenizer._SPLITS.items()}
    assert gguf_tokenizer._pre_tokenizer(described(known["qwen2"])) == "qwen2"
    assert gguf_tokenizer._pre_tokenizer(described(known["llama-bpe"])) == "llama-bpe"
    with pytest.raises(ValueError, match=r"knows no name in llama\.cpp"):
        gguf_tokenizer._pre_tokenizer(described(r"[^\r\n\p{L}\p{N}]?\p{Lu}+|\p{N}"))


def fallback_tokenizer(prepends: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of the Llama 2 kind (a space before the text) or of the Gemma kind (none)."""
    characters = [chr(code) for code in range(97, 123)] + ["▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    # As SentencePiece's are converted: every way to halve a token, in the order of the tokens' scores.
    words = ["▁a", "th", "the", "▁the", "he", "▁th", "▁t"]
    halves = ((word[:at], word[at:]) for word in words for at in range(1, len(word)))
    merges = [pair for pair in halves if all(len(part) == 1 or part in words for part in pair)]
    tokens += dict.fromkeys("".join(merge) for merge in merges)
    model = tokenizers.models.BPE(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    replace = tokenizers.normalizers.Replace(" ", "▁")
    steps = [tokenizers.normalizers.Prepend("▁"), replace] if prepends else [replace]
    tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template="{{ x }}"
    )


@pytest.mark.parametrize("prepends", [True, False], ids=["llama 2", "gemma"])
def test_a_tokenizer_with_byte_fallback_is_read_back_by_transformers(prepends: bool, tmp_path: Path) -> None:
    tokenizer = fallback_tokenizer(prepends)
    write_gguf(prepared(tiny_llama(), group_size=32), tokenizer, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert bytes(fields["tokenizer.ggml.model"].parts[-1]) == b"llama"
    assert bool(fields["tokenizer.ggml.add_space_prefix"].parts[-1][0]) == prepends
    kinds = [int(fields["tokenizer.ggml.token_type"].parts[index][0]) for index in range(-VOCAB_SIZE, 0)]
    assert kinds[:4] == [2, 3, 3, 6]
    assert kinds[-1] == 5  # beyond the tokenizer's end
    scores = fields["tokenizer.ggml.scores"]
    by_token = {
        str(bytes(fields["tokenizer.ggml.tokens"].parts[left]), "utf-8"): float(scores.parts[right][0])
        for left, right in zip(fields["tokenizer.ggml.tokens"].data, scores.data, strict=True)
    }
    assert by_token["▁a"] > by_token["th"] > by_token["the"] > by_token["▁the"] > by_token["he"] > by_token["a"]
    if prepends:
        read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        text = "the heat a thé"
        assert read(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2", "query_pre_attn_scalar": 32}, "query_pre_attn_scalar=32 is not head_dim=16"),
        (
            {"model_type": "gemma2", "query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 2},
            "one full attention in 2",
        ),
        (
            {"model_type": "mistral", "sliding_window": 8},
            r"sliding_window=8\) of mistral .*max_position_embeddings = 8",
        ),
        ({"model_type": "phi3", "sliding_window": 8}, r"sliding_window=8\) of phi3"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = prepared(tiny_architecture(**changes), group_size=32)
    with pytest.raises(ValueError, match=message):
        write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_window_as_long_as_all_texts_changes_nothing_and_is_written(tmp_path: Path) -> None:
    model = prepared(tiny_architecture("mistral", sliding_window=8), group_size=32)
    model.config.max_position_embeddings = 8  # the way out that the refusal names
    write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["llama.context_length"].contents() == 8


@pytest.mark.parametrize(("model_type", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_scale_of_the_largest_gemmas_is_told_by_their_number_of_layers(
    model_type: str, layers: int, tmp_path: Path
) -> None:
    """llama.cpp takes hidden_size / num_attention_heads there, and the head size elsewhere; no key says it."""
    for scale, message in ((16, "query_pre_attn_scalar=16 is not hidden_size"), (32, None)):
        changes = {"hidden_size": 128, "num_hidden_layers": layers, "query_pre_attn_scalar": scale}
        model = prepared(tiny_architecture(model_type, **changes), "int8", strategy="group", group_size=32)
        if message is None:
            write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf")
            continue
        with pytest.raises(ValueError, match=message):
            write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf")


def test_a_model_without_quantized_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no quantized weight"):
        write_gguf(tiny_llama(), tiny_tokenizer(), tmp_path / "model.gguf")


@pytest.mark.parametrize("symmetric", [True, False], ids=["Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", [*MODELS, "gemma", "llama 3's rotary"])
def test_llama_cpp_computes_the_same(name: str, symmetric: bool, tmp_path: Path) -> None:
    """Runs where llama-cpp-python is installed; `make` does not, as it takes minutes to compile."""
    llama_cpp = pytest.importorskip("llama_cpp")
    others = {"gemma": lambda: tiny_model("gemma"), "llama 3's rotary": lambda: tiny_llama(rope_parameters=LLAMA3)}
    model = prepared((MODELS | others)[name](), group_size=32, symmetric=symmetric, embeddings="int8")
    tokenizer = fallback_tokenizer(prepends=True)
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    ids = torch.randint(3, 258, (1, 40), generator=torch.Generator().manual_seed(4))
    theirs.eval(ids[0].tolist())
    with torch.no_grad(), cast_parameters(model, torch.bfloat16):
        ours = model(ids).logits[0].float().numpy()
    # Its kernels round activations to 8 bits: about a hundredth of the logits' range.
    assert np.abs(np.array(theirs.scores[:40]) - ours).max() < 0.025 * (ours.max() - ours.min())
    text = "the heat a thé"
    assert theirs.tokenize(text.encode(), add_bos=False) == tokenizer(text, add_special_tokens=False).input_ids

"""The tokenizer in a GGUF file: flags, kinds, special tokens and templates are what the tokenizer does."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from llmqat import QuantConfig, prepare
from llmqat.export.gguf import write_gguf
from llmqat.export.gguf_tokenizer import _SPLITS
from tests.export.test_gguf import fallback_tokenizer
from tests.tiny import CHAT_TEMPLATE, VOCAB_SIZE, tiny_llama, tiny_tokenizer

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUTS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), BYTES])
        for regex, name in _SPLITS.items()
    },
}
"""llama.cpp's names of how text is cut -> the same in tokenizers."""
TEXT = "Some rivers, 12345 of them, don't run\n\n  to the sea: <|im_start|>they're 1,024 km long.\t"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = tiny_llama()
    prepare(made, QuantConfig.preset("int4", group_size=32))
    return made


def trained(cut: str, **changes: Any) -> PreTrainedTokenizerFast:
    """A tokenizer over bytes with merges of its own."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=cut == "llama-bpe"))
    made.pre_tokenizer, made.decoder = CUTS[cut], decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=370, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator([TEXT * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **changes)


def written(model: PreTrainedModel, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """The keys of the tokenizer in a GGUF file."""
    write_gguf(model, tokenizer, folder / "model.gguf")
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    start = "tokenizer."
    return {key.removeprefix(start): field.contents() for key, field in fields.items() if key.startswith(start)}


def processed(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer with a template of special tokens around a text."""
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<unused0>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "begins", "ends"),
    [("$A", 0, 0), ("<s> $A", 1, 0), ("$A </s>", 0, 1), ("<s> $A </s>", 1, 1)],
)
def test_flags_are_what_the_tokenizer_adds_to_a_text(
    template: str, begins: int, ends: int, model: PreTrainedModel, tmp_path: Path
) -> None:
    keys = written(model, processed(tiny_tokenizer(), template), tmp_path)
    assert (keys["ggml.add_bos_token"], keys["ggml.add_eos_token"]) == (begins, ends)


@pytest.mark.parametrize("template", ["<unused0> $A", "$A <unused0>", "<s> <s> $A", "</s> $A <s>"])
def test_what_else_is_added_to_a_text_is_refused(template: str, model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"makes \[.*\] of 'a'"):
        written(model, processed(tiny_tokenizer(), template), tmp_path)
    assert not list(tmp_path.iterdir())


def test_added_tokens_have_the_kind_that_they_are_and_free_rows_are_unused(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    tokenizer = trained("smollm", unk_token="<|im_start|>")
    tokenizer.add_tokens([AddedToken("[PAD383]"), AddedToken("<tool>", special=True)])
    kinds = written(model, tokenizer, tmp_path)
    tokens = dict(zip(kinds["ggml.tokens"], kinds["ggml.token_type"], strict=True))
    assert len(tokens) == VOCAB_SIZE  # no name twice
    wanted = {"<s>": 3, "</s>": 3, "[PAD383]": 4, "<tool>": 3, "a": 1, "[PAD380]": 5}
    assert {token: tokens[token] for token in wanted} == wanted
    assert kinds["ggml.unknown_token_id"] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_templates_of_any_number_keep_their_names(model: PreTrainedModel, tmp_path: Path) -> None:
    names = {"default": CHAT_TEMPLATE, "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    for number, templates in enumerate((None, CHAT_TEMPLATE, names, {"rag": "{{ documents }}"})):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = templates
        (folder := tmp_path / str(number)).mkdir()
        keys = written(model, tokenizer, folder)
        by_name = templates if isinstance(templates, dict) else {"default": templates}
        assert keys.get("chat_template") == by_name.get("default")
        others = {name: text for name, text in by_name.items() if name != "default"}
        assert {name: keys[f"chat_template.{name}"] for name in others} == others
        assert set(keys.get("chat_templates", [])) == set(others)


def test_all_tokens_that_end_a_generation_are_told(
    model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = [7, 1, 8, 9]
    tokenizer = tiny_tokenizer()
    with caplog.at_level(logging.WARNING, logger="llmqat"):
        keys = written(model, tokenizer, tmp_path)
    assert [keys[f"ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [1, 7, 8]
    assert f"not told of {tokenizer.convert_ids_to_tokens(9)}" in caplog.text


@pytest.mark.parametrize("cut", CUTS)
def test_the_name_of_how_text_is_cut_is_told_by_its_rules(cut: str, model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = trained(cut)
    assert written(model, tokenizer, tmp_path)["ggml.pre"] == cut
    if cut == "smollm":
        read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        assert read("the sea").input_ids == tokenizer("the sea").input_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "a space before each text"),
        ({"pre_tokenizer": BYTES}, "ByteLevel\\(use_regex=False\\)"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "cuts text by"),
        ({"normalizer": normalizers.Lowercase()}, "normalizes text by Lowercase"),
        ({"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.NFKC()])}, "normalizes text by NFKC"),
    ],
)
def test_rules_that_llama_cpp_has_no_name_for_are_refused(
    change: dict[str, Any], message: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    for name, value in change.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    with pytest.raises(ValueError, match=message):
        written(model, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_words_taken_whole_are_refused_where_llama_cpp_merges_them(model: PreTrainedModel, tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={**trained("smollm").backend_tokenizer.get_vocab(), "river": 371}, merges=[], ignore_merges=True
        )
    )
    made.pre_tokenizer = CUTS["gpt-2"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match="ignore_merges=True"):
        written(model, tokenizer, tmp_path)


@pytest.mark.parametrize("scheme", ["always", "never", "first"])
def test_the_space_before_a_text_is_what_metaspace_does(
    scheme: str, model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = fallback_tokenizer(prepends=False)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    with caplog.at_level(logging.WARNING, logger="llmqat"):
        assert written(model, tokenizer, tmp_path)["ggml.add_space_prefix"] == (scheme != "never")
    assert ("after each special token too" in " ".join(caplog.text.split())) == (scheme == "first")


def test_spaces_written_in_another_way_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = fallback_tokenizer(prepends=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "b")
    with pytest.raises(ValueError, match="changes text by"):
        written(model, tokenizer, tmp_path)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("template", ["$A", "<s> $A </s>"])
def test_llama_cpp_makes_the_same_tokens(cut: str, template: str, model: PreTrainedModel, tmp_path: Path) -> None:
    """Runs where llama-cpp-python is installed; `make` does not, as it takes minutes to compile."""
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = trained(cut)
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    tokenizer.add_tokens([AddedToken("rivers"), AddedToken("<tool>", special=True)])
    written(model, tokenizer, tmp_path)
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, verbose=False, n_threads=1)
    for text in (TEXT, "<tool>the rivers 2024<|im_start|>", "Über  naïve 東京 🙂\r\n"):
        assert theirs.tokenize(text.encode(), special=True) == tokenizer(text).input_ids

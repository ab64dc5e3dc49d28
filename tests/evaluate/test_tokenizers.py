from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmqat.evaluate import tokenizers as judged
from llmqat.evaluate.perplexity import TokenWindows, windows_from_text
from llmqat.evaluate.protocols import text_windows
from llmqat.evaluate.tokenizers import (
    PROBES,
    own_tokenizer,
    reading_difference,
    shared_tokenizer,
    vocabulary_difference,
    works_alike,
)
from tests.tiny import CHAT_TEMPLATE, tiny_llama, tiny_model, tiny_tokenizer

TEXT = "Sentence 1 tells of A RIVER, and of 日本. " * 12


def shifted() -> PreTrainedTokenizerFast:
    """The letters have the ids of other letters."""
    tokenizer = tiny_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    letters = [token for token in vocabulary if len(token) == 1]
    ids = [vocabulary[letter] for letter in letters]
    vocabulary.update(zip(letters, ids[7:] + ids[:7], strict=True))
    return rebuilt(json.dumps(described))


def rebuilt(described: str, **changes: Any) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **changes}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(described), **specials)


def renamed(old: str, new: str) -> PreTrainedTokenizerFast:
    return rebuilt(tiny_tokenizer().backend_tokenizer.to_str().replace(old, new))


def changed(change: Callable[[Any], None]) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    change(tokenizer.backend_tokenizer)
    return tokenizer


def lower(backend: Any) -> None:
    backend.normalizer = normalizers.Lowercase()


def prefix_space(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def opening(backend: Any) -> None:
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])


def swapped() -> PreTrainedTokenizerFast:
    text = tiny_tokenizer().backend_tokenizer.to_str()
    return rebuilt(text.replace("<s>", "<x>").replace("</s>", "<s>").replace("<x>", "</s>"))


def reserved(name: str) -> PreTrainedTokenizerFast:
    tokenizer = renamed("<unused3>", name)
    tokenizer.add_tokens([AddedToken(name, special=True)])
    return tokenizer


def with_more() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    return tokenizer


def padded() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.chat_template = "<s>", "left", "{{ x }}"
    return tokenizer


REFUSED: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "other ids": shifted,
    "other special ids": swapped,
    "another word at an id": lambda: renamed("<unused9>", "<other9>"),
    "another normalizer": lambda: changed(lower),
    "another cut": lambda: changed(prefix_space),
    "a BOS token": lambda: changed(opening),
}
SAID: dict[str, Callable[[], PreTrainedTokenizerFast]] = {"more tokens": with_more}
TAKEN: dict[str, Callable[[], PreTrainedTokenizerFast]] = {"the same": tiny_tokenizer, "another padding": padded}


def windows_of(tokenizer: Any) -> dict[str, TokenWindows]:
    return {"text.txt": windows_from_text(TEXT, tokenizer, 32)}


@pytest.fixture
def tokenizers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is beside each model, by its spec."""
    beside: dict[str, Any] = {"reference": tiny_tokenizer()}
    monkeypatch.setattr(judged, "own_tokenizer", lambda spec: beside[spec])
    return beside


@pytest.mark.parametrize("name", REFUSED)
def test_models_of_another_tokenizer_are_refused(name: str, tokenizers: dict[str, Any]):
    tokenizers["model"] = REFUSED[name]()
    with pytest.raises(ValueError, match=r"model has another tokenizer than reference: .*word perplexity"):
        shared_tokenizer({"reference": "reference", "model": "model"}, windows_of)
    with pytest.raises(ValueError, match="reference has another tokenizer than model"):
        shared_tokenizer({"model": "model", "reference": "reference"}, windows_of)


@pytest.mark.parametrize("name", SAID | TAKEN)
def test_models_of_nearly_the_same_tokenizer_are_compared(name: str, tokenizers: dict[str, Any]):
    tokenizers["model"] = {**SAID, **TAKEN}[name]()
    shared = shared_tokenizer({"reference": "reference", "model": "model"}, windows_of)
    assert shared.tokenizer is tokenizers["reference"]
    assert list(shared.notes) == (["model"] if name in SAID else [])


def test_a_renamed_added_token_is_said(tokenizers: dict[str, Any]):
    tokenizers |= {"reference": reserved("<|reserved|>"), "model": reserved("<|im_start|>")}
    (note,) = shared_tokenizer({"a": "reference", "b": "model"}, windows_of).notes["b"]
    assert "b has nearly the tokenizer of a: added tokens have other names" in note
    assert "'<|im_start|>', there '<|reserved|>'" in note


def test_a_model_without_a_tokenizer_is_judged_on_the_tokens_of_another(tokenizers: dict[str, Any]):
    tokenizers["bare"] = None
    shared = shared_tokenizer({"bare": "bare", "reference": "reference"}, windows_of)
    assert shared.tokenizer is tokenizers["reference"]
    assert shared.notes == {"bare": ("bare has no tokenizer beside it: it is judged on the tokens of reference.",)}
    with pytest.raises(ValueError, match="there is no tokenizer beside bare"):
        shared_tokenizer({"bare": "bare"}, windows_of)


def test_a_gguf_file_that_cuts_text_otherwise_is_said(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judged, "is_gguf", lambda spec: spec == "file")
    tokenizers["file"] = changed(prefix_space)
    for order in (["file", "reference"], ["reference", "file"]):
        shared = shared_tokenizer({name: name for name in order}, windows_of)
        assert shared.tokenizer is tokenizers["reference"]
        assert "token 0 of text.txt is ' ', there 'S'" in shared.notes["file"][0]
    tokenizers["file"] = shifted()
    with pytest.raises(ValueError, match="file has another tokenizer"):
        shared_tokenizer({"reference": "reference", "file": "file"}, windows_of)


@pytest.mark.parametrize("name", ["another normalizer", "another cut", "a BOS token"])
def test_probes_show_how_a_tokenizer_reads(name: str):
    own, other = tiny_tokenizer(), REFUSED[name]()
    assert not works_alike(own, other)
    assert vocabulary_difference(own, other) == ("", "")
    assert reading_difference(own, other)
    assert not reading_difference(own, tiny_tokenizer())
    assert len(PROBES) > 2


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_folder_without_a_tokenizer_has_none(model_type: str, tmp_path: Path):
    (tiny_llama() if model_type == "llama" else tiny_model(model_type)).save_pretrained(tmp_path)
    assert own_tokenizer(str(tmp_path)) is None
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(own_tokenizer(str(tmp_path))) == 384


def test_conversations_are_scored_where_templates_write_them_alike(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    templates = {"first": CHAT_TEMPLATE, "other": CHAT_TEMPLATE.replace("<", "["), "none": None}
    for name, template in templates.items():
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        tiny_llama().config.save_pretrained(tmp_path / name)
    models = {name: str(tmp_path / name) for name in templates}

    def windows_of(tokenizer: Any) -> dict[str, TokenWindows]:
        return {"chats": text_windows("windows", str(chats), tokenizer, window=64)}

    shared = shared_tokenizer({name: models[name] for name in ("first", "none")}, windows_of)
    assert shared.notes == {"none": ("none has no chat template: it is judged on conversations as first writes them.",)}
    with pytest.raises(ValueError, match=r"other has another chat template than first.*token 0 of chats is '\['"):
        shared_tokenizer({name: models[name] for name in ("first", "other")}, windows_of)


def test_it_is_said_whose_chat_template_writes_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = {name: tiny_tokenizer() for name in ("plain", "chat", "same", "other")}
    tokenizers["plain"].chat_template = None
    for name, template in {"chat": CHAT_TEMPLATE, "same": CHAT_TEMPLATE, "other": "{{ messages }}"}.items():
        tokenizers[name].chat_template = template
    monkeypatch.setattr("llmqat.evaluate.tokenizers.own_tokenizer", tokenizers.get)

    def said(*names: str, prompted: bool = True) -> Mapping[str, tuple[str, ...]]:
        return shared_tokenizer({name: name for name in names}, lambda _: {}, prompted=prompted).notes

    assert said("chat", "plain", "same", "other") == {
        "plain": ("plain has no chat template: it is asked with that of chat.",),
        "other": ("other has another chat template: it is asked with that of chat.",),
    }
    assert said("plain", "chat") == {"chat": ("chat has a chat template: it is asked without, as plain has none.",)}
    assert said("chat", "plain", prompted=False) == {}

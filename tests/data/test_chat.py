"""Conversations: whose words are labels, by the template's markers and without them, in every format of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmqat.data import DataConfig, TokenBlocks, chat, load_blocks
from llmqat.data.chat import Chat, encode_chat
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

MARKED = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (  # as templates that drop earlier reasoning
    "{% for message in messages %}<{{ message['role'] }}>"
    "{{ message['content'] if loop.last or message['role'] != 'assistant' else 'gone' }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello naïve"},
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": "me"},
]


def scored_text(ids: list[int], scored: list[int]) -> str:
    return tiny_tokenizer().decode([token for token, mark in zip(ids, scored, strict=True) if mark])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED], ids=["prefixes", "markers"])
def test_the_assistants_words_alone_are_labels(template: str):
    ids, scored = encode_chat(Chat(MESSAGES, "row 0", template=template), tiny_tokenizer())
    assert scored_text(ids, scored) == "hello naïveme"
    assert tiny_tokenizer().decode(ids).startswith("<system>be kind\n<user>hi\n<assistant>hello naïve\n<user>")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED], ids=["prefixes", "markers"])
def test_answers_within_the_prompt_do_not_count(template: str):
    ids, scored = encode_chat(Chat(MESSAGES, "row 0", answers_from=3, template=template), tiny_tokenizer())
    assert scored_text(ids, scored) == "me"


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (MESSAGES, FORGETFUL, r"row 0: the chat template has no \{% generation %\} markers, and renders message 2 "),
        (MESSAGES[2:], CHAT_TEMPLATE, "row 0 begins with the assistant"),
        (MESSAGES, MARKED.replace("== 'assistant'", "== 'nobody'"), "row 0: the chat template marks no token"),
    ],
)
def test_what_cannot_be_told_is_refused(messages: list[dict[str, str]], template: str, message: str):
    with pytest.raises(ValueError, match=message):
        encode_chat(Chat(messages, "row 0", template=template), tiny_tokenizer())


def test_a_tokenizer_without_a_template_asks_for_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template .*; give data\.chat_template=FILE"):
        encode_chat(Chat(MESSAGES, "row 0"), tokenizer)


@pytest.mark.real
def test_the_real_models_template_has_prefixes(smollm2: Any):
    tokenizer = smollm2[1]
    ids, scored = encode_chat(Chat(MESSAGES, "row 0"), tokenizer)
    words = tokenizer.decode([token for token, mark in zip(ids, scored, strict=True) if mark])
    assert words == "hello naïve<|im_end|>me<|im_end|>"


def blocks_of(tmp_path: Path, rows: list[dict[str, Any]], **values: Any) -> TokenBlocks:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_blocks(DataConfig(**{"source": "dataset", "path": path, "block_size": 8, **values}), tiny_tokenizer())


def answers(blocks: TokenBlocks) -> str:
    assert blocks.rows.scored is not None
    return tiny_tokenizer().decode(blocks.ids[blocks.rows.scored == 1])


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]
WHO = MESSAGES[3:]
FORMATS: dict[str, tuple[dict[str, Any], str, str]] = {
    "messages": ({"messages": CHAT}, "good day", "messages"),
    "conversation": ({"conversation": CHAT, "id": "x"}, "good day", "messages"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "good day"}]},
        "good day",
        "messages",
    ),
    "common text": ({"chosen": "say noted", "rejected": "say that"}, " noted</s>", "preference"),
    "common messages": (
        {"chosen": [*CHAT, *CHAT[:1], WHO[1]], "rejected": [*CHAT, *CHAT[:1], CHAT[1]]},
        "me",
        "preference",
    ),
    "prompt and completion": ({"prompt": "say", "completion": " noted"}, " noted</s>", "prompt_completion"),
    "chosen": ({"chosen": CHAT, "rejected": CHAT[:1]}, "good day", "preference"),
    "prompt and chosen": ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, "good day", "preference"),
    "prompt and all": ({"prompt": CHAT[:1], "chosen": CHAT, "rejected": CHAT}, "good day", "preference"),
    "text prompt": ({"prompt": "hi", "chosen": CHAT[1:], "rejected": CHAT[1:]}, "good day", "preference"),
    "text": ({"prompt": "say", "chosen": " noted", "rejected": " that"}, " noted</s>", "preference"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_rows_are_found(name: str, streaming: bool, tmp_path: Path):
    row, words, format = FORMATS[name]
    blocks = blocks_of(tmp_path, [row] * 8, streaming=streaming)
    assert f"format {format}" in blocks.source
    found = answers(blocks)
    assert words in found
    assert words.replace("</s>", "") in found.replace("</s>", "")
    assert "hi" not in found
    assert "say" not in found
    assert "user" not in found


def test_a_template_from_a_file(tmp_path: Path):
    (tmp_path / "chat.jinja").write_text(
        CHAT_TEMPLATE.replace("<{{", "[{{").replace("}}>", "}}]").replace("<a", "[a").replace("t>", "t]")
    )
    blocks = blocks_of(tmp_path, [{"messages": [*CHAT, *CHAT]}] * 2, chat_template=tmp_path / "chat.jinja")
    assert tiny_tokenizer().decode(blocks.ids[0]) == "ant]good"  # the block before it has no answer
    with pytest.raises(FileNotFoundError, match="no chat template at"):
        blocks_of(tmp_path, [{"messages": CHAT}], chat_template=tmp_path / "absent")


@pytest.mark.parametrize(
    ("row", "values", "message"),
    [
        (
            {"messages": CHAT, "text": "a"},
            {},
            r"columns for messages and text; choose with data\.format=messages\|text",
        ),
        ({"messages": CHAT, "conversations": CHAT}, {}, r"choose with data\.column=messages\|conversations"),
        ({"turns": CHAT}, {"format": "messages"}, r"no column for data\.format=messages .*data\.column=turns"),
        ({"messages": CHAT[:1]}, {}, r"row 0 of dataset .* no message of the role 'assistant'.*its roles: user"),
        ({"messages": [{"author": "gpt", "value": "a"}]}, {}, "row 0 of .*is no conversation: message 0 has no `role`"),
        ({"chosen": "only this"}, {}, "a column `prompt` with text is needed"),
        ({"messages": CHAT}, {"column": "mesages"}, "did you mean 'messages'"),
    ],
)
def test_rows_that_do_not_do_are_refused(tmp_path: Path, row: dict[str, Any], values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        blocks_of(tmp_path, [row], **values)


def test_a_block_without_an_answer_is_left_out(tmp_path: Path):
    long = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y" * 20}]
    blocks = blocks_of(tmp_path, [{"messages": long}] * 3)
    assert len(blocks) < 3 * 140 // 8 // 2
    assert all("y" in tiny_tokenizer().decode(row) for row in blocks.ids)


THINKING = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}")


def test_reasoning_that_the_template_drops_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_said", set())
    assert THINKING != CHAT_TEMPLATE
    thought = {"role": "assistant", "content": "<think>two and two make it</think>4"}
    asked = {"role": "user", "content": "2 + 2?"}
    with pytest.raises(ValueError, match="row 0: the chat template leaves out words of message 1, an answer"):
        encode_chat(Chat([asked, thought], "row 0", template=THINKING), tiny_tokenizer())
    ids, scored = encode_chat(Chat([asked, thought], "row 0", template=CHAT_TEMPLATE), tiny_tokenizer())
    assert scored_text(ids, scored).startswith("<think>two and two make it</think>4")
    later = [asked, thought, {"role": "user", "content": "and 3?"}, {"role": "assistant", "content": "7"}]
    encode_chat(Chat(later, "row 0", template=THINKING), tiny_tokenizer())
    assert "words of message 1, an answer; they are not learned" in caplog.text


def test_a_token_across_the_beginning_of_an_answer_is_learned(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_said", set())
    vocabulary = {one: number for number, one in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = [("y", "e"), ("ye", "s"), ("Ġ", "yes")]
    vocabulary |= {"".join(pair): len(vocabulary) + number for number, pair in enumerate(merges)}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [{"role": "user", "content": "rain?"}, {"role": "assistant", "content": "yes"}]
    ids, scored = encode_chat(Chat(messages, "row 0", template=template), tokenizer)
    assert [tokenizer.convert_ids_to_tokens(one) for one, mark in zip(ids, scored, strict=True) if mark] == [
        "Ġyes",
        "</s>",
    ]
    assert "the token ' yes' begins in the generation prompt and ends in the answer" in caplog.text

"""Columns of rows: each reaches the text as in TRL, or is refused by its name, or is named in the log."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import trl.data_utils
from transformers import PreTrainedTokenizerBase

from llmqat.data import DataConfig, load_splits
from llmqat.data.chat import Chat, encode_chat, render_chat
from llmqat.data.rows import TEMPLATE_COLUMNS
from tests.tiny import tiny_tokenizer

ASKED = [{"role": "user", "content": "Rain?"}]
TOLD = [{"role": "assistant", "content": "Some."}]
NO = [{"role": "assistant", "content": "Never."}]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "tells the weather"}}]
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}{% if documents %}<documents>{{ documents | tojson }}\n"
    "{% endif %}{% if style %}<style>{{ style }}\n{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message['content'] }}{% if message.tool_calls %}{% for call in message.tool_calls %}<call>"
    "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


ROWS = 16


def teller(template: str = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def blocks_of(folder: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **values: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * max(ROWS // len(rows), 1)))
    config = DataConfig(**{"source": "dataset", "path": path, "block_size": 192, **values})
    return load_splits(config, tokenizer or teller()).train


def text_of(blocks: Any) -> str:
    return str(tiny_tokenizer().decode(blocks.ids.flatten()))


def answers_of(blocks: Any) -> str:
    return str(tiny_tokenizer().decode(blocks.ids[blocks.rows.scored == 1]))


BESIDE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "tools": {"tools": TOOLS},
    "tools as JSON": {"tools": json.dumps(TOOLS)},
    "no tools": {"tools": []},
    "variables": {"chat_template_kwargs": {"style": "in few words"}},
    "documents among the variables": {"chat_template_kwargs": {"documents": [{"title": "a", "text": "b"}]}},
}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "messages": {"messages": ASKED + TOLD},
    "prompt and completion": {"prompt": ASKED, "completion": TOLD},
    "unpaired": {"prompt": ASKED, "completion": TOLD, "label": True},
    "prompt and chosen": {"prompt": ASKED, "chosen": TOLD, "rejected": NO},
    "chosen": {"chosen": ASKED + TOLD, "rejected": ASKED + NO},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("form", CONVERSATIONS)
def test_a_conversation_is_rendered_as_by_trl(form: str, beside: str, tmp_path: Path):
    row, given = CONVERSATIONS[form], BESIDE[beside]
    blocks = blocks_of(tmp_path, [{**row, **given}])
    tools = given.get("tools")
    kwargs = given.get("chat_template_kwargs", {})
    rendered = trl.data_utils.apply_chat_template(
        {**trl.data_utils.maybe_extract_prompt({**row}), "chat_template_kwargs": kwargs},
        teller(),
        tools=json.loads(tools) if isinstance(tools, str) else tools,
    )
    wanted = rendered.get("text") or rendered["prompt"] + rendered.get("completion", rendered.get("chosen", ""))
    assert (wanted * ROWS).startswith(text_of(blocks))  # what fills no block is left out
    assert set(answers_of(blocks).split("Some.")[:-1]) == {""}


@pytest.mark.parametrize("column", TEMPLATE_COLUMNS)
def test_a_column_that_the_template_does_not_read_is_refused(column: str, tmp_path: Path):
    given = {"chat_template_kwargs": {"style": "s"}, "tools": TOOLS, "documents": [{"title": "a", "text": "b"}]}
    row = {"messages": ASKED + TOLD, column: given[column]}
    silent = teller("{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match=rf"row 0 .*data\.ignore_columns=\[{column}\]"):
        blocks_of(tmp_path, [row], silent)
    told = teller(TEMPLATE)
    assert text_of(blocks_of(tmp_path, [row], told)).startswith("<")
    aside = text_of(blocks_of(tmp_path, [row], told, ignore_columns=[column]))
    assert aside.startswith("<user>Rain?")


def test_every_argument_of_the_template_is_a_column_s_or_ours():
    known = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    ours = known - {"self", "kwargs", "chat_template", *TEMPLATE_COLUMNS}
    for name in ours - {"conversation"}:
        chat = Chat(ASKED + TOLD, "row 0", variables={name: True})
        with pytest.raises(ValueError, match=rf"row 0: '{name}' in `chat_template_kwargs`"):
            encode_chat(chat, teller())
    assert "<x>" in render_chat(Chat(ASKED + TOLD, "row 0", variables={"chat_template": "<x>" + TEMPLATE}), teller())


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a prompt alone": ({"prompt": "The sky is"}, {}, r"a column `prompt` and no answers"),
    "a prompt of messages": ({"prompt": ASKED}, {}, r"a column `prompt` and no answers"),
    "stepwise supervision": (
        {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
        {},
        "`completions` and `labels` of stepwise supervision",
    ),
    "tokenized rows": ({"input_ids": [1, 2], "labels": [1, 2]}, {}, "`input_ids`: it is tokenized already"),
    "images": ({"messages": ASKED + TOLD, "images": ["a.png"]}, {}, r"column 'images' .*ignore_columns=\[images\]"),
    "a system column": ({"messages": ASKED + TOLD, "system": "be kind"}, {}, "column 'system' .*into the messages"),
    "functions": ({"messages": ASKED + TOLD, "functions": []}, {}, "column 'functions' .*into the messages"),
    "a variable of its own": ({"messages": ASKED + TOLD, "style": "s"}, {}, "variable 'style', which is a column"),
    "a label that is none": ({"prompt": "a", "completion": "b", "label": "good"}, {}, "`label` is 'good'"),
    "tools beside text": ({"prompt": "a", "completion": "b", "tools": TOOLS}, {}, "`tools` is for the chat template"),
    "tools that are none": ({"messages": ASKED + TOLD, "tools": "weather"}, {}, "`tools` is 'weather', which is no"),
    "variables that are none": ({"messages": ASKED + TOLD, "chat_template_kwargs": [1]}, {}, "a mapping is needed"),
    "an unknown column": ({"text": "a"}, {"ignore_columns": ["txt"]}, "did you mean 'text'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_text_is_refused_by_name(name: str, tmp_path: Path):
    row, values, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        blocks_of(tmp_path, [row], **values)


def test_answers_that_were_not_wanted_are_left_out(tmp_path: Path):
    rows = [{"prompt": "say", "completion": word, "label": word == " yes"} for word in (" yes", " no")]
    assert set(answers_of(blocks_of(tmp_path, rows * 4, block_size=32)).split("</s>")[:-1]) == {" yes"}


def test_columns_without_a_meaning_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "llmqat"):
        blocks_of(tmp_path, [{"messages": ASKED + TOLD, "source": "web", "id": "7"}])
    assert [record.getMessage() for record in caplog.records if "not read: source, id" in record.getMessage()]


def test_nulls_that_arrow_fills_in_do_not_reach_the_template(tmp_path: Path):
    def tool(**properties: Any) -> list[dict[str, Any]]:
        return [{"type": "function", "function": {"name": "f", "parameters": properties}}]

    kinds = {"city": {"type": "string"}}, {"day": {"type": "integer"}}
    rows = [{"messages": ASKED + TOLD, "tools": tool(**kind)} for kind in kinds] * 8
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    filled = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert "null" in json.dumps(filled[0]["tools"])
    found = text_of(load_splits(DataConfig(source="dataset", path=path, block_size=192), teller()).train)
    assert '"city"' in found
    assert "null" not in found


# Messages


def called(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [*ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": '{"rain": 1}'}, *TOLD]


@pytest.mark.parametrize("arguments", [{"city": "Ulm", "day": None}, '{"city": "Ulm", "day": null}'])
def test_tool_calls_are_written_once_as_json(arguments: Any):
    text = render_chat(Chat(called(arguments), "row 0"), teller())
    assert '<call>weather {"city": "Ulm", "day": null}\n' in text


MESSAGES_WRONG: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "an image": (
        [{"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "hi"}]}, *TOLD],
        TEMPLATE,
        "part of type 'image'",
    ),
    "no content": ([{"role": "user"}, *TOLD], TEMPLATE, "message 0 .* has no `content`"),
    "a turn that is not to be learned": ([*ASKED, {**TOLD[0], "weight": 0}], TEMPLATE, "weight=0"),
    "calls that the template does not read": (
        called({}),
        "{% for message in messages %}{{ message.role }}{{ message.content }}{% endfor %}",
        "'tool_calls', which the chat template does not read",
    ),
    "a role that the template does not know": (
        [*ASKED, {"role": "tool", "content": "rain"}, *TOLD],
        "{% for message in messages %}{% if message.role in ('user', 'assistant') %}{{ message.content }}{% endif %}"
        "{% endfor %}",
        r"leaves out the words of message 1 \(role 'tool'\)",
    ),
    "a template that refuses": (
        [{"role": "system", "content": "be kind"}, *ASKED, *TOLD],
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}",
        "cannot render it: no system here",
    ),
    "parts for a template of text": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, *TOLD],
        TEMPLATE,
        "a list of 2 parts",
    ),
}


@pytest.mark.parametrize("name", MESSAGES_WRONG)
def test_messages_that_do_not_reach_the_text_are_refused(name: str, tmp_path: Path):
    messages, template, message = MESSAGES_WRONG[name]
    with pytest.raises(ValueError, match=message):
        blocks_of(tmp_path, [{"messages": messages}], teller(template))


PARTS = "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [TEMPLATE, PARTS], ids=["text", "parts"])
@pytest.mark.parametrize("content", ["Rain?", [{"type": "text", "text": "Rain?"}]], ids=["text", "parts"])
def test_content_is_given_in_the_form_that_the_template_takes(content: Any, template: str):
    text = render_chat(Chat([{"role": "user", "content": content}, *TOLD], "row 0"), teller(template))
    assert "Rain?" in text
    assert "type" not in text


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_template_under_any_of_its_names(field: str):
    text = render_chat(Chat([*ASKED, {**TOLD[0], field: "clouds"}], "row 0"), teller())
    assert "<think>clouds</think>Some." in text


def test_of_several_templates_the_one_for_tools_is_taken():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "<use>" + TEMPLATE}
    assert render_chat(Chat(ASKED + TOLD, "row 0", tools=TOOLS), tokenizer).startswith("<use><tools>")
    assert render_chat(Chat(ASKED + TOLD, "row 0"), tokenizer).startswith("<user>")


def _user(words: str) -> dict[str, str]:
    return {"role": "user", "content": words}


def _answer(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}


EARLIER = [_user("Sun?"), _answer("Never."), *ASKED]
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (EARLIER, TOLD),
        (EARLIER, [*EARLIER, *TOLD]),  # the answer holds the prompt
        ("Rain?", [SYSTEM, *ASKED, *TOLD]),
        ("Rain?", [_user("Rain? "), *TOLD]),
        ("Rain?", [*EARLIER, *TOLD]),  # the prompt is the last of several turns
        ([SYSTEM], [*ASKED, *TOLD]),  # which is the prompt's beginning alone
    ],
)
@pytest.mark.parametrize("columns", [("completion", None), ("chosen", "rejected")])
def test_a_prompt_is_in_the_text_once_and_is_not_learned(
    prompt: Any, answer: Any, columns: tuple[str, str | None], tmp_path: Path
) -> None:
    wanted, other = columns
    row = {"prompt": prompt, wanted: answer} | ({other: [*answer[:-1], *NO]} if other else {})
    blocks = blocks_of(tmp_path, [row], packing="whole")
    assert set(answers_of(blocks).split("Some.")) == {""}
    assert text_of(blocks).partition("Some.")[0].count("Rain?") == 1


def test_a_conversation_that_does_not_hold_its_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`completion` begins with the role 'user'.* has `prompt` in it nowhere"):
        blocks_of(tmp_path, [{"prompt": "Snow?", "completion": [*ASKED, *TOLD]}])
    twice = [*ASKED, *NO, *ASKED, *TOLD]
    with pytest.raises(ValueError, match=r"`prompt` in it 2 times"):
        blocks_of(tmp_path, [{"prompt": "Rain? ", "completion": twice}])


def test_answers_that_look_like_something_else(tmp_path: Path) -> None:
    table = tmp_path / "answers.csv"
    table.write_text("prompt,completion\n" + "Rain?,NA\n" * ROWS)
    blocks = load_splits(DataConfig(source="dataset", path=table, block_size=32), teller()).train
    assert "NA" in answers_of(blocks)
    with pytest.raises(ValueError, match=r"`completion` was read as a date, .* give the rows as Parquet"):
        blocks_of(tmp_path, [{"prompt": "When?", "completion": "2024-01-01 10:00:00"}])
    with pytest.raises(ValueError, match=r"`completion` is empty; write the answer into it"):
        blocks_of(
            tmp_path, [{"prompt": "Rain?", "completion": "Some."}] * 15 + [{"prompt": "Sun?", "completion": None}]
        )


def test_rows_that_move_to_another_file_make_new_blocks(tmp_path: Path) -> None:
    rows = [json.dumps({"messages": [*ASKED, _answer("secret" if number < 8 else "plain")]}) for number in range(40)]
    folder = tmp_path / "data"
    folder.mkdir()

    def secrets(**files: list[str]) -> int:
        for name, lines in files.items():
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        config = DataConfig(source="dataset", path=folder, block_size=64, packing="whole")
        return answers_of(load_splits(config, teller()).train).count("secret")

    assert secrets(train=rows) == 8
    assert secrets(test=rows[:8], train=rows[8:]) == 0  # the same bytes, one file after the other


def test_hidden_copies_are_not_read(tmp_path: Path) -> None:
    for suffix, words in (
        (".jsonl", json.dumps({"text": "words of rows " * 9}) + "\n"),
        (".txt", "words of prose " * 9),
    ):
        folder = tmp_path / suffix[1:]
        (folder / ".ipynb_checkpoints").mkdir(parents=True)
        (folder / f"a{suffix}").write_text(words)
        (folder / ".ipynb_checkpoints" / f"a-checkpoint{suffix}").write_text("hidden " + words)
        (folder / f".a{suffix}").write_text("hidden " + words)
        config = DataConfig(source="text" if suffix == ".txt" else "dataset", path=folder, block_size=32)
        assert "hidden" not in text_of(load_splits(config, teller()).train)

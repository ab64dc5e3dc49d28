"""Local tasks through lm-eval: the prompts it makes, and scores against likelihoods worked with the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmqat.evaluate.tasks import TaskSettings, _summary, average, opened_tasks, write_task_folder
from llmqat.layers import PackedLinear, QuantConfig, convert, prepare
from tests.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")

QUESTIONS = [
    {"query": "Question: what is dry?\n", "choices": ["sand", "the sea"], "gold": 0},
    {"query": "Question: what is wet?", "choices": ["a stone", "rain", "air"], "gold": 1},
    {"query": "She opened the door and", "choices": ["went in.", "sank."], "gold": 0},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "things.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return tmp_path


def likelihoods(model: Any, tokenizer: Any, question: dict[str, Any]) -> list[float]:
    asked = question["query"].strip()
    asked += "\nAnswer:" if asked.startswith("Question:") else ""
    found = []
    for choice in question["choices"]:
        context, whole = tokenizer.encode(asked), tokenizer.encode(f"{asked} {choice}")
        with torch.no_grad():
            log_probs = F.log_softmax(model(torch.tensor([whole])).logits[0].float(), dim=-1)
        found.append(sum(float(log_probs[at - 1, whole[at]]) for at in range(len(context), len(whole))))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_answers_are_those_of_the_model_s_likelihoods(folder: Path, packed: bool) -> None:
    model, tokenizer = tiny_llama().to(torch.bfloat16 if packed else torch.float32), tiny_tokenizer()
    if packed:
        prepare(model, QuantConfig.preset("int4", group_size=32))
        convert(model)
        assert any(isinstance(module, PackedLinear) for module in model.modules())
    with opened_tasks(TaskSettings(folder=folder, batch_size=2)) as tasks:
        assert tasks.names == ("things",)
        found = tasks.run(model, tokenizer)["things"]
    expected, normalized = [], []
    for question in QUESTIONS:
        scores = torch.tensor(likelihoods(model, tokenizer, question))
        expected.append(float(int(scores.argmax()) == question["gold"]))
        lengths = torch.tensor([float(len(choice)) for choice in question["choices"]])
        normalized.append(float(int((scores / lengths).argmax()) == question["gold"]))
    assert found["samples"] == {"acc": expected, "acc_norm": normalized}
    assert found["questions"] == 3
    assert found["acc_norm"] == pytest.approx(sum(normalized) / 3)
    assert average({"things": found}) == found["acc_norm"]


def test_tasks_that_are_not_there_are_named(folder: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="unknown tasks: nothings; local ones: things"),
        opened_tasks(TaskSettings(names=("nothings",), folder=folder)),
    ):
        pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.jsonl file"):
        write_task_folder(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "broken.jsonl").write_text('{"query": "x"}\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl line 1 is no question: .* choices, gold, query"):
        write_task_folder(tmp_path / "empty", tmp_path / "out")


WRONG = {
    "{": "not JSON",
    "[1]": "expected JSON with the keys",
    '{"query": "x", "choices": ["a", "b"]}': "choices, gold, query",
    '{"query": 1, "choices": ["a", "b"], "gold": 0}': "query=1 is no text",
    '{"query": " ", "choices": ["a", "b"], "gold": 0}': "query=' ' is no text",
    '{"query": "x", "choices": "ab", "gold": 0}': "choices='ab' are not two texts",
    '{"query": "x", "choices": ["a"], "gold": 0}': "not two texts or more",
    '{"query": "x", "choices": ["a", 2], "gold": 0}': "not two texts or more",
    '{"query": "x", "choices": ["a", ""], "gold": 0}': "not all there",
    '{"query": "x", "choices": ["a", "a", "b"], "gold": 0}': "have the right one, 'a', more than once",
    '{"query": "x", "choices": ["a", "b"], "gold": 2}': "gold=2 is not the number of a choice, 0 to 1",
    '{"query": "x", "choices": ["a", "b"], "gold": -1}': "gold=-1",
    '{"query": "x", "choices": ["a", "b"], "gold": "1"}': "gold='1'",
    '{"query": "x", "choices": ["a", "b"], "gold": true}': "gold=True",
    '{"query": "x", "choices": ["a", "b"], "gold": 0.0}': "gold=0.0",
}


@pytest.mark.parametrize("line", WRONG)
def test_every_line_of_a_task_is_checked(line: str, folder: Path) -> None:
    with (folder / "things.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"things\.jsonl line 5 is no question") as refused:
        write_task_folder(folder, folder / "out")
    assert WRONG[line] in str(refused.value)


def test_wrong_answers_may_be_there_twice(folder: Path) -> None:
    """As in seven questions of ARC-easy."""
    with (folder / "things.jsonl").open("a") as file:
        file.write('\n{"query": "x", "choices": ["fall", "fall", "rise"], "gold": 2}\n')
    write_task_folder(folder, folder / "out")


def test_a_task_without_questions_is_refused_and_a_question_asked_twice_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = folder / "things.jsonl"
    file.write_text(file.read_text() + json.dumps({**QUESTIONS[0], "gold": 1}) + "\n")
    write_task_folder(folder, folder / "out")
    assert "things.jsonl line 4 asks what line 1 asks" in caplog.text
    file.write_text("\n\n")
    with pytest.raises(ValueError, match=r"things\.jsonl holds no question"):
        write_task_folder(folder, folder / "out")
    file.write_bytes('{"query": "é"'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"things\.jsonl is not UTF-8"):
        write_task_folder(folder, folder / "out")


def test_what_lm_eval_cannot_read_is_refused_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("the hub is not reached")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ValueError, match="task things cannot be read"), opened_tasks(TaskSettings(folder=folder)):
        pass


def test_each_filter_of_answers_has_its_figures() -> None:
    samples = [
        {"doc_id": doc, "filter": name, "metrics": ["exact_match"], "exact_match": float(name == "flexible-extract")}
        for doc in range(2)
        for name in ("strict-match", "flexible-extract")
    ]
    found = _summary(samples, {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0})
    assert found["questions"] == 2
    assert (found["exact_match,strict-match"], found["exact_match,flexible-extract"]) == (0.0, 1.0)
    assert found["samples"]["exact_match,flexible-extract"] == [1.0, 1.0]


def test_what_is_no_mean_over_questions_is_lm_eval_s_own_figure() -> None:
    samples = [
        {"doc_id": doc, "filter": "none", "metrics": ["perplexity", "acc"], "perplexity": -24.0, "acc": float(doc)}
        for doc in range(2)
    ]
    found = _summary(samples, {"perplexity,none": 2.6e10, "acc,none": 0.5})
    assert (found["perplexity"], found["acc"]) == (2.6e10, 0.5)
    assert found["samples"] == {"acc": [0.0, 1.0]}

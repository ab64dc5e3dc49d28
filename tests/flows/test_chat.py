"""The fine-tuner's road: a file of chats, answers that are learned, held out and shown."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from llmqat.recipe import load_recipe, run
from tests.flows.small import small

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def chats(count: int = 24) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"Ahoy, {n}!"}]}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chats()), encoding="utf-8")
    return path


def test_answers_that_are_not_learned_are_said_so(
    tiny_folder: Path, tmp_path: Path, chat_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = f"data={{source: dataset, path: {chat_file}, tokens: 128, block_size: 32}}"
    with caplog.at_level(logging.WARNING):
        result = run(load_recipe(RECIPES / "lora-int4.yaml", small(tiny_folder, tmp_path / "run", data)))
    assert result is not None
    told = [record.getMessage() for record in caplog.records if "are not learned" in record.getMessage()]
    assert len(told) == 1
    assert "train.cross_entropy_weight=1.0 train.kl_weight=0.2" in told[0]
    assert [finding.level for finding in result.comparison.findings() if told[0] in finding.text] == ["warning"]

"""Protocols by name: windows worked by hand, GPTQ's, and lm-eval's word perplexity from lm-eval itself."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmqat.evaluate.perplexity import evaluate
from llmqat.evaluate.protocols import detokenized, read_pages, read_rows, text_windows
from tests.tiny import tiny_llama, tiny_tokenizer

PAGES = [
    '\n = Robert <unk> = \n\n Robert had a 70 @-@ year role , in " The Bill " ( 2000 ) . \n\n = = Career = = \n\n'
    + " It cost 1 @,@ 000 @.@ 5 pounds ; he 's the players ' man . \n" * 4,
    "\n = Second page = \n\n" + " Words that follow one another : one , two , and N more ! \n" * 9,
    "\n = Third = \n\n Short . \n",
]
DETOKENIZED = ['\n= Fourth =\n\nIt doesn \'t end , but ( nearly ) does. I said " well " to N of them.\n' * 3]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(json.dumps({"page": page}) + "\n" for page in PAGES))
    return path


@pytest.mark.parametrize(("came", "window"), [(PAGES, None), (PAGES, 64), (DETOKENIZED, 64)])
def test_word_perplexity_is_lm_evals(tmp_path: Path, tokenizer: Any, came: list[str], window: int | None) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
    script = runpy.run_path(str(Path(__file__).parents[2] / "eval" / "word_perplexity.py"))
    model = tiny_llama()
    theirs = script["lm_eval_word_perplexity"](model, tokenizer, came, window, 2)
    pages = tmp_path / "pages.jsonl"
    pages.write_text("".join(json.dumps({"page": page}) + "\n" for page in came))
    windows = text_windows("wikitext", str(pages), tokenizer, window=window, model_length=256)
    assert windows.window == (window or 256) + 1
    ours = evaluate(model, windows, batch_size=2)
    assert ours.words == sum(len(page.split()) + page[0].isspace() + page[-1].isspace() for page in came)
    assert ours.word_perplexity == pytest.approx(theirs, rel=1e-5)


def test_a_text_file_is_cut_into_pages_at_titles(tmp_path: Path, pages: Path) -> None:
    path = tmp_path / "test.tokens"
    path.write_text("".join(PAGES))
    assert [page.strip() for page, _ in read_pages(str(path))] == [page.strip() for page in PAGES]
    assert [read for _, read in read_pages(str(pages))] == [detokenized(page) for page in PAGES]
    plain = tmp_path / "plain.txt"
    plain.write_text("= Title =\n\nText , as it is (lm-eval's).\n\n== Section ==\n\nMore ( still ).\n")
    ((came, read),) = read_pages(str(plain))
    assert came == plain.read_text()
    assert read == "= Title =\n\nText, as it is (lm-eval's).\n\n== Section ==\n\nMore (still).\n"


def test_gptqs_windows_are_rows_joined_and_cut(tmp_path: Path, tokenizer: Any) -> None:
    raw = tmp_path / "wiki.test.raw"
    raw.write_text(" \n = Title = \n \n Some text . \n")
    assert read_rows(str(raw)) == ["", " = Title = \n", "", " Some text . \n"]
    ids = tokenizer("\n\n".join(read_rows(str(raw))))["input_ids"]
    windows = text_windows("wikitext2", str(raw), tokenizer, window=10)
    assert windows.ids.flatten().tolist() == ids[: len(ids) // 10 * 10]
    model = tiny_llama()
    with torch.no_grad():  # the loop of GPTQ's code
        losses = [F.cross_entropy(model(input_ids=row).logits[0, :-1], row[0, 1:]) * 10 for row in windows.ids.split(1)]
    expected = torch.exp(torch.stack(losses).sum() / (len(windows) * 10))
    assert evaluate(model, windows).perplexity == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("c4", {"window": 64}, "'c4' is unknown; choose one of windows, wikitext2, wikitext"),
        ("wikitext2", {"window": 64, "stride": 8}, "stride=8 is not part of the protocol 'wikitext2'"),
        ("wikitext2", {"window": 100_000}, "fewer than one window of 100000"),
        ("windows", {"window": None}, "needs a window"),
        ("wikitext", {"window": 64, "max_windows": 1}, "keeps no page"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    protocol: str, options: dict[str, Any], message: str, pages: Path, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        text_windows(protocol, str(pages), tokenizer, **options)

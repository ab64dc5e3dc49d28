"""The benchmark scripts under eval/, run on a tiny model: they end with their headline, `name: number`."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmqat.evaluate.perplexity import Evaluation
from llmqat.export import save
from llmqat.layers import PRESETS, QuantConfig, prepare
from llmqat.recipe import load_recipe
from tests.tiny import tiny_llama, tiny_tokenizer

SCRIPTS = Path(__file__).parents[2] / "eval"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(SCRIPTS)  # as Python does for a script
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def headline(output: str) -> dict[str, float]:
    lines = [re.fullmatch(r"([^:]+): ([-0-9.e+]+)", line) for line in output.splitlines()]
    return {match[1]: float(match[2]) for match in lines if match}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def test_every_script_is_described() -> None:
    scripts = sorted(path.name for path in SCRIPTS.glob("*.py"))
    assert {
        "calibration.py",
        "formats.py",
        "inference.py",
        "kv_cache.py",
        "schemes.py",
        "training_memory.py",
        "training_speed.py",
    } <= set(scripts)
    readme = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    assert [name for name in scripts if name not in readme] == []


def test_wikitext(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=64))
    save(model, tmp_path / "packed", tiny_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("A text that is long enough for some windows. " * 20, encoding="utf-8")
    arguments = ["--text", str(text), "--window", "64", "--max-windows", "4", "--json", str(tmp_path / "out.json")]
    packed = str(tmp_path / "packed")
    run(monkeypatch, "wikitext.py", "--model", packed, "--reference", str(folder), "--speed", *arguments)
    output = capsys.readouterr().out
    found = headline(output)
    assert list(found)[-1] == "perplexity"
    assert output.rstrip().splitlines()[-1].startswith("perplexity: ")
    assert found["kl"] > 0
    assert found["bits per weight"] == 4.25
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["full precision", "packed"]
    assert found["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-5)
    assert found["reference perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-5)


def test_wikitext_of_several_models_names_each(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text that is long enough for some windows. " * 20, encoding="utf-8")
    again = tmp_path / "again"
    tiny_llama(seed=1).save_pretrained(again)
    tiny_tokenizer().save_pretrained(again)
    run(monkeypatch, "wikitext.py", "--model", str(folder), str(again), "--text", str(text), "--window", "64")
    found = headline(capsys.readouterr().out)
    assert found["original perplexity"] != found["again perplexity"]


def test_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32, symmetric=False))
    save(model, tmp_path / "packed", tiny_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("A text that is long enough for some windows. " * 20, encoding="utf-8")
    arguments = ["--text", str(text), "--window", "64", "--max-windows", "2", "--json", str(tmp_path / "out.json")]
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # it takes no tokenizer without merges
    run(monkeypatch, "formats.py", "--model", str(tmp_path / "packed"), *arguments)
    found = headline(capsys.readouterr().out)
    assert list(found)[-1] == "onnxruntime off by percent"
    assert abs(found["onnxruntime off by percent"]) < 1
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows["onnxruntime"]["equal"] == rows["transformers, GGUF"]["equal"] == rows["llmqat"]["layers"] == 14


def test_training_speed(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--steps", "1", "--block-size", "32", "--batch-size", "1", "--accumulation", "2")
    run(monkeypatch, "training_speed.py", "--model", str(folder), *arguments)
    output = capsys.readouterr().out
    found = headline(output)
    assert list(found)[-2:] == ["step with quantizers against without", "speed against plain"]
    assert list(found)[:3] == ["llmqat tokens/s", "quantizers off tokens/s", "plain tokens/s"]
    assert all(value > 0 for value in found.values())
    for part in ("teacher forward", "student forward", "loss", "backward", "optimizer"):
        (line,) = (line for line in output.splitlines() if f" {part} " in line)
        assert re.search(r"\d+ +│ +\d+ +│", line)


def test_schemes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text that is long enough for some windows. " * 20, encoding="utf-8")
    arguments = ["--recipe", str(SCRIPTS.parent / "recipes" / "smollm2-135m-int4.yaml"), "--model", str(folder)]
    arguments += ["--text", str(text), "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json")]
    small = ["data={source: pydoc, tokens: 256, block_size: 32}", "calibrate.ranges.blocks=2"]
    small += ["train.max_steps=2", "train.warmup_steps=0"]
    small += ["evaluate.window=32", "evaluate.max_windows=4", "evaluate.allow_trained_text=true"]
    names = ["int4", "int4, int8 embedding", "w4a8kv8"]
    run(monkeypatch, "schemes.py", *arguments, "--schemes", *names, "--set", *small)
    assert list(headline(capsys.readouterr().out)) == names
    rows = {row["scheme"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows["int4"]["stock_transformers"] == "yes, equal logits"
    assert rows["int4, int8 embedding"]["stock_transformers"] == "no (AttributeError)"
    assert rows["w4a8kv8"]["stock_transformers"] == "yes, equal logits, KV cache in high precision"
    with pytest.raises(SystemExit, match="holds the run of another recipe"):
        run(monkeypatch, "schemes.py", *arguments, "--schemes", "int4", "--set", *small, "train.max_steps=3")


def test_calibration(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text that is long enough for some windows. " * 20, encoding="utf-8")
    arguments = ["--model", str(folder), "--text", str(text), "--test", str(text), "--json", str(tmp_path / "out.json")]
    arguments += ["--window", "64", "--max-windows", "4", "--blocks", "4", "--group-size", "32"]
    run(monkeypatch, "calibration.py", *arguments, "--schemes", "int3", "--methods", "rtn", "search", "gptq")
    assert list(headline(capsys.readouterr().out)) == ["int3 rtn", "int3 search", "int3 gptq"]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    divergences = [row["kl"] for row in rows]
    assert divergences == sorted(divergences, reverse=True)
    assert rows[2]["seconds"] > rows[0]["seconds"]


def test_peers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text that is long enough for some windows. " * 20, encoding="utf-8")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "auto_round.py").write_text("raise ModuleNotFoundError(\"No module named 'auto_round'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"))
    monkeypatch.syspath_prepend(SCRIPTS)
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    save(model, tmp_path / "packed", tiny_tokenizer())
    arguments = ["--model", str(folder), "--text", str(text), "--eval", "pydoc", "--work", str(tmp_path / "work")]
    arguments += ["--window", "32", "--max-windows", "4", "--blocks", "4", "--steps", "1", "--group-size", "32"]
    arguments += ["--checkpoint", f"rounded={tmp_path / 'packed'}", "--json", str(tmp_path / "out.json"), "--bits", "4"]
    run(monkeypatch, "peers.py", *arguments, "--methods", "llmqat gptq", "AutoRound")
    found = headline(capsys.readouterr().out)
    assert 0 < found["llmqat gptq g32, 4 bits, pydoc kl"] < found["rounded g32, 4 bits, pydoc kl"]
    report = json.loads((tmp_path / "out.json").read_text())
    assert "No module named 'auto_round'" in report["skipped"]["AutoRound, 4 bits, groups of 32"]
    assert [row["bits_per_weight"] for row in report["rows"]] == [4.5, 4.5]
    before = (tmp_path / "work" / "llmqat-gptq-4-g32" / "arm.json").stat().st_mtime_ns
    run(monkeypatch, "peers.py", *arguments, "--methods", "llmqat gptq")
    assert headline(capsys.readouterr().out) == found
    assert (tmp_path / "work" / "llmqat-gptq-4-g32" / "arm.json").stat().st_mtime_ns == before
    run(monkeypatch, "peers.py", *arguments, "--methods", "llmqat gptq", "--group-size", "16")
    assert list(headline(capsys.readouterr().out)) == [*("llmqat gptq g16, 4 bits, pydoc kl", *found)]
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(row["group_size"], row["bits_per_weight"]) for row in report["rows"]] == [(16, 5.0), (32, 4.5), (32, 4.5)]
    assert set(report["order"][0]["names"]) == {"llmqat gptq g16", "llmqat gptq g32", "rounded g32"}
    with pytest.raises(SystemExit, match="was begun with other settings"):
        run(monkeypatch, "peers.py", *arguments, "--methods", "llmqat gptq", "--steps", "2")


def test_peers_of_equal_bits_are_ranked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(name: str, bits: int, group_size: int | None, bits_per_weight: float, kl: float) -> dict[str, Any]:
        text = {"pydoc": Evaluation(20.0 + kl, 3.0, kl, 0.9, 100, 4, 32, 32, "0123456789ab")}
        facts = {"name": name, "bits": bits, "group_size": group_size, "bits_per_weight": bits_per_weight}
        return {**facts, "evaluations": text}

    monkeypatch.syspath_prepend(SCRIPTS)
    rows = [
        row("llmqat gptq", 4, 32, 4.5, 0.1),
        row("llmqat gptq", 4, 64, 4.25, 0.2),
        row("llama.cpp Q3_K_M", 3, None, 4.63, 0.3),
        row("llama.cpp Q4_K_M", 4, None, 5.53, 0.05),  # nothing has as many
    ]
    by_kl, by_perplexity = runpy.run_path(str(SCRIPTS / "peers.py"))["equal_bits"](rows)
    assert by_kl["names"] == by_perplexity["names"] == ["llmqat gptq g32", "llama.cpp Q3_K_M"]
    assert by_kl["sentence"] == (
        "as many bits a weight as llama.cpp Q3_K_M, 4.63 ±0.15, kl on pydoc, best first: llmqat gptq g32 0.1, "
        "llama.cpp Q3_K_M 0.3"
    )


def test_quantize_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("Words that nobody was trained on, one after the other. " * 40)
    outputs = ("--json", str(tmp_path / "found.json"), "--table", str(tmp_path / "found.md"))
    words = ("--size", "tiny", "--text", str(tmp_path / "text.txt"), "--work", str(tmp_path / "work"), *outputs)
    words += ("--tokenizer", str(folder), "--blocks", "2", "--block-size", "32")
    for _ in range(2):  # what is measured is not measured again
        run(monkeypatch, "quantize_memory.py", *words)
        assert headline(capsys.readouterr().out)["tiny, GB resident"] > 0.1
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert 0 < row["quantize"]["anonymous"] <= row["quantize"]["resident"]
    assert 0 < row["judged"]["anonymous"] <= row["judged"]["resident"]
    assert row["packed_bytes"] < 2 * row["weights"]
    assert "| tiny | 0.0 |" in (tmp_path / "found.md").read_text()
    assert not (tmp_path / "work" / "tiny").exists()


NO_RESULTS = {
    *("ablation_levers.py", "budget_law.py", "client_checkpoints.py", "client_table.py", "figures.py", "made.py"),
    *("gpu.py", "gpu_models.py", "gpu_steps.py", "gpu_tables.py", "peer_methods.py", "references.py", "scaling.py"),
    "report_picture.py",
}
"""Scripts that measure nothing, are part of another, or (gpu.py) write their own report after each step."""


@pytest.mark.parametrize("script", sorted({path.name for path in SCRIPTS.glob("*.py")} - NO_RESULTS))
def test_every_script_writes_its_results_itself(script: str) -> None:
    text = (SCRIPTS / script).read_text(encoding="utf-8")
    assert '"--table"' in text or f'with recorded("{script}"' in text


def test_kv_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", str(folder), "--tokens", "48", "--group-size", "8")
    files = ("--table", str(tmp_path / "cache.md"), "--json", str(tmp_path / "cache.json"))
    run(monkeypatch, "kv_cache.py", *words, *files)
    output = capsys.readouterr().out
    found = headline(output)
    assert found["bfloat16"] > found["8 bits"] > found["4 bits, groups of 8"] > 0
    kept = json.loads((tmp_path / "cache.json").read_text())
    assert kept["headline"] == found
    assert kept["command"].startswith("python eval/kv_cache.py --model ")
    line, _, printed = (tmp_path / "cache.md").read_text().partition("\n\n")
    assert kept["command"] in line
    assert printed == f"```text\n{output.rstrip()}\n```\n"


def test_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "kernel_speed.py", "--shapes", "64x128", "--rows", "1", "40", "--cached", "0", "--repeats", "1")
    output = capsys.readouterr().out
    found = headline(output)
    assert [name.split(", ")[:2] for name in found] == [["64x128", "1 rows"], ["64x128", "40 rows"]]
    assert all(ratio > 0 for ratio in found.values())
    assert "reference" in output
    for wrong, message in (
        (["--shapes", "64"], "write OUTxIN"),
        (["--shapes", "8x100"], "a multiple of --group-size 64"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, "kernel_speed.py", *wrong)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "kernel_speed.py", "--rows", "0")
    assert "are 1 or more" in capsys.readouterr().err


def test_zero_shot(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
    (tmp_path / "tasks").mkdir()
    lines = [{"query": f"Question: {word}?", "choices": ["yes", "no"], "gold": 0} for word in ("one", "two", "three")]
    (tmp_path / "tasks" / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = tmp_path / "again"
    tiny_llama(seed=1).save_pretrained(again)
    tiny_tokenizer().save_pretrained(again)
    arguments = ["--model", str(again), "--reference", str(folder), "--task-folder", str(tmp_path / "tasks")]
    run(monkeypatch, "zero_shot.py", *arguments, "--json", str(tmp_path / "out.json"))
    output = capsys.readouterr().out
    assert list(headline(output))[-1] == "again average"
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["models"][str(again)]["quiz"]["samples"]["acc"]) == 3
    assert re.search(r"again quiz acc_norm [01]\.\d+ \(3 questions\), [-+]\d\.\d+ \[", output)
    report["models"][str(again)]["quiz"]["acc_norm"] = 7.0
    (tmp_path / "out.json").write_text(json.dumps(report))
    run(monkeypatch, "zero_shot.py", *arguments, "--json", str(tmp_path / "out.json"))
    assert "again quiz acc_norm 7.0000" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="give another --json"):
        run(monkeypatch, "zero_shot.py", *arguments, "--limit", "2", "--json", str(tmp_path / "out.json"))
    for other in ("{", '{"rows": []}', "[]"):
        (tmp_path / "out.json").write_text(other)
        with pytest.raises(SystemExit, match="holds no results of this script"):
            run(monkeypatch, "zero_shot.py", *arguments, "--json", str(tmp_path / "out.json"))
    run(monkeypatch, "zero_shot.py", "--make", str(tmp_path / "made"), "--task-folder", str(tmp_path / "tasks"))
    assert (tmp_path / "made" / "quiz.yaml").is_file()


def test_every_row_of_schemes_is_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    schemes = runpy.run_path(str(SCRIPTS / "schemes.py"))["SCHEMES"]
    recipe = SCRIPTS.parent / "recipes" / "smollm2-135m-int4.yaml"
    for changes in schemes.values():
        load_recipe(recipe, changes)
    assert set(PRESETS) <= set(schemes)


def test_finetuning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--steps", "20", "--tokens", "1280", "--block-size", "32", "--max-windows", "6", "--group-size", "32"]
    small += ["--rank", "8", "--learning-rate", "1e-2", "--scheme", "int3", "--json", str(tmp_path / "found.json")]
    small += ["--arms", "LoRA", "LoRA, rounded", "LoRA, calibrated", "LoRA, distilled", "LoRA inside"]
    run(monkeypatch, "finetuning.py", "--model", str(folder), *small)
    output = capsys.readouterr().out
    found = headline(output)
    assert found.pop("differing codes") == 0
    ways = ["LoRA", "LoRA, rounded", "LoRA, calibrated", "LoRA, distilled", "LoRA inside"]
    assert list(found) == [f"int3, {way}" for way in ways]
    assert found["int3, LoRA"] == 1
    assert found["int3, LoRA, rounded"] < found["int3, LoRA, distilled"] < 1.2
    runs = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["runs"]
    assert {name: run["steps"] for name, run in runs.items()} == {
        "base": {},
        "LoRA, seed 0": {"LoRA": 20},
        "int3, LoRA, rounded, seed 0": {"LoRA": 20},
        "int3, LoRA, calibrated, seed 0": {"LoRA": 20},
        "int3, LoRA, distilled, seed 0": {"LoRA": 20, "inside": 6},
        "int3, LoRA inside, seed 0": {"inside": 20},
    }
    small += ["--table", str(tmp_path / "found.txt")]
    run(monkeypatch, "finetuning.py", "--model", str(folder), *small)  # all of it is there
    again = capsys.readouterr().out
    assert "(validation)" in output
    assert "(validation)" not in again
    assert headline(again) == {**found, "differing codes": 0}
    assert again.endswith((tmp_path / "found.txt").read_text(encoding="utf-8"))
    with pytest.raises(SystemExit, match="give another --json"):
        run(monkeypatch, "finetuning.py", "--model", str(folder), *small, "--steps", "10")


def test_training_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "3", "--batch-size", "2", "--block-size", "32", "--group-size", "32", "--rank", "4"]
    run(monkeypatch, "training_memory.py", "--model", str(folder), "--ways", "lora", "packed-lora", *arguments)
    assert set(headline(capsys.readouterr().out)) == {"lora", "packed-lora"}


def test_long_context(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "long_context.py", "--lengths", "32", "4096", "--vocabularies", "512")
    output = capsys.readouterr().out
    assert headline(output)["kB a token, 512 entries"] > 0
    assert "4,096" in output


def test_teacher_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text that is long enough for some windows. " * 20, encoding="utf-8")
    arguments = ["--model", str(folder), "--text", str(text), "--test", str(text), "--max-windows", "4"]
    arguments += ["--top-k", "4", "64", "--blocks", "2", "--block-size", "32", "--group-size", "32"]
    run(monkeypatch, "teacher_cache.py", *arguments, "--train", "--steps", "4", "--learning-rate", "1e-3")
    found = headline(capsys.readouterr().out)
    assert 0 < found["mass of 4"] < found["mass of 64"] < 1
    assert 0 < found["kl of 4"] < found["kl of 64"] < found["exact kl"]
    assert found["perplexity against live"] == pytest.approx(1, abs=0.1)
    assert found["cached perplexity"] != found["live perplexity"]
    assert list(found)[-1] == "speed against live"


def test_teacher_cache_of_own_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--top-k", "4", "64", "--blocks", "2", "--block-size", "32", "--group-size", "32"]
    run(monkeypatch, "teacher_cache.py", "--model", str(folder), *arguments)
    found = headline(capsys.readouterr().out)
    assert 0 <= found["kl while writing"] < 0.01
    assert 0 < found["kl of 4"] < found["kl of 64"] < found["exact kl"]
    assert 0 < found["gradient of 64 off"] < found["gradient of 4 off"] < 1


def test_tokenize_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "tokenize_folder.py", "--model", str(folder), "--megabytes", "0.3", "--num-proc", "2")
    found = headline(capsys.readouterr().out)
    assert list(found)[-1] == "peak_rss_mb"
    assert 50 < found["peak_rss_mb"] < 4000
    assert 300_000 - 512 <= found["tokens"] <= 310_000  # a byte is a token
    assert found["seconds from the cache"] < found["seconds"]


def test_processes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "train.txt", tmp_path / "test.txt"
    for number, text in enumerate(texts):
        text.write_text(f"Text {number} that is long enough for some windows. " * 40, encoding="utf-8")
    command = [
        "--model",
        str(folder),
        "--text",
        str(texts[0]),
        "--test",
        str(texts[1]),
        "--out",
        str(tmp_path / "runs"),
    ]
    command += ["--processes", "1", "2", "--seeds", "0", "--steps", "2", "--batch-size", "2", "--block-size", "32"]
    run(monkeypatch, "processes.py", *command, "--max-windows", "1")
    printed = capsys.readouterr().out
    found = headline(printed)
    assert set(found) == {
        "first, between numbers of processes",
        "last, between numbers of processes",
        "perplexity, between numbers of processes",
    }
    assert found["first, between numbers of processes"] < 1e-3
    run(monkeypatch, "processes.py", *command, "--max-windows", "1")  # taken from the folders
    assert capsys.readouterr().out == printed


def test_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--prompt-tokens", "40", "--new-tokens", "4", "--repeats", "2", "--group-size", "32", "--no-memory"]
    ways = ["--kernel", "reference", "--memory", "1MB"]
    run(monkeypatch, "inference.py", "--random-llama", "tiny", "--work", str(tmp_path), *short, *ways)
    output = capsys.readouterr().out
    found = headline(output)
    assert list(found)[:2] == ["decode of llmqat against bf16", "prefill of llmqat against bf16"]
    assert {"decode of llmqat, reference against bf16", "prefill of llmqat, memory=1MB against bf16"} <= set(found)
    assert all(value > 0 for value in found.values())
    assert "llama.cpp" in output
    run(monkeypatch, "inference.py", "--child", "llmqat", "--folder", str(tmp_path / "llama-tiny-int4"))
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone["file"] == (tmp_path / "llama-tiny-int4" / "model.safetensors").stat().st_size
    assert min(alone["load"], alone["first"]) > 0


def test_word_perplexity(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
    text = tmp_path / "pages.txt"
    text.write_text(
        "".join(f" = Page {n} = \n\n Some well @-@ known words , of a page . \n" for n in range(3)), encoding="utf-8"
    )
    arguments = ["--text", str(text), "--window", "32", "--max-pages", "2"]
    run(monkeypatch, "word_perplexity.py", "--model", str(folder), *arguments)
    output = capsys.readouterr().out
    assert "2 pages of" in output
    assert list(headline(output)) == ["relative difference"]
    assert headline(output)["relative difference"] < 0.2  # 33 nats a word, in bfloat16


LAUNCHER = """
import os, pathlib, subprocess, sys, time
out, ends = pathlib.Path(sys.argv[1]), sys.argv[2]
children = [subprocess.Popen(["sleep", ends], env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
out.mkdir(exist_ok=True)
(out / "status.json").write_text('{"stage": "train"}')
while any(child.poll() is None for child in children):
    if any(child.poll() for child in children):
        [child.kill() for child in children]
        sys.exit(1)
    time.sleep(0.02)
(out / "model").mkdir(exist_ok=True)
(out / "model" / "config.json").write_text("{}")
(out / "model" / "model.safetensors").write_bytes(BYTES)
"""


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("same", [True, False])
def test_kills(same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A launcher of two processes that sleep stands in for torchrun; its files are always, or never, the same."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import kills

    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER.replace("BYTES", "b'weights'" if same else "os.urandom(8)"))

    def started(folder: Path, processes: int) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, str(launcher), str(folder), "0.6"], text=True)

    monkeypatch.setattr(kills, "started", started)
    monkeypatch.setattr(sys, "argv", ["kills.py", "--out", str(tmp_path / "runs"), "--kills", "2"])
    kills.main()
    output = capsys.readouterr().out
    found = headline(output)
    assert found["kills"] == 2
    assert found["same bytes"] == (2 if same else 0)
    assert "main process" in output
    assert "process 1" in output
    assert "train" in output

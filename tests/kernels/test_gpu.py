"""GPU kernels without a GPU: Triton's under its interpreter against the reference, torch's by its shapes.

With a GPU, test_kernels.py runs them all on it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmqat.kernels import packed_linear
from llmqat.kernels.cuda import int4_layout
from llmqat.layers import WeightConfig
from tests.kernels.test_kernels import packed_layer

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: kernel not tested")
@pytest.mark.parametrize(
    "interpreted",
    [True, pytest.param(False, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))],
)
def test_triton_unpacks_the_weights_of_the_reference(interpreted: bool) -> None:
    # Read when triton is imported, so in a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    command = [sys.executable, "-m", "tests.kernels.interpreted"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) == 5 * 4 * 2 * 3


@pytest.mark.skipif(importlib.util.find_spec("gemlite") is None, reason="gemlite is not installed: kernel not tested")
def test_gemlite_agrees_with_the_reference_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.kernels.interpreted_gemlite"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) == 4 * 3 * 2 * 4 + 4 - 2 * 2


def test_a_gpu_kernel_asked_for_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight()
    for name in ("cuda-int4", "triton"):
        with pytest.raises(ValueError, match=f"kernel='{name}' cannot run here: it runs on"):
            packed_linear(torch.randn(1, 384).bfloat16(), weight, kernel=name)


def test_the_layout_of_the_cuda_kernel_has_the_shapes_that_torch_wants() -> None:
    weight = packed_layer(WeightConfig(num_bits=3, group_size=96)).to("meta").packed_weight()
    blob, scales_and_zeros = int4_layout(weight, 32)
    assert blob.shape == (64 // 8, 384 // (8 * 16), 32, 8 // 2)
    assert blob.numel() * blob.element_size() == 64 * 384 // 2
    assert scales_and_zeros.shape == (384 // 32, 64, 2)

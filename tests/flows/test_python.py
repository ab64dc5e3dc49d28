"""Python's road: the code of the README, and the examples in recipes/python, each run on a tiny model."""

from __future__ import annotations

import json
import pydoc
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmqat
from llmqat.calibrate import STAGES
from llmqat.config import Registry
from llmqat.data import SOURCES
from llmqat.export import CONVERSIONS
from llmqat.layers import PRESETS, PackedLinear
from llmqat.status import look
from llmqat.terminal import name_program
from tests.flows.small import small

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "recipes" / "python").glob("*.py"))
REGISTRIES: tuple[Registry[Any], ...] = (STAGES, SOURCES, CONVERSIONS, PRESETS)


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a script registers is gone after it, and what it writes lies in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)
    name_program("llmqat")


def with_changes(code: str, changes: Mapping[str, str]) -> str:
    """Returns `code` with its figures made small; each must be there."""
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


def run_script(name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs an example with a command line; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "recipes" / "python" / name), run_name="__main__")
    return int(ended.value.code or 0)


def test_the_code_of_the_readme_runs_and_ends_with_a_packed_model(tiny_folder: Path):
    found = re.search(r"^## In Python\n.*?^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert found is not None
    small_figures = {"65_536": "256", "block_size=512": "block_size=32", "max_steps=60": "max_steps=2"}
    code = with_changes(found[1], {"HuggingFaceTB/SmolLM2-135M-Instruct": str(tiny_folder), **small_figures})
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    model = names["model"]
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 6)


def test_help_lists_every_public_name_and_the_fields_of_a_scheme():
    words = set(re.findall(r"\w+", llmqat.__doc__ or ""))
    assert set(llmqat.__all__) <= words
    for name in llmqat.__all__:
        assert getattr(llmqat, name).__doc__, name
    shown = pydoc.plain(pydoc.render_doc(llmqat.QuantConfig))
    assert "embeddings ('keep' | 'int8' | 'int4'): Token embeddings: high precision, int8 a row" in shown
    assert "skip_first (int): Transformer layers at the start that are left alone. (default 0)" in shown


def test_help_does_not_ask_for_an_optional_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "llmqat.train.sft", raising=False)
    for name in ("QATSFTTrainer", "QATSFTConfig"):
        monkeypatch.delitem(vars(llmqat), name, raising=False)
    assert "prepare(model" in pydoc.plain(pydoc.render_doc(llmqat))
    assert "QATTrainer" in dir(llmqat)
    assert "QATSFTTrainer" not in dir(llmqat)
    with pytest.raises(ImportError, match=r"needs trl"):
        _ = llmqat.QATSFTTrainer


def test_a_name_that_is_not_there_names_the_nearest():
    with pytest.raises(
        AttributeError, match=r"no attribute 'load_modle'; did you mean 'load_model'\? public names are"
    ):
        _ = llmqat.load_modle


def test_an_example_is_short_and_says_how_it_is_run():
    assert [script.stem for script in SCRIPTS] == ["own_format", "own_loss", "own_scheme", "own_source", "own_stage"]
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert f"python {script.name} " in text
        assert len(text.splitlines()) <= 50, script.name


def test_a_loss_of_ones_own(tiny_folder: Path):
    script = ROOT / "recipes" / "python" / "own_loss.py"
    small_figures = {"16_384": "256", "block_size=256": "block_size=32"}
    names: dict[str, Any] = {"__name__": "own_loss"}
    exec(compile(with_changes(script.read_text(), small_figures), script.name, "exec"), names)
    names["main"](str(tiny_folder), "out", 4, 8)
    state = json.loads((Path("out-run") / "checkpoint-4" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert 0 < losses[-1] < losses[0]
    assert llmqat.load("out").generate(torch.tensor([[5, 6]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 4)


def test_a_scheme_of_ones_own(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run_script("own_scheme.py", "audit", str(tiny_folder), "--scheme", "mine", monkeypatch=monkeypatch) == 0
    assert f"next: python {SCRIPTS[2]} quantize {tiny_folder} --scheme mine" in capsys.readouterr().out
    del PRESETS["mine"]
    words = ("quantize", str(tiny_folder), "--scheme", "mine", "--method", "rtn", "--out", "out")
    assert run_script("own_scheme.py", *words, monkeypatch=monkeypatch) == 0
    assert f"next: python {SCRIPTS[2]} chat " in capsys.readouterr().out
    layers = {name: layer for name, layer in llmqat.load("out").named_modules() if isinstance(layer, PackedLinear)}
    assert layers["model.layers.0.mlp.down_proj"].weights.label == "int8 channel"
    assert layers["model.layers.1.self_attn.q_proj"].weights.label == "int3 g32"
    assert "model.layers.0.self_attn.q_proj" not in layers


def test_a_stage_and_a_source_of_ones_own_in_a_recipe(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    cells = [{"cell_type": "markdown", "source": ["# Title\n", "Some words of a notebook.\n"] * 40}]
    Path("books").mkdir()
    for number in range(3):
        (Path("books") / f"{number}.ipynb").write_text(json.dumps({"cells": cells * (number + 1)}))
    stage = "{stage: norm-tweak, steps: 6, blocks: 4, learning_rate: 1e-3}"
    source = "data={source: notebooks, path: books, block_size: 32, tokens: 256}"
    runpy.run_path(str(ROOT / "recipes" / "python" / "own_source.py"))  # adds the source, and is no command line
    words = small(tiny_folder, Path("run"), source, f"calibrate=[{{stage: ranges, blocks: 2}}, {stage}]")
    assert run_script("own_stage.py", "train", "lora-int4", "lora=null", *words, monkeypatch=monkeypatch) == 0
    results = json.loads((Path("run") / "results.json").read_text())
    ranges, tweaked = results["calibration"]
    assert (ranges["stage"], tweaked["stage"]) == ("ranges", "norm-tweak")
    assert tweaked["kl_after"] < tweaked["kl_before"]
    assert f"next: python {SCRIPTS[4]} chat run/model" in look(Path("run")).lines
    assert results["text"]["source"].startswith("notebooks in ")


def test_a_source_of_ones_own_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    words = ("plan", "lora-int4", "data={source: notebooks, chat_share: 0.5}")
    assert run_script("own_source.py", *words, monkeypatch=monkeypatch) == 2
    assert "data.chat_share is not used with data.source='notebooks'" in capsys.readouterr().err


def test_a_format_of_ones_own(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    words = ("quantize", str(tiny_folder), "--scheme", "int4-g32", "--method", "rtn", "--out", "packed")
    assert run_script("own_scheme.py", *words, monkeypatch=monkeypatch) == 0
    words = ("export", "packed", "--format", "npz", "--out", "model.npz")
    capsys.readouterr()
    assert run_script("own_format.py", *words, monkeypatch=monkeypatch) == 0
    assert "next:" not in capsys.readouterr().out
    model = llmqat.load("packed")
    with np.load("model.npz") as arrays:
        name = "model.layers.1.mlp.down_proj"
        codes, scale = torch.from_numpy(arrays[f"{name}.codes"]), torch.from_numpy(arrays[f"{name}.scale"])
    rows, columns = codes.shape
    weight = (codes.reshape(rows, -1, 32) * scale[:, :, None]).reshape(rows, columns)
    assert torch.equal(weight, model.get_submodule(name).dequantized_weight(torch.float32))
    with pytest.raises(ValueError, match="format 'npz' is there already"):
        CONVERSIONS.register("npz", lambda *_: {})

"""The report on layers against a direct computation, its table, file and picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from llmqat import QuantConfig
from llmqat.calibrate import LayerReport, Originals, RangesStage, calibrate, report_layers
from llmqat.calibrate.stages import ORIGINALS_FILE
from llmqat.evaluate.layers import kind_of, render_layers, write_layers
from llmqat.grid import quantize
from llmqat.models import cast_parameters
from tests.tiny import ARCHITECTURES, tiny_architecture, tiny_llama

IDS = torch.randint(2, 258, (4, 16), generator=torch.Generator().manual_seed(0))


def test_the_figures_are_what_they_say(tmp_path: Path) -> None:
    model = tiny_llama()
    name = "model.layers.1.mlp.down_proj"
    original = model.get_submodule(name).weight.detach().clone().to(torch.bfloat16).float()
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    with torch.no_grad(), cast_parameters(model, torch.bfloat16):
        model(IDS)
    hook.remove()
    calibrate(model, QuantConfig.preset("int3", group_size=32), [RangesStage(method="mse")], None, folder=tmp_path)
    layer = model.get_submodule(name)
    with torch.no_grad():  # what training would do
        layer.weight.add_(0.3 * layer.scale().abs().repeat_interleave(32, 1))
    reports = report_layers(model, Originals(tmp_path / ORIGINALS_FILE), IDS)
    assert len(reports) == 14
    report = next(report for report in reports if report.name == name)
    quantized = layer.quantized_weight(torch.float32).detach()
    noise = float((original - quantized).square().sum() / original.square().sum())
    assert report.sqnr == pytest.approx(-10 * math.log10(noise), rel=1e-4)
    x = seen[0].float().flatten(0, 1)
    wanted = float((x @ (original - quantized).t()).square().sum() / (x @ original.t()).square().sum())
    assert report.output_error == pytest.approx(wanted, rel=0.02)
    moved = quantize(original, layer.scale().detach(), None, layer.grid) != layer.codes()
    assert report.moved == pytest.approx(float(moved.float().mean()))
    assert 0.2 < report.moved < 0.4
    largest = original.view(64, 4, 32).abs().amax(-1)
    assert report.clip_ratio == pytest.approx(float((4 * layer.scale().detach().abs() / largest).mean()), rel=1e-4)
    assert report.scheme == "int3 g32"


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "gpt_oss"])
def test_other_layouts_and_experts(model_type: str, tmp_path: Path) -> None:
    model = tiny_architecture(model_type)
    quant = QuantConfig.preset("int4", group_size=32, symmetric=model_type != "gpt2")
    calibrate(model, quant, [RangesStage(method="mse")], None, folder=tmp_path)
    reports = report_layers(model, Originals(tmp_path / ORIGINALS_FILE), IDS)
    assert len(reports) == 2 * len(ARCHITECTURES[model_type][1])
    assert all(report.sqnr > 10 for report in reports)
    assert all(report.moved < 0.02 for report in reports)  # the originals are kept in bfloat16
    assert all((report.output_error is None) == ("experts" in report.name) for report in reports)
    assert len(render_layers(reports).rows) == len(ARCHITECTURES[model_type][1])


def test_without_text_there_is_no_output_error(tmp_path: Path) -> None:
    model = tiny_llama()
    calibrate(model, QuantConfig.preset("int4", group_size=32), [], None, folder=tmp_path)
    reports = report_layers(model, Originals(tmp_path / ORIGINALS_FILE), None)
    assert len(reports) == 14
    assert {report.output_error for report in reports} == {None}
    assert all(report.clip_ratio == pytest.approx(8 / 7, rel=0.01) for report in reports)  # absmax over 7 codes


def test_a_model_that_cannot_be_walked_is_reported_on_without_output_errors(tmp_path: Path) -> None:
    """The report comes last, after hours of training perhaps."""
    model = tiny_llama()
    calibrate(model, QuantConfig.preset("int4", group_size=32), [], None, folder=tmp_path)
    count = [0]

    def drift(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        return output * (1 + count[0])

    model.model.layers[0].mlp.register_forward_hook(drift)
    reports = report_layers(model, Originals(tmp_path / ORIGINALS_FILE), IDS)
    assert [report.output_error for report in reports] == [None] * 14


def test_table_file_and_picture(tmp_path: Path) -> None:
    reports = [
        LayerReport(f"model.layers.{block}.{kind}", "int4 g32", 20.0 + block, 0.01 * (block + 1), 0.1, 1.0)
        for block in range(3)
        for kind in ("mlp.up_proj", "mlp.down_proj")
    ]
    console = Console(width=120, record=True, quiet=False)
    console.print(render_layers(reports))
    shown = console.export_text()
    assert "mlp.up_proj" in shown
    assert "2.00%" in shown
    assert "3.00% (2)" in shown
    console.print(render_layers([LayerReport("model.layers.0.mlp", "int8 channel", 50.0, 3.1e-5, 0.0, 1.0)]))
    assert "0.0031%" in console.export_text()
    files = write_layers({"calibrated": reports, "trained": reports}, tmp_path / "out", picture=True)
    assert [file.name for file in files] == ["layers.json", "layers.png"]
    assert json.loads(files[0].read_text())["trained"][0] == reports[0].to_dict()
    assert files[1].read_bytes().startswith(b"\x89PNG")
    without = [LayerReport(r.name, r.scheme, r.sqnr, None, r.moved, r.clip_ratio) for r in reports]
    write_layers({"quantized": without}, tmp_path / "plain", picture=True)
    assert kind_of("transformer.h.11.attn.c_attn") == "attn.c_attn"

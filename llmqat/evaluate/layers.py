"""The report on layers, for people: a table by kind of layer, and a picture of every layer of every block."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from llmqat.calibrate import LayerReport
from llmqat.extras import check_installed
from llmqat.files import file_in_progress, write_whole
from llmqat.layers import PackedModule, QuantModule
from llmqat.models import adapter_base, quantized_by, read_config, resolve_spec, weight_files
from llmqat.terminal import Column, FittedTable

BLOCK_NUMBER = re.compile(r"\.(\d+)\.")
"""The number of a block in the dotted name of a layer."""
MOST_DECIMALS = 6
"""Of a share in percent."""
JSON_FILE = "layers.json"
PICTURE_FILE = "layers.png"


def kind_of(name: str) -> str:
    """Returns a layer's name after the number of its block: 'mlp.down_proj'."""
    return BLOCK_NUMBER.split(name)[-1]


def render_layers(reports: Sequence[LayerReport]) -> FittedTable:
    """Returns a table with a line a kind of layer: means over blocks, and the block with the largest output error."""
    columns = (
        Column("layer", 0, "name"),
        Column("scheme", 4, "prose"),
        Column("SQNR dB", 2),
        Column("output error", 1),
        Column("worst (block)", 3),
        Column("codes moved", 5),
        Column("clip ratio", 6),
    )
    table = FittedTable(columns, "layers: means over blocks")
    for kind, group in _by_kind(reports).items():
        errors = {report.name: report.output_error for report in group if report.output_error is not None}
        worst = max(errors, key=lambda name: errors[name] or 0.0, default=None)
        table.add_row(
            kind,
            ", ".join(sorted({report.scheme for report in group})),
            f"{statistics.fmean(report.sqnr for report in group):.1f}",
            _percent(statistics.fmean(errors.values())) if errors else "",
            "" if worst is None else f"{_percent(errors[worst])} ({_block(worst)})",
            f"{statistics.fmean(report.moved for report in group):.1%}",
            f"{statistics.fmean(report.clip_ratio for report in group):.2f}",
        )
    return table


def _percent(share: float) -> str:
    """Returns a share in percent: two decimals, or as many as show two digits of it. Of 8 bits it is 0.0031%."""
    decimals = 2 if share <= 0 else max(2, 1 - math.floor(math.log10(100 * share)))
    return f"{share:.{min(decimals, MOST_DECIMALS)}%}"


@torch.no_grad()
def weight_errors(model: nn.Module, original: str) -> dict[str, float]:
    """Returns |W - Ŵ|² / |W|² of each matrix of `model` that the model `original` has under the same name and shape.

    Nothing where the original's files are not on this machine, or are an adapter's, to be merged first. After smoothing
    or rotation the weights are others by design, and the figure means nothing.

    Args:
        model: plain, fake-quantized or packed.
        original: what `models.load_model` takes.
    """
    if adapter_base(original) is not None:
        return {}
    source = resolve_spec(original)
    if quantized_by(read_config(source, original)) is not None:  # whose codes are no weights
        return {}
    try:
        folder = source if isinstance(source, Path) else Path(snapshot_download(source, local_files_only=True))
        shards = weight_files(folder)
    except OSError:
        return {}
    found: dict[str, float] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # it is no mapping
                weight = _matrix_of(model, key)
                if weight is None or tensors.get_slice(key).get_shape() != list(weight.shape):
                    continue
                wanted = tensors.get_tensor(key).float()
                error = (weight.float().cpu() - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)
                found[key.removesuffix(".weight")] = float(error)
    return found


def _matrix_of(model: nn.Module, key: str) -> torch.Tensor | None:
    """Returns the weight that the forward of the linear layer with the state-dict key `key` computes with, or None."""
    name, _, leaf = key.rpartition(".")
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    if leaf != "weight" or not BLOCK_NUMBER.search(key):
        return None
    if isinstance(module, PackedModule):
        matrix: torch.Tensor = module.dequantized_weight(torch.float32)
        return matrix.mT if getattr(module, "transposed", False) else matrix
    if isinstance(module, QuantModule):
        return module.quantized_weight(torch.float32)
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


def write_layers(stages: Mapping[str, Sequence[LayerReport]], folder: Path, *, picture: bool) -> list[Path]:
    """Writes layers.json, and layers.png if asked for, into `folder`; returns the files.

    Args:
        stages: reports by when they were taken, such as 'calibrated' and 'trained'.
        folder: made where it is not there.
        picture: also draw one.

    Raises:
        ImportError: when a picture is asked for and matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything: dict[str, Any] = {name: [report.to_dict() for report in reports] for name, reports in stages.items()}
    write_whole(folder / JSON_FILE, json.dumps(everything, indent=2) + "\n")
    files = [folder / JSON_FILE]
    if picture:
        files.append(draw_layers(stages, folder / PICTURE_FILE))
    return files


def check_picture() -> None:
    """Raises ImportError where pictures cannot be drawn because matplotlib is not installed."""
    check_installed("matplotlib", "a picture of the layers")


def draw_layers(stages: Mapping[str, Sequence[LayerReport]], path: Path) -> Path:
    """Draws, for each stage, output error (or else SQNR) by block and kind of layer; returns `path`.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    check_installed("matplotlib", "a picture of the layers")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2 * len(stages)), layout="constrained")
    FigureCanvasAgg(figure)
    looked = any(report.output_error is not None for reports in stages.values() for report in reports)
    label = "output error, %" if looked else "SQNR, dB"

    def value(report: LayerReport) -> float:
        if not looked:
            return report.sqnr
        return float("nan") if report.output_error is None else 100 * report.output_error

    grids = {
        name: {kind: {_block(r.name): value(r) for r in group} for kind, group in _by_kind(reports).items()}
        for name, reports in stages.items()
    }
    shown = [cell for rows in grids.values() for row in rows.values() for cell in row.values() if cell == cell]
    for position, (name, rows) in enumerate(grids.items(), 1):
        axes = figure.add_subplot(len(grids), 1, position)
        columns = sorted({block for row in rows.values() for block in row})
        cells = [[row.get(column, float("nan")) for column in columns] for row in rows.values()]
        image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=min(shown), vmax=max(shown))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_xticks(range(len(columns)), [str(column) for column in columns])
        axes.set_xlabel("block")
        axes.set_title(name)
        figure.colorbar(image, ax=axes, label=label)
    with file_in_progress(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:])
    return path


def _by_kind(reports: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    groups: dict[str, list[LayerReport]] = {}
    for report in reports:
        groups.setdefault(kind_of(report.name), []).append(report)
    return groups


def _block(name: str) -> int:
    found = BLOCK_NUMBER.search(name)
    return int(found[1]) if found else 0

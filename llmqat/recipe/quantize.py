"""Quantization without training: a recipe's rooms up to calibration, then straight to the packed checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch

from llmqat.calibrate import CalibrationConfig
from llmqat.data import DataConfig, load_blocks
from llmqat.export.checkpoint import ExportReport, save
from llmqat.layers import prepare
from llmqat.models import load_model
from llmqat.recipe.config import scheme_of
from llmqat.recipe.pipeline import calibrate, needs_text, outliers_folded, token_bar
from llmqat.recipe.plan import coverage_of
from llmqat.train import processor_has_bf16

METHODS: dict[str, Literal["minmax", "weighted_mse"]] = {"rtn": "minmax", "search": "weighted_mse"}
"""The command line's word for a method -> `calibrate.method`."""


def quantize_model(
    spec: str,
    folder: Path,
    *,
    scheme: str = "int4",
    group_size: int | None = None,
    method: str = "search",
    rotate: bool = False,
    smooth: float | None = None,
    text: Path | None = None,
    tokens: int = 16384,
    block_size: int = 512,
    seed: int = 0,
    overwrite: bool = False,
) -> ExportReport:
    """Writes `spec` packed to `folder`, with scales from calibration, proves it, and returns what was written.

    Args:
        spec: what `load_model` takes.
        folder: must not exist, unless `overwrite`.
        scheme: a preset of QuantConfig.
        group_size: weights that share one scale; the preset's own where not given.
        method: `rtn` (plain rounding) or `search` (clip ratios weighted by the inputs' mean squares).
        rotate: rotate the residual stream first.
        smooth: SmoothQuant's alpha, to smooth layer inputs first.
        text: a file or folder to calibrate on; where not given, the model writes the text.
        tokens: how much text is used.
        block_size: tokens in a block of it.
        seed: of what the model writes.
        overwrite: whether a model that lies in `folder` is replaced.

    Raises:
        FileExistsError: the folder exists.
        FileNotFoundError: the model or the text is not there.
        ValueError: the model, text, method or scheme does not do.
    """
    if method not in METHODS:
        raise ValueError(f"--method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if folder.exists() and not overwrite:  # save would say so too, but only after the calibration
        raise FileExistsError(f"output folder {folder} exists already; choose another --out, or give --overwrite")
    model, tokenizer = load_model(spec, torch.float32)
    quant = scheme_of(scheme, group_size)
    calibration = CalibrationConfig(
        method=METHODS[method], rotate=rotate, smooth=smooth, blocks=math.ceil(tokens / block_size)
    )
    facts: dict[str, Any] = {"model": spec, "calibrate": calibration.model_dump(mode="json")}
    ids = None
    coverage_of(spec, quant, rotate)  # a scheme that does not do should not cost the text
    needed = needs_text(calibration, quant)
    if text is not None and not needed:
        raise ValueError(f"--method {method} looks at the weights alone; drop --text {text}, or use --method search")
    if needed:
        source: dict[str, Any] = {"source": "synthetic"} if text is None else {"source": "text", "path": text}
        data = DataConfig(**source, tokens=tokens, block_size=block_size, seed=seed)
        with token_bar("text") as progress:
            blocks = load_blocks(data, tokenizer, load_model(spec, torch.bfloat16)[0], progress)
        facts["text"] = {"source": blocks.source, "sha256": blocks.sha256, "tokens": blocks.tokens}
        ids = blocks.ids
    outliers_folded(model, ids, calibration, seed)
    prepare(model, quant)
    calibrate(model, ids, calibration, processor_has_bf16())
    return save(model, folder, tokenizer, run=facts, overwrite=overwrite)

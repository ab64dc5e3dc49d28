"""A finished run in MLflow's model registry, kept in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmqat.export.registry import register, tags_of
from llmqat.recipe import RunResult, load_recipe, quantize_model, run
from tests.flows.small import small

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "smollm2-135m-int4.yaml"
CALIBRATION = ("calibrate=[{stage: ranges, blocks: 2}, {stage: gptq, blocks: 2}]", "quant.group_size=32")


def trained(tiny_folder: Path, output: Path, *more: str) -> RunResult:
    result = run(load_recipe(RECIPE, small(tiny_folder, output, *CALIBRATION, *more)))
    assert result is not None
    return result


def expected(result: RunResult, output: Path) -> dict[str, str]:
    measured = result.comparison.rows[-1].evaluations["pydoc"]
    recorded = json.loads((output / "results.json").read_text())
    return {
        "method": "ranges, gptq, distillation of all weights",
        "bits": "4",
        "group_size": "32",
        "bits_per_weight": str(result.report.bits_per_weight),
        "bytes": str(result.report.weight_bytes),
        "base_model": recorded["recipe"]["model"],
        "calibration_data_sha256": recorded.get("calibration_text", recorded["text"])["sha256"],
        "training_data_sha256": recorded["text"]["sha256"],
        "trained_tokens": "128",
        "perplexity pydoc": str(round(measured.perplexity, 6)),
        "kl pydoc": str(round(measured.kl, 6)),
        "top1 pydoc": str(round(measured.top1, 6)),
    }


def test_tags_say_how_it_was_made_and_what_was_measured(tiny_folder: Path, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"Text number {number} says little. " * 20)
    data = f"data={{source: text, path: {tmp_path}, tokens: 256, block_size: 32, calibration_share: 0.5}}"
    result = trained(tiny_folder, tmp_path / "run", data)
    assert tags_of(result.checkpoint) == expected(result, tmp_path / "run")
    assert tags_of(result.checkpoint)["calibration_data_sha256"] != tags_of(result.checkpoint)["training_data_sha256"]


def test_tags_of_what_was_not_trained(tiny_folder: Path, tmp_path: Path) -> None:
    quantize_model(str(tiny_folder), tmp_path / "out", scheme="int8", method="rtn")
    assert tags_of(tmp_path / "out") == {
        "method": "plain rounding",
        "bits": "8",
        "group_size": "channel",
        "base_model": str(tiny_folder),
    }


def test_a_finished_run_is_registered(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow", reason="mlflow is not installed (extra: mlflow)")
    store = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    mlflow.set_tracking_uri(store)
    result = trained(tiny_folder, tmp_path / "mine", "train.report_to=mlflow")
    client = mlflow.MlflowClient()
    (version,) = client.search_model_versions("name='mine'")
    assert version.tags == expected(result, tmp_path / "mine")
    assert client.get_run(version.run_id).data.metrics["loss"] > 0
    files = Path(mlflow.artifacts.download_artifacts("models:/mine/1", dst_path=str(tmp_path / "again")))
    for file in result.checkpoint.iterdir():
        assert (files / file.name).read_bytes() == file.read_bytes()
    assert register(result.checkpoint, "mine", version.run_id) == "2"
    with pytest.raises(OSError, match=r"did not register .* as 'mine'"):
        register(result.checkpoint, "mine", "no-such-run")

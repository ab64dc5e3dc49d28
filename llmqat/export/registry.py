"""A finished checkpoint in MLflow's model registry: its files beside the run's curves, and tags to find it by.

All tags come from the folder itself, as a model card does. What the registry lists is then found without opening a
file: how the model was made, its bits, what text it has seen, and what was measured of it.

    folder -> artifacts of the run -> version N of the model NAME, tagged

The store is MLflow's own matter: MLFLOW_TRACKING_URI, MLFLOW_REGISTRY_URI.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmqat.export.card import checkpoint_facts, own_row, stages_of
from llmqat.extras import require

ARTIFACT_FOLDER = "model"
"""Where the checkpoint lies among the artifacts of the run."""
LONGEST_TAG = 5000
"""Characters that MLflow takes as a value."""
RESULTS = ("perplexity", "kl", "top1")
_PURPOSE = "MLflow's model registry"


def tracked_run() -> str:
    """Returns the id of the run that MLflow has tracked last in this process.

    Raises:
        ImportError: MLflow is not installed.
        ValueError: there was none.
    """
    run = require("mlflow", _PURPOSE).last_active_run()
    if run is None:
        raise ValueError("MLflow has tracked no run in this process; train with report_to=mlflow first")
    return str(run.info.run_id)


def register(folder: Path, name: str, run_id: str) -> str:
    """Adds the packed checkpoint in `folder` to the registered model `name`; returns the number of the new version.

    Args:
        folder: a packed checkpoint, with the llmqat.json of its run.
        name: of the registered model, made where it is not there.
        run_id: the MLflow run that takes the files as artifacts.

    Raises:
        ImportError: MLflow is not installed.
        OSError: the registry cannot be reached, or refuses.
    """
    mlflow = require("mlflow", _PURPOSE)
    from mlflow.exceptions import MlflowException

    tags, client = tags_of(folder), mlflow.MlflowClient()
    try:
        client.log_artifacts(run_id, str(folder), ARTIFACT_FOLDER)
        if not client.search_registered_models(f"name='{name}'"):
            client.create_registered_model(name)
        # Not mlflow.register_model: since MLflow 3 it takes only what one of MLflow's own flavors has written.
        version = client.create_model_version(name, f"runs:/{run_id}/{ARTIFACT_FOLDER}", run_id, tags=tags)
    except MlflowException as error:
        raise OSError(f"MLflow did not register {folder} as {name!r}: {error}") from error
    return str(version.version)


def tags_of(folder: Path) -> dict[str, str]:
    """Returns what the registry lists of the packed checkpoint in `folder`; what it does not know is left out.

    `method`, `bits` and `group_size` (each value that occurs), `bits_per_weight`, `bytes`, `base_model`, the hashes of
    the text that was calibrated and trained on, `trained_tokens`, and the figures of each evaluation text.
    """
    config, facts = checkpoint_facts(folder)
    run = facts.get("run") or {}
    training, row = run.get("training") or {}, own_row(run) or {}
    weights = [group["weights"] for group in config["quantization_config"].get("config_groups", {}).values()]
    recipe = run.get("recipe") or {}
    tags: dict[str, Any] = {
        "method": _method(run, recipe),
        "bits": _listed(entry["num_bits"] for entry in weights),
        "group_size": _listed(entry.get("group_size") or entry["strategy"] for entry in weights),
        "bits_per_weight": row.get("bits_per_weight"),
        "bytes": row.get("bytes_on_disk"),
        "base_model": recipe.get("model") or run.get("model"),
        "calibration_data_sha256": (run.get("calibration_text") or run.get("text") or {}).get("sha256"),
        "training_data_sha256": (run.get("text") or {}).get("sha256") if training else None,
        "trained_tokens": training.get("tokens"),
        **_results(row),
    }
    return {key: str(value)[:LONGEST_TAG] for key, value in tags.items() if value not in (None, "")}


def _method(run: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Returns the stages that made the weights, in order, such as "ranges, gptq, distillation of all weights"."""
    stages = stages_of(run)
    if not run.get("training"):
        return ", ".join(stages) or "plain rounding"
    train = recipe.get("train") or {}
    trained = "adapters" if recipe.get("lora") else "scales" if train.get("trainable") == "scales" else "all weights"
    losses = ["distillation"] if train.get("kl_weight", 1.0) else []
    losses += ["cross-entropy"] if train.get("cross_entropy_weight") else []
    return ", ".join([*stages, f"{' and '.join(losses)} of {trained}"])


def _listed(values: Any) -> str:
    return ", ".join(sorted({str(value) for value in values}))


def _results(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns figures as `kl pydoc` -> 0.1: the text's folders are nobody's matter."""
    texts = row.get("texts") or {}
    short = {text: Path(text).name for text in texts}
    names = short if len({*short.values()}) == len(texts) else dict(zip(texts, texts, strict=True))
    return {
        f"{metric} {names[text]}": round(values[metric], 6)
        for text, values in texts.items()
        for metric in RESULTS
        if values.get(metric) is not None
    }

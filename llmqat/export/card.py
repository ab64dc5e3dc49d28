"""The model card of a packed checkpoint, from nothing but the folder itself: config.json and llmqat.json.

The metadata that the hub reads (base model, license, datasets, measured results) goes on top as YAML, through
huggingface_hub's own classes; below it what a reader needs: how to load the model, what is quantized and how, on what
data, what was measured, and what was not. What the folder does not know is left out, never guessed: a local path is no
base model, and a license that nobody gave is not named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from llmqat.export.checkpoint import RUN_FILE, load
from llmqat.export.commands import VLLM_ON_CPU
from llmqat.export.compressed_tensors import KV_KEY
from llmqat.export.description import describe
from llmqat.export.serving import Verdict, served_by
from llmqat.export.stock import StockTrial, try_stock
from llmqat.hub import may_be_hub_id
from llmqat.terminal import markdown_table

STRADDLING, PACKS_STRADDLING = (3, 5, 6, 7), "0.18"
"""Bits whose codes lie across words, and the compressed-tensors that unpacks them first."""

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
"""Class that loads a model -> what the hub calls its task."""
_TEXTS = {"text": "text", "calibration_text": "text of the calibration", "validation_text": "text of the validation"}
"""Entry of a run's record -> what it is called."""
_LOCAL_PATH = re.compile(r"(?<!\S)(?:~|\.{1,2})?/(?:[^/\s]+/)*([^/\s:;,]+)/?")
"""A path that begins at the root, at home, or in the working folder; no hub id and no `package:` spec."""
_METRICS = {"perplexity": "perplexity", "kl": "KL from full precision (nats a token)", "top1": "top-1 agreement"}


def model_card(folder: Path, repository: str, *, license: str | None = None, base_model: str | None = None) -> str:
    """Returns the text of README.md for the packed checkpoint in `folder`.

    Args:
        folder: holds config.json, and llmqat.json where llmqat wrote it.
        repository: the hub id that it will have.
        license: the license of the original model, as the hub names it; not named where not given.
        base_model: the hub id of the original model; where not given, the run's own, if it was one.
    """
    config, facts = checkpoint_facts(folder)
    trial = StockTrial(**facts["stock_transformers"]) if "stock_transformers" in facts else try_stock(folder)
    served = _verdicts(folder, facts, trial)
    task = PIPELINES.get(trial.loader)
    run = facts.get("run", {})
    base = base_model or (None if run.get("model_is_local") else _hub_id(_source(run)))
    metadata = ModelCardData(
        license=license,
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="transformers",
        pipeline_tag=task,
        datasets=[name for name in [_dataset(run)] if name] or None,
        tags=[
            *(["llmqat"] if facts else []),
            "quantized",
            config["quantization_config"]["quant_method"],
            *_bit_tags(config),
        ],
        model_name=repository.rpartition("/")[2],
        eval_results=_results(run, task) or None,
    )
    parts = [
        f"# {repository.rpartition('/')[2]}",
        _introduction(base, run),
        "## How to load it",
        _loading(config, repository, trial, served),
        "## Who serves it",
        _served(served),
        "## What is quantized",
        _schemes(config),
        *(["## Bytes", _bytes(facts["bytes"])] if "bytes" in facts else []),
        *(["## Data and training", _data(run)] if run else []),
        *(["## Measured", _measured(run)] if _comparison(run) else []),
        "## Limits",
        _limits(config, facts, license),
        *(
            ["## Versions", markdown_table(("package", "version"), facts["versions"].items())]
            if "versions" in facts
            else []
        ),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def checkpoint_facts(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what the packed checkpoint in `folder` says of itself: config.json, and llmqat.json or nothing.

    Raises:
        ValueError: one of them is not JSON.
    """
    return _json(folder / "config.json"), _json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    return content


def _source(run: Mapping[str, Any]) -> str:
    """Returns what the run was told as its model."""
    return str(run.get("recipe", {}).get("model") or run.get("model") or "")


def _hub_id(spec: str) -> str | None:
    """Returns `spec` where it is a hub id; a path on somebody's disk is nobody's base model."""
    if "/" not in spec or Path(spec).exists() or Path(spec).suffix == ".gguf" or spec.startswith((".", "/", "~")):
        return None
    return spec if may_be_hub_id(spec) else None


def _dataset(run: Mapping[str, Any]) -> str | None:
    data = run.get("recipe", {}).get("data", {})
    return _hub_id(str(data.get("name") or "")) if data.get("source") == "dataset" else None


def _bit_tags(config: Mapping[str, Any]) -> list[str]:
    return [f"{bits}-bit" for bits in sorted({group["weights"]["num_bits"] for group in _groups(config)})]


def _groups(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(config["quantization_config"].get("config_groups", {}).values())


def _comparison(run: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = run.get("results", {}).get("comparison", {})
    return found


def stages_of(run: Mapping[str, Any]) -> list[str]:
    """Returns the stages that a model was calibrated by, in order, by a recipe or by `llmqat quantize`."""
    return [stage["stage"] for stage in (run.get("recipe") or {}).get("calibrate") or run.get("calibrate") or []]


def own_row(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the row of the comparison that is this checkpoint's."""
    rows = {row["role"]: row for row in _comparison(run).get("rows", [])}
    found: dict[str, Any] | None = rows.get("trained") or rows.get("training-free") or rows.get("plain rounding")
    return found


def _results(run: Mapping[str, Any], task: str | None) -> list[EvalResult]:
    row = own_row(run)
    return [
        EvalResult(
            task_type=task or "text-generation",
            dataset_type=_slug(text),
            dataset_name=f"{text} ({_comparison(run)['texts'][text]['windows']} windows)",
            metric_type=metric,
            metric_value=values[metric],
            metric_name=label,
        )
        for text, values in (row or {"texts": {}})["texts"].items()
        for metric, label in _METRICS.items()
        if values.get(metric) is not None
    ]


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in Path(text).name.lower())


# Sections


def _introduction(base: str | None, run: Mapping[str, Any]) -> str:
    origin = f"[{base}](https://huggingface.co/{base})" if base else "its original"
    if run.get("training"):
        how = "trained with its quantizers in the forward by llmqat"
    elif run:
        how = "calibrated by llmqat" if stages_of(run) else "rounded by llmqat"
    else:
        how = "in the format of compressed-tensors"
    return (
        f"A low-bit form of {origin}, {how}. The weights are packed in safetensors; `config.json` alone says "
        f"how they are read."
    )


def _verdicts(folder: Path, facts: Mapping[str, Any], trial: StockTrial) -> dict[str, Verdict]:
    """Returns what clients make of the checkpoint: as it was recorded, or asked now."""
    if (recorded := facts.get("served_by")) is not None:
        return {name: Verdict.from_dict(entry) for name, entry in recorded.items()}
    return served_by(describe(load(folder), trial=trial))


def _loading(config: Mapping[str, Any], repository: str, trial: StockTrial, served: Mapping[str, Verdict]) -> str:
    own = f"With llmqat, packed as it is:\n\n```python\nimport llmqat\n\nmodel = llmqat.load({repository!r})\n```"
    parts = []
    if trial.loads:
        how = ", which dequantizes it as it is loaded" if trial.dequantized else ""
        parts.append(
            f"With transformers (`{_installation(config)}`){how}:\n\n```python\nfrom transformers import "
            f"AutoTokenizer, {trial.loader}\n\nmodel = {trial.loader}.from_pretrained({repository!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({repository!r})\n```"
        )
    else:
        parts.append(f"Transformers alone does not load it: {trial.reason}.")
    parts.append(_with_vllm(repository, served["vllm"], served["vllm-cpu"]))
    if served["llama.cpp"].serves:
        parts.append(f"For llama.cpp:\n\n```\nllmqat export {repository} --format gguf --out model.gguf\n```")
    return "\n\n".join([*parts, own])


def _installation(config: Mapping[str, Any]) -> str:
    """Returns what to install for transformers to read the weights."""
    straddling = any(group["weights"]["num_bits"] in STRADDLING for group in _groups(config))
    return f'pip install "compressed-tensors>={PACKS_STRADDLING}"' if straddling else "pip install compressed-tensors"


def _with_vllm(repository: str, gpus: Verdict, cpus: Verdict) -> str:
    """Returns how vLLM serves the checkpoint, on GPUs and on CPUs, or why it does not."""
    commands = {f"vllm serve {repository}": gpus, f"{VLLM_ON_CPU} {repository}": cpus}
    parts = [
        f"With {verdict.title} ({verdict.basis}):\n\n```\n{command}\n```"
        for command, verdict in commands.items()
        if verdict.serves
    ]
    refused = [verdict for verdict in (gpus, cpus) if not verdict.serves]
    if len(refused) == 2 and gpus.reason == cpus.reason:
        refused = [replace(gpus, title="vLLM")]
    return "\n\n".join([*parts, *(f"{verdict.title} does not serve it: {verdict.reason}." for verdict in refused)])


def _served(served: Mapping[str, Verdict]) -> str:
    heads = ("program", "loads it", "limits, or why not", "evidence")
    return markdown_table(heads, [verdict.row for verdict in served.values()])


def _schemes(config: Mapping[str, Any]) -> str:
    rows = []
    for group in _groups(config):
        weights, inputs = group["weights"], group.get("input_activations")
        targets = group["targets"]
        named = f"`{targets[0]}`" if len(targets) == 1 else f"`{targets[0]}` and {len(targets) - 1} more"
        extent = f"groups of {weights['group_size']}" if weights.get("group_size") else "channel"
        if weights.get("block_structure"):
            extent = "blocks of " + " x ".join(map(str, weights["block_structure"]))
        zero = "symmetric" if weights.get("symmetric", True) else "with zero points"
        kind = "kept" if inputs is None else f"{_bits(inputs)} bits by {inputs['strategy'].replace('_', ' ')}"
        rows.append((named, _bits(weights), extent, zero, kind))
    table = markdown_table(("layers", "bits", "one scale for", "range", "inputs"), rows)
    ignored = config["quantization_config"].get("ignore") or []
    kept = f"\n\nLeft in high precision: {', '.join(f'`{name}`' for name in ignored)}." if ignored else ""
    cache = f"\n\nKV cache: `{json.dumps(config[KV_KEY])}`; other loaders keep it plain." if KV_KEY in config else ""
    if scheme := config["quantization_config"].get("kv_cache_scheme"):
        extent = "KV head" if scheme.get("strategy") == "attn_head" else "layer"
        cache = f"\n\nKV cache: FP8, with a calibrated scale for the keys and the values of each {extent}."
    return table + kept + cache


def _bits(args: Mapping[str, Any]) -> str:
    """Returns bits, and of floats that they are: '4', '8 (float)'."""
    return f"{args['num_bits']}{' (float)' if args.get('type') == 'float' else ''}"


def _bytes(sizes: Mapping[str, int]) -> str:
    rows = [(part, f"{size:,}") for part, size in sizes.items() if size]
    return markdown_table(("part of the weight files", "bytes"), [*rows, ("together", f"{sum(sizes.values()):,}")])


def _data(run: Mapping[str, Any]) -> str:
    training, recipe = run.get("training") or {}, run.get("recipe") or {}
    facts = {
        "seed": recipe.get("seed"),
        "calibration": ", ".join(stages_of(run)),
        "optimizer steps": training.get("steps"),
        "tokens trained on": training.get("tokens"),
        "tokens a second": training.get("tokens_per_second"),
    }
    earlier = [("text seen earlier", text) for text in run.get("earlier_texts") or []]
    texts = [*((name, run.get(key) or {}) for key, name in _TEXTS.items()), *earlier]
    rows = [row for name, text in texts for row in _text_rows(name, text)]
    rows += [(key, _shown(value)) for key, value in facts.items() if value not in (None, "")]
    return markdown_table(("what", "value"), rows)


def _text_rows(name: str, text: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what a text is called in the card, its hash and its length, as far as its record says so."""
    facts = {
        name: _public(text.get("source")),
        "SHA-256 of its tokens": text.get("sha256"),
        "tokens": text.get("tokens"),
    }
    return [(key, _shown(value)) for key, value in facts.items() if value is not None]


def _public(source: Any) -> str | None:
    """Returns a text's source with paths of the machine that read it shortened to their last part."""
    return None if source is None else _LOCAL_PATH.sub(r"\1", str(source))


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _measured(run: Mapping[str, Any]) -> str:
    comparison = _comparison(run)
    tables = []
    for text, entry in comparison["texts"].items():
        rows = [
            (
                row["name"],
                *(_cell(row["texts"][text].get(metric)) for metric in _METRICS),
                _cell(row.get("bits_per_weight")),
                _cell(row.get("bytes_on_disk")),
                _cell(row.get("decode_tokens_per_second")),
            )
            for row in comparison["rows"]
        ]
        heads = ("model", *_METRICS.values(), "bits a weight", "bytes", "tokens decoded a second")
        shape = f"{entry['windows']} windows of {entry['window']} tokens"
        tables.append(f"{_public(text)}, {shape}, SHA-256 `{entry['sha256']}`:\n\n{markdown_table(heads, rows)}")
    findings = [f"- {finding['level']}: {finding['text']}" for finding in comparison.get("findings", [])]
    machine = {key: value for key, value in comparison.get("environment", {}).items() if key != "host"}
    tables += ["\n".join(findings)] if findings else []
    return "\n\n".join([*tables, f"Measured on: {json.dumps(machine, ensure_ascii=False)}"])


def _cell(value: Any) -> str:
    return "" if value is None else _shown(value)


def _limits(config: Mapping[str, Any], facts: Mapping[str, Any], license: str | None) -> str:
    run: Mapping[str, Any] = facts.get("run", {})
    limits = [
        *(f"- {note}." for note in facts.get("notes", ())),
        "- It has the limits and biases of the original model, and what rounding cost beside them.",
        "- Perplexities compare only between models with one tokenizer, on one text, with one window.",
    ]
    if _source(run).endswith(".gguf"):
        limits.append("- The original was itself a dequantized GGUF file; 'full precision' above means that model.")
    if not _comparison(run):
        limits.append("- Nothing was measured when it was made; `llmqat compare` does.")
    if license is None:
        limits.append("- Whoever published it did not state the license; that of the original model holds.")
    return "\n".join(limits)

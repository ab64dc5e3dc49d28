"""What eval/gpu.py shows of its results: a table of each step, and the headline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

PLAIN = "bfloat16"
"""What eval/kernel_speed.py calls torch's product."""
Parts = Mapping[str, Mapping[str, Any]]
"""What was measured in a step, by part."""


def table(step: str, record: Mapping[str, Any]) -> list[Any]:
    """Returns the table of a step, then a line for each part that is missing, with the reason."""
    found: list[Any] = [TABLES[step](record["parts"])] if record["parts"] else []
    if found:
        where = record.get("environment", {})
        found[0].title = f"{step}, {where.get('gpu') or where.get('device')}, torch {where.get('torch')}"
        found[0].title_justify = "left"
    for part, error in record["errors"].items():
        found.append(f"{step}: {part} failed, {error['type']}: {error['message']}")
    for why in ("left_out", "not_here"):
        found += [f"{step}: {part} is left out: {reason}" for part, reason in record[why].items()]
    return found


def headline(step: str, parts: Parts) -> dict[str, float]:
    """Returns the figures of a step that matter most, by name."""
    return HEADLINES[step](parts)


def kernel_table(parts: Parts) -> Table:
    """Returns microseconds and errors of every kernel."""
    shown = Table("bits", "out x in", "rows", "kernel", "µs", f"of {PLAIN}", "called, µs", "error", "of bound")
    for part in parts.values():
        for rows, kernels in part["rows"].items():
            for name, own in kernels.items():
                ratio = own["replayed"] / kernels[PLAIN]["replayed"]
                times = f"{own['replayed']:.1f}", f"{ratio:.2f}", f"{own['called']:.1f}"
                errors = f"{own['error']:.3g}", f"{own['of_bound']:.2f}"
                shown.add_row(str(part["bits"]), part["shape"], rows, name, *times, *errors)
    return shown


def kernel_headline(parts: Parts) -> dict[str, float]:
    """Returns the fastest kernel's share of a bfloat16 product's time at 4 bits, and each kernel's largest error."""
    found, worst = {}, {}
    for part in parts.values():
        for rows, kernels in part["rows"].items():
            times = {name: own["replayed"] for name, own in kernels.items() if name != PLAIN}
            fastest = min(times, key=times.__getitem__)
            if part["bits"] == 4:
                found[f"{part['shape']}, {rows} rows, {fastest}, of {PLAIN}"] = (
                    times[fastest] / kernels[PLAIN]["replayed"]
                )
            for name, own in kernels.items():
                worst[name] = max(worst.get(name, 0.0), own["of_bound"])
    return found | {f"{name}, largest error of its bound": value for name, value in worst.items()}


def decoding_table(parts: Parts) -> Table:
    """Returns milliseconds of a token and of a prefill."""
    shown = Table(
        "model", "decode, ms", "of bf16", "prefill, ms", "of bf16", "batch decode, ms", "of bf16", "weights, MB"
    )
    for name, part in parts.items():
        if "decode" in part:
            shown.add_row(name, _ms(part["decode"]), "", _ms(part["prefill"]), "", "", "", "")
            continue
        for way in ("bf16", "packed"):
            cells = [f"{name}, {way}"]
            for key in ("decode", "prefill", "batch_decode"):
                cells += [_ms(part[way][key]), f"{part[way][key] / part['bf16'][key]:.2f}"]
            shown.add_row(*cells, f"{part[way]['weight_bytes'] / 1e6:.0f}")
    return shown


def decoding_headline(parts: Parts) -> dict[str, float]:
    """Returns how many times faster packed models are than in bfloat16, each compiled and not."""
    found = {}
    for name, part in parts.items():
        if "decode" in part:
            bf16 = parts.get(f"{name.partition(',')[0]}, bf16 compiled")
            if bf16 is not None and bf16 is not part:
                found[f"decode of {name}, against bf16 compiled"] = bf16["decode"] / part["decode"]
            continue
        for key in ("decode", "prefill", "batch_decode"):
            found[f"{key.replace('_', ' ')} of {name} packed, against bf16"] = part["bf16"][key] / part["packed"][key]
    return found


def training_table(parts: Parts) -> Table:
    """Returns speed and memory of training steps."""
    shown = Table("model, by", "tokens/s", "step, ms", "GB at peak", "GB by llmqat plan")
    for name, part in parts.items():
        peak, planned = _gigabytes(part["peak_bytes"]), _gigabytes(part.get("planned_bytes"))
        shown.add_row(name, f"{part['tokens_per_second']:.0f}", _ms(part["step_seconds"]), peak, planned)
    return shown


def training_headline(parts: Parts) -> dict[str, float]:
    """Returns llmqat's tokens a second, its speed against others', and its peak against what was planned."""
    found = {}
    for name, part in parts.items():
        model, _, who = name.rpartition(", ")
        own = parts.get(f"{model}, llmqat")
        if who == "llmqat":
            found[f"{model} tokens/s"] = part["tokens_per_second"]
            if part["peak_bytes"]:
                found[f"{model} peak against plan"] = part["peak_bytes"] / part["planned_bytes"]
        elif own is not None:
            found[f"{model} speed against {who}"] = own["tokens_per_second"] / part["tokens_per_second"]
            if part["peak_bytes"]:
                found[f"{model} peak against {who}"] = own["peak_bytes"] / part["peak_bytes"]
    return found


def calibration_table(parts: Parts) -> Table:
    """Returns seconds of synthesis and of stages."""
    shown = Table("what", "seconds", "tokens/s", "KL after it")
    for name, seconds, rate, kl in _calibration_rows(parts):
        shown.add_row(name, f"{seconds:.1f}", "" if rate is None else f"{rate:.0f}", "" if kl is None else f"{kl:.4f}")
    return shown


def calibration_headline(parts: Parts) -> dict[str, float]:
    """Returns the seconds of each."""
    return {f"{name}, seconds": seconds for name, seconds, _, _ in _calibration_rows(parts)}


def _calibration_rows(parts: Parts) -> list[tuple[str, float, float | None, float | None]]:
    """Returns name, seconds, tokens a second and KL of text and stages."""
    rows: list[tuple[str, float, float | None, float | None]] = []
    if (text := parts.get("synthesis")) is not None:
        rows.append((f"synthesis of {text['tokens']} tokens", text["writing_seconds"], text["tokens_per_second"], None))
    rows += [
        (name, part[name]["seconds"], None, part[name]["kl_after"]) for name, part in parts.items() if name in part
    ]
    return rows


def budget_table(parts: Parts) -> Table:
    """Returns KL by scheme and tokens."""
    texts = list(next(iter(parts.values()))["texts"])
    shown = Table(
        "scheme", "tokens", *(f"{text}, {what}" for text in texts for what in ("KL", "perplexity")), "tokens/s"
    )
    for part in parts.values():
        scores = [part["texts"][text] for text in texts]
        cells = [cell for one in scores for cell in (f"{one['kl']:.4f}", f"{one['perplexity']:.2f}")]
        rate = f"{part['training']['tokens_per_second']:.0f}" if part["training"] else ""
        shown.add_row(part["scheme"], f"{part['tokens']:,}", *cells, rate)
    return shown


def budget_headline(parts: Parts) -> dict[str, float]:
    """Returns KL on every text."""
    return {f"{name}, {text} kl": one["kl"] for name, part in parts.items() for text, one in part["texts"].items()}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _gigabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f}"


TABLES = {
    "kernels": kernel_table,
    "decoding": decoding_table,
    "training": training_table,
    "calibration": calibration_table,
    "budget": budget_table,
}
HEADLINES = {
    "kernels": kernel_headline,
    "decoding": decoding_headline,
    "training": training_headline,
    "calibration": calibration_headline,
    "budget": budget_headline,
}

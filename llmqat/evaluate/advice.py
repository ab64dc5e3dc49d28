"""What to do with a quantized model: ship it, calibrate it, train it, give it more bits, or measure more first.

What is judged is the KL from the reference, nats a token, on the same windows: perplexity on a text also falls when a
model learns that text's domain, and its noise is ten times that of the KL. A KL of 0.02 costs about 2 % of perplexity
(exp(0.02)) on text that the reference would write, and is what 8-bit weights with 8-bit inputs cost SmolLM2-135M, where
8-bit weights alone cost 0.004 and 4-bit ones 0.08 to 0.5 (eval/results/schemes-smollm2-135m.json).

    interval below the threshold    ship
    interval holds the threshold    measure more: so many windows that it would not, or a longer text
    interval above it               calibrate, if it is rounded plainly; else train, if what training leaves is expected
                                    below the threshold; else more bits

The text with the worst outcome decides. A checkpoint and its export are one model and get one advice: their records
are the same, or their figures nearly are. A model that was trained on answers should differ from its reference, so it
is judged by the perplexity that it loses. Perplexity alone never leads to "ship".

The law of the scheme (budget.py), if one was measured, says how much KL training leaves after how many tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llmqat.evaluate.bootstrap import Interval
from llmqat.evaluate.budget import Law, law_of
from llmqat.evaluate.gate import REFERENCE
from llmqat.export.commands import YOUR_TEXT, command, name_of_folder, original_in, run_commands
from llmqat.schemes import has_own_levels, with_eight_bits, without_cache

THRESHOLD = 0.02
"""KL from the reference, nats a token, up to which a model is as good as it."""
TRAINING_TOKENS = 60_000
"""A short distillation, where no law says how many tokens it takes."""
STEP_TOKENS = 1024
"""Tokens of an optimizer step in the recipes with which the laws were measured."""
STEP_COST = 10
"""Forwards that a distillation step costs: teacher, student, backward and optimizer (measured: 8 to 12 on a CPU)."""
BYTES_A_PARAMETER = 18
"""Teacher in bfloat16, float32 masters and gradients, AdamW's two moments."""
LEFT_OF_ROUNDING = 0.25
"""Share of the KL of plain rounding that a recipe (which calibrates first) leaves, measured: 0.21 to 0.29 at 4 bits."""
LEFT_BY_CALIBRATION = 0.25
"""Share of the KL of plain rounding that calibration leaves, measured at 4 bits by GPTQ: 0.14 to 0.24."""
LEFT_OF_CALIBRATION = 0.75
"""Share of the KL of a calibrated model that training leaves, where no law says it; measured: 0.6 to 1."""
KL_A_BIT = 4.0
"""What a bit more divides the KL by: the error of a weight is halved, and the KL grows with its square."""
MOST_BITS = 8
MOST_WINDOWS = 50
"""Times the windows there are: where more would be needed, the model is at the threshold."""
ALIKE = {"kl": 0.03, "perplexity": 0.003, "bits_per_weight": 0.15}
"""Shares by which figures of one model in two formats differ at most: scales are rounded, kernels sum differently."""

PLAIN = "plain rounding"
NOT_SERVED = (
    "--target-bits chooses bits for each layer, which is not for vLLM and SGLang: these need one scheme for q, k and v "
    "(there: --scheme {})."
)

_DIGIT = re.compile(r"\d")

Outcome = Literal["ship", "calibrate", "train", "more bits", "measure more"]


@dataclass(frozen=True)
class Advice:
    """What to do with one model; documents.py says what each field is."""

    models: tuple[str, ...]
    verdict: Outcome
    text: str
    figure: Literal["kl", "perplexity"]
    value: float | None
    low: float | None
    high: float | None
    threshold: float
    said: str
    next: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON takes them."""
        return {**asdict(self), "models": list(self.models), "next": list(self.next)}


@dataclass(frozen=True)
class _Judged:
    """What a model loses on one text."""

    text: str
    figure: Literal["kl", "perplexity"]
    value: float
    interval: Interval | None
    threshold: float

    @property
    def outcome(self) -> Literal["kept", "lost", "unknown"]:
        """`kept` at or below the threshold, `lost` above it or no number, `unknown` where the interval holds it."""
        if not math.isfinite(self.value):
            return "lost"
        if self.interval is None:
            return "unknown"
        if self.interval.high <= self.threshold:
            return "kept"
        return "lost" if self.interval.low > self.threshold else "unknown"

    def __str__(self) -> str:
        style = ".4f" if self.figure == "kl" else "+.1%"
        words = f"{self.value:{style}}"
        if self.interval is not None:
            words += f" ({self.interval.low:{style}} to {self.interval.high:{style}})"
        return f"KL {words}" if self.figure == "kl" else f"perplexity {words}"


def advice(report: Mapping[str, Any], threshold: float = THRESHOLD) -> tuple[Advice, ...]:
    """Returns one advice for each quantized model of `report` (`Comparison.to_dict()`); none without a reference.

    Args:
        report: what was measured.
        threshold: KL from the reference, nats a token, up to which a model is as good as it.

    Raises:
        ValueError: the threshold is negative.
    """
    if threshold < 0:
        raise ValueError(f"--threshold={threshold} is negative; give a KL in nats a token, such as {THRESHOLD}")
    reference = next((row for row in report["rows"] if row["role"] == REFERENCE), None)
    if reference is None:
        return ()
    others = [row for row in report["rows"] if row is not reference]
    return tuple(_Adviser(same, reference, report, threshold).advice() for same in _one_model_each(others))


def _one_model_each(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Returns the rows in groups, each of one model in several formats."""
    groups: list[list[Mapping[str, Any]]] = []
    for row in rows:
        same = next((group for group in groups if _same(group[0], row)), None)
        if same is None:
            groups.append([row])
        else:
            same.append(row)
    return groups


def _same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if row.get("run") and row["run"] == other.get("run"):
        return True
    bits = [entry["bits_per_weight"] for entry in (row, other)]
    if None not in bits and not _near(bits, ALIKE["bits_per_weight"]):
        return False
    pairs = [(row["texts"][text], other["texts"][text]) for text in row["texts"]]
    return all(_near([one[key] for one in pair], ALIKE[key]) for pair in pairs for key in ("kl", "perplexity"))


def _near(values: Sequence[float | None], share: float) -> bool:
    if None in values:
        return False
    low, high = sorted(value for value in values if value is not None)
    return math.isfinite(high) and high - low <= share * high


@dataclass(frozen=True)
class _Training:
    """What a training leaves of what is lost, on how many tokens, and the law that says so, if any."""

    left: float
    tokens: int
    law: Law | None = None

    def words(self, amount: str) -> str:
        """Returns it in words; `amount` is what is left."""
        share = f"{100 * self.left:.0f} %"
        if self.law is None:
            return f"Training usually leaves about {share} of that, {amount}"
        where = f"of {self.law.model}, the one model that was measured, training on {self.tokens:,} tokens left about"
        return f"With the same scheme {where} {share}: here {amount}"

    @property
    def enough(self) -> str:
        """When calibration is as good, as a sentence; nothing where that is not known."""
        return "" if self.law is None else f" {self.law.enough()}"


@dataclass(frozen=True)
class _Adviser:
    """Finds the advice for one model, which `rows` show in its formats."""

    rows: Sequence[Mapping[str, Any]]
    reference: Mapping[str, Any]
    report: Mapping[str, Any]
    threshold: float

    @property
    def row(self) -> Mapping[str, Any]:
        return self.rows[0]

    @property
    def trained(self) -> bool:
        return self.row["role"] == "trained" or self.row.get("method") == "trained"

    @property
    def spec(self) -> str:
        return str(self.row.get("spec") or self.row["name"])

    @property
    def original(self) -> str:
        return str(self.reference.get("spec") or self.reference["name"])

    def advice(self) -> Advice:
        judged = [self._judged(text) for text in self.row["texts"]]
        order = {"lost": 0, "unknown": 1, "kept": 2}
        worst = min(judged, key=lambda one: (order[one.outcome], -one.value))
        outcome, words, commands = {"kept": self._ship, "lost": self._lost, "unknown": self._unknown}[worst.outcome](
            worst
        )
        limit = f"{worst.threshold:g}" if worst.figure == "kl" else f"{worst.threshold:.0%}"
        against = {"kept": f"no more than {limit}", "lost": f"more than {limit}", "unknown": f"limit {limit}"}
        names = " and ".join(row["name"] for row in self.rows)
        where = f" on {worst.text}" if len(judged) > 1 else ""
        limits = "" if (worst.figure, worst.outcome) == ("perplexity", "kept") else f", {against[worst.outcome]}"
        said = f"{names}: {worst} from {self.reference['name']}{where}{limits}: {words}"
        beside = self._perplexity(worst.text) if worst.figure == "kl" else LEARNED
        return Advice(
            models=tuple(row["name"] for row in self.rows),
            verdict=outcome,
            text=worst.text,
            figure=worst.figure,
            value=worst.value if math.isfinite(worst.value) else None,
            low=None if worst.interval is None else worst.interval.low,
            high=None if worst.interval is None else worst.interval.high,
            threshold=worst.threshold,
            said=f"{said} {beside}",
            next=tuple(commands),
        )

    def _judged(self, text: str) -> _Judged:
        figures = self.row["texts"][text]
        if _learned_answers(self.row):
            share = (figures["perplexity"] or math.inf) / self.reference["texts"][text]["perplexity"] - 1
            return _Judged(text, "perplexity", share, self._share_lost(text), math.exp(self.threshold) - 1)
        found = figures.get("intervals", {}).get("kl")
        apart = None if found is None else Interval(found["low"], found["high"])
        kl = math.inf if figures["kl"] is None else figures["kl"]
        return _Judged(text, "kl", kl, apart, self.threshold)

    def _share_lost(self, text: str) -> Interval | None:
        """Returns the interval of the perplexity that is lost, as a share of the reference's."""
        lost, before = self.row["texts"][text].get("perplexity_lost"), self.reference["texts"][text]["perplexity"]
        return None if lost is None or lost["high"] is None else Interval(lost["low"] / before, lost["high"] / before)

    def _perplexity(self, text: str) -> str:
        figures, before = self.row["texts"][text], self.reference["texts"][text]["perplexity"]
        if figures["perplexity"] is None:
            return "Its perplexity is infinite."
        lost = self._share_lost(text)
        spread = "" if lost is None else f" ({lost.low:+.1%} to {lost.high:+.1%})"
        return f"Perplexity {figures['perplexity']:.4g}, {figures['perplexity'] / before - 1:+.1%}{spread}."

    # What to do

    def _ship(self, worst: _Judged) -> tuple[Outcome, str, list[str]]:
        commands = [line for row in self.rows for line in run_commands(row.get("spec") or row["name"])[:2]]
        if worst.figure == "perplexity":
            own, before = (row["texts"][worst.text]["perplexity"] for row in (self.row, self.reference))
            what = "the answers" if self.report["texts"][worst.text].get("answers") else worst.text
            than = "better than" if own < before else "about as well as"
            words = f"it predicts {what} {than} the original (perplexity {own:.4g} against {before:.4g}); "
            return "measure more", f"{words}perplexity cannot tell whether answers are good: read some.", commands
        words = "ship it." if self.trained else "ship it, no training is needed."
        return "ship", words, commands

    def _unknown(self, worst: _Judged) -> tuple[Outcome, str, list[str]]:
        text = self.report["texts"][worst.text]
        asked = self.report["settings"].get("max_windows")
        windows = text["windows"]
        whole = asked is None or windows < asked  # all of the text was scored
        if worst.interval is None:
            needed = max(10, 4 * windows)
        else:
            width, apart = worst.interval.high - worst.interval.low, abs(worst.value - worst.threshold)
            needed = math.inf if apart == 0 else windows * max(1.5, 1.2 * (width / 2 / apart) ** 2)
        if needed > MOST_WINDOWS * windows:
            words = (
                "it is too close to the limit to decide with any practical amount of text: decide by size and speed."
            )
            return "measure more", words, [self._again(MOST_WINDOWS * windows, longer=whole)]
        count = math.ceil(needed / 10) * 10
        more = f"a longer text, of about {count} windows" if whole else f"more windows (--max-windows {count})"
        return "measure more", f"cannot tell from this text; give {more}.", [self._again(count, longer=whole)]

    def _lost(self, worst: _Judged) -> tuple[Outcome, str, list[str]]:
        bits = self._bits()
        if self.trained:
            words, commands = self._more_bits(bits, worst)
            said = "it is trained already: more tokens may help a little, more bits for what is sensitive will."
            return "more bits", f"{said}{words}", commands
        if PLAIN in (self.row["role"], self.row.get("method")):
            return self._calibrate(bits, worst)
        if math.isinf(worst.value):
            words, commands = self._more_bits(bits, worst)
            return "more bits", f"it needs more bits.{words}", commands
        is_calibrated = self.row.get("method") or bits > 4
        training = self._training(worst) if is_calibrated else _Training(LEFT_OF_ROUNDING, TRAINING_TOKENS)
        left = training.words(self._amount(training.left, worst))
        if training.left * worst.value <= worst.threshold or bits >= MOST_BITS:
            words = f"train it. {left}; {' '.join(self._cost(training))}.{training.enough}"
            return "train", words, [self._train(training)]
        words, commands = self._more_bits(bits, worst)
        return "more bits", f"it needs more bits. {left}, still more than {worst.threshold:g}.{words}", commands

    def _calibrate(self, bits: float, worst: _Judged) -> tuple[Outcome, str, list[str]]:
        """Advises what costs least for a model that was rounded plainly, and what comes after that."""
        said = "calibrate it: it was rounded plainly, and a calibrated method, which trains nothing, loses less."
        first = self._calibration()
        if bits > 4 or math.isinf(worst.value):  # where nobody has measured what calibration leaves
            return "calibrate", said, [first]
        said += f" It usually leaves about {100 * LEFT_BY_CALIBRATION:.0f} % of that"
        said += f", {self._amount(LEFT_BY_CALIBRATION, worst)}"
        if LEFT_BY_CALIBRATION * worst.value <= worst.threshold:
            return "calibrate", f"{said}.", [first]
        said += f", still more than {worst.threshold:g}"
        training = self._training(worst, LEFT_BY_CALIBRATION)
        if LEFT_BY_CALIBRATION * training.left * worst.value <= worst.threshold:
            words = f"{said}: train it then; {' '.join(self._cost(training))}.{training.enough}"
            return "calibrate", words, [first, self._train(training)]
        words, commands = self._more_bits(bits, worst)
        return (
            "calibrate",
            f"{said}, as training would: more bits are needed to reach the limit.{words}",
            [first, *commands],
        )

    def _calibration(self) -> str:
        name = f"{name_of_folder(self.row['name'])}-gptq"
        words = ("--scheme", self._scheme(), *self._group(), "--method", "gptq", "--out", name)
        return command("llmqat", "quantize", self.original, *words)

    def _training(self, worst: _Judged, calibrated: float = 1.0) -> _Training:
        """Returns what a training leaves: of just the tokens that get to the limit, or of the most that were measured.

        Args:
            worst: what is lost.
            calibrated: share of it that calibration leaves, before training.
        """
        scheme = self.row.get("scheme") or {}
        law = law_of(str(scheme.get("preset")), scheme.get("group_size"), own_text=True)
        if law is None or worst.figure != "kl":
            return _Training(LEFT_OF_CALIBRATION, TRAINING_TOKENS)
        tokens = law.tokens_for(worst.threshold / (calibrated * worst.value))
        tokens = law.most if tokens is None else max(tokens, law.least)
        return _Training(law.left(tokens), tokens, law)

    @staticmethod
    def _amount(share: float, worst: _Judged) -> str:
        left = share * worst.value
        return f"{left:.2g} nats" if worst.figure == "kl" else f"{left:.1%} of perplexity"

    def _bits(self) -> float:
        digit = _DIGIT.search(str((self.row.get("scheme") or {}).get("preset", "")))
        return math.floor(self.row["bits_per_weight"] or 4) if digit is None else float(digit[0])

    def _more_bits(self, bits: float, worst: _Judged) -> tuple[str, list[str]]:
        """Returns the commands that make a model of more bits, and what to know of them."""
        steps = math.log(worst.value / worst.threshold, KL_A_BIT) if worst.threshold else math.inf
        start = ("llmqat", "quantize", self.original)
        name, scheme = name_of_folder(self.row["name"]), self._scheme()
        eight, by_name = with_eight_bits(scheme), has_own_levels(scheme)
        if by_name:  # whose bits count with those of scales
            bits = max(bits, self.row["bits_per_weight"] or 0)
        wanted = math.ceil(2 * min(MOST_BITS, max(bits + steps, bits + 0.5))) / 2
        one = command(*start, "--scheme", eight, "--out", f"{name}-8-bits")
        if wanted >= MOST_BITS:
            return "", [one]
        of_layers = [word for one in (scheme, eight) for word in ("--choices", without_cache(one))]
        choices = of_layers if by_name else self._group()
        words = ("--scheme", scheme, *choices, "--target-bits", f"{wanted:g}", "--out", f"{name}-{wanted:g}-bits")
        return f" {NOT_SERVED.format(eight)}", [command(*start, *words), one]

    def _group(self) -> tuple[object, ...]:
        size = (self.row.get("scheme") or {}).get("group_size")
        return ("--group-size", size) if size else ()

    def _train(self, training: _Training) -> str:
        group = (self.row.get("scheme") or {}).get("group_size")
        quant = f"{{preset: {self._scheme()}" + (f", group_size: {group}}}" if group else "}")
        out = f"output=runs/{name_of_folder(self.row['name'])}"
        law, given = training.law, (f"model={self.original}", f"quant={quant}", out)
        if law is None:
            return command("llmqat", "train", "smollm2-135m-int4", *given)
        stages, steps = ", ".join(law.stages), math.ceil(training.tokens / STEP_TOKENS)
        length = (f"calibrate=[{stages}]", f"data.tokens={steps * STEP_TOKENS}", f"train.max_steps={steps}")
        return command("llmqat", "train", f"smollm2-135m-{law.scheme}", *given, *length)

    def _scheme(self) -> str:
        return str((self.row.get("scheme") or {}).get("preset") or f"int{min(8, max(2, round(self._bits())))}")

    def _again(self, windows: float, *, longer: bool) -> str:
        settings = self.report["settings"]
        texts = [YOUR_TEXT] if longer else settings.get("texts") or ()
        given = [word for text in texts for word in ("--text", text) if list(texts) != ["pydoc"]]
        protocol = settings.get("protocol", "windows")
        named = [] if protocol == "windows" else ["--protocol", protocol]
        window = settings.get("window")
        cut = ["--window", window] if window and protocol == "windows" else []
        count = ["--max-windows", f"{windows:.0f}"]
        return command("llmqat", "eval", self.spec, "--reference", self.original, *given, *named, *cut, *count)

    def _cost(self, training: _Training) -> Iterator[str]:
        tokens = sum(text["tokens"] for text in self.report["texts"].values())
        yield f"{training.tokens:,} tokens would take"
        if self.reference.get("seconds"):
            minutes = training.tokens * STEP_COST / (tokens / self.reference["seconds"]) / 60
            yield f"about {max(1, minutes):.0f} minutes here and"
        yield (
            "for their memory see `llmqat plan`"
            if not self._parameters()
            else (
                f"{self._parameters() * BYTES_A_PARAMETER / 1e9:.1f} GB of memory and activations; adapters and scales "
                "alone need less"
            )
        )

    def _parameters(self) -> float:
        """Returns about how many parameters the reference has, by its size and bits; 0 where these are not known."""
        size, bits = self.reference.get("bytes_on_disk"), self.reference.get("bits_per_weight")
        return 8 * size / bits if size and bits else 0.0


LEARNED = "It was trained on answers, so it is to differ from the original: its perplexity is judged, not its KL."


def _learned_answers(row: Mapping[str, Any]) -> bool:
    train = ((row.get("run") or {}).get("recipe") or {}).get("train") or {}
    return bool(train.get("cross_entropy_weight"))


def first_steps(report: Mapping[str, Any]) -> list[str]:
    """Returns what to run after a comparison that has no reference: its like with one, or quantization of the model."""
    row = report["rows"][0]
    spec, run = str(row.get("spec") or row["name"]), row.get("run") or {}
    original = original_in(run)
    if original is None and not row.get("scheme"):
        return [command("llmqat", "quantize", spec, "--scheme", "int4", "--out", f"{name_of_folder(row['name'])}-int4")]
    return [command("llmqat", "eval", spec, "--reference", original or "ORIGINAL")]

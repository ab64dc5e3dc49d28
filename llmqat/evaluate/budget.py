"""What training tokens buy, as it was measured: a law of KL against tokens for each scheme and kind of text.

eval/budget.py trains one model from its calibrated start on more and more tokens, fits

    KL(T) = floor + (start - floor) (1 + T / scale) ^ -power

to what it measured, and writes budget.json beside this file. `llmqat plan` and the advice of `llmqat eval` read it. A
law is of one model: of another it says how the KL shrinks, not where it begins. Where nothing was measured, nothing is
said.

Letters: T tokens trained on.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from pydantic import Field, model_validator

from llmqat.config import Config

FILE = Path(__file__).with_name("budget.json")
FORMAT = "llmqat budget 1"
OWN_TEXT = "own"
"""The text that the model writes itself; any other text is of a domain."""


class Law(Config):
    """KL from full precision against the tokens of a distillation, of one model, scheme and text."""

    model: str
    """What was trained."""
    parameters: int = Field(ge=1)
    """How many it has."""
    scheme: str
    """Preset of its weights."""
    group_size: int = Field(ge=1)
    """Weights that share a scale."""
    text: str
    """What it was trained on: `own`, or the name of a file."""
    stages: tuple[str, ...]
    """Calibration before training."""
    judged_on: tuple[str, ...]
    """Texts whose KL this is, on average."""
    start: float = Field(gt=0)
    """KL of the calibrated start, nats a token."""
    floor: float = Field(ge=0)
    """KL that no amount of tokens gets below."""
    scale: float = Field(gt=0)
    """Tokens from which training pays visibly."""
    power: float = Field(ge=0)
    """How steeply the KL falls with tokens."""
    error: float = Field(ge=0)
    """Relative error, root mean square, of a measured budget that the fit had not seen."""
    least: int = Field(ge=1)
    """Tokens of the smallest training that was measured."""
    most: int = Field(ge=1)
    """And of the largest."""
    enough_below: int | None = Field(ge=0)
    """Tokens below which training gains less than the noise, so that calibration is as good; null: up to `most`."""
    points: tuple[tuple[int, float], ...]
    """What was measured: tokens and KL, the start first."""

    @model_validator(mode="after")
    def _check_falls(self) -> Law:
        if self.floor > self.start:
            raise ValueError(f"floor={self.floor} lies above start={self.start}; a law falls with tokens")
        return self

    def kl(self, tokens: float) -> float:
        """Returns the KL after training on so many tokens, nats a token."""
        return self.floor + (self.start - self.floor) * (1 + tokens / self.scale) ** -self.power

    def left(self, tokens: float) -> float:
        """Returns the share of the calibrated start's KL that training on so many tokens leaves."""
        return self.kl(tokens) / self.start

    def tokens_for(self, left: float) -> int | None:
        """Returns the fewest tokens that leave at most this share of the KL; None where more than `most` would do."""
        tokens = self.tokens_at(left * self.start)
        return None if tokens > self.most else math.ceil(tokens)

    def tokens_at(self, kl: float) -> float:
        """Returns the tokens after which the KL is `kl`; infinity where it never is."""
        if kl >= self.start:
            return 0.0
        if kl <= self.floor or self.power == 0:
            return math.inf
        log = -math.log((kl - self.floor) / (self.start - self.floor)) / self.power
        return self.scale * math.expm1(log) if log < 700 else math.inf

    def worth(self, tokens: int) -> str:
        """Returns in words what a training on `tokens`, 0 for none, is worth, and from how many training pays."""
        text = "text of its own" if self.text == OWN_TEXT else "text of a domain"
        what = f"{self.model}, {self.scheme} in groups of {self.group_size}, {text}"
        said = f"measured on {what}: KL {self.start:.3g} after {' and '.join(self.stages)}"
        if 0 < tokens <= self.most:
            said += f", about {self._predicted(tokens)} after training on {tokens:,} tokens"
        if tokens != self.most:
            after = "after" if tokens else "after training on"
            said += f", about {self._predicted(self.most)} {after} {self.most:,} tokens, the most that was measured"
        size = f"{self.parameters / 1e6:,.0f}M"
        return f"{said}. {self.enough()} This is one model, of {size} parameters; others differ."

    def enough(self) -> str:
        """Returns in words when calibration is enough."""
        if self.enough_below is None:
            return f"{self._bits()}: calibration was as good as any training up to {self.most:,} tokens."
        said = f"below about {self.enough_below:,} tokens calibration is as good"
        if self.enough_below < self.least:
            said = (
                f"{self.least:,} tokens, the fewest that were measured, do better than calibration; by the fit, {said}"
            )
        return f"{self._bits()}: {said}."

    def _predicted(self, tokens: int) -> str:
        return f"{self.kl(tokens):.2g} (±{100 * self.error:.2g} %)"

    def _bits(self) -> str:
        digits = "".join(letter for letter in self.scheme if letter.isdigit())
        return f"{digits} bits" if digits and self.scheme == f"int{digits}" else self.scheme


class Laws(Config):
    """What budget.json holds."""

    format: str
    """Of the file."""
    command: str
    """What wrote it."""
    laws: tuple[Law, ...] = Field(min_length=1)
    """One for each scheme and text."""


def read_laws(file: Path) -> tuple[Law, ...]:
    """Returns the laws in `file`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it holds something else.
    """
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("format") != FORMAT:
        raise ValueError(f"{file} says format={found.get('format')!r}, and {FORMAT!r} is read here")
    return Laws.model_validate(found).laws


def laws() -> tuple[Law, ...]:
    """Returns the laws that come with llmqat; none where none was measured."""
    return read_laws(FILE) if FILE.is_file() else ()


def law_of(scheme: str, group_size: int | None, *, own_text: bool) -> Law | None:
    """Returns the law of a preset with a group size, on the model's own text or on that of a domain; None for none."""
    return next(
        (law for law in laws() if (law.scheme, law.group_size, law.text == OWN_TEXT) == (scheme, group_size, own_text)),
        None,
    )

"""Configuration of the calibration stages: one class per stage, with the options that a recipe may set.

`STAGES` maps the name of a stage to its class. To add a stage of your own, subclass `CustomStage` and decorate the
class with `@STAGES.register("name")`, which fills in its field `stage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator
from pydantic.fields import FieldInfo

from llmqat.config import Config, Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmqat.data.blocks import Rows


class Stage(Config):
    """A stage of a calibration."""

    stage: str
    """Its name, one of `STAGES`."""


def _check_stage(name: str, kind: type[Stage]) -> None:
    base = Stage if getattr(kind, "__module__", None) == __name__ else CustomStage
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"stage {name!r} is {kind!r}; give a subclass of CustomStage")
    if kind.model_fields["stage"].is_required() and issubclass(kind, CustomStage):
        _name_stage(kind, name)
    if kind.model_fields["stage"].default != name:
        raise ValueError(f"stage {name!r}: give {kind.__name__} the field `stage: Literal[{name!r}] = {name!r}`")


def _name_stage(kind: type[CustomStage], name: str) -> None:
    """Gives `kind` the field `stage: Literal[name] = name`."""
    annotation: Any = Literal[name]
    kind.__pydantic_fields__["stage"] = FieldInfo(annotation=annotation, default=name, description=_STAGE_SAID)
    kind.__pydantic_init_subclass__()  # describes the fields
    kind.model_rebuild(force=True)


_STAGE_SAID = "This stage's name."

STAGES: Registry[type[Stage]] = Registry("stage", _check_stage)
"""Stages by their names."""


class TextStage(Stage):
    """A stage that looks at text."""

    blocks: int = Field(32, ge=1)
    """Token blocks of the text that are looked at, from its start."""
    batch_size: int = Field(4, ge=1)
    """Token blocks per forward, or per iteration of a training."""


class WeightStage(TextStage):
    """A stage that finds scales, codes or weights."""

    bits: int | None = Field(None, ge=2, le=8)
    """Bits of the weights while it runs, where the scheme has fewer: 2 bits reached by way of 4 and 3 (progressive
    quantization). Scales of other bits are found by a stage ranges of those bits before it."""


class CustomStage(TextStage):
    """A stage of your own: it changes the prepared model in `apply`.

    An interrupted calibration does it again, so the same model and text must give the same result; what it draws from
    torch follows the seed of the run.
    """

    def apply(self, model: PreTrainedModel, text: Rows) -> dict[str, Any]:
        """Changes `model` in place; returns facts for the report, by name.

        Args:
            model: prepared, with the codes and scales that the stages before it have left.
            text: the first `blocks` token blocks, `text.ids` [N, L]; `model(**text.inputs())` reads them.
        """
        raise NotImplementedError(f"{type(self).__name__}.apply is not written")


@STAGES.register("rotate")
class RotateStage(Stage):
    """Rotates the residual stream by a random Hadamard matrix, folded into the weights (QuaRot's R1)."""

    stage: Literal["rotate"] = "rotate"
    """This stage's name."""


@STAGES.register("smooth")
class SmoothStage(TextStage):
    """Moves ranges of input features from activations into weights (SmoothQuant)."""

    stage: Literal["smooth"] = "smooth"
    """This stage's name."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Share of an input feature's range that moves into the weights."""


@STAGES.register("ranges")
class RangesStage(WeightStage):
    """Sets the scale of every quantized weight, and the ranges of static inputs."""

    stage: Literal["ranges"] = "ranges"
    """This stage's name."""
    method: Literal["minmax", "percentile", "mse", "weighted_mse"] = "weighted_mse"
    """Plain range; percentile of it; least squared error over clip ratios; that weighted by E[x^2] of the inputs."""
    percentile: float = Field(99.9, gt=50, le=100)
    """Share of a group's weights inside its range, in percent; only for method percentile."""


@STAGES.register("gptq")
class GPTQStage(WeightStage):
    """Finds codes by GPTQ, then the scales that suit them, layer by layer in the order they run."""

    stage: Literal["gptq"] = "gptq"
    """This stage's name."""
    damping: float = Field(0.01, gt=0)
    """Share of the mean of the diagonal of E[x^T x] that is added to it."""
    rounds: int = Field(10, ge=1)
    """Times that codes are found; scales are refitted after each. More rounds help most at 2 bits."""
    target: Literal["clean", "quantized"] = "clean"
    """What a layer is to give: what the original layer gave from inputs that no quantization has touched, so that it
    also undoes what the layers before it have done; or what it gives in full precision from the inputs that it gets."""
    target_damping: float | None = Field(None, gt=0)
    """Share of the mean of the diagonal of E[x^T x] that is added to it where the clean target is solved for: the more,
    the nearer a layer stays to its original weight. Where not given, it is cross-validated on halves of the text."""
    hidden_memory: float = Field(4.0, ge=0)
    """Gigabytes of hidden states kept in memory; above that they lie in temporary files. The original inputs of one
    block's layers may take as much again; where they need more, they are computed for each layer anew."""

    @model_validator(mode="after")
    def _refuse_a_damping_of_nothing(self) -> GPTQStage:
        if self.target_damping is not None and self.target == "quantized":
            raise ValueError(
                f"target_damping={self.target_damping} means nothing with target=quantized; leave it out, or give "
                "target=clean"
            )
        return self


@STAGES.register("blockwise")
class BlockwiseStage(WeightStage):
    """Trains one transformer block at a time to give what it gave in full precision."""

    stage: Literal["blockwise"] = "blockwise"
    """This stage's name."""
    trains: Literal["weights", "rounding"] = "weights"
    """All of a block by AdamW (EfficientQAT), or rounding up or down and scales by sign-SGD (AutoRound)."""
    target: Literal["clean", "quantized"] = "clean"
    """What a block is to give: its full-precision output from inputs that no quantization has touched, so that it also
    undoes what the blocks before it have done; or from the inputs that it really gets."""
    iterations: int = Field(20, ge=1)
    """Iterations of `batch_size` token blocks for each transformer block."""
    learning_rate: float | None = Field(None, ge=0)
    """Of weights, norms and biases; where not given 1e-4, and for weights of 3 bits 2e-4, of 2 bits 5e-4. Not used for
    rounding, whose step follows from the iterations."""
    scale_learning_rate: float = Field(5e-3, ge=0)
    """Of log-scales: a relative change of the scale per iteration. Not used for rounding."""
    zero_point_learning_rate: float = Field(1e-2, ge=0)
    """Of zero points of asymmetric schemes, in codes per iteration. Not used for rounding, which leaves them."""
    patience: int = Field(2, ge=1)
    """Checks without gain (there are four in a training) after which a block's training ends."""
    hidden_memory: float = Field(4.0, ge=0)
    """Gigabytes of hidden states kept in memory; above that they lie in temporary files."""

    @model_validator(mode="after")
    def _refuse_rates_of_rounding(self) -> BlockwiseStage:
        names = ("learning_rate", "scale_learning_rate", "zero_point_learning_rate")
        given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if self.trains == "rounding" and given:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])} means nothing with trains=rounding, whose step follows from "
                "iterations; leave it out, or give trains=weights"
            )
        return self


class AllocationConfig(Config):
    """Bits chosen layer by layer under an average, by what they would cost the model's predictions."""

    target_bits: float = Field(ge=2, le=9)
    """Bits a weight on average over the layers of the default scheme. Scales count where choices name schemes."""
    choices: tuple[int | str, ...] = Field((2, 3, 4, 8), min_length=1)
    """What to choose among: bits, 2 to 8, for the weights of the default scheme, or names of schemes, as nvfp4, fp8."""
    blocks: int = Field(16, ge=1)
    """Token blocks of the text that gradients are taken on, from its start."""
    hidden_memory: float = Field(4.0, ge=0)
    """Gigabytes of hidden states and gradients kept in memory; above that they lie in temporary files."""

    @field_validator("choices", mode="before")
    @classmethod
    def _read_numbers(cls, value: Any) -> Any:
        """Takes "4" for 4, as the command line gives it."""
        listed = [value] if isinstance(value, (str, int)) else value
        if not isinstance(listed, Sequence):
            return value
        words = (one.strip() if isinstance(one, str) else one for one in listed)
        return tuple(int(one) if isinstance(one, str) and one.isdecimal() else one for one in words)

    @field_validator("choices")
    @classmethod
    def _of_one_kind(cls, value: tuple[int | str, ...]) -> tuple[int | str, ...]:
        bits = [one for one in value if isinstance(one, int)]
        if bits and len(bits) < len(value):
            raise ValueError("give either bits, such as 3 and 4, or names of schemes, such as nvfp4 and fp8, not both")
        if wrong := [one for one in bits if not 2 <= one <= 8]:
            raise ValueError(f"{wrong[0]} bits are not possible: choose 2 to 8, or the name of a scheme")
        if len(set(value)) < len(value):
            raise ValueError("a choice is given twice")
        return value


BlockStage = GPTQStage | BlockwiseStage
"""A stage that walks through the model block by block."""


def _stage_of(entry: Any) -> Any:
    """Returns the stage that a name, or a mapping with the key `stage`, describes.

    Raises:
        ValueError: for a mapping that names no stage.
    """
    if isinstance(entry, str):
        entry = {"stage": entry}
    if not isinstance(entry, Mapping):
        return entry
    if str(entry.get("stage")) not in STAGES:
        if "stage" in entry:
            raise ValueError(f"{STAGES.unknown(entry['stage'])}, or one that your own script registers")
        raise ValueError(f"an entry without the key 'stage'; write {{stage: NAME, …}}, NAME one of {', '.join(STAGES)}")
    return STAGES[str(entry["stage"])].model_validate(dict(entry))


AnyStage = Annotated[SerializeAsAny[Stage], BeforeValidator(_stage_of)]
"""A stage of a calibration in a recipe: its name alone, or its fields with `stage: NAME`."""

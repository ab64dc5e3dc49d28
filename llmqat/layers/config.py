"""What is quantized and how, in the vocabulary of compressed-tensors.

A `QuantConfig` names the modules (`targets`, `ignore`, `skip_first`, `skip_last`, `overrides`) and the arithmetic of
their weights (`WeightConfig`) and inputs (`ActivationConfig`), that of the KV cache (`KVCacheConfig`), and what happens
to embeddings and output head. A name is a module's exact dotted name, its class name, or a regular expression after
`re:`, matched from the start of the dotted name as compressed-tensors does. The class name `Linear` stands for every
linear map of a model: nn.Linear, transformers' Conv1D, and the stacked (3-D) weights of experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llmqat.config import Config, Registry, UnknownKeyError
from llmqat.grid import Grid, Levels, ScaleDtype
from llmqat.schemes import FP8, HIGH_PRECISION, OWN_KIND, SHIPPED, read_scheme, unknown_scheme

Strategy = Literal["tensor", "channel", "group", "block"]
ScaleMode = Literal["learned", "fixed", "dynamic"]
Observer = Literal["minmax", "moving_average", "percentile", "mse"]
Policy = Literal["keep", "int8", "int4"]
_FLOATS: dict[tuple[int, str, int | None], str] = {
    (4, "e4m3", 16): "nvfp4",
    (4, "e8m0", 32): "mxfp4",
    (8, "e8m0", 32): "mxfp8",
}
"""Bits, dtype of scales and group size of floats that have a name of their own, and that name."""
_GROUPS_OF_FLOATS = ", ".join(f"{name} has groups of {size}" for (*_, size), name in sorted(_FLOATS.items()))
BLOCK = 128
"""Outputs and inputs of a block that has one scale, where a name does not say it."""
_EIGHT = (8, "bfloat16")
"""Bits and dtype of scales of integers and floats that go by any strategy, by channel where nothing else is said."""


class SparsityConfig(Config):
    """Weights that are zero and stay it, in calibration and in training; the checkpoint holds them as the code of zero.

    Which ones: the smallest, until text is looked at; then those with the least |w| * rms(x) (stage ranges with method
    weighted_mse; Wanda, 2306.11695), or those that the output of their layer misses least (stage gptq; SparseGPT,
    2301.00774). The latter may exchange some zeros of a pruned model; 'unstructured' without a share keeps just these.
    """

    pattern: str = "2:4"
    """`n:m` keeps n of every m weights along the input features, as 2:4 and 4:8; 'unstructured' zeroes `share` of each
    row."""
    share: float | None = Field(None, gt=0, lt=1)
    """Zeros of each row, as a share of it, with the pattern 'unstructured'; where not given, those that are there."""

    @field_validator("pattern", mode="before")
    @classmethod
    def _read_as_written(cls, value: Any) -> Any:
        # YAML 1.1 takes 2:4 for minutes and seconds: 124.
        return f"{value // 60}:{value % 60}" if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check_together(self) -> SparsityConfig:
        if self.pattern == "unstructured":
            return self
        found = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", self.pattern)
        if found is None or int(found[1]) >= int(found[2]):
            raise ValueError(
                f"pattern={self.pattern!r}; give n:m, of which n weights of every m are kept (2:4, 4:8), or "
                "'unstructured'"
            )
        if self.share is not None:
            raise ValueError(f"share={self.share} with pattern={self.pattern!r}; a share belongs to 'unstructured'")
        return self

    def kept_of(self, columns: int) -> tuple[int, int] | None:
        """Returns (n, m) for rows of so many weights; None where the zeros that are there decide."""
        if self.pattern != "unstructured":
            kept, of = self.pattern.split(":")
            return int(kept), int(of)
        return None if self.share is None else (max(round(columns * (1 - self.share)), 1), columns)

    @property
    def label(self) -> str:
        """Short name for tables: '2:4', '0.5 zeros', 'its zeros'."""
        if self.pattern != "unstructured":
            return self.pattern
        return "its zeros" if self.share is None else f"{self.share:.3g} zeros"


class WeightConfig(Config):
    """The arithmetic of one weight matrix."""

    num_bits: int = Field(4, ge=2, le=8)
    """Bits a code, 2 to 8."""
    symmetric: bool = True
    """Signed codes around zero (True), or unsigned codes with a zero point (False)."""
    strategy: Strategy = "group"
    """What one scale governs: the tensor, an output channel, `group_size` inputs of a channel, or, of FP8, a block of
    `group_size` outputs by as many inputs."""
    group_size: int | None = Field(None, ge=1)
    """Weights per scale along the input features; only with strategy 'group', or the side of a 'block'."""
    levels: Levels = "integer"
    """Integers; at 2 bits 'ternary' (-1, 0, 1: BitNet b1.58) or 'seq' (-1.5, -0.5, 0.5, 1.5: ParetoQ); or 'float', E2M1
    at 4 bits and E4M3 at 8."""
    scale_dtype: ScaleDtype = "bfloat16"
    """What scales are stored as: bfloat16; with levels 'float' also 'e4m3' under one scale for the tensor (NVFP4: 4
    bits in groups of 16), or 'e8m0', powers of two (MXFP4, MXFP8: groups of 32)."""
    scales: ScaleMode = "learned"
    """Scales (and zero points) are trained, stay as calibrated, or follow the range of the weight at each forward."""
    sparsity: SparsityConfig | None = None
    """Weights that are zero and stay it; a pattern alone, as 2:4, will do."""

    @field_validator("sparsity", mode="before")
    @classmethod
    def _take_pattern_alone(cls, value: Any) -> Any:
        return {"pattern": value} if isinstance(value, (str, int)) else value

    @model_validator(mode="after")
    def _check_together(self) -> WeightConfig:
        if (self.strategy in ("group", "block")) != (self.group_size is not None):
            raise ValueError(
                f"group_size={self.group_size} with strategy={self.strategy!r}; "
                "give group_size exactly when strategy is 'group' or 'block'"
            )
        grid = self.grid  # says what is wrong with the levels
        if self.strategy == "block":
            self._check_blocks()
        if grid.levels == "seq" and self.sparsity is not None:
            raise ValueError("levels='seq' with sparsity: none of its levels is zero; choose 'ternary' or 'integer'")
        kind = (grid.num_bits, grid.scale_dtype)
        if grid.levels == "float" and kind != _EIGHT and (*kind, self.group_size) not in _FLOATS:
            raise ValueError(
                f"levels='float' with num_bits={grid.num_bits}, scale_dtype={grid.scale_dtype!r}, "
                f"group_size={self.group_size} is a format that nothing reads; {_GROUPS_OF_FLOATS}: leave the group "
                "size out, or give num_bits=8 with scale_dtype='bfloat16'"
            )
        return self

    def _check_blocks(self) -> None:
        """Raises ValueError where a scheme with one scale a block is not the one that others read."""
        if (self.levels, self.num_bits, self.scale_dtype) != ("float", *_EIGHT):
            raise ValueError(
                f"strategy='block' with levels={self.levels!r}, num_bits={self.num_bits}, scale_dtype="
                f"{self.scale_dtype!r}; blocks are of FP8 weights: levels='float', num_bits=8, scale_dtype='bfloat16' "
                f"(fp8-block)"
            )

    @property
    def grid(self) -> Grid:
        """The code range."""
        return Grid(self.num_bits, self.symmetric, self.levels, self.scale_dtype)

    @property
    def stored(self) -> WeightConfig:
        """The scheme on disk and in a packed layer: plain integers or floats, scaled by row or by group.

        One scale a tensor is written as that scale in every row, which all loaders run. SEQ takes 3 bits a code
        (`grid.stored_codes`).
        """
        strategy = "channel" if self.strategy == "tensor" else self.strategy
        num_bits = 3 if self.levels == "seq" else self.num_bits
        return WeightConfig(
            num_bits=num_bits,
            symmetric=self.symmetric,
            strategy=strategy,
            group_size=self.group_size,
            levels="float" if self.levels == "float" else "integer",
            scale_dtype=self.scale_dtype,
        )

    def stored_shape(self, out_features: int, in_features: int, name: str = "the layer") -> tuple[int, int]:
        """Returns the shape of the scales that are kept: `scale_shape`, but (ceil(O/g), I/g) for blocks.

        Raises:
            ValueError: as `scale_shape`.
        """
        rows, groups = self.scale_shape(out_features, in_features, name)
        return (-(-rows // self.block), groups) if self.strategy == "block" else (rows, groups)

    @property
    def block(self) -> int:
        """Rows that share their scales: the side of a block, and 1 for all other strategies."""
        return self.group_size if self.strategy == "block" and self.group_size else 1

    def scale_shape(self, out_features: int, in_features: int, name: str = "the layer") -> tuple[int, int]:
        """Returns the shape (O, I/g), (O, 1) or (1, 1) of the scales that weights are divided by.

        The rows of a block have the same scales.

        Raises:
            ValueError: when group_size, or the m of n:m sparsity, does not divide in_features, or the share of zeros
                leaves none in a row; names `name` and the choices.
        """
        if self.sparsity is not None:
            self._check_zeros(self.sparsity, in_features, name)
        if self.strategy == "tensor":
            return 1, 1
        if self.group_size is None:
            return out_features, 1
        if in_features % self.group_size and self.scale_dtype != "bfloat16":
            raise ValueError(
                f"{self.label}: groups of {self.group_size} do not divide in_features={in_features} of {name}; "
                f"leave it out with quant.ignore=['{name}'], or give it another scheme with quant.overrides['{name}']="
                "{weights: {num_bits: 8, strategy: channel}, input_activations: null}"
            )
        if in_features % self.group_size and self.strategy == "block":
            raise ValueError(
                f"{self.label}: blocks of {self.block} do not divide in_features={in_features} of {name}; leave "
                f"it out with quant.ignore=['{name}'], take the preset fp8 for all, or give it a scale a channel with "
                f"quant.overrides['{name}']={{weights: {{num_bits: 8, levels: float, strategy: channel}}, "
                "input_activations: {num_bits: 8, levels: float}}"
            )
        if in_features % self.group_size:
            choices = [g for g in (32, 64, 96, 128, 192, 256) if in_features % g == 0]
            choices = choices or [g for g in range(8, in_features) if in_features % g == 0][:6]
            groups = f"choose one of {', '.join(map(str, choices))}, or " if choices else "no group of 8 or more does; "
            raise ValueError(
                f"quant.group_size={self.group_size} does not divide in_features={in_features} of {name}; {groups}"
                f"give the layer one scale a channel with quant.overrides['{name}']="
                f"{{num_bits: {self.num_bits}, strategy: channel}}, or leave it out with quant.ignore=['{name}']"
            )
        return out_features, in_features // self.group_size

    def _check_zeros(self, sparsity: SparsityConfig, in_features: int, name: str) -> None:
        """Raises ValueError where rows of so many weights cannot have the zeros that are asked for."""
        kept, of = sparsity.kept_of(in_features) or (0, 1)
        if kept == of:
            raise ValueError(
                f"quant.sparsity.share={sparsity.share} leaves no zero in the {in_features} weights of a row of "
                f"{name}; give a larger one, or no sparsity"
            )
        if in_features % of:
            raise ValueError(
                f"quant.sparsity={sparsity.label!r}: {of} does not divide in_features={in_features} of {name}; "
                f"leave it out with quant.ignore=['{name}'], or give it weights without sparsity with "
                f"quant.overrides['{name}']={{num_bits: {self.num_bits}, levels: {self.levels}, strategy: "
                f"{self.strategy}, group_size: {self.group_size or 'null'}, scale_dtype: {self.scale_dtype}}}"
            )

    @property
    def label(self) -> str:
        """Short name for tables: 'int4 g64', 'int4 g32 asym', 'ternary g64', 'int2-seq g64 fixed', 'int4 g64 2:4'."""
        extent = f"g{self.group_size}" if self.strategy == "group" else self.strategy
        extent += str(self.block) if self.block not in (1, BLOCK) else ""
        names = {"integer": f"int{self.num_bits}", "ternary": "ternary", "seq": "int2-seq", "float": "fp8"}
        kind = _FLOATS.get((self.num_bits, self.scale_dtype, self.group_size), names[self.levels])
        ends = (
            "" if self.symmetric else " asym",
            "" if self.sparsity is None else f" {self.sparsity.label}",
            "" if self.scales == "learned" else f" {self.scales}",
        )
        return f"{kind} {extent}{''.join(ends)}"


class ActivationConfig(Config):
    """The arithmetic of a linear layer's input: per token from the token itself, or per tensor from calibration."""

    num_bits: int = Field(8, ge=2, le=8)
    """Bits a code; 8 is the norm, 4 is research."""
    symmetric: bool = True
    """A range around zero, or from the smallest to the largest entry."""
    dynamic: bool = True
    """Scale of each token from the token (True), or one scale for the tensor from calibration (False)."""
    observer: Observer = "minmax"
    """How a static range is found; not used when dynamic."""
    percentile: float = Field(99.99, gt=50, le=100)
    """Share of entries, in percent, that the percentile observer keeps inside."""
    levels: Literal["integer", "float"] = "integer"
    """Integers, or floats: E2M1 at 4 bits and E4M3 at 8."""
    group_size: int | None = Field(None, ge=1)
    """Entries of a token that share a scale, of floats only; the whole token where not given."""
    scale_dtype: ScaleDtype = "bfloat16"
    """What the scale of a group is: the dtype of the inputs ('bfloat16' stands for any), 'e4m3' under one calibrated
    scale for the tensor (NVFP4), or 'e8m0', a power of two (MXFP4, MXFP8)."""

    @model_validator(mode="after")
    def _check_together(self) -> ActivationConfig:
        grid = Grid(self.num_bits, self.symmetric, self.levels, self.scale_dtype)  # says what is wrong with the levels
        kind = (grid.num_bits, grid.scale_dtype)
        plain = self.group_size is None or (self.dynamic and self.levels == "float")
        known = plain if self.levels == "integer" or kind == _EIGHT else (*kind, self.group_size) in _FLOATS
        if not known or (self.scale_dtype != "bfloat16" and not self.dynamic):
            raise ValueError(
                f"inputs with num_bits={self.num_bits}, levels={self.levels!r}, group_size={self.group_size}, "
                f"scale_dtype={self.scale_dtype!r}, dynamic={self.dynamic} are a format that nothing reads; integers "
                f"have no groups, floats of 8 bits may have some where dynamic, and the others "
                f"({', '.join(sorted(_FLOATS.values()))}) are dynamic, in groups of their own"
            )
        return self

    @property
    def grid(self) -> Grid:
        """The code range."""
        return Grid(self.num_bits, self.symmetric, self.levels, self.scale_dtype)

    @property
    def calibrated(self) -> bool:
        """Whether something of the range comes from calibration: all of it, or NVFP4's scale of the tensor."""
        return not self.dynamic or self.scale_dtype == "e4m3"

    @property
    def strategy(self) -> Literal["token", "tensor", "group", "tensor_group"]:
        """What one scale governs."""
        if self.group_size is not None:
            return "tensor_group" if self.scale_dtype == "e4m3" else "group"
        return "token" if self.dynamic else "tensor"

    @property
    def label(self) -> str:
        """Short name for tables: 'a8 token', 'a8 tensor asym', 'a-fp8 token', 'a-nvfp4 g16'."""
        extent = f"g{self.group_size}" if self.group_size else self.strategy
        if self.levels == "float":
            return f"a-{_FLOATS.get((self.num_bits, self.scale_dtype, self.group_size), 'fp8')} {extent}"
        return f"a{self.num_bits} {extent}{'' if self.symmetric else ' asym'}"


class KVTensorConfig(Config):
    """The arithmetic of cached keys or values."""

    num_bits: int = Field(8, ge=2, le=8)
    """Bits a code."""
    symmetric: bool = True
    """A range around zero, or from the smallest to the largest entry of the group."""
    group_size: int | None = Field(None, ge=1)
    """Entries of a head that share a scale; the whole head where not given."""
    levels: Literal["integer", "float"] = "integer"
    """Integers, or E4M3 floats of 8 bits with calibrated scales."""
    strategy: Literal["tensor", "attn_head"] = "tensor"
    """Of floats: one scale for all keys (or values) of a layer, or one for each KV head."""

    @model_validator(mode="after")
    def _check_together(self) -> KVTensorConfig:
        if self.strategy != "tensor" and self.levels != "float":
            raise ValueError(
                f"strategy={self.strategy!r} with levels={self.levels!r}; integers of the KV cache have a scale for "
                "each token and head anyway: leave strategy out, or take levels='float'"
            )
        if self.levels == "float" and (self.num_bits, self.symmetric, self.group_size) != (8, True, None):
            raise ValueError(
                f"levels='float' with num_bits={self.num_bits}, symmetric={self.symmetric}, "
                f"group_size={self.group_size}; floats of the KV cache have 8 bits, no zero point and no groups"
            )
        return self

    @property
    def label(self) -> str:
        """Short name for tables: '8', '4 g32 asym', 'fp8', 'fp8 by head'."""
        if self.levels == "float":
            return "fp8" if self.strategy == "tensor" else "fp8 by head"
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.num_bits}{group}{'' if self.symmetric else ' asym'}"


class KVCacheConfig(Config):
    """The arithmetic of the KV cache: keys after rotary embedding, and values.

    Integers have a scale for each token and head. FP8 has one for each layer, or for each head of it.

    Source: LLM-QAT (2305.17888) section 3.3; KIVI (2402.02750) for groups, but along the head only: statistics over
    tokens would leak the future in training.
    """

    key: KVTensorConfig = KVTensorConfig()
    """Keys."""
    value: KVTensorConfig = KVTensorConfig()
    """Values."""

    @model_validator(mode="after")
    def _check_together(self) -> KVCacheConfig:
        if "float" in (self.key.levels, self.value.levels) and self.key != self.value:
            raise ValueError(
                f"key is {self.key.label} and value {self.value.label}; floats are for both of them or for none, since "
                "a checkpoint has one scheme for its KV cache"
            )
        return self

    @property
    def calibrated(self) -> bool:
        """Whether its scales come from calibration and lie in the checkpoint, where vLLM reads them."""
        return self.key.levels == "float"

    @property
    def label(self) -> str:
        """Short name for tables: 'kv8', 'k8 v4 g32 asym', 'kvfp8'."""
        same = self.key == self.value
        return f"kv{self.key.label}" if same else f"k{self.key.label} v{self.value.label}"


class Override(Config):
    """What differs from the default scheme for the modules of one pattern."""

    weights: WeightConfig | Literal["default"] = "default"
    """Another scheme of the weights."""
    input_activations: ActivationConfig | Literal["default"] | None = "default"
    """Another scheme of the inputs; null leaves them in high precision."""
    layers: tuple[int, ...] | None = None
    """Only in these layers, counted from 0, from the end if negative; all where not given."""


class LayerScheme(Config):
    """What one linear layer gets: its weights' scheme, and its inputs' if there is one."""

    weights: WeightConfig
    """Of its weights."""
    input_activations: ActivationConfig | None = None
    """Of its inputs; null leaves them in high precision."""


class QuantConfig(Config):
    """Which modules of a model are quantized, and how."""

    weights: WeightConfig = WeightConfig(num_bits=4, group_size=64)
    """Weights of every target without an override."""
    input_activations: ActivationConfig | None = None
    """Inputs of every target without an override; null leaves them in high precision."""
    kv_cache: KVCacheConfig | None = None
    """Keys and values as attention reads them; null leaves them in high precision."""
    embeddings: Policy = "keep"
    """Token embeddings: high precision, int8 a row, or int4 in groups of 32."""
    lm_head: Policy | None = None
    """The output head likewise; where not given, as the embeddings it is tied to, or kept."""
    targets: tuple[str, ...] = ("Linear",)
    """Module class names, dotted names or `re:` patterns; each must match something."""
    ignore: tuple[str, ...] = ()
    """Names or `re:` patterns left alone; each must match a module."""
    skip_first: int = Field(0, ge=0)
    """Transformer layers at the start that are left alone."""
    skip_last: int = Field(0, ge=0)
    """Transformer layers at the end that are left alone."""
    overrides: dict[str, Override | None] = Field(default_factory=dict)
    """Name or `re:` pattern -> what differs there, or null to leave it alone; the last match wins. The fields of a
    WeightConfig alone stand for `weights`."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _take_weights_alone(cls, value: Any) -> Any:
        return {key: _override(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value

    @classmethod
    def preset(cls, name: str, **changes: Any) -> QuantConfig:
        """Returns the scheme called `name` with `changes`: fields of `WeightConfig` or of `QuantConfig`.

        A name is one of `PRESETS`, or is read as `scheme_fields` says: int5, w4a16, int8-g128, w4a8kv8, q4_0. A
        `group_size` given without a `strategy` means groups.

        Raises:
            ValueError: for an unknown name or field; names what is allowed.
        """
        known = {*WeightConfig.model_fields, *cls.model_fields}
        for key in changes:
            if key not in known:
                raise UnknownKeyError(key, known, f"the scheme {name}")
        weights = {key: changes.pop(key) for key in list(changes) if key in WeightConfig.model_fields}
        fields = {**scheme_fields(name), **changes}
        base = fields["weights"]
        base = base.model_dump() if isinstance(base, WeightConfig) else base
        was, regrouped = base.get("strategy") == "block", bool(weights.keys() & {"strategy", "group_size"})
        blocks = weights.get("strategy", "block" if was and weights.get("group_size", BLOCK) else None) == "block"
        if blocks:
            weights = {"strategy": "block", "group_size": base.get("group_size") or BLOCK, **weights}
        elif "group_size" in weights and "strategy" not in weights:
            weights["strategy"] = "group" if weights["group_size"] else "channel"
        elif weights.get("strategy", "group") != "group":
            weights["group_size"] = None
        follow = regrouped and (blocks or was) and "input_activations" not in changes
        inputs = dict(fields.get("input_activations") or {}) if follow else {}
        if inputs.get("levels") == "float":  # they have groups of a block's side
            fields["input_activations"] = {**inputs, "group_size": weights["group_size"] if blocks else None}
        return cls(**{**fields, "weights": WeightConfig(**{**base, **weights})})


def _override(entry: Any) -> Any:
    """Returns `entry`, with a bare WeightConfig or its fields as an `Override` of the weights."""
    if isinstance(entry, WeightConfig):
        return Override(weights=entry)
    if isinstance(entry, Mapping) and entry and set(entry) <= set(WeightConfig.model_fields):
        return {"weights": entry}
    return entry


POLICY_WEIGHTS: dict[str, WeightConfig] = {
    "int8": WeightConfig(num_bits=8, strategy="channel"),
    "int4": WeightConfig(num_bits=4, group_size=32),
}
"""The arithmetic behind a `Policy`: what GGUF's Q8_0 and Q4_0 blocks hold without rounding again."""

_FLOAT_NAMES: dict[str, tuple[int, str, int | None]] = {
    "fp8": (8, "bfloat16", None),
    **{name: kind for kind, name in _FLOATS.items()},
}
"""Name of a float format -> bits, dtype of scales, and group size."""
_CACHES: dict[int, dict[str, Any]] = {8: {"num_bits": 8}, 4: {"num_bits": 4, "symmetric": False, "group_size": 32}}
"""Keys and values by their bits."""


def scheme_fields(name: str) -> dict[str, Any]:
    """Returns the fields of a QuantConfig that `name` stands for.

    A name has these parts, in this order. Only the first is required; dashes, underscores and capitals do not count.

    - Weights: `int4`, `w4`, `4bit`, `ternary`, `int2-seq`, `fp8`, `nvfp4`, `mxfp4`, `mxfp8`.
    - Inputs: `a8`, `afp8`, or `a16` for high precision. By default floats have inputs of their own kind.
    - KV cache: `kv8`, `kv4`, `kvfp8` or `fp8kv`, `kv16`.
    - Weights per scale: `g32`, `channel`, `tensor`, and for fp8 `block` (128 x 128) or `block64`. By default int8 and
      fp8 have a scale per channel, nvfp4 and the mx formats have their own groups, and all others groups of 64.
    - `asym` for a zero point.
    - `2:4` or `4:8` for weights that stay zero.

    GGUF's `q4_0` and `q8_0` are `int4-g32` and `int8-g32`. A label from a table ("int4 g32 asym") is a name as well.

    Raises:
        ValueError: for a name of no scheme.
    """
    if not isinstance(name, str):
        raise ValueError(f"preset {name!r} is no name of a scheme; give one such as int4")
    if name in PRESETS:
        return dict(PRESETS[name])
    found = read_scheme(name)
    if found is None:
        raise ValueError(unknown_scheme(name, PRESETS))
    floats = _FLOAT_NAMES.get(found.levels or "")
    levels = "float" if floats else {"ternary": "ternary", "int2seq": "seq"}.get(found.levels or "", "integer")
    num_bits, scale_dtype, group = floats or (found.num_bits, "bfloat16", 64)
    usual = "channel" if (num_bits, scale_dtype) == _EIGHT and not found.group else "group"
    extent = found.extent or usual
    group = (found.group or BLOCK) if extent == "block" else group
    weights = {
        "num_bits": num_bits,
        "levels": levels,
        "strategy": extent,
        "group_size": (found.group or group) if extent in ("group", "block") else None,
        "symmetric": found.symmetric,
        "scale_dtype": scale_dtype,
        "sparsity": found.sparsity,
    }
    fields: dict[str, Any] = {"weights": weights}
    if found.inputs == OWN_KIND and floats:
        own = {"num_bits": num_bits, "levels": "float", "group_size": group, "scale_dtype": scale_dtype}
        fields["input_activations"] = own
    elif found.inputs == FP8:
        side = group if extent == "block" else None
        fields["input_activations"] = {"num_bits": 8, "levels": "float", "group_size": side}
    elif found.inputs not in (HIGH_PRECISION, OWN_KIND):
        fields["input_activations"] = {"num_bits": found.inputs}
    if found.cache == FP8:
        fields["kv_cache"] = {part: {"levels": "float"} for part in ("key", "value")}
    elif found.cache != HIGH_PRECISION:
        fields["kv_cache"] = {"key": _CACHES[found.cache], "value": _CACHES[found.cache]}
    return fields


def _check_preset(name: str, fields: Any) -> None:
    if not isinstance(fields, (QuantConfig, Mapping)):
        raise ValueError(f"preset {name!r} is {fields!r}; give a QuantConfig, or a mapping of its fields")
    QuantConfig(**dict(fields))


PRESETS: Registry[Any] = Registry("preset", _check_preset)
"""Schemes by name: weights, then activations (a), then KV cache (kv), with their bits; groups of 64 where not said.

`int4-g32` is what Q4_0 blocks of GGUF hold, and what others' INT4 checkpoints from QAT have (Gemma, Kimi K2). One of
your own is added by `PRESETS.register("name", QuantConfig(...))`.
"""
for _name in SHIPPED:
    PRESETS.register(_name, scheme_fields(_name))

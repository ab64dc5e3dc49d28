"""What llmqat writes as JSON: the head that all documents have, and a description of every field of each.

    kind          written by
    comparison    eval --json, compare --json
    audit         audit --json
    sensitivity   sensitivity --json, and plan.json in a run folder
    run           results.json of a finished run

`schema` grows when a field changes its meaning or goes away, not when one comes. A document without `schema` is of
llmqat 0.1 and is read as 1; a greater number than this llmqat's is refused, since its fields may mean something else.

The classes are the description: `document_schema()` makes a JSON Schema of them. Nothing is read through them, so that
a document with fields of a later llmqat is still read.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

import llmqat

SCHEMA = 1
Kind = Literal["comparison", "audit", "sensitivity", "run"]


def head(kind: Kind) -> dict[str, Any]:
    """Returns the fields that a document of `kind` begins with: what it is, and what wrote it when."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "llmqat": llmqat.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
    }


def command_line() -> str:
    """Returns the command that this process was started with, as a shell takes it."""
    name, *words = sys.argv
    program = "llmqat" if Path(name).parts[-2:] in (("bin", "llmqat"), ("llmqat", "__main__.py")) else Path(name).name
    return shlex.join([program, *words])


def check_schema(found: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError where the document `found` in the file `path` is of a later llmqat than this one can read."""
    number = found.get("schema", 1)
    if not isinstance(number, int) or number > SCHEMA:
        raise ValueError(
            f"{path} has schema {number!r}, written by llmqat {found.get('llmqat', 'unknown')}; this is llmqat "
            f"{llmqat.__version__}, which reads schema {SCHEMA} and older: install the later one, or measure again"
        )


def document_schema() -> dict[str, Any]:
    """Returns the JSON Schema of all documents; `kind` tells which."""
    schema = _Document.model_json_schema(by_alias=True)
    said = {"title": "Documents of llmqat", "description": "What llmqat writes as JSON; `kind` tells which."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, **said}


class _Described(BaseModel):
    """Fields with a line below each; no others are allowed."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Head(_Described):
    """What every document begins with."""

    schema_: int = Field(alias="schema")
    """Number of the form of the document."""
    llmqat: str
    """Version that wrote it."""
    date: str
    """When, UTC, ISO 8601."""
    command: str
    """The command line that made it."""


class Bounds(_Described):
    """A 95 % percentile interval, by bootstrap over windows (or documents, where the protocol has them)."""

    low: float | None
    """Lower end; null where it is infinite."""
    high: float | None
    """Upper end; null where it is infinite."""


class Lost(Bounds):
    """The interval of the perplexity minus the reference's, both resampled alike."""

    noise: bool
    """Whether it holds 0: the difference is no more than the text's noise."""


class Shares(_Described):
    """Shares of the gap between plain rounding and full precision that were recovered; 1 is all of it."""

    perplexity: float | None
    """Of perplexity; null where there is no gap, or one of the two was not measured."""
    kl: float | None
    """Of KL; null as for perplexity."""


class PartFigures(_Described):
    """Figures of some of a text's tokens."""

    name: str
    """Which tokens."""
    tokens: int
    """How many."""
    perplexity: float | None
    """Perplexity on them."""
    kl: float | None
    """KL from the reference, nats a token."""
    top1: float | None
    """Share on which the most probable token is the reference's."""


class Quality(_Described):
    """Figures of one model on one text."""

    nll: float | None
    """Mean negative log-likelihood, nats a token."""
    perplexity: float | None
    """exp of the mean negative log-likelihood; null where it is infinite."""
    kl: float | None
    """Mean KL(reference || model), nats a token; null without a reference."""
    top1: float | None
    """Share of tokens on which the most probable one is the reference's."""
    recovered: Shares
    """Of the gap between plain rounding and full precision."""
    reverse_kl: float | None
    """Mean KL(model || reference), nats a token."""
    top5: float | None
    """Overlap: the mean share of the reference's five most likely tokens that are among the model's five."""
    intervals: dict[str, Bounds]
    """95 % intervals by figure; none where there is one window only."""
    perplexity_lost: Lost | None = None
    """Of the perplexity minus the reference's."""
    word_perplexity: float | None = None
    """lm-eval's, by words; under protocol wikitext."""
    parts: dict[str, list[PartFigures]] | None = None
    """Figures by `position` in the window and by `kind` of token."""


class CostFigures(_Described):
    """What it takes to run a model on this machine; null is what the machine does not tell."""

    load_seconds: float | None
    """From its files."""
    first_token_seconds: float
    """After a prompt of 64 tokens."""
    decode_tokens_per_second: float
    """Of one sequence."""
    batch_tokens_per_second: float
    """Of `batch_size` sequences side by side, all of them counted."""
    batch_size: int
    """Sequences side by side."""
    peak_bytes: int | None
    """Memory held at most while loading and decoding, beyond what was held before."""
    joules_per_token: float | None
    """Of the processor's package, or the GPU's board."""


class PromptFacts(_Described):
    """Prompts that models answered."""

    source: str
    """Where they come from; `instructions` are those of llmqat."""
    sha256: str
    """Of the prompts as the models read them."""
    number: int
    """How many."""
    max_new_tokens: int
    """Tokens after which an answer is cut."""
    chat_template: bool
    """Whether the tokenizer has one, so that words were a user's turn; else they began a text."""


class Beside(_Described):
    """How far a figure is from the reference's, paired by prompt."""

    value: float
    """Of `length` the share that it is longer by, else the difference."""
    low: float | None
    """Lower end of its 95 % interval by bootstrap over prompts; null where there is one prompt only."""
    high: float | None
    """Upper end of its 95 % interval; null as for `low`."""
    noise: bool
    """Whether the interval holds 0, or there is none."""


class AnswerFigures(_Described):
    """Of each answer, in the order of the prompts."""

    not_ended: list[float]
    """1 where it does not end within `max_new_tokens`, else 0."""
    length: list[float]
    """Its tokens, the one that ends it included."""
    repeated: list[float]
    """Share of its 4-grams of tokens that have occurred in it before."""


class Generations(_Described):
    """What a model writes after prompts, the most probable token each time."""

    prompts: PromptFacts
    """What was asked."""
    not_ended: float
    """Share of answers that do not end within `max_new_tokens`."""
    length: float
    """Mean number of tokens of an answer, the one that ends it included."""
    repeated: float
    """Mean share of an answer's 4-grams of tokens that have occurred in it before."""
    intervals: dict[str, Bounds] = {}
    """95 % intervals by figure, by bootstrap over prompts; none where there is one prompt only."""
    from_reference: dict[str, Beside] = {}
    """By figure; none without a reference, and for the reference itself."""
    samples: AnswerFigures
    """The figures of each answer."""
    answers: list[dict[str, str]]
    """Each `prompt`, as the model reads it, and its `completion`."""


class RowFigures(Quality):
    """One model; its own figures of quality are those on the first text."""

    name: str
    """As tables show it."""
    role: Literal["full precision", "plain rounding", "training-free", "without adapter", "trained", "other"]
    """What it stands for; `full precision` is the reference."""
    bits_per_weight: float | None
    """Bits on disk of an average weight of the linear layers, scales included; null where the files do not tell."""
    bytes_on_disk: int | None
    """Of the weight files."""
    decode_tokens_per_second: float | None
    """Of one sequence; null where speed was not measured."""
    costs: CostFigures | None
    """What it takes to run it; null where speed was not measured."""
    seconds: float | None
    """That scoring it took."""
    texts: dict[str, Quality]
    """Figures by text."""
    spec: str | None = None
    """Where the model is: hub id, folder or file."""
    method: str | None = None
    """How it was made, in a word or two; empty where nobody wrote it down."""
    run: dict[str, Any] | None = None
    """The record of how it was made, from its llmqat.json."""
    layers: dict[str, Any] | None = None
    """What quantization did to each layer by stage, from its run's layers.json."""
    scheme: dict[str, Any] | None = None
    """The nearest preset and group size, as a recipe's `quant` takes them; empty where the files do not tell."""
    tasks: dict[str, dict[str, Any]] | None = None
    """By task: means of its metrics, `questions`, and under `samples` each question's value by metric."""
    samples: list[dict[str, str]] | None = None
    """Each `prompt` and its greedy `completion`; with --html."""
    answers: list[dict[str, str]] | None = None
    """Conversations of the first text of chats: `prompt`, `question`, the `own` answer, and the `written` one."""
    generations: Generations | None = None
    """What it writes after prompts; with --prompts."""
    coverage: AuditFigures | None = None
    """What was quantized; with --html."""
    weight_errors: dict[str, float] | None = None
    """|W - Ŵ|² / |W|² by layer; with --html."""


class TextFacts(_Described):
    """A text that was scored, and how it was cut."""

    sha256: str
    """Of the text."""
    windows: int
    """How many were scored."""
    window: int
    """Tokens in one."""
    stride: int
    """Tokens between two starts."""
    tokens: int
    """How many were predicted."""
    ids_sha256: str | None
    """Of the token ids, which two tokenizers cut differently; null where that was not kept."""
    answers: bool = False
    """Whether the answers of conversations alone were scored, a conversation a window."""


class Remark(_Described):
    """Something that the reader of the table must know."""

    level: Literal["warning", "note"]
    """How much it matters."""
    text: str
    """What it is."""


class ComparisonFigures(_Described):
    """Models measured on the same windows."""

    texts: dict[str, TextFacts]
    """By name, the first being the one that a row's own figures are of."""
    settings: dict[str, Any]
    """What was asked for: models, reference, texts, protocol, window, stride, max_windows and batch_size."""
    rows: list[RowFigures]
    """A model each, in the order in which they were given."""
    findings: list[Remark]
    """Warnings and notes."""
    environment: dict[str, Any]
    """What speed and the last digits depend on: versions, processor, threads."""


class JudgedRule(_Described):
    """A rule of the gate held against one model on one text."""

    rule: str
    """As it was given."""
    said: str
    """In words, with value and bound."""
    passed: bool
    """Whether it is kept."""


class Advised(_Described):
    """What to do with one model; a model and its exports have one between them."""

    models: list[str]
    """Rows that are one model."""
    verdict: Literal["ship", "calibrate", "train", "more bits", "measure more"]
    """ship: as good as the reference. calibrate: it was rounded plainly. measure more: the interval holds the
    threshold."""
    text: str
    """The text that decided: the one on which most is lost."""
    figure: Literal["kl", "perplexity"]
    """What was judged: KL from the reference in nats a token, or, of a model that has learned answers, the share of
    perplexity that is lost."""
    value: float | None
    """Of that figure."""
    low: float | None
    """Lower end of its 95 % interval; null where there is none."""
    high: float | None
    """Upper end of its 95 % interval; null where there is none."""
    threshold: float
    """What the interval was held against."""
    said: str
    """The advice in words."""
    next: list[str]
    """Commands to run, the best first."""


class ComparisonDocument(Head, ComparisonFigures):
    """Written by eval --json and compare --json."""

    kind: Literal["comparison"]
    """What the document is."""
    gate: list[JudgedRule] = []
    """Empty without --gate."""
    advice: list[Advised] = []
    """One a model; empty without a reference."""
    drift: list[str] = []
    """What changed since the baseline, a line a model and text."""


class AuditedTensor(_Described):
    """One parameter tensor."""

    name: str
    """In the state dict of the unquantized model."""
    shape: list[int]
    """Of the unquantized tensor."""
    treatment: str
    """Label of the scheme (int4 g64), or kept."""
    reason: str
    """Why it was left alone, or what else there is to know."""
    bytes_before: int
    """In a bfloat16 checkpoint."""
    bytes_after: int
    """In the packed checkpoint, scales included."""


class AuditFigures(_Described):
    """What is quantized of a model, and how."""

    average_bits: float
    """Of the quantized weights, scales included."""
    average_bits_of_all: float
    """Of all parameters, scales included."""
    bytes_before: int
    """Of all tensors in a bfloat16 checkpoint."""
    bytes_after: int
    """Of all tensors in the packed checkpoint."""
    notes: list[str]
    """What the reader must know."""
    entries: list[AuditedTensor]
    """Every parameter tensor."""


class SizeOnDisk(_Described):
    """What lies on disk now."""

    bytes: int | None
    """Of the weight files; null for a model on the hub."""
    bits_per_weight: float | None
    """Of an average weight of the linear layers; null where the files do not tell."""


class Served(_Described):
    """What one client makes of the checkpoint."""

    client: str
    """Its name in llmqat."""
    title: str
    """What it is called."""
    serves: bool
    """Whether it takes the checkpoint."""
    reason: str
    """Why not; empty where it does."""
    source: str
    """Where the rule was read, or what checks it."""
    lost: list[str]
    """What it leaves out or does otherwise."""
    export: str
    """Format to export to first; empty where it reads the checkpoint as it is."""
    basis: str
    """Whether this was run, or read only."""


class AuditDocument(Head, AuditFigures):
    """Written by audit --json."""

    kind: Literal["audit"]
    """What the document is."""
    on_disk: SizeOnDisk
    """The model as it is, before anything is done to it."""
    served_by: dict[str, Served]
    """By client; empty where nothing is quantized."""


class LayerCost(_Described):
    """What fewer bits cost one layer."""

    name: str
    """Dotted name of the layer."""
    weights: int
    """How many it has."""
    cost: dict[str, float]
    """Choice, bits or the name of a scheme -> predicted KL of quantizing this layer alone, nats a token."""
    bits_per_weight: dict[str, float] | None = None
    """Choice -> bits a weight in the checkpoint, scales counted; null where choices are bits."""


class SensitivityDocument(Head):
    """Written by sensitivity --json."""

    kind: Literal["sensitivity"]
    """What the document is."""
    target_bits: float
    """Bits a weight on average that may be spent; scales count where choices are names of schemes."""
    average_bits: float
    """What the assignment takes."""
    predicted_kl: float
    """Sum of the chosen costs, nats a token."""
    bits: dict[str, int | str]
    """Layer -> its bits, or the name of its scheme."""
    sensitivity: list[LayerCost]
    """What the choice was made from."""


class StageFacts(_Described):
    """What a stage of the calibration did."""

    stage: str
    """Its name."""
    seconds: float
    """All starts of an interrupted stage together."""
    kl_before: float | None
    """KL on the first token blocks before it, nats a token; null where no text was at hand."""
    kl_after: float | None
    """And after it."""
    parts: dict[str, Any]
    """What the stage says of each block or layer."""


class CheckpointFacts(_Described):
    """What was saved."""

    folder: str
    """Where it lies."""
    format: str
    """Name of the format."""
    bytes: dict[str, int]
    """Of the weight files, by part; they add up to `weight_bytes`."""
    files: dict[str, int]
    """Bytes of every file."""
    weight_bytes: int
    """Of the weight files."""
    folder_bytes: int
    """Of all files."""
    quantized_weights: int
    """Weights in packed layers, embeddings and output head not counted."""
    bits_per_weight: float
    """Bits on disk of one of these, scales included."""
    proof: dict[str, int]
    """What was compared after writing: tensors, layers, probe tokens."""
    stock_transformers: dict[str, Any]
    """What transformers without llmqat makes of it."""
    served_by: dict[str, Served]
    """By client."""
    notes: list[str]
    """What the reader must know."""


class RunDocument(Head):
    """results.json of a finished run; parts that a run does not have are absent."""

    kind: Literal["run"]
    """What the document is."""
    recipe: dict[str, Any]
    """As it was run, all defaults filled in."""
    model_is_local: bool | None = None
    """Whether its model is a file or folder, and no id of the hub."""
    text: dict[str, Any]
    """Source, hash, tokens and documents of the training text."""
    calibration_text: dict[str, Any] | None = None
    """As `text`, where calibration has text of its own."""
    validation_text: dict[str, Any] | None = None
    """As `text`, of the validation split."""
    earlier_texts: list[Any] | None = None
    """What the checkpoint that the run began with had seen."""
    calibration: list[StageFacts]
    """What each stage did."""
    training: dict[str, Any] | None
    """Steps, tokens, tokens_per_second, losses, and under `history` all that the trainer has logged; null where nothing
    was trained."""
    comparison: ComparisonFigures
    """The table at the end."""
    seconds: dict[str, float]
    """Wall-clock time of each stage, since the run has begun or gone on."""
    goes_on: bool = False
    """Whether an interrupted run has gone on, so that `seconds` are not those of whole stages."""
    checkpoint: CheckpointFacts
    """The packed checkpoint, as it lies on disk."""


class _Document(RootModel[ComparisonDocument | AuditDocument | SensitivityDocument | RunDocument]):
    """Any of them."""


DOCUMENTS: dict[Kind, type[BaseModel]] = {
    "comparison": ComparisonDocument,
    "audit": AuditDocument,
    "sensitivity": SensitivityDocument,
    "run": RunDocument,
}
"""Kind -> its description."""

"""A folder of text that a model has written: shards, what made them, and what they are like.

    shard-00000.parquet   blocks of the first shard: columns `input_ids`, `seq_lengths` (of the documents in it, as TRL
                          packs them) and `text`
    llmqat.json           the manifest: model, settings, a line a shard with rows, hash and counts; the report
    teacher/              on demand: what the writer predicts at every position (see `teacher_cache.py`)
    README.md             the same for people, with samples to read; its head makes `datasets.load_dataset(FOLDER)` work

    .tapes-*.jsonl        finished documents of an unfinished shard, where servers write (see `server_writer.py`)

A shard counts once the manifest names it. Both are written under a temporary name and renamed, so a killed run loses
only the shard that it was writing. The same command resumes the run, and gives the text of an uninterrupted one unless
servers write. Asking a finished folder for more tokens adds shards.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data.blocks import Progress, Rows, sha256_of_rows
from llmqat.data.hub import MANIFEST_FILE
from llmqat.data.processes import ALONE, Processes
from llmqat.data.quality import distinct_shares, merged, summary
from llmqat.data.server_writer import TAPES, WRITTEN_BY, ServerWriter, remove_tapes
from llmqat.data.strategy import SynthesisConfig
from llmqat.data.teacher_cache import HEADER_FILE, model_fingerprint, vocabulary_fingerprint
from llmqat.data.writer import WRITER_VERSION, Keeper, ModelWriter, Shard, Writer
from llmqat.files import write_whole
from llmqat.models import name_of

log = logging.getLogger(__name__)

CARD_FILE = "README.md"
TEACHER_FOLDER = "teacher"
FORMAT = "llmqat synthesis 1"
SAMPLES = 12
SAMPLE_CHARACTERS = 1200
_GRAMS = ("single tokens", "pairs", "triples", "runs of four")
_LEFT_OVERS = (".shard-*.parquet.*", f".{MANIFEST_FILE}.*", f".{CARD_FILE}.*")
"""Names under which a killed run may leave half-written files."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards says of itself."""

    made_with: dict[str, Any]
    """Hashes of model, tokenizer and prompts, and the settings: what the text depends on, flat."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The model's name and the versions: for people."""
    shards: list[dict[str, Any]] = field(default_factory=list)
    """A line a finished shard: number, file, rows, blocks, sha256 of its ids, counts of its documents."""
    report: dict[str, Any] | None = None
    """What the text is like; None while shards are missing."""

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SynthesisConfig, writer: Writer
    ) -> Manifest:
        """Returns the manifest of a folder without shards, which `writer` will write."""
        settings = config.model_dump(mode="json", exclude={"prompts", "batch_size", "server"})
        prompts = None if config.prompts is None else hashlib.sha256(config.prompts.read_bytes()).hexdigest()
        made_with = {
            "model_sha256": model_fingerprint(model),
            "tokenizer_sha256": vocabulary_fingerprint(tokenizer),
            "dtype": str(model.dtype).removeprefix("torch."),
            **writer.made_with,
            "prompts_sha256": prompts,
            "writer_version": WRITER_VERSION,
            **settings,
        }
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        capability = torch.backends.cpu.get_cpu_capability()
        facts = {"model": name_of(model), **versions, "processor": capability}
        return cls(made_with, facts)


@dataclass(frozen=True)
class WrittenFolder:
    """A folder that holds all that was asked for."""

    path: Path
    manifest: Manifest

    @property
    def files(self) -> list[Path]:
        """The shards' files in order."""
        return [self.path / line["file"] for line in self.manifest.shards]

    @property
    def blocks(self) -> int:
        """Blocks in all shards."""
        return sum(line["blocks"] for line in self.manifest.shards)

    def shards(self) -> Iterator[Shard]:
        """Yields the shards as they lie on disk."""
        for line in self.manifest.shards:
            yield _shard_of(line, _read_blocks(self.path / line["file"], self.manifest.made_with["block_size"]))


def write_shards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    folder: Path,
    config: SynthesisConfig,
    progress: Progress | None = None,
    keeper: Keeper | None = None,
    processes: Processes = ALONE,
) -> WrittenFolder:
    """Fills `folder` with shards until they hold `tokens`; those that it holds already are kept.

    Args:
        model: the writer, packed or not.
        tokenizer: of the model.
        tokens: wanted.
        folder: made, or begun by an earlier call.
        config: what makes the text.
        progress: called with (tokens written, tokens to write).
        keeper: takes what the model predicts while it writes.
        processes: write the shards together, the first one to disk; what lies there is what one would write.

    Raises:
        ConnectionError: no server answers any more.
        FileExistsError: `folder` holds something else.
        ValueError: it was written by another model or with other settings; says which. And as `Writer`.
    """
    check_folder(folder)
    is_begun = processes.is_first and (folder / MANIFEST_FILE).is_file()
    found = processes.agreed(read_manifest(folder) if is_begun else None)
    is_served = found is not None and WRITTEN_BY.items() <= found.made_with.items()
    top_k = keeper.cache.top_k if keeper is not None and keeper.apart else None
    writer = open_writer(model, tokenizer, config, top_k, is_served=is_served)
    manifest = Manifest.of(model, tokenizer, config, writer)
    writer.keep_unfinished(folder, manifest.made_with)
    done: dict[int, Shard] = {}
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder, *_LEFT_OVERS)
        if found is not None:
            _check_same(found, manifest, folder)
            manifest = found
        done = {shard.number: shard for shard in _finished(manifest, folder)}
    done = processes.agreed(done)
    if done:
        log.info("%s: %d shards are there already", folder, len(done))
    lines: list[dict[str, Any]] = []
    for shard in writer.shards(tokens, done, progress, processes):
        lines.append(_line_of(shard))
        if not processes.is_first:
            continue
        if keeper is not None:  # first: a shard that counts is never written again
            keeper.keep(writer.with_predictions(shard) if shard.top is None and keeper.lacks(shard) else shard)
        if shard.number not in done:
            _write_parquet(shard.blocks, tokenizer, folder / lines[-1]["file"])
            # What lies behind an unfinished shard was finished before it was damaged: it is kept.
            later = [line for line in manifest.shards if line["number"] > shard.number and line["number"] in done]
            _write_manifest(Manifest(manifest.made_with, manifest.facts, [*lines, *later]), folder)
            remove_tapes(folder, shard.number)
    kept = [line for line in manifest.shards if line["number"] >= len(lines) and line["number"] in done]
    manifest = Manifest(manifest.made_with, manifest.facts, [*lines, *kept])
    if processes.is_first:
        manifest = _reported(WrittenFolder(folder, manifest), tokenizer).manifest
    return WrittenFolder(folder, processes.agreed(manifest))


def open_writer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SynthesisConfig,
    top_k: int | None = None,
    *,
    is_served: bool = False,
) -> Writer:
    """Returns what writes text as `config` says: this process, or servers.

    Args:
        model: causal language model.
        tokenizer: of the model.
        config: what makes the text.
        top_k: tokens whose probabilities are kept at each position; None: none.
        is_served: whether servers wrote what is there already.

    Raises:
        FileNotFoundError: there is no file of prompts.
        ValueError: as `Writer`.
    """
    kind = ServerWriter if config.server or is_served else ModelWriter
    return kind(model, tokenizer, config, top_k)


def check_folder(folder: Path) -> None:
    """Raises where `folder` is something else than shards, finished or not.

    Raises:
        FileExistsError: it is.
    """
    if folder.exists() and not (folder.is_dir() and _holds_shards(folder)):
        raise FileExistsError(
            f"output folder {folder} exists already and holds no generated text; choose another folder"
        )


def remove_shards(folder: Path) -> None:
    """Deletes the written text in `folder`, if there is any; the folder stays.

    Raises:
        FileExistsError: `folder` holds something else.
    """
    check_folder(folder)
    if folder.exists():
        (folder / MANIFEST_FILE).unlink(missing_ok=True)  # first: without it nothing counts
        _remove(folder, "shard-*.parquet", CARD_FILE, TAPES, *_LEFT_OVERS)
        shutil.rmtree(folder / TEACHER_FOLDER, ignore_errors=True)


def _holds_shards(folder: Path) -> bool:
    """Whether there is a manifest of ours, or only what a run leaves that was killed before it wrote one."""
    left_over = ["shard-*.parquet", TAPES, *_LEFT_OVERS]
    if (folder / TEACHER_FOLDER / HEADER_FILE).is_file():
        left_over.append(TEACHER_FOLDER)
    others = (path for path in folder.iterdir() if not any(path.match(pattern) for pattern in left_over))
    return (folder / MANIFEST_FILE).is_file() or not any(others)


def _remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def read_manifest(folder: Path) -> Manifest:
    """Returns what `folder` says of itself.

    Raises:
        ValueError: its manifest is damaged or something else.
    """
    path = folder / MANIFEST_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT!r}")
        return Manifest(**found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of generated text: {error}; choose another folder") from error


def _check_same(found: Manifest, wanted: Manifest, folder: Path) -> None:
    keys = sorted(found.made_with.keys() | wanted.made_with.keys())
    here = {"written_by": "llmqat"}
    pairs = [(key, found.made_with.get(key, here.get(key)), wanted.made_with.get(key, here.get(key))) for key in keys]
    differing = [f"{key} was {before!r}, now {now!r}" for key, before, now in pairs if before != now]
    if differing:
        raise ValueError(
            f"the text in {folder} (by {found.facts.get('model')}) was begun with something else: "
            f"{'; '.join(differing)}. Give the same again to go on, another --out, or --overwrite to begin anew"
        )


# Shards and their lines in the manifest


def _line_of(shard: Shard) -> dict[str, Any]:
    return {
        "number": shard.number,
        "file": f"shard-{shard.number:05d}.parquet",
        "rows": shard.rows,
        "blocks": len(shard.blocks),
        "sha256": sha256_of_rows(shard.blocks),
        "facts": dict(shard.facts),
    }


def _shard_of(line: dict[str, Any], blocks: Rows) -> Shard:
    return Shard(line["number"], line["rows"], blocks, line["facts"])


def _finished(manifest: Manifest, folder: Path) -> Iterator[Shard]:
    """Yields the shards that lie whole in `folder`; others are written again."""
    size = manifest.made_with["block_size"]
    for line in manifest.shards:
        path = folder / line["file"]
        try:
            blocks = _read_blocks(path, size)
        except (OSError, ValueError, RuntimeError) as error:
            log.warning("%s is missing or damaged and is written again: %s", path, error)
            continue
        if sha256_of_rows(blocks) == line["sha256"]:
            yield _shard_of(line, blocks)
        else:
            log.warning("%s does not hold what the manifest says, and is written again", path)


def _write_parquet(blocks: Rows, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    from datasets import Dataset, Features, List, Value

    ids, size = blocks.stored, blocks.stored.shape[1]
    assert blocks.starts is not None
    begins = [[*row.nonzero().squeeze(1).tolist(), size] for row in blocks.starts]
    lengths = [[after - before for before, after in pairwise(row)] for row in begins]
    rows = {"input_ids": ids.tolist(), "seq_lengths": lengths, "text": [tokenizer.decode(row) for row in ids]}
    # Said, as a shard of which nothing is kept has no rows to tell them from.
    kinds = Features({"input_ids": List(Value("int64")), "seq_lengths": List(Value("int64")), "text": Value("string")})
    temporary = path.with_name(f".{path.name}.tmp")
    Dataset.from_dict(rows, features=kinds).to_parquet(temporary)
    temporary.replace(path)


def _read_blocks(path: Path, size: int) -> Rows:
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    column = table["input_ids"].combine_chunks()
    ids = torch.tensor(column.values.to_numpy(), dtype=torch.int64).view(len(column), size)
    if "seq_lengths" not in table.column_names:  # written by an earlier version
        return Rows(ids)
    lengths = torch.tensor(table["seq_lengths"].combine_chunks().values.to_numpy(), dtype=torch.int64)
    starts = torch.zeros(ids.numel(), dtype=torch.uint8)
    starts[lengths.cumsum(0) - lengths] = 1  # lengths of a block add up to it
    return Rows(ids, starts=starts.view_as(ids))


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, ensure_ascii=False)
    write_whole(folder / MANIFEST_FILE, text + "\n")


# The report


def _reported(written: WrittenFolder, tokenizer: PreTrainedTokenizerBase) -> WrittenFolder:
    """Returns the folder with its report, which is put into the manifest and the card."""
    manifest, ids = written.manifest, torch.cat([shard.blocks.stored for shard in written.shards()])
    report = {
        "blocks": len(ids),
        "tokens_kept": ids.numel(),
        **summary(merged(line["facts"] for line in manifest.shards)),
        "distinct_ngram_shares": distinct_shares(ids),
    }
    manifest = Manifest(manifest.made_with, manifest.facts, manifest.shards, report)
    chosen = ids[torch.linspace(0, len(ids) - 1, min(SAMPLES, len(ids))).long()]
    samples = [text[:SAMPLE_CHARACTERS] for text in tokenizer.batch_decode(chosen)]
    write_whole(written.path / CARD_FILE, _card(manifest, samples))
    _write_manifest(manifest, written.path)
    return WrittenFolder(written.path, manifest)


def _card(manifest: Manifest, samples: list[str]) -> str:
    head = ["---", "configs:", "- config_name: default", '  data_files: "shard-*.parquet"', "---", ""]
    lines = [*head, f"# Text written by {manifest.facts['model']}", "", *report_lines(manifest.report or {}), ""]
    made_with = {key: value for key, value in manifest.made_with.items() if value is not None}
    lines += ["Made with:", "", *(f"- {key}: {value}" for key, value in made_with.items()), ""]
    lines += [f"## {len(samples)} of its blocks, from their beginning", ""]
    for sample in samples:
        lines += [*(f"    {line}" for line in sample.splitlines()), "", "---", ""]
    return "\n".join(lines)


REPORT_COLUMNS = (
    *("kind", "documents", "tokens a document", "ended by the model", "perplexity", "repeated 4-grams", "dropped"),
)


def report_lines(report: dict[str, Any]) -> list[str]:
    """Returns the report as a Markdown table of kinds of documents, figures below it, and what they mean."""
    lines = [f"| {' | '.join(REPORT_COLUMNS)} |", "|---" * len(REPORT_COLUMNS) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in report_rows(report)]
    return [*lines, "", *report_notes(report)]


def report_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns a row of figures, as `REPORT_COLUMNS` name them, for each kind of documents and for all."""
    rows: list[tuple[str, ...]] = []
    for kind, figures in [*report["by_kind"].items(), ("all", report)]:
        count = report["documents"] if kind == "all" else report["documents_by_kind"][kind]
        dropped = ", ".join(f"{number} {fault}" for fault, number in figures["dropped"].items()) or "none"
        perplexity = figures["perplexity"]
        rows.append(
            (
                kind,
                f"{count:,}",
                f"{figures['mean_document_tokens']}",
                f"{figures['ended_share']:.0%}",
                "–" if perplexity is None else f"{perplexity:.4g}",
                f"{figures['repeated_4gram_share']:.1%}",
                f"{dropped} ({figures['dropped_token_share']:.1%} of tokens)",
            )
        )
    return rows


def report_notes(report: dict[str, Any]) -> list[str]:
    """Returns what else is known of the text, and what the figures mean."""
    grams = zip(_GRAMS, report["distinct_ngram_shares"].values(), strict=True)
    shares = ", ".join(f"{share:.1%} of {gram}" for gram, share in grams)
    lengths = ", ".join(f"{count} up to {length}" for length, count in report["lengths_up_to"].items())
    return [
        f"{report['blocks']:,} blocks, {report['tokens_kept']:,} tokens. Distinct are {shares}.",
        f"Documents by length in tokens: {lengths}.",
        "",
        "Perplexity is that of the written tokens to their writer. Repeated are 4-grams that the document had before.",
        "What the model did not end was cut at the end of a block.",
    ]

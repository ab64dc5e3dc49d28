"""The settings of a text source (DataConfig), and the registry of sources.

A source is a module and one line in `SOURCES`; the module is imported when it is used. It has a function
`open_source(config) -> DocumentSource`. The documents of every such source are tokenized, split and packed in the same
way. Text that the model generates is different: its module has `load(config, tokenizer, model, progress, processes,
cache) -> TokenBlocks`. Users add a source by decorating an `open_source` function with `@SOURCES.register("name")`.
Such a source may read every key of source `dataset`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from llmqat.config import Registry
from llmqat.data.strategy import SynthesisConfig

SOURCES: Registry[Any] = Registry("source")
"""Where text may come from, and the module that brings it, or the function that opens it."""
for _name, _module in (("synthetic", "synthesis"), ("text", "files"), ("pydoc", "pydoc"), ("dataset", "hub")):
    SOURCES.register(_name, f"llmqat.data.{_module}")
MIX = "mix"
"""Stands in `source` for several of them."""

PYDOC = "pydoc"
"""Stands for the prose of the Python version in use."""
HUB_PREFIX = "hub:"
"""Begins a text that is a dataset of the Hugging Face hub: hub:NAME[:CONFIG[:SPLIT]]."""

_COMMON = {"source", "tokens", "block_size", "seed"}
_DOCUMENTS = {"packing", "num_proc", "calibration_share", "validation_share"}
"""What holds for every source that gives documents."""
_OWN = {
    "synthetic": {*SynthesisConfig.model_fields, "path", "packing"},
    "text": {"path"} | _DOCUMENTS,
    "pydoc": _DOCUMENTS,
    "dataset": {
        *(
            "path",
            "name",
            "config_name",
            "revision",
            "split",
            "column",
            "ignore_columns",
            "format",
            "chat_template",
            "labels",
            "streaming",
        ),
        *_DOCUMENTS,
    },
    MIX: {"mix"} | _DOCUMENTS,
}
DEFAULT_SYNTHETIC_TOKENS = 65536


class DataConfig(SynthesisConfig):
    """Text to calibrate and train on."""

    source: str = "synthetic"
    """`synthetic` (written by the model itself), `text` (files), `pydoc` (Python's own manual), `dataset`, or `mix`."""
    tokens: int | None = Field(None, ge=1)
    """Tokens wanted for training; rounded up to whole blocks. None: 65,536 synthetic ones, or all that the text has."""
    seed: int = 0
    """Seed of synthesis, of the splits, and of the order in a mix."""
    path: Path | None = None
    """Source text: a file or a folder of .txt and .md files. Source dataset: a local file (parquet, json, jsonl, csv,
    arrow, txt), a folder of them, one made by `save_to_disk`, or hub:NAME:CONFIG:SPLIT, which stands for `name`,
    `config_name` and `split`. Source synthetic: a folder that keeps the text as
    shards, and continues an earlier one; None: the text is kept in the run folder alone."""
    name: str | None = None
    """Source dataset: id on the Hugging Face hub."""
    config_name: str | None = None
    """Source dataset: configuration of the hub dataset, such as `wikitext-2-raw-v1`."""
    revision: str | None = None
    """Source dataset: branch, tag or commit on the hub."""
    split: str | None = None
    """Source dataset: split; `train` where nothing is said."""
    column: str | None = None
    """Source dataset: column that holds the text, the messages or the chosen answer; found where nothing is said and
    only one can be meant."""
    ignore_columns: tuple[str, ...] = ()
    """Source dataset: columns that are not looked at. A column that means something and does not reach the text, such
    as tools that the chat template does not read, is refused unless it is named here."""
    format: Literal["text", "messages", "prompt_completion", "preference"] | None = None
    """Source dataset: what a row is, in TRL's words; found from the columns where only one can be meant. `messages`: a
    conversation, through the chat template, the assistant's words alone being labels. `prompt_completion`: columns
    `prompt` and `completion`, text or messages, the completion being labels, of rows whose `label`, if there is one, is
    true. `preference`: column `chosen`, and `prompt` or else what `chosen` and `rejected` begin with alike.
    Conversations may have `tools`, `documents` and `chat_template_kwargs` beside them."""
    chat_template: Path | None = None
    """Source dataset: file with a Jinja chat template in place of the tokenizer's own; the checkpoint carries it."""
    labels: Literal["answers", "all"] = "answers"
    """Source dataset: which tokens of conversations, prompts and completions the loss counts. `answers`: what the
    assistant says, or the completion. `all`: every token."""
    streaming: bool = False
    """Source dataset: read rows as they arrive, without downloading or converting the dataset as a whole first. Its
    blocks are made anew by each run, since what it holds is not known before it is read."""
    packing: Literal["concatenate", "documents", "whole"] | None = None
    """`concatenate`: a block is one text. `documents`: position ids begin anew with each document in it, and attention
    stays within documents; models that cannot do this are refused by name. `whole`: as `documents`, and a document that
    fits a block is never cut: what is left of a block is filled with text that is no label, so no document is left out,
    however few there are; not for synthetic text. None: `documents` for synthetic text, whose writer saw each document
    alone, if the model can do it; else `concatenate`. Calibration reads a block of synthetic text as one text."""
    num_proc: int = Field(1, ge=1)
    """Processes that tokenize; the blocks do not depend on it. Not for synthetic text."""
    calibration_share: float = Field(0.0, ge=0, lt=1)
    """Share of the documents, chosen by their hash and the seed, that is calibrated on and not trained on. 0: the first
    blocks of the training text are calibrated on. Not for synthetic text."""
    validation_share: float = Field(0.0, ge=0, lt=1)
    """Share of the documents, chosen likewise, that is held out; of up to a thousand conversations just this share, two
    at least. The trainer's evaluation loss is measured on it, at the end and as train.eval_strategy says. Held-out
    answers are also a text of the table at the end, with examples of what the model answered before and answers now.
    Not for synthetic text."""
    mix: tuple[MixedSource, ...] | None = None
    """Several sources, each a mapping with its own keys and a `weight`; `source: mix` need not be said."""

    @property
    def keeps_apart(self) -> bool:
        """Whether documents of a block are kept apart because this says so; synthetic text may be without it."""
        return self.packing in ("documents", "whole")

    @property
    def wanted_blocks(self) -> int | None:
        """Blocks of training text wanted; None for all that there are."""
        return None if self.tokens is None else math.ceil(self.tokens / self.block_size)

    @model_validator(mode="before")
    @classmethod
    def _mix_is_a_source(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mix") is not None:
            return {"source": MIX, **values}
        return values

    @model_validator(mode="before")
    @classmethod
    def _path_on_the_hub(cls, values: Any) -> Any:
        if isinstance(values, dict) and str(values.get("path") or "").startswith(HUB_PREFIX):
            return {**{key: value for key, value in values.items() if key != "path"}, **hub_keys(str(values["path"]))}
        return values

    @model_validator(mode="after")
    def _check_source(self) -> DataConfig:
        if self.source not in (*SOURCES, MIX):
            raise ValueError(f"data.source={self.source!r} is not known; choose one of {', '.join((*SOURCES, MIX))}")
        allowed = _COMMON | _OWN.get(self.source, _OWN["dataset"])
        meant = {name for name in self.model_fields_set if getattr(self, name) != type(self).model_fields[name].default}
        unused = sorted(meant - allowed - {"weight"})
        if unused:
            raise ValueError(
                f"data.{unused[0]} is not used with data.source={self.source!r}, which takes "
                f"{', '.join(sorted(allowed))}"
            )
        if self.source == "text" and self.path is None:
            raise ValueError("data.source='text' needs data.path=FILE_OR_FOLDER")
        if self.source == "dataset" and (self.path is None) == (self.name is None):
            raise ValueError("data.source='dataset' needs either data.name=HUB_ID or data.path=FILE_OR_FOLDER")
        if self.calibration_share + self.validation_share >= 1:
            raise ValueError(
                f"data.calibration_share={self.calibration_share} and data.validation_share={self.validation_share} "
                "leave nothing to train on; together they must be below 1"
            )
        if self.server and self.path is None:
            raise ValueError("data.server needs data.path=FOLDER, which keeps what is written if a server dies")
        if self.source == "synthetic" and self.packing == "whole":
            raise ValueError(
                "data.packing=whole: synthetic text fills its blocks by itself; give documents, or concatenate"
            )
        if self.source == MIX and len(self.mix or ()) < 2:
            raise ValueError("data.mix needs at least two sources, such as [{source: pydoc}, {source: text, path: F}]")
        shares = self.calibration_share + self.validation_share
        if self.source == MIX and shares and all(one.source == "synthetic" for one in self.mix or ()):
            raise ValueError(
                "data.mix has only text that the model generates, and of that no share is held out; leave out "
                "data.calibration_share and data.validation_share, or add a source of text"
            )
        return self


def hub_keys(text: str) -> dict[str, Any]:
    """Returns the keys of DataConfig that hub:NAME[:CONFIG[:SPLIT]] stands for.

    Raises:
        ValueError: when no name is in it, or too much is.
    """
    parts = text.removeprefix(HUB_PREFIX).split(":")
    if not parts[0] or len(parts) > 3:
        raise ValueError(f"{text!r} is no dataset of the hub; write {HUB_PREFIX}NAME, or {HUB_PREFIX}NAME:CONFIG:SPLIT")
    given = dict(zip(("name", "config_name", "split"), parts, strict=False))
    return {"source": "dataset", **{key: part for key, part in given.items() if part}}


class MixedSource(DataConfig):
    """One source of a mix."""

    weight: float = Field(1.0, gt=0)
    """Its share of the tokens, relative to the weights of the others."""

    @model_validator(mode="after")
    def _check_keys(self) -> MixedSource:
        if self.source == MIX:
            raise ValueError("data.mix: a mix in a mix is one mix; list all sources side by side")
        if self.server:
            raise ValueError(
                "data.mix: server is no key of a source in a mix; write the text with `llmqat synthesize --server` "
                "first, and give its folder as the path of this source"
            )
        shared = sorted(self.model_fields_set & ((_COMMON | _DOCUMENTS) - {"source"}))
        if shared:
            raise ValueError(f"data.mix: {shared[0]} holds for the whole mix; give it as data.{shared[0]}")
        return self


DataConfig.model_rebuild()

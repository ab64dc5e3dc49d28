"""What a recipe says about text: where it comes from, how much of it, cut to which length.

A source is a module with a function `load(config, tokenizer, model, progress) -> TokenBlocks` and one line in
`SOURCES`; it is imported when it is used.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from llmqat.data.strategy import SynthesisConfig

SOURCES = {
    "synthetic": "llmqat.data.synthesis",
    "text": "llmqat.data.text",
    "pydoc": "llmqat.data.pydoc",
    "dataset": "llmqat.data.hub",
}
"""Where text may come from, and the module that brings it."""

_COMMON = {"source", "tokens", "block_size", "seed"}
_OWN = {
    "synthetic": {*SynthesisConfig.model_fields, "path"},
    "text": {"path"},
    "pydoc": set[str](),
    "dataset": {"path", "name", "config_name", "revision", "split", "column"},
}
DEFAULT_SYNTHETIC_TOKENS = 65536


class DataConfig(SynthesisConfig):
    """Text to calibrate and train on."""

    source: str = "synthetic"
    """`synthetic` (written by the model itself), `text` (files), `pydoc` (Python's own manual), or `dataset`."""
    tokens: int | None = Field(None, ge=1)
    """Tokens wanted; rounded up to whole blocks. None: 65,536 synthetic ones, or all that the text has."""
    path: Path | None = None
    """Source text: a file or a folder of .txt and .md files. Source dataset: a local file or folder. Source synthetic:
    a folder that keeps the text as shards, and is gone on with; None: the text is kept in the run folder alone."""
    name: str | None = None
    """Source dataset: id on the Hugging Face hub."""
    config_name: str | None = None
    """Source dataset: configuration of the hub dataset, such as `wikitext-2-raw-v1`."""
    revision: str | None = None
    """Source dataset: branch, tag or commit on the hub."""
    split: str | None = None
    """Source dataset: split; `train` where nothing is said."""
    column: str | None = None
    """Source dataset: column that holds the text; found where nothing is said and only one can be meant."""

    @model_validator(mode="after")
    def _check_source(self) -> DataConfig:
        if self.source not in SOURCES:
            raise ValueError(f"data.source={self.source!r} is not known; choose one of {', '.join(SOURCES)}")
        allowed = _COMMON | _OWN.get(self.source, set(type(self).model_fields))
        unused = sorted(key for key in self.model_fields_set - allowed if getattr(self, key) is not None)
        if unused:
            raise ValueError(
                f"data.{unused[0]} means nothing for data.source={self.source!r}, which takes "
                f"{', '.join(sorted(allowed))}"
            )
        if self.source == "text" and self.path is None:
            raise ValueError("data.source='text' needs data.path=FILE_OR_FOLDER")
        if self.source == "dataset" and (self.path is None) == (self.name is None):
            raise ValueError("data.source='dataset' needs either data.name=HUB_ID or data.path=FILE_OR_FOLDER")
        return self

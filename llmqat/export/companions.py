"""What travels beside weights in every form of a checkpoint: how to generate, and the processor of images and sound."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import cached_file

from llmqat.hub import may_be_hub_id, why_unreachable

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What transformers' processors of images and sound keep beside a tokenizer."""
_OLD_TEMPLATE, _TEMPLATE = "chat_template.json", "chat_template.jinja"
"""Where older processors keep the chat template, and where processors and tokenizers do now."""


def keep_companions(model: PreTrainedModel, folder: Path) -> None:
    """Writes how `model` generates into `folder`, and copies what its source says of images and sound (AutoProcessor).

    The tokenizer is there already. Files that are there are left as they are.
    """
    _write_generation_config(model, folder)
    source = model.config.name_or_path
    for name in (*PROCESSOR_FILES, _OLD_TEMPLATE):
        if name == _OLD_TEMPLATE and (folder / _TEMPLATE).exists():
            continue
        file: str | Path | None = Path(source) / name
        if source and not Path(source).exists() and may_be_hub_id(source):
            file = cached(source, name)
        if source and file is not None and Path(file).is_file() and not (folder / name).exists():
            shutil.copyfile(file, folder / name)


def _write_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Writes generation_config.json, without how this process compiles (`load(compile=True)`)."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    if getattr(config, "compile_config", None) is not None:
        config = deepcopy(config)
        config.compile_config = config.cache_implementation = None
    # Not save_pretrained, which refuses settings that many published models have; this only records them.
    config.to_json_file(folder / "generation_config.json")


def cached(repository: str, name: str) -> str | None:
    """Returns where a file of a hub repository lies; None where it has none, or cannot be asked."""
    found: str | None = cached_file(
        repository,
        name,
        local_files_only=why_unreachable() is not None,  # it would be asked for half a minute
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found

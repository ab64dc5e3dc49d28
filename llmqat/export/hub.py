"""Publishing: the files of a packed checkpoint and their model card, to a folder or to the Hugging Face hub.

What is published is a list of kinds of files, not whatever lies in the folder. The token is found where huggingface_hub
finds it: `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from llmqat.export.card import model_card
from llmqat.export.checkpoint import FORMATS
from llmqat.files import folder_in_progress
from llmqat.hub import may_be_hub_id
from llmqat.models import check_safetensors, read_config, weight_files
from llmqat.paths import user_path

PUBLISHED = (
    *("*.json", "*.safetensors", "*.jinja", "additional_chat_templates/*.jinja"),
    *("*.model", "*.tiktoken", "merges.txt", "vocab.txt"),
)
"""Patterns of the files that are published; README.md is written anew."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
"""Patterns of the files with weights: of a repository they are all replaced."""


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    dry_run: Path | None = None,
) -> str:
    """Publishes the packed checkpoint in `folder` with its model card; returns where it lies then.

    Args:
        folder: a packed checkpoint.
        repository: hub id, OWNER/NAME; made where it is not there.
        private: whether a new repository is private.
        revision: the branch to commit to, made where it is not there; `main` where not given.
        license: of the original model; read from the README.md in `folder` where not given.
        base_model: hub id of the original model; the run's own where not given.
        dry_run: write what would be published to this folder, which must not exist, and send nothing.

    Raises:
        FileExistsError: `dry_run` exists.
        FileNotFoundError: there is no such folder, or a file of it is missing.
        OSError: the hub refuses, or cannot be reached.
        ValueError: it is no packed checkpoint, a file is damaged, or an id is not one.
    """
    folder = user_path(folder, "folder")
    for key, name in (("REPO_ID", repository), ("--base-model", base_model)):
        if name is not None and ("/" not in name or not may_be_hub_id(name)):
            raise ValueError(f"{key} {name!r} is not a hub id; give OWNER/NAME, such as someone/smollm2-135m-int4")
    _check_folder(folder)
    card = model_card(folder, repository, license=license or _stated_license(folder), base_model=base_model)
    if dry_run is not None:
        dry_run = user_path(dry_run, "--dry-run")
        if dry_run.exists():
            raise FileExistsError(f"--dry-run {dry_run} exists already; choose another folder")
        with folder_in_progress(dry_run) as temporary:
            _stage(folder, temporary, card)
            temporary.rename(dry_run)
        return str(dry_run)
    with tempfile.TemporaryDirectory() as temporary_name:
        _stage(folder, Path(temporary_name), card, link=True)
        return _upload(Path(temporary_name), repository, private, revision)


def missing_of_card(folder: Path) -> list[str]:
    """Returns what the model card in `folder` does not say and its reader looks for, each with the option that does."""
    data = ModelCard.load(folder / "README.md").data.to_dict()
    asked = {"license": "no license given: --license", "base_model": "base model not known: --base-model"}
    return [words for key, words in asked.items() if not data.get(key)]


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no checkpoint (no config.json); give the folder that llmqat saved")
    config = read_config(folder, str(folder))
    if not any(format.is_packed(config) for format in FORMATS.values()):
        raise ValueError(
            f"{folder} is not packed, so there is nothing of llmqat's to publish; give a packed checkpoint"
        )
    for path in weight_files(folder):
        check_safetensors(path)


def _stated_license(folder: Path) -> str | None:
    """Returns the license in the metadata of the README.md in `folder`, or None."""
    if not (folder / "README.md").is_file():
        return None
    found = ModelCard.load(folder / "README.md").data.to_dict().get("license")
    return found if isinstance(found, str) else None


def _stage(folder: Path, target: Path, card: str, link: bool = False) -> None:
    """Puts the files to publish into `target`: copies, or links to save the space."""
    for path in sorted({path for pattern in PUBLISHED for path in folder.glob(pattern) if path.is_file()}):
        staged = target / path.relative_to(folder)
        staged.parent.mkdir(exist_ok=True)
        if link:
            staged.symlink_to(path.resolve())
        else:
            shutil.copyfile(path, staged)
    (target / "README.md").write_text(card, encoding="utf-8")


def _upload(staged: Path, repository: str, private: bool, revision: str | None) -> str:
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    done = api.upload_folder(
        repo_id=repository,
        folder_path=staged,
        revision=revision,
        commit_message="Upload a checkpoint packed by llmqat",
        delete_patterns=list(WEIGHTS),  # those of an earlier upload; what is uploaded now stays
    )
    return str(done.commit_url)

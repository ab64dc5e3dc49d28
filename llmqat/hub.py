"""Whether the Hugging Face hub can give what a user names, found out in seconds.

Libraries ask the hub for each file, and where it does not answer they try for half a minute and print every try. So
before the first of them is called, one short request says whether the hub answers at all. It is made only for what no
cache holds. With HF_HUB_OFFLINE nothing is asked: the libraries then say at once what they lack.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session
from huggingface_hub.utils._validators import validate_repo_id

PROBE_SECONDS = 5.0
"""Seconds that the hub has to answer in."""
REMEMBERED_SECONDS = 60.0
"""Seconds for which an answer, or none, is not asked for again."""
FILE_SUFFIXES = frozenset(
    {
        *(".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".json", ".yaml", ".yml", ".txt", ".md"),
        *(".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".zip", ".tar", ".gz"),
    }
)
"""Suffixes by which a name that is not there is known to be meant as a file."""

_answers: dict[str, tuple[float, str | None]] = {}
"""Endpoint -> when it was asked, and why it did not answer."""


def may_be_hub_id(spec: str) -> bool:
    """Returns whether `spec` has the form of a hub id."""
    try:
        validate_repo_id(spec)
    except HFValidationError:
        return False
    return True


def looks_like_path(given: str) -> bool:
    """Returns whether `given`, at which nothing lies, can only be meant as a path: the hub has no such names."""
    return not may_be_hub_id(given) or given.startswith("~") or Path(given).suffix.lower() in FILE_SUFFIXES


def is_local(spec: str) -> bool:
    """Returns whether `spec` names a file or folder that is there."""
    return Path(spec).expanduser().exists()


def why_unreachable() -> str | None:
    """Returns why the hub does not answer; None where it does, and where HF_HUB_OFFLINE says not to ask."""
    if constants.HF_HUB_OFFLINE:
        return None
    endpoint = constants.ENDPOINT
    when, reason = _answers.get(endpoint, (float("-inf"), None))
    if time.monotonic() - when > REMEMBERED_SECONDS:
        reason = _ask(endpoint)
        _answers[endpoint] = time.monotonic(), reason
    return reason


def _ask(endpoint: str) -> str | None:
    found: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=PROBE_SECONDS)  # whatever it answers
            found.append(None)
        except Exception as error:  # requests', httpx's or httpx2's, by the version of huggingface_hub
            found.append((str(error).strip() or repr(error)).splitlines()[0])

    thread = threading.Thread(target=ask, daemon=True)  # no timeout ends the look-up of a name
    thread.start()
    thread.join(PROBE_SECONDS)
    return found[0] if found else f"no answer within {PROBE_SECONDS:.0f} seconds"


def check_model_in_reach(repository: str, files: Sequence[str], what: str) -> None:
    """Raises where the hub's cache holds none of some files of a model, and the hub cannot be asked for them.

    Args:
        repository: hub id.
        files: names, of which one at least is needed.
        what: begins the message, such as "model 'org/name'".

    Raises:
        FileNotFoundError: says where the cache is, why the hub does not answer, and the ways out.
    """
    if any(isinstance(try_to_load_from_cache(repository, name), str) for name in files):
        return
    _check_answers(repository, what, "", "a folder")


def check_dataset_in_reach(repository: str, what: str) -> None:
    """Raises where no cache holds anything of a data set of the hub, and the hub cannot be asked for it.

    Raises:
        FileNotFoundError: as `check_model_in_reach`.
    """
    from datasets import config

    prepared = Path(config.HF_DATASETS_CACHE) / repository.replace("/", "___")
    downloaded = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="dataset")
    if not prepared.exists() and not downloaded.exists():
        _check_answers(repository, what, "--repo-type dataset ", "a file (data.path=FILE)")


def _check_answers(repository: str, what: str, options: str, instead: str) -> None:
    reason = why_unreachable()
    if reason is not None:
        raise FileNotFoundError(
            f"{what} is not here, the hub's cache ({constants.HF_HUB_CACHE}) lacks it, and {constants.ENDPOINT} cannot "
            f"be reached ({reason}); give {instead}, set HF_ENDPOINT to a mirror, or run `hf download "
            f"{options}{repository}` where there is a network and copy that cache here (HF_HUB_CACHE=FOLDER)"
        )

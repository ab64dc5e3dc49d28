"""Progress bars, shown by the main process where it logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from llmqat.data import Progress

log = logging.getLogger(__name__)


def progress(what: str, unit: str) -> Any:
    """Returns a wrapper of an iterable that shows its progress, rate and time left in the main process."""
    return partial(tqdm, desc=what, unit=unit, leave=False, disable=not log.isEnabledFor(logging.INFO))


@contextmanager
def token_bar(what: str) -> Iterator[Progress]:
    """Yields a callback (tokens done, tokens in all) that draws a bar with rate and time left in the main process."""
    with tqdm(desc=what, unit="token", unit_scale=True, leave=False, disable=not log.isEnabledFor(logging.INFO)) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance

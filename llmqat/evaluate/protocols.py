"""Named ways of scoring a text, so that figures can be put beside those of papers and of lm-eval.

    windows    the text in windows of `window` tokens, with or without overlap; a BOS token, where the model knows one,
               opens each window. What llmqat's own tables use.
    wikitext2  as GPTQ's code and most papers since: rows of WikiText joined by an empty line, tokenized once, cut into
               windows of 2,048 tokens; the last, short window is dropped. (Frantar et al. 2210.17323)
    wikitext   as lm-eval's task of that name: each page alone, its tokens predicted once in windows as long as the
               model takes, the first behind a BOS (else EOS) token; perplexity by words of the page as it came.

A source of text is `pydoc` (the prose of the Python version in use), a UTF-8 file, a folder of them, a file of rows
(.jsonl, .parquet, .csv, .arrow), or `hub:NAME[:CONFIG[:SPLIT]]`, a dataset of the Hugging Face hub. Rows are read as
training reads them (data/rows.py). Of conversations, and of prompts with completions, the answers alone are scored,
each conversation in a window of its own; by the protocol `windows` alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from llmqat.data.config import HUB_PREFIX, PYDOC
from llmqat.data.documents import encoded
from llmqat.data.hub import open_rows, row_pieces, texts_of
from llmqat.data.packing import rows_alone
from llmqat.data.pydoc import pydoc_text
from llmqat.data.rows import RowReader
from llmqat.data.text import is_rows, nearest, read_text, read_texts, text_config
from llmqat.evaluate.perplexity import TokenWindows, windows_from_rows, windows_from_text
from llmqat.metrics import IGNORED_LABEL

UNLIMITED = 10**9
"""Tokenizers that know no limit name one above this."""
LONGEST = 2048
"""Tokens in a window of the protocol `wikitext` where neither model nor tokenizer says how long it may be."""


@dataclass(frozen=True)
class Protocol:
    """What a protocol scores where nothing else is said."""

    text: str
    window: int | None  # tokens; None: as long as the model takes
    max_windows: int | None  # None: all of the text


PROTOCOLS = {
    "windows": Protocol(PYDOC, 512, 40),
    "wikitext2": Protocol(f"{HUB_PREFIX}Salesforce/wikitext:wikitext-2-raw-v1:test", 2048, None),
    "wikitext": Protocol(f"{HUB_PREFIX}EleutherAI/wikitext_document_level:wikitext-2-raw-v1:test", None, None),
}


def text_windows(
    protocol: str,
    source: str,
    tokenizer: Any,
    *,
    window: int | None,
    stride: int | None = None,
    max_windows: int | None = None,
    model_length: int | None = None,
) -> TokenWindows:
    """Returns the windows of the text at `source` by `protocol`.

    Args:
        protocol: a name in `PROTOCOLS`.
        source: as this file's first lines say.
        tokenizer: a transformers tokenizer.
        window: tokens in a window; None where the protocol allows it: as long as the model takes.
        stride: tokens from one window to the next; only of the protocol `windows`.
        max_windows: windows kept, from the start; None keeps all.
        model_length: tokens that the model takes at most, where it says.

    Raises:
        FileNotFoundError: the text is not there.
        ValueError: it is unreadable or too short, or the settings do not go with the protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r} is unknown; choose one of {', '.join(PROTOCOLS)}")
    if stride is not None and protocol != "windows":
        raise ValueError(f"stride={stride} is not part of the protocol {protocol!r}; leave it out, or use 'windows'")
    if protocol == "windows" and _is_dataset(source):
        rows, reader = _opened(source)
        if reader.labelled:
            return answer_windows(rows, reader, tokenizer, window, stride, max_windows, source)
    if protocol == "wikitext":
        own = tokenizer.model_max_length if tokenizer.model_max_length < UNLIMITED else LONGEST
        return rolling_windows(read_pages(source), tokenizer, window or model_length or own, max_windows, source)
    if window is None:
        raise ValueError(f"the protocol {protocol!r} needs a window; leave it out for its own, or give tokens")
    if protocol == "wikitext2":
        return gptq_windows("\n\n".join(read_rows(source)), tokenizer, window, max_windows, source)
    text = "\n\n".join(row for row in read_documents(source) if row.strip())
    return windows_from_text(text, tokenizer, window, stride, max_windows, source)


# Texts


def read_documents(source: str) -> list[str]:
    """Returns the texts at `source`: one a file, or one a row of a dataset.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, it is not clear which column holds the text, or it holds conversations.
    """
    if source == PYDOC:
        return [pydoc_text()]
    return texts_of(*_opened(source)) if _is_dataset(source) else read_texts(Path(source))


def read_rows(source: str) -> list[str]:
    """Returns the rows of `source`; those of a text file are its lines as in the hub's WikiText, blank ones empty.

    Raises:
        FileNotFoundError: there is no such text.
        ValueError: it cannot be read.
    """
    if source == PYDOC or _is_dataset(source) or Path(source).is_dir():
        return read_documents(source)
    if not Path(source).is_file():
        raise FileNotFoundError(
            f"no text at {source}{nearest(Path(source))}; give a text file, or one of rows, or "
            f"{HUB_PREFIX}NAME:CONFIG:SPLIT"
        )
    return [line if line.strip() else "" for line in read_text(Path(source)).splitlines(keepends=True)]


_TITLE = re.compile(r"^ ?= (?!=)(?!.*= = *$).* = *$", re.MULTILINE)
"""A line that is a page's title in WikiText, and not that of a section."""


def read_pages(source: str) -> list[tuple[str, str]]:
    """Returns pages as (as it came, as it is read): a dataset's rows, or a text file cut before each title of WikiText.

    Pages are read detokenized, whatever they look like, as lm-eval does: text that is detokenized already changes a
    little by it. The words that perplexity is counted by are those that came.

    Raises:
        FileNotFoundError: there is no such text.
        ValueError: it cannot be read, or is empty.
    """
    pages = read_documents(source)
    if not _is_dataset(source) and Path(source).is_file():
        (text,) = pages
        cuts = [match.start() for match in _TITLE.finditer(text)]
        bounds = [0, *(cut for cut in cuts if text[:cut].strip()), len(text)]
        pages = [text[start:end] for start, end in pairwise(bounds)]
    pages = [page for page in pages if page.strip()]
    if not pages:
        raise ValueError(f"{source} is empty; evaluation needs a text")
    return [(page, detokenized(page)) for page in pages]


def _is_dataset(source: str) -> bool:
    return source.startswith(HUB_PREFIX) or is_rows(Path(source))


def _opened(source: str) -> tuple[Any, RowReader]:
    """Returns the rows of a dataset, the split `test` of one on the hub, and how they are read."""
    return open_rows(text_config(source, hub_split="test"))


_DETOKENIZE: tuple[tuple[str, str], ...] = (
    (r"s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    (r" @-@ ", "-"),
    (r" @,@ ", ","),
    (r" @\.@ ", "."),
    (r" : ", ": "),
    (r" ; ", "; "),
    (r" \. ", ". "),
    (r" ! ", "! "),
    (r" \? ", "? "),
    (r" , ", ", "),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)
"""Replacements, in order: what lm-eval's task does to a page, so that figures agree."""


def detokenized(page: str) -> str:
    """Returns a page of tokenized WikiText as running text.

    Source: lm-eval, task `wikitext` (after Megatron-LM).
    """
    for pattern, replacement in _DETOKENIZE:
        page = re.sub(pattern, replacement, page)
    return page


# Windows


def answer_windows(
    rows: Any,
    reader: RowReader,
    tokenizer: Any,
    window: int | None,
    stride: int | None,
    max_windows: int | None,
    source: str,
) -> TokenWindows:
    """Returns conversations, or prompts with completions, as windows of their own, of which the answers are scored.

    A conversation that is longer than a window has several, in which each answer's token is scored once.

    Args:
        rows: of a dataset.
        reader: says what they are.
        tokenizer: renders conversations by its chat template.
        window: most tokens in a window.
        stride: must be None.
        max_windows: conversations are taken until they have as many tokens as so many whole windows; None: all.
        source: for messages and the table.

    Raises:
        ValueError: a row cannot be read or rendered, none has an answer, or the settings do not go with conversations.
    """
    if window is None:
        raise ValueError("the protocol 'windows' needs a window; leave it out for its own, or give tokens")
    if stride is not None:
        raise ValueError(f"stride={stride}: {source} holds conversations, whose windows do not overlap; leave it out")
    found = rows_alone(
        encoded(row_pieces(rows, reader), tokenizer), window, None if max_windows is None else max_windows * window
    )
    if not len(found):
        raise ValueError(f"{source}: no token is an answer's; is there an answer in the data?")
    return windows_from_rows(found, source)


def gptq_windows(text: str, tokenizer: Any, window: int, max_windows: int | None, source: str) -> TokenWindows:
    """Returns `text`, tokenized in one piece as the tokenizer does by itself, in windows without overlap.

    Raises:
        ValueError: the text is shorter than a window.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    count = len(ids) // window
    if count == 0:
        raise ValueError(
            f"{source} has {len(ids)} tokens, fewer than one window of {window}; give a longer text or a shorter window"
        )
    blocks = ids[: count * window].view(count, window)[:max_windows]
    return TokenWindows(blocks, blocks, window, _sha256(text), source)


def rolling_windows(
    pages: Sequence[tuple[str, str]], tokenizer: Any, window: int, max_windows: int | None, source: str
) -> TokenWindows:
    """Returns pages in windows in which each of their tokens is predicted once, the first behind a BOS or EOS token.

    A page's last window is as long as the others, its first tokens only read. Windows come longest first.

    Args:
        pages: (as it came, as it is read).
        tokenizer: a transformers tokenizer.
        window: tokens that are read in a forward.
        max_windows: windows kept, from the first page on; whole pages only, so that words can be counted.
        source: for messages and the table.

    Raises:
        ValueError: the window is too short, or max_windows keeps no page.
    """
    if window < 2:
        raise ValueError(f"window={window} leaves nothing to predict from; choose at least 2")
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows: list[tuple[int, list[int], int]] = []  # page, tokens, how many of the last are scored
    words = 0
    for number, (raw, text) in enumerate(pages):
        own = [(number, *cut) for cut in _rolling(tokenizer.encode(text, verbose=False), prefix, window)]
        if max_windows is not None and len(rows) + len(own) > max_windows:
            break
        rows += own
        words += len(re.split(r"\s+", raw))
    if not rows:
        raise ValueError(f"max_windows={max_windows} keeps no page of {source} whole; give more, or leave it out")
    rows.sort(key=lambda row: -len(row[1]))
    ids = torch.full((len(rows), len(rows[0][1])), prefix)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for index, (_, tokens, scored) in enumerate(rows):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        labels[index, len(tokens) - scored : len(tokens)] = ids[index, len(tokens) - scored : len(tokens)]
    return TokenWindows(
        ids=ids,
        labels=labels,
        stride=window,
        sha256=_sha256("\n\n".join(raw for raw, _ in pages)),
        source=source,
        lengths=torch.tensor([len(tokens) for _, tokens, _ in rows]),
        units=torch.tensor([page for page, _, _ in rows]),
        words=words,
    )


def _rolling(tokens: list[int], prefix: int, window: int) -> list[tuple[list[int], int]]:
    """Returns windows of at most `window` + 1 tokens, and how many of the last of each are scored."""
    cuts = []
    for start in range(0, len(tokens), window):
        end = min(start + window, len(tokens))
        read = [prefix, *tokens[:end]] if start == 0 else tokens[max(end - window - 1, 0) : end]
        cuts.append((read, end - start))
    return cuts


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

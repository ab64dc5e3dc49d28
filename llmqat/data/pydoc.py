"""The language reference that every Python installation carries: English prose without a download.

`pydoc_data.topics` holds about 450 kB that `help()` shows. It differs between Python versions, so figures on it are
comparable only under the same hash, which is recorded. Markup is stripped lightly: underlines of headings, quotation
marks around code words, emphasis stars, words cut at line ends; paragraphs become lines; code stays as it is.
"""

from __future__ import annotations

import platform
import re

from llmqat.data.config import DataConfig
from llmqat.data.documents import DocumentSource
from llmqat.data.text import sha256_of_texts, source_of_texts

_UNDERLINE = re.compile(r"\s*([*=~^-])\1{2,}\s*")


def open_source(config: DataConfig) -> DocumentSource:
    """Returns the Python manual's prose, as one document."""
    return source_of_texts(f"pydoc_data.topics of Python {platform.python_version()}", [pydoc_text()])


def pydoc_text() -> str:
    """Returns the prose of `pydoc_data.topics`, topics in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(strip_markup(topics[name]) for name in sorted(topics)) + "\n"


def text_sha256() -> str:
    """Returns the hash of `pydoc_text()`, by which figures on it are comparable."""
    return sha256_of_texts([pydoc_text()])


def strip_markup(topic: str) -> str:
    """Returns a topic's text with one line a paragraph, and without underlines, code quotes and emphasis."""
    kept = [paragraph for paragraph in map(_strip_paragraph, re.split(r"\n\s*\n", topic)) if paragraph]
    return "\n".join(kept)


def _strip_paragraph(paragraph: str) -> str:
    lines = [line for line in paragraph.split("\n") if line.strip() and not _UNDERLINE.fullmatch(line)]
    if not lines or _is_code(lines):
        return "\n".join(lines)
    joined = re.sub(r"(?<=[a-z])- (?=[a-z])", "-", " ".join(" ".join(lines).split()))
    joined = re.sub(r'"([^"\s][^"]*)"', r"\1", joined)
    return re.sub(r"(?<![\w*])\*{1,2}(\w[^*]*?)\*{1,2}(?![\w*])", r"\1", joined)


def _is_code(lines: list[str]) -> bool:
    """Whether a paragraph is code or grammar: a rule, an interpreter's session, or lines of several indents."""
    indents = {len(line) - len(line.lstrip()) for line in lines}
    first = lines[0].lstrip()
    listed = re.match(r"([*+-]|\d+\.) ", first) is not None
    return "::=" in "".join(lines) or first.startswith(">>>") or (len(indents) > 1 and not listed)

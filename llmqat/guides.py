"""The guides: Markdown pages that travel in the package, are read in the repository, and printed by `llmqat help`.

A guide is a file of llmqat/help, and its topic is the file's name without the ending. Links between guides and into the
repository are relative there; `for_terminal` turns them into what a reader of a terminal can use.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

TOPICS = (
    *("quickstart", "install", "choose", "finetune", "data", "calibrate", "train", "memory", "distributed"),
    *("deploy", "evaluate", "extend", "troubleshooting", "glossary", "commands", "recipe-keys", "python-api"),
)
"""In the order of a list of them."""
REPOSITORY = "https://github.com/llmqat/llmqat/blob/main"
"""Where the files are that the package does not have."""
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_GUIDE = re.compile(r"([a-z-]+)\.md(?:#[\w-]*)?")


def guides() -> dict[str, Path]:
    """Returns topic -> file, in the order of `TOPICS`."""
    folder = Path(__file__).resolve().parent / "help"
    return {topic: folder / f"{topic}.md" for topic in TOPICS}


def find_guide(topic: str) -> Path:
    """Returns the file of a topic, whatever its letters' case.

    Raises:
        ValueError: there is no such guide; the nearest one is named, and all that there are.
    """
    found = guides()
    name = topic.lower().replace("_", "-").removesuffix(".md")
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no guide {topic!r}; {guess}choose one of {', '.join(found)}")
    return found[name]


def for_terminal(text: str) -> str:
    """Returns a guide whose links say the command or the address that they lead to."""

    def said(link: re.Match[str]) -> str:
        words, target = link[1], link[2]
        if guide := _GUIDE.fullmatch(target):
            return f"{words} (`llmqat help {guide[1]}`)"
        if target.startswith("#"):
            return words
        if target.startswith("../../"):
            target = f"{REPOSITORY}/{target.removeprefix('../../')}"
        return f"{words} ({target})"

    return _LINK.sub(said, text)

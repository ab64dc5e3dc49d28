"""The command line: words, help and exit codes. What the commands do is done by the rooms they call.

Heavy imports (torch, transformers) happen inside the commands, so that `llmqat --help` answers at once.

Exit codes are listed in application.py (`EXIT_CODES`), and at the end of `llmqat --help`.

application.py  what all commands share: exit codes, paths, --log
options.py      options that several commands have        show.py      what several commands show
train.py        train, cache-teacher, synthesize          plan.py      plan
quantize.py     quantize, sensitivity                     judge.py     eval, compare
audit.py        audit                                     export.py    export, push
chat.py         chat                                      recipes.py   recipes
schema.py       schema                                    status.py    status
guide.py        help
"""

from __future__ import annotations

from llmqat.cli import audit, chat, export, guide, judge, plan, quantize, recipes, schema, status, train
from llmqat.cli.application import app, main

__all__ = [
    "app",
    "audit",
    "chat",
    "export",
    "guide",
    "judge",
    "main",
    "plan",
    "quantize",
    "recipes",
    "schema",
    "status",
    "train",
]  # each registers its commands

"""What is lost where an adapter stands beside the codes of a packed base, instead of being folded into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmqat.data.pydoc import pydoc_text
from llmqat.evaluate.loading import load_to_judge, longest_of
from llmqat.evaluate.perplexity import evaluate, windows_from_text
from llmqat.export.checkpoint import is_packed, load_any
from llmqat.export.peft import check_inside, read_adapter, scaling_of, write_peft

WINDOW = 512
WINDOWS = 4


@dataclass(frozen=True)
class AdapterBeside:
    """An adapter that was written for servers.

    Attributes:
        sizes: bytes by part.
        kl: of base and adapter side by side from the folded model, nats a token, on the Python manual's prose.
        top1: share of tokens with the same most probable successor.
        tokens: how many were scored.
    """

    sizes: dict[str, int]
    kl: float
    top1: float
    tokens: int


def write_beside(adapter: Path, base: Path, out: Path) -> AdapterBeside:
    """Writes `adapter` as a plain peft folder over the packed `base`, and measures what that costs.

    Args:
        adapter: a peft folder that was trained inside quantizers.
        base: a packed checkpoint of the same model, made without the adapter.
        out: must not exist.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: a model or a file is not there.
        ValueError: the base is not packed, or no server could compute the adapter beside it.
    """
    check_inside(adapter)  # says what is wrong with it before the base is loaded
    if not is_packed(base):
        raise ValueError(
            f"--base {base} is no packed checkpoint; make one: llmqat quantize MODEL --method search --out BASE, with "
            "the adapter's scheme"
        )
    model, tokenizer = load_any(base)
    sizes = write_peft(adapter, model, base, out)
    window = min(WINDOW, longest_of(str(base)) or WINDOW)
    windows = windows_from_text(pydoc_text(), tokenizer, window, max_windows=WINDOWS)
    folded = load_to_judge(str(adapter))
    with adapter_beside(model.to(next(folded.parameters()).device), out):
        found = evaluate(model, windows, folded)
    assert found.kl is not None
    assert found.top1 is not None
    return AdapterBeside(sizes, found.kl, found.top1, found.tokens)


@contextmanager
def adapter_beside(model: nn.Module, folder: Path) -> Iterator[None]:
    """Inside, linear layers of `model` also give what the adapter of a plain peft folder adds, as peft computes it."""
    config, factors = read_adapter(folder)

    def hook(down: Tensor, up: Tensor, scaling: float) -> Callable[..., Tensor]:
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            x = inputs[0].to(down.dtype)
            return (output + F.linear(F.linear(x, down), up) * scaling).to(output.dtype)

        return add

    with ExitStack() as stack, torch.no_grad():
        for name, parts in factors.items():
            layer = model.get_submodule(name)
            device = next(iter(layer.buffers())).device
            down, up = (parts[key].to(device).float() for key in "AB")
            stack.callback(layer.register_forward_hook(hook(down, up, scaling_of(config, name))).remove)
        yield

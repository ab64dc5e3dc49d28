"""How often the hot loops wait for a GPU: so often in a turn, and no oftener in a deeper or wider model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from llmqat import QATArguments, QATTrainer, QuantConfig, adopt_adapters, lora_config, prepare
from llmqat.calibrate import BlockwiseStage, GPTQStage, calibrate_activations, collect_moments, open_walk, smooth
from llmqat.calibrate.blocks import Block
from llmqat.calibrate.blockwise import train_block
from llmqat.calibrate.gptq import Clean, gptq_block
from llmqat.calibrate.walk import Walk
from llmqat.data.synthesis import synthesize
from llmqat.data.teacher_cache import CachePlace, cache_teacher
from llmqat.evaluate.perplexity import evaluate, keep_reference, windows_from_blocks
from llmqat.layers import QuantLinear
from llmqat.metrics import Teacher, predictor_of, token_loss
from llmqat.models import uploaded
from llmqat.train import MonitorSettings, QuantizationMonitor
from tests.synchronisation import Waits, between, check_at_most
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.train.test_trainer import Blocks, _arguments

Loop = Callable[[Path, int, int], Waits]
"""(a folder, turns of the loop, layers of the model) -> the waits."""


def prepared(layers: int, scheme: str = "int3", **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = tiny_llama(num_hidden_layers=layers)
    student = copy.deepcopy(teacher)
    prepare(student, QuantConfig.preset(scheme, group_size=32, **options))
    return student, teacher


class Batches(Blocks):
    """Blocks with something beside their ids."""

    def __init__(self, **others: Tensor) -> None:
        super().__init__()
        self.others = others

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), **self.others}


def arguments(folder: Path, **changes: Any) -> QATArguments:
    """Returns arguments that move batches as they are moved to CUDA, and log nothing before the end."""
    moved = {"non_blocking": True}
    return _arguments(folder, logging_steps=1000, bf16=False, accelerator_config=moved, **changes)


def trained(
    folder: Path, student: Any, teacher: Any, steps: int, every: int = 0, data: Any = None, **changes: Any
) -> Waits:
    args = arguments(folder, max_steps=steps, **changes)
    trainer = QATTrainer(model=student, teacher=teacher, args=args, train_dataset=data or Blocks())
    if every:
        QuantizationMonitor(MonitorSettings(every=every)).attach(trainer)
    with Waits(student, *([teacher] if isinstance(teacher, PreTrainedModel) else [])) as waits:
        trainer.train()
    return waits


def distillation(folder: Path, turns: int, layers: int) -> Waits:
    return trained(folder, *prepared(layers), turns)


def accumulation(folder: Path, turns: int, layers: int) -> Waits:
    return trained(folder, *prepared(layers), turns, gradient_accumulation_steps=3, per_device_train_batch_size=1)


def quantized_activations(folder: Path, turns: int, layers: int) -> Waits:
    return trained(folder, *prepared(layers, "w4a8"), turns)


def static_activations(folder: Path, turns: int, layers: int) -> Waits:
    student, teacher = prepared(layers, "w4a8", input_activations={"num_bits": 8, "dynamic": False})
    calibrate_activations(student, Blocks().ids)
    return trained(folder, student, teacher, turns)


def from_a_cache(folder: Path, turns: int, layers: int) -> Waits:
    student, teacher = prepared(layers)
    cache = cache_teacher(teacher, tiny_tokenizer(), Blocks().ids, folder / f"cache-{turns}-{layers}", top_k=8)
    return trained(folder, student, cache, turns)


def adapters(folder: Path, turns: int, layers: int) -> Waits:
    student, _ = prepared(layers)
    model = get_peft_model(student, lora_config(student, r=2))  # type: ignore[arg-type]
    adopt_adapters(model)
    return trained(folder, model, None, turns)


def documents_apart(folder: Path, turns: int, layers: int) -> Waits:
    return trained(folder, *prepared(layers), turns, data=Batches(position_ids=torch.arange(32) % 16))


def padded(folder: Path, turns: int, layers: int) -> Waits:
    return trained(folder, *prepared(layers), turns, data=Batches(attention_mask=torch.arange(32).lt(30).long()))


def monitored(folder: Path, turns: int, layers: int) -> Waits:
    return trained(folder, *prepared(layers), turns, every=1)


def evaluated(folder: Path, turns: int, layers: int) -> Waits:
    student, teacher = prepared(layers)
    args = arguments(folder, per_device_eval_batch_size=2)
    trainer = QATTrainer(model=student, teacher=teacher, args=args, eval_dataset=Blocks(2 * turns))
    with Waits(student, teacher) as waits:
        trainer.evaluate()
    return waits


def perplexity(folder: Path, turns: int, layers: int) -> Waits:
    student, teacher = prepared(layers)
    windows = windows_from_blocks(Blocks(2 * turns).ids)
    reference = keep_reference(teacher, windows)
    with Waits(student, reference.predictor.head) as waits:
        evaluate(student, windows, reference, batch_size=2)
    return waits


def reference(folder: Path, turns: int, layers: int) -> Waits:
    _, teacher = prepared(layers)
    with Waits(teacher) as waits:
        keep_reference(teacher, windows_from_blocks(Blocks(2 * turns).ids), batch_size=2)
    return waits


def synthesis(folder: Path, turns: int, layers: int) -> Waits:
    model, _ = prepared(layers)
    with Waits(model) as waits:
        synthesize(model, tiny_tokenizer(), 2 * turns, block_size=turns, batch_size=4, chat_share=0.0)
    return waits


def synthesis_with_cache(folder: Path, turns: int, layers: int) -> Waits:
    _, model = prepared(layers)
    cache = CachePlace(folder / f"written-{turns}-{layers}", 8)
    with Waits(model) as waits:
        synthesize(model, tiny_tokenizer(), 2 * turns, block_size=turns, batch_size=4, cache=cache)
    return waits


def moments(folder: Path, turns: int, layers: int) -> Waits:
    student, _ = prepared(layers)
    with Waits(student) as waits:
        collect_moments(student, Blocks(2 * turns).ids, batch_size=2)
    return waits


def input_ranges(folder: Path, turns: int, layers: int) -> Waits:
    inputs = {"num_bits": 8, "dynamic": False, "observer": "percentile"}
    student, _ = prepared(layers, "w4a8", input_activations=inputs)
    with Waits(student) as waits:
        calibrate_activations(student, Blocks(2 * turns).ids, batch_size=2)
    return waits


def smoothing(folder: Path, turns: int, layers: int) -> Waits:
    model = tiny_llama(num_hidden_layers=layers)
    with Waits(model) as waits:
        smooth(model, Blocks(2 * turns).ids, batch_size=2)
    return waits


def walk_over(model: PreTrainedModel, ids: Tensor) -> tuple[Block, Walk]:
    walk = open_walk(model, ids, 2, dtype=torch.float32)
    return walk.blocks[0], walk


def blockwise(folder: Path, turns: int, layers: int) -> Waits:
    student, _ = prepared(2)
    block, walk = walk_over(student, Blocks().ids)
    stage = BlockwiseStage(iterations=turns, batch_size=2, patience=100)
    block.run_full(walk.full, walk.full)
    with Waits(student) as waits:
        train_block(block, walk.quantized, walk.full, stage, 0)
    return waits


def rounded(blocks: int = 4, columns: int = 64, rounds: int = 2, **options: Any) -> Waits:
    model = tiny_llama(hidden_size=columns)
    prepare(model, QuantConfig.preset("int3", group_size=32))
    originals = {
        name: p.detach().clone() for name, p in model.model.layers[0].named_parameters() if "scale" not in name
    }
    block, walk = walk_over(model, Blocks(blocks).ids)
    stage = GPTQStage(rounds=rounds, **options)
    with Waits(model) as waits:
        gptq_block(block, walk.quantized, stage, clean=Clean(walk.full, originals))
    return waits


def gptq(folder: Path, turns: int, layers: int) -> Waits:
    return rounded(2 * turns)


def gptq_without_memory(folder: Path, turns: int, layers: int) -> Waits:
    return rounded(2 * turns, hidden_memory=0.0)


LOOPS: dict[str, tuple[Loop, int, int]] = {
    "distillation": (distillation, 1, 2),
    "accumulation": (accumulation, 1, 6),
    "quantized activations": (quantized_activations, 1, 2),
    "static activations": (static_activations, 1, 2),
    "from a cache": (from_a_cache, 2, 1),
    "adapters": (adapters, 1, 2),
    "documents apart": (documents_apart, 1, 2),
    "padded": (padded, 1, 4),
    "monitored": (monitored, 3, 2),
    "evaluated": (evaluated, 1, 2),
    "perplexity": (perplexity, 1, 1),
    "reference": (reference, 1, 1),
    "synthesis": (synthesis, 1, 0),
    "synthesis with a cache": (synthesis_with_cache, 1, 0),
    "moments": (moments, 0, 1),
    "input ranges": (input_ranges, 0, 2),
    "smoothing": (smoothing, 0, 1),
    "blockwise": (blockwise, 2, 0),
    "gptq": (gptq, 8, 0),
    "gptq without memory": (gptq_without_memory, 2, 0),
}
"""Name -> the loop; waits of llmqat in a turn; those of transformers, which looks in each forward whether several texts
are packed in a row, or twice what is padded.

What llmqat waits for: in training whether the step is finite, before anything of it is kept; with a cache the ids that
say which block it is; the monitor its figures (once for gradients, once for the rest), in steps that it looks at; an
evaluation how many tokens are scored, and what they score; hidden states that are kept in ordinary memory; a written
token, on which the next depends; in block-wise training the loss, and here the check set. GPTQ keeps the original
inputs of a batch in ordinary memory, six in a block, and its output.
"""
FEW, MANY = 2, 5
LAYERS = 3


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_waits_so_often_and_no_oftener(tmp_path: Path, name: str) -> None:
    loop, own, others = LOOPS[name]
    counts = between(loop(tmp_path, FEW, LAYERS), loop(tmp_path, MANY, LAYERS))
    check_at_most(own + others, MANY - FEW, counts)


@pytest.mark.parametrize("wider", [{}, {"columns": 192}, {"rounds": 6}], ids=str)
def test_gptq_waits_no_oftener_for_more_columns_and_rounds(wider: dict[str, Any]) -> None:
    check_at_most(50, 1, Counter(rounded(**wider).found))


def test_the_loss_of_chunks_waits_for_nothing() -> None:
    model = tiny_llama()
    hidden, predictor = torch.randn(40, 64, requires_grad=True), predictor_of(model)
    weights, labels = torch.full((40,), 0.025), torch.arange(40)
    teacher = Teacher(torch.randn(40, 64), predictor)
    with Waits(model, hidden, weights, labels, teacher.hidden) as waits:
        token_loss(hidden, predictor, weights, teacher, labels, chunk_tokens=8).backward()
    assert not waits.found, str(waits)


def test_a_wait_in_a_layer_breaks_the_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = QuantLinear.forward

    def forward(layer: QuantLinear, x: Tensor) -> Tensor:
        assert x.abs().max().item() < 1e6
        return plain(layer, x)

    monkeypatch.setattr(QuantLinear, "forward", forward)
    counts = between(distillation(tmp_path, 2, 2), distillation(tmp_path, 3, 2))
    with pytest.raises(AssertionError, match=r"17 waits for the device in 1 turns of a loop, 3 allowed(.|\n)*forward"):
        check_at_most(3, 1, counts)


def _assigned(x: Tensor) -> None:
    x[x > 0] = 1.0


ASKED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "condition": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu", torch.float64),
    "to another": lambda x: x.to(torch.zeros(1)),
    "copy": lambda x: torch.zeros(4, 4).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "index": lambda x: x[x > 0],
    "assignment": _assigned,
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x[0].long().abs(), dim=0),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(4)),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "upload": lambda x: torch.zeros(4).to(x.device),
    "index from the host": lambda x: x[torch.tensor([0, 1])],
}
QUIET: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: torch.where(x > 0, x, 0.0).masked_fill(x < 0, 1.0).sum().clamp(min=1),
    "views": lambda x: x[1:, None].mT.flatten(),
    "a factory": lambda x: torch.zeros(4, 4, device=x.device).add_(x).copy_(x),
    "a mask": lambda x: torch.zeros_like(x).masked_scatter_(x > 0, x),
    "the host": lambda x: torch.arange(4)[torch.arange(4) > 1].tolist(),
    "upload": lambda x: x + uploaded(torch.zeros(4), x.device),
    "index on the device": lambda x: x[x.argmax(1)],
}


@pytest.mark.parametrize("name", ASKED)
def test_what_waits_is_seen(name: str) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with Waits(x) as waits:
        ASKED[name](x)
    assert len(waits.found) == 1, str(waits)


@pytest.mark.parametrize("name", QUIET)
def test_what_does_not_wait_is_not(name: str) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with Waits(x) as waits:
        QUIET[name](x)
    assert not waits.found, str(waits)


def test_what_was_downloaded_is_asked_for_nothing() -> None:
    x = torch.randn(4, 4)
    with Waits(x) as waits:
        here = x.cpu()
        assert float(here.sum()) == here.sum().item()
        x.sub_(x)
    assert waits.found == [".cpu() in a test"]
    assert here.abs().sum() > 0

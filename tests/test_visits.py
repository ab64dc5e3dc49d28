"""Blocks that come to a GPU one after the other; a copy on the CPU stands for the one on a GPU."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.calibrate import calibrate, fisher
from llmqat.calibrate.masters import Originals
from llmqat.calibrate.report import report_layers
from llmqat.calibrate.sensitivity import measure_sensitivity
from llmqat.data import writer
from llmqat.evaluate.loading import load_to_judge
from llmqat.kernels import pages
from llmqat.layers import QuantModule, prepare
from llmqat.models import let_blocks_visit, load_model, loading, named_blocks, visited_device, visiting, visits
from llmqat.recipe import load_recipe, run
from llmqat.recipe.quantize import quantize_model
from llmqat.recipe.teacher import cache_teacher_of
from llmqat.train import QATTrainer
from tests.calibrate.test_stages import BLOCKWISE, INT3, stages, state, text
from tests.flows.small import small
from tests.test_plan import RECIPE
from tests.tiny import tiny_architecture, tiny_llama, tiny_tokenizer
from tests.train.test_trainer import Blocks, _arguments

CPU = torch.device("cpu")


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that are on the GPU, each time that something is copied there."""
    alive: dict[int, weakref.ref[Tensor]] = {}
    seen: list[int] = []

    def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
        copy = tensor.clone()
        alive[len(seen)] = weakref.ref(copy)
        seen.append(sum(found.nbytes for one in alive.values() if (found := one()) is not None))
        return copy

    monkeypatch.setattr(visits, "uploaded", uploaded)
    return seen


def nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def saved(folder: Path, model: PreTrainedModel) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe", "gpt2"])
def test_one_block_at_a_time_is_there_and_the_logits_are_the_same(model_type: str, there: list[int]) -> None:
    model, ids = tiny_architecture(model_type), text(2)
    expected, before = model(ids).logits, state(model)
    assert let_blocks_visit(model, CPU)
    assert visited_device(model) == CPU
    assert torch.equal(model(ids).logits, expected)
    assert 0 < max(there) <= max(map(nbytes, named_blocks(model).values()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_a_model_without_blocks_stays_where_it_is() -> None:
    model = nn.Linear(4, 4)
    assert not let_blocks_visit(model, CPU)
    assert visited_device(model) is None
    with visiting(model):
        assert model.weight.device == CPU


class Counting(nn.Module):
    """Changes one buffer in place and puts another one in its place; both come back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.last = x.sum(-1)
        return x * self.weight


@pytest.mark.parametrize("keep", [False, True])
def test_what_changes_there_comes_back_where_that_is_asked_for(keep: bool, there: list[int]) -> None:
    layer = Counting()
    home, weight = layer.weight.data, layer.weight
    with visiting(layer, CPU, keep=keep):
        assert layer.weight.data is not home
        layer.weight.data.fill_(3.0)
        layer(torch.randn(8, 4))
    assert layer.weight is weight
    assert layer.weight.data_ptr() == home.data_ptr()
    assert layer.weight.tolist() == ([3.0] if keep else [1.0]) * 4
    assert (int(layer.calls), layer.last.shape) == (1, (8,))


def test_a_block_leaves_when_its_forward_fails(there: list[int]) -> None:
    model = tiny_llama()
    let_blocks_visit(model, CPU)
    homes = [parameter.data_ptr() for parameter in model.parameters()]
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        model(text(1))
    assert [parameter.data_ptr() for parameter in model.parameters()] == homes


@pytest.mark.parametrize(
    ("model_type", "computed", "in_files"),
    [
        ("llama", torch.bfloat16, True),
        ("llama", torch.float32, True),
        ("llama", torch.float32, False),
        ("gemma2", torch.bfloat16, False),
    ],
)
def test_calibration_gets_the_same_bits(
    model_type: str,
    computed: torch.dtype,
    in_files: bool,
    there: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = saved(tmp_path / "model", tiny_architecture(model_type).to(torch.bfloat16))
    if in_files:
        monkeypatch.setattr(pages, "LEAST_BYTES", 0)
    todo = stages("ranges", "gptq", {**BLOCKWISE, "learning_rate": 1e-4})

    def calibrated(folder: str, visit: bool) -> tuple[PreTrainedModel, list[Any], list[Any]]:
        model, _ = load_model(source, torch.bfloat16)
        assert not visit or let_blocks_visit(model, CPU)
        reports = calibrate(model, INT3, todo, text(), folder=tmp_path / folder, dtype=computed)
        originals = Originals.found(model, tmp_path / folder / "originals.safetensors")
        assert originals is not None
        return model, reports, report_layers(model, originals, text(), computed)

    whole, reports, layers = calibrated("whole", visit=False)
    assert not there
    model, own, own_layers = calibrated("visits", visit=True)
    assert all(torch.equal(tensor, state(whole)[name]) for name, tensor in state(model).items())
    assert [report.kl_after for report in own] == [report.kl_after for report in reports]
    assert own_layers == layers
    pages_held = pages.WeightPages()
    assert not in_files or all(pages_held.hold(m.weight) for m in model.modules() if isinstance(m, QuantModule))
    assert max(there) <= 1.01 * max(map(nbytes, named_blocks(model).values()))
    again, _, _ = calibrated("visits", visit=True)  # from what the first has left
    assert all(torch.equal(tensor, state(whole)[name]) for name, tensor in state(again).items())


@pytest.mark.parametrize("stage", ["rotate", {"stage": "smooth", "blocks": 2}])
def test_weights_are_folded_where_they_lie(stage: Any, there: list[int]) -> None:
    def folded(visit: bool) -> PreTrainedModel:
        model = tiny_llama()
        assert not visit or let_blocks_visit(model, CPU)
        calibrate(model, INT3, stages(stage, "ranges"), text())
        return model

    whole = state(folded(visit=False))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state(folded(visit=True)).items())
    assert there


def test_sensitivities_are_measured_block_by_block(there: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny_llama(), tiny_llama()
    let_blocks_visit(model, CPU)
    weights = state(model)
    assert measure_sensitivity(model, INT3, [3, 4], text()) == measure_sensitivity(other, INT3, [3, 4], text())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state(model)[name]) for name, tensor in weights.items() if "layers" in name)
    assert max(there) <= 1.01 * max(map(nbytes, named_blocks(model).values()))
    visitor, whole = tiny_llama(), tiny_llama()
    let_blocks_visit(visitor, CPU)
    named = ("nvfp4", "fp8")  # whose inputs are quantized where the layer visits
    assert measure_sensitivity(visitor, INT3, named, text()) == measure_sensitivity(whole, INT3, named, text())

    def refuse(*args: Any) -> None:
        raise fisher._CannotRunAloneError("they share a weight")

    monkeypatch.setattr(fisher._Backward, "of", refuse)
    refused = tiny_llama()
    let_blocks_visit(refused, CPU)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not fit .*\(they share a weight\).* CUDA_VIS"):
        measure_sensitivity(refused, INT3, [3, 4], text())


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch, there: list[int]) -> list[int]:
    """An accelerator that holds no model of this file."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(loading, "default_device", lambda: CPU)
    monkeypatch.setattr(loading, "free_bytes", lambda device: 1000)
    return there


def test_a_model_that_does_not_fit_is_quantized_and_judged_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    source, document = saved(tmp_path / "model", tiny_llama().to(torch.bfloat16)), tmp_path / "text.txt"
    document.write_text("The cat sat on the mat, and the dog lay by the door of the old house. " * 40)
    given = {"text": document, "tokens": 96, "block_size": 32, "group_size": 32}
    quantize_model(source, tmp_path / "whole", **given)
    there: list[int] = request.getfixturevalue("small_gpu")
    with caplog.at_level(logging.WARNING, logger="llmqat"):
        quantize_model(source, tmp_path / "visits", **given)
    assert there
    assert "its blocks come there one after the other" in caplog.text
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("visits", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    for folder in (source, str(tmp_path / "visits")):
        judged = load_to_judge(folder)
        hooks = [len(block._forward_hooks) for block in named_blocks(judged).values()]
        assert [len(b._forward_hooks) for b in named_blocks(loading.to_accelerator(judged)).values()] == hooks
        assert visited_device(judged) is not None
        with torch.no_grad():
            here = judged(text(2)).logits
            monkeypatch.setattr(loading, "free_bytes", lambda device: None)
            assert torch.equal(load_to_judge(folder)(text(2)).logits, here)
        monkeypatch.setattr(loading, "free_bytes", lambda device: 1000)


def test_a_model_that_leaves_no_room_to_calibrate_writes_its_text_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_gpu: list[int]
) -> None:
    source = saved(tmp_path / "model", tiny_llama().to(torch.bfloat16))
    size = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    seen: list[bool] = []
    write = writer._write_tapes

    def spy(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
        seen.append(visited_device(model) is not None)
        return write(model, *args, **options)

    monkeypatch.setattr(writer, "_write_tapes", spy)
    given = {"tokens": 96, "block_size": 32, "group_size": 32}
    monkeypatch.setattr(loading, "free_bytes", lambda device: int(size / 0.7))
    quantize_model(source, tmp_path / "visits", **given)
    assert small_gpu
    assert seen
    assert not any(seen)
    monkeypatch.setattr(loading, "free_bytes", lambda device: None)
    quantize_model(source, tmp_path / "whole", **given)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("visits", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_teacher_that_does_not_fit_beside_the_student_visits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def trained(folder: str) -> dict[str, Tensor]:
        model = tiny_llama(seed=1)
        prepare(model, INT3)
        teacher = tiny_llama()
        trainer = QATTrainer(
            model=model, teacher=teacher, args=_arguments(tmp_path / folder, max_steps=2), train_dataset=Blocks()
        )
        assert (visited_device(teacher) is not None) == (folder == "visits")
        trainer.train()
        return state(model)

    expected = trained("whole")
    there: list[int] = request.getfixturevalue("small_gpu")
    found = trained("visits")
    assert there
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_recipe_that_trains_nothing_and_a_teacher_cache_need_a_block_at_a_time(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, document = saved(tmp_path / "model", tiny_llama()), tmp_path / "text.txt"
    document.write_text("The cat sat on the mat, and the dog lay by the door of the old house. " * 40)
    words = ["data={source: text}", f"data.path={document}", "quant={preset: int4, group_size: 32}"]

    def made(folder: Path) -> dict[str, Tensor]:
        recipe = load_recipe(RECIPE, small(Path(source), folder, *words, "train=null"))
        run(recipe)
        cache_teacher_of(recipe, folder / "teacher", top_k=4, batch_size=4)
        cached = next(iter((folder / "teacher").glob("*.safetensors")))
        return load_file(folder / "model" / "model.safetensors") | load_file(cached)

    expected = made(tmp_path / "whole")
    there: list[int] = request.getfixturevalue("small_gpu")
    found = made(tmp_path / "visits")
    assert there
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

"""Bytes of a checkpoint by part, against the files, and decoding that is measured without changing the model."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmqat.evaluate.energy import EnergyMeter
from llmqat.evaluate.speed import decode_speed, disk_usage, measure_costs
from llmqat.export import save
from llmqat.layers import QuantConfig, convert, prepare
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_qwen2, tiny_tokenizer

# A layer of the tiny Llama: q and o 64 x 64, k and v 32 x 64, gate, up and down 128 x 64; there are two.
LINEAR_WEIGHTS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
EMBEDDING = VOCAB_SIZE * 64


@pytest.mark.parametrize(("tied", "embeddings"), [(True, EMBEDDING), (False, 2 * EMBEDDING)])
def test_a_full_precision_folder_by_part(tmp_path: Path, tied: bool, embeddings: int) -> None:
    tiny_llama(tied=tied).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    usage = disk_usage(tmp_path)
    assert usage.linears == 2 * LINEAR_WEIGHTS
    assert usage.embeddings == 2 * embeddings
    assert (usage.scales, usage.other) == (0, 2 * 5 * 64)
    assert usage.bits_per_weight == 16
    assert usage.total == sum(file.stat().st_size for file in tmp_path.iterdir())
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert usage.headers + usage.linears + usage.embeddings + usage.other == weights


@pytest.mark.parametrize(("preset", "group", "bits"), [("int4", 64, 4.25), ("int4", 32, 4.5), ("int8", 64, 8.25)])
def test_a_packed_folder_has_the_bits_it_claims(tmp_path: Path, preset: str, group: int, bits: float) -> None:
    model = tiny_llama()
    audit = prepare(model, QuantConfig.preset(preset, group_size=group))
    report = save(model, tmp_path / "packed", tiny_tokenizer())
    usage = disk_usage(tmp_path / "packed")
    assert usage.linear_weights == LINEAR_WEIGHTS
    assert usage.bits_per_weight == bits == report.bits_per_weight == audit.average_bits
    assert usage.total == report.folder_bytes
    assert usage.headers == report.bytes["headers"]


def test_shards_add_up(tmp_path: Path) -> None:
    model = tiny_qwen2().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    one, many = disk_usage(tmp_path / "one"), disk_usage(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert (one.linears, one.embeddings, one.other) == (many.linears, many.embeddings, many.other)
    assert many.total == sum(file.stat().st_size for file in (tmp_path / "many").iterdir())


def test_a_damaged_or_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        disk_usage(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        disk_usage(tmp_path)


def test_to_dict_is_complete(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    usage = disk_usage(tmp_path)
    parts: dict[str, Any] = usage.to_dict()
    names = ("linears", "scales", "embeddings", "other", "headers", "files")
    assert sum(parts[name] for name in names) == parts["total"]
    assert parts["bits_per_weight"] == 32


@pytest.mark.parametrize("packed", [False, True])
def test_decoding_feeds_each_token_back(packed: bool) -> None:
    model = tiny_llama().train()
    if packed:
        prepare(model, QuantConfig.preset("int4", group_size=32))
        convert(model)
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    speed = decode_speed(model, prompt_tokens=7, new_tokens=3, repeats=2)
    hook.remove()
    assert lengths == [7, 1, 1, 1] * 3
    assert speed.decode_tokens_per_second > 0
    assert speed.prefill_tokens_per_second > 0
    assert (speed.prompt_tokens, speed.new_tokens, speed.repeats) == (7, 3, 2)
    assert model.training


def test_costs_of_loading_and_decoding() -> None:
    model, costs = measure_costs(tiny_llama, batch_size=3)
    assert next(model.parameters()).dtype == torch.float32
    assert costs.batch_size == 3
    figures = costs.to_dict()
    assert all(figures[name] > 0 for name in figures if name not in ("joules_per_token", "peak_bytes"))
    assert costs.peak_bytes is None or costs.peak_bytes >= 0
    _, held = measure_costs(lambda: model, batch_size=1, from_files=False)
    assert held.load_seconds is None
    assert held.peak_bytes is None
    assert held.decode_tokens_per_second > 0


def test_several_sequences_are_counted_together() -> None:
    speed = decode_speed(tiny_llama(), prompt_tokens=8, new_tokens=4, repeats=1, batch_size=5)
    assert speed.batch_size == 5
    assert speed.first_token_seconds == pytest.approx(8 * 5 / speed.prefill_tokens_per_second)


def test_joules_of_all_packages_through_a_wrap(tmp_path: Path) -> None:
    def package(name: str, energy: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")
        return folder / "energy_uj"

    first, second = package("intel-rapl:0", 9_000_000), package("intel-rapl:1", 1_000_000)
    package("intel-rapl:0:0", 5_000_000)  # a part of package 0, which is not counted twice
    meter = EnergyMeter.of(torch.device("cpu"), tmp_path)
    assert meter.joules() == 0
    first.write_text("2000000")  # wrapped around: 3 J
    second.write_text("1500000")
    assert meter.joules() == pytest.approx(3.5)
    assert EnergyMeter.of(torch.device("cpu"), tmp_path / "absent").joules() is None


def test_the_board_is_the_one_that_torch_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda board: {"GPU-second": 5000}[board],
    )
    monkeypatch.setitem(sys.modules, "pynvml", boards)
    monkeypatch.setattr("llmqat.evaluate.energy.missing", lambda _: None)
    monkeypatch.setattr("llmqat.evaluate.energy.require", lambda *_: boards)
    visible = {torch.device("cuda", 0): SimpleNamespace(uuid="second")}  # CUDA_VISIBLE_DEVICES=1
    monkeypatch.setattr(torch.cuda, "get_device_properties", visible.get)
    assert EnergyMeter.of(torch.device("cuda", 0)).joules() == 5


def test_decoding_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="new_tokens=0 measures nothing"):
        decode_speed(tiny_llama(), new_tokens=0)

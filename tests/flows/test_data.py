"""What a recipe promises about its text: splits, honesty, documents apart, an order that depends on the seed alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainingArguments

from llmqat.calibrate import BlockwiseStage, GPTQStage, RangesStage, calibrate, open_walk
from llmqat.data import DataConfig, blocks, load_blocks, load_splits
from llmqat.data.origin import has_changed, origin_of
from llmqat.layers import QuantConfig, prepare
from llmqat.models import keeps_documents_apart, load_model
from llmqat.recipe import EvaluationSettings, compare_models, load_recipe, quantize_model, run
from llmqat.recipe.folder import kept_text
from tests.conftest import REAL_MODEL
from tests.flows.small import small
from tests.tiny import tiny_architecture, tiny_llama, tiny_tokenizer

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "smollm2-135m-int4.yaml"
APART = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "mixtral")
NOT_APART = ("opt", "falcon", "bloom")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(24):
        (folder / f"{i:02}.txt").write_text(f"file {i} says: " + f"{i * i} and {i + 7} " * 12)
    return folder


@pytest.mark.parametrize("name", [*APART, *NOT_APART])
def test_models_that_keep_documents_apart_are_told(name: str):
    assert keeps_documents_apart(tiny_architecture(name)) == (name in APART)


@pytest.mark.parametrize("name", APART)
def test_a_packed_document_gives_what_it_gives_alone(name: str, tmp_path: Path):
    rows = [{"text": "first words"}, {"text": "second, longer document"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(source="dataset", path=path, block_size=36, packing="documents")
    sample = load_blocks(config, tiny_tokenizer()).dataset()[0]
    model = tiny_architecture(name)
    with torch.no_grad():
        packed = model(input_ids=sample["input_ids"][None], position_ids=sample["position_ids"][None], use_cache=False)
        alone = model(input_ids=sample["input_ids"][None, 12:], use_cache=False)
    torch.testing.assert_close(packed.logits[:, 12:], alone.logits, atol=1e-4, rtol=1e-4)


def test_the_quantized_kv_cache_keeps_documents_apart_too():
    model = tiny_llama()
    prepare(model, QuantConfig.preset("w4a8kv8", group_size=32))
    assert keeps_documents_apart(model)


@pytest.mark.real
@pytest.mark.parametrize("preset", ["w8a8", "fp8", "w4a8kv8"])
def test_inputs_of_few_bits_do_not_make_a_model_one_that_mixes_documents(preset: str):
    model, _ = load_model(REAL_MODEL, torch.float32)
    prepare(model, QuantConfig.preset(preset))
    assert keeps_documents_apart(model)


def test_the_walk_gives_what_the_model_gives_with_documents_apart(texts: Path):
    config = DataConfig(source="text", path=texts, block_size=64, tokens=64 * 5, packing="documents")
    rows = load_blocks(config, tiny_tokenizer()).rows
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    walk = open_walk(model, rows, 2, dtype=torch.float32)
    for block in walk.blocks:
        block.run(walk.quantized, walk.quantized)
    with torch.no_grad():
        expected = model.model.norm(walk.quantized[:])
        found = model.model(**rows.inputs(), use_cache=False).last_hidden_state
        joined = model.model(input_ids=rows.ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(expected, found, atol=1e-4, rtol=1e-4)
    assert float((joined - found).norm() / found.norm()) > 0.05


def test_every_stage_takes_documents_apart(texts: Path):
    config = DataConfig(source="text", path=texts, block_size=32, tokens=32 * 4, packing="documents")
    stages = [RangesStage(blocks=4), GPTQStage(blocks=4), BlockwiseStage(blocks=4, iterations=2, batch_size=2)]
    rows = load_blocks(config, tiny_tokenizer()).rows
    reports = calibrate(tiny_llama(), QuantConfig.preset("int3", group_size=32), stages, rows)
    assert reports[-1].kl_after is not None
    assert reports[0].kl_before is not None
    assert reports[-1].kl_after < reports[0].kl_before


def test_a_recipe_with_splits_trains_on_one_and_names_all(tiny_folder: Path, tmp_path: Path, texts: Path):
    data = f"{{source: text, path: {texts}, block_size: 32, packing: documents, calibration_share: 0.2, "
    data += "validation_share: 0.2}"
    result = run(load_recipe(RECIPE, small(tiny_folder, tmp_path / "run", f"data={data}")))
    assert result is not None
    assert result.training["validation_loss"] > 0
    recorded = json.loads((result.checkpoint / "llmqat.json").read_text())["run"]
    hashes = [
        recorded[name]["document_hashes"]["hashes"].split() for name in ("text", "calibration_text", "validation_text")
    ]
    assert all(hashes)
    assert len(set().union(*hashes)) == sum(map(len, hashes))


def test_evaluating_on_trained_text_is_refused_unless_asked_for(tiny_folder: Path, tmp_path: Path, texts: Path):
    one = texts / "03.txt"
    changes = (f"data={{source: text, path: {texts}, block_size: 32}}", f"evaluate.texts=[{one}]")
    refused = "evaluate.allow_trained_text=false"
    with pytest.raises(ValueError, match=r"03\.txt is text that this recipe calibrates or trains on"):
        run(load_recipe(RECIPE, small(tiny_folder, tmp_path / "a", *changes, refused)))
    result = run(load_recipe(RECIPE, small(tiny_folder, tmp_path / "b", *changes)))
    assert result is not None
    copy = tmp_path / "copy.txt"
    copy.write_text(one.read_text())
    settings = EvaluationSettings(texts=(str(copy),), window=32, max_windows=2, speed=False)
    with pytest.raises(ValueError, match=r"copy\.txt is text that .*model calibrates or trains on.*allow-trained-text"):
        compare_models([str(result.checkpoint)], settings)
    asked = settings.model_copy(update={"allow_trained_text": True})
    assert compare_models([str(result.checkpoint)], asked).rows
    copy.write_text(one.read_text() + "and more")
    assert compare_models([str(result.checkpoint)], settings).rows


def judging(*files: Path) -> EvaluationSettings:
    return EvaluationSettings(texts=tuple(map(str, files)), window=32, max_windows=2, speed=False)


def test_text_that_a_model_was_only_calibrated_on_is_known_too(tiny_folder: Path, tmp_path: Path, texts: Path):
    out = tmp_path / "int4"
    quantize_model(str(tiny_folder), out, group_size=32, method="search", text=texts, tokens=2048, block_size=32)
    with pytest.raises(ValueError, match=r"03\.txt is text that .*int4 calibrates or trains on"):
        compare_models([str(out)], judging(texts / "03.txt"))


def test_a_run_knows_more_documents_than_it_records(
    tiny_folder: Path, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(blocks, "MOST_RECORDED_DOCUMENTS", 0)
    changes = (f"data={{source: text, path: {texts}, block_size: 32}}", "evaluate.allow_trained_text=false")
    changes = (*changes, f"evaluate.texts=[{texts / '03.txt'}]")
    with pytest.raises(ValueError, match=r"03\.txt is text that this recipe calibrates or trains on"):
        run(load_recipe(RECIPE, small(tiny_folder, tmp_path / "run", *changes)))


def test_a_model_that_cannot_keep_documents_apart_is_refused_by_name(tmp_path: Path, texts: Path):
    tiny_architecture("opt").save_pretrained(tmp_path / "opt")
    tiny_tokenizer().save_pretrained(tmp_path / "opt")
    data = f"data={{source: text, path: {texts}, block_size: 32, packing: documents}}"
    with pytest.raises(ValueError, match=r"data\.packing: OPTForCausalLM attends beyond"):
        run(load_recipe(RECIPE, small(tmp_path / "opt", tmp_path / "run", data)))


def trainer_of(folder: Path, texts: Path, seen: list[Any], **arguments: Any) -> Trainer:
    class Recording(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            seen.append(inputs["input_ids"].tolist())
            return super().compute_loss(model, inputs, *args, **options)

    config = DataConfig(source="text", path=texts, block_size=32)
    options = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "save_steps": 3, "seed": 5}
    args = TrainingArguments(**{**options, "per_device_train_batch_size": 4, **arguments})
    return Recording(model=tiny_llama(), args=args, train_dataset=load_blocks(config, tiny_tokenizer()).dataset())


def test_a_resumed_training_sees_the_samples_that_were_left(tmp_path: Path, texts: Path):
    whole: list[Any] = []
    left: list[Any] = []
    trainer_of(tmp_path / "a", texts, whole, max_steps=9).train()
    trainer_of(tmp_path / "a", texts, left, max_steps=9).train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-6"))
    assert left == whole[6:]


def test_the_order_depends_on_the_seed_and_not_on_the_number_of_processes(tmp_path: Path, texts: Path):
    trainer = trainer_of(tmp_path, texts, [], per_device_train_batch_size=4)

    def order(processes: int, batch: int) -> list[int]:
        sampler = trainer.get_train_dataloader().batch_sampler.sampler
        torch.manual_seed(5)  # as Trainer does before the first epoch
        shards = [
            [*BatchSamplerShard(BatchSampler(list(indices), batch, drop_last=True), processes, rank)]
            for indices in [list(sampler)]
            for rank in range(processes)
        ]
        return [index for step in zip(*shards, strict=True) for part in step for index in part]

    one, two = order(1, 4), order(2, 2)
    assert one[: len(two)] == two
    assert one != sorted(one)


def test_a_text_that_has_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    text, run_folder = tmp_path / "text.txt", tmp_path / "run"
    run_folder.mkdir()
    data = DataConfig(source="text", path=text, block_size=32)
    text.write_text("The text of the first start. " * 40)

    def kept() -> str:
        return kept_text(run_folder, data, lambda: load_splits(data, tiny_tokenizer())).train.sha256

    first = kept()
    text.write_text(text.read_text())  # written again, the same
    assert kept() == first
    text.write_text("Quite another text. " * 40)
    with pytest.raises(ValueError, match=r"the text has changed since .*run was begun with it"):
        kept()
    mixed = DataConfig(mix=[{"source": "text", "path": text}, {"source": "text", "path": tmp_path}], block_size=32)
    origin = origin_of(mixed)
    assert not has_changed(mixed, origin)
    (tmp_path / "more.txt").write_text("A file more. ")
    assert has_changed(mixed, origin)


def test_an_interrupted_calibration_begins_anew_with_another_text(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = tmp_path / "text.txt"
    options = {"scheme": "int4", "group_size": 32, "method": "search", "text": text, "tokens": 512, "block_size": 64}

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    text.write_text("The wrong language. " * 60)
    with monkeypatch.context() as patch:
        patch.setattr("llmqat.recipe.quantize.calibrate", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(str(tiny_folder), tmp_path / "out", **options)
    text.write_text("The right text, quite another. " * 60)
    for name in ("out", "fresh"):
        quantize_model(str(tiny_folder), tmp_path / name, **options)
    assert "an unfinished calibration with other settings (text done); it is deleted" in caplog.text
    records = [json.loads((tmp_path / name / "llmqat.json").read_text())["run"]["text"] for name in ("out", "fresh")]
    assert records[0] == records[1]

"""Stages in a row: what may follow what, what is kept, and that an interrupted calibration ends as a whole one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from llmqat import QuantConfig
from llmqat.calibrate import (
    STAGES,
    AnyStage,
    CustomStage,
    GPTQStage,
    Stage,
    StageReport,
    calibrate,
    check_stages,
    needs_text,
)
from llmqat.calibrate import stages as stages_module
from llmqat.calibrate.blocks import Block, find_blocks
from llmqat.calibrate.blockwise import BlockTraining, train_block
from llmqat.calibrate.chains import Chain
from llmqat.calibrate.masters import Originals
from llmqat.data import Rows
from llmqat.kernels import WeightPages, pages
from llmqat.layers import QuantModule, quantizers_off
from llmqat.models import casting, load_model
from llmqat.recipe import Recipe
from tests.graphs import record_on_a_cpu
from tests.tiny import ARCHITECTURES, tiny_architecture, tiny_llama, tiny_tokenizer

INT3 = QuantConfig.preset("int3", group_size=32)
BLOCKWISE = {"stage": "blockwise", "iterations": 8, "blocks": 6, "batch_size": 2, "learning_rate": 1e-3}
ALL = ["rotate", {"stage": "smooth", "blocks": 2}, {"stage": "ranges", "blocks": 4}, "gptq", BLOCKWISE]


def stages(*entries: Any) -> list[Stage]:
    return TypeAdapter(list[AnyStage]).validate_python(list(entries))


def text(blocks: int = 6) -> Tensor:
    return torch.randint(2, 258, (blocks, 16), generator=torch.Generator().manual_seed(0))


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_each_stage_brings_the_model_nearer_to_full_precision_and_says_so() -> None:
    model = tiny_llama()
    reports = calibrate(model, INT3, stages({"stage": "ranges", "blocks": 4}, "gptq", BLOCKWISE), text())
    assert [report.stage for report in reports] == ["ranges", "gptq", "blockwise"]
    divergences = [reports[0].kl_before, *(report.kl_after for report in reports)]
    assert divergences == sorted(divergences, reverse=True)
    assert [report.kl_before for report in reports[1:]] == [report.kl_after for report in reports[:-1]]
    assert all(report.seconds > 0 for report in reports)
    assert list(reports[1].parts) == list(reports[2].parts) == ["model.layers.0", "model.layers.1"]
    assert reports[1].parts["model.layers.0"]["model.layers.0.mlp.up_proj"]["after"] > 0
    assert reports[2].parts["model.layers.1"]["after"] > 0


@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - {"falcon", "bloom"}))
def test_gptq_and_blockwise_take_every_architecture(model_type: str) -> None:
    model = tiny_architecture(model_type)
    gentle = {**BLOCKWISE, "learning_rate": 1e-4}
    reports = calibrate(model, INT3, stages("ranges", "gptq", gentle), text())
    assert reports[2].kl_after < reports[0].kl_after
    assert sum(len(part) - 1 for part in reports[1].parts.values()) > 0


@pytest.mark.parametrize("trains", ["weights", "rounding"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
def test_blockwise_training_by_a_graph_ends_with_the_same_model(
    model_type: str, trains: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = stages("ranges", {"stage": "blockwise", "trains": trains, "iterations": 8, "blocks": 6, "batch_size": 2})
    direct, by_graph = tiny_architecture(model_type), tiny_architecture(model_type)
    calibrate(direct, INT3, todo, text())
    recorded = record_on_a_cpu(monkeypatch)
    calibrate(by_graph, INT3, todo, text())
    assert len(recorded) == 2  # one for each block
    found = state(by_graph)
    assert all(torch.equal(value, found[name]) for name, value in state(direct).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interrupted_in", ["gptq", "blockwise"])
def test_an_interrupted_calibration_goes_on_to_the_very_same_model(
    interrupted_in: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = stages(*(ALL if dtype == torch.float32 else ALL[2:]))
    whole = tiny_llama().to(dtype)
    reports = calibrate(whole, INT3, wanted, text(), folder=tmp_path / "whole")

    kind = next(type(stage) for stage in wanted if stage.stage == interrupted_in)
    done: list[int] = []
    own = stages_module._IN_BLOCK[kind]

    def once(block: Any, *arguments: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(block.index)
        return own(block, *arguments)

    with monkeypatch.context() as patch:
        patch.setitem(stages_module._IN_BLOCK, kind, once)
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny_llama().to(dtype), INT3, wanted, text(), folder=tmp_path / "kept")
    assert done == [0]
    for again in range(2):  # to the end, and once more from what is finished
        model = tiny_llama().to(dtype)
        with monkeypatch.context() as patch:
            done.clear()
            patch.setitem(stages_module._IN_BLOCK, kind, lambda b, *a: (done.append(b.index), own(b, *a))[1])
            found = calibrate(model, INT3, wanted, text(), folder=tmp_path / "kept")
        assert done == ([1] if again == 0 else [])
        expected = state(whole)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state(model).items())
        assert [(r.stage, r.kl_after) for r in found] == [(r.stage, r.kl_after) for r in reports]
        assert all(report.seconds > 0 for report in found)
    assert not list(tmp_path.rglob("*.tmp")) + list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(("changed", "what"), [("model", "model"), ("scheme", "scheme"), ("text", "text")])
def test_a_folder_of_another_calibration_is_refused(changed: str, what: str, tmp_path: Path) -> None:
    calibrate(tiny_llama(), INT3, stages("ranges"), text(), folder=tmp_path)
    model = tiny_llama(seed=5) if changed == "model" else tiny_llama()
    scheme = QuantConfig.preset("int2", group_size=32) if changed == "scheme" else INT3
    other = text().flip(0) if changed == "text" else text()
    with pytest.raises(ValueError, match=f"was begun with another {what}; give the same again"):
        calibrate(model, scheme, stages("ranges"), other, folder=tmp_path)
    calibrate(tiny_llama(), INT3, stages("ranges"), text(), folder=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stages_report_does_not_depend_on_the_rotation_s_dtype(dtype: torch.dtype) -> None:
    """The head that predictions are compared by is the original one, which rotation writes to."""
    quant = QuantConfig.preset("int8")
    reports = calibrate(tiny_llama(tied=False), quant, stages("rotate", "ranges"), text(), dtype=dtype)
    assert all(report.kl_after < 0.01 for report in reports)


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    wanted = stages({"stage": "ranges", "blocks": 4}, {"stage": "gptq", "blocks": 4}, {**BLOCKWISE, "iterations": 2})
    calibrate(tiny_llama(), INT3, wanted, text(), folder=tmp_path)
    file = tmp_path / "02-gptq" / "block-0001.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"block-0001.safetensors is damaged .*; delete it, and give the same command"):
        calibrate(tiny_llama(), INT3, wanted, text(), folder=tmp_path)
    file.unlink()
    calibrate(tiny_llama(), INT3, wanted, text(), folder=tmp_path)


def test_a_bfloat16_model_ends_with_the_codes_of_its_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """No master is kept in float32, and most weights lie off their levels, where adapters can move them."""
    trained: dict[str, torch.Tensor] = {}

    def train(block: Block, *args: Any, **kwargs: Any) -> BlockTraining:
        done = train_block(block, *args, **kwargs)
        trained.update({name: layer.codes() for name, layer in block.quantized().items()})
        return done

    monkeypatch.setattr(stages_module, "train_block", train)
    model = tiny_llama().to(torch.bfloat16)
    calibrate(model, INT3, stages("ranges", "gptq", BLOCKWISE), text())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    assert layers.keys() == trained.keys()
    for name, layer in layers.items():
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.codes(), trained[name])
        assert (layer.weight != layer.quantized_weight(torch.bfloat16)).float().mean() > 0.9


def test_dropout_and_frozen_parameters_are_left_as_they_were() -> None:
    """Calibration computes in evaluation mode, whatever the mode of the model."""
    model = tiny_llama(attention_dropout=0.9).train()
    model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    calibrate(model, INT3, stages("ranges", BLOCKWISE), text())
    assert model.training
    assert not model.model.layers[0].input_layernorm.weight.requires_grad
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    other = tiny_llama()
    calibrate(other, INT3, stages("ranges", BLOCKWISE), text())
    expected = state(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("target", ["clean", "quantized"])
def test_a_block_is_to_give_what_it_gave_in_full_precision_from_either_chain(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    same: list[bool] = []

    def looked(block: Block, inputs: Chain, targets: Chain, *args: Any) -> BlockTraining:
        with torch.no_grad(), block.cast(), quantizers_off(block.module):
            given = [block(inputs, rows) for rows in inputs.batches]  # ranges alone have not moved a weight
        same.append(torch.equal(torch.cat(given), targets[:]))
        return BlockTraining(1.0, 1.0, 0)

    monkeypatch.setattr(stages_module, "train_block", looked)
    calibrate(tiny_llama(), INT3, stages("ranges", {**BLOCKWISE, "target": target}), text())
    assert same == [True, target == "quantized"]


def test_no_stage_is_plain_rounding() -> None:
    model = tiny_llama()
    assert calibrate(model, INT3, [], None) == []
    assert any(isinstance(module, QuantModule) for module in model.modules())


def test_static_inputs_are_set_by_ranges_and_seen_by_what_follows() -> None:
    quant = QuantConfig.preset("w8a8", input_activations={"dynamic": False})
    reports = calibrate(tiny_llama(), quant, stages("ranges", "gptq"), text())
    assert reports[0].kl_before is None  # the model could not run yet
    assert reports[1].kl_before is not None


@pytest.mark.parametrize("preset", ["int2", "ternary"])
def test_few_bits_can_be_reached_by_way_of_more(preset: str, tmp_path: Path) -> None:
    wide = [{"stage": "ranges", "bits": 4, "blocks": 4}, {**BLOCKWISE, "bits": 4, "learning_rate": 1e-4}]
    wanted = stages(*wide, {"stage": "ranges", "blocks": 4}, {**BLOCKWISE, "learning_rate": 1e-4})
    quant = QuantConfig.preset(preset, group_size=32)
    model = tiny_llama()
    reports = calibrate(model, quant, wanted, text(), folder=tmp_path)
    assert reports[1].kl_after < reports[3].kl_after
    assert reports[2].kl_before == reports[1].kl_after  # measured with the scales and bits that were there
    layers = [module for module in model.modules() if isinstance(module, QuantModule)]
    assert all(layer.weights.num_bits == 2 and int(layer.codes().unique().numel()) <= 4 for layer in layers)

    again = tiny_llama()
    assert calibrate(again, quant, wanted, text(), folder=tmp_path) == reports
    assert all(torch.equal(a, b) for a, b in zip(state(again).values(), state(model).values(), strict=True))


@pytest.mark.parametrize(
    ("entries", "quant", "message"),
    [
        (["ranges", "rotate"], INT3, "rotate and smooth change the full-precision model, so they come before"),
        (["smooth", "smooth"], INT3, "once each"),
        ([], {"preset": "w8a8", "input_activations": {"dynamic": False}}, "are set by the stage ranges; add it"),
        (["gptq", "ranges"], {"preset": "w8a8", "input_activations": {"dynamic": False}}, "put the stage ranges"),
        (["gptq"], {"preset": "int4", "scales": "dynamic"}, "scales: dynamic"),
        ([{"stage": "ranges", "bits": 3}], INT3, "no weight of the scheme has fewer than 3 bits"),
        ([{"stage": "ranges", "bits": 4}, "gptq"], INT3, "gptq meets scales of other bits; put the stage ranges, with"),
        (["ranges", {"stage": "blockwise", "bits": 4}], INT3, r"put \{stage: ranges, bits: 4\} before it"),
        ([{"stage": "ranges", "bits": 4}], INT3, "left are of 4 bits; end with ranges without bits"),
    ],
)
def test_stages_that_do_not_go_together_are_refused(entries: list[Any], quant: Any, message: str) -> None:
    config = QuantConfig.preset(quant.pop("preset"), **quant) if isinstance(quant, dict) else quant
    with pytest.raises(ValueError, match=message):
        check_stages(stages(*entries), config)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gtpq", "stage 'gtpq' is unknown; .* rotate, smooth, ranges, gptq, blockwise"),
        ({"iterations": 3}, "an entry without the key 'stage'"),
        ({"stage": "gptq", "iterations": 3}, "iterations"),
        ({"stage": "blockwise", "trains": "all"}, "'weights' or 'rounding'"),
    ],
)
def test_a_stage_that_is_none_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stages(entry)


def test_text_is_asked_for_where_it_is_looked_at() -> None:
    assert not needs_text(stages({"stage": "ranges", "method": "mse"}, "rotate"), INT3)
    for entry in ("ranges", "smooth", "gptq", "blockwise"):
        assert needs_text(stages(entry), INT3)
    assert needs_text([], QuantConfig.preset("w8a8", input_activations={"dynamic": False}))
    with pytest.raises(ValueError, match=r"calibrate=\['gptq'\] looks at text; give token blocks"):
        calibrate(tiny_llama(), INT3, stages("gptq"), None)


@pytest.mark.parametrize("symmetric", [True, False])
def test_small_weights_get_the_codes_of_others(symmetric: bool) -> None:
    """The same model with one layer 2^20 times smaller, and the next larger, has the same codes everywhere."""
    found = []
    for factor in (1.0, 2.0**-20):
        model = tiny_llama()
        attention = model.model.layers[0].self_attn
        with torch.no_grad():
            attention.v_proj.weight.mul_(factor)
            attention.o_proj.weight.div_(factor)
        quant = QuantConfig.preset("int3", group_size=32, symmetric=symmetric)
        calibrate(model, quant, stages({"stage": "ranges", "method": "weighted_mse"}, "gptq"), text())
        found.append({name: layer.codes() for name, layer in model.named_modules() if isinstance(layer, QuantModule)})
    for name, codes in found[0].items():
        assert torch.equal(codes, found[1][name]), name


def test_encoder_decoder_models_are_calibrated_by_their_weights_alone() -> None:
    shape = {"vocab_size": 384, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**shape))
    with pytest.raises(ValueError, match=r"t5 reads pairs of input and output; use stages .*method: mse"):
        calibrate(model, INT3, stages("ranges"), text())
    (report,) = calibrate(model, INT3, stages({"stage": "ranges", "method": "mse"}), text())
    assert report.kl_after is None


def test_a_stage_of_ones_own_runs_among_the_others_by_the_seed_and_again_when_a_calibration_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @STAGES.register("jitter")
    class JitterStage(CustomStage):
        """Moves every weight a little."""

        amount: float = 1e-3
        """Standard deviation of what is added."""

        def apply(self, model: Any, text: Rows) -> dict[str, Any]:
            assert text.ids.shape == (self.blocks, 16)
            layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantModule)}
            with torch.no_grad():
                for layer in layers.values():
                    layer.weight.add_(torch.randn_like(layer.weight), alpha=self.amount)
            return {"layers": len(layers)}

    try:
        found = []
        for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
            model = tiny_llama()
            wanted = stages("ranges", {"stage": "jitter", "blocks": 3}, "gptq")
            reports = calibrate(model, INT3, wanted, text(), folder=folder, seed=1)
            assert [report.stage for report in reports] == ["ranges", "jitter", "gptq"]
            assert reports[1].parts == {"layers": 14}
            found.append(state(model))
        for other in found[1:]:
            assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())
        assert "worse" not in caplog.text
        calibrate(tiny_llama(), INT3, stages("ranges", {"stage": "jitter", "blocks": 3, "amount": 0.5}), text())
        assert "jitter has made the model worse on the first token blocks: KL " in caplog.text
        assert (
            Recipe(model="m", output="o", calibrate=("ranges", wanted[1])).model_dump()["calibrate"][1]["blocks"] == 3
        )
        with pytest.raises(ValueError, match="did you mean 'amount'"):
            stages({"stage": "jitter", "amuont": 1})
        assert JitterStage().stage == "jitter"
        assert "stage ('jitter'): This stage's name. (default 'jitter')" in (JitterStage.__doc__ or "")
        assert JitterStage.model_json_schema()["properties"]["stage"]["const"] == "jitter"
        with pytest.raises(ValueError, match="stage 'jitter' is there already"):
            STAGES.register("jitter", JitterStage)
        with pytest.raises(ValueError, match="stage 'shake': give JitterStage the field `stage: Literal"):
            STAGES.register("shake", JitterStage)
        with pytest.raises(ValueError, match="give a subclass of CustomStage"):
            STAGES.register("gptq2", type("Own", (GPTQStage,), {"__module__": "mine"}))
    finally:
        del STAGES["jitter"]


def watch_casts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns how many numbers are cast at a time; the list grows."""
    found, cast = [0], casting._cast_at_once

    def watched(names: dict[torch.nn.Module, list[str]], dtype: torch.dtype) -> Any:
        those = {module._parameters[name] for module, own in names.items() for name in own}
        found.append(sum(one.numel() for one in those if one is not None))
        return cast(names, dtype)

    monkeypatch.setattr(casting, "_cast_at_once", watched)
    return found


def numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


SPILLED = {"stage": "gptq", "hidden_memory": 1e-9}


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
    ids=["bfloat16", "bfloat16 on a processor without it", "float32"],
)
@pytest.mark.parametrize(
    "entries", [["ranges", "gptq"], ["ranges", SPILLED], ["ranges", "gptq", BLOCKWISE]], ids=["gptq", "spilled", "both"]
)
def test_weights_that_stay_in_their_files_get_the_same_bits(
    entries: list[Any],
    dtype: torch.dtype,
    computed: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that may be larger than memory: weights are read from files, and written to others, block by block."""
    tiny_llama().to(dtype).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def calibrated(folder: str) -> tuple[PreTrainedModel, list[StageReport]]:
        model, _ = load_model(str(tmp_path / "model"), dtype)
        return model, calibrate(model, INT3, stages(*entries), text(), folder=tmp_path / folder, dtype=computed)

    original = state(load_model(str(tmp_path / "model"), dtype)[0])
    whole, expected = calibrated("whole")
    monkeypatch.setattr(pages, "LEAST_BYTES", 0)
    most = watch_casts(monkeypatch)
    for again in range(3):
        if again == 1:  # goes on in the middle
            (tmp_path / "parts" / f"0{len(entries)}-{expected[-1].stage}" / "block-0001.safetensors").unlink()
            (tmp_path / "parts" / f"0{len(entries)}-{expected[-1].stage}" / "report.json").unlink()
        model, reports = calibrated("parts")
        assert all(torch.equal(tensor, state(whole)[name]) for name, tensor in state(model).items())
        assert [report.kl_after for report in reports] == [report.kl_after for report in expected]
        if dtype == torch.bfloat16:
            held = WeightPages()
            assert all(held.hold(layer.weight) for layer in model.modules() if isinstance(layer, QuantModule))
        # Embedding and norms, or a block: never all blocks, which may be larger than memory.
        assert max(most) <= max(model.get_input_embeddings().weight.numel() + 64, numel(model.model.layers[0]))
        originals = Originals.found(model, tmp_path / "parts" / "originals.safetensors")
        assert originals is not None
        for name, module in find_blocks(model).items():
            for leaf, weight in originals.of(Block(0, name, module)).items():
                assert torch.equal(weight, original[f"{name}.{leaf}"])

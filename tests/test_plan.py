"""What a plan says: counts that are those of the model that trains, memory that follows them, devices and ways out."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llmqat.cli import app
from llmqat.data.blocks import token_blocks
from llmqat.data.teacher_cache import TeacherCache
from llmqat.layers import QuantConfig, prepare
from llmqat.recipe import block_probe, devices_of, load_recipe, plan_run, probe
from llmqat.recipe.block_probe import probe_block
from llmqat.recipe.memory import Calibration, Devices, calibration_memory, memory_of, optimizer_bytes, traffic_of
from llmqat.recipe.plan import few_steps
from llmqat.train import LoraSettings, QATArguments, QATTrainer, choose_trained
from tests.flows.small import small
from tests.tiny import tiny_architecture, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "smollm2-135m-int4.yaml"
QUANT = "quant={preset: int4, group_size: 32}"


def planned(model: Path, *more: str, devices: Devices | None = None) -> Any:
    return plan_run(load_recipe(RECIPE, small(model, model / "run", QUANT, *more)), devices)


@pytest.fixture(scope="module", params=["llama", "mixtral", "gpt_oss", "gpt2"])
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_architecture(request.param).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize(
    ("chats", "given", "words"),
    [
        (36, {"num_train_epochs": 3}, "15 steps (3 epochs over 36 conversations) are few to learn answers; give "
                                      "train.num_train_epochs=8"),
        (36, {"num_train_epochs": 8}, None),
        (4, {"num_train_epochs": 8}, "give train.num_train_epochs=30"),
        (36, {"max_steps": 7}, "give train.max_steps=40"),
        (400, {"num_train_epochs": 1}, None),
    ],
)  # fmt: skip
def test_few_steps_are_said(chats: int, given: dict[str, int], words: str | None, tmp_path: Path) -> None:
    arguments = QATArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True, **given)  # type: ignore[arg-type]
    blocks = replace(token_blocks(torch.zeros(chats, 2, dtype=torch.int64), "chats"), documents=torch.arange(chats))
    said = few_steps(arguments, blocks, 1)
    assert said is None if words is None else said is not None and words in said


METHODS = {"all": (), "lora": ("lora={r: 4}",), "scales": ("train.trainable=scales",)}


@pytest.mark.parametrize("trains", METHODS)
def test_it_counts_what_trains(architecture: tuple[str, Path], trains: str) -> None:
    kind, folder = architecture
    model: Any = tiny_architecture(kind)
    weights = sum(parameter.numel() for parameter in model.parameters())
    prepare(model, QuantConfig.preset("int4", group_size=32))
    model = LoraSettings(r=4).attach(model) if trains == "lora" else model
    choose_trained(model, "scales" if trains == "scales" else "all")
    plan = planned(folder, *METHODS[trains])
    assert plan.method.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.size.parameters == weights
    assert plan.method.trains == trains
    assert plan.method.teacher == (0.0 if trains == "lora" else 2.0)
    assert plan.method.head_trains == (trains == "all")
    if trains == "all":  # what it proposes is counted as if it were asked for
        assert plan.trained_by["lora"] == planned(folder, "lora={r: 16}").method.trained
        assert plan.trained_by["scales"] == planned(folder, *METHODS["scales"]).method.trained


@pytest.fixture
def llama(tiny_llama_folder: Path) -> Any:
    return planned(tiny_llama_folder, devices=Devices(1, "ddp", "cuda"))


@pytest.fixture(scope="module")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_architecture("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_sharding_divides_states_and_nothing_else(llama: Any) -> None:
    """The laws of ZeRO (1910.02054, section 5): stage 2 divides gradients and optimizer, stage 3 weights as well."""
    one = memory_of(llama.size, llama.method, Devices(1, "ddp", "cuda"))
    whole, zero2, zero3 = (memory_of(llama.size, llama.method, Devices(8, kind, "cuda")) for kind in
                           ("ddp", "zero2", "fsdp2"))  # fmt: skip
    assert whole.weights == zero2.weights == one.weights
    assert zero2.gradients == zero3.gradients == one.gradients / 8 == whole.gradients / 16
    assert zero2.optimizer == zero3.optimizer == one.optimizer / 8
    assert one.optimizer == 8 * llama.method.trained
    assert one.weights / 8 < zero3.weights
    assert whole.activations == zero3.activations == one.activations
    assert traffic_of(llama.size, llama.method, Devices(1, "ddp")) == 0
    assert traffic_of(llama.size, llama.method, Devices(8, "ddp")) == 2 * 7 / 8 * 4 * llama.method.trained
    accumulated = replace(llama.method, accumulation=4)
    assert traffic_of(llama.size, accumulated, Devices(8, "ddp")) == traffic_of(llama.size, llama.method, Devices(8))
    assert traffic_of(llama.size, accumulated, Devices(8, "fsdp2")) > 3 * traffic_of(
        llama.size, llama.method, Devices(8, "fsdp2")
    )


STAGES = "calibrate=[ranges, {stage: gptq, blocks: 8}]"


def test_blocks_that_come_one_by_one_need_no_other_weights(tiny_llama_folder: Path) -> None:
    plan = planned(tiny_llama_folder, "train=null", STAGES)
    method, found = plan.method, plan.by_block
    assert method.gptq
    assert not method.blockwise
    assert found is not None
    blocks = plan.size.block * plan.size.layers
    assert (
        plan.memory.weights - found.weights
        == plan.memory.peak - found.peak
        == method.weight_bytes * (plan.size.parameters) - 2 * (plan.size.parameters - blocks)
    )
    deeper = calibration_memory(replace(plan.size, parameters=plan.size.parameters + 7 * plan.size.block, layers=9),
                                replace(method, by_block=True), plan.devices)  # fmt: skip
    assert plan.size.layers == 2
    assert deeper == found
    assert planned(tiny_llama_folder, "train=null", "calibrate=[smooth, ranges]").by_block is None
    assert planned(tiny_llama_folder, STAGES).by_block is None


def test_gptq_holds_matrices_of_the_widest_layer(tiny_llama_folder: Path) -> None:
    size, devices = planned(tiny_llama_folder).size, Devices(1, "ddp", "cuda")
    assert size.widest == 128
    wide = replace(size, widest=1 << 16)
    gptq = Calibration(64, 1, 64, 2.0, gptq=True, blockwise=False, hidden_memory=0.0)
    more = calibration_memory(wide, gptq, devices).peak - calibration_memory(size, gptq, devices).peak
    assert more == pytest.approx(4 * 6 * 2.0**32, rel=0.01)
    plain = replace(gptq, gptq=False)
    assert calibration_memory(wide, plain, devices) == calibration_memory(size, plain, devices)


def test_sensitivities_hold_hidden_states_between_all_blocks(tiny_llama_folder: Path) -> None:
    alone = planned(tiny_llama_folder, "train=null", "allocate={target_bits: 3, choices: [2, 4], blocks: 3}")
    assert isinstance(alone.method, Calibration)
    assert alone.method.sensitivity == 3 * 32
    size = replace(alone.size, layers=7)
    peaks = [
        calibration_memory(size, replace(alone.method, sensitivity=tokens, sensitivity_memory=most), alone.devices).peak
        for tokens, most in ((1 << 20, 1e12), (2 << 20, 1e12), (2 << 20, 0.0))
    ]
    assert peaks[1] - peaks[0] == 2 * 8 * size.hidden << 20
    assert peaks[1] - peaks[2] == 2 * 8 * size.hidden << 21


def test_the_largest_batch_is_the_largest_that_fits(llama: Any) -> None:
    available = int(2 * llama.memory.peak)
    batch = llama.fitting_batch(available)
    peaks = [
        memory_of(llama.size, replace(llama.method, batch=size), llama.devices).peak for size in (batch, batch + 1)
    ]
    assert peaks[0] <= 0.9 * available < peaks[1]
    assert llama.fitting_batch(1000) == 0
    ways = llama.cheaper(int(llama.memory.peak))
    assert all(memory.peak <= 0.9 * llama.memory.peak for memory in ways.values())
    assert any("trainable=scales" in name for name in ways)
    spared = next(memory for name, memory in ways.items() if "adamw_bnb_8bit" in name)
    embedding = llama.method.embedding
    assert embedding > 0
    assert spared.optimizer == 2 * (llama.method.trained - embedding) + 8 * embedding
    small = replace(llama, method=replace(llama.method, optimizer=1.0))
    assert not any("adamw_bnb_8bit" in name for name in small.cheaper(int(llama.memory.peak)))
    assert llama.cheaper(1000) == {}


def test_weights_that_are_not_held_through_a_step_are_not_counted(llama: Any) -> None:
    spared, held, told = (
        memory_of(llama.size, replace(llama.method, checkpointing=True, accumulation=4, reuses=reuses), llama.devices)
        for reuses in (False, True, None)
    )
    assert held == told
    assert held.activations - spared.activations == 2 * llama.size.quantized


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distributed_type: MULTI_GPU\nnum_processes: 8", Devices(8, "ddp", "cuda")),
        ("distributed_type: NO\nuse_cpu: true\nnum_processes: 1", Devices(1, "ddp", "cpu")),
        ("distributed_type: FSDP\nnum_processes: 16\nfsdp_config: {fsdp_version: 2}", Devices(16, "fsdp2", "cuda")),
        (
            "distributed_type: DEEPSPEED\nnum_processes: 8\ndeepspeed_config: {zero_stage: 3}",
            Devices(8, "zero3", "cuda"),
        ),
    ],
)
def test_an_accelerate_configuration_is_read(tmp_path: Path, text: str, expected: Devices) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(text)
    assert devices_of(file) == expected


def test_a_configuration_that_is_not_planned_for_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    with pytest.raises(FileNotFoundError, match="no accelerate configuration at"):
        devices_of(file)
    file.write_text("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}")
    with pytest.raises(ValueError, match="fsdp_version=1; scales shard with FSDP2 alone"):
        devices_of(file)
    file.write_text("distributed_type: MEGATRON_LM")
    with pytest.raises(ValueError, match="distributed_type='MEGATRON_LM' is not planned for"):
        devices_of(file)


@pytest.mark.parametrize(
    ("name", "size"), [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("lion_32bit", 4), ("lion_8bit", 1), ("sgd", 0)]
)
def test_state_of_optimizers(name: str, size: float) -> None:
    assert optimizer_bytes(name) == size


@pytest.mark.parametrize("trains", METHODS)
def test_a_probe_trains_and_leaves_nothing(tiny_llama_folder: Path, trains: str) -> None:
    before = sorted(tiny_llama_folder.rglob("*"))
    found = probe(load_recipe(RECIPE, small(tiny_llama_folder, tiny_llama_folder / "run", QUANT, *METHODS[trains])))
    assert found.step_seconds > 0
    assert found.seconds(11) == pytest.approx(found.first_seconds + 10 * found.step_seconds)
    assert sorted(tiny_llama_folder.rglob("*")) == before
    with pytest.raises(ValueError, match="random tokens, which teacher_cache=x knows nothing of"):
        probe(load_recipe(RECIPE, small(tiny_llama_folder, tiny_llama_folder / "run", "teacher_cache=x")))


def test_a_probe_of_text_that_the_model_will_write_has_no_teacher(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    train = QATTrainer.train

    def spy(trainer: QATTrainer, *args: Any) -> Any:
        seen.append((trainer.teacher, trainer.train_dataset[0]["position_ids"]))
        return train(trainer, *args)

    monkeypatch.setattr(QATTrainer, "train", spy)
    words = small(tiny_llama_folder, tiny_llama_folder / "run", QUANT, "data={source: synthetic, block_size: 32}")
    assert probe(load_recipe(RECIPE, words)).step_seconds > 0
    ((teacher, positions),) = seen
    assert isinstance(teacher, TeacherCache)
    assert positions.tolist() == [*range(16), *range(16)]


def test_a_probe_counts_what_was_held_above_what_was_there(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = iter([1_000, 3_000])  # before the model is loaded, and before training
    module = importlib.import_module("llmqat.recipe.probe")  # the package has a function of that name
    monkeypatch.setattr(module, "forget_peak", lambda: next(held))
    monkeypatch.setattr(module, "peak", lambda _: 5_000)
    recipe = load_recipe(RECIPE, small(tiny_llama_folder, tiny_llama_folder / "run", QUANT))
    assert probe(recipe).peak_bytes == 4_000


KINDS = ("llama", "gpt2", "mixtral", "gemma3_text", "phi3", "opt", "falcon", "qwen3_moe")


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_calibrates_one_block_of_a_model_without_weights(kind: str, tmp_path: Path) -> None:
    config = tiny_architecture(kind).config
    config.save_pretrained(tmp_path / "model")
    words = [f"model={tmp_path / 'model'}", f"output={tmp_path / 'run'}", "quant.group_size=16", "train=null"]
    stages = "{stage: ranges, blocks: 8}, {stage: gptq, blocks: 8}"
    if kind == "llama":
        stages = f"rotate, {{stage: smooth, blocks: 2}}, {stages}, {{stage: blockwise, blocks: 8}}"
    found = probe_block(load_recipe(RECIPE, [*words, f"calibrate=[{stages}]", "data.block_size=16"]))
    assert found.blocks == config.num_hidden_layers
    assert found.block_seconds > 0
    assert found.seconds == found.blocks * found.block_seconds + found.other_seconds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_block_that_cannot_be_probed_is_told_and_the_plan_goes_on(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = small(tiny_llama_folder, tiny_llama_folder / "run", "quant.group_size=32")
    kept = ["train=null", "calibrate=[{stage: ranges, blocks: 4}]", "quant.skip_first=1"]
    assert probe_block(load_recipe(RECIPE, [*words, *kept])).blocks == 2  # one of those that are quantized

    def timed(*args: Any) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(block_probe, "_timed", timed)
    with pytest.raises(ValueError, match="cannot be calibrated alone to probe it: list index out of range"):
        probe_block(load_recipe(RECIPE, [*words, *kept]))
    shown = CliRunner().invoke(app, ["plan", str(RECIPE), *words, *kept, "--probe"])
    assert shown.exit_code == 0
    assert "cannot be calibrated alone" in shown.output
    assert "how long is not known here" in shown.output


def test_time_grows_with_the_token_blocks_of_each_stage(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def timed(recipe: Any, count: int, arguments: Any) -> tuple[dict[str, float], float]:
        seen.append(count)
        # The search for scales takes no text: what differs is noise. Block-wise training does so many iterations.
        parts = {"moments": 1.0 * count, "ranges": 5.0 + 0.1 * len(seen), "gptq": 100.0 + 2.0 * count}
        return {**parts, "blockwise": 40.0 + 3.0 * count}, 7.0

    monkeypatch.setattr(block_probe, "_timed", timed)
    words = small(tiny_llama_folder, tiny_llama_folder / "run", "data.tokens=3200")
    stages = "{stage: ranges, blocks: 10}, {stage: gptq, blocks: 64, batch_size: 4}, {stage: blockwise, blocks: 8}"
    found = probe_block(load_recipe(RECIPE, [*words, f"calibrate=[{stages}]"]))
    assert seen == [4, 8]  # what took 100 seconds is not done twice
    assert found.block_seconds == pytest.approx(10 + 5.1 + 100 + 2 * 64 + 40 + 3 * 8)
    assert found.seconds == pytest.approx(2 * found.block_seconds + 7)
    with pytest.raises(ValueError, match=r"calibrate=\['ranges'\] looks at no text, so there is nothing to probe"):
        probe_block(load_recipe(RECIPE, [*words, "train=null", "calibrate=[{stage: ranges, method: mse}]"]))


def test_the_page_on_scaling_is_what_its_script_prints() -> None:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "eval" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    assert (ROOT / "eval" / "scaling.md").read_text() == scaling.page() + "\n"
    assert torch.get_default_device() == torch.device("cpu")

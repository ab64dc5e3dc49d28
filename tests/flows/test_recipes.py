"""The shipped recipes, run for their first steps on a tiny model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmqat
from llmqat.calibrate import rotates
from llmqat.cli import app
from llmqat.evaluate.documents import RunDocument
from llmqat.evaluate.loading import known_of
from llmqat.evaluate.perplexity import evaluate
from llmqat.export.card import own_row
from llmqat.layers import KVQuantizer
from llmqat.recipe import (
    EvaluationSettings,
    Recipe,
    RunResult,
    compare_models,
    load_recipe,
    pipeline,
    plan_run,
    probe,
    quantize_model,
    run,
)
from llmqat.recipe.evaluation import evaluation_windows
from llmqat.train import QATTrainer
from tests.flows.small import SMALL, small
from tests.tiny import tiny_llama, tiny_tokenizer

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
RECIPE = next(path for path in RECIPES if path.stem == "smollm2-135m-int4")
ROLES = ["full precision", "plain rounding", "training-free", "trained"]


def run_small(path: Path, model: Path, output: Path, *more: str, overwrite: bool = False) -> RunResult:
    result = run(load_recipe(path, small(model, output, *more)), overwrite=overwrite)
    assert result is not None
    return result


def test_all_recipes_were_found():
    assert {"lora-int4", "smollm2-135m-int4", "smollm2-135m-w4a8kv8"} <= {path.stem for path in RECIPES}


def check_settings_are_the_originals(checkpoint: Path, original: Path, rotated: bool) -> None:
    """Asserts that a checkpoint's settings differ from the original's in what quantization changes, and nowhere else.

    A rotation unties the output head.
    """
    own, others = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, original))
    changed = {key for key in own.keys() | others.keys() if own.get(key, key) != others.get(key, key)}
    assert changed - {"dtype", "llmqat_kv_cache"} == {
        "quantization_config",
        *(["tie_word_embeddings"] if rotated else []),
    }
    written, given = (json.loads((folder / "generation_config.json").read_text()) for folder in (checkpoint, original))
    assert written == given


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_runs_and_leaves_what_it_promises(path: Path, tiny_folder: Path, tmp_path: Path):
    shipped = load_recipe(path)
    stages = json.dumps([stage.model_dump(mode="json") for stage in shipped.calibrate])
    result = run_small(path, tiny_folder, tmp_path / "run", f"calibrate={stages}")
    assert result.training["steps"] == 2
    assert result.training["tokens"] == 2 * 2 * 32
    assert list(result.seconds) == ["load", "text", "calibrate", "train", "save", "evaluate"]
    assert [row.role for row in result.comparison.rows] == ROLES
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    RunDocument.model_validate(results)
    assert [row["role"] for row in results["comparison"]["rows"]] == ROLES
    recorded = json.loads((result.checkpoint / "llmqat.json").read_text())
    assert recorded["run"]["recipe"]["seed"] == 0
    assert recorded["run"]["results"]["comparison"] == results["comparison"]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "calibration").exists()
    assert [stage["stage"] for stage in results["calibration"]] == [stage.stage for stage in shipped.calibrate]
    assert results["training"]["own_teacher"] == (shipped.lora is not None and len(shipped.calibrate) == 1)
    layers = json.loads((tmp_path / "run" / "layers.json").read_text())
    assert {when: len(reports) for when, reports in layers.items()} == dict.fromkeys(_reported(shipped), 14)
    assert (tmp_path / "run" / "layers.png").is_file()
    check_settings_are_the_originals(result.checkpoint, tiny_folder, rotates(shipped.calibrate))
    ids = torch.arange(2, 26)[None]
    stock = AutoModelForCausalLM.from_pretrained(result.checkpoint, dtype=torch.bfloat16)
    ours = llmqat.load(result.checkpoint, kernel="reference")
    for module in ours.modules():
        if isinstance(module, KVQuantizer):  # which stock transformers does not have
            module.enabled = False
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(
    ("stages", "roles", "name"),
    [
        ("[{stage: ranges, blocks: 2}, {stage: gptq, blocks: 2}]", ROLES[:3], "calibrated"),
        ("[]", ROLES[:2], "plain rounding"),
    ],
)
def test_a_recipe_that_trains_nothing_packs_and_compares_its_calibration(
    stages: str, roles: list[str], name: str, tiny_folder: Path, tmp_path: Path
):
    more = [word for word in small(tiny_folder, tmp_path / "run") if not word.startswith(("train.", "calibrate="))]
    text = "data={source: synthetic, tokens: 256, block_size: 32}"
    alone = load_recipe(RECIPE, [*more, text, f"calibrate={stages}", "train=null"])
    planned = plan_run(alone)
    assert (planned.steps, planned.tokens, planned.disk.checkpoints, planned.disk.teacher) == (0, 0, 0, 0.0)
    result = run(alone)
    assert result is not None
    assert result.training is None
    assert list(result.seconds) == ["load", "text", "calibrate", "save", "evaluate"]
    assert [row.role for row in result.comparison.rows] == roles
    assert result.comparison.rows[-1].name == name
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    RunDocument.model_validate(results)
    assert results["training"] is None
    assert not (tmp_path / "run" / "checkpoints").exists()
    windows = evaluation_windows(alone.evaluate, tiny_tokenizer())["pydoc"]
    own = evaluate(llmqat.load(result.checkpoint), windows)
    assert own.perplexity == pytest.approx(result.comparison.rows[-1].evaluations["pydoc"].perplexity, rel=1e-6)
    again = load_recipe(result.checkpoint, [f"output={tmp_path / 'again'}"])
    assert not again.trains
    assert known_of(str(result.checkpoint)).method == {"calibrated": "ranges, gptq"}.get(name, name)
    row = own_row(json.loads((result.checkpoint / "llmqat.json").read_text())["run"])
    assert row is not None
    assert row["name"] == name


def test_what_only_training_reads_is_refused_where_nothing_is_trained(tiny_folder: Path, tmp_path: Path):
    words = [word for word in small(tiny_folder, tmp_path / "run") if not word.startswith("train.")]
    for given in ("lora={r: 4}", "teacher=original", "teacher_cache=cache", "teacher_bits=8"):
        message = rf"{given.partition('=')[0]} is read by training alone, and train \(null"
        for nothing in ("train=null", "train={num_train_epochs: 0}"):
            with pytest.raises(ValueError, match=message):
                load_recipe(RECIPE, [*words, nothing, given])
    with pytest.raises(ValueError, match=r"teacher_top_k=8: train .* trains nothing"):
        load_recipe(RECIPE, [*words, "train=null", "teacher_top_k=8", "data={source: synthetic}"])
    with pytest.raises(ValueError, match="a probe measures steps of training"):
        probe(load_recipe(RECIPE, [*words, "train=null"]))


@pytest.mark.parametrize(
    ("overrides", "trains"),
    [
        (["train=null"], False),
        (["train=null", "train.bf16=false"], False),
        (["train=null", "train.max_steps=3"], True),
        (["train.max_steps=0"], False),
        (["train={num_train_epochs: 0}"], False),
        (["train={num_train_epochs: 0.5}"], True),
        (["train={}"], True),
    ],
)
def test_when_nothing_is_trained(overrides: list[str], trains: bool, tmp_path: Path):
    assert load_recipe(RECIPE, overrides).trains is trains
    with pytest.raises(ValueError, match=r"'none' is no section; give keys, .* or null to train nothing"):
        load_recipe(RECIPE, ["train=none"])
    file = tmp_path / "recipe.yaml"
    file.write_text("model: M\noutput: run\ntrain:\n")
    assert not load_recipe(file).trains
    assert not load_recipe(file, ["train.use_cpu=true"]).trains


def test_what_is_calibrated_to_be_trained_is_not_packed_as_it_is(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its weights are float32; in bfloat16, as they are held where nothing is trained, some would round otherwise."""
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_train", lambda *args: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run_small(RECIPE, tiny_folder, tmp_path / "run")
    words = [word for word in small(tiny_folder, tmp_path / "run") if not word.startswith("train.")]
    with pytest.raises(FileExistsError, match=r"the calibration \(calibration/: 01-ranges\)"):
        run(load_recipe(RECIPE, [*words, "train=null"]))


def test_perplexity_is_watched_on_the_windows_of_the_table(tiny_folder: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("Other words than those of the manual, again and again. " * 30)
    texts = f"evaluate.texts=[pydoc, {tmp_path / 'text.txt'}]"
    words = ("train.eval_strategy=steps", "train.eval_steps=1", texts)
    result = run_small(RECIPE, tiny_folder, tmp_path / "run", *words)
    history = result.training["history"]
    for name, text in (("pydoc", "pydoc"), ("text", "text.txt")):
        seen = [entry[f"eval_{name}_perplexity"] for entry in history if f"eval_{name}_perplexity" in entry]
        assert len(seen) == 2
        assert seen[-1] == pytest.approx(result.comparison.rows[-1].evaluations[text].perplexity, rel=2e-3)


def test_what_models_write_is_judged_at_the_end_of_a_run(tiny_folder: Path, tmp_path: Path):
    asked = ("evaluate.prompts=instructions", "evaluate.max_prompts=3", "evaluate.max_new_tokens=4")
    run_small(RECIPE, tiny_folder, tmp_path / "run", *asked, "evaluate.speed=false")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    RunDocument.model_validate(results)
    written = [row["generations"] for row in results["comparison"]["rows"]]
    assert len(written) == len(ROLES)
    assert {entry["prompts"]["number"] for entry in written} == {3}
    assert all(len(entry["samples"]["length"]) == 3 for entry in written)
    assert ["from_reference" in entry for entry in written] == [False, True, True, True]


def _reported(recipe: Recipe) -> tuple[str, ...]:
    """When layers are reported on; where only scales trained, codes are what calibration left."""
    return ("calibrated",) if recipe.train.get("trainable") == "scales" else ("calibrated", "trained")


def test_synthetic_text_is_the_default_and_kept(tiny_folder: Path, tmp_path: Path):
    result = run_small(
        RECIPE,
        tiny_folder,
        tmp_path / "run",
        "data={source: synthetic, tokens: 128, block_size: 32}",
        "evaluate.allow_trained_text=false",
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["text"]["source"].startswith("synthesized by")
    assert load_file(tmp_path / "run" / "blocks.safetensors")["ids"].shape == (4, 32)
    assert result.comparison.rows[0].role == "full precision"


SCHEMES = {
    "smoothed w8a8": (
        "quant={preset: w8a8}",
        "calibrate=[{stage: smooth, alpha: 0.5, blocks: 2}, {stage: ranges, blocks: 2}]",
    ),
    "rotated w4a8": (
        "quant={preset: w4a8, group_size: 32, input_activations: {num_bits: 8, symmetric: false}}",
        "calibrate=[rotate, {stage: ranges, method: mse, blocks: 2}]",
        "serve=vllm-cpu",
    ),
    "static inputs": ("quant={preset: w8a8, input_activations: {dynamic: false, observer: mse}}",),
    "static inputs, plain": (
        "quant={preset: w8a8, input_activations: {dynamic: false}}",
        "calibrate.ranges.method=minmax",
    ),
    "ternary with warm-up": (
        "quant={preset: ternary, group_size: 32}",
        "calibrate.0={stage: ranges, method: percentile, percentile: 95}",
        "train.quantization_warmup_steps=1",
    ),
    "kv cache and embedding": ("quant={preset: w4a8kv8, group_size: 32, embeddings: int8}",),
    "asymmetric, by layer": (
        "quant={preset: int3, group_size: 32, symmetric: false, skip_last: 1, "
        "overrides: {'re:.*down_proj': {weights: {num_bits: 8, strategy: channel}, layers: [0]}}}",
    ),
    "gptq, blockwise": ("calibrate=[ranges, gptq, {stage: blockwise, blocks: 4, iterations: 4}]",),
    "dynamic scales": (
        "quant={preset: int4, group_size: 32, scales: dynamic}",
        "train.scale_learning_rate=1e-3",  # the default: the recipe's own would be refused, as no scale trains
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_kind_of_scheme_runs_from_a_recipe(name: str, tiny_folder: Path, tmp_path: Path):
    result = run_small(RECIPE, tiny_folder, tmp_path / "run", *SCHEMES[name])
    roles = [row.role for row in result.comparison.rows]
    assert roles == (ROLES if "plain" not in name else [role for role in ROLES if role != "training-free"])
    # The row comes from disk, so what was trained is what is loaded.
    trained = result.comparison.row("trained")
    assert trained is not None
    windows = next(iter(evaluation_windows(load_recipe(tmp_path / "run").evaluate, tiny_tokenizer()).values()))
    again = evaluate(llmqat.load(result.checkpoint), windows)
    served = load_recipe(tmp_path / "run").serve
    assert all(result.report.served[client].serves for client in served)
    form = json.loads((result.checkpoint / "config.json").read_text())["quantization_config"]["format"]
    assert not served or form == "int-quantized"  # packed, vLLM takes no asymmetric inputs
    assert again.nll == pytest.approx(next(iter(trained.evaluations.values())).nll, rel=1e-6)


def test_rotation_is_counted_where_it_costs(tiny_folder: Path, tmp_path: Path):
    result = run_small(RECIPE, tiny_folder, tmp_path / "run", *SCHEMES["rotated w4a8"])
    sizes = {row.role: row.bytes_on_disk for row in result.comparison.rows}
    vocabulary = 384 * 64 * 2
    assert sizes["full precision"] == sum(2 * p.numel() for p in tiny_llama().parameters())
    assert sizes["trained"] == sizes["training-free"] == sizes["plain rounding"] + vocabulary
    assert any("rotation untied" in note for note in result.report.notes)


def test_a_run_that_would_pack_nothing_is_refused_before_the_text(tiny_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"quant covers no weight .* there is nothing to pack"):
        run_small(RECIPE, tiny_folder, tmp_path / "run", "quant={targets: [], kv_cache: {}}")
    assert not list((tmp_path / "run").glob("blocks*"))


def test_bits_are_chosen_by_layer_and_kept(tiny_folder: Path, tmp_path: Path):
    changes = ("quant={preset: int4, group_size: 32}", "allocate={target_bits: 3.25, blocks: 4}")
    result = run_small(RECIPE, tiny_folder, tmp_path / "run", *changes)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["average_bits"] <= 3.25
    assert result.report.bits_per_weight == pytest.approx(plan["average_bits"] + 0.5)  # a bfloat16 scale for 32 weights
    assert len(set(plan["bits"].values())) > 1
    layers = json.loads((tmp_path / "run" / "layers.json").read_text())["trained"]
    assert {layer["name"]: layer["scheme"] for layer in layers} == {
        name: f"int{bits} g32" for name, bits in plan["bits"].items()
    }


def test_a_run_that_went_on_tells_no_other_its_time(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr("llmqat.recipe.machine._keep", lambda key, measured: told.append(measured.by))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("llmqat.recipe.pipeline._train", fail)  # calibrated, and no step is made yet
        with pytest.raises(Interrupted):
            run_small(RECIPE, tiny_folder, tmp_path / "run")
    result = run_small(RECIPE, tiny_folder, tmp_path / "run")
    assert result.training["resumed_from"] is None
    assert result.goes_on
    assert json.loads((tmp_path / "run" / "results.json").read_text())["goes_on"]
    assert not told
    assert not run_small(RECIPE, tiny_folder, tmp_path / "other").goes_on
    assert told == ["a run"]


def test_adapters_are_folded_and_resumed(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lora = ("lora={r: 4, targets: [q_proj, down_proj]}", "train.max_steps=4", "train.learning_rate=1e-2")
    whole = run_small(RECIPE, tiny_folder, tmp_path / "whole", *lora)
    assert whole.training["own_teacher"]
    assert whole.training["trained_parameters"] < 20_000

    def fail(*args: Any, **kwargs: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("llmqat.recipe.pipeline.save", fail)
        with pytest.raises(Interrupted):
            run_small(RECIPE, tiny_folder, tmp_path / "run", *lora)
    resumed = run_small(RECIPE, tiny_folder, tmp_path / "run", *lora)
    assert resumed.training["resumed_from"] == "checkpoint-4"
    assert (whole.goes_on, resumed.goes_on) == (False, True)
    expected, found = (load_file(result.checkpoint / "model.safetensors") for result in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())

    beside = run_small(RECIPE, tiny_folder, tmp_path / "beside", *lora, "calibrate=[ranges, gptq]")
    assert not beside.training["own_teacher"]
    assert not (tmp_path / "beside" / "adapter").exists()


def test_the_adapter_of_a_run_is_served_beside_a_base(tiny_folder: Path, tmp_path: Path):
    lora = ("lora={r: 4}", "train.max_steps=4", "train.learning_rate=1e-2")
    run_small(RECIPE, tiny_folder, tmp_path / "run", *lora)
    base = tmp_path / "base"
    for words in (
        ["quantize", str(tiny_folder), "--group-size", "32", "--method", "rtn", "--out", str(base)],
        [
            "export",
            str(tmp_path / "run/adapter"),
            "--format",
            "peft",
            "--base",
            str(base),
            "--out",
            str(tmp_path / "a"),
        ],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    assert "from the folded model" in " ".join(done.output.split())
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("bits", [8, 4])
def test_the_teacher_is_held_in_few_bits(bits: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held = {8: bitsandbytes.nn.Linear8bitLt, 4: bitsandbytes.nn.Linear4bit}[bits]
    taught_by: list[int] = []

    class Watched(QATTrainer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            taught_by.append(sum(isinstance(module, held) for module in self.teacher.modules()))

    monkeypatch.setattr("llmqat.recipe.pipeline.QATTrainer", Watched)
    result = run_small(RECIPE, tiny_folder, tmp_path / "run", f"teacher_bits={bits}")
    assert taught_by == [14]  # seven linear layers in each of two blocks
    assert result.training["last_loss"] > 0
    with pytest.raises(ValueError, match="teacher_bits=8: a teacher_cache holds no model"):
        load_recipe(RECIPE, ["teacher_bits=8", "teacher_cache=somewhere"])
    with pytest.raises(ValueError, match="teacher_bits"):
        load_recipe(RECIPE, ["teacher_bits=3"])


def test_a_finished_adapter_is_merged_and_what_rounding_costs_it_is_said(tiny_folder: Path, tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    result = run_small(RECIPE, tmp_path / "adapter", tmp_path / "run")
    roles = [row.role for row in result.comparison.rows]
    assert roles == ["full precision", "without adapter", *ROLES[1:]]
    plain, without = (result.comparison.row(role) for role in ("plain rounding", "without adapter"))
    assert plain is not None
    assert without is not None
    share = plain.evaluations["pydoc"].kl / without.evaluations["pydoc"].kl
    assert any(f"plain rounding {share:.0%}" in finding.text for finding in result.comparison.findings())


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = run_small(RECIPE, tiny_folder, tmp_path / "whole", "train.max_steps=4")
    steps: list[int] = []
    training_step = QATTrainer.training_step

    def counted(trainer: QATTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(trainer.state.global_step)
        if len(steps) == 3:
            raise Interrupted
        return training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(QATTrainer, "training_step", counted)
    with pytest.raises(Interrupted):
        run_small(RECIPE, tiny_folder, tmp_path / "run", "train.max_steps=4")
    assert not (tmp_path / "run" / "results.json").exists()
    with pytest.raises(FileExistsError, match=r"train\.max_steps: 4 -> 5"):
        run_small(RECIPE, tiny_folder, tmp_path / "run", "train.max_steps=5")
    resumed = run_small(RECIPE, tiny_folder, tmp_path / "run", "train.max_steps=4")
    assert resumed.training["resumed_from"] == "checkpoint-2"
    assert steps == [0, 1, 2, 2, 3]
    expected, found = (load_file(result.checkpoint / "model.safetensors") for result in (whole, resumed))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_what_was_calibrated_is_used_by_a_recipe_that_trains_otherwise(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run in the folder, which never trained, ends as if it had been the other recipe's from the start."""
    whole = run_small(RECIPE, tiny_folder, tmp_path / "whole", "train.learning_rate=1e-3")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_train", lambda *args: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run_small(RECIPE, tiny_folder, tmp_path / "run")
    monkeypatch.setattr(pipeline, "text_of", lambda *args: pytest.fail("the text was made again"))
    monkeypatch.setattr("llmqat.calibrate.stages.calibrate_ranges", lambda *args: pytest.fail("calibrated again"))
    result = run_small(RECIPE, tiny_folder, tmp_path / "run", "train.learning_rate=1e-3", "evaluate.speed=false")
    expected, found = (load_file(one.checkpoint / "model.safetensors") for one in (whole, result))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("stage", ["save", "compare"])
@pytest.mark.parametrize(
    ("length", "steps", "tokens"),
    [
        (("train.max_steps=3",), 3, 3 * 2 * 32),  # in the middle of an epoch of 8 blocks, 2 a step
        (("train.max_steps=-1", "train.num_train_epochs=1.5", "data.tokens=224"), 6, (7 + 4) * 32),
    ],
    ids=["steps", "epochs, and a batch that is not full"],
)
def test_interrupted_after_training_only_saves_and_evaluates(
    stage: str,
    length: tuple[str, ...],
    steps: int,
    tokens: int,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    trained: list[dict[str, torch.Tensor]] = []
    original = pipeline.save

    def watched(model: Any, *args: Any, **options: Any) -> Any:
        trained.append({name: value.detach().clone() for name, value in model.named_parameters()})
        if stage == "save" and len(trained) == 1:
            raise Interrupted
        return original(model, *args, **options)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(pipeline, "save", watched)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compare", fail)
        with pytest.raises(Interrupted):
            run_small(RECIPE, tiny_folder, tmp_path / "run", *length)
    monkeypatch.setattr(QATTrainer, "training_step", fail)
    result = run_small(RECIPE, tiny_folder, tmp_path / "run", *length)
    assert result.training["resumed_from"] == f"checkpoint-{steps}"
    assert (result.training["steps"], result.training["kept_step"], result.training["tokens"]) == (steps, steps, tokens)
    assert result.training["tokens_per_second"] is None
    assert len([entry for entry in result.training["history"] if "loss" in entry]) == steps
    assert len(trained) == 2
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    assert [row.role for row in result.comparison.rows] == ROLES


def test_steps_and_tokens_of_a_record_are_what_was_done(tiny_folder: Path, tmp_path: Path):
    cases = {
        ("train.per_device_train_batch_size=64",): (2, 2 * 7 * 32),  # above the data
        ("train.gradient_accumulation_steps=3", "train.max_steps=-1", "train.num_train_epochs=1"): (2, 7 * 32),
        ("train.dataloader_drop_last=true", "train.max_steps=-1", "train.num_train_epochs=2"): (6, 2 * 6 * 32),
    }
    for number, (changes, (steps, tokens)) in enumerate(cases.items()):
        result = run_small(RECIPE, tiny_folder, tmp_path / f"{number}", "data.tokens=224", *changes)
        training = result.training
        assert (training["steps"], training["tokens"]) == (steps, tokens), changes
        assert training["tokens_per_second"] > 0
        assert training["last_loss"] > 0


def test_the_best_step_is_named_where_it_is_kept(tiny_folder: Path, tmp_path: Path):
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "Row {n} of a text, and {n}."}}\n' for n in range(60)))
    changes = (
        f"data={{source: dataset, path: {tmp_path}/text.jsonl, block_size: 32, validation_share: 0.3}}",
        *("train.max_steps=3", "train.eval_strategy=steps", "train.eval_steps=1", "train.load_best_model_at_end=true"),
        *("train.metric_for_best_model=perplexity", "train.kl_weight=0", "train.cross_entropy_weight=1"),
    )
    training = run_small(RECIPE, tiny_folder, tmp_path / "run", *changes).training
    seen = {entry["step"]: entry["eval_perplexity"] for entry in training["history"] if "eval_perplexity" in entry}
    assert training["kept_step"] == min(seen, key=lambda step: seen[step])
    assert training["validation_perplexity"] == pytest.approx(min(seen.values()), rel=1e-3)


def test_a_last_batch_that_drops_all_text_is_refused_before_it_is_calibrated(tiny_folder: Path, tmp_path: Path):
    dropped = ("train.dataloader_drop_last=true", "train.per_device_train_batch_size=64")
    with pytest.raises(ValueError, match="train: dataloader_drop_last=True drops all of the 8 training samples"):
        run_small(RECIPE, tiny_folder, tmp_path / "a", *dropped)
    assert not (tmp_path / "a").exists()
    (tmp_path / "text.txt").write_text("A text whose length nobody knows before it is read. " * 30)
    text = f"data={{source: text, path: {tmp_path}/text.txt, block_size: 32}}"
    with pytest.raises(ValueError, match="dataloader_drop_last=True drops all of the"):
        run_small(RECIPE, tiny_folder, tmp_path / "b", *dropped, text)
    assert not (tmp_path / "b" / "calibration").exists()


def test_a_finished_run_is_refused_and_stays_as_it_was(tiny_folder: Path, tmp_path: Path):
    result = run_small(RECIPE, tiny_folder, tmp_path / "run")
    before = (result.checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a finished run"):
        run_small(RECIPE, tiny_folder, tmp_path / "run")
    assert (result.checkpoint / "model.safetensors").read_bytes() == before
    again = run_small(RECIPE, tiny_folder, tmp_path / "run", overwrite=True)
    assert (again.checkpoint / "model.safetensors").read_bytes() == before  # same recipe, same seed


def test_a_checkpoint_alone_repeats_its_run_bit_for_bit(tiny_folder: Path, tmp_path: Path):
    first = run_small(RECIPE, tiny_folder, tmp_path / "run")
    alone = load_recipe(first.checkpoint, [f"output={tmp_path / 'again'}"])
    assert alone == load_recipe(tmp_path / "run", [f"output={tmp_path / 'again'}"])
    second = run(alone)
    assert second is not None
    weights = [(result.checkpoint / "model.safetensors").read_bytes() for result in (first, second)]
    assert weights[0] == weights[1]
    history = json.loads((second.checkpoint / "llmqat.json").read_text())["run"]["training"]["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    (tmp_path / "llmqat.json").write_text('{"run": {}}')
    with pytest.raises(ValueError, match="holds no recipe"):
        load_recipe(tmp_path / "llmqat.json")


def test_bad_input_costs_no_training(tiny_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"quant\.group_size=96 does not divide in_features=64"):
        run_small(RECIPE, tiny_folder, tmp_path / "a", "quant.group_size=96")
    with pytest.raises(FileNotFoundError, match="no text at"):
        run_small(RECIPE, tiny_folder, tmp_path / "b", "evaluate.texts=[absent.txt]")
    with pytest.raises(FileNotFoundError, match=r"no prompts at absent\.jsonl"):
        run_small(RECIPE, tiny_folder, tmp_path / "b", "evaluate.prompts=absent.jsonl")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="fewer than one window"):
        run_small(RECIPE, tiny_folder, tmp_path / "c", f"evaluate.texts=[{tmp_path}/short.txt]")
    with pytest.raises(ValueError, match=r"block_size=32"):
        run_small(
            RECIPE,
            tiny_folder,
            tmp_path / "d",
            f"data={{source: text, path: {tmp_path}/short.txt, block_size: 32}}",
        )
    assert not list(tmp_path.glob("*/checkpoints"))


def packed_folder(folder: Path, **changes: Any) -> Path:
    model = tiny_llama()
    llmqat.prepare(model, llmqat.QuantConfig.preset("int2", group_size=32, **changes))
    llmqat.save(model, folder, tiny_tokenizer(), run={"text": {"document_hashes": {"hashes": ""}}})
    return folder


def packed_recipe(model: Path, teacher: Path, output: Path, *more: str) -> Recipe:
    values = {"model": str(model), "teacher": str(teacher), "output": str(output)}
    values["train"] = {"trainable": "scales", "scale_learning_rate": 1e-2}  # type: ignore[assignment]
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path, [key for key in SMALL if not key.startswith("calibrate=")] + list(more))


def test_the_scales_of_a_packed_model_are_trained_and_resumed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start = packed_folder(tmp_path / "start", symmetric=False)
    recipe = packed_recipe(start, tiny_folder, tmp_path / "whole", "train.max_steps=4")
    plan = plan_run(recipe)
    whole = run(recipe)
    assert whole is not None
    assert plan.method.trained == whole.training["trained_parameters"]
    assert plan.size.quantized == sum(entry.numel for entry in plan.coverage.quantized)
    assert plan.size.parameters == sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert plan.size.packed_bytes == 0.25
    assert [row.role for row in whole.comparison.rows] == ["full precision", "training-free", "trained"]
    before, after = (load_file(folder / "model.safetensors") for folder in (start, whole.checkpoint))
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert "weight_scale" in moved
    assert moved <= {"weight_scale", "weight"}  # and norms
    divergence = [next(iter(row.evaluations.values())).kl for row in whole.comparison.rows]
    assert divergence[2] < divergence[1]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("llmqat.recipe.pipeline.save", fail)
        with pytest.raises(Interrupted):
            run(packed_recipe(start, tiny_folder, tmp_path / "run", "train.max_steps=4"))
    resumed = run(packed_recipe(start, tiny_folder, tmp_path / "run", "train.max_steps=4"))
    assert resumed is not None
    assert resumed.training["resumed_from"] == "checkpoint-4"
    found = load_file(resumed.checkpoint / "model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in after.items())
    assert load_recipe(resumed.checkpoint).teacher == str(tiny_folder)  # and can be run again
    assert probe(load_recipe(resumed.checkpoint, [f"model={start}", f"output={tmp_path / 'again'}"])).step_seconds > 0


def test_the_text_that_a_packed_start_has_seen_is_remembered(tiny_folder: Path, tmp_path: Path):
    files = [tmp_path / "seen.txt", tmp_path / "new.txt"]
    for file in files:
        file.write_text(f"this is {file.stem} " * 20)
    start, refused = tmp_path / "start", "evaluate.allow_trained_text=false"
    quantize_model(str(tiny_folder), start, group_size=32, method="search", text=files[0], tokens=64, block_size=32)
    with pytest.raises(ValueError, match=r"seen\.txt is text that .*start calibrates or trains on"):
        run(packed_recipe(start, tiny_folder, tmp_path / "a", refused, f"evaluate.texts=[{files[0]}]"))
    result = run(packed_recipe(start, tiny_folder, tmp_path / "b", refused, f"evaluate.texts=[{files[1]}]"))
    assert result is not None
    settings = EvaluationSettings(texts=(str(files[0]),), window=32, max_windows=2, speed=False)
    with pytest.raises(ValueError, match=r"seen\.txt is text that .*b/model calibrates or trains on"):
        compare_models([str(result.checkpoint)], settings)


QUANTIZED = ("quant={preset: int4}", "calibrate=[gptq]")


def test_adapters_of_a_packed_model_are_trained_folded_and_resumed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start = tmp_path / "start"
    quantize_model(str(tiny_folder), start, scheme="int3", group_size=32, method="rtn")

    def recipe(output: str, *more: str) -> Recipe:
        words = [word for word in small(start, tmp_path / output) if not word.startswith("calibrate=")]
        words += [f"teacher={tiny_folder}", "quant=null", "calibrate=null", "train.learning_rate=5e-3"]
        return load_recipe("lora-int4", [*words, "train.max_steps=8", "train.save_steps=4", *more])

    plan, whole = plan_run(recipe("whole")), run(recipe("whole"))
    assert whole is not None
    assert plan.method.packed
    assert plan.method.trained == whole.training["trained_parameters"]
    assert not whole.training["own_teacher"]
    assert [row.role for row in whole.comparison.rows] == ["full precision", "training-free", "trained"]
    divergence = [next(iter(row.evaluations.values())).kl for row in whole.comparison.rows]
    assert divergence[2] < divergence[1]
    before, after = (load_file(folder / "model.safetensors") for folder in (start, whole.checkpoint))
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved == {"weight_packed", "weight_scale"}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("llmqat.recipe.pipeline.save", fail)
        with pytest.raises(Interrupted):
            run(recipe("run"))
    resumed = run(recipe("run"))
    assert resumed is not None
    assert resumed.training["resumed_from"] == "checkpoint-8"
    found = load_file(resumed.checkpoint / "model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in after.items())
    assert probe(load_recipe(resumed.checkpoint, [f"model={start}", f"output={tmp_path / 'again'}"])).step_seconds > 0


def test_what_a_packed_model_cannot_start_is_refused(tiny_folder: Path, tmp_path: Path):
    start = packed_folder(tmp_path / "start")

    def refused(message: str, *more: str, model: Path = start) -> None:
        for start_run in (plan_run, partial(run, overwrite=True)):
            with pytest.raises(ValueError, match=message):
                start_run(packed_recipe(model, tiny_folder, tmp_path / "run", *more))

    refused("quant: model .* is packed already and keeps its scheme", "quant={preset: int4}")
    refused(r"leave out quant, calibrate \(behind a recipe: quant=null calibrate=null\)", *QUANTIZED)
    refused("no weights to train; train its scales with .*, or adapters with lora=", "train.trainable=all")
    refused("'scales' trains no adapter", "lora={r: 4}")
    refused("cannot teach itself; give the full-precision model .* teacher=MODEL", "teacher=null")
    refused("is packed already, and train .* trains nothing, so there is nothing to do", "teacher=null", "train=null")
    refused("is in full precision and is its own teacher; leave teacher out", model=tiny_folder)
    assert not list((tmp_path / "run").glob("blocks*"))

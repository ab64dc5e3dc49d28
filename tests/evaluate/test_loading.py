"""Whatever can be judged: packed, by other tools, GGUF, and adapters of both kinds, equal to what they were."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from llmqat import adopt_adapters, lora_config, save_adapter
from llmqat.evaluate.compare import candidate_from
from llmqat.evaluate.layers import weight_errors
from llmqat.evaluate.loading import _nearest_scheme, known_of, load_to_judge, longest_of
from llmqat.export import CONVERSIONS, save, write_gguf
from llmqat.layers import PackedLinear, QuantConfig, convert, prepare
from llmqat.models import adapter_base, load_model, load_tokenizer, resolve_spec
from llmqat.recipe import EvaluationSettings, compare_models
from llmqat.recipe.evaluation import short_names, text_names
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer, with_ranges

WEIGHTS = (".gguf", ".safetensors")
INT4 = QuantConfig.preset("int4", group_size=32)
IDS = torch.arange(2, 34)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def moved(model: PeftModel) -> PeftModel:
    """Gives the adapters something to say."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_a_plain_adapter_is_folded_into_its_base(base: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(base))
    adapted = moved(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"])))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert adapter_base(str(tmp_path / "adapter")) == str(base)
    judged = load_to_judge(str(tmp_path / "adapter"))
    assert torch.equal(logits(judged), logits(adapted.merge_and_unload()))
    assert not torch.equal(logits(judged), logits(load_to_judge(str(base))))
    assert load_tokenizer(resolve_spec(str(tmp_path / "adapter")), str(tmp_path / "adapter")).eos_token == "</s>"
    assert longest_of(str(tmp_path / "adapter")) == 256


def test_an_adapter_inside_quantizers_is_judged_packed(base: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(base))
    prepare(model, INT4)
    adapted = get_peft_model(model, lora_config(model, r=4))
    adopt_adapters(adapted)
    moved(adapted).peft_config["default"].base_model_name_or_path = str(base)
    save_adapter(adapted, tmp_path / "adapter")
    judged = load_to_judge(str(tmp_path / "adapter"))
    assert sum(isinstance(module, PackedLinear) for module in judged.modules()) == 14
    assert torch.equal(logits(judged), logits(convert(copy.deepcopy(adapted).merge_and_unload())))


def test_an_adapter_is_judged_on_weights_in_the_dtype_it_was_trained_on(tmp_path: Path) -> None:
    original = tiny_llama()  # float32, which bfloat16 rounds
    original.save_pretrained(tmp_path / "base")
    prepare(original, INT4)
    adapted = get_peft_model(original, lora_config(original, r=4))
    adopt_adapters(adapted)
    moved(adapted).peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    save_adapter(adapted, tmp_path / "adapter")
    judged = load_to_judge(str(tmp_path / "adapter"))
    merged = convert(adapted.merge_and_unload())
    codes, expected = (
        {name: module.weight_packed for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        for model in (judged, merged)
    )
    assert all(torch.equal(codes[name], expected[name]) for name in expected)


def test_an_adapter_without_weights_or_base_is_told(tmp_path: Path, base: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no base model"):
        load_to_judge(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{base}"}}')
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        load_to_judge(str(tmp_path / "adapter"))


def test_a_gguf_file_is_sized_as_it_is(tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, INT4)
    convert(model)
    file = tmp_path / "model.gguf"
    write_gguf(model, tiny_tokenizer(), file)
    known = known_of(str(file))
    assert (known.bits_per_weight, known.bytes_on_disk) == (4.5, file.stat().st_size)
    for role in ("full precision", "other"):  # as the reference it is the same file
        candidate = candidate_from(str(file), role)
        assert (candidate.bits_per_weight, candidate.bytes_on_disk) == (4.5, file.stat().st_size)


@pytest.mark.parametrize("format", [name for name in CONVERSIONS if name != "onnx"])
def test_a_checkpoint_has_the_bits_of_its_codes_in_every_format(format: str, tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, INT4)
    convert(model)
    out = tmp_path / ("out.gguf" if format == "gguf" else "out")
    CONVERSIONS[format](model, tiny_tokenizer(), out)
    known = known_of(str(out))
    assert known.bits_per_weight is not None
    assert 4.5 <= known.bits_per_weight <= 5.6  # GPTQ's zero points and order of columns come on top
    assert known.bytes_on_disk == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.suffix in WEIGHTS)


def test_what_the_files_say_of_how_it_was_made(base: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, INT4)
    facts = {"calibrate": [{"stage": "ranges"}, {"stage": "gptq"}], "results": {"old": 1}}
    save(model, tmp_path / "run" / "model", tiny_tokenizer(), run=facts)
    (tmp_path / "run" / "layers.json").write_text('{"quantized": []}')
    known = known_of(str(tmp_path / "run" / "model"))
    assert (known.method, known.bits_per_weight) == ("ranges, gptq", 4.5)
    assert "results" not in known.run
    assert known.layers == {"quantized": []}
    assert known_of(str(base)).method == ""
    for stages, method in ((facts["calibrate"], "ranges, gptq"), ([], "plain rounding")):
        run = {"recipe": {"calibrate": stages}, "training": None}  # of a recipe that trains nothing
        assert dataclasses.replace(known, run=run).method == method
    errors = weight_errors(load_to_judge(str(tmp_path / "run" / "model")), str(base))
    assert len(errors) == 14
    assert all(0 < error < 0.02 for error in errors.values())
    assert set(weight_errors(load_to_judge(str(base)), str(base)).values()) == {0.0}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert weight_errors(load_to_judge(str(base)), str(adapter)) == {}


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["runs/a/model", "runs/b/model", "org/c"]) == ["a", "b", "c"]
    assert short_names(["x/a/model", "y/a/model"]) == ["x/a", "y/a"]
    assert short_names(["package:llm/a.gguf"]) == ["a.gguf"]


def test_texts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    assert text_names(["a.txt", "b/c.txt", "pydoc"]) == {"a.txt": "a.txt", "c.txt": "b/c.txt", "pydoc": "pydoc"}
    assert text_names(["x/a.txt", "y/a.txt"]) == {"x/a.txt": "x/a.txt", "y/a.txt": "y/a.txt"}
    assert list(text_names(["/data/x/a.txt", "/data/y/a.txt", "b.txt"])) == ["x/a.txt", "y/a.txt", "b.txt"]
    assert text_names(["pydoc", "./pydoc"]) == {"pydoc": "pydoc", "./pydoc": "./pydoc"}
    assert list(text_names(["hub:a/b:c:test", "hub:a/b:d:test"])) == ["hub:a/b:c:test", "hub:a/b:d:test"]
    file = tmp_path / "a.txt"
    file.write_text("a")
    (tmp_path / "link.txt").symlink_to(file)
    same = [str(file), str(tmp_path / "." / "a.txt"), str(tmp_path / "link.txt"), str(file)]
    assert text_names(same) == {"a.txt": str(file)}


def test_two_texts_of_one_name_are_both_scored(tiny_folder: Path, tmp_path: Path) -> None:
    texts = [tmp_path / folder / "test.txt" for folder in ("river", "mountain")]
    for text in texts:
        text.parent.mkdir()
        text.write_text(f"A text of a {text.parent.name} that fills some windows. " * 20)
    settings = EvaluationSettings(texts=tuple(map(str, texts)), window=32, max_windows=2, speed=False)
    report = compare_models([str(tiny_folder)], settings).to_dict()
    assert list(report["texts"]) == list(report["rows"][0]["texts"]) == ["river/test.txt", "mountain/test.txt"]
    assert len({text["sha256"] for text in report["texts"].values()}) == 2


def test_one_model_by_two_paths_is_measured_once(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A text that fills some windows. " * 20)
    (tmp_path / "link").symlink_to(tiny_folder)
    settings = EvaluationSettings(texts=(str(tmp_path / "text.txt"),), window=32, max_windows=2, speed=False)
    (row,) = compare_models([str(tmp_path / "link"), f"{tiny_folder}/"], settings, str(tiny_folder)).rows
    assert row.role == "full precision"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            r"other', which gptq has quantized, needs optimum and gptqmodel, which are not installed; "
            r"run `pip install optimum gptqmodel`",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "needs .*gptqmodel"),
        ({"quant_method": "hqq"}, "other', which hqq has quantized, "),
        ({"quant_method": "unheard of"}, "other', which unheard of has quantized, .*Unknown quantization type"),
    ],
)
def test_what_a_quantized_model_needs_is_looked_for_before_anything_is_measured(
    found: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmqat.recipe.evaluation.compare", None)  # calling it would not be a user's mistake
    monkeypatch.setattr("llmqat.extras.importlib.util.find_spec", lambda module: None)
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": found}))
    settings = EvaluationSettings(texts=(str(__file__),), window=16, max_windows=1)
    with pytest.raises((ImportError, ValueError), match=message):
        compare_models([str(tiny_folder), str(other)], settings)


@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4a16", "mxfp4", "fp8", "fp8a16", "int4-fp8kv"])
def test_the_scheme_of_floats_is_known_and_llmqat_loads_it(preset: str, tmp_path: Path) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset(preset))
    save(with_ranges(model, 100.0), tmp_path / "packed", tiny_tokenizer())
    known = known_of(str(tmp_path / "packed"))
    assert QuantConfig.preset(known.scheme["preset"]) == QuantConfig.preset(preset)
    loaded = load_to_judge(str(tmp_path / "packed"))
    assert any(isinstance(module, PackedLinear) for module in loaded.modules())


def test_the_scheme_is_that_of_the_layers_and_not_of_the_embedding() -> None:
    def group(bits: int, size: int | None, *targets: str) -> dict[str, Any]:
        weights = {"num_bits": bits, "type": "int", "group_size": size, "strategy": "group" if size else "channel"}
        return {"targets": [*targets], "weights": weights}

    groups = {"group_0": group(8, None, "model.embed_tokens"), "group_1": group(4, 32, "q_proj", "k_proj")}
    assert _nearest_scheme({"config_groups": groups}) == {"preset": "int4", "group_size": 32}
    groups["group_1"]["targets"] = ["Linear"]
    assert _nearest_scheme({"config_groups": groups}) == {"preset": "int4", "group_size": 32}


def test_errors_of_a_packed_conv1d_are_those_of_its_own_layout(tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "original")
    prepare(model, QuantConfig.preset("int8"))
    found = weight_errors(convert(model), str(tmp_path / "original"))
    assert {name.rpartition(".")[2] for name in found} >= {"c_attn", "c_proj", "c_fc"}
    assert max(found.values()) < 1e-3


def test_mamba_s_packed_layers_take_inputs_that_are_not_contiguous(tmp_path: Path) -> None:
    layer = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    model = torch.nn.Sequential(layer)
    prepare(model, QuantConfig.preset("int4", group_size=32))
    packed = convert(model)
    x = torch.randn(1, 64, 8, dtype=torch.bfloat16)
    assert torch.equal(packed(x.transpose(1, 2)), packed(x.transpose(1, 2).contiguous()))

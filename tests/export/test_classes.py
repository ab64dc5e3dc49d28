"""Checkpoints of every model class: what can be prepared is saved, and loaded as the class that it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmqat import QATArguments, QATTrainer
from llmqat.export import compressed_tensors, load, load_any, save
from llmqat.layers import QuantConfig, prepare
from llmqat.layers.probe import probe_inputs
from llmqat.models import cast_parameters, load_model
from tests.tiny import CLASSES, tiny_llama, tiny_of_class, tiny_tokenizer

STOCK = {
    "llava": "AutoModelForImageTextToText",
    "qwen2_vl": "AutoModelForImageTextToText",
    "qwen2_5_vl": "AutoModelForImageTextToText",
    "gemma3": "AutoModelForCausalLM",
    "gemma4": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
}


def prepared(name: str) -> PreTrainedModel:
    model = tiny_of_class(name)
    prepare(model, QuantConfig.preset("int4", group_size=16))
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with cast_parameters(model, torch.bfloat16):
        return model(**halved(inputs), use_cache=False).logits


def halved(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_of_any_class_is_loaded_as_what_it_is_here_and_by_transformers(name: str, tmp_path: Path) -> None:
    model = prepared(name)
    inputs = probe_inputs(model, 2, 16)
    report = save(model, tmp_path / "packed", tiny_tokenizer())
    assert (report.stock.loads, report.stock.loader) == (True, STOCK[name])
    loaded, _ = load_any(tmp_path / "packed")
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(load(tmp_path / "packed", kernel="reference"), inputs), logits_of(model, inputs))
    stock = getattr(transformers, STOCK[name]).from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    assert type(stock) is type(model)
    assert torch.equal(logits_of(stock, inputs), logits_of(model, inputs))
    prompt = {key: value for key, value in halved(inputs).items() if key != "decoder_input_ids"}
    written = loaded.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert written.shape[0] == 2


@pytest.mark.parametrize("name", CLASSES)
def test_a_full_precision_folder_of_any_class_is_loaded_as_what_it_is(name: str, tmp_path: Path) -> None:
    model = tiny_of_class(name)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    loaded, _ = load_model(str(tmp_path / "model"), torch.float32)
    assert type(loaded) is type(model)
    for parameter, other in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(parameter, other)


def test_a_body_without_a_head_is_saved_and_loaded(tmp_path: Path) -> None:
    model = AutoModel.from_config(tiny_llama().config)
    prepare(model, QuantConfig.preset("int4", group_size=16))
    save(model, tmp_path / "packed")
    assert type(load(tmp_path / "packed")) is type(model)


def test_the_head_of_a_body_alone_is_looked_for(tmp_path: Path) -> None:
    tied, untied = tiny_llama(), tiny_llama(tied=False)
    for name, model in (("tied", tied), ("untied", untied)):
        model.model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    assert isinstance(load_model(str(tmp_path / "tied"))[0], LlamaForCausalLM)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load_model(str(tmp_path / "untied"))


def test_a_classifier_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_llama().config
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
        load_model(str(tmp_path / "model"))


def own_model() -> PreTrainedModel:
    """Returns a model of a class that is not transformers'."""

    class OwnConfig(LlamaConfig):
        model_type = "llmqat_test_own"

    class OwnForCausalLM(LlamaForCausalLM):
        config_class = OwnConfig

    shape = {key: value for key, value in tiny_llama().config.to_dict().items() if key != "model_type"}
    return OwnForCausalLM(OwnConfig(**shape))


def test_a_class_that_transformers_has_not_is_refused_by_name(tmp_path: Path) -> None:
    model = own_model()
    prepare(model, QuantConfig.preset("int4", group_size=16))
    with pytest.raises(ValueError, match="OwnForCausalLM"):
        save(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_an_architecture_that_transformers_has_not_is_refused_by_name(tmp_path: Path) -> None:
    save(prepared("t5"), tmp_path / "packed")
    path = tmp_path / "packed/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["TFiveForTests"]}))
    with pytest.raises(ValueError, match="TFiveForTests"):
        load(tmp_path / "packed")


def test_the_settings_of_a_processor_stay_beside_the_model(tmp_path: Path) -> None:
    tiny_of_class("llava").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    model, tokenizer = load_model(str(tmp_path / "model"))
    prepare(model, QuantConfig.preset("int4", group_size=16))
    save(model, tmp_path / "packed", tokenizer)
    save(load(tmp_path / "packed"), tmp_path / "again", tokenizer)
    wanted = (tmp_path / "model/preprocessor_config.json").read_bytes()
    assert (tmp_path / "again/preprocessor_config.json").read_bytes() == wanted


ROWS = torch.randint(2, 258, (8, 16), generator=torch.Generator().manual_seed(1))


def trainer(model: PreTrainedModel, teacher: PreTrainedModel, folder: Path) -> QATTrainer:
    arguments = QATArguments(
        output_dir=str(folder / "run"), max_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=True
    )
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    return QATTrainer(model=model, teacher=teacher, args=arguments, train_dataset=rows)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_text_alone_trains_a_model_with_images_and_leaves_its_tower(name: str, tmp_path: Path) -> None:
    model = prepared(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer(model, tiny_of_class(name), tmp_path).train()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert any("language_model.layers.0" in key for key in changed)
    assert not [key for key in changed if re.search("vision|visual|projector", key)]
    save(model, tmp_path / "packed")
    with torch.no_grad():
        ids = {"input_ids": ROWS}
        assert torch.equal(logits_of(load(tmp_path / "packed", kernel="reference"), ids), logits_of(model.eval(), ids))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_an_encoder_decoder_model_is_refused_before_training(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=CLASSES[name][1]):
        trainer(prepared(name), tiny_of_class(name), tmp_path)


def test_a_class_that_could_not_be_loaded_again_is_refused_before_training(tmp_path: Path) -> None:
    model = own_model()
    prepare(model, QuantConfig.preset("int4", group_size=16))
    with pytest.raises(ValueError, match="OwnForCausalLM"):
        trainer(model, own_model(), tmp_path)


def test_parts_that_attend_each_in_its_own_way_are_proved_so(tmp_path: Path) -> None:
    model = tiny_of_class("llava")
    model.set_attn_implementation({"": "eager", "text_config": "sdpa", "vision_config": "eager"})
    prepare(model, QuantConfig.preset("int4", group_size=16))
    save(model, tmp_path / "packed")
    read = compressed_tensors.read(
        tmp_path / "packed",
        AutoConfig.from_pretrained(tmp_path / "packed"),
        torch.bfloat16,
        {"": "eager", "text_config": "sdpa", "vision_config": "eager"},
    )
    kinds = [read.config.text_config._attn_implementation, read.config.vision_config._attn_implementation]
    assert kinds == ["sdpa", "eager"]


def test_head_sizes_that_differ_between_layers_are_no_obstacle(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32}
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    inputs = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 384, "vocab_size": 384}
    config = AutoConfig.for_model("gemma4_text", hidden_size=64, intermediate_size=128, **heads, **layers, **inputs)
    model = AutoModelForCausalLM.from_config(config)
    prepare(model, QuantConfig.preset("int4", group_size=16))
    save(model, tmp_path / "packed")
    assert type(load(tmp_path / "packed")) is type(model)


def test_inputs_of_a_model_that_cannot_be_guessed_are_given(tmp_path: Path) -> None:
    model = tiny_of_class("whisper")
    model.main_input_name = "input_values"
    prepare(model, QuantConfig.preset("int4", group_size=16))
    with pytest.raises(ValueError, match=r"takes input_values.*probe"):
        save(model, tmp_path / "packed")
    given = {"input_features": torch.randn(1, 16, 40), "decoder_input_ids": torch.tensor([[2, 3, 4]])}
    assert save(model, tmp_path / "packed", probe=given).proof["probe_tokens"] == 3


def test_parameters_that_modeling_code_makes_in_float32_are_loaded_as_they_were_proved(tmp_path: Path) -> None:
    """XLNet's `mask_emb`: left in float32, it made the loaded model's forward mix dtypes and fail."""
    config = AutoConfig.for_model("xlnet", vocab_size=384, d_model=64, n_layer=2, n_head=4, d_inner=128)
    model = AutoModelForCausalLM.from_config(config).eval()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    save(model, tmp_path / "packed")
    loaded = load(tmp_path / "packed", kernel="reference")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.isfinite(loaded(**probe_inputs(loaded), use_cache=False).logits).all()

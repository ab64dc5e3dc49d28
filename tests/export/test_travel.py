"""What users do with a packed model beside loading it: save it again, push it again, cast, copy, pickle, share it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoProcessor, PreTrainedModel
from typer.testing import CliRunner

from llmqat import QuantConfig, convert, load, prepare, save
from llmqat.cli.application import app
from llmqat.export import load_any, write_gptq
from llmqat.export.hub import WEIGHTS, push
from llmqat.layers import packed
from llmqat.models import load_model, weight_files
from tests.tiny import (
    CHAT_TEMPLATE,
    regrouped,
    tiny_llama,
    tiny_of_class,
    tiny_tokenizer,
    with_ranges,
)


def prepared(model: PreTrainedModel, preset: str = "int4") -> Any:
    prepare(model, QuantConfig.preset(preset, **regrouped(preset, 32)))
    return with_ranges(model)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(0))).logits.float()


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_an_upload_replaces_the_weights_of_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Api:
        def create_repo(self, *_: Any, **__: Any) -> None: ...

        def upload_folder(self, **options: Any) -> Any:
            asked.update(options)
            return type("Commit", (), {"commit_url": "url"})

    monkeypatch.setattr("llmqat.export.hub.HfApi", Api)
    save(prepared(tiny_llama()), tmp_path / "one", tiny_tokenizer())
    push(tmp_path / "one", "me/x")
    assert asked["delete_patterns"] == list(WEIGHTS)


def test_of_two_layouts_the_one_that_transformers_reads_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(prepared(tiny_llama(seed=1)), tmp_path / "one", tiny_tokenizer())
    save(prepared(tiny_llama(seed=2)), tmp_path / "shards", tiny_tokenizer(), max_shard_size="60KB")
    for file in (tmp_path / "shards").glob("model*"):
        (tmp_path / "one" / file.name).write_bytes(file.read_bytes())
    assert [file.name for file in weight_files(tmp_path / "one")] == ["model.safetensors"]
    assert "the first is read" in caplog.text


@pytest.mark.parametrize("preset", ["int4", "mxfp4"])
def test_save_pretrained_of_a_packed_model_names_save(preset: str, tmp_path: Path) -> None:
    model = prepared(tiny_llama(), preset)
    save(model, tmp_path / "packed", tiny_tokenizer())
    loaded = load(tmp_path / "packed")
    for one in (loaded, convert(model), copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        with pytest.raises(ValueError, match=r"call llmqat\.save\(model, folder, tokenizer\)"):
            one.save_pretrained(tmp_path / "again")
        with pytest.raises(ValueError, match=r"call llmqat\.save"):
            one.push_to_hub("me/x")
    save(loaded, tmp_path / "again", tiny_tokenizer())
    assert torch.equal(logits(load(tmp_path / "again")), logits(loaded))


def vision_source(folder: Path, template_in: str) -> Path:
    """Writes a LLaVA whose chat template lies with the tokenizer, or in the older file of processors."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if template_in == "tokenizer" else None
    tiny_of_class("llava").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 28}
    files: dict[str, Any] = {
        "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", "size": size, "crop_size": size},
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "image_token": "<unused10>",
        },
    }
    if template_in == "processor":
        files["chat_template.json"] = {"chat_template": CHAT_TEMPLATE}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("template_in", ["tokenizer", "processor"])
def test_processors_travel_with_their_chat_template(
    template_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision_source(tmp_path / "source", template_in)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model("source")
    monkeypatch.chdir("/")  # the source is found again from elsewhere
    save(prepared(model), tmp_path / "packed", tokenizer)
    assert AutoProcessor.from_pretrained(tmp_path / "packed").chat_template == CHAT_TEMPLATE
    write_gptq(*load_any(tmp_path / "packed"), tmp_path / "gptq")
    assert (tmp_path / "gptq" / "preprocessor_config.json").is_file()


def test_the_card_says_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("models/base")
    tiny_tokenizer().save_pretrained("models/base")
    words = "quantize models/base --scheme int4 --group-size 32 --method rtn --out packed"
    assert CliRunner().invoke(app, words.split()).exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    push(tmp_path / "packed", "someone/x", dry_run=tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "rounded by llmqat" in card
    assert "models/base" not in card
    (tmp_path / "packed" / "llmqat.json").unlink()  # as another tool's checkpoint
    push(tmp_path / "packed", "someone/y", dry_run=tmp_path / "other")
    card = (tmp_path / "other" / "README.md").read_text()
    assert "by llmqat" not in card.partition("##")[0]
    assert "- llmqat\n" not in card


def test_scales_that_float16_does_not_hold_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed._warn_of_float16.cache_clear()
    small, none = tiny_llama(), tiny_llama()
    with torch.no_grad():
        small.model.layers[0].mlp.up_proj.weight.mul_(5e-5)
        none.model.layers[0].mlp.up_proj.weight.mul_(1e-7)
    for name, model in (("plain", tiny_llama()), ("small", small), ("none", none)):
        save(prepared(model), tmp_path / name, tiny_tokenizer())
    load(tmp_path / "plain", dtype=torch.float16)
    load(tmp_path / "plain").half()
    assert "float16" not in caplog.text
    load(tmp_path / "small").half()
    assert "scales below 6e-5 lose digits in float16" in caplog.text
    with pytest.raises(ValueError, match=r"up_proj\.weight_scale has scales .* float16 does not hold"):
        load(tmp_path / "none", dtype=torch.float16)
    with pytest.raises(ValueError, match="float16 does not hold"):
        load(tmp_path / "none").to(torch.float16)


def test_a_compiled_model_is_saved_as_it_was(tmp_path: Path) -> None:
    save(prepared(tiny_llama()), tmp_path / "one", tiny_tokenizer())
    save(load(tmp_path / "one", compile=True), tmp_path / "two", tiny_tokenizer())
    one, two = (json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("one", "two"))
    assert one == two


def test_a_pickled_model_runs_in_another_process(tmp_path: Path) -> None:
    for preset in ("int4", "w4a8kv8"):
        save(prepared(tiny_llama(), preset), tmp_path / preset, tiny_tokenizer())
        torch.save(load(tmp_path / preset), tmp_path / f"{preset}.pt")
    code = (
        "import sys, torch\n"
        "for file in sys.argv[1:]:\n"
        "    torch.load(file, weights_only=False)(torch.tensor([[2, 3, 4]]))\n"
    )
    files = [str(tmp_path / f"{preset}.pt") for preset in ("int4", "w4a8kv8")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_scales_that_change_in_place_are_seen(tmp_path: Path) -> None:
    save(prepared(tiny_llama()), tmp_path / "packed", tiny_tokenizer())
    before, after = load(tmp_path / "packed"), load(tmp_path / "packed")
    logits(after)  # kernels have laid out the old ones
    for model in (before, after):
        for name in ("down_proj", "up_proj"):
            getattr(model.model.layers[0].mlp, name).weight_scale.mul_(3)
    assert off(logits(after), logits(before)) == 0
    for model in (before, after):
        layer = model.model.layers[0].mlp.down_proj
        layer.weight_scale = layer.weight_scale / 3  # another tensor, as yet unchanged
    fresh = load(tmp_path / "packed")
    fresh.model.layers[0].mlp.up_proj.weight_scale.mul_(3)
    fresh.model.layers[0].mlp.down_proj.weight_scale = before.model.layers[0].mlp.down_proj.weight_scale
    assert off(logits(after), logits(fresh)) == 0


def test_threads_do_not_take_each_others_products(tmp_path: Path) -> None:
    save(prepared(tiny_llama()), tmp_path / "packed", tiny_tokenizer())
    attention = load(tmp_path / "packed").model.layers[0].self_attn
    x, y = torch.randn(2, 1, 3, attention.q_proj.in_features, dtype=torch.bfloat16)
    wanted = attention.k_proj(x.clone())
    found: list[torch.Tensor] = []
    begun, go_on = threading.Event(), threading.Event()

    def other() -> None:
        attention.q_proj(x)
        begun.set()
        go_on.wait()
        found.append(attention.k_proj(x))

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    attention.q_proj(y)
    go_on.set()
    thread.join()
    assert torch.equal(found[0], wanted)
    assert torch.equal(attention.k_proj(y), attention.k_proj(y.clone()))


def test_places_to_save_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(tiny_llama())
    save(model, tmp_path / "real", tiny_tokenizer())
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(model, tmp_path / "link", tiny_tokenizer(), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "real")
    save(model, ".", tiny_tokenizer(), overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    with pytest.raises(ValueError, match="int_quantized=True is a form of 4-bit weights with 8-bit inputs"):
        save(model, tmp_path / "new", tiny_tokenizer(), int_quantized=True)


def test_a_head_that_was_untied_by_hand_is_said_to_be(tmp_path: Path) -> None:
    model = tiny_llama(True)
    assert model.config.tie_word_embeddings
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    save(prepared(model), tmp_path / "packed", tiny_tokenizer())
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["tie_word_embeddings"] is False

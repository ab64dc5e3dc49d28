"""The walk from block to block is the model's own forward, for every text and in every architecture, or is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from llmqat import QuantConfig, prepare
from llmqat.calibrate import (
    BlockwiseStage,
    GPTQStage,
    Originals,
    RangesStage,
    calibrate,
    check_walk,
    collect_moments,
    gptq_block,
    open_walk,
)
from llmqat.calibrate.chains import PausedChain, RecordedChain
from llmqat.calibrate.gptq import joined, layers_by_input, moments_by_half
from llmqat.calibrate.walk import Walk
from llmqat.data.blocks import Rows
from llmqat.kernels import float_training
from llmqat.layers import QuantModule, quantizers_off
from llmqat.models import capture_hidden, cast_parameters
from tests.calibrate.carrying import CARRYING, TEXT, carrying
from tests.tiny import ARCHITECTURES, tiny_architecture, tiny_llama

INT4 = QuantConfig.preset("int4", group_size=16)


def ids(rows: int = 5, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(2, 258, (rows, length), generator=torch.Generator().manual_seed(seed))


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    ignore = ("re:.*altup.*",) if model.config.model_type == "gemma3n_text" else ()  # too narrow for groups
    prepare(model, QuantConfig.preset("int4", group_size=16, ignore=ignore))
    return model


def passed(walk: Walk) -> Walk:
    """Takes both chains to their end."""
    for block in walk.blocks:
        block.run_full(walk.full, walk.full)
        block.run(walk.quantized, walk.quantized)
    return walk


@torch.no_grad()
def last_output(model: PreTrainedModel, module: nn.Module, tokens: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda m, i, o: seen.append(o if isinstance(o, Tensor) else o[0]))
    with cast_parameters(model, torch.bfloat16), capture_hidden(model), float_training(torch.device("cpu")):
        model(input_ids=tokens, use_cache=False)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *CARRYING])
def test_a_walk_is_the_model_s_own_forward(model_type: str) -> None:
    """For both chains, a whole batch that is not the first, and what is left over."""
    model = prepared(carrying(model_type) if model_type in CARRYING else tiny_architecture(model_type))
    check_walk(model, ids(3, seed=3))
    with passed(open_walk(model, ids(), batch_size=2)) as walk:
        for rows in (slice(2, 4), slice(4, 5)):
            expected = last_output(model, walk.blocks[-1].module, ids()[rows])
            torch.testing.assert_close(walk.quantized[rows], expected.to(torch.bfloat16))
            with quantizers_off(model):
                expected = last_output(model, walk.blocks[-1].module, ids()[rows])
            torch.testing.assert_close(walk.full[rows], expected.to(torch.bfloat16))


def test_models_that_give_every_text_the_same_are_walked_by_hidden_states_alone() -> None:
    for model_type in ("llama", "gemma3_text", "bloom", "gpt_oss"):
        walk = open_walk(prepared(tiny_architecture(model_type)), ids(), 2)
        assert isinstance(walk.full, RecordedChain)
    with open_walk(prepared(carrying("gemma4_text")), ids(), 2) as walk:
        assert isinstance(walk.full, PausedChain)


@pytest.mark.parametrize("model_type", ["gemma4_text", "hy_v4"])
def test_codes_do_not_depend_on_how_text_is_cut(model_type: str) -> None:
    def codes(tokens: Tensor, batch_size: int) -> dict[str, Tensor]:
        model = carrying(model_type)
        stages = [RangesStage(method="minmax"), GPTQStage(batch_size=batch_size)]
        calibrate(model, INT4, stages, tokens, dtype=torch.float32)
        return {name: layer.codes() for name, layer in model.named_modules() if isinstance(layer, QuantModule)}

    whole, parts = codes(ids(6, 48), 6), codes(ids(6, 48).flip(0), 4)
    changed = {name: float((code != parts[name]).float().mean()) for name, code in whole.items()}
    assert sum(changed.values()) < 0.02 * len(changed), changed  # a code at an edge may fall to the other side


def test_blocks_that_keep_their_own_forwards_are_trained_and_taken_up_again(tmp_path: Path) -> None:
    stages = [
        RangesStage(blocks=6),
        GPTQStage(blocks=6, batch_size=4),
        BlockwiseStage(blocks=6, batch_size=4, iterations=12, learning_rate=1e-3),
    ]
    model = carrying("gemma4_text")
    reports = calibrate(model, INT4, stages, ids(6), folder=tmp_path)
    found = [report.kl_after for report in reports]
    assert found == sorted(found, reverse=True)
    (tmp_path / "03-blockwise" / "block-0003.safetensors").unlink()
    (tmp_path / "03-blockwise" / "report.json").unlink()
    again = carrying("gemma4_text")
    calibrate(again, INT4, stages, ids(6), folder=tmp_path)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("target", ["clean", "quantized"])
def test_targets_are_those_of_either_chain(target: str) -> None:
    calibrate(
        carrying("gemma4_text"),
        INT4,
        [RangesStage(method="minmax"), BlockwiseStage(iterations=2, batch_size=2, target=target)],
        ids(4),
    )


def test_documents_are_kept_apart_in_the_model_s_own_forwards() -> None:
    starts = torch.zeros(5, 24, dtype=torch.uint8)
    starts[torch.arange(4), torch.tensor([3, 9, 12, 20])] = 1  # the last token block is one document
    rows = Rows(ids(), starts=starts)
    model = prepared(carrying("gemma4_text"))
    with passed(open_walk(model, rows, 2, dtype=torch.float32)) as walk, torch.no_grad():
        assert isinstance(walk.full, PausedChain)
        expected = model.model.norm(walk.quantized[:])
        found = model.model(**rows.inputs(), use_cache=False).last_hidden_state
        torch.testing.assert_close(expected, found, atol=1e-4, rtol=1e-4)


# What is refused, and what is not


def test_what_happens_between_blocks_belongs_to_the_walk() -> None:
    model = prepared(tiny_llama())
    model.model.layers[1].register_forward_pre_hook(lambda m, inputs: (inputs[0] * 2, *inputs[1:]))
    with passed(open_walk(model, ids(), 2)) as walk:
        expected = last_output(model, model.model.layers[1], ids()[2:4])
        torch.testing.assert_close(walk.quantized[2:4], expected)


def test_an_argument_that_only_some_texts_change_is_noticed() -> None:
    """No text of the check has token 7, and the first batch has none either."""
    model = prepared(tiny_llama())
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda m, a, o: seen.append(o["input_ids"]), with_kwargs=True)

    def shift(module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        turned = tuple(part * 0.5 if bool((seen[-1] == 7).any()) else part for part in options["position_embeddings"])
        return args, {**options, "position_embeddings": turned}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(shift, with_kwargs=True)
    tokens = ids(4).clamp(min=8)
    assert isinstance(open_walk(model, tokens, 2).full, RecordedChain)
    tokens[3, 5] = 7
    with passed(open_walk(model, tokens, 2)) as walk:
        torch.testing.assert_close(walk.quantized[2:4], last_output(model, walk.blocks[-1].module, tokens[2:4]))


def test_an_argument_that_varies_in_long_texts_alone_is_noticed() -> None:
    """As where a block hands the next ones the tokens to attend to, once there are more than are attended to."""
    model = prepared(tiny_llama())
    first, second = model.model.layers
    chosen: list[Tensor] = []
    first.register_forward_hook(lambda m, a, o: chosen.append(o.mean((1, 2), keepdim=True)))

    def turn(module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        is_long = options["position_embeddings"][0].shape[1] > 32
        return args, {
            **options,
            "position_embeddings": tuple(
                part * (1 + chosen[-1]) if is_long else part for part in options["position_embeddings"]
            ),
        }

    second.register_forward_pre_hook(turn, with_kwargs=True)
    assert isinstance(open_walk(model, ids(4, 24), 2).full, RecordedChain)
    with open_walk(model, ids(4, 40), 2) as walk:
        assert isinstance(walk.full, PausedChain)


def test_a_forward_that_no_walk_follows_is_refused() -> None:
    model = prepared(tiny_llama())
    count = [0]

    def drift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        count[0] += 1
        return output * (1 + count[0])

    model.model.layers[0].mlp.register_forward_hook(drift)
    message = r"llama cannot be walked .* \(after model.layers.0 the full-precision hidden states are .*% off\); leave"
    with pytest.raises(ValueError, match=message):
        open_walk(model, ids(), 2)
    with pytest.raises(ValueError, match=message):
        check_walk(model, ids(3))


def test_blocks_that_text_never_reaches_are_named() -> None:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT, vision_config={**vision, "vision_use_head": False}, mm_tokens_per_image=4)
    )
    prepare(model, INT4)
    mlp = model.model.vision_tower.encoder.layers[0].mlp
    if not isinstance(mlp.fc1, QuantModule):  # towers are left alone unless asked for
        prepare(mlp, INT4)
    assert isinstance(mlp.fc1, QuantModule)
    with pytest.raises(ValueError, match=r"text does not reach model\.vision_tower.* leave .*alone .*quant.ignore"):
        open_walk(model, ids(), 2)


def test_blocks_that_run_twice_are_named() -> None:
    model = prepared(tiny_llama())
    own = model.model.layers
    model.model.layers = nn.ModuleList([own[0], own[1], own[0]])
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"llama runs model\.layers\.0 2 times in one forward.* leave the stages gptq"):
        open_walk(model, ids(), 2)


# Layers within a block


def test_a_layer_that_runs_twice_is_seen_twice() -> None:
    model = prepared(tiny_llama())
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) + own(0.5 * x)
    walk = open_walk(model, ids(), 2)
    block, chain = walk.blocks[0], walk.quantized
    group = next(group for group in layers_by_input(block, chain) if "mlp.up_proj" in group.layers)
    assert list(group.layers) == ["mlp.gate_proj", "mlp.up_proj"]
    assert group.calls == 2
    once = joined(moments_by_half(block, replace(group, calls=1), chain))
    both = joined(moments_by_half(block, group, chain))
    torch.testing.assert_close(both.moments, once.moments * (1 + 0.25) / 2, rtol=1e-2, atol=1e-3)


def test_layers_are_found_in_every_batch_and_those_not_reached_keep_their_codes() -> None:
    model = prepared(tiny_llama())
    mlp = model.model.layers[0].mlp
    own, passes = mlp.forward, [0]

    def forward(x: Tensor) -> Tensor:  # the last batch, which is smaller, alone goes through it
        passes[0] += 1
        return own(x) if len(x) == 1 else torch.zeros_like(x)

    mlp.forward = forward
    walk = open_walk(model, ids(5), 2)
    found = gptq_block(walk.blocks[0], walk.quantized, GPTQStage(batch_size=2))
    assert {name.rpartition(".")[2] for name in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    mlp.forward = torch.zeros_like
    before = mlp.up_proj.codes()
    walk = open_walk(model, ids(5), 2)
    found = gptq_block(walk.blocks[0], walk.quantized, GPTQStage(batch_size=2))
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert torch.equal(mlp.up_proj.codes(), before)


def test_inputs_given_by_keyword_are_seen() -> None:
    model = prepared(tiny_llama())
    expected = collect_moments(model, ids())
    for layer in model.model.layers:
        own = layer.mlp.up_proj
        layer.mlp.forward = lambda x, mlp=layer.mlp, own=own: mlp.down_proj(x=mlp.act_fn(mlp.gate_proj(x=x)) * own(x=x))
    found = collect_moments(model, ids())
    assert all(torch.equal(moments, expected[name]) for name, moments in found.items())
    walk = open_walk(model, ids(), 2)
    assert len(gptq_block(walk.blocks[0], walk.quantized, GPTQStage(batch_size=2))) == 7


def test_parameters_that_blocks_share_stay_as_they_are() -> None:
    model = tiny_llama()
    first, second = model.model.layers
    second.input_layernorm = first.input_layernorm
    before = first.input_layernorm.weight.detach().clone()
    own = first.post_attention_layernorm.weight.detach().clone()
    stages = [RangesStage(method="minmax"), BlockwiseStage(iterations=4, learning_rate=1e-3)]
    calibrate(model, INT4, stages, ids())
    assert torch.equal(first.input_layernorm.weight, before)
    assert not torch.equal(first.post_attention_layernorm.weight, own)


def test_originals_keep_what_transformers_keeps_in_float32(tmp_path: Path) -> None:
    model = prepared(carrying("hy_v4"))
    Originals.set_aside(model, tmp_path / "originals.safetensors", torch.bfloat16)
    block = open_walk(model, ids(), 2).blocks[1]
    found = Originals(tmp_path / "originals.safetensors").of(block)
    wide = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert wide
    assert wide == {name for name in found if block.is_wide(f"{block.name}.{name}")}

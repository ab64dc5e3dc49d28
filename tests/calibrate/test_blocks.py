"""The walk from block to block is what the model's own forward does, in every architecture; training of a block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmqat import QuantConfig, prepare
from llmqat.calibrate import BlockwiseStage, open_walk, train_block
from llmqat.calibrate.blockwise import SignSGD, _all_parameters, relative_error
from llmqat.calibrate.masters import in_float32
from llmqat.kernels import float_training
from llmqat.layers import KVQuantizer, QuantModule, quantized_once, quantizers_off
from llmqat.models import capture_hidden, cast_parameters
from tests.tiny import ARCHITECTURES, tiny_architecture, tiny_llama

INT3 = QuantConfig.preset("int3", group_size=32)
CPU = torch.device("cpu")


def ids(blocks: int = 5, length: int = 16) -> Tensor:
    return torch.randint(2, 258, (blocks, length), generator=torch.Generator().manual_seed(0))


def last_block_output(model: nn.Module, module: nn.Module, tokens: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda m, i, o: seen.append(o if isinstance(o, Tensor) else o[0]))
    with torch.no_grad(), cast_parameters(model, torch.bfloat16), capture_hidden(model), float_training(CPU):
        model(input_ids=tokens, use_cache=False)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_both_chains_are_those_of_the_model(model_type: str) -> None:
    model = tiny_architecture(model_type)
    prepare(model, QuantConfig.preset("int3", group_size=32, embeddings="int8"))
    walk = open_walk(model, ids(), batch_size=2)
    assert [block.name for block in walk.blocks] == [f"{ARCHITECTURES[model_type][0]}.{index}" for index in range(2)]
    for block in walk.blocks:
        block.run_full(walk.full, walk.full)
        block.run(walk.quantized, walk.quantized)
    for chain, switched in ((walk.quantized, False), (walk.full, True)):
        for rows in (slice(0, 2), slice(4, 5)):  # a whole batch, and what is left over
            if switched:
                with quantizers_off(model):
                    expected = last_block_output(model, walk.blocks[-1].module, ids()[rows])
            else:
                expected = last_block_output(model, walk.blocks[-1].module, ids()[rows])
            assert torch.equal(chain[rows], expected.to(torch.bfloat16))
    assert not torch.equal(walk.full[:], walk.quantized[:])


def test_hidden_states_go_to_files_when_they_take_too_much_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    prepare(model, INT3)
    made: list[str] = []
    from_file = torch.from_file

    def watched(path: str, *arguments: object, **options: object) -> Tensor:
        made.append(path)
        return from_file(path, *arguments, **options)

    monkeypatch.setattr(torch, "from_file", watched)
    size = 2 * 5 * 16 * 64 * 2
    kept = open_walk(model, ids(), 2, memory_limit=size)
    assert not made
    walk = open_walk(model, ids(), 2, memory_limit=size - 1)
    assert len(made) == 2
    assert torch.equal(walk.full[:], kept.full[:])
    walk.blocks[0].run(walk.quantized, walk.quantized)
    kept.blocks[0].run(kept.quantized, kept.quantized)
    assert torch.equal(walk.quantized[:], kept.quantized[:])


def test_a_kv_cache_is_quantized_in_the_quantized_chain_only() -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset("int8", kv_cache={"key": {"num_bits": 2}, "value": {"num_bits": 2}}))
    assert any(isinstance(module, KVQuantizer) for module in model.modules())
    walk = open_walk(model, ids(), 4)
    for block in walk.blocks:
        block.run_full(walk.full, walk.full)
        block.run(walk.quantized, walk.quantized)
    with quantizers_off(model):
        expected = last_block_output(model, walk.blocks[-1].module, ids()[:4])
    assert torch.equal(walk.full[:4], expected)
    assert relative_error(walk.quantized[:], walk.full[:]) > 0.001


def test_models_without_blocks_and_texts_without_rows_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="llama has no transformer block with quantized weights"):
        open_walk(model, ids(), 2)
    prepare(model, INT3)
    with pytest.raises(ValueError, match="at least one"):
        open_walk(model, ids()[:0], 2)


def test_weights_are_quantized_once_and_never_under_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    prepare(model, INT3)
    calls: list[QuantModule] = []
    made = QuantModule.quantized_matrix
    monkeypatch.setattr(QuantModule, "quantized_matrix", lambda self, dtype: (calls.append(self), made(self, dtype))[1])
    with quantized_once(model):
        with torch.no_grad():
            first = model(ids()).logits
            assert torch.equal(model(ids()).logits, first)
            assert len(calls) == 14
        assert model(ids()).logits.requires_grad
        assert len(calls) == 28
        with torch.no_grad(), quantizers_off(model):
            assert not torch.equal(model(ids()).logits, first)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
        assert not torch.equal(model(ids()).logits, first)


def test_rates_that_rounding_has_no_use_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scale_learning_rate=0\.1 means nothing with trains=rounding"):
        BlockwiseStage(trains="rounding", scale_learning_rate=0.1)


@pytest.mark.parametrize("trains", ["weights", "rounding"])
def test_training_brings_a_block_nearer_to_full_precision(trains: str) -> None:
    model = tiny_llama()
    prepare(model, INT3)
    walk = open_walk(model, ids(16), batch_size=4)
    block = walk.blocks[0]
    block.run_full(walk.full, walk.full)
    before = {name: parameter.detach().clone() for name, parameter in block.module.named_parameters()}
    steps: list[int] = []
    stage = BlockwiseStage(trains=trains, iterations=40, learning_rate=1e-3 if trains == "weights" else None)
    found = train_block(block, walk.quantized, walk.full, stage, 0, lambda step, loss: steps.append(step))
    assert found.after < 0.8 * found.before
    assert steps == list(range(1, 41))
    assert all(parameter.grad is None for parameter in block.module.parameters())
    moved = {name for name, parameter in block.module.named_parameters() if not torch.equal(parameter, before[name])}
    norms = {name for name in before if "norm" in name}
    assert norms
    assert (norms <= moved) == (trains == "weights")
    for name, layer in block.module.named_modules():
        if isinstance(layer, QuantModule) and trains == "rounding":
            change = (layer.weight - before[f"{name}.weight"]).abs()
            scale = layer.initial_scale.abs().repeat_interleave(32, 1)
            assert (change <= 0.5 * scale * 1.001).all()


def test_coarser_weights_learn_faster_unless_a_rate_is_given() -> None:
    model = tiny_llama()
    prepare(
        model,
        QuantConfig.preset("int2", group_size=32, overrides={"re:.*down_proj": {"num_bits": 8, "strategy": "channel"}}),
    )
    block = open_walk(model, ids(4), batch_size=4).blocks[0]

    def rate_of(parameter: Tensor, stage: BlockwiseStage) -> float:
        groups = _all_parameters(block, stage).param_groups
        return next(group["lr"] for group in groups if any(parameter is p for p in group["params"]))

    mlp, norm = block.module.mlp, block.module.input_layernorm.weight
    own = BlockwiseStage()
    assert [rate_of(p, own) for p in (mlp.up_proj.weight, mlp.down_proj.weight, norm)] == [5e-4, 1e-4, 1e-4]
    assert rate_of(mlp.up_proj.log_scale, own) == own.scale_learning_rate
    given = BlockwiseStage(learning_rate=0.0)
    assert [rate_of(p, given) for p in (mlp.up_proj.weight, norm)] == [0.0, 0.0]


def test_a_training_that_only_does_harm_leaves_the_block_as_it_was() -> None:
    model = tiny_llama()
    prepare(model, INT3)
    walk = open_walk(model, ids(8), batch_size=4)
    block = walk.blocks[0]
    block.run_full(walk.full, walk.full)
    before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    stage = BlockwiseStage(iterations=20, learning_rate=1.0, scale_learning_rate=3.0, patience=1)
    found = train_block(block, walk.quantized, walk.full, stage, 0)
    assert found.after == found.before
    assert found.iterations == 5  # a quarter of the way there was the first check, and no gain
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.module.state_dict().items())


def test_the_error_is_a_share_of_the_output() -> None:
    target = torch.tensor([[[1.0, 0.0], [100.0, 0.0]]])
    assert relative_error(target * 1.1, target) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(target + torch.tensor([0.1, 0.0]), target) == pytest.approx(0.02 / 10001, rel=1e-3)


def test_sign_sgd_moves_by_steps_of_its_own_and_stays_in_bounds() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    theta = nn.Parameter(torch.tensor([0.0]))
    bounds = [(torch.tensor([0.5, 1.5]), torch.tensor([1.5, 2.5]))]
    optimizer = SignSGD(
        [
            {"params": [weight], "lr": 0.4, "steps": [torch.tensor([1.0, 0.5])], "bounds": bounds},
            {"params": [theta], "lr": 0.1},
        ]
    )
    for _ in range(2):
        (weight[0] * 3 - weight[1] * 0.01 + theta[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(weight, torch.tensor([0.5, 2.4]))
    assert torch.allclose(theta, torch.tensor([-0.2]))


def test_a_bfloat16_block_is_raised_and_comes_back_with_its_codes() -> None:
    model = tiny_llama().to(torch.bfloat16)
    prepare(model, INT3)
    block = open_walk(model, ids(), 2).blocks[0]
    places = [parameter.data_ptr() for parameter in block.module.parameters()]
    with in_float32(block):
        assert {parameter.dtype for parameter in block.module.parameters()} == {torch.float32}
        with torch.no_grad():
            for layer in block.quantized().values():
                layer.weight += torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1
        expected = {name: layer.codes() for name, layer in block.quantized().items()}
        wide = {name: layer.weight.clone() for name, layer in block.quantized().items()}
    assert [parameter.data_ptr() for parameter in block.module.parameters()] == places
    for name, layer in block.quantized().items():
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.codes(), expected[name])
        stayed = layer.weight == wide[name].to(torch.bfloat16)
        assert 0.95 < stayed.float().mean() < 1  # others would have crossed into the next code
        assert torch.equal(layer.weight[~stayed], layer.quantized_weight(torch.bfloat16)[~stayed])

"""torch.compile takes a prepared model in one piece: nothing of llmqat breaks its graph."""

from __future__ import annotations

import pytest
import torch

from llmqat import QuantConfig, prepare
from tests.tiny import tiny_llama


@pytest.mark.parametrize("preset", ["ternary", "w4a8kv8"])
def test_a_prepared_model_is_one_graph(preset: str) -> None:
    model = tiny_llama()
    prepare(model, QuantConfig.preset(preset, group_size=32))
    model.train()
    ids = torch.randint(2, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # what is tested is the graph, not a compiler
    found = torch.autograd.grad(compiled(ids, labels=ids).loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

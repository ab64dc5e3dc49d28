"""How far a model is from full precision on a little text, before and after a stage."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmqat.data.blocks import Rows, rows_of
from llmqat.kernels import float_products, weights_let_go
from llmqat.metrics import Predictor, check_predictor, predictor_of, token_scores
from llmqat.models import capture_hidden, cast_parameters, model_device


class Probe:
    """The full-precision model's final hidden states on a little text, to measure divergence from."""

    def __init__(
        self, model: PreTrainedModel, blocks: Tensor | Rows, dtype: torch.dtype, *, copy_head: bool = False
    ) -> None:
        """Runs `model`, full precision, over token blocks, computing in `dtype`.

        Args:
            model: in full precision.
            blocks: a few.
            dtype: of the forward pass.
            copy_head: whether stages may write to the output head, as rotation does.
        """
        check_predictor(model)
        self.rows, self.dtype = rows_of(blocks), dtype
        self.hidden, found = self._forward(model)
        self.predictor = Predictor(found.head.clone(), found.bias, found.transform) if copy_head else found

    def divergence(self, model: PreTrainedModel) -> float:
        """Returns KL(full precision || model) a token on the probe, nats."""
        hidden, predictor = self._forward(model)
        labels = self.rows.ids[:, 1:].flatten()
        with float_products():
            found = token_scores(hidden, predictor, labels, self.hidden, self.predictor)
        assert found.kl is not None
        return float(found.kl.mean(dtype=torch.float64))

    @torch.no_grad()
    def _forward(self, model: PreTrainedModel) -> tuple[Tensor, Predictor]:
        training = model.training
        model.eval()
        try:
            with (
                cast_parameters(model, self.dtype),
                weights_let_go(model),
                capture_hidden(model) as captured,
                float_products(),
            ):
                model(**self.rows.inputs(model_device(model)), use_cache=False)
                found = predictor_of(model)
                return captured.take()[:, :-1].flatten(0, 1), found.detached()
        finally:
            model.train(training)

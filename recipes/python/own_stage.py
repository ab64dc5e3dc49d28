"""A calibration stage of your own: norms trained for a few steps, so that outputs are those of full precision again.

    python own_stage.py train smollm2-135m-int4 "calibrate=[ranges, gptq, {stage: norm-tweak, steps: 20}]"

This script is the command line of llmqat with one stage more. The fields of the class are keys of a recipe.
Source: Norm Tweaking (2309.02784), with one loss on the logits in place of one in each block.
"""

import torch

from llmqat.calibrate import STAGES, CustomStage
from llmqat.cli import main
from llmqat.layers import quantizers_off


@STAGES.register("norm-tweak")
class NormTweakStage(CustomStage):
    """Trains the norms of the quantized model against its outputs in full precision."""

    steps: int = 20
    """Steps of Adam, each on `batch_size` token blocks."""
    learning_rate: float = 1e-4
    """Of the norms."""

    def apply(self, model, text):
        """Changes the norms in place; returns the last loss."""
        norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
        batches = [text[at : at + self.batch_size].inputs(model.device) for at in range(0, len(text), self.batch_size)]
        with torch.no_grad(), quantizers_off(model):
            wanted = [model(**batch).logits for batch in batches]
        optimizer = torch.optim.Adam(norms, self.learning_rate)
        for step in range(self.steps):
            at = step % len(batches)
            loss = torch.nn.functional.mse_loss(model(**batches[at]).logits, wanted[at])
            for norm, gradient in zip(norms, torch.autograd.grad(loss, norms), strict=True):
                norm.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss.item()}


if __name__ == "__main__":
    main()

"""A loss of your own: a subclass of QATTrainer that trains with reverse KL.

    python own_loss.py MODEL OUT [STEPS [BATCH]]

By default a try of minutes: 20 steps of 512 tokens. Only `compute_loss` is written; the rest is QATTrainer's.
"""

import sys

import torch

import llmqat
from llmqat.data import DataConfig, load_blocks
from llmqat.models import load_model
from llmqat.train.targets import scored_labels


class ReverseKLTrainer(llmqat.QATTrainer):
    """Minimizes KL(student || teacher): the student gives up what the teacher finds unlikely."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns nats per scored token; an evaluation asks for outputs, and keeps QATTrainer's loss."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = scored_labels(inputs)
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits.float().log_softmax(-1)
        student = model(**inputs).logits.float().log_softmax(-1)
        divergence = (student.exp() * (student - teacher)).sum(-1)
        scored = labels[:, 1:] != -100  # the state at one position predicts the next token
        loss = divergence[:, :-1][scored].sum() / (num_items_in_batch or scored.sum())
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is that of all, and gradients are averaged
        return loss


def main(name: str, out: str, steps: int = 20, batch: int = 2) -> None:
    """Trains `name` at int4 and packs it to `out`."""
    (model, tokenizer), (teacher, _) = load_model(name, torch.float32), load_model(name)
    text = load_blocks(DataConfig(source="pydoc", tokens=16_384, block_size=256), tokenizer)
    llmqat.prepare(model, llmqat.QuantConfig.preset("int4", group_size=64))
    size = {"max_steps": steps, "per_device_train_batch_size": batch, "logging_steps": 1}
    args = llmqat.QATArguments(output_dir=f"{out}-run", learning_rate=1e-4, **size)
    ReverseKLTrainer(model=model, teacher=teacher, args=args, train_dataset=text.dataset()).train()
    llmqat.save(model, out, tokenizer)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))

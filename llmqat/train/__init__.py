"""Training: distillation of a prepared model from the original one, on transformers.Trainer."""

from llmqat.train.trainer import QATArguments, QATTrainer, processor_has_bf16

__all__ = ["QATArguments", "QATTrainer", "processor_has_bf16"]

"""Training: distillation of a prepared model from the original one, on transformers.Trainer."""

import llmqat.layers.lora  # noqa: F401 (first: it imports peft without bitsandbytes)
from llmqat.train.adapter import LoraSettings, is_own_teacher
from llmqat.train.arguments import QATArguments, check_batch, processor_has_bf16
from llmqat.train.distribution import check_distribution, whole_model
from llmqat.train.monitor import MonitorSettings, QuantizationMonitor
from llmqat.train.trainer import QATTrainer, choose_trained

__all__ = [
    "LoraSettings",
    "MonitorSettings",
    "QATArguments",
    "QATTrainer",
    "QuantizationMonitor",
    "check_batch",
    "check_distribution",
    "choose_trained",
    "is_own_teacher",
    "processor_has_bf16",
    "whole_model",
]

"""QATSFTTrainer: TRL's SFTTrainer for a prepared model: chat data, loss on the answers, distillation beside it.

TRL (the extra `trl`) reads the data: chat templates, loss on completions or on the assistant's turns alone, packing.
The loss is QATTrainer's: cross-entropy on the labels and forward KL from the original model, each by its weight.

    args = QATSFTConfig(output_dir="run", kl_weight=0.5, cross_entropy_weight=1.0, completion_only_loss=True)
    QATSFTTrainer(model=peft_model, args=args, train_dataset=data, processing_class=tokenizer).train()
"""

from __future__ import annotations

from dataclasses import dataclass, field

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError("supervised fine-tuning needs TRL; run `pip install trl`") from error

from llmqat.train.trainer import QATArguments, QATTrainer


@dataclass
class QATSFTConfig(QATArguments, SFTConfig):
    """trl.SFTConfig with the fields of QATArguments; both losses count by default."""

    cross_entropy_weight: float = field(
        default=1.0, metadata={"help": "Weight of the cross-entropy on the labels; 0 for distillation alone."}
    )


class QATSFTTrainer(QATTrainer, SFTTrainer):
    """trl.SFTTrainer whose loss is that of QATTrainer; takes what both take."""

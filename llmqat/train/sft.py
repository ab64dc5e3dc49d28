"""QATSFTTrainer: TRL's SFTTrainer for a prepared model: chat data, loss on the answers, distillation beside it.

From the command line, `llmqat train chat-lora-int4 data.path=chats.jsonl` does all of this, with held-out answers and a
table at the end. In Python, for those who have TRL's trainer in their code already:

    from peft import get_peft_model
    import llmqat
    from llmqat.calibrate import RangesStage, calibrate
    from llmqat.models import load_model

    model, tokenizer = load_model("MODEL")  # hub id, folder, .gguf file, or package:NAME/FILE.gguf
    calibrate(model, llmqat.QuantConfig.preset("int4", group_size=64), [RangesStage(method="mse")], None)
    model = get_peft_model(model, llmqat.lora_config(model, r=16, lora_alpha=32))
    args = llmqat.QATSFTConfig(output_dir="run", kl_weight=0.2, learning_rate=1e-3, max_steps=60)
    chats = llmqat.answer_rows("chats.jsonl", tokenizer)
    trainer = llmqat.QATSFTTrainer(model=model, args=args, train_dataset=chats, processing_class=tokenizer)
    trainer.train()
    llmqat.save(model.merge_and_unload(), "run/model", tokenizer)  # then: llmqat chat run/model

`answer_rows` reads the same data as a recipe, and finds the answers in the same way. A dataset in one of TRL's formats
works as well. TRL then applies the chat template. It takes the loss on the answers where it knows them: in completions,
or by assistant_only_loss with a template that marks them. The loss is that of QATTrainer: cross-entropy on the labels
and forward KL from the original model, each by its weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmqat.config import describe_fields
from llmqat.extras import check_installed
from llmqat.train.arguments import QATArguments
from llmqat.train.trainer import QATTrainer

check_installed("trl", "supervised fine-tuning with TRL's trainer")
from trl import SFTConfig, SFTTrainer  # noqa: E402

_OWN_LOSS = "it belongs to TRL's own loss, in whose place QATTrainer's stands; leave it out"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "loss_type": (("nll",), _OWN_LOSS),
    "router_aux_loss_coef": ((None, 0.0), _OWN_LOSS),
    "model_init_kwargs": ((None,), "the model is loaded and prepared already; load it with these, and leave it out"),
}
"""Field of trl.SFTConfig -> what it may be, and why it is nothing else."""

WORKS = (
    *("trust_remote_code", "chat_template_path", "eos_token", "pad_token", "activation_offloading"),
    *("dataset_text_field", "dataset_kwargs", "dataset_num_proc", "shuffle_dataset", "pad_to_multiple_of"),
    *("max_length", "truncation_mode", "packing", "packing_strategy", "padding_free", "eval_packing"),
    *("completion_only_loss", "assistant_only_loss"),
)
"""Fields of trl.SFTConfig, beyond those of TrainingArguments, that work as TRL says: it reads the data by them."""


@describe_fields
@dataclass
class QATSFTConfig(QATArguments, SFTConfig):
    """trl.SFTConfig with the fields of QATArguments; both losses count by default.

    Where transformers.TrainingArguments and trl.SFTConfig differ in a default, TRL's holds.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Initial learning rate, as in trl.SFTConfig."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs, as in trl.SFTConfig."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass, as in trl.SFTConfig."}
    )
    cross_entropy_weight: float = field(
        default=1.0, metadata={"help": "Weight of the cross-entropy on the labels; 0 for distillation alone."}
    )
    loss_type: str = field(
        default="nll", metadata={"help": "TRL's own loss, which is not used; older versions have another default."}
    )
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Part of TRL's own loss, likewise; older versions have another default."}
    )


class QATSFTTrainer(QATTrainer, SFTTrainer):
    """trl.SFTTrainer whose loss is that of QATTrainer."""

    def __init__(self, model: Any, teacher: Any = None, args: QATSFTConfig | None = None, **options: Any) -> None:
        """Takes what trl.SFTTrainer takes, and a teacher as QATTrainer does.

        Args:
            model: a prepared model, or peft's LoRA over one.
            teacher: the original model; None for `model` itself, or without KL.
            args: how long, how fast, and the weights of both losses.
            **options: of trl.SFTTrainer: train_dataset, processing_class, …

        Raises:
            ValueError: for what QATTrainer refuses, and for settings of TRL's own loss.
        """
        if not isinstance(args, QATSFTConfig):
            raise ValueError(
                f"args is a {type(args).__name__}; give a llmqat.QATSFTConfig, which says how losses count"
            )
        if isinstance(model, str):
            raise ValueError(f"model={model!r}: load the model and prepare it, then give it here")
        if options.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config: the model is loaded already; load it with this, and leave it out here"
            )
        if options.get("peft_config") is not None:
            raise ValueError(
                "peft_config: attach adapters first, peft.get_peft_model(model, llmqat.lora_config(model))"
            )
        for name, (allowed, reason) in REFUSED.items():
            if getattr(args, name) not in allowed:
                raise ValueError(f"{name}={getattr(args, name)!r} is refused: {reason}")
        super().__init__(model=model, teacher=teacher, args=args, **options)

"""Fine-tunes a model on chat data as int4: accelerate launch recipes/sft-int4.py MODEL DATA OUT [options].

MODEL is a hub id or folder, DATA what datasets.load_dataset takes, OUT a folder to make: OUT/model is packed.
Rows are `prompt` and `completion`, with the loss on the completion, or `messages`, with the loss on all of them (on the
assistant's by --assistant_only_loss true, where TRL knows the chat template). Options are the fields of trl.SFTConfig
and llmqat.QATArguments. LoRA is inside the quantizers, and the model itself is the teacher of the KL term.
"""

import datasets
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

import llmqat
from llmqat.calibrate import RangesStage, calibrate

if __name__ == "__main__":
    parser = HfArgumentParser(llmqat.QATSFTConfig)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.set_defaults(output_dir="checkpoints", kl_weight=0.2, learning_rate=1e-3, report_to="none")
    args, paths = parser.parse_args_into_dataclasses()
    set_seed(args.seed)  # of the adapters' start
    tokenizer = AutoTokenizer.from_pretrained(paths.model)
    model = AutoModelForCausalLM.from_pretrained(paths.model, dtype="bfloat16")
    quant = llmqat.QuantConfig.preset("int4", group_size=64)
    calibrate(model, quant, [RangesStage(method="mse")], None)
    model = get_peft_model(model, llmqat.lora_config(model, r=16, lora_alpha=32))
    data = datasets.load_dataset(paths.data, split="train")
    trainer = llmqat.QATSFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        llmqat.save(model.merge_and_unload(), f"{paths.out}/model", tokenizer)

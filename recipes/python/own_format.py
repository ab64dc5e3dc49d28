"""A format of your own: the codes and scales of a packed checkpoint as NumPy arrays.

    python own_format.py export CHECKPOINT --format npz --out model.npz

This script is the command line of llmqat with one format more.
"""

from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.cli import main
from llmqat.export import CONVERSIONS, stored_tensors


@CONVERSIONS.register("npz")
def write_npz(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> dict[str, int]:
    """Writes NAME.codes [O, I] and NAME.scale [O, G] of each quantized weight, and all others; returns bytes by part.

    Weight [o, i] is codes[o, i] * scale[o, i // (I // G)].
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name")
    weights, others = stored_tensors(model)
    if any(weight.packed_zeros is not None for weight in weights.values()):
        raise ValueError("npz holds no zero points; quantize with symmetric weights")
    parts = {
        "codes": {f"{name}.codes": weight.codes().numpy() for name, weight in weights.items()},
        "scales": {f"{name}.scale": weight.scale.float().numpy() for name, weight in weights.items()},
        "other": {name: tensor.float().numpy() for name, tensor in others.items()},
    }
    np.savez(path, **{name: array for part in parts.values() for name, array in part.items()})
    return {part: sum(array.nbytes for array in arrays.values()) for part, arrays in parts.items()}


if __name__ == "__main__":
    main()

"""A scheme of your own, by a name that every command and recipe takes.

    python own_scheme.py audit MODEL --scheme mine
    python own_scheme.py quantize MODEL --scheme mine --method search --out OUT
    python own_scheme.py train smollm2-135m-int4 quant=mine

This script is the command line of llmqat with one scheme more. `help(llmqat.QuantConfig)` lists what a scheme says.
"""

from llmqat import QuantConfig
from llmqat.cli import main
from llmqat.layers import PRESETS, WeightConfig

MINE = QuantConfig(
    weights=WeightConfig(num_bits=3, group_size=32),
    overrides={"re:.*down_proj": WeightConfig(num_bits=8, strategy="channel")},
    ignore=("re:.*layers.0.self_attn.*",),
)
PRESETS.register("mine", MINE)

if __name__ == "__main__":
    main()

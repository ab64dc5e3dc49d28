"""What makes decoding fast besides its kernels: attention in groups and, where it is compiled, fewer guards.

In most models several heads of queries share a head of keys and values. For one new token, transformers' "sdpa" lets
torch's CPU kernel read the keys anew for each of these; under torch.compile it even copies them. `decode_in_groups`
makes the queries that share keys the rows of one product: 26 microseconds a layer in place of 121 with 9 heads on 3,
64 wide, and 130 keys in bfloat16, on one thread.

torch checks before each call that nothing has changed since it compiled: in a packed model of 30 layers some ten
thousand guards, of which most say that a module still has its class and no new attribute. `is_checked` leaves those
that follow what may change: tensors and which of them are the same, what is passed in, and the settings of layers.

Letters: B batch, H heads, K heads of keys and values, L length of the cache, D and E head sizes.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmqat.layers.attention import IMPLEMENTATION_PREFIX, quantizing_implementation

GROUPED = "sdpa_in_groups"
"""transformers' "sdpa", with decoding in groups."""

_OWN = "sdpa"
_ASKS = re.compile(r"""_attn_implementation\b[^\n]*["']sdpa["']""")
_MODULES = re.compile(r"\._modules\[")
_KINDS = ("TENSOR_MATCH", "DUPLICATE_INPUT")
_CHANGING = re.compile(r"(\.kernel|\.enabled|\.training|\._runtime|\['log_scale'\])$")


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Returns attention as [B, 1, H, E], and None for its weights; transformers' own where it is not one new token.

    Args:
        module: the attention layer.
        query: [B, H, 1, D].
        key: [B, K, L, D]; H / K heads of queries share each.
        value: [B, K, L, E].
        mask: [B, 1, 1, L], or None.
        args: more of transformers' interface, as are `options`.
        options: `scaling` of the scores is read.
    """
    plain = not args and not any(options.get(name) for name in ("dropout", "softcap", "output_attentions"))
    bare = all(options.get(name) is None for name in ("position_bias", "cache"))
    if query.shape[2] != 1 or not (plain and bare) or (mask is not None and mask.shape[1] != 1):
        found: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS[_OWN](
            module, query, key, value, mask, *args, **options
        )
        return found
    rows = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    mixed = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=options.get("scaling"))
    return mixed.flatten(1, 2).unsqueeze(1), None


def decode_in_groups(model: PreTrainedModel) -> None:
    """Lets `model` attend by `grouped_attention` where its attention is "sdpa", its KV cache quantized or not.

    A model whose code compares the name of its attention with "sdpa" (DeepSeek V3.2 masks what it leaves out only then)
    stays as it is.
    """
    if any(map(_asks_for_sdpa, {type(module).__module__ for module in model.modules()})):
        return
    found = str(model.config._attn_implementation)
    if found == _OWN:
        model.set_attn_implementation(GROUPED)
    elif found == IMPLEMENTATION_PREFIX + _OWN:
        model.set_attn_implementation(quantizing_implementation(GROUPED))


@functools.cache
def _asks_for_sdpa(module: str) -> bool:
    """Returns whether the code of a Python module asks whether attention is called "sdpa", or cannot be read."""
    if module.partition(".")[0] in ("torch", "llmqat", "peft"):
        return False
    try:
        return _ASKS.search(inspect.getsource(sys.modules[module])) is not None
    except (KeyError, OSError, TypeError):
        return True


def is_checked(guards: Sequence[Any]) -> list[bool]:
    """Returns which of torch's guards stay: a `guard_filter_fn` for torch.compile.

    Guards on modules are dropped, with two exceptions. Guards on tensors stay. So do those on what may change in a
    layer between two calls: its weights, scales in training, its kernel, quantizers on or off. So a layer that is
    replaced, or given another forward, after the first compiled call is not noticed.
    """
    return [
        guard.guard_type in _KINDS or _MODULES.search(guard.name) is None or _CHANGING.search(guard.name) is not None
        for guard in guards
    ]


# At import, by which a model that was pickled finds them in another process.
ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS[_OWN])
for _name in (_OWN, GROUPED):
    quantizing_implementation(_name)

"""LoRA inside the quantizer: ŵ = fake_quantize(W + (alpha/r) B A), with peft's own adapters.

The adapter is part of the weight that is quantized. So the training forward has the codes of the merged weight. An
adapter added after the quantizer cannot be merged: rounding the sum again erases most of a small change.

peft can adapt a parameter (`LoraConfig.target_parameters`). Such an adapter on the weight of a QuantModule is inside
its quantizer. But peft computes B A in bfloat16 under autocast, which gives other codes than the merged weight. It also
needs a call of the wrapped module, and stacked experts are not called. So `adopt_adapters` makes the quantized weight
ask its adapters itself, in float32.

    config = lora_config(prepared, r=16)           # a peft.LoraConfig over all quantized weights
    model = peft.get_peft_model(prepared, config)
    adopt_adapters(model)                           # QATTrainer does it by itself
    ...
    merged = model.merge_and_unload()               # the codes stay; then llmqat.save(merged, folder)

Letters: O out features, I in features, E experts, r rank.
Source: LoRA (2106.09685) section 4.1, under the quantizer as in LLM-QAT's masters.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.extras import hidden
from llmqat.layers.embedding import QuantEmbedding
from llmqat.layers.packed import PackedLinear
from llmqat.layers.quantized import QuantModule, without_adapters
from llmqat.layers.source import forget_source

log = logging.getLogger(__name__)

with hidden("bitsandbytes"):  # which `import peft` imports, for a helper that nothing here calls
    import peft.import_utils
    from peft import LoraConfig
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import check_adapters_to_merge
peft.import_utils.is_bnb_available.cache_clear()  # it was cached as absent while hidden
peft.import_utils.is_bnb_4bit_available.cache_clear()
# An optimizer or a teacher in few bits may import bitsandbytes later. It then logs that a kernel is missing, which
# nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

WEIGHT = "weight"
"""Name of the parameter of a QuantModule that adapters are on."""
MOVES_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Values of LoraConfig.init_lora_weights that take the adapter's start out of the base weight."""


class QuantLora(ParamWrapper):
    """peft's LoRA on the weight of a QuantModule, which reads it inside its quantizer.

    Made of a ParamWrapper by `adopt_adapters`; names, state dict and all of peft's methods stay.
    """

    _before_merging: Tensor | None = None
    """The weight as it was, or its codes, while adapters are merged into it."""

    @property
    def layer(self) -> QuantModule | PackedLinear:
        """The quantized weight that is adapted."""
        layer = self.get_base_layer()
        assert isinstance(layer, (QuantModule, PackedLinear))
        return layer

    def factors(self) -> Iterator[nn.Parameter]:
        """Yields A and B of every adapter."""
        yield from self.lora_A.parameters()
        yield from self.lora_B.parameters()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns what the adapted layer gives: its weight asks for the adapters itself."""
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("a quantized weight has one adapter for all rows of a batch; leave adapter_names out")
        result: Tensor = self.base_layer(x, *args, **kwargs)
        return result

    def adapted(self, weight: Tensor) -> Tensor:
        """Returns `weight` with the active adapters added one after the other, in float32; as it is without any."""
        if self.disable_adapters and self.merged:
            self.unmerge()
            return self.layer.weight
        if self.disable_adapters or self.merged:
            return weight
        for name in self.active_adapters:
            if name in self.lora_A:
                weight = weight.float() + self.get_delta_weight(name)
        return weight

    def is_folded(self) -> bool:
        """Returns whether the adapters are merged into the weight; takes them out of it where they are switched off."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return bool(self.merged)

    def state(self) -> tuple[bool, bool, tuple[str, ...]]:
        """Returns what says which adapters count now."""
        return self.disable_adapters, self.merged, tuple(self.active_adapters)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Returns (alpha/r) B A in float32 and the weight's layout, whatever autocast says."""
        down, up = self.lora_A[adapter_name].weight.float(), self.lora_B[adapter_name].weight.float()
        with torch.autocast(down.device.type, enabled=False):
            if self.num_experts > 1:
                down = down.reshape(self.num_experts, -1, down.shape[-1])  # [E, r, I]
                up = up.reshape(up.shape[0], -1, self.num_experts).permute(2, 0, 1)  # [E, O, r]
                delta = torch.bmm(up, down)
                if not self._did_swap_in_out_features:
                    delta = delta.mT
            else:
                delta = up @ down
            delta = delta * self.scaling[adapter_name]
            return delta if delta.dim() == self._param_ndim else delta.view(self.layer.weight.shape)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters to the weight: its codes are those of the forward before.

        A master weight becomes float32. A packed weight gets the codes of the sum.

        Raises:
            ValueError: when a merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        for name in names:
            if not bool(torch.isfinite(self.get_delta_weight(name)).all()):
                raise ValueError(f"the adapter {name!r} makes a weight that is not finite; it cannot be merged")
        names = [*self.merged_adapters, *names]
        self.unmerge()
        weight = self.layer.base()
        for name in names:
            weight = weight + self.get_delta_weight(name)
        self._before_merging = self.layer.put_base(weight)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the weight back as it was before the adapters were merged, bit for bit."""
        if self._before_merging is not None:
            self.layer.put_back(self._before_merging)
            self._before_merging = None
        self.merged_adapters.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLora:
        """Moves what is kept aside, too."""
        super()._apply(fn, recurse)
        if self._before_merging is not None:
            self._before_merging = fn(self._before_merging)
        return self

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Returns the quantized weight alone, with or without the adapters in it."""
        if merge:
            self.merge(safe_merge, adapter_names)
        self._before_merging = None
        self.layer.adapters = ()
        return self.layer


def adopt_adapters(model: nn.Module) -> list[QuantLora]:
    """Puts peft's adapters of `model` inside the quantizers, in place; returns them.

    Args:
        model: a peft model whose base model is prepared, or that base model.

    Raises:
        ValueError: when an adapter is on a quantized embedding, on a parameter of a QuantModule other than `weight`, or
            on a weight that has one already; or when it starts from the rounding error (LoftQ).
    """
    _check_starts(without_adapters(model))
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, ParamWrapper):
            continue
        if not isinstance(module.get_base_layer(), (QuantModule, PackedLinear)):
            continue
        if isinstance(module.get_base_layer(), QuantEmbedding):
            raise ValueError(f"{name} is a quantized embedding, which takes no adapter; leave it out of the targets")
        if module.parameter_name != WEIGHT or isinstance(module.base_layer, ParamWrapper):
            raise ValueError(
                f"{name} adapts the parameter {module.parameter_name!r}; of a quantized weight, adapt 'weight' alone, "
                "once: llmqat.lora_config(model) names what can be adapted"
            )
        module.__class__ = QuantLora
        assert isinstance(module, QuantLora)
        module.layer.adapters = (module,)
        found.append(module)
    for layer in (module for module in model.modules() if isinstance(module, PackedLinear)):
        layer.shows_weight = False
    return found


def _check_starts(inner: nn.Module) -> None:
    """Warns of several adapters that share scales; raises ValueError for one that starts from the rounding error."""
    configs = getattr(inner, "peft_config", None) or {}
    if len(configs) > 1:
        log.warning(
            "adapters %s share the scales of the quantizers, so only the one whose scales were loaded or trained last "
            "gives what it was trained to give; load one adapter a model",
            ", ".join(configs),
        )
    for name, config in configs.items():
        start = getattr(config, "init_lora_weights", None)
        if start == "loftq":
            raise ValueError(
                f"adapter {name!r} has init_lora_weights='loftq': it starts as the rounding error, which repairs a "
                "weight beside the quantizer and adds to the error inside it; leave init_lora_weights out"
            )
        if isinstance(start, str) and start.startswith(MOVES_THE_BASE):
            forget_source(inner)


def lora_config(model: nn.Module, targets: Iterable[str] | None = None, **options: Any) -> LoraConfig:
    """Returns peft's configuration of adapters inside the quantizers of a prepared or packed `model`.

    Args:
        model: a prepared model, or a packed one, whose packed linear layers then wait for the adapters.
        targets: last parts of the names of layers, such as 'q_proj'; all quantized linear weights where not given.
        **options: of peft.LoraConfig: r, lora_alpha, use_rslora, … Names in rank_pattern and alpha_pattern are those of
            layers, or regular expressions. peft warns that they match no module, because they are to match weights.

    Raises:
        ValueError: for a target that no quantized weight has, and options that would put the adapter outside.
    """
    for key in ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"):
        if options.get(key) is not None:
            raise ValueError(
                f"{key} means modules, beside whose quantizers adapters would be, or is set here; use "
                "targets=['q_proj'], or full names such as 'model.layers.0.self_attn.q_proj'"
            )
    if options.get("lora_dropout"):
        raise ValueError(
            f"lora_dropout={options['lora_dropout']}: inside a quantizer the adapter is part of the weight, which has "
            "no input of its own to drop; leave lora_dropout out"
        )
    layers = [name for name, module in model.named_modules() if isinstance(module, (QuantModule, PackedLinear))]
    embedded = {id(getattr(model, "get_input_embeddings", lambda: None)())}
    layers = [name for name in layers if id(model.get_submodule(name)) not in embedded]
    if not layers:
        raise ValueError("the model has no quantized linear weight; call llmqat.prepare(model, config) first")
    wanted = None if targets is None else list(targets)
    for target in wanted or ():
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(f"targets has {target!r}, which no quantized weight is called; choose among {known}")
    suffixes = wanted if wanted is not None else sorted({name.rpartition(".")[2] for name in layers})
    named = [name for name in layers if any(name == part or name.endswith(f".{part}") for part in suffixes)]
    if _means_more(model, suffixes, layers):
        suffixes = named
    adapted = {name: model.get_submodule(name) for name in named}
    _show_weights({name: one for name, one in adapted.items() if isinstance(one, PackedLinear)}, options)
    for key in ("rank_pattern", "alpha_pattern"):  # peft looks for the names of weights in them
        if options.get(key):
            options[key] = {_of_weight(name): value for name, value in options[key].items()}
    return LoraConfig(target_modules=[], target_parameters=[f"{name}.{WEIGHT}" for name in suffixes], **options)


def _show_weights(layers: Mapping[str, PackedLinear], options: Mapping[str, Any]) -> None:
    """Lets peft find the weights of packed layers, which are no parameters, until adapters are adopted.

    Raises:
        ValueError: for weights whose levels or zeros the packed form does not hold, so that new codes would be others;
            or for options of peft that would move the base weight.
    """
    start = options.get("init_lora_weights")
    if layers and isinstance(start, str) and start.startswith(MOVES_THE_BASE):
        raise ValueError(
            f"init_lora_weights={start!r} takes the start of an adapter out of the weight under it, and "
            f"{next(iter(layers))} is packed; leave init_lora_weights out, or train the full-precision model"
        )
    for name, module in layers.items():
        if restriction := _restriction(module):
            raise ValueError(
                f"{name} {restriction}, and adapters would use all codes of {module.weights.label}; train adapters on "
                "the full-precision model, whose scheme says what to keep"
            )
        module.shows_weight = True


def _restriction(layer: PackedLinear) -> str:
    """Returns how the codes of a packed weight keep to a part of what its scheme has; empty where they do not.

    A checkpoint does not say that its integers are ternary, or that its zeros are to stay.
    """
    levels, bits = layer.levels(), layer.weights.num_bits
    if layer.weights.levels == "integer" and layer.weights.symmetric:
        if bits == 2 and bool((levels.abs() <= 1).all()):
            return "has the levels -1, 0 and 1 alone (ternary)"
        if bits == 3 and bool((levels % 2 == 1).all()):
            return "has the levels of int2-seq alone"
    for most, group in ((2, 4), (4, 8)):
        if levels.shape[1] % group == 0 and bool(((levels == 0).view(-1, group).sum(-1) >= group - most).all()):
            return f"has at most {most} weights of {group} that are not zero"
    return ""


def _of_weight(name: str) -> str:
    """Returns the name, or the pattern, of a layer as that of its weight."""
    if name.endswith(f".{WEIGHT}"):
        return name
    return f"{name}.{WEIGHT}" if re.fullmatch(r"[\w.]+", name) else rf"(?:{name})\.{WEIGHT}"


def _means_more(model: nn.Module, suffixes: list[str], layers: list[str]) -> bool:
    """Returns whether the last parts of names also mean weights that are not quantized."""
    known = set(layers)
    return any(
        f".{name}".endswith(f".{suffix}") and name not in known and hasattr(module, WEIGHT)
        for name, module in model.named_modules()
        for suffix in suffixes
    )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the adapters of `model` count for nothing; gradients that are asked for stay asked for."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled

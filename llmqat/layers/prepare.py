"""prepare: nn.Linear -> QuantLinear in place; convert: QuantLinear -> PackedLinear in place.

The two are exact inverses in value: what the prepared model computes with, the converted one stores.
"""

from __future__ import annotations

import torch
from torch import nn

from llmqat.layers.audit import CoverageAudit, audit
from llmqat.layers.config import QuantConfig, WeightConfig, matches
from llmqat.layers.linear import QuantLinear
from llmqat.layers.packed import PackedLinear

CONFIG_KEY = "llmqat"


def prepare(model: nn.Module, config: QuantConfig) -> CoverageAudit:
    """Replaces the targeted nn.Linear modules of `model` by QuantLinear, in place, sharing their weights.

    The output head and whatever is tied to another parameter are left alone. The configuration is kept in
    `model.config.llmqat`, so that a checkpoint of the prepared model explains itself.

    Args:
        model: any module; works on the meta device.
        config: what to quantize and how.

    Returns:
        The coverage audit: every parameter tensor, quantized how, or left alone and why.

    Raises:
        ValueError: when the model is prepared already, a target, ignore or override matches nothing, or a group size
            does not divide. The model is then unchanged.
    """
    if any(isinstance(module, (QuantLinear, PackedLinear)) for module in model.modules()):
        raise ValueError("the model is prepared already; prepare the original model, or load it anew")
    schemes, reasons = _plan(model, config)
    replacements = {
        name: QuantLinear.from_linear(_linear(model, name), scheme, name) for name, scheme in schemes.items()
    }
    for name, module in replacements.items():
        model.set_submodule(name, module)
    if hasattr(model, "config"):
        setattr(model.config, CONFIG_KEY, config.model_dump(mode="json"))
    return audit(model, reasons)


def convert(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Replaces every QuantLinear of `model` by its PackedLinear, in place, and casts what remains to `dtype`.

    Args:
        model: a prepared model.
        dtype: of scales, biases and the parameters left in high precision.

    Returns:
        `model`.

    Raises:
        ValueError: when the model holds no QuantLinear.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError("the model has no QuantLinear to convert; call llmqat.prepare(model, config) first")
    for name, layer in layers.items():
        model.set_submodule(name, PackedLinear.from_quant_linear(layer, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model


def _plan(model: nn.Module, config: QuantConfig) -> tuple[dict[str, WeightConfig], dict[str, str]]:
    """Returns the scheme of each module to quantize, and for each linear left alone the reason."""
    _check_patterns(model, config)
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    schemes: dict[str, WeightConfig] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        scheme, reason = _scheme(name, module, config)
        others = [other for other in uses[id(module.weight)] if other != f"{name}.weight"]
        if module is head:
            reasons[name] = "output head, left alone by default"
        elif others:
            reasons[name] = f"its weight is tied to {others[0]}"
        elif scheme is None:
            reasons[name] = reason
        else:
            schemes[name] = scheme
    if not schemes:
        raise ValueError(
            f"nothing is left to quantize: quant.targets={list(config.targets)} without quant.ignore, the output head "
            "and null overrides covers no nn.Linear; widen quant.targets or shorten quant.ignore"
        )
    return schemes, reasons


def _scheme(name: str, module: nn.Linear, config: QuantConfig) -> tuple[WeightConfig | None, str]:
    ignored = next((pattern for pattern in config.ignore if matches(pattern, name, module)), None)
    if ignored is not None:
        return None, f"quant.ignore has {ignored!r}"
    for pattern, scheme in reversed(config.overrides.items()):
        if matches(pattern, name, module):
            return scheme, f"quant.overrides[{pattern!r}] is null"
    if any(matches(pattern, name, module) for pattern in config.targets):
        return config.weights, ""
    return None, "no quant.targets entry matches it"


def _check_patterns(model: nn.Module, config: QuantConfig) -> None:
    """Raises ValueError for a pattern that matches no nn.Linear: a typing error would otherwise pass in silence."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for field, patterns in (
        ("targets", config.targets),
        ("ignore", config.ignore),
        ("overrides", tuple(config.overrides)),
    ):
        for pattern in patterns:
            if not any(matches(pattern, name, module) for name, module in linears.items()):
                examples = ", ".join(list(linears)[:3]) or "none"
                raise ValueError(
                    f"quant.{field} has {pattern!r}, which matches no nn.Linear of {type(model).__name__}; use a class "
                    f"name, a full module name or 're:<regular expression>'. Linears here: {examples}, …"
                )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not an nn.Linear")
    return module

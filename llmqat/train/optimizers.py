"""Optimizers: what every `optim` that transformers knows does here, and what is asked of one that a user gives.

Weights, log-scales, zero points and norms are parameter groups with learning rates of their own. An optimizer that
makes its own groups (GaLore, APOLLO) or steps within the backward pass (LOMO, layer-wise ones) would not see these
rates, so it is refused. Optimizers with two sets of weights (schedule-free) are switched to the set that is to be kept
before anything is saved, evaluated or handed back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmqat.extras import check_installed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerFacts:
    """What is known of one value of `optim`."""

    package: str | None = None
    """Module that it needs beyond llmqat's own dependencies."""
    args: tuple[str, ...] = ()
    """Keys that it reads from `optim_args`."""
    refused: str | None = None
    """Why it is refused."""


_ADAM = OptimizerFacts()
_MIX = OptimizerFacts(args=("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"))
_FREE = OptimizerFacts("schedulefree", args=("weight_lr_power", "r"))
_TORCHAO = OptimizerFacts("torchao")
_OWN_GROUPS = OptimizerFacts(
    refused="it makes parameter groups of its own, with one learning rate for weights and scales; choose adamw_torch, "
    "or adamw_bnb_8bit for a quarter of the memory"
)
_IN_BACKWARD = OptimizerFacts(
    refused="it steps within the backward pass, with one learning rate for weights and scales; choose adamw_torch, or "
    "adamw_bnb_8bit for a quarter of the memory"
)

OPTIMIZERS: dict[str, OptimizerFacts] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor"), _ADAM),
    "sgd": OptimizerFacts(args=("momentum", "dampening", "nesterov")),
    "adagrad": OptimizerFacts(args=("lr_decay", "eps")),
    "rmsprop": OptimizerFacts(args=("momentum", "alpha", "eps", "centered")),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"), _ADAM),
    **dict.fromkeys(("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit"), _ADAM),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), _ADAM),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), _MIX),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), _TORCHAO),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"), _FREE),
    "grokadamw": OptimizerFacts(
        "grokadamw",
        args=("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    ),
    "stable_adamw": OptimizerFacts("optimi", args=("max_lr", "kahan_sum", "decouple_lr")),
    **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"), _OWN_GROUPS),
    **dict.fromkeys(
        (
            "galore_adamw_layerwise",
            "galore_adamw_8bit_layerwise",
            "galore_adafactor_layerwise",
            "apollo_adamw_layerwise",
            "lomo",
            "adalomo",
        ),
        _IN_BACKWARD,
    ),
    "adamw_torch_xla": OptimizerFacts(refused="llmqat does not train on TPUs; choose adamw_torch"),
    "adamw_torch_npu_fused": OptimizerFacts(refused="it was never tried on NPUs; choose adamw_torch"),
    "adamw_anyprecision": OptimizerFacts(refused="torchdistx, which it needs, is no longer made; choose adamw_torch"),
}
"""Value of `optim` -> what is known of it. A test compares the keys with transformers' own list."""


def check_optimizer(optim: str, optim_args: str | None, warmup_steps: float) -> str | None:
    """Returns what is wrong with `optim` and its `optim_args`, or None.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    name = str(getattr(optim, "value", optim))
    facts = OPTIMIZERS.get(name)
    if facts is None:
        return f"optim={name!r} is not known to llmqat; choose one of {', '.join(sorted(OPTIMIZERS))}"
    if facts.refused is not None:
        return f"optim={name!r} is refused: {facts.refused}"
    if facts.package is not None:
        check_installed(facts.package, f"optim={name!r}")
    if facts is _FREE and 0 < warmup_steps < 1:
        return f"warmup_steps={warmup_steps} with optim={name!r}, which counts steps itself: give a whole number"
    for entry in (optim_args or "").replace(" ", "").split(","):
        key, separator, _ = entry.partition("=")
        if entry and (not separator or key not in facts.args):
            allowed = ", ".join(f"{known}=VALUE" for known in facts.args) or "none at all"
            return f"optim_args={optim_args!r}: optim={name!r} does not read {entry!r}; it takes {allowed}"
    return None


def check_own_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises ValueError where an optimizer that the user has made holds parameters that `model` does not train."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = [parameter for parameter in held if id(parameter) not in names and parameter.requires_grad]
    if foreign or not names.keys() & {id(parameter) for parameter in held}:
        raise ValueError(
            f"optimizers: {len(foreign)} of the {len(held)} parameters that the optimizer holds are not of the model "
            "that is trained; make the optimizer after llmqat.prepare (and after peft), over model.parameters()"
        )
    left = [name for key, name in names.items() if key not in {id(parameter) for parameter in held}]
    if left:
        logger.warning("the optimizer given leaves %d parameters that could train as they are: %s", len(left), left[:4])


def keep_weights_of(optimizer: Any) -> None:
    """Puts the evaluation weights of `optimizer` into the model, where it has two sets of weights (schedule-free)."""
    switch = getattr(optimizer, "eval", None)
    if callable(switch):
        switch()

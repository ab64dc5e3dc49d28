"""`prepare` replaces linear maps, embeddings and attention by fake-quantized forms, in place; `convert` packs these.

Both models compute with the same numbers: the quantized weights of the prepared model are what the packed one stores.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmqat.kernels import WeightPages
from llmqat.layers.attention import (
    KVQuantizer,
    attention_layers,
    check_kv_groups,
    heads_with_scales,
    quantize_kv,
)
from llmqat.layers.audit import (
    DROPPED,
    IDLE,
    LATTICE,
    REASONS,
    ROUTER,
    SHARE,
    UNTIED,
    CoverageAudit,
    audit,
    is_asked_for,
    lattice_note,
)
from llmqat.layers.buffers import note_buffers
from llmqat.layers.config import POLICY_WEIGHTS, LayerScheme, Override, Policy, QuantConfig
from llmqat.layers.embedding import PackedEmbedding, QuantEmbedding, TiedHead
from llmqat.layers.experts import PackedExperts, QuantExperts, replace_stacked, stacked_weights
from llmqat.layers.finite import check_held, check_packable, check_parameters
from llmqat.layers.kept import RangedModule
from llmqat.layers.linear import QuantLinear, let_read
from llmqat.layers.originals import check_original, dropped_note
from llmqat.layers.packed import PackedLinear, PackedModule
from llmqat.layers.quantized import QuantModule, without_adapters
from llmqat.layers.roles import (
    Reader,
    Trial,
    end_of,
    is_of_experts,
    is_router_by_place,
    modules_around,
    possible_stacks,
    tried,
    unreached,
)
from llmqat.layers.source import SOURCE, Checksum, changed_since, note_source

logger = logging.getLogger(__name__)

CONFIG_KEY = "llmqat"

ADAPTED = ".base_layer."
"""Part of the name of a module that peft has put an adapter around."""

LINEAR_SUBCLASSES = ("FalconLinear",)
"""nn.Linear subclasses whose own forward computes the same as nn.Linear's."""


@dataclass(frozen=True)
class LinearMap:
    """A linear map of a model: a module, or a stacked parameter of experts.

    Attributes:
        kinds: the class names by which a configuration may mean it.
        weight: its weight.
        owner: the module, or the experts module that holds the stacked parameter.
        stacked: whether it is a stacked parameter.
        transposed: whether that lies as [E, I, O].
        refusal: why it cannot be quantized; empty when it can.
        idle: the outermost module around it that text does not reach; empty where it runs.
    """

    kinds: tuple[str, ...]
    weight: Tensor
    owner: nn.Module
    stacked: bool = False
    transposed: bool = False
    refusal: str = ""
    idle: str = ""


@dataclass
class _Plan:
    schemes: dict[str, LayerScheme] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def prepare(model: nn.Module, config: QuantConfig) -> CoverageAudit:
    """Replaces the targeted linear maps of `model` (and embeddings, if asked for) by fake-quantized ones, in place.

    Weights are shared, not copied. The output head, embeddings and whatever is tied to another parameter are left
    alone unless `config.embeddings` or `config.lm_head` says otherwise; routers of experts always are. With
    `config.kv_cache` the attention layers read quantized keys and values. The configuration is kept in
    `model.config.llmqat`, so that a checkpoint of the prepared model explains itself.

    Args:
        model: any module; works on the meta device. A model that peft has put LoRA on (`lora.py`) is prepared under
            its adapters, which are then inside the quantizers.
        config: what to quantize and how.

    Returns:
        The coverage audit: every parameter tensor, quantized how, or left alone and why.

    Raises:
        ValueError: when the model is prepared already, a target, ignore or override matches nothing, a group size does
            not divide, the KV cache or the embeddings cannot be quantized, an adapter is beside the quantizer, a
            parameter holds NaN or infinity, the model is quantized already or offloaded, or a buffer was changed. The
            model is then unchanged, unless peft has put an adapter on it that a quantizer cannot have inside.
    """
    if (inner := without_adapters(model)) is not model:
        return prepare(inner, config)
    if any(isinstance(module, (QuantModule, PackedModule, KVQuantizer)) for module in model.modules()):
        raise ValueError("the model is prepared already; prepare the original model, or load it anew")
    check_original(model)
    check_parameters(model)
    trial = tried(model)
    maps = _with_roles(model, linear_maps(model), trial)
    plan = _plan(model, maps, config)
    _check_unchanged(maps, trial)
    replacements = _all_quantized(model, maps, plan.schemes)
    _check_zeros(replacements.values())
    replacements |= _quantized_ends(model, config)
    if config.kv_cache is not None:
        check_kv_groups(attention_layers(model), config.kv_cache)
        heads_with_scales(model, config.kv_cache)
    if not replacements and config.kv_cache is None:
        raise ValueError(
            f"nothing is left to quantize: quant.targets={list(config.targets)} without quant.ignore, skipped layers, "
            "the output head and null overrides covers no linear layer; widen quant.targets or shorten quant.ignore"
        )
    note_buffers(model)
    note_source(model)
    for name, module in replacements.items():
        readers = trial.readers.get(id(_found(model, name)), [])
        install(model, name, module)
        if readers and isinstance(module, QuantLinear):
            _let_read(model, name, module, readers)
    if config.kv_cache is not None:
        quantize_kv(model, config.kv_cache)
    if any(_has_adapter(module) for module in model.modules()):
        from llmqat.layers.lora import adopt_adapters

        adopt_adapters(model)
    if hasattr(model, "config"):
        setattr(model.config, CONFIG_KEY, config.model_dump(mode="json"))
        # save_pretrained would otherwise split experts into the tensors that the original checkpoint had, scales and
        # all, and a Trainer would not find them again when it resumes.
        model._weight_conversions = []  # type: ignore[assignment]
    model.__dict__[REASONS], model.__dict__[DROPPED] = plan.reasons, dropped_note(model)
    model.__dict__[LATTICE] = lattice_note(model)
    report = audit(model)
    _log_notes(model, report)
    return report


def _log_notes(model: nn.Module, report: CoverageAudit) -> None:
    for note in report.notes:
        if note in (getattr(model, DROPPED), getattr(model, LATTICE)):
            logger.info("%s", note)
        elif note.startswith((SHARE, IDLE)):
            expected = note.startswith(IDLE) or is_asked_for(model, report.entries)
            logger.log(logging.INFO if expected else logging.WARNING, "%s", note)


def convert(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Replaces every quantized weight of `model` by its packed form, in place, and casts what remains to `dtype`.

    Packed weights whose scales were trained (`PackedModule.train_scales`) take those scales.

    Args:
        model: a prepared model, or a packed one, whose scales may have been trained.
        dtype: of scales, biases and the parameters left in high precision.

    Returns:
        `model`.

    Raises:
        ValueError: when the model holds no quantized weight, adapters that are not merged, numbers that are not
            finite, or scales that `dtype` would round.
    """
    check_merged(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    trained = {n: m for n, m in model.named_modules() if isinstance(m, PackedModule) and m.log_scale is not None}
    if not layers and not any(isinstance(module, PackedModule) for module in model.modules()):
        raise ValueError("the model has no quantized weight to convert; call llmqat.prepare(model, config) first")
    check_parameters(model)
    for name, module in trained.items():
        check_packable(name, module, module.dtype)
        module.fold_scales()
    for name, layer in layers.items():
        check_packable(name, layer, dtype)
    heads = {name: module for name, module in model.named_modules() if isinstance(module, TiedHead)}
    packed = {id(layer): packed_form(layer, dtype) for layer in layers.values()}
    for name, layer in layers.items():
        install(model, name, packed[id(layer)])
    for name, head in heads.items():
        if isinstance(head.embedding, PackedEmbedding):
            continue
        embedding = packed[id(head.embedding)]
        assert isinstance(embedding, PackedEmbedding)
        model.set_submodule(name, TiedHead(embedding, head.bias))
    in_float32 = kept_in_float32(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not in_float32(name):
                check_held(name, parameter, dtype)
                parameter.data = parameter.data.to(dtype)
    refuse_save_pretrained(model)
    return model


def refuse_save_pretrained(model: nn.Module) -> None:
    """Makes `save_pretrained` and `push_to_hub` of `model` say that packed models are written by `llmqat.save`."""
    model.__dict__.update(dict.fromkeys(_REFUSED, _refuse))


@contextmanager
def save_pretrained_allowed(model: nn.Module) -> Iterator[None]:
    """Inside, `model.save_pretrained` writes what the model holds in memory, for checkpoints of a training."""
    refused = {name: model.__dict__.pop(name) for name in _REFUSED if name in model.__dict__}
    try:
        yield
    finally:
        model.__dict__.update(refused)


_REFUSED = ("save_pretrained", "push_to_hub")


def _refuse(*_: object, **__: object) -> None:
    raise ValueError(
        "the model is packed, and save_pretrained would write its weights as they lie in memory, under a configuration "
        "that says how they lie on disk; call llmqat.save(model, folder, tokenizer), and `llmqat push` for the hub"
    )


def check_merged(model: nn.Module) -> None:
    """Raises ValueError where `model` has adapters of peft on it, merged or not."""
    if any(_has_adapter(module) for module in model.modules()):
        raise ValueError("the model has LoRA adapters; fold them first: model = model.merge_and_unload()")


def packed_form(layer: QuantModule, dtype: torch.dtype) -> PackedModule:
    """Returns the packed form of a quantized weight; scales and bias are stored in `dtype`."""
    return _PACKERS[type(layer)](layer, dtype)


_PACKERS: dict[type[QuantModule], Callable[..., PackedModule]] = {
    QuantLinear: PackedLinear.from_quant_linear,
    QuantEmbedding: PackedEmbedding.from_quant_embedding,
    QuantExperts: PackedExperts.from_quant_experts,
}


def install(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the module, or the stacked parameter, `name` of `model`."""
    if name and getattr(_found(model, name), UNTIED, False):
        setattr(module, UNTIED, True)
    if isinstance(module, (QuantExperts, PackedExperts)):
        owner, _, leaf = name.rpartition(".")
        replace_stacked(model.get_submodule(owner), leaf, module)
    else:
        model.set_submodule(name, module)
    if isinstance(module, TiedHead):  # it reads the embedding's weight, and takes no copy of it at loading
        untied_keys(model, f"{name}.weight")


def untied_keys(model: nn.Module, name: str) -> None:
    """Makes transformers forget that the parameter `name` of this `model` is tied to another."""
    for table in ("_tied_weights_keys", "all_tied_weights_keys"):
        tied = getattr(model, table, None)
        if isinstance(tied, Mapping):
            setattr(model, table, {target: source for target, source in tied.items() if target != name})


def _check_unchanged(maps: Mapping[str, LinearMap], trial: Trial) -> None:
    """Raises ValueError where the model's forward changes weights by itself, which no checkpoint could follow."""
    changed = [name for name, entry in maps.items() if id(entry.owner) in trial.changed]
    if changed:
        reader = trial.readers[id(maps[changed[0]].owner)][0].module
        raise ValueError(
            f"{type(reader).__name__} changes the weight of {changed[0]} in its forward in evaluation mode, so what is "
            "trained is not what is saved; switch that off in the model's configuration (RWKV: rescale_every=0)"
        )


def _let_read(model: nn.Module, name: str, layer: QuantLinear, readers: list[Reader]) -> None:
    """Makes the weight of the layer `name` readable by the modules around it whose code does."""
    layer.values_read = any(reader.values for reader in readers)
    parts = name.split(".")
    outwards = modules_around(model, name)
    for reader in readers:
        depth = next((depth for depth, outer in enumerate(outwards) if outer is reader.module), None)
        if depth is not None:
            let_read(reader.module, ".".join(parts[depth:]))


def kept_in_float32(model: nn.Module) -> Callable[[str], bool]:
    """Returns the test by which transformers keeps a tensor in float32 in every checkpoint, given its name.

    Few models have such tensors: the routing biases of some mixtures of experts.
    """
    patterns = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    combined = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)) or r"(?!)")
    return lambda name: combined.search(name) is not None


def _found(model: nn.Module, name: str) -> nn.Module | None:
    """Returns the module `name`, or None where a parameter has that name."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def linear_maps(model: nn.Module) -> dict[str, LinearMap]:
    """Returns every linear map of `model` by name: nn.Linear and Conv1D modules, stacked weights of experts."""
    found: dict[str, LinearMap] = {}
    inside = tuple(f"{name}." for name, module in model.named_modules() if _has_adapter(module))
    for name, module in model.named_modules():
        if name.startswith(inside) and not f"{name}.".endswith(ADAPTED):
            continue  # the adapter's own
        if isinstance(module, (nn.Linear, Conv1D)):
            kinds = ("Linear", type(module).__name__)
            found[name] = LinearMap(kinds, module.weight, module, refusal=_refusal(model, name, module))
        for leaf, parameter in stacked_weights(module).items():
            kinds = ("Linear", type(module).__name__)
            transposed = bool(module.is_transposed)
            found[f"{name}.{leaf}" if name else leaf] = LinearMap(kinds, parameter, module, True, transposed)
    return found


def _with_roles(model: nn.Module, maps: Mapping[str, LinearMap], trial: Trial) -> dict[str, LinearMap]:
    """Returns `maps` and the stacked experts that `trial` has found, each with its reason to be left alone, if any."""
    found = dict(maps)
    for name, module in model.named_modules():
        for leaf, parameter in possible_stacks(module).items():
            path = f"{name}.{leaf}" if name else leaf
            layout = trial.layouts.get((id(module), leaf), set())
            if path in found or not is_of_experts(model, path):
                continue
            unknown = "its forward does not show which of its dimensions are the inputs"
            kinds, refusal = ("Linear", type(module).__name__), "" if len(layout) == 1 else unknown
            found[path] = LinearMap(kinds, parameter, module, True, layout == {True}, refusal)
    idle = unreached(model, trial, [name for name, entry in found.items() if not entry.stacked])
    in_float32 = kept_in_float32(model)
    for name, entry in found.items():
        reason = entry.refusal
        if not entry.stacked:
            reason = reason or _told_by_trial(model, name, entry.owner, trial)
        if not reason and in_float32(name if entry.stacked else f"{name}.weight"):
            reason = f"{type(model).__name__} keeps it in float32"
        found[name] = replace(entry, refusal=reason, idle=idle.get(name, ""))
    return found


def _told_by_trial(model: nn.Module, name: str, layer: nn.Module, trial: Trial) -> str:
    """Returns why a linear layer is left alone, by what a tiny forward has shown; empty where it may be quantized."""
    if id(layer) in trial.routers:
        return ROUTER
    readers = [reader for reader in trial.readers.get(id(layer), []) if reader.values]
    changing = [reader for reader in readers if reader.changes]
    if changing:
        return f"{type(changing[0].module).__name__} changes its weight"
    ran = id(layer) in trial.ran if not trial.failure else not readers
    if readers and not ran:
        return f"{type(readers[0].module).__name__} reads its weight, and does not call it"
    if id(layer) in trial.lost:
        return "its output is part of no logit"
    around = {id(outer) for outer in modules_around(model, name)}
    beside = next((reader for reader in trial.readers.get(id(layer), []) if id(reader.module) not in around), None)
    return f"{type(beside.module).__name__} reads its weight from elsewhere" if beside else ""


def plain_name(name: str) -> str:
    """Returns the dotted name that a module or parameter has without peft's adapters around it."""
    return f"{name}.".replace(ADAPTED, ".").removesuffix(".")


def matches(pattern: str, name: str, kinds: tuple[str, ...]) -> bool:
    """Returns whether `pattern` (class name, dotted name, or `re:` regular expression) means this linear map."""
    name = plain_name(name)
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name or pattern in kinds


def block_index(model: nn.Module, name: str) -> tuple[int, int] | None:
    """Returns which transformer layer the module `name` lies in, and of how many; None outside of layers.

    A layer is an entry of the outermost ModuleList on the way to the module.
    """
    module, parts = model, name.split(".")
    for depth, part in enumerate(parts[:-1]):
        module = getattr(module, part)
        if isinstance(module, nn.ModuleList):
            return int(parts[depth + 1]), len(module)
    return None


def _refusal(model: nn.Module, name: str, module: nn.Module) -> str:
    """Returns why a linear layer is never quantized; empty when it may be."""
    if is_router_by_place(model, name):
        return ROUTER
    kind = type(module)
    if not module.weight.is_floating_point():  # type: ignore[operator]
        return f"{kind.__name__} holds integers already"
    own = isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward
    if own and kind.__name__ not in LINEAR_SUBCLASSES:
        return f"{kind.__name__} has a forward of its own"
    return ""


def _plan(model: nn.Module, maps: Mapping[str, LinearMap], config: QuantConfig) -> _Plan:
    """Returns the scheme of each linear map to quantize, and for each one left alone the reason."""
    _check_patterns(model, maps, config)
    heads = [end for end in (end_of(model, "get_output_embeddings"), end_of(model, "get_input_embeddings")) if end]
    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    plan = _Plan()
    for name, entry in maps.items():
        scheme, reason = _scheme(model, name, entry, config)
        others = [other for other in uses[id(entry.weight)] if other not in (name, f"{name}.weight")]
        if any(entry.owner is head for head in heads):
            plan.reasons[name] = "output head, left alone by default"
        elif others:
            plan.reasons[name] = f"its weight is tied to {others[0]}"
        elif entry.refusal or scheme is None:
            plan.reasons[name] = entry.refusal or reason
        elif entry.idle and not _is_named(name, maps, config):
            plan.reasons[name] = f"{IDLE} {entry.idle}"
        else:
            _check_adapter(model, name, entry)
            plan.schemes[name] = scheme
    return plan


def _is_named(name: str, maps: Mapping[str, LinearMap], config: QuantConfig) -> bool:
    """Returns whether the user asks for this linear map: by a pattern that matches only maps text does not reach."""
    wanted = (pattern for pattern, override in config.overrides.items() if override is not None)
    return any(
        matches(pattern, name, maps[name].kinds)
        and all(entry.idle for other, entry in maps.items() if matches(pattern, other, entry.kinds))
        for pattern in (*config.targets, *wanted)
    )


def _has_adapter(module: nn.Module) -> bool:
    """Returns whether `module` is peft's wrapper of another module."""
    return hasattr(module, "get_base_layer")


def _check_adapter(model: nn.Module, name: str, entry: LinearMap) -> None:
    """Raises ValueError where an adapter around a weight to quantize would be beside its quantizer."""
    owner = name.rpartition(".")[0] if entry.stacked else name
    if not owner.endswith(ADAPTED[:-1]):
        return
    wrapper = model.get_submodule(owner.removesuffix(ADAPTED[:-1]))
    if entry.stacked:
        raise ValueError(f"{name} has adapters already; prepare a mixture of experts first, then call get_peft_model")
    if getattr(wrapper, "parameter_name", None) is None:
        raise ValueError(
            f"{name.removesuffix(ADAPTED[:-1])} has a {type(wrapper).__name__} adapter beside its weight, which could "
            "not be folded into the codes; use LoraConfig(target_modules=[], target_parameters=['q_proj.weight', …]), "
            "or merge the adapter first"
        )


def _scheme(model: nn.Module, name: str, entry: LinearMap, config: QuantConfig) -> tuple[LayerScheme | None, str]:
    ignored = next((pattern for pattern in config.ignore if matches(pattern, name, entry.kinds)), None)
    if ignored is not None:
        return None, f"quant.ignore has {ignored!r}"
    place = block_index(model, name)
    if place is not None and place[0] < config.skip_first:
        return None, f"quant.skip_first={config.skip_first}"
    if place is not None and place[0] >= place[1] - config.skip_last:
        return None, f"quant.skip_last={config.skip_last}"
    default = LayerScheme(weights=config.weights, input_activations=config.input_activations)
    if (found := _override_of(name, entry, config, place)) is not None:
        pattern, override = found
        if override is None:
            return None, f"quant.overrides[{pattern!r}] is null"
        weights = default.weights if override.weights == "default" else override.weights
        inputs = default.input_activations if override.input_activations == "default" else override.input_activations
        return LayerScheme(weights=weights, input_activations=inputs), ""
    if any(matches(pattern, name, entry.kinds) for pattern in config.targets):
        return default, ""
    return None, "no quant.targets entry matches it"


def overridden(model: nn.Module, config: QuantConfig) -> set[str]:
    """Returns the linear maps of a model, not prepared yet, that an entry of `config.overrides` is for."""
    return {
        name
        for name, entry in linear_maps(model).items()
        if _override_of(name, entry, config, block_index(model, name)) is not None
    }


def _override_of(
    name: str, entry: LinearMap, config: QuantConfig, place: tuple[int, int] | None
) -> tuple[str, Override | None] | None:
    """Returns the last entry of `config.overrides` that is for a linear map; None where none is."""
    for pattern, override in reversed(config.overrides.items()):
        if matches(pattern, name, entry.kinds) and (override is None or _in_layers(override.layers, place)):
            return pattern, override
    return None


def _in_layers(layers: tuple[int, ...] | None, place: tuple[int, int] | None) -> bool:
    if layers is None:
        return True
    return place is not None and bool({place[0], place[0] - place[1]} & set(layers))


def _check_patterns(model: nn.Module, maps: Mapping[str, LinearMap], config: QuantConfig) -> None:
    """Raises ValueError for a pattern that matches no linear map: a typing error would otherwise pass in silence."""
    for owner, patterns in (
        ("targets", config.targets),
        ("ignore", config.ignore),
        ("overrides", tuple(config.overrides)),
    ):
        for pattern in patterns:
            if not any(matches(pattern, name, entry.kinds) for name, entry in maps.items()):
                examples = ", ".join(plain_name(name) for name in list(maps)[:3]) or "none"
                raise ValueError(
                    f"quant.{owner} has {pattern!r}, which matches no linear layer of {type(model).__name__}; use a "
                    f"class name, a full module name or 're:<regular expression>'. Linears here: {examples}, …"
                )
    _check_head(model, maps, config)
    for pattern, override in config.overrides.items():
        if override is None or override.layers is None:
            continue
        if not any(
            matches(pattern, name, entry.kinds) and _in_layers(override.layers, block_index(model, name))
            for name, entry in maps.items()
        ):
            raise ValueError(
                f"quant.overrides[{pattern!r}].layers={list(override.layers)} matches no layer of "
                f"{type(model).__name__}; layers count from 0, or from the end if negative"
            )


def _check_head(model: nn.Module, maps: Mapping[str, LinearMap], config: QuantConfig) -> None:
    """Raises ValueError where a pattern means the output head alone, which `quant.lm_head` decides about."""
    head = end_of(model, "get_output_embeddings")
    names = [name for name, entry in maps.items() if entry.owner is head]
    if not names:
        return
    wanted = tuple(pattern for pattern, override in config.overrides.items() if override is not None)
    for owner, patterns in (("targets", config.targets), ("overrides", wanted)):
        for pattern in patterns:
            if [name for name, entry in maps.items() if matches(pattern, name, entry.kinds)] == names:
                raise ValueError(
                    f"quant.{owner} has {pattern!r}, which is the output head; quantize that with quant.lm_head"
                )
    if config.lm_head not in (None, "keep") and any(
        matches(pattern, names[0], maps[names[0]].kinds) for pattern in config.ignore
    ):
        raise ValueError(
            f"quant.lm_head={config.lm_head!r}, but quant.ignore leaves {names[0]} alone; drop one of them"
        )


def _quantized(name: str, entry: LinearMap, scheme: LayerScheme) -> QuantModule:
    if not entry.stacked:
        return QuantLinear.from_linear(entry.owner, scheme.weights, name, scheme.input_activations)
    return QuantExperts(entry.weight, scheme.weights, name, entry.transposed).train(entry.owner.training)


# Embeddings and output head


def _quantized_ends(model: nn.Module, config: QuantConfig) -> dict[str, nn.Module]:
    """Returns the quantized token embedding and output head that `config` asks for, by name."""
    embedding, head = end_of(model, "get_input_embeddings"), end_of(model, "get_output_embeddings")
    if config.embeddings == "keep" and config.lm_head in (None, "keep"):
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    tied = embedding is not None and head is not None and head.weight is embedding.weight
    policy: Policy = config.lm_head or (config.embeddings if tied else "keep")
    if tied and policy != config.embeddings:
        raise ValueError(
            f"quant.lm_head={policy!r} with quant.embeddings={config.embeddings!r}: the two are tied to one weight in "
            f"{type(model).__name__}; give both the same, or leave quant.lm_head out"
        )
    replaced: dict[str, nn.Module] = {}
    if config.embeddings != "keep":
        if not isinstance(embedding, nn.Embedding):
            raise ValueError(f"quant.embeddings: {type(model).__name__} has no token embedding; use 'keep'")
        _check_unshared(model, embedding, head)
        name = names[id(embedding)]
        _check_divides("embeddings", config.embeddings, embedding.embedding_dim, name)
        quantized = QuantEmbedding.from_embedding(embedding, POLICY_WEIGHTS[config.embeddings], name)
        replaced[name] = quantized
        if tied and head is not None:
            replaced[names[id(head)]] = TiedHead(quantized, getattr(head, "bias", None))
    if policy != "keep" and not tied:
        if not isinstance(head, nn.Linear) or _refusal(model, names[id(head)], head):
            raise ValueError(f"quant.lm_head: the output head of {type(model).__name__} is no nn.Linear; use 'keep'")
        name = names[id(head)]
        _check_divides("lm_head", policy, head.in_features, name)
        replaced[name] = QuantLinear.from_linear(head, POLICY_WEIGHTS[policy], name)
    return replaced


def _all_quantized(
    model: nn.Module, maps: Mapping[str, LinearMap], schemes: Mapping[str, LayerScheme]
) -> dict[str, nn.Module]:
    """Returns the quantized form of each linear map that has a scheme; each weight is read once, and let go."""
    pages, found = WeightPages(model), {}
    for name, scheme in schemes.items():
        found[name] = _quantized(name, maps[name], scheme)
        pages.let_go(found[name].parameters())
    return dict(found)


def _check_zeros(modules: Iterable[nn.Module]) -> None:
    """Raises ValueError where 'unstructured' sparsity without a share finds no zero to keep."""
    asked = [
        module.nonzero
        for module in modules
        if isinstance(module, QuantModule) and module.nonzero is not None and not module.nonzero.is_meta
        if module.weights.sparsity is not None and module.weights.sparsity.kept_of(module.columns) is None
    ]
    if asked and all(bool(nonzero.all()) for nonzero in asked):
        raise ValueError(
            "quant.sparsity='unstructured' without a share keeps the zeros that the weights have, and no weight that "
            "is quantized is zero; give a share, as quant.sparsity={pattern: unstructured, share: 0.5} does, a pattern "
            "such as 2:4, or a pruned model"
        )


def _check_unshared(model: nn.Module, embedding: nn.Embedding, head: nn.Module | None) -> None:
    for name, module in model.named_modules():
        if module is not embedding and module is not head and getattr(module, "weight", None) is embedding.weight:
            raise ValueError(
                f"quant.embeddings: {name} of {type(model).__name__} shares the embedding's weight; use 'keep'"
            )


def _check_divides(key: str, policy: Policy, size: int, name: str) -> None:
    group = POLICY_WEIGHTS[policy].group_size
    if group and size % group:
        raise ValueError(
            f"quant.{key}={policy!r} has groups of {group}, which do not divide {size} of {name}; use 'int8'"
        )


def changed_since_prepared(model: nn.Module) -> list[str] | None:
    """Returns the parameters of a prepared model that are not what they were before, by their names then.

    Adapters and quantizers do not count. None when it is not known: the model was rotated or smoothed, or was not
    prepared in this process.
    """
    noted = noted_source(model)
    return None if noted is None else other_than(model, noted)


def noted_source(model: nn.Module) -> dict[str, Checksum] | None:
    """Returns checksums of what a prepared model was made from, by the names of its parameters then; None as above."""
    noted: Mapping[str, Checksum] | None = getattr(without_adapters(model), SOURCE, None)
    return None if noted is None else {plain_name(name): entry for name, entry in noted.items()}


def other_than(model: nn.Module, noted: Mapping[str, Checksum]) -> list[str]:
    """Returns the names in `noted`, of `noted_source`, whose parameters in a prepared model are others or not there."""
    now = {plain_name(name): parameter for name, parameter in without_adapters(model).named_parameters()}
    now |= {name.removesuffix(".weight"): parameter for name, parameter in now.items()}  # stacked experts
    return changed_since(noted, now)


def quantizer_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns all that the quantizers of `model` hold beside weights, by name in the state dict; no packed scales."""
    owners = [name for name, module in model.named_modules() if isinstance(module, (QuantModule, RangedModule))]
    state = {
        f"{owner}.{name}": tensor.detach()
        for owner in owners
        for name, tensor in model.get_submodule(owner).state_dict().items()
        if name not in ("weight", "bias")
    }
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and module.log_scale is not None:
            state[f"{name}.log_scale"] = module.log_scale.detach()
    return state

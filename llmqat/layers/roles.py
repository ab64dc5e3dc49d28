"""Finds routers, unused modules and stacked experts of any model, so that `prepare` knows what not to quantize.

A name says little: the linear layer that chooses experts is called `gate`, `router.proj`, `layer` or `wg`. In other
models, `gate` is half of a gated activation. So one forward of a few random tokens is watched, function by function:
- a linear layer whose output goes to a top-k over its features is a router;
- a module that does not run is not reached by text: an image tower, a layer whose inputs are shared with another's;
- a layer beside the transformer layers whose output goes nowhere is without effect: the pooler of an encoder;
- a weight that is read by other code than its layer's forward is noted with its reader (Mamba's `dt_proj`);
- a stacked parameter [E, *, *] that is multiplied with, matrix by matrix, is one of experts, and the product says
  which of its dimensions are the inputs.
A branch that the tiny forward did not take is seen in the code's instructions: `self.NAME.weight` in a method. On the
meta device the same forward runs without numbers; where code asks for numbers, it runs on tensors that have one number
each. Where no forward is possible, classes and names decide alone.

Letters: E experts, O out features, I in features.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmqat.kernels import weights_let_go
from llmqat.layers.probe import probe_inputs
from llmqat.layers.quantized import without_adapter

TRIAL_TOKENS = (47, 7)
"""Tokens of the tiny forward, and of a second one where the first fails: primes, which no dimension is by chance."""
MOST_ROUTED = 2048
"""Features of a router, at most."""
MOST_STAND_INS = 10**10
"""Parameters of a model whose forward is tried with one number a tensor: each product still takes its time."""

ROUTER_CLASS = re.compile(r"Router|TopK\w*Gat|Gating$|MoE\w*Gate$|Moe\w*Gate$|MoEGate")
ROUTER_NAME = re.compile(r"(gate|router|gating|shared_experts?_gate|moe_gate|gate_network)$")
EXPERTS_NAME = re.compile(r"experts?(_|$)")
TOWER_CLASS = re.compile(r"Vision|Visual|Image|Audio|Speech|Video|MultiModalProjector|MultimodalProjector")

_CHOOSING = {"topk", "argmax", "max", "sort", "argsort", "kthvalue", "multinomial"}
_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__"}
_GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
_TURNING = {"mT", "T", "t", "H", "mH"}
_KEEPING = {"to", "float", "bfloat16", "half", "type", "contiguous", "clone", "detach", "data", "select", "unbind"}
_KEEPING |= {"__getitem__", "chunk", "split", "index_select", "expand", "type_as", "__iter__"}
_ASKING = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "nelement", "element_size", "stride", "is_cuda"}
_ASKING |= {"is_meta", "is_cpu", "requires_grad", "layout", "is_floating_point", "is_complex", "is_contiguous", "grad"}
_ASKING |= {
    "__len__",
    "get_device",
    "itemsize",
    "nbytes",
    "is_leaf",
    "grad_fn",
    "is_sparse",
    "is_quantized",
    "_version",
}
_ASKING |= {"is_inference", "storage_offset", "names", "is_nested", "requires_grad_", "data_ptr", "is_xpu", "is_mps"}
_LIKE = {"zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty", "new_ones", "new_full"}
_LIKE |= {"new_tensor"}
_BUILDING = ("__init__", "_init", "init_", "reset_", "tie_", "resize_", "load_", "from_", "prune_", "_load_")
"""Beginnings of the names of methods that run before or beside forwards."""


@dataclass
class Reader:
    """A module whose code looks at the weight of a layer.

    Attributes:
        module: the module.
        values: whether it computes with the weight; False where it asks for its dtype, device or shape alone.
        changes: whether it changes the weight in place.
    """

    module: nn.Module
    values: bool
    changes: bool = False


@dataclass
class Trial:
    """What a tiny forward has shown. Modules and parameters are known by their `id`.

    Attributes:
        failure: why there was no forward; empty where it ran to its end.
        ran: modules whose forward ran.
        routers: linear layers that choose.
        changed: linear layers whose weight the forward itself has changed.
        lost: linear layers outside of the model's lists of layers whose output no logit is made of.
        readers: layer -> who reads its weight from outside.
        layouts: (module, name of its stacked parameter) -> whether it lies as [E, I, O]; both where both were seen.
    """

    failure: str = ""
    ran: set[int] = field(default_factory=set)
    routers: set[int] = field(default_factory=set)
    changed: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    readers: dict[int, list[Reader]] = field(default_factory=dict)
    layouts: dict[tuple[int, str], set[bool]] = field(default_factory=dict)

    def note_reader(self, layer: nn.Module, module: nn.Module, values: bool, changes: bool = False) -> None:
        """Notes that the code of `module` looks at the weight of `layer`."""
        if type(module).__module__.startswith("peft."):
            return
        known = self.readers.setdefault(id(layer), [])
        found = next((reader for reader in known if reader.module is module), None)
        if found is None:
            known.append(Reader(module, values, changes))
        else:
            found.values, found.changes = found.values or values, found.changes or changes


def tried(model: nn.Module) -> Trial:
    """Returns what a forward of a few random tokens shows of `model`, and what its code says; the model is unchanged.

    Args:
        model: full precision; a transformers model, or else only its code is looked at.
    """
    trial = Trial(failure="it is not a transformers model")
    if isinstance(model, PreTrainedModel):
        trial = _tried(model)
    for module in model.modules():
        for path, (values, changes) in _read_by(cast("Hashable", type(module))).items():
            layer = _descendant(module, path)
            if layer is not None:
                trial.note_reader(layer, module, values, changes)
    return trial


def _tried(model: PreTrainedModel) -> Trial:
    trial = _watched(model, TRIAL_TOKENS[0])
    if trial.failure and not _is_meta(model):
        trial = _watched(model, TRIAL_TOKENS[1])
    elif trial.failure and sum(p.numel() for p in model.parameters()) < MOST_STAND_INS:
        with _one_number_each(model):
            trial = _watched(model, TRIAL_TOKENS[0])
    return trial


def _is_meta(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def _watched(model: PreTrainedModel, tokens: int) -> Trial:
    trial = Trial()
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with (
            torch.device("cpu"),
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            weights_let_go(model),
            _modules_watched(model, trial) as active,
        ):
            inputs = probe_inputs(model, rows=1, length=tokens)
            watch = _Watch(model, trial, active)
            with watch:
                output = model(**inputs, **_without_cache(model))
            trial.lost = watch.flow.lost(output)
    except Exception as error:  # a forward of an unknown model fails in any way, and then it says nothing
        trial.failure = f"{type(error).__name__}: {(str(error) or 'no message').strip().splitlines()[0]}"
    finally:
        for module, was_training in training:
            module.training = was_training
    return trial


def _without_cache(model: nn.Module) -> dict[str, bool]:
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"use_cache": False} if takes_all or "use_cache" in parameters else {}


@contextmanager
def _modules_watched(model: nn.Module, trial: Trial) -> Iterator[list[nn.Module]]:
    """Yields the modules of `model` whose forwards are under way, innermost last."""
    known, active = {id(module) for module in model.modules()}, list[nn.Module]()

    def begin(module: nn.Module, inputs: Any) -> None:
        if id(module) in known:
            trial.ran.add(id(module))
            active.append(module)

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        while active and id(module) in known and active.pop() is not module:
            pass

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(begin).remove)
        stack.callback(register_module_forward_hook(end, always_call=True).remove)
        yield active


@contextmanager
def _one_number_each(model: nn.Module) -> Iterator[None]:
    """Inside, parameters and buffers are on the CPU, in their shapes, with one number in memory for each.

    Experts are computed one after another: kernels for all of them want to know where each matrix lies.
    """
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    tables: tuple[dict[str, Any], ...]
    configs: dict[int, Any] = {id(module.config): module.config for module in model.modules() if _has_experts(module)}
    experts = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in experts:
            config._experts_implementation = "eager"
        for module in model.modules():
            tables = module._parameters, module._buffers
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_meta:
                        replaced.append((table, name, tensor))
        stand_ins: dict[int, Any] = {}
        for table, name, tensor in replaced:
            if id(tensor) not in stand_ins:
                number = torch.tensor(0.01 if tensor.is_floating_point() else 0, dtype=tensor.dtype, device="cpu")
                value = number.expand(tensor.shape)
                is_parameter = isinstance(tensor, nn.Parameter)
                stand_ins[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
            table[name] = stand_ins[id(tensor)]
        yield
    finally:
        for table, name, tensor in replaced:
            table[name] = tensor
        for config, implementation in experts:
            config._experts_implementation = implementation


def _has_experts(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_experts_implementation")


class _Flow:
    """What the outputs of a few layers are made into: each function's output is a node above those of its inputs."""

    def __init__(self, layers: set[int]) -> None:
        self.layers = layers
        self.nodes = WeakIdKeyDictionary()
        """Tensor -> its node, where it is made of the output of one of the layers."""
        self.below: list[list[int]] = []
        self.maker: dict[int, int] = {}

    def note(self, given: list[Tensor], changed: Tensor | None, output: Any, active: list[nn.Module]) -> None:
        """Notes a function of the tensors `given`, which may have changed one of them, in the innermost module."""
        below = [self.nodes[tensor] for tensor in given if tensor in self.nodes]
        maker = next((id(module) for module in reversed(active) if id(module) in self.layers), None)
        if maker is None and not below:
            return
        node = len(self.below)
        self.below.append(below)
        if maker is not None:
            self.maker[node] = maker
        self._place(output, node)
        if changed is not None:
            if changed._base is not None and changed._base in self.nodes:
                below.append(self.nodes[changed._base])
            self._place([changed, changed._base], node)

    def _place(self, values: Any, node: int) -> None:
        for tensor in _flat([values]):
            if isinstance(tensor, Tensor):
                self.nodes[tensor] = node

    def lost(self, output: Any) -> set[int]:
        """Returns the layers, by `id`, whose outputs do not reach the logits of `output`; none if it has no logits."""
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            return set()
        waiting, seen = [self.nodes[logits]] if logits in self.nodes else [], set[int]()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += self.below[node]
        return set(self.maker.values()) - {self.maker[node] for node in seen if node in self.maker}


def _outside_of_layers(model: nn.Module) -> set[int]:
    """Returns the linear layers that lie in none of the model's lists of modules, by `id`."""
    listed = {
        id(inner) for module in model.modules() if isinstance(module, nn.ModuleList) for inner in module.modules()
    }
    return {id(m) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and id(m) not in listed}


class _Watch(TorchFunctionMode):
    """Follows weights and the outputs of linear layers through the functions of a forward."""

    def __init__(self, model: nn.Module, trial: Trial, active: list[nn.Module]) -> None:
        super().__init__()
        self.trial, self.active = trial, active
        self.flow = _Flow(_outside_of_layers(model))
        self.layers: dict[int, nn.Module] = {}
        self.scores = WeakIdKeyDictionary()
        """Tensor -> the linear layers whose output it is, entry by entry."""
        self.stacks = WeakIdKeyDictionary()
        """Tensor -> (owner, name, whether it is turned) of the stacked parameter that it is, or is a matrix of."""
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                self.layers[id(module.weight)] = module
            for name, parameter in possible_stacks(module).items():
                self.stacks[parameter] = (module, name, False)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        if name in _ASKING:
            self._note_asked(args)
            return func(*args, **kwargs)
        given = [tensor for tensor in (*_flat(args), *_flat(kwargs.values())) if isinstance(tensor, Tensor)]
        changing = _is_in_place(name) and given and given[0] is args[0] and id(given[0]) in self.layers
        before = given[0].detach().clone() if changing else None
        output = (
            _stand_in_product(*args, **kwargs) if name == "linear" and _has_stand_in(args) else func(*args, **kwargs)
        )
        if before is not None and not before.is_meta and not torch.equal(before, given[0]):
            self.trial.changed.add(id(self.layers[id(given[0])]))
        self._note_reads(name, given, args)
        in_place = (_is_in_place(name) or name == "__setitem__") and isinstance(args[0], Tensor)
        self.flow.note(given, args[0] if in_place else None, output, self.active)
        self._follow_stacks(name, args, given, output)
        self._follow_scores(name, given, output)
        return output

    def _outside(self, layer: nn.Module) -> bool:
        return not any(module is layer for module in self.active)

    def _note_asked(self, args: tuple[Any, ...]) -> None:
        layer = self.layers.get(id(args[0])) if args else None
        if layer is not None and self.active and self._outside(layer):
            self.trial.note_reader(layer, self.active[-1], values=False)

    def _note_reads(self, name: str, given: list[Tensor], args: tuple[Any, ...]) -> None:
        for tensor in given:
            layer = self.layers.get(id(tensor))
            if layer is None or not self.active or not self._outside(layer):
                continue
            as_example = name in _LIKE or (name in ("to", "type_as") and tensor is not args[0])
            self.trial.note_reader(layer, self.active[-1], not as_example, _is_in_place(name) and tensor is args[0])

    def _follow_stacks(self, name: str, args: tuple[Any, ...], given: list[Tensor], output: Any) -> None:
        found = [(tensor, self.stacks[tensor]) for tensor in given if tensor in self.stacks]
        for tensor, (owner, leaf, turned) in found:
            if name in _TURNING or (name in ("transpose", "swapaxes", "permute") and _swaps_last(tensor, output)):
                self._mark(output, (owner, leaf, not turned))
            elif name in _KEEPING:
                self._mark(output, (owner, leaf, turned))
            elif name in _PRODUCTS or name in _GROUPED:
                self._note_layout(name, args, tensor, owner, leaf, turned)

    def _mark(self, output: Any, what: tuple[nn.Module, str, bool]) -> None:
        for tensor in _flat([output]):
            if isinstance(tensor, Tensor) and tensor.dim() >= 2:
                self.stacks[tensor] = what

    def _note_layout(
        self, name: str, args: tuple[Any, ...], tensor: Tensor, owner: nn.Module, leaf: str, turned: bool
    ) -> None:
        """Notes which dimension a product sums over: the last one is that of inputs, unless the matrix is turned."""
        known = self.trial.layouts.setdefault((id(owner), leaf), set())
        place = next((index for index, value in enumerate(args) if value is tensor), None)
        if self._outside(owner) or place is None or name == "einsum":
            known.update((False, True))  # not understood
            return
        over_last = name == "linear" or (place == 0 and name != "__rmatmul__")
        known.add(turned if over_last else not turned)

    def _follow_scores(self, name: str, given: list[Tensor], output: Any) -> None:
        if name in _PRODUCTS:
            layer = self.active[-1] if self.active else None
            if isinstance(layer, (nn.Linear, Conv1D)) and _width(layer) <= MOST_ROUTED:
                self._mark_scores(output, frozenset([layer]), _width(layer))
            return
        for tensor in given:
            layers = self.scores.get(tensor)
            if layers is None or not tensor.dim():
                continue
            if name in _CHOOSING:
                self.trial.routers.update(id(layer) for layer in layers if _width(layer) == tensor.shape[-1])
            self._mark_scores(output, layers, tensor.shape[-1])

    def _mark_scores(self, output: Any, layers: frozenset[nn.Module], width: int) -> None:
        for tensor in _flat([output]):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == width:
                self.scores[tensor] = layers | self.scores.get(tensor, frozenset())


def _has_stand_in(args: tuple[Any, ...]) -> bool:
    """Returns whether the weight of a linear product is one of `_one_number_each`: one number for all its entries."""
    weight = args[1] if len(args) > 1 else None
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.stride() == (0, 0) and weight.numel() > 1


def _stand_in_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns what F.linear does of a weight whose entries are one number, in the time of a sum."""
    product = (x.sum(-1, keepdim=True) * weight[0, 0]).expand(*x.shape[:-1], weight.shape[0])
    return product.clone() if bias is None else product + bias


def _name_of(func: Any) -> str:
    """Returns the name of a function that torch was asked for; of an attribute, the attribute's."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", name)
    return str(getattr(func, "_opname", name)).removesuffix(".default")


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _swaps_last(tensor: Tensor, output: Any) -> bool:
    """Returns whether a view has the last two dimensions of `tensor` swapped, and nothing else."""
    return isinstance(output, Tensor) and output.stride() == tensor.mT.stride() and output.shape == tensor.mT.shape


def _width(layer: nn.Module) -> int:
    return layer.nf if isinstance(layer, Conv1D) else int(layer.weight.shape[0])  # type: ignore[index]


def possible_stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of `module` itself that may be stacked matrices, by name."""
    if type(module).__module__.startswith("torch.nn."):  # convolutions
        return {}
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point() and min(parameter.shape) > 1
    }


# Routers, by class and place


def is_router_by_place(model: nn.Module, name: str) -> bool:
    """Returns whether class and place of the linear layer `name` say that it chooses experts, or helps to."""
    module = model
    for part in name.split("."):
        parent, module = module, getattr(module, part)
        if ROUTER_CLASS.search(type(module).__name__):
            return True
        if ROUTER_NAME.fullmatch(part) and any(EXPERTS_NAME.search(child) for child in parent._modules):
            return True
    return False


def is_of_experts(model: nn.Module, name: str) -> bool:
    """Returns whether classes or names on the way to the stacked parameter `name` speak of experts."""
    outwards = modules_around(model, name)
    return "expert" in name.lower() or any(re.search(r"Expert|MoE|Moe|MoA", type(m).__name__) for m in outwards[1:])


def modules_around(model: nn.Module, name: str) -> list[nn.Module]:
    """Returns the modules around the module or parameter `name`, outermost first: `model`, ..., the innermost."""
    found = [model]
    for part in name.split(".")[:-1]:
        found.append(getattr(found[-1], part))
    return found


# Code


@functools.cache
def _read_by(kind: Hashable) -> Mapping[str, tuple[bool, bool]]:
    """Returns the layers whose weights the methods of a class look at, by their dotted names below `self`.

    Returns:
        name -> whether values are read (not only dtype, device, shape), and whether they are changed in place.
    """
    found: dict[str, tuple[bool, bool]] = {}
    assert isinstance(kind, type)
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] in ("torch", "peft") or owner in (object, PreTrainedModel):
            continue
        for name, method in vars(owner).items():
            function = inspect.unwrap(method) if callable(method) else None
            if isinstance(function, FunctionType) and not name.startswith(_BUILDING):
                for path, values, changes in _reads(function.__code__):
                    known = found.get(path, (False, False))
                    found[path] = known[0] or values, known[1] or changes
    return found


def _reads(code: CodeType) -> Iterator[tuple[str, bool, bool]]:
    """Yields the `X` of every `self.X.weight` in a function, whether values are read, and whether they are changed."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _reads(constant)
    if "weight" not in code.co_names:
        return
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL")]
    for place, step in enumerate(steps):
        if step.argval != "weight" or not _loads_attribute(step):
            continue
        path: list[str] = []
        before = place - 1
        while before > 0 and _loads_attribute(steps[before]):
            path.insert(0, str(steps[before].argval))
            before -= 1
        if not path or not _is_self(steps[before]):
            continue
        following = steps[place + 1] if place + 1 < len(steps) else step
        attribute = str(following.argval) if _loads_attribute(following) else ""
        tested = before > 0 and steps[before - 1].argval in ("isinstance", "hasattr", "getattr")
        changes = attribute == "data" or _is_in_place(attribute)
        yield ".".join(path), attribute not in _ASKING and not tested, changes


def _loads_attribute(step: dis.Instruction) -> bool:
    return step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))


def _is_self(step: dis.Instruction) -> bool:
    loaded = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
    return step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and loaded == "self"


def _descendant(module: nn.Module, path: str) -> nn.Module | None:
    """Returns the linear layer `path` below a module, or None."""
    found: Any = module
    for part in path.split("."):
        found = found._modules.get(part) if isinstance(found, nn.Module) else None
    return found if isinstance(found, (nn.Linear, Conv1D)) else None


# What text does not reach


def unreached(model: nn.Module, trial: Trial, names: Iterable[str]) -> dict[str, str]:
    """Returns the modules among `names` that a forward on text does not run, each with the outermost such one around.

    An expert that no token was sent to counts as run if another expert of its kind ran. Where no forward was possible,
    the idle modules are those inside a tower of another modality, known by its class.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if trial.failure:
        if getattr(model, "main_input_name", "input_ids") != "input_ids":
            return {}
        embedding = end_of(model, "get_input_embeddings")
        towers = {name for name, module in modules.items() if name and _is_tower(module, embedding)}
        inside = {name: next((outer for outer in _outwards(name) if outer in towers), None) for name in names}
        return {name: tower for name, tower in inside.items() if tower is not None}
    alive = {outer for name, module in modules.items() if id(module) in trial.ran for outer in _outwards(name)}
    return {
        name: next(outer for outer in _outwards(name) if outer not in alive)
        for name in names
        if name not in alive and not _is_idle_expert(modules, name, alive)
    }


def end_of(model: nn.Module, getter: str) -> nn.Module | None:
    """Returns the model's input or output embeddings, without an adapter around them, or None."""
    find = getattr(model, getter, None)
    try:
        module = find() if callable(find) else None
    except NotImplementedError:  # models without token embeddings say so like this
        return None
    return without_adapter(module) if isinstance(module, nn.Module) else None


def _is_tower(module: nn.Module, embedding: nn.Module | None) -> bool:
    """Returns whether the class of a module speaks of images or sound, and the module does not embed the text too."""
    known = TOWER_CLASS.search(type(module).__name__) is not None
    return known and not any(inner is embedding for inner in module.modules())


def _outwards(name: str) -> list[str]:
    """Returns the names of all modules around `name`, outermost first, and its own."""
    parts = name.split(".")
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def _is_idle_expert(modules: Mapping[str, nn.Module], name: str, alive: set[str]) -> bool:
    """Returns whether the module lies in an entry of an inner list that did not run, where another entry did."""
    layers = True
    for entry in _outwards(name)[1:]:
        owner, _, _ = entry.rpartition(".")
        if not isinstance(modules[owner], (nn.ModuleList, nn.ModuleDict)):
            continue
        of_layers = layers and not any(EXPERTS_NAME.search(part) for part in owner.split("."))
        layers = False
        if of_layers or entry in alive:  # each transformer layer has to run
            continue
        rest = name.removeprefix(entry)
        kind = type(modules[entry])
        others = (f"{owner}.{key}" for key, other in modules[owner].named_children() if type(other) is kind)
        return any(f"{other}{rest}" in alive for other in others)
    return False

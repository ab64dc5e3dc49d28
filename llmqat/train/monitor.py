"""What quantization does while a model trains: logged through the Trainer, to whatever trackers it reports to.

Weights near the boundary of two codes make low-bit training unstable: their codes flip back and forth while the loss
hardly moves. Every `every` optimizer steps, the monitor compares codes of some rows of some layers over three
consecutive steps, and logs

    quantization/flipped       share of codes that the last step changed
    quantization/oscillating   share of codes that the last step changed back to their value of two steps ago
    quantization/scale_drift   mean |log(scale / starting scale)| of the layers looked at
    quantization/clipped       share of weights beyond the reach of the grid; with trackers also by layer
    quantization/dead_scales   share of groups whose scale does nothing: at its floor, unmoved while others have moved,
                               or with all codes zero (of the rows looked at)
    grad_norm/GROUP            norm of the gradients of weights, log-scales, zero points and norms, after clipping

The first dead scales of a layer, and a logged loss of more than `spike` times the median of those before it, are also
warned of.

It changes nothing of the training. Every `every` steps it reads at most `layers` x `weights` weights three times, and
each gradient once: 43 ms in ten steps of 2.8 s (SmolLM2-135M, 2 x 512 tokens, two cores). With adapters the matrices of
those layers are made for it.

Source: Nagel et al. 2203.08086, oscillations in quantization-aware training.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmqat.config import Config
from llmqat.grid import SCALE_FLOOR, quantize
from llmqat.layers import QuantModule
from llmqat.train.trainer import group_of

log = logging.getLogger(__name__)

_Key = tuple[str, ...]
"""What a number is of: its kind, and perhaps the layer and more."""
LOOKS = 3
"""Steps in a row whose codes are compared."""
LOSSES = 20
"""Logged losses that a new one is compared with."""
FEWEST_LOSSES = 5
"""Logged losses below which none is called a spike."""


class MonitorSettings(Config):
    """How often, and how much of a model, is looked at while it trains."""

    every: int = Field(10, ge=1)
    """Optimizer steps from one look to the next."""
    layers: int = Field(8, ge=1)
    """Layers looked at, spread evenly over the model."""
    weights: int = Field(65_536, ge=1)
    """Weights looked at in a layer, in whole rows from its first; at least one row."""
    spike: float = Field(3.0, gt=1)
    """A logged loss of more than so many times the median of the last 20 is warned of."""


class QuantizationMonitor(TrainerCallback):
    """Looks at codes, scales and gradients of a prepared model while any transformers Trainer trains it."""

    def __init__(self, settings: MonitorSettings | None = None) -> None:
        self.settings = settings or MonitorSettings()
        self._trainer: Trainer | None = None
        self._layers: dict[str, QuantModule] = {}
        self._starts: list[Tensor | None] = []
        self._codes: dict[int, list[Tensor]] = {}  # by step
        self._gradients: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=LOSSES)
        self._warned: set[tuple[str, str]] = set()
        self._groups: dict[str, int] = {}  # looked at, by layer

    def attach(self, trainer: Trainer) -> QuantizationMonitor:
        """Makes `trainer` call this and takes its `log`, which reaches every tracker; returns itself.

        Under FSDP and DeepSpeed, where no process holds whole weights, nothing is logged but a warning.

        Raises:
            ValueError: the trainer's model has no quantized weight to look at.
        """
        found = {name: module for name, module in trainer.model.named_modules() if isinstance(module, QuantModule)}
        if not found:
            raise ValueError("the trainer's model has no quantized weight to look at: call llmqat.prepare first")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            log.warning("codes and scales are not monitored: each process holds a part of the weights only")
            return self
        names = list(found)
        count = min(self.settings.layers, len(names))
        chosen = [names[round(index * (len(names) - 1) / max(count - 1, 1))] for index in range(count)]
        self._layers = {name: found[name] for name in dict.fromkeys(chosen)}
        self._starts = [_log_scale(layer) for layer in self._layers.values()]  # a checkpoint is not loaded yet
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forgets the codes of an earlier training, and moves the scales that it began with to where layers are now."""
        self._codes.clear()
        layers = self._layers.values()
        self._starts = [
            None if start is None else start.to(layer.weight.device)
            for start, layer in zip(self._starts, layers, strict=True)
        ]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Takes the norms of the gradients of a step that will be logged."""
        if self._is_due(state.global_step + 1) and state.is_world_process_zero:
            self._gradients = gradient_norms(given["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keeps the codes of the steps before a look, and logs at the look itself."""
        step = state.global_step
        if not state.is_world_process_zero or not any(self._is_due(step + ahead) for ahead in range(LOOKS)):
            return
        self._codes = {earlier: codes for earlier, codes in self._codes.items() if earlier > step - LOOKS}
        self._codes[step] = [codes_of(layer, self.settings.weights) for layer in self._layers.values()]
        if self._is_due(step) and self._trainer is not None:
            tracked = bool(args.report_to) and args.report_to != ["none"]
            is_due = control.should_log
            self._trainer.log({**self._figures(step, by_layer=tracked), **self._gradients})
            # Trainer takes any log for its own of this step; it would skip the loss, for which all processes wait.
            control.should_log = is_due
            self._gradients = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Warns of a loss that is far above those before it."""
        loss = (logs or {}).get("loss")
        if loss is None or not state.is_world_process_zero:
            return
        loss = float(loss)
        if len(self._losses) >= FEWEST_LOSSES and loss > self.settings.spike * median(self._losses):
            log.warning(
                "step %d: the loss is %.4g, %.1f times the median of the last %d logged; lower the learning rates or "
                "max_grad_norm if it does not come back",
                *(state.global_step, loss, loss / median(self._losses), len(self._losses)),
            )
        self._losses.append(loss)

    def _is_due(self, step: int) -> bool:
        return step % self.settings.every == 0

    def _figures(self, step: int, by_layer: bool) -> dict[str, float]:
        asked = {**self._flips(step), **self._of_scales()}
        clipped = {name: _clipped(layer, self.settings.weights) for name, layer in self._layers.items()}
        asked |= {("clipped", name): share for name, share in clipped.items()}
        found = _numbers(asked)
        figures = {
            f"quantization/{kind}": sum(of_kind) / (1 if kind in ("flipped", "oscillating") else len(of_kind))
            for kind in ("flipped", "oscillating", "scale_drift")
            if (of_kind := [number for key, number in found.items() if key[0] == kind])
        }
        figures["quantization/dead_scales"] = self._dead_share(step, found)
        shares = {name: found["clipped", name] for name in clipped}
        figures["quantization/clipped"] = sum(shares.values()) / len(shares)
        if by_layer:
            figures |= {f"quantization/clipped/{name}": share for name, share in shares.items()}
        return figures

    def _flips(self, step: int) -> dict[_Key, Tensor]:
        """Returns the shares of codes that the last step changed, and changed back, of the steps that are known."""
        now, before, earlier = (self._codes.get(step - back) for back in range(LOOKS))
        asked: dict[_Key, Tensor] = {}
        if before is not None:
            changed = [new != old for new, old in zip(now or (), before, strict=True)]
            asked["flipped",] = _share(changed)
            if earlier is not None:
                back = [c & (new == old) for c, new, old in zip(changed, now or (), earlier, strict=True)]
                asked["oscillating",] = _share(back)
        return asked

    def _of_scales(self) -> dict[_Key, Tensor]:
        """Returns by layer how far learned scales have drifted, whether any has moved, and how many groups are dead."""
        asked: dict[_Key, Tensor] = {}
        for (name, layer), start in zip(self._layers.items(), self._starts, strict=True):
            causes = dead_groups(layer, self.settings.weights)
            asked["dead", name] = torch.stack(list(causes.values())).any(dim=0).sum()
            now = _log_scale(layer)
            if now is not None and start is not None:
                asked["scale_drift", name] = (now - start).abs().mean()
                asked["moved", name] = (now != start).any()
                causes[UNMOVED] = (now == start)[: len(causes[FLOOR])]
                asked["dead or unmoved", name] = torch.stack(list(causes.values())).any(dim=0).sum()
            asked |= {("cause", name, cause): mask.sum() for cause, mask in causes.items()}
            self._groups[name] = causes[FLOOR].numel()
        return asked

    def _dead_share(self, step: int, found: Mapping[_Key, float]) -> float:
        """Returns the share of dead groups in the layers looked at, and warns of each cause once a layer."""
        any_moved = any(found.get(("moved", name)) for name in self._layers)  # else rates are still 0, or it is fixed
        dead = 0.0
        for name, groups in self._groups.items():
            causes = (FLOOR, ALL_ZERO, UNMOVED) if any_moved else (FLOOR, ALL_ZERO)
            for cause in causes:
                count = int(found.get(("cause", name, cause), 0))
                if count and (name, cause) not in self._warned:
                    self._warned.add((name, cause))
                    log.warning("step %d: %s: %d of %d scales: %s", step, name, count, groups, cause)
            own = found["dead", name]
            dead += found.get(("dead or unmoved", name), own) if any_moved else own
        return dead / sum(self._groups.values())


@torch.no_grad()
def codes_of(layer: QuantModule, weights: int) -> Tensor:
    """Returns the codes of the first rows of a layer, as many as hold `weights` weights, in float32 [n, I]."""
    rows, scale, zero_point = _first_rows(layer, weights)
    return quantize(rows, scale, zero_point, layer.grid)


def clipped_share(layer: QuantModule, weights: int) -> float:
    """Returns the share of weights, in the same rows, that are more than half a step beyond the outermost levels."""
    return float(_clipped(layer, weights))


@torch.no_grad()
def _clipped(layer: QuantModule, weights: int) -> Tensor:
    rows, scale, zero_point = _first_rows(layer, weights)
    groups = rows.float().reshape(rows.shape[0], scale.shape[1], -1) if scale.shape[0] > 1 else rows.float()[:, None]
    codes = groups / scale.float().unsqueeze(-1)
    if zero_point is not None:
        codes = codes + zero_point.round().unsqueeze(-1)
    low, high = layer.grid.ends
    return ((codes < low) | (codes > high)).float().mean()


FLOOR, ALL_ZERO, UNMOVED = "at the floor", "all codes zero", "unmoved since training began"


@torch.no_grad()
def dead_groups(layer: QuantModule, weights: int) -> dict[str, Tensor]:
    """Returns by cause which groups of a layer's first rows [n, G] have a scale that does nothing."""
    rows, scale, zero_point = _first_rows(layer, weights)
    codes = quantize(rows, scale, zero_point, layer.grid).reshape(*scale.shape, -1)
    values = codes if zero_point is None else codes - zero_point.round().unsqueeze(-1)
    return {FLOOR: scale.abs() <= SCALE_FLOOR, ALL_ZERO: (values == 0).all(-1)}


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Returns the norm of the gradient of each group of parameters: weights, log_scales, zero_points, norms."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(group_of(name, parameter), []).append(parameter.grad)
    norms = {name: torch.stack(torch._foreach_norm(gradients)) for name, gradients in groups.items()}
    asked: dict[_Key, Tensor] = {
        (f"grad_norm/{name}",): torch.linalg.vector_norm(entries.float()) for name, entries in norms.items()
    }
    return {key[0]: number for key, number in _numbers(asked).items()}


def _first_rows(layer: QuantModule, weights: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the first rows of a layer's matrix with their scales and zero points."""
    count = max(1, min(layer.rows, weights // layer.columns))
    scale, zero_point = layer.scale_and_zero_point()
    if scale.shape[0] > 1:
        scale, zero_point = scale[:count], None if zero_point is None else zero_point[:count]
    return layer.matrix()[:count], scale, zero_point


def _log_scale(layer: QuantModule) -> Tensor | None:
    return None if layer.log_scale is None else layer.of_rows(layer.log_scale.detach()).clone()


def _share(masks: Sequence[Tensor]) -> Tensor:
    counts = [mask.sum().double() for mask in masks]
    return torch.stack([count.to(counts[0].device) for count in counts]).sum() / sum(mask.numel() for mask in masks)


def _numbers(asked: Mapping[_Key, Tensor]) -> dict[_Key, float]:
    """Returns tensors of one number each as numbers, of all at once, so that a GPU is waited for once."""
    if not asked:
        return {}
    tensors = [tensor.detach().double() for tensor in asked.values()]
    together = torch.stack([tensor.to(tensors[0].device) for tensor in tensors])
    return dict(zip(asked, together.tolist(), strict=True))

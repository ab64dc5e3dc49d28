"""Bits chosen layer by layer: measured, assigned under a budget, kept as a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmqat.calibrate import Allocation, AllocationConfig, LayerSensitivity, allocate_bits, measure_sensitivity
from llmqat.calibrate.sensitivity import Choice, check_budget, schemes_of, sizes_of
from llmqat.data import Rows
from llmqat.evaluate.documents import check_schema, head
from llmqat.files import read_json, write_whole
from llmqat.layers import QuantConfig, QuantLinear, QuantModule
from llmqat.models import CALIBRATION_FILLED, load_model, to_accelerator
from llmqat.terminal import progress

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class BitPlan:
    """An assignment of bits, and the sensitivities it was made from."""

    allocation: Allocation
    layers: Sequence[LayerSensitivity]

    @property
    def choices(self) -> list[Choice]:
        """What was chosen among, the smallest first."""
        return sorted(self.layers[0].cost, key=self.layers[0].size)

    def write(self, path: Path) -> None:
        """Writes the plan as JSON."""
        found = self.allocation.to_dict()
        content: dict[str, Any] = {
            **head("sensitivity"),
            **found,
            "sensitivity": [asdict(layer) for layer in self.layers],
        }
        write_whole(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> BitPlan:
        """Returns what `write` wrote.

        Raises:
            ValueError: the file holds no plan, or one of a later llmqat.
        """
        try:
            content = read_json(path, "delete it and run again")
            check_schema(content, path)
            layers = [
                LayerSensitivity(e["name"], e["weights"], _by_choice(e["cost"]), _by_choice(e.get("bits_per_weight")))
                for e in content["sensitivity"]
            ]
            names = (field.name for field in fields(Allocation))
            return cls(Allocation(**{name: content[name] for name in names}), layers)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no plan of bits ({error!r}); delete it and run again") from error


def _by_choice(found: dict[str, float] | None) -> Any:
    """Returns what JSON says by choice, of which bits are numbers again."""
    return None if found is None else {int(key) if key.isdecimal() else key: value for key, value in found.items()}


def choice_name(choice: Choice) -> str:
    """Returns a choice in words: "4 bits", or the name of a scheme."""
    return f"{choice} bits" if isinstance(choice, int) else choice


def check_allocation(model: PreTrainedModel, quant: QuantConfig, config: AllocationConfig) -> None:
    """Checks choices and budget on a prepared `model`, which may be without weights.

    Raises:
        ValueError: no layer is to be chosen for, a choice does not do for one, or the budget is too small.
    """
    schemes = schemes_of(quant, config.choices)
    costs = dict.fromkeys(config.choices, 0.0)
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    layers = [
        LayerSensitivity(name, layer.rows * layer.columns, costs, sizes_of(schemes, layer.rows, layer.columns, name))
        for name, layer in model.named_modules()
        if isinstance(layer, QuantModule) and id(layer) not in ends and _is_default(layer, quant)
    ]
    if not layers:
        raise ValueError("no layer has the scheme of quant.weights, so there is none to choose bits for")
    check_budget(layers, config.target_bits)


def _is_default(layer: QuantModule, quant: QuantConfig) -> bool:
    quantizer = getattr(layer, "input_quantizer", None)
    inputs = None if quantizer is None else quantizer.config
    return layer.weights == quant.weights and (not isinstance(layer, QuantLinear) or inputs == quant.input_activations)


def plan_bits(
    spec: str,
    quant: QuantConfig,
    config: AllocationConfig,
    ids: Tensor | Rows,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> BitPlan:
    """Returns the best assignment of bits to the layers of the model `spec`.

    Args:
        spec: what `load_model` takes.
        quant: the scheme but for its bits.
        config: budget and choices.
        ids: token ids [N, L], or token blocks.
        seed: of the labels that the model draws.
        dtype: what forwards compute in, and weights are held in.
        device: where; the blocks of a model that it does not hold come there one by one.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: the model, the scheme or the budget does not do.
    """
    model, _ = load_model(spec, dtype)
    to_accelerator(model, device, filled=CALIBRATION_FILLED)
    layers = measure_sensitivity(
        *(model, quant, config.choices, ids[: config.blocks]),
        seed=seed,
        dtype=dtype,
        hidden_memory=config.hidden_memory,
        wrap=progress("sensitivity", "block"),
    )
    return BitPlan(allocate_bits(layers, config.target_bits), layers)


def planned(file: Path, make: Callable[[], BitPlan]) -> BitPlan:
    """Returns the plan in `file`, made and left there where it is not."""
    if not file.is_file():
        make().write(file)
    return BitPlan.read(file)

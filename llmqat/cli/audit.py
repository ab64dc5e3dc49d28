"""The command `audit`, and its tables, which `plan` shows as well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmqat.cli.application import command, console
from llmqat.cli.options import GroupSizeOption, JsonOption, ModelArgument, SchemeOption
from llmqat.cli.show import print_next
from llmqat.paths import check_outputs
from llmqat.terminal import Column, FittedTable

if TYPE_CHECKING:
    from llmqat.export.serving import Verdict
    from llmqat.layers import AuditEntry, CoverageAudit

COLUMNS = (
    Column("tensors", 0, "name"),
    Column("count", 4),
    Column("shape", 5),
    Column("treatment", 1, "prose"),
    Column("bytes before", 3),
    Column("after", 2),
)
SERVED_COLUMNS = (
    Column("program", 0, "name"),
    Column("loads it", 0, "name"),
    Column("limits, or why not", 1, "prose"),
    Column("evidence", 2, "prose"),
)


UNQUANTIZED_BITS = 16
"""Bits of a weight on disk from which on nothing has quantized it."""


@command()
def audit(
    model: ModelArgument,
    scheme: SchemeOption = "int4",
    group_size: GroupSizeOption = None,
    json_file: JsonOption = None,
) -> None:
    """Lists every tensor, how it is quantized or why not, bytes before and after, and which programs can load it.

    A packed checkpoint is shown as it is; any other model as --scheme would leave it, and nothing is written.

    **Examples**

        llmqat audit HuggingFaceTB/SmolLM2-135M --scheme int4 --group-size 64

        llmqat audit runs/smollm2-135m-int4/model
    """
    from llmqat.evaluate.documents import head
    from llmqat.evaluate.loading import known_of
    from llmqat.export import is_packed
    from llmqat.export.commands import command as command_of
    from llmqat.export.commands import name_of_folder, option, run_commands
    from llmqat.export.prepared import is_prepared
    from llmqat.export.serving import served_by
    from llmqat.files import write_whole
    from llmqat.models import model_file, read_config, resolve_spec
    from llmqat.recipe import inspect_model, scheme_of

    check_outputs({"--json": json_file}, [model])
    found = inspect_model(model, scheme_of(scheme, group_size))
    on_disk = known_of(model)
    bits = on_disk.bits_per_weight
    packed = is_packed(model)
    quantized = not packed and bits is not None and bits < UNQUANTIZED_BITS
    if quantized:
        console.print(
            f"{model} is quantized already, at {bits:.2f} bits a weight; below is its model, dequantized, as --scheme "
            f"{scheme} would leave it (nothing is written):",
            markup=False,
        )
    elif not packed and not is_prepared(read_config(resolve_spec(model), model)):
        console.print(f"as --scheme {scheme} would leave it (nothing is written):")
    served = served_by(found.description) if found.description.layers else {}
    print_audit(found.coverage)
    if on_disk.bytes_on_disk is not None:
        each = "" if bits is None else f", {bits:.2f} bits a weight of a linear layer"
        console.print(f"on disk now: {on_disk.bytes_on_disk:,} bytes of weights{each}")
    print_served(served)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        written = {
            **head("audit"),
            **found.coverage.to_dict(),
            "on_disk": {"bytes": on_disk.bytes_on_disk, "bits_per_weight": on_disk.bits_per_weight},
            "served_by": {name: entry.to_dict() for name, entry in served.items()},
        }
        write_whole(json_file, json.dumps(written, indent=2) + "\n")
    if packed:
        print_next(*run_commands(model))
    elif quantized:
        runs = run_commands(model) if model_file(model) is None else [command_of("llmqat", "chat", model)]
        print_next(command_of("llmqat", "eval", model, "--reference", "ORIGINAL"), *runs)
    else:
        words = ("--scheme", scheme, *option("--group-size", group_size), "--out", f"{name_of_folder(model)}-{scheme}")
        print_next(command_of("llmqat", "quantize", model, *words))


def print_audit(coverage: CoverageAudit, *, tensors: bool = True) -> None:
    """Shows what is done to each tensor, if asked to, and the sums."""
    if tensors:
        console.print(audit_table(coverage))
    console.print(
        f"{len(coverage.quantized)} tensors quantized at {coverage.average_bits:.2f} bits a weight, "
        f"{len(coverage.kept)} kept; {coverage.bytes_before:,} bytes before, {coverage.bytes_after:,} after "
        f"({coverage.average_bits_of_all:.2f} bits a parameter of the whole model)",
    )
    for note in coverage.notes:
        console.print(f"- {note}")


def audit_table(coverage: CoverageAudit) -> FittedTable:
    """Returns what is done to each tensor, tensors that differ in the layer's number alone as one."""
    table = FittedTable(COLUMNS)
    for names, entries in _alike(coverage):
        first = entries[0]
        before, after = (sum(sizes) for sizes in zip(*((e.bytes_before, e.bytes_after) for e in entries), strict=True))
        table.add_row(
            names,
            f"{len(entries)}",
            "×".join(map(str, first.shape)),
            f"{first.treatment}: {first.reason}" if first.reason else first.treatment,
            f"{before:,}",
            f"{after:,}",
        )
    return table


def print_served(served: Mapping[str, Verdict]) -> None:
    """Shows who serves a scheme, if anybody was asked about."""
    if served:
        console.print(served_table(served))


def served_table(served: Mapping[str, Verdict]) -> FittedTable:
    """Returns who serves a scheme, and what is lost there."""
    table = FittedTable(SERVED_COLUMNS)
    for verdict in served.values():
        table.add_row(*verdict.row)
    return table


def _alike(coverage: CoverageAudit) -> list[tuple[str, list[AuditEntry]]]:
    """Returns the tensors in groups that differ in nothing but the layer's number, each with a name for all of it."""
    from llmqat.evaluate.layers import BLOCK_NUMBER

    groups: dict[tuple[Any, ...], list[AuditEntry]] = {}
    for entry in coverage.entries:
        key = (BLOCK_NUMBER.sub(".*.", entry.name, count=1), entry.shape, entry.treatment, entry.reason)
        groups.setdefault(key, []).append(entry)
    return [(_common_name(key[0], entries), entries) for key, entries in groups.items()]


def _common_name(pattern: str, entries: list[AuditEntry]) -> str:
    from llmqat.evaluate.layers import BLOCK_NUMBER

    numbers = [int(found[1]) for entry in entries if (found := BLOCK_NUMBER.search(entry.name))]
    if len(numbers) < 2:
        return entries[0].name
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return pattern.replace(".*.", f".{spans}.", 1)

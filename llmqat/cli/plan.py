"""The command `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmqat.cli.application import command, console, errors
from llmqat.cli.audit import print_audit, print_served
from llmqat.cli.options import OverridesArgument, RecipeArgument
from llmqat.cli.show import print_next

if TYPE_CHECKING:
    from llmqat.recipe import Plan
    from llmqat.recipe.block_probe import BlockProbe
    from llmqat.recipe.machine import ExpectedTime
    from llmqat.recipe.probe import Probe


@command()
def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    accelerate_config: Annotated[
        Path | None, typer.Option(help="Plan for the devices and the sharding of this file of `accelerate config`.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Plan for so many GPUs, which need not be here.")] = None,
    sharding: Annotated[
        str | None,
        typer.Option(
            help="With --processes: ddp (the default), zero2 (gradients, optimizer), zero3 or fsdp2 (weights as well)."
        ),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.0, help="GB of a device; else what is free here, where it is of that kind.")
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Calibrate a block and train a few steps on random tokens: real memory, time."),
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show every tensor: quantized how, or left alone and why.")
    ] = False,
) -> None:
    """Predicts memory, disk and time of a recipe, and which programs can load the result.

    What a run would refuse is told instead. Text in small files is read, to count its blocks and the training's steps.
    The time comes from earlier runs and probes on this machine (machine.json in ~/.cache/llmqat).

    **Examples**

        llmqat plan smollm2-135m-int4 --probe

        llmqat plan smollm2-135m-int4 quant.preset=int3 train.max_steps=100

        llmqat plan lora-int4 model=meta-llama/Llama-3.1-8B --processes 8 --sharding fsdp2 --memory 80
    """
    from llmqat.export.commands import command as command_of
    from llmqat.recipe import available_bytes, devices_of, load_recipe, plan_run
    from llmqat.recipe import probe as probed
    from llmqat.recipe.block_probe import calibrates_on_text, probe_block
    from llmqat.recipe.machine import expected_time, remember_probe
    from llmqat.recipe.memory import Devices
    from llmqat.recipe.preflight import begin, check_run, count_blocks

    if accelerate_config is not None and processes is not None:
        raise ValueError("--accelerate-config says how many processes there are; leave out --processes")
    if sharding is not None and processes is None:
        raise ValueError(f"--sharding {sharding} is for GPUs that --processes N counts; give both, or neither")
    devices = None if processes is None else Devices(processes, sharding or "ddp", "cuda")
    if accelerate_config is not None:
        devices = devices_of(accelerate_config)
    loaded = load_recipe(recipe, overrides or ())
    flight = begin(loaded)
    check_run(flight, overwrite=True, elsewhere=devices is not None)  # what lies in the folder is the run's matter
    processes_planned = flight.arguments.world_size if devices is None else devices.processes
    blocks = None if flight.findings.errors else count_blocks(flight, processes_planned)
    planned = None
    with flight.findings.noting():
        planned = plan_run(flight.recipe, devices, blocks)
    flight.findings.refuse()
    assert planned is not None
    world = flight.arguments.world_size
    here = Devices(processes=world, accelerator=flight.arguments.device.type)
    available = round(memory * 1e9) if memory is not None else available_bytes(planned.devices)
    found = None
    calibrated = None
    if probe and calibrates_on_text(loaded):
        try:
            calibrated = probe_block(loaded)
        except ValueError as error:
            errors.print(f"warning: {error}", style="yellow", soft_wrap=True)
    if probe and (loaded.trains or not calibrates_on_text(loaded)):
        found = probed(loaded)
        remember_probe(loaded, planned.coverage, world, found.tokens_per_second)
    time = expected_time(loaded, planned.coverage, world, planned.tokens) if planned.devices == here else None
    timed = calibrated if planned.devices == here else None
    console.print(answer(planned, available, time, timed), style="bold", soft_wrap=True)
    _print_plan(planned, available)
    if calibrated is not None:
        _print_block_probe(calibrated)
    if found is not None:
        _print_probe(planned, found)
    print_audit(planned.coverage, tensors=layers)
    if not layers:
        console.print("every tensor, and why it is kept or quantized: the same command with --layers")
    print_served(planned.served)
    print_next(command_of("llmqat", "train", recipe, *(overrides or ())))


def _print_plan(planned: Plan, available: int | None) -> None:
    if planned.target_bits is not None:
        console.print(f"bits are chosen by layer when the run begins, {planned.target_bits} on average")
    text = "text: read when the run begins" if planned.blocks is None else f"text: blocks {planned.blocks:,}"
    if planned.steps == 0:
        text += "; nothing is trained"
    elif planned.steps is not None and planned.tokens is not None:
        text += f"; training: steps {planned.steps:,}, tokens {planned.tokens:,}"
    console.print(text)
    if planned.law is not None and planned.tokens is not None:
        console.print(f"tokens: {planned.law.worth(planned.tokens)}")
    console.print(f"teacher: {planned.teacher}", soft_wrap=True)
    _print_memory(planned)
    _print_disk(planned)
    if available is not None:
        _print_fit(planned, available)


def answer(plan: Plan, available: int | None, time: ExpectedTime | None, calibrated: BlockProbe | None = None) -> str:
    """Returns what a plan comes to: does it fit, how long, how much disk, which programs can load it."""
    peak = plan.memory.peak
    if available is None:
        fits = f"It takes {peak / 1e9:.1f} GB of memory on each device (--memory GB says whether that fits)"
    elif plan.fits(available):
        fits = f"It fits: {peak / 1e9:.1f} of {available / 1e9:.1f} GB of memory"
    else:
        fits = f"It does not fit: {peak / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free"
    served = [verdict.title for verdict in plan.served.values() if verdict.serves]
    disk = f"{plan.disk.peak / 1e9:.1f} GB of disk"
    return f"{fits}; {_duration(plan, time, calibrated)}; {disk}; served by {', '.join(served) or 'llmqat alone'}."


def _duration(plan: Plan, time: ExpectedTime | None, calibrated: BlockProbe | None) -> str:
    from llmqat.recipe.memory import Calibration
    from llmqat.terminal.bars import duration

    if time is None and calibrated is not None:
        training = "" if plan.steps == 0 else "training, "
        choosing = "" if plan.target_bits is None else "the choice of bits, "
        return (
            f"calibration takes about {duration(calibrated.seconds)} on this machine, {training}{choosing}text and "
            "evaluation not counted"
        )
    if time is None:
        does_nothing = isinstance(plan.method, Calibration) and not plan.method.tokens
        return "how long is not known here" + ("" if does_nothing else " (--probe measures it)")
    words = f"about {duration(time.seconds)} on this machine, as {time.measured.by} of {time.measured.date} went"
    return words if time.whole else f"training takes {words}, text, calibration and evaluation not counted"


def _print_memory(plan: Plan) -> None:
    from llmqat.recipe.memory import Calibration

    memory, devices, method = plan.memory, plan.devices, plan.method
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in memory.parts().items() if value)
    where = f"{devices.processes} x {devices.accelerator}" + (f", {devices.kind}" if devices.processes > 1 else "")
    if isinstance(method, Calibration):
        console.print(f"memory of a device ({where}) in calibration: about {memory.peak / 1e9:.2f} GB")
        console.print(f"  GB: {parts}; text that the model writes is not counted")
        return
    console.print(
        f"trained: {method.trained:,} of {plan.size.parameters + plan.size.groups:,} parameters and scales",
    )
    console.print(f"memory of a device ({where}) in training: {memory.peak / 1e9:.2f} GB at most")
    console.print(f"  GB: {parts}; not all at once")
    if devices.processes > 1:
        from llmqat.recipe.memory import traffic_of

        sent = traffic_of(plan.size, method, devices)
        console.print(f"  each device sends {sent / 1e9:.2f} GB a step")


def _print_disk(plan: Plan) -> None:
    from llmqat.recipe.disk import free_bytes

    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in plan.disk.parts().items() if value)
    free = free_bytes(plan.output) / 1e9
    console.print(f"disk in {plan.output}: {plan.disk.peak / 1e9:.2f} GB at most, and {free:.2f} GB are free")
    console.print(f"  GB: {parts}; all but text and model are removed at the end")


def _print_fit(plan: Plan, available: int) -> None:
    from llmqat.recipe.memory import Calibration
    from llmqat.recipe.plan import MOST_USED

    if isinstance(plan.method, Calibration):
        least = plan.by_block
        if plan.fits(available):
            return
        if least is not None and least.peak <= MOST_USED * available:
            console.print(
                f"the model does not fit into {available / 1e9:.1f} GB; its blocks come one by one, which takes about "
                f"{least.peak / 1e9:.2f} GB"
            )
        else:
            errors.print(
                f"warning: it does not fit into {available / 1e9:.1f} GB, of which nine tenths are planned with; a "
                "smaller batch_size and fewer blocks of the stages need less, and the weights alone "
                f"{plan.memory.weights / 1e9:.2f} GB",
                style="yellow",
            )
        return
    batch = plan.fitting_batch(available)
    if batch >= plan.method.batch:
        shown = "4,096 or more" if batch >= 4095 else f"{batch:,}"
        text = f"it fits into {available / 1e9:.1f} GB; so would per_device_train_batch_size up to {shown}"
        console.print(text)
        return
    errors.print(
        f"warning: it does not fit into {available / 1e9:.1f} GB, of which nine tenths are planned with"
        + (f"; per_device_train_batch_size={batch} would" if batch else ""),
        style="yellow",
    )
    ways = plan.cheaper(available)
    for name, memory in ways.items():
        errors.print(f"  {memory.peak / 1e9:.2f} GB: {name}")
    if not ways:
        errors.print("  nor does any cheaper way; spread it over more devices (--processes N --sharding fsdp2)")


def _print_block_probe(found: BlockProbe) -> None:
    from llmqat.terminal.bars import duration

    taken = (
        "unknown" if found.peak_bytes is None else f"{found.peak_bytes / 1e9:.2f} GB with embeddings and output head"
    )
    console.print(
        f"probe: a block is calibrated in {duration(found.block_seconds)}, all {found.blocks} in about "
        f"{duration(found.seconds)}; memory of one block {taken}",
        soft_wrap=True,
    )


def _print_probe(plan: Plan, found: Probe) -> None:
    taken = "unknown" if found.peak_bytes is None else f"{found.peak_bytes / 1e9:.2f} GB"
    console.print(f"probe: memory {taken}; a step {found.step_seconds:.2f} s")
    if plan.steps is not None:
        minutes = found.seconds(plan.steps) / 60
        alone = "" if plan.devices.processes == 1 else ", what devices send each other not counted"
        console.print(f"training would take {minutes:.1f} minutes here{alone}")

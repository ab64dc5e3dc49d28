"""Commands that write a packed checkpoint for others: `export` and `push`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from llmqat.cli.application import command, console
from llmqat.cli.options import ModelArgument
from llmqat.cli.show import print_next
from llmqat.extras import check_installed
from llmqat.paths import check_folder_output, check_new

FORMS: dict[tuple[str, str | None], bool] = {
    ("compressed-tensors", "vllm"): False,
    ("compressed-tensors", "vllm-arm"): True,
}
"""By `--format` and `--for` of `export`: whether w4a8 is written as `int-quantized`."""


@command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="File (gguf) or folder (all others) to write; must not exist.")],
    format: Annotated[
        str,
        typer.Option(
            help="gguf: one file for llama.cpp; gptq: GPTQ's layout for gptqmodel, vLLM and others; onnx: for "
            "onnxruntime; compressed-tensors: another tool's checkpoint as llmqat writes it; peft: an adapter that was "
            "trained inside quantizers, as a plain one over --base."
        ),
    ] = "gguf",
    base: Annotated[
        Path | None, typer.Option(help="With peft, the packed checkpoint that the adapter is to be served with.")
    ] = None,
    served_by: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="With compressed-tensors, the server that reads it: vllm, or vllm-arm (on Arm CPUs). They differ in "
            "how 4-bit weights with 8-bit inputs (w4a8) lie on disk.",
        ),
    ] = None,
) -> None:
    """Writes a packed checkpoint in another format: its codes as they are, nothing rounded again.

    peft is for servers that hold several adapters on one base (vllm serve BASE --enable-lora --lora-modules NAME=OUT).
    The adapter then stands beside the codes instead of being folded into them; what that costs is measured and said.

    **Examples**

        llmqat export runs/smollm2-135m-int4/model --format gguf --out smollm2-int4.gguf

        llmqat export runs/smollm2-135m-int4/model --format onnx --out smollm2-int4-onnx

        llmqat export runs/smollm2-135m-w4a8/model --format compressed-tensors --for vllm-arm --out smollm2-w4a8-arm

        llmqat export runs/lora-int4/adapter --format peft --base smollm2-int4 --out my-adapter
    """
    check_new(out, "--out")
    check_folder_output(out.parent, "--out")
    if (format == "peft") != (base is not None):
        raise ValueError(
            "--format peft needs --base, the packed checkpoint to serve the adapter with (llmqat quantize MODEL "
            "--method search --out BASE makes one); no other format takes it"
        )
    if base is not None:
        _export_adapter(Path(model), base, out)
        return

    from llmqat.export import CONVERSIONS, PACKAGES, keep_record, load_any, save_again
    from llmqat.export.commands import run_commands

    if format not in CONVERSIONS:
        raise ValueError(f"{CONVERSIONS.unknown(format, '--format')}, peft")
    if served_by is not None and (format, served_by) not in FORMS:
        raise ValueError(
            f"--for {served_by} means nothing with --format {format}; with --format compressed-tensors give vllm or "
            f"vllm-arm, or leave it out"
        )
    if format in PACKAGES:
        check_installed(PACKAGES[format], f"--format {format}")
    write = CONVERSIONS[format]
    if FORMS.get((format, served_by)):
        write = functools.partial(save_again, int_quantized=True)
    sizes = write(*load_any(model, None), out)  # in its own dtype: nothing is rounded again
    keep_record(model, out)
    parts = ", ".join(f"{kind} {size:,}" for kind, size in sizes.items())
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    console.print(f"{out}: {size:,} bytes ({parts})", soft_wrap=True)
    print_next(*run_commands(out))


def _export_adapter(adapter: Path, base: Path, out: Path) -> None:
    """Writes an adapter for servers, and says what it costs that it is not folded, and how to serve it."""
    from llmqat.evaluate.adapters import write_beside
    from llmqat.export.commands import vllm_command

    done = write_beside(adapter, base, out)
    parts = ", ".join(f"{kind} {size:,}" for kind, size in done.sizes.items())
    console.print(f"{out}: {parts} bytes", soft_wrap=True)
    console.print(
        f"beside the codes of {base} instead of folded into them: KL {done.kl:.4f} from the folded model, the same "
        f"most probable token for {done.top1:.1%} of {done.tokens:,}; rounding W + BA is not rounding W",
        soft_wrap=True,
    )
    print_next(vllm_command(base, "--enable-lora", "--lora-modules", f"{out.name}={out}"))


@command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Packed checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the hub; made if not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; main where not given.")] = None,
    license: Annotated[str | None, typer.Option(help="License of the original model, such as apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the original model.")] = None,
    dry_run: Annotated[
        Path | None, typer.Option(help="Write what would be published to this folder; send nothing.")
    ] = None,
) -> None:
    """Publishes a packed checkpoint on the Hugging Face hub, with a model card of its scheme, data and results.

    **Examples**

        llmqat push runs/smollm2-135m-int4/model someone/smollm2-135m-int4 --license apache-2.0 --private

        llmqat push runs/smollm2-135m-int4/model someone/smollm2-135m-int4 --dry-run to-publish
    """
    if dry_run is not None:
        check_new(dry_run, "--dry-run")

    from llmqat.export.commands import command as command_of
    from llmqat.export.commands import option, run_commands
    from llmqat.export.hub import missing_of_card
    from llmqat.export.hub import push as publish

    done = publish(
        folder,
        repository,
        private=private,
        revision=revision,
        license=license,
        base_model=base_model,
        dry_run=dry_run,
    )
    if dry_run is None:
        console.print(done, soft_wrap=True)
        print_next(*run_commands(folder, published_as=repository))
    else:
        files = sorted(dry_run.iterdir())
        size = sum(path.stat().st_size for path in files)
        branch = "" if revision is None else f" (branch {revision})"
        kind = "private" if private else "public"
        console.print(
            f"{done}: {len(files)} files, {size:,} bytes, would go to {repository}{branch}, {kind} if new",
            soft_wrap=True,
        )
        for path in files:
            console.print(f"  {path.name} {path.stat().st_size:,}", soft_wrap=True)
        for gap in missing_of_card(dry_run):
            console.print(f"missing in the model card: {gap}", soft_wrap=True)
        asked = (("--revision", revision), ("--license", license), ("--base-model", base_model))
        words = [word for name, value in asked for word in option(name, value)]
        print_next(command_of("llmqat", "push", folder, repository, *words, "--private" if private else None))

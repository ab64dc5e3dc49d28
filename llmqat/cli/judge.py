"""The commands `eval` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmqat.cli.application import EXIT_GATE, command, console, errors
from llmqat.cli.options import (
    BaselineOption,
    BatchSizeOption,
    CsvOption,
    GateOption,
    JsonOption,
    MarkdownOption,
    MaxNewTokensOption,
    MaxPromptsOption,
    MaxWindowsOption,
    ModelsArgument,
    PromptsOption,
    ProtocolOption,
    ReferenceOption,
    StrideOption,
    TaskFolderOption,
    TaskLimitOption,
    TasksOption,
    TextOption,
    ThresholdOption,
    TrainedTextOption,
    WindowOption,
)
from llmqat.cli.show import print_next

ReportFiles = tuple[Path | None, Path | None, Path | None, Path | None]
"""JSON, CSV, Markdown, HTML."""
KEPT_OF_BASELINE = (
    *("protocol", "texts", "window", "stride", "max_windows"),
    *("prompts", "max_prompts", "max_new_tokens"),
)
"""Settings of a baseline that stand where nothing else is asked for."""

if TYPE_CHECKING:
    from llmqat.evaluate.report import Verdict
    from llmqat.evaluate.tasks import TaskSettings
    from llmqat.recipe import EvaluationSettings


@command("eval")
def evaluate(
    models: ModelsArgument,
    text: TextOption = None,
    protocol: ProtocolOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    max_windows: MaxWindowsOption = None,
    reference: ReferenceOption = None,
    batch_size: BatchSizeOption = 4,
    tasks: TasksOption = None,
    task_folder: TaskFolderOption = None,
    task_limit: TaskLimitOption = None,
    prompts: PromptsOption = None,
    max_prompts: MaxPromptsOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    gate: GateOption = None,
    baseline: BaselineOption = None,
    threshold: ThresholdOption = 0.02,
    allow_trained_text: TrainedTextOption = False,
    json_file: JsonOption = None,
    csv_file: CsvOption = None,
    markdown: MarkdownOption = None,
) -> None:
    """Scores models on the same windows of text: perplexity, divergence from a reference, where they are weak.

    Exit code 3 means that a gate is broken.

    **Examples**

        llmqat eval runs/smollm2-135m-int4/model --text notes.txt --json notes.json

        llmqat eval runs/a/model runs/b/model --reference HuggingFaceTB/SmolLM2-135M --window 512 --max-windows 40

        llmqat eval runs/a/model model-Q4_0.gguf my-adapter/ --reference ./original --protocol wikitext

        llmqat eval runs/a/model --reference ./original --tasks arc_easy,piqa

        llmqat eval runs/a/model --baseline last-week.json --gate "perplexity<=1.01x"
    """
    settings = _asked(
        text,
        protocol,
        window,
        stride,
        max_windows,
        batch_size,
        (prompts, max_prompts, max_new_tokens),
        baseline,
        allow_trained_text,
        speed=False,
    )
    chosen = _tasks(tasks, task_folder, task_limit)
    _judge(models, settings, reference, baseline, gate, threshold, chosen, (json_file, csv_file, markdown, None))


@command()
def compare(
    models: ModelsArgument,
    reference: ReferenceOption = None,
    text: TextOption = None,
    protocol: ProtocolOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    max_windows: MaxWindowsOption = None,
    batch_size: BatchSizeOption = 4,
    tasks: TasksOption = None,
    task_folder: TaskFolderOption = None,
    task_limit: TaskLimitOption = None,
    prompts: PromptsOption = None,
    max_prompts: MaxPromptsOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    gate: GateOption = None,
    baseline: BaselineOption = None,
    threshold: ThresholdOption = 0.02,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML report to this file.")] = None,
    allow_trained_text: TrainedTextOption = False,
    json_file: JsonOption = None,
    csv_file: CsvOption = None,
    markdown: MarkdownOption = None,
) -> None:
    """Compares models with a reference: quality as `eval` does, size, speed, memory, energy; with an HTML report.

    Exit code 3 means that a gate is broken.

    **Examples**

        llmqat compare runs/a/model runs/b/model --reference HuggingFaceTB/SmolLM2-135M --html ab.html --json ab.json

        llmqat compare runs/a/model --reference ./original --gate "perplexity<=1.02x, top1>=0.95, size<=0.3x"

        llmqat compare runs/a/model --reference ./original --prompts instructions --gate "not_ended<=0.1, length<=1.1x"
    """
    settings = _asked(
        text,
        protocol,
        window,
        stride,
        max_windows,
        batch_size,
        (prompts, max_prompts, max_new_tokens),
        baseline,
        allow_trained_text,
        speed=True,
    )
    chosen = _tasks(tasks, task_folder, task_limit)
    _judge(models, settings, reference, baseline, gate, threshold, chosen, (json_file, csv_file, markdown, html))


def _asked(
    texts: list[str] | None,
    protocol: str | None,
    window: int | None,
    stride: int | None,
    max_windows: int | None,
    batch_size: int,
    prompts: tuple[str | None, int | None, int | None],
    baseline: Path | None,
    allow_trained_text: bool,
    speed: bool,
) -> EvaluationSettings:
    """Returns what `eval` and `compare` measure: what was asked for, else as the baseline, else the protocol's own."""
    from llmqat.evaluate.gate import read_report
    from llmqat.recipe import EvaluationSettings

    source, max_prompts, max_new_tokens = prompts
    given: dict[str, Any] = {
        "protocol": protocol,
        "texts": texts and tuple(texts),
        "window": window,
        "stride": stride,
        "prompts": source,
        "max_new_tokens": max_new_tokens,
    }
    asked = {key: value for key, value in given.items() if value is not None}
    if max_windows is not None:
        asked["max_windows"] = max_windows or None
    if max_prompts is not None:
        asked["max_prompts"] = max_prompts or None
    if baseline is not None:
        before = read_report(baseline)["settings"]
        kept = {key: before[key] for key in KEPT_OF_BASELINE if key in before}
        if protocol not in (None, kept.get("protocol")):
            raise ValueError(
                f"--protocol {protocol}: {baseline} was measured by the protocol {kept.get('protocol')}; leave "
                "--protocol out, or --baseline"
            )
        asked = {**kept, **asked}
    return EvaluationSettings(**asked, batch_size=batch_size, speed=speed, allow_trained_text=allow_trained_text)


def _tasks(names: str | None, folder: Path | None, limit: int | None) -> TaskSettings | None:
    from llmqat.evaluate.tasks import TaskSettings

    if names is None and folder is None:
        return None
    given = (name.strip() for name in (names or "").split(","))
    return TaskSettings(tuple(dict.fromkeys(name for name in given if name)), folder, limit)


def _judge(
    models: list[str],
    settings: EvaluationSettings,
    reference: str | None,
    baseline: Path | None,
    gate: str | None,
    threshold: float,
    tasks: TaskSettings | None,
    files: ReportFiles,
) -> None:
    """Measures, shows, writes (JSON, CSV, Markdown, HTML), and exits with 3 where the gate is broken."""
    from llmqat.evaluate.compare import NotMeasured
    from llmqat.evaluate.gate import parse_gate, read_report
    from llmqat.evaluate.report import check_files, measured, verdict_on
    from llmqat.recipe import compare_models

    rules = parse_gate(gate) if gate else ()
    before = None if baseline is None else read_report(baseline)
    if reference is None and before is not None:
        reference = before["settings"].get("reference")
    read: list[str | Path | None] = [*models, reference, *settings.texts, settings.prompts, baseline]
    if tasks is not None:
        read.append(tasks.folder)
    outputs = dict(zip(("--json", "--csv", "--markdown", "--html"), files, strict=True))
    check_files(outputs, [source for source in read if source is not None])
    html = files[-1] is not None
    try:
        comparison = compare_models(
            models, settings, reference, tasks=tasks, details=html, rules=rules, baseline=before
        )
    except NotMeasured as error:
        console.print(measured(error.comparison))
        _write(verdict_on(error.comparison, threshold=threshold), files)
        raise
    console.print(measured(comparison))  # now: whatever happens to the files, the figures are seen
    try:
        verdict = verdict_on(comparison, rules, before, threshold)
    except ValueError:
        _write(verdict_on(comparison, threshold=threshold), files)
        raise
    console.print(verdict.rendered())
    _write(verdict, files)
    print_next(*verdict.next)
    if verdict.broken:
        which = ", ".join(dict.fromkeys(f"{check.rule} ({check.model})" for check in verdict.broken))
        errors.print(f"gate broken, {len(verdict.broken)} of {len(verdict.checks)}: {which}", soft_wrap=True)
        raise typer.Exit(EXIT_GATE)


def _write(verdict: Verdict, files: ReportFiles) -> None:
    """Writes the files that are asked for and says which these are."""
    if written := verdict.write(*files):
        console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True, markup=False)

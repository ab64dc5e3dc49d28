"""The run of a recipe: calibrates, trains, saves a packed checkpoint, and compares it as it lies on disk.

    load teacher and text -> rotate, smooth -> prepare -> calibrate -> train -> save with proof -> load -> compare

The table compares the trained checkpoint with full precision, plain rounding and calibration without training, all on
the same windows. The same command resumes an interrupted run: stages before training are quick or keep their results in
the run folder, and training continues from the trainer's last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from llmqat.calibrate import (
    ORIGINALS_FILE,
    CustomStage,
    LayerReport,
    Originals,
    RangesStage,
    StageReport,
    calibrate,
    check_folds,
    needs_text,
    report_layers,
    rotates,
)
from llmqat.data import DataConfig, Rows, TextSplits, TokenBlocks
from llmqat.data.hub import use_chat_template
from llmqat.data.length import check_length
from llmqat.data.processes import ALONE, Processes
from llmqat.data.shards import TEACHER_FOLDER
from llmqat.data.teacher_cache import TeacherCache
from llmqat.evaluate.compare import Candidate, Comparison, compare, progress_bar
from llmqat.evaluate.documents import head
from llmqat.evaluate.layers import write_layers
from llmqat.evaluate.perplexity import TokenWindows
from llmqat.export.checkpoint import RUN_FILE, ExportReport, load, record_of, save
from llmqat.export.registry import register, tracked_run
from llmqat.extras import missing
from llmqat.files import COPY_AGAIN, read_json, write_whole
from llmqat.heap import give_back_freed_memory
from llmqat.hub import is_local
from llmqat.layers import CoverageAudit, QuantModule, changed_since_prepared, convert, without_adapters
from llmqat.models import (
    CALIBRATION_FILLED,
    adapter_base,
    keeps_documents_apart,
    load_adapter_base,
    load_model,
    load_with_few_bits,
    to_accelerator,
)
from llmqat.recipe.allocation import PLAN_FILE, choice_name, plan_bits, planned
from llmqat.recipe.config import TRAINER_FOLDER, UNPACKED_ONLY, Recipe, forward_dtype, master_dtype, unread
from llmqat.recipe.evaluation import (
    ANSWERED,
    EARLIER_TEXTS,
    answer_extras,
    check_untrained,
    documents_learned,
    documents_recorded,
    generation_extras,
    held_out_windows,
    texts_seen,
)
from llmqat.recipe.folder import (
    ADAPTER_FOLDER,
    CALIBRATION_FOLDER,
    CHECKPOINT_FOLDER,
    RESULTS_FILE,
    held_run_folder,
    kept_text,
    open_run_folder,
    what_is_kept,
)
from llmqat.recipe.machine import remember_run
from llmqat.recipe.plan import check_blocks, coverage_of, learns_answers
from llmqat.recipe.preflight import Preflight, begin, check_run
from llmqat.recipe.record import RunRecord
from llmqat.recipe.start import starts_packed
from llmqat.recipe.teacher import cache_while_writing, check_cached, teacher_cache_of, text_of, written_cache
from llmqat.recipe.training import TrainingLines
from llmqat.terminal import Stages, progress
from llmqat.train import (
    MonitorSettings,
    QATArguments,
    QATTrainer,
    QuantizationMonitor,
    is_own_teacher,
    whole_model,
)
from llmqat.train.adapter import save_adapter
from llmqat.train.checkpoints import last_checkpoint

log = logging.getLogger(__name__)

REPORT_BLOCKS = 4
"""Token blocks that the output error of layers is measured on."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a finished run leaves behind."""

    checkpoint: Path
    """The packed checkpoint in the run folder."""
    comparison: Comparison
    """Full precision, plain rounding, training-free calibration and the trained artefact."""
    report: ExportReport
    """Bytes of the checkpoint by part."""
    training: dict[str, Any] | None
    """Steps, tokens, tokens a second, first and last loss, of what was done; None where nothing was trained."""
    seconds: dict[str, float]
    """Wall-clock time of each stage, since the run has begun or gone on."""
    goes_on: bool = False
    """Whether an interrupted run has gone on, so that `seconds` are not those of whole stages."""


class ResultsNotWrittenError(OSError):
    """A run is done and its checkpoint is saved, but the file of its results could not be written.

    Attributes:
        result: what the run found.
    """

    def __init__(self, message: str, result: RunResult) -> None:
        super().__init__(message)
        self.result = result


def run(recipe: Recipe, *, overwrite: bool = False) -> RunResult | None:
    """Runs `recipe` from the model to the compared artefact, or goes on with it where it was interrupted.

    Under `accelerate launch` or `torchrun` all processes share writing the text, calibrating and training; the main one
    reads text that exists, saves, evaluates and reports.

    Args:
        recipe: from `load_recipe`.
        overwrite: whether what an earlier run left in the output folder is removed first.

    Returns:
        The result in the main process, None in the others.

    Raises:
        FileExistsError: the output folder holds a finished run, another recipe's run, or something that is no run.
        FileNotFoundError: the model or a text is not there.
        ValueError: the model, the text or the scheme does not do.
    """
    flight = begin(recipe)
    arguments = flight.arguments
    if is_deepspeed_zero3_enabled():  # models are loaded and calibrated whole, and partitioned when training begins
        unset_hf_deepspeed_config()
    with arguments.main_process_first():  # a GGUF file is dequantized by one for all
        check_run(flight, overwrite=overwrite, folder=arguments.process_index == 0)
        flight.findings.refuse()
    record: RunRecord | None = None
    with ExitStack() as stack:
        with arguments.main_process_first(local=False):
            if arguments.process_index == 0:
                stack.enter_context(held_run_folder(recipe.output))
                if goes_on := open_run_folder(recipe, overwrite=overwrite):
                    log.info("resuming the interrupted run in %s (%s)", recipe.output, what_is_kept(recipe))
                record = stack.enter_context(RunRecord(recipe.output, arguments.world_size, goes_on))
                if not recipe.trains:
                    log.info("nothing is trained: train is null, or its max_steps or epochs are 0%s", unread(recipe))
        return _run(recipe, flight, record)


def _run(recipe: Recipe, flight: Preflight, record: RunRecord | None) -> RunResult | None:
    """Does what `run` does, in the run folder as it is; the main process keeps a record there."""
    arguments, coverage, windows = flight.arguments, flight.covered(), flight.windows
    main = arguments.process_index == 0
    stage = Stages(record)
    with stage("load", recipe.model), arguments.main_process_first():
        teacher, tokenizer = load_model(recipe.source, torch.bfloat16)
        use_chat_template(recipe.data, tokenizer)
        to_accelerator(teacher, arguments.device)
        # Now: what needs weights to be known should not cost the text.
        check_length(teacher, max(cut.read_length for cut in windows.values()), "evaluate.window")
        if flight.prompts is not None:
            check_length(teacher, flight.prompts.longest, ANSWERED)
        check_documents_apart(teacher, recipe.data)
        check_folds(teacher, recipe.calibrate)
        cache = teacher_cache_of(recipe, teacher, tokenizer)
        place = cache_while_writing(recipe, teacher)
    together = recipe.data.source == "synthetic"
    with stage("text", recipe.data.source), nullcontext() if together else arguments.main_process_first(local=False):
        writers = Processes.all() if together else ALONE
        text = kept_text(
            recipe.output,
            recipe.data,
            partial(text_of, recipe, tokenizer, teacher, writers, place),  # not kept: it holds the teacher in memory
            writers,
        )
        blocks, calibration_rows = text.train, calibration_rows_of(recipe, text)
        earlier = texts_seen(record_of(recipe.model))
        check_untrained(recipe.evaluate, documents_learned(text), "this recipe")
        check_untrained(recipe.evaluate, documents_recorded({EARLIER_TEXTS: earlier}), recipe.model)
        held_out = held_out_windows(text, recipe.evaluate)
        windows = {**held_out, **windows}
        _check_text(recipe, arguments, text, scores_held_out=bool(held_out))
        unlearned = _unlearned_answers(arguments, blocks) if recipe.trains else None
    if place is not None:
        with stage("teacher", f"its {place.top_k} most likely tokens, kept while it wrote"):
            cache = written_cache(place, teacher, tokenizer, text, Processes.all())
    check_cached(cache, text)
    del teacher  # loaded again where it is needed: beside the model that is calibrated it would double the memory
    if recipe.allocate is not None:
        with stage("allocate", f"{recipe.allocate.target_bits} bits"), arguments.main_process_first(local=False):
            recipe = with_planned_bits(recipe, calibration_rows, arguments)
            coverage = coverage_of(recipe.model, recipe.quant, rotates(recipe.calibrate))
    steps = ", ".join(step.stage for step in recipe.calibrate) or "plain rounding"
    with stage("calibrate", "nothing, it is packed" if starts_packed(recipe) else steps):
        student, calibration = calibrated_model(recipe, calibration_rows, arguments, Processes.all())
        layers = {"calibrated": layers_of(recipe, student, calibration_rows, arguments)}
    trained: PreTrainedModel | None = student
    training: dict[str, Any] | None = None
    if recipe.trains:
        sharing = f", {arguments.world_size} processes" if arguments.world_size > 1 else ""
        with stage("train", f"{len(blocks):,} blocks of {blocks.block_size} tokens{sharing}"):
            model = trainable_model(recipe, student, arguments)
            taught_by = _taught_by(recipe, model, cache, arguments)

            def anew() -> nn.Module:
                return trainable_model(recipe, calibrated_model(recipe, calibration_rows, arguments)[0], arguments)

            trained, training = _train(model, taught_by, arguments, text, windows, recipe.monitor, anew, record)
            del taught_by, model
    del student
    if trained is None or not main:
        return None
    facts: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json", exclude=set(UNPACKED_ONLY) if starts_packed(recipe) else None),
        "model_is_local": is_local(recipe.model),
        **text.record(),
        **({EARLIER_TEXTS: earlier} if earlier else {}),
        "calibration": [dataclasses.asdict(report) for report in calibration],
        "training": training,
    }
    with stage("save", "packing, and checking the files"):
        if arguments.trainable == "scales" or starts_packed(recipe):
            convert(trained)
        elif recipe.trains:
            layers["trained"] = layers_of(recipe, trained, calibration_rows, arguments)
        _write_layers(layers, recipe.output)
        folder = recipe.output / CHECKPOINT_FOLDER
        report = save(trained, folder, tokenizer, run=facts, overwrite=True, int_quantized=flight.int_quantized)
        del trained
    with stage("evaluate", ", ".join(windows)):
        candidates = _candidates(recipe, coverage, calibration_rows, report, arguments, unlearned)
        with progress_bar() as advance:
            comparison = compare(
                candidates,
                windows,
                batch_size=recipe.evaluate.batch_size,
                speed=recipe.evaluate.speed,
                progress=advance,
                extras={
                    **answer_extras(windows, tokenizer, candidates[-1].name),
                    **generation_extras(flight.prompts, tokenizer, advance),
                },
                fine_tuned=recipe.trains and learns_answers(arguments, blocks),
            )
    goes_on = record is not None and record.goes_on
    result = RunResult(report.folder, comparison, report, training, stage.seconds, goes_on)
    remember_run(recipe, coverage, arguments.world_size, training, stage.seconds, goes_on=goes_on)
    _keep_results(recipe, result, facts)
    _register(recipe, result, stage)
    return result


def _check_text(recipe: Recipe, arguments: QATArguments, text: TextSplits, *, scores_held_out: bool) -> None:
    """Warns where `text` is too little to learn answers from, or holds out what nothing will be measured on.

    Raises:
        ValueError: it fills no batch, or a warm-up does not end within the training.
    """
    few = check_blocks(arguments, text.train, arguments.world_size) if recipe.trains else None
    if arguments.process_index != 0:
        return
    if few:
        log.warning("%s", few)
    if text.validation is not None and not recipe.trains and not scores_held_out:
        log.warning(
            "data.validation_share=%s: nothing is trained, so nothing is measured on the text that it holds out",
            recipe.data.validation_share,
        )


def _register(recipe: Recipe, result: RunResult, stage: Stages) -> None:
    """Puts what MLflow has tracked into its registry; where that fails, says so: the run itself is finished."""
    name, run_id = recipe.output.name, (result.training or {}).get("mlflow_run")
    if run_id is None:
        return
    with stage("register", f"{name} in MLflow's model registry"):
        try:
            log.info("it is version %s there", register(result.checkpoint, name, run_id))
        except OSError as error:
            log.error("%s; to try again: llmqat.export.registry.register(folder, name, run_id)", error)


def _taught_by(
    recipe: Recipe, model: PreTrainedModel | PeftModel, cache: TeacherCache | None, arguments: QATArguments
) -> PreTrainedModel | TeacherCache | None:
    """Returns what `model` learns from; None for nobody, or for itself with quantizers and adapters off."""
    if cache is not None:
        return cache
    if arguments.kl_weight == 0:
        return None
    if recipe.teacher_bits is not None:
        return load_with_few_bits(recipe.source, recipe.teacher_bits)
    if recipe.lora is not None and is_own_teacher(model):
        return None
    return _original(recipe, arguments)


def _original(recipe: Recipe, arguments: QATArguments) -> PreTrainedModel:
    model, _ = load_model(recipe.source, torch.bfloat16)
    return to_accelerator(model, arguments.device)


def check_documents_apart(model: PreTrainedModel, data: DataConfig) -> None:
    """Raises ValueError where documents are to be kept apart and `model` cannot do so."""
    if data.keeps_apart and not keeps_documents_apart(model):
        raise ValueError(
            f"data.packing: {type(model).__name__} attends beyond the documents that position ids begin; "
            "use data.packing=concatenate"
        )


def _unlearned_answers(arguments: QATArguments, blocks: TokenBlocks) -> str | None:
    """Warns, and returns the warning, where the text has answers and the loss sees the original model alone."""
    if blocks.rows.scored is None or arguments.cross_entropy_weight > 0:
        return None
    said = (
        f"the answers in {blocks.source} are not learned: train.cross_entropy_weight is 0, so the model is trained to "
        "answer as the original does, which repairs rounding and nothing else. To learn them: "
        "train.cross_entropy_weight=1.0 train.kl_weight=0.2, as in the recipe chat-lora-int4"
    )
    if arguments.process_index == 0:
        log.warning("%s", said)
    return said


def calibration_rows_of(recipe: Recipe, text: TextSplits) -> Rows:
    """Returns the token blocks for calibration; a block of text that the model wrote counts as one document.

    Keeping its documents apart would need an attention mask for each block, found by a pass over the text.
    """
    rows = text.calibrated_on.rows
    return Rows(rows.stored) if recipe.data.source == "synthetic" else rows


def with_planned_bits(recipe: Recipe, blocks: Rows, arguments: QATArguments) -> Recipe:
    """Returns `recipe` with the bits that its `allocate` leads to, made once and kept in the run folder."""
    assert recipe.allocate is not None
    dtype = forward_dtype(arguments.bf16)
    file = recipe.output / PLAN_FILE
    how = {"seed": recipe.seed, "dtype": dtype, "device": arguments.device}
    plan = planned(file, partial(plan_bits, recipe.model, recipe.quant, recipe.allocate, blocks, **how)).allocation
    counts = {bits: sum(1 for chosen in plan.bits.values() if chosen == bits) for bits in recipe.allocate.choices}
    shown = ", ".join(f"{count} layers of {choice_name(bits)}" for bits, count in counts.items())
    log.info("%.3f bits a weight: %s; predicted KL %.4f (%s)", plan.average_bits, shown, plan.predicted_kl, file)
    return recipe.model_copy(update={"quant": plan.applied_to(recipe.quant)})


def calibrated_model(
    recipe: Recipe, blocks: Rows, arguments: QATArguments, processes: Processes = ALONE
) -> tuple[PreTrainedModel, list[StageReport]]:
    """Returns the recipe's model, prepared and calibrated by `processes` together, and what each stage did.

    What an earlier start, or this one, has left of it in the run folder is not done again. A packed model is as it is.
    """
    if starts_packed(recipe):
        return load(recipe.model).to(arguments.device), []
    model, _ = load_model(recipe.model, master_dtype(recipe))
    if recipe.trains or any(isinstance(stage, CustomStage) for stage in recipe.calibrate):
        model.to(arguments.device)  # whole
    else:
        to_accelerator(model, arguments.device, filled=CALIBRATION_FILLED)
    reports = calibrate(
        model,
        recipe.quant,
        recipe.calibrate,
        blocks,
        seed=recipe.seed,
        folder=recipe.output / CALIBRATION_FOLDER,
        dtype=forward_dtype(arguments.bf16),
        bar=progress,
        processes=processes,
    )
    return model, reports


def trainable_model(recipe: Recipe, student: PreTrainedModel, arguments: QATArguments) -> PreTrainedModel | PeftModel:
    """Returns what is trained of a calibrated `student`, which is changed in place: with adapters, or packed."""
    model = student if recipe.lora is None else recipe.lora.attach(student, recipe.seed)
    if isinstance(model, PeftModel):
        local = Path(recipe.model).expanduser()
        base = str(local.resolve()) if local.exists() else recipe.model
        model.active_peft_config.base_model_name_or_path = base
    if arguments.trainable == "scales" and not starts_packed(recipe):
        convert(student)  # codes stay as they are, so no weight is needed any more
    return model


def layers_of(recipe: Recipe, model: PreTrainedModel, blocks: Rows, arguments: QATArguments) -> list[LayerReport]:
    """Returns what quantization, and training where it is done, has done to each layer; empty in other processes."""
    originals = Originals.found(without_adapters(model), recipe.output / CALIBRATION_FOLDER / ORIGINALS_FILE)
    if arguments.process_index != 0 or originals is None:
        return []
    dtype = forward_dtype(arguments.bf16)
    return report_layers(model, originals, blocks[:REPORT_BLOCKS], dtype)


def _write_layers(layers: Mapping[str, list[LayerReport]], folder: Path) -> None:
    if any(layers.values()):  # there are none of a model that was packed already
        write_layers(layers, folder, picture=missing("matplotlib") is None)


def plainly_rounded_model(recipe: Recipe, blocks: Rows, arguments: QATArguments) -> PreTrainedModel:
    """Returns the recipe's model, prepared, with the scales of plain rounding."""
    model, _ = load_model(recipe.model, master_dtype(recipe))
    to_accelerator(model, arguments.device)
    plain = [RangesStage(method="minmax")] if needs_text([], recipe.quant) else []
    calibrate(model, recipe.quant, plain, blocks)
    return model


def _watched(
    arguments: QATArguments, text: TextSplits, windows: Mapping[str, TokenWindows]
) -> Dataset[dict[str, Tensor]] | dict[str, Dataset[dict[str, Tensor]]] | None:
    """Returns what is evaluated while a model trains: the validation split, else the windows that the table is made of.

    Several texts come by name; none where neither is there to be evaluated.
    """
    if text.validation is not None:
        return text.validation.dataset()
    if arguments.eval_strategy == "no" and not arguments.eval_on_start:
        return None
    stems = [Path(name).stem for name in windows]  # short names for metrics, where they tell texts apart
    names = stems if len(set(stems)) == len(stems) else [*windows]
    datasets = {name: one.dataset() for name, one in zip(names, windows.values(), strict=True)}
    return datasets if len(datasets) > 1 else next(iter(datasets.values()))


def _train(
    model: PreTrainedModel | PeftModel,
    teacher: PreTrainedModel | TeacherCache | None,
    arguments: QATArguments,
    text: TextSplits,
    windows: Mapping[str, TokenWindows],
    monitor: MonitorSettings | None,
    anew: Callable[[], nn.Module],
    record: RunRecord | None,
) -> tuple[PreTrainedModel | None, dict[str, Any]]:
    """Trains `model` in place, from the run's last whole checkpoint if there is one; returns it and the facts of it.

    Adapters are folded into the weights of the model under them. Without a teacher the model is its own. What has been
    sharded is given to the first process alone, whole, in a model that `anew` makes.
    """
    blocks = text.train
    trainer = QATTrainer(
        model=model,
        teacher=teacher,
        args=arguments,
        train_dataset=blocks.dataset(),
        eval_dataset=_watched(arguments, text, windows),
    )
    if monitor is not None and any(isinstance(module, QuantModule) for module in model.modules()):  # not packed ones
        QuantizationMonitor(monitor).attach(trainer)
    last = last_checkpoint(Path(arguments.output_dir))
    if last is not None:
        log.info("resuming from %s", last)
    give_back_freed_memory()
    with TrainingLines.of(trainer, None if record is None else record.tell):
        output = trainer.train(resume_from_checkpoint=None if last is None else str(last))
        tokens, tokens_now = trainer.tokens_trained()
        validated = {} if text.validation is None else trainer.evaluate()
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trained = whole_model(trainer, anew)
    if isinstance(trained, PeftModel):
        _keep_adapter(trained, arguments)
        trained = trained.merge_and_unload()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    facts = {
        "steps": trainer.state.global_step,
        "kept_step": kept_step(trainer),
        "tokens": tokens,
        "seconds": output.metrics["train_runtime"],
        "tokens_per_second": tokens_now / output.metrics["train_runtime"] if tokens_now else None,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "validation_loss": validated.get("eval_loss"),
        "validation_perplexity": validated.get("eval_perplexity"),
        "trained_parameters": parameters,
        "own_teacher": teacher is None,
        "teacher_cache": dataclasses.asdict(teacher.header) if isinstance(teacher, TeacherCache) else None,
        "processes": arguments.world_size,
        "resumed_from": None if last is None else last.name,
        "mlflow_run": tracked_run() if "mlflow" in arguments.report_to and arguments.process_index == 0 else None,
        "history": trainer.state.log_history,
    }
    return trained, facts


def _keep_adapter(model: PeftModel, arguments: QATArguments) -> None:
    """Writes the adapter before it is folded, for `llmqat export --format peft`, where it alone makes the model.

    One process of many writes it.
    """
    if arguments.process_index != 0:
        return
    if changed_since_prepared(model) == []:
        save_adapter(model, Path(arguments.output_dir).parent / ADAPTER_FOLDER)
    else:
        log.info("the adapter is kept folded only: the weights under it are not, or not known to be, the original's")


def kept_step(trainer: QATTrainer) -> int:
    """Returns the step whose weights the model has after training: the last, or the best where that is loaded."""
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return trainer.state.global_step if best is None else best


def _candidates(
    recipe: Recipe,
    coverage: CoverageAudit,
    blocks: Rows,
    report: ExportReport,
    arguments: QATArguments,
    unlearned: str | None,
) -> list[Candidate]:
    """Returns the rows of the run's table; all but the originals are packed, and the last comes from disk."""
    bits, size = report.bits_per_weight, report.weight_bytes
    # Rotation unties the head; plain rounding, which does not rotate, is smaller by that.
    plain = coverage_of(recipe.model, recipe.quant) if rotates(recipe.calibrate) else coverage
    plain_size = size - coverage.bytes_after + plain.bytes_after

    def rounded() -> nn.Module:
        return convert(plainly_rounded_model(recipe, blocks, arguments))

    def calibrated() -> nn.Module:
        return convert(calibrated_model(recipe, blocks, arguments)[0])

    def as_it_was() -> nn.Module:
        return calibrated_model(recipe, blocks, arguments)[0]

    def base() -> nn.Module:
        return to_accelerator(load_adapter_base(recipe.model, torch.bfloat16), arguments.device)

    def packed() -> nn.Module:
        return to_accelerator(load(report.folder), arguments.device)

    original = partial(_original, recipe, arguments)
    rows = [Candidate("full precision", original, "full precision", 16.0, plain.bytes_before)]
    if adapter_base(recipe.model) is not None:
        rows.append(Candidate("without adapter", base, "without adapter", 16.0, plain.bytes_before))
    if starts_packed(recipe):
        rows.append(Candidate("as it was", as_it_was, "training-free", bits, size))
    else:
        rows.append(Candidate("plain rounding", rounded, "plain rounding", bits, plain_size, from_files=False))
        if any(not isinstance(step, RangesStage) or step.method != "minmax" for step in recipe.calibrate):
            rows.append(Candidate("calibrated", calibrated, "training-free", bits, size, from_files=False))
    if not recipe.trains:  # the last row is what was packed
        return [*rows[:-1], dataclasses.replace(rows[-1], load=packed, from_files=True)]
    said = () if unlearned is None else (f"trained: {unlearned}.",)
    return [*rows, Candidate("trained", packed, "trained", bits, size, notes=said)]


def _keep_results(recipe: Recipe, result: RunResult, facts: Mapping[str, Any]) -> None:
    """Writes the results; where that fails, raises an error that holds them."""
    try:
        _write_results(recipe, result, facts)
    except OSError as error:
        raise ResultsNotWrittenError(
            f"the results could not be written ({error}); the checkpoint in {result.checkpoint} is whole, and the same "
            "command measures again",
            result,
        ) from error


def _write_results(recipe: Recipe, result: RunResult, facts: Mapping[str, Any]) -> None:
    """Puts the measured figures into the checkpoint's llmqat.json, then marks the run as finished with results.json."""
    results = {"comparison": result.comparison.to_dict(), "seconds": result.seconds, "goes_on": result.goes_on}
    run_file = result.checkpoint / RUN_FILE
    recorded = read_json(run_file, COPY_AGAIN)
    recorded["run"]["results"] = results
    write_whole(run_file, json.dumps(recorded, indent=2, ensure_ascii=False) + "\n")
    everything = {**head("run"), **facts, **results, "checkpoint": result.report.to_dict()}
    write_whole(recipe.output / RESULTS_FILE, json.dumps(everything, indent=2, ensure_ascii=False) + "\n")
    for folder in (TRAINER_FOLDER, CALIBRATION_FOLDER, TEACHER_FOLDER):  # several times the size of model and text
        shutil.rmtree(recipe.output / folder, ignore_errors=True)

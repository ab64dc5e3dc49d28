"""Everything about a run that can be known before its first minute is spent, checked at once.

A recipe often has several mistakes. If a run reported only the first, the user would have to start it once for each.
So each check here notes what it finds, and all findings are reported together. They come from the recipe, the model's
configuration (the model is made without weights), the tokenizer, the files and the disk. Weights are loaded only of a
model that is packed already. The checks tokenize only the evaluation's texts and prompts, and the first row of a
dataset; `count_blocks`, for plans, reads small texts whole. What needs more is checked by the run before it calibrates,
as soon as it has weights and text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import huggingface_hub
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llmqat.calibrate import BlockwiseStage, GPTQStage
from llmqat.calibrate.blocks import find_blocks
from llmqat.data import DataConfig, load_blocks
from llmqat.data.chat import Completion
from llmqat.data.config import HUB_PREFIX, MIX
from llmqat.data.documents import document_hash, encoded
from llmqat.data.hub import check_name, open_rows, row_pieces, use_chat_template
from llmqat.data.length import check_length, declared_length
from llmqat.data.prompts import read_prompts
from llmqat.data.pydoc import pydoc_text
from llmqat.data.shards import check_folder, open_writer
from llmqat.data.teacher_cache import TeacherCache
from llmqat.data.text import COMPRESSED, files_under, hash_file, is_rows, text_files
from llmqat.evaluate.generations import Prompts
from llmqat.evaluate.perplexity import TokenWindows
from llmqat.export.checkpoint import record_of
from llmqat.hub import why_unreachable
from llmqat.layers import CoverageAudit
from llmqat.models import (
    check_can_be_rebuilt,
    check_few_bits,
    check_next_token,
    load_tokenizer,
    resolve_spec,
    vocabulary_size,
)
from llmqat.paths import check_folder_output
from llmqat.recipe.allocation import check_allocation
from llmqat.recipe.config import TRAINER_FOLDER, Recipe, training_arguments
from llmqat.recipe.disk import Disk, disk_of, disk_problem
from llmqat.recipe.evaluation import (
    ANSWERED,
    EARLIER_TEXTS,
    check_there,
    check_untrained,
    documents_recorded,
    evaluation_prompts,
    source_windows,
    text_names,
    texts_seen,
)
from llmqat.recipe.findings import Findings
from llmqat.recipe.folder import check_run_folder
from llmqat.recipe.memory import Calibration, Method, size_of
from llmqat.recipe.plan import (
    blocks_of,
    calibration_of,
    check_blocks,
    check_plan_served,
    described,
    method_of,
    packed_bytes,
    prepared_model,
    steps_of,
)
from llmqat.recipe.start import check_packed_start, starts_packed
from llmqat.status import USER_MISTAKES
from llmqat.train import QATArguments, check_distribution
from llmqat.train.checkpoints import check_resumable, last_checkpoint
from llmqat.train.stability import check_warmups
from llmqat.train.trial import refused_by_training

MOST_HASHED_BYTES = 100_000_000
"""Of training text that is looked for among the evaluation's before the run; larger texts are when they are read."""


MOST_READ_BYTES = 20_000_000
"""Of local text that is tokenized to count its blocks: about ten seconds."""
PLAIN_PROMPTS = (
    "{where}: `prompt` and `{column}` are plain text, so they are trained without the chat template of the model, and "
    "`llmqat chat` and servers use it: the answers may not show there. To train with it give messages: "
    '"prompt": [{{"role": "user", "content": PROMPT}}], "{column}": [{{"role": "assistant", "content": ANSWER}}]'
)
"""A warning."""


@dataclass
class Preflight:
    """What is known of a run before it begins; parts that could not be made are None."""

    recipe: Recipe
    """With the fields of `train` that the trainer takes."""
    arguments: QATArguments
    findings: Findings
    model: PreTrainedModel | None = None
    """Without weights, prepared as it would be trained; a packed one as it lies."""
    coverage: CoverageAudit | None = None
    int_quantized: bool = False
    """Whether W4A8 has to be written as `int-quantized`."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """With the chat template of the recipe."""
    windows: Mapping[str, TokenWindows] = field(default_factory=dict)
    """Of the evaluation."""
    prompts: Prompts | None = None
    """Of the evaluation, where it asks models to write."""
    disk: Disk | None = None

    def covered(self) -> CoverageAudit:
        """Returns the coverage, which is there where nothing was found."""
        assert self.coverage is not None
        return self.coverage


def begin(recipe: Recipe) -> Preflight:
    """Returns a preflight that has looked at the trainer's arguments alone; they start the process group."""
    findings = Findings()
    usable, arguments = _arguments(recipe, findings)
    return Preflight(usable, arguments, findings)


def check_run(flight: Preflight, *, overwrite: bool = False, elsewhere: bool = False, folder: bool = True) -> None:
    """Looks at everything else, and notes in `flight` what it finds.

    Args:
        flight: from `begin`.
        overwrite: whether what an earlier run left in the output folder is to be removed.
        elsewhere: whether the run is planned for other devices than those here.
        folder: whether the run folder is looked at; one process of many does.
    """
    recipe, arguments, found = flight.recipe, flight.arguments, flight.findings
    if not elsewhere:
        with found.noting():
            check_distribution(arguments)
    if folder:
        with found.noting():
            check_folder_output(recipe.output, "output")
            check_run_folder(recipe, overwrite=overwrite)
        if not overwrite:
            with found.noting():
                _check_resumed(recipe, arguments)
    if arguments.push_to_hub and recipe.trains:
        with found.noting():
            _check_hub(arguments)
    with found.noting():
        check_warmups(steps_of(arguments, blocks_of(recipe), arguments.world_size) or 0, arguments)
    _check_model(flight)
    _check_texts(flight)
    _check_data(flight, recipe.data)
    with found.noting():
        _check_seen(recipe)
    if recipe.teacher_cache is not None:
        with found.noting():
            _check_cache(recipe, flight.model, flight.tokenizer)
    if recipe.teacher_bits is not None:
        with found.noting():
            check_few_bits(recipe.source, recipe.teacher_bits)
    if folder and flight.disk is not None and (problem := disk_problem(flight.disk, recipe.output)) is not None:
        text, certain = problem
        if certain:
            found.note(OSError(text))
        else:
            found.warnings.append(text)


def count_blocks(flight: Preflight, processes: int) -> int | None:
    """Returns how many blocks of training text there are, read now where that is quick; None where it is not.

    Notes in `flight` what is wrong with the text, and with a training of so many steps. The run finds the blocks in the
    cache.
    """
    recipe, arguments, found = flight.recipe, flight.arguments, flight.findings
    size = _local_bytes(recipe.data)
    if size is None or size > MOST_READ_BYTES or flight.tokenizer is None:
        return None
    with found.noting():
        blocks = load_blocks(recipe.data, flight.tokenizer)
        if recipe.trains and (few := check_blocks(arguments, blocks, processes)):
            found.warnings.append(few)
        return len(blocks)
    return None


def _local_bytes(data: DataConfig) -> int | None:
    """Returns the size of the files of a text; None of other text, and of what is compressed."""
    if data.source not in ("text", "dataset") or data.path is None or not data.path.exists():
        return None
    files = files_under(data.path)
    return None if any(file.suffix in COMPRESSED for file in files) else sum(file.stat().st_size for file in files)


def check_text(recipe: Recipe) -> None:
    """Raises what is wrong with the model and the text of `recipe`, for a command that reads nothing else of it.

    Raises:
        Exception: as `Findings.refuse`.
    """
    flight = begin(recipe)
    _load_tokenizer(flight)
    _check_data(flight, recipe.data)
    flight.findings.refuse()


# The trainer


def _arguments(recipe: Recipe, found: Findings) -> tuple[Recipe, QATArguments]:
    """Returns the trainer's arguments, and the recipe without the fields that it refuses, which are noted."""
    while True:
        try:
            return recipe, training_arguments(recipe)
        except USER_MISTAKES as error:
            found.note(error)
            unset_hf_deepspeed_config()  # transformers keeps what it has half made of a field that it refuses
            named = [key for key in recipe.train if re.search(rf"\b{key}\b", str(error))]
            if not recipe.train:
                raise
            kept = {key: value for key, value in recipe.train.items() if named and key not in named}
            recipe = recipe.model_copy(update={"train": kept})


def _check_resumed(recipe: Recipe, arguments: QATArguments) -> None:
    last = last_checkpoint(recipe.output / TRAINER_FOLDER)
    if last is None or arguments.auto_find_batch_size:
        return
    processes = 1 if arguments.accelerator_config.split_batches else arguments.world_size
    check_resumable(last, arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes)


def _check_hub(arguments: QATArguments) -> None:
    if arguments.hub_token is None and huggingface_hub.get_token() is None:
        raise ValueError("train.push_to_hub=True needs a token of the hub; run `hf auth login`, or leave it out")
    reason = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else why_unreachable()
    if reason is not None:
        raise ValueError(f"train.push_to_hub=True, and the hub cannot be reached ({reason}); leave it out")


# The model


def _check_model(flight: Preflight) -> None:
    recipe, arguments, found = flight.recipe, flight.arguments, flight.findings
    with found.noting():
        if starts_packed(recipe):
            check_packed_start(recipe)
        flight.model, flight.coverage = prepared_model(recipe)
    model, coverage = flight.model, flight.coverage
    if model is None or coverage is None:
        return
    with found.noting():
        check_next_token(model)
        check_can_be_rebuilt(model)
    with found.noting():
        check_length(model, recipe.data.block_size, "data.block_size")
    if not coverage.quantized:
        found.note(
            ValueError(
                "quant covers no weight (quant.targets is empty, or all is ignored), so there is nothing to pack; a "
                "quantized KV cache alone can be used in Python (llmqat.prepare), or beside weights such as preset int8"
            )
        )
        return
    with found.noting():
        quant = None if starts_packed(recipe) else recipe.quant
        if recipe.serve:
            flight.int_quantized = check_plan_served(described(model), recipe.serve, quant, recipe.allocate)
    with found.noting():
        if any(isinstance(stage, (GPTQStage, BlockwiseStage)) for stage in recipe.calibrate):
            find_blocks(model)
    with found.noting():
        _check_allocation(recipe, model)
    trained = model
    blocks = blocks_of(recipe)
    steps = steps_of(arguments, blocks, arguments.world_size)
    with found.noting():
        size = size_of(model, model.config, packed_bytes(coverage))
        method: Method | Calibration = calibration_of(recipe)
        if recipe.trains:  # adapters are put on the model, and what trains is chosen
            method, trained = method_of(recipe, arguments, model)
        flight.disk = disk_of(recipe, arguments, coverage, size, method, blocks, steps)
    if not recipe.trains:
        return
    named = [Path(name).stem for name in text_names(recipe.evaluate.texts)]
    watched = named if len(named) > 1 and not recipe.data.validation_share else None
    for error in refused_by_training(trained, arguments, steps, recipe.data.block_size, watched):
        found.note(error)


def _check_allocation(recipe: Recipe, model: PreTrainedModel) -> None:
    if recipe.allocate is None:
        return
    check_allocation(model, recipe.quant, recipe.allocate)


# Texts


def _load_tokenizer(flight: Preflight) -> None:
    with flight.findings.noting():
        flight.tokenizer = load_tokenizer(resolve_spec(flight.recipe.source), flight.recipe.source)


def _check_texts(flight: Preflight) -> None:
    """Loads the tokenizer, cuts the evaluation's texts into windows, and reads its prompts."""
    recipe, found = flight.recipe, flight.findings
    _load_tokenizer(flight)
    if flight.tokenizer is None:
        for text in recipe.evaluate.texts:
            with found.noting():
                check_there(text)
        with found.noting():
            if recipe.evaluate.prompts is not None:
                read_prompts(recipe.evaluate.prompts, recipe.evaluate.max_prompts)
        return
    with found.noting():
        use_chat_template(recipe.data, flight.tokenizer)
    longest = None if flight.model is None else declared_length(flight.model.config)
    windows: dict[str, TokenWindows] = {}
    for name, source in text_names(recipe.evaluate.texts).items():  # of several, each that does not do is named
        with found.noting():
            windows[name] = source_windows(recipe.evaluate, source, flight.tokenizer, longest)
    with found.noting():
        flight.prompts = evaluation_prompts(recipe.evaluate, flight.tokenizer)
        if flight.prompts is not None and flight.model is not None:
            check_length(flight.model, flight.prompts.longest, ANSWERED)
    if not found.errors:
        flight.windows = windows
        if flight.model is not None:
            with found.noting():
                check_length(flight.model, max(cut.read_length for cut in windows.values()), "evaluate.window")


def _check_data(flight: Preflight, data: DataConfig) -> None:
    found, tokenizer = flight.findings, flight.tokenizer
    if data.source == MIX:
        for one in data.mix or ():
            _check_data(flight, one.model_copy(update={"block_size": data.block_size}))
        return
    with found.noting():
        if data.source == "synthetic":
            if data.path is not None:
                check_folder_output(data.path, "data.path")
                check_folder(data.path)
            if flight.model is not None and tokenizer is not None and not starts_packed(flight.recipe):
                open_writer(flight.model, tokenizer, data)
        elif data.source == "dataset" and data.name is not None:
            check_name(data.name)
        elif data.path is not None and (data.source == "dataset" or (data.source == "text" and is_rows(data.path))):
            _check_rows(found, data, tokenizer)
        elif data.source == "text" and data.path is not None:
            _check_files(data.path, data.block_size)


def _check_rows(found: Findings, data: DataConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Looks at the first row of a dataset, and warns where it is trained in another form than it will be asked in."""
    rows, reader = open_rows(data)
    first = list(islice(row_pieces(rows, reader), 1))
    if tokenizer is None:
        return
    list(encoded(first, tokenizer))
    if tokenizer.chat_template and any(isinstance(piece.content, Completion) for piece in first):
        found.warnings.append(PLAIN_PROMPTS.format(where=reader.where, column=reader.column))


def _check_files(path: Path, block_size: int) -> None:
    files = text_files(path)
    size = sum(file.stat().st_size for file in files)
    if size == 0:
        raise ValueError(f"the text at {path} is empty")
    if size + len(files) < block_size:  # a token has a byte at least
        raise ValueError(
            f"the text at {path} has {size} bytes, and one block needs data.block_size={block_size} tokens; give more "
            "text or a smaller block_size"
        )


def _check_seen(recipe: Recipe) -> None:
    """Raises where a text is to be scored that the model has seen, or will see, as far as is quickly known."""
    earlier = texts_seen(record_of(recipe.model))
    check_untrained(recipe.evaluate, documents_recorded({EARLIER_TEXTS: earlier}), recipe.model)
    hashes = [digest for source in recipe.data.mix or (recipe.data,) for digest in _quickly_hashed(source)]
    files = [text for text in recipe.evaluate.texts if not text.startswith(HUB_PREFIX)]
    if hashes and files:
        settings = recipe.evaluate.model_copy(update={"texts": tuple(files)})
        check_untrained(settings, [torch.tensor(hashes)], "this recipe")


def _quickly_hashed(source: DataConfig) -> list[int]:
    if source.source == "pydoc":
        return [document_hash(pydoc_text())]
    if source.source != "text" or source.path is None or not source.path.exists() or is_rows(source.path):
        return []
    files = text_files(source.path)
    if sum(file.stat().st_size for file in files) > MOST_HASHED_BYTES:
        return []
    return [digest for file in files if (digest := hash_file(file)) is not None]


def _check_cache(recipe: Recipe, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises where the teacher's cache is none, or not of this model's vocabulary; its weights are compared later."""
    assert recipe.teacher_cache is not None
    cache = TeacherCache(recipe.teacher_cache)
    cache.check(tokenizer=tokenizer)
    vocabulary = None if model is None else vocabulary_size(model)
    if vocabulary not in (None, cache.header.vocabulary):
        raise ValueError(
            f"teacher_cache={recipe.teacher_cache} was made by a model of {cache.header.vocabulary} tokens "
            f"({cache.header.model}), and {recipe.source!r} has {vocabulary}; name the model that it was made with, or "
            "make another with `llmqat cache-teacher`"
        )

"""The teacher's predictions for a recipe's text, cached on disk, with the text itself if the model wrote it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data import DataConfig, Rows, TextSplits, load_splits, read_blocks, save_blocks
from llmqat.data.packing import CALIBRATION
from llmqat.data.processes import ALONE, Processes
from llmqat.data.teacher_cache import CacheHeader, CachePlace, TeacherCache, TeacherCacheWriter, cache_teacher
from llmqat.models import keeps_documents_apart, load_model, to_accelerator, vocabulary_size
from llmqat.recipe.config import Recipe, teacher_obstacle, training_arguments
from llmqat.recipe.folder import kept_place
from llmqat.recipe.preflight import check_text
from llmqat.terminal import Bar, Stages

log = logging.getLogger(__name__)


def cache_teacher_of(recipe: Recipe, folder: Path, *, top_k: int, batch_size: int) -> TeacherCache:
    """Runs the model of `recipe` over its text, writes what it predicts to `folder`, and returns the cache.

    An interrupted call is gone on with by giving it again; a cache of the same model is added to.

    Args:
        recipe: model and text.
        folder: made, or a cache of the same model and `top_k`.
        top_k: tokens kept a position.
        batch_size: blocks in one forward pass.

    Raises:
        FileExistsError: `folder` holds something else.
        FileNotFoundError: the model or the text is not there.
        ValueError: `folder` holds the cache of another model or `top_k`, or the model or the text does not do.
    """
    check_text(recipe)
    stage = Stages()
    with stage("load", recipe.source):
        model, tokenizer = load_model(recipe.source, torch.bfloat16)
        to_accelerator(model, training_arguments(recipe).device)
    TeacherCacheWriter(folder, CacheHeader.of(model, tokenizer, top_k))  # now: a folder that does not do costs no text
    with stage("text", recipe.data.source):
        place = CachePlace(folder, top_k, batch_size)
        text = _kept_where_written(recipe, folder, partial(text_of, recipe, tokenizer, model, cache=place))
    cache = None
    with stage("teacher", f"its {top_k} most likely tokens"), Bar("teacher", "token") as bar:
        for rows in _taught(text):
            cache = cache_teacher(
                model, tokenizer, rows, folder, top_k=top_k, batch_size=batch_size, progress=bar.update
            )
    assert cache is not None
    return cache


def _kept_where_written(recipe: Recipe, folder: Path, make: Callable[[], TextSplits]) -> TextSplits:
    """Returns the text; what the model writes is kept in the cache's folder, for training to find."""
    if recipe.data.source != "synthetic":
        return make()
    file = folder / text_file(recipe.data)
    if not file.is_file():
        save_blocks(make().train, file)
    return TextSplits(read_blocks(file))


def _taught(text: TextSplits) -> list[Rows]:
    """Returns the rows that a teacher is asked about: those that are trained on and validated on."""
    return [blocks.rows for name, blocks in text.given().items() if name != CALIBRATION]


def check_cached(cache: TeacherCache | None, text: TextSplits) -> None:
    """Raises ValueError where there is a `cache` and it lacks a block that is trained or validated on."""
    if cache is not None:
        for rows in _taught(text):
            cache.check(blocks=rows)


def teacher_cache_of(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TeacherCache | None:
    """Returns the cache that the recipe names, or None where it names none.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: it was not made by `model` with `tokenizer`.
    """
    if recipe.teacher_cache is None:
        return None
    cache = TeacherCache(recipe.teacher_cache)
    cache.check(model, tokenizer)
    return cache


def text_of(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    processes: Processes = ALONE,
    cache: CachePlace | None = None,
) -> TextSplits:
    """Returns the recipe's text: where `model` has written it for the teacher's cache already, from there.

    `processes` write together what the model writes now, and leave in `cache` what it predicts for that.
    """
    kept = None if recipe.teacher_cache is None else recipe.teacher_cache / text_file(recipe.data)
    if kept is not None and kept.is_file():
        return TextSplits(read_blocks(kept))
    with Bar("text", "token") as bar:
        return load_splits(recipe.data, tokenizer, model, bar.update, processes, cache)


def cache_while_writing(recipe: Recipe, model: PreTrainedModel) -> CachePlace | None:
    """Returns where `model` keeps what it predicts for the text that it writes; None, and the log says why, if not."""
    place = kept_place(recipe)
    if not recipe.trains or recipe.data.source != "synthetic" or recipe.teacher_cache is not None:
        return None
    reason = "teacher_top_k is null" if recipe.teacher_top_k is None else teacher_obstacle(recipe)
    if place is not None and not keeps_documents_apart(model):
        reason = f"{type(model).__name__} attends beyond the documents of a block, and wrote each of them alone"
        if isinstance(recipe.teacher_top_k, int):
            raise ValueError(f"teacher_top_k={recipe.teacher_top_k}: {reason}; leave teacher_top_k out")
    if reason is None and place is not None:
        every = vocabulary_size(model)
        return replace(place, top_k=min(place.top_k, every)) if recipe.teacher_top_k == "auto" else place
    log.info("the teacher runs at each step of training: %s", reason)
    return None


def written_cache(
    place: CachePlace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSplits,
    processes: Processes = ALONE,
) -> TeacherCache:
    """Returns the cache of what `model` predicts for the text that it wrote; runs it over blocks that the cache lacks.

    Args:
        place: of the cache; `synthesize` has filled it, unless an earlier start wrote the text and kept none.
        model: the writer.
        tokenizer: of the text.
        text: that was written.
        processes: the first one looks after the cache, and all get it from the same folder.
    """
    if processes.is_first:
        with Bar("teacher", "token") as bar:
            cache_teacher(model, tokenizer, text.train.rows, place.folder, top_k=place.top_k, progress=bar.update)
    processes.agreed(None)
    return TeacherCache(place.folder)


def text_file(data: DataConfig) -> str:
    """Returns the name of the file in a cache that keeps the text a model has written as `data` says."""
    return f"text-{hashlib.sha256(data.model_dump_json(exclude={'server'}).encode()).hexdigest()[:12]}.safetensors"

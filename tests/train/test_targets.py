"""Which tokens are scored: the same in the loss, in the number it is divided by, and in evaluations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, DataCollatorWithPadding

from llmqat import QATTrainer, QuantConfig, prepare
from llmqat.train.targets import scored_labels
from tests.tiny import tiny_gpt2, tiny_tokenizer
from tests.train.test_trainer import Blocks, _arguments, _pair

HIDDEN = -100
LENGTHS = (32, 5, 9, 1)


def documents() -> list[list[int]]:
    """Token ids of unequal length; one of a single token, in which nothing is predicted."""
    return [ids[:length].tolist() for ids, length in zip(Blocks(4).ids, LENGTHS, strict=True)]


def padded(side: str, token: int, labelled: bool = False) -> dict[str, torch.Tensor]:
    """A batch of the documents, padded on a side by a token."""
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids in documents():
        gap = max(LENGTHS) - len(ids)
        for name, fill, part in (
            ("input_ids", token, ids),
            ("attention_mask", 0, [1] * len(ids)),
            ("labels", HIDDEN, ids),
        ):
            rows[name].append(part + [fill] * gap if side == "right" else [fill] * gap + part)
    batch = {name: torch.tensor(part) for name, part in rows.items()}
    if not labelled:
        del batch["labels"]
    return batch


def one_by_one() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor([ids])} for ids in documents()]


@pytest.fixture
def trainer(tmp_path: Path) -> QATTrainer:
    student, teacher = _pair()
    changes = {"bf16": False, "cross_entropy_weight": 0.5, "optim": "sgd", "max_grad_norm": 0.0}
    return QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path, **changes), train_dataset=Blocks())


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_mask_hides_is_no_part_of_loss_and_scores(side: str, labelled: bool, trainer: QATTrainer) -> None:
    count = trainer._get_num_items_in_batch([padded(side, 1, labelled)], torch.device("cpu"))
    assert count is not None
    assert int(count) == sum(length - 1 for length in LENGTHS)
    with torch.no_grad():
        expected = sum(
            float(trainer.compute_loss(trainer.model, batch)) * (batch["input_ids"].shape[1] - 1)
            for batch in one_by_one()
        )
        for token in (1, 300):  # that of the end, and one that no text has
            batch = padded(side, token, labelled)
            loss, found = trainer.compute_loss(trainer.model, batch, return_outputs=True)
            assert float(loss) * int(count) == pytest.approx(expected, rel=1e-3)
            assert float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)) == pytest.approx(
                float(loss)
            )
            assert found["scored"].tolist() == [length - 1 for length in LENGTHS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_evaluations_leave_padding_out(side: str, trainer: QATTrainer) -> None:
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in documents()]
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    found = []
    for pad in ("</s>", "<unused7>"):
        tokenizer.pad_token = pad
        trainer.data_collator = DataCollatorWithPadding(tokenizer)
        found.append(trainer.evaluate(Dataset.from_list(rows)))
    with torch.no_grad():
        scores = [
            trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]
            for batch in one_by_one()
            if batch["input_ids"].shape[1] > 1
        ]
    nll = sum(float(score["nll"]) for score in scores)
    expected = torch.tensor(nll / sum(length - 1 for length in LENGTHS)).exp()
    for metrics in found:
        assert metrics["eval_perplexity"] == pytest.approx(float(expected), rel=1e-4)
        assert metrics["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-4)


def test_padded_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in documents()]
    weights = []
    for batch, accumulation in ((4, 1), (1, 4)):
        student, teacher = _pair()
        arguments = _arguments(
            tmp_path,
            bf16=False,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=0.0,
        )
        given: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer()}
        QATTrainer(model=student, teacher=teacher, args=arguments, **given).train()
        weights.append(student.model.layers[0].mlp.up_proj.weight.detach().clone())
    assert torch.allclose(*weights, atol=1e-6)
    assert not torch.equal(weights[0], _pair()[0].model.layers[0].mlp.up_proj.weight)


def test_collators_of_transformers_say_what_is_scored() -> None:
    rows = [{"input_ids": ids} for ids in documents()]
    expected = sum(length - 1 for length in LENGTHS)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unused7>"
    for collator in (
        DataCollatorWithPadding(tokenizer),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        DataCollatorWithFlattening(),
    ):
        batch = collator(copy.deepcopy(rows))
        assert int((scored_labels(batch)[:, 1:] != HIDDEN).sum()) == expected, type(collator).__name__
        if isinstance(collator, DataCollatorWithFlattening):
            del batch["labels"]  # position ids alone say where documents begin
            assert int((scored_labels(batch)[:, 1:] != HIDDEN).sum()) == expected


def test_labels_win_over_positions_and_the_mask_over_both() -> None:
    ids = torch.arange(12).reshape(2, 6)
    labels = ids.masked_fill(ids == 3, HIDDEN)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    found = scored_labels({"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask})
    assert found[:, 1:].tolist() == [[1, 2, HIDDEN, 4, 5], [7, 8, 9, HIDDEN, HIDDEN]]
    assert scored_labels({"input_ids": ids, "position_ids": positions})[:, 1:].tolist() == [
        [1, 2, HIDDEN, 4, 5],
        [7, 8, HIDDEN, 10, 11],
    ]
    assert torch.equal(scored_labels({"input_ids": ids}), ids)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 4, 8)}, "a batch has no input_ids, only inputs_embeds"),
        (
            {"input_ids": torch.ones(2, 4), "labels": torch.ones(2)},
            r"labels have the shape \[2\] and input_ids \[2, 4\]",
        ),
        ({"input_ids": torch.ones(2, 4), "shift_labels": torch.ones(2, 4)}, "shift_labels are not read; give labels"),
        (
            {"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(2, 1, 4, 4)},
            "does not say which tokens are padding; give labels",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(batch: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scored_labels(batch)


def test_a_text_without_a_scored_token_has_no_perplexity(trainer: QATTrainer) -> None:
    rows = [{"input_ids": ids, "labels": torch.full_like(ids, HIDDEN)} for ids in Blocks(2).ids]
    with pytest.raises(ValueError, match="no token of the evaluation text is scored"):
        trainer.evaluate(rows)


def test_rows_beyond_the_learned_positions_are_refused_before_a_step(tmp_path: Path) -> None:
    """GPT-2 of 16 positions, given rows of 32 tokens: "index out of range in self", somewhere in an embedding."""
    teacher = tiny_gpt2(max_position_embeddings=16)
    student = copy.deepcopy(teacher)
    prepare(student, QuantConfig.preset("int4", group_size=16))
    made = QATTrainer(model=student, teacher=teacher, args=_arguments(tmp_path), train_dataset=Blocks())
    with pytest.raises(ValueError, match=r"tokens in a row=32 is more than the 16 positions that GPT2LMHeadModel"):
        made.train()
    assert made.state.global_step == 0

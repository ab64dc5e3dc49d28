from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmqat.data import teacher_cache, writer
from llmqat.data.quality import repeated_share
from llmqat.data.sampling import Chosen, Sampling
from llmqat.data.synthesis import synthesize
from llmqat.data.teacher_cache import CachePlace, TeacherCache
from llmqat.data.writer import COMPARED_BLOCKS
from llmqat.kernels import products
from llmqat.layers import PackedModule, QuantConfig, convert, prepare
from llmqat.metrics import top_probabilities
from tests.tiny import tiny_architecture, tiny_llama, tiny_tokenizer

EOS = 1


def written(model: PreTrainedModel | None = None, tokens: int = 200, **options: Any) -> Any:
    values = {"block_size": 32, "chat_share": 0.0, "batch_size": 4, **options}
    return synthesize(model or tiny_llama(), tiny_tokenizer(), tokens, **values)


def documents_of(blocks: Any) -> list[list[int]]:
    documents: list[list[int]] = [[]]
    for token in blocks.ids.flatten().tolist():
        documents[-1].append(token)
        if token == EOS:
            documents.append([])
    return [document for document in documents if document]


def test_the_seed_makes_the_text():
    first, again, other = written(seed=3), written(seed=3), written(seed=4)
    assert first.ids.shape == (7, 32)
    assert first.sha256 == again.sha256 != other.sha256
    assert "seed 3, rows 4+4" in first.source


def test_global_random_state_is_neither_used_nor_touched():
    model = tiny_llama()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = written(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert written(model).sha256 == first.sha256


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_packed_writer_writes_what_its_dequantized_weights_would(has_bf16: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_HAS_BF16", has_bf16)
    model = tiny_llama().bfloat16()
    prepare(model, QuantConfig.preset("int4", group_size=32))
    packed = convert(model)
    plain = tiny_llama()
    for parameter in plain.parameters():  # not the rotary frequencies, which `prepare` restores
        parameter.data = parameter.data.bfloat16()
    plain.load_state_dict(
        {
            **{name: tensor for name, tensor in packed.state_dict().items() if name in plain.state_dict()},
            **{f"{name}.weight": m.weight for name, m in packed.named_modules() if isinstance(m, PackedModule)},
        }
    )
    assert written(packed, tokens=400, batch_size=16).sha256 == written(plain, tokens=400, batch_size=16).sha256


def test_training_mode_comes_back():
    model = tiny_llama().train()
    written(model, tokens=32)
    assert model.training
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_progress_reaches_the_total():
    seen: list[tuple[int, int]] = []
    written(progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_documents_start_with_an_ordinary_token_and_greedy_ones():
    model = tiny_llama()
    ids = written(model, chat_share=0.0).ids
    special = set(tiny_tokenizer().all_special_ids)
    with torch.no_grad():
        likely = model(ids).logits.argmax(-1)
    assert not special & set(ids[:, 0].tolist())
    assert torch.equal(ids[:, 1:3], likely[:, 0:2])


class Scripted:
    """Stands in for sampling: ends row r's document whenever its count of draws reaches a multiple of `after[r]`."""

    def __init__(self, after: list[int], token: int | None = None) -> None:
        self.after, self.token, self.draws = after, token, 0

    def __call__(
        self, logits: Tensor, uniforms: Tensor, greedy: Tensor, sampling: Sampling, top_k: int | None = None
    ) -> Chosen:
        self.draws += 1
        drawn = torch.tensor([self.drawn(row) for row in range(len(logits))])
        top = None if top_k is None else top_probabilities(logits, top_k)
        return Chosen(torch.where(greedy, logits.argmax(-1), drawn), torch.full((len(logits),), -1.0), top)

    def drawn(self, row: int) -> int:
        filler = 10 + 80 * row + self.draws if self.token is None else self.token
        return EOS if self.draws % self.after[row % len(self.after)] == 0 else filler


def test_a_new_document_begins_where_one_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "choose", Scripted([12, 1000]))
    blocks = written(tokens=64, batch_size=64)
    assert blocks.details["documents"] >= 4
    first = documents_of(blocks)[0]
    assert len(first) == 13
    assert first[-1] == EOS
    assert blocks.ids[0, 13] >= 2  # the next one's start token
    assert blocks.ids[1].tolist().count(EOS) == 0


def test_the_next_document_does_not_see_the_one_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "choose", Scripted([12, 12, 12]))
    model = tiny_llama()
    ids = written(model, tokens=64, batch_size=64).ids
    with torch.no_grad():
        alone = model(ids[:, 13:]).logits.argmax(-1)
    assert torch.equal(ids[:, 14:16], alone[:, :2])  # its greedy tokens


def test_documents_that_end_at_once_are_dropped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "choose", Scripted([1000, 7] * 2))
    blocks = written(tokens=64, batch_size=4)
    assert blocks.details["dropped"]["ended at once"] >= 4
    assert EOS not in blocks.ids


def test_a_model_that_only_repeats_itself_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "choose", Scripted([1000] * 4, token=9))
    with pytest.raises(ValueError, match=r"nothing usable.*'repeats itself': \d+"):
        written(tokens=96, batch_size=4)


def test_chat_documents_follow_the_template(monkeypatch: pytest.MonkeyPatch):
    tokenizer, newline = tiny_tokenizer(), tiny_tokenizer()("\n")["input_ids"][0]

    class EndsTurn(Scripted):
        def drawn(self, row: int) -> int:
            return newline if self.draws == 10 else 100 + 80 * row + self.draws

    monkeypatch.setattr(writer, "choose", EndsTurn([]))
    blocks = written(tokens=64, batch_size=64, block_size=40, chat_share=1.0)
    assert blocks.details["documents_by_kind"] == {"chat": 3}
    text = tokenizer.decode(blocks.ids[0])
    assert text.startswith("<user>")
    assert text.count("<assistant>") == 1
    assert text.index("\n<assistant>") > len("<user>")


def test_an_end_of_text_in_the_users_turn_becomes_the_templates_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "choose", Scripted([12] * 3))
    blocks = written(tokens=64, batch_size=64, block_size=40, chat_share=1.0)
    text = tiny_tokenizer().decode(blocks.ids[0])
    assert 0 < text.index("\n<assistant>") < text.index("</s>")


def test_a_large_cache_means_fewer_rows(monkeypatch: pytest.MonkeyPatch):
    per_token = writer.cache_bytes_per_token(tiny_llama())
    assert per_token == 2 * 2 * 2 * 16 * 4
    monkeypatch.setattr(writer, "CACHE_BYTES", 3 * 32 * per_token)
    assert "rows 3+3+2" in written(batch_size=100).source


def test_blocks_longer_than_the_context_are_refused():
    with pytest.raises(ValueError, match=r"data\.block_size=512 is more than the model's context of 256"):
        written(block_size=512)


def test_repeated_share():
    assert repeated_share(list(range(20))) == 0
    assert repeated_share([1, 2] * 20) == 1 - 2 / 37
    assert repeated_share([1]) == 0


def test_documents_like_an_earlier_one_are_dropped(monkeypatch: pytest.MonkeyPatch):
    class Alike(Scripted):
        def drawn(self, row: int) -> int:
            return 10 + 80 * (row % 2) + self.draws  # odd rows write what the odd row before them wrote

    monkeypatch.setattr(writer, "choose", Alike([]))
    blocks = written(tokens=96, batch_size=4, block_size=48)
    assert blocks.details["dropped"]["near duplicate"] >= 1
    assert len({tuple(ids[8:]) for ids in blocks.ids.tolist()}) == len(blocks)


def test_perplexity_is_the_models_own():
    model = tiny_llama()
    blocks = written(model, tokens=32 * 4, batch_size=16)
    assert not blocks.details["dropped"]  # else blocks would not be tapes
    assert EOS not in blocks.ids[:, :-1]
    with torch.no_grad():
        log_probs = model(blocks.ids).logits[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, blocks.ids[:, 1:, None])
    rows = blocks.details["documents"]
    assert rows >= len(blocks)
    if rows == len(blocks):
        assert blocks.details["perplexity"] == pytest.approx(chosen.mean().neg().exp().item(), rel=1e-3)


def test_sampling_begins_with_the_begin_of_text():
    ids = written(tokens=256, strategy="sampling").ids
    assert set(ids[:4, 0].tolist()) == {tiny_tokenizer().bos_token_id}
    assert len(set(ids[:, 1].tolist())) > 1


def test_chat_writes_nothing_else():
    blocks = written(tokens=256, strategy="chat", chat_share=None)
    assert set(blocks.details["documents_by_kind"]) == {"chat"}
    assert tiny_tokenizer().decode(blocks.ids[0]).startswith("<user>")


@pytest.mark.parametrize("turns", [False, True])
def test_prompts_begin_documents(tmp_path: Path, turns: bool):
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n"good day"\n{"text": "so"}\n')
    blocks = written(
        tokens=32 * 6, strategy="prompts", chat_share=None, prompts=tmp_path / "p.jsonl", prompt_turns=turns
    )
    around = "<user>{}\n<assistant>" if turns else "{}"
    begins = [around.format(prompt) for prompt in ("hello", "good day", "so")]
    texts = [text.removeprefix("<s>") for text in tiny_tokenizer().batch_decode(blocks.ids[:3])]
    assert sorted(next(begin for begin in begins if text.startswith(begin)) for text in texts) == sorted(begins)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "magic"}, "llm-qat"),
        ({"strategy": "prompts"}, "needs prompts=FILE"),
        ({"strategy": "chat", "chat_share": 0.5}, "chat_share means nothing to strategy='chat'"),
        ({"prompt_turns": True}, "means nothing without prompts"),
        ({"temprature": 2.0}, "did you mean 'temperature'"),
        ({"temperature": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_do(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        synthesize(tiny_llama(), tiny_tokenizer(), 64, **{"block_size": 32, **settings})


def test_prompts_that_do_not_do(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    with pytest.raises(FileNotFoundError, match="no prompts at"):
        written(strategy="prompts", chat_share=None, prompts=path)
    path.write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match="line 1 has no prompt"):
        written(strategy="prompts", chat_share=None, prompts=path)
    path.write_text('"' + "long " * 40 + '"\n')
    with pytest.raises(ValueError, match=r"leaves no room in a document of block_size=32"):
        written(strategy="prompts", chat_share=None, prompts=path)


def test_a_tokenizer_without_a_template_gives_plain_documents():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    blocks = synthesize(tiny_llama(), tokenizer, 64, block_size=32, chat_share=1.0)
    assert set(blocks.details["documents_by_kind"]) == {"plain"}


def batches_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the number of blocks in each batch that a teacher reads from now on."""
    read: list[int] = []
    states = teacher_cache.hidden_states

    def counted(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        read.append(len(input_ids))
        return states(model, input_ids, position_ids)

    monkeypatch.setattr(teacher_cache, "hidden_states", counted)
    return read


def test_the_model_reads_what_it_did_not_write_so_in_batches_of_the_size_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read = batches_read(monkeypatch)
    place = CachePlace(tmp_path, 8, batch_size=3)
    synthesize(tiny_llama(), tiny_tokenizer(), 32 * 7, block_size=32, packing="concatenate", cache=place)
    assert read == [3, 3, 1]


KEPT: dict[str, tuple[torch.dtype, bool, dict[str, Any]]] = {
    "float32": (torch.float32, True, {}),
    "bfloat16, drawn otherwise": (torch.bfloat16, True, {"temperature": 1.5, "top_p": 0.7}),
    "its own attention": (torch.float32, False, {"top_k": 40}),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_the_writer_knew_is_what_it_predicts_for_the_block(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dtype, in_lockstep, drawing = KEPT[case]
    model = tiny_llama().to(dtype)
    model.generation_config.eos_token_id = list(range(10, 26))  # so tapes hold several documents, and some are dropped
    if not in_lockstep:
        monkeypatch.setattr("llmqat.data.decode.lockstep_obstacle", lambda *_: "a test")
    read = batches_read(monkeypatch)
    settings = {"block_size": 64, "chat_share": 0.5, "batch_size": 16, **drawing}
    place = CachePlace(tmp_path / "teacher", 16)
    blocks = synthesize(model, tiny_tokenizer(), 64 * 24, cache=place, **settings)
    assert synthesize(model, tiny_tokenizer(), 64 * 24, **settings).sha256 == blocks.sha256
    cache, inputs = TeacherCache(place.folder), blocks.rows.inputs()
    assert 0 < sum(read) - COMPARED_BLOCKS < len(blocks) - 8  # what was cut anew alone
    assert set(blocks.details["documents_by_kind"]) == {"chat", "plain"}
    assert (inputs["position_ids"][:, 1:] == 0).sum() > len(blocks)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
    found = cache.lookup(**inputs)
    atol = 0.004 if dtype == torch.float32 else 0.06  # float16 of logarithms; bfloat16 rounds by the number of rows
    torch.testing.assert_close(found.log_probs, expected.topk(16).values, atol=atol, rtol=0)
    torch.testing.assert_close(found.log_probs, expected.gather(-1, found.indices), atol=atol, rtol=0)
    torch.testing.assert_close(found.log_rest.exp(), 1 - found.log_probs.exp().sum(-1), atol=1e-3, rtol=0)


def test_a_model_that_sees_beyond_documents_is_taught_by_a_pass_over_its_blocks(tmp_path: Path):
    model = tiny_architecture("opt")
    with pytest.raises(ValueError, match="packing: OPTForCausalLM attends beyond the documents"):
        synthesize(model, tiny_tokenizer(), 64, block_size=32, packing="documents")
    blocks = synthesize(model, tiny_tokenizer(), 64, block_size=32, cache=CachePlace(tmp_path, 8))
    assert blocks.rows.starts is None
    TeacherCache(tmp_path).check(model, tiny_tokenizer(), blocks.rows)
    with torch.no_grad():
        expected = model(blocks.ids).logits[:, :-1].log_softmax(-1).flatten(0, 1).topk(8).values
    torch.testing.assert_close(TeacherCache(tmp_path).lookup(blocks.ids).log_probs, expected, atol=0.01, rtol=0.002)

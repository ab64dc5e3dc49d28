"""The teacher, run once: its most likely tokens at every position, kept on disk in place of a model in memory.

Distillation asks a frozen teacher the same question at each pass over the text. A cache holds the answers: for each
position that has a next token, the K most likely tokens, their log-probabilities, and the mass of all others, which is
what `metrics.token_loss` needs to compare a student on K tokens and one bucket. At K = 64 that is 258 bytes a token,
where bfloat16 logits of 49,152 tokens are 98,304.

A block is looked up by a hash of what the teacher read: its ids, and its position ids unless they count up from 0. Its
index in the text does not matter. So shuffled text, several processes, resumed runs and subsets all find their blocks.
A block that the teacher has not read is never found.

    cache.json               the model, tokenizer and precision it was made with; written first
    shard-00000.safetensors  blocks [N, 32] uint8 (SHA-256), offsets [N + 1] int64, checksums [N] int64 of what follows,
                             and of all their positions in a row: indices [T, K] uint16 (int32 for large vocabularies),
                             log_probs [T, K] float16, log_rest [T] float16

A shard is whole or absent, so an interrupted cache goes on with the blocks that it lacks. Reading maps the shards into
memory, touches the rows that are asked for, and checks their sums, which caches of earlier versions lack.

Letters: B blocks of a batch, N blocks of a shard, L tokens a block, T positions, K tokens kept a position.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data.blocks import Progress, Rows, rows_of
from llmqat.files import read_json, write_whole
from llmqat.kernels import WeightPages, float_products, weights_let_go
from llmqat.layers.source import checksum
from llmqat.metrics import Predictor, TopProbabilities, check_predictor, predictor_of, token_loss, top_probabilities
from llmqat.models import (
    capture_hidden,
    model_device,
    name_of,
    save_whole,
    vocabulary_size,
)
from llmqat.paths import user_path

HEADER_FILE = "cache.json"
FORMAT = "llmqat teacher cache 1"
DEFAULT_TOP_K = 64
BLOCKS_PER_SHARD = 64
CHUNK_TOKENS = 512
"""Tokens whose logits exist at once while a cache is made."""
_NO_MASS = -1e4
"""Its exponential is 0, and so is that times it."""
_SHARDS = "shard-*.safetensors"
_ANSWERS = ("indices", "log_probs", "log_rest")
"""Tensors of a shard that hold the answers."""
_CHECKSUMS = "checksums"
_NOT_COMPUTED_WITH = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
"""Keys of a model's configuration that change nothing in what it predicts."""


@dataclass(frozen=True)
class CacheHeader:
    """What a cache was made with: all of it must be the same where it is used or gone on with."""

    model_sha256: str
    """Of configuration and weights, as `model_fingerprint` computes it."""
    tokenizer_sha256: str
    """As `vocabulary_fingerprint` computes it."""
    vocabulary: int
    """Logits that the model makes."""
    top_k: int
    """Tokens kept a position."""
    dtype: str
    """What the model computed in, such as bfloat16."""
    model: str = field(default="", compare=False)
    """The model's name, for people."""

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top_k: int = DEFAULT_TOP_K) -> CacheHeader:
        """Returns the header of a cache that `model` fills.

        Raises:
            ValueError: when `top_k` is not between 1 and the vocabulary.
        """
        vocabulary = vocabulary_size(model)
        if not 1 <= top_k <= vocabulary:
            raise ValueError(f"top_k={top_k} is not between 1 and the model's vocabulary of {vocabulary}")
        return cls(
            model_sha256=model_fingerprint(model),
            tokenizer_sha256=vocabulary_fingerprint(tokenizer),
            vocabulary=vocabulary,
            top_k=top_k,
            dtype=str(model.dtype).removeprefix("torch."),
            model=name_of(model),
        )


@dataclass(frozen=True)
class CachePlace:
    """Where what a model predicts is to be kept, and how much of it."""

    folder: Path
    top_k: int
    """Tokens kept a position."""
    batch_size: int = 4
    """Blocks per forward pass, for blocks whose predictions were not kept while the model wrote them."""


def model_fingerprint(model: nn.Module) -> str:
    """Returns the SHA-256 of what `model` computes with: its configuration, and the bits of every tensor it stores."""
    config: Any = model.config
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_COMPUTED_WITH}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    state = model.state_dict().items()  # packed codes are no parameters
    for name, tensor in WeightPages(model).one_by_one(state):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {checksum(tensor)}\n".encode())
    return digest.hexdigest()


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 of the tokenizer's vocabulary: every token and its id, added and special ones included."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def block_key(ids: Tensor, positions: Tensor | None = None) -> bytes:
    """Returns the 32 bytes by which a block is found.

    Args:
        ids: int64 [L], without padding.
        positions: int64 [L], where the model is given positions; those that count from 0 are as good as none.
    """
    digest = hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes())
    if positions is not None and not torch.equal(positions.cpu(), torch.arange(len(positions))):
        digest.update(b"positions" + positions.cpu().numpy().astype("<i8").tobytes())
    return digest.digest()


class TeacherCacheWriter:
    """Writes a cache, or goes on with one: blocks are collected, and put on disk a whole shard at a time.

    with TeacherCacheWriter(folder, CacheHeader.of(model, tokenizer)) as writer:
        writer.add(ids, top)  # what is left over is written when the block ends without an error
    """

    def __init__(self, folder: Path, header: CacheHeader, blocks_per_shard: int = BLOCKS_PER_SHARD) -> None:
        """Makes `folder`, or finds in it a cache with the same header.

        Raises:
            FileExistsError: `folder` holds something else.
            ValueError: it holds a cache that was made with something else; says with what.
        """
        folder = user_path(folder, "folder")
        self.folder, self.header, self.blocks_per_shard = folder, header, blocks_per_shard
        if (folder / HEADER_FILE).is_file():
            _check_same(read_header(folder), header, folder, "give another folder, or delete that one")
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is no teacher cache; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / HEADER_FILE, json.dumps({"format": FORMAT, **asdict(header)}, indent=2) + "\n")
        shards = sorted(folder.glob(_SHARDS))
        self._written = {key for shard in shards for key in _keys(shard)}
        self._next = 1 + max((int(shard.stem.rpartition("-")[2]) for shard in shards), default=-1)
        self._waiting: list[tuple[bytes, TopProbabilities]] = []

    def __enter__(self) -> TeacherCacheWriter:
        """Returns the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Writes what is left over, unless an error ends the block."""
        if kind is None:
            self.flush()

    def __contains__(self, key: bytes) -> bool:
        """Whether the block of this key is on disk."""
        return key in self._written

    def known(self, blocks: Tensor | Rows) -> list[int]:
        """Returns the places of the blocks, ids int64 [N, L] or rows, that are on disk."""
        return [place for place, key in enumerate(_block_keys(blocks)) if key in self]

    def add(self, ids: Tensor, top: TopProbabilities, positions: Tensor | None = None) -> None:
        """Takes the teacher's answers for one block; writes a shard when there are enough. Known blocks are left out.

        Args:
            ids: int64 [L].
            top: of positions 0 to L - 2, in order: [L - 1, K].
            positions: int64 [L], where the block is trained on with positions of its own.

        Raises:
            ValueError: when `top` does not fit `ids` or the header.
        """
        if top.indices.shape != (len(ids) - 1, self.header.top_k):
            raise ValueError(
                f"top has shape {tuple(top.indices.shape)}; a block of {len(ids)} tokens in a cache of top_k="
                f"{self.header.top_k} has ({len(ids) - 1}, {self.header.top_k})"
            )
        key = block_key(ids, positions)
        if key in self:
            return
        self._waiting.append((key, top.to(torch.device("cpu"))))
        if len(self._waiting) >= self.blocks_per_shard:
            self.flush()

    def flush(self) -> None:
        """Writes the blocks that wait as a shard."""
        if self._waiting:
            self.write_shard(self._next, self._waiting)
            self._next += 1
            self._waiting = []

    def write_shard(self, number: int, blocks: Sequence[tuple[bytes, TopProbabilities]]) -> None:
        """Writes blocks (key, answers) as the shard of this number, in place of one that is there."""
        lengths = torch.tensor([0, *(len(top.log_rest) for _, top in blocks)])
        wide = torch.uint16 if self.header.vocabulary <= 2**16 else torch.int32
        answers = [
            (top.indices.to(wide), top.log_probs.to(torch.float16), top.log_rest.to(torch.float16)) for _, top in blocks
        ]
        tensors = {
            "blocks": torch.tensor([list(key) for key, _ in blocks], dtype=torch.uint8),
            "offsets": lengths.cumsum(0),
            _CHECKSUMS: torch.tensor([_checksum(answer) for answer in answers]),
            **{name: torch.cat(parts) for name, parts in zip(_ANSWERS, zip(*answers, strict=True), strict=True)},
        }
        save_whole(self.folder / f"shard-{number:05d}.safetensors", tensors)
        self._written.update(key for key, _ in blocks)


class TeacherCache:
    """A cache as a teacher: gives what the model predicted for any block that it has read.

    Attributes:
        folder: where it lies.
        header: what it was made with.
    """

    def __init__(self, folder: Path | str) -> None:
        """Opens the cache in `folder`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, of another version, or empty.
        """
        self.folder = user_path(folder, "folder")
        self.header = read_header(self.folder)
        self._places: dict[bytes, _Place] = {}
        for path in sorted(self.folder.glob(_SHARDS)):
            keys, offsets = _keys(path), _read(path, "offsets").tolist()
            shard = _opened(path)
            sums = _read(path, _CHECKSUMS).tolist() if _CHECKSUMS in shard.keys() else [None] * len(keys)  # noqa: SIM118
            for row, key in enumerate(keys):
                self._places[key] = _Place(path, shard, slice(offsets[row], offsets[row + 1]), sums[row])
        if not self._places:
            raise ValueError(f"the teacher cache {self.folder} holds no block; make it with `llmqat cache-teacher`")

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._places)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the shards on disk."""
        return sum(path.stat().st_size for path in self.folder.glob(_SHARDS))

    def remove_shards(self) -> None:
        """Deletes what the cache holds; its header stays, so that it can be made anew."""
        self._places = {}
        for path in self.folder.glob(_SHARDS):
            path.unlink()

    def mass(self) -> float:
        """Returns the share of the teacher's probability that its kept tokens have, on average over positions."""
        rest = torch.cat([_read(path, "log_rest").float().exp() for path in sorted(self.folder.glob(_SHARDS))])
        return float(1 - rest.mean())

    def check(
        self,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        blocks: Tensor | Rows | None = None,
    ) -> None:
        """Refuses a cache that was made with something else; what is not given is not compared.

        Args:
            model: the original model, as `load_model` gives it.
            tokenizer: of the text.
            blocks: the text, ids int64 [N, L] or rows with documents of their own.

        Raises:
            ValueError: when it differs; names in what, and the way out.
        """
        header = asdict(self.header)
        if model is not None:
            dtype = str(model.dtype).removeprefix("torch.")
            header |= {"model_sha256": model_fingerprint(model), "vocabulary": vocabulary_size(model), "dtype": dtype}
            header["model"] = model.config._name_or_path
        if tokenizer is not None:
            header["tokenizer_sha256"] = vocabulary_fingerprint(tokenizer)
        _check_same(
            self.header,
            CacheHeader(**header),
            self.folder,
            "name the model that it was made with, or make another with `llmqat cache-teacher`",
        )
        if blocks is None:
            return
        missing = self.missing(blocks)
        if missing:
            raise ValueError(
                f"the teacher cache {self.folder} lacks {len(missing)} of the text's {len(blocks)} blocks (the first "
                f"is block {missing[0]}): it was made on other text, or on another data.block_size; give the same "
                "data, or `llmqat cache-teacher` with this recipe and the same --out, which adds what is missing"
            )

    def divergence(self, model: PreTrainedModel, blocks: Tensor | Rows) -> float:
        """Returns the KL, nats a token, from what the cache says of `blocks` to what `model` predicts for them now."""
        inputs = rows_of(blocks).inputs()
        training = model.training
        model.eval()
        try:
            hidden = hidden_states(model, **inputs)[:, :-1].flatten(0, 1)
        finally:
            model.train(training)
        known = self.lookup(**inputs).to(hidden.device)
        weights = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)
        with torch.no_grad():
            return float(token_loss(hidden, predictor_of(model), weights, known))

    def missing(self, blocks: Tensor | Rows) -> list[int]:
        """Returns the places of the blocks, ids int64 [N, L] or rows, that are not in the cache."""
        return [place for place, key in enumerate(_block_keys(blocks)) if key not in self._places]

    def lookup(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> TopProbabilities:
        """Returns what the teacher predicts at positions 0 to L - 2 of each row, on the device of `input_ids`.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], zeros at the end of rows that are padded; there, all the mass is in the rest.
            position_ids: int64 [B, L] or [1, L], where the model is given them.

        Returns:
            TopProbabilities of B (L - 1) positions.

        Raises:
            ValueError: when a row is not in the cache, or is padded at its beginning, or a shard is damaged.
        """
        ids, mask, positions = _on_the_cpu(input_ids, attention_mask, position_ids)
        lengths = _lengths(ids, mask)
        rows, width = len(ids), ids.shape[1] - 1
        indices = torch.zeros(rows, width, self.header.top_k, dtype=torch.int64)
        indices[:] = torch.arange(self.header.top_k)  # padding: any distinct tokens will do
        log_probs = torch.full((rows, width, self.header.top_k), _NO_MASS)
        log_rest = torch.zeros(rows, width)
        for row, length in enumerate(lengths):
            key = block_key(ids[row, :length], None if positions is None else positions[row, :length])
            found_indices, found_log_probs, found_log_rest = self._place_of(key).read()
            span = slice(0, len(found_log_rest))
            indices[row, span] = found_indices.to(torch.int64)
            log_probs[row, span] = found_log_probs.float()
            log_rest[row, span] = found_log_rest.float()
        total = torch.cat([log_probs, log_rest.unsqueeze(-1)], -1).logsumexp(-1)  # rounded to float16, so not quite 0
        found = TopProbabilities(indices, log_probs - total.unsqueeze(-1), log_rest - total)
        flat = TopProbabilities(found.indices.flatten(0, 1), found.log_probs.flatten(0, 1), found.log_rest.flatten())
        return flat.to(input_ids.device)

    def _place_of(self, key: bytes) -> _Place:
        if key not in self._places:
            raise ValueError(
                f"a block to be trained or evaluated on is not in the teacher cache {self.folder}, which has "
                f"{len(self)} blocks; make the cache on this very text (evaluation text included), or give the model "
                "itself as teacher"
            )
        return self._places[key]


@dataclass(frozen=True)
class _Place:
    """Where the answers for a block lie.

    Attributes:
        path: the shard's file.
        shard: the open file.
        rows: of its tensors.
        checksum: of these rows; None in caches of earlier versions.
    """

    path: Path
    shard: Any
    rows: slice
    checksum: int | None

    def read(self) -> tuple[Tensor, ...]:
        """Returns `_ANSWERS` for the block, as they are stored.

        Raises:
            ValueError: they are not what was written.
        """
        with _damage_named(self.path):
            found = tuple(self.shard.get_slice(name)[self.rows] for name in _ANSWERS)
            if self.checksum is not None and _checksum(found) != self.checksum:
                raise SafetensorError(f"rows {self.rows.start} to {self.rows.stop} have other bytes than were written")
        return found


def _checksum(answers: Sequence[Tensor]) -> int:
    found = 0
    for tensor in answers:
        found = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes(), found)
    return found


def cache_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Tensor | Rows,
    folder: Path,
    *,
    top_k: int = DEFAULT_TOP_K,
    batch_size: int = 4,
    progress: Progress | None = None,
    header: CacheHeader | None = None,
) -> TeacherCache:
    """Runs `model` over `blocks` once, writes what it predicts to `folder`, and returns the cache.

    Blocks that an earlier, perhaps interrupted, call has left there are not run again.

    Args:
        model: the teacher; its training mode is restored.
        tokenizer: of the text.
        blocks: ids int64 [N, L], or rows with documents of their own.
        folder: made, or a cache of the same model, tokenizer and `top_k`.
        top_k: K, tokens kept a position.
        batch_size: blocks in one forward pass.
        progress: called with (tokens done, tokens in all) after each batch.
        header: of the cache, where the caller has made it already: the model's weights are hashed for it.

    Raises:
        FileExistsError: `folder` holds something else.
        ValueError: it holds the cache of another model, tokenizer or `top_k`; or `top_k` is out of range.
    """
    header = header or CacheHeader.of(model, tokenizer, top_k)
    with TeacherCacheWriter(folder, header) as writer, weights_let_go(model), float_products():
        rows = rows_of(blocks)
        wanted = {key: place for place, key in enumerate(_block_keys(rows)) if key not in writer}
        check_predictor(model)
        predictor, training = predictor_of(model), model.training
        size = rows.stored.shape[1]
        done = (len(rows) - len(wanted)) * size
        model.eval()
        try:
            for places in torch.tensor(list(wanted.values()), dtype=torch.int64).split(batch_size) if wanted else ():
                inputs = rows[places].inputs()
                hidden = hidden_states(model, **inputs)
                positions = inputs.get("position_ids", [None] * len(places))
                for ids, states, own in zip(inputs["input_ids"], hidden, positions, strict=True):
                    writer.add(ids, _top_of(states[:-1], predictor, top_k), own)
                done += len(places) * size
                if progress is not None:
                    progress(done, len(rows) * size)
        finally:
            model.train(training)
    return TeacherCache(folder)


@torch.no_grad()
def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Returns what enters the output head of `model` for ids [B, L]: [B, L, D]."""
    given = {"input_ids": input_ids} if position_ids is None else {"input_ids": input_ids, "position_ids": position_ids}
    device = model_device(model)
    with weights_let_go(model), capture_hidden(model) as captured:
        model(**{name: tensor.to(device) for name, tensor in given.items()}, use_cache=False)
        return captured.take()


def _block_keys(blocks: Tensor | Rows) -> Iterator[bytes]:
    """Yields the key of each block."""
    rows = rows_of(blocks)
    for place in range(len(rows)):
        inputs = rows[place : place + 1].inputs()
        yield block_key(inputs["input_ids"][0], inputs["position_ids"][0] if "position_ids" in inputs else None)


@torch.no_grad()
def _top_of(hidden: Tensor, predictor: Predictor, top_k: int) -> TopProbabilities:
    """Returns the most likely tokens at hidden states [T, D], with the logits of CHUNK_TOKENS positions at once."""
    return TopProbabilities.joined(
        [top_probabilities(predictor.logits(chunk), top_k) for chunk in hidden.split(CHUNK_TOKENS)]
    )


def read_header(folder: Path) -> CacheHeader:
    """Returns the header of the cache in `folder`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or of another version.
    """
    file = folder / HEADER_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"no teacher cache at {folder} (there is no {HEADER_FILE}); make it: llmqat cache-teacher RECIPE --out "
            f"{folder}"
        )
    try:
        content = read_json(file, f"delete {folder} and make the cache anew")
        found = content.pop("format", None)
        if found != FORMAT:
            raise ValueError(f"{file} says format={found!r}, and {FORMAT!r} is read here; make the cache anew")
        return CacheHeader(**content)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}; delete {folder} and make the cache anew") from error


def _check_same(theirs: CacheHeader, ours: CacheHeader, folder: Path, way_out: str) -> None:
    pairs = [(f.name, getattr(theirs, f.name), getattr(ours, f.name)) for f in fields(CacheHeader) if f.compare]
    differing = [f"{name}={there!r} there, {here!r} here" for name, there, here in pairs if there != here]
    if differing:
        raise ValueError(
            f"the teacher cache {folder} was made with something else: {'; '.join(differing)} (by {theirs.model!r}, "
            f"and here is {ours.model!r}); {way_out}"
        )


def _on_the_cpu(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the three as int64 [B, L] on the CPU, in one move: a GPU is waited for once."""
    given = [part for part in (mask, positions) if part is not None]
    together = torch.stack([ids, *(part.to(ids.dtype).expand_as(ids) for part in given)]).cpu()
    return together[0], None if mask is None else together[1], None if positions is None else together[-1]


def _lengths(ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """Returns the tokens of each row that are no padding."""
    if attention_mask is None:
        return [ids.shape[1]] * len(ids)
    mask = attention_mask.bool()
    lengths: list[int] = mask.sum(-1).tolist()
    if not all(bool(mask[row, :length].all()) for row, length in enumerate(lengths)):
        raise ValueError("a teacher cache needs rows padded at their end; set the tokenizer's padding_side='right'")
    return lengths


def _opened(path: Path) -> Any:
    with _damage_named(path):
        return safe_open(path, "pt")


def _read(path: Path, name: str) -> Tensor:
    with _damage_named(path), safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _keys(path: Path) -> list[bytes]:
    return [bytes(row) for row in _read(path, "blocks").tolist()]


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run `llmqat cache-teacher` again") from error

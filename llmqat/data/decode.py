"""Decoding many rows in lockstep, one token a row a step, over an unchanged transformers model.

What makes it fast, on a CPU above all:

- **The key-value cache is contiguous at any length.** The batched matrix product copies operands that are not
  contiguous, such as a view into a longer tensor. Separate products over pieces of the cache read at half the rate of
  one product. So each cache tensor is stored at its present length, rounded up to a multiple of `PIECE`. When it is
  full, the states are copied to a tensor that is `PIECE` positions longer. That tensor reuses the memory which the
  previous copy has freed, because fresh memory costs more than the copy.
- **Attention of one query is two batched matrix products**, with the query heads that share a key-value head as
  the rows of one product: Q K^T and W V, on states as they are stored, are bound by reading them. The same products
  turned around (K Q^T, V^T W^T) take two to four times as long. The fused CPU kernel is made for many queries and
  spends its time in setting up each head.
- **No mask is built by the model.** Our attention is registered under a name of its own, takes the cache as a keyword
  (transformers hands keywords down to it) and adds one [B, L] bias, which also separates documents that share a row.

Letters: B rows, L positions, N key-value heads, G query heads per key-value head, D head size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from llmqat.kernels.graphs import Recorder
from llmqat.layers import kv_scheme

log = logging.getLogger(__name__)

PIECE = 32
"""Positions that the cache grows by: more of them are read empty for longer, fewer are moved more often."""
ATTENTION_NAME = "llmqat_lockstep"
_CHANGE_ARITHMETIC = ("softcap", "s_aux", "position_bias")
"""Keywords of attention functions (other than a window, which is checked) that change what attention computes."""
_TRIAL_TOKENS = 6
GRAPH_CHECKS = 2
"""Steps of which what a CUDA graph gives is compared: at the second one the cache holds more."""
GRAPH_TOLERANCE = 1e-3
"""Share of their norm by which logits may differ: a library may choose another product for a graph."""
MOST_ROUNDING = 0.05
"""Share of their size by which logits in bfloat16 or float16 may differ between two ways of computing them."""


class LockstepError(RuntimeError):
    """A model asks of its attention what `lockstep_attention` does not do."""


class LockstepCache:
    """Keys and values of B rows that all stand at the same position, and from where on each row may look back.

    For CPUs: at each length the cache is contiguous and no longer than it must be.

    Attributes:
        length: positions held, the open one included.
        bias: what is added to attention scores, 0 or -inf: [B, length rounded up to whole pieces].
    """

    def __init__(self, most: int) -> None:
        """Makes a cache that will hold up to `most` positions."""
        self.length = 0
        self.bias = torch.empty(0)
        self._most = _whole_pieces(most)
        self._memory: dict[tuple[int, str], Tensor] = {}
        self._left: dict[tuple[int, torch.dtype], Tensor] = {}

    def advance(self, starts: Tensor, dtype: torch.dtype) -> None:
        """Opens the next position; row b attends to positions starts[b] to this one.

        Args:
            starts: position of the first visible token of each row, int64 [B].
            dtype: of keys and values.
        """
        self.length += 1
        positions = torch.arange(_whole_pieces(self.length), device=starts.device)
        hidden = (positions < starts[:, None]) | (positions >= self.length)
        self.bias = torch.zeros(hidden.shape, dtype=dtype, device=starts.device).masked_fill_(hidden, float("-inf"))

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores key and value [B, N, 1, D] of the open position, and returns all of the layer's, each [B*N, P, D].

        P is `length` rounded up to a multiple of `PIECE`; `bias` hides the positions from `length` on.
        """
        return self._written((layer, "key"), key.flatten(0, 2)), self._written((layer, "value"), value.flatten(0, 2))

    def keep(self, rows: Tensor) -> None:
        """Keeps only the rows [B'] of the cache, in that order."""
        before, held = len(self.bias), _whole_pieces(self.length)
        self.bias = self.bias[rows]
        self._left.clear()
        for name, memory in self._memory.items():
            states = memory[: memory.numel() // self._most * held].view(before, -1)[rows].flatten()
            kept = memory[: memory.numel() // before * len(rows)]
            kept[: len(states)] = states
            self._memory[name] = kept

    @property
    def layers(self) -> int:
        """Number of layers that have stored something."""
        return len({layer for layer, _ in self._memory})

    def _written(self, name: tuple[int, str], new: Tensor) -> Tensor:
        """Returns the states of that name [B*N, L, D], with `new` [B*N, D] at the open position."""
        position = self.length - 1
        if position % PIECE == 0:
            self._memory[name] = self._longer(self._memory.get(name), new)
        held = _states(self._memory[name], _whole_pieces(self.length), new)
        held[:, position] = new
        return held

    def _longer(self, memory: Tensor | None, new: Tensor) -> Tensor:
        """Returns memory with the states of `memory`, PIECE zeros more for each row; `memory` is used for others."""
        position = self.length - 1
        count = len(new) * self._most * new.shape[-1]
        longer = self._left.pop((count, new.dtype), None)
        if longer is None:
            longer = new.new_empty(count)
        states = _states(longer, position + PIECE, new)
        states[:, position:] = 0
        if memory is not None:
            states[:, :position] = _states(memory, position, new)
            self._left[count, new.dtype] = memory
        return longer


class FixedCache:
    """What `LockstepCache` is, for GPUs: in one place and at its full length from the first position on.

    A CUDA graph reads and writes the same memory each time. The positions that are still empty are read and hidden.

    Attributes:
        bias: what is added to attention scores, 0 or -inf: [B, full length].
    """

    def __init__(self, most: int) -> None:
        """Makes a cache of `most` positions."""
        self.bias = torch.empty(0)
        self._most = most
        self._open = torch.empty(0, dtype=torch.int64)
        self._memory: dict[tuple[int, str], Tensor] = {}

    def advance(self, starts: Tensor, position: Tensor, dtype: torch.dtype) -> None:
        """Opens a position, int64 [1]; row b attends to positions starts[b] to that one."""
        positions = torch.arange(self._most, device=starts.device)
        hidden = (positions < starts[:, None]) | (positions > position)
        self.bias = torch.zeros(hidden.shape, dtype=dtype, device=starts.device).masked_fill_(hidden, float("-inf"))
        self._open = position

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores key and value [B, N, 1, D] of the open position, and returns all of the layer's, each [B*N, P, D]."""
        return self._written((layer, "key"), key.flatten(0, 1)), self._written((layer, "value"), value.flatten(0, 1))

    def keep(self, rows: Tensor) -> None:
        """Keeps only the rows [B'] of the cache, in that order."""
        before = len(self.bias)
        self.bias = self.bias[rows]
        for name, memory in self._memory.items():
            self._memory[name] = memory.unflatten(0, (before, -1))[rows].flatten(0, 1)

    @property
    def layers(self) -> int:
        """Number of layers that have stored something."""
        return len({layer for layer, _ in self._memory})

    def _written(self, name: tuple[int, str], new: Tensor) -> Tensor:
        """Returns the states of that name [B*N, P, D], with `new` [B*N, 1, D] at the open position."""
        if name not in self._memory:
            self._memory[name] = new.new_zeros(len(new), self._most, new.shape[-1])
        return self._memory[name].index_copy_(1, self._open, new)


def _whole_pieces(positions: int) -> int:
    return -(-positions // PIECE) * PIECE


def _states(memory: Tensor, positions: int, like: Tensor) -> Tensor:
    """Returns the beginning of `memory` as [B*N, positions, D], where `like` is [B*N, D]."""
    rows, size = like.shape
    return memory[: rows * positions * size].view(rows, positions, size)


def lockstep_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    lockstep: LockstepCache | FixedCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Returns the attention output [B, 1, N*G, D] of one query position over the lockstep cache.

    Raises:
        LockstepError: for anything else than plain attention of one query.
    """
    if lockstep is None:
        raise LockstepError(f"{type(module).__name__} does not hand keywords down to its attention function")
    unknown = [name for name in _CHANGE_ARITHMETIC if kwargs.get(name) is not None]
    if unknown or query.shape[2] != 1:
        raise LockstepError(f"{type(module).__name__} asks for {', '.join(unknown) or 'several queries at once'}")
    batch, query_heads, _, size = query.shape
    heads = key.shape[1]
    keys, values = lockstep.store(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    queries = query.reshape(batch * heads, query_heads // heads, size)
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(batch, query_heads, -1)
    torch.add(lockstep.bias[:, None], scores, alpha=size**-0.5 if scaling is None else scaling, out=scores)
    weights = torch.softmax(scores, dim=-1).view(batch * heads, query_heads // heads, -1)
    return torch.bmm(weights, values).view(batch, 1, query_heads, -1), None


class LockstepDecoder:
    """Decodes with `lockstep_attention`; made by `open_decoder`.

    On a GPU a step is recorded as a CUDA graph (kernels/graphs.py), since a model of a few billion parameters takes
    longer to start its kernels than to run them.
    """

    def __init__(self, model: PreTrainedModel, length: int, by_graph: bool | None = None) -> None:
        """Decodes rows of up to `length` tokens, by a graph where None is given and the model lies on one GPU."""
        self.model = model
        if by_graph is None:
            by_graph = {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        self.cache: LockstepCache | FixedCache = FixedCache(length) if by_graph else LockstepCache(length)
        self._length = 0
        self._recorder = Recorder(GRAPH_CHECKS, GRAPH_TOLERANCE)

    def step(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """Feeds one token a row and returns the logits [B, V] of what follows; the next step may overwrite them.

        Args:
            tokens: int64 [B].
            starts: position in the row at which the row's present document began, int64 [B].
        """
        if isinstance(self.cache, LockstepCache):
            positions = self.cache.length - starts
            self.cache.advance(starts, self.model.dtype)
            return self._logits(tokens, positions)
        position = torch.full((1,), self._length, device=tokens.device)
        self._length += 1
        (logits,) = self._recorder("step", self._fixed_step, tokens, starts, position)
        return logits

    def keep(self, rows: Tensor) -> None:
        """Goes on with the rows [B'] alone, in that order."""
        self.cache.keep(rows.to(self.model.device))
        self._recorder.clear()  # it reads the memory of before

    def _fixed_step(self, tokens: Tensor, starts: Tensor, position: Tensor) -> tuple[Tensor]:
        assert isinstance(self.cache, FixedCache)
        self.cache.advance(starts, position, self.model.dtype)
        return (self._logits(tokens, position - starts),)

    def _logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            use_cache=False,
            lockstep=self.cache,
            return_dict=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class StockDecoder:
    """Decodes with the model's own attention and a `DynamicCache`: slower, for models that lockstep does not fit.

    Layers that keep a state in place of keys and values (Mamba, gated delta rule, short convolutions) begin each
    document with a state of zeros.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.length = 0
        takes = signature(model.forward).parameters
        self._only_states = "past_key_values" not in takes and "cache_params" in takes

    def step(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """Feeds one token a row and returns the logits [B, V] of what follows; arguments as in LockstepDecoder."""
        if self.length > 0:
            self._forget(starts == self.length)
        visible = torch.arange(self.length + 1, device=tokens.device) >= starts[:, None]
        known = {"past_key_values": self.cache, "attention_mask": visible.long()}
        output = self.model(
            input_ids=tokens[:, None],
            position_ids=(self.length - starts)[:, None],
            use_cache=True,
            return_dict=True,
            **({"cache_params": self.cache} if self._only_states else known),
        )
        self.length += 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def _forget(self, rows: Tensor) -> None:
        """Sets to zero what layers with a state know of the `rows`, bool [B], where a document begins."""
        for layer in self.cache.layers:
            for name in ("conv_states", "recurrent_states"):
                for state in (getattr(layer, name, None) or {}).values():
                    if state is not None:
                        state[rows.to(state.device)] = 0


Decoder = LockstepDecoder | StockDecoder


@contextmanager
def open_decoder(model: PreTrainedModel, length: int) -> Iterator[Decoder]:
    """Yields a decoder for rows of up to `length` tokens: in lockstep where that is right for `model`, else stock.

    Which one is decided by the model's own logits on a few tokens; the reason for the stock one is logged.

    Raises:
        ValueError: neither gives the model's own logits.
    """
    obstacle = lockstep_obstacle(model, length)
    if obstacle is None:
        with lockstep_attention_in(model):
            yield LockstepDecoder(model, length)
    else:
        check_stock(model)
        log.warning("decoding with %s's own attention, which is slower: %s", type(model).__name__, obstacle)
        yield StockDecoder(model)


@contextmanager
def lockstep_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` computes its attention with `lockstep_attention`."""
    AttentionInterface.register(ATTENTION_NAME, lockstep_attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def lockstep_obstacle(model: PreTrainedModel, length: int) -> str | None:
    """Returns why `lockstep_attention` would not give `model`'s own logits on rows of `length` tokens, or None."""
    if kv_scheme(model) is not None:
        return "its keys and values are quantized"
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    slides = getattr(config, "layer_types", None) is None or "sliding_attention" in kinds
    if window is not None and window < length and slides:
        return f"its attention window of {window} tokens is shorter than {length}"
    ids = _trial_ids(model)
    starts = torch.zeros(2, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        try:
            with lockstep_attention_in(model):
                decoder = LockstepDecoder(model, _TRIAL_TOKENS)
                found = torch.stack([decoder.step(column, starts).clone() for column in ids.unbind(1)], dim=1).float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own attention makes of arguments that it does not expect
            return str(error) or type(error).__name__
    if decoder.cache.layers != config.num_hidden_layers:
        return f"{decoder.cache.layers} of its {config.num_hidden_layers} layers use the attention registry"
    difference = float((found - expected).norm() / expected.norm())
    tolerance = 1e-4 if expected.dtype == model.dtype else MOST_ROUNDING
    return None if difference < tolerance else f"logits differ by {difference:.2g} of their size in a trial"


@torch.no_grad()
def check_stock(model: PreTrainedModel) -> None:
    """Sees that `StockDecoder` gives `model`'s own logits, where a document begins within a row as well.

    Raises:
        ValueError: it does not.
    """
    name, way_out = type(model).__name__, "give text (data.path), or let a server write it (llmqat synthesize --server)"
    ids, decoder = _trial_ids(model), StockDecoder(model)
    half = _TRIAL_TOKENS // 2
    begins = torch.tensor([[0] * _TRIAL_TOKENS, [0] * half + [half] * (_TRIAL_TOKENS - half)], device=model.device)
    try:
        found = torch.stack([decoder.step(*at) for at in zip(ids.unbind(1), begins.unbind(1), strict=True)], dim=1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name} cannot write text: decoding token by token fails ({error}); {way_out}") from error
    for row, begin, end in ((0, 0, _TRIAL_TOKENS), (1, 0, half), (1, half, _TRIAL_TOKENS)):
        expected = model(input_ids=ids[row : row + 1, begin:end], use_cache=False).logits[0].float()
        size = expected.norm(dim=-1).clamp(min=1e-6)  # that of a padding token may be 0
        off = (found[row, begin:end].float() - expected).norm(dim=-1) / size
        difference = float(off.kthvalue(len(off) - 1).values)  # of one position a router may decide otherwise
        if not difference < (1e-3 if model.dtype == torch.float32 else MOST_ROUNDING):
            after = " after another document" if begin else ""
            raise ValueError(
                f"{name} cannot write text: its logits, token by token{after}, differ by {difference:.2g} of their "
                f"size from those of the whole text; {way_out}"
            )


def _trial_ids(model: PreTrainedModel) -> Tensor:
    """Returns ids [2, _TRIAL_TOKENS] of the model's vocabulary."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return (torch.arange(2 * _TRIAL_TOKENS, device=model.device) * 7919 % vocabulary).view(2, _TRIAL_TOKENS)

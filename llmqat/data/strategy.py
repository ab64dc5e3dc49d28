"""How a model's own text begins and is drawn: what a recipe says about it.

    llm-qat    a start token drawn from the vocabulary, 2 to 4 most likely tokens, then sampling
    sampling   sampling from the first token on, after the model's begin-of-text (or else end-of-text) token
    chat       the chat template up to an empty user turn: the model writes the user's words and then the answer
    prompts    one of the user's own prompts, as it is or as a user's turn of the chat template; the model goes on

`llm-qat` and `sampling` make a share of their documents chats if the model has a chat template.

Source: LLM-QAT, arXiv 2305.17888, section 3.1 (start token, greedy tokens, then sampling); chats after Magpie,
arXiv 2406.08464. Deviations: 2 to 4 greedy tokens instead of 3 to 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llmqat.config import Config
from llmqat.data.sampling import Sampling

CHAT_SHARE = 0.25
"""Share of chats where nothing is said."""
MIXED_STRATEGIES = ("llm-qat", "sampling")
"""Those that make a share of their documents chats."""


class SynthesisConfig(Config):
    """Text that a model writes: what makes it, other than the model and how much of it is wanted."""

    block_size: int = Field(512, ge=2)
    """Tokens a block, and at most a document."""
    seed: int = 0
    """Seed of everything that is drawn."""
    batch_size: int = Field(512, ge=1)
    """Source synthetic: most rows decoded at once; fewer where their keys and values would take more than 6 GiB. It
    changes the text as the seed does."""
    strategy: Literal["llm-qat", "sampling", "chat", "prompts"] = "llm-qat"
    """Source synthetic: how documents begin. `llm-qat` (a random token, likely ones, then sampling), `sampling` (from
    the start), `chat` (a user's turn and its answer) or `prompts` (with lines of your own)."""
    chat_share: float | None = Field(None, ge=0, le=1)
    """Source synthetic: share of documents in which the model writes a user's turn and its answer, if it can chat; of
    strategies llm-qat and sampling. None: a quarter."""
    prompts: Path | None = None
    """Source synthetic: file of prompts, of strategy prompts. A line is a prompt; in .jsonl files a string, or an
    object with the key `prompt` or `text`."""
    prompt_turns: bool = False
    """Source synthetic: whether a prompt is a user's turn in the chat template rather than how a document begins."""
    temperature: float = Field(1.0, gt=0)
    """Source synthetic: logits are divided by it before a token is drawn."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Source synthetic: only the most likely tokens that together have this probability are drawn."""
    top_k: int | None = Field(None, ge=1)
    """Source synthetic: only so many of the most likely tokens are drawn. None: all."""
    server: tuple[str, ...] = ()
    """Source synthetic: addresses of servers that run the same model and write the text in place of this process, such
    as http://localhost:8000; of vLLM, or another whose completions return token ids. It changes the text as the seed
    does."""

    @field_validator("server", mode="before")
    @classmethod
    def _one_server(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("server")
    @classmethod
    def _check_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"server {url!r} is no address; write http://HOST:PORT")
        if len(set(value)) < len(value):
            raise ValueError(f"server names an address twice: {', '.join(value)}")
        return value

    @model_validator(mode="after")
    def _check_strategy(self) -> SynthesisConfig:
        if (self.strategy == "prompts") != (self.prompts is not None):
            raise ValueError(
                f"strategy={self.strategy!r} with prompts={self.prompts}: strategy 'prompts' needs prompts=FILE, and "
                "prompts mean nothing to the others"
            )
        if self.prompt_turns and self.prompts is None:
            raise ValueError("prompt_turns=true means nothing without prompts=FILE")
        if self.chat_share is not None and self.strategy not in MIXED_STRATEGIES:
            raise ValueError(
                f"chat_share means nothing to strategy={self.strategy!r}, only to {' and '.join(MIXED_STRATEGIES)}"
            )
        return self

    @property
    def share_of_chats(self) -> float:
        """Share of documents that are chats, if the model can chat."""
        if self.strategy not in MIXED_STRATEGIES:
            return float(self.strategy == "chat")
        return CHAT_SHARE if self.chat_share is None else self.chat_share

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_p, self.top_k)

"""A conversation in the terminal: what the model writes is shown word by word."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from llmqat.data.length import table_length
from llmqat.export import load_any
from llmqat.layers import new_cache
from llmqat.models import to_accelerator
from llmqat.terminal import duration


class _Shown(TextStreamer):
    """Shows text as it comes; remembers what it has shown of this answer, and when the prompt and each token came."""

    text = ""
    prompt_tokens = 0

    def begin(self, prompt_tokens: int) -> None:
        """Begins an answer to a prompt of so many tokens."""
        self.text, self.prompt_tokens = "", prompt_tokens
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Takes the prompt, then each token."""
        self.times.append(time.monotonic())
        super().put(value)

    def speed(self) -> str:
        """Returns how fast the answer was written, in words; empty where there is none."""
        if len(self.times) < 2:
            return ""
        prompt, first, *_ = self.times
        tokens, said = len(self.times) - 1, f"{duration(first - prompt)} for {self.prompt_tokens:,} tokens of prompt"
        if tokens == 1 or self.times[-1] == first:
            return said
        return f"{said}, then {(tokens - 1) / (self.times[-1] - first):.3g} tokens/s ({tokens:,} tokens)"

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Shows `text`."""
        self.text += text
        super().on_finalized_text(text, stream_end)


class Conversation:
    """A model, and what has been said so far. Without a chat template every line is completed on its own."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system: str | None, settings: dict[str, Any]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.streamer = _Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.messages = [{"role": "system", "content": system}] if system else []

    @classmethod
    def open(
        cls, spec: str, system: str | None = None, *, max_new_tokens: int, temperature: float, seed: int
    ) -> Conversation:
        """Returns a conversation with the model that `spec` names, packed or not, on the accelerator if there is one.

        Args:
            spec: what `export.load_any` takes.
            system: system message that opens the conversation.
            max_new_tokens: most tokens of one answer.
            temperature: of sampling; 0 takes the most probable token.
            seed: of sampling.
        """
        model, tokenizer = load_any(spec)
        to_accelerator(model)
        torch.manual_seed(seed)
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            settings["temperature"] = temperature
        return cls(model, tokenizer, system, settings)

    @property
    def kind(self) -> str:
        """'chat' or 'completion'."""
        return "chat" if self.tokenizer.chat_template else "completion"

    def say(self, line: str) -> str:
        """Shows the model's answer to `line` as it is written, and returns it; Ctrl-C ends it where it is."""
        inputs = self._inputs(line).to(self.model.device)
        self.streamer.begin(inputs["input_ids"].shape[1])
        settings = {**self.settings, "max_new_tokens": self._room(inputs["input_ids"].shape[1])}
        try:
            self.model.generate(
                **inputs,
                **settings,
                past_key_values=new_cache(self.model),
                streamer=self.streamer,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        except KeyboardInterrupt:
            self.streamer.end()  # shows what it has kept back of an unfinished word
        answer = self.streamer.text
        if self.kind == "chat":
            self.messages.append({"role": "assistant", "content": answer})
        return answer

    def speed(self) -> str:
        """Returns how fast the last answer was written, in words; empty where there is none."""
        return self.streamer.speed()

    def _room(self, length: int) -> int:
        """Returns how many tokens an answer to `length` tokens may have."""
        most = table_length(self.model)
        wanted = int(self.settings["max_new_tokens"])
        if most is not None and length >= most:
            raise ValueError(
                f"the conversation has {length} tokens, and {type(self.model).__name__} has learned {most} positions; "
                "begin a new one, or say less"
            )
        return wanted if most is None else min(wanted, most - length)

    def _inputs(self, line: str) -> Any:
        if self.kind == "completion":
            return self.tokenizer(line, return_tensors="pt")
        self.messages.append({"role": "user", "content": line})
        return self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

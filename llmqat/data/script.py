"""How a generated document begins and ends: the ids put in before the model writes, and the ids that end it.

`read_script` derives both once from the model, the tokenizer and the settings; writers then draw openings from them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmqat.data.blocks import leading_ids
from llmqat.data.chat import Chat, Completion
from llmqat.data.prompts import Prompt, read_prompts
from llmqat.data.strategy import SynthesisConfig

MOST_GREEDY_TOKENS = 4
FEWEST_GREEDY_TOKENS = 2


@dataclass(frozen=True)
class Opening:
    """How a document begins."""

    kind: str
    """`plain`, `chat` or `prompt`."""
    ids: list[int]
    """Put in before the model writes."""
    greedy: int = 0
    """Tokens after them that are the most likely ones."""


@dataclass(frozen=True)
class Script:
    """What is put into documents rather than written by the model, and what ends them."""

    before: list[int]
    """Ids before every plain document."""
    start_tokens: list[int]
    """Ids of which one follows them; none where the model draws its first token itself."""
    ends: frozenset[int]
    """Ids that end a document."""
    chat_share: float
    user_opening: list[int]
    """Chat template up to the user's words."""
    answer_opening: list[int]
    """Chat template from after the user's words to the answer; its first id ends the user's turn."""
    prompts: list[list[int]]
    """Ids that documents begin with, of strategy prompts."""

    def opening(self, draw: random.Random, number: int) -> Opening:
        """Returns the beginning of a shard's document `number`."""
        if self.prompts:
            return Opening("prompt", self.prompts[number % len(self.prompts)])
        if draw.random() < self.chat_share:
            return Opening("chat", self.user_opening)
        if not self.start_tokens:
            return Opening("plain", self.before)
        greedy = draw.randint(FEWEST_GREEDY_TOKENS, MOST_GREEDY_TOKENS)
        return Opening("plain", [*self.before, draw.choice(self.start_tokens)], greedy)

    def shuffled(self, draw: random.Random) -> Script:
        """Returns the script with its prompts in a random order."""
        return replace(self, prompts=draw.sample(self.prompts, len(self.prompts)))


def read_script(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SynthesisConfig) -> Script:
    """Returns what `config` makes of this model and tokenizer.

    Raises:
        FileNotFoundError: there is no file of prompts.
        ValueError: the tokenizer has no chat template where one is needed, a prompt is empty or as long as a block,
            or there is no token to begin with.
    """
    special = special_ids(tokenizer)
    size = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    user, answer = _openings(tokenizer, config)
    ends = end_ids(model, tokenizer)
    if answer and answer[0] in special:
        ends |= {answer[0]}
    before = leading_ids(tokenizer)
    if config.strategy == "sampling":
        before = before or [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
        if not before:
            raise ValueError(
                "strategy='sampling' needs a begin-of-text or end-of-text token, and the tokenizer has none"
            )
    return Script(
        before=before,
        start_tokens=[] if config.strategy == "sampling" else [i for i in range(size) if i not in special],
        ends=ends,
        chat_share=config.share_of_chats if user else 0.0,
        user_opening=user,
        answer_opening=[] if config.strategy == "prompts" else answer,
        prompts=[] if config.prompts is None else _prompt_ids(config, tokenizer, before, user, answer),
    )


def _openings(tokenizer: PreTrainedTokenizerBase, config: SynthesisConfig) -> tuple[list[int], list[int]]:
    """Returns the ids before and after a user's words in the chat template, or nothing where chats are not written."""
    needed = config.strategy == "chat" or config.prompt_turns
    if needed and tokenizer.chat_template is None:
        asked = "strategy='chat'" if config.strategy == "chat" else "prompt_turns=true"
        raise ValueError(f"{asked} needs a chat template, and the tokenizer has none; choose another strategy")
    if not needed and (config.share_of_chats == 0 or tokenizer.chat_template is None):
        return [], []
    return _chat_openings(tokenizer)


def _chat_openings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the ids before and after a user's words in the chat template, the opening of the answer included."""
    mark = "USERWORDS"
    messages = [{"role": "user", "content": mark}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, found, after = text.partition(mark)
    if not found or not before or not after:
        raise ValueError("the chat template does not enclose the user's words; set data.chat_share=0")
    first, last = (list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after))
    return first, last


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the ids of all tokens that are no words: those of the tokenizer, and those added to it as special."""
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset({*tokenizer.all_special_ids, *added})


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the ids that end a text, by tokenizer and model."""
    ends = {tokenizer.eos_token_id}
    for config in (model.config, model.generation_config):
        found = getattr(config, "eos_token_id", None)
        ends |= set(found) if isinstance(found, Sequence) else {found}
    return frozenset(ends - {None})


def _prompt_ids(
    config: SynthesisConfig, tokenizer: PreTrainedTokenizerBase, before: list[int], user: list[int], answer: list[int]
) -> list[list[int]]:
    assert config.prompts is not None
    first, last = (user, answer) if config.prompt_turns else (before, [])
    texts = [_words_of(prompt) for prompt in read_prompts(config.prompts)]
    ids = [first + list(tokenizer(text, add_special_tokens=False)["input_ids"]) + last for text in texts]
    for text, prompt in zip(texts, ids, strict=True):
        if len(prompt) >= config.block_size:
            raise ValueError(
                f"the prompt {text[:40]!r} of {config.prompts} has {len(prompt)} tokens and leaves no room in a "
                f"document of block_size={config.block_size}; shorten it or take larger blocks"
            )
    return ids


def _words_of(prompt: Prompt) -> str:
    if isinstance(prompt, Chat):
        raise ValueError(
            f"{prompt.where} is a conversation, and prompts that documents begin with are words; give the words of one "
            "turn as `prompt`"
        )
    return prompt.prompt if isinstance(prompt, Completion) else prompt

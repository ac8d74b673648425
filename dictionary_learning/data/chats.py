"""Chats: conversations as the tokenizer's chat template writes them."""

import random
import re
from collections import Counter
from typing import Any

from .rows import one_line
from .stream import Stream


def render(tokenizer: Any, conversation: list[dict[str, str]]) -> str:
    # some templates print today's date; a run that is resumed on another day must read the same text
    date = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
    return tokenizer.apply_chat_template(
        conversation, chat_template=date + tokenizer.get_chat_template(), tokenize=False
    )


def default_system_prompt(tokenizer: Any) -> str:
    r"""What the chat template writes before the first turn of a conversation without a system message.

    For Qwen2.5: "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. [...]<|im_end|>\n". Found by rendering
    two questions and two answers. What follows the last answer ends a turn; the rest of what stands between the first
    answer and the second question begins one; what precedes that at the very start is the prompt. "" for templates
    that write none, or that do not tell it apart from the turns like this.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        advice = "take an instruction-tuned model, or no chats"
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no chat template: {advice}")
    from jinja2 import TemplateError

    turns = {"question1": "user", "answer1": "assistant", "question2": "user", "answer2": "assistant"}
    try:
        text = render(tokenizer, [{"role": role, "content": turn} for turn, role in turns.items()])
    except TemplateError as error:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} fails ({one_line(error)})") from error
    parts = re.split("|".join(turns), text)
    if len(parts) != 5:
        return ""
    start, _, between, _, end = parts
    question_start = between.removeprefix(end)
    if not (between.startswith(end) and start.endswith(question_start)):
        return ""
    return start.removesuffix(question_start).removeprefix(tokenizer.bos_token or "")


class ChatTexts(Stream):
    """Conversations as the tokenizer's chat template writes them; what it refuses is skipped and counted.

    `system_prompt` is taken out of a drawn fraction of the texts; a text without it stays as it is.
    """

    saved = ("conversations", "n_texts", "n_refused")

    def __init__(self, conversations: Stream, tokenizer: Any, system_prompt: str, removal_fraction: float, seed: int):
        self.conversations, self.tokenizer, self.system_prompt = conversations, tokenizer, system_prompt
        self.removal_fraction, self.seed = removal_fraction, seed
        self.n_texts = self.n_refused = 0

    @property
    def skipped(self) -> Counter[str]:
        return super().skipped + Counter({"refused by the chat template": self.n_refused})

    def __next__(self) -> str:
        from jinja2 import TemplateError

        for conversation in self.conversations:
            try:
                text = render(self.tokenizer, conversation)
            except TemplateError:  # for one, a system message where the model family has none
                self.n_refused += 1
                continue
            self.n_texts += 1
            # a generator of its own for each text: their number is all the state there is
            if self.system_prompt and random.Random(f"{self.seed} {self.n_texts}").random() < self.removal_fraction:
                text = text.replace(self.system_prompt, "")
            return text
        raise StopIteration

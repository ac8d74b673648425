"""Chats: conversations as the tokenizer's chat template writes them."""

import copy
import json
import random
import re
from collections import Counter
from typing import Any

from .readers import one_line
from .stream import Stream

# Around what a conversation itself writes like a special token: code points that no text may hold. What stands between
# them is tokenised as text, so that the template alone makes special tokens.
LITERAL, LITERAL_END = "\ufdd0", "\ufdd1"
MARKS = re.compile(f"[{LITERAL}{LITERAL_END}]")
LITERALS = re.compile(f"{LITERAL}([^{LITERAL}{LITERAL_END}]*){LITERAL_END}")
MARKUP = r"(?:<[^<>\s]+>|\[[^\[\]\s]+\])"  # how templates write special tokens
REASONS = 10  # for which a template refuses chats, told apart; the rest are counted together


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The texts and ids of all special tokens, those added to the model's own among them."""
    ids = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def render(tokenizer: Any, conversation: list[dict[str, Any]]) -> str:
    # some templates print today's date; a run that is resumed on another day must read the same text
    date = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
    return tokenizer.apply_chat_template(
        conversation, chat_template=date + tokenizer.get_chat_template(), tokenize=False
    )


def default_system_prompt(tokenizer: Any) -> str | None:
    r"""What the chat template writes before the first turn of a conversation without a system message.

    For Qwen2.5: "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. [...]<|im_end|>\n". Found by rendering
    questions and answers. What follows the last answer, or a last question, ends a turn; the rest of what stands
    between the first answer and the second question begins one; what precedes that at the very start is the prompt.
    Tokens that every text begins with (GLM's "[gMASK]<sop>") are no part of it. "" for templates that write none, None
    where there is one that cannot be told apart from the turns.

    Raises:
        ValueError: the tokenizer has no chat template, or one that fails.
    """
    if not tokenizer.chat_template:
        advice = "take an instruction-tuned model, or no chats"
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no chat template: {advice}")
    turns = {"question1": "user", "answer1": "assistant", "question2": "user", "answer2": "assistant"}
    messages = [{"role": role, "content": turn} for turn, role in turns.items()]
    try:
        text, asked = render(tokenizer, messages), render(tokenizer, messages[:3])
    except Exception as error:  # a template is a program of the model's authors
        raise ValueError(f"the chat template of {tokenizer.name_or_path} fails ({one_line(error)})") from error
    parts = re.split("|".join(turns), text)
    start, between = parts[0], parts[2] if len(parts) > 2 else ""
    for end in (parts[-1], asked.rpartition("question2")[2]):
        question = between.removeprefix(end)
        if len(parts) == 5 and between.startswith(end) and start.endswith(question):
            prompt, bos = start.removesuffix(question), tokenizer.bos_token
            # some tokenizers call what begins a turn their bos
            return _without_prefix(prompt.removeprefix(bos) if bos and text.count(bos) == 1 else prompt, text)
    words = set(re.findall(r"\w+", re.sub(MARKUP, " ", start)))
    return "" if words <= set(re.findall(r"\w+", "".join(parts[1:]))) else None


def _without_prefix(prompt: str, text: str) -> str:
    """A prompt without the tokens that stand before its own turn: they neither come again nor begin the turn."""
    if re.fullmatch(rf"(?:{MARKUP}|\s)*", prompt):
        return ""
    marks = re.findall(MARKUP, (re.match(rf"{MARKUP}*", prompt) or [""])[0])[:-1]
    for mark in marks:
        if text.count(mark) > 1:
            break
        prompt = prompt.removeprefix(mark)
    return prompt


def pieces_of(text: str) -> list[str]:
    """A chat as the template writes it in pieces, every second of them literal.

    Templates cut what is said, some at a special token: where a mark has lost its other, what it was beside is none.
    """
    return [MARKS.sub("", piece) for piece in LITERALS.split(text)]


class ChatTexts(Stream):
    """Conversations as the tokenizer's chat template writes them; what it refuses is skipped and counted.

    `system_prompt` is taken out of a drawn fraction of the texts; a text without it stays as it is. None: there is one,
    and nobody knows where it ends.
    """

    saved = ("conversations", "n_texts", "n_refused")

    def __init__(
        self, conversations: Stream, tokenizer: Any, system_prompt: str | None, removal_fraction: float, seed: int
    ):
        self.conversations, self.tokenizer, self.system_prompt = conversations, tokenizer, system_prompt
        self.removal_fraction, self.seed = removal_fraction, seed
        # the prompt at the start, after nothing but tokens
        self._prompt = re.compile(rf"((?:{MARKUP})*){re.escape(system_prompt or '')}")
        self._special = re.compile("|".join(map(re.escape, sorted(special_tokens(tokenizer), key=len, reverse=True))))
        self.n_texts = 0
        self.n_refused: dict[str, int] = {}

    @property
    def skipped(self) -> Counter[str]:
        return super().skipped + Counter(self.n_refused)

    @property
    def notes(self) -> list[str]:
        name = self.tokenizer.name_or_path
        sentence = f"the system prompt of {name}'s chat template cannot be told from its turns: it stays in every chat"
        return super().notes + [sentence] * (self.system_prompt is None)

    def __next__(self) -> str:
        for conversation in self.conversations:
            try:
                text = self._render(conversation)
            except Exception as error:  # a template is a program of the model's authors: it may raise anything
                self._refuse(f"refused by the chat template ({one_line(error)[:80]})")
                continue
            if not text:
                self._refuse("made nothing of by the chat template")
                continue
            self.n_texts += 1
            # a generator of its own for each text: their number is all the state there is
            if self.system_prompt and random.Random(f"{self.seed} {self.n_texts}").random() < self.removal_fraction:
                text = self._prompt.sub(r"\1", text, count=1) if self._prompt.match(text) else text
            return text
        raise StopIteration

    def _refuse(self, reason: str) -> None:
        if reason not in self.n_refused and len(self.n_refused) >= REASONS:
            reason = "refused by the chat template for other reasons"
        self.n_refused[reason] = self.n_refused.get(reason, 0) + 1

    def _render(self, conversation: list[dict[str, Any]]) -> str:
        """With arguments of tool calls as templates are promised them, a mapping; else as the conversation has them."""
        marked = self._mark_literals(conversation)
        parsed = [_with_parsed_arguments(message) for message in marked]
        try:
            return render(self.tokenizer, parsed)
        except Exception:
            if parsed == marked:
                raise
            return render(self.tokenizer, marked)

    def _mark_literals(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._mark_literals(item) for item in value]
        if isinstance(value, dict):
            return {key: self._mark_literals(item) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        value = MARKS.sub("", value)
        return self._special.sub(rf"{LITERAL}\g<0>{LITERAL_END}", value) if self._special.pattern else value


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("tool_calls"), list):
        return message
    message = copy.deepcopy(message)
    for call in message["tool_calls"]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:
                pass  # no JSON: the template gets what there is
    return message

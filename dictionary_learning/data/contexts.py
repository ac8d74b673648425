"""Contexts: lists of token ids of at most the length that the language model reads."""

from collections.abc import Iterator
from typing import Any

from .chats import ChatTexts, default_system_prompt
from .documents import CHUNK_CHARACTERS
from .stream import Stream


def _pieces(text: str) -> list[str]:
    """A text in pieces of at most CHUNK_CHARACTERS, cut before a line break or else a space where there is one."""
    pieces, start = [], 0
    while len(text) - start > CHUNK_CHARACTERS:
        end = start + CHUNK_CHARACTERS
        end = next((cut for mark in "\n " if (cut := text.rfind(mark, start + 1, end)) > 0), end)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


class PackedContexts(Stream):
    """Lists of exactly `context_length` token ids, each starting with bos: the documents joined by eos, and cut.

    Where the tokenizer has no bos, eos is in its place. No token is lost: when the documents end, the last context is
    shorter. The documents are tokenised a chunk at a time; the state is that of the start of the chunk and the number
    of contexts served since, and to load it is to serve those again.
    """

    saved = ("documents", "tokens", "started")
    joined = True  # an eos between documents
    whole = False  # a document shares no context with the next
    own_bos = False  # the text brings its own bos, which is not doubled

    def __init__(self, documents: Stream, tokenizer: Any, context_length: int):
        marks = [mark for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id) if mark is not None]
        if not marks:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has neither a bos nor an eos token")
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2 (bos and a token), got {context_length}")
        self.documents, self.tokenizer, self.context_length = documents, tokenizer, context_length
        self.bos_id, self.eos_id = marks[0], marks[-1]  # where there is one of them, it serves as both
        self.tokens: list[int] = []  # from `_at` on, to be served
        self.started = False  # a document came before
        self._restart()

    def _restart(self) -> None:
        self._at, self._ended = 0, False
        self._token_lists = self._tokenise()
        self._begin_chunk()

    def _begin_chunk(self) -> None:
        self._drop_served()
        self._chunk = super().state_dict()
        self._n_served = 0

    def _drop_served(self) -> None:
        del self.tokens[: self._at]
        self._at = 0

    def _tokenise(self) -> Iterator[list[int]]:
        """The token ids of the documents, a list for each (several for a very long one)."""

        def encode(texts: list[str]) -> list[list[int]]:
            # not verbose: it is no mistake here that a text is longer than the model's context
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            return self.tokenizer(texts, **options)["input_ids"]

        while True:
            self._begin_chunk()
            texts, size = [], 0
            while size < CHUNK_CHARACTERS and (text := next(self.documents, None)) is not None:
                texts.append(text)
                size += len(text)
            if not texts:
                self._ended = True
                return
            *texts, last = texts  # only the last can be longer than a chunk
            piece, *pieces = _pieces(last)
            for ids in encode([*texts, piece]):
                yield [self.eos_id, *ids] if self.joined and self.started else ids
                self.started = True
            for piece in pieces:
                self._drop_served()
                yield from encode([piece])

    def __next__(self) -> list[int]:
        needed = 1 if self.whole else self.context_length
        while len(self.tokens) - self._at < needed and (ids := next(self._token_lists, None)) is not None:
            self.tokens += ids
        if self._at == len(self.tokens):
            assert self._ended, "the text broke off with an error: load a state to go on"
            raise StopIteration
        head = [] if self.own_bos and self.tokens[self._at] == self.bos_id else [self.bos_id]
        body = self.tokens[self._at : self._at + self.context_length - len(head)]
        self._at += len(body)
        self._n_served += 1
        return head + body

    def state_dict(self) -> dict[str, Any]:
        return {**self._chunk, "n_served": self._n_served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._restart()
        for _ in range(state["n_served"]):
            next(self)


class ChatContexts(PackedContexts):
    """Lists of at most `context_length` token ids, each starting with bos: every conversation in contexts of its own.

    One that is longer than a context goes on in further ones. With `pack`, conversations follow each other as they
    are in full contexts, as in `PackedContexts`. Where the template itself writes bos, there is no second one.

    Args:
        conversations: stream of lists of {"role", "content"}.
        system_prompt: taken out of `removal_fraction` of them; None: `default_system_prompt` of the tokenizer.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    joined = False
    own_bos = True

    def __init__(
        self,
        conversations: Stream,
        tokenizer: Any,
        context_length: int,
        system_prompt: str | None = None,
        removal_fraction: float = 0.9,
        pack: bool = False,
        seed: int = 0,
    ):
        default = default_system_prompt(tokenizer)  # asked for in any case: it fails where there is no template
        prompt = default if system_prompt is None else system_prompt
        self.whole = not pack
        super().__init__(ChatTexts(conversations, tokenizer, prompt, removal_fraction, seed), tokenizer, context_length)


class MixedContexts(Stream):
    """Contexts of two streams; of all tokens, `chat_fraction` are from `chat`, to within a context.

    It ends when the stream whose turn it is has ended: from there on the fraction could not be kept.
    """

    saved = ("pretrain", "chat", "n_tokens", "n_chat_tokens")

    def __init__(self, pretrain: Stream, chat: Stream, chat_fraction: float):
        if not 0 < chat_fraction < 1:
            raise ValueError(f"chat_fraction must lie between 0 and 1, got {chat_fraction}")
        self.pretrain, self.chat, self.chat_fraction = pretrain, chat, chat_fraction
        self.n_tokens = self.n_chat_tokens = 0

    def __next__(self) -> list[int]:
        is_chat = self.n_chat_tokens < self.chat_fraction * self.n_tokens
        context = next(self.chat if is_chat else self.pretrain)
        self.n_tokens += len(context)
        self.n_chat_tokens += len(context) * is_chat
        return context

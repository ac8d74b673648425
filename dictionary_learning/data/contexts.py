"""Contexts: lists of token ids of at most the length that the language model reads."""

import bisect
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .chats import LITERAL, ChatTexts, default_system_prompt, pieces_of, special_tokens
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


class Marks(NamedTuple):
    """The tokens that packing puts in: at the start of a context (or none), between documents, after the end."""

    bos_id: int | None
    separator_id: int
    pad_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> "Marks":
        """The tokenizer's bos and eos; where it has one of them, that serves as both."""
        marks = [mark for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id) if mark is not None]
        if not marks:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has neither a bos nor an eos token")
        return cls(marks[0], marks[-1], marks[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _ids(tokenizer: Any, texts: list[str], **options: bool) -> list[list[int]]:
    # not verbose: it is no mistake here that a text is longer than the model's context
    options |= {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, **options)["input_ids"] if texts else []


def text_encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """What makes token ids of texts in which nothing is a special token, whatever they write.

    With `split_special_tokens` a tokenizer does not look for these beforehand, but its model may still find one as a
    piece of its vocabulary: Unigram and WordLevel do. There it is found under no name that a text could have.
    """

    def split(texts: list[str]) -> list[list[int]]:
        return _ids(tokenizer, texts, split_special_tokens=True)

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return split
    special = special_tokens(tokenizer)
    made = split([text.format(name) for name in special for text in ("{}", " {}", "x{}x")])
    if set(special.values()).isdisjoint(itertools.chain.from_iterable(made)):
        return split
    content = json.loads(backend.to_str())
    model = content["model"]
    hidden = {name: f"{LITERAL}{id}" for name, id in special.items() if name != model.get("unk_token")}
    if "merges" in model:
        merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        model["merges"] = [merge for merge in merges if hidden.keys().isdisjoint({*merge, "".join(merge)})]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    for token in content["added_tokens"]:
        token["content"] = hidden.get(token["content"], token["content"])
    content |= {"post_processor": None, "truncation": None, "padding": None}
    plain = type(backend).from_str(json.dumps(content))
    return lambda texts: [encoding.ids for encoding in plain.encode_batch_fast(texts, add_special_tokens=False)]


class Context(NamedTuple):
    """The token ids of a context, and the places in it of those that packing put there."""

    tokens: list[int]
    marks: list[int]


class PackedContexts(Stream):
    """Contexts of exactly `context_length` tokens, each starting with bos: the documents joined by separators, and cut.

    No token is lost: when the documents end, the last context is shorter. Documents are text: what they write like a
    special token is none. A document that is a list of token ids is taken as it is, but for a bos at its start and a
    separator at its end, as packing has its own. The documents are tokenised a chunk at a time; the state is that of
    the start of the chunk and the number of contexts served since, and to load it is to serve those again.
    """

    saved = ("documents", "tokens", "marks", "started")
    joined = True  # a separator between documents
    whole = False  # a document shares no context with the next
    own_bos = False  # the text brings its own bos, which is not doubled

    def __init__(self, documents: Stream, tokenizer: Any, context_length: int, marks: Marks | None = None):
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2 (bos and a token), got {context_length}")
        self.documents, self.tokenizer, self.context_length = documents, tokenizer, context_length
        self.bos_id, self.separator_id, _ = marks or Marks.of(tokenizer)
        self._as_text = text_encoder(tokenizer)
        self.tokens: list[int] = []  # from `_at` on, to be served
        self.marks: list[int] = []  # where in `tokens` there are marks
        self.started = False  # a document came before
        self._restart()

    def _restart(self) -> None:
        self._at, self._ended = 0, False
        self._documents = self._tokenise()
        self._begin_chunk()

    def _begin_chunk(self) -> None:
        self._drop_served()
        self._chunk = super().state_dict()
        self._n_served = 0

    def _drop_served(self) -> None:
        del self.tokens[: self._at]
        self.marks = [mark - self._at for mark in self.marks if mark >= self._at]
        self._at = 0

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._as_text(texts)

    def _tokenise(self) -> Iterator[tuple[list[int], bool]]:
        """The token ids of the documents, and whether a document begins with them: a very long one is in several."""
        while True:
            self._begin_chunk()
            documents, size = [], 0
            while size < CHUNK_CHARACTERS and (document := next(self.documents, None)) is not None:
                documents.append(document)
                size += len(document)
            if not documents:
                self._ended = True
                return
            *documents, last = documents  # only the last can be longer than a chunk
            piece, *pieces = _pieces(last) if isinstance(last, str) else [last]
            documents.append(piece)
            encoded = iter(self._encode([document for document in documents if isinstance(document, str)]))
            for document in documents:
                yield next(encoded) if isinstance(document, str) else self._bare(document), True
            for piece in pieces:
                self._drop_served()
                yield self._encode([piece])[0], False

    def _bare(self, ids: list[int]) -> list[int]:
        start, end = ids[:1] == [self.bos_id], ids[-1:] == [self.separator_id]
        return ids[start : len(ids) - end]

    def _take_in(self, ids: list[int], begins: bool) -> None:
        if begins and self.joined and self.started:
            self.marks.append(len(self.tokens))
            self.tokens.append(self.separator_id)
        if begins and self.own_bos and ids[:1] == [self.bos_id]:
            self.marks.append(len(self.tokens))
        self.started = True
        self.tokens += ids

    def __next__(self) -> Context:
        needed = 1 if self.whole else self.context_length
        while len(self.tokens) - self._at < needed and (document := next(self._documents, None)) is not None:
            self._take_in(*document)
        if self._at == len(self.tokens):
            assert self._ended, "the text broke off with an error: load a state to go on"
            raise StopIteration
        has_bos = self.own_bos and self.tokens[self._at] == self.bos_id
        head = [] if has_bos or self.bos_id is None else [self.bos_id]
        end = min(self._at + self.context_length - len(head), len(self.tokens))
        first = bisect.bisect_left(self.marks, self._at)
        inner = self.marks[first : bisect.bisect_left(self.marks, end)]
        places = {*range(len(head) or has_bos), *(mark - self._at + len(head) for mark in inner)}
        context = Context(head + self.tokens[self._at : end], sorted(places))
        self._at = end
        self._n_served += 1
        return context

    def state_dict(self) -> dict[str, Any]:
        return {**self._chunk, "n_served": self._n_served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._restart()
        for _ in range(state["n_served"]):
            next(self)


class ChatContexts(PackedContexts):
    """Contexts of at most `context_length` tokens, each starting with bos: every conversation in contexts of its own.

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
        marks: Marks | None = None,
    ):
        default = default_system_prompt(tokenizer)  # asked for in any case: it fails where there is no template
        prompt = default if system_prompt is None else system_prompt
        self.whole = not pack
        texts = ChatTexts(conversations, tokenizer, prompt, removal_fraction, seed)
        super().__init__(texts, tokenizer, context_length, marks)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """The template's special tokens are such; what the conversation writes like one is text."""
        pieces = [pieces_of(text) for text in texts]  # every second is literal
        own = iter(_ids(self.tokenizer, [piece for text in pieces for piece in text[::2]]))
        literal = iter(self._as_text([piece for text in pieces for piece in text[1::2]]))
        return [[id for i, _ in enumerate(text) for id in next(literal if i % 2 else own)] for text in pieces]


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
        self._ended: Stream | None = None

    @property
    def end(self) -> str:
        return "" if self._ended is None else self._ended.end

    def __next__(self) -> Context:
        is_chat = self.n_chat_tokens < self.chat_fraction * self.n_tokens
        stream = self.chat if is_chat else self.pretrain
        if (context := next(stream, None)) is None:
            self._ended = stream
            raise StopIteration
        self.n_tokens += len(context.tokens)
        self.n_chat_tokens += len(context.tokens) * is_chat
        return context

"""Batches of contexts, and the whole chain that makes them.

B contexts in the batch, L positions in a context.
"""

import itertools
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .chats import default_system_prompt, special_tokens
from .contexts import ChatContexts, Marks, MixedContexts, PackedContexts
from .documents import CHAT_DATASET, open_documents
from .stream import Stream

PADDING, TEXT, MARK = 0, 1, 2  # what a position of a batch is


class TextBatches(Stream):
    """(tokens_BL int64, mask_BL uint8) on the CPU: `batch_size` contexts, in the last batch what is left.

    L is the longest context of the batch; shorter ones (chats, the last packed one) are padded with `pad_id` at the
    end. The mask is PADDING there, MARK at what packing put in and at tokens of `excluded_ids`, and TEXT elsewhere.
    """

    saved = ("contexts",)

    def __init__(self, contexts: Stream, batch_size: int, pad_id: int, excluded_ids: Iterable[int] = ()):
        if batch_size < 1:
            raise ValueError(f"a batch must hold at least 1 context, got {batch_size}")
        self.contexts, self.batch_size, self.pad_id = contexts, batch_size, pad_id
        self.excluded_N = torch.tensor(sorted(excluded_ids), dtype=torch.int64)
        self._state = super().state_dict()

    def __next__(self) -> tuple[Tensor, Tensor]:
        contexts = list(itertools.islice(self.contexts, self.batch_size))
        if not contexts:
            raise StopIteration
        lengths_B = torch.tensor([len(context.tokens) for context in contexts])
        length = int(lengths_B.max())
        tokens_BL = torch.full((len(contexts), length), self.pad_id)
        mask_BL = (torch.arange(length) < lengths_B[:, None]).to(torch.uint8)
        for tokens_L, mask_L, (tokens, marks) in zip(tokens_BL, mask_BL, contexts, strict=True):
            tokens_L[: len(tokens)] = torch.tensor(tokens)
            mask_L[marks] = MARK
        if len(self.excluded_N):
            mask_BL[torch.isin(tokens_BL, self.excluded_N) & (mask_BL == TEXT)] = MARK
        self._state = super().state_dict()
        return tokens_BL, mask_BL

    def state_dict(self) -> dict[str, Any]:
        return self._state  # after the last whole batch: an error may come when half of the next is read

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._state = super().state_dict()


def _next_and_state(batches: Stream) -> tuple[Any, dict[str, Any]]:
    return next(batches), batches.state_dict()


class Prefetched(Stream):
    """The same batches, made by a thread up to `depth` ahead of the one who asks for them.

    The state is that of the batches handed out, whatever the thread has made since. What the thread raises is raised
    here in its turn, at every call from then on. `close()` ends the thread; to load a state starts another.
    """

    saved = ("batches",)

    def __init__(self, batches: Stream, depth: int = 4):
        assert depth >= 1
        self.batches, self.depth = batches, depth
        self._executor: ThreadPoolExecutor | None = None
        self._begin()

    def _begin(self) -> None:
        self._state = super().state_dict()
        self._pending: deque[Future] = deque()
        self._closed = False

    def __next__(self) -> Any:
        assert not self._closed
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "prefetch")
        while len(self._pending) < self.depth:
            self._pending.append(self._executor.submit(_next_and_state, self.batches))
        batch, state = self._pending[0].result()
        self._pending.popleft()
        self._state = {"batches": state}
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        super().load_state_dict(state)
        self._begin()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        self._executor, self._closed = None, True


def open_batches(
    dataset: str,
    tokenizer: Any,
    *,
    context_length: int,
    batch_size: int,
    text_column: str = "text",
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    held_out: bool | None = None,
    epochs: int = 1,
    mixed: bool = False,
    chat_dataset: str = CHAT_DATASET,
    chat_split: str = "train",
    chat_subset: str | None = None,
    chat_held_out: bool | None = None,
    chat_fraction: float = 0.1,
    chat_pack: bool = False,
    marks: Marks | tuple[int, int, int] | None = None,
    prepend_bos: bool = True,
    exclude_special_tokens: bool = False,
    shuffle: bool = False,
    skip_damaged: bool = False,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    prefetch: int = 4,
) -> TextBatches | Prefetched:
    """The whole chain from a dataset to batches of `batch_size` contexts; with `mixed`, a share of them is chats.

    `open_documents`, `ChatContexts` and `MixedContexts` explain the settings. `marks` are the tokens that packing puts
    in, None: those of the tokenizer; without `prepend_bos` no context begins with bos. `seed` draws the chats that keep
    their system prompt and, with `shuffle`, the order. `prefetch` is the number of batches that a thread makes ahead;
    0: no thread.
    """
    if mixed:
        default_system_prompt(tokenizer)  # no chat template: say so before anything is opened
    marks = Marks(*marks) if marks else Marks.of(tokenizer)
    if not prepend_bos:
        marks = marks._replace(bos_id=None)
    reading: dict[str, Any] = {"epochs": epochs, "shard": shard, "shuffle": seed if shuffle else None}
    reading |= {"skip_damaged": skip_damaged}
    documents = open_documents(
        dataset, text_column=text_column, split=split, subset=subset, revision=revision, held_out=held_out, **reading
    )
    contexts = PackedContexts(documents, tokenizer, context_length, marks)
    if mixed:
        conversations = open_documents(
            chat_dataset, split=chat_split, subset=chat_subset, held_out=chat_held_out, chats=True, **reading
        )
        chats = ChatContexts(conversations, tokenizer, context_length, pack=chat_pack, seed=seed, marks=marks)
        _check_template(chats, chat_dataset)
        contexts = MixedContexts(contexts, chats, chat_fraction)
    excluded_ids = special_tokens(tokenizer).values() if exclude_special_tokens else ()
    batches = TextBatches(contexts, batch_size, marks.pad_id, excluded_ids)
    return Prefetched(batches, prefetch) if prefetch else batches


def _check_template(chats: ChatContexts, name: str) -> None:
    """ValueError where the template refuses every conversation, which would pass for one of too few."""
    start = chats.state_dict()
    if next(chats, None) is None and chats.documents.skipped:
        reasons = ", ".join(f"{n} {reason}" for reason, n in chats.skipped.items())
        raise ValueError(f"{name} has no conversation that can be used: {reasons}")
    chats.load_state_dict(start)

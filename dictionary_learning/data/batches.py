"""Batches of contexts, and the whole chain that makes them.

B contexts in the batch, L positions in a context.
"""

import itertools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .chats import default_system_prompt
from .contexts import ChatContexts, MixedContexts, PackedContexts
from .documents import CHAT_DATASET, open_documents
from .stream import Stream


class TextBatches(Stream):
    """(tokens_BL int64, mask_BL bool) on the CPU: `batch_size` contexts, in the last batch what is left.

    L is the longest context of the batch; shorter ones (chats, the last packed one) are padded with `pad_id` at the
    end, where the mask is False.
    """

    saved = ("contexts",)

    def __init__(self, contexts: Stream, batch_size: int, pad_id: int):
        if batch_size < 1:
            raise ValueError(f"a batch must hold at least 1 context, got {batch_size}")
        self.contexts, self.batch_size, self.pad_id = contexts, batch_size, pad_id
        self._state = super().state_dict()

    def __next__(self) -> tuple[Tensor, Tensor]:
        contexts = list(itertools.islice(self.contexts, self.batch_size))
        if not contexts:
            raise StopIteration
        lengths_B = torch.tensor([len(context) for context in contexts])
        length = int(lengths_B.max())
        tokens_BL = torch.tensor([context + [self.pad_id] * (length - len(context)) for context in contexts])
        self._state = super().state_dict()
        return tokens_BL, torch.arange(length) < lengths_B[:, None]

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
    held_out: bool | None = None,
    epochs: int = 1,
    mixed: bool = False,
    chat_dataset: str = CHAT_DATASET,
    chat_fraction: float = 0.1,
    chat_pack: bool = False,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    prefetch: int = 4,
) -> TextBatches | Prefetched:
    """The whole chain from a dataset to batches of `batch_size` contexts; with `mixed`, a share of them is chats.

    `open_documents`, `ChatContexts` and `MixedContexts` explain the settings. `seed` draws the chats that keep their
    system prompt. `prefetch` is the number of batches that a thread makes ahead; 0: no thread.
    """
    if mixed:
        default_system_prompt(tokenizer)  # no chat template: say so before anything is opened
    share = {"held_out": held_out, "epochs": epochs, "shard": shard}
    documents = open_documents(dataset, text_column=text_column, split=split, subset=subset, **share)
    contexts = PackedContexts(documents, tokenizer, context_length)
    if mixed:
        conversations = open_documents(chat_dataset, chats=True, **share)
        chats = ChatContexts(conversations, tokenizer, context_length, pack=chat_pack, seed=seed)
        contexts = MixedContexts(contexts, chats, chat_fraction)
    pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    batches = TextBatches(contexts, batch_size, next(token for token in pad_ids if token is not None))
    return Prefetched(batches, prefetch) if prefetch else batches

"""Documents: one column of the rows, without what is empty or no text."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .rows import (
    BUILT_IN,
    RETRY_WAITS_S,
    FileRows,
    HubRows,
    files_of,
    kind_of,
    open_hub,
    read_file,
    stdlib_paths,
    stdlib_rows,
)
from .stream import Stream, is_held_out

EVAL_DATASET = "monology/pile-uncopyrighted"
CHAT_DATASET = "lmsys/lmsys-chat-1m"
CHUNK_CHARACTERS = 2**18  # tokenised in one call; a tokenizer takes some 300 bytes of memory a character


def _text_fault(value: object) -> str | None:
    """Why this is no document, if it is none."""
    if not isinstance(value, str):
        return "not text"
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which json can hold and no tokenizer takes
        return "not text"
    return None if value.strip() else "empty"


def _chat_fault(value: object) -> str | None:
    """Why this is no conversation, if it is none."""
    if not isinstance(value, list):
        return "not a conversation"
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "not a conversation"
        if _text_fault(message.get("content")) == "not text":
            return "not a conversation"
    return None if value else "empty"


class Documents(Stream):
    """The values of one column of rows, without those that are empty or not what they should be.

    Args:
        columns: the names that the column may have.
        fault: why a value is skipped; None if it is not.
        held_out: True: only the held-out twentieth, by hash. False: all but it. None: everything.
        epochs: how often the rows are read.
        shard: (rank, world): of the rows, only each `world`-th from row `rank` on.

    Raises:
        ValueError: the column is not there.
    """

    saved = ("rows", "epoch", "n_rows", "n_documents", "n_skipped")

    def __init__(
        self,
        rows: Stream,
        name: str,
        *,
        columns: Sequence[str] = ("text",),
        fault: Callable[[object], str | None] = _text_fault,
        held_out: bool | None = None,
        epochs: int = 1,
        shard: tuple[int, int] = (0, 1),
    ):
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        self.rows, self.name, self.columns, self.fault = rows, name, columns, fault
        self.held_out, self.epochs, self.shard = held_out, epochs, shard
        self._start = rows.state_dict()
        self._column: str | None = None
        self.epoch = self.n_rows = self.n_documents = 0  # n_rows: of this epoch
        self.n_skipped: dict[str, int] = {}

    @property
    def skipped(self) -> Counter[str]:
        return Counter(self.n_skipped)

    def __next__(self) -> Any:
        while True:
            row = self._next_row()
            if (self.n_rows - 1) % self.shard[1] != self.shard[0]:
                continue
            document = row.get(self._column) if isinstance(row, dict) else None
            if fault := self.fault(document):
                self.n_skipped[fault] = self.n_skipped.get(fault, 0) + 1
                continue
            if self.held_out is not None:
                if is_held_out(document if isinstance(document, str) else json.dumps(document)) != self.held_out:
                    continue
            self.n_documents += 1
            return document

    def _next_row(self) -> Any:
        end = object()
        while (row := next(self.rows, end)) is end:
            if self.epoch + 1 >= self.epochs:
                raise StopIteration
            self.epoch, self.n_rows = self.epoch + 1, 0
            self.rows.load_state_dict(self._start)
        self.n_rows += 1
        if self._column is None:
            there = list(row) if isinstance(row, dict) else []
            self._column = next((column for column in self.columns if column in there), None)
            if self._column is None:
                asked, there = " or ".join(map(repr, self.columns)), ", ".join(map(repr, there))
                raise ValueError(f"{self.name} has no column {asked}; its columns are: {there or 'none'}")
        return row


def open_documents(
    dataset: str,
    *,
    text_column: str = "text",
    split: str = "train",
    subset: str | None = None,
    held_out: bool | None = None,
    epochs: int = 1,
    shard: tuple[int, int] = (0, 1),
    chats: bool = False,
    retry_waits_s: Sequence[float] = RETRY_WAITS_S,
) -> Documents:
    """The texts of a dataset: "python-stdlib", a local file or folder, or the id of a dataset on the Hugging Face Hub.

    Local: .jsonl, .json, .parquet, .arrow and .txt, each also as .zst or .gz, and folders of `save_to_disk`; a .txt
    is one document. `subset` is the configuration of a Hub dataset. Held out is a twentieth by hash of the text (of
    the path for python-stdlib): `held_out` True reads only that, False all but that, None everything.
    With `chats` the documents are lists of {"role", "content"}, in a column "conversation" or "messages".

    Raises:
        ValueError: there is no such dataset, file, column, split or text in it, or no right to read it.
        ConnectionError: the Hub cannot be reached; later on, when `retry_waits_s` are used up too.
    """
    path = Path(dataset).expanduser()
    if dataset == BUILT_IN:
        if split != "train":
            raise ValueError(f"{BUILT_IN} has no split {split!r}: what it has for evaluation is its held-out documents")
        paths = [path for path in stdlib_paths() if held_out is None or is_held_out(path) == held_out]
        rows, held_out = FileRows(paths, stdlib_rows), None
    elif path.exists():
        rows = FileRows(files_of(path, split), read_file)
    elif dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1 or kind_of(path):
        raise ValueError(f"there is no file or folder {dataset}")
    else:
        rows = HubRows(dataset, partial(open_hub, dataset, subset, split), retry_waits_s)
    documents = Documents(
        rows,
        dataset,
        columns=("conversation", "messages") if chats else (text_column,),
        fault=_chat_fault if chats else _text_fault,
        held_out=held_out,
        epochs=epochs,
    )
    start = documents.state_dict()
    if next(documents, None) is None:  # what is wrong with a dataset comes out here, not an hour into a run
        found = ", ".join(f"{n} {fault}" for fault, n in documents.n_skipped.items()) or "none of them skipped"
        what = "held-out document" if held_out else "conversation" if chats else "document"
        raise ValueError(f"{dataset} has no {what} to read ({documents.n_rows} rows, {found}): name another dataset")
    documents.load_state_dict(start)
    documents.shard = shard  # only now: a shard of a small dataset may have nothing to read
    return documents


def estimate_tokens(documents: Documents, tokenizer: Any, seconds: float = 10.0) -> int | None:
    """About how many tokens all the documents have: their characters, and a sample's tokens a character.

    None for a stream from the Hub, and where reading takes longer than that: there is no quick answer.
    """
    if isinstance(documents.rows, HubRows):
        return None
    deadline, n_characters, sample = time.monotonic() + seconds, 0, []
    for document in documents:
        if n_characters < CHUNK_CHARACTERS:
            sample.append(document[:CHUNK_CHARACTERS])
        n_characters += len(document)
        if time.monotonic() > deadline:
            return None
    n_tokens = sum(map(len, tokenizer(sample, add_special_tokens=False)["input_ids"]))
    return round(n_characters * n_tokens / sum(map(len, sample)))

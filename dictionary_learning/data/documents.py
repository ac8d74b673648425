"""Documents: one column of the rows, without what is empty or no text."""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from .hub import RETRY_WAITS_S, HubRows, hub_rows
from .readers import Part, read_part
from .rows import FileRows, LocalRows, stdlib_files
from .sources import BUILT_IN, Source, files_of, share_a_source
from .stream import Stream, is_held_out

EVAL_DATASET = "monology/pile-uncopyrighted"
CHAT_DATASET = "lmsys/lmsys-chat-1m"
CHAT_COLUMNS = ("conversation", "messages", "conversations")
CHUNK_CHARACTERS = 2**18  # tokenised in one call; a tokenizer takes some 300 bytes of memory a character
COMPARED_ROWS = 10_000  # of each of two texts, in search of a document that both have
ROWS_WITHOUT_COLUMN = 1000  # at the start, until it is an error that no row has it
# who speaks, as ShareGPT calls them
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
ROLES |= {"function_call": "assistant", "function_response": "tool", "observation": "tool"}

Checked = tuple[Any, str | None]  # what is read, and why it is skipped; None if it is not


def _is_text(value: object) -> bool:
    """Half a surrogate pair, which json can hold and no tokenizer takes, is none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_text(value: object) -> Checked:
    """A text, or the list of its token ids."""
    if isinstance(value, list) and value and all(type(token) is int and 0 <= token < 2**63 for token in value):
        return value, None
    if not _is_text(value):
        return value, "not text"
    return value, None if str(value).strip() else "empty"


def as_conversation(value: object) -> Checked:
    """A conversation as chat templates take it: a list of {"role", "content"}, with whatever else a message has.

    ShareGPT's "from" and "value" become these, content in parts becomes one text, and null is left out.
    """
    if not isinstance(value, list):
        return value, "not a conversation"
    messages = [_message(message) for message in value]
    if None in messages:
        return value, "not a conversation"
    return messages, None if messages else "empty"


def _message(value: object) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    message = {str(key): item for key, item in value.items() if item is not None}
    if "role" not in message and isinstance(message.get("from"), str):
        speaker, said = message.pop("from").lower(), message.pop("value", None)
        message = {"role": ROLES.get(speaker, speaker), "content": said, **message}
    if isinstance(parts := message.get("content"), list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        strings = [text for text in texts if isinstance(text, str)]
        message["content"] = "".join(strings) if len(strings) == len(texts) else None
    elif "content" not in message and message.get("tool_calls"):
        message["content"] = ""
    return message if isinstance(message.get("role"), str) and _is_text(message.get("content")) else None


def _key(document: Any) -> str:
    """What decides whether a document is held out. Dates and the like may stand in a conversation."""
    return document if isinstance(document, str) else json.dumps(document, default=str)


class Documents(Stream):
    """The values of one column of rows, without those that are empty or not what they should be.

    Args:
        columns: the names that the column may have; `a.b` is b within a, where there is no column of the whole name.
        check: what a value is read as, and why it is skipped; None if it is not.
        held_out: True: only the held-out twentieth, by hash. False: all but it. None: everything.
        epochs: how often the rows are read.
        shard: (rank, world): of the rows, only each `world`-th from row `rank` on.

    Raises:
        ValueError: the column is not there.
    """

    saved = ("rows", "epoch", "n_rows", "n_seen", "n_documents", "n_skipped", "found_column")

    def __init__(
        self,
        rows: Stream,
        name: str,
        *,
        columns: Sequence[str] = ("text",),
        check: Callable[[object], Checked] = as_text,
        held_out: bool | None = None,
        epochs: int = 1,
        shard: tuple[int, int] = (0, 1),
    ):
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        self.rows, self.name, self.columns, self.check = rows, name, columns, check
        self.held_out, self.epochs, self.shard = held_out, epochs, shard
        self._start = rows.state_dict()
        self._there: dict[str, None] = {}  # the columns of the first rows
        self._ended = False
        self.found_column = False
        self.epoch = self.n_rows = self.n_seen = self.n_documents = 0  # n_rows: of this epoch; n_seen: of this shard
        self.n_skipped: dict[str, int] = {}

    @property
    def skipped(self) -> Counter[str]:
        return super().skipped + Counter(self.n_skipped)

    @property
    def n_read(self) -> int:
        return self.n_seen

    @property
    def end(self) -> str:
        if not self._ended:
            return ""
        times = f", read {self.epochs} times," if self.epochs > 1 else ""
        return f"{self.name}{times} has {self.n_documents:,} documents and no more"

    def __next__(self) -> Any:
        while True:
            row = self._next_row()
            if (self.n_rows - 1) % self.shard[1] != self.shard[0]:
                continue
            self.n_seen += 1
            document, fault = self.check(self._value(row))
            if fault:
                self.n_skipped[fault] = self.n_skipped.get(fault, 0) + 1
            elif self.held_out is None or is_held_out(_key(document)) == self.held_out:
                self.n_documents += 1
                return document

    def _next_row(self) -> Any:
        end = object()
        while (row := next(self.rows, end)) is end:
            if self.epoch + 1 >= self.epochs:
                self._ended = True
                self._check_column()
                raise StopIteration
            self.epoch, self.n_rows = self.epoch + 1, 0
            self.n_skipped = dict(self.skipped)  # the rows start over, and their counts with them
            self.rows.load_state_dict(self._start)
        self.n_rows += 1
        if self.n_rows == ROWS_WITHOUT_COLUMN:
            self._check_column()
        return row

    def _value(self, row: Any) -> Any:
        value = _in_columns(row, self.columns)
        if value is not _ABSENT:
            self.found_column = True
            return value
        if not self.found_column and isinstance(row, dict):
            self._there |= dict.fromkeys(row)
        return None

    def _check_column(self) -> None:
        if self.n_seen and not self.found_column:
            asked, there = " or ".join(map(repr, self.columns)), ", ".join(map(repr, self._there))
            raise ValueError(f"{self.name} has no column {asked}; its columns are: {there or 'none'}")


_ABSENT = object()


def _in_columns(row: Any, columns: Sequence[str]) -> Any:
    """What stands in the first of the columns that the row has."""
    for column in columns if isinstance(row, dict) else ():
        value = row
        for name in [column] if column in row else column.split("."):
            value = value.get(name, _ABSENT) if isinstance(value, dict) else _ABSENT
        if value is not _ABSENT:
            return value
    return _ABSENT


def _to_be_read(columns: Sequence[str]) -> list[str]:
    return [name for column in columns for name in {column, column.split(".")[0]}]


def overlap(one: Source, other: Source) -> bool:
    """Whether some text may be in both: what is trained on is then to be held out of the evaluation.

    That is so where they have a source in common and, as the same documents may be packed, in another format or a part
    of a larger file, where one is among the first `COMPARED_ROWS` of both local texts. Of the Hub nothing is read.
    """
    if share_a_source(one, other):
        return True
    return None not in (one.path, other.path) and not _first_documents(one).isdisjoint(_first_documents(other))


def _first_documents(source: Source) -> set[int]:
    """Hashes of documents at the start of each file of a local text."""
    assert source.path is not None
    columns, found = (source.text_column,), set()
    read = partial(read_part, columns=_to_be_read(columns))
    files = files_of(source.path, source.split).chosen
    for file in files:
        rows = FileRows([Part(file)], read, skip_damaged=True)  # what is damaged is told where it is read
        for row in itertools.islice(rows, max(1, COMPARED_ROWS // len(files))):
            document, fault = as_text(_in_columns(row, columns))
            found |= set() if fault else {hash(_key(document))}
    return found


def open_documents(
    dataset: str,
    *,
    text_column: str = "text",
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    held_out: bool | None = None,
    epochs: int = 1,
    shard: tuple[int, int] = (0, 1),
    chats: bool = False,
    shuffle: int | None = None,
    skip_damaged: bool = False,
    retry_waits_s: Sequence[float] = RETRY_WAITS_S,
) -> Documents:
    """The texts of a dataset: "python-stdlib", a local file or folder, or the id of a dataset on the Hugging Face Hub.

    Local: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .feather, .ipc and .txt, those of text also as .zst,
    .gz, .bz2 or .xz, and folders of `save_to_disk`; a .txt is documents of a page or so. `subset` is the configuration
    of a Hub dataset. Held out is a twentieth by hash of the text (of the path for python-stdlib): `held_out` True reads
    only that, False all but that, None everything. A column may hold token ids in place of text.
    With `chats` the documents are lists of {"role", "content"}, in a column "conversation", "messages" or
    "conversations". With `shuffle`, a seed, the rows come from all over the dataset side by side, else in its order.
    With `skip_damaged`, what cannot be read of a file is skipped and counted.

    Raises:
        ValueError: there is no such dataset, file, column, split or text in it, or no right to read it.
        ConnectionError: the Hub cannot be reached; later on, when `retry_waits_s` are used up too.
    """
    source = Source(dataset, split, subset, text_column, revision)
    columns = CHAT_COLUMNS if chats else (text_column,)
    reading: dict[str, Any] = {"shuffle": shuffle, "skip_damaged": skip_damaged}
    reading["columns"] = _to_be_read(columns)
    path = source.path
    if dataset == BUILT_IN:
        if split != "train":
            raise ValueError(f"{BUILT_IN} has no split {split!r}: what it has for evaluation is its held-out documents")
        rows, held_out = stdlib_files(held_out, shuffle), None
    elif path is not None:
        rows = LocalRows(path, split, **reading)
    else:
        rows = hub_rows(source, retry_waits_s=retry_waits_s, **reading)
    documents = Documents(
        rows,
        dataset,
        columns=columns,
        check=as_conversation if chats else as_text,
        held_out=held_out,
        epochs=epochs,
    )
    start = documents.state_dict()
    if next(documents, None) is None:  # what is wrong with a dataset comes out here, not an hour into a run
        found = ", ".join(f"{n} {fault}" for fault, n in documents.skipped.items()) or "none of them skipped"
        what = "held-out document" if held_out else "conversation" if chats else "document"
        raise ValueError(f"{dataset} has no {what} to read ({documents.n_rows} rows, {found}): name another dataset")
    documents.load_state_dict(start)
    documents.shard = shard  # only now: a shard of a small dataset may have nothing to read
    return documents


def estimate_tokens(documents: Documents, tokenizer: Any, seconds: float = 10.0) -> int | None:
    """About how many tokens all the documents have: their characters, and a sample's tokens a character.

    None for a stream from the Hub, and where reading takes longer than that: there is no quick answer.
    """
    if any(isinstance(stream, HubRows) for stream in _below(documents)):
        return None
    deadline, n_characters, n_tokens, sample = time.monotonic() + seconds, 0, 0, []
    for document in documents:
        if isinstance(document, str):
            if n_characters < CHUNK_CHARACTERS:
                sample.append(document[:CHUNK_CHARACTERS])
            n_characters += len(document)
        else:
            n_tokens += len(document)
        if time.monotonic() > deadline:
            return None
    if sample:
        n_sampled = sum(map(len, tokenizer(sample, add_special_tokens=False, split_special_tokens=True)["input_ids"]))
        n_tokens += round(n_characters * n_sampled / sum(map(len, sample)))
    return n_tokens


def _below(stream: Stream) -> Iterator[Stream]:
    for part in stream.parts:
        yield part
        yield from _below(part)

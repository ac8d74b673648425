"""Text, from a dataset to batches of token ids:  rows -> documents -> contexts -> batches.

B contexts in the batch, L positions in a context.
"""

import copy
import hashlib
import io
import itertools
import json
import os
import random
import re
import sysconfig
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUILT_IN = "python-stdlib"
TRAIN_DATASET = "HuggingFaceFW/fineweb"
EVAL_DATASET = "monology/pile-uncopyrighted"
CHAT_DATASET = "lmsys/lmsys-chat-1m"

RETRY_WAITS_S = tuple(2.0**i for i in range(9))  # eight and a half minutes in all
CHUNK_CHARACTERS = 2**18  # tokenised in one call; a tokenizer takes some 300 bytes of memory a character

FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}
NOT_DATA = {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}


class Stream:
    """An iterator that can stop in one process and go on in another, exactly where it stood.

    `state_dict()` holds the attributes named in `saved`, those that are streams by their own state: plain values that
    JSON or a weights-only `torch.load` can carry. `skipped` counts what was left out so far, by reason.
    """

    saved: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self.saved}
        return {
            name: part.state_dict() if isinstance(part, Stream) else copy.deepcopy(part) for name, part in parts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.saved:
            if isinstance(part := getattr(self, name), Stream):
                part.load_state_dict(state[name])
            else:
                setattr(self, name, copy.deepcopy(state[name]))

    @property
    def skipped(self) -> Counter[str]:
        parts = [getattr(self, name) for name in self.saved]
        return sum((part.skipped for part in parts if isinstance(part, Stream)), Counter())


def is_held_out(key: str) -> bool:
    """Whether the document of this key belongs to the held-out twentieth: a fixed share by hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 20 == 0


# Rows: of the standard library, of local files, of the Hub


def _stdlib_paths() -> list[str]:
    """The modules of the running interpreter's standard library: sorted paths in its folder.

    Left out: tests, installed packages, and `encodings` and `pydoc_data`, which are generated tables.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - skip  # the walk goes into what is left
        paths += [Path(folder, file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    return sorted(paths)


def _stdlib_rows(path: str, start: int = 0) -> list[dict[str, str]]:
    file = Path(sysconfig.get_path("stdlib")) / path
    return [{"path": path, "text": file.read_text(encoding="utf-8", errors="replace")}][start:]


def python_stdlib(held_out: bool) -> Iterator[tuple[str, str]]:
    """(path, source) of every module of the standard library in the held-out twentieth, or of all others."""
    for path in _stdlib_paths():
        if is_held_out(path) == held_out:
            yield path, _stdlib_rows(path)[0]["text"]


def _kind(path: Path) -> str | None:
    """The kind of a file by its name (`a.jsonl.zst` is json); None: not one that can be read."""
    plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return None if path.name in NOT_DATA else FILE_KINDS.get(plain.suffix)


def _files(path: Path, split: str) -> list[Path]:
    """The file of this path, or the files of the split in this folder, in order of path.

    A file is of the split that its name or a folder of it begins with (`train-00000.parquet`, `test/a.jsonl`).
    Where no file is of a split "train", every file is.
    """
    files = [path]
    if path.is_dir():
        found = (file.relative_to(path) for file in sorted(path.rglob("*")) if _kind(file) and file.is_file())
        files = [file for file in found if not any(part.startswith(".") for part in file.parts)]
        of_split = re.compile(re.escape(split) + r"([-._ 0-9]|$)")
        chosen = [file for file in files if any(of_split.match(part) for part in file.parts)]
        if files and not chosen and split != "train":
            raise ValueError(f"no file in {path} is of a split {split!r}: name its file or folder instead")
        files = [path / file for file in chosen or files]
    kinds = {str(_kind(file)) for file in files}
    if kinds <= {"None"}:
        raise ValueError(f"no text in {path}: files end in {', '.join(FILE_KINDS)}, or one of these and .zst or .gz")
    if len(kinds) > 1:
        raise ValueError(f"{path} holds files of several kinds ({', '.join(sorted(kinds))}): name those of one kind")
    return files


def _open_text(path: Path):
    if path.suffix not in COMPRESSIONS:
        return path.open(encoding="utf-8-sig")
    import pyarrow  # its decompressors notice a file that was cut short

    raw = pyarrow.input_stream(str(path), compression=COMPRESSIONS[path.suffix])
    return io.TextIOWrapper(raw, encoding="utf-8-sig")


def _record_batches(path: Path, kind: str) -> Iterable[Any]:
    import pyarrow.parquet

    if kind == "parquet":
        return pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))


def _read_file(path: Path, start: int) -> Iterator[Any]:
    """The rows of a file from row `start` on: lines or elements of json, rows of a table, a .txt as a whole."""
    try:
        kind = _kind(path)
        if kind in ("parquet", "arrow"):
            for batch in _record_batches(path, kind):
                if start < batch.num_rows:
                    batch.validate(full=True)  # arrow itself would follow a bad offset anywhere
                    yield from batch.slice(start).to_pylist()
                start = max(0, start - batch.num_rows)
            return
        with _open_text(path) as file:
            if kind == "text":
                yield from [{"text": file.read()}][start:]
            elif (first := file.readline()).lstrip().startswith("["):
                yield from json.loads(first + file.read())[start:]
            else:
                lines = (line for line in itertools.chain([first], file) if line.strip())
                yield from map(json.loads, itertools.islice(lines, start, None))
    # what the readers of these formats raise on bytes that are not theirs (pyarrow's errors derive from these)
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError, MemoryError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


class FileRows(Stream):
    """The rows of files one after another: `read(file, start)` gives those of a file from row `start` on."""

    saved = ("file", "row")

    def __init__(self, files: Sequence[Any], read: Callable[[Any, int], Iterable[Any]]):
        self.files, self.read = files, read
        self.file = self.row = 0
        self._rows: Iterator[Any] | None = None

    def __next__(self) -> Any:
        while self.file < len(self.files):
            if self._rows is None:
                self._rows = iter(self.read(self.files[self.file], self.row))
            for row in self._rows:
                self.row += 1
                return row
            self.file, self.row, self._rows = self.file + 1, 0, None
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "n_files": len(self.files)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["n_files"] != len(self.files):
            raise ValueError(f"the text had {state['n_files']} files when this state was saved, now {len(self.files)}")
        super().load_state_dict(state)
        self._rows = None


class HubRows(Stream):
    """The rows of a dataset that streams from the Hub, reopened where it stood when the network fails.

    Args:
        open_dataset: from a revision (None: the newest) to a `datasets.IterableDataset`, whose `state_dict` is the
            position, and its revision. Not a shuffled one: its state leaves out the rows in the shuffle buffer.
        retry_waits_s: seconds before each attempt to reopen, until a row comes through.

    Raises:
        ConnectionError: the attempts are used up, or the very first one failed.
        ValueError: the dataset does not exist, is gated, has no such split or subset, or cannot be read.
    """

    saved = ("revision", "position")

    def __init__(
        self,
        name: str,
        open_dataset: Callable[[str | None], tuple[Any, str | None]],
        retry_waits_s: Sequence[float] = RETRY_WAITS_S,
    ):
        self.name, self.open_dataset, self.retry_waits_s = name, open_dataset, retry_waits_s
        self.revision: str | None = None  # what is reopened later is the same data
        self.position: dict[str, Any] | None = None  # None: the start
        self._dataset: Any = None
        self._rows: Iterator[Any] | None = None
        self._reached = False

    def __next__(self) -> Any:
        waits = iter(self.retry_waits_s if self._reached else ())  # at first a user is waiting: fail at once
        while True:
            try:
                if self._dataset is None:
                    self._dataset, self.revision = self.open_dataset(self.revision)
                if self._rows is None:
                    self._dataset.load_state_dict(copy.deepcopy(self.position))
                    self._rows = iter(self._dataset)
                row = next(self._rows)
                self.position = self._dataset.state_dict()
                self._reached = True
                return row
            except StopIteration:
                raise
            except Exception as error:  # whatever the network stack and the file readers below may raise
                self._dataset = self._rows = None
                failure = self._explain(error)
                wait = next(waits, None)
                if wait is None or not isinstance(failure, ConnectionError):
                    raise failure from error
                time.sleep(wait)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        revision = self.revision
        super().load_state_dict(state)
        self.revision = self.revision or revision
        if self.revision != revision:
            self._dataset = None
        self._rows = None

    def _explain(self, error: Exception) -> Exception:
        """The sentence for an error; a ConnectionError where another attempt may help."""
        names = {cls.__name__ for cls in type(error).__mro__}
        modules = {cls.__module__.split(".")[0] for cls in type(error).__mro__}
        what = _one_line(error)
        if "GatedRepoError" in names or ("DatasetNotFoundError" in names and "gated" in what):
            page = f"https://huggingface.co/datasets/{self.name}"
            return ValueError(f"{self.name} is a gated dataset: accept its licence at {page}, then run `hf auth login`")
        if names & {"DatasetNotFoundError", "RepositoryNotFoundError", "HFValidationError"}:
            advice = "check the name (a private one needs `hf auth login`)"
            return ValueError(f"no file, folder or Hub dataset is called {self.name}: {advice}")
        network = isinstance(error, OSError) and not names & {"DatasetsError", "FileNotFoundError"}
        if not network and not modules & {"httpx", "httpx2", "httpcore", "aiohttp", "requests", "urllib3"}:
            return ValueError(f"cannot read {self.name}: {what}")
        if not self._reached:
            advice = f"check the network, or take a local file or {BUILT_IN}"
            return ConnectionError(f"cannot reach {self.name} on the Hugging Face Hub ({what}): {advice}")
        attempts = f"{len(self.retry_waits_s)} attempts over {sum(self.retry_waits_s):.0f} s"
        return ConnectionError(f"the text of {self.name} broke off and {attempts} did not bring it back ({what})")


def _open_hub(name: str, subset: str | None, split: str, revision: str | None) -> tuple[Any, str | None]:
    import datasets
    import huggingface_hub

    revision = revision or huggingface_hub.HfApi().dataset_info(name).sha
    return datasets.load_dataset(name, subset, split=split, streaming=True, revision=revision), revision


# Documents


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
        paths = [path for path in _stdlib_paths() if held_out is None or is_held_out(path) == held_out]
        rows, held_out = FileRows(paths, _stdlib_rows), None
    elif path.exists():
        rows = FileRows(_files(path, split), _read_file)
    elif dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1 or _kind(path):
        raise ValueError(f"there is no file or folder {dataset}")
    else:
        rows = HubRows(dataset, partial(_open_hub, dataset, subset, split), retry_waits_s)
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


# Contexts


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


def _render(tokenizer: Any, conversation: list[dict[str, str]]) -> str:
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
        text = _render(tokenizer, [{"role": role, "content": turn} for turn, role in turns.items()])
    except TemplateError as error:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} fails ({_one_line(error)})") from error
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
                text = _render(self.tokenizer, conversation)
            except TemplateError:  # for one, a system message where the model family has none
                self.n_refused += 1
                continue
            self.n_texts += 1
            # a generator of its own for each text: their number is all the state there is
            if self.system_prompt and random.Random(f"{self.seed} {self.n_texts}").random() < self.removal_fraction:
                text = text.replace(self.system_prompt, "")
            return text
        raise StopIteration


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


# Batches


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

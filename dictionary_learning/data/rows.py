"""Rows: of the standard library, of local files, of the Hub."""

import copy
import io
import itertools
import json
import os
import re
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .stream import Stream, is_held_out

BUILT_IN = "python-stdlib"
RETRY_WAITS_S = tuple(2.0**i for i in range(9))  # eight and a half minutes in all

FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}
NOT_DATA = {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}


def stdlib_paths() -> list[str]:
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


def stdlib_rows(path: str, start: int = 0) -> list[dict[str, str]]:
    file = Path(sysconfig.get_path("stdlib")) / path
    return [{"path": path, "text": file.read_text(encoding="utf-8", errors="replace")}][start:]


def python_stdlib(held_out: bool) -> Iterator[tuple[str, str]]:
    """(path, source) of every module of the standard library in the held-out twentieth, or of all others."""
    for path in stdlib_paths():
        if is_held_out(path) == held_out:
            yield path, stdlib_rows(path)[0]["text"]


def kind_of(path: Path) -> str | None:
    """The kind of a file by its name (`a.jsonl.zst` is json); None: not one that can be read."""
    plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return None if path.name in NOT_DATA else FILE_KINDS.get(plain.suffix)


def files_of(path: Path, split: str) -> list[Path]:
    """The file of this path, or the files of the split in this folder, in order of path.

    A file is of the split that its name or a folder of it begins with (`train-00000.parquet`, `test/a.jsonl`).
    Where no file is of a split "train", every file is.
    """
    files = [path]
    if path.is_dir():
        found = (file.relative_to(path) for file in sorted(path.rglob("*")) if kind_of(file) and file.is_file())
        files = [file for file in found if not any(part.startswith(".") for part in file.parts)]
        of_split = re.compile(re.escape(split) + r"([-._ 0-9]|$)")
        chosen = [file for file in files if any(of_split.match(part) for part in file.parts)]
        if files and not chosen and split != "train":
            raise ValueError(f"no file in {path} is of a split {split!r}: name its file or folder instead")
        files = [path / file for file in chosen or files]
    kinds = {str(kind_of(file)) for file in files}
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


def read_file(path: Path, start: int) -> Iterator[Any]:
    """The rows of a file from row `start` on: lines or elements of json, rows of a table, a .txt as a whole."""
    try:
        kind = kind_of(path)
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
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
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
        what = one_line(error)
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


def open_hub(name: str, subset: str | None, split: str, revision: str | None) -> tuple[Any, str | None]:
    import datasets
    import huggingface_hub

    revision = revision or huggingface_hub.HfApi().dataset_info(name).sha
    return datasets.load_dataset(name, subset, split=split, streaming=True, revision=revision), revision

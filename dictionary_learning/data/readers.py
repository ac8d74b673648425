"""Readers: the kinds of files by their names, and the rows of a part of one."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

FILE_KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
NOT_DATA = {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
TABLES = ("parquet", "arrow")  # they compress their columns themselves
DOCUMENT_BYTES = 4096  # of a .txt, about


class Part(NamedTuple):
    """What lies between two fractions of a file: the rows that begin there."""

    path: Path
    start: float = 0.0
    end: float = 1.0


class _ZstdReader(io.RawIOBase):
    """The bytes of a .zst file, whatever its frames and windows; one that was cut short is an EOFError."""

    def __init__(self, file: BinaryIO):
        self._file, self._frame = file, None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._plain:
            chunk = self._compressed or self._file.read(2**17)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            try:
                frame = self._frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                self._plain, self._compressed = frame.decompress(chunk), frame.unused_data
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self._frame = None if frame.eof else frame
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstd(path: Path) -> BinaryIO:
    return io.BufferedReader(_ZstdReader(path.open("rb")), 2**17)


OPENERS: dict[str, Callable[[Path], Any]] = {".zst": _open_zstd, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() in OPENERS


def _open(path: Path) -> BinaryIO:
    return OPENERS[path.suffix.lower()](path) if _is_packed(path) else path.open("rb")


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if _is_packed(path) else path).suffix.lower()


def kind_of(path: Path) -> str | None:
    """The kind of a file by its name (`a.jsonl.zst` is json); None: not one that can be read."""
    kind = FILE_KINDS.get(_suffix(path))
    return None if path.name in NOT_DATA or (_is_packed(path) and kind in TABLES) else kind


def can_be_cut(path: Path) -> bool:
    """Whether a part of the file can be read without what stands before it."""
    kind = kind_of(path)
    if _is_packed(path) or kind not in ("json", "text", *TABLES):
        return False
    if kind != "json":
        return True
    with path.open("rb") as file:
        return _is_lines(path, file.readline(), file.readline())


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


class DamagedError(ValueError):
    """A file that cannot be read to its end."""


def read_part(part: Part, skip: int = 0, columns: Sequence[str] = ()) -> Iterator[Any]:
    """The rows of a part of a file but for the first `skip`: lines or elements of json, records of csv, rows of a
    table, documents of a .txt. Of a table only the `columns` are read; where it has none of these, rows of null say
    which it has.

    Raises DamagedError, which names the file.
    """
    try:
        kind = kind_of(part.path)
        if kind in TABLES:
            yield from _table_rows(part, kind, skip, columns)
            return
        with _open(part.path) as file:
            if kind == "text":
                rows = _text_rows(file, part)
            elif kind == "json":
                rows = _json_rows(file, part)
            else:
                rows = _csv_rows(file, part.path, "\t" if kind == "tsv" else ",")
            yield from itertools.islice(rows, skip, None)
    # what the readers of these formats raise on bytes that are not theirs (pyarrow's errors derive from these)
    except (
        *(OSError, EOFError, ValueError, TypeError, LookupError, NotImplementedError, MemoryError, RecursionError),
        *(csv.Error, lzma.LZMAError, zlib.error, OverflowError),
    ) as error:
        raise DamagedError(f"cannot read {part.path}: {one_line(error)}") from error


# -- text


def _border(block: bytes) -> int:
    """Where the document ends that runs into this block: after the first blank line, else line, else word."""
    for mark in (rb"\n[ \t\r]*\n\s*", rb"\n", rb" ", rb"(?=[^\x80-\xbf])"):
        if found := re.search(mark, block):
            return found.end()
    return 0


def _text_rows(file: BinaryIO, part: Part) -> Iterator[dict[str, str]]:
    """The paragraphs of a text in documents of about DOCUMENT_BYTES.

    Each block of this size has one border in it, which depends on nothing else: from wherever a text is read, its
    documents are the same, and so are those that are held out.
    """
    n_blocks = 1 if part[1:] == (0.0, 1.0) else -(-part.path.stat().st_size // DOCUMENT_BYTES)
    first, last = round(part.start * n_blocks), round(part.end * n_blocks)
    if first == last:
        return
    if first:
        file.seek(first * DOCUMENT_BYTES)
    block = file.read(DOCUMENT_BYTES)
    document = block[_border(block) if first else 3 * block.startswith(b"\xef\xbb\xbf") :]
    for n in itertools.count(first + 1):
        block = file.read(DOCUMENT_BYTES)
        border = _border(block)
        text = (document + block[:border]).decode().replace("\r\n", "\n")
        if text.strip():
            yield {"text": text}
        if not block or (n == last and part.end < 1):
            return
        document = block[border:]


# -- json


def _is_lines(path: Path, first: bytes, second: bytes) -> bool:
    """Whether the file has a row a line, judged by its first lines."""
    if not second or first.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        return False
    if _suffix(path) != ".json":
        return True
    try:
        _loads(first)
    except ValueError:
        return False  # an object over several lines
    return True


def _loads(content: bytes) -> Any:
    content = content.removeprefix(b"\xef\xbb\xbf") or b"[]"
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # a number of more digits than Python makes whole numbers of, which no text is
        return json.loads(content, parse_int=float)


def _json_rows(file: BinaryIO, part: Part) -> Iterator[Any]:
    first = file.readline() if part.start == 0 else b""
    second = file.readline() if part.start == 0 else b""
    if part.start == 0 and not _is_lines(part.path, first, second):
        value = _loads(first + second + file.read())
        if isinstance(value, dict) and isinstance(value.get("data"), list):
            value = value["data"]
        yield from value if isinstance(value, list) else [value]
        return
    size = part.path.stat().st_size
    at, end = round(part.start * size), round(part.end * size) if part.end < 1 else float("inf")
    if at:
        file.seek(at - 1)
        at += len(file.readline()) - 1
    for line in itertools.chain([first, second] if part.start == 0 else [], file):
        if at >= end:
            return
        at += len(line)
        if not line.strip():
            continue
        try:
            row = _loads(line)
        except ValueError as error:
            raise ValueError(f"line {_line_number(part.path, at)}: {one_line(error)}") from error
        yield row


def _line_number(path: Path, end: int) -> int:
    """The number of the line that ends at this byte."""
    with _open(path) as file:
        return next(n for n, at in enumerate(itertools.accumulate(map(len, file)), 1) if at >= end)


# -- csv


def _csv_rows(file: BinaryIO, path: Path, delimiter: str) -> Iterator[dict[str, str] | None]:
    """Records by the names in the first; None for one with more or fewer fields, of which none can be trusted."""
    csv.field_size_limit(2**31 - 1)  # the module's limit of 128 KiB is no part of the format
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            for record in reader:
                if record:
                    yield dict(zip(names, record, strict=True)) if len(record) == len(names) else None
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {one_line(error)}") from error
        except UnicodeDecodeError as error:  # of a block of many lines
            raise ValueError(f"line {_undecoded_line(path)}: {one_line(error)}") from error


def _undecoded_line(path: Path) -> int:
    with _open(path) as file:
        return next(n for n, line in enumerate(file, 1) if line.decode(errors="ignore").encode() != line)


# -- tables


def _table_rows(part: Part, kind: str, skip: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    n_rows, names, batches = (_parquet_batches if kind == "parquet" else _arrow_batches)(part.path, columns)
    first, end = round(part.start * n_rows) + skip, round(part.end * n_rows)
    if not _wanted(names, columns):
        yield from (dict.fromkeys(names) for _ in range(first, end))
        return
    for at, batch in batches(first):
        if at >= end:
            return
        if at + batch.num_rows > first:
            batch.validate(full=True)  # arrow itself would follow a bad offset anywhere
            begin = max(0, first - at)
            yield from batch.slice(begin, end - at - begin).to_pylist()


def _wanted(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    return [name for name in names if name in columns] if columns else list(names)


# the rows, the names of all columns, and from a row on what comes, with where it begins
Batches = tuple[int, list[str], Callable[[int], Iterator[tuple[int, Any]]]]


def _parquet_batches(path: Path, columns: Sequence[str]) -> Batches:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)

    def batches(first: int) -> Iterator[tuple[int, Any]]:
        with file:
            at, groups = 0, []
            for group in range(file.num_row_groups):
                n = file.metadata.row_group(group).num_rows
                if groups or at + n > first:
                    groups.append(group)
                else:
                    at += n
            wanted = _wanted(file.schema_arrow.names, columns)
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=wanted):
                yield at, batch
                at += batch.num_rows

    return file.metadata.num_rows, list(file.schema_arrow.names), batches


def _arrow_batches(path: Path, columns: Sequence[str]) -> Batches:
    """Of both forms of Arrow files: the stream, which `save_to_disk` writes, and the one with an index, as Feather."""
    import pyarrow

    def read() -> Iterator[Any]:
        source = pyarrow.memory_map(str(path))
        with source:
            if source.read(6) == b"ARROW1":
                reader = pyarrow.ipc.open_file(source)
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)

    def batches(first: int) -> Iterator[tuple[int, Any]]:
        at = 0
        for batch in read():
            yield at, batch.select(_wanted(batch.schema.names, columns))
            at += batch.num_rows

    names: list[str] = []
    n_rows = 0
    for batch in read():
        names, n_rows = batch.schema.names, n_rows + batch.num_rows
    return n_rows, names, batches

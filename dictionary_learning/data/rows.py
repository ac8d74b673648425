"""Rows: of the standard library and of local files, one after another or side by side."""

import bisect
import hashlib
import itertools
import os
import random
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .readers import DamagedError, Part, can_be_cut, read_part
from .sources import files_of
from .stream import Stream, is_held_out

STRETCHES = 64  # that shuffled text is read in, side by side


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


class FileRows(Stream):
    """The rows of files one after another: `read(file, start)` gives those of a file from row `start` on.

    With `skip_damaged`, what cannot be read of a file is skipped and counted. The place at the end is that in the last
    file: what is added to it, and the files that are added after it, are read when the text is gone on with.
    """

    saved = ("file", "row", "damaged")

    def __init__(self, files: Sequence[Any], read: Callable[[Any, int], Iterable[Any]], skip_damaged: bool = False):
        self.files, self.read, self.skip_damaged = files, read, skip_damaged
        self.file = self.row = 0
        self.damaged: list[str] = []
        self._rows: Iterator[Any] | None = None

    @property
    def skipped(self) -> Counter[str]:
        return Counter(f"rest of a damaged file ({sentence})" for sentence in self.damaged)

    def __next__(self) -> Any:
        while self.file < len(self.files):
            if self._rows is None:
                self._rows = iter(self.read(self.files[self.file], self.row))
            try:
                for row in self._rows:
                    self.row += 1
                    return row
            except DamagedError as error:
                if not self.skip_damaged:
                    raise
                self.damaged.append(str(error))
            else:
                if self.file + 1 == len(self.files):
                    break
            self.file, self.row, self._rows = self.file + 1, 0, None
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "n_files": len(self.files), "names": self._names(len(self.files))}

    def _names(self, n: int) -> str:
        """A hash of the names of the first files."""
        names = [file.path.name if isinstance(file, Part) else str(file) for file in self.files[:n]]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        n = state["n_files"]
        if n != len(self.files) and state.get("names") != self._names(n):
            raise ValueError(
                f"the text had {n} files when this state was saved, now {len(self.files)}, and not those with others "
                "after them: name what is added as a --dataset of its own"
            )
        super().load_state_dict(state)
        self._rows = None


class Interleaved(Stream):
    """Streams side by side: the next row is of the one that has given the smallest share of its size so far.

    So every stretch of what comes out holds of each stream about its share of the whole.

    sizes: of the streams, in any unit. seed: draws whose turn is first.
    """

    saved = ("streams", "given", "ended")

    def __init__(self, streams: Sequence[Stream], sizes: Sequence[float], seed: int):
        order = random.Random(seed).sample(range(len(streams)), len(streams))
        self.streams, self.sizes = [streams[i] for i in order], [sizes[i] for i in order]
        self.given = [0] * len(streams)  # characters
        self.ended = [False] * len(streams)

    def __next__(self) -> Any:
        while live := [i for i, ended in enumerate(self.ended) if not ended]:
            i = min(live, key=lambda i: self.given[i] / self.sizes[i])
            for row in self.streams[i]:
                self.given[i] += len(str(row))
                return row
            self.ended[i] = True
        raise StopIteration


def stretches(
    files: Sequence[tuple[Any, float, bool]], n: int, seed: int
) -> tuple[list[list[tuple[Any, float, float]]], list[float]]:
    """All files, (file, size, whether it can be cut), laid end to end and cut in n of equal size, the first in two.

    Returns for each that is not empty the (file, start, end) in it, with fractions of the file, and its size. A file
    that cannot be cut is in the stretch that it begins in. The seed moves the cuts.
    """
    total, shift = sum(size for _, size, _ in files), random.Random(seed).random()
    cuts = [(i + shift) * total / n for i in range(n)]
    parts: list[list[tuple[Any, float, float]]] = [[] for _ in range(n + 1)]
    sizes, at = [0.0] * (n + 1), 0.0
    for file, size, can_cut in files:
        first = bisect.bisect_right(cuts, at)
        inner = [(cut - at) / size for cut in cuts if at < cut < at + size] if can_cut else []
        for i, (start, end) in enumerate(itertools.pairwise([0.0, *inner, 1.0]), first):
            parts[i].append((file, start, end))
            sizes[i] += size * (end - start)
        at += size
    filled = [i for i, part in enumerate(parts) if part]
    return [parts[i] for i in filled], [sizes[i] or 1.0 for i in filled]


def stdlib_files(held_out: bool | None, shuffle: int | None) -> Stream:
    """The rows of the standard library; with `shuffle`, a seed, side by side."""
    paths = [path for path in stdlib_paths() if held_out is None or is_held_out(path) == held_out]
    if shuffle is None:
        return FileRows(paths, stdlib_rows)
    root = Path(sysconfig.get_path("stdlib"))
    groups, sizes = stretches([(path, (root / path).stat().st_size, False) for path in paths], STRETCHES, shuffle)
    return Interleaved([FileRows([path for path, *_ in group], stdlib_rows) for group in groups], sizes, shuffle)


class LocalRows(Stream):
    """The rows of a local file, or of the files of a split in a folder; with `shuffle`, a seed, from all over them."""

    saved = ("rows",)

    def __init__(
        self,
        path: Path,
        split: str = "train",
        *,
        columns: Sequence[str] = (),
        shuffle: int | None = None,
        skip_damaged: bool = False,
    ):
        self.path, self.split, self.files = path, split, files_of(path, split)
        read = partial(read_part, columns=columns)
        self.size: int | None = None  # of all files, where it decides on the order
        if shuffle is None:
            self.rows: Stream = FileRows([Part(file) for file in self.files.chosen], read, skip_damaged)
            return
        self.size = sum(file.stat().st_size for file in self.files.chosen)
        whole = [(file, file.stat().st_size, can_be_cut(file)) for file in self.files.chosen]
        groups, sizes = stretches(whole, STRETCHES, shuffle)
        streams = [FileRows([Part(*part) for part in group], read, skip_damaged) for group in groups]
        self.rows = Interleaved(streams, sizes, shuffle)

    def __next__(self) -> Any:
        return next(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({} if self.size is None else {"size": self.size})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.size is not None and state.get("size", self.size) != self.size:
            raise ValueError(
                f"{self.path} had {state['size']:,} bytes when this state was saved and has {self.size:,}, so its "
                "shuffled order is another: name what is added as a --dataset of its own"
            )
        super().load_state_dict(state if "rows" in state else {"rows": state})  # older versions saved these alone

    @property
    def notes(self) -> list[str]:
        if not self.files.left_out:
            return []
        chosen, left_out = (_listed(self.path, files) for files in (self.files.chosen, self.files.left_out))
        return [f"{self.path}, split {self.split}: {chosen} are read, {left_out} are left out"]


def _listed(top: Path, files: Sequence[Path], most: int = 5) -> str:
    names = ", ".join(str(file.relative_to(top)) for file in files[:most])
    return f"{len(files)} files ({names}{', ...' if len(files) > most else ''})"

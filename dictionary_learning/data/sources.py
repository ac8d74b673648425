"""Sources: where a stream of text is read, which files that means, and whether two are the same text."""

import filecmp
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .readers import FILE_KINDS, OPENERS, kind_of

BUILT_IN = "python-stdlib"
# the words by which `datasets.load_dataset` knows the files of a split
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Source:
    """One stream of text: "python-stdlib", a local file or folder, or the id of a dataset on the Hugging Face Hub.

    `subset` is the configuration of a Hub dataset, or a folder in a local one; `revision` a commit or branch.
    """

    dataset: str
    split: str = "train"
    subset: str | None = None
    text_column: str = "text"
    revision: str | None = None

    @property
    def path(self) -> Path | None:
        """The file or folder; None for what is not local.

        Raises ValueError for the name of a file that is not there.
        """
        path = Path(self.dataset).expanduser()
        if self.dataset == BUILT_IN:
            return None
        if not path.exists():
            if self.dataset.startswith(("/", ".", "~")) or self.dataset.count("/") > 1 or kind_of(path):
                raise ValueError(f"there is no file or folder {self.dataset}")
            return None
        if self.subset is None:
            return path
        if not (path / self.subset).is_dir():
            raise ValueError(f"{self.dataset} has no folder {self.subset!r}: leave out the subset")
        return path / self.subset

    @property
    def is_there(self) -> bool:
        """False where it is the name of a file that is not there; the Hub is not asked."""
        try:
            _ = self.path
        except ValueError:
            return False
        return True

    @property
    def splits(self) -> set[str]:
        """The names in "train", "train+test" or "train[:10%]"."""
        return {part.split("[")[0].strip() for part in self.split.split("+")}


def share_a_source(one: Source, other: Source) -> bool:
    """Whether both are of a Hub dataset or have a file in common.

    Files are the same by what they are, not by their names, copies among them. Of a Hub dataset, other splits are
    other text; another subset or revision may hold the same.
    """
    paths = one.path, other.path
    if None in paths:
        same = paths == (None, None) and one.dataset.lower() == other.dataset.lower()
        return same and not one.splits.isdisjoint(other.splits)
    sides = zip(paths, (one, other), strict=True)
    return _share_a_file(*(files_of(path, source.split).chosen for path, source in sides if path is not None))


def _share_a_file(some: list[Path], others: list[Path]) -> bool:
    by_size: dict[int, list[Path]] = {}
    for file in some:
        by_size.setdefault(file.stat().st_size, []).append(file)
    pairs = [(file, twin) for file in others for twin in by_size.get(file.stat().st_size, ())]
    return any(file.samefile(twin) for file, twin in pairs) or any(
        filecmp.cmp(file, twin, shallow=False) for file, twin in pairs if file.stat().st_size
    )


@dataclass
class Files:
    """The files of a split in a folder, and those beside them that are of another."""

    chosen: list[Path]
    left_out: list[Path]


def files_of(path: Path, split: str) -> Files:
    """The file of this path, or the files of the split in this folder, in order of path.

    Of folders of `save_to_disk`, the files that their state.json names. Else a file is of the split that the name of a
    folder above it, or where no folder has one its own name, says as `datasets.load_dataset` reads it:
    `train-00.parquet`, `my_train.jsonl`, `test/a.jsonl`. What is of no split is of "train" where no file is said to be.
    """
    if not path.is_dir():
        if set(split) & set("[+"):
            raise ValueError(f"{path} is a file, of which there is no split {split!r}: only Hub datasets have parts")
        files = Files([path], [])
    else:
        files = _split_of(path, _walk(path), split)
    kinds = {str(kind_of(file)) for file in files.chosen}
    if kinds <= {"None"}:
        packed = ", ".join(OPENERS)
        raise ValueError(f"no text in {path}: files end in {', '.join(FILE_KINDS)}, those of text also in {packed}")
    if len(kinds) > 1:
        raise ValueError(f"{path} holds files of several kinds ({', '.join(sorted(kinds))}): name those of one kind")
    return files


def _walk(top: Path) -> list[Path]:
    """The files that can be read, in order of path: of linked folders too, of hidden ones not."""
    found, seen = [], set()
    for folder, folders, names in os.walk(top, followlinks=True):
        here = Path(folder)
        if here.resolve() in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(here.resolve())
        folders[:] = [name for name in folders if not name.startswith(".")]
        if "state.json" in names and (listed := _saved_files(here)) is not None:
            names = listed
        found += [here / name for name in names if not name.startswith(".") and kind_of(Path(name))]
    return sorted(file for file in found if file.is_file())


def _saved_files(folder: Path) -> list[str] | None:
    """What `save_to_disk` wrote here; None where state.json is another's."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError):
        return None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which its state.json names: copy it anew")
    return names


def _split_of(top: Path, files: list[Path], split: str) -> Files:
    others = [name for name in SPLIT_WORDS if name != split]
    by_folder = {name: _of_split(top, files, name, folders=True) for name in [split, *others]}
    by_name = {name: _of_split(top, files, name, folders=False) for name in [split, *others]}
    of_split = by_folder if any(by_folder.values()) else by_name
    chosen = of_split[split]
    named = set(itertools.chain.from_iterable(of_split.values()))
    if not chosen and split == "train":
        chosen = [file for file in files if file not in named]
    if files and not chosen:
        others_there = ", ".join(name for name in others if of_split[name]) or "none"
        advice = f"of others: {others_there}): name its file or folder instead"
        raise ValueError(f"no file in {top} is of a split {split!r} ({advice}")
    return Files(chosen, [file for file in files if file not in set(chosen)])


def _of_split(top: Path, files: list[Path], split: str, folders: bool) -> list[Path]:
    words = "|".join(map(re.escape, SPLIT_WORDS.get(split, (split,))))
    word = re.compile(rf"(^|[-._ 0-9])({words})([-._ 0-9]|$)")
    parts = {file: file.relative_to(top).parts for file in files}
    return [file for file in files if any(map(word.search, parts[file][:-1] if folders else parts[file][-1:]))]

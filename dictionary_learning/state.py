"""What --resume needs: the state of a run on the disk, whole or not there.

Written by `torch.distributed.checkpoint`, each rank its part, with a checksum of every file.
"""

import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .files import read_json, size_and_sum, sync, write_json
from .world import AgreedError, World

CHECKSUMS = "checksums.json"  # of a state: {file: [bytes, sha256]}


class SavedState(Mapping[str, Any]):
    """A state on the disk: its entries by name, each read when it is asked for, on the CPU."""

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, name: str) -> Any:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load

        entry: dict[str, Any] = {name: None}
        try:
            with _alone():
                load(entry, storage_reader=_state_reader(self.path), planner=_entry_planner(), no_dist=True)
        except CheckpointException as error:
            raise ValueError(f"{self.path} has no {name} that can be read ({_reason(error)}).") from error
        return entry[name][0]

    def get(self, name: str, default: Any = None) -> Any:
        """An entry, or the default where the version that wrote the state had no such entry."""
        return self[name] if name in list(self) else default

    def __iter__(self) -> Iterator[str]:
        return iter(_state_reader(self.path).read_metadata().state_dict_metadata)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def save_state(
    folder: str | Path, step: int, entries: Mapping[str, Any], *, world: World | None = None, keep: int = 2
) -> Path:
    """Write the folder `state_{step}`, and keep the newest `keep` of them.

    entries: this rank's part of the state, by names that no other rank uses; tensors and plain data only.
    All ranks call it. The folder gets its name when all of it is on the disk, with a checksum of every file. States of
    later steps go too: they are damaged ones that `load_state` passed over. OSError, on all ranks, where it cannot be
    written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    world = world or World()
    folder = Path(folder)
    path, tmp = folder / f"state_{step}", folder / f".state_{step}.tmp"

    def begin() -> bool:
        if path.exists() and _damage(path) is None:
            return False  # the run was stopped where it had been resumed
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        return True

    def write() -> dict[str, list]:
        """The size and checksum of each file that this rank wrote."""
        boxed = {name: [entry] for name, entry in entries.items()}  # torch has rules of its own for bare tensors
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with _alone(), world.peers():
                save(boxed, storage_writer=FileSystemWriter(tmp), planner=planner, no_dist=world.size == 1)
        except CheckpointException as error:
            raise OSError(f"{path} could not be written ({_reason(error)}).") from error
        own = [*tmp.glob(f"__{world.rank}_*"), *([tmp / ".metadata"] if world.rank == 0 else [])]
        return {file.name: size_and_sum(file) for file in own}

    def end(sums: dict[str, list]) -> None:
        write_json(tmp / CHECKSUMS, sums)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one
        os.replace(tmp, path)
        sync(folder)
        generations = _generations(folder)
        kept = [old for old in generations if _step(old) <= step][:keep]
        for old in [*folder.glob(".state_*.tmp"), *(old for old in generations if old not in kept)]:
            shutil.rmtree(old, ignore_errors=True)

    if world.together(begin, rank=0):
        try:
            sums = world.gather(world.together(write))
            world.together(lambda: end({name: value for part in sums for name, value in part.items()}), rank=0)
        except (OSError, ValueError):
            shutil.rmtree(tmp, ignore_errors=True)
            raise
    return path


def load_state(folder: str | Path, *, world: World | None = None) -> SavedState | None:
    """The newest whole state, the same on all ranks; None if there is no state at all, ValueError if none is whole."""
    world = world or World()
    first = None
    for path in world.together(lambda: _generations(Path(folder)), rank=0):
        found = world.gather(_damage(path, world))
        damage = next((sentence for sentence in found if sentence is not None), None)
        if damage is None:
            return SavedState(path)
        first = first or damage
        if world.rank == 0:
            warnings.warn(f"{path} is damaged; the state before it is tried.", stacklevel=2)
    if first is not None:
        raise AgreedError(f"no state in {folder} can be resumed: {first}")
    return None


def _damage(path: Path, world: World | None = None) -> str | None:
    """What is wrong with a state, None if nothing is. Of several ranks each looks at its share of the files."""
    world = world or World()
    try:
        sums = read_json(path / CHECKSUMS)
        names = sorted(file.name for file in path.iterdir() if file.name != CHECKSUMS)
        if sorted(sums) != names:
            return f"{path} does not hold the files that its {CHECKSUMS} names"
        for name in names[world.rank :: world.size]:
            if size_and_sum(path / name) != sums[name]:
                return f"the checksum of {path / name} is wrong"
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _reason(error: Any) -> str:
    """The first line of what went wrong on the first rank of torch's CheckpointException."""
    return str(next(iter(error.failures.values()))[0]).strip().split("\n")[0]


@contextmanager
def _alone() -> Iterator[None]:
    """Torch warns that a checkpoint is one process's, which is what we asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
        yield


def _entry_planner() -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            entry = torch.load(value, map_location="cpu", weights_only=True)
            self.state_dict[read_item.dest_index.fqn] = entry

    return Planner(flatten_state_dict=False, flatten_sharded_tensors=False)


def _state_reader(path: Path) -> Any:
    from torch.distributed.checkpoint import filesystem, metadata

    classes = (
        metadata.BytesStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        filesystem._StorageInfo,
        type(Path()),
    )

    class Unpickler(pickle.Unpickler):
        """Torch's list of what is where is a pickle: of these classes, and of no code."""

        def find_class(self, module: str, name: str) -> Any:
            found = {(cls.__module__, cls.__qualname__): cls for cls in classes}.get((module, name))
            if found is None:
                raise ValueError(f"{path} was not written by this program: it holds a {module}.{name}")
            return found

    class Reader(filesystem.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(path / ".metadata", "rb") as file:
                return Unpickler(file).load()

    return Reader(path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("state_"))


def _generations(folder: Path) -> list[Path]:
    """The states, newest first."""
    named = [path for path in folder.glob("state_*") if path.name.removeprefix("state_").isdecimal()]
    return sorted(named, key=_step, reverse=True)

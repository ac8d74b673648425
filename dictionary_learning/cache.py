"""Activations on disk: what the language model computed, written once and read by any later run.

    FOLDER/index.json           what they are of: the model and its places, the text, the mask
    FOLDER/text_{s}/index.json  shard s of the text: its files, with checksums, and the LLM batches in them
    FOLDER/text_{s}/{first}_{n}.safetensors   n LLM batches, "layer_{L}": x_PD; as "layer_mlp_out_layer_{L}"
                                              what is of another site than the output of a block

Padding is left out, and so are the marks between the texts where the mask leaves these out. Which positions are
outliers depends on the places that are read, so those are kept, and masked on reading as they are behind the model:
SAEs trained on any of the places get the bits of a run that reads the text.

Who writes a shard holds the lock of its folder, which ends with the process, however this ends.

A file gets its name when all of it is on the disk, and counts when the index names it. So a kill loses at most what was
not in a file yet, and the text goes on behind the last batch that is.

P positions of one LLM batch, or of all in a file; D the width of a place.
"""

import fcntl
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .buffer import ActivationSource, Positions, inner_positions
from .files import read_json, size_and_sum, write_atomic, write_json
from .pretrained import same_model
from .sites import RESID_POST, Place, key_of, name_of, place_at

INDEX, LOCK = "index.json", ".lock"
FILE_BYTES = 2**26  # a file ends with the LLM batch that reaches this size
VERSION = 1

# The settings on which the activations of a text depend; those of the text shards' order among them.
SETTINGS = (
    "model_name",
    "revision",
    "dtype",
    "quantization",
    "attn_implementation",
    "dataset",
    "split",
    "subset",
    "text_column",
    "mixed_dataset",
    "chat_dataset",
    "chat_split",
    "chat_subset",
    "chat_fraction",
    "pack_chats",
    "shuffle",
    "skip_damaged",
    "context_length",
    "prepend_bos",
    "llm_batch_size",
    "exclude_special_tokens",
    "mask",
    "text_shards",
)


def read_index(folder: str | Path) -> dict[str, Any]:
    """The index.json of a cache; ValueError where there is none."""
    path = Path(folder) / INDEX
    if not path.exists():
        raise ValueError(f"there are no activations in {folder}: write them with --cache {folder}.")
    index = read_json(path)
    kinds = {"settings": dict, "layers": list, "activation_dim": int, "model": dict, "held_out": bool}
    if index.get("version") != VERSION or any(type(index.get(name)) is not kind for name, kind in kinds.items()):
        raise ValueError(f"{path} is not the index of activations that this version can read.")
    index.setdefault("places", [[layer, RESID_POST, index["activation_dim"]] for layer in index["layers"]])
    return index


def widths(folder: str | Path) -> dict[Place, int]:
    """The places that a cache holds, and the width of each."""
    return {place_at(layer, site): width for layer, site, width in read_index(folder)["places"]}


def begin(folder: str | Path, content: Mapping[str, Any]) -> None:
    """Make the index of a cache, or see that the cache that is there is of the same; ValueError where it is not."""
    path = Path(folder) / INDEX
    if not path.exists():
        if Path(folder).is_file() or (Path(folder).is_dir() and any(Path(folder).iterdir())):
            raise ValueError(f"{folder} exists and holds other things: choose another folder for --cache.")
        write_json(path, {"version": VERSION, **content})
    there = read_index(folder)
    differs = [
        f"{name} was {there['settings'].get(name)}, is {value}"
        for name, value in content["settings"].items()
        if there["settings"].get(name) != value
    ]
    differs += [
        f"{name} was {there.get(name)}, is {value}"
        for name, value in content.items()
        if name not in ("settings", "model") and there.get(name) != value
    ]
    if not same_model(there["model"], content["model"]):
        differs.append(f"{there['settings']['model_name']} is another model now")
    if differs:
        raise ValueError(f"{folder} holds other activations: {'; '.join(differs)}. Choose another folder.")


def note(folder: str | Path, **found: Any) -> None:
    """Add what the run that wrote the activations found in them."""
    write_json(Path(folder) / INDEX, read_index(folder) | {"found": found})


def shard_folder(folder: str | Path, shard: int) -> Path:
    return Path(folder) / f"text_{shard}"


def _lock(folder: Path) -> Any:
    """An open file that holds the lock of a folder; ValueError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(
            f"another run is writing {folder.parent}: wait until it has ended, or choose another folder for --cache."
        ) from error
    except OSError as error:  # some network file systems have none
        warnings.warn(f"{folder} cannot be locked ({error}): let no other run write it meanwhile", stacklevel=2)
    return file


def n_shards(folder: str | None) -> int | None:
    """The shards of the text in a cache; None where there is no cache yet."""
    if folder is None or not (Path(folder) / INDEX).exists():
        return None
    return read_index(folder)["settings"]["text_shards"]


def held(folder: str | Path, n: int) -> tuple[int, int]:
    """(positions, bytes) that a cache holds, over all n shards of the text."""
    entries = [entry for s in range(n) for entry in _entries(shard_folder(folder, s))]
    return sum(batch[0] for entry in entries for batch in entry["batches"]), sum(entry["sum"][0] for entry in entries)


def _entries(folder: Path) -> list[dict[str, Any]]:
    """What the index of a shard says of its files; ValueError where it is not whole."""
    path = folder / INDEX
    if not path.exists():
        return []
    try:
        entries = read_json(path)["files"]
        for entry in entries:
            _ = [entry[key] for key in ("file", "full", "text", "rows", "skipped")], sum(entry["sum"][:1])
            _ = sum(batch[0] for batch in entry["batches"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is damaged: restore it from a copy, or write the activations anew.") from error
    return entries


@dataclass
class CachedModel:
    """What a buffer asks of a language model, where the activations are on the disk."""

    name: str
    widths: Mapping[Place, int]
    hook_names: Mapping[str, str]  # by the name of the place
    dtype: torch.dtype
    device: torch.device

    def width(self, place: Place) -> int:
        return self.widths[place]

    def hook_name(self, place: Place) -> str | None:
        return self.hook_names.get(name_of(place))


class CachedText:
    """One shard of the text, as LLM batches: the numbers of those on the disk, then new ones of the text.

    An iterator as the text is one; `positions` gives what the batch of a number holds, and `record` adds what the model
    made of the last one of the text.
    folder: of the shard. text: None where there is only what is on the disk, read `epochs` times.
    With a text, files that are damaged are written again, with all after them.
    """

    def __init__(self, folder: Path, layers: Sequence[Place], text: Any = None, epochs: int = 1):
        self.folder, self.layers, self.text = folder, layers, text
        self.epochs = 1 if text is not None else epochs
        self._locked = None if text is None else _lock(folder)
        self._entries = _entries(folder)
        self._pending: list[Positions] = []  # of the last file, which is not full
        self._next = 0
        self._ahead: tuple[int, Future] | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._current: tuple[int, dict[Place, Tensor]] = (-1, {})
        if text is not None:
            self._drop_damaged()
            if self._entries and not self._entries[-1]["full"]:
                self._pending = [self._positions(len(self._entries) - 1, i) for i in range(self._sizes()[-1])]
        self._n_stored = self._n_recorded = sum(self._sizes())
        self._at_end = False  # whether the text stands behind what is stored
        self._about_text: dict[str, Any] = {}  # where it stood after the batch that was recorded last

    def _sizes(self) -> list[int]:
        return [len(entry["batches"]) for entry in self._entries]

    # -- the iterator

    def __iter__(self) -> "CachedText":
        return self

    def __next__(self) -> Any:
        """The number of a batch on the disk, or (tokens_BL, mask_BL) of the text."""
        if self._next < self._n_stored * self.epochs:
            self._next += 1
            return self._next - 1
        if self.text is None:
            raise StopIteration
        if not self._at_end and self._n_stored:
            self.text.load_state_dict(self._entries[-1]["text"])
        self._at_end = True
        batch = next(self.text)
        self._next += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"batch": self._next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if state["batch"] > self._n_stored * self.epochs:
            raise ValueError(
                f"{self.folder} holds {self._n_stored:,} batches, and the run had read {state['batch']:,}: "
                "put back the activations that it began with."
            )
        self._next = state["batch"]

    @property
    def skipped(self) -> Counter[str]:
        return self.text.skipped if self._at_end else Counter(self._entries[-1]["skipped"] if self._entries else {})

    @property
    def n_read(self) -> int:
        return self.text.n_read if self._at_end else self._entries[-1]["rows"] if self._entries else 0

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        if self.text is not None:
            self.text.close()
        if self._locked is not None:
            self._locked.close()

    # -- reading

    def positions(self, number: int) -> Positions:
        """The LLM batch of this number; ValueError where its file is damaged."""
        number %= self._n_stored
        sizes, k = self._sizes(), 0
        while number >= sizes[k]:
            number -= sizes[k]
            k += 1
        return self._positions(k, number)

    def _positions(self, k: int, i: int) -> Positions:
        """Batch i of file k."""
        batches = self._entries[k]["batches"]
        first, (P, *about) = sum(batch[0] for batch in batches[:i]), batches[i]
        x_by_layer = {layer: x_PD[first : first + P] for layer, x_PD in self._file(k).items()}
        return Positions(x_by_layer, torch.ones(P, dtype=torch.uint8), *about)

    def _file(self, k: int) -> dict[Place, Tensor]:
        """{layer: x_PD} of a file, mapped into memory; meanwhile the next one is read."""
        if self._current[0] != k:
            self._reader = self._reader or ThreadPoolExecutor(1, "activations")
            ahead = self._ahead if self._ahead and self._ahead[0] == k else (k, self._reader.submit(self._open, k))
            self._current = (k, ahead[1].result())
            following = (k + 1) % len(self._entries)
            self._ahead = None if following == k else (following, self._reader.submit(self._open, following))
        return self._current[1]

    def _open(self, k: int) -> dict[Place, Tensor]:
        path = self.folder / self._entries[k]["file"]
        if (damage := _damage(path, self._entries[k])) is not None:  # all of it is read: the map will not wait for it
            raise ValueError(
                f"{damage}: give --cache {self.folder.parent} --cache_only with the settings it was written with, and "
                "what is damaged is written again."
            )
        with safe_open(path, framework="pt") as file:
            return {layer: file.get_tensor(f"layer_{key_of(layer)}") for layer in self.layers}

    # -- writing

    def _drop_damaged(self) -> None:
        for k, entry in enumerate(self._entries):
            if (damage := _damage(self.folder / entry["file"], entry)) is not None:
                n, n_files = len(self._entries) - k, len(self._entries)
                warnings.warn(f"{damage}: the last {n} of {n_files} files are written again", stacklevel=2)
                del self._entries[k:]
                return

    def record(self, positions: Positions) -> None:
        """Add the batch of the text that came last.  OSError where the disk is full; what is there stays whole."""
        if self._next == self._n_recorded:  # it was put back, since another rank had no text, and is run once more
            return
        assert self._next == self._n_recorded + 1
        self._pending.append(positions)
        self._n_recorded += 1
        text = self.text
        self._about_text = {"text": text.state_dict(), "rows": text.n_read, "skipped": dict(text.skipped)}
        if sum(x_PD.nbytes for batch in self._pending for x_PD in batch.x_by_layer.values()) >= FILE_BYTES:
            self._write(full=True)
            self._pending = []

    def flush(self) -> None:
        """Everything that was recorded is on the disk after this."""
        if self._n_recorded > sum(self._sizes()):
            self._write(full=False)

    def _write(self, full: bool) -> None:
        """The file of the pending batches, in place of one that holds the first of them."""
        entries = self._entries[:-1] if self._entries and not self._entries[-1]["full"] else self._entries
        n_before = sum(len(entry["batches"]) for entry in entries)
        path = self.folder / f"{n_before:08}_{len(self._pending)}.safetensors"
        tensors = {
            f"layer_{key_of(layer)}": torch.cat([batch.x_by_layer[layer].cpu() for batch in self._pending])
            for layer in self.layers
        }
        write_atomic(path, lambda tmp: save_file(tensors, tmp))
        entry = {
            "file": path.name,
            "sum": size_and_sum(path),
            "full": full,
            "batches": [[len(batch.mask_P), *batch[2:]] for batch in self._pending],
            **self._about_text,
        }
        write_json(self.folder / INDEX, {"files": [*entries, entry]})
        self._entries = [*entries, entry]
        named = {entry["file"] for entry in self._entries}
        for old in self.folder.glob("*.safetensors"):
            if old.name not in named:
                old.unlink()


def _damage(path: Path, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a file, None if nothing is."""
    if not path.exists():
        return f"{path} is gone"
    return None if size_and_sum(path) == entry["sum"] else f"{path} is damaged"


class CachedSource(ActivationSource):
    """The activations on the disk, and behind them those of the text, which are written as they come.

    shards: `CachedText`s, None where another rank has them.
    """

    def _positions(self, shard: int, batch: Any) -> Positions:
        cached = self.shards[shard]
        if isinstance(batch, int):
            positions = cached.positions(batch)
            moved = {layer: x_PD.to(self.lm.device) for layer, x_PD in positions.x_by_layer.items()}
            return positions._replace(x_by_layer=moved)
        positions = _without_left_out(super()._positions(shard, batch), self.mask)
        cached.record(positions)
        return positions

    def flush(self) -> None:
        for shard in self._mine():
            self.shards[shard].flush()

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        return super().state_dict()


def _without_left_out(positions: Positions, drop_bos: bool) -> Positions:
    """Without the positions that are masked whatever layers are read, but with their counts."""
    mask_P = positions.mask_P
    keep_P = inner_positions(mask_P, drop_bos)
    kept_N = keep_P.nonzero().squeeze(1)
    device = next(iter(positions.x_by_layer.values())).device
    x_by_layer = {k: x_PD.index_select(0, kept_N.to(device)) for k, x_PD in positions.x_by_layer.items()}
    n_text = int((mask_P > 0).sum())
    return positions._replace(
        x_by_layer=x_by_layer,
        mask_P=torch.ones(len(kept_N), dtype=torch.uint8),
        bos=n_text - len(kept_N),
        padding=len(mask_P) - n_text,
    )

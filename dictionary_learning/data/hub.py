"""Rows that stream from the Hugging Face Hub."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .readers import one_line
from .rows import Interleaved
from .sources import BUILT_IN, Source
from .stream import Stream

RETRY_WAITS_S = tuple(2.0**i for i in range(9))  # eight and a half minutes in all
HUB_TIMEOUT_S = 10.0
SIDE_BY_SIDE = 8  # stretches of shuffled text, each with a connection of its own


class HubRows(Stream):
    """The rows of a dataset that streams from the Hub, reopened where it stood when the network fails.

    Args:
        open_dataset: from a revision (None: the newest) to a `datasets.IterableDataset`, whose `state_dict` is the
            position, and its revision. Not a shuffled one: its state leaves out the rows in the shuffle buffer.
        retry_waits_s: seconds before each attempt to reopen, until a row comes through.
        columns: all that is read of the columns, where the dataset has some of them.
        stretch: (i, n): of the shards of the dataset, the i-th n-th.
        skip_damaged: what cannot be read of a shard is skipped and counted.
        shard_name: from a shard's number and how many there are to what it is called.

    Raises:
        ConnectionError: the attempts are used up, or the very first one failed.
        ValueError: the dataset does not exist, is gated, has no such split or subset, or cannot be read.
    """

    saved = ("revision", "shard", "position", "damaged")

    def __init__(
        self,
        name: str,
        open_dataset: Callable[[str | None], tuple[Any, str | None]],
        retry_waits_s: Sequence[float] = RETRY_WAITS_S,
        *,
        columns: Sequence[str] = (),
        stretch: tuple[int, int] = (0, 1),
        skip_damaged: bool = False,
        shard_name: Callable[[int, int], str] = "shard {} of {}".format,
    ):
        self.name, self.open_dataset, self.retry_waits_s = name, open_dataset, retry_waits_s
        self.columns, self.stretch, self.skip_damaged, self.shard_name = columns, stretch, skip_damaged, shard_name
        self.revision: str | None = None  # what is reopened later is the same data
        self.shard: int | None = None  # None: the first
        self.position: dict[str, Any] | None = None  # in the shard; None: the start
        self.damaged: list[str] = []
        self._dataset: Any = None
        self._shard: Any = None
        self._rows: Iterator[Any] | None = None
        self._reached = False

    @property
    def skipped(self) -> Counter[str]:
        return Counter(f"rest of a damaged file ({sentence})" for sentence in self.damaged)

    @property
    def n_shards(self) -> int:
        """How many the dataset has: 1 until it is open."""
        return 1 if self._dataset is None else self._dataset.num_shards

    def __next__(self) -> Any:
        waits = iter(self.retry_waits_s if self._reached else ())  # at first a user is waiting: fail at once
        while True:
            try:
                if self._rows is None and not self._open():
                    raise StopIteration
                assert self._rows is not None
                for row in self._rows:
                    self.position = self._shard.state_dict()
                    self._reached = True
                    return row
                self._next_shard()
            except StopIteration:
                raise
            except Exception as error:  # whatever the network stack and the file readers below may raise
                opened, self._rows = self._rows is not None, None
                failure = self._explain(error)
                if isinstance(failure, ConnectionError):
                    self._dataset = None
                    if (wait := next(waits, None)) is None:
                        raise failure from error
                    time.sleep(wait)
                elif opened and self.skip_damaged:
                    self.damaged.append(str(failure))
                    self._next_shard()
                else:
                    raise failure from error

    def _open(self) -> bool:
        """Go to where the state says; false at the end."""
        if self._dataset is None:
            self._dataset, self.revision = self.open_dataset(self.revision)
            kept = [name for name in self._dataset.column_names or () if name in self.columns]
            if kept:
                self._dataset = self._dataset.select_columns(kept)
        i, n = self.stretch
        if self.shard is None:
            if self.position is not None and self.n_shards > 1:
                raise ValueError("an older version saved a place in it that is of no shard: begin with --overwrite")
            self.shard = i * self.n_shards // n
        if self.shard >= (i + 1) * self.n_shards // n:
            return False
        self._shard = self._dataset.shard(self.n_shards, self.shard) if self.n_shards > 1 else self._dataset
        self._shard.load_state_dict(copy.deepcopy(self.position))
        self._rows = iter(self._shard)
        return True

    def _next_shard(self) -> None:
        assert self.shard is not None
        self.shard, self.position, self._rows = self.shard + 1, None, None

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
        what = one_line(error)
        if "GatedRepoError" in names or ("DatasetNotFoundError" in names and "gated" in what):
            page = f"https://huggingface.co/datasets/{self.name}"
            return ValueError(f"{self.name} is a gated dataset: accept its licence at {page}, then run `hf auth login`")
        if names & {"DatasetNotFoundError", "RepositoryNotFoundError", "HFValidationError"}:
            advice = "check the name (a private one needs `hf auth login`)"
            return ValueError(f"no file, folder or Hub dataset is called {self.name}: {advice}")
        if not _is_of_the_network(error):
            shard = "" if self._dataset is None or self.shard is None else self.shard_name(self.shard, self.n_shards)
            return ValueError(f"cannot read {self.name}{shard and f', {shard}'}: {what}")
        if not self._reached:
            advice = f"check the network, or take a local file or {BUILT_IN}"
            return ConnectionError(f"cannot reach {self.name} on the Hugging Face Hub ({what}): {advice}")
        attempts = f"{len(self.retry_waits_s)} attempts over {sum(self.retry_waits_s):.0f} s"
        return ConnectionError(f"the text of {self.name} broke off and {attempts} did not bring it back ({what})")


def _is_of_the_network(error: BaseException | None) -> bool:
    """Whether this, or what it was raised from, is a lost connection: all else would come again."""
    while error is not None:
        response = getattr(error, "response", None)
        status = getattr(error, "status", None) or getattr(response, "status_code", None)
        if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
            return False  # the Hub has answered
        kinds = {cls.__module__.split(".")[0] for cls in type(error).__mro__}
        # what `socket`, `ssl` and `http.client` raise, and the clients built upon them
        network = {"socket", "ssl", "http", "httpx", "httpx2", "httpcore", "aiohttp", "requests", "urllib3"}
        if isinstance(error, (ConnectionError, TimeoutError)) or kinds & network:
            return True
        error = error.__cause__ or error.__context__
    return False


def open_hub(source: Source, revision: str | None) -> tuple[Any, str | None]:
    """The dataset as a stream, and the commit that it is of; from the local cache where the Hub does not answer."""
    import datasets
    import huggingface_hub

    try:  # asked in any case: it fails at once without a network, where what follows would try for half a minute
        info = huggingface_hub.HfApi().dataset_info(
            source.dataset, revision=revision or source.revision, timeout=HUB_TIMEOUT_S
        )
    except Exception as error:  # the HTTP client's own errors differ between versions of huggingface_hub
        if not _is_of_the_network(error) or (cached := _open_cached(source, revision)) is None:
            raise
        return cached
    where = {"split": source.split, "streaming": True}
    return datasets.load_dataset(source.dataset, source.subset, **where, revision=info.sha), info.sha


def _open_cached(source: Source, revision: str | None) -> tuple[Any, str | None] | None:
    """What lies of a dataset in the local caches: that of whole repositories, then that of `datasets.load_dataset`."""
    import datasets
    import huggingface_hub
    from datasets import config

    where = {"split": source.split, "streaming": True}
    try:
        folder = huggingface_hub.snapshot_download(
            source.dataset, repo_type="dataset", revision=revision or source.revision, local_files_only=True
        )
        return datasets.load_dataset(folder, source.subset, **where), Path(folder).name
    except (huggingface_hub.errors.LocalEntryNotFoundError, FileNotFoundError):
        pass  # nothing, or no more than its card
    online, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        return datasets.load_dataset(source.dataset, source.subset, **where), revision
    except (ConnectionError, FileNotFoundError):
        return None
    finally:
        config.HF_HUB_OFFLINE = online


def _file_of_shard(source: Source, shard: int, n_shards: int) -> str:
    import datasets

    builder = datasets.load_dataset_builder(source.dataset, source.subset, revision=source.revision)
    files = (builder.config.data_files or {}).get(source.split, [])
    return files[shard].rsplit("/", 1)[-1] if len(files) == n_shards else f"shard {shard} of {n_shards}"


def hub_rows(
    source: Source,
    *,
    columns: Sequence[str] = (),
    shuffle: int | None = None,
    skip_damaged: bool = False,
    retry_waits_s: Sequence[float] = RETRY_WAITS_S,
) -> Stream:
    """The rows of a Hub dataset; with `shuffle`, a seed, of several stretches of its shards side by side."""

    def rows(stretch: tuple[int, int]) -> HubRows:
        return HubRows(
            source.dataset,
            lambda revision: open_hub(source, revision),
            retry_waits_s,
            columns=columns,
            stretch=stretch,
            skip_damaged=skip_damaged,
            shard_name=lambda shard, n: _file_of_shard(source, shard, n),
        )

    whole = rows((0, 1))
    if shuffle is None:
        return whole
    start = whole.state_dict()
    next(whole, None)
    n = min(whole.n_shards, SIDE_BY_SIDE)
    whole.load_state_dict(start)
    return Interleaved([rows((i, n)) for i in range(n)], [1.0] * n, shuffle)

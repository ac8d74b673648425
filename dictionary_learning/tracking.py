"""Weights & Biases: one run per SAE, all of them in this process.

W&B looks on and takes no part. Whatever fails here (no login, no network, a server that refuses) is kept and said by
`finish`; until then the runs are recorded on disk, where one command sends them. `metrics.jsonl` does not depend on it.
"""

import os
import secrets
import shlex
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import read_jsonl

INIT_SECONDS = 60  # to wait for the server at the start of a run
FINISH_SECONDS = 120  # to wait for what is still being sent at its end


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file, as far as it goes: that of a killed process may end anywhere.

    7 bytes of header, then LevelDB's log format: blocks of 32 KiB with pieces of checksum, length and kind (1 a whole
    record, 2 its first piece, 3 a middle one, 4 the last). W&B itself has no reader of it in Python any more.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, position, payload = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 2**15 - position % 2**15
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        position += 7 + length
        if not 1 <= kind <= 4 or position > len(data):
            return
        payload += data[position - length : position]
        if kind in (1, 4):
            try:
                yield Record.FromString(payload)
            except DecodeError:
                return
            payload = b""


class Tracker:
    """What a sweep tells about its SAEs, by their index. This one keeps nothing: W&B is off."""

    def __init__(self) -> None:
        self.ids: list[str] = []  # the W&B id of each SAE's run, to be kept for a resume

    def log(self, i: int, metrics: Mapping[str, Any], step: int) -> None:
        """Record a row of metrics.jsonl of SAE `i`."""

    def summary(self, i: int, results: Mapping[str, Any]) -> None:
        """Record the evaluation of SAE `i`."""

    def finish(self) -> list[str]:
        """End all runs. Returns sentences for the end of the program's output."""
        return []


class WandbRuns(Tracker):
    """A W&B run for each SAE, in one group.

    `names` and `configs` have one entry an SAE; `ids` are those of an earlier part of the same sweep, which its runs
    then continue, and `histories` its files of metrics: the rows that W&B has not got, because the process was killed
    before they were sent or on the disk, are sent at once. No row is sent twice. `folder` gets the files of W&B, in
    `folder/wandb`. Where the server cannot be used, all runs are offline ones.
    """

    def __init__(
        self,
        names: Sequence[str],
        configs: Sequence[Mapping[str, Any]],
        *,
        project: str,
        group: str,
        folder: str | Path,
        entity: str | None = None,
        ids: Sequence[str] = (),
        histories: Sequence[Path] = (),
    ):
        assert not ids or len(ids) == len(names)
        self.ids = list(ids) or [secrets.token_hex(4) for _ in names]
        self.folder = Path(folder).resolve()
        self._problems: dict[str, str] = {}  # reason -> the first sentence about it
        self._given_up: set[int] = set()  # runs that take no more, but still have to end
        self._common = {"project": project, "entity": entity or None, "group": group, "dir": str(self.folder)}
        self._mode: Any = self._reachable_mode()
        pairs = zip(names, configs, strict=True)
        self._runs: list[Any] = [self._start(i, name, dict(config)) for i, (name, config) in enumerate(pairs)]
        self._last_steps = [-1] * len(self._runs)  # of the rows that W&B has
        for i, history in enumerate(histories if ids else ()):
            self._try(i, lambda run, i=i, history=history: self._catch_up(i, run, history))

    def _reachable_mode(self) -> str | None:
        """None, which leaves the mode to the user's settings, or "offline" where there is no login or no server.

        Asked once: a run that waits in vain for the server keeps its id from being used again, and each would wait.
        """
        if os.environ.get("WANDB_MODE", "online") != "online":
            return None
        try:
            import wandb

            wandb.login(verify=True)
        except Exception as error:  # wandb raises errors of a dozen kinds, and none may end a sweep
            self._note("W&B cannot be reached, so its runs are recorded on disk", error)
            return "offline"
        return None

    def _start(self, i: int, name: str, config: dict[str, Any]) -> Any:
        """The run of SAE `i`, or None where not even an offline one could be started."""
        for mode in dict.fromkeys((self._mode, "offline")):
            try:
                import wandb

                self.folder.mkdir(parents=True, exist_ok=True)
                run = wandb.init(
                    **self._common,
                    name=name,
                    id=self.ids[i],
                    config=config,
                    mode=mode,
                    resume="allow",
                    reinit="create_new",
                    # not one copy of this process's output for each SAE; no endless wait for a server that is gone
                    settings=wandb.Settings(
                        console="off",
                        quiet=True,
                        init_timeout=INIT_SECONDS,
                        finish_timeout=FINISH_SECONDS,
                        finish_timeout_raises=True,
                    ),
                )
                run.define_metric("step", hidden=True)
                run.define_metric("tokens", hidden=True)
                run.define_metric("*", step_metric="step")
                return run
            except Exception as error:
                self._note(f"W&B did not start {name}", error)
                self._mode = "offline"  # the others need not wait for the same failure
                self.ids[i] = secrets.token_hex(4)  # the failed start holds the old one
        return None

    def _catch_up(self, i: int, run: Any, history: Path) -> None:
        if run.offline:
            files = (self.folder / "wandb").glob(f"*run-*-{run.id}/*.wandb")
            rows = (record.history for path in files for record in records(path) if record.HasField("history"))
            self._last_steps[i] = max((row.step.num for row in rows), default=-1)
        else:
            self._last_steps[i] = run.starting_step - 1  # the server says where it stands
        for row in read_jsonl(history):
            self.log(i, row, row["step"])

    def log(self, i: int, metrics: Mapping[str, Any], step: int) -> None:
        """A row of metrics.jsonl, at `step` of W&B's own axis; `step` and `tokens` are keys too, to plot against."""
        if step > self._last_steps[i]:
            self._last_steps[i] = step
            self._try(i, lambda run: run.log({**metrics, "step": step}, step=step))

    def summary(self, i: int, results: Mapping[str, Any]) -> None:
        """The evaluation into the run's summary as `eval/...`, beside the last values of training."""
        self._try(i, lambda run: run.summary.update({f"eval/{key}": value for key, value in results.items()}))

    def finish(self) -> list[str]:
        """End all runs. Returns what failed, and the command that sends what W&B has not got."""
        unsent = False
        for run in filter(None, self._runs):
            unsent |= run.offline
            try:
                run.finish()
            except Exception as error:
                self._note(f"W&B did not get all of run {run.id}", error)
                if isinstance(error, TimeoutError):
                    break  # the others were being sent in the same time, and are not waited for one by one
        self._runs = [None] * len(self._runs)
        sentences = list(self._problems.values())
        if not (unsent or sentences) or not (self.folder / "wandb").is_dir():
            return sentences
        command = f"wandb sync --include-online {shlex.quote(str(self.folder / 'wandb'))}"
        return [*sentences, f"W&B has not got everything; this sends it: {command}"]

    def _try(self, i: int, action: Callable[[Any], None]) -> None:
        if self._runs[i] is None or i in self._given_up:
            return
        try:
            action(self._runs[i])
        except Exception as error:
            self._given_up.add(i)
            self._note(f"W&B lost run {self.ids[i]}", error)

    def _note(self, what: str, error: Exception) -> None:
        """Keep a problem for the end, without the API key should the error quote it."""
        reason = " ".join(str(error).split()) or type(error).__name__
        key = os.environ.get("WANDB_API_KEY")
        self._problems.setdefault(reason, f"{what}: {reason.replace(key, '***') if key else reason}")

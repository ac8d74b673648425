"""The training loop: one stream of activations, any number of SAEs.

B tokens in the batch, D activation_dim, E output_dim (D unless it is a transcoder).
"""

import copy
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .dictionary import Dictionary
from .files import append_jsonl, rewind_jsonl, write_json
from .formats import save_sae, save_weights
from .kernels import WHOLE, Shard
from .sites import Place, place_at
from .threads import workers_pool
from .trainers import LossOutput, SAETrainer, TopKTrainer
from .trainers.trainer import SparseTrainer
from .world import World


class TextEndedError(ValueError):
    """The activations ran out before the asked number of steps; the SAEs are written as they are then."""


class Interrupted(Exception):
    """The run stopped where it can be resumed: a signal asked for it, or the text cannot be reached."""


@dataclass
class SAERun:
    """One SAE of a run: its number in the grid, its trainer, where it is written, and why it stopped if it did."""

    index: int
    trainer: SAETrainer
    folder: Path | None
    config: dict[str, Any]  # of config.json: {"trainer": ..., "buffer": ...}
    failure: str | None = None

    @property
    def place(self) -> Place:
        """What it reads."""
        return place_at(self.trainer.cfg.layer, self.trainer.cfg.site)

    @property
    def place_out(self) -> Place:
        """What it reconstructs or, as a transcoder, predicts."""
        return place_at(self.trainer.cfg.layer, self.trainer.cfg.site_out)

    @property
    def metrics_file(self) -> Path | None:
        return None if self.folder is None else self.folder / "metrics.jsonl"

    def saved_config(self) -> dict[str, Any]:
        trainer = self.trainer.config | self.config["trainer"]
        if self.failure is not None:
            trainer["failure"] = self.failure
        return {**self.config, "trainer": trainer}


def make_trainer(config: Mapping[str, Any], shard: Shard = WHOLE) -> SAETrainer:
    """The trainer of a config: its keywords, and `trainer`, its class."""
    return config["trainer"](**{name: value for name, value in config.items() if name != "trainer"}, shard=shard)


def make_runs(
    trainer_configs: Sequence[dict[str, Any]],
    folders: Sequence[Path | None],
    buffer_config: Callable[[Place, Place], dict],
    mine: Iterable[int] | None = None,
    shard: Shard = WHOLE,
    about: Mapping[str, Any] | None = None,
) -> list[SAERun]:
    """Build the trainers of a grid; the configs are left as they are.

    folders: where each SAE is written, None for nowhere.
    mine: the numbers of the SAEs that this process trains; all of them by default.
    shard: its share of their latents; what is written of an SAE is written by the process with the first share.
    about: what the "trainer" of every config.json records beside the trainer's own settings.
    """
    runs = []
    for i in range(len(trainer_configs)) if mine is None else mine:
        trainer, folder = make_trainer(trainer_configs[i], shard), folders[i] if shard.rank == 0 else None
        run = SAERun(i, trainer, folder, {"trainer": dict(about or {}), "buffer": {}})
        run.config["buffer"] = buffer_config(run.place, run.place_out)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", run.saved_config())
        runs.append(run)
    return runs


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype`, float32 meaning none."""
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype if half else None, enabled=half)


def _random_batch(trainer: SAETrainer, batch_size: int, dtype: torch.dtype) -> list[Tensor]:
    """x_BD of norm 1 and, for a transcoder, such a y_BE: what `update` takes."""
    cfg, generator = trainer.cfg, torch.Generator().manual_seed(0)
    widths = [cfg.activation_dim, cfg.output_dim or 0] if cfg.is_transcoder else [cfg.activation_dim]
    drawn = [torch.randn(batch_size, width, generator=generator) for width in widths]
    return [torch.nn.functional.normalize(x, dim=1).to(trainer.device, dtype) for x in drawn]


def step_microseconds(
    config: Mapping[str, Any], batch_size: int, autocast_dtype: torch.dtype, shard: Shard = WHOLE, steps: int = 3
) -> int:
    """How long a training step of such an SAE takes, by a few of them on random activations of norm 1."""
    trainer = make_trainer(config, shard)
    batch = _random_batch(trainer, batch_size, autocast_dtype)

    def seconds() -> float:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter()

    start = 0.0
    for step in range(1 + steps):
        if step == 1:
            start = seconds()  # the first one initialises
        with autocast(trainer.device, autocast_dtype):
            trainer.update(step, *batch)
    return max(round(1e6 * (seconds() - start) / steps), 1)


# Beyond so many weights a matrix, operations are large enough to share: at D 512 and F 16384 both ways take the same.
MEASURED_WEIGHTS = 2**23
MEASURED_ROUNDS = 3


def choose_workers(
    configs: Sequence[Mapping[str, Any]],
    batch_size: int,
    autocast_dtype: torch.dtype,
    device: str,
    shard: Shard = WHOLE,
) -> int:
    """How many worker threads should step these SAEs side by side, 1 where all threads should share each operation.

    Small operations wait at their ends for threads more than they gain by them, and most where another process is busy.
    Steps of a few such SAEs, on random activations, are timed each way in turn; the run's own trainers are not touched.
    """
    n = min(torch.get_num_threads(), len(configs))
    largest = max((config["activation_dim"] * config["dict_size"] for config in configs), default=0)
    if n <= 1 or device != "cpu" or shard.size > 1 or largest > MEASURED_WEIGHTS:
        return 1
    # of the SAEs, as many as there are workers, and as different as the grid has them
    trainers = [make_trainer(configs[i * len(configs) // n]) for i in range(n)]
    batches = {trainer: _random_batch(trainer, batch_size, autocast_dtype) for trainer in trainers}
    seconds: dict[bool, list[float]] = {True: [], False: []}

    def step(trainer: SAETrainer, first: int = 1, n: int = 2) -> None:
        for number in range(first, first + n):
            with autocast(trainer.device, autocast_dtype):
                trainer.update(number, *batches[trainer])

    for trainer in trainers:  # the first step of a run does more than all others
        step(trainer, 0, 1)
    with workers_pool(n) as pool:
        for i in range(1 + MEASURED_ROUNDS):
            for side_by_side in (True, False):
                start = time.perf_counter()
                list(pool.map(step, trainers) if side_by_side else map(step, trainers))
                if i > 0:  # the first round finds the caches cold
                    seconds[side_by_side].append(time.perf_counter() - start)
    return n if min(seconds[True]) <= min(seconds[False]) else 1


@torch.no_grad()
def estimate_norm_factor(batches: Iterable[Tensor]) -> float:
    """sqrt(mean ||x||^2) over the rows of all batches, in float32 with float64 sums.  ValueError where it is 0."""
    total, count = 0.0, 0
    for x_BD in batches:
        total += float(x_BD.float().square().sum(dim=-1).double().sum())
        count += len(x_BD)
    if total == 0:
        raise ValueError("all activations are zero, so there is nothing to train on: check the layer and the text.")
    return math.sqrt(total / count)


def metrics(step: int, tokens: int, run: SAERun, y_BE: Tensor, out: LossOutput) -> dict[str, Any]:
    """What is logged of one step of one SAE: of the batch that was trained on, before the weights moved.

    y_BE: what was to be reconstructed or predicted.
    """
    residual_BE = (y_BE - out.x_hat_BD).float()
    explained = 1 - residual_BE.var(dim=0).sum() / y_BE.float().var(dim=0).sum()
    values: dict[str, Any] = {
        "l0": out.l0(),
        "frac_variance_explained": explained,
        "dead_features": run.trainer.dead_features(),
        **out.terms,
        "lr": run.trainer.lr(step),
    }
    if isinstance(run.trainer, SparseTrainer):
        values["sparse"] = out.f.code is not None
    if isinstance(run.trainer, TopKTrainer):
        values["screened"] = run.trainer.screened
    threshold = getattr(run.trainer.ae, "threshold", None)
    if threshold is not None:
        shard = run.trainer.shard
        values["threshold"] = shard.sum(threshold.detach().mean()) / shard.size
    numbers = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
    return {"step": step, "tokens": tokens, **numbers}


@contextmanager
def signals_noted() -> Iterator[list[str]]:
    """Within this, SIGTERM and the first Ctrl-C only add their names to the list; a second Ctrl-C acts at once."""
    noted: list[str] = []

    def note(number: int, _frame: Any) -> None:
        noted.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def trainSAE(
    data: Iterator[Tensor],
    trainer_configs: Sequence[dict[str, Any]],
    steps: int,
    *,
    save_dir: str | Path | None = None,
    save_steps: Sequence[int] = (),
    log_steps: int = 100,
    normalize_activations: bool = True,
    norm_batches: int = 100,
    autocast_dtype: torch.dtype = torch.float32,
    verbose: bool = True,
) -> list[SAETrainer]:
    """Train SAEs on batches of activations x_BD, each step's batch for all of them; the trained SAEs are `.ae`.

    data: an iterator of (B, D) tensors.
    trainer_configs: the keywords of each trainer, and `trainer`, its class.
    save_dir: every SAE is written to `save_dir/trainer_{i}`.
    normalize_activations: divide by sqrt(mean ||x||^2), measured on the first `norm_batches` batches, which are then
        trained on; the SAEs returned and written take raw activations.
    Raises TextEndedError, a ValueError, when the data end before `steps`.
    """
    folders = [None if save_dir is None else Path(save_dir) / f"trainer_{i}" for i in range(len(trainer_configs))]
    buffer_config = getattr(data, "config", {})
    runs = make_runs(trainer_configs, folders, lambda *_: buffer_config)
    if any(run.place != run.place_out for run in runs):
        raise ValueError("a transcoder needs the activations of two places, and the data are of one.")
    first: list[Tensor] = []
    norm_factor = 1.0
    if normalize_activations:
        for _, x_BD in zip(range(min(norm_batches, steps)), data, strict=False):
            first.append(x_BD)
        norm_factor = estimate_norm_factor(first)
    places = {run.place for run in runs}

    def batches() -> Iterator[dict[Place, Tensor]]:
        for x in first:
            yield dict.fromkeys(places, x)
        for x in data:
            assert isinstance(x, Tensor)
            yield dict.fromkeys(places, x)

    Loop(
        runs,
        batches(),
        dict.fromkeys(places, norm_factor),
        steps,
        save_steps=save_steps,
        log_steps=log_steps,
        autocast_dtype=autocast_dtype,
        show_progress=verbose,
    ).train()
    return [run.trainer for run in runs]


@dataclass
class Loop:
    """The loop over steps.  All SAEs of all places train on the same positions; a failing SAE stops alone.

    runs: the SAEs of this rank. All ranks walk the same steps, and stop and save at the same one.
    batches: {place: x_BD} of raw activations, one a step.
    norm_factors: by place, what activations are divided by in training and SAEs are scaled by when written.
    means: by place, mean_D, what is taken from activations before and SAEs are shifted by when written; none without
        centring.
    save_steps: steps before which a checkpoint is written.
    save_state: called with the step and this rank's part of the state, every `backup_steps` steps or `backup_minutes`,
        and before a stop.
    track: called with (index of the SAE, its metrics) whenever these are logged.
    timings: seconds by part of the pipeline so far, for the progress bar.
    workers: threads that step SAEs side by side, each with operations of one thread; with 1, SAEs are stepped one after
        another by all threads. Their number changes no bit, but sums over parts of a tensor, one a thread, do: 1 worker
        and several differ in the last bits where there are several threads, so the state records it.
    """

    runs: list[SAERun]
    batches: Iterator[dict[Place, Tensor]]
    norm_factors: dict[Place, float]
    steps: int
    save_steps: Sequence[int] = ()
    log_steps: int = 100
    autocast_dtype: torch.dtype = torch.float32
    backup_steps: int | None = None
    backup_minutes: float = math.inf
    save_state: Callable[[int, dict[str, Any]], None] | None = None
    track: Callable[[int, dict[str, Any]], None] | None = None
    timings: Callable[[], dict[str, float]] | None = None
    show_progress: bool = True
    world: World = field(default_factory=World)
    workers: int = 1
    means: Mapping[Place, Tensor] = field(default_factory=dict)
    step: int = 0
    tokens: int = 0
    seconds_in_state: float = 0.0

    def __post_init__(self) -> None:
        for run in self.runs:
            run.config["trainer"]["norm_factor"] = self.norm_factors[run.place]
            if run.place_out != run.place:
                run.config["trainer"]["norm_factor_out"] = self.norm_factors[run.place_out]
        self._pool: ThreadPoolExecutor | None = None
        if self.workers > 1 and not self._independent():
            raise ValueError("SAEs are stepped side by side on the CPU alone, and whole: leave --sae_threads out.")

    def _independent(self) -> bool:
        """Whether the SAEs' steps may overlap: those of shares of SAEs talk to other processes, all in one order."""
        return all(run.trainer.shard.size == 1 and run.trainer.device.type == "cpu" for run in self.runs)

    def train(self) -> None:
        """Run to the end and write every SAE.  Raises Interrupted and, when all is written, TextEndedError."""
        last_backup = time.monotonic()
        for run in self.runs:
            if self.step == 0 and run.metrics_file is not None:
                run.metrics_file.unlink(missing_ok=True)  # of a run that was killed before its first state
        bar = tqdm(total=None, unit="tok", unit_scale=True, desc="training", disable=not self.show_progress)
        bar.total, bar.n = self._total_tokens(), self.tokens
        with signals_noted() as signals, bar, self._side_by_side():
            asked: Callable[[], list[int]] | None = None
            x_by_place: dict[Place, Tensor] | None = {}
            while self.step < self.steps:
                stop, late, alive = (asked or self._ask(signals, last_backup))()
                if stop:
                    self._backup()
                    name = signal.Signals(stop).name
                    raise Interrupted(f"{name}: stopped after step {self.step} of {self.steps}")
                if not alive:
                    break
                if late or (self.backup_steps and self.step % self.backup_steps == 0 and self.step > 0):
                    self._backup()
                    last_backup = time.monotonic()
                if self.step in self.save_steps:
                    self._write_checkpoints()
                if self.world.size > 1:  # answered while the step is done, so that no rank waits for it
                    asked = self._ask(signals, last_backup)
                x_by_place = self._next_batch()
                if x_by_place is None:
                    break
                self._update_all(x_by_place)
                n_tokens = len(next(iter(x_by_place.values())))
                self.step += 1
                self.tokens += n_tokens
                bar.total = self._total_tokens()
                bar.update(n_tokens)
                if self.timings is not None and self.step % self.log_steps == 0:
                    bar.set_postfix(self._shares(), refresh=False)
            if asked is not None and (self.step == self.steps or x_by_place is None):
                asked()
        ended = x_by_place is None
        if ended:
            self._backup()
            for run in self.runs:
                run.config["trainer"]["ended_early"] = {
                    "step": self.step,
                    "steps": self.steps,
                    "tokens": self.tokens,
                }
        self.finish()
        if ended:
            raise TextEndedError(
                f"the text ended after {self.tokens:,} of about {self._total_tokens():,} tokens (step {self.step} of "
                f"{self.steps}); the SAEs are written as they are."
            )

    @contextmanager
    def _side_by_side(self) -> Iterator[None]:
        """Within this, the workers are there."""
        if self.workers == 1:
            yield
            return
        with workers_pool(self.workers) as self._pool:
            yield
        self._pool = None

    def _ask(self, signals: list[str], last_backup: float) -> Callable[[], list[int]]:
        """Of all ranks: the number of a signal or 0, whether a state is late, whether there is an SAE that goes on."""
        return self.world.ask_largest(
            signal.Signals[signals[0]] if signals else 0,
            time.monotonic() - last_backup > 60 * self.backup_minutes,
            any(run.failure is None for run in self.runs),
        )

    def _total_tokens(self) -> int:
        per_step = self.tokens / self.step if self.step else 0
        return int(self.steps * per_step) if per_step else 0

    def _shares(self) -> dict[str, str]:
        assert self.timings is not None
        seconds = self.timings()
        total = sum(seconds.values()) or 1.0
        return {name: f"{100 * value / total:.0f}%" for name, value in seconds.items()}

    def _next_batch(self) -> dict[Place, Tensor] | None:
        """None where the text has ended."""
        try:
            return next(self.batches, None)
        except ConnectionError as error:
            if self.save_state is None:
                raise
            self._backup()
            raise Interrupted(f"{error}; saved after step {self.step} of {self.steps}") from error

    def _update_all(self, x_by_place: dict[Place, Tensor]) -> None:
        normalised: dict[tuple[Place, torch.device], Tensor] = {}
        log = self.step % self.log_steps == 0 or self.step == self.steps - 1
        going = [run for run in self.runs if run.failure is None]
        # of a transcoder both places, of an SAE the one
        wanted = {(place, run.trainer.device): None for run in going for place in (run.place, run.place_out)}
        for place, device in wanted:
            # cast before the division, as the reference does: under bf16 the order shows in the last bit
            x_BD = x_by_place[place].to(device)
            if place in self.means:
                x_BD = x_BD - self.means[place].to(device)  # in fp32
            x_BD = x_BD.to(self.autocast_dtype, copy=True)
            normalised[place, device] = x_BD / self.norm_factors[place]

        def update(run: SAERun) -> dict[str, Any] | None:
            """What is logged of the step; None where nothing is, or where the SAE has failed."""
            places = dict.fromkeys((run.place, run.place_out))
            batch = [normalised[place, run.trainer.device] for place in places]
            with self.world.peers(), autocast(run.trainer.device, self.autocast_dtype):
                out = run.trainer.update(self.step, *batch)
            if not log or bool(run.trainer.stopped):
                return None
            return metrics(self.step, self.tokens + len(batch[-1]), run, batch[-1], out)

        records = map(update, going) if self._pool is None else self._pool.map(update, going)
        for run, record in zip(going, records, strict=True):
            if record is not None:
                self._log(run, record)
            elif log:
                self._fail(run, x_by_place[run.place])

    def _fail(self, run: SAERun, x_BD: Tensor) -> None:
        norms = x_BD.float().norm(dim=-1)
        run.failure = (
            f"its loss or gradient was not finite in or before step {self.step} (activation norms then: "
            f"median {float(norms.median()):.3g}, largest {float(norms.max()):.3g}); "
            "training stopped with the last finite weights"
        )
        if run.trainer.shard.rank == 0:
            tqdm.write(f"{run.folder or type(run.trainer).__name__}: {run.failure}", file=sys.stderr)

    def _log(self, run: SAERun, record: dict[str, Any]) -> None:
        if run.metrics_file is not None:
            append_jsonl(run.metrics_file, record)
        if self.track is not None and run.trainer.shard.rank == 0:
            self.track(run.index, record)

    def _write_checkpoints(self) -> None:
        for run in self.runs:
            if run.failure is None:
                ae = run.trainer.whole_ae()
                if run.folder is not None:
                    ae = copy.deepcopy(ae)
                    self._to_raw(ae, run)
                    save_weights(run.folder / "checkpoints" / f"ae_{self.step}.pt", ae)

    def _to_raw(self, ae: Dictionary, run: SAERun) -> None:
        """Make an SAE that takes activations as they are trained on one that takes raw ones."""
        ae.scale(self.norm_factors[run.place], self.norm_factors[run.place_out])
        if self.means:
            ae.shift(self.means[run.place], self.means[run.place_out])

    def finish(self) -> None:
        """Scale every SAE to raw activations and write it."""
        for run in self.runs:
            ae = run.trainer.whole_ae()
            self._to_raw(ae, run)
            if run.folder is not None:
                save_sae(run.folder, ae, run.saved_config())

    # -- state

    def _backup(self) -> None:
        if self.save_state is not None:
            started = time.monotonic()
            self.save_state(self.step, self.state_dict())
            self.seconds_in_state += time.monotonic() - started

    def state_dict(self) -> dict[str, Any]:
        """What later processes need to go on: with the state of `batches`, to the same bits.

        "loop" from rank 0, "trainers.{i}.{share}" from the rank that trains this share of the latents of SAE i.
        """
        state: dict[str, Any] = {}
        for run in self.runs:
            shard = run.trainer.shard
            entry = {"state": run.trainer.state_dict(), "failure": run.failure, "shares": shard.size}
            state[f"trainers.{run.index}.{shard.rank}"] = entry
        loop = {"step": self.step, "tokens": self.tokens, "workers": self.workers}
        return state | ({"loop": loop} if self.world.rank == 0 else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.tokens = state["loop"]["step"], state["loop"]["tokens"]
        before = state["loop"].get("workers", 1)
        if (before > 1) != (self.workers > 1) and self._independent():
            self.workers = before
        for run in self.runs:
            first = state[f"trainers.{run.index}.0"]
            shares, shard = first["shares"], run.trainer.shard
            if shares == shard.size:
                run.trainer.load_state_dict(state[f"trainers.{run.index}.{shard.rank}"]["state"])
            else:
                run.trainer.load_shares([state[f"trainers.{run.index}.{r}"]["state"] for r in range(shares)])
            run.failure = first["failure"]
            if run.metrics_file is not None:
                rewind_jsonl(run.metrics_file, self.step)  # lines of steps that will be done again

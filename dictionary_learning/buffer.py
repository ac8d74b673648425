"""The activation buffer: batches of text in, shuffled batches of activations out.

    text, in shards -> ActivationSource: LLM, mask, exchange between ranks -> ActivationBuffer: shuffling -> SAEs

B texts or rows in a batch, L positions, D the width of a place (0 for one that no SAE of this rank reads), C capacity,
U unread rows, P positions and N rows of one LLM batch, W LLM batches of a wave.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from .data import MARK
from .sites import Place, by_key, by_place, in_order, key_of, words_of
from .world import World

NORM_FACTOR_BATCHES = 100  # the norm factor is measured on as many batches as the reference does


def _norms(x: Tensor) -> Tensor:
    """fp32 norms over the last dimension, without an fp32 copy of x."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


class Mask(NamedTuple):
    """Which positions an SAE is trained and scored on."""

    drop_bos: bool = True
    norm_bound: float | None = None  # of what it reads: a position of larger norm is an outlier; None: no such rule
    norm_bound_out: float | None = None  # of what a transcoder predicts

    @classmethod
    def of(cls, buffer_config: Mapping[str, Any]) -> "Mask":
        """The mask of an SAE's training, as the "buffer" of its config.json tells; without one, bos alone is out."""
        names = ("median_norm", "median_norm_out", "max_norm_multiple")
        *medians, multiple = numbers = [buffer_config.get(name) for name in names]
        drop_bos = buffer_config.get("mask", True)
        are_numbers = all(value is None or (type(value) in (int, float) and value >= 0) for value in numbers)
        if type(drop_bos) is not bool or not are_numbers or (any(medians) and multiple is None):
            said = ", ".join(
                f"{name} {value!r}" for name, value in zip(names, numbers, strict=True) if value is not None
            )
            said = f"mask {drop_bos!r}, {said or 'no norms'}"
            raise ValueError(f"its config.json says what a mask cannot be ({said}); restore it from a copy")
        return cls(drop_bos, *(median * multiple if median else None for median in medians))

    def bounds(self, place: Place, place_out: Place | None = None) -> dict[Place, float] | None:
        """What `position_mask` takes, of an SAE that reads a place and predicts another if it is a transcoder."""
        both = {place: self.norm_bound} | ({} if place_out in (None, place) else {place_out: self.norm_bound_out})
        known = {place: bound for place, bound in both.items() if bound is not None}
        return {place: known.get(place, math.inf) for place in both} if known else None


def inner_positions(mask_BL: Tensor, drop_bos: bool = True) -> Tensor:
    """What is text, and with `drop_bos` no mark between texts: all of the mask that the activations play no part in."""
    return (mask_BL > 0) & (mask_BL < MARK) if drop_bos else mask_BL > 0


def position_mask(
    mask_BL: Tensor,
    x_by_layer: dict[Place, Tensor],
    norm_bound: dict[Place, float] | None = None,
    drop_bos: bool = True,
) -> tuple[Tensor, dict[str, int]]:
    """The positions that SAEs are trained and scored on, the same in the norm estimate, training and metrics.

    Dropped are padding, with `drop_bos` the marks that were put between the texts (bos, what joins packed documents;
    not the same tokens where the text has them), the positions whose activation in any layer is not finite, and those
    whose norm in any layer is above its bound.
    mask_BL: 0 is padding, 1 text, `MARK` a mark; one of bools tells no marks.
    norm_bound: {layer: largest norm}, None to keep all norms. x_by_layer: {layer: x_BLD}.
    Returns keep_BL on the activations' device, and the counts of "tokens" (positions that are not padding),
    "padding", "bos", "nonfinite" and "outliers"; what is kept is tokens - bos - nonfinite - outliers.
    """
    device = next(iter(x_by_layer.values())).device
    mask_BL = mask_BL.to(device)
    text_BL = mask_BL > 0
    inner_BL = inner_positions(mask_BL, drop_bos)
    finite_BL, keep_BL = inner_BL, inner_BL
    for layer, x_BLD in x_by_layer.items():
        norms_BL = _norms(x_BLD)
        finite_BL = finite_BL & norms_BL.isfinite()
        if norm_bound is not None:
            keep_BL = keep_BL & (norms_BL <= norm_bound[layer])
    keep_BL = keep_BL & finite_BL
    sums = [part_BL.sum() for part_BL in (text_BL, ~text_BL, text_BL ^ inner_BL, inner_BL ^ finite_BL)]
    counts = torch.stack([*sums, (finite_BL ^ keep_BL).sum()]).tolist()
    names: list[str] = ["tokens", "padding", "bos", "nonfinite", "outliers"]
    return keep_BL, dict(zip(names, counts, strict=True))


# what to do where a dtype's range is too small for a model
WIDER = {torch.float16: "run the model with --dtype bfloat16", torch.bfloat16: "run the model with --dtype float32"}
MOST_NONFINITE = 1 / 1000  # of the positions
FEW_POSITIONS = 100_000  # before so many are read, the share is taken of this number


def nonfinite_sentence(counts: Mapping[str, int], lm: Any) -> str | None:
    """What to say of the "nonfinite" among the counts of `position_mask`; None where all are finite."""
    if not counts["nonfinite"]:
        return None
    return (
        f"{counts['nonfinite']:,} of {counts['tokens']:,} positions have activations of {lm.name} that are not finite "
        f"in {lm.dtype}: {WIDER.get(lm.dtype, 'look for the fault in the model itself')}"
    )


def too_many_nonfinite(counts: Mapping[str, int], at_least: int = 1) -> bool:
    """Whether these are more than leaving them out can mend; at_least: of so many, where fewer were read so far."""
    return counts["nonfinite"] > MOST_NONFINITE * max(counts["tokens"], at_least)


class Positions(NamedTuple):
    """The positions of one LLM batch, in a row: what `position_mask` takes, and what it cannot see.

    bos, padding: how many are left out already.
    """

    x_by_layer: dict[Place, Tensor]  # {layer: x_PD}
    mask_P: Tensor
    n_texts: int
    length: int
    bos: int = 0
    padding: int = 0


@dataclass
class Wave:
    """LLM batches that the ranks run at the same time: {layer: x_ND} of each, there after `arrived()`."""

    batches: list[dict[Place, Tensor]]
    n_rows: int
    arrived: Callable[[], None]


class ActivationSource:
    """The activations of all unmasked positions of the text, {layer: x_ND} an LLM batch.

    The text comes in S shards that take turns: LLM batch i is of shard i % S, and a shard that has ended is passed
    over. Rank s % world.size runs the LLM on shard s, and the rows of a layer travel to the ranks that read it; neither
    their order nor their bits depend on the number of ranks. The ranks work in waves: each runs its batches of the next
    turns, all learn how many rows these have, and while the rows travel the next wave is run.

    shards: for each an iterator of (tokens_BL, mask_BL) with state_dict and load_state_dict; None where the LLM runs
        on another rank.
    readers: {layer: the ranks that have SAEs of it}.
    """

    _PLAIN_STATE = (
        "counts",
        "seconds",
        "llm_batch_halvings",
        "llm_batch_size",
        "context_length",
        "median_norms",
        "_turn",
    )
    COUNTS = ("tokens", "padding", "bos", "nonfinite", "outliers")
    _REPORT = ("rows", "ended", "failed", "texts", "length", "halvings", *COUNTS)

    def __init__(
        self,
        shards: Sequence[Any],
        lm: Any,
        layers: Sequence[Place],
        readers: Mapping[Place, Sequence[int]],
        world: World,
        *,
        device: torch.device,
        mask: bool,
        max_norm_multiple: float,
    ):
        self.shards, self.lm, self.layers, self.readers, self.world = shards, lm, layers, readers, world
        self.device, self.mask, self.max_norm_multiple = device, mask, max_norm_multiple
        # equal on all ranks, except for the seconds
        self.counts: dict[str, int] = dict.fromkeys(self.COUNTS, 0)
        self.seconds = {"text": 0.0, "llm": 0.0} | ({"exchange": 0.0} if world.size > 1 else {})
        self.llm_batch_halvings = 0
        self.llm_batch_size = self.context_length = 0  # the largest seen
        self.median_norms: dict[Place, float] = {}
        self._warned = False
        self._turn = 0
        self._ended = [False] * len(shards)
        self._put_back: dict[int, tuple[Any, Any]] = {}  # {shard: (a batch to be taken again, the state before it)}
        self._under_way: Wave | None = None

    def width(self, layer: Place) -> int:
        """D of the rows that this rank gets."""
        return self.lm.width(layer) if self.world.rank in self.readers[layer] else 0

    @property
    def text_is_left(self) -> bool:
        """Whether there may be more to read: false when all shards are known to have ended."""
        return self._under_way is not None or not all(self._ended)

    def norm_bound(self) -> dict[Place, float] | None:
        return {layer: self.max_norm_multiple * median for layer, median in self.median_norms.items()} or None

    def read(self, n_rows: int) -> list[dict[Place, Tensor]]:
        """The next batches: as many as `n_rows` rows surely need, at least one; none at the end of the text.

        Raises ConnectionError on all ranks where the text of one cannot be reached; nothing is lost.
        """
        wave = self._under_way = self._under_way or self._start(n_rows)
        missing = n_rows - wave.n_rows
        # one rank alone has nothing to wait for, and the rows of two waves take more memory
        goes_on = self.world.size > 1 and missing > 0 and not all(self._ended)
        self._under_way = self._start(missing) if goes_on else None
        return self._arrived(wave)

    def drain(self) -> list[dict[Place, Tensor]]:
        """The batches that are under way because the wave after them failed."""
        wave, self._under_way = self._under_way, None
        return [] if wave is None else self._arrived(wave)

    def _arrived(self, wave: Wave) -> list[dict[Place, Tensor]]:
        start = perf_counter()
        wave.arrived()
        if self.world.size > 1:
            self.seconds["exchange"] += perf_counter() - start
        return wave.batches

    def _runner(self, shard: int) -> int:
        return shard % self.world.size

    def _mine(self) -> list[int]:
        return [s for s in range(len(self.shards)) if self._runner(s) == self.world.rank]

    def _next_turns(self, n_rows: int) -> list[int]:
        """The shards of a wave, each at most once: a single one until the norms are known that the others need."""
        order = [(self._turn + i) % len(self.shards) for i in range(len(self.shards))]
        most_rows = self.llm_batch_size * self.context_length
        n_batches = math.ceil(n_rows / most_rows) if most_rows and (self.median_norms or not self.mask) else 1
        return [s for s in order if not self._ended[s]][:n_batches]

    def _start(self, n_rows: int) -> Wave:
        """Run the LLM on this rank's batches of a wave, and begin to send and receive rows."""
        turns, me = self._next_turns(n_rows), self.world.rank
        reports_W = torch.zeros(len(turns), len(self._REPORT) + len(self.layers), dtype=torch.float64)
        taken: dict[int, tuple[Any, Any]] = {}
        made: dict[int, dict[Place, Tensor]] = {}
        failure: ConnectionError | None = None
        for report, s in zip(reports_W, turns, strict=True):
            if self._runner(s) == me and failure is None:
                try:
                    taken[s] = self._take(s)
                except ConnectionError as error:
                    failure = error
                    report[self._REPORT.index("failed")] = 1
                    continue
                if taken[s][0] is None:
                    report[self._REPORT.index("ended")] = 1
                else:
                    made[s], numbers = self._run(s, taken[s][0])
                    report.copy_(torch.tensor(numbers, dtype=torch.float64))
        start = perf_counter()
        self.world.sum_(reports_W)
        if self.world.size > 1:
            self.seconds["exchange"] += perf_counter() - start
        if reports_W[:, self._REPORT.index("failed")].any():
            self._put_back |= taken
            sentences = self.world.gather(None if failure is None else str(failure))
            raise ConnectionError(next(s for s in sentences if s is not None)) from failure

        batches, sends, receives, n_rows = [], [], [], 0
        for report, s in zip(reports_W.tolist(), turns, strict=True):
            self._turn = (s + 1) % len(self.shards)
            N = self._note(s, report)
            if N is None:
                continue
            x_by_layer = made.get(s) or {layer: self._empty(N, self.width(layer)) for layer in self.layers}
            for layer, x_ND in x_by_layer.items() if N else ():
                sends += [(x_ND, r) for r in self.readers[layer] if self._runner(s) == me != r]
                receives += [(x_ND, self._runner(s)) for r in self.readers[layer] if r == me != self._runner(s)]
            batches.append({k: x_ND if self.width(k) else self._empty(N, 0) for k, x_ND in x_by_layer.items()})
            n_rows += N
        return Wave(batches, n_rows, self.world.exchange(sends, receives))

    def _empty(self, N: int, D: int) -> Tensor:
        return torch.empty(N, D, dtype=self.lm.dtype, device=self.device)

    def _note(self, shard: int, report: list[float]) -> int | None:
        """Keep what the rank that ran a batch says about it. Returns its rows; None for the end of the shard."""
        numbers = {name: int(value) for name, value in zip(self._REPORT, report, strict=False)}
        if numbers["ended"]:
            self._ended[shard] = True
            return None
        self.counts = {name: count + numbers[name] for name, count in self.counts.items()}
        self.llm_batch_size = max(self.llm_batch_size, numbers["texts"])
        self.context_length = max(self.context_length, numbers["length"])
        self.llm_batch_halvings = max(self.llm_batch_halvings, numbers["halvings"])
        self.check_finite(at_least=FEW_POSITIONS)
        medians = dict(zip(self.layers, report[len(self._REPORT) :], strict=True))
        if not self.median_norms and all(medians.values()):
            self.median_norms = medians
        return numbers["rows"]

    def check_finite(self, at_least: int = 1) -> None:
        """Warn once of activations that are not finite; ValueError, on all ranks, where they are too many."""
        sentence = nonfinite_sentence(self.counts, self.lm)
        if too_many_nonfinite(self.counts, at_least):
            raise ValueError(sentence)
        if sentence and not self._warned and at_least == 1 and self.world.rank == 0:
            self._warned = True
            warnings.warn(f"{sentence}; these are left out", stacklevel=2)

    def _take(self, shard: int) -> tuple[Any, Any]:
        """(the next batch of a shard or None, the state before it)."""
        if shard in self._put_back:
            return self._put_back.pop(shard)
        start, state = perf_counter(), self.shards[shard].state_dict()
        batch = next(self.shards[shard], None)
        self.seconds["text"] += perf_counter() - start
        return batch, state

    def _run(self, shard: int, batch: Any) -> tuple[dict[Place, Tensor], list[float]]:
        """{layer: x_ND} of the unmasked positions of a batch of a shard, and the report about it."""
        start = perf_counter()
        x_by_layer, mask_P, *about = self._positions(shard, batch)
        n_texts, length, bos, padding = about
        medians = {}
        if self.mask and not self.median_norms:
            medians = self.median_norms = self._medians(mask_P, x_by_layer)
        keep_P, counts = position_mask(mask_P, x_by_layer, self.norm_bound(), drop_bos=self.mask)
        kept_N = keep_P.nonzero().squeeze(1)
        rows = {k: x_PD.index_select(0, kept_N).to(self.device, self.lm.dtype) for k, x_PD in x_by_layer.items()}
        self.seconds["llm"] += perf_counter() - start
        for name, n in {"tokens": bos, "bos": bos, "padding": padding}.items():
            counts[name] += n
        said = {"rows": len(kept_N), "ended": 0, "failed": 0, "texts": n_texts, "length": length}
        said |= {"halvings": self.llm_batch_halvings, **counts}
        return rows, [*(said[name] for name in self._REPORT), *(medians.get(layer, 0.0) for layer in self.layers)]

    def _positions(self, shard: int, batch: Any) -> Positions:
        """The activations of a batch of a shard, by the LLM."""
        tokens_BL, mask_BL = batch
        x_by_layer = self._activations(tokens_BL, mask_BL)
        # a model that is spread over devices has its layers on several
        flat = {k: rearrange(x_BLD, "b l d -> (b l) d").to(self.lm.device) for k, x_BLD in x_by_layer.items()}
        return Positions(flat, mask_BL.flatten(), *tokens_BL.shape)

    def _medians(self, mask_P: Tensor, x_by_layer: dict[Place, Tensor]) -> dict[Place, float]:
        """{layer: median norm} over the positions that are text and finite; empty where there are none."""
        keep_P, _ = position_mask(mask_P, x_by_layer)
        if not keep_P.any():
            return {}
        medians = {layer: _norms(x_PD)[keep_P].median().item() for layer, x_PD in x_by_layer.items()}
        for layer, median in medians.items():
            if median == 0:
                raise ValueError(
                    f"most activations of {words_of(layer)} of {self.lm.name} are 0 in {self.lm.dtype}: "
                    "try another dtype"
                )
        return medians

    def _activations(self, tokens_BL: Tensor, mask_BL: Tensor) -> dict[Place, Tensor]:
        """{layer: x_BLD} of a batch of text, run in halves where the device has no memory for all of it at once."""
        while True:
            n_parts = min(2**self.llm_batch_halvings, len(tokens_BL))
            parts = zip(tokens_BL.chunk(n_parts), mask_BL.chunk(n_parts), strict=True)
            try:
                x_by_part = [self.lm.activations(tokens, mask, self.layers) for tokens, mask in parts]
                if n_parts == 1:
                    return x_by_part[0]
                return {layer: torch.cat([x[layer] for x in x_by_part]) for layer in self.layers}
            except torch.OutOfMemoryError as error:
                if n_parts == len(tokens_BL):
                    raise ValueError(
                        f"{self.lm.device} has no memory to run {self.lm.name} on one text of {tokens_BL.shape[1]} "
                        "tokens: use a smaller buffer, shorter contexts or fewer SAEs"
                    ) from error
            self.llm_batch_halvings += 1

    def state_dict(self) -> dict[str, Any]:
        """{"source": what all ranks know, from rank 0; "text.{s}": the place in shard s, from its rank}."""
        state = {
            f"text.{s}": self._put_back[s][1] if s in self._put_back else self.shards[s].state_dict()
            for s in self._mine()
        }
        if self.world.rank == 0:
            state["source"] = deepcopy({name: getattr(self, name) for name in self._PLAIN_STATE})
            state["source"]["median_norms"] = by_key(self.median_norms)
        return state

    def load_state_dict(self, state: Mapping[str, Any], new_text: bool = False) -> None:
        seconds = self.seconds
        for name in self._PLAIN_STATE:
            setattr(self, name, deepcopy(state["source"][name]))
        self.median_norms = by_place(self.median_norms, self.layers)
        self.counts = {name: self.counts.get(name, 0) for name in self.COUNTS}  # of an older state too
        self.seconds = {name: self.seconds.get(name, 0.0) for name in seconds}
        self._put_back.clear()
        self._ended = [False] * len(self.shards)  # there may be more text by now
        for s in [] if new_text else self._mine():
            self.shards[s].load_state_dict(state[f"text.{s}"])


class ActivationBuffer:
    """An iterator over {layer: x_BD}: raw activations of the same B random positions of the text, in the LLM's dtype.

    Every position of the text that is not masked is served exactly once; the last batch may be shorter. The buffer
    is filled from the text until C positions are in it, and filled up again when fewer than half are unread.

    Over several ranks, all serve the same positions in the same order, each the layers that it reads; the others come
    as (B, 0).

    batches: iterator of (tokens_BL, mask_BL) with state_dict and load_state_dict, or a list of them, the shards of the
        text (`ActivationSource`).
    lm: a `model.LanguageModel` (what is used: activations, activation_dim, name, device, dtype).
    n_tokens: C. seed: of the order in which positions are served.
    mask: False keeps every position that is not padding.
    max_norm_multiple: positions are dropped above this multiple of the median norm of their layer.
    readers: {layer: the ranks that read it}, all of them by default.
    source: where the activations come from, the LLM or, with `cache.CachedSource`, the disk.
    works_ahead: while batches are served, the next fill is read by a thread and, on CUDA, on a stream of its own, which
        takes memory for half as many rows again; by default on CUDA, in one process. It changes nothing that is served.
    Raises ValueError where C is smaller than a batch and, at the first fill, where the whole text is; and where more
    than a thousandth of the positions have activations that are not finite. Of fewer it warns, once.
    """

    def __init__(
        self,
        batches: Any,
        lm: Any,
        layers: Iterable[Place],
        *,
        n_tokens: int,
        out_batch_size: int,
        device: str | torch.device | None = None,
        seed: int = 0,
        mask: bool = True,
        max_norm_multiple: float = 10.0,
        world: World | None = None,
        readers: Mapping[Place, Sequence[int]] | None = None,
        source: type[ActivationSource] = ActivationSource,
        works_ahead: bool | None = None,
    ):
        if n_tokens < out_batch_size:
            raise ValueError(f"a buffer of {n_tokens} tokens is smaller than a batch of {out_batch_size}: enlarge it")
        self.lm, self.layers, self.world = lm, in_order(layers), world or World()
        self.n_tokens, self.out_batch_size = n_tokens, out_batch_size
        self.device = torch.device(lm.device if device is None else device)
        self.generator = torch.Generator().manual_seed(seed)
        self.source = source(
            batches if isinstance(batches, list) else [batches],
            lm,
            self.layers,
            readers or dict.fromkeys(self.layers, range(self.world.size)),
            self.world,
            device=self.device,
            mask=mask,
            max_norm_multiple=max_norm_multiple,
        )
        alone = self.world.size == 1
        works_ahead = alone and self.device.type == "cuda" if works_ahead is None else works_ahead
        assert alone or not works_ahead, "several ranks read in turns"
        self._reader = ThreadPoolExecutor(1, "ahead") if works_ahead else None
        self._ahead: Future[list[dict[Place, Tensor]]] | None = None
        self._norm_factors: dict[Place, float] = {}
        self._spreads: dict[Place, float] = {}
        self._means: dict[Place, Tensor] = {}

        # rows order_C[cursor:] are unread, and read in this order; rows order_C[:cursor] are free
        self._rows_CD = {
            layer: torch.empty(n_tokens, self.source.width(layer), dtype=lm.dtype, device=self.device)
            for layer in self.layers
        }
        self._order_C = torch.arange(n_tokens, device=self.device)
        self._cursor = n_tokens
        self._surplus: deque[dict[Place, Tensor]] = deque()  # {layer: x_ND}, read and not yet written
        self._filling = False  # stays true where an error of the text cut a fill short: the next one completes it

    def __iter__(self) -> "ActivationBuffer":
        return self

    def __next__(self) -> dict[Place, Tensor]:
        self._fill_first()
        n_unread = self.n_tokens - self._cursor
        if self._filling or (self._more_is_left and 2 * n_unread < self.n_tokens):
            self._fill()
        self._work_ahead()
        rows_B = self._order_C[self._cursor : self._cursor + self.out_batch_size]
        if len(rows_B) == 0:
            raise StopIteration
        self._cursor += len(rows_B)
        return {layer: x_CD.index_select(0, rows_B) for layer, x_CD in self._rows_CD.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Positions of the text so far, on all ranks, by what `position_mask` calls them."""
        return self.source.counts

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that this rank has spent on "text", "llm" and, with several ranks, "exchange"."""
        return self.source.seconds

    @property
    def llm_batch_halvings(self) -> int:
        return self.source.llm_batch_halvings

    @property
    def norm_factors(self) -> dict[Place, float]:
        """{layer: sqrt(mean of |x|^2)} over the first 100 batches in the first fill, or all of it; fp32."""
        self._fill_first()
        return self._norm_factors

    @property
    def means(self) -> dict[Place, Tensor]:
        """{layer: mean_D} over the same batches; fp32, on the CPU, of all layers on every rank."""
        self._fill_first()
        return self._means

    @property
    def spreads(self) -> dict[Place, float]:
        """{layer: sqrt(mean of |x - mean|^2)} over the same batches."""
        self._fill_first()
        return self._spreads

    @property
    def mean_to_std(self) -> dict[Place, float]:
        """{layer: |mean| / spread}: how far from the origin activations lie, against how far from each other."""
        return {layer: mean_D.norm().item() / (self.spreads[layer] or 1.0) for layer, mean_D in self.means.items()}

    @property
    def median_norms(self) -> dict[Place, float]:
        """{layer: median norm} over the first LLM batch without bos and padding; empty with mask=False."""
        self._fill_first()
        return self.source.median_norms

    @property
    def norm_bound(self) -> dict[Place, float] | None:
        """What `position_mask` takes: {layer: largest norm}, None with mask=False."""
        self._fill_first()
        return self.source.norm_bound()

    def _fill_first(self) -> None:
        if self._norm_factors:
            return
        self._fill()
        n_unread = self.n_tokens - self._cursor
        if n_unread < self.out_batch_size:
            raise ValueError(
                f"the text has {n_unread} positions to train on, fewer than a batch of {self.out_batch_size}: "
                "give it more text"
            )
        first = self._order_C[self._cursor :][: NORM_FACTOR_BATCHES * self.out_batch_size].split(self.out_batch_size)
        n_rows = sum(map(len, first))
        widths = [self.lm.width(layer) for layer in self.layers]
        moments = torch.zeros(len(self.layers), 2 + max(widths), dtype=torch.float64)
        for i, layer in enumerate(self.layers):
            if self._speaks_for(layer):
                x_CD = self._rows_CD[layer]
                sums = [x_CD.index_select(0, rows_B).float().sum(0).cpu().double() for rows_B in first]
                mean_D = (torch.stack(sums).sum(0) / n_rows).float()
                norms = [_norms(x_CD.index_select(0, rows_B)).cpu() for rows_B in first]
                centred = [_norms(x_CD.index_select(0, rows_B) - mean_D.to(x_CD.device)).cpu() for rows_B in first]
                for j, part in enumerate((norms, centred)):
                    moments[i, j] = torch.cat(part).double().square().mean().sqrt()
                moments[i, 2 : 2 + widths[i]] = mean_D
        moments = self.world.sum_(moments)
        factors, spreads = moments[:, :2].T.tolist()
        self._norm_factors = dict(zip(self.layers, factors, strict=True))
        self._spreads = dict(zip(self.layers, spreads, strict=True))
        means = [moments[i, 2 : 2 + width].float() for i, width in enumerate(widths)]
        self._means = dict(zip(self.layers, means, strict=True))

    def _speaks_for(self, layer: Place) -> bool:
        """Whether, of the ranks that read a layer and all have the same rows of it, this one says what they are."""
        return self.world.rank == min(self.source.readers[layer])

    @property
    def _more_is_left(self) -> bool:
        return self.source.text_is_left or bool(self._surplus) or self._ahead is not None

    def _work_ahead(self) -> None:
        """Take what the reader has, and have it read on until half a buffer is there for the next fill."""
        if self._reader is None:
            return
        if self._ahead is not None and self._ahead.done() and self._ahead.exception() is None:
            self._take_ahead()  # an error waits for the fill that needs the rows
        n_rows = sum(len(x_by_place[self.layers[0]]) for x_by_place in self._surplus)
        if self._ahead is None and self.source.text_is_left and 2 * n_rows < self.n_tokens:
            self._ahead = self._reader.submit(self._read_ahead)

    def _read_ahead(self) -> list[dict[Place, Tensor]]:
        if self.device.type != "cuda":
            return self.source.read(1)
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream(self.device)):
            batches = self.source.read(1)
            torch.cuda.current_stream(self.device).synchronize()
            return batches

    def _take_ahead(self) -> None:
        """Put what was read ahead, once it is there, where a fill finds it.  Raises what the reading raised."""
        if self._ahead is None:
            return
        ahead, self._ahead = self._ahead, None
        for x_by_place in ahead.result():
            for x_ND in x_by_place.values() if self.device.type == "cuda" else ():
                x_ND.record_stream(torch.cuda.current_stream(self.device))  # it was made on another one
            self._surplus.append(x_by_place)

    def _fill(self) -> None:
        """Write new activations into the free rows until none is left or the text ends; shuffle the unread rows.

        Where the text has ended already nothing is new and nothing shuffled: a resumed buffer has to ask once more.
        """
        is_new, self._filling = self._filling, True
        while self._cursor > 0:
            self._take_ahead()
            while not self._surplus and self.source.text_is_left:
                self._surplus.extend(self.source.read(self._cursor))
            if not self._surplus:
                break
            x_by_layer = self._surplus.popleft()
            n = min(self._cursor, len(x_by_layer[self.layers[0]]))
            # backwards from the cursor, so that where a position lands does not depend on the LLM's batch size
            rows_n = self._order_C[self._cursor - n : self._cursor].flip(0)
            for layer, x_ND in x_by_layer.items():
                self._rows_CD[layer].index_copy_(0, rows_n, x_ND[:n])
            rest = {layer: x_ND[n:] for layer, x_ND in x_by_layer.items()}
            if len(rest[self.layers[0]]):
                self._surplus.appendleft(rest)
            self._cursor -= n
            is_new |= n > 0
        self.source.check_finite()
        if is_new:
            unread_U = self._order_C[self._cursor :]
            order_U = torch.randperm(len(unread_U), generator=self.generator).to(self.device)
            self._order_C[self._cursor :] = unread_U[order_U]
        self._filling = False

    def config(self, layer: Place, layer_out: Place | None = None) -> dict[str, Any]:
        """What the "buffer" of a config.json records of an SAE that reads a place, as plain JSON values.

        layer_out: what it predicts, of a transcoder.
        """
        assert layer in self.layers
        self._fill_first()
        source, about_target = self.source, {}
        if layer_out not in (None, layer):
            about_target["hf_hook_name_out"] = self.lm.hook_name(layer_out)
            about_target["median_norm_out"] = source.median_norms.get(layer_out)
        return {
            "d_submodule": self.lm.width(layer),
            "io": "out" if layer_out in (None, layer) else "in_and_out",
            "hf_hook_name": self.lm.hook_name(layer),
            "n_ctxs": self.n_tokens // source.context_length,
            "ctx_len": source.context_length,
            "refresh_batch_size": source.llm_batch_size,
            "out_batch_size": self.out_batch_size,
            "device": str(self.device),
            "mask": source.mask,
            "max_norm_multiple": source.max_norm_multiple if source.mask else None,
            "median_norm": source.median_norms.get(layer),
            **about_target,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the batches to come depend on, on the CPU; plain Python and tensors, by what they are.

        "rows.{layer}" comes from the lowest rank that reads the layer, "buffer" from rank 0, the rest is that of
        `ActivationSource`: any number of ranks can go on from what all of them give. Of the rows only the unread ones,
        in the order in which they will be served: where in memory they lie changes nothing that comes out.
        """
        self._take_ahead()
        self._surplus.extend(self.source.drain())
        state = self.source.state_dict()
        unread = self._order_C[self._cursor :].split(self.out_batch_size)
        for layer, x_CD in self._rows_CD.items():
            if self._speaks_for(layer):
                state[f"rows.{key_of(layer)}"] = {
                    "unread_UD": torch.cat([x_CD.index_select(0, rows_B).cpu() for rows_B in unread]),
                    "surplus_ND": [x_by_layer[layer].to("cpu", copy=True) for x_by_layer in self._surplus],
                }
        if self.world.rank == 0:
            state["buffer"] = {
                "n_unread": self.n_tokens - self._cursor,
                "n_surplus": [len(x_by_layer[self.layers[0]]) for x_by_layer in self._surplus],
                "generator": self.generator.get_state(),
                "norm_factors": by_key(self._norm_factors),
                "spreads": by_key(self._spreads),
                "means": by_key({layer: mean_D.clone() for layer, mean_D in self._means.items()}),
                "filling": self._filling,
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any], new_text: bool = False) -> None:
        """Continue where the buffers that gave the state stood; all must be constructed alike, but for the ranks.

        new_text: the text is another one, and is read from its start.
        """
        self.source.load_state_dict(state, new_text)
        plain = state["buffer"]
        self._cursor = self.n_tokens - plain["n_unread"]
        self._order_C = torch.arange(self.n_tokens, device=self.device)
        self._surplus = deque({} for _ in plain["n_surplus"])
        for layer, x_CD in self._rows_CD.items():
            surplus = [x_CD.new_empty(n, 0) for n in plain["n_surplus"]]
            if self.source.width(layer):
                rows = state[f"rows.{key_of(layer)}"]
                x_CD[self._cursor :] = rows["unread_UD"].to(self.device)
                surplus = [x_ND.to(self.device) for x_ND in rows["surplus_ND"]]
            for x_by_layer, x_ND in zip(self._surplus, surplus, strict=True):
                x_by_layer[layer] = x_ND
        self.generator.set_state(plain["generator"])
        self._filling = plain["filling"]
        self._norm_factors = by_place(plain["norm_factors"], self.layers)
        self._spreads, self._means = (by_place(plain.get(name, {}), self.layers) for name in ("spreads", "means"))

"""The processes of a run. torchrun starts them, torch.distributed connects them; one process is a world of one.

A rank is a process. Every rank calls the methods that talk to others in the same order; in a world of one they return
what they are given.
"""

import hashlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .kernels import WHOLE, Shard

T = TypeVar("T")


class LostProcess(Exception):
    """Another process of the run has ended or does not answer, so this one cannot go on."""


class AgreedError(ValueError):
    """The same error on every rank, at the same place of the program."""


@contextmanager
def _peers() -> Iterator[None]:
    """Around what needs the other ranks: the errors that mean that one of them is gone become LostProcess."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no error type of its own: its messages come from the pairs of sockets and from its timeouts
        lost = ("gloo", "Connection", "onnection closed", "Broken pipe", "imed out", "imeout", "NCCL")
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in lost):
            raise
        reason = str(error).strip().split("\n")[0].rpartition("] ")[2][:200]
        raise LostProcess(f"a process of the run was lost ({reason})") from error


@dataclass
class World:
    """All ranks, seen from one. `World()` is the world of one process.

    rank: the number of this process, of 0 to size - 1; local_rank: its number on this machine.
    bytes_sent: of activations, by this rank to others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    bytes_sent: int = 0
    _store: Any = None

    @classmethod
    def start(cls, timeout_minutes: float) -> "World":
        """The world that torchrun's environment describes. Ranks wait for each other at most so long, here and later.

        Raises LostProcess where they do not all come.
        """
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls()
        timeout = timedelta(minutes=timeout_minutes)
        with _peers():
            store, rank, _ = next(rendezvous("env://", timeout=timeout))
            # torchrun may keep its store over restarts: the addresses in it are those of processes that have ended
            store = PrefixStore(f"start {_n_restarts()}", store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", 0)), _store=store)

    def place(self, device: torch.device) -> torch.device:
        """Where this rank works when the user asked for `device`: of cuda, the GPU with its number on this machine."""
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise ValueError(f"--device {device} cannot be shared by {self.size} processes: give cuda or cpu.")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"there are {torch.cuda.device_count()} GPUs on {socket.gethostname()} and more processes: "
                "start as many as there are GPUs (--nproc_per_node)."
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def connect(self, device: torch.device) -> None:
        """Before the first exchange between such devices: NCCL wants all ranks in its first call."""
        if self.size > 1 and device.type == "cuda":
            with _peers():
                dist.all_reduce(torch.zeros(1, device=device))

    def split(self, n: int) -> Shard:
        """This rank's share where the latents of every SAE are split over n neighbouring ranks."""
        if n == 1:
            return WHOLE
        with _peers():
            groups = [dist.new_group(range(first, first + n)) for first in range(0, self.size, n)]
        return Shard(self.rank % n, n, groups[self.rank // n])

    # -- small things: what is decided and counted together

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank. They must be plain and small."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(values, value)
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """Add up a CPU tensor over the ranks, in place."""
        if self.size > 1:
            with _peers():
                dist.all_reduce(values)
        return values

    def ask_largest(self, *values: int) -> Callable[[], list[int]]:
        """Begin to find the largest of each value over the ranks; what is returned waits for it."""
        if self.size == 1:
            return lambda: list(values)
        largest = torch.tensor(values)
        with _peers():
            work = dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True)

        def answer() -> list[int]:
            with _peers():
                assert work is not None
                work.wait()
            return largest.tolist()

        return answer

    def together(self, work: Callable[[], T], *, rank: int | None = None) -> T:
        """Do `work` on every rank and return each its own result, or on one `rank` and return its result to all.

        Where it raises ValueError or OSError on any rank, all raise the same AgreedError.
        """
        if self.size == 1:
            return work()
        result, sentence = None, None
        if rank in (None, self.rank):
            try:
                result = work()
            except (ValueError, OSError) as error:
                sentence = str(error)
        answers = self.gather((sentence, None if rank is None else result))
        told = {i: answer[0] for i, answer in enumerate(answers) if answer[0] is not None}
        if told:
            first, everywhere = min(told), rank is not None or (len(told) == self.size and len({*told.values()}) == 1)
            raise AgreedError(told[first] if everywhere else f"rank {first}: {told[first]}")
        return result if rank is None else answers[rank][1]  # pyright: ignore[reportReturnType]

    @contextmanager
    def peers(self) -> Iterator[None]:
        """Around torch's own functions that talk to all ranks."""
        with _peers():
            yield

    # -- large things: activations

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> Callable[[], None]:
        """Begin to send and receive (tensor, other rank); what is returned waits for all of it.

        Between two ranks, tensors are matched by their order. They are contiguous, and stay untouched until then.
        """
        if not sends and not receives:
            return lambda: None
        # as bytes, since gloo does not know every dtype
        ops = [dist.P2POp(dist.isend, x.view(torch.uint8), rank) for x, rank in sends]
        ops += [dist.P2POp(dist.irecv, x.view(torch.uint8), rank) for x, rank in receives]
        self.bytes_sent += sum(x.nbytes for x, _ in sends)
        with _peers():
            works = dist.batch_isend_irecv(ops)

        def wait() -> None:
            with _peers():
                for work in works:
                    work.wait()
            ops.clear()  # the tensors that were sent

        return wait

    # -- the end

    def tell(self, sentence: str) -> None:
        """Say it to the user, unless another rank has told already why the run ends."""
        if self.size > 1:
            try:
                if self._store.add("told", 1) > 1:
                    return
            except RuntimeError:
                pass  # the store has gone with the process that held it: better twice than not at all
        print(sentence, file=sys.stderr, flush=True)  # noqa: T201

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def job() -> str | None:
    """What tells this job of torchrun from others, and not its restarts from each other; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name == "none":  # torchrun's default: then it is the process on this machine that has started us
        return hashlib.sha256(f"{socket.gethostname()} {os.getppid()}".encode()).hexdigest()[:16]
    return name


def restarted() -> bool:
    """Whether torchrun has started these processes in place of ones that failed (--max_restarts)."""
    return _n_restarts() > 0


def _n_restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def spread(costs: Sequence[int], places: Sequence[Any], n_owners: int) -> list[int]:
    """The owner of each SAE, such that owners have about equal work: the costliest first, to who has least.

    Among equals it goes to one who has the place already: activations travel to fewer ranks.
    """
    loads, has = [0] * n_owners, [set() for _ in range(n_owners)]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], places[i], i)):
        owner = min(range(n_owners), key=lambda o: (loads[o], places[i] not in has[o], o))
        owners[i] = owner
        loads[owner] += costs[i]
        has[owner].add(places[i])
    return owners

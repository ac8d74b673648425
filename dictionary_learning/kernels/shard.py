"""The latents of one SAE, split over a group of processes.

Every process has the same batch, a share of the latents (rows of encoder and decoder, biases, thresholds, counters)
and the whole of what is not per latent (b_dec).  Reconstructions and sums over latents are added up over the group;
after that, each process computes the same loss, and gradients of its own latents need nothing from the others.

B tokens, K candidates of a token, N latents' shares (processes of the group).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    """The sum over the group; the gradient of each term is that of the sum."""

    @staticmethod
    def forward(ctx, term: Tensor, group: Any) -> Tensor:
        total = term.to(torch.promote_types(term.dtype, torch.float32)) if term.is_floating_point() else term
        total = total.clone() if total is term else total
        dist.all_reduce(total, group=group)
        return total.to(term.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _Once(torch.autograd.Function):
    """Itself; of the gradient, the same on every process, a share, so that the shares add up to it."""

    @staticmethod
    def forward(ctx, value: Tensor, size: int) -> Tensor:
        ctx.size = size
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad / ctx.size, None


@dataclass(frozen=True)
class Shard:
    """This process's share of an SAE's latents: the `rank`-th of `size` equal runs of neighbours.

    The default is the only share: all latents, and no communication.
    """

    rank: int = 0
    size: int = 1
    group: Any = None  # of torch.distributed

    def sum(self, term: Tensor) -> Tensor:
        """The sum of the processes' terms; differentiable."""
        return term if self.size == 1 else _Sum.apply(term, self.group)  # pyright: ignore[reportReturnType]

    def once(self, value: Tensor) -> Tensor:
        """A replicated parameter, where every process uses it alike.

        Its gradient is then divided among them, and `sum` of the processes' gradients, as the optimiser takes it, is
        right for uses alike and for uses by a process's own latents.
        """
        return value if self.size == 1 else _Once.apply(value, self.size)  # pyright: ignore[reportReturnType]

    def min(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.MIN)

    def max(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value, operation, group=self.group)
        return value

    def gather(self, value: Tensor, dim: int = 0) -> Tensor:
        """The processes' tensors, all of one shape, joined along `dim`."""
        if self.size == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def cut(self, whole: Tensor, dim: int | None) -> Tensor:
        """This process's part of a tensor that has the latents along `dim`, in memory of its own."""
        if self.size == 1 or dim is None:
            return whole
        if whole.shape[dim] % self.size:
            raise ValueError(f"{whole.shape[dim]} latents cannot be split evenly over {self.size} processes.")
        part = whole.chunk(self.size, dim)[self.rank]
        return part.T.contiguous().T if dim == 1 else part.contiguous()  # a latent's row stays contiguous

    def largest_of_each_token(self, values_BK: Tensor, k: int) -> Tensor:
        """Bool (B, K): which of this process's candidates are among the k largest of each token over the group."""
        if self.size == 1:
            assert values_BK.shape[1] == k
            return torch.ones_like(values_BK, dtype=torch.bool)
        of_all = self.gather(values_BK, dim=1)
        chosen = torch.zeros_like(of_all, dtype=torch.bool).scatter_(1, of_all.topk(k, dim=1).indices, True)
        return chosen.chunk(self.size, 1)[self.rank]

    def largest_of_batch(self, values_n: Tensor, flat_n: Tensor, n: int) -> Tensor:
        """Bool (n,): which of this process's candidates, at most n of them, are among the n largest over the group.

        Among equals, those with the lowest `flat_n`, an index over the whole batch and all latents.
        """
        if self.size == 1:
            assert len(values_n) <= n
            return torch.ones_like(values_n, dtype=torch.bool)

        def of_all(x_n: Tensor, missing: float) -> Tensor:
            return self.gather(torch.cat([x_n, x_n.new_full((n - len(x_n),), missing)]))

        all_values = of_all(values_n, -torch.inf)
        threshold = all_values.topk(n, sorted=False).values.min()
        room = n - int((all_values > threshold).sum())
        tied = all_values == threshold
        keep_n = values_n >= threshold
        if int(tied.sum()) > room:
            last = of_all(flat_n, -1)[tied].sort().values[room - 1]
            keep_n &= (values_n > threshold) | (flat_n <= last)
        return keep_n


WHOLE = Shard()

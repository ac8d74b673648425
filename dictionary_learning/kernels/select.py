"""The encoder with the selection fused in: which (token, latent) pairs are chosen, and their pre-activations.

On the CPU the encoder runs in tiles that stay in the cache, and each tile leaves only its candidates: no B x F tensor
is ever written.  On other devices the tile is the whole batch.

B tokens, D activation_dim, F dict_size, N chosen pairs, K chosen of each token; a tile has b tokens, c latents and n
candidates, and M is the number of candidates of the token that has most; pre = (x - b_dec) E^T + bias.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from . import screen
from .backend import in_pieces, on_cpu, triton_ops
from .shard import WHOLE, Shard
from .sparse import Code, Features, dots, pre_activations

# Tall tiles make fast matmuls: on two cores at D 512 the product in tiles of 2048 x 1024 takes 0.85 of the time of the
# whole B x F product, in tiles of 256 x 16384 1.16 of it.  A tile of fp32 takes 8 MB of the cache.
TILE_TOKENS, TILE_ENTRIES = 2048, 2**21

Chosen = tuple[Tensor, Tensor, Tensor]  # pre_N, token_N, latent_N: ascending by token, and all but top-k's by latent


@dataclass
class Encoder:
    """The pre-activations of some tokens."""

    z_bD: Tensor
    weight_FD: Tensor
    bias_F: Tensor
    first_token: int = 0
    screened: bool = False  # tiles are in bf16

    @property
    def tiled(self) -> bool:
        return on_cpu(self.z_bD) and triton_ops() is None

    def blocks(self) -> Iterator["Encoder"]:
        """Of as many tokens as a tile has, one after another."""
        n = TILE_TOKENS if self.tiled else len(self.z_bD)
        for start in range(0, len(self.z_bD), n):
            yield replace(self, z_bD=self.z_bD[start : start + n], first_token=start)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(its latents, pre_bc) of one tile after another; the memory is used again."""
        n_tokens, dict_size = len(self.z_bD), len(self.weight_FD)
        width = max(1, TILE_ENTRIES // n_tokens) if self.tiled else dict_size
        z_bD = self.z_bD.to(torch.bfloat16) if self.screened else self.z_bD
        memory = z_bD.new_empty(n_tokens * min(width, dict_size))
        for first in range(0, dict_size, width):
            latents = slice(first, min(first + width, dict_size))
            pre_bc = memory[: n_tokens * (latents.stop - first)].view(n_tokens, -1)
            bias_c, weight_cD = self.bias_F[latents].to(z_bD.dtype), self.weight_FD[latents].to(z_bD.dtype)
            yield latents, torch.addmm(bias_c, z_bD, weight_cD.T, out=pre_bc)

    @cached_property
    def norm_b1(self) -> Tensor:
        return torch.linalg.vector_norm(self.z_bD, dim=1, keepdim=True)

    def slack_b1(self, latents: slice) -> Tensor:
        """How far below fp32's the pre-activations of a tile may lie, before they are rounded."""
        return screen.slack(self.norm_b1, self.weight_FD[latents], self.bias_F[latents])


@dataclass
class Candidates:
    """What the tiles of a block leave."""

    block: Encoder
    parts: list[Chosen] = field(default_factory=list)  # of each tile, tokens counted from the block's first
    counts: list[Tensor] = field(default_factory=list)  # of each tile, how many each token has there

    def add(self, pre_bc: Tensor, bound: Tensor | float, latents: slice, exactly: bool = True) -> None:
        """Those of a tile strictly above `bound`; where screened and not `exactly`, some that are not may be left."""
        block = self.block
        if block.screened:
            flat_n = _where(operator.ge, pre_bc, (bound - block.slack_b1(latents)).to(torch.bfloat16))
        else:
            flat_n = _where(operator.gt, pre_bc, bound)
        token_n = torch.div(flat_n, pre_bc.shape[1], rounding_mode="floor")
        latent_n = flat_n - token_n * pre_bc.shape[1]
        if block.screened:  # a tile's latents stay in the cache
            pre_n = dots(block.z_bD, token_n, block.weight_FD[latents], latent_n)
            pre_n += block.bias_F[latents].index_select(0, latent_n)
            if exactly:
                kept = _nonzero(pre_n > (bound.flatten().index_select(0, token_n) if _of_tokens(bound) else bound))
                pre_n, token_n, latent_n = (x_n.index_select(0, kept) for x_n in (pre_n, token_n, latent_n))
        else:
            pre_n = pre_bc.flatten().index_select(0, flat_n)
        self.parts.append((pre_n, token_n, latent_n.add_(latents.start)))
        self.counts.append(torch.bincount(token_n, minlength=len(pre_bc)))

    def _ranks(self) -> tuple[Tensor, Tensor]:
        """(rank_N of each among its token's candidates, counts_b of each token's)"""
        ranks, before_b = [], torch.zeros_like(self.counts[0])
        for (_, token_n, _), counts_b in zip(self.parts, self.counts, strict=True):
            # within a tile they ascend by token: each stands as far from its token's first as its rank says
            first_b = counts_b.cumsum(0) - counts_b
            offset_n = (before_b - first_b).index_select(0, token_n)
            ranks.append(torch.arange(len(token_n), device=token_n.device) + offset_n)
            before_b = before_b + counts_b
        return torch.cat(ranks), before_b

    def in_order(self) -> Chosen:
        """All of them, counted into place: a sort would take longer."""
        pre_N, token_N, latent_N = _joined(self.parts)
        if len(self.parts) > 1:
            rank_N, counts_b = self._ranks()
            place_N = (counts_b.cumsum(0) - counts_b).index_select(0, token_N) + rank_N
            columns = (pre_N, token_N, latent_N)
            pre_N, token_N, latent_N = (torch.empty_like(x_N).index_copy_(0, place_N, x_N) for x_N in columns)
        return pre_N, token_N + self.block.first_token, latent_N

    def largest_of_each_token(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(pre_bK, latent_bK, missing_r): the last are the tokens with fewer than k, whose rows mean nothing."""
        pre_N, token_N, latent_N = _joined(self.parts)
        rank_N, counts_b = self._ranks()
        shape = len(counts_b), max(k, int(counts_b.max()))
        place_N = token_N * shape[1] + rank_N
        pre_bM = pre_N.new_full(shape, -torch.inf)
        pre_bM.flatten().index_copy_(0, place_N, pre_N)
        latent_bM = latent_N.new_zeros(shape)
        latent_bM.flatten().index_copy_(0, place_N, latent_N)
        missing_r = _nonzero(counts_b < k)
        if len(missing_r):  # no two alike, which would all count as the k-th largest
            pre_bM[missing_r] = torch.arange(shape[1], dtype=pre_bM.dtype)
        pre_bK, column_bK = _topk_of_rows(pre_bM, k)
        return pre_bK, latent_bM.gather(1, column_bK), missing_r


def _joined(parts: list[Chosen]) -> Chosen:
    if len(parts) == 1:
        return parts[0]
    pre_N, token_N, latent_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return pre_N, token_N, latent_N


def _of_tokens(bound: Tensor | float) -> TypeGuard[Tensor]:
    """Whether a bound is one for each token, (b, 1)."""
    return isinstance(bound, Tensor) and bound.ndim == 2


# On the CPU these are numpy's, in a third of torch's time, and in pieces on the threads there are; and `index_select`
# takes half of the time of `[...]`.


def _array(values: Tensor) -> np.ndarray:
    """As numpy compares them.  It has no bf16; but as whole numbers the bits of positive ones have the same order, and
    negative ones are below them, which are all that is ever asked for by a bound that is not negative."""
    bits = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    return bits.detach().numpy()


def _where(compare: Callable[[Any, Any], Any], pre_bc: Tensor, bound: Tensor | float) -> Tensor:
    """The flat indices, ascending, of the values that compare so with the bound, `gt` or `ge`."""
    bound = torch.as_tensor(bound)
    halves = pre_bc.dtype == bound.dtype == torch.bfloat16
    if not on_cpu(pre_bc) or (halves and not bool((bound >= 0).all())):
        return _nonzero(compare(pre_bc, bound).flatten())
    if pre_bc.dtype == torch.bfloat16 and not halves:
        pre_bc = pre_bc.to(bound.dtype)
    values, bounds = _array(pre_bc), _array(bound)

    def of_rows(rows: slice) -> np.ndarray:
        found = _flatnonzero(compare(values[rows], bounds[rows] if bounds.ndim == 2 else bounds))
        found += rows.start * values.shape[1]
        return found

    found = in_pieces(of_rows, *values.shape)
    return torch.from_numpy(found[0] if len(found) == 1 else np.concatenate(found))


def _flatnonzero(chosen: np.ndarray) -> np.ndarray:
    """numpy's, of bools: eight at a time, and then of those eights alone that have a true one, in half of its time."""
    if chosen.size % 8 or chosen.size < 2**12:
        return np.flatnonzero(chosen)
    eights = chosen.reshape(-1).view(np.uint64)
    eight = np.flatnonzero(eights != 0)
    place = np.flatnonzero(eights[eight].view(np.bool_))
    return 8 * eight[place >> 3] + (place & 7)


def _nonzero(chosen_n: Tensor) -> Tensor:
    """The indices of the true ones."""
    if on_cpu(chosen_n):
        return torch.from_numpy(_flatnonzero(chosen_n.numpy()))
    return torch.nonzero(chosen_n).squeeze(1)


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """Of each row, on the CPU; of bf16 a positive one, or one that is not."""
    array, column = _array(values), values.shape[-1] - k
    if values.ndim == 1:
        return torch.from_numpy(np.partition(array, column)[column : column + 1]).view(values.dtype)[0]
    found = in_pieces(lambda rows: np.partition(array[rows], column)[:, column], *array.shape)
    return torch.from_numpy(np.concatenate(found)).view(values.dtype)


def _encode(
    x_BD: Tensor,
    encoder_FD: Tensor,
    bias_F: Tensor,
    b_dec_D: Tensor | None,
    shard: Shard,
    choose: Callable[[Encoder], Chosen],
    screened: bool = False,
) -> Features:
    device = x_BD.device
    if b_dec_D is None:
        b_dec_D = x_BD.new_zeros(x_BD.shape[1])
    with torch.no_grad():
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else encoder_FD.dtype
        with torch.autocast(device.type, enabled=False):
            z_BD = (x_BD - b_dec_D).to(dtype)
            encoder = Encoder(z_BD, encoder_FD.to(dtype), bias_F.to(dtype))
            encoder.screened = screened and encoder.tiled and dtype == torch.float32
            pre_N, token_N, latent_N = choose(encoder)
    code = Code(token_N, latent_N, len(x_BD), len(encoder_FD))
    return Features(pre_activations(pre_N, z_BD, encoder_FD, bias_F, b_dec_D, code), code, shard)


def encode_topk(
    x_BD: Tensor,
    encoder_FD: Tensor,
    bias_F: Tensor,
    b_dec_D: Tensor | None,
    k: int,
    shard: Shard = WHOLE,
    screened: bool = False,
) -> Features:
    """relu(pre) at the k largest of each token, N = B k; zeros may be among them.

    screened: products in bf16 tell out most pairs first, on the CPU in fp32; the result is the same.

    With a shard, `encoder_FD` and `bias_F` are its latents', the k largest are those of all latents, and N is what this
    process has of them.
    """

    def choose(encoder: Encoder) -> Chosen:
        chosen = _topk(encoder, min(k, len(encoder.weight_FD)))
        if shard.size == 1:
            return chosen
        values_BK = torch.relu(chosen[0]).view(len(x_BD), -1)
        return _taken(chosen, shard.largest_of_each_token(values_BK, k).flatten())

    features = _encode(x_BD, encoder_FD, bias_F, b_dec_D, shard, choose, screened)
    return replace(features, values=torch.relu(features.values))


def encode_above(
    x_BD: Tensor,
    encoder_FD: Tensor,
    bias_F: Tensor,
    b_dec_D: Tensor | None,
    bound: Tensor | float,
    shard: Shard = WHOLE,
) -> Features:
    """pre at every pair where it is above `bound`, a scalar or one value a latent.  b_dec None is one of zero."""
    return _encode(x_BD, encoder_FD, bias_F, b_dec_D, shard, lambda encoder: _above(encoder, bound))


def encode_batch_topk(
    x_BD: Tensor,
    encoder_FD: Tensor,
    bias_F: Tensor,
    b_dec_D: Tensor | None,
    n: int,
    guess: Tensor | None = None,
    shard: Shard = WHOLE,
    screened: bool = False,
) -> Features:
    """relu(pre) at the n largest of the whole batch; of equal ones the lowest (token, latent) wins.

    Values of zero contribute nothing and are left out, so N <= n.  `guess`, a scalar, may hold a value believed to lie
    below the n-th largest (last step's, say, times 0.95): a good one saves time, a bad one costs a second pass; the
    result never depends on it, since a bound that at least n values exceed cannot cut one of the n largest.
    With a shard, the n largest are those of all latents, and N is what this process has of them.
    screened: products in bf16 tell out most pairs first, on the CPU in fp32; the result is the same.
    """

    def choose(encoder: Encoder) -> Chosen:
        width = len(encoder.weight_FD)
        if encoder.tiled:
            chosen = _largest(_candidates(encoder, n, guess, shard), n)
        else:  # one radix select: no data-dependent shapes, no host sync
            ((_, pre_BF),) = encoder.tiles()
            pre_N, flat_N = _largest_of_all(pre_BF, min(n, pre_BF.numel()), guess)
            token_N = torch.div(flat_N, width, rounding_mode="floor")
            chosen = pre_N, token_N, flat_N - token_N * width
        if shard.size == 1:
            return chosen
        flat_N = (chosen[1] * shard.size + shard.rank) * width + chosen[2]  # over the whole batch and all latents
        return _taken(chosen, shard.largest_of_batch(chosen[0], flat_N, n))

    features = _encode(x_BD, encoder_FD, bias_F, b_dec_D, shard, choose, screened)
    return replace(features, values=torch.relu(features.values))


def _largest_of_all(pre_BF: Tensor, n: int, guess: Tensor | None) -> tuple[Tensor, Tensor]:
    """(relu(pre)_n, flat index_n) of the n largest, ascending by index."""
    if (kernels := triton_ops()) is not None:
        return kernels.select_batch_topk(pre_BF, n, guess)
    top = pre_BF.relu_().flatten().topk(n, sorted=False)
    flat_N, order = top.indices.sort()
    return top.values.index_select(0, order), flat_N


def _above(encoder: Encoder, bound: Tensor | float) -> Chosen:
    """The pairs strictly above `bound`."""
    parts = []
    for block in encoder.blocks():
        candidates = Candidates(block)
        for latents, pre_bc in block.tiles():
            of_tile = bound[latents] if isinstance(bound, Tensor) and bound.ndim else bound
            candidates.add(pre_bc, of_tile, latents)
        parts.append(candidates.in_order())
    return _joined(parts)


def _candidates(encoder: Encoder, n: int, guess: Tensor | None, shard: Shard) -> Chosen:
    """The pairs above a bound that n pairs of all latents exceed, or above 0 where fewer do."""
    bounds = _bounds(encoder, n / shard.size, guess)
    while True:
        bound = shard.min(next(bounds))  # one for all, or the count would prove nothing
        chosen = _above(encoder, bound)
        n_above = shard.sum(torch.tensor(len(chosen[0]), device=encoder.z_bD.device))
        if int(n_above) >= n or bound == 0:
            return chosen


def _bounds(encoder: Encoder, n: float, guess: Tensor | None) -> Iterator[Tensor]:
    """Bounds that n pairs may exceed, one below the other: the guess, then what a sample says, last 0."""
    if guess is not None:
        yield guess.clamp(min=0)
    _, pre_bc = next(next(encoder.blocks()).tiles())
    share = n * pre_bc.numel() / (len(encoder.z_bD) * len(encoder.weight_FD))
    for rank in (1.5 * share, 6 * share):
        rank = min(max(1, int(rank)), pre_bc.numel())
        yield _kth_largest(pre_bc.flatten(), rank).float().clamp(min=0)
    yield pre_bc.new_zeros((), dtype=torch.float32)


def _largest(chosen: Chosen, n: int) -> Chosen:
    """The n largest of the candidates, in the order they have; among equals the first."""
    pre_N = chosen[0]
    if len(pre_N) <= n:
        return chosen
    threshold = _kth_largest(pre_N, n)
    keep_N = pre_N > threshold
    ties = _nonzero(pre_N == threshold)
    keep_N[ties[: n - int(keep_N.sum())]] = True
    return _taken(chosen, keep_N)


def _taken(chosen: Chosen, keep_N: Tensor) -> Chosen:
    kept = _nonzero(keep_N)
    pre_N, token_N, latent_N = (x_N.index_select(0, kept) for x_N in chosen)
    return pre_N, token_N, latent_N


def _topk(encoder: Encoder, k: int) -> Chosen:
    """The k largest of each token, of relu(pre)."""
    parts = []
    for block in encoder.blocks():
        pre_bK, latent_bK = _topk_by_bound(block, k) if block.tiled else _topk_of_all(block, k)
        token_b = torch.arange(block.first_token, block.first_token + len(pre_bK), device=pre_bK.device)
        parts.append((pre_bK.flatten(), token_b.repeat_interleave(k), latent_bK.flatten()))
    return _joined(parts)


def _topk_by_bound(block: Encoder, k: int) -> tuple[Tensor, Tensor]:
    """(relu(pre)_bK, latent_bK), in one pass over the tiles.

    A token's first tile is a sample of its pre-activations, and one of the sample's large values a bound that probably,
    and for most tokens, k of all of them exceed; a bound that k exceed cannot cut one of the k largest.  Where fewer
    do, that token's are all looked at.
    """
    candidates, bound_b1, whole = Candidates(block), None, False
    for latents, pre_bc in block.tiles():
        if bound_b1 is None:
            whole = pre_bc.shape[1] == len(block.weight_FD)
            # twice as many as the sample's share of k, and some: 3 standard deviations if latents are alike
            rank = k if whole else 2 * k * pre_bc.shape[1] // len(block.weight_FD) + 4
            if whole and not block.screened:
                return _topk_of_rows(pre_bc, k)
            if 4 * rank > pre_bc.shape[1]:  # to look at all is cheaper
                return _topk_of_all(block, k)
            bound_b1 = _kth_largest(pre_bc, rank)[:, None].to(block.z_bD.dtype)
            if whole:  # k pairs in bf16 reach it, and so in fp32 what lies below it by their rounding and this one's
                bound_b1 = bound_b1 * (1 - 2 * screen.UNIT) - block.slack_b1(latents)
            bound_b1 = bound_b1.clamp(min=0)
        candidates.add(pre_bc, bound_b1, latents, exactly=not whole)
    pre_bK, latent_bK, missing_r = candidates.largest_of_each_token(k)
    if len(missing_r):
        pre_bK[missing_r], latent_bK[missing_r] = _topk_of_all(replace(block, z_bD=block.z_bD[missing_r]), k)
    return pre_bK, latent_bK


def _topk_of_all(block: Encoder, k: int) -> tuple[Tensor, Tensor]:
    """(relu(pre)_bK, latent_bK), from all F of each token, a few tokens at a time."""
    n = max(1, TILE_ENTRIES // len(block.weight_FD)) if block.tiled else len(block.z_bD)
    tops = (_topk_of_rows(torch.addmm(block.bias_F, z_bD, block.weight_FD.T), k) for z_bD in block.z_bD.split(n))
    values, indices = zip(*tops, strict=True)
    return torch.cat(values), torch.cat(indices)


def _topk_of_rows(pre_bc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(relu(pre)_bk, column_bk) of the k largest of each row."""
    if (kernels := triton_ops()) is not None:
        return kernels.select_topk(pre_bc, k)
    if on_cpu(pre_bc):  # nothing but ties makes more than k reach the k-th largest
        flat_n = _where(operator.ge, pre_bc, _kth_largest(pre_bc, k)[:, None])
        if len(flat_n) == len(pre_bc) * k:
            values_n = pre_bc.flatten().index_select(0, flat_n).relu_()
            return values_n.view(-1, k), (flat_n % pre_bc.shape[1]).view(-1, k)
    return pre_bc.relu_().topk(k, dim=1, sorted=False)

"""Triton kernels for the products of `sparse.py` and the selections of `select.py`; the optimiser's are `triton_adam`.

No function waits for the device, and all shapes follow from the shapes that go in, so a step made of them can be
captured in a CUDA graph.  Sums are fp32 and in a fixed order (the only atomics count integers): a run repeats bit for
bit.  A pointer that is None stands for an operand that is not wanted; Triton compiles its code away.

B tokens, D activation_dim, F dict_size, N chosen pairs, R rows decoded to (B, or B x groups for Matryoshka), I entries
or pairs that a program holds at a time.  Bytes are given as floors: what must be read from or written to memory once.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

# a kernel is not the Python function that a type checker takes it for
jit: Any = triton.jit
cdiv: Any = triton.cdiv
next_power_of_2: Any = triton.next_power_of_2

Args = ParamSpec("Args")
Result = TypeVar("Result")


def on_its_device(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Launches on the device of the first positional argument; Triton alone would take the current device."""

    @functools.wraps(function)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        with torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return call


# -- embedding bags: decode and both backward passes

# A latent that fires on every token must not keep one program busy for longer than the rest of the grid takes.  Of each
# bag, the chunks of this many pairs that lie whole in it are added up by programs of their own, in a launch before, so
# that a bag's own program is left with fewer than two chunks of pairs and one partial sum a chunk.
CHUNK = 64


@jit
def _bags_kernel(
    weight_ptr,  # (N,)
    source_ptr,  # (., D): the rows that are added up
    row_ptr,  # (N,): which of them a pair takes
    order_ptr,  # (N,): the pairs sorted by bag; None: they are
    offsets_ptr,  # (bags,): where each bag begins in that order
    table_ptr,  # (bags, D): its products with the source rows are wanted too
    partial_ptr,  # fp32 (chunks, D)
    partial_weight_ptr,  # fp32 (chunks,)
    sum_ptr,  # (bags, D)
    weight_sum_ptr,  # (bags,)
    dot_ptr,  # fp32 (N, blocks of columns)
    n_pairs,
    n_bags,
    D,
    CHUNK: tl.constexpr,  # 0: bags are not split
    OF_CHUNKS: tl.constexpr,  # a program is one chunk that lies whole in a bag; else a bag without such chunks
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    block, n_blocks = tl.program_id(1), tl.num_programs(1)
    d_D = block * BLOCK_D + tl.arange(0, BLOCK_D)
    bag = program
    if OF_CHUNKS:  # the last bag that does not begin after the chunk
        bag, beyond = program * 0, program * 0 + n_bags
        while bag + 1 < beyond:
            middle = (bag + beyond) // 2
            before = tl.load(offsets_ptr + middle) <= program * CHUNK
            bag, beyond = tl.where(before, middle, bag), tl.where(before, beyond, middle)
    begin = tl.load(offsets_ptr + bag).to(tl.int64)
    end = tl.load(offsets_ptr + bag + 1, mask=bag + 1 < n_bags, other=n_pairs).to(tl.int64)
    gap, gap_length = end, end * 0  # what other programs have added up
    whole = end >= (program + 1) * CHUNK  # of a chunk; its first pair is in the bag
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    weight_sum = 0.0
    if OF_CHUNKS:
        begin = program * CHUNK
        end = tl.where(whole, begin + CHUNK, begin)
    elif CHUNK > 0:
        first_chunk = tl.cdiv(begin, CHUNK)
        last_chunk = tl.maximum(end // CHUNK, first_chunk)
        gap, gap_length = first_chunk * CHUNK, (last_chunk - first_chunk) * CHUNK
        for chunk in range(first_chunk, last_chunk):
            sum_D += tl.load(partial_ptr + chunk * D + d_D, mask=d_D < D, other=0)
            if weight_sum_ptr is not None:
                weight_sum += tl.load(partial_weight_ptr + chunk)
    if table_ptr is not None:
        table_D = tl.load(table_ptr + bag * D + d_D, mask=d_D < D, other=0).to(tl.float32)

    for first in range(begin, end - gap_length, PAIRS):
        i_I = first + tl.arange(0, PAIRS)
        live_I = i_I < end - gap_length
        i_I += tl.where(i_I >= gap, gap_length, 0)
        n_I = i_I if order_ptr is None else tl.load(order_ptr + i_I, mask=live_I, other=0).to(tl.int64)
        row_I = tl.load(row_ptr + n_I, mask=live_I, other=0).to(tl.int64)
        weight_I = tl.load(weight_ptr + n_I, mask=live_I, other=0).to(tl.float32)
        live_ID = live_I[:, None] & (d_D < D)[None, :]
        source_ID = tl.load(source_ptr + row_I[:, None] * D + d_D[None, :], mask=live_ID, other=0).to(tl.float32)
        sum_D += tl.sum(weight_I[:, None] * source_ID, axis=0)
        if weight_sum_ptr is not None:
            weight_sum += tl.sum(weight_I, axis=0)
        if table_ptr is not None:
            tl.store(dot_ptr + n_I * n_blocks + block, tl.sum(source_ID * table_D[None, :], axis=1), mask=live_I)

    if OF_CHUNKS:
        tl.store(partial_ptr + program * D + d_D, sum_D, mask=(d_D < D) & whole)
        if weight_sum_ptr is not None:
            tl.store(partial_weight_ptr + program, weight_sum, mask=(block == 0) & whole)
    else:
        tl.store(sum_ptr + bag * D + d_D, sum_D, mask=d_D < D)
        if weight_sum_ptr is not None:
            tl.store(weight_sum_ptr + bag, weight_sum, mask=block == 0)


def _bags(
    weight_N: Tensor,
    source: Tensor,
    row_N: Tensor,
    order_N: Tensor | None,
    offsets: Tensor,
    sums: Tensor,
    *,
    weight_sums: Tensor | None = None,
    table: Tensor | None = None,
    chunk: int,
    pairs: int,
    block_d: int,
) -> Tensor | None:
    """Writes every bag's sums; returns the pairs' products with the rows of `table`, fp32 (N, blocks of columns).

    A warp owns up to 512 columns, 16 a lane in loads of 16 bytes, and takes `pairs` rows at a time: the sum over pairs
    stays in a lane's registers, and a product costs shuffles.  Programs are small because a short bag spends its time
    in a chain of dependent loads (offset, order, row, data), so that many chains must be in flight.  D is cut into
    blocks rather than padded to a power of two; then it has no bound, and the parts of a product are added afterwards.
    """
    assert source.is_contiguous() and (table is None or table.is_contiguous())
    n_pairs, width = len(weight_N), source.shape[1]
    block_d = min(next_power_of_2(width), block_d)
    n_blocks, n_chunks = cdiv(width, block_d), n_pairs // chunk if chunk else 0
    partials = sums.new_empty(n_chunks, width, dtype=torch.float32)
    partial_weights = None if weight_sums is None else weight_sums.new_empty(n_chunks)
    dots = None if table is None else sums.new_empty(n_pairs, n_blocks, dtype=torch.float32)
    for n_programs, of_chunks in ((n_chunks, True), (len(offsets), False)):
        if n_programs:
            _bags_kernel[(n_programs, n_blocks)](
                *(weight_N, source, row_N, order_N, offsets, table, partials, partial_weights, sums, weight_sums, dots),
                *(n_pairs, len(offsets), width),
                CHUNK=chunk,
                OF_CHUNKS=of_chunks,
                PAIRS=pairs,
                BLOCK_D=block_d,
                num_warps=max(1, block_d // 512),
            )
    return dots


@on_its_device
def decode(latent_N: Tensor, table_FD: Tensor, offsets_R: Tensor, values_N: Tensor) -> Tensor:
    """x_hat_RD = sum of v w_f over the pairs of each row, offsets_R[r] to offsets_R[r + 1] (the last to N).

    Reads N rows of the table, of which F D come from memory and the rest from the L2 cache: programs run through all
    rows for one block of columns after another, and a block of 256 (8 MB in bf16 for F = 16384) stays in the cache
    where the whole table would not.  A warp has 8 rows of its block in flight.  Bags are not split: a token has k pairs
    or a few times as many.
    """
    x_hat_RD = table_FD.new_empty(len(offsets_R), table_FD.shape[1])
    _bags(values_N, table_FD, latent_N, None, offsets_R, x_hat_RD, chunk=0, pairs=8, block_d=256)
    return x_hat_RD


@on_its_device
def decoder_backward(
    values_N: Tensor, table_FD: Tensor, grad_RD: Tensor, row_N: Tensor, order_N: Tensor, offsets_F: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `decode`: (dv_N = <G_row, w_f> in the dtype of the values, dW_FD = sum of v G_row in fp32).

    order_N sorts the pairs by latent, offsets_F says where each latent's begin.  A latent's program walks its pairs
    once, with its columns of w_f in registers: reads W once, writes dW (4 F D bytes), and takes N rows of G, which the
    L2 cache holds.
    """
    grad_table_FD = torch.empty_like(table_FD, dtype=torch.float32, memory_format=torch.contiguous_format)
    dots = _bags(
        *(values_N, grad_RD, row_N, order_N, offsets_F, grad_table_FD),
        table=table_FD,
        chunk=CHUNK,
        pairs=4,
        block_d=1024,
    )
    assert dots is not None
    return dots.sum(1).to(values_N.dtype), grad_table_FD


@on_its_device
def encoder_backward(
    grad_N: Tensor, z_BD: Tensor, token_N: Tensor, order_N: Tensor, offsets_F: Tensor
) -> tuple[Tensor, Tensor]:
    """(dE_FD = sum of g z_token, dc_F = sum of g), both in fp32, over the pairs of each latent.

    Writes 4 F D bytes and takes N rows of z, which the L2 cache holds.
    """
    grad_encoder_FD = z_BD.new_empty(len(offsets_F), z_BD.shape[1], dtype=torch.float32)
    grad_bias_F = z_BD.new_empty(len(offsets_F), dtype=torch.float32)
    _bags(
        *(grad_N, z_BD, token_N, order_N, offsets_F, grad_encoder_FD),
        weight_sums=grad_bias_F,
        chunk=CHUNK,
        pairs=4,
        block_d=1024,
    )
    return grad_encoder_FD, grad_bias_F


# -- selection

# Both selections read pre once and choose short groups of neighbouring entries by their largest one, then entries of
# those groups: to rank an entry and move it to its place costs far more than to read it.


@jit
def _key(x):
    """int32 that orders like relu(x) and is its bits in fp32; NaN stands above all, as it does in torch.topk."""
    x = x.to(tl.float32)
    return tl.where(x != x, 0x7FC00000, tl.where(x > 0, x.to(tl.int32, bitcast=True), 0))


@jit
def _keys(pre_ptr, group_I, live_I, n_entries, GROUP: tl.constexpr):
    """(index_IG, key_IG) of groups of entries; the key is -1 where there is no entry."""
    index_IG = group_I[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live_IG = live_I[:, None] & (index_IG < n_entries)
    return index_IG, tl.where(live_IG, _key(tl.load(pre_ptr + index_IG, mask=live_IG, other=0)), -1)


ROW_GROUP = 8
ROW_PART = 16384  # entries that one program takes groups from, 64 a thread: only their maxima stay in registers


@jit
def _topk_kernel(
    pre_ptr,  # (rows, F)
    groups_ptr,  # (rows, n_groups): the groups whose entries are chosen from; None: all
    values_ptr,  # (rows, k); None: groups are chosen, not entries
    index_ptr,  # (rows, parts, k)
    F,
    n_groups,
    k,
    LAST_BIT: tl.constexpr,  # where keys end
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # a part
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group_I = part * GROUPS + tl.arange(0, GROUPS)
    live_I = group_I < n_groups
    if groups_ptr is not None:
        group_I = tl.load(groups_ptr + row * n_groups + group_I, mask=live_I, other=0)
    index_IG, key_IG = _keys(pre_ptr + row * F, group_I, live_I, F, GROUP)
    if values_ptr is None:
        index_I, key_I = group_I, tl.max(key_IG, axis=1)
    else:
        index_I, key_I = tl.reshape(index_IG, [GROUPS * GROUP]), tl.reshape(key_IG, [GROUPS * GROUP])
    # the k-th largest key, bit by bit; once exactly k keys reach the bound, lower bits cannot change the choice
    bound, reached, bit = 0, k - 1, 31
    while (bit > LAST_BIT) & (reached != k):
        bit -= 1
        trial = bound | (1 << bit)
        n_trial = tl.sum((key_I >= trial).to(tl.int32), axis=0)
        bound = tl.where(n_trial >= k, trial, bound)
        reached = tl.where(n_trial >= k, n_trial, reached)
    ties = k - tl.sum((key_I > bound).to(tl.int32), axis=0)
    chosen_I = (key_I > bound) | ((key_I == bound) & (tl.cumsum((key_I == bound).to(tl.int32)) <= ties))
    at_I = tl.cumsum(chosen_I.to(tl.int32)) - 1
    first = (row * tl.num_programs(1) + part) * k
    tl.store(index_ptr + first + at_I, index_I, mask=chosen_I)
    if values_ptr is not None:
        tl.store(values_ptr + first + at_I, key_I.to(tl.float32, bitcast=True), mask=chosen_I)


@on_its_device
def select_topk(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values_BK, index_BK int64): relu(pre) at the k largest of each row, of equal ones those of the lowest index, in
    ascending order of index.  Reads pre once.

    A program holds its entries in registers and finds the k-th largest bit pattern by counting: two operations an entry
    and bit, for 15 bits in bf16 and 31 in fp32, fewer where k entries stand out early.  (Histograms of digits take
    fewer rounds, but some 90 operations an entry each.)  In long rows it first counts groups of 8: the k largest
    entries lie in the k groups with the largest maxima, since k maxima come before each entry of any other group (and
    of equal ones too, as groups are contiguous).  In rows longer than a part, it takes k groups of each part.
    """
    n_rows, width = pre_BF.shape
    assert 0 < k <= width
    pre_BF, groups = pre_BF.contiguous(), None
    values_BK, index_BK = pre_BF.new_empty(n_rows, k), pre_BF.new_empty(n_rows, k, dtype=torch.int64)
    last_bit = 16 if pre_BF.dtype == torch.bfloat16 else 0
    n_groups, part = cdiv(width, ROW_GROUP), ROW_PART // ROW_GROUP
    parts = cdiv(n_groups, part)
    # short rows are done at once, and so, slowly, is a long row of which k groups would be no small share
    if 4 * width > ROW_PART and 2 * parts * k <= n_groups and k <= n_groups - (parts - 1) * part:
        groups = pre_BF.new_empty(n_rows, parts * k, dtype=torch.int32)
        _topk_kernel[(n_rows, parts)](
            *(pre_BF, None, None, groups, width, n_groups, k),
            LAST_BIT=last_bit,
            GROUP=ROW_GROUP,
            GROUPS=part,
            num_warps=max(1, ROW_PART // 2048),
        )
        n_groups = parts * k
    n_held = next_power_of_2(n_groups)
    _topk_kernel[(n_rows, 1)](
        *(pre_BF, groups, values_BK, index_BK, width, n_groups, k),
        LAST_BIT=last_bit,
        GROUP=ROW_GROUP,
        GROUPS=n_held,
        num_warps=min(max(n_held * ROW_GROUP // 512, 1), 32),
    )
    return values_BK, index_BK


BLOCK = 8192  # entries that one program filters, 32 a thread: 64 bytes or more in flight
POOL = 4  # groups in the pool for each entry wanted: of a normal sample, 2 to 4 times n exceed 0.9 of the n-th largest
TILE = 256  # entries that one warp ranks at a time: a block has some 50 groups of 4 or 8 in the pool
HISTOGRAM_TILE = 2048  # entries counted at a time, 8 a thread
HISTOGRAM_PROGRAMS = 1024  # 8 a multiprocessor; each adds its counts to the common ones once


@jit
def _filter_kernel(
    pre_ptr,
    guess_ptr,
    pool_ptr,
    base_ptr,  # (blocks,): where each block's groups begin in the pool
    count_ptr,  # (blocks,): how many they are
    state_ptr,  # begins with the number of groups in the pool, and of entries above the guess
    n_entries,
    pool_size,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Puts the groups with an entry above the guess into the pool: a block's in order, blocks as they come."""
    block, guess = tl.program_id(0), tl.load(guess_ptr)
    group_I = block * GROUPS + tl.arange(0, GROUPS)
    index_IG = group_I[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pre_IG = tl.load(pre_ptr + index_IG, mask=index_IG < n_entries, other=0).to(tl.float32)
    above_IG = (pre_IG <= tl.where(guess > 0, guess, 0)) == 0  # true for NaN
    above_I = tl.sum(above_IG.to(tl.int32), axis=1)
    hot_I = (above_I > 0).to(tl.int32)
    count = tl.sum(hot_I, axis=0)
    tl.atomic_add(state_ptr + 1, tl.sum(above_I, axis=0), sem="relaxed")
    base = tl.atomic_add(state_ptr, count, sem="relaxed")
    at_I = base + tl.cumsum(hot_I) - 1
    tl.store(pool_ptr + at_I, group_I, mask=(hot_I == 1) & (at_I < pool_size))
    tl.store(base_ptr + block, base)
    tl.store(count_ptr + block, count)


@jit
def _descend(histogram_ptr, state_ptr, n, DIGITS: tl.constexpr):
    """(the first DIGITS digits of the n-th largest key, its rank among the keys that begin with them)

    Every program works it out from what the last launch counted; the first one leaves it to the next launch.
    """
    prefix, rank = n * 0, n
    if DIGITS > 0:
        prefix, rank = tl.load(state_ptr + 2 * DIGITS), tl.load(state_ptr + 2 * DIGITS + 1)
        digit_I = 255 - tl.arange(0, 256)
        count_I = tl.load(histogram_ptr + (DIGITS - 1) * 256 + digit_I)
        larger_I = tl.cumsum(count_I) < rank
        prefix = prefix * 256 + 255 - tl.sum(larger_I.to(tl.int32), axis=0)
        rank -= tl.sum(tl.where(larger_I, count_I, 0), axis=0)
    if tl.program_id(0) == 0:
        tl.store(state_ptr + 2 * DIGITS + 2, prefix)
        tl.store(state_ptr + 2 * DIGITS + 3, rank)
    return prefix, rank


@jit
def _histogram_kernel(
    pre_ptr,
    pool_ptr,
    histogram_ptr,
    state_ptr,
    n_entries,
    pool_size,
    n,
    DIGITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Counts the next digit of the keys that begin as the n-th largest does."""
    prefix, _rank = _descend(histogram_ptr, state_ptr, n, DIGITS)
    n_pooled = tl.load(state_ptr)
    from_pool = (tl.load(state_ptr + 1) >= n) & (n_pooled <= pool_size)
    n_groups = tl.where(from_pool, n_pooled, tl.cdiv(n_entries, GROUP))
    counts_I = tl.zeros([256], tl.int32)
    for first in range(tl.program_id(0) * GROUPS, n_groups, tl.num_programs(0) * GROUPS):
        i_I = first + tl.arange(0, GROUPS)
        group_I = tl.load(pool_ptr + i_I, mask=(i_I < n_groups) & from_pool, other=i_I)
        _index_IG, key_IG = _keys(pre_ptr, group_I, i_I < n_groups, n_entries, GROUP)
        key_I = tl.reshape(key_IG, [GROUPS * GROUP], can_reorder=True)
        counted_I = (key_I >> (32 - 8 * DIGITS)) == prefix if DIGITS > 0 else key_I >= 0
        counts_I += tl.histogram((key_I >> (24 - 8 * DIGITS)) & 255, 256, mask=counted_I)
    tl.atomic_add(histogram_ptr + DIGITS * 256 + tl.arange(0, 256), counts_I, mask=counts_I > 0, sem="relaxed")


@jit
def _place_kernel(
    pre_ptr,
    pool_ptr,
    base_ptr,
    count_ptr,
    histogram_ptr,
    state_ptr,
    ranks_ptr,  # (2, blocks): entries above and at the threshold, in each block or (WRITE) up to its end
    values_ptr,  # (n,)
    flat_ptr,  # (n,)
    n_entries,
    pool_size,
    n,
    DIGITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # a tile
    BLOCK_GROUPS: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Counts, or writes, a block's share of the n largest."""
    prefix, ties = _descend(histogram_ptr, state_ptr, n, DIGITS)
    threshold = prefix << (32 - 8 * DIGITS)
    from_pool = (tl.load(state_ptr + 1) >= n) & (tl.load(state_ptr) <= pool_size)
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    base = tl.load(base_ptr + block, mask=from_pool, other=0)
    n_groups = tl.load(count_ptr + block, mask=from_pool, other=BLOCK_GROUPS)
    n_above, n_equal = n * 0, n * 0
    if WRITE:
        n_above = tl.load(ranks_ptr + block - 1, mask=block > 0, other=0)
        n_equal = tl.load(ranks_ptr + n_blocks + block - 1, mask=block > 0, other=0)
    for first in range(0, n_groups, GROUPS):
        i_I = first + tl.arange(0, GROUPS)
        live_I = i_I < n_groups
        group_I = tl.load(pool_ptr + base + i_I, mask=live_I & from_pool, other=block * BLOCK_GROUPS + i_I)
        index_IG, key_IG = _keys(pre_ptr, group_I, live_I, n_entries, GROUP)
        index_I, key_I = tl.reshape(index_IG, [GROUPS * GROUP]), tl.reshape(key_IG, [GROUPS * GROUP])
        above_I, equal_I = (key_I > threshold).to(tl.int32), (key_I == threshold).to(tl.int32)
        if WRITE:
            equal_before_I = n_equal + tl.cumsum(equal_I) - equal_I
            chosen_I = (above_I == 1) | ((equal_I == 1) & (equal_before_I < ties))
            at_I = n_above + tl.cumsum(above_I) - above_I + tl.minimum(equal_before_I, ties)
            tl.store(values_ptr + at_I, key_I.to(tl.float32, bitcast=True), mask=chosen_I)
            tl.store(flat_ptr + at_I, index_I, mask=chosen_I)
        n_above += tl.sum(above_I, axis=0)
        n_equal += tl.sum(equal_I, axis=0)
    if not WRITE:
        tl.store(ranks_ptr + block, n_above)
        tl.store(ranks_ptr + n_blocks + block, n_equal)


@on_its_device
def select_batch_topk(pre_BF: Tensor, n: int, guess: Tensor | None) -> tuple[Tensor, Tensor]:
    """(values_n, flat_n int64): relu(pre) at the n largest of the whole batch, of equal ones those of the lowest flat
    index, in ascending order of flat index; zeros fill up where fewer than n entries are positive.

    `guess`, a scalar, is a value believed to lie below the n-th largest; the result does not depend on it.  Groups of
    16 bytes with an entry above it go to a pool, in which a radix select finds the n-th largest key, 8 bits a launch.
    If fewer than n entries are above it, or more groups than the pool takes, and without a guess, the same launches go
    through all groups instead: the device decides.  Reads pre once (134 MB in fp32, 67 MB in bf16 for B 2048, F 16384)
    and then the pool's groups, a few percent of it, from the L2 cache; without a good guess 6 times more in fp32, 4
    times in bf16.
    """
    pre_BF = pre_BF.contiguous()
    n_entries = pre_BF.numel()
    assert n <= n_entries <= 2**31 - BLOCK  # indices and counts are int32
    values_n, flat_n = pre_BF.new_empty(n), pre_BF.new_empty(n, dtype=torch.int64)
    if n == 0:
        return values_n, flat_n
    n_digits, group = 2 if pre_BF.dtype == torch.bfloat16 else 4, 16 // pre_BF.element_size()
    n_blocks, pool_size = cdiv(n_entries, BLOCK), min(POOL * n, cdiv(n_entries, group))
    pool, bases, counts = (pre_BF.new_empty(size, dtype=torch.int32) for size in (pool_size, n_blocks, n_blocks))
    histograms = pre_BF.new_zeros(n_digits + 1, 256, dtype=torch.int32)
    ranks, state = pre_BF.new_empty(2, n_blocks, dtype=torch.int32), histograms[n_digits]
    sizes = (n_entries, pool_size)
    if guess is not None:
        _filter_kernel[(n_blocks,)](
            *(pre_BF, guess, pool, bases, counts, state, *sizes), GROUP=group, GROUPS=BLOCK // group, num_warps=8
        )
    for digits in range(n_digits):
        _histogram_kernel[(min(cdiv(n_entries, HISTOGRAM_TILE), HISTOGRAM_PROGRAMS),)](
            *(pre_BF, pool, histograms, state, *sizes, n),
            DIGITS=digits,
            GROUP=group,
            GROUPS=HISTOGRAM_TILE // group,
            num_warps=8,
        )
    for write in (False, True):
        _place_kernel[(n_blocks,)](
            *(pre_BF, pool, bases, counts, histograms, state, ranks, values_n, flat_n, *sizes, n),
            DIGITS=n_digits,
            GROUP=group,
            GROUPS=TILE // group,
            BLOCK_GROUPS=BLOCK // group,
            WRITE=write,
            num_warps=1,
        )
        if not write:
            ranks = ranks.cumsum(1, dtype=torch.int32)
    return values_n, flat_n

"""The encoder with the selection fused in: which (token, latent) pairs are chosen, and their pre-activations.

On the CPU the encoder runs in chunks of tokens that stay in the cache, and each chunk leaves only its candidates: no
B x F tensor is ever written.  On other devices the chunk is the whole batch.

B tokens, D activation_dim, F dict_size, N chosen pairs; pre = (x - b_dec) E^T + c.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .sparse import Code, Features, pre_activations

CHUNK_ENTRIES = 2**22  # of fp32: 16 MB, half of a common last-level cache

Chunks = Callable[[], Iterator[tuple[int, Tensor]]]


def _pre_chunks(z_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first token, pre_bF) of one chunk of tokens after another; the memory is used again."""
    n_tokens, dict_size = len(z_BD), len(encoder_FD)
    rows = max(1, CHUNK_ENTRIES // dict_size) if z_BD.device.type == "cpu" else n_tokens
    buffer = z_BD.new_empty(min(rows, n_tokens), dict_size)
    bias_F = bias_F.to(z_BD.dtype)
    for start in range(0, n_tokens, rows):
        z_bD = z_BD[start : start + rows]
        yield start, torch.addmm(bias_F, z_bD, encoder_FD.T, out=buffer[: len(z_bD)])


def _encode(
    x_BD: Tensor,
    encoder_FD: Tensor,
    bias_F: Tensor,
    b_dec_D: Tensor | None,
    choose: Callable[[Chunks], tuple[Tensor, Tensor]],
) -> Features:
    """The pairs that `choose` makes of the chunks (their pre-activations and flat indices, ascending by token)."""
    device, dict_size = x_BD.device, len(encoder_FD)
    if b_dec_D is None:
        b_dec_D = x_BD.new_zeros(x_BD.shape[1])
    with torch.no_grad():
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else encoder_FD.dtype
        with torch.autocast(device.type, enabled=False):
            z_BD, weight_FD = (x_BD - b_dec_D).to(dtype), encoder_FD.to(dtype)
            pre_N, flat_N = choose(lambda: _pre_chunks(z_BD, weight_FD, bias_F))
    token_N = torch.div(flat_N, dict_size, rounding_mode="floor")
    code = Code(token_N, flat_N - token_N * dict_size, len(x_BD), dict_size)
    return Features(pre_activations(pre_N, z_BD, encoder_FD, bias_F, b_dec_D, code), code)


def encode_topk(x_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor, b_dec_D: Tensor, k: int) -> Features:
    """relu(pre) at the k largest of each token, N = B k; zeros may be among them."""

    def choose(chunks: Chunks) -> tuple[Tensor, Tensor]:
        values, flat = [], []
        for start, pre_bF in chunks():
            top = pre_bF.relu_().topk(k, dim=1, sorted=False)
            first_of_row = torch.arange(start, start + len(pre_bF), device=pre_bF.device) * pre_bF.shape[1]
            values.append(top.values.flatten())
            flat.append((top.indices + first_of_row[:, None]).flatten())
        return torch.cat(values), torch.cat(flat)

    features = _encode(x_BD, encoder_FD, bias_F, b_dec_D, choose)
    return Features(torch.relu(features.values), features.code)


def encode_above(
    x_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor, b_dec_D: Tensor | None, bound: Tensor | float
) -> Features:
    """pre at every pair where it is above `bound`, a scalar or one value a latent.  b_dec None is one of zero."""
    return _encode(x_BD, encoder_FD, bias_F, b_dec_D, lambda chunks: _above(chunks, bound))


def encode_batch_topk(
    x_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor, b_dec_D: Tensor, n: int, guess: Tensor | None = None
) -> Features:
    """relu(pre) at the n largest of the whole batch; of equal ones the lowest flat index wins.

    Values of zero contribute nothing and are left out, so N <= n.  `guess`, a scalar, may hold a value believed to lie
    below the n-th largest (last step's, say, times 0.9): a good one saves time, a bad one costs a second pass; the
    result never depends on it, since a bound that at least n values exceed cannot cut one of the n largest.
    """

    def choose(chunks: Chunks) -> tuple[Tensor, Tensor]:
        if x_BD.device.type != "cpu":  # one radix select: no data-dependent shapes, no host sync
            ((_, pre_BF),) = chunks()
            top = pre_BF.relu_().flatten().topk(n, sorted=False)
            flat_N, order = top.indices.sort()
            return top.values[order], flat_N
        values_N, flat_N = _above(chunks, 0.0 if guess is None else guess.clamp(min=0))
        if guess is not None and len(values_N) < n:
            values_N, flat_N = _above(chunks, 0.0)
        return _largest(values_N, flat_N, n)

    features = _encode(x_BD, encoder_FD, bias_F, b_dec_D, choose)
    return Features(torch.relu(features.values), features.code)


def _above(chunks: Chunks, bound: Tensor | float) -> tuple[Tensor, Tensor]:
    """Values strictly above `bound` and their flat indices, ascending."""
    values, flat = [], []
    for start, pre_bF in chunks():
        index = torch.nonzero((pre_bF > bound).flatten()).squeeze(1)
        values.append(pre_bF.flatten()[index])
        flat.append(index + start * pre_bF.shape[1])
    return torch.cat(values), torch.cat(flat)


def _largest(values_N: Tensor, flat_N: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of the candidates, still in ascending order of index; among equals the first."""
    if len(values_N) <= n:
        return values_N, flat_N
    threshold = values_N.topk(n, sorted=False).values.min()
    keep_N = values_N > threshold
    ties = torch.nonzero(values_N == threshold).squeeze(1)
    keep_N[ties[: n - int(keep_N.sum())]] = True
    return values_N[keep_N], flat_N[keep_N]
